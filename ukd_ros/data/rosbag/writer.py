# SPDX-License-Identifier: Apache-2.0
"""A bag being written: views as a camera's compressed images, with their true poses; it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer, WriterError

from ukd_ros.data.rosbag.message_types import IMAGE_TYPES, INFO_TYPE, POSE_TYPE, store
from ukd_ros.data.rosbag.storage import BagError
from ukd_ros.geometry.camera import Camera, DistortionModel
from ukd_ros.geometry.view import LabelledView, View

TRUTH_PREFIX = "/truth/"
JPEG_QUALITY = 90
BAG_VERSION: Literal[8] = 8
"""Of the rosbag2 metadata; Humble's own tools read mcap bags of it too."""


class BagWriter:
    """An mcap bag being written beside its place; it appears there whole when the ``with`` block ends without error."""

    def __init__(self, path: Path | str) -> None:
        """Begin the bag ``path`` (a folder that does not exist yet); BagError otherwise."""
        self.path = Path(path)
        if self.path.exists():
            raise BagError(f"{self.path}: exists already and is not overwritten.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._beside = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
            # The file inside is named after its folder, so the folder has its final name from the start.
            self._writer = Writer(self._beside / self.path.name, version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP)
            self._writer.open()
        except (OSError, WriterError) as error:
            raise BagError(f"{self.path}: this bag cannot be written: {error}") from error
        self._connections: dict[tuple[str, str], Connection] = {}

    def __enter__(self) -> BagWriter:
        """Return the open bag."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bag and put it in its place, or remove it after an error."""
        try:
            if error is None:
                self._writer.close()
                os.rename(self._beside / self.path.name, self.path)
        finally:
            shutil.rmtree(self._beside, ignore_errors=True)

    def write(self, topic: str, kind: str, time_ns: int, data: bytes) -> None:
        """Append a serialised message of a type that the rosbags library knows."""
        key = (topic, kind)
        if key not in self._connections:
            self._connections[key] = self._writer.add_connection(topic, kind, typestore=store())
        self._writer.write(self._connections[key], time_ns, data)

    def write_message(self, topic: str, kind: str, time_ns: int, message: Any) -> None:
        """Serialise and append a message of the rosbags library's types."""
        self.write(topic, kind, time_ns, bytes(store().serialize_cdr(message, kind)))

    def write_view(
        self, view: View, camera_name: str = "/camera", codec: str = "jpeg", jpeg_quality: int = JPEG_QUALITY
    ) -> None:
        """Append a view as a compressed image (``codec`` jpeg or png) and its camera_info, at the view's own stamp."""
        header = _header(view)
        types = store().types
        extension, settings = {
            "jpeg": (".jpg", [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality]),
            "png": (".png", [cv2.IMWRITE_PNG_COMPRESSION, 3]),
        }[codec]
        _, encoded = cv2.imencode(extension, cv2.cvtColor(view.image, cv2.COLOR_RGB2BGR), settings)
        kind = IMAGE_TYPES[1]
        image = types[kind](header=header, format=f"bgr8; {codec} compressed bgr8", data=encoded.reshape(-1))
        # camera_info first: a player that keeps the order gives a node what it needs before the image.
        self.write_message(f"{camera_name}/camera_info", INFO_TYPE, view.stamp_ns, camera_info(view.camera, header))
        self.write_message(f"{camera_name}/image/compressed", kind, view.stamp_ns, image)

    def write_truth(self, view: LabelledView) -> None:
        """Append the true pose of every labelled object (the first label of each name)."""
        types = store().types
        seen: set[str] = set()
        for label in view.objects:
            if label.object_name in seen:
                continue
            seen.add(label.object_name)
            x, y, z = label.T_camera_object.translation.tolist()
            qx, qy, qz, qw = label.T_camera_object.quaternion().tolist()
            pose = types["geometry_msgs/msg/Pose"](
                position=types["geometry_msgs/msg/Point"](x=x, y=y, z=z),
                orientation=types["geometry_msgs/msg/Quaternion"](x=qx, y=qy, z=qz, w=qw),
            )
            stamped = types[POSE_TYPE](header=_header(view), pose=pose)
            self.write_message(f"{TRUTH_PREFIX}{label.object_name}/pose", POSE_TYPE, view.stamp_ns, stamped)


def _header(view: View) -> Any:
    types = store().types
    sec, nanosec = divmod(view.stamp_ns, 10**9)
    stamp = types["builtin_interfaces/msg/Time"](sec=sec, nanosec=nanosec)
    return types["std_msgs/msg/Header"](stamp=stamp, frame_id=view.frame_id)


def camera_info(camera: Camera, header: Any) -> Any:
    """Return ``camera`` as a sensor_msgs/CameraInfo of the rosbags library: K, D, R = identity and P = [K 0]."""
    types = store().types
    model, coefficients = camera.distortion_model, np.asarray(camera.distortion, dtype=np.float64)
    if model is DistortionModel.NONE:
        model, coefficients = DistortionModel.PLUMB_BOB, np.zeros(5)
    projection: npt.NDArray[np.float64] = np.hstack([camera.matrix, np.zeros((3, 1))])
    roi = types["sensor_msgs/msg/RegionOfInterest"](x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
    return types[INFO_TYPE](
        header=header,
        height=camera.height,
        width=camera.width,
        distortion_model=model.value,
        d=coefficients,
        k=camera.matrix.reshape(9).copy(),
        r=np.eye(3).reshape(9),
        p=projection.reshape(12),
        binning_x=0,
        binning_y=0,
        roi=roi,
    )


def write_bag(
    path: Path | str,
    views: Iterable[View],
    camera_name: str = "/camera",
    codec: str = "jpeg",
    jpeg_quality: int = JPEG_QUALITY,
) -> int:
    """Write ``views`` (stamps ascending; labelled ones with their truth) as the mcap bag ``path``; return how many.

    BagError when the bag exists, cannot be written, or the stamps do not ascend.
    """
    last_ns, count = -1, 0
    with BagWriter(path) as bag:
        for view in views:
            if view.stamp_ns <= last_ns:
                raise BagError(f"{path}: view {count} is stamped {view.stamp_ns} ns, not after {last_ns} ns before it.")
            last_ns = view.stamp_ns
            if isinstance(view, LabelledView):
                bag.write_truth(view)
            bag.write_view(view, camera_name, codec, jpeg_quality)
            count += 1
    return count
