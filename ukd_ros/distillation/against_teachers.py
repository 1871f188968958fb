# SPDX-License-Identifier: Apache-2.0
"""A student beside its teachers on frames that nobody labelled: do their poses differ as their covariances say?

Frames are taken as they come, not those that the teachers were sure of: what is hard for a robot must count. The
teachers are no truth. Where they and the student err alike nothing shows, so agreement proves nothing; a disagreement
beyond both covariances is real, and the student's covariance is enlarged by it, never made smaller.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ukd_ros.data.progress import Bar
from ukd_ros.distillation.conformal import block_quantile
from ukd_ros.distillation.pseudo_labels import UNSURE, PseudoLabel
from ukd_ros.distillation.recalibrate import LEAST_POSES, drawn_to_one, telling_level
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.chi_square import chi2_quantile
from ukd_ros.geometry.estimate import PoseEstimate
from ukd_ros.geometry.metrics import nees
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.symmetry import nearest
from ukd_ros.geometry.view import View
from ukd_ros.perception.estimator import PoseEstimator
from ukd_ros.perception.votes import Calibration

logger = logging.getLogger(__name__)

NEAR = 0.5
"""Of several objects of a kind, two poses are of one when their origins are nearer than so many diameters, sideways."""

LARGEST = 100.0
"""Largest factor: ten times the standard deviation. What asks for more is no error bar, but another object."""

MANY = 0.05
"""From this share of the teachers' poses on, those that the student's do not match are worth a warning."""

_DOF = 6


@dataclass(frozen=True)
class Agreement:
    """How a student's poses differ from its teachers' on a set of them.

    teachers: poses the teachers gave; both: of them the student gave one too. nees: mean of δᵀΣ⁻¹δ with the sum of both
    covariances (6 expected where their errors are independent). inside: share of these within the 95 % bound.
    """

    teachers: int
    both: int
    nees: float
    inside: float


@dataclass(frozen=True, eq=False)
class AgainstTeachers:
    """The comparison on all held-out frames: of poses that would be labels (`accepted`), of the others (`refused`),
    of `all`, and the factor (1 or more) that this gives for the student's covariance.

    The factor is from `used` poses. far: pairs more than half a diameter apart. alone: poses of the student where the
    teachers gave none.
    """

    frames: int
    accepted: Agreement
    refused: Agreement
    all: Agreement
    factor: float
    used: int
    far: int
    alone: int

    def table(self) -> str:
        """Return the comparison as text."""
        rows = [f"{'teachers':10} poses  student too   NEES  inside 95 %"]
        for name in ("accepted", "refused", "all"):
            a: Agreement = getattr(self, name)
            rows.append(f"{name:10} {a.teachers:5d} {a.both:12d} {a.nees:6.1f} {100 * a.inside:12.1f}")
        rows.append(
            f"covariance times {self.factor:.3g}, from the {self.used} accepted or unsure ones (the teachers' own "
            f"residuals, scores or neighbours speak against the others); {self.frames} frames, as they came"
        )
        missed = self.all.teachers - self.all.both
        if missed or self.alone:
            rows.append(
                f"not compared: {missed} of {self.all.teachers} poses of the teachers, which the student lacks, and "
                f"{self.alone} of the student's, where the teachers have none"
            )
        if self.far:
            rows.append(
                f"{self.far} of {self.all.both} pairs lie more than half a diameter apart: one of the two is plainly "
                "wrong, and no covariance says so"
            )
        return "\n".join(rows)


@dataclass(frozen=True, eq=False)
class _Pair:
    """What both say of one object: teachers' pose minus student's [6], and both covariances [6,6]."""

    label: PseudoLabel
    delta: FloatArray
    cov_student: FloatArray
    far: bool


def against_teachers(
    estimator: PoseEstimator,
    frames: Iterable[tuple[int, View]],
    labels: Sequence[PseudoLabel],
    block_of: Sequence[int],
    total: int | None = None,
    progress: bool = True,
) -> AgainstTeachers:
    """Run the student on held-out frames (number, view) and compare with what the teachers said of them.

    labels: accepted and refused ones. block_of: the block of each frame, for neighbours are not independent.
    """
    by_frame: dict[int, list[PseudoLabel]] = {}
    for label in labels:
        by_frame.setdefault(label.frame, []).append(label)
    pairs: list[_Pair] = []
    told: list[bool] = []
    seen = alone = 0
    for number, view in Bar(
        frames, desc="comparing with the teachers", unit="frame", total=total, disable=not progress
    ):
        seen += 1
        mine = list(estimator.estimate(view).estimates)
        theirs = by_frame.get(number, [])
        told += [not label.refused for label in theirs]
        for index, model in enumerate(estimator.objects):
            of_class = [estimate for estimate in mine if estimate.object_name == model.name]
            found = _pairs([label for label in theirs if label.class_index == index], of_class, model)
            pairs += found
            alone += len(of_class) - len(found)
    used = [pair for pair in pairs if pair.label.refused in ("", UNSURE)]
    far = sum(pair.far for pair in pairs)
    everything = _agreement(pairs, len(told))
    unmatched = len(told) - len(pairs) + far
    if told and unmatched > MANY * len(told):
        words = "of %d poses of the teachers the student lacks %d, and of its others %d are plainly elsewhere"
        logger.warning(words, len(told), len(told) - len(pairs), far)
    return AgainstTeachers(
        seen,
        _agreement([pair for pair in pairs if not pair.label.refused], sum(told)),
        _agreement([pair for pair in pairs if pair.label.refused], len(told) - sum(told)),
        everything,
        _factor(used, np.array([block_of[pair.label.frame] for pair in used], np.int64)),
        len(used),
        far,
        alone,
    )


def enlarged(calibration: Calibration, factor: float) -> Calibration:
    """Return the calibration of a covariance times `factor`; its conformal radius was another's and goes."""
    if factor == 1.0:
        return calibration
    return replace(
        calibration,
        block_factor=calibration.block_factor * factor,
        modes=calibration.modes * factor,
        conformal_level=0.0,
        conformal_radius=0.0,
    )


