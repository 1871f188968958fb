# SPDX-License-Identifier: Apache-2.0
"""Laws of rotations and poses, sampled also near the identity and near half a turn."""

from __future__ import annotations

import numpy as np
import pytest

from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.pose import (
    Pose,
    exp_so3,
    left_jacobian_so3,
    log_so3,
    nearest_rotation,
    quaternion_of,
    rotate_covariance,
    skew,
)

ANGLES = [0.0, 1e-300, 1e-160, 1e-12, 1e-8, 1e-5, 1e-3, 0.1, 0.299, 0.301, 1.0, 2.0, 3.0]
NEAR_PI = [np.pi - 1e-3, np.pi - 1e-6, np.pi - 1e-9, np.pi - 1e-12]


def axes(seed: int, count: int = 20) -> FloatArray:
    v = np.random.default_rng(seed).normal(size=(count, 3))
    v = np.concatenate([v / np.linalg.norm(v, axis=1, keepdims=True), np.eye(3), -np.eye(3)])
    return np.asarray(v)


def some_pose(rng: np.random.Generator) -> Pose:
    return Pose(exp_so3(rng.normal(size=3) * 2), rng.normal(size=3))


def near(a: Pose, b: Pose, tolerance: float = 1e-12) -> bool:
    return bool(np.abs(a.matrix() - b.matrix()).max() < tolerance)


def test_skew_is_the_cross_product() -> None:
    rng = np.random.default_rng(1)
    v, u = rng.normal(size=(2, 5, 3))
    assert np.allclose((skew(v) @ u[:, :, None])[:, :, 0], np.cross(v, u), rtol=0, atol=1e-15)


@pytest.mark.parametrize("angle", ANGLES + NEAR_PI)
def test_exp_gives_rotations_and_log_takes_them_back(angle: float) -> None:
    vectors = angle * axes(2)
    R = exp_so3(vectors)
    assert np.abs(R.transpose(0, 2, 1) @ R - np.eye(3)).max() < 5e-15
    assert np.linalg.det(R) == pytest.approx(np.ones(len(R)), abs=1e-14)
    # Relative to the angle: a small turn must keep its digits too.
    assert np.abs(log_so3(R) - vectors).max() <= 5e-15 * max(angle, 1e-290) + 4e-16 * (angle > 1)


def test_one_vector_and_many_give_the_same_rotation() -> None:
    for angle in ANGLES + NEAR_PI:
        for vector in angle * axes(3, 4):
            assert np.abs(exp_so3(vector) - exp_so3(vector[None])[0]).max() < 2e-16 * 8


def test_log_at_exactly_half_a_turn_gives_one_of_the_two_axes() -> None:
    for axis in axes(4):
        R = 2 * np.outer(axis, axis) - np.eye(3)
        found = log_so3(R)
        assert np.linalg.norm(found) == pytest.approx(np.pi, abs=1e-14)
        assert abs(found @ axis) == pytest.approx(np.pi, abs=1e-14)


def test_exp_agrees_with_the_power_series() -> None:
    v = np.array([0.3, -0.4, 0.5])
    series, term = np.eye(3), np.eye(3)
    for n in range(1, 30):
        term = term @ skew(v) / n
        series = series + term
    assert np.abs(exp_so3(v) - series).max() < 1e-15


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-3, 0.1, 0.2999, 0.3001, 1.5, 3.0])
def test_left_jacobian_by_central_differences(angle: float) -> None:
    h = 1e-6
    for axis in axes(5, 3):
        v = angle * axis
        columns = [log_so3(exp_so3(v + h * e) @ exp_so3(v - h * e).T) / (2 * h) for e in np.eye(3)]
        assert np.abs(left_jacobian_so3(v) - np.stack(columns, axis=1)).max() < 2e-9


def test_quaternion_round_trip_in_the_order_of_ros() -> None:
    quarter_about_z = Pose.from_quaternion([0, 0, np.sqrt(0.5), np.sqrt(0.5)], [1, 2, 3])
    assert quarter_about_z.transform([[1, 0, 0]]) == pytest.approx(np.array([[1, 3, 3]]), abs=1e-15)
    rng = np.random.default_rng(6)
    for _ in range(50):
        q = rng.normal(size=4)
        q /= np.linalg.norm(q)
        found = Pose.from_quaternion(q, np.zeros(3)).quaternion()
        assert found[3] >= 0
        assert np.abs(found - np.sign(q[3]) * q).max() < 1e-15
    many = exp_so3(rng.normal(size=(2, 5, 3)))
    assert quaternion_of(many).shape == (2, 5, 4)


