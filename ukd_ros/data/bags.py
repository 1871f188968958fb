# SPDX-License-Identifier: Apache-2.0
"""Rosbags without ROS: camera streams with their true poses in and out, one message at a time.

A bag written here is an rosbag2 folder (mcap) with ``<camera>/image/compressed``, ``<camera>/camera_info`` and, for
each labelled object, ``/truth/<object>/pose``: what ``ros2 bag play``, Foxglove and this package's demo read. Only
message types that are known here are deserialised, by definitions from the rosbags library: a bag's own are never used.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from rosbags.interfaces import Connection
from rosbags.rosbag1 import Reader as Reader1
from rosbags.rosbag1 import ReaderError as ReaderError1
from rosbags.rosbag2 import Reader as Reader2
from rosbags.rosbag2 import ReaderError as ReaderError2
from rosbags.rosbag2 import StoragePlugin, Writer, WriterError
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.store import Typestore

from ukd_ros.geometry.camera import Camera, DistortionModel
from ukd_ros.geometry.pose import Pose
from ukd_ros.geometry.view import LabelledView, View
from ukd_ros.perception.images import CameraInfoError, ImageError, view_from_messages

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
INFO_TYPE = "sensor_msgs/msg/CameraInfo"
POSE_TYPE = "geometry_msgs/msg/PoseStamped"
TRUTH_PREFIX = "/truth/"
JPEG_QUALITY = 90
BAG_VERSION: Literal[8] = 8
"""Of the rosbag2 metadata; Humble's own tools read mcap bags of it too."""


class BagError(RuntimeError):
    """A bag that cannot be read or written; the text names it."""


@dataclass(frozen=True)
class BagMessage:
    """One message: its topic, type, the time at which it was recorded (ns), and its serialised bytes."""

    topic: str
    kind: str
    time_ns: int
    data: bytes
    ros1: bool = False

    def decoded(self) -> Any:
        """Return the message with the attributes of its ROS definition; BagError for bytes that are no such message."""
        store = _store(self.ros1)
        if self.kind not in store.types:
            raise BagError(f"{self.topic}: messages of type {self.kind} are not understood here.")
        try:
            read = store.deserialize_ros1 if self.ros1 else store.deserialize_cdr
            return read(self.data, self.kind)
        except (SerdeError, ValueError, IndexError, AssertionError, UnicodeDecodeError) as error:
            raise BagError(f"{self.topic}: {len(self.data)} bytes are no {self.kind}: {error}") from error


_stores: dict[bool, Typestore] = {}


def _store(ros1: bool) -> Typestore:
    if ros1 not in _stores:
        _stores[ros1] = get_typestore(Stores.ROS1_NOETIC if ros1 else Stores.ROS2_JAZZY)
    return _stores[ros1]


