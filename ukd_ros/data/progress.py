# SPDX-License-Identifier: Apache-2.0
"""How far long work is: a bar on the terminal, and word of it for whoever listens (the offline node does)."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Progress:
    """What is being done: `done` of `total` (None: unknown) `unit`s, with a few numbers such as the loss."""

    stage: str
    done: int
    total: int | None
    unit: str
    numbers: dict[str, str]


class Stopped(KeyboardInterrupt):
    """Work that was asked to stop; what was done so far is kept, and the message says how to go on."""


_listener: ContextVar[Callable[[Progress], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[Progress], None]) -> Iterator[None]:
    """Tell `listener` of the progress of all work done inside, in this thread.

    It is called at every step, so it should be quick; raising `Stopped` in it ends the work there.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def within(seconds: float | None, words: str) -> Iterator[None]:
    """Let the work done inside take so many seconds (None: any): at its first step after them it is `Stopped`.

    Whoever listens already is told before.
    """
    if seconds is None:
        yield
        return
    end, before = time.monotonic() + seconds, _listener.get()

    def watch(progress: Progress) -> None:
        if before is not None:
            before(progress)
        if time.monotonic() > end:
            raise Stopped(words)

    try:
        with listening(watch):
            yield
    except Stopped as stop:
        if time.monotonic() <= end or str(stop) == words:
            raise
        raise Stopped(words) from stop  # a stage that kept what it had, and worded that for another command


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C (or SIGTERM) came inside; a second Ctrl-C interrupts at once.

    For loops that must not be cut in the middle of a step. Outside of the main thread nothing is deferred.
    """
    asked = threading.Event()
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and pressed.is_set():
            raise KeyboardInterrupt
        asked.set()
        if number == signal.SIGINT:
            pressed.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Bar(tqdm):  # type: ignore[misc]  # tqdm is not typed
    """tqdm's bar (any iterable, or `update`), which also tells the listener."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._stage, self._unit = str(kwargs.get("desc") or ""), str(kwargs.get("unit", "it"))
        self._done, self._numbers = int(kwargs.get("initial", 0)), dict[str, str]()
        super().__init__(*args, **kwargs)
        self._tell()

    def __iter__(self) -> Iterator[Any]:
        """Yield the items and count them."""
        for item in super().__iter__():
            yield item
            self._done += 1
            self._tell()

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` more."""
        answer: bool | None = super().update(n)
        self._done += int(n or 0)
        self._tell()
        return answer

    def set_postfix(self, *args: Any, **kwargs: Any) -> None:
        """Show numbers beside the bar."""
        self._numbers = {key: str(value) for key, value in kwargs.items()}
        super().set_postfix(*args, **kwargs)

    def _tell(self) -> None:
        listener = _listener.get()
        if listener is not None:
            total = None if self.total is None else int(self.total)
            listener(Progress(self._stage, self._done, total, self._unit, self._numbers))
