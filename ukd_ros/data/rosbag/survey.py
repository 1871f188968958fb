# SPDX-License-Identifier: Apache-2.0
"""One pass over a bag: which of its images are readable and show something new, with camera, time and labels.

It holds one image at a time. What it finds is plain JSON, kept beside the output, so that a call that was killed does
not look twice, and so that scenes can be cut and shared out among processes before one is written.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from io import BytesIO
from operator import attrgetter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.data.progress import Bar
from ukd_ros.data.rosbag.folder import shown
from ukd_ros.data.rosbag.labels import FrameLabel, Stamped, read_labels, unused_topics
from ukd_ros.data.rosbag.options import BagOptions
from ukd_ros.data.rosbag.reader import BagIndex, BagReader, Entry
from ukd_ros.data.rosbag.storage import BagError, IntArray
from ukd_ros.data.rosbag.topics import Chosen, choose_topics
from ukd_ros.data.undistortion import MAX_SIDE
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.view import View
from ukd_ros.perception.images import CameraInfoError, ImageError, view_from_messages

THUMBNAIL = (32, 24)
CHANGED_SHARE = 0.02
JUMP_NS = 60 * 10**9
"""A pause this long, or a step back, in the times of recording ends a block: nobody knows what lies between."""

STAMP_JUMP_NS = 5 * 10**9
"""Stamps that run away from the times of recording by more than this between two images are a jump of a clock."""

TOLERANCE_NS = 10**8
"""Steps back by less are messages that overtook each other."""

MAX_REASONS = 20


@dataclass(frozen=True, slots=True)
class Frame:
    """One image that is kept: where it is in the bag, when, in which segment, by which camera, with which labels.

    `elapsed_ns` is the time of recording since the first image, jumps of the clock left out; it never goes back. A long
    recording has hundreds of thousands of frames, which are held at once: no field costs more than it must.
    """

    entry: tuple[int, ...]
    stamp_ns: int
    frame_id: str
    elapsed_ns: int
    segment: int
    camera: int
    labels: tuple[dict[str, Any], ...] = ()


@dataclass
class Survey:
    """What one bag holds; the counts are of images."""

    bag: str
    image_topic: str
    info_topic: str
    rectified: bool
    seen: int = 0
    thinned: int = 0
    without_camera_info: int = 0
    broken: dict[str, int] = field(default_factory=dict)
    labels_refused: dict[str, int] = field(default_factory=dict)
    clock_jumps: int = 0
    duration_ns: int = 0
    size: int = 0
    lost_bytes: int = 0
    damage: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    cameras: list[dict[str, Any]] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)


def survey_bag(path: Path, name: str, options: BagOptions, progress: bool = True) -> Survey:
    """Look through the bag at ``path``; BagError when it has no images, no camera_info, or several to choose from."""
    with BagReader(path, partial=True) as bag:
        chosen = choose_topics(bag, options)
        survey = Survey(name, chosen.image_topic, chosen.info_topic, chosen.rectified, size=bag.size)
        _look_through(bag, chosen, options, survey, progress)
        _label(bag, options, survey)
        survey.lost_bytes, survey.damage, survey.warnings = bag.lost_bytes, bag.damage, bag.warnings
        survey.warnings = [*survey.warnings, *unused_topics(bag, options)]
    return survey


def timeline(times_ns: IntArray) -> tuple[IntArray, IntArray, int]:
    """Return (elapsed ns, segment, number of jumps) of images recorded in this order at these times.

    Time goes on by the steps between images. A step back or a very long one has no length and begins a new segment:
    whether an hour passed or a clock was set, what is on both sides is not one stretch of time.
    """
    steps = np.diff(times_ns, prepend=times_ns[:1])
    jumps = (steps < -TOLERANCE_NS) | (steps > JUMP_NS)
    elapsed = np.cumsum(np.where(jumps, 0, np.maximum(steps, 0)))
    return elapsed, np.cumsum(jumps), int(jumps.sum())


def _look_through(bag: BagReader, chosen: Chosen, options: BagOptions, survey: Survey, progress: bool) -> None:
    """Read every image once and keep those that are whole and new."""
    index = bag.index([chosen.image_topic])
    elapsed, segments, survey.clock_jumps = timeline(index.times_ns)
    survey.duration_ns = int(elapsed[-1]) if len(elapsed) else 0
    infos = _Infos(bag, chosen)
    broken: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    cameras: dict[str, int] = {}
    frame_ids: dict[str, str] = {}
    last: npt.NDArray[np.int16] | None = None
    before: tuple[int, int] | None = None
    with Bar(total=len(index), desc=f"looking through {survey.bag}", unit="image", disable=not progress) as bar:
        for number in range(len(index)):
            entry = index[number]
            survey.seen += 1
            bar.update()
            try:
                view = infos.view(entry)
            except _NoInfo:
                survey.without_camera_info += 1
                continue
            except (BagError, ImageError, CameraInfoError) as error:
                broken[_reason(error, reasons)] += 1
                continue
            survey.clock_jumps += _jumped(before, (view.stamp_ns, entry.time_ns))
            before = (view.stamp_ns, entry.time_ns)
            now = thumbnail(view.image)
            if last is not None and options.min_change > 0 and changed(last, now) < options.min_change:
                survey.thinned += 1
                continue
            last = now
            camera = cameras.setdefault(json.dumps(camera_record(view.camera)), len(cameras))
            place = (int(elapsed[number]), int(segments[number]))
            frame_id = frame_ids.setdefault(view.frame_id, view.frame_id)  # one text for all frames
            survey.frames.append(Frame(tuple(entry), view.stamp_ns, frame_id, *place, camera))
    if survey.seen and survey.without_camera_info == survey.seen:
        raise BagError(f"{bag.path}: none of the {survey.seen} images has a camera_info of its camera: {infos.told()}.")
    survey.broken = dict(broken)
    survey.cameras = [json.loads(text) for text in cameras]


class _NoInfo(Exception):
    """No camera_info of the image's camera is anywhere in the bag."""


