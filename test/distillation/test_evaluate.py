# SPDX-License-Identifier: Apache-2.0
"""Scores of answers whose errors are known: drawn from their covariance, missing, doubled, symmetric, elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from ukd_ros.data.bop import BopError
from ukd_ros.distillation import evaluate as module
from ukd_ros.distillation.evaluate import EvaluationOptions, evaluate_model, independent
from ukd_ros.distillation.scores import EvaluationReport
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.chi_square import chi2_quantile
from ukd_ros.geometry.estimate import PoseEstimate, Rejection, RejectReason
from ukd_ros.geometry.keypoints import Keypoints
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose, exp_so3
from ukd_ros.geometry.view import View
from ukd_ros.perception.estimator import EstimatorOptions, FrameResult

CAMERA = Camera(64, 48, np.array([[60.0, 0, 31.5], [0, 60.0, 23.5], [0, 0, 1]]))
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * [0.03, 0.04, 0.05]
FACES = [(0, 1, 3), (0, 3, 2), (4, 6, 7), (4, 7, 5), (0, 4, 5), (0, 5, 1), (2, 3, 7), (2, 7, 6), (0, 2, 6), (0, 6, 4)]
DIAMETER = float(np.linalg.norm([0.06, 0.08, 0.10]))
BOX = ObjectModel("box", CORNERS, DIAMETER)
SIGMA_PX = 0.05


def write_dataset(root: Path, poses: Sequence[Sequence[Pose]], **info: Any) -> Path:
    """Write a BOP folder: image i has the grey value i and the objects ``poses[i]``; ``info`` goes to models_info."""
    scene = root / "test" / "000003"
    (scene / "rgb").mkdir(parents=True)
    (root / "models").mkdir()
    vertices = "\n".join(" ".join(f"{1000 * c:.3f}" for c in corner) for corner in CORNERS)
    faces = "\n".join(f"3 {a} {b} {c}" for a, b, c in FACES)
    header = f"ply\nformat ascii 1.0\nelement vertex {len(CORNERS)}\n"
    header += "property float x\nproperty float y\nproperty float z\n"
    header += f"element face {len(FACES)}\nproperty list uchar int vertex_indices\nend_header\n"
    (root / "models" / "obj_000001.ply").write_text(f"{header}{vertices}\n{faces}\n")
    facts = {"1": {"name": "box", "diameter": 1000 * DIAMETER, **info}}
    (root / "models" / "models_info.json").write_text(json.dumps(facts))
    truth, cameras, visible = {}, {}, {}
    for index, objects in enumerate(poses):
        cv2.imwrite(str(scene / "rgb" / f"{index:06d}.png"), np.full((48, 64, 3), index, np.uint8))
        cameras[str(index)] = {"cam_K": CAMERA.matrix.reshape(-1).tolist(), "depth_scale": 1.0}
        truth[str(index)] = [
            {
                "cam_R_m2c": pose.rotation.reshape(-1).tolist(),
                "cam_t_m2c": (1000 * pose.translation).tolist(),
                "obj_id": 1,
            }
            for pose in objects
        ]
        visible[str(index)] = [{"visib_fract": 1.0 - 0.3 * i} for i in range(len(objects))]
    for name, content in (("scene_gt", truth), ("scene_camera", cameras), ("scene_gt_info", visible)):
        (scene / f"{name}.json").write_text(json.dumps(content))
    return root


def estimate_of(pose: Pose, cov: FloatArray | None = None, score: float = 0.9) -> PoseEstimate:
    """Return an estimate that sees its keypoints exactly where its pose puts them."""
    points = Keypoints(CAMERA.project(pose.transform(CORNERS)), SIGMA_PX**2 * np.eye(16), np.ones(8))
    spread = np.diag([1e-6] * 3 + [1e-4] * 3) if cov is None else cov
    return PoseEstimate("box", 0, pose, spread, score, points, np.ones(8, bool), 10.0, 10)


Answer = Callable[[int], list[PoseEstimate]]


@dataclass
class FakeEstimator:
    """Answers by the image's grey value; remembers what it was shown."""

    answer: Answer
    rejections: tuple[Rejection, ...] = ()
    options: EstimatorOptions = field(default_factory=EstimatorOptions)
    backend_name: str = "fake"
    shown: list[Any] = field(default_factory=list)
    boxes: list[FloatArray] = field(default_factory=list)

    def estimate(self, view: View) -> FrameResult:
        self.shown.append(view)
        found = tuple(self.answer(int(view.image[0, 0, 0])))
        return FrameResult(found, self.rejections, {"total": 5.0}, False)

    def zoom(self, view: View, class_index: int, box: FloatArray) -> Any:
        self.shown.append(view)
        self.boxes.append(box)
        return SimpleNamespace(image=int(view.image[0, 0, 0]), box=box) if class_index == 0 else None

    def solve(self, camera: Camera, instance: Any) -> PoseEstimate | Rejection:
        found = self.answer(instance.image)
        return found[0] if found else Rejection(RejectReason.INCONSISTENT, "")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[EvaluationReport, FakeEstimator]]:
    """Return a function that evaluates a fake estimator on a data set."""

    def evaluate(
        root: Path, answer: Answer, *, model: ObjectModel = BOX, rejections: tuple[Rejection, ...] = (), **changes: Any
    ) -> tuple[EvaluationReport, FakeEstimator]:
        fake = FakeEstimator(answer, rejections)
        monkeypatch.setattr(module, "find_model", lambda name: name)
        monkeypatch.setattr(module, "load_bundle", lambda path: SimpleNamespace(name="fake", objects=(model,)))
        monkeypatch.setattr(module, "PoseEstimator", lambda *args, **kwargs: fake)
        return evaluate_model("fake", root, progress=False, **changes), fake

    return evaluate


