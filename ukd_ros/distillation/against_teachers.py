# SPDX-License-Identifier: Apache-2.0
"""A student beside its teachers on frames that nobody labelled: do their poses differ as their covariances say?

Frames are taken as they come, not those that the teachers were sure of: what is hard for a robot must count. The
teachers are no truth. Where they and the student err alike nothing shows, so agreement proves nothing; a disagreement
beyond both covariances is real, and the student's covariance is enlarged by it, never made smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ukd_ros.data.progress import Bar
from ukd_ros.distillation.pseudo_labels import PseudoLabel
from ukd_ros.distillation.recalibrate import LEAST_POSES, scale_factor
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.chi_square import chi2_quantile
from ukd_ros.geometry.estimate import PoseEstimate
from ukd_ros.geometry.metrics import nees
from ukd_ros.geometry.symmetry import nearest
from ukd_ros.geometry.view import View
from ukd_ros.perception.estimator import PoseEstimator
from ukd_ros.perception.votes import Calibration

NEAR = 0.5
"""Two poses are of one object when their origins are nearer than this share of its diameter, sideways."""

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
    """

    frames: int
    accepted: Agreement
    refused: Agreement
    all: Agreement
    factor: float

    def table(self) -> str:
        """Return the comparison as text."""
        rows = [f"{'teachers':10} poses  student too   NEES  inside 95 %"]
        for name in ("accepted", "refused", "all"):
            a: Agreement = getattr(self, name)
            rows.append(f"{name:10} {a.teachers:5d} {a.both:12d} {a.nees:6.1f} {100 * a.inside:12.1f}")
        rows.append(f"covariance times {self.factor:.3g} ({self.frames} frames, as they came)")
        return "\n".join(rows)


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
    squares: list[float] = []
    accepted: list[bool] = []
    blocks: list[int] = []
    counts = {True: 0, False: 0}
    seen = 0
    for number, view in Bar(
        frames, desc="comparing with the teachers", unit="frame", total=total, disable=not progress
    ):
        seen += 1
        mine = list(estimator.estimate(view).estimates)
        for label in by_frame.get(number, []):
            counts[not label.refused] += 1
            square = _square(label, mine, estimator)
            if square is not None:
                squares.append(square)
                accepted.append(not label.refused)
                blocks.append(block_of[number])
    values, sure, block = np.array(squares), np.array(accepted, bool), np.array(blocks, np.int64)
    factor = 1.0
    if len(values) >= LEAST_POSES and len(np.unique(block)) >= 2:
        factor = max(1.0, scale_factor(values, block))
    return AgainstTeachers(
        seen,
        _agreement(values[sure], counts[True]),
        _agreement(values[~sure], counts[False]),
        _agreement(values, counts[True] + counts[False]),
        factor,
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


def _square(label: PseudoLabel, mine: list[PoseEstimate], estimator: PoseEstimator) -> float | None:
    """Return the squared length of the difference to the student's pose of the same object; None without one."""
    model = estimator.objects[label.class_index]
    best: tuple[float, PoseEstimate] | None = None
    for estimate in mine:
        aside = estimate.T_camera_object.translation - label.T_camera_object.translation
        apart = float(np.linalg.norm(aside[:2]))
        if estimate.object_name == model.name and apart < NEAR * model.diameter and (best is None or apart < best[0]):
            best = (apart, estimate)
    if best is None:
        return None
    pose = nearest(best[1].T_camera_object, label.T_camera_object, model.symmetries)
    delta: FloatArray = np.asarray(label.T_camera_object.minus(pose))
    return float(nees(delta[None], (best[1].cov + label.cov)[None])[0])


def _agreement(squares: npt.NDArray[np.float64], teachers: int) -> Agreement:
    if len(squares) == 0:
        return Agreement(teachers, 0, float("nan"), float("nan"))
    inside = float((squares <= chi2_quantile(0.95, _DOF)).mean())
    return Agreement(teachers, len(squares), float(squares.mean()), inside)
