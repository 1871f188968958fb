# SPDX-License-Identifier: Apache-2.0
"""Frames that nobody labelled, labelled by the teachers where they are sure.

Every frame goes through the ensemble's estimator (`ensemble_estimator`): the same search, zoom, PnP and gates as on the
robot. Its *calibrated* covariance gives the probability that ADD stays below a tenth of the diameter. That orders poses
well and is itself too modest where errors have long tails, so what it takes to be a label is measured (`required`): the
lowest probability above which so many poses on held-out renders were right. A label's keypoints must also agree with
one another, and the neighbouring frames must not speak against it (`neighbours`). Whatever is refused is counted by its
reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.data.dataset import LabelledViews, SupposedObject
from ukd_ros.data.progress import Bar
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.estimate import PoseEstimate, Rejection
from ukd_ros.geometry.metrics import add
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose, exp_so3
from ukd_ros.geometry.symmetry import without_free_turns
from ukd_ros.geometry.view import ObjectLabel, View
from ukd_ros.perception.cells import STRIDES
from ukd_ros.perception.estimator import PoseEstimator
from ukd_ros.perception.votes import VoteInstance

LEAST_RIGHT = 10
"""Fewer accepted poses on held-out renders than these promise nothing."""

DRAWS = 256
"""Poses drawn from a covariance to see how often ADD stays small (a share of 0.9 is known to ± 0.02)."""

UNSURE, INCONSISTENT, LOW_SCORE = "unsure", "inconsistent", "low_score"
NOTHING = "nothing_found"


@dataclass(frozen=True)
class PseudoLabelOptions:
    """When a teacher's pose is taken as a label."""

    error: float = field(
        default=0.1, metadata={"help": "What counts as right: ADD below this share of the diameter.", "unit": "share"}
    )
    sure: float = field(
        default=0.95,
        metadata={
            "help": "Share of each object's accepted labels that must be right on held-out renders; elsewhere it is "
            "less.",
            "unit": "0..1",
        },
    )
    min_score: float = field(default=0.4, metadata={"help": "Least score of the ensemble.", "unit": "0..1"})
    max_chi2: float = field(
        default=2.0,
        metadata={
            "help": "Largest squared residual of the pose's keypoints, in their covariance and per degree of freedom "
            "(1 is expected).",
            "unit": "",
        },
    )
    min_inliers: float = field(
        default=0.8,
        metadata={
            "help": "Least share of the keypoints that the pose explains; PnP leaves the others out.",
            "unit": "0..1",
        },
    )
    time_gap_s: float = field(
        default=0.4, metadata={"help": "Frames this close must agree with one another; 0: do not look.", "unit": "s"}
    )
    time_error: float = field(
        default=0.15,
        metadata={
            "help": "Largest ADD between a pose and what the frames before and after it say, over the diameter.",
            "unit": "share",
        },
    )

    def __post_init__(self) -> None:
        """Refuse values out of range; ValueError names the field."""
        for name in ("error", "max_chi2", "time_error"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"labels.{name}: is {getattr(self, name)}, but a positive number is needed.")
        for name in ("sure", "min_score", "min_inliers"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"labels.{name}: is {getattr(self, name)}, but 0..1 is needed.")
        if not self.time_gap_s >= 0.0:
            raise ValueError(f"labels.time_gap_s: is {self.time_gap_s}, but 0 or more is needed.")


