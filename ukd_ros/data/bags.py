# SPDX-License-Identifier: Apache-2.0
"""Rosbags without ROS: camera streams with their true poses in and out, one message at a time.

A bag written here is an rosbag2 folder (mcap) with ``<camera>/image/compressed``, ``<camera>/camera_info`` and, for
each labelled object, ``/truth/<object>/pose``: what ``ros2 bag play``, Foxglove and this package's demo read. Only
message types that are known here are deserialised (`bag_types`): a bag's own definitions are never used.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer, WriterError

from ukd_ros.data.bag_compression import unpack_file
from ukd_ros.data.bag_folder import compare, find_files, shown
from ukd_ros.data.bag_mcap import McapFile
from ukd_ros.data.bag_ros1 import Ros1File
from ukd_ros.data.bag_sqlite import SqliteFile
from ukd_ros.data.bag_storage import BagError as BagError
from ukd_ros.data.bag_storage import BrokenMessage, Channel, IntArray, Storage
from ukd_ros.data.bag_types import IMAGE_TYPES as IMAGE_TYPES
from ukd_ros.data.bag_types import INFO_TYPE as INFO_TYPE
from ukd_ros.data.bag_types import POSE_TYPE as POSE_TYPE
from ukd_ros.data.bag_types import BagMessage as BagMessage
from ukd_ros.data.bag_types import store, unpacked_message
from ukd_ros.geometry.camera import Camera, DistortionModel
from ukd_ros.geometry.pose import Pose
from ukd_ros.geometry.view import LabelledView, View
from ukd_ros.perception.images import CameraInfoError, ImageError, view_from_messages

TRUTH_PREFIX = "/truth/"
JPEG_QUALITY = 90
BAG_VERSION: Literal[8] = 8
"""Of the rosbag2 metadata; Humble's own tools read mcap bags of it too."""


STORAGES: dict[str, Callable[[Path], Storage]] = {".mcap": McapFile, ".db3": SqliteFile, ".bag": Ros1File}


class Entry(NamedTuple):
    """Where one message is: what `BagReader.read` takes. `time_ns` is when it was recorded."""

    time_ns: int
    file: int
    channel: int
    first: int
    second: int


@dataclass(frozen=True, eq=False)
class BagIndex:
    """Where the messages of some topics are, without having read one, in the order in which they were recorded.

    times_ns [n]: when each was recorded. rows [n, 4]: the file, the channel in it, and two numbers of its own.
    """

    times_ns: IntArray
    rows: IntArray

    def __len__(self) -> int:
        """Return the number of messages."""
        return len(self.times_ns)

    def __getitem__(self, number: int) -> Entry:
        """Return message `number` in the order of recording."""
        return Entry(int(self.times_ns[number]), *(int(value) for value in self.rows[number]))

    def by_time(self) -> BagIndex:
        """Return the same messages in order of time; equal times stay as recorded."""
        order = np.argsort(self.times_ns, kind="stable")
        return BagIndex(self.times_ns[order], self.rows[order])


