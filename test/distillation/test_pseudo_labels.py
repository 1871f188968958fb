# SPDX-License-Identifier: Apache-2.0
"""The teachers' labels: right where they are accepted, refused with a reason elsewhere, kept, and learnt with care."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cubes import CUBE, CubeViews

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from perception.painted_world import BOX, MODELS, FakeBackend, World  # noqa: E402

from ukd_ros.data.dataset import MixedWindows, SupposedObject, SupposedWindows, WindowConfig, WindowDataset  # noqa: E402
from ukd_ros.distillation.against_teachers import AgainstTeachers, against_teachers, enlarged  # noqa: E402
from ukd_ros.distillation.assignment import BACKGROUND, IGNORED, POSITIVE, assign  # noqa: E402
from ukd_ros.distillation.label_store import LabelError, stored_labels  # noqa: E402
from ukd_ros.distillation.parallel import Processes  # noqa: E402
from ukd_ros.distillation.pseudo_labels import (  # noqa: E402
    DISAGREES,
    INCONSISTENT,
    LOW_SCORE,
    NOTHING,
    UNSURE,
    PseudoLabel,
    PseudoLabelOptions,
    PseudoLabels,
    agreeing,
    label_frames,
    probability_right,
    required,
    required_on,
    voting_patches,
)
from ukd_ros.geometry.chi_square import chi2_cdf  # noqa: E402
from ukd_ros.geometry.object_model import Symmetries  # noqa: E402
from ukd_ros.geometry.pose import Pose, exp_so3  # noqa: E402
from ukd_ros.geometry.view import LabelledView, ObjectLabel, View  # noqa: E402
from ukd_ros.perception.cells import STRIDES  # noqa: E402
from ukd_ros.perception.estimator import EstimatorOptions, PoseEstimator  # noqa: E402
from ukd_ros.perception.manifest import GraphSpec  # noqa: E402
from ukd_ros.perception.votes import Calibration  # noqa: E402

SURE = PseudoLabelOptions()
WINDOW = WindowConfig(size=64, zoom_fill_spread=1.1)


def teachers(world: World, noise_px: float, said_px: float | None = None) -> PoseEstimator:
    """An ensemble whose votes err by `noise_px` of the zoomed crop and say `said_px` (None: the same)."""
    graphs = {"locate": GraphSpec("locate.onnx", 320, 256), "zoom": GraphSpec("zoom.onnx", 128, 128, context=1.5)}
    factor = 1.0 if said_px is None else (said_px / noise_px) ** 2
    calibration = Calibration(block_factor=factor, vote_correlation=0.0)
    bundle = SimpleNamespace(name="painted", objects=MODELS, graphs=graphs, calibration=calibration)
    return PoseEstimator(
        bundle,  # type: ignore[arg-type]
        options=EstimatorOptions(tracking=False, max_sigma_position=100.0, max_sigma_rotation_deg=1000.0),
        locate=FakeBackend(world, 320, 256, 1.5, locate=True),
        zoom=FakeBackend(world, 128, 128, noise_px, locate=False),
    )


def pose_of(rng: np.random.Generator) -> Pose:
    axis = rng.normal(size=3)
    turn = exp_so3(axis / np.linalg.norm(axis) * rng.uniform(0.0, np.pi))
    return Pose(turn, np.array([rng.uniform(-0.1, 0.1), rng.uniform(-0.06, 0.06), rng.uniform(0.5, 0.8)]))


def scenes(world: World, count: int, truths: list[Pose]) -> Iterator[tuple[int, View]]:
    """Frames of one box each; the world shows the one being looked at, and its true pose goes to `truths`."""
    rng = np.random.default_rng(1)
    for number in range(count):
        world.objects = [(0, pose_of(rng))]
        truths.append(world.objects[0][1])
        yield number, world.view(number)


class LabelledScenes:
    """Labelled views of one box each."""

    def __init__(self, world: World, count: int) -> None:
        self.world, self.count = world, count

    def __len__(self) -> int:
        return self.count

    def pose(self, index: int) -> Pose:
        return pose_of(np.random.default_rng((5, index)))

    def view(self, index: int) -> LabelledView:
        self.world.objects = [(0, self.pose(index))]
        plain = self.world.view(index)
        return LabelledView(plain.image, plain.camera, objects=(ObjectLabel("box", self.pose(index)),))


def label(
    frame: int, pose: Pose, refused: str = "", cov: float = 1e-6, patches: tuple[float, ...] = (0, 0, 8, 8)
) -> PseudoLabel:
    return PseudoLabel(frame, 0, pose, cov * np.eye(6), 0.9, 0.95, np.array([patches], float), refused)


def right(found: PseudoLabels, truths: list[Pose]) -> list[bool]:
    """Whether each accepted label's ADD is below a tenth of the diameter."""
    out = []
    for item in found.accepted:
        moved = item.T_camera_object.transform(BOX.keypoints_3d) - truths[item.frame].transform(BOX.keypoints_3d)
        out.append(float(np.linalg.norm(moved, axis=1).mean()) < 0.1 * BOX.diameter)
    return out


