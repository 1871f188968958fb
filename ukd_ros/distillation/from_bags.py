# SPDX-License-Identifier: Apache-2.0
"""From bags that nobody labelled to a student that is better where they were recorded: `ukd distill --bag`.

Bags become frames (`data.rosbag.frames`), the calibrated ensemble labels those it is sure of (`pseudo_labels`), a
student learns from them beside rendered windows and the teachers' votes (`distill`), is exported and calibrated on
renders that nobody has seen, and compared with its teachers on frames held out as they came. Every stage leaves its
result under `out`, so a call that was stopped, or killed, is gone on with by the same call (`from_bags_request`).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ukd_ros.config import to_mapping
from ukd_ros.data.bop import BopDataset
from ukd_ros.data.dataset import MixedWindows, SupposedWindows, UnlabelledWindows, Windows
from ukd_ros.data.progress import Stopped
from ukd_ros.data.rosbag.frames import bags_to_bop
from ukd_ros.data.rosbag.plan import HELD_OUT, TRAIN
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.distillation.bag_calibration import calibrate_student
from ukd_ros.distillation.calibrate import CalibrationOptions, calibrate
from ukd_ros.distillation.checkpoint import load_checkpoint
from ukd_ros.distillation.distill import distill
from ukd_ros.distillation.ensemble_estimator import ensemble_estimator, window_sizes
from ukd_ros.distillation.export import export_checkpoint, trained_options
from ukd_ros.distillation.frames import Frames
from ukd_ros.distillation.from_bags_report import BagStory, advice, write_story
from ukd_ros.distillation.from_bags_request import FromBagsConfig, FromBagsRequest, FromBagsResult, finished
from ukd_ros.distillation.label_store import stored_labels
from ukd_ros.distillation.parallel import Processes
from ukd_ros.distillation.pseudo_labels import PseudoLabels, agreeing, label_frames, required_on
from ukd_ros.distillation.teacher import Ensemble, TeacherError, member_files, member_models
from ukd_ros.distillation.train import object_models, open_folders, train_device
from ukd_ros.distillation.unlabelled import kept_proposals
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.perception.estimator import EstimatorOptions, PoseEstimator
from ukd_ros.perception.manifest import calibration_data
from ukd_ros.perception.votes import Calibration

logger = logging.getLogger(__name__)

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
    and nothing is calibrated, and the report says so). `objects`: their names (default: the teachers').
    The same call goes on where an earlier one stopped (unless `resume` is False: FileExistsError). Under torchrun
    processes share the frames, the teachers' work and the training. BagError, TeacherError, BopError, LabelError and
    ValueError for what cannot work, before long work where possible; Stopped when it was asked to stop, or
    `time_budget_s` is over, with everything kept.
    """
    request = FromBagsRequest(config, tuple(bags), tuple(teachers), out, tuple(renders), held_out, tuple(objects))
    request.compare(resume)
    done = finished(out)
    if done is not None:
        logger.info("%s: is finished already", out)
        return done
    started = time.monotonic()
    work = _Work(request, progress)
    work.open()
    work.take_frames()
    work.claim()  # only now: a path mistyped at first must not spoil the folder
    work.calibrate_teachers()
    work.label()
    left = None if time_budget_s is None else max(1.0, time_budget_s - (time.monotonic() - started))
    checkpoint = work.learn(left)
    if checkpoint is None:
        raise Stopped(f"{out}: the time is up and what is done is kept; the same call goes on")
    return work.finish(checkpoint)


