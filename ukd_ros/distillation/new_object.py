# SPDX-License-Identifier: Apache-2.0
"""From a CAD file to a model that the pose node loads, in a given time: `ukd new-object`.

    render → train → export → calibrate → evaluate                            (from five minutes on)
    render → trunk → teach → distil → export → calibrate → [adapt to bags] → evaluate (from an hour on)

The budget is shared out by rates measured on this machine (`new_object_plan`), the last stages' time is reserved, and
after every stage what is left is planned anew. A stage that is finished is not done again (`new_object_state`). What
may be asked for, and what is refused at once, is in `new_object_request`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ukd_ros.config import to_mapping
from ukd_ros.data.progress import Progress, Stopped
from ukd_ros.distillation.new_object_part import PartFacts, inspect_part
from ukd_ros.distillation.new_object_plan import (
    ASKING,
    LAST_CYCLE,
    LEAST,
    ON_THEIR_OWN,
    SLOWEST,
    TEACHERS_FROM_S,
    TRAINING_SLACK,
    Plan,
    Rates,
    closing_s,
    make_plan,
    steps_within,
)
from ukd_ros.distillation.new_object_report import Story, launch_line, write_story
from ukd_ros.distillation.new_object_request import (
    NewObjectConfig,
    NewObjectError,
    NewObjectRequest,
    arguments,
    check_model_folder,
    checked_source,
    publishing,
)
from ukd_ros.distillation.new_object_stages import RealStages, Stages, Trained
from ukd_ros.distillation.new_object_state import WorkState, locked
from ukd_ros.distillation.train_config import learning_rate
from ukd_ros.geometry.declared_symmetry import symmetries_of
from ukd_ros.perception.bundle import load_bundle, save_bundle

logger = logging.getLogger(__name__)

MARGIN = 0.04
"""This part of the budget is left free: the time between stages, and the interpreter's own start."""

PROBE_PART = 0.4
"""A trial that takes longer than this part of the budget leaves too little for anything."""

LEAST_STEPS = 30
"""Fewer training steps than these teach nothing: better to say so at once than after five minutes."""


@dataclass(frozen=True)
class NewObjectResult:
    """The finished model, its report, the line that starts the pose node on it, and ADD-0.1d and coverage (of the 95 %
    ellipsoid, None when nothing was answered) on held-out renders.
    """

    model: Path
    report: Path
    launch: str
    add_recall: float
    coverage: float | None
    seconds: float


