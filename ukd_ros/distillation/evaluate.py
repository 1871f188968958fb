# SPDX-License-Identifier: Apache-2.0
"""How good is a model on labelled images: poses, their covariance, speed, and pictures of where it fails.

The estimator runs as on the robot (without tracking: the images are taken as unrelated). The truth is used for scoring
only; with ``crops: oracle`` it also places the crop, which tells what detection costs. Symmetric objects are compared
with the symmetric truth that is nearest to the estimate.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ukd_ros.data.bop import TARGETS_FILE, BopDataset, BopError
from ukd_ros.data.bop_check import check_bop
from ukd_ros.data.progress import Bar
from ukd_ros.distillation.failures import cause_of
from ukd_ros.distillation.pose_check import pose_check
from ukd_ros.distillation.protocol import (
    METRICS,
    Answers,
    matches,
    risk_coverage,
)
from ukd_ros.distillation.report import write_report
from ukd_ros.distillation.scores import (
    ADD_THRESHOLD,
    EvaluationReport,
    TargetResult,
    detection_rates,
    keypoint_check,
    predicted_error,
    score_of,
)
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.estimate import PoseEstimate, Rejection
from ukd_ros.geometry.keypoints import Keypoints
from ukd_ros.geometry.metrics import (
    add,
    add_s,
    mspd,
    mssd,
    nees,
    pose_nll,
    projection_error,
)
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose
from ukd_ros.geometry.symmetry import nearest, with_free_turns, without_free_turns
from ukd_ros.geometry.view import LabelledView, ObjectLabel, View
from ukd_ros.perception.bundle import find_model, load_bundle
from ukd_ros.perception.estimator import EstimatorOptions, PoseEstimator
from ukd_ros.perception.pnp import solve_pnp
from ukd_ros.perception.votes import keypoint_box

logger = logging.getLogger(__name__)

CROPS = ("estimator", "oracle")
MAX_ADD_S_POINTS = 1000
"""About so many true points ask for the nearest estimated one, which is looked for among all."""

CONTINUOUS_STEPS = 315
"""Turns that stand for an axis of revolution in MSSD and MSPD: steps that move the farthest point by 0.01 diameters."""

ELSEWHERE = "elsewhere"
"""Nothing was refused: the estimate of this object, if any, lies elsewhere."""

OUTRANKED = "outranked"
"""There is an estimate at the object, but as many others as were asked for score higher."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated, and what counts."""

    split: str | None = field(default=None, metadata={"help": "Split folder of the data set; none: its only one."})
    limit: int = field(
        default=0, metadata={"help": "At most this many images, evenly spread; 0: all.", "unit": "images"}
    )
    ids: tuple[int, int] | None = field(
        default=None, metadata={"help": "Only images with first <= id < last (two numbers)."}
    )
    crops: str = field(default="estimator", metadata={"help": "estimator: as on the robot; oracle: from the truth."})
    backend: str = field(default="auto", metadata={"help": "auto, onnxruntime, opencv or torch."})
    threads: int = field(default=0, metadata={"help": "Cores for the network; 0: the runtime's own choice."})
    min_visible: float = field(
        default=0.1,
        metadata={"help": "Objects less visible are not asked for (unless a target list is).", "unit": "0..1"},
    )
    match_radius: float = field(
        default=0.5,
        metadata={
            "help": "An estimate is of a labelled object when the median distance of their keypoints is below this "
            "fraction of the object's box.",
            "unit": "fraction",
        },
    )
    estimator: EstimatorOptions = field(
        default_factory=EstimatorOptions,
        metadata={"help": "The estimator's own settings, gates among them; every image stands alone, so no tracking."},
    )
    target_list: bool = field(
        default=True, metadata={"help": f"Ask for the instances in {TARGETS_FILE} where the data set has one."}
    )

    def __post_init__(self) -> None:
        """Refuse values out of range; ValueError names the field."""
        if self.crops not in CROPS:
            raise ValueError(f"crops: is {self.crops!r}, but one of {', '.join(CROPS)} is needed.")
        if self.limit < 0:
            raise ValueError(f"limit: is {self.limit}, but 0 (all) or more is needed.")
        if self.ids is not None and not 0 <= self.ids[0] < self.ids[1]:
            raise ValueError(f"ids: are {self.ids}, but 0 <= first < last is needed.")
        if not 0.0 <= self.min_visible <= 1.0 or not self.match_radius > 0.0:
            raise ValueError("min_visible must be in 0..1 and match_radius positive.")


