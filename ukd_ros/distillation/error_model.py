# SPDX-License-Identifier: Apache-2.0
"""Fitting how keypoint errors are shared: block factor, vote correlation and the common modes.

The model (design, section 4) is Gaussian: an instance's 2K keypoint errors e have the covariance

    C = blkdiag(c_k S_k) + s^2 B diag(modes) B^T,    c_k = block_factor (rho + (1 - rho) / N_k)

with S_k the typical vote's block, N_k the effective votes, s^2 the mean predicted variance and B the common modes.
All inner products <x, y> = x^T C^-1 y follow from sums over keypoints of S_k^-1-weighted 2x2 products, which do not
depend on the parameters and are computed once; C^-1 is then a rank-4 correction (Woodbury). No 2K x 2K matrix is built.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, special

from ukd_ros.geometry.arrays import BoolArray, FloatArray, frozen_array
from ukd_ros.geometry.chi_square import chi2_quantile
from ukd_ros.geometry.metrics import coverage, nees
from ukd_ros.perception.votes import MODES, Calibration, common_modes

TRIM_LEVEL = 0.999
"""An error outside the ellipsoid that holds this share under the current fit is a gross one and does not count."""

CAP_LEVEL = 0.99
"""From this quantile on, an error's influence on the pose-level fit grows with its logarithm only."""

PARTS: dict[str, slice] = {"pose": slice(0, 6), "xy": slice(0, 2), "z": slice(2, 3), "rotation": slice(3, 6)}
"""Parts of the pose error (x y z rotX rotY rotZ) whose coverage is promised."""

_MAX_TRIM_ROUNDS = 30
_LOG_MODE_RANGE = (-14.0, 8.0)
_TINY_MODE = 1e-3


@dataclass(frozen=True, eq=False)
class ErrorSamples:
    """Keypoint errors of n instances with everything that the model of their covariance needs. Pixels of the image.

    error: [n, 2K] px, predicted minus true. mean_blocks [n, K, 2, 2] px^2, effective_votes [n, K]: see VoteInstance.
    xy: [n, K, 2] px, predicted. jacobian: [n, 2K, 6] px per (m, rad), of the projections with respect to the pose's
    delta, at the true pose. view: [n], number of the view each comes from, in the data set's order.
    ValueError names the field of a wrong shape.
    """

    error: FloatArray
    mean_blocks: FloatArray
    effective_votes: FloatArray
    xy: FloatArray
    jacobian: FloatArray
    view: FloatArray

    def __post_init__(self) -> None:
        """Check and freeze the arrays."""
        n, count = len(self.xy), np.shape(self.xy)[1]
        shapes = {
            "error": (n, 2 * count),
            "mean_blocks": (n, count, 2, 2),
            "effective_votes": (n, count),
            "xy": (n, count, 2),
            "jacobian": (n, 2 * count, 6),
            "view": (n,),
        }
        for name, shape in shapes.items():
            object.__setattr__(self, name, frozen_array(getattr(self, name), shape, name))

    def __len__(self) -> int:
        """Return n."""
        return len(self.xy)

    def select(self, which: BoolArray) -> ErrorSamples:
        """Return the samples where ``which`` [n] is true."""
        fields = ("error", "mean_blocks", "effective_votes", "xy", "jacobian", "view")
        return ErrorSamples(**{name: getattr(self, name)[which] for name in fields})

    def folds(self, count: int) -> FloatArray:
        """Return [n] the fold 0..count-1 of each sample: contiguous blocks of views with equally many samples.

        Neighbouring views may resemble each other, so a fold never takes every other one.
        """
        views, inverse, weight = np.unique(self.view, return_inverse=True, return_counts=True)
        middle = np.cumsum(weight) - 0.5 * weight
        fold = np.minimum((middle * count / len(self)).astype(np.int64), count - 1)
        return np.asarray(fold[inverse].astype(np.float64))


