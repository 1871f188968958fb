# SPDX-License-Identifier: Apache-2.0
"""Photographs of a BOP data set as a bag, so that a running node can be played and measured on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ukd_ros.data.bop import BopDataset, BopError
from ukd_ros.data.rosbag.writer import write_bag
from ukd_ros.geometry.view import LabelledView

START_NS = 1_000_000_000
FRAME_ID = "camera_optical"


def bag_from_bop(
    dataset: Path | str,
    out: Path | str,
    image_ids: Sequence[int] | None = None,
    object_names: Sequence[str] | None = None,
    names: Mapping[int, str] | None = None,
    rate_hz: float = 10.0,
    split: str | None = None,
    codec: str = "png",
) -> int:
    """Write images of the BOP folder ``dataset`` as the bag ``out``, ``rate_hz`` apart; return how many.

    image_ids: which images, in this order (None: all). object_names: whose true poses go along (None: all), as
    ``names`` (object id -> name) or models_info.json calls them; call them as the model does. codec: png or jpeg; png
    changes no pixel.
    BopError when an image or object is not there, ValueError for a rate that is no rate, BagError when ``out`` exists.
    """
    if not 0.0 < rate_hz < 1e6:
        raise ValueError(f"rate_hz: is {rate_hz}, but a positive number of images per second is needed.")
    data = BopDataset(dataset, split, dict(names) if names else None)
    for name in object_names or ():
        data.object_id(name)
    by_id = {image.image_id: index for index, image in enumerate(data.images)}
    missing = [i for i in image_ids or () if i not in by_id]
    if missing:
        raise BopError(
            f"{dataset}: has no image {missing[0]} ({len(missing)} of the {len(image_ids or ())} are missing)."
        )
    indices = range(len(data)) if image_ids is None else [by_id[i] for i in image_ids]
    return write_bag(out, _views(data, indices, object_names, 1e9 / rate_hz), codec=codec)


def _views(
    data: BopDataset, indices: Sequence[int], object_names: Sequence[str] | None, step_ns: float
) -> Iterator[LabelledView]:
    for number, index in enumerate(indices):
        view = data.view(index, masks=False)
        kept = tuple(label for label in view.objects if object_names is None or label.object_name in object_names)
        yield replace(view, objects=kept, stamp_ns=START_NS + round(number * step_ns), frame_id=FRAME_ID)