def evaluate_model(
    model: Path | str,
    dataset: Path | str,
    options: EvaluationOptions | None = None,
    *,
    out: Path | None = None,
    progress: bool = True,
    names: Mapping[int, str] | None = None,
    **changes: Any,
) -> EvaluationReport:
    """Run a model over a BOP data set and score it; ``changes`` replace single fields of ``options``.

    ``names`` gives object ids of the data set the model's names. With ``out`` the report is written there: report.txt,
    report.json, summary.png, best.png, worst.png. Raises BundleError or BackendError for the model, BopError for the
    data set or when it has none of the model's objects.
    """
    options = replace(options or EvaluationOptions(), **changes)
    bundle = load_bundle(find_model(model))
    data = BopDataset(dataset, options.split, dict(names or {}))
    _check(data, [model.name for model in bundle.objects], options)
    estimator = PoseEstimator(
        bundle, options.backend, replace(options.estimator, tracking=False), threads=options.threads
    )
    judge = _Judge(data, bundle.objects, estimator, options)
    run = _run_oracle if options.crops == "oracle" else _run_estimator
    indices = judge.images()
    for index in Bar(indices, desc="evaluating", unit="image", disable=not progress):
        run(judge, index)
    report = judge.report(bundle.name, Path(dataset).name, len(indices))
    if out is not None:
        write_report(report, data, bundle.objects, Path(out))
    return report


def _check(data: BopDataset, known: Sequence[str], options: EvaluationOptions) -> None:
    """Refuse a faulty data set before the work starts; BopError."""
    objects = [i for i in data.object_ids if data.name(i) in known]
    listed = options.target_list and data.has_targets
    check_bop(data, _chosen(data, options), objects=objects, targets=listed, evaluation=True)


def _chosen(data: BopDataset, options: EvaluationOptions) -> list[int]:
    """Return the indices of the images to be evaluated."""
    first, last = options.ids or (0, 2**62)
    chosen = [i for i, image in enumerate(data.images) if first <= image.image_id < last]
    if not chosen:
        raise BopError(f"{data.root}: has no images with ids from {first} to below {last}.")
    if 0 < options.limit < len(chosen):
        spread = np.linspace(0, len(chosen) - 1, options.limit).round().astype(int)
        chosen = [chosen[int(i)] for i in spread]
    return chosen


