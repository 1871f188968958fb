# SPDX-License-Identifier: Apache-2.0
"""The processes that train together, torchrun's or forks (`forked`); alone, every operation is the identity."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

PATIENCE = timedelta(days=1)
"""So long may one process work alone while the others wait: the first calibrates and exports, for hours on a CPU."""


@dataclass(frozen=True)
class Processes:
    """This process's `rank` among `count`."""

    rank: int = 0
    count: int = 1

    @staticmethod
    def from_environment() -> Processes:
        """Return the group that this process belongs to, join that which torchrun announced, or stand alone.

        gloo carries what is on CPUs, nccl what is on CUDA.
        """
        if distributed.is_available() and distributed.is_initialized():
            return Processes(distributed.get_rank(), distributed.get_world_size())
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return Processes()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(kinds, timeout=PATIENCE)
        return Processes(distributed.get_rank(), distributed.get_world_size())

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.count == 1:
            return value
        total = value.clone()
        distributed.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Return whether any process says yes; all get the same answer."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)]))[0] > 0)

    def sum_gradients(self, network: nn.Module) -> None:
        """Replace every gradient by its sum over all processes, in one message."""
        if self.count == 1:
            return
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