# ---- who decides -----------------------------------------------------------------------------------------------


def test_labels_of_sure_teachers_are_right_and_those_of_unsure_ones_are_refused() -> None:
    for noise, least, most in ((0.8, 36, 40), (4.0, 8, 30), (9.0, 0, 4)):
        truths: list[Pose] = []
        world = World(votes=(6, 10))
        found = label_frames(teachers(world, noise), scenes(world, 40, truths), SURE, 0.9, 40, progress=False)
        assert least <= len(found.accepted) <= most, found.counts()
        assert found.frames == 40 and len(found.accepted) + sum(found.refused.values()) >= 40
        if found.accepted:
            assert np.mean(right(found, truths)) >= 0.85
    assert found.refused[UNSURE] >= 20


def test_teachers_that_know_no_doubt_deceive_but_the_residuals_tell() -> None:
    """Errors five times what they say: what is calibrated badly is caught by its own keypoints."""
    truths: list[Pose] = []
    world = World(votes=(6, 10))
    options = PseudoLabelOptions(max_chi2=2.0)
    found = label_frames(teachers(world, 4.0, said_px=0.8), scenes(world, 30, truths), options, 0.9, 30, progress=False)
    assert len(found.accepted) <= 3
    assert found.refused.get(INCONSISTENT, 0) >= 20


def test_every_refusal_has_its_reason() -> None:
    world = World(votes=(6, 10))
    empty = label_frames(teachers(world, 0.8), [(0, world.view())], SURE, 0.9, 1, progress=False)
    assert empty.counts() == {"accepted": 0, NOTHING: 1}
    truths: list[Pose] = []
    strict = PseudoLabelOptions(min_score=0.99)
    found = label_frames(teachers(world, 0.8), scenes(world, 5, truths), strict, 0.9, 5, progress=False)
    assert found.counts() == {"accepted": 0, LOW_SCORE: 5}
    with pytest.raises(ValueError, match=r"labels\.sure"):
        PseudoLabelOptions(sure=1.5)


def test_the_probability_is_that_of_the_covariance() -> None:
    """For a shift alone ADD is its length, whose square over the variance is chi-square with three degrees."""
    sigma = 0.006
    cov = np.diag([sigma**2] * 3 + [1e-12] * 3)
    chance = probability_right(Pose(np.eye(3), np.array([0.0, 0.0, 1.0])), cov, BOX, 0.1)
    assert chance == pytest.approx(chi2_cdf((0.1 * BOX.diameter / sigma) ** 2, 3), abs=0.05)
    turns = np.diag([1e-12] * 3 + [0.2**2] * 3)
    assert probability_right(Pose(np.eye(3), np.array([0.0, 0.0, 1.0])), turns, BOX, 0.1) < 0.95
    free = replace(BOX, symmetries=Symmetries(continuous=((np.array([0.0, 0.0, 1.0]), np.zeros(3)),)))
    pose = Pose(np.eye(3), np.array([0.0, 0.0, 1.0]))
    unseen = cov.copy()
    unseen[5, 5] = np.pi**2 / 3
    assert probability_right(pose, unseen, free, 0.1) == pytest.approx(chance, abs=0.05)


def test_how_sure_a_label_must_be_is_measured() -> None:
    def rows(chances: list[float]) -> list[PseudoLabel]:
        return [replace(label(i, Pose(np.eye(3), np.ones(3))), probability=p) for i, p in enumerate(chances)]

    chances = [1.0 - 0.01 * i for i in range(40)]
    right = [i < 20 or i % 2 == 0 for i in range(40)]
    assert required(rows(chances), right, 0.95) == pytest.approx(chances[20])  # 21 of 21, and one wrong assumed
    assert required(rows(chances), right, 0.8) == pytest.approx(chances[30])
    assert required(rows(chances), [True] * 40, 0.5) == pytest.approx(chances[-1])
    assert required(rows(chances), [False] * 40, 0.5) > 1.0
    assert required(rows(chances[:9]), [True] * 9, 0.5) > 1.0  # too few to promise anything
    assert required(rows([0.5] * 40), right, 0.9) > 1.0  # equal ones are taken together
    inconsistent = [replace(item, refused=INCONSISTENT) for item in rows(chances)]
    assert required(inconsistent, [True] * 40, 0.5) > 1.0


