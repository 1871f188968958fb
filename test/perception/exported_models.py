# SPDX-License-Identifier: Apache-2.0
"""Small networks with lively votes, exported: what the tests of folders and runtimes share. Imports torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ukd_ros.distillation.export import ExportOptions, ExportReport, export_model
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.perception.network import KeypointNetwork, NetworkConfig

SMALL = ExportOptions(locate_width=96, locate_height=64, zoom_size=64)


def objects(classes: int, keypoints: int) -> tuple[ObjectModel, ...]:
    """Return objects of 10 cm with random keypoints."""
    rng = np.random.default_rng(1)
    return tuple(ObjectModel(f"part_{i}", rng.uniform(-0.02, 0.02, (keypoints, 3)), 0.1) for i in range(classes))


def lively_network(architecture: str = "lean", classes: int = 1, keypoints: int = 5) -> KeypointNetwork:
    """Return a narrow network whose scores, positions and scales vary, so that a wrong decoding shows."""
    torch.manual_seed(3)
    names = tuple(model.name for model in objects(classes, keypoints))
    network = KeypointNetwork(NetworkConfig(architecture, names, keypoints, width_factor=0.125))
    for layer in (network.head.score, network.head.offset, network.head.scale):
        nn.init.normal_(layer.weight, std=0.3)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(torch.rand(2, 3, 64, 64) * 255)
    return network.eval()


def export_small(root: Path, architecture: str = "lean", classes: int = 1, keypoints: int = 5) -> ExportReport:
    """Export such a network to ``root``."""
    network = lively_network(architecture, classes, keypoints)
    return export_model(network, objects(classes, keypoints), root, SMALL)