def some_poses(count: int, rng: np.random.Generator) -> list[Pose]:
    """Return poses that the camera sees."""
    return [
        Pose(exp_so3(rng.normal(0, 1, 3)), np.array([*rng.uniform(-0.05, 0.05, 2), rng.uniform(0.4, 0.7)]))
        for _ in range(count)
    ]


Run = Callable[..., tuple[EvaluationReport, FakeEstimator]]


def test_perfect_answers_are_perfect(tmp_path: Path, run: Run, rng: np.random.Generator) -> None:
    poses = some_poses(4, rng)
    report, _ = run(write_dataset(tmp_path, [[pose] for pose in poses]), lambda i: [estimate_of(poses[i])])
    score = report.overall
    assert (score.targets, score.add_recall, score.detection_rate) == (4, 1.0, 1.0)
    assert score.translation_mm < 1e-3 and score.rotation_deg < 1e-3 and score.keypoint_px < 1e-3
    assert report.false_alarms == 0 and report.missed == {}
    assert report.checks["joint"].nees < 1e-3
    assert report.latency_ms == {"p50": 5.0, "p95": 5.0}


def test_errors_drawn_from_the_covariance_are_covered_as_promised(
    tmp_path: Path, run: Run, rng: np.random.Generator
) -> None:
    """NEES sums to a chi-square variable; the share inside the 95 % ellipsoid is binomial (5 sigma allowed)."""
    count = 150
    poses = some_poses(count, rng)
    mix = rng.normal(size=(6, 6))
    scale = np.diag([1e-3] * 3 + [2e-2] * 3)
    cov = scale @ (mix @ mix.T + np.eye(6)) @ scale
    answers = [estimate_of(pose.retract(rng.multivariate_normal(np.zeros(6), cov)), cov) for pose in poses]
    report, _ = run(write_dataset(tmp_path, [[pose] for pose in poses]), lambda i: [answers[i]])
    check = report.checks["joint"]
    low, high = chi2_quantile(1e-6, 6 * count) / count, chi2_quantile(1 - 1e-6, 6 * count) / count
    assert low < check.nees < high
    for part in ("pose", "xy", "z", "rotation"):
        assert abs(check.coverage[part][0.95] - 0.95) < 5 * np.sqrt(0.95 * 0.05 / count)
    assert check.sigma_z_mm == pytest.approx(1e3 * np.sqrt(cov[2, 2]), rel=1e-6)


def test_the_block_diagonal_variant_forgets_what_keypoints_share(
    tmp_path: Path, run: Run, rng: np.random.Generator
) -> None:
    """Keypoints that err by one common shift: the joint covariance knows it, the blocks alone are too sure of xy."""
    poses = some_poses(40, rng)
    shared = np.tile(np.eye(2), (8, 1))
    joint = SIGMA_PX**2 * (0.02 * np.eye(16) + shared @ shared.T)

    def answer(i: int) -> list[PoseEstimate]:
        from ukd_ros.perception.pnp import PnpOptions, solve_pnp

        noise = np.random.default_rng(i).multivariate_normal(np.zeros(16), joint).reshape(8, 2)
        points = Keypoints(CAMERA.project(poses[i].transform(CORNERS)) + noise, joint, np.ones(8))
        solved = solve_pnp(CORNERS, points, CAMERA, PnpOptions())
        if isinstance(solved, Rejection):
            return []
        found = (solved.T_camera_object, solved.cov, 0.9, points, solved.inliers, solved.chi2, solved.dof)
        return [PoseEstimate("box", 0, *found)]

    report, _ = run(write_dataset(tmp_path, [[pose] for pose in poses]), answer)
    checks = report.checks
    assert checks["joint"].poses >= 35
    assert checks["joint"].coverage["xy"][0.95] > 0.8
    assert checks["block_diagonal"].coverage["xy"][0.95] < checks["joint"].coverage["xy"][0.95] - 0.1
    assert checks["block_diagonal"].sigma_xy_mm < checks["joint"].sigma_xy_mm


