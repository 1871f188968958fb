# SPDX-License-Identifier: Apache-2.0
"""Transport agrees with POT and with finite differences, keeps its marginals, and survives empty and padded sets."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from ukd_ros.distillation.transport import (
    TransportOptions,
    divergence,
    gaussian_distance,
    solve,
    squared_distance,
)

BALANCED = TransportOptions(blur=0.15, iterations=3000, tolerance=1e-9)
UNBALANCED = TransportOptions(blur=0.15, reach=0.5, iterations=3000, tolerance=1e-9)
ADLP = TransportOptions(blur=1e-3, reach=0.5)
"""The published setting (arXiv 2205.14971): ε = 1e-6, ρ = 0.25, coordinates over the image's size."""


def problem(rng: np.random.Generator, batch: int = 3, n: int = 5, m: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    x, y = torch.from_numpy(rng.random((batch, n, 2))), torch.from_numpy(rng.random((batch, m, 2)))
    a, b = torch.from_numpy(rng.random((batch, n)) + 0.1), torch.from_numpy(rng.random((batch, m)) + 0.1)
    return squared_distance(x, y), a, b


def equal(a: Tensor) -> Tensor:
    return a / a.sum(-1, keepdim=True)


def test_balanced_agrees_with_pot_and_keeps_its_marginals(rng: np.random.Generator) -> None:
    cost, a, b = problem(rng)
    a, b = equal(a), equal(b)
    found = solve(cost, a, b, BALANCED)
    assert torch.allclose(found.plan.sum(-1), a, atol=1e-7) and torch.allclose(found.plan.sum(-2), b, atol=1e-7)
    for i in range(len(cost)):
        sure = ot.solve(cost[i].numpy(), a[i].numpy(), b[i].numpy(), reg=BALANCED.epsilon, reg_type="KL",
                        max_iter=100_000, tol=1e-12)  # fmt: skip
        assert np.allclose(found.plan[i].numpy(), sure.plan, atol=1e-7)
        assert float(found.value[i]) == pytest.approx(float(sure.value), abs=1e-7)


def test_unbalanced_agrees_with_pot(rng: np.random.Generator) -> None:
    cost, a, b = problem(rng)
    found = solve(cost, a, b, UNBALANCED)
    rho, epsilon = UNBALANCED.rho, UNBALANCED.epsilon
    for i in range(len(cost)):
        C, p, q = cost[i].numpy(), a[i].numpy(), b[i].numpy()
        plan = ot.unbalanced.sinkhorn_unbalanced(p, q, C, reg=epsilon, reg_m=rho, reg_type="kl", numItermax=100_000,
                                                 stopThr=1e-13)  # fmt: skip
        assert np.allclose(found.plan[i].numpy(), plan, atol=1e-7)

        def divergence_from(given: np.ndarray, wanted: np.ndarray) -> float:
            return float((given * np.log(given / wanted) - given + wanted).sum())

        value = (plan * C).sum() + epsilon * divergence_from(plan, np.outer(p, q))
        value += rho * (divergence_from(plan.sum(1), p) + divergence_from(plan.sum(0), q))
        assert float(found.value[i]) == pytest.approx(value, abs=1e-7)


def test_little_entropy_gives_the_linear_program(rng: np.random.Generator) -> None:
    cost, a, b = problem(rng, batch=4, n=6, m=6)
    a = b = torch.full_like(a, 1 / 6)
    found = solve(cost, a, b, TransportOptions(blur=2e-3, iterations=5000))
    for i in range(4):
        assert float(found.value[i]) == pytest.approx(ot.emd2([], [], cost[i].numpy()), rel=2e-3)


@pytest.mark.parametrize("options", [BALANCED, UNBALANCED])
def test_gradients_are_finite_differences(options: TransportOptions, rng: np.random.Generator) -> None:
    cost, a, b = problem(rng, batch=2, n=3, m=4)
    a, b = equal(a), equal(b)
    cost.requires_grad_(True)
    solve(cost, a, b, options).value.sum().backward()
    assert cost.grad is not None
    for index in np.ndindex(*cost.shape):
        step = torch.zeros_like(cost)
        step[index] = 1e-5
        with torch.no_grad():
            ahead, behind = (solve(cost + s * step, a, b, options).value.sum() for s in (1, -1))
        assert float(cost.grad[index]) == pytest.approx(float(ahead - behind) / 2e-5, abs=1e-5)
    # the gradient with respect to the cost is the plan
    assert torch.allclose(cost.grad, solve(cost.detach(), a, b, options).plan)


def test_gradients_of_the_masses(rng: np.random.Generator) -> None:
    cost, a, b = problem(rng, batch=1, n=3, m=4)
    a.requires_grad_(True)
    solve(cost, a, b, UNBALANCED).value.sum().backward()
    assert a.grad is not None
    for i in range(3):
        step = torch.zeros_like(a)
        step[0, i] = 1e-5
        with torch.no_grad():
            ahead, behind = (solve(cost, a + s * step, b, UNBALANCED).value.sum() for s in (1, -1))
        assert float(a.grad[0, i]) == pytest.approx(float(ahead - behind) / 2e-5, abs=1e-5)


@pytest.mark.parametrize("options", [BALANCED, UNBALANCED, ADLP])
def test_padding_and_company_change_nothing(options: TransportOptions, rng: np.random.Generator) -> None:
    cost, a, b = problem(rng)
    a, b = equal(a), equal(b)
    together = solve(cost, a, b, options)
    padded_cost = torch.nn.functional.pad(cost, (0, 2, 0, 3), value=0.7)
    padded = solve(padded_cost, torch.nn.functional.pad(a, (0, 3)), torch.nn.functional.pad(b, (0, 2)), options)
    assert torch.allclose(padded.value, together.value, rtol=1e-3, atol=1e-9)
    assert torch.count_nonzero(padded.plan[:, 5:]) == 0 and torch.count_nonzero(padded.plan[:, :, 7:]) == 0
    for i in range(len(cost)):
        assert torch.allclose(solve(cost[i], a[i], b[i], options).value, together.value[i], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("options", [BALANCED, UNBALANCED, ADLP])
def test_empty_and_single_sets_in_float32(options: TransportOptions) -> None:
    cost = torch.rand(4, 3, 2, requires_grad=True)
    a = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0.5, 0.5, 0], [0, 0, 0]])
    b = torch.tensor([[1.0, 0], [1.0, 0], [0, 0], [0, 0]])
    found = solve(cost, a, b, options)
    found.value.sum().backward()
    assert cost.grad is not None and found.value.dtype == torch.float32
    assert torch.isfinite(found.value).all() and torch.isfinite(found.plan).all() and torch.isfinite(cost.grad).all()
    lost = 0.0 if math.isinf(options.reach) else options.rho
    assert found.value[1:].tolist() == pytest.approx([lost, lost, 0.0], abs=1e-6)
    assert torch.count_nonzero(found.plan[1:]) == 0
    if math.isinf(options.reach):
        assert found.value[0].item() == pytest.approx(cost[0, 0, 0].item(), rel=1e-4)
    nothing = solve(torch.zeros(2, 0, 3), torch.zeros(2, 0), torch.ones(2, 3), options)
    assert nothing.plan.shape == (2, 0, 3) and nothing.value.tolist() == pytest.approx([3 * lost] * 2)