class SharedErrors:
    """The parameter-free sums of samples, from which likelihoods and linearised pose errors are cheap."""

    def __init__(self, samples: ErrorSamples) -> None:
        """Compute the 2x2 products of errors, modes and Jacobians once."""
        n, count = len(samples), samples.xy.shape[1]
        a, b, d = (samples.mean_blocks[..., i, j] for i, j in ((0, 0), (0, 1), (1, 1)))
        det = a * d - b * b
        if not (det > 0).all():
            raise ValueError("mean_blocks: a predicted block is not positive definite.")
        self._log_det_blocks = np.log(det).sum(axis=1)
        inverse = np.stack([d, -b, -b, a], axis=-1).reshape(n, count, 2, 2) / det[..., None, None]
        modes = common_modes(samples.xy).reshape(n, count, 2, MODES)
        jacobian = samples.jacobian.reshape(n, count, 2, 6)
        stack = np.concatenate([samples.error.reshape(n, count, 2, 1), modes, jacobian], axis=-1)
        # Products of [error | modes | Jacobian] (1 + 4 + 6 columns) per keypoint.
        self._products = np.swapaxes(stack, -1, -2) @ inverse @ stack
        self._variance = 0.5 * np.trace(samples.mean_blocks, axis1=-2, axis2=-1).mean(axis=1)
        self._votes = samples.effective_votes
        self.dimension = 2 * count

    def _reduced(self, calibration: Calibration, size: int) -> tuple[FloatArray, FloatArray]:
        """Return the inner products under C^-1 [n, size, size] of the first columns, and log det C [n]."""
        rho = calibration.vote_correlation
        factor = calibration.block_factor * (rho + (1.0 - rho) / self._votes)
        products = np.einsum("nk,nkab->nab", 1.0 / factor, self._products[..., :size, :size], optimize=True)
        log_det = self._log_det_blocks + 2.0 * np.log(factor).sum(axis=1)
        if not calibration.modes.any():
            return products, log_det
        half = np.sqrt(self._variance[:, None] * calibration.modes)
        right = products[:, 1 : 1 + MODES, :] * half[:, :, None]
        middle = np.eye(MODES) + right[:, :, 1 : 1 + MODES] * half[:, None, :]
        products = products - np.swapaxes(right, 1, 2) @ np.linalg.solve(middle, right)
        return products, log_det + np.linalg.slogdet(middle)[1]

    def squares(self, calibration: Calibration) -> tuple[FloatArray, FloatArray]:
        """Return e^T C^-1 e and log det C, each [n]."""
        products, log_det = self._reduced(calibration, 1 + MODES)
        return products[:, 0, 0], log_det

    def pose_errors(self, calibration: Calibration) -> tuple[FloatArray, FloatArray]:
        """Return the pose errors [n, 6] and covariances [n, 6, 6] that weighted least squares gives, to first order.

        (J^T C^-1 J)^-1 J^T C^-1 e and (J^T C^-1 J)^-1: what PnP answers when nothing is an outlier.
        """
        products, _ = self._reduced(calibration, 1 + MODES + 6)
        information, right = products[:, 1 + MODES :, 1 + MODES :], products[:, 1 + MODES :, 0]
        # Metres and radians differ by orders of magnitude; unit diagonals keep the digits.
        scale = 1.0 / np.sqrt(np.diagonal(information, axis1=1, axis2=2))
        cov = np.linalg.inv(information * scale[:, :, None] * scale[:, None, :])
        cov = cov * scale[:, :, None] * scale[:, None, :]
        return np.einsum("nij,nj->ni", cov, right), cov


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted calibration and which samples [n] it treated as gross errors."""

    calibration: Calibration
    gross: BoolArray


def fit_likelihood(samples: ErrorSamples, with_modes: bool = True) -> Fit:
    """Fit by trimmed maximum likelihood of the keypoint errors; ``with_modes=False`` fits blocks only (modes 0).

    Starts from the blocks alone scaled by the median error, sets gross errors aside (TRIM_LEVEL under the current fit),
    and repeats until the same samples are set aside. ValueError for fewer than 20 samples.
    """
    if len(samples) < 20:
        raise ValueError(f"{len(samples)} matched instances are too few to fit a calibration; at least 20 are needed.")
    shared = SharedErrors(samples)
    square, _ = shared.squares(Calibration())
    start = float(np.median(square)) / chi2_quantile(0.5, shared.dimension)
    calibration = Calibration(block_factor=max(start, 1e-6))
    if with_modes:
        calibration = replace(calibration, modes=np.full(MODES, 0.1 * calibration.block_factor))
    limit = chi2_quantile(TRIM_LEVEL, shared.dimension)
    # The first trimming is against blocks that know nothing of common modes: only what is far out of all measure goes.
    gross = square / start > 10.0 * limit
    for _ in range(_MAX_TRIM_ROUNDS):
        calibration = _maximise(SharedErrors(samples.select(~gross)), calibration, with_modes)
        square, _ = shared.squares(calibration)
        before, gross = gross, square > limit
        if np.array_equal(before, gross):
            break
    return Fit(replace(calibration, outlier_fraction=float(gross.mean())), gross)


def _maximise(shared: SharedErrors, start: Calibration, with_modes: bool) -> Calibration:
    """Return the calibration of highest likelihood, from ``start``, on log and logit parameters."""

    def calibration_of(x: FloatArray) -> Calibration:
        modes = np.exp(x[2:]) if with_modes else np.zeros(MODES)
        return Calibration(float(np.exp(x[0])), float(special.expit(x[1])), modes)

    def cost(x: FloatArray) -> float:
        square, log_det = shared.squares(calibration_of(x))
        # A weak prior about rho = 1/2: where every instance has equally many votes, rho and the factor are one number.
        return float(0.5 * (square + log_det).mean() + 1e-4 * x[1] ** 2)

    first = [np.log(start.block_factor), special.logit(np.clip(start.vote_correlation, 0.02, 0.98))]
    bounds = [(-12.0, 12.0), (-6.0, 6.0)]
    if with_modes:
        first += list(np.log(np.maximum(start.modes, _TINY_MODE * start.block_factor)))
        bounds += [_LOG_MODE_RANGE] * MODES
    best = optimize.minimize(cost, np.array(first), method="L-BFGS-B", bounds=bounds, options={"maxiter": 200})
    return calibration_of(best.x)


def capped_nll(delta: FloatArray, cov: FloatArray) -> FloatArray:
    """Return [n] the negative log-likelihood (nats) of pose errors [n, 6] whose tail counts with its logarithm only.

    A Gaussian's up to the CAP_LEVEL quantile c of its square q, then c (1 + log(q / c)) in place of q: one grossly
    wrong pose cannot buy covariance for all the others.
    """
    square = np.maximum(nees(delta, cov), 1e-12)
    cap = chi2_quantile(CAP_LEVEL, 6)
    capped = np.where(square < cap, square, cap * (1.0 + np.log(square / cap)))
    log_det = np.linalg.slogdet(cov)[1]
    return np.asarray(0.5 * (capped + log_det + 6.0 * np.log(2.0 * np.pi)))


def fit_pose_level(samples: ErrorSamples, start: Calibration, with_modes: bool = True) -> Calibration:
    """Refine block factor, shift, scale and turn by the likelihood of the *pose* errors, linearised.

    Four factors (one with ``with_modes=False``) on the given calibration; shift u and v move together. The vote
    correlation stays: poses say little about it.
    """
    shared = SharedErrors(samples)
    base = np.maximum(start.modes, _TINY_MODE * start.block_factor) if with_modes else np.zeros(MODES)

    def calibration_of(x: FloatArray) -> Calibration:
        modes = base * np.exp(x[[1, 1, 2, 3]]) if with_modes else base
        return replace(start, block_factor=start.block_factor * float(np.exp(x[0])), modes=modes)

    def cost(x: FloatArray) -> float:
        delta, cov = shared.pose_errors(calibration_of(x))
        # The weak prior keeps a mode that poses hardly feel where the keypoints put it.
        return float(capped_nll(delta, cov).mean() + 1e-3 * (x**2).sum())

    x0 = np.zeros(4 if with_modes else 1)
    best = optimize.minimize(cost, x0, method="L-BFGS-B", bounds=[(-5.0, 5.0)] * len(x0), options={"maxiter": 60})
    return calibration_of(best.x)


def scaled_to_coverage(start: Calibration, squares: FloatArray, level: float = 0.95) -> Calibration:
    """Scale the whole covariance so that ``level`` of poses lie inside their ellipsoid, given their NEES [n] under it.

    A common factor changes no weight between keypoints, only how sure the pose is. ValueError when no pose was solved.
    """
    if len(squares) == 0:
        raise ValueError(
            "all poses that were solved are in one part of the views, and the others cannot tell how sure they may be: "
            "the student finds too little to be calibrated; train it longer, or give more views."
        )
    factor = float(np.quantile(squares, level)) / chi2_quantile(level, 6)
    return replace(start, block_factor=start.block_factor * factor, modes=start.modes * factor)


@dataclass(frozen=True)
class HeldOut:
    """How a way of fitting does on folds that it was not fitted on.

    nll: mean capped pose NLL, nats. miss: largest |coverage - 0.95| over pose, xy, z and rotation.
    """

    nll: float
    miss: float


def fit_every_way(samples: ErrorSamples, with_modes: bool = True) -> dict[str, Calibration]:
    """Return the calibrations that compete: by keypoint likelihood, and that refined on poses."""
    fit = fit_likelihood(samples, with_modes)
    return {"likelihood": fit.calibration, "pose_level": fit_pose_level(samples, fit.calibration, with_modes)}


def choose(scores: dict[str, HeldOut], tolerance: float = 0.01, dearest: float = 1.5) -> str:
    """Return the way with the lowest held-out NLL among those whose coverage misses by at most 1 % more than the best.

    Coverage is the promise; the likelihood, which inflation cannot win, decides between those that keep it. It also
    has a veto: a way whose NLL is more than ``dearest`` nats above the best is out, because it buys coverage of a few
    gross errors by making all other poses useless (1.5 nats: all standard deviations almost doubled).
    """
    best_nll = min(score.nll for score in scores.values())
    sharp = {name: score for name, score in scores.items() if score.nll <= best_nll + dearest}
    least = min(score.miss for score in sharp.values())
    kept = {name: score for name, score in sharp.items() if score.miss <= least + tolerance}
    return min(kept, key=lambda name: kept[name].nll)


def held_out(samples: ErrorSamples, calibrations: list[Calibration], fold: FloatArray) -> HeldOut:
    """Score one calibration per fold on the linearised poses of that fold (it was fitted on all the others)."""
    nlls, misses = [], []
    squares: dict[str, list[FloatArray]] = {part: [] for part in PARTS}
    for index, calibration in enumerate(calibrations):
        delta, cov = SharedErrors(samples.select(fold == index)).pose_errors(calibration)
        nlls.append(capped_nll(delta, cov))
        for part, where in PARTS.items():
            squares[part].append(nees(delta[:, where], cov[:, where, where]))
    for part, where in PARTS.items():
        share = coverage(np.concatenate(squares[part]), where.stop - where.start, 0.95)
        misses.append(abs(share - 0.95))
    return HeldOut(float(np.concatenate(nlls).mean()), max(misses))


@dataclass(frozen=True, eq=False)
class CrossFit:
    """A calibration with its honest twins.

    calibration: fitted on all samples, in the way that did best on held-out folds. way: its name. scores: of every way.
    fold: [n], and by_fold: the calibrations, each fitted without its fold: what to judge each sample by.
    """

    calibration: Calibration
    way: str
    scores: dict[str, HeldOut]
    fold: FloatArray
    by_fold: tuple[Calibration, ...]


def cross_fit(samples: ErrorSamples, folds: int = 4, with_modes: bool = True) -> CrossFit:
    """Fit every way on all folds but one, each in turn, choose the best way, and fit it on everything.

    ValueError when there are too few samples.
    """
    fold = samples.folds(folds)
    fits = [fit_every_way(samples.select(fold != index), with_modes) for index in range(folds)]
    scores = {way: held_out(samples, [fit[way] for fit in fits], fold) for way in fits[0]}
    way = choose(scores)
    return CrossFit(fit_every_way(samples, with_modes)[way], way, scores, fold, tuple(fit[way] for fit in fits))


def cover(fit: CrossFit, squares: FloatArray, fold: FloatArray) -> CrossFit:
    """Return the fit scaled to nominal coverage of solved poses: their NEES [m] under ``fit`` and their folds [m].

    Every fold's factor comes from the other folds, so each pose is still judged by what has not seen it.
    """
    by_fold = tuple(
        scaled_to_coverage(calibration, squares[fold != index]) for index, calibration in enumerate(fit.by_fold)
    )
    return replace(fit, calibration=scaled_to_coverage(fit.calibration, squares), by_fold=by_fold)
