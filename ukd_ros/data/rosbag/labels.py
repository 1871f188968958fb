# SPDX-License-Identifier: Apache-2.0
"""The poses that a bag knows of the objects in its images, in the camera's optical frame at the image's own stamp."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ukd_ros.data.rosbag.folder import shown
from ukd_ros.data.rosbag.message_types import DETECTIONS_TYPE, POSE_TYPE, POSE_TYPES, TF_TYPES
from ukd_ros.data.rosbag.options import BagOptions
from ukd_ros.data.rosbag.poses import FrameTree, PoseSeries, Unknown, bare
from ukd_ros.data.rosbag.reader import BagReader
from ukd_ros.data.rosbag.storage import BagError
from ukd_ros.data.rosbag.writer import TRUTH_PREFIX
from ukd_ros.geometry.pose import Pose

STATIC = "/tf_static"


class Stamped(NamedTuple):
    """The stamp (ns) and frame_id of an image that asks for labels."""

    stamp_ns: int
    frame_id: str


class FrameLabel(NamedTuple):
    """An object's pose in the optical frame of an image."""

    object_name: str
    T_camera_object: Pose


class LabelSource:
    """All labels of one bag, read once for the images that ask for them."""

    def __init__(self, bag: BagReader, options: BagOptions, images: Sequence[Stamped]) -> None:
        """Read what may serve ``images``; BagError when a topic asked for is not there or of another type."""
        self._gap = round(options.label_max_gap_s * 1e9)
        self._options = options
        self.unusable: Counter[str] = Counter()
        self._stamps = np.unique(np.array([image.stamp_ns for image in images], dtype=np.int64))
        self._tree = FrameTree(self._stamps, self._gap)
        self._series: dict[tuple[str, str], PoseSeries] = {}  # object, frame -> poses
        self._crowds: dict[str, dict[int, list[tuple[str, Pose]]]] = {}  # object -> stamp -> several instances
        topics = _topics(bag, options)
        self.asked = bool(topics or options.label_frames)
        frames = {bare(image.frame_id) for image in images}
        if topics:
            self._read_topics(bag, topics)
        others = {*options.label_frames, *(bare(frame) for frame in self._frames())} - frames
        if others or options.label_frames:
            self._read_transforms(bag, frames | others)

    def labels(self, image: Stamped) -> tuple[list[FrameLabel], list[str]]:
        """Return the labels of an image, and why others could not be given."""
        out: list[FrameLabel] = []
        refused: list[str] = []
        for name, pose in self._askings(image):
            try:
                T_camera_object = pose()
            except Unknown as error:
                refused.append(f"{name}: {error}")
                continue
            if T_camera_object.translation[2] > 0:
                out.append(FrameLabel(name, T_camera_object))
            else:
                refused.append(f"{name}: the object is behind the camera")
        return out, refused

    def _askings(self, image: Stamped) -> Iterator[tuple[str, Callable[[], Pose]]]:
        """Yield the name of every object that may be in an image, and what gives its pose or raises Unknown."""
        for (name, frame), series in self._series.items():
            if image.stamp_ns not in self._crowds.get(name, {}):
                yield name, partial(self._followed, series, frame, image)
        for name, crowd in self._crowds.items():
            for frame, pose in crowd.get(image.stamp_ns, ()):
                yield name, partial(self._bring, frame, pose, image)
        for frame, name in self._options.label_frames.items():
            yield name, partial(self._tree.transform, image.frame_id, frame, image.stamp_ns)

    def _followed(self, series: PoseSeries, frame: str, image: Stamped) -> Pose:
        return self._bring(frame, series.at(image.stamp_ns, self._gap), image)

    def _frames(self) -> set[str]:
        """Return the frames in which poses were given."""
        crowded = {frame for crowd in self._crowds.values() for some in crowd.values() for frame, _ in some}
        return crowded | {frame for _, frame in self._series}

    def _bring(self, frame: str, pose: Pose, image: Stamped) -> Pose:
        """Return a pose of another frame in the image's; Unknown when /tf does not connect them."""
        if bare(frame) == bare(image.frame_id):
            return pose
        return self._tree.transform(image.frame_id, frame, image.stamp_ns) @ pose

    def _read_topics(self, bag: BagReader, topics: dict[str, str]) -> None:
        for message in bag.messages(list(topics)):
            try:
                decoded = message.decoded()
                stamp = stamp_ns(decoded.header.stamp)
                if message.kind == DETECTIONS_TYPE:
                    self._note_detections(stamp, decoded)
                else:
                    inner = decoded.pose if message.kind == POSE_TYPE else decoded.pose.pose
                    self._note(topics[message.topic], stamp, str(decoded.header.frame_id), pose_from_message(inner))
            except BagError:
                self.unusable["messages of a label topic that cannot be decoded"] += 1
            except ValueError:
                self.unusable["poses that are none (no unit quaternion, or not finite)"] += 1

    def _note(self, name: str, stamp: int, frame: str, pose: Pose) -> None:
        self._series.setdefault((name, frame), PoseSeries(self._stamps)).add(stamp, pose)

    def _note_detections(self, stamp: int, message: Any) -> None:
        """Note the best hypothesis of every detection; a class seen once in a message is followed over time."""
        found: dict[str, list[tuple[str, Pose]]] = {}
        for detection in message.detections:
            if not len(detection.results):
                continue
            best = max(detection.results, key=lambda result: float(result.hypothesis.score))
            name = self._options.classes.get(best.hypothesis.class_id, str(best.hypothesis.class_id))
            frame = str(detection.header.frame_id) or str(message.header.frame_id)
            found.setdefault(name, []).append((frame, pose_from_message(best.pose.pose)))
        for name, instances in found.items():
            if len(instances) == 1:
                self._note(name, stamp, *instances[0])
            elif self._asks_for(stamp):  # which is which in the next is not known: they serve images of this stamp only
                self._crowds.setdefault(name, {})[stamp] = instances

    def _asks_for(self, stamp: int) -> bool:
        """Return whether an image has this very stamp (ns)."""
        at = int(np.searchsorted(self._stamps, stamp))
        return at < len(self._stamps) and int(self._stamps[at]) == stamp

    def _read_transforms(self, bag: BagReader, frames: set[str]) -> None:
        """Read what joins frames: first who is whose parent, so that of a robot's many joints few are kept."""
        topics = [topic for topic, kind in bag.topics.items() if kind in TF_TYPES]
        for message in bag.messages(topics) if topics else ():
            try:
                for transform in message.decoded().transforms:
                    self._tree.connect(str(transform.header.frame_id), str(transform.child_frame_id))
            except BagError:
                self.unusable["messages of /tf that cannot be decoded"] += 1
        self._tree.keep(frames)
        for message in bag.messages(topics) if topics else ():
            with suppress(BagError):  # counted above
                for transform in message.decoded().transforms:
                    self._note_transform(transform, message.topic.endswith(STATIC))

    def _note_transform(self, message: Any, static: bool) -> None:
        at, turn = message.transform.translation, message.transform.rotation
        try:
            pose = Pose.from_quaternion([turn.x, turn.y, turn.z, turn.w], [at.x, at.y, at.z])
        except ValueError:
            self.unusable["transforms that are none (no unit quaternion, or not finite)"] += 1
            return
        parent, child = str(message.header.frame_id), str(message.child_frame_id)
        self._tree.add(parent, child, stamp_ns(message.header.stamp), pose, static)


