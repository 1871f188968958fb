# SPDX-License-Identifier: Apache-2.0
"""The scores that the field compares by: which estimate answers for which label, and what share of labels is right.

After the BOP challenge 2019 (Hodan et al., arXiv 2009.07378, section 2.2, and the toolkit's pose_matching.py): of the
estimates for an object in an image only the best-scored ones count, as many as are asked for; by falling score each
takes the label it fits best among those left, if its error is below the threshold; recall is over all labels asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ukd_ros.geometry.arrays import FloatArray, frozen_array

ADD_THRESHOLDS = (0.02, 0.05, 0.1)
"""Fractions of the diameter below which ADD(-S) is right; 0.1 is the usual one (Hinterstoisser 2012)."""

MSSD_THRESHOLDS = tuple(0.05 * i for i in range(1, 11))
"""Fractions of the diameter."""

MSPD_THRESHOLDS = tuple(5.0 * i for i in range(1, 11))
"""Pixels of an image 640 px wide; an error in a wider one counts for less in proportion."""

PROJECTION_THRESHOLD = 5.0
"""Pixels below which the mean projection error is right (Brachmann et al. 2016)."""

AUC_LIMIT = 0.1
"""Metres up to which the area under the recall of ADD(-S) is taken (PoseCNN, Xiang et al. 2018)."""

METRICS = ("add", "add_m", "mssd", "mspd", "projection")
"""Errors of one estimate against one label: ADD(-S) over the diameter and in m, MSSD over the diameter, MSPD in px of
an image 640 px wide, mean projection error in px."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What was answered for one object in one image.

    targets: how many instances were asked for, T. errors: per metric [E, T], a row for each estimate that counts (the
    best-scored ones, at most T, by falling score), a column for each label asked for; infinite where there is no error
    to speak of.
    """

    object_name: str
    targets: int
    errors: dict[str, FloatArray]

    def __post_init__(self) -> None:
        """Check the shapes; ValueError names the metric."""
        for name, matrix in self.errors.items():
            if matrix.ndim != 2 or matrix.shape[1] != self.targets or len(matrix) > self.targets:
                raise ValueError(
                    f"{name}: has shape {matrix.shape}, but [E, {self.targets}] with E <= {self.targets} is needed: "
                    "only the best estimates count, as many as are asked for."
                )
            self.errors[name] = np.where(np.isnan(matrix), np.inf, matrix)


def matches(errors: FloatArray, threshold: float = np.inf) -> list[tuple[int, int]]:
    """Return (estimate, label) pairs with an error strictly below the threshold, each label at most once.

    errors [E, T], estimates by falling score; each takes the label of least error among those left.
    """
    free = np.ones(errors.shape[1], dtype=bool)
    pairs = []
    for row, values in enumerate(errors):
        open_values = np.where(free & (values < threshold), values, np.inf)
        if open_values.size and np.isfinite(open_values).any():
            column = int(np.argmin(open_values))
            free[column] = False
            pairs.append((row, column))
    return pairs


def recall(answers: Iterable[Answers], metric: str, threshold: float) -> float:
    """Return the share of all targets that are matched below a threshold; NaN when nothing was asked for."""
    right = asked = 0
    for item in answers:
        right += len(matches(item.errors[metric], threshold))
        asked += item.targets
    return right / asked if asked else float("nan")


def average_recall(answers: Sequence[Answers], metric: str, thresholds: Sequence[float]) -> float:
    """Return the mean of the recalls at several thresholds (BOP's AR of one metric)."""
    return float(np.mean([recall(answers, metric, threshold) for threshold in thresholds]))


def area_under_recall(answers: Sequence[Answers], metric: str, limit: float) -> float:
    """Return the exact area, 0..1, under the recall over the threshold from 0 to ``limit``; missed targets add none."""
    area, asked = 0.0, 0
    for item in answers:
        asked += item.targets
        # recall is constant between two errors, and the matching may change at each of them
        errors = item.errors[metric]
        edges = np.unique(np.concatenate([[0.0, limit], errors[errors < limit]])).tolist()
        area += sum((b - a) / limit * len(matches(errors, b)) for a, b in zip(edges[:-1], edges[1:], strict=True))
    return area / asked if asked else float("nan")


@dataclass(frozen=True)
class RiskPoint:
    """A point of the risk-coverage curve: of the surest answers, `kept` of all targets, this share is right."""

    kept: float
    accuracy: float
    doubt: float


def risk_coverage(doubt: FloatArray, right: FloatArray, targets: int, points: int = 20) -> list[RiskPoint]:
    """Return how accurate the answers are when the most uncertain ones are refused (Geifman and El-Yaniv 2017).

    doubt [n]: predicted error of each answer, any unit that orders them. right [n] bool. targets: all that were asked
    for, answered or not. From the surest twentieth (``points``) of the answers to all of them.
    """
    values = frozen_array(doubt, (None,), "doubt")
    good = frozen_array(right, (len(values),), "right", np.bool_)
    order = np.argsort(values, kind="stable")
    hits = np.cumsum(good[order])
    counts = np.unique(np.ceil(np.linspace(0, len(values), points + 1)[1:]).astype(int)) if len(values) else []
    return [
        RiskPoint(float(n / targets), float(hits[n - 1] / n), float(values[order[n - 1]])) for n in map(int, counts)
    ]
