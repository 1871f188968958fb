# SPDX-License-Identifier: Apache-2.0
"""How pose covariances compare with the truth: coverage, sharpness and likelihood in one table row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ukd_ros.distillation.error_model import PARTS, capped_nll
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.chi_square import chi2_cdf, chi2_quantile
from ukd_ros.geometry.metrics import coverage, expected_calibration_error, nees

LEVELS = (0.5, 0.68, 0.8, 0.9, 0.95, 0.99)
"""Nominal levels whose coverage is reported."""


@dataclass(frozen=True)
class PoseCheck:
    """How the poses of one variant of the covariance compare with the truth.

    poses, rejected: solved, and refused by PnP or the gate. nees: mean normalised squared error (6 expected), its
    median beside it (5.35 expected). coverage: per part (pose, xy, z, rotation) and level. calibration_error: mean
    |coverage - level| per part. sigma_xy_mm, sigma_z_mm, sigma_rotation_deg: medians of the predicted standard
    deviations (sharpness). nll: mean pose negative log-likelihood, nats, with the far tail counted by its logarithm
    (capped_nll). error_xy_mm, error_z_mm, error_rotation_deg: medians of the errors themselves.
    """

    poses: int
    rejected: dict[str, int]
    nees: float
    nees_median: float
    coverage: dict[str, dict[float, float]]
    calibration_error: dict[str, float]
    sigma_xy_mm: float
    sigma_z_mm: float
    sigma_rotation_deg: float
    nll: float
    error_xy_mm: float
    error_z_mm: float
    error_rotation_deg: float


def pose_check(
    delta: FloatArray,
    cov: FloatArray,
    rejected: dict[str, int],
    free: npt.ArrayLike = 0,
    known: FloatArray | None = None,
) -> tuple[PoseCheck, dict[str, FloatArray]]:
    """Return the check of pose errors [n, 6] against covariances [n, 6, 6], and the NEES [n] per part.

    free: [n] or one number, the turns about axes of revolution that each covariance calls unknown. The truth has no
    error in them, so so many degrees of freedom fewer are left, and the NEES is given as that of 6 (of 3 for the
    rotation) with the same probability. known: the covariances without those turns, for the standard deviations.
    """
    squares = {part: nees(delta[:, where], cov[:, where, where]) for part, where in PARTS.items()}
    sizes = {part: where.stop - where.start for part, where in PARTS.items()}
    turns = np.broadcast_to(np.asarray(free, dtype=np.int64), len(delta))
    if turns.any():
        for part in ("pose", "rotation"):
            squares[part] = _of_all_dof(squares[part], sizes[part], turns)
    variance = np.diagonal(cov if known is None else known, axis1=1, axis2=2)
    check = PoseCheck(
        poses=len(delta),
        rejected=rejected,
        nees=float(squares["pose"].mean()),
        nees_median=float(np.median(squares["pose"])),
        coverage={p: {level: coverage(squares[p], sizes[p], level) for level in LEVELS} for p in PARTS},
        calibration_error={p: expected_calibration_error(squares[p], sizes[p]) for p in PARTS},
        sigma_xy_mm=1e3 * float(np.median(np.sqrt(variance[:, :2].mean(axis=1)))),
        sigma_z_mm=1e3 * float(np.median(np.sqrt(variance[:, 2]))),
        sigma_rotation_deg=float(np.degrees(np.median(np.sqrt(variance[:, 3:].mean(axis=1))))),
        nll=float(capped_nll(delta, cov).mean()),
        error_xy_mm=1e3 * float(np.median(np.linalg.norm(delta[:, :2], axis=1))),
        error_z_mm=1e3 * float(np.median(np.abs(delta[:, 2]))),
        error_rotation_deg=float(np.degrees(np.median(np.linalg.norm(delta[:, 3:], axis=1)))),
    )
    return check, squares


def _of_all_dof(squares: FloatArray, dof: int, free: npt.NDArray[np.int64]) -> FloatArray:
    """Return each squared error [n] of dof - free degrees of freedom as the equally probable one of dof."""
    out = np.array(squares)
    for index in np.flatnonzero(free):
        level = float(chi2_cdf(squares[index], dof - int(free[index])))
        out[index] = chi2_quantile(level, dof) if level < 1.0 else squares[index]
    return out
