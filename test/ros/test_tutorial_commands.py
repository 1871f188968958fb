# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/your_object.md, read by the real parser and the real settings; nothing is run."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("trimesh")

from ukd_ros.cli import build_parser
from ukd_ros.config import load_config
from ukd_ros.data.meshes import MeshError, object_model, vertex_normals
from ukd_ros.data.scenes import SceneConfig
from ukd_ros.distillation.from_bags_request import FromBagsConfig
from ukd_ros.distillation.new_object_report import FAIR, GOOD
from ukd_ros.distillation.new_object_request import NewObjectConfig, training_of_a_part
from ukd_ros.distillation.train_config import TrainConfig
from ukd_ros.geometry.object_model import Mesh


@pytest.fixture
def page(repo_root: Path) -> str:
    return (repo_root / "docs" / "your_object.md").read_text(encoding="utf-8")


def calls_of(page: str, command: str) -> list[argparse.Namespace]:
    """Return every call of a command in the page's blocks, parsed: a word that is no option ends the test."""
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in shell.splitlines() if line.startswith(f"ukd {command} ")]
    assert lines
    return [build_parser().parse_args(words[1:]) for words in lines]


def test_teachers_are_rendered_and_trained_as_a_new_part_is(page: str, repo_root: Path) -> None:
    train = calls_of(page, "train")[0]
    config = load_config(TrainConfig, train.config and repo_root / train.config, train.set)
    usual = training_of_a_part()
    for name in ("architecture", "keypoints", "optimizer", "learning_rate", "micro_batch", "positives"):
        assert getattr(config, name) == getattr(usual, name), name
    assert config.initial == "models/part" and config.keypoint_kind == "farthest"
    assert f"{config.steps:,} steps of {config.batch_size} windows" in page
    found = re.search(r"here of a part (\d+) cm across", page)
    assert found is not None
    renders = calls_of(page, "render")
    scenes = [load_config(SceneConfig, repo_root / call.config, call.set) for call in renders]
    assert scenes == [NewObjectConfig().scene_for(int(found[1]) / 100)] * 2


def test_a_plain_box_is_cured_as_the_page_says(page: str, repo_root: Path) -> None:
    corners = np.array([[x, y, z] for x in (0.0, 0.1) for y in (0.0, 0.1) for z in (0.0, 0.2)])
    faces = np.array([[0, 1, 2], [1, 2, 3], [4, 5, 6], [5, 6, 7]])
    box = Mesh(corners, faces, vertex_normals(corners, faces))
    found = re.search(
        r"stops here with `(.+?)`.*? add `(\S+)`\s+to the `--set` of `ukd train`, and `--set (\S+)` to `ukd distill`",
        page,
        re.DOTALL,
    )
    assert found is not None
    said, train, distil = found.groups()
    (call,) = calls_of(page, "train")
    usual, cured = (load_config(TrainConfig, None, words) for words in (call.set, [*call.set, train]))
    with pytest.raises(MeshError, match=said):
        object_model("part", box, usual.keypoints, usual.keypoint_kind)
    (call,) = calls_of(page, "distill")
    student = load_config(FromBagsConfig, repo_root / call.config, [*call.set, distil]).distill
    for config in (cured, student):
        assert len(object_model("part", box, config.keypoints, config.keypoint_kind).keypoints_3d) == 8


def test_the_page_judges_as_the_report_does(page: str) -> None:
    words = re.search(r"fair from (\d+) % and good from (\d+) % on.* Below (\d+) % give it more time", page, re.DOTALL)
    assert words is not None
    assert [float(word) / 100 for word in words.groups()] == [FAIR, GOOD, GOOD]
