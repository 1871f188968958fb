# SPDX-License-Identifier: Apache-2.0
"""Losses against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ukd_ros.distillation.losses import focal_loss, gaussian_nll, pose_loss, ray_loss
from ukd_ros.geometry.pose import Pose, exp_so3


def test_focal_loss_by_hand() -> None:
    """p = 0.5: a positive costs α (1/2)^2 log 2, a background cell (1-α) (1/2)^2 log 2, an ignored one nothing."""
    state = torch.tensor([[[1], [0], [-1], [0]]])
    expected = (0.25 + 2 * 0.75) * 0.25 * math.log(2)
    assert focal_loss(torch.zeros(1, 4, 1), state).item() == pytest.approx(expected, rel=1e-6)


def test_ray_loss_by_hand() -> None:
    """A point 1 m ahead, its pixel off by 10 px of f = 500: 0.02 m / sqrt(1 + 0.02²) from the ray, beyond the knee."""
    f = 500.0
    matrix = torch.linalg.inv(torch.tensor([[f, 0, 100.0], [0, f, 80.0], [0, 0, 1]], dtype=torch.float64))[None]
    point = torch.tensor([[[0.0, 0.0, 1.0]]], dtype=torch.float64)
    xy = torch.tensor([[[110.0, 80.0]]], dtype=torch.float64)
    distance = 0.02 / math.sqrt(1 + 0.02**2) / 0.2
    loss = ray_loss(xy, point, matrix, torch.tensor([0.2], dtype=torch.float64))
    assert loss.item() == pytest.approx(distance - 0.01, rel=1e-9)
    near = ray_loss(xy * 0 + torch.tensor([100.5, 80.0]), point, matrix, torch.tensor([0.2], dtype=torch.float64))
    assert near.item() == pytest.approx(0.5 * (0.001 / 0.2) ** 2 / 0.02, rel=1e-3)


def test_ray_loss_gradient_is_finite_at_the_truth_and_right_elsewhere() -> None:
    torch.manual_seed(0)
    matrix = torch.linalg.inv(torch.tensor([[300.0, 5, 60], [-5, 300, 60], [0, 0, 1]], dtype=torch.float64))[
        None
    ].repeat(3, 1, 1)
    points = torch.randn(3, 4, 3, dtype=torch.float64) * 0.05 + torch.tensor([0, 0, 0.6], dtype=torch.float64)
    projected = points @ torch.linalg.inv(matrix[0]).T
    truth = projected[..., :2] / projected[..., 2:]
    diameter = torch.full((3,), 0.2, dtype=torch.float64)
    at_truth = truth.clone().requires_grad_()
    ray_loss(at_truth, points, matrix, diameter).backward()
    assert at_truth.grad is not None and torch.isfinite(at_truth.grad).all() and at_truth.grad.abs().max() < 1e-6
    moved = (truth + torch.randn_like(truth) * 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda xy: ray_loss(xy, points, matrix, diameter), (moved,))


def _projected(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    h = points @ matrix.T
    return np.asarray(h[:, :2] / h[:, 2:])


def test_pose_loss_is_how_far_the_keypoints_move_the_pose() -> None:
    """Keypoints of a pose a little beside the truth: the root mean square of their displacements over the diameter."""
    rng = np.random.default_rng(3)
    turned = np.array([[300.0, 40.0, 60.0], [-40.0, 300.0, 70.0], [0.0, 0.0, 1.0]])  # a window that is turned as well
    model = rng.normal(size=(12, 3)) * 0.06
    truth = Pose(exp_so3(np.array([0.4, -0.9, 0.3])), np.array([0.03, -0.02, 0.7]))
    shift = np.array([4e-4, -3e-4, 2e-3])
    turn = np.array([2e-3, 1e-3, -1.5e-3])
    moved = Pose(exp_so3(turn) @ truth.rotation, truth.translation + shift)
    points = truth.transform(model)
    displaced = float(np.sqrt(np.mean(np.sum((moved.transform(model) - points) ** 2, 1)))) / 0.2
    xy, target = (torch.from_numpy(_projected(p, turned))[None] for p in (moved.transform(model), points))
    rest = torch.from_numpy(points)[None], torch.from_numpy(np.linalg.inv(turned))[None], torch.tensor([0.2]).double()
    assert pose_loss(xy, target, *rest).item() == pytest.approx(0.05 * math.log1p((displaced / 0.1) ** 2), rel=2e-2)
    far = target + 40.0 * (xy - target)
    assert pose_loss(far, target, *rest).item() == pytest.approx(0.05 * math.log1p((displaced / 0.0025) ** 2), rel=1e-2)
    assert torch.autograd.gradcheck(lambda value: pose_loss(value, target, *rest), (xy.clone().requires_grad_(),))


def test_pose_loss_sees_a_common_scale_that_the_ray_loss_hardly_does() -> None:
    """As many pixels in all: shared as a shift they cost a pose little, as a scale they are a distance."""
    rng = np.random.default_rng(4)
    matrix = np.array([[572.0, 0.0, 320.0], [0.0, 572.0, 240.0], [0.0, 0.0, 1.0]])
    points = rng.normal(size=(12, 3)) * 0.05 + (0.0, 0.0, 1.0)
    target = _projected(points, matrix)
    spread = target - target.mean(0)
    scale = 0.04 * spread
    shift = np.tile((np.sqrt(np.mean(np.sum(scale**2, 1))), 0.0), (12, 1))
    rest = torch.from_numpy(points)[None], torch.from_numpy(np.linalg.inv(matrix))[None], torch.tensor([0.2]).double()
    truth = torch.from_numpy(target)[None]
    by_scale, by_shift = (truth + torch.from_numpy(e)[None] for e in (scale, shift))
    assert pose_loss(by_scale, truth, *rest) > 8.0 * pose_loss(by_shift, truth, *rest)
    assert ray_loss(by_scale, *rest) < 1.1 * ray_loss(by_shift, *rest)


def test_pose_loss_has_finite_gradients_where_the_points_fix_no_pose() -> None:
    """At the truth, and for points in one place."""
    points = torch.tensor([0.0, 0.0, 0.5], dtype=torch.float64).expand(1, 6, 3)
    rest = points + 0.0, torch.linalg.inv(torch.diag(torch.tensor([300.0, 300.0, 1.0]).double()))[None]
    xy = torch.zeros(1, 6, 2, dtype=torch.float64, requires_grad=True)
    for target in (xy.detach(), xy.detach() + 1.0):
        (slope,) = torch.autograd.grad(pose_loss(xy, target, *rest, torch.tensor([0.1]).double()), xy)
        assert torch.isfinite(slope).all()


def test_gaussian_nll_matches_torch_and_is_least_at_the_true_covariance() -> None:
    torch.manual_seed(1)
    scale = torch.tensor([3.0, 1.5, 0.6], dtype=torch.float64)
    cov = torch.tensor([[9.0, 0.6 * 4.5], [0.6 * 4.5, 2.25]], dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), cov)
    error = normal.sample((4000, 1))
    expected = -(normal.log_prob(error) + math.log(2 * math.pi)).sum()
    here = gaussian_nll(error, scale.expand(4000, 1, 3))
    assert here.item() == pytest.approx(expected.item(), rel=1e-9)
    for other in ((4.0, 1.5, 0.6), (3.0, 1.1, 0.6), (3.0, 1.5, 0.2), (3.0, 1.5, 0.85)):
        assert gaussian_nll(error, torch.tensor(other, dtype=torch.float64).expand(4000, 1, 3)) > here


def test_beta_nll_weights_but_does_not_move_the_scale_optimum() -> None:
    """With β = 1 the gradient with respect to the mean no longer shrinks with σ²."""
    error = torch.ones(1, 1, 2, dtype=torch.float64)
    slopes = []
    for sigma in (1.0, 10.0):
        e = error.clone().requires_grad_()
        gaussian_nll(e, torch.tensor([[[sigma, sigma, 0.0]]], dtype=torch.float64), beta=1.0).backward()
        assert e.grad is not None
        slopes.append(float(e.grad[0, 0, 0]))
    np.testing.assert_allclose(slopes, [1.0, 1.0])
