# SPDX-License-Identifier: Apache-2.0
"""How good is a model on labelled images: poses, their covariance, speed, and pictures of where it fails.

The estimator runs as on the robot (without tracking: the images are taken as unrelated). The truth is used for scoring
only; with ``crops: oracle`` it also places the crop, which tells what detection costs. Symmetric objects are compared
with the symmetric truth that is nearest to the estimate.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ukd_ros.data.bop import BopDataset, BopError
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.distillation.calibrate import PoseCheck, pose_check
from ukd_ros.distillation.error_model import PARTS
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.estimate import PoseEstimate, Rejection
from ukd_ros.geometry.keypoints import Keypoints
from ukd_ros.geometry.metrics import add, add_s, mssd, rotation_error_deg, translation_error
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose
from ukd_ros.geometry.view import LabelledView, ObjectLabel, View
from ukd_ros.perception.bundle import find_model, load_bundle
from ukd_ros.perception.estimator import EstimatorOptions, PoseEstimator
from ukd_ros.perception.pnp import solve_pnp
from ukd_ros.perception.votes import keypoint_box

logger = logging.getLogger(__name__)

CROPS = ("estimator", "oracle")
TARGETS_FILE = "test_targets_bop19.json"
ADD_THRESHOLD = 0.1
"""A pose is right when its ADD (ADD-S if symmetric) is below this fraction of the diameter (Hinterstoisser 2012)."""

MAX_ADD_S_POINTS = 1000


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


@dataclass(frozen=True, eq=False)
class TargetResult:
    """One labelled object that was asked for, and what was answered.

    image: index in the data set, image_id its number there. truth: the label's pose, or its symmetric equivalent
    nearest to the estimate. estimate: None when it was missed. add: ADD or ADD-S, m (infinite when missed).
    keypoint_px: median keypoint error. block_cov: [6, 6] of the same keypoints without their correlations, None where
    that gives no pose. missed: the reason, "" when found.
    """

    image: int
    image_id: int
    object_name: str
    visible_fraction: float
    truth: Pose
    estimate: PoseEstimate | None
    add: float
    correct: bool
    keypoint_px: float
    block_delta: FloatArray | None
    block_cov: FloatArray | None
    missed: str


@dataclass(frozen=True)
class Score:
    """Numbers over a set of targets; medians are over the detected ones, NaN when there are none.

    add_recall: share with ADD(-S) below 0.1 diameters, of all targets. detection_rate: share with an estimate at the
    object. translation_mm, rotation_deg, keypoint_px: medians.
    """

    targets: int
    add_recall: float
    detection_rate: float
    translation_mm: float
    rotation_deg: float
    keypoint_px: float


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """Everything that `evaluate_model` found.

    objects: a score per object, overall over all targets. checks: "joint" is the covariance as published,
    "block_diagonal" the same keypoints without their correlations; empty when nothing was detected. false_alarms:
    estimates of no labelled object. missed: reasons and how often. latency_ms: p50 and p95 per image (oracle: per
    crop), and what they are of.
    """

    model: str
    dataset: str
    options: EvaluationOptions
    backend: str
    images: int
    overall: Score
    objects: dict[str, Score]
    checks: dict[str, PoseCheck]
    false_alarms: int
    missed: dict[str, int]
    latency_ms: dict[str, float]
    results: tuple[TargetResult, ...] = field(repr=False, default=())
    squares: dict[str, dict[str, FloatArray]] = field(repr=False, default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """Return the report as plain data for JSON, without the single covariances."""
        names = ("model", "dataset", "backend", "images", "false_alarms", "missed", "latency_ms")
        data: dict[str, Any] = {name: getattr(self, name) for name in names}
        data["options"] = asdict(self.options)
        data["overall"] = asdict(self.overall)
        data["objects"] = {name: asdict(score) for name, score in self.objects.items()}
        data["checks"] = {name: asdict(check) for name, check in self.checks.items()}
        data["targets"] = [
            {
                "image_id": item.image_id,
                "object": item.object_name,
                "visible": item.visible_fraction,
                "add_m": item.add if np.isfinite(item.add) else None,
                "correct": item.correct,
                "score": None if item.estimate is None else item.estimate.score,
                "missed": item.missed,
            }
            for item in self.results
        ]
        return data

    def table(self) -> str:
        """Return the report as text."""
        lines = [
            f"{self.model} on {self.dataset}: {self.images} images, crops {self.options.crops}, {self.backend}",
            f"{'object':20} targets  ADD-0.1d  detected   t mm  rot deg  keypoint px",
        ]
        for name, score in [*self.objects.items(), ("all", self.overall)]:
            lines.append(
                f"{name:20} {score.targets:7d} {100 * score.add_recall:8.1f}% {100 * score.detection_rate:8.1f}% "
                f"{score.translation_mm:6.1f} {score.rotation_deg:8.2f} {score.keypoint_px:12.2f}"
            )
        if self.checks:
            lines.append(
                f"{'covariance':20}   NEES  median  cov95: pose    xy     z   rot   s_xy mm   s_z mm  s_rot deg     NLL"
            )
        for name, check in self.checks.items():
            shares = " ".join(f"{100 * check.coverage[part][0.95]:5.1f}" for part in PARTS)
            lines.append(
                f"{name:20} {check.nees:6.1f} {check.nees_median:7.1f}         {shares} {check.sigma_xy_mm:9.2f} "
                f"{check.sigma_z_mm:8.2f} {check.sigma_rotation_deg:10.2f} {check.nll:7.2f}"
            )
        if self.checks:
            lines.append("xy, z: along the camera's x, y and z axes; NEES 6 (median 5.3) and 95 % are expected")
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.missed.items()) or "none"
        lines.append(f"missed: {reasons}; false alarms: {self.false_alarms}")
        unit = "crop" if self.options.crops == "oracle" else "image"
        lines.append(f"latency per {unit}: p50 {self.latency_ms['p50']:.1f} ms, p95 {self.latency_ms['p95']:.1f} ms")
        return "\n".join(lines)


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
    estimator = PoseEstimator(
        bundle, options.backend, replace(options.estimator, tracking=False), threads=options.threads
    )
    judge = _Judge(data, bundle.objects, estimator, options)
    run = _run_oracle if options.crops == "oracle" else _run_estimator
    indices = judge.images()
    for index in tqdm(indices, desc="evaluating", unit="image", disable=not progress):
        run(judge, index)
    report = judge.report(bundle.name, Path(dataset).name, len(indices))
    if out is not None:
        write_report(report, data, bundle.objects, Path(out))
    return report


class _Judge:
    """Knows the truth, asks the estimator, and keeps the results."""

    def __init__(
        self, data: BopDataset, objects: Sequence[ObjectModel], estimator: PoseEstimator, options: EvaluationOptions
    ) -> None:
        self.data, self.estimator, self.options = data, estimator, options
        self.results: list[TargetResult] = []
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
        for index, model in enumerate(objects):
            if model.name in known:
                # The data set's own symmetries decide how it is scored.
                symmetries = data.symmetries(known[model.name])
                self.objects[model.name] = replace(model, symmetries=symmetries)
                self.indices[model.name] = index
                self.points[model.name] = data.mesh(known[model.name]).vertices
        self.counts = self._target_counts()

    def _target_counts(self) -> dict[tuple[int, int, str], int] | None:
        """Return how many instances of an object are asked for in an image (scene, image, name), if a list says so."""
        if not self.options.target_list or not (self.data.root / TARGETS_FILE).is_file():
            return None
        targets = [t for t in self.data.targets() if t.object_id in self.data.object_ids]
        return {(t.scene_id, t.image_id, self.data.name(t.object_id)): t.count for t in targets}

    def images(self) -> list[int]:
        """Return the indices of the images to be evaluated."""
        first, last = self.options.ids or (0, 2**62)
        chosen = [i for i, image in enumerate(self.data.images) if first <= image.image_id < last]
        if not chosen:
            raise BopError(f"{self.data.root}: has no images with ids from {first} to below {last}.")
        if 0 < self.options.limit < len(chosen):
            spread = np.linspace(0, len(chosen) - 1, self.options.limit).round().astype(int)
            chosen = [chosen[int(i)] for i in spread]
        return chosen

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

    def record(self, index: int, view: View, label: ObjectLabel, answer: PoseEstimate | None, missed: str) -> None:
        """Score one target and keep the result."""
        name = label.object_name
        model, points = self.objects[name], self.points[name]
        truth, distance, keypoint_px = label.T_camera_object, np.inf, np.nan
        block_delta, block_cov = None, None
        if answer is not None:
            truth = nearest_truth(answer.T_camera_object, truth, model)
            symmetric = bool(model.symmetries.discrete or model.symmetries.continuous)
            few = points[:: max(1, len(points) // MAX_ADD_S_POINTS)]
            pose = answer.T_camera_object
            distance = add_s(pose, truth, few) if symmetric else add(pose, truth, points)
            true_xy = view.camera.project(truth.transform(model.keypoints_3d))
            keypoint_px = float(np.median(np.linalg.norm(answer.keypoints.xy - true_xy, axis=1)))
            alone = solve_pnp(
                model.keypoints_3d, independent(answer.keypoints), view.camera, self.estimator.options.pnp, pose
            )
            if not isinstance(alone, Rejection):
                block_delta, block_cov = truth.minus(alone.T_camera_object), alone.cov
        self.results.append(
            TargetResult(
                image=index,
                image_id=self.data.images[index].image_id,
                object_name=name,
                visible_fraction=label.visible_fraction,
                truth=truth,
                estimate=answer,
                add=distance,
                correct=distance < ADD_THRESHOLD * model.diameter,
                keypoint_px=keypoint_px,
                block_delta=block_delta,
                block_cov=block_cov,
                missed=missed,
            )
        )

    def report(self, model: str, dataset: str, images: int) -> EvaluationReport:
        """Return the report on everything recorded."""
        found = [(item, item.estimate) for item in self.results if item.estimate is not None]
        checks, squares = {}, {}
        if found:
            delta = np.array([item.truth.minus(estimate.T_camera_object) for item, estimate in found])
            cov = np.array([estimate.cov for _, estimate in found])
            checks["joint"], squares["joint"] = pose_check(delta, cov, {})
            blocks = [(i.block_delta, i.block_cov) for i in self.results if i.block_cov is not None]
            if blocks:
                refused = {"refused": len(found) - len(blocks)} if len(blocks) < len(found) else {}
                checks["block_diagonal"], squares["block_diagonal"] = pose_check(
                    np.array([block[0] for block in blocks]), np.array([block[1] for block in blocks]), refused
                )
        latencies = np.array(self.latencies or [np.nan])
        return EvaluationReport(
            model=model,
            dataset=dataset,
            options=self.options,
            backend=self.estimator.backend_name,
            images=images,
            overall=_score(self.results),
            objects={name: _score([r for r in self.results if r.object_name == name]) for name in self.objects},
            checks=checks,
            false_alarms=self.false_alarms,
            missed=dict(Counter(item.missed for item in self.results if item.missed).most_common()),
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
    answers, free = match_estimates(view, [label for label, _ in labels], result.estimates, judge)
    judge.false_alarms += free
    reasons = {r.object_name: r.reason.value for r in reversed(result.rejections)}
    for (label, asked), answer in zip(labels, answers, strict=True):
        if asked:
            why = reasons.get(label.object_name, reasons.get("", "elsewhere"))
            judge.record(index, view, label, answer, "" if answer is not None else why)


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
        if isinstance(answer, PoseEstimate):
            judge.record(index, view, label, answer, "")
        else:
            judge.record(index, view, label, None, "nothing_found" if answer is None else answer.reason.value)


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
    truth = nearest_truth(estimate.T_camera_object, label.T_camera_object, model)
    xy = view.camera.project(truth.transform(model.keypoints_3d))
    found = view.camera.project(estimate.T_camera_object.transform(model.keypoints_3d))
    if not (np.isfinite(xy).all() and np.isfinite(found).all()):
        return float("inf")
    return float(np.median(np.linalg.norm(found - xy, axis=1)) / max(np.ptp(xy, axis=0).max(), 1.0))


def nearest_truth(estimate: Pose, truth: Pose, model: ObjectModel) -> Pose:
    """Return the pose among the symmetric equivalents of ``truth`` that is nearest to the estimate."""
    motions = model.symmetries.poses(continuous_steps=72)
    if len(motions) == 1:
        return truth
    return min((truth @ motion for motion in motions), key=lambda pose: mssd(estimate, pose, model.keypoints_3d))


def independent(keypoints: Keypoints) -> Keypoints:
    """Return the keypoints as if their errors had nothing in common: the same 2x2 blocks, zero between them."""
    mask = np.kron(np.eye(len(keypoints)), np.ones((2, 2)))
    return Keypoints(keypoints.xy, keypoints.cov * mask, keypoints.score)


def _score(results: Sequence[TargetResult]) -> Score:
    """Return the numbers over some targets."""
    found = [(item, item.estimate.T_camera_object) for item in results if item.estimate is not None]
    count = len(results)

    def median(values: list[float]) -> float:
        return float(np.median(values)) if values else float("nan")

    return Score(
        targets=count,
        add_recall=sum(item.correct for item in results) / count if count else float("nan"),
        detection_rate=len(found) / count if count else float("nan"),
        translation_mm=median([1e3 * translation_error(pose, item.truth) for item, pose in found]),
        rotation_deg=median([rotation_error_deg(pose, item.truth) for item, pose in found]),
        keypoint_px=median([item.keypoint_px for item, _ in found]),
    )


def write_report(report: EvaluationReport, data: BopDataset, objects: Sequence[ObjectModel], out: Path) -> None:
    """Write report.txt, report.json, summary.png and contact sheets into a folder, each by rename."""
    from ukd_ros.distillation.pictures import contact_sheet, draw_summary, encode_png  # brings matplotlib

    out.mkdir(parents=True, exist_ok=True)
    write_bytes(out / "report.txt", (report.table() + "\n").encode())
    write_bytes(out / "report.json", json.dumps(_without_nan(report.as_data()), indent=1, allow_nan=False).encode())
    ordered = sorted(report.results, key=lambda item: item.add)
    for name, chosen in (("best", ordered[:20]), ("worst", ordered[::-1][:20])):
        if chosen:
            write_bytes(out / f"{name}.png", encode_png(contact_sheet(chosen, data, objects)))
    write_bytes(out / "summary.png", draw_summary(report, {model.name: model.diameter for model in objects}))


def _without_nan(value: Any) -> Any:
    """Return plain data with None for what is not a finite number: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
