# SPDX-License-Identifier: Apache-2.0
"""Small bags of every format for the tests, also ones that no honest recorder writes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lz4.frame
import numpy as np
import numpy.typing as npt
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from ukd_ros.data.rosbag.compression import zstd
from ukd_ros.data.rosbag.message_types import IMAGE_TYPES, INFO_TYPE, POSE_TYPE, store
from ukd_ros.data.rosbag.writer import camera_info
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.pose import Pose

START = 1_700_000_000 * 10**9
STEP = 10**8
K = np.array([[150.0, 0.0, 79.5], [0.0, 151.0, 59.5], [0.0, 0.0, 1.0]])
CAMERA = Camera(160, 120, K)


class Recorded(NamedTuple):
    """One message to be written."""

    topic: str
    kind: str
    time_ns: int
    data: bytes


def painting(number: int, size: tuple[int, int] = (160, 120)) -> npt.NDArray[np.uint8]:
    """Return an image [H,W,3] that no other number resembles."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.ascontiguousarray(np.kron(small, np.ones((size[1] // 6, size[0] // 8, 1), dtype=np.uint8)))


def header(stamp_ns: int, frame_id: str = "camera_optical", ros1: bool = False) -> Any:
    types = store(ros1).types
    stamp = types["builtin_interfaces/msg/Time"](sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)
    extra = {"seq": 0} if ros1 else {}
    return types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id, **extra)


def packed(kind: str, message: Any, ros1: bool = False) -> bytes:
    types = store(ros1)
    return bytes(types.serialize_ros1(message, kind) if ros1 else types.serialize_cdr(message, kind))


def raw_image(
    image: npt.NDArray[np.uint8], stamp_ns: int, frame_id: str = "camera_optical", ros1: bool = False
) -> bytes:
    kind = IMAGE_TYPES[0]
    message = store(ros1).types[kind](
        header=header(stamp_ns, frame_id, ros1),
        height=image.shape[0],
        width=image.shape[1],
        encoding="rgb8",
        is_bigendian=0,
        step=image.shape[1] * 3,
        data=image.reshape(-1),
    )
    return packed(kind, message, ros1)


def info(stamp_ns: int, frame_id: str = "camera_optical", camera: Camera = CAMERA, ros1: bool = False) -> bytes:
    message = camera_info(camera, header(stamp_ns, frame_id))
    if ros1:
        fields = {name.upper() if name in "dkrp" else name: value for name, value in vars(message).items()}
        fields["header"] = header(stamp_ns, frame_id, ros1)
        fields["roi"] = store(True).types["sensor_msgs/msg/RegionOfInterest"](**_plain(message.roi))
        message = store(True).types[INFO_TYPE](**{k: v for k, v in fields.items() if not k.startswith("__")})
    return packed(INFO_TYPE, message, ros1)


def _plain(message: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(message).items() if not name.startswith("__")}


def pose(kind: str, pose: Pose) -> Any:
    """Return a geometry_msgs Pose or Transform."""
    types = store().types
    x, y, z = pose.translation.tolist()
    qx, qy, qz, qw = pose.quaternion().tolist()
    turn = types["geometry_msgs/msg/Quaternion"](x=qx, y=qy, z=qz, w=qw)
    if kind == "Pose":
        return types["geometry_msgs/msg/Pose"](
            position=types["geometry_msgs/msg/Point"](x=x, y=y, z=z), orientation=turn
        )
    return types["geometry_msgs/msg/Transform"](
        translation=types["geometry_msgs/msg/Vector3"](x=x, y=y, z=z), rotation=turn
    )


def pose_stamped(stamp_ns: int, value: Pose, frame_id: str = "camera_optical") -> bytes:
    types = store().types
    return packed(POSE_TYPE, types[POSE_TYPE](header=header(stamp_ns, frame_id), pose=pose("Pose", value)))


def stream(
    count: int,
    image_topic: str = "/camera/image_raw",
    info_topic: str | None = "/camera/camera_info",
    frame_id: str = "camera_optical",
    camera: Camera = CAMERA,
    still: bool = False,
    first: int = 0,
    ros1: bool = False,
    start_ns: int = START,
) -> list[Recorded]:
    """Return the messages of a camera: raw images at 10 Hz, each with its camera_info before it."""
    out = []
    for number in range(first, first + count):
        at = start_ns + number * STEP
        if info_topic is not None:
            out.append(Recorded(info_topic, INFO_TYPE, at, info(at, frame_id, camera, ros1)))
        image = painting(0 if still else number, (camera.width, camera.height))
        out.append(Recorded(image_topic, IMAGE_TYPES[0], at, raw_image(image, at, frame_id, ros1)))
    return out


