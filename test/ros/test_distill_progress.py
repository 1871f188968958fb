# SPDX-License-Identifier: Apache-2.0
"""How far a job is: what is logged and how often, how fast it goes, and what is left."""

from __future__ import annotations

import pytest

from ukd_ros.config import parse_duration
from ukd_ros.data.progress import Bar, Progress, listening
from ukd_ros.ros.distill_progress import SAY_EVERY_S, ProgressLog, duration


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(stage: str, done: int, total: int | None = 100, **numbers: str) -> Progress:
    return Progress(stage, done, total, "step", numbers)


def test_a_stage_is_logged_when_it_begins_and_every_ten_seconds() -> None:
    clock = ManualClock()
    log = ProgressLog(clock)
    said = []
    for done in range(0, 25):
        log.note(step("training", done, loss="0.5"))
        said += log.lines()
        clock.now += 1.0
    assert said == [
        "training: 0 of 100 steps, loss 0.5",
        "training: 10 of 100 steps, 1/s, 1m30s left, loss 0.5",
        "training: 20 of 100 steps, 1/s, 1m20s left, loss 0.5",
    ]
    log.note(step("exporting", 0, None))
    assert log.lines() == ["exporting: 0 steps"] and log.lines() == []


def test_two_bars_one_inside_the_other_do_not_fill_the_log() -> None:
    clock = ManualClock()
    log = ProgressLog(clock)
    for done in range(50):
        log.note(step("bags", done))
        log.note(step("frames", 0))
        clock.now += 0.1
    assert len(log.lines()) == 2
    clock.now += SAY_EVERY_S
    log.note(step("frames", 0))
    assert len(log.lines()) == 1


def test_the_rate_is_that_of_the_last_minute_and_of_this_stage() -> None:
    clock = ManualClock()
    log = ProgressLog(clock)
    for done in range(1000):
        log.note(step("frames", done, 100_000))
        clock.now += 0.1
    for done in range(200):
        log.note(step("training", done, 1000, loss="1.0"))
        clock.now += 1.0
    clock.now -= 1.0
    values = log.values()
    assert values["stage"] == "training" and values["loss"] == "1.0"
    assert (values["done"], values["total"], values["unit"]) == ("199", "1000", "step")
    assert float(values["rate (1/s)"]) == pytest.approx(1.0) and values["ETA of this stage (s)"] == "801"
    assert float(values["elapsed (s)"]) == pytest.approx(299.0)
    clock.now += 601.0
    assert float(log.values()["rate (1/s)"]) < 0.2, "a job that hangs does not keep its rate"


def test_a_stage_that_begins_again_forgets_its_rate() -> None:
    clock = ManualClock()
    log = ProgressLog(clock)
    for done in (0, 500):
        log.note(step("frames", done))
        clock.now += 1.0
    log.note(step("frames", 0))
    clock.now += 5.0
    assert log.values()["rate (1/s)"] == "" and log.values()["ETA of this stage (s)"] == ""


def test_before_the_first_step_every_key_is_there_and_empty() -> None:
    clock = ManualClock()
    log = ProgressLog(clock)
    before = log.values()
    assert log.message() == "starting" and before["stage"] == before["done"] == before["ETA of this stage (s)"] == ""
    log.note(step("frames", 3, None))
    assert before.keys() == log.values().keys() and log.values()["total"] == ""


def test_a_bar_that_is_not_drawn_is_heard() -> None:
    log = ProgressLog()
    with listening(log.note):
        for _ in Bar(range(4), desc="labelling", unit="view", disable=True):
            pass
    assert log.message().startswith("labelling: 4 of 4 views") and log.version == 5


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.4, "59s"), (59.6, "1m00s"), (200.0, "3m20s"), (7499.0, "2h04m")]
)
def test_durations_are_words_that_the_configuration_reads_back(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    if seconds > 1.0:
        assert parse_duration(text) == pytest.approx(seconds, abs=60.0)
