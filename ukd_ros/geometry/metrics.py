# SPDX-License-Identifier: Apache-2.0
"""How far is a pose from the truth, and does its covariance say so?

Distances follow BOP (Hodan et al., ECCV 2018 and the BOP toolkit's pose_error.py); estimates come first, truth second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.arrays import FloatArray, frozen_array
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.chi_square import chi2_quantile
from ukd_ros.geometry.pose import Pose, log_so3

NEIGHBOUR_CHUNK = 512
"""Points per block of the nearest-neighbour search; a block against 10,000 points holds 40 MB."""


def add(estimate: Pose, truth: Pose, points: npt.ArrayLike) -> float:
    """Return ADD, m: the mean distance between the object's points [N, 3] in the two poses (Hinterstoisser 2012)."""
    distance = estimate.transform(points) - truth.transform(points)
    return float(np.mean(np.linalg.norm(distance, axis=1)))


def add_s(estimate: Pose, truth: Pose, points: npt.ArrayLike, queries: npt.ArrayLike | None = None) -> float:
    """Return ADD-S (ADI), m, for symmetric objects: the mean distance from a true point to the nearest estimated one.

    The search is exact and takes N times Q steps. queries [Q, 3]: the true points that ask, all of ``points`` [N, 3]
    when None; fewer of them leave the mean unbiased, fewer points to find would not.
    """
    found = estimate.transform(points)
    true = truth.transform(points if queries is None else queries)
    squared = np.sum(found**2, axis=1)
    total = 0.0
    for start in range(0, len(true), NEIGHBOUR_CHUNK):
        block = true[start : start + NEIGHBOUR_CHUNK]
        nearest = np.argmin(squared - 2 * (block @ found.T), axis=1)
        # The expanded square cancels; the distance to the nearest point is taken anew.
        total += float(np.linalg.norm(block - found[nearest], axis=1).sum())
    return total / len(true)


def mssd(estimate: Pose, truth: Pose, points: npt.ArrayLike, symmetries: Sequence[Pose] = ()) -> float:
    """Return BOP's maximum symmetry-aware surface distance, m.

    The least, over the symmetry motions S (``Symmetries.poses()``; none means the identity), of the largest
    ``|T_estimate x - T_truth S x|`` over the points [N, 3].
    """
    found = estimate.transform(points)
    candidates = symmetries or (Pose.identity(),)
    return min(float(np.linalg.norm(found - (truth @ S).transform(points), axis=1).max()) for S in candidates)


def mspd(estimate: Pose, truth: Pose, points: npt.ArrayLike, camera: Camera, symmetries: Sequence[Pose] = ()) -> float:
    """Return BOP's maximum symmetry-aware projection distance, px; infinite when a point is not in front of the camera.

    Like ``mssd`` with the distance between projections. BOP's own uses the pinhole part: give ``camera.pinhole()``.
    """
    found = camera.project(estimate.transform(points))
    candidates = symmetries or (Pose.identity(),)
    worst = [np.linalg.norm(found - camera.project((truth @ S).transform(points)), axis=1).max() for S in candidates]
    return float(np.min(np.nan_to_num(worst, nan=np.inf)))


def projection_error(estimate: Pose, truth: Pose, points: npt.ArrayLike, camera: Camera) -> float:
    """Return the mean distance, px, between the projections of the points [N, 3] (the "2D projection" metric).

    Infinite when a point is not in front of the camera in one of the poses.
    """
    distance = camera.project(estimate.transform(points)) - camera.project(truth.transform(points))
    return float(np.nan_to_num(np.mean(np.linalg.norm(distance, axis=1)), nan=np.inf))


def rotation_error_deg(estimate: Pose, truth: Pose) -> float:
    """Return the angle, degrees, of the turn between the two poses (0..180)."""
    return float(np.degrees(np.linalg.norm(log_so3(estimate.rotation @ truth.rotation.T))))


def translation_error(estimate: Pose, truth: Pose) -> float:
    """Return the distance, m, between the origins of the object in the two poses."""
    return float(np.linalg.norm(estimate.translation - truth.translation))


def nees(delta: npt.ArrayLike, cov: npt.ArrayLike) -> FloatArray:
    """Return the normalised estimation error squared ``delta^T cov^-1 delta`` [...] (Bar-Shalom et al. 2001, 5.4).

    delta: [..., d] error, for a pose ``truth.minus(estimate)``. cov: [..., d, d]; for a part of the state (xy, z,
    rotation alone) give the matching sub-vector and sub-block. It is chi-square with d degrees of freedom when the
    covariance is true. ValueError when a covariance is not positive definite.
    """
    return _whitened_square(delta, cov)[0]


