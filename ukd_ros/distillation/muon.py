# SPDX-License-Identifier: Apache-2.0
"""Muon for convolutions: momentum steps made orthogonal, for training in few samples.

After Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). `torch.optim.Muon` is the same
method, yet it takes matrices only, is missing before torch 2.9, and its bfloat16 products cost a third of a training
step on a CPU; the tests compare both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MUON_RATIO = 10.0
"""Muon's learning rate over AdamW's."""

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the quintic iteration: singular values go to 0.7..1.2 in five rounds."""


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay; a parameter of more than two axes is the matrix [first axis, all others].

    `lr` is the spectral norm of a step on a wide matrix; on a tall one the step grows by sqrt(rows / columns).
    Give it the hidden layers only: first and last layers, biases and norms are AdamW's.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() < 2:
                    raise ValueError(f"Muon: a parameter of shape {tuple(parameter.shape)} is no matrix; use AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with Nesterov momentum; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"])
                matrix = update.reshape(len(update), -1)
                tall = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalised(matrix).view(update.shape), alpha=-group["lr"] * tall)
        return loss


def orthogonalised(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Return about U V^T of a matrix U S V^T [rows, columns] (Newton-Schulz: singular values near one).

    Every round multiplies by a polynomial of the Gram matrix on the short side, so only those products of the short
    side are formed, and the long side is touched twice.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalised(matrix.T, rounds).T
    matrix = matrix / (matrix.norm() + 1e-7)
    gram = matrix @ matrix.T
    factor = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for _ in range(rounds):
        polynomial = _A * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        polynomial += _B * gram + _C * (gram @ gram)
        factor = polynomial @ factor
        gram = polynomial @ gram @ polynomial  # all are polynomials of one symmetric matrix, so they commute
    return factor @ matrix


class Together:
    """Several optimizers of disjoint parameters that step, save and load as one."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)

    def set_learning_rate(self, rate: float) -> None:
        """Give every part the rate, and Muon MUON_RATIO times as much."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * (MUON_RATIO if isinstance(part, Muon) else 1.0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parts."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        """Let every part take its step."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the parts, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
