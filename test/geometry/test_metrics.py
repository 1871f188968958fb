# SPDX-License-Identifier: Apache-2.0
"""Metrics against values worked out by hand, and the statistics of errors against their own laws."""

from __future__ import annotations

import numpy as np
import pytest

from ukd_ros.geometry import metrics
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.object_model import Symmetries, box_corners
from ukd_ros.geometry.pose import Pose, exp_so3

K = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
CAMERA = Camera(640, 480, K)
HALF_TURN = exp_so3([0, 0, np.pi])
AT_1M = Pose(np.eye(3), np.array([0, 0, 1.0]))
TURNED = Pose(HALF_TURN, np.array([0, 0, 1.0]))
CROSS = np.array([[0.1, 0, 0], [-0.1, 0, 0], [0, 0.2, 0], [0, -0.2, 0]])


def test_add_of_a_shift_is_its_length_and_of_a_half_turn_the_mean_diameter() -> None:
    shifted = Pose(np.eye(3), np.array([0.03, 0.04, 1.0]))
    assert metrics.add(shifted, AT_1M, CROSS) == pytest.approx(0.05)
    assert metrics.add(TURNED, AT_1M, CROSS) == pytest.approx((2 * 0.2 + 2 * 0.4) / 4)


def test_add_s_does_not_see_a_symmetry_and_takes_the_nearest_point() -> None:
    assert metrics.add_s(TURNED, AT_1M, CROSS) == pytest.approx(0, abs=1e-12)
    # Two points 0.2 apart, shifted by 0.15 along their line: distances 0.05 (to the other's new place) and 0.15.
    pair = np.array([[0.0, 0, 0], [0.2, 0, 0]])
    shifted = Pose(np.eye(3), np.array([0.15, 0, 1.0]))
    assert metrics.add_s(shifted, AT_1M, pair) == pytest.approx((0.15 + 0.05) / 2)
    # The mean runs over the true points: the other way round the nearest ones differ.
    three = np.array([[0.0, 0, 0], [0.2, 0, 0], [0.9, 0, 0]])
    assert metrics.add_s(shifted, AT_1M, three) == pytest.approx((0.15 + 0.05 + 0.15) / 3)
    turned = Pose(exp_so3([0, 0, np.pi / 2]), np.array([0, 0, 1.0]))
    line = np.array([[0.0, 0, 0], [1.0, 0, 0], [0, 2.0, 0]])
    # True (0,0) (1,0) (0,2); found (0,0) (0,1) (-2,0): 0, sqrt(2) or 1 -> 1, 1.
    assert metrics.add_s(turned, AT_1M, line) == pytest.approx((0 + 1 + 1) / 3)


def test_add_s_in_chunks_is_brute_force() -> None:
    rng = np.random.default_rng(1)
    points = rng.normal(size=(1300, 3))
    a, b = Pose(exp_so3([0.3, 0, 0.1]), rng.normal(size=3)), Pose(exp_so3([0, 1, 0]), rng.normal(size=3))
    true, found = b.transform(points), a.transform(points)
    brute = np.mean([np.linalg.norm(found - p, axis=1).min() for p in true])
    assert metrics.add_s(a, b, points) == pytest.approx(brute, abs=1e-12)


def test_mssd_takes_the_worst_point_under_the_best_symmetry() -> None:
    shifted = Pose(HALF_TURN, np.array([0.01, 0, 1.0]))
    assert metrics.mssd(shifted, AT_1M, CROSS) == pytest.approx(0.4, abs=0.001)
    symmetries = Symmetries(discrete=(Pose(HALF_TURN, np.zeros(3)),)).poses()
    assert metrics.mssd(shifted, AT_1M, CROSS, symmetries) == pytest.approx(0.01)


