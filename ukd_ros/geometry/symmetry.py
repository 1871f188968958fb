# SPDX-License-Identifier: Apache-2.0
"""Poses of a symmetric object that look alike: which one to name, and what no image can tell.

An object in pose T looks as in T @ S for every motion S of its `Symmetries`. A network can only learn one label for one
look, so training takes the `canonical` pose of each such family; a consumer wants a pose that does not jump between
members, so tracking takes the one `nearest` to the last; and a turn about an axis of revolution is known to no camera,
which `free_turns` says and the covariance of an estimate then holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.object_model import Symmetries
from ukd_ros.geometry.pose import Pose, exp_so3, skew

UPRIGHT = np.diag([1.0, -1.0, -1.0])
"""Rotation of an object whose z axis points at the camera, x to the right: the view from above."""

FREE_TURN_VARIANCE = math.pi**2 / 3
"""Variance, rad^2, of an angle of which nothing is known: uniform over -pi..pi."""


def nearest(pose: Pose, reference: Pose, symmetries: Symmetries) -> Pose:
    """Return the pose that looks like ``pose`` and whose rotation is nearest to that of ``reference``.

    Exact, also for axes of revolution (the angle has a closed form). Where several are equally near (the opposite of
    the reference), the first of them.
    """
    members = [pose @ motion for motion in _listed(symmetries)]
    if not symmetries.continuous:
        return max(members, key=lambda member: _likeness(member, reference))
    turned = [_turned(member, reference, axis, offset) for member in members for axis, offset in symmetries.continuous]
    return max(turned, key=lambda member: _likeness(member, reference))


def canonical(pose: Pose, symmetries: Symmetries) -> Pose:
    """Return the one pose that stands for all that look like ``pose``: the nearest to the view from above.

    The same for every member of the family, and for every place in the image: the reference is turned with the line of
    sight, because a crop does not show where it was cut. With discrete symmetries the name must jump somewhere, and
    does so half the symmetry's angle away from the reference; with an axis of revolution it changes smoothly except
    where the axis points straight away from the camera. Of several axes only one at a time is turned about.
    """
    if not symmetries:
        return pose
    # the point that all motions leave where it is (the mean of any point's images), so that every member has one sight
    centre = np.mean([motion.translation for motion in symmetries.poses(continuous_steps=8)], axis=0)
    sight = pose.transform(centre[None])[0]
    reference = _turn_between(np.array([0.0, 0.0, 1.0]), sight) @ UPRIGHT
    if symmetries.continuous:
        # the axis itself towards the camera, whichever it is in the object's frame
        reference = reference @ _turn_between(symmetries.continuous[0][0], np.array([0.0, 0.0, 1.0]))
    return nearest(pose, Pose(reference, pose.translation), symmetries)


def free_turns(pose: Pose, symmetries: Symmetries) -> FloatArray:
    """Return the directions [n, 6] of `Pose`'s tangent in which the object in this pose can turn unseen, per radian."""
    rows = []
    for axis, offset in symmetries.continuous:
        turn = pose.rotation @ axis
        # A turn about a point q moves the origin by turn x (t - q), and q - t = R offset.
        rows.append(np.concatenate([np.cross(turn, -(pose.rotation @ offset)), turn]))
    return np.asarray(rows, dtype=np.float64).reshape(-1, 6)


def with_free_turns(cov: FloatArray, pose: Pose, symmetries: Symmetries) -> FloatArray:
    """Return a covariance [6, 6] that also says that turns about axes of revolution are unknown.

    The network names one turn out of all, by convention, so the covariance of what it named is no knowledge of the
    object's turn; the variance of a uniform angle is added along each free direction.
    """
    directions = free_turns(pose, symmetries)
    return np.asarray(cov + FREE_TURN_VARIANCE * directions.T @ directions)


def covariance_at(cov: FloatArray, pose: Pose, member: Pose) -> FloatArray:
    """Return the covariance [6, 6] of ``member``, which looks like ``pose`` and moves with it, given that of ``pose``.

    Both turn alike, but the origin of ``member`` lies elsewhere in the object: dt' = dt + dtheta x (t' - t).
    """
    lever = member.translation - pose.translation
    J = np.eye(6)
    J[:3, 3:] = -skew(lever)
    return np.asarray(J @ cov @ J.T)


def without_free_turns(cov: FloatArray, pose: Pose, symmetries: Symmetries) -> FloatArray:
    """Return the covariance without the variance that `with_free_turns` added: what the image did tell."""
    directions = free_turns(pose, symmetries)
    return np.asarray(cov - FREE_TURN_VARIANCE * directions.T @ directions)


def _turn_between(start: FloatArray, end: FloatArray) -> FloatArray:
    """Return the smallest rotation [3, 3] that takes the direction ``start`` to that of ``end``."""
    a, b = start / np.linalg.norm(start), end / np.linalg.norm(end)
    normal = np.cross(a, b)
    sine, cosine = float(np.linalg.norm(normal)), float(a @ b)
    if sine < 1e-12:
        # the same direction, or the opposite one: then half a turn about any axis across it
        across = np.cross(a, np.eye(3)[int(np.argmin(np.abs(a)))])
        return np.eye(3) if cosine > 0 else exp_so3(np.pi * across / np.linalg.norm(across))
    return exp_so3(normal / sine * math.atan2(sine, cosine))


def _listed(symmetries: Symmetries) -> Iterable[Pose]:
    """Return the identity and the discrete motions."""
    return Symmetries(discrete=symmetries.discrete).poses()


def _likeness(pose: Pose, reference: Pose) -> float:
    """Return the trace of the turn between two poses: largest, 3, when their rotations are equal."""
    return float(np.sum(pose.rotation * reference.rotation))


def _turned(pose: Pose, reference: Pose, axis: FloatArray, offset: FloatArray) -> Pose:
    """Return the pose turned about the object's axis so that its rotation is nearest to the reference's.

    With A = R_ref^T R, trace(A Exp(axis * angle)) = (tr A - a^T A a) cos(angle) + w . a sin(angle) + const, where w is
    the vector of A - A^T's skew part.
    """
    A = reference.rotation.T @ pose.rotation
    along = float(np.trace(A) - axis @ A @ axis)
    across = float(np.array([A[1, 2] - A[2, 1], A[2, 0] - A[0, 2], A[0, 1] - A[1, 0]]) @ axis)
    R = exp_so3(axis * math.atan2(across, along))
    return pose @ Pose(R, offset - R @ offset)