def read_labels(
    bag: BagReader, options: BagOptions, images: Sequence[Stamped]
) -> tuple[list[list[FrameLabel]], Counter[str]]:
    """Return the labels of every image, in their order, and why others could not be given, counted."""
    source = LabelSource(bag, options, images)
    refused = Counter(source.unusable)
    out = []
    for image in images:
        labels, reasons = source.labels(image) if source.asked else ([], [])
        out.append(labels)
        refused.update(reasons)
    return out, refused


def unused_topics(bag: BagReader, options: BagOptions) -> list[str]:
    """Return a sentence that lists the topics which could give labels, where none was asked for; else nothing."""
    if _topics(bag, options) or options.label_frames:
        return []
    there = [topic for topic, kind in sorted(bag.topics.items()) if kind in (*POSE_TYPES, DETECTIONS_TYPE)]
    listed = ", ".join(shown(topic) for topic in there[:10]) + (", ..." if len(there) > 10 else "")
    return [f"no labels are taken from {listed}: label_topics names those that are poses of objects"] if there else []


def _topics(bag: BagReader, options: BagOptions) -> dict[str, str]:
    """Return topic -> object name ("" for detections), having checked types."""
    kinds = bag.topics
    out = dict(options.label_topics)
    for topic, name in out.items():
        kind = kinds.get(topic)
        if kind not in (*POSE_TYPES, DETECTIONS_TYPE):
            told = "is not in the bag" if kind is None else f"has type {shown(kind)}"
            wanted = ", ".join((*POSE_TYPES, DETECTIONS_TYPE))
            raise BagError(f"{bag.path}: label topic {topic!r} {told}; labels come from {wanted}, or label_frames.")
        if kind != DETECTIONS_TYPE and not name:
            raise BagError(f"{bag.path}: label topic {topic!r} needs the name of the object whose pose it is.")
    if options.truth_topics:
        for topic, kind in kinds.items():
            if kind == POSE_TYPE and topic.startswith(TRUTH_PREFIX) and topic.endswith("/pose"):
                out.setdefault(topic, topic[len(TRUTH_PREFIX) : -len("/pose")])
    return out


def pose_from_message(message: Any) -> Pose:
    """Return a geometry_msgs/Pose; ValueError when it is none."""
    at, turn = message.position, message.orientation
    return Pose.from_quaternion([turn.x, turn.y, turn.z, turn.w], [at.x, at.y, at.z])


def stamp_ns(stamp: Any) -> int:
    """Return a builtin_interfaces/Time in nanoseconds; rosbags spells ROS 1's like ROS 2's."""
    return int(stamp.sec) * 10**9 + int(stamp.nanosec)
