# SPDX-License-Identifier: Apache-2.0
"""Lens distortion on the plane z = 1: forward with its Jacobian, and inverse. Each model ends where it would fold.

The formulas are OpenCV's (calib3d: "Detailed Description", fisheye: "Fisheye camera model") and so those of
sensor_msgs/CameraInfo. Beyond the radius where the distorted radius stops growing a model is meaningless: points
there would be drawn back into the image. They get NaN.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np

from ukd_ros.geometry.arrays import FloatArray

NEWTON_STEPS = 30
NEWTON_TOLERANCE = 1e-12
"""Residual on the plane z = 1; with a focal length of 1,000 px this is 1e-9 px."""


_ONES = np.ones(2)


class Lens(Protocol):
    """A map of the plane z = 1 onto itself."""

    def distort(self, xy: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return distorted points [N, 2] and their Jacobian [N, 2, 2]; NaN outside the model's valid range."""

    def undistort(self, xy: FloatArray) -> FloatArray:
        """Return the points [N, 2] that ``distort`` takes to ``xy``; NaN where there are none."""


def _smallest_positive_root(descending: FloatArray) -> float:
    """Return the smallest positive real root of a polynomial (highest power first), infinity when there is none."""
    roots = np.roots(descending)
    real = roots.real[(np.abs(roots.imag) <= 1e-7 * np.abs(roots)) & (roots.real > 0)]
    return float(real.min()) if real.size else float("inf")


@lru_cache(maxsize=256)
def _rational_limit(coefficients: tuple[float, ...]) -> float:
    """Return the radius below which the distorted radius grows and the denominator is positive."""
    k1, k2, _, _, k3, k4, k5, k6 = coefficients
    numerator = np.array([k3, k2, k1, 1.0])
    denominator = np.array([k6, k5, k4, 1.0])
    # d/dr [r n(s)/d(s)], s = r^2, has the numerator (n + 2 s n') d - 2 s n d'.
    s = np.array([1.0, 0.0])
    slope = np.polysub(
        np.polymul(np.polyadd(numerator, 2 * np.polymul(s, np.polyder(numerator))), denominator),
        2 * np.polymul(np.polymul(s, numerator), np.polyder(denominator)),
    )
    return float(np.sqrt(min(_smallest_positive_root(slope), _smallest_positive_root(denominator))))


class RationalLens:
    """OpenCV's rational model, of which plumb_bob is the case k4 = k5 = k6 = 0.

    coefficients: [8] in OpenCV's order k1 k2 p1 p2 k3 k4 k5 k6.
    """

    def __init__(self, coefficients: FloatArray) -> None:
        """Keep the coefficients and find where the model folds."""
        k1, k2, p1, p2, k3, k4, k5, k6 = (float(k) for k in coefficients)
        self._limit = _rational_limit((k1, k2, p1, p2, k3, k4, k5, k6))
        self._tangential = np.array([p2, p1])
        # Columns: numerator, denominator and their derivatives by s = r^2, as polynomials in s.
        self._radial = np.array(
            [[1.0, 1.0, k1, k4], [k1, k4, 2 * k2, 2 * k5], [k2, k5, 3 * k3, 3 * k6], [k3, k6, 0.0, 0.0]]
        )

    def distort(self, xy: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return distorted points [N, 2] and their Jacobian [N, 2, 2]; NaN outside the model's valid range.

        With the gain g(s) and q = (p2, p1), OpenCV's formula reads ``x (g + 2 q.x) + s q``.
        """
        q = self._tangential
        with np.errstate(all="ignore"):
            powers = np.ones((len(xy), 4))
            s = powers[:, 1] = (xy * xy) @ _ONES
            powers[:, 2] = s * s
            powers[:, 3] = powers[:, 2] * s
            numerator, denominator, numerator_slope, denominator_slope = (powers @ self._radial).T
            gain = numerator / denominator
            slope = (numerator_slope - gain * denominator_slope) / denominator
            diagonal = gain + xy @ (2 * q)
            out = xy * diagonal[:, None] + s[:, None] * q
            jacobian = xy[:, :, None] * (2 * (slope[:, None] * xy + q))[:, None, :]
            jacobian += (2 * q)[:, None] * xy[:, None, :]
            jacobian[:, 0, 0] += diagonal
            jacobian[:, 1, 1] += diagonal
            # The radial limit does not see the tangential terms; they fold where the determinant changes sign.
            turned = jacobian[:, 0, 0] * jacobian[:, 1, 1] - jacobian[:, 0, 1] * jacobian[:, 1, 0]
            outside = ~((s < self._limit**2) & (turned > 0))
        if outside.any():
            out[outside] = np.nan
            jacobian[outside] = np.nan
        return out, jacobian

    def undistort(self, xy: FloatArray) -> FloatArray:
        """Return the points [N, 2] that ``distort`` takes to ``xy`` by damped Newton; NaN where there are none."""
        with np.errstate(all="ignore"):
            radius = np.hypot(xy[:, 0], xy[:, 1])
            guess = xy * np.minimum(1.0, 0.9 * self._limit / np.maximum(radius, 1e-300))[:, None]
            value, jacobian = self.distort(guess)
            residual = value - xy
            error = np.abs(residual).max(axis=1)
            active = np.flatnonzero(error > NEWTON_TOLERANCE)
            for _ in range(NEWTON_STEPS):
                if not active.size:
                    break
                step = _solve_2x2(jacobian[active], residual[active])
                moved = self._moved(guess[active], step, xy[active], error[active])
                guess[active], residual[active], jacobian[active] = moved
                now = np.abs(residual[active]).max(axis=1)
                # A point that no step length improves is stuck at the edge of the range: nothing is seen there.
                going = (now > NEWTON_TOLERANCE) & (now < error[active])
                error[active] = now
                active = active[going]
        return np.where((error <= NEWTON_TOLERANCE)[:, None], guess, np.nan)

    def _moved(
        self, guess: FloatArray, step: FloatArray, target: FloatArray, error: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return (guess, residual, jacobian) after the step, halved per point until it stays in range and improves."""
        out = guess - step
        value, jacobian = self.distort(out)
        residual = value - target
        factor = 1.0
        for _ in range(12):
            # NaN compares false: a step out of the valid range is halved like one that makes things worse.
            bad = np.flatnonzero(~(np.abs(residual).max(axis=1) < error))
            if not bad.size:
                break
            factor *= 0.5
            out[bad] = guess[bad] - factor * step[bad]
            value, jacobian[bad] = self.distort(out[bad])
            residual[bad] = value - target[bad]
        return out, residual, jacobian


def _solve_2x2(matrix: FloatArray, vector: FloatArray) -> FloatArray:
    """Return matrix^-1 vector for [N, 2, 2] and [N, 2]; NaN or infinite where singular, never an exception."""
    a, b, c, d = matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1]
    u, v = vector[:, 0], vector[:, 1]
    return np.stack([d * u - b * v, a * v - c * u], axis=1) / (a * d - b * c)[:, None]


