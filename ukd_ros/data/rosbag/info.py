# SPDX-License-Identifier: Apache-2.0
"""What a bag holds, without reading its images: topics, cameras, what would be chosen, what is broken or a lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ukd_ros.data.rosbag.folder import shown
from ukd_ros.data.rosbag.message_types import INFO_TYPE, understood
from ukd_ros.data.rosbag.options import BagOptions
from ukd_ros.data.rosbag.reader import BagIndex, BagReader
from ukd_ros.data.rosbag.storage import BagError
from ukd_ros.data.rosbag.survey import timeline
from ukd_ros.data.rosbag.topics import choose_topics, rate_hz
from ukd_ros.perception.images import CameraInfoError, camera_from_message

MB = 1e6


@dataclass(frozen=True)
class TopicInfo:
    """One topic: its type, messages as counted, and rate; `known` when its type is understood here."""

    topic: str
    kind: str
    count: int
    rate_hz: float
    known: bool


@dataclass(frozen=True)
class BagInfo:
    """A bag's contents; `chosen` or `problem` is the sentence about what would become frames."""

    path: Path
    size: int
    duration_s: float
    topics: tuple[TopicInfo, ...]
    cameras: tuple[str, ...]
    chosen: str
    problem: str
    clock_jumps: int
    lost_bytes: int
    damage: tuple[str, ...]
    warnings: tuple[str, ...]

    def text(self) -> str:
        """Return it for a terminal."""
        lines = [f"{self.path}: {self.size / MB:.1f} MB, {self.duration_s:.1f} s"]
        widths = [max([len(shown(text)) for text in texts] or [0]) for texts in zip(*self._names(), strict=True)]
        for row in self.topics:
            unknown = "" if row.known else "  (type not understood, skipped)"
            names = f"{shown(row.topic):{widths[0]}}  {shown(row.kind):{widths[1]}}"
            lines.append(f"  {names}  {row.count:7d}  {row.rate_hz:7.1f} Hz{unknown}")
        lines += [f"camera: {text}" for text in self.cameras]
        lines.append(f"frames: {self.chosen or self.problem}")
        if self.clock_jumps:
            lines.append(f"clock: the times of recording jump {self.clock_jumps} times (each begins a new block)")
        if self.damage:
            share = 100 * self.lost_bytes / max(1, self.size)
            lines.append(f"damage: {self.lost_bytes} of {self.size} bytes cannot be read ({share:.1f} %)")
        lines += [f"damage: {shown(text, 400)}" for text in self.damage]
        lines += [f"warning: {shown(text, 400)}" for text in self.warnings]
        return "\n".join(lines)

    def _names(self) -> list[tuple[str, str]]:
        return [(row.topic, row.kind) for row in self.topics] or [("", "")]


def bag_info(path: Path | str, options: BagOptions | None = None) -> BagInfo:
    """Return what the bag at ``path`` holds; BagError when nothing of it can be read."""
    options = options or BagOptions()
    with BagReader(path, partial=True) as bag:
        everything = bag.index()
        duration = int(np.ptp(everything.times_ns)) if len(everything) else 0
        chosen, problem, jumps = "", "", 0
        try:
            found = choose_topics(bag, options)
            lens = "rectified" if found.rectified else "raw, with lens model"
            chosen = f"{shown(found.image_topic)} with {shown(found.info_topic)} ({lens})"
            jumps = timeline(bag.index([found.image_topic]).times_ns)[2]
        except BagError as error:
            problem = str(error)
        strange: list[str] = []
        if chosen:
            strange = _strange_frames(bag, found.image_topic, found.info_topic)
        cameras = tuple(_cameras(bag))  # reads messages, and so may find damage
        return BagInfo(
            path=bag.path,
            size=bag.size,
            duration_s=duration / 1e9,
            topics=tuple(_topics(bag, everything)),
            cameras=cameras,
            chosen=chosen,
            problem=problem,
            clock_jumps=jumps,
            lost_bytes=bag.lost_bytes,
            damage=tuple(bag.damage),
            warnings=(*strange, *bag.warnings, *bag.contradictions(duration)),
        )


def _topics(bag: BagReader, everything: BagIndex) -> list[TopicInfo]:
    counts: Mapping[str, int] = bag.counts
    rates = {topic: rate_hz(times) for topic, times in bag.times_by_topic(everything).items()}
    return [
        TopicInfo(topic, kind, counts.get(topic, 0), rates.get(topic, 0.0), _known(kind))
        for topic, kind in sorted(bag.topics.items())
    ]


def _strange_frames(bag: BagReader, images: str, infos: str) -> list[str]:
    """Return a sentence when the first image and the first messages of camera_info are of different frames."""
    first, others = _frames(bag, images, 1), _frames(bag, infos, 20)
    if not first or not others or first[0] in others:
        return []
    names = ", ".join(map(repr, dict.fromkeys(others)))
    return [f"the frame_id of {images} is {first[0]!r}, that of {infos} {names}: they are not of one camera"]


def _frames(bag: BagReader, topic: str, count: int) -> list[str]:
    """Return the frame_id of a topic's first readable messages."""
    found: list[str] = []
    index = bag.index([topic])
    for number in range(min(len(index), count + 5)):
        try:
            found.append(str(bag.read(index[number]).decoded().header.frame_id))
        except BagError:
            continue
        if len(found) == count:
            break
    return found


def _known(kind: str) -> bool:
    return understood(kind, "cdr") or understood(kind, "ros1")


def _cameras(bag: BagReader) -> list[str]:
    """Return one line per topic of camera_info, by its first readable message."""
    out = []
    for topic, kind in sorted(bag.topics.items()):
        if kind != INFO_TYPE:
            continue
        index = bag.index([topic])
        for number in range(min(len(index), 5)):
            try:
                out.append(f"{shown(topic)}: {_camera(bag.read(index[number]).decoded())}")
                break
            except BagError:
                continue
        else:
            out.append(f"{shown(topic)}: no readable message")
    return out


def _camera(info: Any) -> str:
    frame = shown(str(info.header.frame_id))
    try:
        camera = camera_from_message(info, rectified=False)
    except CameraInfoError as error:
        return f"frame {frame!r}: {error}"
    fx, fy = camera.matrix[0, 0], camera.matrix[1, 1]
    lens = camera.distortion_model.value if camera.distorted else "no distortion"
    return f"frame {frame!r}, {camera.width}x{camera.height}, fx {fx:.1f} fy {fy:.1f} px, {lens}"
