# SPDX-License-Identifier: Apache-2.0
"""How far the offline job is, as log lines and as a DiagnosticArray; steps come in from the job's thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

SAY_EVERY_S = 10.0
"""A stage is logged when it begins and then this often."""

SAMPLE_S = 0.5
"""The rate is taken over steps at least this far apart ..."""

SAMPLES = 120
"""... and over this many of them: the last minute, since a job seldom goes on as fast as it began."""


class Step(Protocol):
    """What is read of data.progress.Progress."""

    @property
    def stage(self) -> str:
        """What is being done."""
        ...

    @property
    def done(self) -> int:
        """How many units are done."""
        ...

    @property
    def total(self) -> int | None:
        """Of how many; None: unknown."""
        ...

    @property
    def unit(self) -> str:
        """One of what is counted."""
        ...

    @property
    def numbers(self) -> Mapping[str, str]:
        """A few numbers, such as the loss."""
        ...


def duration(seconds: float) -> str:
    """Return "45s", "3m20s" or "2h05m", which config.parse_duration reads back."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class ProgressLog:
    """The newest step, how fast the steps come, and the log lines that are due; any thread may use it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._started_s = clock()
        self._step: Step | None = None
        self._samples: deque[tuple[float, int]] = deque(maxlen=SAMPLES)
        self._said_s: dict[str, float] = {}
        self._lines: list[str] = []
        self.version = 0

    def note(self, step: Step) -> None:
        """Take a step. It is called for every image and every training step: nothing slow happens here."""
        now = self._clock()
        with self._lock:
            before, self._step = self._step, step
            if before is None or before.stage != step.stage or step.done < before.done:
                self._samples.clear()
            if not self._samples or now - self._samples[-1][0] >= SAMPLE_S:
                self._samples.append((now, step.done))
            self.version += 1
            # Per stage: two bars that take turns, one inside the other, would otherwise be a line for every step.
            if now - self._said_s.get(step.stage, -SAY_EVERY_S) >= SAY_EVERY_S:
                self._said_s[step.stage] = now
                self._lines.append(self._message(now))

    def lines(self) -> list[str]:
        """Return the log lines that became due since the last call."""
        with self._lock:
            lines, self._lines = self._lines, []
        return lines

    def message(self) -> str:
        """Return how far the job is, in one line."""
        with self._lock:
            return self._message(self._clock())

    def values(self) -> dict[str, str]:
        """Return the same for programs; what is not known is an empty text, and no key is ever left out."""
        with self._lock:
            now, step = self._clock(), self._step
            rate, left = self._rate(now), self._left_s(now)
            values = {
                "stage": "" if step is None else step.stage,
                "done": "" if step is None else str(step.done),
                "total": "" if step is None or step.total is None else str(step.total),
                "unit": "" if step is None else step.unit,
                "rate (1/s)": "" if rate is None else f"{rate:.3f}",
                "ETA of this stage (s)": "" if left is None else f"{left:.0f}",
                "elapsed (s)": f"{now - self._started_s:.0f}",
            }
            return values | ({} if step is None else {str(k): str(v) for k, v in step.numbers.items()})

    def _rate(self, now: float) -> float | None:
        if self._step is None or not self._samples:
            return None
        first_s, first = self._samples[0]
        gained, took_s = self._step.done - first, now - first_s
        return gained / took_s if gained > 0 and took_s >= SAMPLE_S else None

    def _left_s(self, now: float) -> float | None:
        rate, step = self._rate(now), self._step
        if rate is None or step is None or step.total is None:
            return None
        return max(0.0, (step.total - step.done) / rate)

    def _message(self, now: float) -> str:
        step = self._step
        if step is None:
            return "starting"
        of = "" if step.total is None else f" of {step.total}"
        parts = [f"{step.stage or 'working'}: {step.done}{of} {step.unit}s"]
        rate, left = self._rate(now), self._left_s(now)
        parts += [] if rate is None else [f"{rate:.3g}/s"]
        parts += [] if left is None else [f"{duration(left)} left"]
        return ", ".join([*parts, *(f"{name} {value}" for name, value in step.numbers.items())])


def progress_array(
    stamp: Any, node_name: str, out: str, level: bytes, message: str, values: Mapping[str, str]
) -> DiagnosticArray:
    """Return the job's one status, of the folder ``out``; ``level`` is a member of DiagnosticStatus."""
    status = DiagnosticStatus(level=level, name=f"{node_name}: distillation", message=message, hardware_id=out)
    status.values = [KeyValue(key=key, value=value) for key, value in values.items()]
    array = DiagnosticArray(status=[status])
    array.header.stamp = stamp
    return array
