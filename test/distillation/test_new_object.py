# SPDX-License-Identifier: Apache-2.0
"""`ukd new-object`: the plan fits the budget, the chain ends in time and goes on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from ukd_ros.cli import main
from ukd_ros.config import load_config
from ukd_ros.data.bags import BagWriter
from ukd_ros.data.demo_object import DEMO_NAME
from ukd_ros.data.meshes import MeshError
from ukd_ros.data.progress import Progress, Stopped
from ukd_ros.data.render_dataset import DEMO, MeshSource
from ukd_ros.data.renderer import RendererError
from ukd_ros.data.rosbag.options import BagOptions
from ukd_ros.data.scenes import SceneConfig
from ukd_ros.distillation import new_object as chain_module
from ukd_ros.distillation import new_object_stages as stages_module
from ukd_ros.distillation import new_object_state as state_module
from ukd_ros.distillation.checkpoint import load_checkpoint
from ukd_ros.distillation.distill import DistillConfig
from ukd_ros.distillation.new_object import NewObjectResult, new_object
from ukd_ros.distillation.new_object_part import PartFacts, inspect_part
from ukd_ros.distillation.new_object_plan import LEAST, MOST, Pace, Rates, closing_s, make_plan, steps_within
from ukd_ros.distillation.new_object_report import Story, advice, verdict
from ukd_ros.distillation.new_object_request import NewObjectConfig, NewObjectError, NewObjectRequest
from ukd_ros.distillation.new_object_stages import RealStages, Trained
from ukd_ros.distillation.new_object_state import WorkError, WorkState, locked
from ukd_ros.distillation.train_config import TrainConfig
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.view import View
from ukd_ros.perception.bundle import BundleError, find_model, load_bundle

SHIPPED = Path(find_model("spray_bottle"))
IDLE = Rates(render_start_s=3.0, image_s=0.1, train_start_s=6.0, step_s=0.2, threads=2)


class Killed(BaseException):
    """What no handler catches, like kill -9."""


@dataclass
class FakeStages:
    """Stages that take time on a clock of their own; `slower` is what other programs do after the probe."""

    rates: Rates = IDLE
    slower: float = 1.0
    fails: str = ""
    killed_at: int = -1
    time: float = 0.0
    calls: list[str] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, float | None] = field(default_factory=dict)
    every: int = 100
    saved: dict[str, tuple[int, float]] = field(default_factory=dict)
    stalls_s: dict[str, float] = field(default_factory=dict)
    tuned: Rates | None = None

    def now(self) -> float:
        return self.time

    def probe(self, ensemble: bool, left_s: Callable[[], float]) -> Rates:
        self.calls.append("probe")
        self.time += 20.0
        return self.rates

    def tune(self, rates: Rates) -> None:
        self.tuned = rates

    def unsaved_s(self, stage: str) -> float:
        if stage.startswith("render"):
            return 0.0
        names = ("student", "last") if stage in ("distil", "train") else (stage,)
        return self.time - max((self.saved[name][1] for name in names if name in self.saved), default=-1e9)

    def render(self, kind: str, count: int, left_s: Callable[[], float]) -> int:
        self.calls.append(f"render {kind}")
        for number in range(count):
            if left_s() <= 0.0:
                return number
            self.time += self.rates.image_s * self.slower
        return count

    def _steps(self, name: str, steps: int, factor: float, left_s: Callable[[], float], reserve_s: float) -> Trained:
        pace = Pace(left_s, reserve_s, now=self.now)
        step_s = self.rates.step_s * factor * self.slower
        self.time += self.rates.train_start_s + self.stalls_s.get(name, 0.0)
        begun = self.done.get(name, 0)
        pace(Progress("training", begun, steps, "step", {}))  # as the bar opens
        for step in range(begun, steps):
            self.time += step_s
            self.done[name] = step + 1
            if step + 1 == self.killed_at:
                self.done[name] = self.saved.get(name, (0, 0.0))[0]  # what came after the last checkpoint is lost
                raise Killed
            if (step + 1) % self.every == 0:
                self.saved[name] = step + 1, self.time
            try:
                pace(Progress("training", step + 1, steps, "step", {}))
            except Stopped:
                break
        self.trained[name] = self.done[name]
        return Trained(Path(f"{name}/checkpoint.pt"), self.done[name], self.done[name] == steps, pace.step_s or step_s)

    def train(
        self, name: str, steps: int, left_s: Callable[[], float], reserve_s: float, initial: str, peak: float | None
    ) -> Trained:
        self.calls.append(f"train {name}")
        self.peaks[name] = peak
        return self._steps(name, steps, 1.0, left_s, reserve_s)

    def trunk(self, steps: int, left_s: Callable[[], float]) -> Trained:
        self.calls.append("trunk")
        return self._steps("trunk", steps, 1.0, left_s, 0.0)

    def teach(self, steps: int, left_s: Callable[[], float], trunk: Path) -> list[Trained]:
        self.calls.append("teach")
        assert trunk == Path("trunk/checkpoint.pt")
        done = self._steps("teach", steps, 1.0, left_s, 0.0)
        return [replace(done, checkpoint=Path(f"seed-{i}/checkpoint.pt")) for i in range(2)]

    def distil(self, steps: int, left_s: Callable[[], float], reserve_s: float, teachers: Sequence[Path]) -> Trained:
        self.calls.append("distil")
        assert [str(path) for path in teachers] == ["seed-0/checkpoint.pt", "seed-1/checkpoint.pt"]
        return self._steps("student", steps, 1.4, left_s, reserve_s)

    def adapt(self, teachers: Sequence[Path], initial: Path, steps: int, left_s: Callable[[], float]) -> dict[str, str]:
        self.calls.append("adapt")
        self.time += 60.0
        if self.fails == "adapt":
            raise ValueError("the teachers see nothing in any of the 40 frames")
        self._steps("adapt", steps, 1.5, left_s, 0.0)
        return {"model": str(SHIPPED), "report": "adapted/report.html", "summary": "40 frames, 12 labels accepted"}

    def export(self, checkpoint: Path) -> dict[str, Any]:
        self.calls.append("export")
        self.time += 8.0 * self.slower
        return {"model": str(SHIPPED), "view_s": 0.08 * self.slower}

    def calibrate(self, model: Path, limit: int) -> dict[str, Any]:
        self.calls.append("calibrate")
        self.time += (3.0 + 0.08 * limit) * self.slower
        if self.fails == "calibrate":
            raise ValueError("No instance matches a label")
        return {"crops": "locate", "matched": 2 * limit, "labels": 3 * limit, "views": limit}

    def evaluate(self, model: Path, limit: int) -> dict[str, Any]:
        self.calls.append("evaluate")
        self.time += (5.0 + 0.12 * limit) * self.slower
        return EVALUATED


EVALUATED: dict[str, Any] = {
    "images": 80, "targets": 240, "add_recall": 0.5, "detected": 0.9, "translation_mm": 9.0, "rotation_deg": 3.0,
    "keypoint_px": 2.0, "answered": 210, "coverage": 0.94, "nees": 6.2, "causes": {"depth": 80, "not found": 24},
    "false_alarms": 1, "latency_ms": 9.0,
}  # fmt: skip


def asked(folder: Path, budget_s: float = 600.0, **changes: Any) -> NewObjectRequest:
    request = NewObjectRequest(DEMO, None, "bottle", budget_s, folder / "models" / "bottle", folder / "work")
    return replace(request, **changes)


def recorded(path: Path, cameras: int = 1) -> Path:
    """Write a small bag of so many cameras."""
    with BagWriter(path) as bag:
        for number in range(cameras):
            camera = Camera(16, 12, np.array([[20.0, 0, 7.5], [0, 20, 5.5], [0, 0, 1]]))
            view = View(np.zeros((12, 16, 3), np.uint8), camera, 10**18, f"camera{number}")
            bag.write_view(view, f"/camera{number}")
    return path


def make(folder: Path, stages: FakeStages, budget_s: float = 600.0, **changes: Any) -> NewObjectResult:
    return run(NewObjectConfig(), asked(folder, budget_s, **changes), stages)


def run(config: NewObjectConfig, request: NewObjectRequest, stages: FakeStages) -> NewObjectResult:
    return new_object(config, request, stages=lambda part: stages, now=stages.now, progress=False)


# ---- the plan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget_s", [285.0, 600.0, 1200.0, 7200.0])
@pytest.mark.parametrize("slow", [1.0, 3.0])
def test_the_plan_fills_the_time_and_no_more(budget_s: float, slow: float) -> None:
    rates = Rates(3.0 * slow, 0.1 * slow, 6.0 * slow, 0.2 * slow, 2)
    plan = make_plan(budget_s, rates, teachers=2 if budget_s >= 3600 else 0, bags=1)
    assert sum(plan.seconds.values()) == pytest.approx(budget_s)
    assert all(seconds > 0.0 for seconds in plan.seconds.values())
    assert all(plan.images[kind] >= LEAST[kind] for kind in LEAST)
    assert ("teach" in plan.seconds) == (budget_s >= 3600)


def test_no_more_views_than_there_is_memory_for() -> None:
    rates = Rates(3.0, 0.1, 6.0, 0.2, 2)
    plenty, little = (make_plan(7200.0, replace(rates, most_views=most), teachers=2, bags=0) for most in (10**6, 900))
    assert plenty.images["train"] == MOST["train"] and little.images["train"] == 900
    assert make_plan(7200.0, replace(rates, most_views=1), teachers=2, bags=0).images["train"] == LEAST["train"]
    assert sum(little.seconds.values()) == pytest.approx(7200.0)


def test_steps_fit_the_time_with_slack() -> None:
    steps = steps_within(400.0, IDLE)
    assert 0.85 * 400.0 < IDLE.train_start_s + steps * IDLE.step_s < 0.95 * 400.0
    assert steps_within(400.0, IDLE, factor=1.5) < 0.7 * steps


def test_a_training_is_stopped_only_when_a_last_cycle_is_all_there_is_time_for() -> None:
    clock = [0.0]
    pace = Pace(lambda: 100.0 - clock[0], 15.0, now=lambda: clock[0])
    with pytest.raises(Stopped):
        for step in range(1, 300):
            clock[0] += 1.0
            pace(Progress("training", step, 300, "step", {}))
    assert pace.stopped and clock[0] == pytest.approx(85.0, abs=1.5)
    assert pace.step_s == pytest.approx(1.0)
    clock[0] = 0.0
    quick = Pace(lambda: 100.0 - clock[0], 15.0, now=lambda: clock[0])
    for step in range(1, 98):  # 97 s: it ends in time, though the last cycle's time has begun
        clock[0] += 1.0
        quick(Progress("training", step, 97, "step", {}))
    assert not quick.stopped
    clock[0] = 0.0
    starved = Pace(lambda: 100.0 - clock[0], 15.0, now=lambda: clock[0])
    with pytest.raises(Stopped):
        for step in range(1, 9):  # too few steps to judge it by, and no time left
            clock[0] += 30.0
            starved(Progress("training", step, 97, "step", {}))
    assert clock[0] == 120.0


# ---- the chain ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slower", [1.0, 1.2, 1.4])
def test_what_the_trunk_saw_of_the_machine_shortens_what_follows(tmp_path: Path, slower: float) -> None:
    stages = FakeStages(slower=slower)
    run(NewObjectConfig(), asked(tmp_path, budget_s=7200.0), stages)
    state = json.loads((tmp_path / "work" / "state.json").read_text())
    assert stages.trained["teach"] == state["decisions"]["teach.steps"]  # to the end of its learning rates
    assert stages.trained["student"] == state["decisions"]["distil.steps"] and "train last" not in stages.calls
    assert 0.8 * 7200.0 < stages.time < 7200.0


@pytest.mark.parametrize("slower", [1.0, 1.3, 2.5])
@pytest.mark.parametrize("budget_s", [300.0, 1200.0, 3600.0])
def test_the_chain_ends_within_the_budget(tmp_path: Path, budget_s: float, slower: float) -> None:
    stages = FakeStages(slower=slower)
    result = make(tmp_path, stages, budget_s)
    assert stages.time <= budget_s
    assert stages.time > 0.7 * budget_s or slower > 1.0
    assert stages.calls[-3:] == ["export", "calibrate", "evaluate"]
    assert load_bundle(result.model).name == "bottle"
    assert result.launch == f"ros2 launch ukd_ros pose.launch.py model:={result.model.resolve()}"


def test_a_training_that_other_programs_slow_down_ends_with_a_low_learning_rate(tmp_path: Path) -> None:
    stages = FakeStages(slower=2.0)
    make(tmp_path, stages, 1200.0)
    assert "train last" in stages.calls
    peak = stages.peaks["last"]
    assert peak is not None and 0.0 < peak < TrainConfig().learning_rate
    state = json.loads((tmp_path / "work" / "state.json").read_text())
    assert stages.trained["last"] == state["decisions"]["train.cut"]["steps"]  # the last cycle came to its end
    assert "ended early" in (tmp_path / "work" / "report.html").read_text()


def test_teachers_come_from_an_hour_on_and_their_absence_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages = FakeStages()
    make(tmp_path / "long", stages, 3600.0)
    assert [name for name in stages.calls if name in ("trunk", "teach", "distil")] == ["trunk", "teach", "distil"]
    assert "train student" not in stages.calls
    page = (tmp_path / "long" / "work" / "report.html").read_text()
    before = stages.trained["trunk"] + stages.trained["teach"]
    assert f"{before + stages.trained['student']} steps" in page
    assert f"{before} of the steps before there were teachers" in page
    with caplog.at_level("WARNING"):
        stages = FakeStages()
        make(tmp_path / "short", stages, 3599.0)
    assert not {"trunk", "teach"} & set(stages.calls) and "train student" in stages.calls
    assert "no teachers" in caplog.text


def test_trunk_teachers_and_student_see_windows_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[TrainConfig] = []

    def note(config: TrainConfig, *rest: Any, **more: Any) -> Any:
        asked_for.append(config)
        raise Stopped("seen")

    for name in ("train_on_folders", "train_ensemble", "distill_on_folders"):  # on one process the trunk has a fork
        monkeypatch.setattr(stages_module, name, note)
    monkeypatch.setattr(stages_module, "open_folders", lambda *_, **__: (None, None, None))
    config = NewObjectConfig(seed=7, teachers=3)
    stages = RealStages(config, MeshSource(DEMO), "farthest", config.scene, tmp_path, progress=False)
    for work in (
        lambda: stages.trunk(100, lambda: 9.0),
        lambda: stages.teach(100, lambda: 9.0, Path("trunk.pt")),
        lambda: stages.distil(100, lambda: 9.0, 1.0, [Path("first.pt"), Path("second.pt"), Path("third.pt")]),
    ):
        with pytest.raises(Stopped, match="seen"):
            work()
    trunk, teacher, student = asked_for
    assert isinstance(student, DistillConfig)
    assert (trunk.hold, teacher.hold, student.hold) == (1.0, 0.0, 0.0)
    assert (teacher.initial, student.initial) == ("trunk.pt", "first.pt")
    assert not {trunk.seed, student.window_seed} & {teacher.seed + member for member in range(3)}
    assert trunk.seed != student.window_seed
    stages.processes = 2
    with pytest.raises(Stopped, match="seen"):
        stages.trunk(100, lambda: 9.0)
    assert replace(asked_for[-1], threads=trunk.threads) == trunk


def test_a_bag_adapts_the_student_when_there_are_teachers(tmp_path: Path) -> None:
    stages = FakeStages()
    make(tmp_path, stages, 7200.0, bags=(recorded(tmp_path / "bag"),))
    assert stages.time <= 7200.0
    assert stages.calls.index("calibrate") < stages.calls.index("adapt") < stages.calls.index("evaluate")
    assert "12 labels accepted" in (tmp_path / "work" / "report.html").read_text()


def test_an_adaptation_that_fails_leaves_the_model_from_renders_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bag, report = recorded(tmp_path / "bag"), tmp_path / "work" / "report.html"
    with caplog.at_level("WARNING"):
        result = make(tmp_path, FakeStages(fails="adapt"), 3600.0, bags=(bag,))
    assert load_bundle(result.model)
    assert "not adapted to the bag" in caplog.text and "see nothing" in caplog.text
    assert "see nothing" in report.read_text()
    again = FakeStages()
    make(tmp_path, again, 3600.0, bags=(bag,))
    assert again.calls == ["adapt"], "the same call tries again, and nothing else"
    assert "see nothing" not in report.read_text() and "12 labels accepted" in report.read_text()


def test_an_adaptation_that_failed_is_tried_again_with_other_settings_of_the_bag(tmp_path: Path) -> None:
    request = asked(tmp_path, 3600.0, bags=(recorded(tmp_path / "bag"),))
    calls = []
    for bags, fails in ((BagOptions(), "adapt"), (BagOptions(held_out=0.0), "")):
        stages = FakeStages(fails=fails)
        run(NewObjectConfig(bags=bags), request, stages)
        calls.append(stages.calls)
    assert calls[1] == ["adapt", "evaluate"]


def test_bags_are_looked_at_before_any_work(tmp_path: Path) -> None:
    stages = FakeStages()
    (tmp_path / "empty.mcap").write_bytes(b"")
    with pytest.raises(NewObjectError, match="empty"):
        make(tmp_path, stages, 3600.0, bags=(tmp_path / "empty.mcap",))
    request = asked(tmp_path, 3600.0, bags=(recorded(tmp_path / "two", cameras=2),))
    with pytest.raises(NewObjectError, match=r"image_topic.*--set bags\.image_topic"):
        run(NewObjectConfig(), request, stages)
    assert stages.calls == []
    chosen = load_config(NewObjectConfig, None, ["bags.image_topic=/camera1/image/compressed"])
    run(chosen, request, stages)
    assert "adapt" in stages.calls
    real = RealStages(chosen, MeshSource(DEMO), "farthest", chosen.scene, tmp_path, bags=request.bags)
    assert real.config.bags.image_topic == "/camera1/image/compressed"


def test_below_an_hour_a_bag_is_said_to_be_of_no_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bag = tmp_path / "bag.mcap"
    bag.write_bytes(b"x")
    stages = FakeStages()
    with caplog.at_level("WARNING"):
        make(tmp_path, stages, 600.0, bags=(bag,))
    assert "adapt" not in stages.calls
    assert "the bag is not used" in caplog.text and "--budget 1h" in caplog.text


def test_a_student_that_cannot_be_calibrated_is_not_shipped(tmp_path: Path) -> None:
    with pytest.raises(NewObjectError, match="no model was made.*larger --budget"):
        make(tmp_path, FakeStages(fails="calibrate"))
    assert not (tmp_path / "models").exists()


def test_a_machine_that_is_too_busy_is_said_at_once(tmp_path: Path) -> None:
    stages = FakeStages(rates=Rates(20.0, 1.0, 20.0, 3.0, 1))
    with pytest.raises(NewObjectError, match="too busy or too slow.*more than 5m"):
        make(tmp_path, stages, 300.0)
    assert stages.calls == ["probe"]

    class Endless(FakeStages):
        def probe(self, ensemble: bool, left_s: Callable[[], float]) -> Rates:
            while left_s() > 0.0:
                self.time += 5.0
            raise Stopped("the time for the trial is up")

    endless = Endless()
    with pytest.raises(NewObjectError, match="did not end in 120 s"):
        make(tmp_path / "endless", endless, 300.0)
    assert endless.time <= 130.0


# ---- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget_s", "killed_at"), [(300.0, 399), (600.0, 500), (600.0, 999)])
def test_a_killed_run_goes_on_to_the_same_model(tmp_path: Path, budget_s: float, killed_at: int) -> None:
    whole = FakeStages()
    make(tmp_path / "whole", whole, budget_s)
    broken = FakeStages(killed_at=killed_at)
    with pytest.raises(Killed):
        make(tmp_path / "broken", broken, budget_s)
    broken.killed_at, broken.calls = -1, []
    make(tmp_path / "broken", broken, budget_s)
    assert broken.tuned == whole.tuned == IDLE  # the probe's threads serve the second call too
    assert broken.calls == ["train student", "export", "calibrate", "evaluate"]
    assert broken.trained == whole.trained
    kept = [
        json.loads((tmp_path / name / "work" / "state.json").read_text())["decisions"] for name in ("whole", "broken")
    ]
    assert kept[0]["plan"] == kept[1]["plan"] and kept[0]["train.steps"] == kept[1]["train.steps"]


@pytest.mark.parametrize("stage", ["student", "trunk"])
def test_a_stall_that_takes_all_the_time_leaves_a_model(tmp_path: Path, stage: str) -> None:
    budget_s = 600.0 if stage == "student" else 3600.0
    stages = FakeStages(stalls_s={stage: budget_s})  # a laptop that was shut, say
    make(tmp_path, stages, budget_s)
    assert stages.trained[stage] == 1 and "evaluate" in stages.calls


def test_what_a_kill_would_lose_is_told_by_the_checkpoints(tmp_path: Path) -> None:
    config = NewObjectConfig()
    stages = RealStages(config, MeshSource(DEMO), "farthest", config.scene, tmp_path, progress=False)
    assert stages.unsaved_s("render.train") == 0.0
    now = time.time()
    for stage, folders in {"trunk": ["trunk/seed-2"], "teach": ["teachers/seed-0", "teachers/seed-1"],
                           "train": ["student", "last"]}.items():  # fmt: skip
        for age, folder in ((50.0, folders[0]), (20.0, folders[-1])):
            assert stages.unsaved_s(stage) == float("inf") or stage == "train"
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "checkpoint.pt").touch()
            os.utime(tmp_path / folder / "checkpoint.pt", (now - age, now - age))
            if len(folders) == 1:
                break
    lost = {stage: stages.unsaved_s(stage) for stage in ("trunk", "teach", "train", "distil")}
    assert lost == pytest.approx({"trunk": 50.0, "teach": 50.0, "train": 20.0, "distil": 20.0}, abs=5.0)


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise Stopped("student/checkpoint.pt: interrupted at step 7, which is kept; go on with --resume")

    monkeypatch.setattr(chain_module, "new_object", interrupted)
    words = ["new-object", "--mesh", DEMO, "--name", "part", "--budget", "10m", "--work", str(tmp_path / "work")]
    assert main(words) == 130
    said = capsys.readouterr().err
    assert f"kept in {tmp_path / 'work'}, and the same line goes on" in said and "--resume" not in said


def test_a_finished_run_does_nothing_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = make(tmp_path, FakeStages())
    again = FakeStages()
    with caplog.at_level("INFO"):
        second = make(tmp_path, again)
    assert again.calls == [] and second == first
    assert "is finished already" in caplog.text


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"budget_s": 700.0}, "budget = 600 s, not 700 s"), ({"name": "can"}, "name = bottle, not can")],
)
def test_other_arguments_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    make(tmp_path, FakeStages())
    stages = FakeStages()
    with pytest.raises(WorkError, match=named):
        make(tmp_path, stages, **changes)
    assert stages.calls == []


def test_another_setting_is_refused_by_its_key(tmp_path: Path) -> None:
    stages = FakeStages()
    make(tmp_path, stages)
    with pytest.raises(WorkError, match=r"settings\.train\.learning_rate"):
        config = NewObjectConfig(train=replace(NewObjectConfig().train, learning_rate=0.5))
        new_object(config, asked(tmp_path), stages=lambda part: stages, now=stages.now)


def test_a_work_folder_serves_one_process_and_holds_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "WAIT_S", 0.2)
    with locked(tmp_path / "work"), pytest.raises(WorkError, match="another ukd new-object"):
        make(tmp_path, FakeStages())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(WorkError, match="thesis.tex"):
        make(tmp_path, FakeStages(), work=tmp_path / "other")
    (tmp_path / "work" / "state.json").write_text("{")
    with pytest.raises(WorkError, match="damaged"):
        make(tmp_path, FakeStages())


def test_forks_of_a_killed_process_are_waited_for(tmp_path: Path) -> None:
    other = locked(tmp_path)
    other.__enter__()
    threading.Timer(0.4, other.__exit__, (None, None, None)).start()
    with locked(tmp_path):
        pass


def test_a_stage_of_other_inputs_is_done_again(tmp_path: Path) -> None:
    state = WorkState(tmp_path, {"name": "a"})
    state.finish("train", state.digest("train", {"steps": 10}), 5.0, {"step": 10})
    again = WorkState(tmp_path, {"name": "a"})
    assert again.result("train", again.digest("train", {"steps": 10})) == {"step": 10}
    other = WorkState(tmp_path, {"name": "a"})
    assert other.result("train", other.digest("train", {"steps": 11})) is None


def test_a_model_that_is_there_is_replaced_when_asked_for(tmp_path: Path) -> None:
    make(tmp_path / "a", FakeStages())
    out = tmp_path / "a" / "models" / "bottle"
    before = (out / "model.yaml").stat().st_ino
    stages = FakeStages()
    with pytest.raises(NewObjectError, match="exists already"):
        make(tmp_path / "b", stages, out=out)
    make(tmp_path / "c", stages, out=out, overwrite=True)
    assert (out / "model.yaml").stat().st_ino != before
    make(tmp_path / "c", FakeStages(), out=out)  # its own: no need to say it again


def test_a_refused_model_folder_binds_nothing_and_its_advice_works(tmp_path: Path) -> None:
    (tmp_path / "models" / "bottle").mkdir(parents=True)
    with pytest.raises(NewObjectError, match="choose another --name or --out"):
        make(tmp_path, FakeStages())
    make(tmp_path, FakeStages(), name="can", out=tmp_path / "models" / "can")
    moved = FakeStages()
    assert make(tmp_path, moved, name="can", out=tmp_path / "elsewhere" / "can").model.is_dir()
    assert moved.calls == [], "a finished model is put anywhere"


def test_a_model_folder_that_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    stages = FakeStages()
    (tmp_path / "file").write_text("x")
    with pytest.raises(NewObjectError, match="nothing can be written in /proc.*another --out"):
        make(tmp_path, stages, out=Path("/proc/models/part"))
    with pytest.raises(NewObjectError, match="file is a file"):
        make(tmp_path, stages, out=tmp_path / "file" / "part")
    assert stages.calls == []


# ---- what is refused before any work ----------------------------------------------------------------------------


def mesh_file(folder: Path, mesh: trimesh.Trimesh, name: str = "part.ply") -> str:
    mesh.export(folder / name)
    return str(folder / name)


def test_bad_arguments_are_refused_in_one_sentence(tmp_path: Path) -> None:
    stages = FakeStages()
    with pytest.raises(NewObjectError, match="give 5m or more"):
        make(tmp_path, stages, budget_s=299.0)
    for name in ("2nd", "a-b", "a/b", "", "é"):
        with pytest.raises(NewObjectError, match="ROS topic"):
            make(tmp_path, stages, name=name)
    with pytest.raises(NewObjectError, match="no such bag"):
        make(tmp_path, stages, bags=(tmp_path / "none.mcap",))
    (tmp_path / "models" / "bottle").mkdir(parents=True)
    with pytest.raises(NewObjectError, match="exists already.*--overwrite"):
        make(tmp_path, stages)
    with pytest.raises(BundleError, match="model.yaml"):
        make(tmp_path, stages, overwrite=True)
    box = mesh_file(tmp_path, trimesh.creation.box((100, 60, 40)))
    with pytest.raises(MeshError, match="unit"):
        make(tmp_path / "b", stages, mesh=box, unit="m")
    empty = tmp_path / "empty.stl"
    empty.write_bytes(b"")
    with pytest.raises(MeshError, match="empty.stl"):
        make(tmp_path / "b", stages, mesh=str(empty), unit="mm")
    sheet = trimesh.Trimesh([[0, 0, 0], [90, 0, 0], [0, 90, 0], [90, 90, 0]], [[0, 1, 2], [1, 3, 2]])
    with pytest.raises(MeshError, match="one plane"):
        make(tmp_path / "b", stages, mesh=mesh_file(tmp_path, sheet, "sheet.ply"), unit="mm")
    assert stages.calls == []


def test_without_opengl_nothing_is_left_where_the_model_would_be(tmp_path: Path) -> None:
    class Blind(FakeStages):
        def probe(self, ensemble: bool, left_s: Callable[[], float]) -> Rates:
            raise RendererError("no headless OpenGL: apt install libegl1")

    with pytest.raises(RendererError, match="apt install"):
        make(tmp_path, Blind())
    assert not (tmp_path / "models").exists()


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "new-object",
        "--mesh",
        DEMO,
        "--name",
        "bottle",
        "--out",
        str(tmp_path / "m"),
        "--work",
        str(tmp_path / "w"),
    ]
    assert main([*words, "--budget", "2m"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(words) == 2
    assert "--budget must be given" in capsys.readouterr().err
    assert main(["new-object", "--mesh", "part.ply", "--name", "a", "--budget", "5m"]) == 2
    assert "--unit must be given" in capsys.readouterr().err


# ---- the mesh ----------------------------------------------------------------------------------------------------


def facts(folder: Path, mesh: trimesh.Trimesh) -> PartFacts:
    return inspect_part(MeshSource(mesh_file(folder, mesh), "mm"), keypoints=12)


def test_a_mesh_is_looked_at(tmp_path: Path) -> None:
    box = facts(tmp_path, trimesh.creation.box((100, 60, 40)))
    assert box.keypoint_kind == "box" and box.open_edges == 0.0 and not box.coloured and box.bare
    assert box.alike == ("x:180", "y:180", "z:180")
    assert facts(tmp_path, trimesh.creation.cylinder(30, 90, sections=128)).alike == ("x:180", "y:180", "z")
    assert facts(tmp_path, trimesh.creation.box((60, 60, 40))).alike[-1] == "z:90"
    holed = trimesh.creation.box((100, 60, 40))
    holed.update_faces(np.arange(len(holed.faces)) > 1)
    assert facts(tmp_path, holed).open_edges > 0.1
    demo = inspect_part(MeshSource(DEMO), keypoints=12)
    assert demo.coloured and not demo.bare and demo.alike == () and demo.keypoint_kind == "farthest"


def test_what_a_mesh_says_is_told_before_the_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    box = trimesh.creation.box((100, 60, 40))
    said = " ".join(facts(tmp_path, box).sentences("part", ("x:180",), SceneConfig()))
    assert "--symmetry y:180 --symmetry z:180" in said and "x:180" not in said and "holes" not in said
    assert "rendered in any" in said and "scene.target_color=[r,g,b]" in said
    known = SceneConfig(target_color=(20, 20, 20))
    assert "rendered in any" not in " ".join(facts(tmp_path, box).sentences("part", (), known))
    box.visual.face_colors = (200, 20, 20, 255)
    assert not facts(tmp_path, box).bare
    box.update_faces(np.arange(len(box.faces)) > 1)
    request = asked(tmp_path, mesh=mesh_file(tmp_path, box), unit="mm")
    with caplog.at_level("INFO"), pytest.raises(NewObjectError):
        run(NewObjectConfig(), request, FakeStages(fails="calibrate"))
    start = caplog.text[: caplog.text.index("plan:")]
    assert "12.3 cm across" in start and "(holes" in start


# ---- the report --------------------------------------------------------------------------------------------------


def story(part: dict[str, Any] | None = None, **changes: Any) -> Story:
    known = PartFacts(0.2, 1000, True, False, 0.0, (), "farthest", "d")
    values: dict[str, Any] = {
        "name": "bottle", "out": Path("models/bottle"), "part": replace(known, **(part or {})), "budget_s": 1200.0,
        "plan": make_plan(1100.0, IDLE, teachers=0, bags=0), "images": {"train": 500}, "cut": False,
        "config": NewObjectConfig(), "trained": {"steps": 1000, "before": 0}, "evaluated": EVALUATED, "adapted": {},
        "bags": 0, "calibrated": {"crops": "locate", "matched": 300, "labels": 400, "views": 120}, "warnings": (),
        "seconds": {},
    }  # fmt: skip
    return Story(**{**values, **changes})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "--budget 2h"),
        ({"cut": True}, "idle machine"),
        (
            {"calibrated": {"crops": "oracle", "matched": 30, "labels": 90, "views": 40}},
            "take its error bars as a guess",
        ),
        ({"part": {"coloured": False}}, "one colour"),
        ({"part": {"open_edges": 0.3}}, "holes"),
        ({"part": {"alike": ("z:180",)}}, "--symmetry z:180"),
        ({"evaluated": {**EVALUATED, "coverage": 0.8}}, "more views to calibrate on"),
        ({"evaluated": {**EVALUATED, "coverage": 0.8, "answered": 30}}, "only roughly"),
        ({"evaluated": {**EVALUATED, "causes": {"flipped": 60, "depth": 60}}}, "from several sides"),
        ({"evaluated": {**EVALUATED, "causes": {"not found": 100}}}, "not found at all"),
        ({}, "errors are of depth"),
        ({}, "Record a bag"),
        ({"bags": 1}, "The bag was not used"),
        ({"trained": {"steps": 1000, "before": 9000}}, "has seen 320,000 windows"),
    ],
)
def test_advice_follows_from_what_was_measured(changed: dict[str, Any], words: str) -> None:
    assert any(words in text for text in advice(story(**changed)))


def test_advice_is_silent_where_nothing_was_measured() -> None:
    good = {**EVALUATED, "add_recall": 0.95, "causes": {"depth": 12}}
    said = " ".join(advice(story(evaluated=good, bags=1, budget_s=7200.0)))
    for words in ("More time", "one colour", "holes", "--symmetry", "depth", "not found", "bag"):
        assert words not in said
    assert verdict(story(evaluated=good)).startswith("A good student: 95.0%")
    assert "nothing is known" in verdict(story(evaluated={**EVALUATED, "coverage": None, "answered": 0}))


# ---- the stages proper -------------------------------------------------------------------------------------------


def test_the_real_chain_from_a_mesh_to_a_model_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps on the demo student's own weights: renders, training, export and calibration are the real ones."""
    monkeypatch.setattr(chain_module, "make_plan", _tiny_plan)
    monkeypatch.setattr(chain_module, "steps_within", lambda seconds, rates, factor=1.0: 3)
    config = _small_config()
    request = NewObjectRequest(DEMO, None, DEMO_NAME, 600.0, tmp_path / "out", tmp_path / "work")
    heard: set[str] = set()
    result = new_object(config, request, progress=False, listener=lambda p: heard.add(p.stage))
    bundle = load_bundle(result.model)
    assert bundle.name == DEMO_NAME and bundle.calibration.instances >= 20
    assert "ukd new-object" in str(bundle.provenance["data"])
    assert {"rendering to train", "training"} <= heard
    assert result.add_recall > 0.2  # the shipped student's own, on views as near as these
    page = result.report.read_text()
    assert result.launch in page and page.count("data:image/") >= 5
    again = new_object(config, request, progress=False, stages=lambda part: FakeStages())
    assert again == result


