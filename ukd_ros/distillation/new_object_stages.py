# SPDX-License-Identifier: Apache-2.0
"""The stages of `ukd new-object`: each is one call of the room that does the work, in a folder of its own."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ukd_ros.config import config_hash
from ukd_ros.data.preview import write_contact_sheet
from ukd_ros.data.progress import Progress, Stopped, listening
from ukd_ros.data.render_dataset import CHUNK, MeshSource, render_dataset
from ukd_ros.data.scenes import SceneConfig
from ukd_ros.distillation.calibrate import UNGATED, CalibrationOptions, calibrate_model
from ukd_ros.distillation.checkpoint import load_checkpoint
from ukd_ros.distillation.distill import DistillConfig, distill_on_folders
from ukd_ros.distillation.ensemble import member_folder, train_ensemble
from ukd_ros.distillation.evaluate import evaluate_model
from ukd_ros.distillation.export import export_checkpoint, trained_options
from ukd_ros.distillation.folders import open_folders
from ukd_ros.distillation.from_bags_request import FromBagsConfig
from ukd_ros.distillation.new_object_plan import STARVED, TICKS, Pace, Rates
from ukd_ros.distillation.new_object_request import NewObjectConfig
from ukd_ros.distillation.new_object_trial import Trial, cores, logged_steps_s, sharings
from ukd_ros.distillation.train import train_on_folders
from ukd_ros.distillation.train_config import TrainConfig

logger = logging.getLogger(__name__)

KINDS = ("train", "calibrate", "evaluate")
CHECKPOINT_S = 45.0
"""A run that is killed loses at most so many seconds; writing one and drawing its curves takes one."""

CHECKPOINTS = {
    "trunk": ("trunk/*/checkpoint.pt", False),
    "teach": ("teachers/*/checkpoint.pt", True),
    "distil": ("[sl]*t/checkpoint.pt", False),
    "train": ("[sl]*t/checkpoint.pt", False),
}
"""Where a stage's checkpoints lie in the work folder (student and last), and whether all teachers must have theirs."""

TIMED_VIEWS = (1, 12)
"""Views that the finished student is timed on: the difference is what more views take."""

SEEDS_APART = 1_000_003
"""Renders for training, calibration and evaluation are scenes of seeds so far apart."""


@dataclass(frozen=True)
class Trained:
    """What a training did: the newest checkpoint, its step, whether that is the last, and s per step of late."""

    checkpoint: Path
    step: int
    finished: bool
    step_s: float


class Stages(Protocol):
    """What the chain calls. Seconds left are asked for again and again: they pass while a stage works."""

    def probe(self, ensemble: bool, left_s: Callable[[], float]) -> Rates:
        """Time a few renders and training steps; RendererError without headless OpenGL, Stopped when the time is up."""
        ...

    def tune(self, rates: Rates) -> None:
        """Take what the probe found, also that of an earlier call: threads, and how often a checkpoint is written."""
        ...

    def unsaved_s(self, stage: str) -> float:
        """Return the seconds of a stage's work that would be lost now, if this process were killed."""
        ...

    def render(self, kind: str, count: int, left_s: Callable[[], float]) -> int:
        """Render views of a kind; return how many there are, fewer when the time is up."""
        ...

    def train(
        self, name: str, steps: int, left_s: Callable[[], float], reserve_s: float, initial: str, peak: float | None
    ) -> Trained:
        """Train `steps`; stop, keeping a checkpoint, when it would not end in time."""
        ...

    def trunk(self, steps: int, left_s: Callable[[], float]) -> Trained:
        """Train what teachers and student begin with; it stops, keeping a checkpoint, when the time is up."""
        ...

    def teach(self, steps: int, left_s: Callable[[], float], trunk: Path) -> list[Trained]:
        """Train the teachers side by side from there; they stop, keeping a checkpoint, when the time is up."""
        ...

    def distil(self, steps: int, left_s: Callable[[], float], reserve_s: float, teachers: Sequence[Path]) -> Trained:
        """Train the student beside its teachers, from the first one's weights."""
        ...

    def adapt(self, teachers: Sequence[Path], initial: Path, steps: int, left_s: Callable[[], float]) -> dict[str, str]:
        """Adapt the student to the bags; return model (folder), report (file) and summary."""
        ...

    def export(self, checkpoint: Path) -> dict[str, Any]:
        """Write the model folder and time the estimator: model (path), view_s."""
        ...

    def calibrate(self, model: Path, limit: int) -> dict[str, Any]:
        """Calibrate on held-out renders; ValueError where the student finds too little."""
        ...

    def evaluate(self, model: Path, limit: int) -> dict[str, Any]:
        """Score on other held-out renders."""
        ...


