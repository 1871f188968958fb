# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found: one result per target, and the numbers over many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ukd_ros.distillation.error_model import PARTS
from ukd_ros.distillation.pose_check import PoseCheck
from ukd_ros.distillation.protocol import (
    ADD_THRESHOLDS,
    AUC_LIMIT,
    MSPD_THRESHOLDS,
    MSSD_THRESHOLDS,
    PROJECTION_THRESHOLD,
    Answers,
    RiskPoint,
    area_under_recall,
    average_recall,
    recall,
)
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.estimate import PoseEstimate
from ukd_ros.geometry.metrics import coverage, rotation_error_deg, translation_error
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose, skew
from ukd_ros.geometry.symmetry import without_free_turns

if TYPE_CHECKING:
    from ukd_ros.distillation.evaluate import EvaluationOptions

ADD_THRESHOLD = 0.1
"""A pose is right when its ADD (ADD-S if symmetric) is below this fraction of the diameter (Hinterstoisser 2012)."""

VISIBLE_EDGES = (0.0, 0.1, 0.3, 0.6, 0.9, np.inf)
SIZE_EDGES = (0.0, 32.0, 64.0, 128.0, 256.0, np.inf)


@dataclass(frozen=True, eq=False)
class TargetResult:
    """One labelled object that was asked for, and what was answered.

    image: index in the data set, image_id its number there. truth: the label's pose, or its symmetric equivalent
    nearest to the estimate. size_px: the longer side of its keypoints' box. estimate: None when it was missed. add: ADD
    or ADD-S, m (infinite when missed). keypoint_px: median keypoint error. keypoint_squares, keypoint_nll: [K] squared
    Mahalanobis distance (2 expected) and negative log-likelihood (px) of each keypoint under its own block; empty when
    missed. doubt: predicted root mean square error of the object's points over its diameter, NaN when missed.
    block_cov: [6, 6] of the same keypoints without their correlations, None where that gives no pose. missed: the
    reason, "" when found.
    """

    image: int
    image_id: int
    object_name: str
    visible_fraction: float
    size_px: float
    truth: Pose
    estimate: PoseEstimate | None
    add: float
    correct: bool
    keypoint_px: float
    keypoint_squares: FloatArray
    keypoint_nll: FloatArray
    doubt: float
    block_delta: FloatArray | None
    block_cov: FloatArray | None
    missed: str


@dataclass(frozen=True)
class Score:
    """Numbers over a set of targets; medians are over the detected ones, NaN when there are none.

    add_recall: share with ADD(-S) below 0.1 diameters, of all targets; add_recalls: by fraction of the diameter.
    add_auc: area under the recall of ADD(-S) up to 0.1 m. ar_mssd, ar_mspd: BOP's average recalls. projection_recall:
    share with a mean projection error below 5 px. detection_rate: share with an estimate at the object.
    translation_mm, rotation_deg, keypoint_px: medians.
    """

    targets: int
    add_recall: float
    add_recalls: dict[str, float]
    add_auc: float
    ar_mssd: float
    ar_mspd: float
    projection_recall: float
    detection_rate: float
    translation_mm: float
    rotation_deg: float
    keypoint_px: float


