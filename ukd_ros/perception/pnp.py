# SPDX-License-Identifier: Apache-2.0
"""Keypoints with a covariance become a pose with a covariance (perspective-n-point), or the reason why not.

Thresholds are in standard deviations, never in pixels: the keypoints' own covariance says what is near.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.arrays import BoolArray, FloatArray, frozen_array
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.chi_square import chi2_quantile, chi2_tail
from ukd_ros.geometry.estimate import Rejection, RejectReason
from ukd_ros.geometry.keypoints import Keypoints
from ukd_ros.geometry.pose import Pose, log_so3, nearest_rotation
from ukd_ros.perception.pnp_hypotheses import (
    Hypotheses,
    enough,
    extents,
    from_all_points,
    from_subsets,
    mirrored,
    squared_distances,
    subset_batches,
)
from ukd_ros.perception.pnp_refine import Fit, PnpProblem, projection_jacobian, refine, refine_with_inliers

__all__ = ["PnpOptions", "PnpSolution", "projection_jacobian", "solve_pnp"]

PLANAR = 1e-3
"""Thickness over length below which a keypoint set is planar enough for IPPE."""

COLLINEAR = 1e-9
"""Width over length below which a keypoint set is a line."""

MAX_TURN_SIGMA = 1.0
"""Rotation uncertainty (rad, root of the trace) beyond which no tangent describes it; for the position it is the
distance itself. The condition number alone does not see an axis that is merely unknown."""

SECOND_STEPS = 3
"""Refinement steps after which the search for a second minimum looks whether there is one."""

SECOND_HOPELESS = 30.0
"""Chi2 above the first minimum's beyond which those steps have found none: a likelihood ratio of exp(-15)."""


