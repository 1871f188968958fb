# SPDX-License-Identifier: Apache-2.0
"""Rotations, rigid poses, and THE tangent in which every 6x6 covariance of this package is written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.arrays import FloatArray, frozen_array

ORTHONORMAL_TOLERANCE = 1e-6
"""Largest entry of R^T R - I that is put down to rounding; beyond it a matrix is refused, not repaired."""

QUATERNION_TOLERANCE = 1e-3
"""Largest | |q| - 1 | that is put down to rounding."""


def skew(v: npt.ArrayLike) -> FloatArray:
    """Return [..., 3, 3] matrices with ``skew(v) @ u == cross(v, u)`` for vectors ``v`` [..., 3]."""
    vector = np.asarray(v, dtype=np.float64)
    out = np.zeros(vector.shape + (3,))
    out[..., 0, 1] = -vector[..., 2]
    out[..., 0, 2] = vector[..., 1]
    out[..., 1, 0] = vector[..., 2]
    out[..., 1, 2] = -vector[..., 0]
    out[..., 2, 0] = -vector[..., 1]
    out[..., 2, 1] = vector[..., 0]
    return out


def exp_so3(rotvec: npt.ArrayLike) -> FloatArray:
    """Return the rotations [..., 3, 3] that turn about ``rotvec`` [..., 3] by its length in rad (Rodrigues)."""
    vector = np.asarray(rotvec, dtype=np.float64)
    if vector.shape == (3,):
        return _exp_one(*vector.tolist())
    theta = np.sqrt(np.sum(vector * vector, axis=-1))[..., None, None]
    cross = skew(vector)
    # (1 - cos t) / t^2 = sinc(t/2)^2 / 2 does not cancel at small angles.
    linear = np.sinc(theta / np.pi)
    quadratic = 0.5 * np.sinc(theta / (2 * np.pi)) ** 2
    return np.asarray(np.eye(3) + linear * cross + quadratic * (cross @ cross))


def _exp_one(x: float, y: float, z: float) -> FloatArray:
    """Return the rotation of one vector: on three numbers array calls cost ten times the arithmetic."""
    theta = math.sqrt(x * x + y * y + z * z)
    if theta > 0:
        linear, root = math.sin(theta) / theta, math.sin(0.5 * theta) / theta
    else:
        linear, root = 1.0, 0.5
    q = 2 * root * root
    xx, yy, zz, xy, xz, yz = q * x * x, q * y * y, q * z * z, q * x * y, q * x * z, q * y * z
    x, y, z = linear * x, linear * y, linear * z
    return np.array([[1 - yy - zz, xy - z, xz + y], [xy + z, 1 - xx - zz, yz - x], [xz - y, yz + x, 1 - xx - yy]])


def quaternion_of(rotation: npt.ArrayLike) -> FloatArray:
    """Return unit quaternions [..., 4] in the order x y z w, w >= 0, of rotations [..., 3, 3].

    The matrix 4 q q^T is linear in R; its row with the largest diagonal entry is q up to a positive or negative
    factor and never cancels (Shepperd 1978).
    """
    R = np.asarray(rotation, dtype=np.float64)
    r00, r11, r22 = R[..., 0, 0], R[..., 1, 1], R[..., 2, 2]
    outer = np.empty(R.shape[:-2] + (4, 4))
    outer[..., 0, 0] = 1 + r00 - r11 - r22
    outer[..., 1, 1] = 1 - r00 + r11 - r22
    outer[..., 2, 2] = 1 - r00 - r11 + r22
    outer[..., 3, 3] = 1 + r00 + r11 + r22
    outer[..., 0, 1] = outer[..., 1, 0] = R[..., 1, 0] + R[..., 0, 1]
    outer[..., 0, 2] = outer[..., 2, 0] = R[..., 2, 0] + R[..., 0, 2]
    outer[..., 1, 2] = outer[..., 2, 1] = R[..., 2, 1] + R[..., 1, 2]
    outer[..., 0, 3] = outer[..., 3, 0] = R[..., 2, 1] - R[..., 1, 2]
    outer[..., 1, 3] = outer[..., 3, 1] = R[..., 0, 2] - R[..., 2, 0]
    outer[..., 2, 3] = outer[..., 3, 2] = R[..., 1, 0] - R[..., 0, 1]
    largest = np.argmax(np.diagonal(outer, axis1=-2, axis2=-1), axis=-1)
    q = np.take_along_axis(outer, largest[..., None, None], axis=-2)[..., 0, :]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    return np.asarray(np.where(q[..., 3:] < 0, -q, q))


def log_so3(rotation: npt.ArrayLike) -> FloatArray:
    """Return rotation vectors [..., 3] with length in [0, pi] rad of rotations [..., 3, 3].

    It goes through the quaternion, which is accurate at 0 and at pi. At exactly pi both signs of the axis are right.
    """
    q = quaternion_of(rotation)
    sine = np.linalg.norm(q[..., :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, q[..., 3:])
    # angle / sin(angle / 2) tends to 2 at the identity.
    factor = np.divide(angle, sine, out=np.full_like(sine, 2.0), where=sine > 1e-150)
    return np.asarray(factor * q[..., :3])


def left_jacobian_so3(rotvec: npt.ArrayLike) -> FloatArray:
    """Return J [..., 3, 3] with ``exp(v + d) = exp(J(v) d) exp(v)`` to first order in d, ``v`` [..., 3] rad.

    It converts derivatives with respect to a Rodrigues vector (OpenCV's) into this package's tangent.
    """
    vector = np.asarray(rotvec, dtype=np.float64)
    theta = np.sqrt(np.sum(vector * vector, axis=-1))[..., None, None]
    square = theta * theta
    # (t - sin t) / t^3 cancels at small angles; below 0.3 rad five terms of the series are exact to rounding.
    series = 1 / 6 + square * (-1 / 120 + square * (1 / 5040 + square * (-1 / 362880 + square / 39916800)))
    direct = np.divide(theta - np.sin(theta), square * theta, out=np.zeros_like(theta), where=theta > 0.3)
    cubic = np.where(theta > 0.3, direct, series)
    quadratic = 0.5 * np.sinc(theta / (2 * np.pi)) ** 2
    cross = skew(vector)
    return np.asarray(np.eye(3) + quadratic * cross + cubic * (cross @ cross))


def nearest_rotation(matrix: npt.ArrayLike) -> FloatArray:
    """Return the rotation [3, 3] closest to ``matrix`` [3, 3] in the Frobenius norm, for rounded annotations.

    ValueError when the matrix is not a rotation even roughly (a singular value outside 0.5..2, or a reflection).
    """
    left, values, right = np.linalg.svd(frozen_array(matrix, (3, 3), "matrix"))
    rotation = left @ right
    if values[0] > 2 or values[2] < 0.5 or np.linalg.det(rotation) < 0:
        raise ValueError(f"matrix: is no rotation (singular values {values.round(4).tolist()}).")
    return np.asarray(rotation)


def _checked_rotation(value: npt.ArrayLike) -> FloatArray:
    rotation = frozen_array(value, (3, 3), "rotation")
    error = float(np.abs(rotation.T @ rotation - np.eye(3)).max())
    if error > ORTHONORMAL_TOLERANCE or np.linalg.det(rotation) < 0:
        raise ValueError(
            f"rotation: is not a rotation matrix (R^T R is off by {error:.3g}, det {np.linalg.det(rotation):.6g}); "
            "pass nearest_rotation(matrix) if it is a rounded annotation."
        )
    if error < 1e-14:
        return rotation
    # Two Newton-Schulz steps towards the polar factor square the error each: 1e-6 -> 1e-12 -> below rounding.
    for _ in range(2):
        rotation = rotation @ (1.5 * np.eye(3) - 0.5 * (rotation.T @ rotation))
    rotation.setflags(write=False)
    return rotation


@dataclass(frozen=True, eq=False)
class Pose:
    """A rigid pose ``T_a_b``: it takes coordinates in frame b to coordinates in frame a.

    ``T_a_c = T_a_b @ T_b_c``. A small change is ``delta = (dt, dtheta)`` [6], m and rad, along the axes of frame
    **a**: ``t' = t + dt``, ``R' = Exp(dtheta) R``. Translation and rotation are decoupled, as
    ``geometry_msgs/PoseWithCovariance`` and tf2 read it (x y z rotX rotY rotZ about fixed axes).
    Every 6x6 covariance in this package is Cov(delta).

    rotation: [3, 3]; at most 1e-6 away from orthonormal, then made orthonormal to rounding.
    translation: [3], m.
    ValueError names the field that is wrong.
    """

    rotation: FloatArray
    translation: FloatArray

    def __post_init__(self) -> None:
        """Check and freeze the arrays."""
        object.__setattr__(self, "rotation", _checked_rotation(self.rotation))
        object.__setattr__(self, "translation", frozen_array(self.translation, (3,), "translation"))

    @staticmethod
    def identity() -> Pose:
        """Return the pose that changes nothing."""
        return Pose(np.eye(3), np.zeros(3))

    @staticmethod
    def from_matrix(T: npt.ArrayLike) -> Pose:
        """Return the pose of a homogeneous matrix [4, 4]; ValueError when its last row is not 0 0 0 1."""
        matrix = frozen_array(T, (4, 4), "T")
        if not np.allclose(matrix[3], [0, 0, 0, 1], rtol=0, atol=1e-9):
            raise ValueError(f"T: the last row is {matrix[3].tolist()}, but 0 0 0 1 is needed.")
        return Pose(matrix[:3, :3], matrix[:3, 3])

    @staticmethod
    def from_quaternion(xyzw: npt.ArrayLike, translation: npt.ArrayLike) -> Pose:
        """Return the pose of a unit quaternion [4] in the order x y z w (as ROS has it) and a translation [3] m.

        ValueError when the quaternion's length differs from 1 by more than 1e-3 (an all-zero one included).
        """
        q = frozen_array(xyzw, (4,), "quaternion")
        length = float(np.linalg.norm(q))
        if abs(length - 1) > QUATERNION_TOLERANCE:
            raise ValueError(f"quaternion: has length {length:.6g}, but a unit quaternion is needed.")
        vector, w = q[:3] / length, q[3] / length
        cross = skew(vector)
        return Pose(np.eye(3) + 2 * w * cross + 2 * (cross @ cross), frozen_array(translation, (3,), "translation"))

    def matrix(self) -> FloatArray:
        """Return the homogeneous matrix [4, 4]."""
        T = np.eye(4)
        T[:3, :3] = self.rotation
        T[:3, 3] = self.translation
        return T

    def quaternion(self) -> FloatArray:
        """Return the unit quaternion [4] in the order x y z w, with w >= 0."""
        return quaternion_of(self.rotation)

    def inverse(self) -> Pose:
        """Return ``T_b_a``."""
        return Pose(self.rotation.T, -self.rotation.T @ self.translation)

    def __matmul__(self, other: Pose) -> Pose:
        """Return ``T_a_c = T_a_b @ T_b_c``."""
        return Pose(self.rotation @ other.rotation, self.rotation @ other.translation + self.translation)

    def transform(self, points: npt.ArrayLike) -> FloatArray:
        """Return the points [..., 3] of frame b in frame a."""
        return np.asarray(np.asarray(points, dtype=np.float64) @ self.rotation.T + self.translation)

    def retract(self, delta: npt.ArrayLike) -> Pose:
        """Return this pose moved by ``delta`` [6]: ``t' = t + dt``, ``R' = Exp(dtheta) R`` (turns on the left)."""
        change = frozen_array(delta, (6,), "delta")
        return Pose(exp_so3(change[3:]) @ self.rotation, self.translation + change[:3])

    def minus(self, other: Pose) -> FloatArray:
        """Return the ``delta`` [6] with ``other.retract(delta) == self``; its rotation part is at most pi long."""
        turn = log_so3(self.rotation @ other.rotation.T)
        return np.concatenate([self.translation - other.translation, turn])


def rotate_covariance(cov: npt.ArrayLike, rotation: npt.ArrayLike) -> FloatArray:
    """Return Cov(delta) [6, 6] written along other axes: ``blkdiag(R, R) cov blkdiag(R, R)^T``.

    With ``R = R_c_a``, a covariance along the axes of frame a comes out along those of c. This alone turns the
    covariance of ``T_a_b`` into that of ``T_c_b`` when c and a share their origin.
    """
    R = frozen_array(rotation, (3, 3), "rotation")
    both = np.zeros((6, 6))
    both[:3, :3] = both[3:, 3:] = R
    return np.asarray(both @ frozen_array(cov, (6, 6), "cov") @ both.T)
