# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints: everything a run needs to go on, written whole, read without executing anything."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ukd_ros.geometry.object_model import ObjectModel, Symmetries
from ukd_ros.perception.network import KeypointNetwork, NetworkConfig

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A network with its optimizer state, the steps done, the training settings and the objects it knows.

    `extra`: weights that only training needs (a distillation's projection); `taught`: by which teachers, on which
    windows; `untold`: the loss terms of each step since the last line of metrics.
    """

    network: KeypointNetwork
    optimizer: dict[str, Any]
    step: int
    config: dict[str, Any]
    models: tuple[ObjectModel, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    taught: str = ""
    untold: list[dict[str, float]] = field(default_factory=list)


@contextmanager
def writing_in(folder: Path, names: Sequence[str] = ()) -> Iterator[None]:
    """Hold a folder as one who writes there, and delete what killed writers left of files of these `names` (patterns).

    That is `.NAME.` and more letters. While another process holds the folder, or where files cannot be locked, all is
    left as it is: it may be half of what somebody writes. FileNotFoundError without the folder.
    """
    try:
        import fcntl
    except ImportError:  # a system without these locks
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in [path for name in names for path in folder.glob(f".{name}.*")]:
                path.unlink()
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint by rename: an interruption or a full disk (CheckpointError) leaves the previous one."""
    content = {
        "format": FORMAT,
        "network_config": asdict(checkpoint.network.config),
        "network": checkpoint.network.state_dict(),
        "optimizer": checkpoint.optimizer,
        "step": checkpoint.step,
        "config": checkpoint.config,
        "extra": checkpoint.extra,
        "taught": checkpoint.taught,
        "untold": checkpoint.untold,
        "models": [
            {
                "name": m.name,
                "keypoints_3d": torch.tensor(np.array(m.keypoints_3d)),
                "diameter": float(m.diameter),
                "symmetries": m.symmetries.to_bop(),
            }
            for m in checkpoint.models
        ],
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch words a full disk as a RuntimeError of its own
        kept = "the one before it is kept; " if path.is_file() else ""
        raise CheckpointError(
            f"{path}: cannot be written ({error}); {kept}make room on the disk and go on with --resume"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; CheckpointError when it is missing, truncated or of another format."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; `ukd train` writes one")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint ({error}); train again or use an older copy"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: checkpoint format {found} is not {FORMAT}, the one this version reads")
    settings = dict(content["network_config"])
    for key in ("classes", "mean", "std"):
        settings[key] = tuple(settings[key])
    network = KeypointNetwork(NetworkConfig(**settings))
    network.load_state_dict(content["network"])
    models = tuple(
        ObjectModel(m["name"], m["keypoints_3d"].numpy(), m["diameter"], Symmetries.from_bop(m["symmetries"]))
        for m in content["models"]
    )
    extra, taught, untold = content.get("extra", {}), str(content.get("taught", "")), content.get("untold", [])
    step, config = int(content["step"]), content["config"]
    return Checkpoint(network, content["optimizer"], step, config, models, extra, taught, untold)
