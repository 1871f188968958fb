# SPDX-License-Identifier: Apache-2.0
"""Poses over time: interpolation between neighbours, and the tree of frames that /tf and /tf_static describe.

Rotation goes along the geodesic (slerp), translation along the straight line. Nothing is extrapolated.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.pose import Pose

EXACT_NS = 1_000
"""Stamps this near are the same: ROS 1 tools pass times through floats."""

MAX_CHAIN = 100


class Unknown(ValueError):
    """No pose can be given; the text says why, in words that do not depend on the image."""


class PoseSeries:
    """Poses of one thing in one frame, for the stamps (ns) that will be asked for.

    Only the nearest pose before and after each of these is kept, as bytes: a bag may hold millions.
    """

    def __init__(self, wanted_ns: Sequence[int] | npt.NDArray[np.int64]) -> None:
        self._wanted = np.unique(np.asarray(wanted_ns, dtype=np.int64))
        # number of the first wanted stamp that is not before -> the first and the last pose of that stretch
        self._stretches: dict[int, tuple[_Kept, _Kept]] = {}
        self._order: list[int] = []

    def __len__(self) -> int:
        """Return the number of stretches between wanted stamps that hold poses; of each two are kept."""
        return len(self._stretches)

    def add(self, stamp_ns: int, pose: Pose) -> None:
        """Note a pose; of two with one stamp the last counts."""
        stretch = int(np.searchsorted(self._wanted, stamp_ns))
        new = _Kept(stamp_ns, np.vstack([pose.rotation, pose.translation]).tobytes())
        first, last = self._stretches.get(stretch, (new, new))
        self._stretches[stretch] = (
            new if stamp_ns <= first.stamp_ns else first,
            new if stamp_ns >= last.stamp_ns else last,
        )

    def at(self, stamp_ns: int, max_gap_ns: int) -> Pose:
        """Return the pose at a wanted time between two that are both at most ``max_gap_ns`` away; Unknown otherwise."""
        stretch = int(np.searchsorted(self._wanted, stamp_ns))
        if stretch == len(self._wanted) or self._wanted[stretch] != stamp_ns:
            raise KeyError(f"no pose at {stamp_ns} ns was asked for")
        if len(self._order) != len(self._stretches):
            self._order = sorted(self._stretches)
        later = bisect_right(self._order, stretch)
        before = self._stretches[self._order[later - 1]][1] if later > 0 else None
        after = self._stretches[self._order[later]][0] if later < len(self._order) else None
        for near in (before, after):
            if near is not None and abs(near.stamp_ns - stamp_ns) <= EXACT_NS:
                return near.pose()
        if before is None or after is None:
            raise Unknown("no pose on both sides of the image's stamp")
        if stamp_ns - before.stamp_ns > max_gap_ns or after.stamp_ns - stamp_ns > max_gap_ns:
            raise Unknown("the nearest poses are too far from the image's stamp (label_max_gap_s)")
        first, second = before.pose(), after.pose()
        part = (stamp_ns - before.stamp_ns) / (after.stamp_ns - before.stamp_ns)
        return first.retract(part * second.minus(first))


class _Kept(NamedTuple):
    """A pose's stamp (ns), and its rotation and translation as the bytes of float64 [4, 3]."""

    stamp_ns: int
    content: bytes

    def pose(self) -> Pose:
        rows = np.frombuffer(self.content).reshape(4, 3)
        return Pose(rows[:3], rows[3])


class FrameTree:
    """Transforms between named frames over time. Names are compared without a leading slash, as tf2 does."""

    def __init__(self, wanted_ns: Sequence[int] | npt.NDArray[np.int64], max_gap_ns: int) -> None:
        """Keep only what serves a stamp of ``wanted_ns`` (`keep`: between frames named), whatever a bag's length."""
        self._wanted = np.unique(np.asarray(wanted_ns, dtype=np.int64))
        self._gap = max_gap_ns
        self._parents: dict[str, str] = {}
        self._static: dict[str, Pose] = {}
        self._moving: dict[str, PoseSeries] = {}
        self._twice: set[str] = set()
        self._kept: set[str] | None = None

    def connect(self, parent: str, child: str) -> None:
        """Note that two frames are joined; what `keep` finds between frames is made of these."""
        parent, child = bare(parent), bare(child)
        if self._parents.setdefault(child, parent) != parent:
            self._twice.add(child)

    def keep(self, frames: Iterable[str]) -> None:
        """Keep, of what is added from now on, only transforms between these frames."""
        self._kept = {above for frame in frames for above in self._ancestors(bare(frame))}

    def add(self, parent: str, child: str, stamp_ns: int, T_parent_child: Pose, static: bool) -> None:
        """Note one transform."""
        self.connect(parent, child)
        parent, child = bare(parent), bare(child)
        if self._parents[child] != parent or (self._kept is not None and child not in self._kept):
            return
        if static:
            self._static[child] = T_parent_child
        elif self._serves(stamp_ns):
            self._moving.setdefault(child, PoseSeries(self._wanted)).add(stamp_ns, T_parent_child)

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