def test_the_measured_demand_keeps_its_promise_on_other_frames() -> None:
    """Errors with a long tail: the covariance fits the tail, so its probabilities are too modest."""
    world = World(votes=(6, 10))
    estimator = teachers(world, 2.5, said_px=5.0)
    views = LabelledScenes(world, 120)
    least = required_on(estimator, views, range(60), PseudoLabelOptions(sure=0.9), progress=False)
    assert least < 0.9
    truths = [views.pose(i) for i in range(60, 120)]
    frames = ((i, views.view(60 + i)) for i in range(60))
    found = label_frames(estimator, frames, SURE, least, 60, progress=False)
    assert len(found.accepted) >= 20 and np.mean(right(found, truths)) >= 0.8


def test_the_cells_that_voted_are_where_they_were_in_the_image() -> None:
    world = World(objects=[(0, Pose(np.eye(3), np.array([0.0, 0.0, 0.6])))])
    instance = teachers(world, 0.8).observe(world.view())[0]
    assert instance.crop is not None
    patches = voting_patches(replace(instance, cells=np.array([0, 17, 256])))
    side = STRIDES[0] / instance.crop.scale
    np.testing.assert_allclose(patches[:, 2:] - patches[:, :2], side * np.array([[1, 1], [1, 1], [2, 2]]), rtol=1e-9)
    np.testing.assert_allclose(patches[0, :2], instance.crop.to_source([-0.5, -0.5]), atol=1e-9)
    np.testing.assert_allclose(patches[1, :2], instance.crop.to_source([7.5, 7.5]), atol=1e-9)
    with pytest.raises(ValueError, match="crop"):
        voting_patches(replace(instance, crop=None))


def test_neighbours_in_time_speak_against_a_jump() -> None:
    def moving(t: float) -> Pose:
        return Pose(exp_so3(np.array([0.0, 0.3 * t, 0.0])), np.array([0.1 * t, 0.0, 0.6]))

    poses = [moving(0.1 * i) for i in range(5)]
    poses[2] = Pose(poses[2].rotation, poses[2].translation + [0.0, 0.0, 0.08])
    labels = PseudoLabels(tuple(label(i, p) for i, p in enumerate(poses)), 5, {NOTHING: 1})
    places = [(0, i * 100_000_000) for i in range(5)]
    found = agreeing(labels, places, MODELS, SURE)
    assert [item.refused for item in found.labels][2] == DISAGREES
    # what stands beside the jump has it as a neighbour, and is not far enough from what both sides say
    assert found.counts()["accepted"] == 5 - found.refused[DISAGREES] and found.refused[NOTHING] == 1
    apart = [(i, 0) for i in range(5)]  # five recordings: nobody has a neighbour
    assert len(agreeing(labels, apart, MODELS, SURE).accepted) == 5
    slow = [(0, i * 10**9) for i in range(5)]  # too far apart in time
    assert len(agreeing(labels, slow, MODELS, SURE).accepted) == 5
    assert len(agreeing(labels, places, MODELS, replace(SURE, time_gap_s=0.0)).accepted) == 5


# ---- kept ------------------------------------------------------------------------------------------------------


