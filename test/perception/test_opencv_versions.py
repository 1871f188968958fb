# SPDX-License-Identifier: Apache-2.0
"""The distributions' OpenCV (4.5 on Humble, 4.6 on Jazzy) gives torch's votes for every kind of architecture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from perception.exported_models import SMALL, lively_network, objects

from ukd_ros.distillation.export import ExportOptions, example_images, export_model, torch_votes

NETWORKS = (("lean", 1), ("lean", 2), ("darknet_tiny_h", 2), ("darknet53", 1))
SCRIPT = Path(__file__).with_name("opencv_versions.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of exported models with torch's votes beside them."""
    root = tmp_path_factory.mktemp("models")
    for architecture, classes in NETWORKS:
        network = lively_network(architecture, classes)
        name = f"{architecture}_{classes}"
        options: ExportOptions = SMALL
        report = export_model(network, objects(classes, 5), root / name, options)
        # What was exported are the weights rounded to float16: compare with those.
        rounded = lively_network(architecture, classes)
        for parameter in rounded.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.half().float()
        for graph, spec in report.bundle.graphs.items():
            image = example_images(spec.width, spec.height)[0]
            votes = torch_votes(rounded, image)
            np.savez(root / f"{name}_{graph}.npz", image=image, score=votes.score, xy=votes.xy, scale=votes.scale)
    return root


def run(python: Path | str, folder: Path, repo_root: Path) -> subprocess.CompletedProcess[str]:
    """Run the comparison with an interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(repo_root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(python), str(SCRIPT), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("version", ["4.5", "4.6"])
def test_old_opencv_gives_torchs_votes(version: str, folder: Path, repo_root: Path) -> None:
    python = repo_root / f".venv-opencv-{version}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment with OpenCV {version}: make test-opencv makes it")
    done = run(python, folder, repo_root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"{version}.") >= 2 * len(NETWORKS)


def test_this_opencv_gives_torchs_votes_and_a_wrong_one_is_noticed(folder: Path, repo_root: Path) -> None:
    done = run(sys.executable, folder, repo_root)
    assert done.returncode == 0, done.stdout + done.stderr
    path = folder / "lean_1_zoom.npz"
    stored = dict(np.load(path))
    np.savez(path, **{**stored, "xy": stored["xy"] + 0.5})
    try:
        assert run(sys.executable, folder, repo_root).returncode == 1
    finally:
        np.savez(path, **stored)
