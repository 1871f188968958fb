# SPDX-License-Identifier: Apache-2.0
"""Scores against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ukd_ros.distillation.protocol import (
    MSPD_THRESHOLDS,
    MSSD_THRESHOLDS,
    Answers,
    area_under_recall,
    average_recall,
    matches,
    recall,
    risk_coverage,
)

INF = np.inf


def one(error: float, metric: str = "add") -> Answers:
    return Answers("a", 1, {metric: np.array([[error]])})


MISSED = Answers("a", 1, {"add": np.zeros((0, 1))})


def test_the_better_scored_estimate_chooses_first_and_a_label_is_used_once() -> None:
    # Row 0 scores best and takes label 1 (0.1); row 1 would like label 1 too (0.05) but gets label 0 (0.3).
    errors = np.array([[0.2, 0.1], [0.3, 0.05]])
    assert matches(errors) == [(0, 1), (1, 0)]
    # Below 0.25 the second is left with nothing: greedy by score, not optimal, as BOP has it.
    assert matches(errors, 0.25) == [(0, 1)]
    # Below 0.08 the first is out and label 1 is the second's.
    assert matches(errors, 0.08) == [(1, 1)]
    assert matches(np.zeros((0, 2))) == [] and matches(np.full((1, 2), INF)) == []


def test_a_threshold_is_not_met_by_reaching_it() -> None:
    assert matches(np.array([[0.1]]), 0.1) == [] and matches(np.array([[0.0999]]), 0.1) == [(0, 0)]


def test_recall_counts_what_was_missed() -> None:
    answers = [one(0.01), one(0.04), one(0.2), MISSED]
    assert recall(answers, "add", 0.02) == 1 / 4
    assert recall(answers, "add", 0.05) == 2 / 4
    assert recall(answers, "add", 0.5) == 3 / 4
    assert np.isnan(recall([], "add", 0.1))


def test_average_recalls_are_bops() -> None:
    """MSSD 0.12 d is below 0.15, 0.20, ... 0.50: eight of ten. MSPD 32 px is below 35, 40, 45, 50: four of ten."""
    assert MSSD_THRESHOLDS[0] == 0.05 and len(MSSD_THRESHOLDS) == 10 and MSSD_THRESHOLDS[-1] == 0.5
    assert (MSPD_THRESHOLDS[0], MSPD_THRESHOLDS[-1]) == (5.0, 50.0)
    assert average_recall([one(0.12, "mssd")], "mssd", MSSD_THRESHOLDS) == pytest.approx(0.8)
    assert average_recall([one(32.0, "mspd")], "mspd", MSPD_THRESHOLDS) == pytest.approx(0.4)
    both = [one(0.12, "mssd"), Answers("b", 1, {"mssd": np.zeros((0, 1))})]
    assert average_recall(both, "mssd", MSSD_THRESHOLDS) == pytest.approx(0.4)


def test_the_area_under_recall_is_a_mean_of_triangles() -> None:
    # 2 cm of 10: recall is 0 up to 2 cm and 1 from there, area 0.8; 15 cm adds nothing, nor does a missed one.
    answers = [one(0.02), one(0.15), MISSED]
    assert area_under_recall(answers, "add", 0.1) == pytest.approx(0.8 / 3)


def test_the_area_follows_the_matching_from_threshold_to_threshold() -> None:
    # Below 0.01 nothing; up to 0.05 only the second estimate meets label 0, from there the first takes it and the
    # second has nothing below 0.1: one of two targets is matched over nine tenths.
    errors = np.array([[0.05, 0.2], [0.01, 0.3]])
    assert area_under_recall([Answers("a", 2, {"add": errors})], "add", 0.1) == pytest.approx(0.45)


def test_nan_is_no_match_and_too_many_estimates_are_refused() -> None:
    assert recall([one(float("nan"))], "add", 10.0) == 0.0
    with pytest.raises(ValueError, match="only the best"):
        Answers("a", 1, {"add": np.zeros((2, 1))})


def test_refusing_the_doubtful_makes_the_rest_better() -> None:
    # Five targets, four answered; the surest two are right, the others not.
    curve = risk_coverage(np.array([3.0, 1.0, 2.0, 4.0]), np.array([0, 1, 1, 0], bool), 5, points=4)
    assert [(p.kept, p.accuracy, p.doubt) for p in curve] == [
        (0.2, 1.0, 1.0),
        (0.4, 1.0, 2.0),
        (0.6, pytest.approx(2 / 3), 3.0),
        (0.8, 0.5, 4.0),
    ]
    assert risk_coverage(np.zeros(0), np.zeros(0, bool), 5) == []
