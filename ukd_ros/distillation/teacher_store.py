# SPDX-License-Identifier: Apache-2.0
"""Teachers in a file small enough for a repository: weights of 8 or 16 bits, and what they know; nothing executable.

Convolutions are stored as integers with a scale per output channel (8 bits) or as half floats; norms and biases stay as
they are. `ukd bench teacher_storage` measures what that costs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ukd_ros.data.whole_files import write_bytes
from ukd_ros.distillation.checkpoint import Checkpoint, CheckpointError
from ukd_ros.geometry.object_model import ObjectModel, Symmetries
from ukd_ros.perception.network import KeypointNetwork, NetworkConfig

FORMAT = "ukd teacher 1"
SUFFIX = ".safetensors"
BITS = (8, 16)
_SCALE = ".scale"


@dataclass(frozen=True, eq=False)
class StoredTeacher:
    """A teacher as a file tells it: the network, its objects, and the side of the windows it was trained on, px."""

    network: KeypointNetwork
    models: tuple[ObjectModel, ...]
    window: int


def save_teacher(path: Path, checkpoint: Checkpoint, bits: int = 8) -> None:
    """Write a checkpoint's network by rename; ValueError for other bits than 8 or 16."""
    if bits not in BITS:
        raise ValueError(f"bits: is {bits}, but one of {', '.join(map(str, BITS))} is needed")
    note = {
        "format": FORMAT,
        "network": asdict(checkpoint.network.config),
        "window": int(checkpoint.config.get("window", {}).get("size", 0)),
        "step": checkpoint.step,
        "samples": checkpoint.step * int(checkpoint.config.get("batch_size", 0)),
        "seed": checkpoint.config.get("seed"),
        "models": [
            {
                "name": m.name,
                "keypoints_3d": np.asarray(m.keypoints_3d).tolist(),
                "diameter": float(m.diameter),
                "symmetries": m.symmetries.to_bop(),
            }
            for m in checkpoint.models
        ],
    }
    state = stored_weights(checkpoint.network, bits)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, safetensors.torch.save(state, {"ukd": json.dumps(note)}))


def load_teacher(path: Path) -> StoredTeacher:
    """Read a teacher; CheckpointError when it is missing, damaged or something else."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such teacher; `ukd export --teacher` writes one")
    try:
        with safetensors.safe_open(path, "pt") as content:
            note = json.loads((content.metadata() or {}).get("ukd", "null"))
            state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - no mapping
        if not isinstance(note, dict) or note.get("format") != FORMAT:
            raise CheckpointError(f"{path}: is no teacher of the format {FORMAT!r}; write it with ukd export --teacher")
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in note["network"].items()}
        network = KeypointNetwork(NetworkConfig(**settings))
        network.load_state_dict(_restored(state))
        models = tuple(_model(m) for m in note["models"])
        fault = _fault(network, models, int(note["window"]), state)
        if fault:
            raise CheckpointError(f"{path}: {fault}; fetch it again or export it")
        return StoredTeacher(network, models, int(note["window"]))
    except CheckpointError:
        raise
    except (
        safetensors.SafetensorError,
        OSError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        raise CheckpointError(f"{path}: cannot be read as a teacher ({error}); fetch it again or export it") from error


def stored_weights(network: KeypointNetwork, bits: int) -> dict[str, Tensor]:
    """Return the weights as they are stored."""
    state: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        value = value.detach().cpu()
        if not value.is_floating_point() or value.dim() != 4:
            state[name] = value.contiguous()
        elif bits == 16:
            state[name] = value.half().contiguous()
        else:
            scale = value.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12) / 127.0
            state[name] = torch.round(value / scale).to(torch.int8).contiguous()
            state[name + _SCALE] = scale.contiguous()
    return state


def _restored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as the network takes them."""
    restored: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(_SCALE) and name[: -len(_SCALE)] in state:
            continue
        scale = state.get(name + _SCALE)
        if value.is_floating_point() or scale is not None:
            value = value.float()
        restored[name] = value if scale is None else value * scale
    return restored


def _fault(network: KeypointNetwork, models: tuple[ObjectModel, ...], window: int, state: dict[str, Tensor]) -> str:
    """Say what is wrong with a teacher that could be read, "" when nothing is."""
    if network.config.classes != tuple(m.name for m in models):
        return f"its network knows {network.config.classes}, its models are {tuple(m.name for m in models)}"
    if any(len(m.keypoints_3d) != network.config.keypoints for m in models):
        return f"its network has {network.config.keypoints} keypoints, its models have another number"
    if window < 0:
        return f"its window of {window} px is none"
    if any(value.dtype == torch.int8 and name + _SCALE not in state for name, value in state.items()):
        return "integers without their scale"
    if not all(torch.isfinite(value.float()).all() for value in network.state_dict().values()):
        return "its weights are not finite"
    return ""


def _model(note: dict[str, Any]) -> ObjectModel:
    points = np.asarray(note["keypoints_3d"], np.float64)
    return ObjectModel(str(note["name"]), points, float(note["diameter"]), Symmetries.from_bop(note["symmetries"]))
