# SPDX-License-Identifier: Apache-2.0
"""What the shipped model and bag give to tests: teachers of the demo's bottle, its bag, and labelled views of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from ukd_ros.data.bop import model_info
from ukd_ros.data.demo_object import DEMO_NAME, demo_mesh
from ukd_ros.data.meshes import write_ply
from ukd_ros.data.rosbag.frames import BagOptions, bags_to_bop
from ukd_ros.distillation.checkpoint import Checkpoint
from ukd_ros.distillation.teacher_store import save_teacher
from ukd_ros.perception.backends import torch_network
from ukd_ros.perception.bundle import load_bundle

ROOT = Path(__file__).resolve().parents[2]
BAG = ROOT / "models" / "sample_bag"
MODEL = ROOT / "models" / "spray_bottle"


def save_teachers(folder: Path, count: int = 2) -> Path:
    """Store the shipped student and near copies of it as an ensemble of teachers."""
    bundle = load_bundle(MODEL)
    for seed in range(count):
        network = copy.deepcopy(torch_network(bundle))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                if seed and parameter.dim() == 4:
                    parameter.mul_(1.0 + 0.01 * torch.randn_like(parameter))
        settings: dict[str, Any] = {"window": {"size": 128}, "batch_size": 32, "seed": seed}
        save_teacher(folder / f"seed-{seed}.safetensors", Checkpoint(network, {}, 1, settings, bundle.objects), 16)
    return folder


def labelled_views(out: Path) -> Path:
    """Write 80 frames of the bag with its truth as a BOP folder with the object's mesh."""
    options = BagOptions(min_change=0.0, held_out=0.0, max_frames=80)
    bags_to_bop([BAG], out, options, names={DEMO_NAME: 1}, progress=False)
    (out / "models").mkdir(exist_ok=True)
    write_ply(out / "models" / "obj_000001.ply", demo_mesh())
    facts = {"1": model_info(DEMO_NAME, demo_mesh())}
    (out / "models" / "models_info.json").write_text(json.dumps(facts))
    return out
