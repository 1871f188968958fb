# SPDX-License-Identifier: Apache-2.0
"""The ensemble's mean and spread by hand, and teachers that cannot teach."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cubes import CUBE, CubeViews

from ukd_ros.data.dataset import WindowConfig, WindowDataset
from ukd_ros.distillation.teacher import Ensemble, TeacherError, as_matrices
from ukd_ros.distillation.train import train
from ukd_ros.distillation.train_config import TrainConfig
from ukd_ros.perception.network import KeypointNetwork, NetworkConfig

TINY = TrainConfig(steps=1, batch_size=4, micro_batch=4, log_every=1, validate_every=0, width_factor=0.25, threads=1,
                   device="cpu", keypoints=CUBE.keypoints_3d.shape[0], window=WindowConfig(size=64))  # fmt: skip


def network(seed: int, keypoints: int = 5, classes: tuple[str, ...] = ("a", "b")) -> KeypointNetwork:
    torch.manual_seed(seed)
    made = KeypointNetwork(NetworkConfig("lean", classes, keypoints, 0.25))
    for layer in (made.head.offset, made.head.scale, made.head.score):
        torch.nn.init.normal_(layer.weight, std=0.3)  # the members differ visibly
    return made.eval()


def test_mean_spread_and_covariance_are_those_of_the_members() -> None:
    members = [network(seed) for seed in range(4)]
    images = 255 * torch.rand(2, 3, 64, 64)
    found = Ensemble(members).predict(images)
    with torch.no_grad():
        outputs = [member(images) for member in members]
    score, xy, scale = (torch.stack([output[i] for output in outputs]).double() for i in range(3))
    assert torch.allclose(found.score.double(), score.mean(0), atol=1e-6)
    assert torch.allclose(found.xy.double(), xy.mean(0), atol=1e-4)
    b, n, c, k = 1, 7, 1, 3
    expected = np.cov(xy[:, b, n, c, k].numpy().T)
    assert np.allclose(as_matrices(found.spread)[b, n, c, k].numpy(), expected, rtol=1e-3)
    u, v, rho = scale[:, b, n, c, k].unbind(-1)
    own = torch.stack((u * u, rho * u * v, v * v), -1).mean(0)
    assert torch.allclose(found.cov[b, n, c, k].double(), own, rtol=1e-4)
    assert not any(p.requires_grad for member in members for p in member.parameters())


def test_members_that_agree_have_no_spread() -> None:
    same = [network(1), network(1)]
    found = Ensemble(same).predict(255 * torch.rand(1, 3, 64, 64))
    assert torch.count_nonzero(found.spread) == 0 and found.cov[..., 0].min() > 0


def test_wrong_members_are_refused() -> None:
    with pytest.raises(TeacherError, match="two members or more"):
        Ensemble([network(0)])
    with pytest.raises(TeacherError, match="no teacher"):
        Ensemble([])
    with pytest.raises(TeacherError, match=r"b\.pt: has keypoints 6, but a\.pt has 5"):
        Ensemble([network(0), network(1, keypoints=6)], ["a.pt", "b.pt"])
    with pytest.raises(TeacherError, match="has classes"):
        Ensemble([network(0), network(1, classes=("a", "c"))])


def test_teachers_of_something_else_are_named(tmp_path: Path) -> None:
    data = WindowDataset(CubeViews(2), [CUBE], TINY.window, seed=0)
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, run in enumerate(runs):
        train(replace(TINY, seed=seed), data, [CUBE], run, progress=False)
    device = torch.device("cpu")
    ensemble = Ensemble.load(runs, [CUBE], 64, device)
    assert len(ensemble) == 2
    assert ensemble.identity != Ensemble.load(runs[::-1], [CUBE], 64, device).identity
    with pytest.raises(TeacherError, match=r"one/checkpoint\.pt: knows the objects cube, but the student learns ball"):
        Ensemble.load(runs, [replace(CUBE, name="ball")], 64, device)
    with pytest.raises(TeacherError, match="windows of 64 px, but the student's have 128"):
        Ensemble.load(runs, [CUBE], 128, device)
    moved = replace(CUBE, keypoints_3d=CUBE.keypoints_3d + [0.002, 0.0, 0.0])
    with pytest.raises(TeacherError, match="up to 2 mm beside"):
        Ensemble.load(runs, [moved], 64, device)
    fewer = replace(CUBE, keypoints_3d=CUBE.keypoints_3d[:4])
    with pytest.raises(TeacherError, match="keypoints on cube, but the student has 4"):
        Ensemble.load(runs, [fewer], 64, device)
