# SPDX-License-Identifier: Apache-2.0
"""Views that nobody labelled: where the teachers see something, windows are cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from ukd_ros.data.bop import BopDataset
from ukd_ros.data.bop_check import check_bop
from ukd_ros.data.dataset import UnlabelledWindows, WindowConfig
from ukd_ros.data.progress import Bar
from ukd_ros.distillation.export import trained_options
from ukd_ros.distillation.guidance import seen
from ukd_ros.distillation.teacher import Ensemble
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.view import View
from ukd_ros.perception.crop import letterbox


def propose(
    ensemble: Ensemble,
    views: Iterable[tuple[int, View]],
    locate_width: int,
    total: int | None = None,
    progress: bool = True,
) -> list[tuple[int, FloatArray]]:
    """Return the boxes (number of the view; x0 y0 x1 y1 px) of what the teachers see in whole frames.

    Every frame is brought to the size of the estimator's locate stage, whatever its own: what a bag says of its images
    does not decide how much memory is asked for. Boxes are whole pixels: what two machines see differs by less.
    """
    device = next(ensemble.networks[0].parameters()).device
    sizes = trained_options({"window": {"locate_width": locate_width}})
    boxes: list[tuple[int, FloatArray]] = []
    for number, view in Bar(views, desc="looking for objects", unit="view", total=total, disable=not progress):
        camera = view.camera
        crop = letterbox((camera.width, camera.height), (sizes.locate_width, sizes.locate_height))
        image = torch.from_numpy(crop.warp(view.image)).permute(2, 0, 1)[None].to(device, torch.float32)
        found = ensemble.predict(image)
        boxes += [(number, np.round(instance.to_source(crop).box)) for instance in seen(found, 0)]
    return boxes


class _FolderViews:
    """The views of folders, decoded when they are asked for."""

    def __init__(self, folders: Sequence[BopDataset]) -> None:
        self._where = [(data, index) for data in folders for index in range(len(data))]

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, number: int, /) -> View:
        data, index = self._where[number]
        image = data.image(index)
        return View(image, data.camera(index, (int(image.shape[1]), int(image.shape[0]))))


def open_unlabelled(
    folders: Sequence[Path],
    ensemble: Ensemble,
    models: Sequence[ObjectModel],
    config: WindowConfig,
    seed: int,
    progress: bool = True,
) -> UnlabelledWindows:
    """Return windows of BOP-format folders whose labels, if they have any, are not read.

    ValueError when the teachers see nothing in any view; BopError for a faulty folder.
    """
    opened = [BopDataset(folder) for folder in folders]
    for data in opened:
        check_bop(data, objects=())
    views = _FolderViews(opened)
    numbered = ((number, views[number]) for number in range(len(views)))
    boxes = propose(ensemble, numbered, config.locate_width, len(views), progress)
    if not boxes:
        names = ", ".join(m.name for m in models)
        raise ValueError(
            f"{', '.join(map(str, folders))}: the teachers see no {names} in any of the {len(views)} views; "
            "train them longer or look whether these views show the objects"
        )
    return UnlabelledWindows(views, boxes, models, config, seed, progress)
