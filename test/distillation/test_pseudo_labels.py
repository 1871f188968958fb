# SPDX-License-Identifier: Apache-2.0
"""The teachers' labels: right where they are accepted, refused with a reason elsewhere, kept, and learnt with care."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
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
from ukd_ros.distillation.label_store import LabelError, stored_boxes, stored_labels  # noqa: E402
from ukd_ros.distillation.neighbours import DISAGREES, agreeing  # noqa: E402
from ukd_ros.distillation.parallel import Processes  # noqa: E402
from ukd_ros.distillation.pseudo_labels import (  # noqa: E402
    INCONSISTENT,
    LOW_SCORE,
    NOTHING,
    UNSURE,
    PseudoLabel,
    PseudoLabelOptions,
    PseudoLabels,
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
LEAST = (0.9, 0.9)
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


class TwoKinds(LabelledScenes):
    """A box in one view, a rod in the next; the truth of the rods is said wrong."""

    def view(self, index: int) -> LabelledView:
        kind, pose = index % 2, self.pose(index)
        self.world.objects = [(kind, pose)]
        plain = self.world.view(index)
        said = pose if kind == 0 else Pose(pose.rotation, pose.translation + [0.0, 0.0, 0.2])
        return LabelledView(plain.image, plain.camera, objects=(ObjectLabel(MODELS[kind].name, said),))


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
        found = label_frames(teachers(world, noise), scenes(world, 40, truths), SURE, LEAST, 40, progress=False)
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
    found = label_frames(
        teachers(world, 4.0, said_px=0.8), scenes(world, 30, truths), options, LEAST, 30, progress=False
    )
    assert len(found.accepted) <= 3
    assert found.refused.get(INCONSISTENT, 0) >= 20


def test_every_refusal_has_its_reason() -> None:
    world = World(votes=(6, 10))
    empty = label_frames(teachers(world, 0.8), [(0, world.view())], SURE, LEAST, 1, progress=False)
    assert empty.counts() == {"accepted": 0, NOTHING: 1}
    truths: list[Pose] = []
    strict = PseudoLabelOptions(min_score=0.99)
    found = label_frames(teachers(world, 0.8), scenes(world, 5, truths), strict, LEAST, 5, progress=False)
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
    assert least[0] < 0.9 and least[1] > 1.0  # nothing is known of the rod, which is in no view
    truths = [views.pose(i) for i in range(60, 120)]
    frames = ((i, views.view(60 + i)) for i in range(60))
    found = label_frames(estimator, frames, SURE, least, 60, progress=False)
    assert len(found.accepted) >= 20 and np.mean(right(found, truths)) >= 0.8


def test_an_object_that_is_known_well_does_not_vouch_for_another() -> None:
    """Boxes are seen well and rods badly: what is asked of rods is measured on rods."""
    world = World(votes=(6, 10))
    sharp = teachers(world, 0.8)
    views = TwoKinds(world, 50)
    least = required_on(sharp, views, range(50), SURE, progress=False)
    assert least[0] <= 1.0 and least[1] > 1.0


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
    places = [(0, i * 100_000_000) for i in range(6)]
    found = agreeing(labels, places, MODELS, SURE)
    assert [item.refused for item in found.labels] == ["", "", DISAGREES, "", ""]
    assert found.refused == {NOTHING: 1, DISAGREES: 1}
    # a wrong one that a worse one beside it vouched for goes too
    slope = [Pose(np.eye(3), np.array([0.0, 0.0, 0.6 + off])) for off in (0.0, 0.0, 0.06, 0.03, 0.0, 0.0)]
    lean = agreeing(PseudoLabels(tuple(label(i, p) for i, p in enumerate(slope)), 6, {}), places, MODELS, SURE)
    assert [item.frame for item in lean.labels if item.refused] == [2, 3]
    apart = [(i, 0) for i in range(5)]  # five recordings: nobody has a neighbour
    assert len(agreeing(labels, apart, MODELS, SURE).accepted) == 5
    slow = [(0, i * 10**9) for i in range(5)]  # too far apart in time
    assert len(agreeing(labels, slow, MODELS, SURE).accepted) == 5
    assert len(agreeing(labels, places, MODELS, replace(SURE, time_gap_s=0.0)).accepted) == 5


def test_one_wrong_label_does_not_take_its_right_neighbours_with_it() -> None:
    """A twentieth of 400 labels jumps by two thirds of the diameter: it goes, and what stands beside it stays."""
    wrong = np.random.default_rng(0).random(400) < 0.05
    poses = [Pose(np.eye(3), np.array([0.001 * i, 0.0, 0.7 if wrong[i] else 0.6])) for i in range(400)]
    labels = PseudoLabels(tuple(label(i, p) for i, p in enumerate(poses)), 400, {})
    found = agreeing(labels, [(0, i * 66_000_000) for i in range(400)], MODELS, SURE)
    refused = np.array([item.refused == DISAGREES for item in found.labels])
    assert wrong.sum() >= 15 and refused[wrong].mean() >= 0.9
    assert refused[~wrong].sum() == 0


def test_the_stretches_of_a_recording_do_not_mix() -> None:
    """The clock was set back: two stretches have the same stamps, and the object stood elsewhere in each."""
    poses = [Pose(np.eye(3), np.array([0.0, 0.0, 0.6 + 0.2 * (i % 2)])) for i in range(20)]
    labels = PseudoLabels(tuple(label(i, p) for i, p in enumerate(poses)), 20, {})
    stretches = [(i % 2, i * 50_000_000) for i in range(20)]
    assert len(agreeing(labels, stretches, MODELS, SURE).accepted) == 20
    mixed = [(0, stamp) for _, stamp in stretches]
    assert len(agreeing(labels, mixed, MODELS, SURE).accepted) < 20


def test_a_label_is_compared_with_those_beside_it_not_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def counting(pose: Pose, near: Pose, symmetries: Symmetries) -> Pose:
        nonlocal asked
        asked += 1
        return pose

    monkeypatch.setattr("ukd_ros.distillation.neighbours.nearest", counting)
    pose = Pose(np.eye(3), np.array([0.0, 0.0, 0.6]))
    labels = PseudoLabels(tuple(label(i, pose) for i in range(2000)), 2000, {})
    agreeing(labels, [(0, i * 10_000_000) for i in range(2000)], MODELS, SURE)
    assert asked <= 3 * 2000


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
    (tmp_path / "a" / ".shard-00001.json.ab12_cd3").touch()  # half of what a killed call wrote
    resumed = stored_labels(tmp_path / "a", {"teachers": "x"}, 150, ask)
    assert not list((tmp_path / "a").glob(".*"))
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


def test_where_something_is_seen_is_kept_in_shards_too(tmp_path: Path) -> None:
    boxes = [(i, np.array([i, 2.0, i + 10.0, 12.0])) for i in range(0, 150, 7)]
    asked: list[range] = []

    def look(shard: range) -> list[tuple[int, np.ndarray]]:
        asked.append(shard)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [box for box in boxes if box[0] in shard]

    with pytest.raises(KeyboardInterrupt):
        stored_boxes(tmp_path / "a", {"teachers": "x"}, 150, look)
    found = stored_boxes(tmp_path / "a", {"teachers": "x"}, 150, look)
    assert [shard.start for shard in asked] == [0, 64, 128, 128]
    assert [number for number, _ in found] == [number for number, _ in boxes]
    np.testing.assert_array_equal([box for _, box in found], [box for _, box in boxes])
    shard = tmp_path / "a" / "shard-00000.json"
    for damage in ("[]", '{"boxes": [[99, [0, 0, 1, 1]]]}', '{"boxes": [[3, [0, 0, 1, NaN]]]}'):
        shard.write_text(damage)
        with pytest.raises(LabelError, match=r"shard-00000\.json.*delete it"):
            stored_boxes(tmp_path / "a", {"teachers": "x"}, 150, look)


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
    told = label_frames(teachers(world, 0.4), scenes(world, 60, truths), SURE, LEAST, 60, progress=False)
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


def moved(pose: Pose, delta: np.ndarray) -> Pose:
    return Pose(exp_so3(delta[3:]) @ pose.rotation, pose.translation + delta[:3])


def beside(
    student: Callable[[np.random.Generator, int], np.ndarray], cov_teachers: np.ndarray, refused: str = "",
    teacher: Callable[[np.random.Generator, int], np.ndarray] | None = None, count: int = 300,
) -> AgainstTeachers:  # fmt: skip
    """A student of covariance SAID whose poses are off by `student`, beside teachers of another; one box a frame."""
    rng = np.random.default_rng(0)
    base = Pose(np.eye(3), np.array([0.0, 0.0, 0.6]))
    labels, mine = [], []
    for i in range(count):
        off = teacher(rng, i) if teacher else rng.multivariate_normal(np.zeros(6), cov_teachers)
        why = refused if i % 2 else ""
        labels.append(PseudoLabel(i, 0, moved(base, off), cov_teachers, 0.9, 0.9, np.zeros((1, 4)), why))
        mine.append(SimpleNamespace(object_name="box", T_camera_object=moved(base, student(rng, i)), cov=SAID))
    estimator = SimpleNamespace(objects=MODELS, estimate=lambda view: SimpleNamespace(estimates=[mine[view]]))
    frames = ((i, i) for i in range(count))
    return against_teachers(estimator, frames, labels, list(range(count)), count, progress=False)  # type: ignore[arg-type]


SAID = np.diag([0.002**2] * 2 + [0.004**2] + [0.03**2] * 3)


def honest(rng: np.random.Generator, _: int) -> np.ndarray:
    return np.asarray(rng.multivariate_normal(np.zeros(6), SAID))


def test_a_student_that_is_plainly_elsewhere_does_not_look_honest(caplog: pytest.LogCaptureFixture) -> None:
    """Off by 0.6 diameters sideways in two frames of five, and sure of itself."""

    def gross(rng: np.random.Generator, number: int) -> np.ndarray:
        return honest(rng, number) + np.eye(6)[0] * (0.6 * BOX.diameter if number % 5 < 2 else 0.0)

    found = beside(gross, SAID)
    assert found.all.both == 300 and found.all.inside < 0.65 and found.far == 120
    assert 10.0 < found.factor <= 100.0
    assert "120 of 300 pairs lie more than half a diameter apart" in found.table()
    assert "120 are plainly elsewhere" in caplog.text
    assert beside(honest, SAID).far == 0 and beside(honest, SAID).factor < 1.2


@pytest.mark.parametrize("share", [0.25, 1.0, 4.0])
def test_the_students_covariance_alone_makes_up_for_what_it_lacks(share: float) -> None:
    """Its errors are four times what it says; the teachers' covariance is right, and large or small."""
    found = beside(lambda rng, i: 2.0 * honest(rng, i), share * SAID, count=1000)
    assert found.factor == pytest.approx(4.0, rel=0.35)


