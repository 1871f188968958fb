# SPDX-License-Identifier: Apache-2.0
"""Which views and objects a training learns from: BOP-format folders, checked and decoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ukd_ros.data.bop import BopDataset
from ukd_ros.data.bop_check import check_bop
from ukd_ros.data.dataset import WindowDataset
from ukd_ros.data.progress import Bar
from ukd_ros.distillation.train_config import TrainConfig
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.view import LabelledView


def open_folders(
    config: TrainConfig,
    datasets: Sequence[Path],
    *,
    objects: Sequence[str] = (),
    held_out: Path | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> tuple[WindowDataset, list[ObjectModel], WindowDataset | None]:
    """Check and decode BOP-format folders; return the windows, the objects' models and the windows to validate on.

    `seed` of the windows (default: the run's).
    BopError or ValueError when a folder, its masks or an object is missing or a folder is faulty.
    """
    Bar.monitor_interval = 0  # its thread would not survive the fork of an ensemble
    folders, models = object_models(config, datasets, objects)
    ids = [folders[0].object_id(model.name) for model in models]
    for folder in [*folders, *([BopDataset(held_out)] if held_out else [])]:
        check_bop(folder, objects=ids if folder is folders[0] else (), masks=True)
    seed = config.seed if seed is None else seed
    data = WindowDataset(_Joined(folders), models, config.window, seed, progress)
    checked = WindowDataset(BopDataset(held_out), models, config.window, seed + 1, progress) if held_out else None
    return data, models, checked


def object_models(
    config: TrainConfig, datasets: Sequence[Path], objects: Sequence[str]
) -> tuple[list[BopDataset], list[ObjectModel]]:
    """Open BOP-format folders; return them and the models of the objects (all of the first folder by default).

    BopError or ValueError when a folder or an object is missing.
    """
    folders = [BopDataset(path) for path in datasets]
    if not folders:
        raise ValueError("train: needs at least one BOP-format data set")
    first = folders[0]
    ids = [first.object_id(name) for name in objects] if objects else list(first.object_ids)
    return folders, [first.object_model(i, config.keypoints, config.keypoint_kind) for i in ids]


class _Joined:
    """Several data sets as one."""

    def __init__(self, parts: Sequence[BopDataset]) -> None:
        self._where = [(part, i) for part in parts for i in range(len(part))]

    def __len__(self) -> int:
        return len(self._where)

    def view(self, index: int) -> LabelledView:
        part, i = self._where[index]
        return part.view(i)
