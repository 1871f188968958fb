# SPDX-License-Identifier: Apache-2.0
"""Rosbags without ROS: camera streams with their true poses in and out, one message at a time.

A bag written here is an rosbag2 folder (mcap) with ``<camera>/image/compressed``, ``<camera>/camera_info`` and, for
each labelled object, ``/truth/<object>/pose``: what ``ros2 bag play``, Foxglove and this package's demo read. The
folder `rosbag` does the work; from outside of it, this file is what one imports to read or to write a bag.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ukd_ros.data.rosbag.message_types import IMAGE_TYPES as IMAGE_TYPES
from ukd_ros.data.rosbag.message_types import INFO_TYPE as INFO_TYPE
from ukd_ros.data.rosbag.message_types import POSE_TYPE as POSE_TYPE
from ukd_ros.data.rosbag.message_types import BagMessage as BagMessage
from ukd_ros.data.rosbag.reader import BagIndex as BagIndex
from ukd_ros.data.rosbag.reader import BagReader as BagReader
from ukd_ros.data.rosbag.reader import Entry as Entry
from ukd_ros.data.rosbag.storage import BagError as BagError
from ukd_ros.data.rosbag.writer import TRUTH_PREFIX as TRUTH_PREFIX
from ukd_ros.data.rosbag.writer import BagWriter as BagWriter
from ukd_ros.data.rosbag.writer import write_bag as write_bag
from ukd_ros.geometry.pose import Pose
from ukd_ros.geometry.view import View
from ukd_ros.perception.images import CameraInfoError, ImageError, view_from_messages


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
