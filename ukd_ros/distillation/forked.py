# SPDX-License-Identifier: Apache-2.0
"""Processes forked off this one, which share its memory (the decoded views) and end with it."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import cv2
import torch
from torch import distributed

from ukd_ros.data.progress import Stopped, listening

logger = logging.getLogger(__name__)

CAN_FORK = "fork" in multiprocessing.get_all_start_methods() and distributed.is_available()

GRACE_S = 30.0
"""So long may a process that was asked to end write its checkpoint."""

LAST_WORDS_S = 2.0
"""So long may a process that failed take to say why."""

PATIENCE = timedelta(minutes=30)
"""So long may one process work alone while the others wait; and one that dies while it joins is waited for."""

INTERRUPTED = 130
"""What a process ends with that Ctrl-C or a signal stopped, as shells have it."""

START_S = 60.0
"""A process that does not run by then never will."""

_PR_SET_PDEATHSIG = 1

T = TypeVar("T")


class ForkError(RuntimeError):
    """Forked processes failed; the message says which and why."""


class Forked:
    """Forked processes; whoever leaves the `with` early, by any exception, ends those that still work.

    Fork from a process whose threads are idle: those of OpenMP are not copied, so a fork may only use more than one
    thread where this process has not done so before.
    """

    def __init__(self) -> None:
        self._processes: list[tuple[BaseProcess, Path, str]] = []

    def __enter__(self) -> Forked:
        # a fork that changed OpenCV's pool would wait for ever for threads that it does not have
        cv2.setNumThreads(1)
        return self

    def start(self, work: Callable[[], None], said: Path, name: str) -> None:
        """Do `work` in a process called `name`; what it fails of is left in the file `said`, for a pipe fills up."""
        said.parent.mkdir(parents=True, exist_ok=True)
        said.unlink(missing_ok=True)
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_run, args=(work, said, os.getpid()), name=name)
        self._processes.append((process, said, name))
        process.start()

    def join(self, seconds: float | None = None) -> list[str]:
        """Wait for all (so long at most, each); return why those that failed did, each beginning with its name."""
        for process, _, _ in self._processes:
            process.join(seconds)
        return [f"{name}: {_reason(process, said)}" for process, said, name in self._processes if process.exitcode]

    @property
    def working(self) -> bool:
        """Return whether any process has not ended."""
        return any(process.is_alive() for process, _, _ in self._processes)

    @property
    def interrupted(self) -> bool:
        """Return whether a process that ended was stopped by a signal that it minds."""
        return any(process.exitcode == INTERRUPTED for process, _, _ in self._processes)

    def wait_for(self, files: Sequence[Path]) -> None:
        """Wait until the processes have made these files; ForkError when one ends before, or nothing comes."""
        end = time.monotonic() + START_S
        while not all(file.exists() for file in files):
            if failures := self.join(0.01):
                raise ForkError("; ".join(failures))
            if time.monotonic() > end:
                raise ForkError(f"processes that share the training did not start within {START_S:.0f} s")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        started = [process for process, _, _ in self._processes if process.pid is not None]
        for process in started:
            if process.is_alive():
                process.terminate()
        for process in started:
            process.join(GRACE_S)
            if process.is_alive():
                process.kill()
                process.join()


def together(count: int, work: Callable[[], T]) -> T:
    """Do `work` in this process and in `count` - 1 forks of it, which train together (`Processes`); return its result.

    This process is the first, so who listens to its progress hears it, and may stop all. Each runs on one thread: this
    process may have used more before, which a fork then cannot. ValueError without fork (Windows) or under torchrun;
    Stopped when a signal came to a fork alone, ForkError when one failed; what `work` raises here otherwise.
    """
    if count == 1:
        return work()
    if not CAN_FORK:
        raise ValueError("several processes share their views by fork, which this system lacks; use torchrun")
    if "RANK" in os.environ:
        raise ValueError("torchrun starts the processes here: do not ask for more")
    with tempfile.TemporaryDirectory() as folder, _one_thread(), Forked() as forked:
        meeting = Path(folder) / "meeting"

        runs = {rank: Path(folder) / f"runs-{rank}" for rank in range(1, count)}

        def other(rank: int) -> None:
            runs[rank].touch()
            with listening(lambda _: None), _group(meeting, rank, count):
                work()

        for rank in runs:
            said = Path(folder) / f"failed-{rank}.txt"
            forked.start(partial(other, rank), said, f"process {rank + 1} of {count}")
        forked.wait_for(list(runs.values()))  # a group waits for ever for who never comes
        try:
            with _group(meeting, 0, count):
                result = work()
        except RuntimeError as error:
            lost = isinstance(error, distributed.DistError) or "gloo" in str(error)
            # when another process dies, this one hears of a closed connection: its reason says more
            if lost:
                _fail_with(forked, LAST_WORDS_S)
            raise
        _fail_with(forked, None)
        return result


def _fail_with(forked: Forked, seconds: float | None) -> None:
    """Wait for the forks (so long at most); raise what made one end, if anything did."""
    failures = forked.join(seconds)
    if forked.interrupted:
        raise Stopped(
            "another process of the training was interrupted; the last checkpoint is kept, go on with --resume"
        )
    if failures:
        raise ForkError("; ".join(failures))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _group(meeting: Path, rank: int, count: int) -> Iterator[None]:
    """Belong to a group of processes on this machine, which find one another by a file."""
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    if before is None and sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a robot's host name need not lead anywhere
    try:
        place = f"file://{meeting}"
        distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=count, timeout=PATIENCE)
        try:
            distributed.barrier()  # who is done at once must not leave while others still connect
            yield
        finally:
            distributed.destroy_process_group()
    finally:
        if before is None:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)


def _run(work: Callable[[], None], said: Path, parent: int) -> None:
    """Work in the forked process; leave the reason of a failure in the file."""
    _end_with(parent)
    try:
        work()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:  # every reason is said by the parent
        logger.debug("%s:\n%s", said, traceback.format_exc())
        said.write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
        sys.exit(1)


def _end_with(parent: int) -> None:
    """Have the kernel end this process with its parent (Linux): nobody else would stop an orphan for hours."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            sys.exit(1)


def _reason(process: BaseProcess, said: Path) -> str:
    """Say why a process ended."""
    if said.is_file():
        return said.read_text(encoding="utf-8").strip()
    if process.exitcode == -signal.SIGKILL:
        return "its process was killed (out of memory, perhaps); its last checkpoint is kept"
    return f"its process ended with {process.exitcode}; its last checkpoint is kept"
