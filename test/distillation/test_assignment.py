# SPDX-License-Identifier: Apache-2.0
"""Which cells answer for which object."""

from __future__ import annotations

import numpy as np
import pytest
from cubes import CUBE, CubeViews

from ukd_ros.data.dataset import TrainingSample, WindowConfig, WindowDataset, WindowObject
from ukd_ros.distillation.assignment import BACKGROUND, IGNORED, POSITIVE, assign, level_shares
from ukd_ros.perception.cells import STRIDES
from ukd_ros.perception.network import cell_geometry


def _sample(size_px: float, box: tuple[int, int, int, int], ignored: bool = False) -> TrainingSample:
    mask = np.zeros((128, 128), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    item = WindowObject(0, np.zeros((8, 2)), np.ones((8, 3)), 0.2, size_px, ignored)
    return TrainingSample(np.zeros((128, 128, 3), np.uint8), mask, (item,), np.eye(3))


def test_shares_follow_the_anchors() -> None:
    """At an anchor's size that level gets e^0 : e^-1 : e^-4 against its neighbours."""
    weights = np.exp([0.0, -1.0, -4.0])
    assert level_shares(32.0, 100) == [round(100 * w / weights.sum()) for w in weights]
    assert level_shares(64.0, 10) == [2, 6, 2]
    assert level_shares(1000.0, 10)[0] == 0


@pytest.mark.parametrize("size", [20.0, 60.0, 110.0])
def test_positives_lie_inside_the_mask_and_number_about_ten(size: float) -> None:
    half = int(size / 2)
    sample = _sample(size, (64 - half, 64 - half, 64 + half, 64 + half))
    targets = assign([sample], 1, 8)
    centres, _ = cell_geometry(128, 128)
    assert 3 <= len(targets.cell) <= 11
    for cell in targets.cell:
        u, v = centres[cell].tolist()
        stride = 8 if cell < 256 else 16 if cell < 320 else 32
        assert abs(u - 63.5) < half + stride / 2 and abs(v - 63.5) < half + stride / 2
        assert targets.state[0, cell, 0] == POSITIVE


def test_cells_beside_the_object_are_background_and_unused_ones_within_are_ignored() -> None:
    sample = _sample(64.0, (32, 32, 96, 96))
    state = assign([sample], 1, 8).state[0, :, 0]
    centres, _ = cell_geometry(128, 128)
    inside = ((centres - 63.5).abs().amax(dim=1) < 24).numpy()
    far = ((centres - 63.5).abs().amax(dim=1) > 52).numpy()
    assert (state[far] == BACKGROUND).all()
    assert np.isin(state[inside], (POSITIVE, IGNORED)).all() and (state[inside] == IGNORED).any()


def test_an_object_that_is_too_hidden_is_ignored_on_every_level() -> None:
    state = assign([_sample(64.0, (32, 32, 96, 96), ignored=True)], 1, 8)
    assert len(state.cell) == 0 and (state.state == POSITIVE).sum() == 0
    offsets = np.cumsum([0] + [(128 // s) ** 2 for s in STRIDES])
    for first, last in zip(offsets[:-1], offsets[1:], strict=True):
        assert (state.state[0, first:last] == IGNORED).any()


def test_a_batch_without_any_object_is_all_background() -> None:
    empty = TrainingSample(np.zeros((128, 128, 3), np.uint8), np.zeros((128, 128), np.uint8), (), np.eye(3))
    targets = assign([empty, empty], 3, 8)
    assert targets.state.shape == (2, 336, 3) and not targets.state.any()
    assert targets.xy.shape == (0, 8, 2) and targets.ray_matrix.shape == (0, 3, 3)


def test_targets_repeat_the_objects_labels() -> None:
    data = WindowDataset(CubeViews(4), [CUBE], WindowConfig(), seed=0)
    samples = [data.sample(i) for i in range(6)]
    targets = assign(samples, 1, 8)
    assert len(targets.cell) > 10
    for row, b in enumerate(targets.batch):
        assert any(np.allclose(targets.xy[row], o.xy, atol=1e-4) for o in samples[b].objects)
        np.testing.assert_allclose(targets.ray_matrix[row], samples[b].ray_matrix, rtol=1e-5)
