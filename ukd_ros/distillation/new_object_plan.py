# SPDX-License-Identifier: Apache-2.0
"""How the time of `ukd new-object` is shared out: pure arithmetic on rates that were measured on this machine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ukd_ros.data.progress import Progress, Stopped

TEACHERS_FROM_S = 3600.0
"""Below this budget there are no teachers: two networks of a few minutes know less than one of twice that time."""

LEAST_BUDGET_S = 300.0

TRUNK, TEACHING = 0.55, 0.17
"""Parts of the learning time, where there are teachers, for what they and the student have in common and for their own;
the student beside them has the rest."""

STEP_OF_AN_IDLE_CORE_S = 0.3
"""A training step of 32 windows takes this long on a core like those that the times below were measured on."""

EXPORT_S, FIT_S, PICTURES_S, REPORT_S = 8.0, 8.0, 5.0, 4.0
CALIBRATED_VIEW_S, EVALUATED_VIEW_S = 0.08, 0.12
"""Seconds on such a core; what follows the training is planned with them and planned again once it can be timed."""

LEAST = {"train": 32, "calibrate": 32, "evaluate": 16}
MOST = {"train": 6000, "calibrate": 500, "evaluate": 250}
"""Images. The trial makes the first ones to calibrate on; what the training holds in memory bounds the most of those to
train on, and more views than these do not change a calibration."""

TRAINING_SLACK = 0.94
"""A training is planned to end after this part of its time; the rest is for checkpoints, curves and other programs."""

LAST_CYCLE = 0.15
"""This part of a training's time is enough to bring the learning rate down when it would not end in time."""

ASKING = 1.7
"""A step beside teachers takes so many times as long as a plain one: they are asked about every third window once."""

ON_THEIR_OWN = 1.15
"""A teacher's step takes so many times as long as the trial says where the trunk's took as long as it says: each goes
through all views, which no cache holds."""

SLOWEST = 2.0
"""What the trunk saw of this machine is believed up to so many times the trial's steps: what held it up may be gone."""

ASKING_STAGE = "asking the teachers"

TICKS = 10
"""Steps between lines of metrics, and steps that are seen before a training is judged too slow."""

STARVED = 3.0
"""Steps that take so many times as long as planned: threads wait for cores that other programs hold."""

FEWEST_STEPS = 8


@dataclass(frozen=True)
class Rates:
    """What this machine did in a short trial: s to start the renderer, s per image with all its processes, s to open
    the data and the network, s per step of the student's training, with the threads (0: torch's own choice) and
    processes that were fastest; s per step of the teachers' side by side, and of a student's on one core (None: as the
    student's); the views that there is memory for.
    """

    render_start_s: float
    image_s: float
    train_start_s: float
    step_s: float
    threads: int
    processes: int = 1
    teach_step_s: float | None = None
    core_step_s: float | None = None
    most_views: int = MOST["train"]

    @property
    def slowness(self) -> float:
        """Return how many times slower than an idle core this machine is at what is not timed."""
        return max(1.0, (self.core_step_s or self.step_s) / STEP_OF_AN_IDLE_CORE_S)

    def alone(self) -> Rates:
        """Return the rates with steps on one core for the student's."""
        return replace(self, step_s=self.core_step_s or self.step_s)

    def trunk(self) -> Rates:
        """Return the rates of what teachers begin with: one process alone takes all cores, more than a teacher has."""
        alone = min(self.step_s, self.teach_step_s or self.step_s)
        return self if self.processes > 1 else replace(self, step_s=alone)

    def teaching(self) -> Rates:
        """Return the rates with the teachers' steps for the student's."""
        return replace(self, step_s=self.teach_step_s or self.step_s)


