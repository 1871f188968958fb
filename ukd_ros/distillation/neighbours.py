# SPDX-License-Identifier: Apache-2.0
"""Labels of one object in neighbouring frames must agree with one another: what jumps out and back is wrong."""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ukd_ros.distillation.pseudo_labels import PseudoLabel, PseudoLabelOptions, PseudoLabels
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.metrics import add
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose, exp_so3, log_so3
from ukd_ros.geometry.symmetry import nearest

DISAGREES = "disagrees_in_time"

NEAR = 0.5
"""Share of the diameter by which one of several parts of a kind moves at most from frame to frame, to be followed."""

PLAINLY = 2.0
"""So many times as far as the nearest must all others be, for that one to be taken for the same part."""


def agreeing(
    labels: PseudoLabels,
    places: Sequence[tuple[int, int]],
    models: Sequence[ObjectModel],
    options: PseudoLabelOptions,
) -> PseudoLabels:
    """Refuse the labels that their neighbours in time speak against.

    places: (stretch of a recording, stamp ns) of every frame, by its number. A label with an accepted one of its part
    within the gap both before and after it must lie where these two, interpolated, say; with a neighbour on one side
    only, or none, nothing is known and it stays. The worst goes first, and no longer speaks against those beside it.
    Several parts of a kind are told from one another by where they were seen, refused or not.
    """
    if options.time_gap_s <= 0.0:
        return labels
    rows: dict[tuple[int, int], list[int]] = {}
    for number, label in enumerate(labels.labels):
        rows.setdefault((places[label.frame][0], label.class_index), []).append(number)
    refused: set[int] = set()
    for (_, class_index), numbers in rows.items():
        numbers.sort(key=lambda number: places[labels.labels[number].frame][1])
        stamps = [places[labels.labels[number].frame][1] for number in numbers]
        own = [labels.labels[number] for number in numbers]
        for track in _Parts(own, stamps, models[class_index], options).tracks():
            voting = [row for row in track if not own[row].refused]
            chosen = [own[row] for row in voting], [stamps[row] for row in voting]
            refused |= {numbers[voting[row]] for row in _Row(*chosen, models[class_index], options).against()}
    marked = tuple(
        replace(label, refused=DISAGREES) if number in refused else label for number, label in enumerate(labels.labels)
    )
    counts = {**labels.refused, **({DISAGREES: len(refused)} if refused else {})}
    return PseudoLabels(marked, labels.frames, counts)


class _Parts:
    """What was seen of one class in one stretch, in the order of time, refused or not: which of it is one part."""

    def __init__(
        self, labels: list[PseudoLabel], stamps: list[int], model: ObjectModel, options: PseudoLabelOptions
    ) -> None:
        middle = _middle(model)
        self.middles = np.array([label.T_camera_object.transform(middle) for label in labels])
        self.stamps = np.array(stamps)
        self.gap_ns, self.near = options.time_gap_s * 1e9, NEAR * model.diameter

    def tracks(self) -> list[list[int]]:
        """Return the rows of each part, in the order of time; a part that was lost from sight begins anew."""
        starts = [*np.unique(self.stamps, return_index=True)[1].tolist(), len(self.stamps)]
        frames = [range(first, end) for first, end in zip(starts, starts[1:], strict=False)]
        tracks = [[row] for row in frames[0]]
        newest = {track[-1]: track for track in tracks}
        for before, frame in zip(frames, frames[1:], strict=False):
            for row in frame:
                same = self._same(row, frame, before)
                track = [] if same is None else newest[same]
                if same is None:
                    tracks.append(track)
                track.append(row)
                newest[row] = track
        return tracks

    def _same(self, row: int, frame: range, before: range) -> int | None:
        """Return the row of the frame before that is the same part as one of a frame, None where none surely is.

        What is alone in both frames is one part, however far it jumped. Of several, two must be plainly nearest to each
        other: the camera moves, and in a row of parts the next may come to where one was.
        """
        if self.stamps[row] - self.stamps[before[0]] > self.gap_ns:
            return None
        if len(frame) == len(before) == 1:
            return None if self._at_once(row, before[0]) else before[0]
        other = self._nearest(row, before)
        return other if other is not None and self._nearest(other, frame) == row else None

    def _nearest(self, row: int, rows: range) -> int | None:
        """Return which of a frame's rows is plainly the nearest to another frame's row, if any is."""
        apart = np.linalg.norm(self.middles[rows.start : rows.stop] - self.middles[row], axis=1)
        order = np.argsort(apart)
        if apart[order[0]] >= self.near or (len(order) > 1 and apart[order[1]] <= PLAINLY * apart[order[0]]):
            return None
        return rows[int(order[0])]

    def _at_once(self, row: int, other: int) -> bool:
        """Return whether within the gap something was seen at the places of two rows at once: they are two parts."""
        stamp = self.stamps[row]
        beside = slice(*np.searchsorted(self.stamps, (stamp - self.gap_ns, stamp + self.gap_ns)))
        middles, stamps = self.middles[beside], self.stamps[beside]
        here, there = self.middles[row], self.middles[other]
        near = np.linalg.norm(here - there) / 3.0  # nothing is near both
        at_here = stamps[np.linalg.norm(middles - here, axis=1) < near]
        at_there = stamps[np.linalg.norm(middles - there, axis=1) < near]
        return bool(np.isin(at_here, at_there).any())