def _whitened_square(delta: npt.ArrayLike, cov: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return (NEES, log det cov), each [...]."""
    error = np.asarray(delta, dtype=np.float64)
    matrix = np.asarray(cov, dtype=np.float64)
    if error.ndim < 1 or matrix.shape[-2:] != (error.shape[-1], error.shape[-1]):
        raise ValueError(f"delta, cov: have shapes {list(error.shape)} and {list(matrix.shape)}, which do not match.")
    # Metres and radians differ by orders of magnitude: scaling to unit variances first keeps the digits.
    with np.errstate(invalid="ignore"):
        sigma = np.sqrt(np.diagonal(matrix, axis1=-2, axis2=-1))
    try:
        if not np.all(sigma > 0):
            raise np.linalg.LinAlgError
        L = np.linalg.cholesky(matrix / (sigma[..., :, None] * sigma[..., None, :]))
    except np.linalg.LinAlgError:
        raise ValueError("cov: is not positive definite.") from None
    white = np.linalg.solve(L, (error / sigma)[..., None])[..., 0]
    log_det = 2 * (np.log(np.diagonal(L, axis1=-2, axis2=-1)) + np.log(sigma)).sum(axis=-1)
    return np.asarray(np.sum(white * white, axis=-1)), np.asarray(log_det)


def nees_band(count: int, dof: float, confidence: float = 0.99) -> tuple[float, float]:
    """Return the interval in which the mean of ``count`` independent NEES lies with probability ``confidence``.

    Their sum is chi-square with count * dof degrees of freedom.
    """
    tail = 0.5 * (1 - confidence)
    return chi2_quantile(tail, count * dof) / count, chi2_quantile(1 - tail, count * dof) / count


def coverage(nees: npt.ArrayLike, dof: float, level: float) -> float:
    """Return the share of NEES values [n] inside the ellipsoid that should hold the share ``level`` of them.

    NaN counts as outside. ValueError when there are none.
    """
    values = np.asarray(nees, dtype=np.float64).ravel()
    if not values.size:
        raise ValueError("nees: is empty; there is no coverage of nothing.")
    return float(np.mean(values <= chi2_quantile(level, dof)))


def pose_nll(delta: npt.ArrayLike, cov: npt.ArrayLike) -> FloatArray:
    """Return minus the log density [...] of the error ``delta`` [..., d] under N(0, cov) (nats; m and rad).

    It cannot be won by inflating the covariance, so it stands beside every coverage.
    """
    square, log_det = _whitened_square(delta, cov)
    dimension = np.asarray(delta).shape[-1]
    return np.asarray(0.5 * (square + log_det + dimension * np.log(2 * np.pi)))


def recall_curve(errors: npt.ArrayLike, thresholds: npt.ArrayLike) -> FloatArray:
    """Return the share of errors [n] strictly below each threshold [t]; a missed object's error is infinite or NaN."""
    values = _errors(errors)
    limits = frozen_array(thresholds, (None,), "thresholds")
    return np.asarray(np.searchsorted(np.sort(values), limits, side="left") / len(values))


def auc(errors: npt.ArrayLike, max_threshold: float) -> float:
    """Return the exact area, 0..1, under the recall curve from 0 to ``max_threshold``: the mean of max(0, 1 - e/max).

    (PoseCNN's ADD-AUC uses max_threshold = 0.1 m and interpolates as VOC does; this one interpolates nothing.)
    """
    if not (np.isfinite(max_threshold) and max_threshold > 0):
        raise ValueError(f"max_threshold: is {max_threshold}, but a positive number is needed.")
    return float(np.mean(np.maximum(0.0, 1.0 - _errors(errors) / max_threshold)))


def _errors(errors: npt.ArrayLike) -> FloatArray:
    values = np.asarray(errors, dtype=np.float64).ravel()
    if not values.size:
        raise ValueError("errors: is empty.")
    return np.asarray(np.where(np.isnan(values), np.inf, values))


def expected_calibration_error(nees: npt.ArrayLike, dof: float, levels: int = 20) -> float:
    """Return the mean of |coverage - level| over equally spaced levels (Kuleshov et al. 2018, ECE of a regression).

    They are the bin centres (i + 1/2) / levels; 0 is perfect.
    """
    centres = (np.arange(levels) + 0.5) / levels
    return float(np.mean([abs(coverage(nees, dof, float(level)) - level) for level in centres]))


def score_calibration_error(scores: npt.ArrayLike, correct: npt.ArrayLike, bins: int = 15) -> float:
    """Return the classification ECE (Guo et al. 2017): |share correct - mean score| per bin, weighted by bin size.

    scores: [n], 0..1. correct: [n] bool. ValueError when they differ in length or are empty.
    """
    score = frozen_array(scores, (None,), "scores")
    right = frozen_array(correct, (len(score),), "correct", np.bool_)
    if not len(score) or score.min() < 0 or score.max() > 1:
        raise ValueError("scores: numbers in 0..1 are needed, and at least one.")
    index = np.minimum((score * bins).astype(np.int64), bins - 1)
    gap = np.bincount(index, weights=right - score, minlength=bins)
    return float(np.abs(gap).sum() / len(score))