def test_the_published_setting_converges(rng: np.random.Generator) -> None:
    """ε a quarter of a millionth of ρ: without the common shift this would take some 1e5 iterations."""
    offset = 0.025  # 6.4 px of 256
    x = torch.from_numpy(rng.random((8, 10, 2)) * 0.02 + 0.5).float()
    mass = torch.full((8, 10), 0.8)
    cost = squared_distance(x, x + offset)
    found = solve(cost, mass, mass, ADLP)
    moved = 8.0 * offset**2  # every vote moved by the offset: 10 votes of mass 0.8, half the squared distance
    assert torch.allclose(found.value, torch.full((8,), moved), rtol=0.02)
    assert torch.allclose(found.plan.sum(-1), mass, rtol=0.01)
    # mass that has no partner costs about ρ times (√|a| − √|b|)²
    short = solve(cost, mass, 0.25 * mass, ADLP).value
    assert torch.allclose(short, torch.full((8,), 0.25 * (math.sqrt(8) - math.sqrt(2)) ** 2), rtol=0.02)


def test_the_divergence_of_a_set_from_itself_is_zero(rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.random((3, 6, 2)))
    a = torch.from_numpy(rng.random((3, 6)) + 0.1)
    within = squared_distance(x, x)
    same = divergence(within, within, within, a, a, UNBALANCED)
    assert torch.allclose(same.value, torch.zeros(3, dtype=torch.float64), atol=1e-8)
    y = torch.from_numpy(rng.random((3, 4, 2)))
    b = torch.from_numpy(rng.random((3, 4)) + 0.1)
    other = divergence(squared_distance(x, y), within, squared_distance(y, y), a, b, UNBALANCED)
    assert (other.value > 0).all() and other.plan.shape == (3, 6, 4)


def test_gaussian_distance_is_the_closed_form(rng: np.random.Generator) -> None:
    x, y = rng.random((2, 3, 2)), rng.random((2, 4, 2))
    roots = rng.normal(size=(2, 7, 2, 2))
    covariances = roots @ roots.transpose(0, 1, 3, 2)
    A, B = covariances[:, :3], covariances[:, 3:]
    found = gaussian_distance(*(torch.from_numpy(v) for v in (x, A, y, B))).numpy()
    for k, i, j in np.ndindex(2, 3, 4):
        root = sqrtm(B[k, j])
        cross = np.real(np.trace(sqrtm(root @ A[k, i] @ root)))
        expected = np.sum((x[k, i] - y[k, j]) ** 2) + np.trace(A[k, i]) + np.trace(B[k, j]) - 2 * cross
        assert found[k, i, j] == pytest.approx(0.5 * expected, rel=1e-6, abs=1e-9)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        solve(torch.zeros(2, 3), torch.ones(3), torch.ones(3), BALANCED)
    with pytest.raises(ValueError, match="equal masses"):
        solve(torch.zeros(3, 3), torch.ones(3), 2 * torch.ones(3), BALANCED)
    for bad in ({"blur": 0.0}, {"reach": -1.0}, {"scaling": 1.0}, {"iterations": 0}):
        with pytest.raises(ValueError, match=f"transport.{next(iter(bad))}"):
            TransportOptions(**bad)