@dataclass(frozen=True, eq=False)
class PseudoLabel:
    """What the teachers say of one object in one frame.

    frame: its number. class_index, T_camera_object, cov [6,6] as `PoseEstimate` has them; score 0..1. probability: that
    ADD stays below the share asked for, by `cov`. patches [n,4]: the cells that voted, as boxes x0 y0 x1 y1 px of the
    frame. refused: why this is no label ("": it is one).
    """

    frame: int
    class_index: int
    T_camera_object: Pose
    cov: FloatArray
    score: float
    probability: float
    patches: FloatArray
    refused: str = ""

    def mask(self, width: int, height: int) -> npt.NDArray[np.bool_]:
        """Return the pixels [H,W] of the cells that voted: where the object was seen."""
        image = np.zeros((height, width), np.uint8)
        for x0, y0, x1, y1 in np.round(self.patches).astype(int).tolist():
            cv2.rectangle(image, (x0, y0), (x1, y1), 1, cv2.FILLED)
        return np.asarray(image > 0)

    def supposed(self, width: int, height: int) -> SupposedObject:
        """Return what training takes."""
        return SupposedObject(self.class_index, self.T_camera_object, self.mask(width, height))


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """Every pose the teachers gave, accepted or not, and why there is none where there is none.

    frames: how many were looked at. refused: how many instances by reason (the estimator's `RejectReason`s and this
    module's), and under "nothing_found" the frames in which nothing was seen.
    """

    labels: tuple[PseudoLabel, ...]
    frames: int
    refused: dict[str, int]

    @property
    def accepted(self) -> tuple[PseudoLabel, ...]:
        """Return those that are labels."""
        return tuple(label for label in self.labels if not label.refused)

    def by_frame(self) -> dict[int, list[PseudoLabel]]:
        """Return the accepted labels of each frame that has any."""
        found: dict[int, list[PseudoLabel]] = {}
        for label in self.accepted:
            found.setdefault(label.frame, []).append(label)
        return found

    def counts(self) -> dict[str, int]:
        """Return how many were accepted, and refused by each reason, the most frequent first."""
        ordered = sorted(self.refused.items(), key=lambda item: (-item[1], item[0]))
        return {"accepted": len(self.accepted), **dict(ordered)}


def label_frames(
    estimator: PoseEstimator,
    frames: Iterable[tuple[int, View]],
    options: PseudoLabelOptions,
    least: Sequence[float],
    total: int | None = None,
    progress: bool = True,
) -> PseudoLabels:
    """Label frames (number and view) by an estimator whose covariance is calibrated; neighbours are not yet asked.

    least: the probability from which a pose of each class is a label, as `required_on` gives it. `agreeing` asks the
    neighbours, once all frames of a bag are there.
    """
    labels: list[PseudoLabel] = []
    refused: Counter[str] = Counter()
    count = 0
    bar = Bar(frames, desc="asking the teachers for labels", unit="frame", total=total, disable=not progress)
    for number, view in bar:
        count += 1
        instances = estimator.observe(view)
        if not instances:
            refused[NOTHING] += 1
        for instance in instances:
            answer = estimator.solve(view.camera, instance)
            if isinstance(answer, Rejection):
                refused[answer.reason.value] += 1
                continue
            model = estimator.objects[instance.class_index]
            labels.append(_judged(number, instance, answer, model, options, least[instance.class_index]))
    refused.update(label.refused for label in labels if label.refused)
    return PseudoLabels(tuple(labels), count, dict(refused))


def _judged(
    frame: int,
    instance: VoteInstance,
    estimate: PoseEstimate,
    model: ObjectModel,
    options: PseudoLabelOptions,
    least: float,
) -> PseudoLabel:
    """Return the label of one estimate, refused where it is not sure enough."""
    chance = probability_right(estimate.T_camera_object, estimate.cov, model, options.error)
    why = ""
    if instance.score < options.min_score:
        why = LOW_SCORE
    elif estimate.chi2 > options.max_chi2 * max(estimate.dof, 1) or estimate.inliers.mean() < options.min_inliers:
        why = INCONSISTENT
    elif chance < least:
        why = UNSURE
    pose, cov, score = estimate.T_camera_object, estimate.cov, estimate.score
    return PseudoLabel(frame, instance.class_index, pose, cov, score, chance, voting_patches(instance), why)


