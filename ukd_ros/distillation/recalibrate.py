# SPDX-License-Identifier: Apache-2.0
"""Recalibrating a model on a handful of labelled frames from where it will be used: one factor, and what it is worth.

A few frames cannot say how errors are shared; that stays as the renders taught it. They can say whether the covariance
as a whole is too small or too large *there*.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ukd_ros.distillation.conformal import block_quantile, conformal_radius, effective_size, highest_level
from ukd_ros.distillation.corrections import Match
from ukd_ros.distillation.pose_check import PoseCheck, pose_check
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.chi_square import chi2_quantile
from ukd_ros.geometry.estimate import Rejection
from ukd_ros.geometry.symmetry import without_free_turns
from ukd_ros.perception.estimator import PoseEstimator
from ukd_ros.perception.votes import Calibration

PRIOR = 2.0
"""How many independent poses the old covariance's own word is worth."""

LEAST_POSES = 5
_DOF = 6


@dataclass(frozen=True, eq=False)
class Recalibration:
    """The factor on the covariance, the radius, and how both do on blocks that they have not seen.

    factor: on the whole covariance. level, radius: {δ: δᵀ cov⁻¹ δ ≤ radius²} with the new covariance holds the pose
    with probability `level` in new blocks like these (the highest level that so many blocks allow, at most the one
    asked for). poses solved, in `blocks` blocks, worth `effective` independent ones. before, after: the covariance as
    it was, and scaled by factors fitted without the pose's own block.
    """

    factor: float
    level: float
    radius: float
    poses: int
    blocks: int
    effective: float
    before: PoseCheck
    after: PoseCheck
    calibration: Calibration

    def as_data(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        data = {name: getattr(self, name) for name in ("factor", "level", "radius", "poses", "blocks", "effective")}
        return {**data, "before": asdict(self.before), "after": asdict(self.after)}

    def table(self) -> str:
        """Return the result as text."""
        rows = [f"{'':8} poses  NEES  cov95: pose    xy     z   rot  s_xy mm   s_z mm  s_rot deg     NLL"]
        for name, check in (("before", self.before), ("after", self.after)):
            shares = " ".join(f"{100 * check.coverage[part][0.95]:5.1f}" for part in ("pose", "xy", "z", "rotation"))
            rows.append(
                f"{name:8} {check.poses:5d} {check.nees:5.1f}       {shares} {check.sigma_xy_mm:8.2f} "
                f"{check.sigma_z_mm:8.2f} {check.sigma_rotation_deg:10.2f} {check.nll:7.2f}"
            )
        rows.append(
            f"covariance times {self.factor:.3g}, from {self.poses} poses in {self.blocks} blocks (worth "
            f"{self.effective:.0f} independent ones); radius {self.radius:.2f} holds {self.level:.1%} of poses in new "
            "blocks like these. Under other light or another camera nothing is promised."
        )
        return "\n".join(rows)


def recalibrate(
    estimator: PoseEstimator, matches: Sequence[Match], block_views: int = 1, level: float = 0.95
) -> Recalibration:
    """Fit one factor on the covariance of an already calibrated model, on matched instances of labelled frames.

    `block_views` neighbouring frames are one block. ValueError when the model was never calibrated, or fewer than five
    poses in two blocks were solved.
    """
    if estimator.calibration.instances == 0:
        raise ValueError("recalibrating needs a model that was calibrated on renders first: run ukd calibrate on them.")
    deltas, covs, known, free, block = [], [], [], [], []
    rejected: Counter[str] = Counter()
    for item in matches:
        answer = estimator.solve(item.camera, item.instance)
        if isinstance(answer, Rejection):
            rejected[answer.reason.value] += 1
            continue
        symmetries = estimator.objects[item.instance.class_index].symmetries
        deltas.append(item.truth.minus(answer.T_camera_object))
        covs.append(answer.cov)
        known.append(without_free_turns(answer.cov, answer.T_camera_object, symmetries))
        free.append(len(symmetries.continuous))
        block.append(item.view // block_views)
    places = np.array(block)
    if len(deltas) < LEAST_POSES or len(np.unique(places)) < 2:
        raise ValueError(
            f"only {len(deltas)} poses in {len(np.unique(places))} blocks were solved from {len(matches)} matched "
            f"instances ({dict(rejected)}): recalibrating needs {LEAST_POSES} poses in two blocks; label more frames."
        )
    delta, cov, kept = np.array(deltas), np.array(covs), np.array(known)
    before, squares = pose_check(delta, cov, dict(rejected), free, kept)
    factors = np.ones(len(delta))
    for one in np.unique(places):
        factors[places == one] = scale_factor(squares["pose"][places != one], places[places != one])
    scaled = factors[:, None, None]
    after, _ = pose_check(delta, cov * scaled, dict(rejected), free, kept * scaled)
    factor = scale_factor(squares["pose"], places)
    blocks = len(np.unique(places))
    reached = min(level, highest_level(blocks))
    # the factor is a change of unit: the set that the radius describes does not depend on it
    radius = conformal_radius(squares["pose"], places, reached) / math.sqrt(factor)
    old = estimator.calibration
    new = replace(
        old,
        block_factor=old.block_factor * factor,
        modes=old.modes * factor,
        conformal_level=reached,
        conformal_radius=radius,
    )
    inside = squares["pose"] <= block_quantile(squares["pose"], places, 0.8)
    return Recalibration(
        factor, reached, radius, len(delta), blocks, effective_size(inside, places), before, after, new
    )


def scale_factor(squares: FloatArray, block: FloatArray) -> float:
    """Return the factor on the covariance that brings poses with these NEES [n] to nominal coverage.

    The quantile compared is the highest that the samples can tell (0.95 from 50 independent ones on, 0.5 from five);
    the logarithm of the factor is drawn to 0 as if `PRIOR` poses had said so.
    """
    middle = block_quantile(squares, block, 0.8)
    size = effective_size(squares <= middle, block)
    level = float(np.clip(1.0 - 2.5 / max(size, 1.0), 0.5, 0.95))
    ratio = block_quantile(squares, block, level) / chi2_quantile(level, _DOF)
    return math.exp(math.log(max(ratio, 1e-6)) * size / (size + PRIOR))
