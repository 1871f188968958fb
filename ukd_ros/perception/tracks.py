# SPDX-License-Identifier: Apache-2.0
"""Which estimate of this frame is which of the last: identities that stay, and a guess where to look next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose
from ukd_ros.geometry.symmetry import nearest

_LONGEST_EXTRAPOLATION = 2.0
_FRAMES_KEPT = 30


@dataclass
class Track:
    """One object followed over frames.

    object_index: position in the model's objects. instance: its identity, unique per object.
    pose, stamp_ns: the last estimate and its time. before, before_ns: the one before that, if any.
    missed: frames since the last estimate (0: it was seen in the last frame).
    """

    object_index: int
    instance: int
    pose: Pose
    stamp_ns: int
    before: Pose | None = None
    before_ns: int = 0
    missed: int = 0

    def see(self, pose: Pose, stamp_ns: int) -> None:
        """Take the estimate of a new frame."""
        self.before, self.before_ns = self.pose, self.stamp_ns
        self.pose, self.stamp_ns = pose, stamp_ns
        self.missed = 0

    def predict(self, stamp_ns: int, constant_velocity: bool) -> Pose:
        """Return where the object is expected at a time: where it was, or where its last motion takes it.

        The motion is carried on for at most twice the time over which it was seen: a long gap says nothing about it.
        """
        span = self.stamp_ns - self.before_ns
        if not constant_velocity or self.before is None or span <= 0:
            return self.pose
        steps = min((stamp_ns - self.stamp_ns) / span, _LONGEST_EXTRAPOLATION)
        return self.pose.retract(max(steps, 0.0) * self.pose.minus(self.before))


class TrackBook:
    """The tracks of a camera's stream: kept, matched, named and forgotten."""

    def __init__(self) -> None:
        """Start without tracks."""
        self._tracks: list[Track] = []

    def clear(self) -> None:
        """Forget everything."""
        self._tracks.clear()

    def alive(self) -> list[Track]:
        """Return the tracks that were seen in the last frame, oldest identity first."""
        return sorted(
            (track for track in self._tracks if track.missed == 0),
            key=lambda track: (track.object_index, track.instance),
        )

    def forget(self, stamp_ns: int, timeout_s: float) -> None:
        """Begin a frame: drop tracks missing for longer than the timeout, or all when time ran backwards.

        Time runs backwards when a bag starts again. A source without stamps (all 0) is bounded by frames instead.
        """
        if any(stamp_ns < track.stamp_ns for track in self._tracks):
            self.clear()
        for track in self._tracks:
            track.missed += track.missed > 0
        limit = int(timeout_s * 1e9)
        self._tracks = [
            track for track in self._tracks if stamp_ns - track.stamp_ns <= limit and track.missed <= _FRAMES_KEPT
        ]

    def miss(self, track: Track) -> None:
        """Note that a track was not found in this frame; its identity waits until the timeout."""
        track.missed += 1

    def assign(self, object_index: int, model: ObjectModel, pose: Pose, stamp_ns: int, camera: Camera) -> Track:
        """Give a newly found object the identity of a missing track close to it, or else the lowest free number."""
        track = self._missing_near(object_index, model, pose, camera)
        if track is not None:
            track.see(nearest(pose, track.pose, model.symmetries) if model.symmetries else pose, stamp_ns)
            track.before = None  # a motion across a gap is no velocity
            return track
        taken = {track.instance for track in self._tracks if track.object_index == object_index and track.missed == 0}
        instance = next(number for number in range(len(taken) + 1) if number not in taken)
        # Whoever is missing under that number has lost it.
        self._tracks = [
            other for other in self._tracks if (other.object_index, other.instance) != (object_index, instance)
        ]
        track = Track(object_index, instance, pose, stamp_ns)
        self._tracks.append(track)
        return track

    def _missing_near(self, object_index: int, model: ObjectModel, pose: Pose, camera: Camera) -> Track | None:
        """Return the missing track whose last pose lies nearest in the image, if within one object size."""
        missing = [track for track in self._tracks if track.object_index == object_index and track.missed > 0]
        if not missing:
            return None
        here = camera.project(pose.transform(model.keypoints_3d))
        size = float(np.nanmax(np.ptp(here, axis=0)))
        gaps = [_gap(here, camera.project(track.pose.transform(model.keypoints_3d))) for track in missing]
        best = int(np.argmin(gaps))
        return missing[best] if gaps[best] <= size else None


def _gap(xy: FloatArray, other: FloatArray) -> float:
    """Return the distance of two projections' centres (px); infinite where one is not in front of the camera."""
    gap = float(np.linalg.norm(xy.mean(axis=0) - other.mean(axis=0)))
    return gap if np.isfinite(gap) else np.inf
