# SPDX-License-Identifier: Apache-2.0
"""From bags that nobody labelled to a student that is better where they were recorded: `ukd distill --bag`.

Bags become frames (`data.rosbag.frames`), the calibrated ensemble labels those it is sure of (`pseudo_labels`), a
student learns from them beside rendered windows and the teachers' votes (`distill`), is exported and calibrated on
renders that nobody has seen, and compared with its teachers on frames held out as they came. Every stage leaves its
result under `out`, so a call that was stopped, or killed, is gone on with by the same call (`from_bags_request`).
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ukd_ros.config import to_mapping
from ukd_ros.data.dataset import MixedWindows, SupposedWindows, UnlabelledWindows, Windows
from ukd_ros.data.progress import Stopped, within
from ukd_ros.data.rosbag.frames import bags_to_bop
from ukd_ros.data.rosbag.plan import HELD_OUT, TRAIN
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.distillation.bag_calibration import calibrate_student
from ukd_ros.distillation.calibrate import CalibrationOptions, calibrate
from ukd_ros.distillation.checkpoint import load_checkpoint, writing_in
from ukd_ros.distillation.device import train_device
from ukd_ros.distillation.distill import distill
from ukd_ros.distillation.ensemble_estimator import ensemble_estimator, window_sizes
from ukd_ros.distillation.export import export_checkpoint, trained_options
from ukd_ros.distillation.folders import object_models, open_folders
from ukd_ros.distillation.frames import Frames, LabelledFrames
from ukd_ros.distillation.from_bags_report import BagStory, advice, write_story
from ukd_ros.distillation.from_bags_request import (
    FromBagsConfig,
    FromBagsRequest,
    FromBagsResult,
    finished,
    launch_line,
)
from ukd_ros.distillation.held_out_renders import HeldOutRenders, open_held_out
from ukd_ros.distillation.label_store import Box, stored_boxes, stored_labels
from ukd_ros.distillation.neighbours import agreeing
from ukd_ros.distillation.parallel import Processes
from ukd_ros.distillation.pseudo_labels import PseudoLabels, label_frames, required_on
from ukd_ros.distillation.teacher import Ensemble, TeacherError, member_files, member_models
from ukd_ros.distillation.unlabelled import propose
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.perception.estimator import EstimatorOptions, PoseEstimator
from ukd_ros.perception.manifest import calibration_data
from ukd_ros.perception.votes import Calibration

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
WRITTEN = "request.json", "teachers.json", "result.json", "report.html", "labels*.png"
"""The names of the files that the first process writes into `out` itself."""
NOTHING_SEEN = "the teachers see nothing in any of the {count} frames: {counts}. {advice}"


def distill_from_bags(
    config: FromBagsConfig,
    bags: Sequence[Path],
    teachers: Sequence[Path],
    out: Path,
    *,
    renders: Sequence[Path] = (),
    held_out: Path | None = None,
    objects: Sequence[str] = (),
    resume: bool = True,
    time_budget_s: float | None = None,
    progress: bool = True,
) -> FromBagsResult:
    """Distil teachers into a student on bags, in the folder `out`; the model appears as `out`/models/NAME.

    `renders`: BOP-format folders with labels to train on beside the bags (without them the student learns from the
    bags alone); `held_out`: one that neither teachers nor student saw, to calibrate on (without it nothing is labelled
    and nothing is calibrated, and the report says so). `objects`: their names (default: all of the first of `renders`,
    without renders the teachers').
    The same call goes on where an earlier one stopped (unless `resume` is False: FileExistsError). Under torchrun
    processes share the frames, the teachers' work and the training. BagError, TeacherError, BopError, LabelError and
    ValueError for what cannot work, before long work where possible; OSError for a full disk. Stopped when it was asked
    to stop, or `time_budget_s` is over, with everything kept (the teachers' calibration and the student's begin anew).
    """
    request = FromBagsRequest(config, tuple(bags), tuple(teachers), out, tuple(renders), held_out, tuple(objects))
    request.compare(resume)
    done = finished(out)
    if done is not None:
        logger.info("%s: is finished already", out)
        return done
    try:
        with within(time_budget_s, f"{out}: the time is up and what is done is kept; the same call goes on"):
            return _Work(request, progress).all()
    except OSError as error:
        if error.errno not in FULL:
            raise
        said = f"{error.strerror}; what is whole is kept, and the same call goes on once there is room"
        raise OSError(error.errno, said, str(error.filename or out)) from error


class _Work:
    """One call: what it was given, and what its stages have made so far."""

    def __init__(self, request: FromBagsRequest, progress: bool) -> None:
        self.request, self.config, self.progress = request, request.config, progress
        self.bags, self.teachers, self.out = request.bags, request.teachers, request.out
        self.renders, self.held_out, self.objects = request.renders, request.held_out, request.objects
        self.processes = Processes.from_environment()
        self.models: list[ObjectModel] = []
        self.calibration: Calibration | None = None
        self.least: tuple[float, ...] = ()
        self.labels: dict[str, PseudoLabels] = {}
        self.rendered: HeldOutRenders | None = None

    def all(self) -> FromBagsResult:
        """Do everything; Stopped when it was asked to."""
        self.open()
        self.take_frames()
        with writing_in(self.out, WRITTEN) if self.processes.rank == 0 else nullcontext():
            self.calibrate_teachers()
            self.claim()  # only now: a path mistyped at first must not spoil the folder
            self.label()
            checkpoint = self.learn()
            if checkpoint is None:
                raise Stopped(f"{self.out}: another process was stopped; what is done is kept, the same call goes on")
            return self.finish(checkpoint)

    def open(self) -> None:
        """Read teachers and models; nothing long."""
        distilling = self.config.distill
        if distilling.threads:
            torch.set_num_threads(distilling.threads)  # from the start: results differ in their last digits
        if not self.bags:
            raise ValueError("no bag was given; name one or more")
        files = member_files(self.teachers)
        if not files:
            raise TeacherError("no teacher was given; name a folder of teachers, or the files of two or more")
        if self.renders:
            self.models = object_models(distilling, self.renders, self.objects)[1]
        else:
            known = {model.name: model for model in member_models(files[0])}
            unknown = set(self.objects) - set(known)
            if unknown:
                raise TeacherError(f"{files[0]}: knows {', '.join(known)}, not {', '.join(sorted(unknown))}")
            self.models = [known[name] for name in (self.objects or known)]
        device = train_device(distilling, self.processes)
        self.ensemble = Ensemble.load(
            files, self.models, distilling.window.size, device, single=distilling.single_teacher
        )
        if not distilling.initial and self.ensemble.networks[0].config.architecture == distilling.architecture:
            logger.info("the student starts from %s: no other start was named", files[0])
            # whole: the same call may come from another folder
            self.config = replace(self.config, distill=replace(distilling, initial=str(files[0].resolve())))
        if self.held_out is None:
            logger.warning(
                "no held-out renders were given: nothing says how sure the teachers may be, nothing is labelled"
            )
        else:
            wanted = self.config.calibrate_views
            self.rendered = open_held_out(self.held_out, self.renders, self.models, wanted)

    def claim(self) -> None:
        """Write down what `out` is for; the first process does it."""
        if self.processes.rank == 0:
            self.request.claim()
        self.processes.any(False)

    def take_frames(self) -> None:
        """Bags become a folder of frames."""
        folder = self.out / "frames"
        self.taken = bags_to_bop(
            self.bags,
            folder,
            self.config.bags,
            progress=self.progress,
            processes=(self.processes.rank, self.processes.count),
        )
        self.processes.any(False)
        names = {number: name for name, number in self.taken.objects.items()}
        if not (folder / TRAIN).is_dir():
            raise ValueError(f"{', '.join(map(str, self.bags))}: no frame is left to learn from\n{self.taken.table()}")
        if self.processes.rank == 0:
            troubled = any(bag.damage or bag.lost_bytes or bag.broken or bag.warnings for bag in self.taken.bags)
            logger.log(logging.WARNING if troubled else logging.INFO, "what the bags gave:\n%s", self.taken.table())
        self.frames = Frames(folder, TRAIN, names)
        self.strange = Frames(folder, HELD_OUT, names) if (folder / HELD_OUT).is_dir() else None

    def estimator(self) -> PoseEstimator:
        """Return the teachers as an estimator that refuses no pose for being uncertain: labelling decides that."""
        default = EstimatorOptions()
        options = replace(
            default,
            tracking=False,
            zoom_rounds=self.config.zoom_rounds,
            max_sigma_position=100.0,
            max_sigma_rotation_deg=1000.0,
            # what labelling accepts must not be refused before; what it refuses is still compared with the student's
            min_score=min(default.min_score, self.config.labels.min_score),
        )
        sizes = window_sizes(self.config.distill.window)
        return ensemble_estimator(self.ensemble, self.models, sizes, options, self.calibration)

    def calibrate_teachers(self) -> None:
        """Fit how sure the ensemble may be, and how sure it must be, on held-out renders; kept in teachers.json."""
        renders = self.rendered
        if renders is None:
            return
        path, names = self.out / "teachers.json", [model.name for model in self.models]
        sizes = window_sizes(self.config.distill.window)
        asked = {
            "teachers": self.ensemble.identity,
            "objects": names,
            "views": [list(renders.fitted), list(renders.chosen)],
            "renders": renders.digest(),
            "labels": json.loads(json.dumps(to_mapping(self.config.labels))),
            "zoom_rounds": self.config.zoom_rounds,
            "window_sizes": [sizes.locate_width, sizes.locate_height, sizes.zoom_size, sizes.context],
        }
        if self.processes.rank == 0 and not _same(path, asked):
            report = calibrate(
                self.estimator(), renders.views, CalibrationOptions(), len(renders.fitted), self.progress
            )
            logger.info("the teachers on %s:\n%s", self.held_out, report.table())
            self.calibration = report.calibration
            least = required_on(self.estimator(), renders.views, renders.chosen, self.config.labels, self.progress)
            told = {**asked, "least": least, "calibration": calibration_data(report.calibration)}
            told["table"] = report.table()
            write_bytes(path, (json.dumps(told, indent=1) + "\n").encode())
        self.processes.any(False)
        told = json.loads(path.read_text(encoding="utf-8"))
        self.calibration = Calibration(**told["calibration"])
        self.least = tuple(float(value) for value in told["least"])
        unsure = [name for name, least in zip(names, self.least, strict=True) if least > 1.0]
        if unsure:
            words = "%s: the surest poses of %s are not right to %s, so none of them is a label"
            logger.warning(words, self.held_out, ", ".join(unsure), f"{self.config.labels.sure:.0%}")

    def label(self) -> None:
        """Ask the teachers for labels of all frames, of those held out too."""
        splits = {"train": self.frames, **({"held_out": self.strange} if self.strange is not None else {})}
        if self.calibration is None:
            self.labels = {
                name: PseudoLabels((), len(frames), {"uncalibrated": len(frames)}) for name, frames in splits.items()
            }
            return
        estimator = self.estimator()
        for name, frames in splits.items():
            note = {
                "teachers": self.ensemble.identity,
                "calibration": calibration_data(self.calibration),
                "frames": frames.fingerprint(),
                "settings": json.loads(json.dumps(to_mapping(self.config.labels))),
                "least": list(self.least),
                "zoom_rounds": self.config.zoom_rounds,
            }

            def ask(shard: range, frames: Frames = frames) -> PseudoLabels:
                return label_frames(
                    estimator, frames.some(shard), self.config.labels, self.least, len(shard), progress=self.progress
                )

            found = stored_labels(self.out / "labels" / name, note, len(frames), ask, self.processes)
            self.labels[name] = agreeing(found, frames.places, self.models, self.config.labels)
            logger.info("%s: %d frames, %s", name, len(frames), _counted(self.labels[name]))
        if not self.labels["train"].accepted:
            logger.warning("no frame is labelled: %s", advice(self.labels["train"]))

    def learn(self) -> Path | None:
        """Train the student; return its checkpoint, None when another process was stopped before."""
        config = self.config.distill
        result = distill(
            config,
            self.ensemble,
            self.windows(),
            self.models,
            self.out / "run",
            cache=self.out / "teachers",
            resume=True,
            progress=self.progress,
        )
        return result.checkpoint if result.finished else None

    def windows(self) -> Windows:
        """Return what the student learns from: renders, accepted labels, and frames with the teachers' votes alone."""
        config, labels = self.config.distill, self.labels["train"]
        how = (self.models, config.window, config.window_seed, self.progress)
        parts: list[tuple[Windows, float]] = []
        boxes = self.proposals()
        if boxes:
            parts.append((UnlabelledWindows(self.frames, boxes, *how), config.unlabelled_share))
        share = supposed_windows_share(self.config, len(labels.accepted))
        if share > 0.0:
            parts.append((SupposedWindows(LabelledFrames(self.frames, labels.by_frame()), *how), share))
        if not parts:
            said = {"count": len(self.frames), "counts": _counted(labels), "advice": advice(labels)}
            raise ValueError(NOTHING_SEEN.format(**said))
        if not self.renders:
            if len(parts) == 1:
                return parts[0][0]
            alone = share / (share + config.unlabelled_share)
            return MixedWindows(parts[0][0], [(parts[1][0], alone)], config.window_seed)
        data, _, _ = open_folders(
            config, self.renders, objects=self.objects, progress=self.progress, seed=config.window_seed
        )
        return MixedWindows(data, parts, config.window_seed)

    def proposals(self) -> list[Box]:
        """Return where the teachers see anything in whole frames; kept in shards, and shared out."""
        width = self.config.distill.window.locate_width
        note = {"teachers": self.ensemble.identity, "frames": self.frames.fingerprint(), "locate_width": width}

        def look(shard: range) -> list[Box]:
            return propose(self.ensemble, self.frames.some(shard), width, len(shard), self.progress)

        return stored_boxes(self.out / "proposals", note, len(self.frames), look, self.processes)

    def finish(self, checkpoint: Path) -> FromBagsResult:
        """Export, calibrate, compare and report; the first process does it."""
        name = self.config.name or self.out.resolve().name
        model = self.out / "models" / name
        if self.processes.rank == 0:
            options = replace(trained_options(load_checkpoint(checkpoint).config), name=name, overwrite=True)
            told = {
                "data": ", ".join(path.name for path in (*self.bags, *self.renders)),
                "teacher": ", ".join(self.ensemble.names),
                "pseudo_labels": self.labels["train"].counts(),
            }
            export_checkpoint(checkpoint, model, options, told)
            calibrated = calibrate_student(
                model,
                self.held_out,
                self.config.calibrate_views,
                self.strange,
                self.labels.get("held_out"),
                self.out / "calibration",
                self.progress,
            )
            story = BagStory(
                self.taken.table(),
                self.frames,
                self.strange,
                self.labels,
                tuple(self.models),
                model,
                self.out / "run",
                calibrated,
                "" if self.rendered is None else self.rendered.trouble,
            )
            report, summary = write_story(story, self.out)
            FromBagsResult(model, report, launch_line(model), summary).keep(self.out)
        self.processes.any(False)
        done = finished(self.out)
        assert done is not None  # the first process has written it
        return done


def supposed_windows_share(config: FromBagsConfig, labels: int) -> float:
    """Return the share of windows to be cut around so many accepted labels."""
    return min(config.supposed_share, config.windows_per_label * labels / config.distill.window_count)


def _counted(labels: PseudoLabels) -> str:
    return ", ".join(f"{count} {name}" for name, count in labels.counts().items())


def _same(path: Path, asked: dict[str, Any]) -> bool:
    """Return whether a file holds the answer to this very question."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return all(told.get(key) == value for key, value in asked.items()) and "calibration" in told
    except (OSError, ValueError, AttributeError):
        return False
