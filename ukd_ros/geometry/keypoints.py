# SPDX-License-Identifier: Apache-2.0
"""Keypoints in an image with everything that is known about their errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ukd_ros.geometry.arrays import FloatArray, frozen_array


@dataclass(frozen=True, eq=False)
class Keypoints:
    """The K keypoints of one object instance, in pixels of the image they are said to be in.

    xy: [K, 2] px, (0, 0) is the centre of the top-left pixel; NaN for a keypoint that was not measured.
    cov: [2K, 2K] px^2 in the order u_0 v_0 u_1 v_1 ...; errors shared between keypoints are off its 2x2 diagonal.
        It is symmetrised here. Whether it is positive definite is for its reader to check: it comes from data.
    score: [K], 0..1.
    ValueError names the field with a wrong shape.
    """

    xy: FloatArray
    cov: FloatArray
    score: FloatArray

    def __post_init__(self) -> None:
        """Check and freeze the arrays."""
        xy = frozen_array(self.xy, (None, 2), "xy", finite=False)
        count = len(xy)
        cov = frozen_array(self.cov, (2 * count, 2 * count), "cov", finite=False)
        object.__setattr__(self, "xy", xy)
        object.__setattr__(self, "cov", frozen_array(0.5 * (cov + cov.T), cov.shape, "cov", finite=False))
        object.__setattr__(self, "score", frozen_array(self.score, (count,), "score", finite=False))

    def __len__(self) -> int:
        """Return K."""
        return len(self.xy)

    def block(self, k: int) -> FloatArray:
        """Return the covariance [2, 2] px^2 of keypoint ``k`` alone; IndexError when there is no such keypoint."""
        if not -len(self) <= k < len(self):
            raise IndexError(f"keypoint {k} of {len(self)}")
        k %= len(self)
        return self.cov[2 * k : 2 * k + 2, 2 * k : 2 * k + 2]

    def blocks(self) -> FloatArray:
        """Return the diagonal blocks [K, 2, 2] px^2."""
        count = len(self)
        index = np.arange(count)
        return self.cov.reshape(count, 2, count, 2)[index, :, index, :]

    def sigma(self) -> FloatArray:
        """Return [K] px: the square root of half the trace of each block (rms standard deviation per axis)."""
        variances = np.diagonal(self.cov).reshape(-1, 2)
        return np.asarray(np.sqrt(0.5 * variances.sum(axis=1)))
