# SPDX-License-Identifier: Apache-2.0
"""Poses over time: interpolation between neighbours, and the tree of frames that /tf and /tf_static describe.

Rotation goes along the geodesic (slerp), translation along the straight line. Nothing is extrapolated.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import numpy as np

from ukd_ros.geometry.pose import Pose

EXACT_NS = 1_000
"""Stamps this near are the same: ROS 1 tools pass times through floats."""

MAX_CHAIN = 100


class Unknown(ValueError):
    """No pose can be given; the text says why, in words that do not depend on the image."""


@dataclass
class PoseSeries:
    """Poses of one thing in one frame by their stamps (ns)."""

    stamps: list[int] = field(default_factory=list)
    poses: list[Pose] = field(default_factory=list)
    _sorted: bool = True

    def add(self, stamp_ns: int, pose: Pose) -> None:
        """Note a pose; of two with one stamp the last counts."""
        self._sorted = self._sorted and (not self.stamps or stamp_ns > self.stamps[-1])
        self.stamps.append(stamp_ns)
        self.poses.append(pose)

    def at(self, stamp_ns: int, max_gap_ns: int) -> Pose:
        """Return the pose at a time between two that are both at most ``max_gap_ns`` away; Unknown otherwise."""
        if not self._sorted:
            kept = dict(zip(self.stamps, self.poses, strict=True))
            self.stamps = sorted(kept)
            self.poses = [kept[stamp] for stamp in self.stamps]
            self._sorted = True
        at = bisect_left(self.stamps, stamp_ns)
        for near in (at - 1, at):
            if 0 <= near < len(self.stamps) and abs(self.stamps[near] - stamp_ns) <= EXACT_NS:
                return self.poses[near]
        if at == 0 or at == len(self.stamps):
            raise Unknown("no pose on both sides of the image's stamp")
        before, after = self.stamps[at - 1], self.stamps[at]
        if stamp_ns - before > max_gap_ns or after - stamp_ns > max_gap_ns:
            raise Unknown("the nearest poses are too far from the image's stamp (label_max_gap_s)")
        first, second = self.poses[at - 1], self.poses[at]
        return first.retract((stamp_ns - before) / (after - before) * second.minus(first))


class FrameTree:
    """Transforms between named frames over time. Names are compared without a leading slash, as tf2 does."""

    def __init__(self, wanted_ns: list[int], max_gap_ns: int) -> None:
        """Keep only transforms that may serve a stamp of ``wanted_ns``, so that a long bag takes no more memory."""
        self._wanted = np.unique(np.array(wanted_ns, dtype=np.int64))
        self._gap = max_gap_ns
        self._parents: dict[str, str] = {}
        self._static: dict[str, Pose] = {}
        self._moving: dict[str, PoseSeries] = {}
        self._twice: set[str] = set()

    def add(self, parent: str, child: str, stamp_ns: int, T_parent_child: Pose, static: bool) -> None:
        """Note one transform."""
        parent, child = bare(parent), bare(child)
        if self._parents.setdefault(child, parent) != parent:
            self._twice.add(child)
            return
        if static:
            self._static[child] = T_parent_child
        elif self._serves(stamp_ns):
            self._moving.setdefault(child, PoseSeries()).add(stamp_ns, T_parent_child)

    def transform(self, target: str, source: str, stamp_ns: int) -> Pose:
        """Return ``T_target_source`` at a time; Unknown says why there is none."""
        target, source = bare(target), bare(source)
        if target == source:
            return Pose.identity()
        up, down = self._ancestors(target), self._ancestors(source)
        meeting = next((frame for frame in down if frame in up), None)
        if meeting is None:
            known = source in self._parents or source in self._parents.values()
            raise Unknown(
                f"/tf does not connect {source!r} with {target!r}" if known else f"/tf has no frame {source!r}"
            )
        return self._down(target, meeting, stamp_ns).inverse() @ self._down(source, meeting, stamp_ns)

    def _serves(self, stamp_ns: int) -> bool:
        at = int(np.searchsorted(self._wanted, stamp_ns - self._gap))
        return at < len(self._wanted) and int(self._wanted[at]) <= stamp_ns + self._gap

    def _ancestors(self, frame: str) -> list[str]:
        out = [frame]
        while frame in self._parents and len(out) < MAX_CHAIN:
            frame = self._parents[frame]
            out.append(frame)
        return out

    def _down(self, frame: str, ancestor: str, stamp_ns: int) -> Pose:
        """Return ``T_ancestor_frame``."""
        pose = Pose.identity()
        while frame != ancestor:
            if frame in self._twice:
                raise Unknown(f"/tf gives {frame!r} two parents")
            if frame in self._static:
                step = self._static[frame]
            elif frame in self._moving:
                step = self._moving[frame].at(stamp_ns, self._gap)
            else:
                raise Unknown("the nearest poses are too far from the image's stamp (label_max_gap_s)")
            pose = step @ pose
            frame = self._parents[frame]
        return pose


def bare(frame: str) -> str:
    """Return a frame's name without the leading slash of tf's first version."""
    return frame.lstrip("/")
