# SPDX-License-Identifier: Apache-2.0
"""The message types that are understood, by definitions from the rosbags library and from here: never from a bag."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from ukd_ros.data.rosbag.compression import ZSTD_MAGIC, decompressed
from ukd_ros.data.rosbag.storage import MAX_BYTES, BrokenMessage

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
INFO_TYPE = "sensor_msgs/msg/CameraInfo"
POSE_TYPE = "geometry_msgs/msg/PoseStamped"
POSE_TYPES = (POSE_TYPE, "geometry_msgs/msg/PoseWithCovarianceStamped")
DETECTIONS_TYPE = "vision_msgs/msg/Detection3DArray"
TF_TYPES = ("tf2_msgs/msg/TFMessage", "tf/msg/tfMessage")

# vision_msgs 4 (Humble to Jazzy), field by field.
VISION = {
    "vision_msgs/msg/ObjectHypothesis": "string class_id\nfloat64 score",
    "vision_msgs/msg/ObjectHypothesisWithPose": (
        "vision_msgs/ObjectHypothesis hypothesis\ngeometry_msgs/PoseWithCovariance pose"
    ),
    "vision_msgs/msg/BoundingBox3D": "geometry_msgs/Pose center\ngeometry_msgs/Vector3 size",
    "vision_msgs/msg/Detection3D": (
        "std_msgs/Header header\nvision_msgs/ObjectHypothesisWithPose[] results\n"
        "vision_msgs/BoundingBox3D bbox\nstring id"
    ),
    DETECTIONS_TYPE: "std_msgs/Header header\nvision_msgs/Detection3D[] detections",
}
TRANSFORMS = "geometry_msgs/TransformStamped[] transforms"

# What bytes that are no message make the deserialiser raise.
_ODD_ERRORS = (SerdeError, ValueError, LookupError, AssertionError, TypeError, OverflowError, MemoryError, struct.error)

_stores: dict[bool, Typestore] = {}


def store(ros1: bool = False) -> Typestore:
    """Return the definitions of ROS 2 Jazzy with vision_msgs, or those of ROS 1 Noetic with tf."""
    if ros1 not in _stores:
        made = get_typestore(Stores.ROS1_NOETIC if ros1 else Stores.ROS2_JAZZY)
        extra = dict.fromkeys(TF_TYPES, TRANSFORMS) if ros1 else VISION
        for kind, definition in extra.items():
            if kind not in made.types:
                made.register(get_types_from_msg(definition, kind))
        _stores[ros1] = made
    return _stores[ros1]


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
        types = store(self.ros1)
        if self.kind not in types.types:
            raise BrokenMessage(f"{self.topic}: messages of type {self.kind} are not understood here.")
        try:
            read = types.deserialize_ros1 if self.ros1 else types.deserialize_cdr
            return read(self.data, self.kind)
        except _ODD_ERRORS as error:
            raise BrokenMessage(f"{self.topic}: {len(self.data)} bytes are no {self.kind}: {error}") from error


def understood(kind: str, encoding: str) -> bool:
    """Return whether messages of this type and serialisation can be decoded."""
    return encoding in ("cdr", "ros1") and kind in store(encoding == "ros1").types


def unpacked_message(data: bytes, encoding: str) -> bytes:
    """Return a message's bytes, unpacked where rosbag2 compressed each by itself (compression_mode: message).

    No CDR message begins as zstd data do, so the metadata need not be believed about it.
    """
    if encoding != "cdr" or not data.startswith(ZSTD_MAGIC):
        return data
    return decompressed(data, "zstd", MAX_BYTES)
