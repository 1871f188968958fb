# SPDX-License-Identifier: Apache-2.0
"""Two reports on the same targets: what the difference is, and what chance may do to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ukd_ros.cli import main
from ukd_ros.distillation.paired import CompareConfig, CompareError, compare_reports


def write(path: Path, right: list[bool], **changes: Any) -> Path:
    """Write a report of two targets an image, right or found but wrong."""
    targets = [
        {
            "image_id": i // 2,
            "object": "cup",
            "visible": 1.0,
            "add_m": 0.01 if ok else 0.08,
            "correct": ok,
            "missed": "",
        }
        for i, ok in enumerate(right)
    ]
    targets[0] |= changes
    path.mkdir()
    (path / "report.json").write_text(json.dumps({"targets": targets}))
    return path


def test_the_difference_is_that_of_the_shares(tmp_path: Path) -> None:
    before = write(tmp_path / "a", [False] * 60 + [True] * 40)
    after = write(tmp_path / "b", [False] * 40 + [True] * 60)
    found = compare_reports(before, after / "report.json", CompareConfig(block=1))
    add, auc = found.differences[1], found.differences[2]
    assert (found.targets, found.blocks) == (100, 50)
    assert (add.before, add.after) == (0.4, 0.6) and add.change == pytest.approx(0.2)
    assert auc.before == pytest.approx(0.4 * 0.9 + 0.6 * 0.2) and auc.change == pytest.approx(0.2 * 0.7)
    assert found.differences[0].change == found.differences[0].low == found.differences[0].high == 0.0
    # ten of fifty images changed from wrong to right: the interval is that of a share of 0.2
    assert add.low == pytest.approx(0.2 - 1.96 * np.sqrt(0.2 * 0.8 / 50), abs=0.02)
    assert add.high == pytest.approx(0.2 + 1.96 * np.sqrt(0.2 * 0.8 / 50), abs=0.02)


def test_images_that_resemble_each_other_are_worth_fewer(tmp_path: Path) -> None:
    before = write(tmp_path / "a", [False] * 100)
    after = write(tmp_path / "b", [False] * 60 + [True] * 40)
    alone = compare_reports(before, after, CompareConfig(block=1)).differences[1]
    blocks = compare_reports(before, after, CompareConfig(block=10)).differences[1]
    assert blocks.high - blocks.low > 2.0 * (alone.high - alone.low) and blocks.change == alone.change


def test_what_was_not_found_adds_nothing(tmp_path: Path) -> None:
    before = write(tmp_path / "a", [True] * 10)
    after = write(tmp_path / "b", [True] * 10, add_m=None, correct=False, missed="low_score")
    assert [d.change for d in compare_reports(before, after, CompareConfig()).differences] == pytest.approx(
        [-0.1, -0.1, -0.09]
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is no report"),
        ("[]", "is no report"),
        ('{"targets": []}', "has no targets"),
        ('{"targets": [{"image_id": 0, "object": "cup", "visible": 1.0}]}', "10 targets and"),
        (
            '{"targets": [' + ", ".join(['{"image_id": 0, "object": "mug", "visible": 1.0}'] * 10) + "]}",
            "object is cup",
        ),
    ],
)
def test_other_reports_are_refused(tmp_path: Path, content: str | None, said: str) -> None:
    before = write(tmp_path / "a", [True] * 10)
    after = tmp_path / "b.json"
    if content is not None:
        after.write_text(content)
    with pytest.raises(CompareError, match=said):
        compare_reports(before, after, CompareConfig())


def test_a_target_of_something_else_is_refused(tmp_path: Path) -> None:
    before, after = (write(tmp_path / name, [True] * 4, add_m="near") for name in "ab")
    with pytest.raises(CompareError, match="target 0"):
        compare_reports(before, after, CompareConfig())


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = write(tmp_path / "a", [False] * 40), write(tmp_path / "b", [True] * 40)
    assert main(["compare", str(before), str(after), "--set", "block=2"]) == 0
    said = capsys.readouterr().out
    assert "+100.0   +100.0 to +100.0" in said and "40 targets; 10 blocks" in said
    assert main(["compare", str(before), str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