@lru_cache(maxsize=256)
def _equidistant_limit(coefficients: tuple[float, ...]) -> float:
    """Return the angle (rad) below which the distorted angle grows; pi/2 at most, where z = 0."""
    k1, k2, k3, k4 = coefficients
    slope = np.array([9 * k4, 7 * k3, 5 * k2, 3 * k1, 1.0])
    return min(float(np.sqrt(_smallest_positive_root(slope))), 0.5 * np.pi)


class EquidistantLens:
    """The fisheye model of Kannala and Brandt (2006): the image radius is a polynomial in the angle to the axis.

    coefficients: [4], k1..k4 of OpenCV's fisheye module.
    """

    def __init__(self, coefficients: FloatArray) -> None:
        """Keep the coefficients and find where the model folds."""
        self._k = tuple(float(k) for k in coefficients)
        self._limit = _equidistant_limit(self._k)

    def _angle(self, theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the distorted angle and its derivative."""
        k1, k2, k3, k4 = self._k
        s = theta * theta
        value = theta * (1 + s * (k1 + s * (k2 + s * (k3 + s * k4))))
        return value, 1 + s * (3 * k1 + s * (5 * k2 + s * (7 * k3 + s * 9 * k4)))

    def distort(self, xy: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return distorted points [N, 2] and their Jacobian [N, 2, 2]; NaN outside the model's valid range."""
        with np.errstate(all="ignore"):
            s = np.sum(xy * xy, axis=1)
            radius = np.sqrt(s)
            theta = np.arctan(radius)
            angle, slope = self._angle(theta)
            on_axis = radius < 1e-9
            gain = np.where(on_axis, 1.0, angle / radius)
            # d angle / d radius = slope / (1 + r^2); the Jacobian is gain I + (d gain / d s) 2 x x^T.
            bend = np.where(on_axis, 0.0, (slope / (1 + s) - gain) / s)
            out = gain[:, None] * xy
            jacobian = gain[:, None, None] * np.eye(2) + bend[:, None, None] * (xy[:, :, None] * xy[:, None, :])
            outside = ~(theta < self._limit)
        out[outside] = np.nan
        jacobian[outside] = np.nan
        return out, jacobian

    def undistort(self, xy: FloatArray) -> FloatArray:
        """Return the points [N, 2] that ``distort`` takes to ``xy``, by safeguarded Newton; NaN where there are none.

        On 0..limit the angle grows, so bisection always has a bracket to fall back to.
        """
        with np.errstate(all="ignore"):
            target = np.sqrt(np.sum(xy * xy, axis=1))
            low, high = np.zeros_like(target), np.full_like(target, self._limit)
            theta = np.minimum(target, 0.9 * self._limit)
            for _ in range(2 * NEWTON_STEPS):
                angle, slope = self._angle(theta)
                residual = angle - target
                if not np.nanmax(np.abs(residual), initial=0.0) > NEWTON_TOLERANCE:
                    break
                high = np.where(residual > 0, theta, high)
                low = np.where(residual < 0, theta, low)
                newton = theta - residual / slope
                theta = np.where((newton > low) & (newton < high), newton, 0.5 * (low + high))
            lost = ~((np.abs(self._angle(theta)[0] - target) <= NEWTON_TOLERANCE) & (theta < self._limit))
            gain = np.where(target < 1e-9, 1.0, np.tan(theta) / target)
        return np.where(lost[:, None], np.nan, gain[:, None] * xy)