class _Judge:
    """Knows the truth, asks the estimator, and keeps the results."""

    def __init__(
        self, data: BopDataset, objects: Sequence[ObjectModel], estimator: PoseEstimator, options: EvaluationOptions
    ) -> None:
        self.data, self.estimator, self.options = data, estimator, options
        self.results: list[TargetResult] = []
        self.answers: list[Answers] = []
        self.latencies: list[float] = []
        self.false_alarms = 0
        known = {data.name(i): i for i in data.object_ids}
        if not known.keys() & {model.name for model in objects}:
            raise BopError(
                f"{data.root}: has the objects {', '.join(known)}, the model {', '.join(m.name for m in objects)}: "
                "none in common. Say which is which by names, object id = name (for example 8=driller)."
            )
        self.objects: dict[str, ObjectModel] = {}
        self.indices: dict[str, int] = {}
        self.points: dict[str, FloatArray] = {}
        self.motions: dict[str, list[Pose]] = {}
        for index, model in enumerate(objects):
            if model.name in known:
                # The data set's own symmetries decide how it is scored, where it has any.
                symmetries = data.symmetries(known[model.name]) or model.symmetries
                self.objects[model.name] = replace(model, symmetries=symmetries)
                self.indices[model.name] = index
                self.points[model.name] = data.mesh(known[model.name], evaluation=True).vertices
                self.motions[model.name] = symmetries.poses(continuous_steps=CONTINUOUS_STEPS)
        self.counts = self._target_counts()

    def _target_counts(self) -> dict[tuple[int, int, str], int] | None:
        """Return how many instances of an object are asked for in an image (scene, image, name), if a list says so."""
        if not self.options.target_list or not self.data.has_targets:
            return None
        targets = [t for t in self.data.targets() if t.object_id in self.data.object_ids]
        return {(t.scene_id, t.image_id, self.data.name(t.object_id)): t.count for t in targets}

    def images(self) -> list[int]:
        """Return the indices of the images to be evaluated."""
        return _chosen(self.data, self.options)

    def labels(self, index: int, view: LabelledView) -> list[tuple[ObjectLabel, bool]]:
        """Return the image's labels of known objects, each with whether it is asked for."""
        image = self.data.images[index]
        known = [label for label in view.objects if label.object_name in self.objects]
        if self.counts is None:
            return [(label, label.visible_fraction >= self.options.min_visible) for label in known]
        left = Counter({name: self.counts.get((image.scene_id, image.image_id, name), 0) for name in self.objects})
        out = []
        for label in sorted(known, key=lambda item: -item.visible_fraction):
            out.append((label, left[label.object_name] > 0))
            left[label.object_name] -= 1
        return out

    def errors(self, view: View, estimate: PoseEstimate, label: ObjectLabel) -> dict[str, float]:
        """Return an estimate's error against a label by every metric of the protocol."""
        name = label.object_name
        model, points, motions = self.objects[name], self.points[name], self.motions[name]
        pose, truth = estimate.T_camera_object, label.T_camera_object
        if model.symmetries:
            distance = add_s(pose, truth, points, points[:: max(1, len(points) // MAX_ADD_S_POINTS)])
        else:
            distance = add(pose, truth, points)
        pinhole = view.camera.pinhole()
        alike = nearest(truth, pose, model.symmetries)
        return {
            "add": distance / model.diameter,
            "add_m": distance,
            "mssd": mssd(pose, truth, points, motions) / model.diameter,
            "mspd": mspd(pose, truth, points, pinhole, motions) * 640.0 / view.camera.width,
            "projection": projection_error(pose, alike, points, pinhole),
        }

    def answer(
        self, view: View, name: str, labels: Sequence[ObjectLabel], estimates: Sequence[PoseEstimate]
    ) -> tuple[FloatArray, dict[int, int]]:
        """Keep the errors of the answers for one object in one image, as many best-scored ones as labels asked for.

        Returns ADD(-S) in m [E, T], and for each label that is right the row of the estimate that makes it so.
        """
        best = sorted(estimates, key=lambda item: -item.score)[: len(labels)]
        errors = [[self.errors(view, estimate, label) for label in labels] for estimate in best]
        matrices: dict[str, FloatArray] = {
            metric: np.array([[cell[metric] for cell in row] for row in errors]).reshape(len(best), len(labels))
            for metric in METRICS
        }
        answers = Answers(name, len(labels), matrices)
        self.answers.append(answers)
        right = {column: row for row, column in matches(answers.errors["add"], ADD_THRESHOLD)}
        return answers.errors["add_m"], right

    def record(
        self,
        index: int,
        view: View,
        label: ObjectLabel,
        answer: PoseEstimate | None,
        distance: float,
        correct: bool,
        missed: str,
    ) -> None:
        """Keep the result of one target; ``distance`` is its ADD(-S), m."""
        model = self.objects[label.object_name]
        truth, keypoint_px, doubt = label.T_camera_object, np.nan, np.nan
        block_delta, block_cov = None, None
        squares: FloatArray = np.zeros(0)
        nll: FloatArray = np.zeros(0)
        true_xy = view.camera.project(truth.transform(model.keypoints_3d))
        size = float(np.ptp(true_xy, axis=0).max())
        if answer is not None:
            truth = nearest(truth, answer.T_camera_object, model.symmetries)
            true_xy = view.camera.project(truth.transform(model.keypoints_3d))
            keypoint_px = float(np.median(np.linalg.norm(answer.keypoints.xy - true_xy, axis=1)))
            squares = nees(true_xy - answer.keypoints.xy, answer.keypoints.blocks())
            nll = pose_nll(true_xy - answer.keypoints.xy, answer.keypoints.blocks())
            doubt = predicted_error(answer, model) / model.diameter
            alone = solve_pnp(
                model.keypoints_3d,
                independent(answer.keypoints),
                view.camera,
                self.estimator.options.pnp,
                answer.T_camera_object,
            )
            if not isinstance(alone, Rejection):
                block_delta = truth.minus(alone.T_camera_object)
                block_cov = with_free_turns(alone.cov, alone.T_camera_object, model.symmetries)
        self.results.append(
            TargetResult(
                image=index,
                image_id=self.data.images[index].image_id,
                object_name=label.object_name,
                visible_fraction=label.visible_fraction,
                size_px=size,
                truth=truth,
                estimate=answer,
                add=distance,
                correct=correct,
                keypoint_px=keypoint_px,
                keypoint_squares=squares,
                keypoint_nll=nll,
                doubt=doubt,
                block_delta=block_delta,
                block_cov=block_cov,
                missed=missed,
            )
        )

    def reason(self, view: View, label: ObjectLabel, rejections: Sequence[Rejection]) -> str:
        """Return why nothing was answered at a label: a refusal whose keypoints lie there, else one without any."""
        truth = view.camera.project(label.T_camera_object.transform(self.objects[label.object_name].keypoints_3d))
        reach = self.options.match_radius * max(float(np.ptp(truth, axis=0).max()), 1.0)
        anywhere = ELSEWHERE
        for rejection in rejections:
            if rejection.object_name not in ("", label.object_name):
                continue
            if rejection.keypoints is None:
                anywhere = rejection.reason.value
            elif float(np.linalg.norm(np.nanmedian(rejection.keypoints.xy - truth, axis=0))) < reach:
                return rejection.reason.value
        return anywhere

    def cause(self, item: TargetResult) -> str:
        """Return why a target is wrong or missing, "" when it is right."""
        return cause_of(item, self.objects[item.object_name])

    def report(self, model: str, dataset: str, images: int) -> EvaluationReport:
        """Return the report on everything recorded."""
        found = [(item, item.estimate) for item in self.results if item.estimate is not None]
        checks, squares = {}, {}
        if found:
            delta = np.array([item.truth.minus(estimate.T_camera_object) for item, estimate in found])
            cov = np.array([estimate.cov for _, estimate in found])
            models = [self.objects[item.object_name] for item, _ in found]
            free = [len(model.symmetries.continuous) for model in models]
            known = np.array(
                [
                    without_free_turns(estimate.cov, estimate.T_camera_object, model.symmetries)
                    for (_, estimate), model in zip(found, models, strict=True)
                ]
            )
            checks["joint"], squares["joint"] = pose_check(delta, cov, {}, free, known)
            blocks = [
                (i.block_delta, i.block_cov, len(self.objects[i.object_name].symmetries.continuous))
                for i in self.results
                if i.block_cov is not None
            ]
            if blocks:
                refused = {"refused": len(found) - len(blocks)} if len(blocks) < len(found) else {}
                checks["block_diagonal"], squares["block_diagonal"] = pose_check(
                    np.array([block[0] for block in blocks]),
                    np.array([block[1] for block in blocks]),
                    refused,
                    [block[2] for block in blocks],
                )
        latencies = np.array(self.latencies or [np.nan])
        return EvaluationReport(
            model=model,
            dataset=dataset,
            options=self.options,
            backend=self.estimator.backend_name,
            images=images,
            overall=score_of(self.results, self.answers),
            objects={
                name: score_of(
                    [r for r in self.results if r.object_name == name],
                    [a for a in self.answers if a.object_name == name],
                )
                for name in self.objects
            },
            checks=checks,
            false_alarms=self.false_alarms,
            missed=dict(Counter(item.missed for item in self.results if item.missed).most_common()),
            causes=dict(Counter(cause for cause in map(self.cause, self.results) if cause).most_common()),
            detection=detection_rates(self.results),
            risk=tuple(
                risk_coverage(
                    np.array([item.doubt for item, _ in found]),
                    np.array([item.correct for item, _ in found], dtype=bool),
                    len(self.results),
                )
            ),
            keypoints=keypoint_check(self.results),
            latency_ms={"p50": float(np.percentile(latencies, 50)), "p95": float(np.percentile(latencies, 95))},
            results=tuple(self.results),
            squares=squares,
        )


def _run_estimator(judge: _Judge, index: int) -> None:
    """Evaluate one image as the robot sees it: the estimator gets the image and the camera, nothing else."""
    view = judge.data.view(index, masks=False)
    result = judge.estimator.estimate(View(view.image, view.camera))
    judge.latencies.append(result.timings_ms["total"])
    labels = judge.labels(index, view)
    near, free = match_estimates(view, [label for label, _ in labels], result.estimates, judge)
    judge.false_alarms += free
    for name in judge.objects:
        mine = [(label, answer) for (label, asked), answer in zip(labels, near, strict=True)
                if asked and label.object_name == name]  # fmt: skip
        if not mine:
            continue
        own = sorted((e for e in result.estimates if e.object_name == name), key=lambda item: -item.score)
        distances, right = judge.answer(view, name, [label for label, _ in mine], own)
        # what is right by the protocol answers its label; the other labels have what lies at them, if it counts at all
        used = set(right.values())
        for column, (label, at) in enumerate(mine):
            row = right.get(
                column, next((i for i, e in enumerate(own[: len(mine)]) if e is at and i not in used), None)
            )
            if row is not None:
                judge.record(index, view, label, own[row], float(distances[row, column]), column in right, "")
            else:
                missed = OUTRANKED if at is not None else judge.reason(view, label, result.rejections)
                judge.record(index, view, label, None, float("inf"), False, missed)


def _run_oracle(judge: _Judge, index: int) -> None:
    """Evaluate the targets of one image in crops placed by the truth; nothing else of it reaches the estimator."""
    view = judge.data.view(index, masks=False)
    for label, asked in judge.labels(index, view):
        if not asked:
            continue
        model = judge.objects[label.object_name]
        box = keypoint_box(view.camera.project(label.T_camera_object.transform(model.keypoints_3d)))
        start = time.perf_counter()
        answer: PoseEstimate | Rejection | None = None
        if np.isfinite(box).all():
            instance = judge.estimator.zoom(View(view.image, view.camera), judge.indices[label.object_name], box)
            if instance is not None:
                answer = judge.estimator.solve(view.camera, instance)
        judge.latencies.append(1e3 * (time.perf_counter() - start))
        estimates = [answer] if isinstance(answer, PoseEstimate) else []
        distances, right = judge.answer(view, label.object_name, [label], estimates)
        if isinstance(answer, PoseEstimate):
            judge.record(index, view, label, answer, float(distances[0, 0]), 0 in right, "")
        else:
            missed = "nothing_found" if answer is None else answer.reason.value
            judge.record(index, view, label, None, float("inf"), False, missed)


def match_estimates(
    view: View, labels: Sequence[ObjectLabel], estimates: Sequence[PoseEstimate], judge: _Judge
) -> tuple[list[PoseEstimate | None], int]:
    """Return the estimate of each label (or None), and how many estimates are of no label.

    As in BOP: by falling score, each estimate takes the label of its object that is nearest among those left, when it
    is near at all; a label is used once.
    """
    answers: list[PoseEstimate | None] = [None] * len(labels)
    unmatched = 0
    for estimate in sorted(estimates, key=lambda item: -item.score):
        best, nearest = -1, judge.options.match_radius
        for index, label in enumerate(labels):
            if answers[index] is None and label.object_name == estimate.object_name:
                distance = _image_distance(view, estimate, label, judge.objects[label.object_name])
                if distance < nearest:
                    best, nearest = index, distance
        if best >= 0:
            answers[best] = estimate
        elif estimate.object_name in judge.objects:
            unmatched += 1
    return answers, unmatched


def _image_distance(view: View, estimate: PoseEstimate, label: ObjectLabel, model: ObjectModel) -> float:
    """Return the median keypoint distance over the longer side of the label's box; infinite when it is not seen."""
    truth = nearest(label.T_camera_object, estimate.T_camera_object, model.symmetries)
    xy = view.camera.project(truth.transform(model.keypoints_3d))
    found = view.camera.project(estimate.T_camera_object.transform(model.keypoints_3d))
    if not (np.isfinite(xy).all() and np.isfinite(found).all()):
        return float("inf")
    return float(np.median(np.linalg.norm(found - xy, axis=1)) / max(np.ptp(xy, axis=0).max(), 1.0))


def independent(keypoints: Keypoints) -> Keypoints:
    """Return the keypoints as if their errors had nothing in common: the same 2x2 blocks, zero between them."""
    mask = np.kron(np.eye(len(keypoints)), np.ones((2, 2)))
    return Keypoints(keypoints.xy, keypoints.cov * mask, keypoints.score)
