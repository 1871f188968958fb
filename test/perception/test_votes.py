# SPDX-License-Identifier: Apache-2.0
"""Votes become instances, and the covariance of the fused keypoints is the covariance of their errors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from ukd_ros.perception.backends import RawVotes
from ukd_ros.perception.crop import square_crop
from ukd_ros.perception.votes import (
    Calibration,
    VoteOptions,
    box_overlap,
    collect_instances,
    common_modes,
    joint_covariance,
)

Array = npt.NDArray[np.float64]

K = 6
SHAPE = np.array([[0.0, 0.0], [40.0, 5.0], [30.0, 50.0], [-5.0, 35.0], [20.0, 20.0], [12.0, 44.0]])


def empty(cells: int = 200, classes: int = 1, keypoints: int = K) -> RawVotes:
    rng = np.random.default_rng(5)
    return RawVotes(
        rng.uniform(0.0, 0.2, (cells, classes)).astype(np.float32),
        rng.uniform(0.0, 128.0, (cells, classes, keypoints, 2)).astype(np.float32),
        np.tile(np.array([2.0, 2.0, 0.0], np.float32), (cells, classes, keypoints, 1)),
        np.full(cells, 64.0, np.float32),
    )


def place(
    raw: RawVotes,
    cells: npt.NDArray[np.int64],
    truth: Array,
    rng: np.random.Generator,
    noise: float = 1.0,
    class_index: int = 0,
) -> None:
    raw.score[cells, class_index] = rng.uniform(0.6, 0.95, len(cells))
    raw.xy[cells, class_index] = truth + rng.normal(0.0, noise, (len(cells), *truth.shape))
    raw.scale[cells, class_index] = [noise, noise, 0.0]


def test_nothing_above_the_threshold_is_no_instance() -> None:
    assert collect_instances(empty(), VoteOptions(), Calibration()) == []


def test_levels_made_for_smaller_objects_have_little_say() -> None:
    """Many cells of a fine level, sure of a wrong place, against a few of the level that is made for this size."""
    truth = 1.6 * SHAPE + [20.0, 20.0]  # 80 px: anchor 64 suits it, 32 does not
    fine, right = np.arange(0, 15), np.arange(100, 110)
    errors, firsts = [], []
    for anchor in (64.0, 32.0):
        rng = np.random.default_rng(2)
        raw = empty()
        place(raw, right, truth, rng)
        place(raw, fine, truth + [10.0, 0.0], rng)
        raw.score[fine] = 0.9
        raw.score[right] = 0.7
        raw.anchor[:100] = anchor
        (found,) = collect_instances(raw, VoteOptions(), Calibration())
        errors.append(float(np.linalg.norm(found.keypoints.xy - truth, axis=1).mean()))
        firsts.append(int(found.cells[0]))
    assert errors[0] > 7.0 and errors[1] < 3.0
    assert firsts[0] in fine and firsts[1] in right


def test_a_large_object_is_not_doubted_for_its_size() -> None:
    """The levels' say is relative: beyond all anchors the coarsest speaks alone, as loudly as any."""
    rng = np.random.default_rng(2)
    raw = empty()
    raw.anchor[:100] = 128.0
    place(raw, np.arange(0, 10), 20.0 * SHAPE, rng)
    (found,) = collect_instances(raw, VoteOptions(), Calibration())
    assert found.votes == 10 and found.score > 0.6
    assert np.isfinite(found.keypoints.cov).all()


def test_two_instances_and_two_classes_are_told_apart() -> None:
    rng = np.random.default_rng(1)
    raw = empty(classes=2)
    truths = [SHAPE + [10.0, 10.0], SHAPE + [70.0, 12.0], SHAPE[::-1] + [40.0, 70.0]]
    place(raw, np.arange(0, 12), truths[0], rng)
    place(raw, np.arange(50, 58), truths[1], rng)
    place(raw, np.arange(100, 110), truths[2], rng, class_index=1)
    found = collect_instances(raw, VoteOptions(), Calibration())
    assert sorted((i.class_index, i.votes) for i in found) == [(0, 8), (0, 12), (1, 10)]
    assert [i.score for i in found] == sorted((i.score for i in found), reverse=True)
    for instance in found:
        truth = truths[{12: 0, 8: 1, 10: 2}[instance.votes]]
        assert np.abs(instance.keypoints.xy - truth).max() < 2.0
        np.testing.assert_allclose(
            instance.box, [*instance.keypoints.xy.min(axis=0), *instance.keypoints.xy.max(axis=0)]
        )