class BagReader:
    """A bag being read: an rosbag2 folder, a lone .mcap or .db3 file (also .zstd), or a .bag file of ROS 1.

    Messages are streamed in the order of their time; a bag larger than the memory is no problem. What is broken is a
    BagError, or with `partial` what is whole is read and `damage`, `lost_bytes` and `broken` say what is not.
    """

    def __init__(self, path: Path | str, partial: bool = False) -> None:
        """Open the bag at ``path``; BagError says why it cannot be."""
        self.path = Path(path)
        self.partial = partial
        self.broken: Counter[str] = Counter()
        found = find_files(self.path)
        self.warnings = list(found.warnings)
        self._claims = found.claims
        self._files: list[Storage] = []
        self._unreadable: list[tuple[str, int]] = []
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None
        try:
            for file in found.files:
                self._open(file)
            if not self._files:
                raise BagError(f"{self.path}: this bag cannot be read: {'; '.join(self.damage)}")
            self._refuse_damage()
        except BaseException:
            self.close()
            raise
        self._channels = [{channel.number: channel for channel in file.channels} for file in self._files]

    def __enter__(self) -> BagReader:
        """Return the open bag."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close its files and remove what was unpacked."""
        while self._files:
            self._files.pop().close()
        if self._unpacked is not None:
            self._unpacked.cleanup()

    @property
    def topics(self) -> dict[str, str]:
        """Return topic -> message type; a serialisation that is not ROS' own stands behind the type."""
        return {c.topic: _kind(c) for channels in reversed(self._channels) for c in reversed(channels.values())}

    @property
    def counts(self) -> dict[str, int]:
        """Return topic -> number of messages, as counted, not as claimed."""
        counts: Counter[str] = Counter()
        for channels in self._channels:
            for channel in channels.values():
                counts[channel.topic] += channel.count
        return dict(counts)

    @property
    def size(self) -> int:
        """Return the size of its files, bytes."""
        return sum(file.size for file in self._files) + sum(size for _, size in self._unreadable)

    @property
    def damage(self) -> list[str]:
        """Return what was found broken so far, in words."""
        out = [reason for reason, _ in self._unreadable]
        return out + [f"{file.path.name}: {reason}" for file in self._files for reason in file.damage.reasons]

    @property
    def lost_bytes(self) -> int:
        """Return how many bytes of the files could not be read, as far as is known by now."""
        return sum(file.damage.lost_bytes for file in self._files) + sum(size for _, size in self._unreadable)

    def index(self, topics: Collection[str] | None = None) -> BagIndex:
        """Return where the messages of ``topics`` (None: all) are; no message is read for it."""
        times: list[IntArray] = [np.zeros(0, np.int64)]
        rows: list[IntArray] = [np.zeros((0, 4), np.int64)]
        for number, (file, channels) in enumerate(zip(self._files, self._channels, strict=True)):
            chosen = {c.number for c in channels.values() if topics is None or c.topic in topics}
            places = file.places(chosen) if chosen else None
            if places is not None and len(places):
                times.append(places.times_ns)
                files = np.full((len(places), 1), number, np.int64)
                rows.append(np.hstack([files, places.channels[:, None], places.where]))
        self._refuse_damage()
        return BagIndex(np.concatenate(times), np.vstack(rows))

    def read(self, entry: Entry) -> BagMessage:
        """Return one message; BrokenMessage (a BagError) when its bytes cannot be had."""
        channel = self._channels[entry.file][entry.channel]
        try:
            data = unpacked_message(self._files[entry.file].data(entry.first, entry.second), channel.encoding)
        except BrokenMessage as error:
            self.broken[channel.topic] += 1
            raise BrokenMessage(
                f"{self.path}: this bag breaks off or is damaged: a message of {shown(channel.topic)} {error}"
            ) from error
        return BagMessage(channel.topic, _kind(channel), entry.time_ns, data, channel.encoding == "ros1")

    def messages(self, topics: Collection[str] | None = None) -> Iterator[BagMessage]:
        """Yield the messages of ``topics`` (None: all) in order of time; with `partial` broken ones are left out."""
        yield from self.read_all(self.index(topics).by_time())

    def read_all(self, index: BagIndex) -> Iterator[BagMessage]:
        """Yield the messages of an index in its order; with `partial` broken ones are left out."""
        for number in range(len(index)):
            try:
                message = self.read(index[number])
            except BrokenMessage:
                if not self.partial:
                    raise
                continue
            yield message

    def contradictions(self, duration_ns: int) -> list[str]:
        """Return where its metadata.yaml contradicts what is there; ``duration_ns`` as measured over all messages."""
        return compare(self._claims, self.counts, duration_ns, not self.damage) if self._claims is not None else []

    def topic_of(self, kinds: Collection[str], wanted: str | None) -> str:
        """Return ``wanted`` if it is there, else the only topic of a type in ``kinds``; BagError names the choice."""
        fitting = sorted(topic for topic, kind in self.topics.items() if kind in kinds)
        if wanted is not None and wanted in fitting:
            return wanted
        if wanted is None and len(fitting) == 1:
            return fitting[0]
        asked = "none was named" if wanted is None else f"'{wanted}' is not one of them"
        names = ", ".join(shown(topic) for topic in fitting)
        raise BagError(f"{self.path}: {len(fitting)} topics of {', '.join(kinds)} ({names}); {asked}.")

    def _open(self, file: Path) -> None:
        """Open one file; with `partial` one that cannot be opened is damage."""
        try:
            whole = True
            if file.suffix == ".zstd":
                if self._unpacked is None:
                    self._unpacked = tempfile.TemporaryDirectory(prefix="ukd_bag_")
                packed, file = file, Path(self._unpacked.name) / file.stem
                whole = unpack_file(packed, file)
            self._files.append(STORAGES[file.suffix](file))
            if not whole:
                self._files[-1].damage.add("its compressed form (.zstd) breaks off or is damaged.")
        except (BagError, OSError) as error:
            if not self.partial:
                told = "" if isinstance(error, BagError) else f"{file}: this bag cannot be read: "
                raise BagError(f"{told}{error}") from error
            self._unreadable.append((str(error), file.stat().st_size if file.is_file() else 0))

    def _refuse_damage(self) -> None:
        if not self.partial and self.damage:
            raise BagError(f"{self.path}: this bag breaks off or is damaged: {self.damage[0]}")


def _kind(channel: Channel) -> str:
    return channel.kind if channel.encoding in ("cdr", "ros1") else f"{channel.kind} ({channel.encoding})"


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