def test_dropping_correlations_keeps_every_keypoints_own_block(rng: np.random.Generator) -> None:
    mix = rng.normal(size=(6, 6))
    points = Keypoints(np.zeros((3, 2)), mix @ mix.T, np.ones(3))
    alone = independent(points)
    assert np.array_equal(alone.blocks(), points.blocks())
    assert np.count_nonzero(alone.cov) == 12


def test_missing_doubled_and_stray_answers(tmp_path: Path, run: Run, rng: np.random.Generator) -> None:
    pose = Pose(exp_so3(np.array([0.1, 0.2, 0.3])), np.array([-0.1, 0.0, 0.6]))
    twin = Pose(pose.rotation, np.array([0.1, 0.0, 0.6]))
    near = pose.retract(np.array([0.02, 0, 0, 0, 0, 0]))
    far = Pose(pose.rotation, np.array([0.0, 0.13, 0.6]))
    images = {
        0: [],  # nothing found of one object
        1: [estimate_of(near, score=0.9), estimate_of(pose, score=0.8)],  # the better score takes the label
        2: [estimate_of(twin, score=0.7), estimate_of(pose, score=0.9)],  # two objects, each found
        3: [estimate_of(far)],  # elsewhere
    }
    root = write_dataset(tmp_path, [[pose], [pose], [pose, twin], [pose]])
    lost = Rejection(RejectReason.LOW_SCORE, "", "box")
    report, _ = run(root, lambda i: images[i], rejections=(lost,))
    assert [item.correct for item in report.results] == [False, False, True, True, False]
    assert [item.estimate is not None for item in report.results] == [False, True, True, True, False]
    assert report.overall.targets == 5
    assert report.overall.add_recall == pytest.approx(2 / 5)
    assert report.overall.detection_rate == pytest.approx(3 / 5)
    assert report.false_alarms == 2
    assert report.missed == {"low_score": 2}


def test_add_counts_below_a_tenth_of_the_diameter(tmp_path: Path, run: Run) -> None:
    pose = Pose(np.eye(3), np.array([0.0, 0.0, 0.6]))
    for factor, right in ((0.099, True), (0.101, False)):
        moved = pose.retract(np.array([0, 0, factor * DIAMETER, 0, 0, 0]))
        root = write_dataset(tmp_path / str(factor), [[pose]])
        report, _ = run(root, lambda i, moved=moved: [estimate_of(moved)])
        assert report.overall.add_recall == float(right)
        assert report.results[0].add == pytest.approx(factor * DIAMETER, rel=1e-5)


def test_every_score_of_a_shift_is_what_the_hand_computes(tmp_path: Path, run: Run) -> None:
    """0.12 diameters sideways: every point moves by just that, so ADD, MSSD and the projection follow on paper."""
    pose = Pose(np.eye(3), np.array([0.0, 0.0, 0.6]))
    shift = 0.12 * DIAMETER
    answer = estimate_of(pose.retract(np.array([shift, 0, 0, 0, 0, 0])))
    report, _ = run(write_dataset(tmp_path, [[pose], [pose]]), lambda i: [answer] if i else [])
    score = report.overall
    assert score.add_recalls == {"0.02": 0.0, "0.05": 0.0, "0.1": 0.0}
    assert score.add_auc == pytest.approx(0.5 * (1 - shift / 0.1))  # one of two found
    assert score.ar_mssd == pytest.approx(0.5 * 0.8)  # below 0.15, 0.20 ... 0.50
    # The nearest corner is 0.55 m away: 60 px * 0.01697 m / 0.55 m = 1.85 px, and the image is a tenth of 640 px wide.
    pixels = 60 * shift / 0.55 * 640 / 64
    assert pixels == pytest.approx(18.5, abs=0.05)
    assert score.ar_mspd == pytest.approx(0.5 * 0.7)  # below 20, 25 ... 50
    assert score.projection_recall == 0.5  # 1.7 px of this image on average
    assert report.causes == {"not found": 1, "sideways": 1}
    assert report.detection["visible fraction"] == {"from 0.9": (0.5, 2)}
    assert [(p.kept, p.accuracy) for p in report.risk] == [(0.5, 0.0)]