HOUR = """
import sys
sys.path.insert(0, sys.argv[1])
from test_new_object import *
from test_new_object import _small_config, _tiny_plan
chain_module.make_plan, chain_module.steps_within = _tiny_plan, lambda seconds, rates, factor=1.0: 3
request = NewObjectRequest(DEMO, None, DEMO_NAME, 3600.0, Path(sys.argv[2]), Path(sys.argv[3]))
print(new_object(_small_config(), request, progress=False).add_recall)
"""


def test_the_real_chain_with_teachers(tmp_path: Path) -> None:
    """Trunk, teachers, a student beside them; in a process of its own: pytest's has threads, which no fork survives."""
    out, work = tmp_path / "out", tmp_path / "work"
    call = [sys.executable, "-c", HOUR, str(Path(__file__).parent), str(out), str(work)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.2
    runs = {path.parent.relative_to(work).as_posix(): load_checkpoint(path) for path in work.glob("**/checkpoint.pt")}
    assert sorted(runs) == ["student", "teachers/seed-0", "teachers/seed-1", "trunk/seed-2"]
    assert [run.step for run in runs.values()] == [3] * 4
    assert runs["student"].taught and not runs["trunk/seed-2"].taught
    assert str(load_bundle(out).provenance["teacher"]) != "none"
    assert "6 of the steps before there were teachers" in (work / "report.html").read_text()


def _small_config() -> NewObjectConfig:
    base = NewObjectConfig()
    return replace(
        base,
        scene=replace(base.scene, width=320, height=240, targets=(2, 3), distractors=(1, 2), texture_pool=4),
        train=replace(base.train, learning_rate=1e-6, batch_size=8, micro_batch=8),
    )


def _tiny_plan(left_s: float, rates: Rates, *, teachers: int, bags: int) -> Any:
    plan = make_plan(left_s, rates, teachers=teachers, bags=bags)
    return replace(plan, images={"train": 8, "calibrate": 32, "evaluate": 8})


def test_rendering_that_is_out_of_time_leaves_a_whole_data_set(tmp_path: Path) -> None:
    base = NewObjectConfig()
    scene = replace(base.scene, width=96, height=72, distractors=(0, 1), texture_pool=3, busy_fraction=0.0)
    stages = RealStages(base, MeshSource(DEMO), "farthest", scene, tmp_path, progress=False)
    count = stages.render("evaluate", 2000, lambda: -1.0)
    truth = json.loads((tmp_path / "renders" / "evaluate" / "train" / "000000" / "scene_gt.json").read_text())
    assert 8 <= count < 2000 and sorted(map(int, truth)) == list(range(count))


def test_the_last_stages_are_longer_on_a_slow_machine() -> None:
    slow = replace(IDLE, step_s=10 * IDLE.step_s)
    assert sum(closing_s(slow, 100, 50).values()) > 5 * sum(closing_s(IDLE, 100, 50).values())
