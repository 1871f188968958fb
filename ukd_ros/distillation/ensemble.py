# SPDX-License-Identifier: Apache-2.0
"""Several networks that differ in their seed alone, trained side by side on one copy of the decoded views.

A deep ensemble is made so, and so is every mean over seeds in docs/results.md. The members are forked after the views
are decoded, so M members need the memory of one; on a GPU they share it.
"""

from __future__ import annotations

import copy
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from ukd_ros.data.dataset import WindowDataset
from ukd_ros.distillation.checkpoint import load_checkpoint
from ukd_ros.distillation.train import TrainConfig, TrainResult, train
from ukd_ros.geometry.object_model import ObjectModel


class EnsembleError(RuntimeError):
    """A member could not be trained; the message names its folder and why. The others went on."""


def member_folder(out: Path, seed: int) -> Path:
    """Return where a member's run lies."""
    return out / f"seed-{seed}"


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
    progress: bool = True,
) -> tuple[TrainResult, ...]:
    """Train networks with the seeds `config.seed`, `config.seed` + 1, … into `out`/seed-N; see `train`.

    Seeds decide the first weights (those that `initial` does not give), and which windows are cut and in what order.
    The progress bar is the first member's. ValueError for less than one member or without fork (Windows);
    EnsembleError, after all have ended, when one failed.
    """
    if members < 1:
        raise ValueError(f"an ensemble needs at least one member, not {members}")
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError("an ensemble shares its views by fork, which this system lacks; train its seeds one by one")
    context = multiprocessing.get_context("fork")
    failures: SimpleQueue[tuple[int, str]] = context.SimpleQueue()

    def run(seed: int) -> None:
        own = copy.copy(data)
        own.seed = seed
        try:
            train(
                replace(config, seed=seed),
                own,
                models,
                member_folder(out, seed),
                held_out=held_out,
                resume=resume,
                time_budget_s=time_budget_s,
                progress=progress and seed == config.seed,
            )
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:  # every reason is said by the parent, which knows the folder
            failures.put((seed, f"{type(error).__name__}: {error}"))
            sys.exit(1)

    seeds = range(config.seed, config.seed + members)
    processes = {seed: context.Process(target=run, args=(seed,), name=f"seed-{seed}") for seed in seeds}
    for process in processes.values():
        process.start()
    try:
        for process in processes.values():
            process.join()
    except KeyboardInterrupt:
        for process in processes.values():
            process.join()
        raise
    said: dict[int, str] = {}
    while not failures.empty():
        seed, text = failures.get()
        said[seed] = text
    for seed, process in processes.items():
        if process.exitcode != 0:
            why = said.get(seed, f"its process ended with {process.exitcode} (out of memory, perhaps)")
            raise EnsembleError(f"{member_folder(out, seed)}: {why}")
    return tuple(_result(member_folder(out, seed)) for seed in seeds)


def _result(folder: Path) -> TrainResult:
    """Return how far a member is."""
    path = folder / "checkpoint.pt"
    checkpoint = load_checkpoint(path)
    return TrainResult(checkpoint.step, checkpoint.step >= int(checkpoint.config["steps"]), path)
