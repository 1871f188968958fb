# SPDX-License-Identifier: Apache-2.0
"""What arrives: the newest image waiting for the worker, and the camera_info that belongs to it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ukd_ros.geometry.camera import Camera
from ukd_ros.perception.images import CameraInfoError, rectified_topic

Item = TypeVar("Item")

MAX_CAMERA_INFOS = 16
"""So many cameras (frame, size, window) are remembered; a stream of new frame ids must not fill the memory."""


class NewestSlot(Generic[Item]):
    """One place between a callback and a worker: the newest item wins, what it replaces is dropped and counted."""

    def __init__(self) -> None:
        """Start empty and open."""
        self._condition = threading.Condition()
        self._item: Item | None = None
        self._closed = False

    def put(self, item: Item) -> bool:
        """Store ``item``; return whether it replaced one that nobody had taken. A closed slot drops everything."""
        with self._condition:
            replaced = self._item is not None or self._closed
            self._item = None if self._closed else item
            self._condition.notify()
            return replaced

    def take(self) -> Item | None:
        """Wait for an item and take it out; None when the slot was closed."""
        with self._condition:
            self._condition.wait_for(lambda: self._item is not None or self._closed)
            item, self._item = self._item, None
            return item

    def close(self) -> None:
        """Forget the waiting item and wake the worker with None."""
        with self._condition:
            self._item = None
            self._closed = True
            self._condition.notify_all()


def rectified_from(choice: str, topic: str) -> bool:
    """Decide whether images are rectified: ``choice`` is auto, true or false; auto asks the name of ``topic``."""
    if choice == "auto":
        return rectified_topic(topic)
    if choice in ("true", "false"):
        return choice == "true"
    raise ValueError(f"rectified: is '{choice}', but one of auto, true, false is needed.")


class CameraInfoCache:
    """The newest CameraInfo of each camera. Calibration does not change per frame, so no synchroniser is needed.

    An image is served by the newest message of the same frame_id whose image size is its own. Messages come in from one
    thread and are looked up from another.
    """

    def __init__(self, rectified: bool, convert: Callable[[Any, bool], Camera]) -> None:
        """Remember ``convert`` (message, rectified) -> Camera, which raises CameraInfoError."""
        self._rectified = rectified
        self._convert = convert
        self._lock = threading.Lock()
        self._infos: OrderedDict[tuple[Any, ...], tuple[tuple[Any, ...], Camera | CameraInfoError]] = OrderedDict()
        self.received = 0

    def store(self, info: Any) -> CameraInfoError | None:
        """Keep ``info`` (sensor_msgs/CameraInfo) as the newest of its camera; return what is wrong with it or None."""
        roi = info.roi
        window = (roi.x_offset, roi.y_offset, roi.width, roi.height, info.binning_x, info.binning_y)
        key = (info.header.frame_id, info.width, info.height, *window)
        content = (info.distortion_model, tuple(info.d), tuple(info.k), tuple(info.p))
        with self._lock:
            self.received += 1
            known = self._infos.pop(key, None)
        # Comparing 30 numbers is cheaper than checking a lens model at every message of a 100 Hz camera.
        if known is not None and known[0] == content:
            entry = known
        else:
            entry = (content, self._converted(info))
        with self._lock:
            self._infos[key] = entry
            while len(self._infos) > MAX_CAMERA_INFOS:
                self._infos.popitem(last=False)
        return entry[1] if isinstance(entry[1], CameraInfoError) else None

    def _converted(self, info: Any) -> Camera | CameraInfoError:
        try:
            return self._convert(info, self._rectified)
        except CameraInfoError as error:
            return error

    def camera_for(self, frame_id: str, width: int, height: int) -> Camera:
        """Return the camera of an image of this frame and size (px); CameraInfoError says why there is none."""
        with self._lock:
            newest_first = [(key, entry[1]) for key, entry in reversed(self._infos.items())]
        if not newest_first:
            raise CameraInfoError(
                "no camera_info has arrived yet: without the camera's matrix an image gives no pose. "
                "Check the camera_info remapping."
            )
        same_frame = [(key[1:3], camera) for key, camera in newest_first if key[0] == frame_id]
        if not same_frame:
            names = ", ".join(sorted({f"'{key[0]}'" for key, _ in newest_first}))
            raise CameraInfoError(
                f"the image is in frame '{frame_id}', but camera_info only came for {names}. Both must carry the "
                "optical frame's id; the camera_info of another camera would give a wrong pose."
            )
        for declared, camera in same_frame:
            if isinstance(camera, CameraInfoError):
                if declared == (width, height):
                    raise camera
            elif (camera.width, camera.height) == (width, height):
                return camera
        for _, camera in same_frame:
            if isinstance(camera, CameraInfoError):
                raise camera
        sizes = ", ".join(f"{c.width}x{c.height}" for _, c in same_frame if isinstance(c, Camera))
        raise CameraInfoError(
            f"the image of frame '{frame_id}' is {width}x{height}, but its camera_info describes {sizes} (roi and "
            "binning applied). Something resized one of them without the other; publish the camera_info of this image."
        )
