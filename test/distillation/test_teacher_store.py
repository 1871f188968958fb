# SPDX-License-Identifier: Apache-2.0
"""Stored teachers are the networks they were, to the bits they were given, and damaged ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from cubes import CUBE

from ukd_ros.cli import main
from ukd_ros.distillation.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from ukd_ros.distillation.teacher import Ensemble, TeacherError
from ukd_ros.distillation.teacher_store import load_teacher, save_teacher
from ukd_ros.geometry.object_model import ObjectModel, Symmetries
from ukd_ros.geometry.pose import Pose
from ukd_ros.perception.network import KeypointNetwork, NetworkConfig


def checkpoint(seed: int = 0) -> Checkpoint:
    torch.manual_seed(seed)
    network = KeypointNetwork(NetworkConfig("lean", ("cube",), 8, 0.25))
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_mean, -300.0, 300.0)  # type: ignore[arg-type]
    turn = Pose([[-1, 0, 0], [0, -1, 0], [0, 0, 1]], [0, 0, 0])  # type: ignore[arg-type]
    cube = ObjectModel("cube", CUBE.keypoints_3d, CUBE.diameter, Symmetries(discrete=(turn,)))
    return Checkpoint(network.eval(), {}, 7, {"window": {"size": 64}, "batch_size": 4, "seed": seed}, (cube,))


@pytest.mark.parametrize(("bits", "error", "share"), [(16, 2e-3, 0.6), (8, 2e-2, 0.45)])
def test_a_teacher_comes_back(bits: int, error: float, share: float, tmp_path: Path) -> None:
    content = checkpoint()
    path = tmp_path / "new" / "seed-0.safetensors"
    save_teacher(path, content, bits)
    found = load_teacher(path)
    assert found.window == 64 and found.network.config == content.network.config
    (model,) = found.models
    assert model.name == "cube" and model.diameter == CUBE.diameter and len(model.symmetries.discrete) == 1
    assert (model.keypoints_3d == CUBE.keypoints_3d).all()
    for name, value in content.network.state_dict().items():
        there = found.network.state_dict()[name]
        if value.dim() == 4:
            assert float((there - value).abs().max()) <= error * float(value.abs().max()), name
        else:
            assert torch.equal(there, value), name
    whole = 4 * sum(p.numel() for p in content.network.parameters())
    assert path.stat().st_size < share * whole + 30_000


def test_the_command_writes_them_and_an_ensemble_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "teachers"
    for seed in (0, 1):
        save_checkpoint(tmp_path / f"{seed}.pt", checkpoint(seed))
        words = ["--checkpoint", str(tmp_path / f"{seed}.pt"), "--out", str(folder / f"seed-{seed}.safetensors")]
        assert main(["export", "--teacher", *words]) == 0
    assert "MB; for ukd distill --teacher" in capsys.readouterr().out
    assert main(["export", "--teacher", *words]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert main(["export", "--teacher", *words[:2], "--out", str(folder / "model")]) == 2
    assert "a teacher is one file" in capsys.readouterr().err
    models = checkpoint().models
    assert len(Ensemble.load([folder], models, 64, torch.device("cpu"))) == 2
    with pytest.raises(TeacherError, match="windows of 64 px"):
        Ensemble.load([folder], models, 128, torch.device("cpu"))


def test_what_is_no_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such teacher"):
        load_teacher(tmp_path / "none.safetensors")
    other = tmp_path / "student.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, other)
    with pytest.raises(CheckpointError, match="no teacher of the format"):
        load_teacher(other)
    path = tmp_path / "teacher.safetensors"
    save_teacher(path, checkpoint())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read as a teacher"):
        load_teacher(path)
    with pytest.raises(ValueError, match="8, 16"):
        save_teacher(path, checkpoint(), 4)
