# SPDX-License-Identifier: Apache-2.0
"""Where may the object be, roughly? Closed-form poses from all keypoints and from minimal subsets, and their cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.pose import exp_so3
from ukd_ros.perception.pnp_refine import PnpProblem

BATCH = 32
"""Minimal subsets tried between two looks at whether enough were tried."""

MISS_PROBABILITY = 1e-3

Vectors = tuple[npt.ArrayLike, npt.ArrayLike]
"""OpenCV's rotation vector (rad) and translation (m), [3, 1] each."""


@dataclass(frozen=True, eq=False)
class Hypotheses:
    """Candidate poses: rotations [h, 3, 3] and translations [h, 3] m, finite."""

    rotations: FloatArray
    translations: FloatArray

    def __len__(self) -> int:
        """Return h."""
        return len(self.translations)

    @staticmethod
    def from_vectors(vectors: list[Vectors]) -> Hypotheses:
        """Return the finite ones of OpenCV's (rvec, tvec) pairs."""
        flat = np.array([np.concatenate([np.ravel(r), np.ravel(t)]) for r, t in vectors]).reshape(-1, 6)
        flat = flat[np.isfinite(flat).all(axis=1)]
        return Hypotheses(exp_so3(flat[:, :3]), flat[:, 3:])

    def joined(self, other: Hypotheses) -> Hypotheses:
        """Return these hypotheses and then the others."""
        return Hypotheses(
            np.concatenate([self.rotations, other.rotations]), np.concatenate([self.translations, other.translations])
        )


def extents(points: FloatArray) -> FloatArray:
    """Return the extents [3] of a point set [n >= 3, 3] along its principal axes, largest first (m, times sqrt n)."""
    return np.asarray(np.linalg.svd(points - points.mean(axis=0), compute_uv=False), dtype=np.float64)


def from_all_points(points: FloatArray, ideal_xy: FloatArray, matrix: FloatArray, planar: bool) -> Hypotheses:
    """Return the poses that OpenCV's SQPnP (Terzakis and Lourakis 2020) and, for planar sets, IPPE (both minima,
    Collins and Bartoli 2014) find for undistorted pixels [n, 2]; EPnP where SQPnP gives none.
    """
    flags = [cv2.SOLVEPNP_SQPNP] + ([cv2.SOLVEPNP_IPPE] if planar else [])
    vectors: list[Vectors] = []
    for flag in flags:
        vectors += _solve_generic(points, ideal_xy, matrix, flag)
    if not vectors:
        vectors = _solve_generic(points, ideal_xy, matrix, cv2.SOLVEPNP_EPNP)
    return Hypotheses.from_vectors(vectors)


def _solve_generic(points: FloatArray, xy: FloatArray, matrix: FloatArray, flag: int) -> list[Vectors]:
    try:
        _, rvecs, tvecs, _ = cv2.solvePnPGeneric(points, xy, matrix, None, flags=flag)
    except cv2.error:
        # OpenCV throws where a configuration is degenerate for one solver; the others still have their say.
        return []
    return list(zip(rvecs, tvecs, strict=True))


def minimal_subsets(count: int, most: int, seed: int) -> npt.NDArray[np.int64]:
    """Return [s, 3] subsets of ``count`` keypoints: all of them in random order, or ``most`` drawn at random.

    The same arguments give the same subsets.
    """
    rng = np.random.default_rng(seed)
    if math.comb(count, 3) <= most:
        every = np.array(list(itertools.combinations(range(count), 3)), dtype=np.int64)
        return rng.permutation(every)
    return np.argsort(rng.random((most, count)), axis=1)[:, :3]


def from_subsets(
    points: FloatArray, ideal_xy: FloatArray, matrix: FloatArray, subsets: npt.NDArray[np.int64]
) -> Hypotheses:
    """Return every pose that P3P (AP3P, Ke and Roumeliotis 2017) finds for the subsets [s, 3]."""
    vectors: list[Vectors] = []
    for three, pixels in zip(points[subsets], ideal_xy[subsets], strict=True):
        try:
            _, rvecs, tvecs = cv2.solveP3P(three, pixels, matrix, None, flags=cv2.SOLVEPNP_AP3P)
        except cv2.error:
            continue
        vectors += list(zip(rvecs, tvecs, strict=True))
    return Hypotheses.from_vectors(vectors)


def subset_batches(count: int, most: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the minimal subsets in batches."""
    subsets = minimal_subsets(count, most, seed)
    for start in range(0, len(subsets), BATCH):
        yield subsets[start : start + BATCH]


def enough(tried: int, inliers: int, count: int) -> bool:
    """Return whether, with that many inliers, a clean subset was missed with probability below 1e-3 only."""
    clean = math.comb(inliers, 3) / math.comb(count, 3)
    return clean >= 1 or (clean > 0 and tried * math.log1p(-clean) <= math.log(MISS_PROBABILITY))


def squared_distances(problem: PnpProblem, hypotheses: Hypotheses, block_information: FloatArray) -> FloatArray:
    """Return [h, n]: each keypoint's squared Mahalanobis distance, by its own 2x2 block, from each hypothesis.

    Infinite where it cannot be seen, and for all keypoints of a pose that has any of them behind the camera.
    """
    count = len(problem)
    placed = problem.points @ hypotheses.rotations.transpose(0, 2, 1) + hypotheses.translations[:, None, :]
    projected = problem.camera.project(placed.reshape(-1, 3)).reshape(-1, count, 2)
    # A hypothesis may be so wrong that squares overflow: that is far enough.
    with np.errstate(over="ignore", invalid="ignore"):
        error = problem.xy - projected
        squared = ((error[:, :, None, :] @ block_information)[:, :, 0, :] * error).sum(axis=2)
    squared[(placed[:, :, 2] <= 0).any(axis=1)] = np.inf
    return np.asarray(np.where(np.isnan(squared), np.inf, squared))


def mirrored(points: FloatArray, rotation: FloatArray, translation: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the pose whose depth is mirrored, which looks almost alike for a flat object or from far away.

    The object is reflected across its plane of least extent, then along the line of sight through its centre, so a
    planar object keeps its image up to perspective (the two minima of Schweighofer and Pinz 2006).
    """
    centre = points.mean(axis=0)
    centred = points - centre
    thin = np.linalg.eigh(centred.T @ centred)[1][:, 0]
    place = rotation @ centre + translation
    sight = place / np.linalg.norm(place)
    flip_depth = np.eye(3) - 2 * np.outer(sight, sight)
    turned = flip_depth @ rotation @ (np.eye(3) - 2 * np.outer(thin, thin))
    return turned, place - turned @ centre
