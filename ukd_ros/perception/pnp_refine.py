# SPDX-License-Identifier: Apache-2.0
"""Refine a pose on whitened reprojection residuals, and test each keypoint against all the others.

Everything is written in the tangent of ``geometry.pose.Pose``: delta = (dt, dtheta), t' = t + dt, R' = Exp(dtheta) R.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ukd_ros.geometry.arrays import BoolArray, FloatArray
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.pose import exp_so3, skew

STEP_TOLERANCE = 1e-6
"""Refinement stops after a step of squared length below this, in standard deviations of the answer (1e-3 sigma)."""

MAX_DAMPING = 1e8


def projection_jacobian(
    points: FloatArray, rotation: FloatArray, translation: FloatArray, camera: Camera
) -> tuple[FloatArray, FloatArray]:
    """Return the pixels [N, 2] of object points [N, 3] and their derivatives [N, 2, 6] with respect to delta.

    px/m for the first three columns, px/rad for the last three; NaN for points that the camera cannot see.
    """
    turned = points @ rotation.T
    xy, by_point = camera.project_with_jacobian(turned + translation)
    jacobian = np.empty((len(points), 2, 6))
    jacobian[:, :, :3] = by_point
    # R' x = R x + dtheta x (R x) = R x - skew(R x) dtheta.
    jacobian[:, :, 3:] = by_point @ -skew(turned)
    return xy, jacobian


@dataclass(frozen=True, eq=False)
class PnpProblem:
    """The usable keypoints of one instance: object points [n, 3] m, pixels [n, 2], covariance [2n, 2n] px^2."""

    points: FloatArray
    xy: FloatArray
    cov: FloatArray
    camera: Camera

    def __len__(self) -> int:
        """Return n."""
        return len(self.points)


@dataclass(frozen=True, eq=False)
class Fit:
    """A pose refined on some of the keypoints.

    inliers: [n] bool. chi2: squared length of their whitened residuals. white_jacobian [2m, 6], white_residual [2m]
    (observed - projected) and whitener [2m, 2m] = L^-1 with L L^T the inliers' covariance, all at the final pose.
    """

    rotation: FloatArray
    translation: FloatArray
    inliers: BoolArray
    chi2: float
    white_jacobian: FloatArray
    white_residual: FloatArray
    whitener: FloatArray
    iterations: int
    converged: bool

    @property
    def dof(self) -> int:
        """Return the expectation of chi2: two per inlier, less the six of the pose."""
        return 2 * int(np.count_nonzero(self.inliers)) - 6

    def information(self) -> FloatArray:
        """Return J^T Sigma^-1 J [6, 6]."""
        return self.white_jacobian.T @ self.white_jacobian


def refine(
    problem: PnpProblem,
    rotation: FloatArray,
    translation: FloatArray,
    inliers: BoolArray,
    max_iterations: int,
    whitener: FloatArray | None = None,
) -> Fit | None:
    """Return the Levenberg-Marquardt refinement of a pose on the inliers, whitened by their *full* covariance.

    whitener: of an earlier fit on the same inliers, which saves computing it again.
    None when the start shows an inlier behind the camera or outside the lens model, or when the covariance or the
    normal equations are singular.
    """
    if whitener is None:
        rows = np.repeat(inliers, 2)
        try:
            whitener = np.asarray(np.linalg.inv(np.linalg.cholesky(problem.cov[np.ix_(rows, rows)])))
        except np.linalg.LinAlgError:
            return None
    white = whitener
    points, xy = problem.points[inliers], problem.xy[inliers]

    def linearise(R: FloatArray, t: FloatArray) -> tuple[float, FloatArray, FloatArray]:
        projected, jacobian = projection_jacobian(points, R, t, problem.camera)
        residual = white @ (xy - projected).ravel()
        return float(residual @ residual), residual, white @ jacobian.reshape(-1, 6)

    R, t = rotation, translation
    chi2, residual, J = linearise(R, t)
    if not np.isfinite(chi2):
        return None
    damping, converged, iterations = 0.0, False, 0
    while iterations < max_iterations and damping < MAX_DAMPING and not converged:
        iterations += 1
        A = J.T @ J
        try:
            damped = A + damping * np.diag(np.diag(A)) if damping > 0 else A
            delta = np.linalg.solve(damped, J.T @ residual)
        except np.linalg.LinAlgError:
            if damping > 0:
                return None
            damping = 1e-3
            continue
        new_R, new_t = exp_so3(delta[3:]) @ R, t + delta[:3]
        trial = linearise(new_R, new_t)
        # A NaN (a point driven behind the camera) compares false and counts as worse.
        if trial[0] <= chi2 + 1e-12 * (1 + chi2):
            R, t = new_R, new_t
            chi2, residual, J = trial
            converged = float(delta @ A @ delta) < STEP_TOLERANCE
            damping = 0.1 * damping if damping > 1e-6 else 0.0
        else:
            damping = max(1e-3, 10 * damping)
    return Fit(R, t, inliers, chi2, J, residual, white, iterations, converged)


def deletion_statistics(problem: PnpProblem, fit: Fit) -> FloatArray:
    """Return, for each keypoint [n], its squared Mahalanobis distance from what the *other* inliers say about it.

    Chi-square with 2 degrees of freedom for a good keypoint, correlations and the uncertainty of the pose included
    (Baarda's data snooping; for an inlier the fit is thought without it). Zero where the others cannot tell, infinite
    where a keypoint cannot be seen in this pose, NaN never.
    """
    J, r, W = fit.white_jacobian, fit.white_residual, fit.whitener
    try:
        cov: FloatArray = np.asarray(np.linalg.inv(fit.information()), dtype=np.float64)
    except np.linalg.LinAlgError:
        return np.zeros(len(problem))
    out = np.zeros(len(problem))
    count = len(r) // 2
    # P = W^T (I - J C J^T) W is the residuals' information; r_k given the others has precision P_kk.
    pulled = W.T @ (r - J @ (cov @ (J.T @ r)))
    reduced = W - J @ (cov @ (J.T @ W))
    columns = reduced.T.reshape(count, 2, -1)
    precision = columns @ columns.transpose(0, 2, 1)
    out[fit.inliers] = _quadratic(precision, pulled.reshape(count, 2))
    if count < len(problem):
        out[~fit.inliers] = _innovations(problem, fit, cov)
    return out


def _innovations(problem: PnpProblem, fit: Fit, cov: FloatArray) -> FloatArray:
    """Return the squared Mahalanobis distances of the keypoints that are not inliers."""
    outside = ~fit.inliers
    rows, columns = np.repeat(outside, 2), np.repeat(fit.inliers, 2)
    xy, jacobian = projection_jacobian(problem.points[outside], fit.rotation, fit.translation, problem.camera)
    cross = problem.cov[np.ix_(rows, columns)] @ fit.whitener.T
    error = (problem.xy[outside] - xy).ravel() - cross @ fit.white_residual
    lever = jacobian.reshape(-1, 6) - cross @ fit.white_jacobian
    spread = problem.cov[np.ix_(rows, rows)] - cross @ cross.T + lever @ cov @ lever.T
    count = len(xy)
    index = np.arange(count)
    blocks = spread.reshape(count, 2, count, 2)[index, :, index, :]
    inverse = np.full_like(blocks, np.nan)
    seen = np.isfinite(blocks).all(axis=(1, 2))
    inverse[seen] = np.linalg.inv(blocks[seen])
    error = error.reshape(count, 2)
    squared = np.einsum("ki,kij,kj->k", error, inverse, error)
    return np.asarray(np.nan_to_num(squared, nan=np.inf), dtype=np.float64)


def _quadratic(precision: FloatArray, pull: FloatArray) -> FloatArray:
    """Return pull^T precision^-1 pull [k] of [k, 2, 2] and [k, 2]; zero where a keypoint has no redundancy."""
    a, b, d = precision[:, 0, 0], precision[:, 0, 1], precision[:, 1, 1]
    determinant = a * d - b * b
    u, v = pull[:, 0], pull[:, 1]
    numerator = d * u * u - 2 * b * u * v + a * v * v
    checkable = determinant > 1e-10 * (a + d) ** 2
    return np.asarray(np.divide(numerator, determinant, out=np.zeros_like(numerator), where=checkable))


def refine_with_inliers(
    problem: PnpProblem,
    rotation: FloatArray,
    translation: FloatArray,
    inliers: BoolArray,
    *,
    limit: float,
    min_inliers: int,
    rounds: int,
    max_iterations: int,
) -> Fit | None:
    """Refine, test every keypoint against the others, and repeat while the set of inliers changes.

    limit: chi-square value (2 degrees of freedom) beyond which a keypoint is out. At most ``rounds`` refinements
    follow the first; the answer is always the refinement on the inliers it names. None as in ``refine``.
    """
    fit = refine(problem, rotation, translation, inliers, max_iterations)
    for _ in range(rounds):
        if fit is None:
            return None
        statistics = deletion_statistics(problem, fit)
        worst = float(statistics[fit.inliers].max())
        # One gross error makes its neighbours look bad: only those like the worst go at once, the rest are asked again.
        keep = statistics <= max(limit, 0.3 * worst)
        updated = np.where(fit.inliers, keep, statistics <= limit)
        if np.array_equal(updated, fit.inliers) or np.count_nonzero(updated) < min_inliers:
            break
        refined = refine(problem, fit.rotation, fit.translation, updated, max_iterations)
        if refined is None:
            break
        fit = refined
    return fit