def new_object(
    config: NewObjectConfig,
    request: NewObjectRequest,
    *,
    progress: bool = True,
    listener: Callable[[Progress], None] | None = None,
    stages: Callable[[PartFacts], Stages] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> NewObjectResult:
    """Make a part's model within the budget; the same call goes on where an earlier one stopped.

    `listener` hears of the progress of every stage. `stages` and `now` replace the work and the clock in tests.
    NewObjectError, WorkError, MeshError, BundleError or ConfigError with one sentence before any long work;
    NewObjectError when the student finds too little to be calibrated: nothing appears in `out` then.
    """
    begun = now()
    source = checked_source(config, request)
    part = inspect_part(source, config.train.keypoints)
    if config.symmetry:
        symmetries_of(config.symmetry, source.load())
    for sentence in part.sentences(request.name, config.symmetry, config.scene):
        logger.info("%s", sentence)
    with locked(request.work):
        state = WorkState(request.work, arguments(config, request, part))
        check_model_folder(request, state)
        state.begin()
        scene = config.scene_for(part.diameter_m)
        if stages is None:
            real = RealStages(
                config, source, part.keypoint_kind, scene, request.work.resolve(), bags=request.bags,
                progress=progress, tell=listener, now=now,
            )  # fmt: skip
        chain = _Chain(config, request, part, state, real if stages is None else stages(part), now, begun)
        return chain.run()


@dataclass
class _Chain:
    """One call: runs the stages in order, knows the time."""

    config: NewObjectConfig
    request: NewObjectRequest
    part: PartFacts
    state: WorkState
    stages: Stages
    now: Callable[[], float]
    begun: float
    warnings: list[str] = field(default_factory=list)
    worked: bool = False

    def __post_init__(self) -> None:
        self.spent_s = sum(self.state.seconds.values())
        self.with_teachers = self.request.budget_s >= TEACHERS_FROM_S

    def left_s(self) -> float:
        """Return what is left of the budget, without its margin; of earlier calls, the work that is kept counts."""
        return self.request.budget_s * (1.0 - MARGIN) - self.spent_s - (self.now() - self.begun)

    def stage(self, name: str, work: Callable[[], dict[str, Any]], **inputs: Any) -> dict[str, Any]:
        """Do a stage, unless it is done already with the same inputs."""
        digest = self.state.digest(name, inputs)
        known = self.state.result(name, digest)
        if known is not None:
            return known
        before, start, self.worked = self.state.kept_s(name), self.now(), True
        logger.info("%s (%.0f s of the budget are left)", name, max(0.0, self.left_s()))
        result = work()
        self.state.finish(name, digest, before + self.now() - start, result)
        return result

    # ---- the chain --------------------------------------------------------------------------------------------

    def run(self) -> NewObjectResult:
        """Do all stages; see `new_object`."""
        self._say_what_is_left_out()
        rates = Rates(**self.stage("probe", self._probe))
        self.stages.tune(rates)
        plan = Plan.from_data(self.state.decide("plan", lambda: self._plan(rates).as_data()))
        logger.info("%s", plan.sentence())
        images = self._render(rates, plan)
        trained, teachers = self._learn(rates, plan)
        checkpoint = Path(trained["checkpoint"])
        exported = self.stage("export", lambda: self.stages.export(checkpoint), checkpoint=str(checkpoint))
        model = Path(exported["model"])
        limits = self.state.decide("views", lambda: self._views(exported["view_s"], plan, rates))
        fitted = self.stage("calibrate", lambda: self._calibrate(model, limits["calibrate"]), **limits)
        adapted = self._adapt(teachers, checkpoint, rates, plan)
        final = Path(adapted.get("model", model))
        scored = self.stage("evaluate", lambda: self.stages.evaluate(final, limits["evaluate"]), model=str(final))
        out = str(self.request.out.resolve())
        self.stage("publish", lambda: self._publish(final), model=str(final), out=out)
        if not self.request.out.exists():  # published by an earlier call, and taken away since
            self._publish(final)
        story = Story(
            self.request.name, self.request.out, self.part, self.request.budget_s, plan, images, trained["cut"],
            self.config, trained, fitted, scored, adapted, len(self.request.bags), tuple(self.warnings),
            self.state.seconds,
        )  # fmt: skip
        told = self.stage(
            "report", lambda: {"report": str(write_story(story, self.request.work))}, warnings=self.warnings
        )
        if not self.worked:
            logger.info("%s: is finished already", self.request.out)
        seconds = sum(self.state.seconds.values())
        launch = launch_line(self.request.out)
        report = Path(told["report"])
        return NewObjectResult(self.request.out, report, launch, scored["add_recall"], scored["coverage"], seconds)

    def _say_what_is_left_out(self) -> None:
        """Tell at the start what the budget does not allow."""
        if not self.with_teachers:
            self.warnings.append("no teachers: below a budget of 1h the student learns from labels alone")
            if self.request.bags:
                # teachers of a few minutes agree where they are wrong together, having begun with the same layers
                self.warnings.append(
                    "the bag is not used: it needs teachers, which need a budget of 1h; give --budget 1h or more"
                )
        for warning in self.warnings:
            logger.warning("%s", warning)

    def _probe(self) -> dict[str, Any]:
        """Measure this machine; NewObjectError when that alone takes too much of the budget."""
        end = self.left_s() - PROBE_PART * self.request.budget_s
        try:
            return asdict(self.stages.probe(self.with_teachers, lambda: self.left_s() - end))
        except Stopped as stop:
            if self.left_s() > end:  # somebody else asked to stop
                raise
            raise NewObjectError(
                f"this machine is too busy or too slow: a trial of 32 renders and six training steps did not end in "
                f"{PROBE_PART * self.request.budget_s:.0f} s; give more than {self.request.budget_s / 60:.0f}m, or end "
                f"other programs (and delete {self.request.work})."
            ) from stop

    def _plan(self, rates: Rates) -> Plan:
        """Plan from what the probe has left; NewObjectError when the machine is too busy for anything."""
        teachers = self.config.teachers if self.with_teachers else 0
        plan = make_plan(self.left_s(), rates, teachers=teachers, bags=len(self.request.bags))
        learning = plan.seconds.get("train", plan.seconds.get("distil", 0.0))
        if TRAINING_SLACK * learning < rates.train_start_s + LEAST_STEPS * rates.step_s:
            raise NewObjectError(
                f"this machine is too busy or too slow for the budget: a render takes {rates.image_s:.1f} s, a "
                f"training step {rates.step_s:.1f} s, which leaves {learning:.0f} s to learn; give more than "
                f"{self.request.budget_s / 60:.0f}m, or end other programs (and delete {self.request.work})."
            )
        return plan

    def _render(self, rates: Rates, plan: Plan) -> dict[str, int]:
        """Render what is held out first; the views to train on take the rest of the rendering's time."""
        end = float(self.state.decide("render.end", lambda: self.left_s() - plan.seconds["render"]))
        return {kind: self._rendered(kind, plan, end) for kind in ("evaluate", "calibrate", "train")}

    def _rendered(self, kind: str, plan: Plan, end_s: float) -> int:
        """Render the views of a kind; return how many there are."""
        if kind != "train":  # these may take longer: without them nothing is calibrated
            end_s -= 0.1 * plan.seconds["render"]
        stage, count = f"render.{kind}", plan.images[kind]
        left = self._tracked(stage, end_s)
        return int(self.stage(stage, lambda: {"count": self.stages.render(kind, count, left)}, count=count)["count"])

    def _tracked(self, stage: str, end_s: float) -> Callable[[], float]:
        """Return what says how long a stage may still take, when so much of the budget shall be left after it."""
        start, before, told = self.now(), self.state.kept_s(stage), [self.now()]

        def left() -> float:
            tick = self.now()
            if tick - told[0] > 5.0:
                told[0] = tick
                # what would have to be done again does not count, or a killed run would have less time for it
                kept = tick - start - self.stages.unsaved_s(stage)
                if kept > 0.0:
                    self.state.keep(stage, before + kept)
            return self.left_s() - end_s

        return left

    def _closing(self, rates: Rates, plan: Plan) -> float:
        """Return the seconds to be reserved for what follows the learning."""
        closing = sum(closing_s(rates, plan.images["calibrate"], plan.images["evaluate"]).values())
        return closing + plan.seconds.get("adapt", 0.0)

    def _learn(self, rates: Rates, plan: Plan) -> tuple[dict[str, Any], list[Path]]:
        """Train the student, beside teachers where there is time; return what it did and the teachers' checkpoints."""
        closing = self._closing(rates, plan)
        teachers, before, slower = self._teachers(rates, plan, closing) if self.with_teachers else ([], 0, 1.0)
        name, factor = ("distil", ASKING * slower) if teachers else ("train", 1.0)
        time_s = self.left_s() - closing
        steps = self.state.decide(f"{name}.steps", lambda: steps_within(time_s, rates, factor))
        done = self.stage(name, lambda: self._trained(name, steps, closing, teachers), steps=steps)
        return {**done, "before": before}, teachers

    def _teachers(self, rates: Rates, plan: Plan, closing: float) -> tuple[list[Path], int, float]:
        """Train the teachers, branches of one trunk.

        Returns their checkpoints, the steps that made the first, and how much slower the trunk's were than the trial's.
        """
        trunk_end = self._end("trunk", ("teach", "distil"), plan, closing)
        steps = self.state.decide("trunk.steps", lambda: steps_within(self.left_s() - trunk_end, rates.trunk()))
        trunk = self.stage("trunk", lambda: self._trunk(steps, trunk_end), steps=steps)
        slower = min(SLOWEST, max(1.0, trunk["step_s"] / rates.trunk().step_s))
        end = self._end("teach", ("distil",), plan, closing)
        factor = ON_THEIR_OWN * slower
        steps = self.state.decide("teach.steps", lambda: steps_within(self.left_s() - end, rates.teaching(), factor))
        taught = self.stage("teach", lambda: self._taught(steps, end, Path(trunk["checkpoint"])), steps=steps)
        for what, done in (("the training that teachers begin with", trunk), ("the teachers' training", taught)):
            if not done["finished"]:
                self.warnings.append(f"{what} was slower than planned, and stopped before its end")
        return [Path(path) for path in taught["teachers"]], trunk["steps"] + taught["steps"], slower

    def _end(self, name: str, after: Sequence[str], plan: Plan, closing: float) -> float:
        """Return what is to be left of the budget at a training's end: the share of those after it, and the closing."""
        later = sum(plan.seconds[stage] for stage in after)
        share = later / (later + plan.seconds[name])
        return float(self.state.decide(f"{name}.end", lambda: closing + share * (self.left_s() - closing)))

    def _trunk(self, steps: int, end: float) -> dict[str, Any]:
        done = self.stages.trunk(steps, self._tracked("trunk", end))
        return {
            "checkpoint": str(done.checkpoint), "finished": done.finished, "steps": done.step, "step_s": done.step_s,
        }  # fmt: skip

    def _taught(self, steps: int, end: float, trunk: Path) -> dict[str, Any]:
        done = self.stages.teach(steps, self._tracked("teach", end), trunk)
        finished = all(item.finished for item in done)
        return {"teachers": [str(item.checkpoint) for item in done], "finished": finished, "steps": done[0].step}

    def _trained(self, name: str, steps: int, closing: float, teachers: Sequence[Path]) -> dict[str, Any]:
        """Train; when it would not end in time, bring the learning rate down in a last short cycle."""
        left = self._tracked(name, closing)
        cut_key = f"{name}.cut"
        whole_s = float(self.state.decide(f"{name}.seconds", lambda: max(1.0, self.left_s() - closing)))
        if not self.state.decided(cut_key):
            if teachers:
                main = self.stages.distil(steps, left, LAST_CYCLE * whole_s, teachers)
            else:
                main = self.stages.train("student", steps, left, LAST_CYCLE * whole_s, "", None)
            if main.finished:
                return {"checkpoint": str(main.checkpoint), "steps": main.step, "cut": False}
            self.state.decide(cut_key, lambda: self._last_cycle(main, steps, left()))
        last = self.state.decide(cut_key, dict)
        done = self.stages.train("last", last["steps"], left, 0.0, last["initial"], last["peak"])
        return {"checkpoint": str(done.checkpoint), "steps": last["after"] + done.step, "cut": True}

    def _last_cycle(self, main: Trained, steps: int, left_s: float) -> dict[str, Any]:
        """Return the cycle that ends a training which was too slow: as many steps as fit, from its learning rate."""
        logger.warning("training is slower than planned (other programs?): a last short cycle ends it in time")
        count = max(4, int(0.75 * left_s / main.step_s))
        peak = learning_rate(min(main.step, steps - 1), replace(self.config.train, steps=steps))
        return {"steps": count, "peak": peak, "initial": str(main.checkpoint), "after": main.step}

    # ---- what follows the learning ----------------------------------------------------------------------------

    def _views(self, view_s: float, plan: Plan, rates: Rates) -> dict[str, int]:
        """Return how many views to calibrate and to evaluate on, from the time that a view takes; never none."""
        slow = rates.slowness
        free = self.left_s() - plan.seconds.get("adapt", 0.0) - slow * 10.0
        affordable = max(0.0, free) / (1.6 * view_s)
        wanted = plan.images["calibrate"] + plan.images["evaluate"]
        part = min(1.0, affordable / wanted)
        return {kind: max(LEAST[kind], int(part * plan.images[kind])) for kind in ("calibrate", "evaluate")}

    def _calibrate(self, model: Path, limit: int) -> dict[str, Any]:
        try:
            return self.stages.calibrate(model, limit)
        except ValueError as error:
            raise NewObjectError(
                f"the student finds too little of {self.request.name} in held-out renders to say how sure it is "
                f"({' '.join(str(error).split())}), so no model was made: give a larger --budget and another --work, "
                f"or look at {self.request.work / 'renders.jpg'}, whether the part can be seen there."
            ) from error

    def _adapt(self, teachers: list[Path], checkpoint: Path, rates: Rates, plan: Plan) -> dict[str, Any]:
        """Adapt the student to the bags, if there are any and teachers too; a failure leaves the one from renders.

        What may be mended (a full disk, a setting of the bags) is no finished stage: the next call tries again.
        """
        if not self.request.bags or not teachers:
            return {}
        evaluating = closing_s(rates, 0, plan.images["evaluate"])["evaluate"]
        own = sum(closing_s(rates, plan.images["calibrate"], 0).values())  # it exports and calibrates by itself
        free = self.left_s() - evaluating - own
        # half of it for reading the bags and asking the teachers what they see
        steps = self.state.decide("adapt.steps", lambda: steps_within(0.5 * free, rates.alone(), ASKING))

        def work() -> dict[str, Any]:
            left = self._tracked("adapt", evaluating + own)
            try:
                return dict(self.stages.adapt(teachers, checkpoint, steps, left))
            except Stopped as stop:
                if left() > 0.0:
                    raise
                return {"failed": f"there was no time for it ({stop})"}

        try:
            result = self.stage("adapt", work, steps=steps, bags=to_mapping(self.config.bags))
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            result = {"failed": f"{' '.join(str(error).split())} (mend it, and the same call tries again)"}
        if "failed" in result:
            self.warnings.append(f"not adapted to the bag, the model is the one from renders: {result['failed']}")
            logger.warning("%s", self.warnings[-1])
        return result

    def _publish(self, model: Path) -> dict[str, Any]:
        """Put the model into its folder, whole."""
        bundle = load_bundle(model)
        self.state.decide(publishing(self.request.out), lambda: True)
        save_bundle(
            self.request.out,
            name=self.request.name,
            objects=bundle.objects,
            network=bundle.network,
            graphs=bundle.graphs,
            weights=bundle.weights,
            calibration=bundle.calibration,
            provenance=bundle.provenance,
            files={name: bundle.root / name for name in _files(bundle.graphs, bundle.weights)},
            overwrite=True,
        )
        return {"model": str(self.request.out)}


def _files(graphs: Mapping[str, Any], weights: str | None) -> list[str]:
    """Return the files of a model besides its manifest."""
    return [spec.file for spec in graphs.values()] + ([weights] if weights else [])
