# SPDX-License-Identifier: Apache-2.0
"""Which processor a training runs on, and in which arithmetic."""

from __future__ import annotations

import os

import torch

from ukd_ros.distillation.parallel import Processes
from ukd_ros.distillation.train_config import TrainConfig

# asking whether there is a GPU would otherwise start CUDA in this process, which its forks could then not use
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def train_device(config: TrainConfig, processes: Processes) -> torch.device:
    """Return the device asked for; ValueError when it is not there or the processes outnumber the micro-batches."""
    check_share(config, processes.count)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device: cuda was asked for, but torch sees no CUDA device here; use cpu or auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def check_share(config: TrainConfig, processes: int) -> None:
    """Refuse a number of processes that cannot share out a batch; ValueError."""
    parts = config.batch_size // config.micro_batch
    if parts % processes:
        raise ValueError(
            f"train.micro_batch: {parts} micro-batches a step cannot be shared evenly by {processes} processes; "
            "make micro_batch smaller (a run started with another value cannot be resumed)"
        )


def check_forks(config: TrainConfig, processes: int) -> None:
    """Refuse what forks of one process cannot do, before anything is decoded; ValueError."""
    if processes == 1:
        return
    check_share(config, processes)
    if config.threads > 1:
        raise ValueError(f"train.threads: {processes} processes run on one thread each, not on {config.threads}")
    if train_device(config, Processes()).type == "cuda":
        raise ValueError(
            "several processes forked off one are for CPUs: use torchrun, one process for each GPU, or --set device=cpu"
        )


def half_precision(precision: str, device: torch.device) -> bool:
    """Return whether convolutions are calculated in bfloat16: asked for, or `auto` and the processor is built for it.

    Weights, batch statistics, votes and losses are in float32 either way. Processors without bfloat16 products emulate
    them several times more slowly than float32, so `auto` takes them only where the instructions are.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return True
    capable = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capable.get("avx512_bf16") or capable.get("amx_bf16"))