def test_only_as_many_estimates_count_as_are_asked_for(tmp_path: Path, run: Run) -> None:
    """A stray that scores higher costs the target, though the object was found: the count is unknown to the robot."""
    pose = Pose(np.eye(3), np.array([-0.1, 0.0, 0.6]))
    stray = Pose(np.eye(3), np.array([0.12, 0.1, 0.6]))
    root = write_dataset(tmp_path, [[pose]])
    report, _ = run(root, lambda i: [estimate_of(stray, score=0.9), estimate_of(pose, score=0.8)])
    assert (report.overall.add_recall, report.missed, report.causes) == (0.0, {"outranked": 1}, {"outranked": 1})
    assert report.false_alarms == 1
    other, _ = run(root, lambda i: [estimate_of(stray, score=0.7), estimate_of(pose, score=0.8)])
    assert other.overall.add_recall == 1.0 and other.causes == {}


def test_failures_have_their_causes(tmp_path: Path, run: Run) -> None:
    pose = Pose(np.eye(3), np.array([0.0, 0.0, 0.6]))
    changes = {
        "depth": [0, 0, 0.03, 0, 0, 0.1],
        "sideways": [0.02, 0, 0.01, 0, 0, 0],
        "turned": [0.001, 0, 0, 0, 0, 0.7],
        "flipped": [0, 0, 0, 0, 0, 3.0],
    }
    for cause, change in changes.items():
        answer = estimate_of(pose.retract(np.array(change, dtype=float)))
        root = write_dataset(tmp_path / cause, [[pose]])
        report, _ = run(root, lambda i, answer=answer: [answer], match_radius=3.0)
        assert report.causes == {cause: 1}
    refused = Rejection(RejectReason.TOO_UNCERTAIN, "", "box")
    report, _ = run(write_dataset(tmp_path / "refused", [[pose]]), lambda i: [], rejections=(refused,))
    assert report.causes == {"refused": 1} and report.missed == {"too_uncertain": 1}


def test_keypoints_are_compared_with_their_own_ellipses(tmp_path: Path, run: Run, rng: np.random.Generator) -> None:
    poses = some_poses(60, rng)

    def answer(i: int) -> list[PoseEstimate]:
        exact = estimate_of(poses[i])
        noise = SIGMA_PX * np.random.default_rng(i).normal(size=(8, 2))
        return [replace(exact, keypoints=Keypoints(exact.keypoints.xy + noise, exact.keypoints.cov, np.ones(8)))]

    report, _ = run(write_dataset(tmp_path, [[pose] for pose in poses]), answer)
    check = report.keypoints
    assert check is not None and check.keypoints == 480
    assert abs(check.square - 2) < 5 * np.sqrt(4 / 480)
    assert abs(check.coverage[0.95] - 0.95) < 5 * np.sqrt(0.95 * 0.05 / 480)
    assert check.nll == pytest.approx(1 + np.log(2 * np.pi * SIGMA_PX**2), abs=0.25)


def test_a_symmetric_object_may_be_seen_either_way(tmp_path: Path, run: Run) -> None:
    half_turn = Pose(np.diag([-1.0, -1.0, 1.0]), np.zeros(3))
    pose = Pose(exp_so3(np.array([0.4, 0.2, 0.1])), np.array([0.0, 0.0, 0.6]))
    turned = (pose @ half_turn).retract(np.array([0.001, 0, 0, 0.02, 0, 0]))
    plain, _ = run(write_dataset(tmp_path / "plain", [[pose]]), lambda i: [estimate_of(turned)])
    assert plain.overall.add_recall == 0.0
    info = {"symmetries_discrete": [half_turn.matrix().reshape(-1).tolist()]}
    report, _ = run(write_dataset(tmp_path / "symmetric", [[pose]], **info), lambda i: [estimate_of(turned)])
    assert report.overall.add_recall == 1.0
    assert report.overall.rotation_deg == pytest.approx(np.degrees(0.02), rel=1e-3)
    assert report.results[0].truth.minus(pose @ half_turn) == pytest.approx(np.zeros(6), abs=1e-6)