def test_group_laws() -> None:
    rng = np.random.default_rng(7)
    for _ in range(20):
        a, b, c = (some_pose(rng) for _ in range(3))
        points = rng.normal(size=(6, 3))
        assert near((a @ b) @ c, a @ (b @ c))
        assert near(a @ a.inverse(), Pose.identity())
        assert near(a.inverse() @ a, Pose.identity())
        assert near(a @ Pose.identity(), a)
        assert np.allclose((a @ b).transform(points), a.transform(b.transform(points)), rtol=0, atol=1e-13)
        assert np.allclose(a.matrix() @ b.matrix(), (a @ b).matrix(), rtol=0, atol=1e-14)
        assert near(Pose.from_matrix(a.matrix()), a)


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-4, 0.5, 3.1])
def test_retract_and_minus_are_inverse(size: float) -> None:
    rng = np.random.default_rng(8)
    for _ in range(20):
        a = some_pose(rng)
        delta = rng.normal(size=6)
        delta[3:] *= size / np.linalg.norm(delta[3:])
        b = a.retract(delta)
        assert np.abs(b.minus(a) - delta).max() < 1e-13 + 2e-14 / (np.pi - size)
        assert near(a.retract(b.minus(a)), b, 1e-13)


def test_retract_turns_about_the_fixed_axes_and_leaves_the_position() -> None:
    a = Pose(exp_so3([0.0, 0.0, np.pi / 2]), np.array([1.0, 2.0, 3.0]))
    b = a.retract([0.0, 0.0, 0.0, np.pi / 2, 0.0, 0.0])
    assert np.array_equal(b.translation, a.translation)
    # The object's x axis points along the fixed y; a turn about the fixed x takes it to the fixed z.
    assert b.rotation[:, 0] == pytest.approx(np.array([0, 0, 1]), abs=1e-15)
    moved = a.retract([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert moved.translation == pytest.approx(np.array([1.1, 2.2, 3.3]), abs=1e-15)


def test_rotate_covariance_is_the_covariance_of_the_rotated_change() -> None:
    rng = np.random.default_rng(9)
    A = rng.normal(size=(6, 6))
    cov, R = A @ A.T, exp_so3([0.2, -1.0, 0.4])
    samples = rng.multivariate_normal(np.zeros(6), cov, size=40_000)
    turned = np.concatenate([samples[:, :3] @ R.T, samples[:, 3:] @ R.T], axis=1)
    # A change of T_a_b along a's axes, seen from a turned frame c: T_c_b = R T_a_b.
    T, small = some_pose(rng), 1e-5 * samples[0]
    C = Pose(R, np.zeros(3))
    assert (C @ T.retract(small)).minus(C @ T) == pytest.approx(1e-5 * turned[0], abs=1e-12)
    got = rotate_covariance(cov, R)
    assert np.abs(got - np.cov(turned.T)).max() < 0.05 * np.abs(cov).max()
    assert np.allclose(rotate_covariance(got, R.T), cov, rtol=0, atol=1e-12)


def test_the_constructor_repairs_rounding_and_refuses_the_rest() -> None:
    R = exp_so3([0.4, -0.2, 0.9])
    pose = Pose(R.astype(np.float32).astype(np.float64), np.array([0, 0, 1]))
    assert np.abs(pose.rotation.T @ pose.rotation - np.eye(3)).max() < 1e-15
    assert np.abs(pose.rotation - R).max() < 1e-7
    with pytest.raises(ValueError, match=r"^rotation"):
        Pose(R * (1 + 1e-5), np.array([0, 0, 1]))
    with pytest.raises(ValueError, match=r"^rotation"):
        Pose(np.diag([1.0, 1.0, -1.0]), np.array([0, 0, 1]))
    with pytest.raises(ValueError, match=r"^translation"):
        Pose(R, np.array([0, 0, np.nan]))
    with pytest.raises(ValueError, match=r"^rotation"):
        Pose(np.eye(4), np.array([0, 0, 1]))
    with pytest.raises(ValueError, match="last row"):
        Pose.from_matrix(np.ones((4, 4)))
    with pytest.raises(ValueError, match="unit quaternion"):
        Pose.from_quaternion([0, 0, 0, 0], [0, 0, 0])


def test_poses_cannot_be_changed() -> None:
    given = np.eye(3)
    pose = Pose(given, np.zeros(3))
    given[0, 0] = 7
    assert pose.rotation[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        pose.translation[0] = 1


def test_nearest_rotation_minimises_the_frobenius_distance() -> None:
    rng = np.random.default_rng(10)
    R = exp_so3(rng.normal(size=3))
    rounded = R + rng.uniform(-1e-3, 1e-3, (3, 3))
    best = nearest_rotation(rounded)
    least = np.linalg.norm(best - rounded)
    for delta in rng.normal(size=(200, 3)) * 1e-3:
        assert np.linalg.norm(exp_so3(delta) @ best - rounded) >= least
    with pytest.raises(ValueError, match="no rotation"):
        nearest_rotation(np.diag([1.0, 1.0, -1.0]))
