# SPDX-License-Identifier: Apache-2.0
"""Which cells answer for which object.

After WDRNet (arXiv 2104.00633, section 3.2): an object of apparent size s draws its positive cells from the pyramid
levels in proportion to exp(-log2(s / anchor_k)²), about `positives` in all, from cells inside its visible mask. The
other cells inside the mask on levels that took part are ignored; every other cell is background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.data.dataset import TrainingSample, WindowObject
from ukd_ros.perception.cells import ANCHORS, STRIDES, level_share

BACKGROUND, POSITIVE, IGNORED = 0, 1, -1


@dataclass(frozen=True, eq=False)
class Assignment:
    """Targets of a batch of B windows with N cells and C classes.

    `state` [B,N,C] int8: BACKGROUND, POSITIVE or IGNORED. The P positive votes, one row each: `batch`, `cell`,
    `class_index` [P], `xy` [P,K,2] window px, `points_camera` [P,K,3] m, `ray_matrix` [P,3,3], `diameter` [P] m,
    `supposed` [P] bool (the label is an estimate, not the truth).
    """

    state: npt.NDArray[np.int8]
    batch: npt.NDArray[np.int64]
    cell: npt.NDArray[np.int64]
    class_index: npt.NDArray[np.int64]
    xy: npt.NDArray[np.float32]
    points_camera: npt.NDArray[np.float32]
    ray_matrix: npt.NDArray[np.float32]
    diameter: npt.NDArray[np.float32]
    supposed: npt.NDArray[np.bool_]


def level_shares(size_px: float, positives: int) -> list[int]:
    """Return how many positive cells each level gives to an object of that apparent size, about `positives` in all."""
    weights = level_share(size_px, np.array(ANCHORS))
    return [int(n) for n in np.round(positives * weights / weights.sum())]


def assign(samples: Sequence[TrainingSample], classes: int, keypoints: int, positives: int = 10) -> Assignment:
    """Return the targets of a batch of equally large windows; what no label speaks of is ignored in
    those without labels and in supposed ones.
    """
    size = samples[0].image.shape[0]
    cells = sum((size // s) ** 2 for s in STRIDES)
    state = np.zeros((len(samples), cells, classes), np.int8)
    rows: list[tuple[int, int, int, WindowObject]] = []
    for b, sample in enumerate(samples):
        if sample.supposed or not sample.labelled:
            state[b] = IGNORED  # nobody knows what else is in it
        for number, item in enumerate(sample.objects):
            chosen = _assign_object(state[b, :, item.class_index], sample.mask == number + 1, item, size, positives)
            rows.extend((b, cell, item.class_index, item) for cell in chosen)
    # A cell may be claimed by two objects of a class that touch; both regress there.
    rays = np.array([samples[b].ray_matrix for b, _, _, _ in rows], np.float32).reshape(-1, 3, 3)
    return Assignment(
        state,
        np.array([r[0] for r in rows], np.int64),
        np.array([r[1] for r in rows], np.int64),
        np.array([r[2] for r in rows], np.int64),
        np.array([r[3].xy for r in rows], np.float32).reshape(-1, keypoints, 2),
        np.array([r[3].points_camera for r in rows], np.float32).reshape(-1, keypoints, 3),
        rays,
        np.array([r[3].diameter for r in rows], np.float32),
        np.array([samples[r[0]].supposed for r in rows], np.bool_),
    )


def object_rows(targets: Assignment) -> list[tuple[int, int]]:
    """Return the ranges of rows that belong to one object each (its votes stand together)."""
    if len(targets.batch) == 0:
        return []
    other = np.any(targets.xy[1:] != targets.xy[:-1], axis=(1, 2))
    other |= (np.diff(targets.batch) != 0) | (np.diff(targets.class_index) != 0)
    changes = np.flatnonzero(other) + 1
    bounds = [0, *changes.tolist(), len(targets.batch)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _assign_object(
    state: npt.NDArray[np.int8], mask: npt.NDArray[np.bool_], item: WindowObject, size: int, positives: int
) -> list[int]:
    """Mark one object's cells in `state` [N] and return its positive cells."""
    shares = level_shares(item.size_px, positives)
    coverage = mask.astype(np.float32)
    if not mask.any():
        return []
    moments = cv2.moments(mask.astype(np.uint8), binaryImage=True)
    centre_u, centre_v = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
    chosen: list[int] = []
    start = 0
    for stride, share in zip(STRIDES, shares, strict=True):
        side = size // stride
        cover = cv2.resize(coverage, (side, side), interpolation=cv2.INTER_AREA).ravel()
        if share > 0 or item.ignored:
            cell_u, cell_v = _centres(side, stride)
            distance = np.hypot(cell_u - centre_u, cell_v - centre_v)
            touched = cover > 0.1
            block = state[start : start + side * side]
            block[touched & (block != POSITIVE)] = IGNORED
            if not item.ignored:
                # well covered cells first, near the centroid among equals; one serves even where none is covered
                rank = np.minimum(cover, 0.6) - 1e-3 * distance / stride
                candidates = np.flatnonzero(cover > 0.3)
                if candidates.size == 0:
                    candidates = np.array([int(np.argmax(rank))])
                best = candidates[np.argsort(-rank[candidates], kind="stable")][:share]
                block[best] = POSITIVE
                chosen.extend(int(start + cell) for cell in best)
        start += side * side
    return chosen


@lru_cache(maxsize=16)
def _centres(side: int, stride: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return u and v [side * side] px of one level's cell centres."""
    grid = (np.arange(side) + 0.5) * stride - 0.5
    u, v = np.meshgrid(grid, grid)
    return u.ravel(), v.ravel()