def test_the_estimator_never_sees_the_truth(tmp_path: Path, run: Run, rng: np.random.Generator) -> None:
    poses = some_poses(2, rng)
    root = write_dataset(tmp_path, [[pose] for pose in poses])
    for crops in ("estimator", "oracle"):
        _, fake = run(root, lambda i: [estimate_of(poses[i])], crops=crops)
        assert len(fake.shown) == 2
        assert all(type(view) is View for view in fake.shown)
    xy = CAMERA.project(poses[0].transform(CORNERS))
    assert fake.boxes[0] == pytest.approx(np.concatenate([xy.min(axis=0), xy.max(axis=0)]), abs=1e-3)


def test_oracle_crops_report_why_a_target_was_missed(tmp_path: Path, run: Run, rng: np.random.Generator) -> None:
    poses = some_poses(3, rng)
    root = write_dataset(tmp_path, [[pose] for pose in poses])
    report, _ = run(root, lambda i: [estimate_of(poses[i])] if i else [], crops="oracle")
    assert report.overall.detection_rate == pytest.approx(2 / 3)
    assert report.missed == {"inconsistent": 1}


def test_the_target_list_decides_what_is_asked_for(tmp_path: Path, run: Run) -> None:
    pose = Pose(np.eye(3), np.array([-0.1, 0.0, 0.6]))
    twin = Pose(np.eye(3), np.array([0.1, 0.0, 0.6]))
    root = write_dataset(tmp_path, [[pose, twin], [pose, twin], [pose]])
    everything, _ = run(root, lambda i: [estimate_of(pose), estimate_of(twin)])
    assert (everything.overall.targets, everything.false_alarms) == (5, 1)
    targets = [{"scene_id": 3, "im_id": i, "obj_id": 1, "inst_count": 1} for i in (0, 1, 7)]
    (root / "test_targets_bop19.json").write_text(json.dumps(targets))
    report, _ = run(root, lambda i: [estimate_of(pose), estimate_of(twin)])
    # The most visible one of each listed image is asked for; the other is no false alarm.
    assert [item.image_id for item in report.results] == [0, 1]
    assert all(item.visible_fraction == 1.0 for item in report.results)
    assert report.false_alarms == 1
    free, _ = run(root, lambda i: [], target_list=False, min_visible=0.8)
    assert free.overall.targets == 3


def test_images_are_chosen_by_id_and_number(tmp_path: Path, run: Run, rng: np.random.Generator) -> None:
    poses = some_poses(10, rng)
    root = write_dataset(tmp_path, [[pose] for pose in poses])

    def chosen(**changes: Any) -> list[int]:
        return [item.image_id for item in run(root, lambda i: [], **changes)[0].results]

    assert chosen(ids=(2, 5)) == [2, 3, 4]
    assert chosen(limit=2) == [0, 9]
    assert len(chosen(limit=4, ids=(0, 8))) == 4
    with pytest.raises(BopError, match="no images"):
        chosen(ids=(50, 60))


def test_objects_are_named_as_in_the_model(tmp_path: Path, run: Run) -> None:
    pose = Pose(np.eye(3), np.array([0.0, 0.0, 0.6]))
    root = write_dataset(tmp_path, [[pose]])
    renamed = ObjectModel("crate", CORNERS, DIAMETER)
    with pytest.raises(BopError, match="box.*crate.*8=driller"):
        run(root, lambda i: [], model=renamed)
    report, _ = run(root, lambda i: [], model=renamed, names={1: "crate"})
    assert report.objects["crate"].targets == 1


def test_reports_are_written_whole_even_when_nothing_was_found(
    tmp_path: Path, run: Run, rng: np.random.Generator
) -> None:
    poses = some_poses(3, rng)
    root = write_dataset(tmp_path / "data", [[pose] for pose in poses])
    for name, answer in (("none", []), ("all", [estimate_of(poses[0])])):
        out = tmp_path / name
        report, _ = run(root, lambda i, answer=answer: answer, out=out)
        files = {"report.html", "report.txt", "report.json", "summary.png", "best.png", "worst.png"}
        assert {path.name for path in out.iterdir()} == files
        data = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
        assert data["overall"]["targets"] == 3
        assert (out / "report.txt").read_text() == report.table() + "\n"
        page = (out / "report.html").read_text()
        assert (
            page.count("data:image/png;base64,") == 1
            and page.count("data:image/jpeg;base64,") >= 2
            and "http" not in page
        )
        for picture in ("summary.png", "best.png", "worst.png"):
            image = cv2.imread(str(out / picture))
            assert image is not None and image.std() > 1


@pytest.mark.parametrize(
    "wrong", [{"crops": "truth"}, {"limit": -1}, {"ids": (5, 5)}, {"min_visible": 2.0}, {"match_radius": 0.0}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EvaluationOptions(**wrong)
