# SPDX-License-Identifier: Apache-2.0
"""The error model: its algebra against dense matrices, and its fit against errors drawn from known parameters."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from ukd_ros.distillation.error_model import (
    CrossFit,
    ErrorSamples,
    HeldOut,
    SharedErrors,
    choose,
    cover,
    cross_fit,
    fit_likelihood,
    fit_pose_level,
    held_out,
    scaled_to_coverage,
)
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.metrics import coverage, nees
from ukd_ros.geometry.pose import exp_so3, skew
from ukd_ros.perception.votes import Calibration, joint_covariance

Array = npt.NDArray[np.float64]

CAMERA = Camera(640, 480, np.array([[600.0, 0.0, 319.5], [0.0, 600.0, 239.5], [0.0, 0.0, 1.0]]))
TRUTH = Calibration(1.6, 0.35, np.array([0.5, 0.3, 0.8, 0.15]))


def draw(n: int, truth: Calibration, rng: np.random.Generator, keypoints: int = 9) -> ErrorSamples:
    """Draw errors from the model for random objects, poses, predicted blocks and numbers of votes."""
    parts: dict[str, list[Array]] = {name: [] for name in ("error", "blocks", "votes", "xy", "jacobian")}
    points = rng.uniform(-0.07, 0.07, (keypoints, 3))
    for _ in range(n):
        rotated = points @ exp_so3(rng.normal(0.0, 1.0, 3)).T
        translation = np.array([*rng.uniform(-0.2, 0.2, 2), rng.uniform(0.5, 1.2)])
        xy, by_point = CAMERA.project_with_jacobian(rotated + translation)
        factor = rng.normal(0.0, 0.3, (keypoints, 2, 2)) + np.eye(2)
        blocks = rng.uniform(0.5, 3.0) * factor @ np.swapaxes(factor, 1, 2)
        votes = np.clip(rng.uniform(1.0, 25.0) * rng.uniform(0.7, 1.0, keypoints), 1.0, None)
        error = rng.multivariate_normal(np.zeros(2 * keypoints), joint_covariance(xy, blocks, votes, truth))
        parts["jacobian"].append(np.concatenate([by_point, by_point @ -skew(rotated)], axis=2).reshape(-1, 6))
        for name, value in (("error", error), ("blocks", blocks), ("votes", votes), ("xy", xy)):
            parts[name].append(value)
    arrays = {name: np.array(values) for name, values in parts.items()}
    return ErrorSamples(
        arrays["error"],
        arrays["blocks"],
        arrays["votes"],
        arrays["xy"],
        arrays["jacobian"],
        np.arange(n, dtype=np.float64) // 2.0,
    )


def test_the_rank_four_algebra_is_the_dense_one() -> None:
    samples = draw(12, TRUTH, np.random.default_rng(0))
    shared = SharedErrors(samples)
    square, log_det = shared.squares(TRUTH)
    delta, cov = shared.pose_errors(TRUTH)
    for i in range(len(samples)):
        C = joint_covariance(samples.xy[i], samples.mean_blocks[i], samples.effective_votes[i], TRUTH)
        e, J = samples.error[i], samples.jacobian[i]
        assert square[i] == pytest.approx(e @ np.linalg.solve(C, e), rel=1e-8)
        assert log_det[i] == pytest.approx(np.linalg.slogdet(C)[1], rel=1e-8)
        dense = np.linalg.inv(J.T @ np.linalg.solve(C, J))
        np.testing.assert_allclose(cov[i], dense, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(delta[i], dense @ J.T @ np.linalg.solve(C, e), rtol=1e-6, atol=1e-12)


def test_the_fit_recovers_what_the_errors_were_drawn_from() -> None:
    fit = fit_likelihood(draw(1200, TRUTH, np.random.default_rng(1)))
    assert fit.calibration.block_factor == pytest.approx(TRUTH.block_factor, rel=0.12)
    assert fit.calibration.vote_correlation == pytest.approx(TRUTH.vote_correlation, abs=0.06)
    np.testing.assert_allclose(fit.calibration.modes, TRUTH.modes, rtol=0.25)
    assert fit.calibration.outlier_fraction < 0.006  # 0.001 by construction


def test_pose_coverage_is_nominal_with_modes_and_is_not_without() -> None:
    """Held-out draws: the joint covariance covers 95 % of every part; the best block-diagonal one does not."""
    rng = np.random.default_rng(2)
    train, test = draw(1000, TRUTH, rng), draw(2000, TRUTH, rng)
    band = 4.0 * np.sqrt(0.95 * 0.05 / len(test)) + 0.01

    def shares(calibration: Calibration) -> dict[str, float]:
        delta, cov = SharedErrors(test).pose_errors(calibration)
        parts = {"pose": slice(0, 6), "xy": slice(0, 2), "z": slice(2, 3), "rotation": slice(3, 6)}
        return {n: coverage(nees(delta[:, w], cov[:, w, w]), w.stop - w.start, 0.95) for n, w in parts.items()}

    joint = fit_likelihood(train).calibration
    for name, share in shares(joint).items():
        assert abs(share - 0.95) < band, name
    blocks = fit_likelihood(train, with_modes=False).calibration
    assert blocks.modes.max() == 0.0
    assert shares(blocks)["pose"] < 0.90 and shares(blocks)["xy"] < 0.85
    # And no single factor repairs it: scaled to cover the pose, some part is still off.
    delta, cov = SharedErrors(train).pose_errors(blocks)
    scaled = shares(scaled_to_coverage(blocks, nees(delta, cov)))
    assert abs(scaled["pose"] - 0.95) < band
    assert max(abs(share - 0.95) for share in scaled.values()) > 0.03
    delta, cov = SharedErrors(test).pose_errors(joint)
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], 6 * len(test)) / len(test)
    assert 0.97 * low < nees(delta, cov).mean() < 1.03 * high


def test_gross_errors_do_not_inflate_the_fit() -> None:
    rng = np.random.default_rng(3)
    clean = draw(600, TRUTH, rng)
    error = clean.error.copy()
    error[::20] += rng.normal(0.0, 60.0, error[::20].shape)
    spoiled = ErrorSamples(error, clean.mean_blocks, clean.effective_votes, clean.xy, clean.jacobian, clean.view)
    fit = fit_likelihood(spoiled)
    assert fit.gross[::20].all() and fit.gross.mean() < 0.06
    assert fit.calibration.block_factor == pytest.approx(fit_likelihood(clean).calibration.block_factor, rel=0.05)


def test_the_pose_level_fit_repairs_a_wrong_start() -> None:
    """From modes that are ten times too small and blocks twice too large, poses lead back to nominal coverage."""
    rng = np.random.default_rng(4)
    train, test = draw(800, TRUTH, rng), draw(1500, TRUTH, rng)
    wrong = Calibration(2.0 * TRUTH.block_factor, TRUTH.vote_correlation, 0.1 * TRUTH.modes)
    refined = fit_pose_level(train, wrong)
    before = held_out(test, [wrong], np.zeros(len(test)))
    after = held_out(test, [refined], np.zeros(len(test)))
    best = held_out(test, [TRUTH], np.zeros(len(test)))
    assert before.miss > 0.04 and before.nll > best.nll + 0.05
    assert after.miss < 0.025 and after.nll < best.nll + 0.02


def test_folds_are_blocks_of_views() -> None:
    samples = draw(40, TRUTH, np.random.default_rng(5))
    fold = samples.folds(4)
    assert (np.diff(fold) >= 0).all() and set(fold) == {0.0, 1.0, 2.0, 3.0}
    for view in np.unique(samples.view):
        assert len(np.unique(fold[samples.view == view])) == 1
    assert len(samples.select(fold == 1.0)) == 10


def test_coverage_comes_first_and_likelihood_decides() -> None:
    scores = {"inflated": HeldOut(-5.0, 0.012), "sharp": HeldOut(-6.0, 0.015), "overconfident": HeldOut(-7.0, 0.08)}
    assert choose(scores) == "sharp"
    assert choose({"plain": HeldOut(-6.0, 0.10), "inflated": HeldOut(-5.2, 0.005)}) == "inflated"
    assert choose({"plain": HeldOut(-6.0, 0.10), "absurd": HeldOut(-3.0, 0.005)}) == "plain"  # coverage at any price


def test_heavy_tails_are_covered_after_scaling() -> None:
    """Instances that are worse than the network knows (Student-like scale mixture): likelihood alone undercovers."""
    rng = np.random.default_rng(7)
    samples = draw(700, TRUTH, rng)
    scale = np.sqrt(6.0 / rng.chisquare(6.0, len(samples)))
    heavy = ErrorSamples(
        samples.error * scale[:, None],
        samples.mean_blocks,
        samples.effective_votes,
        samples.xy,
        samples.jacobian,
        samples.view,
    )
    fit = cross_fit(heavy, folds=2)

    def out_of_fold(fit: CrossFit) -> Array:
        squares = np.empty(len(heavy))
        for index, calibration in enumerate(fit.by_fold):
            mine = fit.fold == index
            squares[mine] = nees(*SharedErrors(heavy.select(mine)).pose_errors(calibration))
        return squares

    before = out_of_fold(fit)
    after = out_of_fold(cover(fit, before, fit.fold))
    assert coverage(before, 6, 0.95) < 0.93
    assert coverage(after, 6, 0.95) == pytest.approx(0.95, abs=0.02)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        fit_likelihood(draw(5, TRUTH, np.random.default_rng(6)))


def test_poses_in_one_fold_alone_are_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="too little to be calibrated"):
        scaled_to_coverage(Calibration(), np.zeros(0))
