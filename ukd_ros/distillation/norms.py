# SPDX-License-Identifier: Apache-2.0
"""Batch norm that does not depend on how many processes share a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ukd_ros.distillation.parallel import Processes


class NormStatistics:
    """Running statistics of batch norm, averaged over all micro-batches of a step on all processes.

    torch would fold micro-batches in one after the other, in an order that depends on the number of processes. Here
    every forward pass leaves its own statistics (momentum 1), and the step averages them.
    """

    def __init__(self, network: nn.Module, momentum: float = 0.02) -> None:
        self.layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        for layer in self.layers:
            layer.momentum = 1.0
        self.momentum = momentum
        self.average = [b.detach().clone() for b in self._buffers()]
        self._sums = [torch.zeros_like(b) for b in self.average]
        self._count = 0

    def _buffers(self) -> list[Tensor]:
        buffers: list[Tensor] = []
        for layer in self.layers:
            if layer.running_mean is not None and layer.running_var is not None:
                buffers += [layer.running_mean, layer.running_var]
        return buffers

    def collect(self) -> None:
        """Note the statistics that the last forward pass left."""
        with torch.no_grad():
            torch._foreach_add_(self._sums, self._buffers())
        self._count += 1

    def update(self, processes: Processes) -> None:
        """Fold the step's mean statistics into the running average."""
        flat = torch.cat(
            [s.flatten() for s in self._sums] + [torch.tensor([float(self._count)], device=self._sums[0].device)]
        )
        flat = processes.sum(flat)
        mean = flat[:-1] / flat[-1]
        start = 0
        for average, total in zip(self.average, self._sums, strict=True):
            part = mean[start : start + average.numel()].view_as(average)
            average.lerp_(part, self.momentum)
            start += average.numel()
            total.zero_()
        self._count = 0

    def store(self) -> None:
        """Write the running average into the layers, for evaluation and checkpoints."""
        for buffer, average in zip(self._buffers(), self.average, strict=True):
            buffer.copy_(average)

    def load(self) -> None:
        """Take the running average from the layers, after a checkpoint was loaded into them."""
        self.average = [b.detach().clone() for b in self._buffers()]
