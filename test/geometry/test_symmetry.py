# SPDX-License-Identifier: Apache-2.0
"""Equal-looking poses get equal names, turns that nobody sees are unknown, and a still thing stays still."""

from __future__ import annotations

import numpy as np
import pytest

from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.object_model import Symmetries
from ukd_ros.geometry.pose import Pose, exp_so3
from ukd_ros.geometry.symmetry import (
    FREE_TURN_VARIANCE,
    canonical,
    covariance_at,
    free_turns,
    nearest,
    with_free_turns,
)

HALF = Pose(np.diag([-1.0, -1.0, 1.0]), np.array([0.004, -0.002, 0.0]))
AXIS = np.array([0.2, -0.1, 1.0]) / np.linalg.norm([0.2, -0.1, 1.0])
OFFSET = np.array([0.01, 0.02, 0.0])
BOX = Symmetries(discrete=(HALF,))
CYLINDER = Symmetries(continuous=((AXIS, OFFSET),))
CAN = Symmetries(
    discrete=(Pose(np.diag([1.0, -1.0, -1.0]), np.zeros(3)),), continuous=((np.array([0, 0, 1.0]), np.zeros(3)),)
)


def turn(axis: FloatArray, offset: FloatArray, angle: float) -> Pose:
    R = exp_so3(axis * angle)
    return Pose(R, offset - R @ offset)


def some_pose(rng: np.random.Generator) -> Pose:
    return Pose(exp_so3(rng.normal(0, 1.5, 3)), np.array([*rng.normal(0, 0.1, 2), rng.uniform(0.4, 1.0)]))


def angle_between(a: Pose, b: Pose) -> float:
    return float(np.arccos(np.clip((np.sum(a.rotation * b.rotation) - 1) / 2, -1, 1)))


@pytest.mark.parametrize("symmetries", [BOX, CYLINDER, CAN], ids=["half turn", "axis", "axis and flip"])
def test_all_that_look_alike_have_one_canonical_pose(symmetries: Symmetries, rng: np.random.Generator) -> None:
    for _ in range(40):
        pose = some_pose(rng)
        chosen = canonical(pose, symmetries)
        member = pose
        for motion in symmetries.discrete:
            if rng.random() < 0.5:
                member = member @ motion
        for axis, offset in symmetries.continuous:
            member = member @ turn(axis, offset, rng.uniform(-np.pi, np.pi))
        assert canonical(member, symmetries).minus(chosen) == pytest.approx(np.zeros(6), abs=1e-7)
        assert canonical(chosen, symmetries).minus(chosen) == pytest.approx(np.zeros(6), abs=1e-7)


def test_without_symmetry_nothing_changes(rng: np.random.Generator) -> None:
    pose = some_pose(rng)
    assert canonical(pose, Symmetries()) is pose
    assert len(free_turns(pose, Symmetries())) == 0


def test_the_nearest_equivalent_is_nearer_than_any_other(rng: np.random.Generator) -> None:
    for _ in range(20):
        pose, reference = some_pose(rng), some_pose(rng)
        best = angle_between(nearest(pose, reference, CYLINDER), reference)
        others = [angle_between(pose @ turn(AXIS, OFFSET, a), reference) for a in np.linspace(-np.pi, np.pi, 721)]
        assert best <= min(others) + 1e-9 and best >= min(others) - 0.01
        found = nearest(pose, reference, BOX)
        assert angle_between(found, reference) == pytest.approx(
            min(angle_between(pose, reference), angle_between(pose @ HALF, reference))
        )


def test_a_cylinder_seen_from_the_side_keeps_its_name_while_the_camera_moves() -> None:
    """Labels of an axis of revolution change smoothly over all views but the one from straight below."""
    upright = Symmetries(continuous=((np.array([0, 0, 1.0]), np.zeros(3)),))
    names = []
    for elevation in np.linspace(np.pi / 2, -1.2, 60):
        tilt = exp_so3(np.array([elevation + np.pi / 2, 0, 0]))
        names.append(canonical(Pose(tilt @ exp_so3(np.array([0, 0, 5 * elevation])), np.array([0, 0, 0.5])), upright))
    steps = [angle_between(a, b) for a, b in zip(names[:-1], names[1:], strict=True)]
    assert max(steps) < 0.1