@dataclass(frozen=True)
class KeypointCheck:
    """How keypoint errors compare with their own 2x2 blocks: mean squared Mahalanobis distance (2 expected), mean
    negative log-likelihood (px), and the share inside the ellipses of several levels.
    """

    keypoints: int
    square: float
    nll: float
    coverage: dict[float, float]


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """Everything that `evaluate_model` found.

    objects: a score per object, overall over all targets. checks: "joint" is the covariance as published,
    "block_diagonal" the same keypoints without their correlations; empty when nothing was detected. false_alarms:
    estimates of no labelled object. missed: reasons and how often. causes: why targets are wrong or missing, by
    `failures.cause_of`. detection: share of targets with an estimate at the object, by visible fraction and by
    apparent size, with their numbers. risk: how right the surest answers are. keypoints: None when nothing was
    detected. latency_ms: p50 and p95 per image (oracle: per crop), and what they are of.
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
    causes: dict[str, int]
    detection: dict[str, dict[str, tuple[float, int]]]
    risk: tuple[RiskPoint, ...]
    keypoints: KeypointCheck | None
    latency_ms: dict[str, float]
    results: tuple[TargetResult, ...] = field(repr=False, default=())
    squares: dict[str, dict[str, FloatArray]] = field(repr=False, default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """Return the report as plain data for JSON, without the single covariances."""
        names = ("model", "dataset", "backend", "images", "false_alarms", "missed", "causes", "detection", "latency_ms")
        data: dict[str, Any] = {name: getattr(self, name) for name in names}
        data["options"] = asdict(self.options)
        data["overall"] = asdict(self.overall)
        data["objects"] = {name: asdict(score) for name, score in self.objects.items()}
        data["checks"] = {name: asdict(check) for name, check in self.checks.items()}
        data["keypoints"] = None if self.keypoints is None else asdict(self.keypoints)
        data["risk"] = [asdict(point) for point in self.risk]
        data["targets"] = [
            {
                "image_id": item.image_id,
                "object": item.object_name,
                "visible": item.visible_fraction,
                "size_px": item.size_px,
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
            f"{'object':16} targets  ADD(-S) .02d   .05d   .10d    AUC   MSSD   MSPD  proj5  detected   t mm  rot deg"
            "  kp px",
        ]
        for name, score in [*self.objects.items(), ("all", self.overall)]:
            shares = (*score.add_recalls.values(), score.add_auc, score.ar_mssd, score.ar_mspd, score.projection_recall)
            lines.append(
                f"{name:16} {score.targets:7d}      "
                + " ".join(f"{100 * share:6.1f}" for share in shares)
                + f" {100 * score.detection_rate:8.1f}% {score.translation_mm:6.1f} {score.rotation_deg:8.2f} "
                f"{score.keypoint_px:6.2f}"
            )
        lines.append("in %, of all targets; AUC up to 0.1 m, MSSD and MSPD are BOP's average recalls, proj5 below 5 px")
        for by, bins in self.detection.items():
            rows = ", ".join(f"{name}: {100 * share:.1f} % of {count}" for name, (share, count) in bins.items())
            lines.append(f"detected by {by}: {rows}")
        if self.checks:
            lines.append(
                f"{'covariance':20}   NEES  median  cov95: pose    xy     z   rot   s_xy mm   s_z mm  s_rot deg     NLL"
            )
        for name, check in self.checks.items():
            covered = " ".join(f"{100 * check.coverage[part][0.95]:5.1f}" for part in PARTS)
            lines.append(
                f"{name:20} {check.nees:6.1f} {check.nees_median:7.1f}         {covered} {check.sigma_xy_mm:9.2f} "
                f"{check.sigma_z_mm:8.2f} {check.sigma_rotation_deg:10.2f} {check.nll:7.2f}"
            )
        if self.checks:
            lines.append("xy, z: along the camera's x, y and z axes; NEES 6 (median 5.3) and 95 % are expected")
        if self.keypoints is not None:
            levels = ", ".join(f"{100 * c:.1f} % at {100 * p:.0f}" for p, c in self.keypoints.coverage.items())
            lines.append(
                f"keypoints: squared distance {self.keypoints.square:.2f} (2 expected), NLL {self.keypoints.nll:.2f}, "
                f"inside their ellipses {levels}"
            )
        if self.risk:
            points = [self.risk[min(len(self.risk) - 1, int(q * len(self.risk)))] for q in (0.25, 0.5, 0.75, 1.0)]
            surest = ", ".join(f"{100 * p.accuracy:.0f} % of the surest {100 * p.kept:.0f} %" for p in points)
            lines.append(f"right: {surest} of all targets")
        if self.causes:
            rows = ", ".join(f"{cause} {count}" for cause, count in self.causes.items())
            lines.append(f"wrong or missing: {rows}")
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.missed.items()) or "none"
        lines.append(f"missed: {reasons}; false alarms: {self.false_alarms}")
        unit = "crop" if self.options.crops == "oracle" else "image"
        lines.append(f"latency per {unit}: p50 {self.latency_ms['p50']:.1f} ms, p95 {self.latency_ms['p95']:.1f} ms")
        return "\n".join(lines)


def predicted_error(estimate: PoseEstimate, model: ObjectModel) -> float:
    """Return the root mean square error, m, that the covariance predicts for the object's keypoints.

    A point at r from the origin moves by dt + dtheta x r. Turns that nobody can see (axes of revolution) do not count.
    """
    pose = estimate.T_camera_object
    arms = model.keypoints_3d @ pose.rotation.T
    cov = without_free_turns(estimate.cov, pose, model.symmetries)
    jacobian = np.concatenate([np.broadcast_to(np.eye(3), (len(arms), 3, 3)), -skew(arms)], axis=2)
    return float(np.sqrt(np.trace(jacobian @ cov @ jacobian.transpose(0, 2, 1), axis1=1, axis2=2).mean()))


def detection_rates(results: Sequence[TargetResult]) -> dict[str, dict[str, tuple[float, int]]]:
    """Return the share detected and the number of targets, by visible fraction and by apparent size; no empty bins."""
    return {
        "visible fraction": _binned(results, [item.visible_fraction for item in results], VISIBLE_EDGES),
        "size in px": _binned(results, [item.size_px for item in results], SIZE_EDGES),
    }


def _binned(
    results: Sequence[TargetResult], values: Sequence[float], edges: Sequence[float]
) -> dict[str, tuple[float, int]]:
    """Return the share detected and the number of targets by bin of a value; the last edge is infinite."""
    rows = {}
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = [item for item, value in zip(results, values, strict=True) if low <= value < high]
        if inside:
            name = f"{low:g}-{high:g}" if np.isfinite(high) else f"from {low:g}"
            rows[name] = (sum(item.estimate is not None for item in inside) / len(inside), len(inside))
    return rows


def keypoint_check(results: Sequence[TargetResult]) -> KeypointCheck | None:
    """Return how the keypoints of all detected targets compare with their blocks."""
    squares = np.concatenate([item.keypoint_squares for item in results]) if results else np.zeros(0)
    if not len(squares):
        return None
    nll = np.concatenate([item.keypoint_nll for item in results])
    levels = {level: coverage(squares, 2, level) for level in (0.5, 0.8, 0.95)}
    return KeypointCheck(len(squares), float(squares.mean()), float(nll.mean()), levels)


def score_of(results: Sequence[TargetResult], answers: Sequence[Answers]) -> Score:
    """Return the numbers over some targets."""
    found = [(item, item.estimate.T_camera_object) for item in results if item.estimate is not None]
    count = len(results)

    def median(values: list[float]) -> float:
        return float(np.median(values)) if values else float("nan")

    return Score(
        targets=count,
        add_recall=recall(answers, "add", ADD_THRESHOLD),
        add_recalls={f"{threshold:g}": recall(answers, "add", threshold) for threshold in ADD_THRESHOLDS},
        add_auc=area_under_recall(answers, "add_m", AUC_LIMIT),
        ar_mssd=average_recall(answers, "mssd", MSSD_THRESHOLDS),
        ar_mspd=average_recall(answers, "mspd", MSPD_THRESHOLDS),
        projection_recall=recall(answers, "projection", PROJECTION_THRESHOLD),
        detection_rate=len(found) / count if count else float("nan"),
        translation_mm=median([1e3 * translation_error(pose, item.truth) for item, pose in found]),
        rotation_deg=median([rotation_error_deg(pose, item.truth) for item, pose in found]),
        keypoint_px=median([item.keypoint_px for item, _ in found]),
    )