class _Infos:
    """Images with the camera_info that was the newest when they were recorded, or the first one after them."""

    def __init__(self, bag: BagReader, chosen: Chosen) -> None:
        self._bag, self._rectified = bag, chosen.rectified
        self._index: BagIndex = bag.index([chosen.info_topic])
        self._next = 0
        self._newest: dict[str, Any] = {}
        self._first: dict[str, Any] = {}
        self._searched = 0
        self._chosen, self._missing = chosen, ""

    def view(self, entry: Entry) -> View:
        """Return the view of an image; _NoInfo, BagError, ImageError or CameraInfoError when there is none."""
        self._catch_up(entry)
        message = self._bag.read(entry).decoded()
        frame = str(message.header.frame_id)
        info = self._newest.get(frame) or self._later(frame)
        if info is None:
            self._missing = frame
            raise _NoInfo
        view = view_from_messages(message, info, self._rectified)
        if view.camera.distorted and max(view.camera.width, view.camera.height) > MAX_SIDE:
            raise ImageError(
                f"The image is {view.camera.width}x{view.camera.height}; a lens is taken out of at most {MAX_SIDE} "
                "pixels a side."
            )
        return view

    def told(self) -> str:
        """Return why the last image without camera_info has none."""
        images, infos = shown(self._chosen.image_topic), shown(self._chosen.info_topic)
        if not self._first:
            return f"no message of {infos} can be read; record it again, or name another topic with info_topic"
        frames = ", ".join(shown(repr(frame)) for frame in list(self._first)[:5])
        return (
            f"the frame_id of {images} is {shown(repr(self._missing))}, that of {infos} {frames}; set the same in the "
            "driver, or name another topic with info_topic"
        )

    def _catch_up(self, entry: Entry) -> None:
        """Read the camera_infos recorded before this image."""
        here = (entry.file, entry.first, entry.second)
        while self._next < len(self._index):
            info = self._index[self._next]
            if (info.file, info.first, info.second) > here:
                break
            self._next += 1
            self._note(info, self._newest)

    def _later(self, frame: str) -> Any:
        """Return the first camera_info of a camera, wherever it is; recorders start topics at different times."""
        while frame not in self._first and self._searched < len(self._index):
            self._note(self._index[self._searched], self._first)
            self._searched += 1
        return self._first.get(frame)

    def _note(self, entry: Entry, table: dict[str, Any]) -> None:
        try:
            info = self._bag.read(entry).decoded()
        except BagError:
            return  # a broken one is as good as none; the next serves
        frame = str(info.header.frame_id)
        if table is self._newest or frame not in table:
            table[frame] = info


