# SPDX-License-Identifier: Apache-2.0
"""The shipped student on fresh renders: a small sample of the benchmark whose numbers are in docs/results.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from ukd_ros.config import load_config
from ukd_ros.data.render_dataset import MeshSource, render_dataset
from ukd_ros.data.scenes import SceneConfig
from ukd_ros.distillation.error_model import PARTS
from ukd_ros.distillation.evaluate import evaluate_model

IMAGES = 36
SEED = 77_001  # never trained or calibrated on


@pytest.mark.slow
def test_coverage_and_accuracy_on_scenes_never_seen(repo_root: Path, tmp_path: Path) -> None:
    """About 80 answers: the share inside 95 % ellipsoids stays within three standard errors of 92 to 98 %."""
    config = load_config(SceneConfig, repo_root / "config" / "render_demo.yaml")
    data = render_dataset(config, [MeshSource("demo")], tmp_path / "data", IMAGES, SEED, workers=2, progress=False)
    report = evaluate_model(repo_root / "models" / "spray_bottle", data, progress=False)
    answered = report.checks["joint"].poses
    assert report.overall.targets > 80 and answered > 0.55 * report.overall.targets
    assert report.overall.add_recall > 0.15 and report.overall.translation_mm < 40.0
    assert report.false_alarms <= 3
    slack = 3.0 * (0.05 / answered) ** 0.5
    for part in PARTS:
        share = report.checks["joint"].coverage[part][0.95]
        assert 0.92 - slack <= share <= 1.0, f"{part}: {share:.3f} of {answered}"
    # Sharp as well: a covariance that covers by being huge would not pass.
    assert report.checks["joint"].sigma_rotation_deg < 10.0 and report.checks["joint"].sigma_xy_mm < 20.0
