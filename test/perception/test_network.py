# SPDX-License-Identifier: Apache-2.0
"""Shapes, sizes and decoding of the networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ukd_ros.perception.cells import cell_anchors
from ukd_ros.perception.network import (
    ARCHITECTURES,
    KeypointNetwork,
    NetworkConfig,
    cell_count,
    cell_geometry,
    decode_scale,
)

SIZES = {
    "darknet53": (47.0, 49.5, 16.0, 17.2),
    "darknet_tiny": (7.8, 8.5, 7.4, 8.0),
    "darknet_tiny_h": (1.9, 2.2, 1.8, 2.1),
    "lean": (0.4, 0.6, 0.18, 0.4),
}


def _gmac(network: KeypointNetwork, side: int) -> float:
    total = 0

    def count(layer: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(layer, torch.nn.Conv2d)
        total += output.numel() * layer.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return total / 1e9


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_and_multiplications(architecture: str) -> None:
    """The family's published sizes (design, section 4), counted at 256x256."""
    network = KeypointNetwork(NetworkConfig(architecture, ("part",), 8))
    low, high, gmac_low, gmac_high = SIZES[architecture]
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert low <= millions <= high
    side = 64 if architecture == "darknet53" else 128
    assert gmac_low <= _gmac(network, side) * (256 / side) ** 2 <= gmac_high


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_training_step(architecture: str) -> None:
    torch.manual_seed(0)
    network = KeypointNetwork(NetworkConfig(architecture, ("a", "b"), 5)).train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    before = [p.detach().clone() for p in network.parameters()]
    score, xy, scale = network(torch.rand(2, 3, 64, 96) * 255)
    cells = cell_count(96, 64)
    assert score.shape == (2, cells, 2) and xy.shape == (2, cells, 2, 5, 2) and scale.shape == (2, cells, 2, 5, 3)
    (score.sum() + xy.square().mean() + scale.mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    optimizer.step()
    assert (
        sum(bool((a != b.detach()).any()) for a, b in zip(before, network.parameters(), strict=True)) > len(before) // 2
    )


def test_cells_tile_the_image_by_pixel_centres() -> None:
    centres, anchors = cell_geometry(96, 64)
    assert len(centres) == cell_count(96, 64) == 12 * 8 + 6 * 4 + 3 * 2
    np.testing.assert_array_equal(anchors.numpy(), cell_anchors(96, 64))
    assert (
        centres[0].tolist() == [3.5, 3.5] and centres[1].tolist() == [11.5, 3.5] and centres[12].tolist() == [3.5, 11.5]
    )
    assert centres[-1].tolist() == [79.5, 47.5] and anchors[0] == 32 and anchors[-1] == 128
    with pytest.raises(ValueError, match="multiples of 32"):
        cell_count(100, 64)


def test_scales_are_positive_bounded_and_ordered() -> None:
    raw = torch.linspace(-50, 50, 101)[:, None].expand(101, 3)
    scale = decode_scale(raw, torch.tensor(64.0))
    assert (scale[:, 0] > 0.1).all() and (scale[:, 0] < 64 * 2.8).all()
    assert (scale[1:, 0] >= scale[:-1, 0]).all()
    assert scale[:, 2].abs().max() <= 0.95


def test_votes_move_with_the_image() -> None:
    """A shift by the coarsest stride shifts every vote of an interior cell by as much: decoding uses the right grid."""
    torch.manual_seed(0)
    network = KeypointNetwork(NetworkConfig("lean", ("part",), 4)).eval()
    image = torch.full((1, 3, 256, 256), 114.0)
    image[..., 112:144, 112:144] = torch.rand(3, 32, 32) * 255
    moved = torch.roll(image, (0, 32), (2, 3))
    with torch.no_grad():
        xy, shifted = network(image)[1][0, :1024], network(moved)[1][0, :1024]
    a = xy.view(32, 32, 4, 2)[14:18, 14:18]
    b = shifted.view(32, 32, 4, 2)[14:18, 18:22]
    torch.testing.assert_close(b - a, torch.tensor([32.0, 0.0]).expand_as(a), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"architecture": "resnet"}, "architecture"),
        ({"classes": ()}, "classes"),
        ({"keypoints": 3}, "keypoints"),
        ({"width_factor": 0.0}, "width_factor"),
    ],
)
def test_impossible_networks_are_refused(change: dict[str, object], word: str) -> None:
    settings: dict[str, object] = {"architecture": "lean", "classes": ("part",), "keypoints": 8} | change
    with pytest.raises(ValueError, match=word):
        NetworkConfig(**settings)  # type: ignore[arg-type]


def test_training_and_inference_agree_on_the_shared_head() -> None:
    """With the statistics of a batch as running statistics, the head gives in inference what it gave in training."""
    torch.manual_seed(0)
    network = KeypointNetwork(NetworkConfig("lean", ("part",), 4)).train()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    image = torch.rand(4, 3, 96, 96) * 255
    with torch.no_grad():
        trained = network.raw(image)
        inferred = network.eval().raw(image)
    # running variances are unbiased, batch variances are not: a small difference remains
    torch.testing.assert_close(inferred.logit, trained.logit, atol=0.02, rtol=0.02)
    torch.testing.assert_close(inferred.offset, trained.offset, atol=0.02, rtol=0.05)