def test_one_object_seen_twice_is_reported_once() -> None:
    """Two bundles of votes that disagree at most keypoints but cover one box are one object, the better one."""
    rng = np.random.default_rng(2)
    raw = empty()
    place(raw, np.arange(0, 10), SHAPE + 20.0, rng, noise=0.3)
    turned = SHAPE.mean(axis=0) * 2 - SHAPE + [-2.0, 1.0]
    place(raw, np.arange(20, 26), turned + 20.0, rng, noise=0.3)
    raw.score[20:26] = 0.5
    found = collect_instances(raw, VoteOptions(), Calibration())
    assert [i.votes for i in found] == [10]


def test_classes_compete_only_when_asked() -> None:
    rng = np.random.default_rng(3)
    raw = empty(classes=2)
    place(raw, np.arange(0, 10), SHAPE + 20.0, rng)
    place(raw, np.arange(0, 10), SHAPE + 21.0, rng, class_index=1)
    raw.score[0:10, 1] = 0.5
    assert len(collect_instances(raw, VoteOptions(), Calibration())) == 2
    found = collect_instances(raw, VoteOptions(class_overlap=0.5), Calibration())
    assert [i.class_index for i in found] == [0]


def test_options_bound_what_is_reported() -> None:
    rng = np.random.default_rng(4)
    raw = empty(cells=400)
    for index in range(6):
        place(raw, np.arange(40 * index, 40 * index + 3 + index), SHAPE + [150.0 * index, 0.0], rng)
    options = VoteOptions()
    assert len(collect_instances(raw, options, Calibration())) == 6
    assert len(collect_instances(raw, VoteOptions(max_instances=2), Calibration())) == 2
    assert len(collect_instances(raw, VoteOptions(min_votes=5), Calibration())) == 4
    assert max(i.votes for i in collect_instances(raw, VoteOptions(max_votes=4), Calibration())) == 4


def test_one_wild_vote_does_not_move_the_mean() -> None:
    rng = np.random.default_rng(6)
    clean, raw = empty(), empty()
    place(raw, np.arange(10), SHAPE + 30.0, rng, noise=1.0)
    for target, source in zip((clean.score, clean.xy, clean.scale), (raw.score, raw.xy, raw.scale), strict=True):
        target[:] = source
    raw.xy[3, 0, 2] += [60.0, -40.0]  # one keypoint of one vote, as sure as the others
    (a,) = collect_instances(clean, VoteOptions(), Calibration())
    (b,) = collect_instances(raw, VoteOptions(), Calibration())
    assert np.abs(a.keypoints.xy - b.keypoints.xy).max() < 0.6  # the plain mean would move by 7 px
    assert b.keypoints.score[2] < a.keypoints.score[2]


def test_a_sure_vote_counts_more() -> None:
    raw = empty()
    raw.score[:2] = 0.9
    raw.xy[0, 0], raw.xy[1, 0] = SHAPE, SHAPE + [4.0, 0.0]
    raw.scale[0, 0], raw.scale[1, 0] = [1.0, 1.0, 0.0], [3.0, 3.0, 0.0]
    (found,) = collect_instances(raw, VoteOptions(), Calibration())
    np.testing.assert_allclose(found.keypoints.xy, SHAPE + [0.4, 0.0], atol=1e-5)  # 4 * (1/9) / (1 + 1/9)


def test_correlated_axes_of_a_vote_are_used() -> None:
    """The information-weighted mean in closed form, for two votes with different full covariances."""
    raw = empty()
    raw.score[:2] = 0.8
    raw.xy[0, 0], raw.xy[1, 0] = SHAPE, SHAPE + [2.0, 3.0]
    raw.scale[0, 0], raw.scale[1, 0] = [2.0, 1.0, 0.6], [1.0, 3.0, -0.5]
    cov_a, cov_b = np.array([[4.0, 1.2], [1.2, 1.0]]), np.array([[1.0, -1.5], [-1.5, 9.0]])
    gain = np.linalg.inv(np.linalg.inv(cov_a) + np.linalg.inv(cov_b)) @ np.linalg.inv(cov_b)
    (found,) = collect_instances(raw, VoteOptions(), Calibration(vote_correlation=1.0))
    np.testing.assert_allclose(found.keypoints.xy, SHAPE + gain @ [2.0, 3.0], atol=1e-5)
    mean_information = 0.5 * (np.linalg.inv(cov_a) + np.linalg.inv(cov_b))
    np.testing.assert_allclose(found.keypoints.block(0), np.linalg.inv(mean_information), rtol=1e-5)


