# SPDX-License-Identifier: Apache-2.0
"""The trial finds how a training is fastest on this machine, and what a step takes then."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from ukd_ros.data.progress import Bar, Stopped
from ukd_ros.data.scenes import SceneConfig
from ukd_ros.distillation import new_object_trial
from ukd_ros.distillation.forked import ForkError
from ukd_ros.distillation.new_object_plan import STEP_OF_AN_IDLE_CORE_S, Rates, steps_within
from ukd_ros.distillation.new_object_request import training_of_a_part
from ukd_ros.distillation.new_object_trial import PROBE_IMAGES, PROBE_STEPS, Trial, sharings, views_in_memory
from ukd_ros.distillation.train_config import TrainConfig

CONFIG = TrainConfig(batch_size=32, micro_batch=16, device="cpu")


@dataclass
class Machine:
    """A clock, and what renders and steps take on it, by threads and processes."""

    step_s: dict[tuple[int, int], float]
    refuses: tuple[int, int] | None = None
    interrupted: tuple[int, int] | None = None
    time: float = 0.0
    tried: list[tuple[int, int]] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def render(self, count: int) -> None:
        self.time += 3.0
        for _ in Bar(range(count), desc="rendering", disable=True):
            self.time += 0.1

    def train(
        self, config: TrainConfig, data: Sequence[Path], out: Path, *, processes: int = 1, progress: bool = True
    ) -> None:
        self.tried.append((config.threads, processes))
        if self.tried[-1] == self.refuses:
            raise ForkError("process 2 of 2: OSError: no room left")
        if self.tried[-1] == self.interrupted:
            raise Stopped("checkpoint.pt: interrupted at step 2 of 6, which is kept; go on with --resume")
        self.time += 2.0
        with Bar(total=config.steps, desc="training", disable=True) as bar:
            for _ in range(config.steps):
                self.time += self.step_s[self.tried[-1]]
                bar.update()


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Return what gives the rates of a machine of so many cores."""

    def rates(machine: Machine, cores: int, config: TrainConfig = CONFIG, left_s: float = 1000.0) -> Any:
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(new_object_trial, "train_on_folders", machine.train)
        trial = Trial(config, SceneConfig(), tmp_path / "data", tmp_path, lambda: left_s - machine.time, machine.now)
        return trial.rates(machine.render, 0)

    return rates


def test_two_processes_are_taken_where_they_are_faster(on: Callable[..., Any]) -> None:
    machine = Machine({(1, 1): 0.4, (1, 2): 0.25})
    rates = on(machine, 2)
    assert machine.tried == [(1, 1), (1, 2)]
    assert (rates.threads, rates.processes) == (1, 2)
    assert rates.step_s == pytest.approx(0.25)
    assert rates.image_s == pytest.approx(0.1, rel=0.3)
    assert rates.train_start_s == pytest.approx(2.0, abs=0.1)
    # what is not a training runs as fast as one core does
    assert rates.slowness == pytest.approx(0.4 / STEP_OF_AN_IDLE_CORE_S)


def test_one_process_stays_where_others_hold_the_second_core(on: Callable[..., Any]) -> None:
    rates = on(Machine({(1, 1): 0.4, (1, 2): 1.5}), 2)
    assert (rates.threads, rates.processes, rates.step_s) == (1, 1, pytest.approx(0.4))


def test_one_process_stays_where_forks_fail(on: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    rates = on(Machine({(1, 1): 0.4, (1, 2): 0.2}, refuses=(1, 2)), 2)
    assert (rates.threads, rates.processes) == (1, 1)
    assert "no room left" in caplog.text


def test_many_cores_may_be_faster_as_threads(on: Callable[..., Any]) -> None:
    machine = Machine({(1, 1): 0.4, (1, 2): 0.25, (8, 1): 0.1})
    rates = on(machine, 8)
    assert machine.tried == [(1, 1), (1, 2), (8, 1)]  # a fork cannot use threads that were used before it
    assert (rates.threads, rates.processes) == (8, 1)


def test_a_trial_without_time_stops(on: Callable[..., Any]) -> None:
    with pytest.raises(Stopped):
        on(Machine({(1, 1): 0.4}), 2, left_s=4.0)


def test_what_is_tried_follows_cores_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for cores, micro, ensemble, tried in [
        (1, 16, False, []),
        (2, 16, False, [(1, 2)]),
        (2, 32, False, [(2, 1)]),
        (4, 8, False, [(1, 4)]),
        (3, 8, False, [(1, 2), (3, 1)]),
        (2, 16, True, [(1, 2)]),
        (8, 16, True, []),
    ]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        config = TrainConfig(batch_size=32, micro_batch=micro, device="cpu")
        assert sharings(config, ensemble) == tried
    monkeypatch.setenv("RANK", "0")
    assert sharings(CONFIG, False) == [(8, 1)]
    part = training_of_a_part()
    assert part.batch_size // part.micro_batch >= 2  # so that two cores can share a step


def test_the_memory_holds_fewer_views_the_larger_they_are() -> None:
    small, large = (views_in_memory(SceneConfig(width=width, height=480)) for width in (320, 640))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < large < small < total / (320 * 480)
    assert small == pytest.approx(2 * large, rel=0.1)


def test_teachers_are_planned_by_their_own_steps() -> None:
    rates = Rates(3.0, 0.1, 2.0, 0.2, 1, 2, teach_step_s=0.5)
    assert steps_within(400.0, rates) > 2 * steps_within(400.0, rates.teaching())
    assert rates.trunk() == rates
    many_cores = replace(rates, processes=1, step_s=0.9)  # of one thread; a teacher has half of the cores
    assert many_cores.trunk().step_s == 0.5
    gpu = replace(rates, processes=1)  # where teachers come one after another
    assert gpu.trunk().step_s == 0.2
    assert PROBE_IMAGES >= 4 and PROBE_STEPS >= 4
    assert steps_within(400.0, rates.alone()) == steps_within(400.0, rates)  # one core was not timed
    assert steps_within(400.0, replace(rates, core_step_s=0.4).alone()) < 0.6 * steps_within(400.0, rates)


def test_who_asks_to_stop_in_the_trial_is_heard(on: Callable[..., Any]) -> None:
    machine = Machine({(1, 1): 0.4, (1, 2): 0.3}, interrupted=(1, 2))
    with pytest.raises(Stopped, match="interrupted at step 2"):
        on(machine, 2)
