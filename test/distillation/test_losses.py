# SPDX-License-Identifier: Apache-2.0
"""Losses against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ukd_ros.distillation.losses import focal_loss, gaussian_nll, ray_loss


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