@pytest.mark.parametrize(("rho", "votes"), [(0.0, 5), (0.0, 16), (0.4, 16), (1.0, 9)])
def test_the_block_is_the_covariance_of_the_fused_mean(rho: float, votes: int) -> None:
    """Monte Carlo: votes of variance s^2 and correlation rho; the chi-square of the error is 2 per keypoint."""
    rng = np.random.default_rng(votes)
    raw = empty()
    raw.score[:votes] = 0.9
    raw.scale[:votes, 0] = [1.5, 1.5, 0.0]
    total, trials = 0.0, 300
    for _ in range(trials):
        common = rng.normal(0.0, 1.5 * np.sqrt(rho), (K, 2))
        raw.xy[:votes, 0] = SHAPE + common + rng.normal(0.0, 1.5 * np.sqrt(1.0 - rho), (votes, K, 2))
        (found,) = collect_instances(raw, VoteOptions(), Calibration(vote_correlation=rho))
        error = (found.keypoints.xy - SHAPE).reshape(-1)
        total += error @ np.linalg.solve(found.keypoints.cov, error)
    dof = trials * 2 * K
    # Four sigmas of chi-square, and 6 % that reweighting costs in efficiency.
    assert -4.0 * np.sqrt(2 * dof) < total - dof < 4.0 * np.sqrt(2 * dof) + 0.06 * dof


def test_common_modes_in_closed_form() -> None:
    """Unit modes move by one pixel rms, are orthogonal, and are what a shift, zoom and turn of the image do."""
    B = common_modes(SHAPE)
    np.testing.assert_allclose(B.T @ B, K * np.eye(4), atol=1e-9)
    centred = SHAPE - SHAPE.mean(axis=0)
    radius = np.sqrt((centred**2).sum(axis=1).mean())
    eps = 1e-6
    turn = np.array([[np.cos(eps), -np.sin(eps)], [np.sin(eps), np.cos(eps)]])
    np.testing.assert_allclose(B[:, 2].reshape(K, 2) * radius, centred, atol=1e-9)
    np.testing.assert_allclose(B[:, 3].reshape(K, 2) * radius, (centred @ turn.T - centred) / eps, atol=1e-4)
    np.testing.assert_allclose(common_modes(np.stack([SHAPE, 3.0 * SHAPE + 7.0]))[1], B, atol=1e-12)


def test_joint_covariance_moves_with_the_crop() -> None:
    """Mapping the covariance and building it in the other image are the same: the calibration has no unit."""
    rng = np.random.default_rng(8)
    calibration = Calibration(1.7, 0.3, np.array([0.2, 0.1, 0.4, 0.05]))
    raw = empty()
    place(raw, np.arange(10), SHAPE + 30.0, rng)
    (found,) = collect_instances(raw, VoteOptions(), calibration)
    moved = found.to_source(square_crop([200.0, 150.0], 300.0, 128))
    rebuilt = joint_covariance(moved.keypoints.xy, moved.mean_blocks, moved.effective_votes, calibration)
    np.testing.assert_allclose(moved.keypoints.cov, rebuilt, rtol=1e-9)
    assert abs(moved.keypoints.cov[0, 2]) > 0.01  # keypoints share errors
    assert np.linalg.eigvalsh(rebuilt).min() > 0.0


def test_overlap_of_boxes() -> None:
    box = np.array([0.0, 0.0, 2.0, 2.0])
    others = np.array([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0], [5.0, 5.0, 6.0, 6.0], [3.0, 3.0, 3.0, 3.0]])
    np.testing.assert_allclose(box_overlap(box, others), [1.0, 1.0 / 7.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"min_score": 0.0}, "min_score"),
        ({"max_votes": 0}, "max_votes"),
        ({"agreement": -1.0}, "agreement"),
        ({"class_overlap": 1.5}, "class_overlap"),
    ],
)
def test_bad_options_are_named(change: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        VoteOptions(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "name"),
    [({"block_factor": 0.0}, "block_factor"), ({"vote_correlation": 1.2}, "vote"), ({"modes": [0, 0, -1, 0]}, "modes")],
)
def test_bad_calibrations_are_named(change: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Calibration(**change)  # type: ignore[arg-type]
