# SPDX-License-Identifier: Apache-2.0
"""Several networks that differ in their seed alone, trained side by side on one copy of the decoded views.

A deep ensemble is made so, and so is every mean over seeds in docs/results.md. The members are forked after the views
are decoded, so M members need the memory of one; on a GPU they share it.
"""

from __future__ import annotations

import copy
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import cv2

from ukd_ros.data.dataset import WindowDataset
from ukd_ros.distillation.checkpoint import load_checkpoint
from ukd_ros.distillation.train import TrainConfig, TrainResult, train
from ukd_ros.geometry.object_model import ObjectModel

logger = logging.getLogger(__name__)

FAILURE = "failed.txt"
"""Where a member leaves its reason, in its folder; a pipe would be full before the parent reads it."""

_PR_SET_PDEATHSIG = 1


class EnsembleError(RuntimeError):
    """Members could not be trained; the message names their folders and why. The others went on to their end."""


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

    Seeds decide the first weights (those that `initial` does not give), and which windows are cut and in what order;
    all members validate on the same windows. With `threads` 0 the cores are shared out. The progress bar is the first
    member's. Call it from a process without other threads: it forks. Stopped by any signal, it stops its members, which
    keep their last checkpoints. ValueError for less than one member, without fork (Windows), or under torchrun;
    EnsembleError, after all have ended, when any failed.
    """
    if members < 1:
        raise ValueError(f"an ensemble needs at least one member, not {members}")
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError("an ensemble shares its views by fork, which this system lacks; train its seeds one by one")
    if "RANK" in os.environ:
        raise ValueError("an ensemble is not trained under torchrun: start it without, or train its seeds one by one")
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // members)
    # a member that changed OpenCV's pool would wait for ever for threads that a fork does not copy
    cv2.setNumThreads(1)
    parent = os.getpid()

    def run(seed: int) -> None:
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

    context = multiprocessing.get_context("fork")
    seeds = range(config.seed, config.seed + members)
    processes: dict[int, BaseProcess] = {}
    try:
        for seed in seeds:
            folder = member_folder(out, seed)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FAILURE).unlink(missing_ok=True)
            processes[seed] = context.Process(target=_member, args=(run, seed, folder, parent), name=f"seed-{seed}")
            processes[seed].start()
        for process in processes.values():
            process.join()
    except BaseException:
        for process in processes.values():
            if process.is_alive():
                process.terminate()
        for process in processes.values():
            if process.pid is not None:
                process.join()
        raise
    failures = [_reason(member_folder(out, seed), process) for seed, process in processes.items() if process.exitcode]
    if failures:
        raise EnsembleError("; ".join(failures))
    return tuple(_result(member_folder(out, seed)) for seed in seeds)


def _member(run: Callable[[int], None], seed: int, folder: Path, parent: int) -> None:
    """Train in the forked process; leave the reason of a failure in the folder."""
    _end_with(parent)
    try:
        run(seed)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # every reason is said by the parent, which knows the folder
        logger.debug("%s:\n%s", folder, traceback.format_exc())
        (folder / FAILURE).write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
        sys.exit(1)


def _end_with(parent: int) -> None:
    """Have the kernel end this process with its parent (Linux): nobody else would stop an orphan for hours."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            sys.exit(1)


def _reason(folder: Path, process: BaseProcess) -> str:
    """Say why a member ended."""
    said = folder / FAILURE
    if said.is_file():
        return f"{folder}: {said.read_text(encoding='utf-8').strip()}"
    if process.exitcode == -signal.SIGKILL:
        return f"{folder}: its process was killed (out of memory, perhaps); its last checkpoint is kept"
    return f"{folder}: its process ended with {process.exitcode}; its last checkpoint is kept"


def _result(folder: Path) -> TrainResult:
    """Return how far a member is."""
    path = folder / "checkpoint.pt"
    checkpoint = load_checkpoint(path)
    return TrainResult(checkpoint.step, checkpoint.step >= int(checkpoint.config["steps"]), path)