def required(labels: Sequence[PseudoLabel], right: Sequence[bool], share: float) -> float:
    """Return the lowest probability from which on at least `share` of labels were right; above 1 where none was.

    labels: of frames whose truth is known, with `right` for each; those refused for another reason than doubt do not
    count. One wrong label more than there were is assumed, and ten right ones are the least.
    """
    rows = sorted(
        ((item.probability, good) for item, good in zip(labels, right, strict=True) if item.refused in ("", UNSURE)),
        reverse=True,
    )
    found, good = 1.1, 0
    for taken, (probability, correct) in enumerate(rows, start=1):
        good += correct
        last = taken == len(rows) or rows[taken][0] < probability
        if last and good >= LEAST_RIGHT and good >= share * (taken + 1):
            found = probability
    return found


def required_on(
    estimator: PoseEstimator,
    views: LabelledViews,
    numbers: Sequence[int],
    options: PseudoLabelOptions,
    progress: bool = True,
) -> tuple[float, ...]:
    """Return `required` of each class on labelled views: poses there are right or wrong by their nearest label.

    Of each alone: an object that is known well must not vouch for another.
    """
    truths: dict[int, Sequence[ObjectLabel]] = {}

    def frames() -> Iterator[tuple[int, View]]:
        for number in numbers:
            view = views.view(number)
            truths[number] = view.objects
            yield number, view

    classes = range(len(estimator.objects))
    found = label_frames(estimator, frames(), options, [0.0] * len(classes), len(numbers), progress)
    right: dict[int, bool] = {}
    for row, item in enumerate(found.labels):
        model = estimator.objects[item.class_index]
        same = [label.T_camera_object for label in truths[item.frame] if label.object_name == model.name]
        motions = model.symmetries.poses()
        errors = [add(item.T_camera_object, pose @ motion, model.keypoints_3d) for pose in same for motion in motions]
        right[row] = min(errors, default=np.inf) < options.error * model.diameter
    of_class = [[row for row, item in enumerate(found.labels) if item.class_index == number] for number in classes]
    return tuple(
        required([found.labels[row] for row in rows], [right[row] for row in rows], options.sure) for rows in of_class
    )


def probability_right(pose: Pose, cov: FloatArray, model: ObjectModel, error: float) -> float:
    """Return how probable a covariance Cov(delta) [6,6] makes it that ADD is below `error` diameters.

    By drawing poses, always the same ones. Turns about an axis of revolution do not count: nobody sees them.
    """
    known = without_free_turns(cov, pose, model.symmetries)
    values, vectors = np.linalg.eigh(known)
    root = vectors * np.sqrt(np.clip(values, 0.0, None))
    delta = np.random.default_rng(0).normal(size=(DRAWS, 6)) @ root.T
    points = model.keypoints_3d @ pose.rotation.T
    moved = np.einsum("nij,kj->nki", exp_so3(delta[:, 3:]), points) + delta[:, None, :3]
    distance = np.linalg.norm(moved - points, axis=2).mean(axis=1)
    return float((distance < error * model.diameter).mean())


def voting_patches(instance: VoteInstance) -> FloatArray:
    """Return the boxes [n,4] (x0 y0 x1 y1 px of the image) of the cells that voted for an instance.

    ValueError for an instance that was not seen in a crop.
    """
    if instance.crop is None:
        raise ValueError("the cells of an instance are known in the crop that it was seen in, and it has none.")
    width, height = instance.crop.size
    starts = np.cumsum([0, *((width // s) * (height // s) for s in STRIDES)])
    level = np.searchsorted(starts, instance.cells, side="right") - 1
    stride = np.array(STRIDES)[level]
    row, column = np.divmod(instance.cells - starts[level], width // stride)
    low = np.stack((column, row), axis=-1) * stride[:, None] - 0.5
    corners = instance.crop.to_source(np.stack((low, low + stride[:, None]), axis=1))
    return np.asarray(corners.reshape(-1, 4))