def _middle(model: ObjectModel) -> FloatArray:
    """Return a point [3] of the object, m, that stays where it is when only the name of a symmetric pose changes."""
    middle = model.keypoints_3d.mean(axis=0)
    return np.asarray(np.mean([motion.transform(middle) for motion in model.symmetries.poses()], axis=0))


class _Row:
    """The labels of one part in one stretch, in the order of time."""

    def __init__(
        self, labels: list[PseudoLabel], stamps: list[int], model: ObjectModel, options: PseudoLabelOptions
    ) -> None:
        self.labels, self.stamps, self.model = labels, stamps, model
        self.gap_ns, self.most = options.time_gap_s * 1e9, options.time_error * model.diameter
        self.gone: set[int] = set()

    def against(self) -> set[int]:
        """Return the rows that the others speak against, taken away one by one, the farthest off first."""
        heap = [(-self.error(row), row) for row in range(len(self.labels))]
        heapq.heapify(heap)
        while heap and -heap[0][0] > self.most:
            said, row = heapq.heappop(heap)
            if row in self.gone:
                continue
            now = self.error(row)
            if now != -said:  # a neighbour has gone since
                heapq.heappush(heap, (-now, row))
                continue
            self.gone.add(row)
            near = range(*self._within(self.stamps[row] - self.gap_ns, self.stamps[row] + self.gap_ns))
            for other in near:  # their error may have grown: what they are compared with is another
                if other not in self.gone:
                    heapq.heappush(heap, (-self.error(other), other))
        return self.gone

    def error(self, row: int) -> float:
        """Return how far (ADD, m) a label is from what its neighbours say; 0 where they say nothing."""
        label = self.labels[row]
        before, after = self._side(row, -1), self._side(row, 1)
        if before is None or after is None:
            return 0.0
        share = before[0] / (before[0] + after[0])
        first, last = before[1], after[1]
        turn = exp_so3(share * log_so3(last.rotation @ first.rotation.T))
        moved = first.translation + share * (last.translation - first.translation)
        near = nearest(Pose(turn @ first.rotation, moved), label.T_camera_object, self.model.symmetries)
        return float(add(label.T_camera_object, near, self.model.keypoints_3d))

    def _side(self, row: int, sign: int) -> tuple[int, Pose] | None:
        """Return time (ns) to the nearest frame with a label on one side, and the pose there.

        None without one within the gap.
        """
        label, stamp = self.labels[row], self.stamps[row]
        other = next(self._others(stamp, sign), None)
        if other is None or abs(self.stamps[other] - stamp) > self.gap_ns:
            return None
        pose = nearest(self.labels[other].T_camera_object, label.T_camera_object, self.model.symmetries)
        return abs(self.stamps[other] - stamp), pose

    def _others(self, stamp: int, sign: int) -> Iterator[int]:
        """Yield the rows before or after a stamp that are still there, the nearest first."""
        first, end = self._within(stamp, stamp)
        rows = range(end, len(self.labels)) if sign > 0 else range(first - 1, -1, -1)
        return (row for row in rows if row not in self.gone)

    def _within(self, low: float, high: float) -> tuple[int, int]:
        """Return the first row from `low` on, and the first after `high` (ns)."""
        return bisect_left(self.stamps, low), bisect_right(self.stamps, high)
