# SPDX-License-Identifier: Apache-2.0
"""How a training begins, or goes on: the network, its first weights, the optimizer, a checkpoint put back."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ukd_ros.distillation.checkpoint import load_checkpoint
from ukd_ros.distillation.guide import Guide
from ukd_ros.distillation.muon import Muon, Together
from ukd_ros.distillation.norms import NormStatistics
from ukd_ros.distillation.teacher_store import SUFFIX, load_teacher
from ukd_ros.distillation.train_config import TrainConfig
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.perception.backends import torch_network
from ukd_ros.perception.bundle import find_model, load_bundle
from ukd_ros.perception.network import KeypointNetwork, NetworkConfig

logger = logging.getLogger(__name__)

OBJECT_LAYERS = ("head.score.", "head.offset.", "head.scale.")
"""Names of the weights whose shape and meaning depend on the objects."""

FREE = frozenset(
    {"device", "threads", "checkpoint_every", "keep_every", "log_every", "validate_every", "validate_windows"}
)
"""Settings of a training that may change when it is resumed."""


def new_network(config: TrainConfig, models: Sequence[ObjectModel]) -> KeypointNetwork:
    """Return the untrained network of a run."""
    names = tuple(m.name for m in models)
    keypoints = models[0].keypoints_3d.shape[0]
    return KeypointNetwork(NetworkConfig(config.architecture, names, keypoints, config.width_factor))


def new_optimizer(network: KeypointNetwork, config: TrainConfig, extra: nn.Module | None = None) -> Together:
    """AdamW, or Muon for the hidden convolutions and AdamW for all else; biases and norms are not decayed.

    What `extra` learns is AdamW's.
    """
    parameters = list(network.parameters())
    ends = [network.head.score, network.head.offset, network.head.scale]
    outer = {id(p) for layer in ends for p in layer.parameters()} | {id(next(network.backbone.parameters()))}
    hidden = [p for p in parameters if p.dim() > 1 and config.optimizer == "muon" and id(p) not in outer]
    taken = {id(p) for p in hidden}
    parameters += [] if extra is None else list(extra.parameters())
    decay = [p for p in parameters if p.dim() > 1 and id(p) not in taken]
    rest = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99))]
    if hidden:
        parts.append(Muon(hidden, weight_decay=config.weight_decay))
    return Together(parts)


def start_from(path: Path, network: KeypointNetwork) -> None:
    """Copy the weights of an earlier run or a model folder, all that fit; ValueError when the layers differ."""
    # a training run is a folder with a checkpoint in it; a model is another kind of folder, or the name of one
    path = path / "checkpoint.pt" if (path / "checkpoint.pt").is_file() else path
    if path.suffix == SUFFIX:
        earlier = load_teacher(path).network
    else:
        earlier = load_checkpoint(path).network if path.is_file() else torch_network(load_bundle(find_model(path)))
    weights, config, mine = earlier.state_dict(), earlier.config, network.config
    same = replace(config, classes=mine.classes, keypoints=mine.keypoints)
    if same != mine:
        raise ValueError(f"train.initial: {path} holds {config}, but this run trains {mine}: the layers differ")
    if config == mine:
        network.load_state_dict(weights)
        return
    kept = {name: value for name, value in weights.items() if not name.startswith(OBJECT_LAYERS)}
    missing, unknown = network.load_state_dict(kept, strict=False)
    if unknown or any(not name.startswith(OBJECT_LAYERS) for name in missing):
        raise ValueError(f"train.initial: {path} lacks {', '.join(missing)} or has unknown {', '.join(unknown)}")
    logger.info("%s knows %s: its last layers begin anew for %s", path, config.classes, mine.classes)


def as_today(settings: dict[str, Any]) -> None:
    """Add to a training's settings, plain data, those that came later, as they were without them."""
    for key, before_it in {"optimizer": "adamw", "pose_weight": 0.0, "precision": "auto", "hold": 0.0}.items():
        settings.setdefault(key, before_it)
    settings.get("guide", {}).get("align", {}).setdefault("covariance", "entropy")


def restore(
    path: Path,
    network: KeypointNetwork,
    optimizer: Together,
    norms: NormStatistics,
    config: TrainConfig,
    guide: Guide | None = None,
) -> int:
    """Load a checkpoint into the parts; ValueError naming the first setting that differs."""
    content = load_checkpoint(path)
    mine, theirs = _plain(asdict(config)), dict(_plain(content.config))
    as_today(theirs)
    for key in sorted(set(mine) | set(theirs)):
        if key not in FREE and mine.get(key) != theirs.get(key):
            raise ValueError(
                f"{path}: was trained with {key} = {theirs.get(key)}, not {mine.get(key)}; --resume needs the same"
                + (f" (--set {key}={theirs[key]})" if isinstance(theirs.get(key), bool | int | float | str) else "")
            )
    if guide is not None and content.taught != guide.identity:
        raise ValueError(f"{path}: was taught by other teachers or on other windows; --resume needs the same")
    network.load_state_dict(content.network.state_dict())
    if guide is not None:
        guide.module.load_state_dict(content.extra)
    # before there was Muon, a checkpoint held the state of AdamW alone
    optimizer.load_state_dict(content.optimizer if "parts" in content.optimizer else {"parts": [content.optimizer]})
    norms.load()
    return content.step


def _plain(value: Any) -> Any:
    """Return settings as JSON would give them back, for comparison."""
    return json.loads(json.dumps(value))
