# SPDX-License-Identifier: Apache-2.0
"""The frames of bags, as `data.rosbag.frames` writes them: views by number, with where and when each was recorded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ukd_ros.data.bop import BopDataset, BopError
from ukd_ros.data.dataset import SupposedObject
from ukd_ros.data.rosbag.scenes import FRAMES_FILE
from ukd_ros.distillation.pseudo_labels import PseudoLabel
from ukd_ros.geometry.view import View


class Frames:
    """One split of a folder of frames; images are decoded when they are asked for.

    places: (stretch, stamp ns) of every frame; a stretch is one scene of one recording, and in it time goes on: a
    clock that was set back begins another. blocks: the scene of every frame.
    """

    def __init__(self, folder: Path, split: str, names: Mapping[int, str] | None = None) -> None:
        """`names` of the labelled objects by id. BopError: no such split, or a scene that lacks its frames.json."""
        self.data = BopDataset(folder, split, dict(names or {}))
        told = {scene: _told(path / FRAMES_FILE) for scene, path in self.data.scene_folders.items()}
        stretches = sorted({(bag, scene) for scene, rows in told.items() for bag, _ in rows.values()})
        number = {stretch: n for n, stretch in enumerate(stretches)}
        self.places: list[tuple[int, int]] = []
        self.blocks: list[int] = []
        for image in self.data.images:
            scene = told[image.scene_id]
            if image.image_id not in scene:
                place = self.data.scene_folders[image.scene_id] / FRAMES_FILE
                raise BopError(
                    f"{place}: lacks image {image.image_id}; delete the folder of frames, and it is made again."
                )
            bag, stamp = scene[image.image_id]
            self.places.append((number[bag, image.scene_id], stamp))
            self.blocks.append(image.scene_id)

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.data)

    def __getitem__(self, number: int, /) -> View:
        """Return one frame; IndexError beyond the last."""
        return self.view(number)

    def view(self, number: int) -> View:
        """Return one frame; what labels it may have are not read."""
        image = self.data.image(number)
        size = (int(image.shape[1]), int(image.shape[0]))
        return View(image, self.data.camera(number, size), self.places[number][1])

    def some(self, numbers: Sequence[int]) -> Iterator[tuple[int, View]]:
        """Yield number and view of these frames, one at a time."""
        for number in numbers:
            yield number, self.view(number)

    @property
    def labelled(self) -> bool:
        """Whether the bags said where objects are in any of these frames."""
        return any(self.data.labels(i, masks=False) for i in range(len(self.data)))

    def fingerprint(self) -> str:
        """Return a digest of which frames these are, without decoding them."""
        rows = [
            (image.scene_id, image.image_id, place, image.path.stat().st_size)
            for image, place in zip(self.data.images, self.places, strict=True)
        ]
        return hashlib.sha256(repr(rows).encode()).hexdigest()


class LabelledFrames:
    """Frames with the accepted labels that they have, by number among those that have any; made when asked for."""

    def __init__(self, frames: Frames, labels: Mapping[int, Sequence[PseudoLabel]]) -> None:
        """`labels` by the frame's number."""
        self._frames, self._labels, self._numbers = frames, labels, sorted(labels)

    def __len__(self) -> int:
        """Return the number of frames with labels."""
        return len(self._numbers)

    def __getitem__(self, number: int, /) -> tuple[View, list[SupposedObject]]:
        """Return a frame and what is supposed in it."""
        place = self._numbers[number]
        view = self._frames.view(place)
        size = view.camera.width, view.camera.height
        return view, [label.supposed(*size) for label in self._labels[place]]


def _told(path: Path) -> dict[int, tuple[str, int]]:
    """Return the recording's name and the stamp (ns) by image id of a scene's frames.json."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {int(key): (str(row["bag"]), int(row["stamp_ns"])) for key, row in data.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BopError(
            f"{path}: cannot be read ({error}); delete the folder of frames, and it is made again."
        ) from error