def _pairs(theirs: list[PseudoLabel], mine: list[PoseEstimate], model: ObjectModel) -> list[_Pair]:
    """Return what both say of the objects of one class in one frame.

    One pose each is of one object, however far apart: that is the disagreement to be known. Of several the nearest
    sideways belong together, since depth is what a camera knows least.
    """
    apart = [
        (float(np.linalg.norm((a.T_camera_object.translation - b.T_camera_object.translation)[:2])), i, j)
        for i, a in enumerate(theirs)
        for j, b in enumerate(mine)
    ]
    limit = np.inf if len(theirs) == len(mine) == 1 else NEAR * model.diameter
    taken: dict[int, int] = {}
    for distance, i, j in sorted(apart):
        if distance < limit and i not in taken and j not in taken.values():
            taken[i] = j
    return [_pair(theirs[i], mine[j], model) for i, j in taken.items()]


def _pair(label: PseudoLabel, estimate: PoseEstimate, model: ObjectModel) -> _Pair:
    pose = nearest(estimate.T_camera_object, label.T_camera_object, model.symmetries)
    delta: FloatArray = np.asarray(label.T_camera_object.minus(pose))
    return _Pair(label, delta, estimate.cov, float(np.linalg.norm(delta[:3])) > NEAR * model.diameter)


def _squares(pairs: Sequence[_Pair], factor: float = 1.0) -> FloatArray:
    """Return the NEES [n] of the differences, with the student's covariance times `factor`."""
    cov = np.stack([factor * pair.cov_student + pair.label.cov for pair in pairs])
    return np.asarray(nees(np.stack([pair.delta for pair in pairs]), cov))


def _factor(pairs: Sequence[_Pair], block: npt.NDArray[np.int64]) -> float:
    """Return the factor (1 to `LARGEST`) on the student's covariance alone that brings the sum to nominal coverage.

    As `scale_factor` does it for poses whose truth is known; the teachers' covariance stays.
    """
    if len(pairs) < LEAST_POSES or len(np.unique(block)) < 2:
        return 1.0
    level, size = telling_level(_squares(pairs), block)
    bound = chi2_quantile(level, _DOF)
    low, high = 0.0, float(np.log(LARGEST))
    if block_quantile(_squares(pairs), block, level) <= bound:
        return 1.0
    for _ in range(30):
        middle = 0.5 * (low + high)
        inside = block_quantile(_squares(pairs, float(np.exp(middle))), block, level) <= bound
        low, high = (low, middle) if inside else (middle, high)
    return drawn_to_one(float(np.exp(high)), size)


def _agreement(pairs: Sequence[_Pair], teachers: int) -> Agreement:
    if not pairs:
        return Agreement(teachers, 0, float("nan"), float("nan"))
    squares = _squares(pairs)
    inside = float((squares <= chi2_quantile(0.95, _DOF)).mean())
    return Agreement(teachers, len(squares), float(squares.mean()), inside)
