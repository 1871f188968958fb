# SPDX-License-Identifier: Apache-2.0
"""Muon: orthogonal steps, the same as torch's own where it has them, and state that survives a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ukd_ros.distillation.muon import Muon, Together, orthogonalised


@pytest.mark.parametrize("shape", [(16, 144), (112, 1008), (48, 48), (64, 24)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = 7.0 * u @ torch.diag(torch.linspace(0.05, 1.0, min(shape))) @ vh
    result = orthogonalised(matrix)
    values = torch.diag(u.T @ result @ vh.T)
    assert 0.6 < values.min() and values.max() < 1.25
    torch.testing.assert_close(u @ torch.diag(values) @ vh, result, rtol=0, atol=1e-4)


def test_a_matrix_of_zeros_and_one_of_rank_one_stay_finite() -> None:
    assert torch.equal(orthogonalised(torch.zeros(8, 20)), torch.zeros(8, 20))
    flat = orthogonalised(torch.ones(8, 20))
    assert torch.isfinite(flat).all() and torch.linalg.matrix_norm(flat, 2) < 1.3


def test_it_takes_the_steps_of_torch() -> None:
    """torch's own rounds its products to bfloat16 (8 bits), so its steps agree to a few percent."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    torch.manual_seed(1)
    mine = [nn.Parameter(torch.randn(24, 16)), nn.Parameter(torch.randn(12, 30))]
    theirs = copy.deepcopy(mine)
    start = copy.deepcopy(mine)
    one = Muon(mine, lr=0.02, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for _ in range(5):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b, before in zip(mine, theirs, start, strict=True):
        assert (a - b).norm() < 0.05 * (b - before).norm()


def test_a_convolution_is_the_matrix_of_its_filters_in_any_memory_layout() -> None:
    torch.manual_seed(2)
    weight = torch.randn(8, 4, 3, 3)
    gradient = torch.randn(8, 4, 3, 3)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(weight.clone().contiguous(memory_format=layout))
        parameter.grad = gradient.clone().contiguous(memory_format=layout)
        Muon([parameter], lr=0.1).step()
        results.append(parameter.detach())
    torch.testing.assert_close(results[0], results[1])
    step = (weight - results[0]).reshape(8, 36) / 0.1
    assert torch.linalg.svdvals(step).min() > 0.6


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="AdamW"):
        Muon([nn.Parameter(torch.zeros(5))])


def test_together_restores_all_parts() -> None:
    def build() -> tuple[list[nn.Parameter], Together]:
        torch.manual_seed(3)
        matrix, vector = nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(6))
        return [matrix, vector], Together([torch.optim.AdamW([vector], lr=0.1), Muon([matrix], lr=0.1)])

    def step(parameters: list[nn.Parameter], optimizer: Together, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        assert all(p.grad is None for p in parameters)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    whole, optimizer = build()
    for seed in range(4):
        step(whole, optimizer, seed)
    first, optimizer = build()
    step(first, optimizer, 0)
    step(first, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    second, resumed = build()
    with torch.no_grad():
        for p, q in zip(second, first, strict=True):
            p.copy_(q)
    resumed.load_state_dict(state)
    step(second, resumed, 2)
    step(second, resumed, 3)
    for p, q in zip(second, whole, strict=True):
        torch.testing.assert_close(p, q)
