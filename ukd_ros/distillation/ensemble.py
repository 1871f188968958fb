# SPDX-License-Identifier: Apache-2.0
"""Several networks that differ in their seed alone, trained side by side on one copy of the decoded views.

A deep ensemble is made so, and so is every mean over seeds in docs/results.md. The members are forked after the views
are decoded, so M members need the memory of one; on a GPU they share it.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ukd_ros.data.dataset import WindowDataset
from ukd_ros.distillation.checkpoint import load_checkpoint
from ukd_ros.distillation.forked import CAN_FORK, Forked
from ukd_ros.distillation.train import TrainResult, train
from ukd_ros.distillation.train_config import TrainConfig
from ukd_ros.geometry.object_model import ObjectModel

FAILURE = "failed.txt"
"""Where a member leaves its reason, in its folder."""


class EnsembleError(RuntimeError):
    """Members could not be trained; the message names their folders and why. The others went on to their end."""


def member_folder(out: Path, seed: int) -> Path:
    """Return where a member's run lies."""
    return out / f"seed-{seed}"


def side_by_side() -> bool:
    """Return whether members are trained at the same time: a GPU that this process has used is lost to its forks."""
    return not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def train_ensemble(
    config: TrainConfig,
    members: int,
    data: WindowDataset,
    models: Sequence[ObjectModel],
    out: Path,
    *,
    held_out: WindowDataset | None = None,
    resume: bool = False,
    time_budget_s: float | None = None,
    waiting: Callable[[], object] | None = None,
    progress: bool = True,
) -> tuple[TrainResult, ...]:
    """Train networks with the seeds `config.seed`, `config.seed` + 1, … into `out`/seed-N; see `train`.

    Seeds decide the first weights (those that `initial` does not give), and which windows are cut and in what order;
    all members validate on the same windows. With `threads` 0 the cores are shared out. The progress bar is the first
    member's. Call it from a process without other threads: it forks. Stopped by any signal, it stops its members, which
    keep their last checkpoints. ValueError for less than one member, without fork (Windows), or under torchrun;
    EnsembleError, after all have ended, when any failed. Where they cannot be `side_by_side` they come one after
    another, each with its part of the time, and what `train` raises ends it.
    `waiting` is called about every second while forks work; what it raises stops them.
    """
    if members < 1:
        raise ValueError(f"an ensemble needs at least one member, not {members}")
    if not CAN_FORK:
        raise ValueError("an ensemble shares its views by fork, which this system lacks; train its seeds one by one")
    if "RANK" in os.environ:
        raise ValueError("an ensemble is not trained under torchrun: start it without, or train its seeds one by one")
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // members)

    def run(seed: int, time_budget_s: float | None = time_budget_s) -> None:
        own = copy.copy(data)
        own.seed = seed
        train(
            replace(config, seed=seed, threads=threads),
            own,
            models,
            member_folder(out, seed),
            held_out=held_out,
            resume=resume,
            time_budget_s=time_budget_s,
            progress=progress and seed == config.seed,
        )

    seeds = range(config.seed, config.seed + members)
    if not side_by_side():
        start = time.monotonic()
        for number, seed in enumerate(seeds):
            left = None if time_budget_s is None else time_budget_s - (time.monotonic() - start)
            run(seed, None if left is None else left / (members - number))
        return tuple(_result(member_folder(out, seed)) for seed in seeds)
    with Forked() as forked:
        for seed in seeds:
            folder = member_folder(out, seed)
            forked.start(partial(run, seed), folder / FAILURE, str(folder))
        while waiting is not None and forked.working:
            forked.join(1.0 / members)
            waiting()
        failures = forked.join()
    if failures:
        raise EnsembleError("; ".join(failures))
    return tuple(_result(member_folder(out, seed)) for seed in seeds)


def _result(folder: Path) -> TrainResult:
    """Return how far a member is."""
    path = folder / "checkpoint.pt"
    checkpoint = load_checkpoint(path)
    return TrainResult(checkpoint.step, checkpoint.step >= int(checkpoint.config["steps"]), path)
