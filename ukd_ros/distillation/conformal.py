# SPDX-License-Identifier: Apache-2.0
"""How far a claimed coverage may be trusted: conformal radii, and what samples that resemble each other are worth.

Frames of one scene or one stretch of video are not exchangeable, blocks of them may be. What holds for new blocks of
the same kind holds for nothing else: under a shift (another camera, another light) there is no guarantee.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.arrays import FloatArray


def conformal_radius(squares: npt.ArrayLike, block: npt.ArrayLike, level: float) -> float:
    """Return r such that {δ: δᵀ cov⁻¹ δ ≤ r²} holds a pose of a new block with probability `level` or more.

    squares [n]: NEES of held-out poses, block [n] the block each comes from. Every block counts alike, and the unseen
    one is taken as infinitely bad (Lee, Barber and Willett 2023, hierarchical data; with blocks of one it is the
    (n + 1) rule of split conformal prediction). Infinite when there are fewer than level / (1 - level) blocks.
    """
    values, _, share = _by_block(squares, block)
    blocks = len(np.unique(np.asarray(block)))
    order = np.argsort(values, kind="stable")
    mass = np.cumsum(share[order]) * blocks / (blocks + 1.0)
    reached = np.flatnonzero(mass >= level - 1e-12)
    return math.sqrt(float(values[order][reached[0]])) if len(reached) else math.inf


def highest_level(blocks: int) -> float:
    """Return the largest level at which `blocks` blocks give a finite radius."""
    return blocks / (blocks + 1.0)


def effective_size(inside: npt.ArrayLike, block: npt.ArrayLike) -> float:
    """Return how many independent samples tell as much about a share as these [n], of which some are `inside`.

    n over the design effect 1 + (m - 1) ICC: m the mean block size (weighted), ICC the intraclass correlation of the
    indicator by one-way analysis of variance, not below zero (Kish 1965).
    """
    y = np.asarray(inside, dtype=np.float64).ravel()
    _, counts = np.unique(np.asarray(block).ravel(), return_counts=True)
    n, blocks = len(y), len(counts)
    if blocks < 2 or n <= blocks:
        return float(blocks)
    inverse = np.unique(np.asarray(block).ravel(), return_inverse=True)[1]
    means = np.bincount(inverse, y) / counts
    between = float((counts * (means - y.mean()) ** 2).sum()) / (blocks - 1)
    within = float(((y - means[inverse]) ** 2).sum()) / (n - blocks)
    size = (n - float((counts**2).sum()) / n) / (blocks - 1)
    spread = between + (size - 1.0) * within
    # samples that all say the same do not tell how they are shared: then a block is worth one
    correlation = max(0.0, (between - within) / spread) if spread > 0.0 else 1.0
    return n / (1.0 + (float((counts**2).sum()) / n - 1.0) * correlation)


def block_quantile(squares: npt.ArrayLike, block: npt.ArrayLike, level: float) -> float:
    """Return the `level` quantile of values [n] in which every block counts alike."""
    values, _, share = _by_block(squares, block)
    order = np.argsort(values, kind="stable")
    mass = np.cumsum(share[order])
    return float(values[order][int(np.searchsorted(mass, level - 1e-12))])


def _by_block(squares: npt.ArrayLike, block: npt.ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return values, the block's size and the weight of each sample; the weights sum to 1, alike for every block."""
    values = np.asarray(squares, dtype=np.float64).ravel()
    if not len(values) or len(values) != len(np.asarray(block).ravel()):
        raise ValueError(f"squares and block need the same number of samples, at least one; got {len(values)}.")
    _, inverse, counts = np.unique(np.asarray(block).ravel(), return_inverse=True, return_counts=True)
    sizes = counts[inverse].astype(np.float64)
    return values, sizes, 1.0 / (sizes * len(counts))
