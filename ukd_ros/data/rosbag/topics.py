# SPDX-License-Identifier: Apache-2.0
"""Which topic of a bag the images come from, and which says what camera took them."""

from __future__ import annotations

from dataclasses import dataclass

from ukd_ros.data.rosbag.folder import shown
from ukd_ros.data.rosbag.message_types import IMAGE_TYPES, INFO_TYPE
from ukd_ros.data.rosbag.options import BagOptions
from ukd_ros.data.rosbag.reader import BagReader
from ukd_ros.data.rosbag.storage import BagError, IntArray
from ukd_ros.perception.images import is_depth

MAX_LISTED = 30


@dataclass(frozen=True)
class Chosen:
    """The topics that frames are taken from, and whether the images are rectified."""

    image_topic: str
    info_topic: str
    rectified: bool


def choose_topics(bag: BagReader, options: BagOptions) -> Chosen:
    """Return the topics of images and camera_info; BagError lists the candidates where there is no single one."""
    image = _choose_images(bag, options.image_topic)
    return Chosen(image, _choose_info(bag, options.info_topic, image), options.rectified_for(image))


def rate_hz(times_ns: IntArray) -> float:
    """Return the messages a second between the first and the last; 0 where that says nothing."""
    if len(times_ns) < 2:
        return 0.0
    span = int(times_ns.max()) - int(times_ns.min())
    return (len(times_ns) - 1) / (span / 1e9) if span > 0 else 0.0


def _choose_images(bag: BagReader, wanted: str) -> str:
    kinds, counts = bag.topics, bag.counts
    fitting = sorted(t for t, kind in kinds.items() if kind in IMAGE_TYPES and counts.get(t, 0) > 0)
    if wanted:
        if wanted in fitting:
            return wanted
        told = "has no message" if kinds.get(wanted) in IMAGE_TYPES else "is no topic of images in this bag"
        raise BagError(f"{bag.path}: {shown(wanted)} {told}; {_listed(bag, fitting, 'image topics')}.")
    if not fitting:
        raise BagError(f"{bag.path}: holds no images ({' or '.join(IMAGE_TYPES)}); {_listed(bag, kinds, 'topics')}.")
    if len(fitting) > 1:
        # Depth beside colour is every RGB-D camera's habit, and never what is meant.
        coloured = [topic for topic in fitting if not _is_depth(bag, topic)]
        if len(coloured) == 1:
            return coloured[0]
        raise BagError(f"{bag.path}: name one with image_topic; {_listed(bag, coloured or fitting, 'image topics')}.")
    return fitting[0]


def _choose_info(bag: BagReader, wanted: str, image: str) -> str:
    kinds, counts = bag.topics, bag.counts
    fitting = sorted(t for t, kind in kinds.items() if kind == INFO_TYPE and counts.get(t, 0) > 0)
    if wanted:
        if wanted in fitting:
            return wanted
        told = "has no message" if kinds.get(wanted) == INFO_TYPE else "is no topic of camera_info in this bag"
        raise BagError(f"{bag.path}: {shown(wanted)} {told}; {_listed(bag, fitting, 'camera_info topics')}.")
    if not fitting:
        raise BagError(
            f"{bag.path}: has no camera_info ({INFO_TYPE}): without the camera's matrix an image gives no pose. Record "
            "that topic too."
        )
    base = image.removesuffix("/compressed")
    beside = f"{base.rpartition('/')[0]}/camera_info"  # image_transport's rule
    if beside in fitting or len(fitting) == 1:
        return beside if beside in fitting else fitting[0]
    raise BagError(f"{bag.path}: name one with info_topic; {_listed(bag, fitting, 'camera_info topics')}.")


def _is_depth(bag: BagReader, topic: str) -> bool:
    """Return whether a topic's first readable image is a depth image."""
    index = bag.index([topic])
    for number in range(min(len(index), 3)):
        try:
            return is_depth(bag.read(index[number]).decoded())
        except BagError:
            continue
    return False


def _listed(bag: BagReader, topics: object, what: str) -> str:
    """Return the topics with type, number of messages and rate."""
    names = list(topics) if isinstance(topics, (list, dict)) else []
    if not names:
        return f"there are no {what}"
    kinds, counts = bag.topics, bag.counts
    rows = [
        f"{shown(topic)} ({shown(kinds[topic])}, {counts.get(topic, 0)} messages, "
        f"{rate_hz(bag.index([topic]).times_ns):.1f} Hz)"
        for topic in names[:MAX_LISTED]
    ]
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"there are {len(names)} {what}: {'; '.join(rows)}{more}"