def test_free_turns_leave_every_point_of_the_axis_and_the_look_alone(rng: np.random.Generator) -> None:
    for _ in range(10):
        pose = some_pose(rng)
        (direction,) = free_turns(pose, CYLINDER)
        moved = pose.retract(1e-6 * direction)
        expected = pose @ turn(AXIS, OFFSET, 1e-6)
        assert moved.minus(expected) == pytest.approx(np.zeros(6), abs=1e-10)
        on_axis = OFFSET + np.outer([-0.1, 0.0, 0.2], AXIS)
        assert np.abs(moved.transform(on_axis) - pose.transform(on_axis)).max() < 1e-10


def test_the_covariance_is_large_about_a_free_axis_only(rng: np.random.Generator) -> None:
    pose = some_pose(rng)
    cov = np.diag([1e-6] * 3 + [1e-4] * 3)
    wide = with_free_turns(cov, pose, CYLINDER)
    (direction,) = free_turns(pose, CYLINDER)
    values = np.linalg.eigvalsh(wide)
    assert values[-1] > 0.9 * FREE_TURN_VARIANCE and values[-2] < 2e-4
    assert direction @ np.linalg.solve(wide, direction) == pytest.approx(1 / FREE_TURN_VARIANCE, rel=1e-3)
    # A turn that nobody sees is no surprise, the same turn about another axis is.
    other = np.cross(direction[3:], [1.0, 0, 0])
    tilted = np.concatenate([np.zeros(3), other / np.linalg.norm(other)])
    assert tilted @ np.linalg.solve(wide, tilted) > 1e3


def test_an_equivalent_pose_has_the_covariance_of_its_own_origin(rng: np.random.Generator) -> None:
    """Monte Carlo: errors of the pose, described at the other member's origin, have the transported covariance."""
    pose = some_pose(rng)
    member = pose @ Pose(HALF.rotation, np.array([0.1, -0.05, 0.02]))
    mix = 1e-3 * rng.normal(size=(6, 6))
    cov = mix @ mix.T
    deltas = rng.multivariate_normal(np.zeros(6), cov, size=4000)
    motion = pose.inverse() @ member
    seen = np.array([(pose.retract(delta) @ motion).minus(member) for delta in deltas])
    expected = covariance_at(cov, pose, member)
    scale = np.sqrt(np.diag(expected))
    assert np.abs((seen.T @ seen / len(seen) - expected) / np.outer(scale, scale)).max() < 0.1
    assert np.abs((cov - expected) / np.outer(scale, scale)).max() > 0.2


@pytest.mark.parametrize("symmetries", [BOX, CYLINDER], ids=["half turn", "axis"])
def test_the_same_look_has_the_same_name_anywhere_in_the_image(symmetries: Symmetries) -> None:
    """Carrying the object around the camera's centre changes where it is seen, not how; nor does rolling the camera."""
    pose = Pose(exp_so3(np.array([1.9, 0.3, 0.4])), np.array([0.0, 0.0, 0.8]))
    name = canonical(pose, symmetries)
    for sideways in (-0.5, 0.2, 0.5):
        carried = Pose(exp_so3(np.array([0.0, sideways, 0.0])), np.zeros(3))
        assert canonical(carried @ pose, symmetries).minus(carried @ name) == pytest.approx(np.zeros(6), abs=1e-3)
    rolled = Pose(exp_so3(np.array([0.0, 0.0, 0.3])), np.zeros(3))
    away = Pose(pose.rotation, np.array([0.2, -0.1, 0.8]))
    near = canonical(away, symmetries)
    again = canonical(rolled @ away, symmetries)
    # the roll is part of the look, so the name follows it only as far as the nearest member does
    assert canonical(again, symmetries).minus(again) == pytest.approx(np.zeros(6), abs=1e-7)
    assert nearest(rolled @ near, again, symmetries).minus(again) == pytest.approx(np.zeros(6), abs=1e-7)


def test_an_axis_that_is_not_z_keeps_its_name_in_ordinary_views() -> None:
    """A screw along x, seen from above and a little tilted: rolling it past half a turn moves its name a little."""
    screw = Symmetries(continuous=((np.array([1.0, 0, 0]), np.zeros(3)),))
    names = []
    for roll in np.radians(np.arange(0.0, 360.0, 2.0)):
        tilted = exp_so3(np.array([0, 0, roll])) @ exp_so3(np.array([0, np.radians(3.0), 0])) @ np.diag([1.0, -1, -1])
        names.append(canonical(Pose(tilted, np.array([0, 0, 0.5])), screw))
    steps = [angle_between(a, b) for a, b in zip(names[:-1], names[1:], strict=True)]
    assert max(steps) < 0.1