class RealStages:
    """The stages proper; folders below `work`."""

    def __init__(
        self, config: NewObjectConfig, source: MeshSource, keypoint_kind: str, scene: SceneConfig, work: Path,
        *, bags: Sequence[Path] = (), progress: bool = True, tell: Callable[[Progress], None] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.config, self.source, self.scene, self.work = config, source, scene, work
        self.training = replace(config.train, keypoint_kind=keypoint_kind, seed=config.seed)
        self.threads, self.processes, self._step_s, self._teach_every = 0, 1, math.inf, self.training.checkpoint_every
        self._bags, self._progress, self._tell, self._now = tuple(bags), progress, tell, now

    def folder(self, kind: str) -> Path:
        """Return where the renders of a kind lie."""
        return self.work / "renders" / kind

    def probe(self, ensemble: bool, left_s: Callable[[], float]) -> Rates:
        """See `Stages`; the images are the first ones of those for calibration, so they are not lost."""
        trial = Trial(self.training, self.scene, self.folder("calibrate"), self.work, left_s, self._now)
        return trial.rates(lambda count: self._render("calibrate", count), self.config.teachers if ensemble else 0)

    def tune(self, rates: Rates) -> None:
        """See `Stages`."""
        self.threads, self.processes, self._step_s = rates.threads, rates.processes, rates.step_s
        self._teach_every = checkpoint_every(rates.teaching())
        every = checkpoint_every(rates)
        self.training = replace(self.training, checkpoint_every=every, log_every=min(self.training.log_every, TICKS))

    def unsaved_s(self, stage: str) -> float:
        """See `Stages`; renders, and what comes of a bag, are kept as they come."""
        if stage not in CHECKPOINTS:
            return 0.0
        pattern, all_of_them = CHECKPOINTS[stage]
        written = sorted(path.stat().st_mtime for path in self.work.glob(pattern))
        if len(written) < (self.config.teachers if all_of_them else 1):
            return math.inf
        return time.time() - (written[0] if all_of_them else written[-1])

    def render(self, kind: str, count: int, left_s: Callable[[], float]) -> int:
        """See `Stages`."""
        reached = 0

        def watch(progress: Progress) -> None:
            nonlocal reached
            reached = progress.done
            if self._tell is not None:
                self._tell(replace(progress, stage=f"rendering to {kind}"))
            if left_s() <= 0.0 and progress.done < count:
                raise Stopped("the time for rendering is up")

        try:
            with listening(watch):
                self._render(kind, count)
        except Stopped:
            if left_s() > 0.0:
                raise
            # what was handed to the processes is being finished: a count that leaves none of it without its label
            flying = 2 * (os.cpu_count() or 1) * CHUNK
            count = min(count, max(reached, CHUNK) + flying)
            self._render(kind, count)
        return count

    def _render(self, kind: str, count: int) -> None:
        out = self.folder(kind)
        seed = self.config.seed + SEEDS_APART * KINDS.index(kind)
        source = replace(self.source, symmetry=self.config.symmetry)
        render_dataset(self.scene, [source], out, count, seed, progress=self._progress)
        if kind == "train":
            write_contact_sheet(out, self.work / "renders.jpg", n=12, columns=4, width=320)

    def _config(self, steps: int) -> TrainConfig:
        return replace(self.training, steps=steps, threads=self.threads or self.training.threads)

    @contextmanager
    def _paced(self, left_s: Callable[[], float], reserve_s: float) -> Iterator[Pace]:
        """Listen to a training; a stop for want of time is no error."""
        pace = Pace(left_s, reserve_s, self._tell, self._now)

        def watch(progress: Progress) -> None:
            pace(progress)
            slow = pace.step_s is not None and progress.done > 2 and pace.step_s > STARVED * self._step_s
            if slow and self.processes == 1 and torch.get_num_threads() > 1:
                # every thread waits for the last one: with a core taken away one alone is several times as fast
                logger.warning("a step takes %.1f s, not %.1f: going on with one thread", pace.step_s, self._step_s)
                torch.set_num_threads(1)
                pace.forget()

        try:
            with listening(watch):
                yield pace
        except Stopped:
            if not pace.stopped:
                raise

    def train(
        self, name: str, steps: int, left_s: Callable[[], float], reserve_s: float, initial: str, peak: float | None
    ) -> Trained:
        """See `Stages`."""
        config, folder = replace(self._config(steps), initial=initial or self.training.initial), self.work / name
        if peak is not None:
            config = replace(config, learning_rate=peak)
        with self._paced(left_s, reserve_s) as pace:
            train_on_folders(
                config, [self.folder("train")], folder, resume=True, processes=self.processes, progress=self._progress
            )
        return _trained(folder, config, pace.step_s)

    def trunk(self, steps: int, left_s: Callable[[], float]) -> Trained:
        """See `Stages`; its learning rate never falls: that is for the branches."""
        # windows of its own: the teachers' seeds follow on the configuration's
        seed = self.config.seed + self.config.teachers
        config, out = replace(self.training, steps=steps, hold=1.0, seed=seed), self.work / "trunk"
        folder = member_folder(out, seed)
        if self.processes == 1:  # alone, with all cores: in a fork, because this process must not start their threads
            # where the trial found two processes slower than one thread, other programs hold the other cores
            config = replace(config, threads=1 if sharings(self.training, True) else config.threads)
            self._ensemble(config, 1, out, left_s)
            return _trained(folder, config, None)
        with self._paced(left_s, 0.0) as pace:
            train_on_folders(
                config, [self.folder("train")], folder, resume=True, processes=self.processes, progress=self._progress
            )
        return _trained(folder, config, pace.step_s)

    def teach(self, steps: int, left_s: Callable[[], float], trunk: Path) -> list[Trained]:
        """See `Stages`."""
        config = replace(self.training, steps=steps, initial=str(trunk), checkpoint_every=self._teach_every)
        count, out = self.config.teachers, self.work / "teachers"
        self._ensemble(config, count, out, left_s)
        return [_trained(member_folder(out, config.seed + i), config, None) for i in range(count)]

    def _ensemble(self, config: TrainConfig, count: int, out: Path, left_s: Callable[[], float]) -> None:
        """Train in forks, for as long as is left; who asks while they work notes the time that is used up."""
        data, models, _ = open_folders(config, [self.folder("train")], progress=self._progress)
        train_ensemble(
            config, count, data, models, out, resume=True, time_budget_s=left_s(), waiting=left_s,
            progress=self._progress,
        )  # fmt: skip

    def _beside_teachers(self, steps: int, initial: Path, threads: int, number: int) -> DistillConfig:
        """Return how the student learns beside teachers, who are asked about every third window once.

        `number`: of the windows that nobody has seen before, which ones.
        """
        plain = {item.name: getattr(self.training, item.name) for item in fields(TrainConfig)}
        plain |= {"steps": steps, "initial": str(initial), "threads": threads}
        windows = max(1, steps * self.training.batch_size // 3)
        seed = self.config.seed + self.config.teachers + number
        return DistillConfig(**plain, guide=self.config.guide, windows=windows, window_seed=seed)

    def distil(self, steps: int, left_s: Callable[[], float], reserve_s: float, teachers: Sequence[Path]) -> Trained:
        """See `Stages`; the teachers are asked about every third window once."""
        config = self._beside_teachers(steps, teachers[0], 1 if self.processes > 1 else cores(), 1)
        folder = self.work / "student"
        with self._paced(left_s, reserve_s) as pace:
            distill_on_folders(
                config, teachers, [self.folder("train")], folder, resume=True, processes=self.processes,
                progress=self._progress,
            )  # fmt: skip
        if not (folder / "checkpoint.pt").is_file():  # asking the teachers took all the time
            return Trained(teachers[0], 0, False, _logged_step_s(teachers[0].parent, config))
        return _trained(folder, config, pace.step_s)

    def adapt(self, teachers: Sequence[Path], initial: Path, steps: int, left_s: Callable[[], float]) -> dict[str, str]:
        """See `Stages`."""
        from ukd_ros.distillation.from_bags import distill_from_bags  # reads bags: needs rosbags

        distil = replace(
            self._beside_teachers(steps, initial, cores(), 2),
            unlabelled_share=FromBagsConfig().distill.unlabelled_share,
        )

        def watch(progress: Progress) -> None:
            if self._tell is not None:
                self._tell(progress)
            if left_s() <= 0.0:
                raise Stopped("the time for the bags is up")

        with listening(watch):
            result = distill_from_bags(
                replace(FromBagsConfig(), bags=self.config.bags, distill=distil, name=self.source.label()),
                self._bags,
                teachers,
                self.work / f"adapted-{config_hash(self.config.bags)}",  # frames taken otherwise are other frames
                renders=[self.folder("train")],
                held_out=self.folder("calibrate"),
                time_budget_s=left_s(),
                progress=self._progress,
            )
        return {"model": str(result.model), "report": str(result.report), "summary": result.summary}

    def export(self, checkpoint: Path) -> dict[str, Any]:
        """See `Stages`."""
        model, content = self.work / "model", load_checkpoint(checkpoint)
        options = trained_options(content.config)
        options = replace(options, name=self.source.label(), overwrite=model.exists())
        provenance = {"data": f"renders of {Path(self.source.path).name} by ukd new-object"}
        export_checkpoint(checkpoint, model, options, provenance)
        return {"model": str(model), "view_s": self._view_s(model)}

    def _view_s(self, model: Path) -> float:
        """Return the seconds that the estimator takes for a view; what opening model and data take is left out."""
        few, more = TIMED_VIEWS
        took = []
        with listening(lambda _: None):
            for views in (few, few, more):  # the first one warms up
                start = self._now()
                evaluate_model(model, self.folder("evaluate"), limit=views, progress=False)
                took.append(self._now() - start)
        return max(took[2] - took[1], 0.1 * took[2]) / (more - few)

    def calibrate(self, model: Path, limit: int) -> dict[str, Any]:
        """See `Stages`; where the student finds too little by itself, on crops around the truth."""
        folder, out = self.folder("calibrate"), self.work / "calibration"
        try:
            report = calibrate_model(model, folder, limit, out, progress=self._progress)
        except ValueError:
            options = CalibrationOptions(crops="oracle")
            weak = replace(UNGATED, min_score=0.02)
            report = calibrate_model(
                model, folder, limit, out, progress=self._progress, options=options, estimator_options=weak
            )
        return {"crops": report.crops, "matched": report.matched, "labels": report.labels, "views": report.views}

    def evaluate(self, model: Path, limit: int) -> dict[str, Any]:
        """See `Stages`."""
        report = evaluate_model(
            model, self.folder("evaluate"), limit=limit, out=self.work / "evaluation", progress=self._progress
        )
        score, joint = report.overall, report.checks.get("joint")
        return {
            "images": report.images,
            "targets": score.targets,
            "add_recall": score.add_recall,
            "detected": score.detection_rate,
            "translation_mm": _or_none(score.translation_mm),
            "rotation_deg": _or_none(score.rotation_deg),
            "keypoint_px": _or_none(score.keypoint_px),
            "answered": 0 if joint is None else joint.poses,
            "coverage": None if joint is None else joint.coverage["pose"][0.95],
            "nees": None if joint is None else joint.nees,
            "causes": report.causes,
            "false_alarms": report.false_alarms,
            "latency_ms": report.latency_ms["p50"],
        }


def checkpoint_every(rates: Rates) -> int:
    """Return the steps between checkpoints."""
    return max(10, int(CHECKPOINT_S / rates.step_s))


def _trained(folder: Path, config: TrainConfig, step_s: float | None) -> Trained:
    """Return how far a run is."""
    checkpoint = folder / "checkpoint.pt"
    step = load_checkpoint(checkpoint).step
    return Trained(checkpoint, step, step >= config.steps, step_s or _logged_step_s(folder, config))


def _logged_step_s(folder: Path, config: TrainConfig) -> float:
    """Return the seconds of a step of late, as the run's metrics have it."""
    return float(np.median(logged_steps_s(folder, config)[-5:]))


def _or_none(value: float) -> float | None:
    """Return a number, or None for NaN, which JSON does not know."""
    return None if value != value else value
