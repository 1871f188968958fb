# SPDX-License-Identifier: Apache-2.0
"""What the node knows about its own health: counters, rates and the last problem, as log lines and DiagnosticArray.

Counting is plain Python and may happen in any thread; only ``diagnostic_array`` makes messages.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

WINDOW = 300
"""Frames that percentiles and rates are taken over."""

SAY_AGAIN_S = 10.0
"""A problem of one kind is logged at most this often."""

PROBLEM_FRESH_S = 3.0
"""A problem that last happened longer ago no longer colours the status."""

SLOW_INPUT_FRACTION = 0.6
"""Below this fraction of the promised rate the input is called lossy."""

MIN_RATE_FRAMES = 20
"""Frames needed before a rate is judged."""

LOSSY_REMEDY = (
    "Large images between processes on one machine are lost by the stock Fast DDS shared memory (512 KB): start both "
    "sides with FASTRTPS_DEFAULT_PROFILES_FILE and FASTDDS_DEFAULT_PROFILES_FILE set to this package's "
    "config/fastdds.xml (the launch file does it for this node), or use compressed:=true."
)


@dataclass
class Problem:
    """One kind of trouble: what was last said about it, how often it happened, and when (monotonic s)."""

    text: str = ""
    count: int = 0
    last_s: float = 0.0
    logged_s: float = field(default=-SAY_AGAIN_S)
    unlogged: int = 0


class ProblemLog:
    """Logs each kind of problem at most every ten seconds, with how often it was held back, and counts them all."""

    def __init__(self, log: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Write to ``log``; ``clock`` gives seconds."""
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._problems: dict[str, Problem] = {}

    def report(self, kind: str, text: str) -> None:
        """Count a problem of this ``kind`` and log ``text`` unless its kind was logged just now."""
        now = self._clock()
        with self._lock:
            problem = self._problems.setdefault(kind, Problem(logged_s=now - SAY_AGAIN_S))
            problem.text, problem.last_s = text, now
            problem.count += 1
            due = now - problem.logged_s >= SAY_AGAIN_S
            held_back = problem.unlogged
            problem.logged_s = now if due else problem.logged_s
            problem.unlogged = 0 if due else problem.unlogged + 1
        if due:
            again = f" ({held_back} more like this since it was last logged)" if held_back else ""
            self._log(f"{text}{again}")

    def fresh(self) -> list[Problem]:
        """Return what happened within the last seconds, the newest first."""
        now = self._clock()
        with self._lock:
            recent = [p for p in self._problems.values() if now - p.last_s <= PROBLEM_FRESH_S]
            return sorted(recent, key=lambda p: -p.last_s)

    def last(self) -> tuple[str, float] | None:
        """Return the newest problem's text and its age (s), or None when all was well since the start."""
        with self._lock:
            if not self._problems:
                return None
            newest = max(self._problems.values(), key=lambda p: p.last_s)
            return newest.text, self._clock() - newest.last_s

    def counts(self) -> dict[str, int]:
        """Return how often each kind happened."""
        with self._lock:
            return {kind: problem.count for kind, problem in self._problems.items()}