class _Work:
    """One call: what it was given, and what its stages have made so far."""

    def __init__(self, request: FromBagsRequest, progress: bool) -> None:
        self.request, self.config, self.progress = request, request.config, progress
        self.bags, self.teachers, self.out = request.bags, request.teachers, request.out
        self.renders, self.held_out, self.objects = request.renders, request.held_out, request.objects
        self.processes = Processes.from_environment()
        self.models: list[ObjectModel] = []
        self.calibration: Calibration | None = None
        self.least = 1.1
        self.labels: dict[str, PseudoLabels] = {}

    def open(self) -> None:
        """Read teachers and models; nothing long."""
        distilling = self.config.distill
        if distilling.threads:
            torch.set_num_threads(distilling.threads)  # from the start: results differ in their last digits
        if not self.bags:
            raise ValueError("no bag was given; name one or more")
        files = member_files(self.teachers)
        if self.renders:
            self.models = object_models(distilling, self.renders, self.objects)[1]
        else:
            known = {model.name: model for model in (member_models(files[0]) if files else ())}
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
            self.config = replace(self.config, distill=replace(distilling, initial=str(files[0])))

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
        self.frames = Frames(folder, TRAIN, names)
        self.strange = Frames(folder, HELD_OUT, names) if (folder / HELD_OUT).is_dir() else None

    def estimator(self) -> PoseEstimator:
        """Return the teachers as an estimator that refuses no pose for being uncertain: labelling decides that."""
        options = EstimatorOptions(
            tracking=False, zoom_rounds=self.config.zoom_rounds, max_sigma_position=100.0, max_sigma_rotation_deg=1000.0
        )
        sizes = window_sizes(self.config.distill.window)
        return ensemble_estimator(self.ensemble, self.models, sizes, options, self.calibration)

    def calibrate_teachers(self) -> None:
        """Fit how sure the ensemble may be, and how sure it must be, on held-out renders; kept in teachers.json."""
        if self.held_out is None:
            logger.warning(
                "no held-out renders were given: nothing says how sure the teachers may be, nothing is labelled"
            )
            return
        path = self.out / "teachers.json"
        views = BopDataset(self.held_out)
        count = min(self.config.calibrate_views, len(views))
        labels = json.loads(json.dumps(to_mapping(self.config.labels)))
        asked = {"teachers": self.ensemble.identity, "views": [len(views), count], "labels": labels}
        if self.processes.rank == 0 and not _same(path, asked):
            report = calibrate(self.estimator(), views, CalibrationOptions(), count, self.progress)
            logger.info("the teachers on %s:\n%s", self.held_out, report.table())
            self.calibration = report.calibration
            # of other views where there are any
            chosen = range(count, 2 * count) if len(views) >= 2 * count else range(count)
            least = required_on(self.estimator(), views, chosen, self.config.labels, self.progress)
            told = {**asked, "least": least, "calibration": calibration_data(report.calibration)}
            told["table"] = report.table()
            write_bytes(path, (json.dumps(told, indent=1) + "\n").encode())
        self.processes.any(False)
        told = json.loads(path.read_text(encoding="utf-8"))
        self.calibration, self.least = Calibration(**told["calibration"]), float(told["least"])
        if self.least > 1.0:
            share = f"{self.config.labels.sure:.0%}"
            logger.warning("%s: the surest poses are not right to %s, so nothing is labelled", self.held_out, share)

    def label(self) -> None:
        """Ask the teachers for labels of all frames, of those held out too."""
        splits = {"train": self.frames, **({"held_out": self.strange} if self.strange is not None else {})}
        if self.calibration is None:
            empty = PseudoLabels((), len(self.frames), {"uncalibrated": len(self.frames)})
            self.labels = dict.fromkeys(splits, empty)
            return
        estimator = self.estimator()
        for name, frames in splits.items():
            note = {
                "teachers": self.ensemble.identity,
                "calibration": calibration_data(self.calibration),
                "frames": frames.fingerprint(),
                "settings": json.loads(json.dumps(to_mapping(self.config.labels))),
                "least": self.least,
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

    def learn(self, time_budget_s: float | None) -> Path | None:
        """Train the student; return its checkpoint, None when the time was up before."""
        config = self.config.distill
        result = distill(
            config,
            self.ensemble,
            self.windows(),
            self.models,
            self.out / "run",
            cache=self.out / "teachers",
            resume=True,
            time_budget_s=time_budget_s,
            progress=self.progress,
        )
        return result.checkpoint if result.finished else None

    def windows(self) -> Windows:
        """Return what the student learns from: renders, accepted labels, and frames with the teachers' votes alone."""
        config = self.config.distill
        views = [self.frames.view(number) for number in range(len(self.frames))]
        place, which = self.out / "proposals.json", self.frames.fingerprint()
        if self.processes.rank == 0:
            kept_proposals(place, self.ensemble, views, which, config.window.locate_width, self.progress)
        self.processes.any(False)
        boxes = kept_proposals(place, self.ensemble, views, which, config.window.locate_width, False)
        supposed = [
            (views[number], [label.supposed(*_size(views[number])) for label in labels])
            for number, labels in self.labels["train"].by_frame().items()
        ]
        parts: list[tuple[Windows, float]] = []
        if boxes:
            strange = UnlabelledWindows(views, boxes, self.models, config.window, config.window_seed)
            parts.append((strange, config.unlabelled_share))
        share = supposed_windows_share(self.config, len(self.labels["train"].accepted))
        if share > 0.0:
            parts.append((SupposedWindows(supposed, self.models, config.window, config.window_seed), share))
        if not parts:
            counts = _counted(self.labels["train"])
            raise ValueError(NOTHING_SEEN.format(count=len(views), counts=counts, advice=advice(self.labels["train"])))
        if not self.renders:
            if len(parts) == 1:
                return parts[0][0]
            alone = share / (share + config.unlabelled_share)
            return MixedWindows(parts[0][0], [(parts[1][0], alone)], config.window_seed)
        data, _, _ = open_folders(
            config, self.renders, objects=self.objects, progress=self.progress, seed=config.window_seed
        )
        return MixedWindows(data, parts, config.window_seed)

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
            )
            report, summary = write_story(story, self.out)
            launch = f"ros2 launch ukd_ros pose.launch.py model:={model.resolve()}"
            FromBagsResult(model, report, launch, summary).keep(self.out)
        self.processes.any(False)
        done = finished(self.out)
        assert done is not None  # the first process has written it
        return done


def supposed_windows_share(config: FromBagsConfig, labels: int) -> float:
    """Return the share of windows to be cut around so many accepted labels."""
    return min(config.supposed_share, config.windows_per_label * labels / config.distill.window_count)


def _counted(labels: PseudoLabels) -> str:
    return ", ".join(f"{count} {name}" for name, count in labels.counts().items())


def _size(view: Any) -> tuple[int, int]:
    return view.camera.width, view.camera.height


def _same(path: Path, asked: dict[str, Any]) -> bool:
    """Return whether a file holds the answer to this very question."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return all(told.get(key) == value for key, value in asked.items()) and "calibration" in told
    except (OSError, ValueError, AttributeError):
        return False
