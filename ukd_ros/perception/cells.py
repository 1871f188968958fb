# SPDX-License-Identifier: Apache-2.0
"""The cells that vote: their levels, and which level speaks for objects of which apparent size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.arrays import FloatArray

STRIDES = (8, 16, 32)
"""Pixels between the cells of each level."""

ANCHOR_STRIDES = 4
"""A level's anchor, the apparent size (px) that it is made for, in its strides."""

ANCHORS = tuple(float(ANCHOR_STRIDES * stride) for stride in STRIDES)


def cell_anchors(width: int, height: int, strides: Sequence[int] = STRIDES) -> npt.NDArray[np.float32]:
    """Return the anchor (px) of each of the N cells of an input of `width` x `height` px, in the order of the votes."""
    counts = [(width // stride) * (height // stride) for stride in strides]
    return np.repeat(np.array(strides, np.float32) * ANCHOR_STRIDES, counts)


def level_share(size: npt.NDArray[Any] | float, anchor: npt.NDArray[Any]) -> FloatArray:
    """Return exp(-log2(size / anchor)²), in 0..1: how much a level of that anchor is asked about an object of that
    apparent size (both px, broadcast).

    Training takes an object's positive cells from the levels in these proportions (after WDRNet, arXiv 2104.00633,
    section 3.2); on the robot the cells' votes count in the same ones.
    """
    ratio = np.log2(np.maximum(np.asarray(size, np.float64), 1.0) / anchor)
    return np.asarray(np.exp(-(ratio**2)))