def _jumped(before: tuple[int, int] | None, now: tuple[int, int]) -> bool:
    """Return whether the stamp jumped between two images, (stamp, time of recording) ns each, and the other did not."""
    if before is None or 0 in (before[0], now[0]):  # a driver that sets no stamp has no clock
        return False
    stamp, recorded = now[0] - before[0], now[1] - before[1]
    if recorded < -TOLERANCE_NS or recorded > JUMP_NS:
        return False  # counted by the times of recording
    return stamp < -TOLERANCE_NS or abs(stamp - recorded) > STAMP_JUMP_NS


def thumbnail(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
    """Return a small grey version [24,32] of an image, in which a sensor's noise is averaged away."""
    small = cv2.resize(image, THUMBNAIL, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.int16)


def changed(first: npt.NDArray[np.int16], second: npt.NDArray[np.int16]) -> float:
    """Return how much two thumbnails differ, grey levels: the mean of the most changed 2 %.

    A part that moves before a still background changes little of the image, but that much.
    """
    differences = np.abs(first - second).reshape(-1)
    most = max(1, round(CHANGED_SHARE * differences.size))
    return float(np.partition(differences, -most)[-most:].mean())


def _reason(error: Exception, known: dict[str, str]) -> str:
    """Return an error's first sentence as it was first said: what differs in its numbers only is counted together.

    known: a sentence without its numbers -> the first one that was like it.
    """
    text = " ".join((str(error).split("are no sensor_msgs")[0] if isinstance(error, BagError) else str(error)).split())
    text = re.split(r"(?<=\.) ", text)[0] if not isinstance(error, BagError) else text
    like = re.sub(r"\d+(\.\d+)?", "#", text)[:160]
    if like not in known and len(known) >= MAX_REASONS:
        return "other reasons"
    return known.setdefault(like, text[:200])


def _label(bag: BagReader, options: BagOptions, survey: Survey) -> None:
    """Give the kept frames the labels that the bag has."""
    images = [Stamped(frame.stamp_ns, frame.frame_id) for frame in survey.frames]
    found, refused = read_labels(bag, options, images)
    survey.labels_refused = dict(refused.most_common(MAX_REASONS))
    for number, labels in enumerate(found):
        if labels:
            records = tuple(_label_record(label) for label in labels)
            survey.frames[number] = replace(survey.frames[number], labels=records)


def _label_record(label: FrameLabel) -> dict[str, Any]:
    pose = label.T_camera_object
    return {"name": label.object_name, "R": pose.rotation.reshape(-1).tolist(), "t": pose.translation.tolist()}


def camera_record(camera: Camera) -> dict[str, Any]:
    """Return a camera as plain values."""
    return {
        "width": camera.width,
        "height": camera.height,
        "matrix": camera.matrix.reshape(-1).tolist(),
        "distortion_model": camera.distortion_model.value,
        "distortion": camera.distortion.tolist(),
    }


def camera_of(record: dict[str, Any]) -> Camera:
    """Return the camera of `camera_record`."""
    matrix = np.reshape(record["matrix"], (3, 3))
    return Camera(record["width"], record["height"], matrix, record["distortion_model"], record["distortion"])


def dumps(survey: Survey) -> bytes:
    """Return a survey as lines of JSON: what it says of the bag, and then one frame a line.

    JSON of all frames at once would take several times the memory of the frames themselves.
    """
    out = BytesIO()
    out.write(json.dumps(asdict(replace(survey, frames=[]))).encode() + b"\n")
    values = attrgetter(*(row.name for row in fields(Frame)))
    for frame in survey.frames:
        out.write(json.dumps(values(frame)).encode() + b"\n")
    return out.getvalue()


def loads(data: bytes) -> Survey:
    """Return the survey of `dumps`."""
    lines = BytesIO(data)
    survey = Survey(**json.loads(next(lines)))
    frame_ids: dict[str, str] = {}
    for line in lines:
        entry, stamp_ns, frame_id, elapsed_ns, segment, camera, labels = json.loads(line)
        frame_id = frame_ids.setdefault(frame_id, frame_id)
        survey.frames.append(Frame(tuple(entry), stamp_ns, frame_id, elapsed_ns, segment, camera, tuple(labels)))
    return survey
