# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a BOP folder, found before any long work starts: no pixel is decoded.

Thousands of images take seconds. The first fault is raised as a `BopError` that names file and id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ukd_ros.data.bop import BopDataset, BopError
from ukd_ros.data.meshes import MeshError

_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)
SLACK = 0.1
"""Relative difference allowed between a mesh and models_info.json; a wrong unit is off by a factor of ten or more."""


def check_bop(
    data: BopDataset,
    indices: Iterable[int] | None = None,
    *,
    objects: Iterable[int] | None = None,
    masks: bool = False,
    targets: bool = False,
    evaluation: bool = False,
) -> None:
    """Raise BopError for the first fault in the images `indices` (all when None) and the models `objects`.

    Checked are the image files and their sizes, cameras, poses, ids, the models' meshes (with `evaluation` those that
    evaluation takes) and their unit; with `masks` also that every label has its visible mask, with `targets` that the
    target list asks only for what is labelled.
    """
    _check_models(data, data.object_ids if objects is None else tuple(objects), evaluation)
    chosen = range(len(data)) if indices is None else list(indices)
    present = {scene: _names_in(folder / "mask_visib") for scene, folder in data.scene_folders.items()} if masks else {}
    for index in chosen:
        _check_image(data, index)
        labels = data.labels(index, masks=False)
        if masks:
            entry = data.images[index]
            for number in range(len(labels)):
                name = f"{entry.image_id:06d}_{number:06d}.png"
                if name not in present[entry.scene_id]:
                    place = data.scene_folders[entry.scene_id] / "mask_visib"
                    raise BopError(
                        f"{place if not present[entry.scene_id] else place / name}: is missing; training needs every "
                        "object's visible mask (ukd render writes them)."
                    )
    if targets:
        _check_targets(data, set(chosen))


def _check_models(data: BopDataset, objects: tuple[int, ...], evaluation: bool) -> None:
    """Every mesh is there and as large as models_info.json says."""
    for object_id in objects:
        said = data.model_facts(object_id).get("diameter")
        try:
            vertices = data.mesh(object_id, evaluation).vertices
        except MeshError as error:
            raise BopError(f"the mesh of object {object_id}: {error}") from error
        sides = np.ptp(vertices, axis=0) * 1e3
        low, high = float(sides.max()), float(np.linalg.norm(sides))  # a diameter lies between side and diagonal
        if said is None or low * (1 - SLACK) <= float(said) <= high * (1 + SLACK):
            continue
        raise BopError(
            f"{data.models_folder}: obj_{object_id:06d}.ply is {low:.4g} to {high:.4g} mm across, but models_info.json "
            f"says {float(said):.4g} mm; BOP's meshes are in mm. Write the mesh in mm, or correct the diameter."
        )


def _check_image(data: BopDataset, index: int) -> None:
    """The image can be opened, has the size its camera says, and the camera is one."""
    entry = data.images[index]
    try:
        with Image.open(entry.path) as image:
            turned = image.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE  # the reader turns it upright
            size = image.size[::-1] if turned else image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BopError(f"{entry.path}: cannot be read as an image ({error}); copy it again.") from error
    said = data.camera_size(index)
    if said is not None and said != size:
        raise BopError(
            f"{entry.path}: is {size[0]}x{size[1]}, but the camera of image {entry.image_id} is {said[0]}x{said[1]}; "
            "its cam_K would be wrong for it."
        )
    try:
        data.camera(index, size)
    except BopError:
        raise
    except ValueError as error:
        place = data.scene_folders[entry.scene_id] / "scene_camera.json"
        raise BopError(f"{place}: image {entry.image_id}: {error}") from error


def _check_targets(data: BopDataset, chosen: set[int]) -> None:
    """What the target list asks for is labelled, as often as it says."""
    unlabelled = [f for f in data.scene_folders.values() if not (f / "scene_gt.json").is_file()]
    if unlabelled:
        raise BopError(f"{unlabelled[0]}/scene_gt.json: is missing, so there is nothing to compare the poses with.")
    number = {(image.scene_id, image.image_id): i for i, image in enumerate(data.images)}
    labelled: dict[int, Counter[str]] = {}
    for target in data.targets():
        index = number[target.scene_id, target.image_id]
        if index not in chosen:
            continue
        if target.object_id not in data.object_ids:
            continue  # a folder cut down to some of the objects is sound
        if index not in labelled:
            labelled[index] = Counter(label.object_name for label in data.labels(index, masks=False))
        found = labelled[index][data.name(target.object_id)]
        if found < target.count:
            raise BopError(
                f"{data.root}/test_targets_bop19.json: asks for {target.count} of object {target.object_id} in image "
                f"{target.image_id} of scene {target.scene_id}, but scene_gt.json labels {found}."
            )


def _names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
