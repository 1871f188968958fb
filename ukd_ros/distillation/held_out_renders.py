# SPDX-License-Identifier: Apache-2.0
"""Renders that neither teachers nor student learn from: opened, checked and parted before any long work."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ukd_ros.data.bop import SCENE_FILES, BopDataset, BopError
from ukd_ros.data.bop_check import check_bop
from ukd_ros.geometry.object_model import ObjectModel

logger = logging.getLogger(__name__)

LEAST_VIEWS = 30
"""What calibrating takes at least; with twice as many, others say how sure a label must be."""

SAME_VIEWS = (
    "{folder}: holds {count} views, too few to part: how sure a label must be is measured on those that the teachers "
    "were calibrated on, so fewer labels are right than was asked for; {least} would do"
)


@dataclass(frozen=True, eq=False)
class HeldOutRenders:
    """Views of a folder: the teachers are calibrated on `fitted`, and `chosen` say how sure a label must be.

    trouble: what is wrong with that, if anything.
    """

    views: BopDataset
    fitted: range
    chosen: range
    trouble: str

    def digest(self) -> str:
        """Return what tells these views from others at the same place: their labels, and the sizes of their images."""
        found = hashlib.sha256()
        for scene, folder in sorted(self.views.scene_folders.items()):
            for file in (folder / name for name in SCENE_FILES):
                found.update(f"{scene} {file.name}\n".encode() + (file.read_bytes() if file.is_file() else b""))
        for number in sorted({*self.fitted, *self.chosen}):
            image = self.views.images[number]
            found.update(f"{image.scene_id} {image.image_id} {image.path.stat().st_size}\n".encode())
        return found.hexdigest()


def open_held_out(folder: Path, learnt: Sequence[Path], models: Sequence[ObjectModel], wanted: int) -> HeldOutRenders:
    """Open a folder and check the views that will be used, `wanted` to calibrate on.

    ValueError for a folder that is also `learnt` from, BopError for a faulty one or one without the models' objects.
    """
    if folder.resolve() in [path.resolve() for path in learnt]:
        raise ValueError(f"{folder}: is learnt from and held out; give two folders that share no render")
    views = BopDataset(folder)
    known = {model.name for model in models}
    mine = [number for number in views.object_ids if views.name(number) in known]
    if not mine:
        names = ", ".join(views.name(number) for number in views.object_ids) or "no objects"
        raise BopError(f"{folder}: has {names}, but {', '.join(sorted(known))} is to be learnt: none in common")
    fitted, chosen = parted(len(views), wanted)
    check_bop(views, sorted({*fitted, *chosen}), objects=mine)
    trouble = ""
    if fitted == chosen:
        trouble = SAME_VIEWS.format(folder=folder, count=len(views), least=2 * LEAST_VIEWS)
        logger.warning("%s", trouble)
    return HeldOutRenders(views, fitted, chosen, trouble)


def parted(views: int, wanted: int) -> tuple[range, range]:
    """Return which of so many held-out views calibrate the teachers, and which say how sure a label must be.

    As many others as there are for calibrating, or half each; the same where halves were too few to calibrate on.
    """
    count = min(wanted, views // 2)
    if count < min(wanted, LEAST_VIEWS):
        return range(min(wanted, views)), range(min(wanted, views))
    return range(count), range(count, 2 * count)