@dataclass(frozen=True)
class Plan:
    """What is to be done: images of each kind (train, calibrate, evaluate), teachers (0: none), and the seconds that
    every stage is meant to take.
    """

    images: dict[str, int]
    teachers: int
    seconds: dict[str, float]

    def as_data(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Plan:
        """Return the plan of `as_data`."""
        return Plan(dict(data["images"]), int(data["teachers"]), dict(data["seconds"]))

    def sentence(self) -> str:
        """Return the plan as a line for the user."""
        times = ", ".join(f"{name} {_minutes(seconds)}" for name, seconds in self.seconds.items())
        counts = ", ".join(f"{count} to {name}" for name, count in self.images.items())
        return f"plan: {times}; renders: {counts}"


def closing_s(rates: Rates, calibrate: int, evaluate: int) -> dict[str, float]:
    """Return the seconds of the last stages, for so many views to calibrate and to evaluate on."""
    slow = rates.slowness
    return {
        "export": slow * EXPORT_S,
        "calibrate": slow * (FIT_S + CALIBRATED_VIEW_S * calibrate),
        "evaluate": slow * (PICTURES_S + EVALUATED_VIEW_S * evaluate + REPORT_S),
    }


def make_plan(left_s: float, rates: Rates, *, teachers: int, bags: int) -> Plan:
    """Share out what is left of the budget; `teachers` is 0 below an hour.

    A quarter of the time is for rendering (a sixth where it is long: more views than the training can see are idle), a
    third of that for views that are held out. A bag takes a third of the learning time.
    """
    rendering = (0.25 if teachers == 0 else 0.16) * left_s - 2.0 * rates.render_start_s
    affordable = max(0.0, rendering) / rates.image_s
    images = {
        "train": min(_within("train", 0.66 * affordable), max(LEAST["train"], rates.most_views)),
        "calibrate": _within("calibrate", 0.22 * affordable),
        "evaluate": _within("evaluate", 0.12 * affordable),
    }
    seconds = {"render": sum(images.values()) * rates.image_s + 2.0 * rates.render_start_s}
    closing = closing_s(rates, images["calibrate"], images["evaluate"])
    learning = max(0.0, left_s - seconds["render"] - sum(closing.values()))
    if teachers:
        adapting = learning / 3.0 if bags else 0.0
        own = learning - adapting
        seconds |= {"trunk": TRUNK * own, "teach": TEACHING * own, "distil": (1.0 - TRUNK - TEACHING) * own}
        seconds |= {"adapt": adapting} if bags else {}
    else:
        seconds["train"] = learning
    return Plan(images, teachers, seconds | closing)


def steps_within(seconds: float, rates: Rates, factor: float = 1.0) -> int:
    """Return the number of steps of a training that may take so long in all, `factor` times a plain step each."""
    working = TRAINING_SLACK * seconds - rates.train_start_s
    return max(FEWEST_STEPS, int(working / (rates.step_s * factor)))


class Pace:
    """Listens to a training, and stops it when it would not end in time and only a last cycle's time is left.

    `left_s` says how long the stage may still take, s. It waits as long as it can: other programs may end.
    """

    def __init__(
        self,
        left_s: Callable[[], float],
        reserve_s: float,
        tell: Callable[[Progress], None] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stopped = False
        self._left_s, self._reserve_s, self._tell, self._now = left_s, reserve_s, tell, now
        self._ticks: deque[tuple[int, float]] = deque(maxlen=33)

    @property
    def step_s(self) -> float | None:
        """Return the seconds of a step of late, or None before there were two."""
        if len(self._ticks) < 2:
            return None
        (first, start), (last, end) = self._ticks[0], self._ticks[-1]
        return (end - start) / (last - first)

    def __call__(self, progress: Progress) -> None:
        """Take note of a step; Stopped when there is no time for the rest."""
        if self._tell is not None:
            self._tell(progress)
        if progress.stage == ASKING_STAGE and self._left_s() <= self._reserve_s:
            self.stopped = True
            raise Stopped("slower than planned")
        if progress.stage != "training" or progress.total is None:
            return
        if not self._ticks:  # the bar opens: only after a step there is anything to keep
            self._ticks.append((progress.done, self._now()))
            return
        if progress.done > self._ticks[-1][0]:
            self._ticks.append((progress.done, self._now()))
        left, step_s = self._left_s(), self.step_s
        if progress.done >= progress.total or left > self._reserve_s:
            return
        seen = step_s is not None and len(self._ticks) > TICKS
        if left <= 0.0 or (seen and step_s is not None and (progress.total - progress.done) * step_s > left):
            self.stopped = True
            raise Stopped("slower than planned")

    def forget(self) -> None:
        """Judge the pace from here on."""
        while len(self._ticks) > 1:
            self._ticks.popleft()


def _within(kind: str, count: float) -> int:
    return int(min(max(count, LEAST[kind]), MOST[kind]))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