def test_mssd_with_a_continuous_symmetry_is_blind_to_the_turn_up_to_a_step() -> None:
    axis = Symmetries(continuous=((np.array([0, 0, 1.0]), np.array([0.5, 0, 0])),))
    points = box_corners([[-0.1, -0.1, -0.1], [0.1, 0.1, 0.1]]) + [0.5, 0, 0]
    R = exp_so3([0, 0, 1.0])
    offset = np.array([0.5, 0, 0])
    turned = AT_1M @ Pose(R, offset - R @ offset)
    assert metrics.mssd(turned, AT_1M, points) > 0.1
    # The nearest of 360 steps is at most half a degree away, at a radius of 0.1 sqrt(2).
    assert metrics.mssd(turned, AT_1M, points, axis.poses(360)) < 0.1 * np.sqrt(2) * np.radians(0.51)
    # Steps of a radian fit exactly where the discretisation holds the turn.
    third = exp_so3([0, 0, 2 * np.pi / 3])
    exact = AT_1M @ Pose(third, offset - third @ offset)
    assert metrics.mssd(exact, AT_1M, points, axis.poses(36)) < 1e-12


def test_mspd_and_projection_error_in_pixels() -> None:
    # 0.01 m at 1 m is 5 px; the points at the same depth all move alike.
    shifted = Pose(np.eye(3), np.array([0.01, 0, 1.0]))
    assert metrics.mspd(shifted, AT_1M, CROSS, CAMERA) == pytest.approx(5)
    assert metrics.projection_error(shifted, AT_1M, CROSS, CAMERA) == pytest.approx(5)
    # From 1 m to 1.25 m: a point at radius r goes from 500 r to 400 r px; mean over 0.1 0.1 0.2 0.2 and worst 0.2.
    farther = Pose(np.eye(3), np.array([0, 0, 1.25]))
    assert metrics.projection_error(farther, AT_1M, CROSS, CAMERA) == pytest.approx(15)
    assert metrics.mspd(farther, AT_1M, CROSS, CAMERA) == pytest.approx(20)
    symmetries = Symmetries(discrete=(Pose(HALF_TURN, np.zeros(3)),)).poses()
    assert metrics.mspd(TURNED, AT_1M, CROSS, CAMERA) == pytest.approx(200)
    assert metrics.mspd(TURNED, AT_1M, CROSS, CAMERA, symmetries) == pytest.approx(0, abs=1e-9)
    behind = Pose(np.eye(3), np.array([0, 0, -1.0]))
    assert metrics.mspd(behind, AT_1M, CROSS, CAMERA) == np.inf
    assert metrics.projection_error(behind, AT_1M, CROSS, CAMERA) == np.inf


def test_rotation_and_translation_errors() -> None:
    a = Pose(exp_so3([0.2, 0.1, -0.3]), np.array([0, 0, 1]))
    for degrees in (0.0, 1e-6, 30.0, 179.999, 180.0):
        b = Pose(exp_so3(np.radians(degrees) * np.array([0.6, 0, 0.8])) @ a.rotation, np.array([0, 3, 5]))
        assert metrics.rotation_error_deg(b, a) == pytest.approx(degrees, abs=1e-9)
    assert metrics.translation_error(Pose(np.eye(3), np.array([0, 3, 5])), AT_1M) == pytest.approx(5)


def test_nees_by_hand_and_in_batches() -> None:
    assert metrics.nees([1e-3, 2e-3, 0, 0, 0, 0.1], np.diag([1e-6, 1e-6, 1, 1, 1, 1e-4])) == pytest.approx(105)
    cov = np.array([[2.0, 1.0], [1.0, 2.0]])
    # Inverse: [[2, -1], [-1, 2]] / 3.
    assert metrics.nees([[1.0, 0.0], [1.0, 1.0]], np.stack([cov, cov])) == pytest.approx(np.array([2 / 3, 2 / 3]))
    for bad in (-np.eye(2), np.ones((2, 2)), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="positive definite"):
            metrics.nees([1.0, 0.0], bad)
    with pytest.raises(ValueError, match="do not match"):
        metrics.nees([1.0, 0.0], np.eye(3))


