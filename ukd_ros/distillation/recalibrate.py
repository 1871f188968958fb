# SPDX-License-Identifier: Apache-2.0
"""Recalibrating a model on a handful of labelled frames from where it will be used: one factor, and what it is worth.

A few frames cannot say how errors are shared; that stays as the renders taught it. They can say whether the covariance
as a whole is too small or too large *there*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ukd_ros.distillation.conformal import block_quantile, conformal_radius, effective_size, highest_level
from ukd_ros.distillation.corrections import Match
from ukd_ros.distillation.pose_check import PoseCheck
from ukd_ros.distillation.solved_poses import SolvedPoses, solve_poses
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.chi_square import chi2_quantile
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
                f"{check.sigma_z_mm:8.2f} {check.sigma_rotation_deg:10.2f} {check.nll:7.2f}  "
                f"{sum(check.rejected.values())} refused"
            )
        rows.append(
            f"covariance times {self.factor:.3g}, from {self.poses} poses in {self.blocks} blocks (worth "
            f"{self.effective:.0f} independent ones); radius {self.radius:.2f} holds {self.level:.1%} of poses in new "
            "blocks like these. Under other light or another camera nothing is promised."
        )
        return "\n".join(rows)


def recalibrate(
    estimator: PoseEstimator, matches: Sequence[Match], blocks: Sequence[int], level: float = 0.95
) -> Recalibration:
    """Fit one factor on the covariance of an already calibrated model, on matched instances of labelled frames.

    `blocks`: the block of every view; views of one block resemble each other. ValueError when the model was never
    calibrated, or fewer than five poses in two blocks were solved.
    """
    old = estimator.calibration
    if old.instances == 0:
        raise ValueError("recalibrating needs a model that was calibrated on renders first: run ukd calibrate on them.")
    places = np.array([blocks[item.view] for item in matches], dtype=np.int64)
    before, block = _solved(estimator, matches, places, np.ones(len(matches)))
    seen = np.unique(block)
    if len(block) < LEAST_POSES or len(seen) < 2:
        raise ValueError(
            f"only {len(block)} poses in {len(seen)} blocks were solved from {len(matches)} matched instances "
            f"({before.check.rejected}): recalibrating needs {LEAST_POSES} poses in two blocks; label more frames."
        )
    # the solver weighs and refuses by the covariance, so every factor is judged on poses that were solved with it
    squares = before.squares["pose"]
    factor = scale_factor(squares, block)
    others = np.array([_without(squares, block, int(place), factor) for place in places])
    after, _ = _solved(estimator, matches, places, others)
    final, final_block = _solved(estimator, matches, places, np.full(len(matches), factor))
    reached = min(level, highest_level(len(np.unique(final_block))))
    radius = conformal_radius(final.squares["pose"], final_block, reached)
    new = replace(
        old,
        block_factor=old.block_factor * factor,
        modes=old.modes * factor,
        conformal_level=reached,
        conformal_radius=radius,
    )
    size = effective_size(squares <= block_quantile(squares, block, 0.8), block)
    return Recalibration(factor, reached, radius, len(block), len(seen), size, before.check, after.check, new)


def _solved(
    estimator: PoseEstimator, matches: Sequence[Match], places: npt.NDArray[np.int64], factors: FloatArray
) -> tuple[SolvedPoses, npt.NDArray[np.int64]]:
    """Solve every match with its covariance times a factor of its own; also return the blocks of those solved."""
    instances = []
    for item, factor in zip(matches, factors, strict=True):
        points = item.instance.keypoints
        instances.append(replace(item.instance, keypoints=replace(points, cov=points.cov * float(factor))))
    found = solve_poses(estimator, matches, instances)
    return found, places[found.kept]


def _without(squares: FloatArray, block: npt.NDArray[np.int64], place: int, whole: float) -> float:
    """Return the factor that the other blocks give."""
    rest = block != place
    return scale_factor(squares[rest], block[rest]) if rest.any() else whole


def scale_factor(squares: FloatArray, block: npt.ArrayLike) -> float:
    """Return the factor on the covariance that brings poses with these NEES [n] to nominal coverage.

    The quantile compared is the highest that the samples can tell (0.95 from 50 independent ones on, 0.5 from five);
    the logarithm of the factor is drawn to 0 as if `PRIOR` poses had said so.
    """
    level, size = telling_level(squares, block)
    return drawn_to_one(block_quantile(squares, block, level) / chi2_quantile(level, _DOF), size)


def telling_level(squares: FloatArray, block: npt.ArrayLike) -> tuple[float, float]:
    """Return the highest quantile that poses with these NEES can tell, and how many independent ones they are worth."""
    size = effective_size(squares <= block_quantile(squares, block, 0.8), block)
    return float(np.clip(1.0 - 2.5 / max(size, 1.0), 0.5, 0.95)), size


def drawn_to_one(factor: float, size: float) -> float:
    """Return a factor that so many independent poses ask for, when `PRIOR` others had asked for 1."""
    return math.exp(math.log(max(factor, 1e-6)) * size / (size + PRIOR))
