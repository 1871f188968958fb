# SPDX-License-Identifier: Apache-2.0
"""Views that nobody labelled: where the teachers see something, windows are cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ukd_ros.data.bop import BopDataset
from ukd_ros.data.bop_check import check_bop
from ukd_ros.data.dataset import UnlabelledWindows, WindowConfig
from ukd_ros.data.progress import Bar
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.distillation.guidance import seen
from ukd_ros.distillation.teacher import Ensemble
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.view import View
from ukd_ros.perception.cells import STRIDES
from ukd_ros.perception.crop import letterbox


def propose(
    ensemble: Ensemble, views: Sequence[View], locate_width: int, progress: bool = True
) -> list[tuple[int, FloatArray]]:
    """Return the boxes (number of the view; x0 y0 x1 y1 px) of what the teachers see in whole frames.

    Every frame is brought to `locate_width` px, as for the estimator's locate stage. Boxes are whole pixels: what two
    machines see differs by less.
    """
    device = next(ensemble.networks[0].parameters()).device
    step = STRIDES[-1]
    width = -(-locate_width // step) * step
    boxes: list[tuple[int, FloatArray]] = []
    for number, view in enumerate(Bar(views, desc="looking for objects", unit="view", disable=not progress)):
        camera = view.camera
        height = -(-round(width * camera.height / camera.width) // step) * step
        crop = letterbox((camera.width, camera.height), (width, height))
        image = torch.from_numpy(crop.warp(view.image)).permute(2, 0, 1)[None].to(device, torch.float32)
        found = ensemble.predict(image)
        boxes += [(number, np.round(instance.to_source(crop).box)) for instance in seen(found, 0)]
    return boxes


def kept_proposals(
    path: Path, ensemble: Ensemble, views: Sequence[View], which: str, locate_width: int, progress: bool = True
) -> list[tuple[int, FloatArray]]:
    """Return `propose`'s boxes from a file, where it holds those of this ensemble and these views (`which`); else ask.

    Asking leaves the file.
    """
    asked = [ensemble.identity, which, locate_width]
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        rows: list[tuple[int, FloatArray]] = [
            (int(number), np.array(box, np.float64).reshape(4)) for number, box in told["boxes"]
        ]
        if told["asked"] == asked and all(0 <= n < len(views) and np.isfinite(box).all() for n, box in rows):
            return rows
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or of another question: it is asked anew
    boxes = propose(ensemble, views, locate_width, progress)
    told = {"asked": asked, "boxes": [[number, box.tolist()] for number, box in boxes]}
    write_bytes(path, (json.dumps(told) + "\n").encode())
    return boxes


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
    views: list[View] = []
    for folder in folders:
        data = BopDataset(folder)
        check_bop(data, objects=())
        for index in Bar(range(len(data)), desc=f"reading {folder.name}", unit="view", disable=not progress):
            image = data.image(index)
            views.append(View(image, data.camera(index, (int(image.shape[1]), int(image.shape[0])))))
    boxes = propose(ensemble, views, config.locate_width, progress)
    if not boxes:
        names = ", ".join(m.name for m in models)
        raise ValueError(
            f"{', '.join(map(str, folders))}: the teachers see no {names} in any of the {len(views)} views; "
            "train them longer or look whether these views show the objects"
        )
    return UnlabelledWindows(views, boxes, models, config, seed)