def write_ros2(
    path: Path, messages: Sequence[Recorded], storage: str = "mcap", mode: str = "none", version: Any = 8
) -> Path:
    """Write an rosbag2 folder with the rosbags library: storage mcap or sqlite3, mode none, file, message, storage."""
    plugin = StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3
    writer = Writer(path, version=version, storage_plugin=plugin)
    if mode != "none":
        writer.set_compression(CompressionMode[mode.upper()], CompressionFormat.ZSTD)
    writer.open()
    known: dict[str, Any] = {}
    for m in messages:
        if m.topic not in known:
            foreign = {} if m.kind in store().types else {"msgdef": "uint8[] data", "rihs01": "RIHS01_" + "0" * 64}
            known[m.topic] = writer.add_connection(m.topic, m.kind, typestore=store(), **foreign)
        writer.write(known[m.topic], m.time_ns, m.data)
    writer.close()
    return path


def write_ros1(path: Path, messages: Sequence[Recorded], codec: str = "none") -> Path:
    writer = Writer1(path)
    if codec != "none":
        writer.set_compression(Writer1.CompressionFormat[codec.upper()])
    writer.open()
    known: dict[str, Any] = {}
    for m in messages:
        if m.topic not in known:
            known[m.topic] = writer.add_connection(m.topic, m.kind, typestore=store(True))
        writer.write(known[m.topic], m.time_ns, m.data)
    writer.close()
    return path


@dataclass(frozen=True)
class McapShape:
    """How an mcap file is laid out: chunks of so many messages (0: none), their codec, index records, an end."""

    chunk: int = 4
    codec: str = ""
    index: bool = True
    end: bool = True
    crc: bool = True
    claimed: int | None = None  # unpacked size that every chunk claims


def write_mcap(path: Path, messages: Sequence[Recorded], shape: McapShape = McapShape()) -> Path:  # noqa: B008
    """Write an mcap file without summary, by the format's own definition."""
    out = bytearray(b"\x89MCAP0\r\n") + _record(1, _text("ros2") + _text("by hand"))
    channels: dict[str, int] = {}
    if shape.chunk == 0:
        for m in messages:
            out += _introduction(m, channels) + _message(m, channels)
    else:
        for start in range(0, len(messages), shape.chunk):
            out += _chunk(messages[start : start + shape.chunk], channels, shape)
    if shape.end:
        out += _record(15, struct.pack("<I", 0)) + _record(2, struct.pack("<QQI", 0, 0, 0)) + b"\x89MCAP0\r\n"
    path.write_bytes(bytes(out))
    return path


def _chunk(messages: Sequence[Recorded], channels: dict[str, int], shape: McapShape) -> bytes:
    content = bytearray()
    entries: dict[int, list[tuple[int, int]]] = {}
    for m in messages:
        content += _introduction(m, channels)
        entries.setdefault(channels[m.topic], []).append((m.time_ns, len(content)))
        content += _message(m, channels)
    plain = bytes(content)
    data = {"": plain, "lz4": lz4.frame.compress(plain), "zstd": zstd.compress(plain)}[shape.codec]
    times = [m.time_ns for m in messages]
    size = len(plain) if shape.claimed is None else shape.claimed
    head = struct.pack("<QQQI", min(times), max(times), size, zlib.crc32(plain) if shape.crc else 0)
    out = _record(6, head + _text(shape.codec) + struct.pack("<Q", len(data)) + data)
    for number, found in entries.items() if shape.index else ():
        rows = b"".join(struct.pack("<QQ", *row) for row in found)
        out += _record(7, struct.pack("<HI", number, len(rows)) + rows)
    return out


def _introduction(m: Recorded, channels: dict[str, int]) -> bytes:
    if m.topic in channels:
        return b""
    number = channels[m.topic] = len(channels) + 1
    schema = struct.pack("<H", number) + _text(m.kind) + _text("ros2msg") + struct.pack("<I", 0)
    channel = struct.pack("<HH", number, number) + _text(m.topic) + _text("cdr") + struct.pack("<I", 0)
    return _record(3, schema) + _record(4, channel)


def _message(m: Recorded, channels: dict[str, int]) -> bytes:
    return _record(5, struct.pack("<HIQQ", channels[m.topic], 0, m.time_ns, m.time_ns) + m.data)


def _record(op: int, content: bytes) -> bytes:
    return struct.pack("<BQ", op, len(content)) + content


def _text(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()