def test_poses_that_the_teachers_themselves_doubt_do_not_enlarge_a_good_student() -> None:
    def wrong(rng: np.random.Generator, number: int) -> np.ndarray:
        return honest(rng, number) + np.eye(6)[2] * (0.08 if number % 2 else 0.0)

    for why, most in ((INCONSISTENT, 1.3), (LOW_SCORE, 1.3), (UNSURE, 101.0)):
        found = beside(honest, SAID, why, wrong)
        assert found.factor <= most and found.used == (300 if why == UNSURE else 150)
        assert found.refused.inside == 0.0 and f"from the {found.used} accepted or unsure" in found.table()
    assert found.factor > 10.0


def test_what_cannot_be_compared_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Frames with a pose of the teachers alone, of the student alone, and two of each, of which one pair is near."""
    base = Pose(np.eye(3), np.array([0.0, 0.0, 0.6]))
    shifts = {0: ([0.0], []), 1: ([], [0.0]), 2: ([0.0, 0.5], [0.01, 0.3])}
    labels = [label(n, moved(base, s * np.eye(6)[0])) for n, (told, _) in shifts.items() for s in told]
    mine = {
        n: [SimpleNamespace(object_name="box", T_camera_object=moved(base, s * np.eye(6)[0]), cov=SAID) for s in given]
        for n, (_, given) in shifts.items()
    }
    estimator = SimpleNamespace(objects=MODELS, estimate=lambda view: SimpleNamespace(estimates=mine[view]))
    frames = ((n, n) for n in range(3))
    found = against_teachers(estimator, frames, labels, [0, 1, 2], 3, progress=False)  # type: ignore[arg-type]
    assert (found.all.teachers, found.all.both, found.alone, found.far) == (3, 1, 2, 0)
    assert "not compared: 2 of 3 poses of the teachers" in found.table() and "2 of the student's" in found.table()
    assert "the student lacks 2" in caplog.text


def test_what_the_teachers_refused_counts_too() -> None:
    truths: list[Pose] = []
    world = World(votes=(6, 10))
    told = label_frames(teachers(world, 0.4), scenes(world, 30, truths), SURE, LEAST, 30, progress=False)
    marked = [replace(item, refused=UNSURE if item.frame % 2 else "") for item in told.labels]
    found = against_teachers(teachers(world, 0.8), scenes(world, 30, []), marked, [0] * 30, 30, progress=False)
    assert found.accepted.teachers + found.refused.teachers == found.all.teachers == len(told.labels)
    assert found.refused.both >= 12 and np.isfinite(found.refused.inside)
    assert found.factor == 1.0  # one block says nothing