@dataclass(frozen=True)
class PnpOptions:
    """How robustly to solve, and what to refuse. ValueError names an option out of range."""

    inlier_level: float = field(
        default=0.999,
        metadata={"help": "Probability with which a good keypoint passes the test against the others (chi-square, 2)."},
    )
    min_inliers: int = field(default=4, metadata={"help": "Fewest keypoints that may carry a pose."})
    min_inlier_fraction: float = field(
        default=1 / 3, metadata={"help": "Least share of the usable keypoints that must agree on the pose."}
    )
    quick_inlier_fraction: float = field(
        default=0.7, metadata={"help": "Share that must agree with the first pose to skip the search over subsets."}
    )
    gate_p_value: float = field(
        default=1e-4, metadata={"help": "A pose whose residuals are less probable than this is refused; 0 never does."}
    )
    max_subsets: int = field(default=256, metadata={"help": "Most minimal subsets tried in the search."})
    max_iterations: int = field(default=30, metadata={"help": "Most Levenberg-Marquardt steps in one refinement."})
    max_rounds: int = field(default=3, metadata={"help": "Most changes of the set of inliers in one refinement."})
    max_condition: float = field(
        default=1e10,
        metadata={"help": "Largest condition number of the information matrix, scaled to a unit diagonal."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random subsets; same input, same answer."})

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("inlier_level", "min_inlier_fraction", "quick_inlier_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: is {getattr(self, name)}, but a number in 0..1 is needed.")
        if self.inlier_level == 1:
            raise ValueError("inlier_level: is 1, which would make every keypoint an inlier.")
        if self.min_inliers < 4:
            raise ValueError(f"min_inliers: is {self.min_inliers}, but fewer than 4 keypoints do not check each other.")
        if not 0 <= self.gate_p_value < 1:
            raise ValueError(f"gate_p_value: is {self.gate_p_value}, but 0 <= p < 1 is needed.")
        for name in ("max_subsets", "max_iterations", "max_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: is {getattr(self, name)}, but at least 1 is needed.")
        if not self.max_condition > 1 or self.seed < 0:
            raise ValueError(f"max_condition, seed: {self.max_condition}, {self.seed} are out of range.")


@dataclass(frozen=True, eq=False)
class PnpSolution:
    """A pose and how sure it is.

    T_camera_object: m, optical frame. cov: [6, 6] = (J^T Sigma^-1 J)^-1, Cov(delta) in the tangent of ``Pose``.
    inliers: [K] bool, of the keypoints given. chi2, dof: of the inliers' whitened residuals, 2 * inliers - 6.
    iterations: refinement steps that led here.
    ambiguity: likelihood of the second-best pose over that of this one, 0 (none) to 1 (cannot be told apart). The
    covariance describes the neighbourhood of this pose only. second: that pose, where it was found.
    """

    T_camera_object: Pose
    cov: FloatArray
    inliers: BoolArray
    chi2: float
    dof: int
    iterations: int
    ambiguity: float = 0.0
    second: Pose | None = None

    def __post_init__(self) -> None:
        """Check and freeze the arrays."""
        object.__setattr__(self, "cov", frozen_array(self.cov, (6, 6), "cov"))
        object.__setattr__(self, "inliers", frozen_array(self.inliers, (None,), "inliers", bool))


def solve_pnp(
    keypoints_3d: npt.ArrayLike,
    keypoints: Keypoints,
    camera: Camera,
    options: PnpOptions | None = None,
    initial: Pose | None = None,
) -> PnpSolution | Rejection:
    """Return the pose of an object from its keypoints in the image, or why there is none.

    keypoints_3d: [K, 3] m, in the object's frame. keypoints: in full-image pixels, distorted as the camera distorts;
    those that are not finite or whose own covariance is not positive definite are left out. initial: a pose near the
    answer (tracking); it is tried first and costs nothing when it is wrong.
    Data never raise; ValueError when the numbers of keypoints differ.
    """
    options = options or PnpOptions()
    points = frozen_array(keypoints_3d, (len(keypoints), 3), "keypoints_3d")
    usable = _usable(keypoints)
    count = int(np.count_nonzero(usable))
    if count < options.min_inliers:
        detail = f"{count} of {len(keypoints)} keypoints are usable, but {options.min_inliers} are needed."
        return Rejection(RejectReason.TOO_FEW_KEYPOINTS, detail, keypoints=keypoints)
    rows = np.repeat(usable, 2)
    problem = PnpProblem(points[usable], keypoints.xy[usable], keypoints.cov[np.ix_(rows, rows)], camera)
    try:
        np.linalg.cholesky(problem.cov)
    except np.linalg.LinAlgError:
        detail = "the covariance of the keypoints is not positive definite."
        return Rejection(RejectReason.INVALID_KEYPOINTS, detail, keypoints=keypoints)
    size = extents(problem.points)
    if size[1] <= COLLINEAR * size[0]:
        detail = f"the {count} usable keypoints lie on one line, which fixes no rotation about it."
        return Rejection(RejectReason.DEGENERATE, detail, keypoints=keypoints)
    search = _Search(problem, options, planar=bool(size[2] < PLANAR * size[0]))
    outcome = search.run(initial)
    if isinstance(outcome, Rejection):
        return Rejection(outcome.reason, outcome.detail, keypoints=keypoints)
    return _answer(problem, outcome, search.iterations, usable, points, keypoints, options)


def _usable(keypoints: Keypoints) -> BoolArray:
    """Return [K], which keypoints are finite with a finite, positive definite block and finite correlations."""
    blocks = keypoints.blocks()
    with np.errstate(invalid="ignore", over="ignore"):
        a, b, d = blocks[:, 0, 0], blocks[:, 0, 1], blocks[:, 1, 1]
        good = np.isfinite(keypoints.xy).all(axis=1) & np.isfinite(blocks).all(axis=(1, 2))
        good &= (a > 0) & (d > 0) & (a * d - b * b > 1e-12 * a * d)
    index = np.flatnonzero(good)
    finite = np.isfinite(keypoints.cov.reshape(len(keypoints), 2, len(keypoints), 2))
    pairs: BoolArray = np.asarray(finite.all(axis=(1, 3)))
    good[index] = pairs[np.ix_(index, index)].all(axis=1)
    return np.asarray(good)


class _Search:
    """The search for the pose that most keypoints agree on, from the cheapest guess to the most thorough."""

    def __init__(self, problem: PnpProblem, options: PnpOptions, planar: bool) -> None:
        """Prepare the weights of single keypoints."""
        self._problem, self._options, self._planar = problem, options, planar
        count = len(problem)
        index = np.arange(count)
        blocks = problem.cov.reshape(count, 2, count, 2)[index, :, index, :]
        self._information: FloatArray = np.asarray(np.linalg.inv(blocks), dtype=np.float64)
        self._limit = chi2_quantile(options.inlier_level, 2)
        # A pose from three noisy pixels is off by several of their sigmas elsewhere.
        self._wide = 4 * self._limit
        self.iterations = 0

    def run(self, initial: Pose | None) -> Fit | Rejection:
        """Return the best fit, or why there is none."""
        own = Hypotheses(np.zeros((0, 3, 3)), np.zeros((0, 3)))
        if initial is not None:
            own = Hypotheses(initial.rotation[None], initial.translation[None])
            fit = self._best_of(own, 1, subset=False)
            if fit is not None and self._convincing(fit):
                return fit
        ideal = self._problem.camera.undistort(self._problem.xy)
        seen = np.isfinite(ideal).all(axis=1)
        points, ideal = self._problem.points[seen], np.ascontiguousarray(ideal[seen])
        if len(points) < 4:
            detail = f"{len(points)} keypoints lie where the lens model of the camera reaches, but 4 are needed."
            return Rejection(RejectReason.TOO_FEW_KEYPOINTS, detail)
        matrix = self._problem.camera.matrix
        hypotheses = from_all_points(points, ideal, matrix, self._planar).joined(own)
        best = self._best_of(hypotheses, 2, subset=False)
        # Few keypoints leave several minima, and SQPnP sees but one of them: then the subsets speak too.
        if best is not None and len(points) > 5 and self._convincing(best):
            return best
        return self._decided(hypotheses.joined(self._subsets(points, ideal)), best)

    def _subsets(self, points: FloatArray, ideal: FloatArray) -> Hypotheses:
        """Return poses of minimal subsets, until enough were tried for the inliers seen so far."""
        found = Hypotheses(np.zeros((0, 3, 3)), np.zeros((0, 3)))
        tried = most = 0
        for subsets in subset_batches(len(points), self._options.max_subsets, self._options.seed):
            new = from_subsets(points, ideal, self._problem.camera.matrix, subsets)
            found = found.joined(new)
            tried += len(subsets)
            if len(new):
                most = max(most, int((self._distances(new) <= self._wide).sum(axis=1).max()))
            if enough(tried, min(most, len(points)), len(points)):
                break
        return found

    def _distances(self, hypotheses: Hypotheses) -> FloatArray:
        return squared_distances(self._problem, hypotheses, self._information)

    def _decided(self, hypotheses: Hypotheses, best: Fit | None) -> Fit | Rejection:
        """Refine the most promising hypotheses and return the best of all."""
        if not len(hypotheses):
            detail = "no solver found a pose; the keypoints may be collinear or coincide."
            return Rejection(RejectReason.NO_CONVERGENCE, detail)
        other = self._best_of(hypotheses, 6, subset=True)
        fits = [fit for fit in (best, other) if fit is not None]
        if fits:
            return min(fits, key=self._score)
        if not np.isfinite(self._distances(hypotheses)).any():
            detail = "every pose that fits the keypoints has some of them behind the camera."
            return Rejection(RejectReason.BEHIND_CAMERA, detail)
        detail = f"no pose was found on which {self._options.min_inliers} of {len(self._problem)} keypoints agree."
        return Rejection(RejectReason.TOO_FEW_KEYPOINTS, detail)

    def _best_of(self, hypotheses: Hypotheses, most: int, subset: bool) -> Fit | None:
        """Return the best refinement of the cheapest ``most`` hypotheses.

        A hypothesis from a subset is refined on the keypoints near it. One from all keypoints, or from the last
        frame, may be off for all of them alike: there only those far beyond the median are left out at first.
        """
        best: Fit | None = None
        distances = self._distances(hypotheses)
        costs = np.minimum(distances, self._wide).sum(axis=1)
        for index in np.argsort(costs, kind="stable")[:most]:
            limit = self._wide
            if not subset:
                limit = max(limit, 9 * float(np.median(distances[index])))
            near = (distances[index] <= limit) & np.isfinite(distances[index])
            if np.count_nonzero(near) < self._options.min_inliers:
                continue
            fit = self._refined(hypotheses.rotations[index], hypotheses.translations[index], near)
            if fit is not None and (best is None or self._score(fit) < self._score(best)):
                best = fit
        return best

    def _score(self, fit: Fit) -> tuple[int, float]:
        """Return what is least for the best fit: chi2, with each keypoint left out at the limit of the test."""
        left_out = len(fit.inliers) - int(np.count_nonzero(fit.inliers))
        return (0 if fit.converged else 1, fit.chi2 + self._limit * left_out)

    def _refined(self, rotation: FloatArray, translation: FloatArray, inliers: BoolArray) -> Fit | None:
        fit = refine_with_inliers(
            self._problem,
            rotation,
            translation,
            inliers,
            limit=self._limit,
            min_inliers=self._options.min_inliers,
            rounds=self._options.max_rounds,
            max_iterations=self._options.max_iterations,
        )
        self.iterations += 0 if fit is None else fit.iterations
        return fit

    def _convincing(self, fit: Fit) -> bool:
        """Return whether so many keypoints agree so well that no other pose can be better."""
        share = np.count_nonzero(fit.inliers) / len(fit.inliers)
        return fit.converged and share >= self._options.quick_inlier_fraction and _passes_gate(fit, self._options)


def _passes_gate(fit: Fit, options: PnpOptions) -> bool:
    return options.gate_p_value == 0 or fit.chi2 <= chi2_quantile(1 - options.gate_p_value, fit.dof)


def _answer(
    problem: PnpProblem,
    fit: Fit,
    iterations: int,
    usable: BoolArray,
    points: FloatArray,
    keypoints: Keypoints,
    options: PnpOptions,
) -> PnpSolution | Rejection:
    """Return the solution of a fit, or why it is refused."""
    second, ambiguity = _second_minimum(problem, fit, options)
    if second is not None and second.chi2 < fit.chi2:
        fit, second = second, fit
    count, of = int(np.count_nonzero(fit.inliers)), len(problem)

    def refused(reason: RejectReason, detail: str) -> Rejection:
        return Rejection(reason, detail, keypoints=keypoints)

    if count < max(options.min_inliers, math.ceil(options.min_inlier_fraction * of - 1e-9)):
        return refused(RejectReason.TOO_FEW_KEYPOINTS, f"only {count} of {of} keypoints agree on a pose.")
    cov = _covariance(fit.information(), options.max_condition)
    if cov is None:
        return refused(RejectReason.DEGENERATE, f"the {count} agreeing keypoints do not determine all of the pose.")
    turn, shift = math.sqrt(np.trace(cov[3:, 3:])), math.sqrt(np.trace(cov[:3, :3]))
    if turn > MAX_TURN_SIGMA or shift > float(np.linalg.norm(fit.translation)):
        detail = (
            f"the pose is only known to {turn:.2g} rad and {shift:.2g} m, too loosely for a covariance to describe."
        )
        return refused(RejectReason.DEGENERATE, detail)
    if not fit.converged:
        return refused(RejectReason.NO_CONVERGENCE, f"the refinement did not settle in {fit.iterations} steps.")
    if not _passes_gate(fit, options):
        p_value = float(chi2_tail(fit.chi2, fit.dof))
        detail = f"chi2 is {fit.chi2:.1f} for {fit.dof} degrees of freedom (p = {p_value:.1e}, {count} keypoints)."
        return refused(RejectReason.INCONSISTENT, detail)
    if (points @ fit.rotation[2] + fit.translation[2] <= 0).any():
        return refused(RejectReason.BEHIND_CAMERA, "part of the object would be behind the camera.")
    inliers = np.zeros(len(keypoints), dtype=bool)
    inliers[usable] = fit.inliers
    other = None if second is None else _pose(second)
    return PnpSolution(_pose(fit), cov, inliers, fit.chi2, fit.dof, iterations, ambiguity, other)


def _pose(fit: Fit) -> Pose:
    # Many products of rotations drift off by rounding; far less than Pose would refuse, unless the start was poor.
    return Pose(nearest_rotation(fit.rotation), fit.translation)


def _covariance(information: FloatArray, max_condition: float) -> FloatArray | None:
    """Return the inverse of an information matrix, or None when it is too ill-conditioned to have one."""
    diagonal = np.diag(information)
    if not (np.isfinite(information).all() and (diagonal > 0).all()):
        return None
    scale = 1 / np.sqrt(diagonal)
    values, vectors = np.linalg.eigh(scale[:, None] * information * scale)
    if values[0] <= 0 or values[-1] > max_condition * values[0]:
        return None
    half = scale[:, None] * vectors / np.sqrt(values)
    return np.asarray(half @ half.T)


def _second_minimum(problem: PnpProblem, fit: Fit, options: PnpOptions) -> tuple[Fit | None, float]:
    """Return the fit with mirrored depth and its likelihood relative to the better of both; (None, 0) if there is none.

    Planar sets, and any set from far away, have two minima (Schweighofer and Pinz 2006).
    """
    R, t = mirrored(problem.points, fit.rotation, fit.translation)
    xy, _ = projection_jacobian(problem.points[fit.inliers], R, t, problem.camera)
    start = fit.whitener @ (problem.xy[fit.inliers] - xy).ravel()
    # A start this poor (or NaN) never ends in a minimum that competes.
    if not float(start @ start) < fit.chi2 + 200 * len(start):
        return None, 0.0
    # Where there is a second minimum, the mirrored pose starts beside it and a few steps come near its bottom. Any
    # other start wanders back to the first minimum in many steps, which take longer than all the rest of the solution.
    second = refine(problem, R, t, fit.inliers, min(SECOND_STEPS, options.max_iterations), fit.whitener)
    if second is None or second.chi2 > fit.chi2 + SECOND_HOPELESS or _same_minimum(second, fit, 3.0):
        return None, 0.0
    if not second.converged:
        R, t = second.rotation, second.translation
        second = refine(problem, R, t, fit.inliers, options.max_iterations, fit.whitener)
    if second is None or not second.converged or _same_minimum(second, fit, 1.0):
        return None, 0.0
    return second, math.exp(-0.5 * abs(second.chi2 - fit.chi2))


def _same_minimum(second: Fit, fit: Fit, sigmas: float) -> bool:
    """Return whether a fit lies within so many standard deviations of another, by the other's covariance."""
    turn = log_so3(second.rotation @ fit.rotation.T)
    delta = np.concatenate([second.translation - fit.translation, turn])
    return float(delta @ fit.information() @ delta) < sigmas**2
