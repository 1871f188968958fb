# SPDX-License-Identifier: Apache-2.0
"""Labels of one object in neighbouring frames must agree with one another: what jumps out and back is wrong."""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ukd_ros.distillation.pseudo_labels import PseudoLabel, PseudoLabelOptions, PseudoLabels
from ukd_ros.geometry.metrics import add
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose, exp_so3, log_so3
from ukd_ros.geometry.symmetry import nearest

DISAGREES = "disagrees_in_time"


def agreeing(
    labels: PseudoLabels,
    places: Sequence[tuple[int, int]],
    models: Sequence[ObjectModel],
    options: PseudoLabelOptions,
) -> PseudoLabels:
    """Refuse the labels that their neighbours in time speak against.

    places: (stretch of a recording, stamp ns) of every frame, by its number. A label with an accepted one of its object
    within the gap both before and after it must lie where these two, interpolated, say; with a neighbour on one side
    only, or none, nothing is known and it stays. The worst goes first, and no longer speaks against those beside it.
    """
    if options.time_gap_s <= 0.0:
        return labels
    rows: dict[tuple[int, int], list[int]] = {}
    for number, label in enumerate(labels.labels):
        if not label.refused:
            rows.setdefault((places[label.frame][0], label.class_index), []).append(number)
    refused: set[int] = set()
    for (_, class_index), numbers in rows.items():
        numbers.sort(key=lambda number: places[labels.labels[number].frame][1])
        stamps = [places[labels.labels[number].frame][1] for number in numbers]
        own = [labels.labels[number] for number in numbers]
        refused |= {numbers[row] for row in _Row(own, stamps, models[class_index], options).against()}
    marked = tuple(
        replace(label, refused=DISAGREES) if number in refused else label for number, label in enumerate(labels.labels)
    )
    counts = {**labels.refused, **({DISAGREES: len(refused)} if refused else {})}
    return PseudoLabels(marked, labels.frames, counts)


class _Row:
    """The labels of one class in one stretch, in the order of time."""

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

        Of several objects of a kind the one nearest in space is the same. None without one within the gap.
        """
        label, stamp = self.labels[row], self.stamps[row]
        best: tuple[int, float, Pose] | None = None
        for other in self._others(stamp, sign):
            dt = abs(self.stamps[other] - stamp)
            if dt > self.gap_ns or (best is not None and dt > best[0]):
                break
            pose = nearest(self.labels[other].T_camera_object, label.T_camera_object, self.model.symmetries)
            apart = float(np.linalg.norm(pose.translation - label.T_camera_object.translation))
            if best is None or apart < best[1]:
                best = (dt, apart, pose)
        return None if best is None else (best[0], best[2])

    def _others(self, stamp: int, sign: int) -> Iterator[int]:
        """Yield the rows before or after a stamp that are still there, the nearest first."""
        first, end = self._within(stamp, stamp)
        rows = range(end, len(self.labels)) if sign > 0 else range(first - 1, -1, -1)
        return (row for row in rows if row not in self.gone)

    def _within(self, low: float, high: float) -> tuple[int, int]:
        """Return the first row from `low` on, and the first after `high` (ns)."""
        return bisect_left(self.stamps, low), bisect_right(self.stamps, high)