class FrameStatistics:
    """Counters of one activation: what arrived, what was dropped, what was answered, and how long it took."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start at zero; ``clock`` gives seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self.received = 0
            self.dropped = 0
            self.processed = 0
            self.with_pose = 0
            self.bad_images = 0
            self.camera_infos = 0
            self.rejections: Counter[str] = Counter()
            self.last_stamp_ns: int | None = None
            self.last_arrival_s: float | None = None
            self._arrivals: deque[tuple[float, int]] = deque(maxlen=WINDOW)
            self._info_arrivals: deque[float] = deque(maxlen=4 * WINDOW)
            self._latency_ms: deque[float] = deque(maxlen=WINDOW)
            self._parts_ms: dict[str, deque[float]] = {}

    def image_arrived(self, stamp_ns: int, dropped: bool) -> float:
        """Count an image and whether it pushed an unread one out; return its arrival (monotonic s)."""
        now = self._clock()
        with self._lock:
            self.received += 1
            self.dropped += dropped
            self.last_stamp_ns, self.last_arrival_s = stamp_ns, now
            self._arrivals.append((now, stamp_ns))
        return now

    def info_arrived(self) -> None:
        """Count a camera_info."""
        with self._lock:
            self.camera_infos += 1
            self._info_arrivals.append(self._clock())

    def frame_done(self, latency_ms: float, parts_ms: dict[str, float], poses: int, reasons: list[str]) -> None:
        """Count a processed frame: callback entry to publish return (ms), its parts, poses, reasons of rejection."""
        with self._lock:
            self.processed += 1
            self.with_pose += poses > 0
            self.rejections.update(reasons)
            self._latency_ms.append(latency_ms)
            for name, value in parts_ms.items():
                self._parts_ms.setdefault(name, deque(maxlen=WINDOW)).append(value)

    def bad_image(self) -> None:
        """Count an image that gave no view."""
        with self._lock:
            self.bad_images += 1

    def rate_hz(self) -> float:
        """Return the rate at which images arrived lately, 0 when unknown."""
        with self._lock:
            return _rate([arrival for arrival, _ in self._arrivals])

    def promised_hz(self) -> float:
        """Return the rate at which the camera seems to send, 0 when unknown.

        Stamps tell it when now and then two neighbouring frames get through: the short steps between them. camera_info
        tells it too: it is small, comes once per image and is not lost where images are.
        """
        with self._lock:
            stamps = np.array([stamp for _, stamp in self._arrivals], dtype=np.int64)
            infos = list(self._info_arrivals)
            first = self._arrivals[0][0] if self._arrivals else 0.0
        if len(stamps) < MIN_RATE_FRAMES:
            return 0.0
        steps = np.diff(stamps) * 1e-9
        steps = steps[steps > 0.0]
        by_stamps = 1.0 / float(np.percentile(steps, 10)) if len(steps) else 0.0
        by_infos = _rate([arrival for arrival in infos if arrival >= first])
        return max(by_stamps, by_infos)

    def lossy(self) -> str | None:
        """Return a sentence with the remedy when images arrive far slower than they seem to be sent, else None."""
        rate, promised = self.rate_hz(), self.promised_hz()
        if promised <= 0.0 or rate >= SLOW_INPUT_FRACTION * promised:
            return None
        return f"images arrive at {rate:.1f} Hz, but seem to be sent at {promised:.1f} Hz. {LOSSY_REMEDY}"

    def percentiles_ms(self) -> dict[str, tuple[float, float]]:
        """Return (p50, p95) in ms of the latency and of each of its parts, over the last frames."""
        with self._lock:
            series = {"latency": list(self._latency_ms)} | {k: list(v) for k, v in self._parts_ms.items()}
        out = {}
        for name, values in series.items():
            if values:
                p50, p95 = np.percentile(values, [50, 95])
                out[name] = (float(p50), float(p95))
        return out


def _rate(times_s: list[float]) -> float:
    if len(times_s) < MIN_RATE_FRAMES or times_s[-1] <= times_s[0]:
        return 0.0
    return (len(times_s) - 1) / (times_s[-1] - times_s[0])


@dataclass(frozen=True)
class Input:
    """An input topic, the messages that came on it and its publishers."""

    topic: str
    count: int
    publishers: int


def silence(silent: Input, other: Input, waited_s: float) -> str:
    """Return the sentence for an input on which nothing came, with what the other one says about the cause."""
    if silent.publishers == 0:
        cure = "Is the remapping right, and does the driver run?"
    else:
        cure = "They send nothing, or their quality of service does not fit ('ros2 topic info -v' shows it)."
    return (
        f"no message on {silent.topic} for {waited_s:.0f} s; it has {silent.publishers} publishers, and {other.count} "
        f"messages came on {other.topic}. {cure}"
    )


def statistics_values(stats: FrameStatistics, node_now_ns: int) -> dict[str, str]:
    """Return what /diagnostics shows of ``stats``; ``node_now_ns`` is the node clock's time, which stamps are of."""
    values = {
        "images received": str(stats.received),
        "images dropped for a newer one": str(stats.dropped),
        "frames processed": str(stats.processed),
        "frames with a pose": str(stats.with_pose),
        "bad images": str(stats.bad_images),
        "camera_info received": str(stats.camera_infos),
        "input rate (Hz)": f"{stats.rate_hz():.2f}",
        "promised rate (Hz)": f"{stats.promised_hz():.2f}",
    }
    if stats.last_stamp_ns is not None and stats.last_arrival_s is not None:
        values["last image arrived (s ago)"] = f"{time.monotonic() - stats.last_arrival_s:.3f}"
        values["last stamp's age (s)"] = f"{(node_now_ns - stats.last_stamp_ns) * 1e-9:.3f}"
    for name, (p50, p95) in stats.percentiles_ms().items():
        values[f"{name} p50 (ms)"] = f"{p50:.2f}"
        values[f"{name} p95 (ms)"] = f"{p95:.2f}"
    for reason, count in sorted(stats.rejections.items()):
        values[f"rejected: {reason}"] = str(count)
    return values


def diagnostic_array(
    stamp: Any, node_name: str, hardware_id: str, level: bytes, message: str, values: dict[str, str]
) -> DiagnosticArray:
    """Return one status as REP-107 wants it; ``level`` is a member of DiagnosticStatus, ``stamp`` a Time message."""
    status = DiagnosticStatus(level=level, name=f"{node_name}: pose estimation", message=message)
    status.hardware_id = hardware_id
    status.values = [KeyValue(key=key, value=value) for key, value in values.items()]
    array = DiagnosticArray(status=[status])
    array.header.stamp = stamp
    return array