def test_nll_is_the_gaussian_density() -> None:
    assert metrics.pose_nll([0.0, 0.0], np.eye(2)) == pytest.approx(np.log(2 * np.pi))
    assert metrics.pose_nll([2.0], [[4.0]]) == pytest.approx(0.5 + 0.5 * np.log(2 * np.pi * 4))
    # The true covariance has the least expected NLL: inflating and shrinking both lose.
    delta = np.random.default_rng(2).normal(size=(4000, 6))
    best, wide, narrow = (metrics.pose_nll(delta, np.broadcast_to(s * np.eye(6), (4000, 6, 6))) for s in (1, 1.5, 0.7))
    assert best.mean() < wide.mean() and best.mean() < narrow.mean()


def test_true_covariances_pass_and_false_ones_fail() -> None:
    rng = np.random.default_rng(3)
    A = rng.normal(size=(6, 6)) * [1e-3, 1e-3, 1e-2, 0.1, 0.1, 0.1]
    cov = A.T @ A
    delta = rng.multivariate_normal(np.zeros(6), cov, size=4000)
    square = metrics.nees(delta, np.broadcast_to(cov, (4000, 6, 6)))
    low, high = metrics.nees_band(4000, 6)
    assert low < 6 < high and low < square.mean() < high
    # Three binomial standard deviations.
    for level in (0.5, 0.95):
        assert abs(metrics.coverage(square, 6, level) - level) < 3 * np.sqrt(level * (1 - level) / 4000)
    assert metrics.expected_calibration_error(square, 6) < 0.02
    assert not low < 1.2 * square.mean() < high
    assert metrics.coverage(2 * square, 6, 0.95) < 0.8
    assert metrics.expected_calibration_error(2 * square, 6) > 0.2


def test_coverage_by_hand() -> None:
    # The 95 % quantile for 2 degrees of freedom is 5.991; NaN is outside.
    assert metrics.coverage([1, 5.9, 6.1, np.nan], 2, 0.95) == 0.5
    with pytest.raises(ValueError, match="empty"):
        metrics.coverage([], 2, 0.95)
    # Everything at zero is inside at every level: ECE is the mean of 1 - level over the bin centres.
    assert metrics.expected_calibration_error(np.zeros(5), 2, levels=10) == pytest.approx(0.5)
    # Covered at levels above 1/2 only: |0 - l| below and |1 - l| above, 1/4 on average.
    median = 2 * np.log(2)
    assert metrics.expected_calibration_error([median], 2, levels=10) == pytest.approx(0.25)


def test_nees_band_has_the_right_probability() -> None:
    rng = np.random.default_rng(4)
    means = rng.chisquare(6, size=(4000, 20)).mean(axis=1)
    low, high = metrics.nees_band(20, 6, 0.9)
    assert np.mean((means > low) & (means < high)) == pytest.approx(0.9, abs=0.015)


def test_recall_and_its_area() -> None:
    errors = [0.02, 0.05, np.inf, np.nan]
    assert metrics.recall_curve(errors, [0.02, 0.021, 0.06, 1e9]).tolist() == [0, 0.25, 0.5, 0.5]
    assert metrics.auc(errors, 0.1) == pytest.approx((0.8 + 0.5) / 4)
    thresholds = np.linspace(0, 0.1, 20_001)
    assert metrics.auc(errors, 0.1) == pytest.approx(metrics.recall_curve(errors, thresholds).mean(), abs=1e-4)
    with pytest.raises(ValueError, match="empty"):
        metrics.auc([], 0.1)


def test_score_calibration_by_hand() -> None:
    # Bin 0.9..1: scores 0.9, right half the time -> gap 0.4; bin 0.1..0.2: score 0.1, never right -> gap 0.1.
    scores, correct = [0.9, 0.9, 0.1, 0.1], [True, False, False, False]
    assert metrics.score_calibration_error(scores, correct, bins=10) == pytest.approx((2 * 0.4 + 2 * 0.1) / 4)
    assert metrics.score_calibration_error([1.0, 0.0], [True, False]) == 0
    with pytest.raises(ValueError, match="^correct"):
        metrics.score_calibration_error(scores, [True])