def test_labels_are_kept_gone_on_with_and_refused_for_another_question(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    poses = [pose_of(rng) for _ in range(150)]
    asked: list[range] = []

    def ask(shard: range) -> PseudoLabels:
        asked.append(shard)
        rows = tuple(label(i, poses[i], UNSURE if i % 3 else "") for i in shard)
        return PseudoLabels(rows, len(shard), {UNSURE: sum(1 for i in shard if i % 3), NOTHING: 1})

    def broken(shard: range) -> PseudoLabels:
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(shard)

    with pytest.raises(KeyboardInterrupt):
        stored_labels(tmp_path / "a", {"teachers": "x"}, 150, broken)
    resumed = stored_labels(tmp_path / "a", {"teachers": "x"}, 150, ask)
    assert [(s.start, s.stop) for s in asked] == [(0, 64), (64, 128), (128, 150)]
    whole = stored_labels(tmp_path / "b", {"teachers": "x"}, 150, ask)
    assert resumed.counts() == whole.counts() == {"accepted": 50, UNSURE: 100, NOTHING: 3}
    for one, other in zip(resumed.labels, whole.labels, strict=True):
        assert (one.frame, one.refused) == (other.frame, other.refused)
        np.testing.assert_allclose(one.T_camera_object.minus(poses[one.frame]), 0.0, atol=1e-12)
        np.testing.assert_array_equal(one.cov, other.cov)
    with pytest.raises(LabelError, match="other teachers"):
        stored_labels(tmp_path / "a", {"teachers": "y"}, 150, ask)
    shard = tmp_path / "a" / "shard-00001.json"
    for damage in ("no json", json.dumps({"labels": [{"frame": 3}], "refused": {}}), json.dumps([])):
        shard.write_text(damage)
        with pytest.raises(LabelError, match=r"shard-00001\.json.*delete it"):
            stored_labels(tmp_path / "a", {"teachers": "x"}, 150, ask)


def test_processes_share_the_frames(tmp_path: Path) -> None:
    class Both(Processes):
        def any(self, flag: bool) -> bool:
            return flag

    def ask(shard: range) -> PseudoLabels:
        done[rank].append(shard.start)
        return PseudoLabels((), len(shard), {NOTHING: len(shard)})

    done: dict[int, list[int]] = {0: [], 1: []}
    rank = 0
    with pytest.raises(LabelError, match="missing"):  # the other process has not done its share yet
        stored_labels(tmp_path, {}, 200, ask, Both(0, 2))
    rank = 1
    assert stored_labels(tmp_path, {}, 200, ask, Both(1, 2)).refused == {NOTHING: 200}
    assert done == {0: [0, 128], 1: [64, 192]}


# ---- learnt ----------------------------------------------------------------------------------------------------


def test_a_supposed_window_teaches_what_was_labelled_and_nothing_else() -> None:
    views = [CubeViews(3).view(i) for i in range(3)]
    data = WindowDataset(CubeViews(3), [CUBE], WINDOW, 0)
    masks = [view.objects[0].mask for view in views]
    assert all(mask is not None for mask in masks)
    supposed = SupposedWindows(
        [
            (View(v.image, v.camera), [SupposedObject(0, v.objects[0].T_camera_object, m)])
            for v, m in zip(views, masks, strict=True)
            if m is not None
        ],
        [CUBE],
        WINDOW,
        0,
    )
    one, other = data.sample(5), supposed.sample(5)
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_allclose(one.objects[0].xy, other.objects[0].xy)
    known, guessed = assign([one], 1, 8), assign([other], 1, 8)
    np.testing.assert_array_equal(known.cell, guessed.cell)
    assert not known.supposed.any() and guessed.supposed.all()
    assert (known.state == BACKGROUND).any() and not (guessed.state == BACKGROUND).any()
    assert set(np.unique(guessed.state)) == {IGNORED, POSITIVE}
    mixed = MixedWindows(data, [(supposed, 0.4), (supposed, 0.3)], 0)
    share = np.mean([mixed.sample(i).supposed for i in range(200)])
    assert 0.55 < share < 0.85
    with pytest.raises(ValueError, match="below 1 in sum"):
        MixedWindows(data, [(supposed, 0.6), (supposed, 0.5)], 0)


# ---- compared --------------------------------------------------------------------------------------------------


def compared(student_px: float, said_px: float) -> AgainstTeachers:
    """A student beside good teachers, both on the same frames."""
    truths: list[Pose] = []
    world = World(votes=(6, 10))
    told = label_frames(teachers(world, 0.4), scenes(world, 60, truths), SURE, 0.9, 60, progress=False)
    student = teachers(world, student_px, said_px)
    return against_teachers(student, scenes(world, 60, []), told.labels, list(range(60)), 60, progress=False)


def test_a_student_that_is_surer_than_it_may_be_is_corrected_and_another_is_left_alone() -> None:
    honest = compared(1.5, 1.5)
    assert honest.all.both >= 50 and 3.0 < honest.all.nees < 9.0
    assert 1.0 <= honest.factor < 1.6
    bold = compared(1.5, 0.5)
    assert bold.factor > 2.0 * honest.factor
    assert "covariance times" in bold.table()
    fit = Calibration(block_factor=2.0, modes=np.ones(4), conformal_level=0.9, conformal_radius=3.0)
    larger = enlarged(fit, 3.0)
    assert larger.block_factor == 6.0 and larger.modes.tolist() == [3.0] * 4 and larger.conformal_level == 0.0
    assert enlarged(fit, 1.0) is fit


def test_what_the_teachers_refused_counts_too() -> None:
    truths: list[Pose] = []
    world = World(votes=(6, 10))
    told = label_frames(teachers(world, 0.4), scenes(world, 30, truths), SURE, 0.9, 30, progress=False)
    marked = [replace(item, refused=UNSURE if item.frame % 2 else "") for item in told.labels]
    found = against_teachers(teachers(world, 0.8), scenes(world, 30, []), marked, [0] * 30, 30, progress=False)
    assert found.accepted.teachers + found.refused.teachers == found.all.teachers == len(told.labels)
    assert found.refused.both >= 12 and np.isfinite(found.refused.inside)
    assert found.factor == 1.0  # one block says nothing
