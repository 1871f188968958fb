# SPDX-License-Identifier: Apache-2.0
"""One scene of a plan as a BOP scene folder; it appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.data.bop import gt_entry
from ukd_ros.data.rosbag.plan import ScenePlan
from ukd_ros.data.rosbag.reader import BagReader, Entry
from ukd_ros.data.rosbag.storage import BagError
from ukd_ros.data.rosbag.survey import Frame, Survey, camera_of
from ukd_ros.data.undistortion import undistorted
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.geometry.pose import Pose
from ukd_ros.perception.images import ImageError, image_from_message

PNG_LEVEL = 1
"""Of compression; higher levels save a tenth of the space for several times the time."""

FRAMES_FILE = "frames.json"
SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png"}


def scene_folder(out: Path, scene: ScenePlan) -> Path:
    """Return where a scene belongs."""
    return out / scene.split / f"{scene.scene_id:06d}"


def write_scene(
    out: Path,
    scene: ScenePlan,
    bag: BagReader,
    survey: Survey,
    objects: Mapping[str, int],
    done: Callable[[], object] = lambda: None,
) -> None:
    """Write a scene beside its place and rename it there; ``done`` is called after every image.

    Nothing stays of one that fails. BagError when the bag no longer gives an image that it gave before.
    """
    place = scene_folder(out, scene)
    beside = place.with_name(f".{place.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)  # of a call that was killed; only this process has this scene
    try:
        (beside / "rgb").mkdir(parents=True)
        tables: dict[str, dict[str, Any]] = {"scene_camera": {}, "scene_gt": {}, "frames": {}}
        for number, frame in enumerate(scene.frames):
            _write_image(beside / "rgb" / f"{number:06d}", bag, survey, frame)
            tables["scene_camera"][str(number)] = _camera_entry(survey, frame)
            tables["frames"][str(number)] = {
                "bag": survey.bag,
                "topic": survey.image_topic,
                "stamp_ns": frame.stamp_ns,
                "recorded_ns": frame.entry[0],
                "frame_id": frame.frame_id,
            }
            if frame.labels:
                tables["scene_gt"][str(number)] = [_label_entry(label, objects) for label in frame.labels]
            done()
        for name, table in tables.items():
            if table:
                lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
                write_bytes(beside / f"{name}.json", ("{\n" + lines + "\n}\n").encode())
        os.rename(beside, place)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _write_image(stem: Path, bag: BagReader, survey: Survey, frame: Frame) -> None:
    """Write what the camera's pinhole twin sees, without losing a pixel: a JPEG as it is, or a PNG."""
    try:
        message = bag.read(Entry(*frame.entry)).decoded()
        image = image_from_message(message)
    except (BagError, ImageError, KeyError, IndexError) as error:
        raise BagError(f"{bag.path}: changed while it was read ({error}); start again in a new folder.") from error
    camera = camera_of(survey.cameras[frame.camera])
    if not camera.distorted and hasattr(message, "format"):
        data = np.asarray(message.data, dtype=np.uint8).tobytes()
        suffix = SUFFIXES.get(data[:2])
        if suffix is not None and _same(data, image):
            write_bytes(stem.with_suffix(suffix), data)
            return
    try:
        pixels = cv2.cvtColor(undistorted(image, camera), cv2.COLOR_RGB2BGR)
        ok, png = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, PNG_LEVEL])
    except cv2.error as error:
        raise BagError(f"{stem}: OpenCV could not write this image of {bag.path}: {error.err}.") from error
    if not ok:
        raise BagError(f"{stem}: OpenCV could not encode it as PNG.")
    write_bytes(stem.with_suffix(".png"), png.tobytes())


def _same(data: bytes, image: npt.NDArray[np.uint8]) -> bool:
    """Return whether a reader of BOP folders sees ``image`` in the file ``data``.

    Not so where the file turns itself by EXIF, which a camera's model knows nothing of, or has red and blue exchanged.
    """
    decoded = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR)
    return decoded is not None and np.array_equal(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), image)


def _camera_entry(survey: Survey, frame: Frame) -> dict[str, Any]:
    camera = survey.cameras[frame.camera]
    return {"cam_K": camera["matrix"], "depth_scale": 1.0, "width": camera["width"], "height": camera["height"]}


def _label_entry(label: Mapping[str, Any], objects: Mapping[str, int]) -> dict[str, Any]:
    return gt_entry(objects[label["name"]], Pose(np.reshape(label["R"], (3, 3)), label["t"]))