class BagReader:
    """A bag being read: an rosbag2 folder, a lone .mcap or .db3 file, or a .bag file of ROS 1.

    Messages are streamed in the order of their time; a bag larger than the memory is no problem.
    """

    def __init__(self, path: Path | str) -> None:
        """Open the bag at ``path``; BagError says why it cannot be."""
        self.path = Path(path)
        self._ros1 = self.path.suffix == ".bag"
        try:
            self._reader: Any = Reader1(self.path) if self._ros1 else Reader2(self.path)
            self._reader.open()
        except (ReaderError1, ReaderError2, OSError, ValueError) as error:
            raise BagError(f"{self.path}: this bag cannot be read: {error}") from error

    def __enter__(self) -> BagReader:
        """Return the open bag."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self._reader.close()

    @property
    def topics(self) -> dict[str, str]:
        """Return topic -> message type."""
        return {connection.topic: connection.msgtype for connection in self._reader.connections}

    @property
    def counts(self) -> dict[str, int]:
        """Return topic -> number of messages."""
        return {connection.topic: int(connection.msgcount) for connection in self._reader.connections}

    def messages(self, topics: Collection[str] | None = None) -> Iterator[BagMessage]:
        """Yield the messages of ``topics`` (None: all) in order of time; BagError where the file breaks off."""
        chosen = [c for c in self._reader.connections if topics is None or c.topic in topics]
        if not chosen:
            return
        try:
            for connection, time_ns, data in self._reader.messages(connections=chosen):
                yield BagMessage(connection.topic, connection.msgtype, time_ns, bytes(data), self._ros1)
        except (ReaderError1, ReaderError2, OSError, ValueError) as error:
            raise BagError(f"{self.path}: this bag breaks off or is damaged: {error}") from error

    def topic_of(self, kinds: Collection[str], wanted: str | None) -> str:
        """Return ``wanted`` if it is there, else the only topic of a type in ``kinds``; BagError names the choice."""
        fitting = sorted(topic for topic, kind in self.topics.items() if kind in kinds)
        if wanted is not None and wanted in fitting:
            return wanted
        if wanted is None and len(fitting) == 1:
            return fitting[0]
        asked = "none was named" if wanted is None else f"'{wanted}' is not one of them"
        raise BagError(f"{self.path}: {len(fitting)} topics of {', '.join(kinds)} ({', '.join(fitting)}); {asked}.")


def bag_views(
    path: Path | str, image_topic: str | None = None, info_topic: str | None = None, rectified: bool = False
) -> Iterator[View | ImageError | CameraInfoError]:
    """Yield every image of a bag as a ``View`` with the newest camera_info of its frame, or the error that it gives.

    A camera_info that comes only after the first images serves them too: recorders start topics at different times.
    BagError when the bag cannot be read or has no such topics.
    """
    with BagReader(path) as bag:
        images = bag.topic_of(IMAGE_TYPES, image_topic)
        infos = bag.topic_of((INFO_TYPE,), info_topic)
        newest: dict[str, Any] = {}
        for message in bag.messages((infos,)):
            decoded = message.decoded()
            newest.setdefault(str(decoded.header.frame_id), decoded)
        for message in bag.messages((images, infos)):
            decoded = message.decoded()
            frame = str(decoded.header.frame_id)
            if message.topic == infos:
                newest[frame] = decoded
            elif not newest:
                yield CameraInfoError(f"{infos} has no message: without the camera's matrix an image gives no pose.")
            else:
                try:
                    yield view_from_messages(decoded, newest.get(frame, next(iter(newest.values()))), rectified)
                except (ImageError, CameraInfoError) as error:
                    yield error


def bag_truth(path: Path | str) -> dict[str, dict[int, Pose]]:
    """Return object name -> stamp (ns) -> true pose in the camera's optical frame, as ``write_bag`` stores it."""
    truth: dict[str, dict[int, Pose]] = {}
    with BagReader(path) as bag:
        topics = [t for t, kind in bag.topics.items() if kind == POSE_TYPE and t.startswith(TRUTH_PREFIX)]
        for message in bag.messages(topics) if topics else ():
            decoded = message.decoded()
            name = message.topic[len(TRUTH_PREFIX) :].rsplit("/", maxsplit=1)[0]
            position, turn = decoded.pose.position, decoded.pose.orientation
            pose = Pose.from_quaternion([turn.x, turn.y, turn.z, turn.w], [position.x, position.y, position.z])
            stamp = decoded.header.stamp
            truth.setdefault(name, {})[stamp.sec * 10**9 + stamp.nanosec] = pose
    return truth


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
            self._connections[key] = self._writer.add_connection(topic, kind, typestore=_store(ros1=False))
        self._writer.write(self._connections[key], time_ns, data)

    def write_message(self, topic: str, kind: str, time_ns: int, message: Any) -> None:
        """Serialise and append a message of the rosbags library's types."""
        self.write(topic, kind, time_ns, bytes(_store(ros1=False).serialize_cdr(message, kind)))

    def write_view(
        self, view: View, camera_name: str = "/camera", codec: str = "jpeg", jpeg_quality: int = JPEG_QUALITY
    ) -> None:
        """Append a view as a compressed image (``codec`` jpeg or png) and its camera_info, at the view's own stamp."""
        header = _header(view)
        types = _store(ros1=False).types
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
        types = _store(ros1=False).types
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
    types = _store(ros1=False).types
    sec, nanosec = divmod(view.stamp_ns, 10**9)
    stamp = types["builtin_interfaces/msg/Time"](sec=sec, nanosec=nanosec)
    return types["std_msgs/msg/Header"](stamp=stamp, frame_id=view.frame_id)


def camera_info(camera: Camera, header: Any) -> Any:
    """Return ``camera`` as a sensor_msgs/CameraInfo of the rosbags library: K, D, R = identity and P = [K 0]."""
    types = _store(ros1=False).types
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
