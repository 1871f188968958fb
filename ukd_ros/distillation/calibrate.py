# SPDX-License-Identifier: Apache-2.0
"""Calibrating a model: how far are its error bars to be believed, measured on held-out labelled views.

The estimator runs as it will on the robot; what it finds is matched with the truth, and how its keypoint errors are
shared (perception/votes.py) is fitted to what is left. Then poses are solved with calibrations that have not seen their
view, and coverage, sharpness and likelihood say what was gained, with the block-diagonal variant beside it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ukd_ros.data.bop import BopDataset, BopError
from ukd_ros.data.bop_check import check_bop
from ukd_ros.data.dataset import LabelledViews
from ukd_ros.data.progress import Bar
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.distillation.conformal import conformal_radius
from ukd_ros.distillation.corrections import (
    Match,
    corrected,
    error_samples,
    fit_doubt,
    fit_shrinkage,
    recalibrated,
    shares_of,
    spread,
)
from ukd_ros.distillation.error_model import (
    PARTS,
    CrossFit,
    HeldOut,
    choose,
    cover,
    cross_fit,
)
from ukd_ros.distillation.pose_check import PoseCheck
from ukd_ros.distillation.recalibrate import Recalibration, recalibrate
from ukd_ros.distillation.reliability import draw_reliability
from ukd_ros.distillation.solved_poses import solve_poses
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose
from ukd_ros.geometry.view import LabelledView
from ukd_ros.perception.bundle import find_model, load_bundle, update_calibration
from ukd_ros.perception.estimator import EstimatorOptions, PoseEstimator
from ukd_ros.perception.votes import (
    Calibration,
    VoteInstance,
    keypoint_box,
)

logger = logging.getLogger(__name__)

FORMS = ("joint", "block_diagonal")
"""With common modes between the keypoints, and without."""

UNGATED = EstimatorOptions(tracking=False, max_sigma_position=100.0, max_sigma_rotation_deg=1000.0)
"""An estimator that refuses no pose for being uncertain."""

CROPS = ("locate", "oracle")
"""Where the zoomed crops come from: the locate stage, or the truth with a jitter."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What counts as a sample, and how the samples are split."""

    crops: str = field(default="locate", metadata={"help": "Crops from the locate stage, or from the jittered truth."})
    min_visible: float = field(
        default=0.1, metadata={"help": "Labels less visible than this are neither sought nor matched.", "unit": "0..1"}
    )
    match_radius: float = field(
        default=0.5,
        metadata={
            "help": "An estimate is of a labelled object when the median distance of their keypoints is below this "
            "fraction of the object's box.",
            "unit": "fraction",
        },
    )
    truncated: bool = field(default=False, metadata={"help": "Also use objects that leave the image."})
    folds: int = field(default=4, metadata={"help": "Blocks of views for cross-validation.", "unit": "blocks"})
    jitter_shift: float = field(
        default=0.1, metadata={"help": "Oracle crops are off by up to this fraction of the box.", "unit": "fraction"}
    )
    jitter_scale: float = field(
        default=1.2, metadata={"help": "Oracle crops are too large or small by up to this factor.", "unit": "factor"}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the jitter."})
    ids: tuple[int, int] | None = field(
        default=None, metadata={"help": "Only images with first <= id < last (two numbers)."}
    )
    block_views: int = field(
        default=0,
        metadata={
            "help": "So many neighbouring views of a scene are one block: frames of a video resemble each other. "
            "0: not said, which for renders means 1 and for recalibrating is refused.",
            "unit": "views",
        },
    )
    level: float = field(default=0.95, metadata={"help": "Coverage of the conformal radius.", "unit": "0..1"})

    def __post_init__(self) -> None:
        """Refuse values out of range; ValueError names the field."""
        if self.crops not in CROPS:
            raise ValueError(f"crops: is {self.crops!r}, but one of {', '.join(CROPS)} is needed.")
        if not 0.0 <= self.min_visible <= 1.0:
            raise ValueError(f"min_visible: is {self.min_visible}, but 0..1 is needed.")
        if not self.match_radius > 0.0 or not self.jitter_shift >= 0.0 or not self.jitter_scale >= 1.0:
            raise ValueError("match_radius must be positive, jitter_shift 0 or more and jitter_scale 1 or more.")
        if self.block_views < 0:
            raise ValueError(f"block_views: is {self.block_views}, but 0 or more is needed.")
        if not 0.0 < self.level < 1.0:
            raise ValueError(f"level: is {self.level}, but a share inside 0..1 is needed.")
        if self.folds < 2:
            raise ValueError(f"folds: is {self.folds}, but at least 2 are needed to hold one out.")


@dataclass(frozen=True, eq=False)
class Collection:
    """What a data set gave: matches, labelled objects sought, and instances of no labelled object."""

    matches: tuple[Match, ...]
    views: int
    labels: int
    unmatched: int


@dataclass(frozen=True, eq=False)
class CalibrationReport:
    """What was fitted, on what, and what it is worth (every check by calibrations that have not seen the view).

    labels: labelled objects sought; matched of them found; unmatched: instances of no labelled object. way: how the
    shipped calibration was fitted, ways: the held-out scores that chose it (likelihood and pose_level on linearised
    poses; solved and solved_covered, without and with a final scaling to nominal coverage, on poses from PnP).
    checks: "joint", "block_diagonal" (modes 0, refitted), "uncalibrated" (the network's own error bars). form: the one
    of the first two that is shipped as `calibration`, by coverage and likelihood on held-out views.
    """

    model: str
    dataset: str
    crops: str
    views: int
    labels: int
    matched: int
    unmatched: int
    form: str
    calibration: Calibration
    way: str
    ways: dict[str, HeldOut]
    checks: dict[str, PoseCheck]
    squares: dict[str, dict[str, FloatArray]] = field(repr=False, default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """Return the report as plain data for JSON (without the single NEES values)."""
        data = {
            item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name not in ("squares",)
        }
        data["calibration"] = {**dataclasses.asdict(self.calibration), "modes": self.calibration.modes.tolist()}
        data["ways"] = {name: dataclasses.asdict(score) for name, score in self.ways.items()}
        data["checks"] = {name: dataclasses.asdict(check) for name, check in self.checks.items()}
        return data

    def table(self) -> str:
        """Return the checks as a text table."""
        header = f"{'':16} poses  NEES  cov95: pose    xy     z   rot   s_xy mm   s_z mm  s_rot deg     NLL"
        rows = [header]
        for name, check in self.checks.items():
            shares = " ".join(f"{100 * check.coverage[part][0.95]:5.1f}" for part in PARTS)
            rows.append(
                f"{name:16} {check.poses:5d} {check.nees:5.1f}       {shares} {check.sigma_xy_mm:9.2f} "
                f"{check.sigma_z_mm:8.2f} {check.sigma_rotation_deg:10.2f} {check.nll:7.2f}"
            )
        rows.append(f"shipped: {self.form} ({self.way})")
        if self.calibration.conformal_level > 0.0:
            rows.append(
                f"radius {self.calibration.conformal_radius:.2f}: that ellipsoid of the shipped covariance holds "
                f"{self.calibration.conformal_level:.0%} of poses in new views like these; nothing is said of others"
            )
        return "\n".join(rows)


def calibrate_model(
    model_dir: Path | str,
    dataset_dir: Path | str,
    limit: int | None = None,
    out: Path | str | None = None,
    backend: str = "auto",
    progress: bool = True,
    *,
    options: CalibrationOptions | None = None,
    estimator_options: EstimatorOptions | None = None,
    names: Mapping[int, str] | None = None,
) -> CalibrationReport:
    """Calibrate a model on a labelled BOP data set and store the result in its model.yaml (by rename).

    limit: at most so many views, from the start. out: folder for calibration.json and reliability.png. names: gives
    object ids of the data set the model's names.
    The data must be neither trained nor evaluated on. Raises BundleError, BackendError or BopError for what cannot be
    opened, ValueError when too few instances were found to fit anything.
    """
    options = options or CalibrationOptions()
    root = find_model(model_dir)
    bundle = load_bundle(root)
    # Keypoints as the votes give them: an earlier calibration must not correct them before they are judged.
    bundle = replace(bundle, calibration=Calibration())
    estimator = PoseEstimator(bundle, backend, estimator_options)
    views = _open(dataset_dir, bundle.objects, options, limit, names)
    report = calibrate(estimator, views, options, limit, progress)
    report = replace(report, model=bundle.name, dataset=Path(dataset_dir).resolve().name)
    update_calibration(root, report.calibration, {"calibrated_on": _provenance(report), "recalibrated_on": None})
    if out is not None:
        write_report(report, Path(out))
    logger.info("%s calibrated on %d instances:\n%s", root, report.matched, report.table())
    return report


def recalibrate_model(
    model_dir: Path | str,
    dataset_dir: Path | str,
    limit: int | None = None,
    out: Path | str | None = None,
    backend: str = "auto",
    progress: bool = True,
    *,
    options: CalibrationOptions | None = None,
    estimator_options: EstimatorOptions | None = None,
    names: Mapping[int, str] | None = None,
) -> Recalibration:
    """Fit one factor on a calibrated model's covariance on a handful of labelled real frames, and store it.

    Arguments as of `calibrate_model`; by default no pose is refused for being uncertain, or the factor would be fitted
    to those that it lets pass. ValueError as of `recalibrate`.
    """
    options = options or CalibrationOptions()
    if options.block_views < 1:
        raise ValueError(
            "block_views: say how many neighbouring frames resemble each other, such as --set block_views=30 for a "
            "second of video, or 1 for photographs taken one by one."
        )
    root = find_model(model_dir)
    bundle = load_bundle(root)
    estimator = PoseEstimator(bundle, backend, estimator_options or UNGATED)
    views = _open(dataset_dir, bundle.objects, options, limit, names)
    found = collect(estimator, views, options, limit, progress)
    result = recalibrate(estimator, found.matches, views.blocks(options.block_views), options.level)
    said = {
        "data": Path(dataset_dir).resolve().name,
        "views": found.views,
        "labels": found.labels,
        "factor": round(result.factor, 4),
        "poses": result.poses,
        "blocks": result.blocks,
        "effective": round(result.effective, 1),
        "coverage_95_before": round(result.before.coverage["pose"][0.95], 4),
        "coverage_95_after": round(result.after.coverage["pose"][0.95], 4),
    }
    update_calibration(root, result.calibration, {"recalibrated_on": said})
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_bytes(Path(out) / "recalibration.json", (json.dumps(result.as_data(), indent=2) + "\n").encode())
    return result


class _Chosen:
    """The views of a data set with ids in a range."""

    def __init__(self, data: BopDataset, ids: tuple[int, int]) -> None:
        self._data = data
        self.indices = [i for i, image in enumerate(data.images) if ids[0] <= image.image_id < ids[1]]
        if not self.indices:
            raise BopError(f"{data.root}: has no images with ids from {ids[0]} to below {ids[1]}.")

    def __len__(self) -> int:
        return len(self.indices)

    def view(self, index: int) -> LabelledView:
        return self._data.view(self.indices[index])

    def blocks(self, views: int) -> list[int]:
        """Return the block of every view: `views` neighbours of one scene."""
        where: dict[tuple[int, int], int] = {}
        seen: Counter[int] = Counter()
        places = []
        for index in self.indices:
            scene = self._data.images[index].scene_id
            places.append(where.setdefault((scene, seen[scene] // views), len(where)))
            seen[scene] += 1
        return places


def _open(
    dataset_dir: Path | str,
    objects: Sequence[ObjectModel],
    options: CalibrationOptions,
    limit: int | None,
    names: Mapping[int, str] | None,
) -> _Chosen:
    """Return the views asked for, checked; BopError for a faulty folder or one without the model's objects."""
    data = BopDataset(dataset_dir, names=dict(names or {}))
    known = {model.name for model in objects}
    mine = [i for i in data.object_ids if data.name(i) in known]
    if not mine:
        raise BopError(
            f"{data.root}: has the objects {', '.join(data.name(i) for i in data.object_ids)}, the model "
            f"{', '.join(sorted(known))}: none in common. Say which is which with --name ID=NAME."
        )
    views = _Chosen(data, options.ids or (0, 2**62))
    chosen = views.indices if limit is None else views.indices[:limit]
    check_bop(data, chosen, objects=mine)
    return views


def calibrate(
    estimator: PoseEstimator,
    views: LabelledViews,
    options: CalibrationOptions | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> CalibrationReport:
    """Run the estimator on labelled views, fit the calibration and check the poses; nothing is stored.

    ValueError when fewer than about 30 instances match a label.
    """
    options = options or CalibrationOptions()
    found = collect(estimator, views, options, limit, progress)
    shrinkage = fit_shrinkage(found.matches, estimator.objects)
    enlarged = tuple(spread(item, shrinkage) for item in found.matches)
    exponent, reference = fit_doubt(error_samples(enlarged, estimator.objects), shares_of(found.matches))
    correction = Calibration(shrinkage=shrinkage, doubt_exponent=exponent, doubt_reference=reference)
    found = replace(found, matches=tuple(corrected(item, correction) for item in found.matches))
    samples = error_samples(found.matches, estimator.objects)
    joint = _judge(estimator, found.matches, cross_fit(samples, options.folds, with_modes=True))
    blocks = _judge(estimator, found.matches, cross_fit(samples, options.folds, with_modes=False))
    plain = replace(joint.fit, by_fold=(Calibration(),) * options.folds)
    check, squares, _, view = check_poses(estimator, found.matches, plain)
    raw = Judged(plain, check, squares, view, way="")
    variants = {"joint": joint, "block_diagonal": blocks, "uncalibrated": raw}
    form = _form({name: _score(variants[name].check) for name in FORMS})
    step = max(1, options.block_views)
    places = np.array(views.blocks(step) if isinstance(views, _Chosen) else [i // step for i in range(len(views))])
    radii = {
        name: conformal_radius(
            variants[name].squares["pose"], places[variants[name].view.astype(np.int64)], options.level
        )
        for name in FORMS
    }
    stamped = [
        replace(
            judged.fit.calibration,
            conformal_level=options.level if math.isfinite(radii[name]) else 0.0,
            conformal_radius=radii[name] if math.isfinite(radii[name]) else 0.0,
            views=found.views,
            instances=len(found.matches),
            shrinkage=shrinkage,
            doubt_exponent=exponent,
            doubt_reference=reference,
        )
        for name, judged in zip(FORMS, (joint, blocks), strict=True)
    ]
    return CalibrationReport(
        model="",
        dataset="",
        crops=options.crops,
        views=found.views,
        labels=found.labels,
        matched=len(found.matches),
        unmatched=found.unmatched,
        form=form,
        calibration=stamped[FORMS.index(form)],
        way=variants[form].way,
        ways=variants[form].fit.scores,
        checks={name: judged.check for name, judged in variants.items()},
        squares={name: judged.squares for name, judged in variants.items()},
    )


def collect(
    estimator: PoseEstimator,
    views: LabelledViews,
    options: CalibrationOptions,
    limit: int | None = None,
    progress: bool = False,
) -> Collection:
    """Run the estimator on labelled views and match what it finds; instances below its min_score do not count."""
    matches: list[Match] = []
    labels = unmatched = 0
    count = len(views) if limit is None else min(limit, len(views))
    for index in Bar(range(count), desc="calibrating", unit="view", disable=not progress):
        view = views.view(index)
        truths = _truths(view, estimator.objects, options)
        labels += sum(sought for _, _, sought in truths)
        if options.crops == "oracle":
            rng = np.random.default_rng((options.seed, index))
            boxes = [
                (class_index, _jittered(_projected_box(view, estimator.objects[class_index], pose), options, rng))
                for class_index, pose, sought in truths
                if sought
            ]
            zoomed = [estimator.zoom(view, class_index, box) for class_index, box in boxes]
            instances = [instance for instance in zoomed if instance is not None]
        else:
            instances = estimator.observe(view)
        sure = [instance for instance in instances if instance.score >= estimator.options.min_score]
        pairs, left = match(sure, truths, view.camera, estimator.objects, options.match_radius)
        matches += [Match(instance, pose, view.camera, index) for instance, pose, sought in pairs if sought]
        unmatched += left
    return Collection(tuple(matches), count, labels, unmatched)


def match(
    instances: Sequence[VoteInstance],
    truths: Sequence[tuple[int, Pose, bool]],
    camera: Camera,
    objects: Sequence[ObjectModel],
    radius: float,
) -> tuple[list[tuple[VoteInstance, Pose, bool]], int]:
    """Pair instances, best score first, with the nearest free label of their class within the radius.

    truths: (class, pose, whether it is sought). A symmetric object's pose comes back as the equivalent one nearest to
    the instance. Returns the pairs and how many instances are of no label.
    """
    free = list(truths)
    pairs: list[tuple[VoteInstance, Pose, bool]] = []
    unmatched = 0
    for instance in instances:
        best: tuple[float, int, Pose] | None = None
        for number, (class_index, truth, _) in enumerate(free):
            if class_index != instance.class_index:
                continue
            model = objects[class_index]
            for motion in model.symmetries.poses(continuous_steps=360):
                pose = truth @ motion
                xy = camera.project(pose.transform(model.keypoints_3d))
                distance = float(np.median(np.linalg.norm(xy - instance.keypoints.xy, axis=1)))
                size = float(np.ptp(xy, axis=0).max())
                if distance < radius * size and (best is None or distance < best[0]):
                    best = (distance, number, pose)
        if best is None:
            unmatched += 1
            continue
        _, _, sought = free.pop(best[1])
        pairs.append((instance, best[2], sought))
    return pairs, unmatched


@dataclass(frozen=True, eq=False)
class Judged:
    """A cross-fitted calibration, the check of its solved poses, their NEES per part, views, and how it was fitted."""

    fit: CrossFit
    check: PoseCheck
    squares: dict[str, FloatArray]
    view: FloatArray
    way: str


def _judge(estimator: PoseEstimator, matches: Sequence[Match], fit: CrossFit) -> Judged:
    """Solve all poses with a fit, and with it scaled to the coverage that these show; return the better of both."""
    check, squares, fold, view = check_poses(estimator, matches, fit)
    covered = cover(fit, squares["pose"], fold)
    covered_check, covered_squares, _, covered_view = check_poses(estimator, matches, covered)
    scores = {"solved": _score(check), "solved_covered": _score(covered_check)}
    fit = replace(fit, scores={**fit.scores, **scores})
    if choose(scores) == "solved":
        return Judged(fit, check, squares, view, fit.way)
    return Judged(
        replace(covered, scores=fit.scores), covered_check, covered_squares, covered_view, f"{fit.way}, covered"
    )


def _form(scores: dict[str, HeldOut], margin_nll: float = 0.1, margin_miss: float = 0.01) -> str:
    """Return which form of the covariance to ship: the joint one, unless held-out views speak clearly against it.

    What errors share on other data than these may be more; so the margins are beyond what a few hundred views can tell.
    """
    joint, blocks = (scores[name] for name in FORMS)
    worse = joint.nll > blocks.nll + margin_nll or joint.miss > blocks.miss + margin_miss
    return "block_diagonal" if worse and choose(scores) == "block_diagonal" else "joint"


def _score(check: PoseCheck) -> HeldOut:
    """Return what decides between fits."""
    return HeldOut(check.nll, max(abs(check.coverage[part][0.95] - 0.95) for part in PARTS))


def check_poses(
    estimator: PoseEstimator, matches: Sequence[Match], fit: CrossFit
) -> tuple[PoseCheck, dict[str, FloatArray], FloatArray, FloatArray]:
    """Solve every match with the calibration that has not seen its view.

    Returns the check, the NEES [m] per part, the fold [m] and the view [m] of the poses that were not rejected.
    ValueError when none was solved.
    """
    instances = [recalibrated(m.instance, fit.by_fold[int(f)]) for m, f in zip(matches, fit.fold, strict=True)]
    found = solve_poses(estimator, matches, instances)
    views = np.array([item.view for item in matches])
    return found.check, found.squares, np.asarray(fit.fold)[found.kept], views[found.kept]


def write_report(report: CalibrationReport, out: Path) -> None:
    """Write calibration.json and reliability.png into a folder, each by rename."""
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".calibration.{os.getpid()}.json"
    temporary.write_text(json.dumps(report.as_data(), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, out / "calibration.json")
    title = f"{report.model}: {report.matched} instances of {report.dataset}, crops by {report.crops}"
    draw_reliability(report.squares, title, out / "reliability.png")


def _provenance(report: CalibrationReport) -> dict[str, Any]:
    """Return what model.yaml keeps of a report."""
    check = report.checks[report.form]
    return {
        "data": report.dataset,
        "crops": report.crops,
        "views": report.views,
        "labels": report.labels,
        "matched": report.matched,
        "unmatched": report.unmatched,
        "form": report.form,
        "way": report.way,
        "coverage_95": {part: round(check.coverage[part][0.95], 4) for part in PARTS},
        "nees": round(check.nees, 3),
        "sigma_xy_mm": round(check.sigma_xy_mm, 3),
        "sigma_z_mm": round(check.sigma_z_mm, 3),
        "sigma_rotation_deg": round(check.sigma_rotation_deg, 3),
        "pose_nll": round(check.nll, 3),
    }


def _truths(
    view: LabelledView, objects: Sequence[ObjectModel], options: CalibrationOptions
) -> list[tuple[int, Pose, bool]]:
    """Return (class, pose, whether it is sought) of every label that projects.

    Hidden and truncated objects are not sought, but an instance of one is no false alarm.
    """
    names = {model.name: index for index, model in enumerate(objects)}
    truths = []
    for label in view.objects:
        if label.object_name not in names:
            continue
        index = names[label.object_name]
        box = _projected_box(view, objects[index], label.T_camera_object)
        if not np.isfinite(box).all():
            continue
        hidden = label.visible_fraction < options.min_visible or (label.truncated and not options.truncated)
        truths.append((index, label.T_camera_object, not hidden))
    return truths


def _projected_box(view: LabelledView, model: ObjectModel, pose: Pose) -> FloatArray:
    """Return the box [4] px of the true keypoints; not finite when the camera cannot see them."""
    return keypoint_box(view.camera.project(pose.transform(model.keypoints_3d)))


def _jittered(box: FloatArray, options: CalibrationOptions, rng: np.random.Generator) -> FloatArray:
    """Return the box shifted and scaled at random, as the locate stage would miss it."""
    centre, half = 0.5 * (box[:2] + box[2:]), 0.5 * (box[2:] - box[:2])
    centre = centre + rng.uniform(-1.0, 1.0, 2) * options.jitter_shift * 2.0 * half.max()
    half = half * options.jitter_scale ** rng.uniform(-1.0, 1.0)
    return np.concatenate([centre - half, centre + half])
