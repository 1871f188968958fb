# SPDX-License-Identifier: Apache-2.0
"""Calibration from views to model.yaml: errors of known correlation are recovered, and coverage becomes nominal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from perception.painted_world import MODELS, VGA, FakeBackend, World  # noqa: E402

from ukd_ros.data.bop import BopError  # noqa: E402
from ukd_ros.distillation import calibrate as module  # noqa: E402
from ukd_ros.distillation.calibrate import (  # noqa: E402
    CalibrationOptions,
    CalibrationReport,
    calibrate,
    collect,
    match,
    write_report,
)
from ukd_ros.distillation.corrections import Match, fit_doubt, fit_shrinkage, spread  # noqa: E402
from ukd_ros.distillation.error_model import CrossFit, ErrorSamples, HeldOut  # noqa: E402
from ukd_ros.distillation.recalibrate import recalibrate  # noqa: E402
from ukd_ros.geometry.arrays import FloatArray  # noqa: E402
from ukd_ros.geometry.estimate import Rejection  # noqa: E402
from ukd_ros.geometry.keypoints import Keypoints  # noqa: E402
from ukd_ros.geometry.metrics import nees  # noqa: E402
from ukd_ros.geometry.object_model import ObjectModel, Symmetries  # noqa: E402
from ukd_ros.geometry.pose import Pose, exp_so3  # noqa: E402
from ukd_ros.geometry.view import LabelledView, ObjectLabel  # noqa: E402
from ukd_ros.perception.estimator import EstimatorOptions, PoseEstimator  # noqa: E402
from ukd_ros.perception.manifest import GraphSpec  # noqa: E402
from ukd_ros.perception.pnp import PnpOptions, PnpSolution, solve_pnp  # noqa: E402
from ukd_ros.perception.votes import Calibration, VoteInstance, keypoint_box, shrink_share, widened  # noqa: E402

MODES = np.array([1.0, 1.0, 0.8, 0.5])


class PaintedViews:
    """Labelled views of a painted world: one object each, some of them truncated or unlabelled."""

    object_ids = (1, 2)
    root = Path("painted")

    def __init__(self, world: World, count: int) -> None:
        self.world, self.count = world, count
        self.truncated: set[int] = set()
        self.images = [SimpleNamespace(image_id=10 * i, scene_id=i // 10) for i in range(count)]

    def name(self, object_id: int) -> str:
        return MODELS[object_id - 1].name

    def __len__(self) -> int:
        return self.count

    def view(self, index: int) -> LabelledView:
        rng = np.random.default_rng(index)
        pose = Pose(exp_so3(rng.normal(0.0, 1.0, 3)), np.array([*rng.uniform(-0.12, 0.12, 2), rng.uniform(0.45, 0.9)]))
        kind = index % 2
        self.world.objects = [(kind, pose)]
        plain = self.world.view(index)
        label = ObjectLabel(MODELS[kind].name, pose, truncated=index in self.truncated)
        return LabelledView(plain.image, plain.camera, objects=(label,))


def estimator_of(world: World) -> PoseEstimator:
    graphs = {"locate": GraphSpec("locate.onnx", 320, 256), "zoom": GraphSpec("zoom.onnx", 128, 128, context=1.5)}
    bundle = SimpleNamespace(name="painted", objects=MODELS, graphs=graphs, calibration=Calibration())
    return PoseEstimator(
        bundle,  # type: ignore[arg-type]
        options=EstimatorOptions(tracking=False),
        locate=FakeBackend(world, 320, 256, 1.5, locate=True),
        zoom=FakeBackend(world, 128, 128, 0.8, locate=False),
    )


@pytest.fixture(scope="module")
def report() -> CalibrationReport:
    world = World(vote_correlation=0.4, modes=MODES, votes=(3, 16))
    views = PaintedViews(world, 200)
    return calibrate(estimator_of(world), views, CalibrationOptions(folds=2))


def test_known_sharing_of_errors_is_recovered(report: CalibrationReport) -> None:
    """Through crops, votes and robust fusion: what the votes were drawn with comes back."""
    fit = report.calibration
    assert report.matched == report.labels == 200 and report.unmatched == 0
    blocks = fit.block_factor * (fit.vote_correlation + (1.0 - fit.vote_correlation) / 8.0)
    assert blocks == pytest.approx(0.4 + 0.6 / 8.0, rel=0.2)
    np.testing.assert_allclose(fit.modes, MODES, rtol=0.4)
    assert (fit.views, fit.instances) == (200, 200)


def test_coverage_is_nominal_and_block_diagonal_is_not(report: CalibrationReport) -> None:
    joint, blocks, raw = (report.checks[name] for name in ("joint", "block_diagonal", "uncalibrated"))
    for part in ("pose", "xy", "z", "rotation"):
        assert 0.895 <= joint.coverage[part][0.95] <= 0.985, part
    assert 4.8 < joint.nees < 7.5
    # No block-diagonal covariance fits: position is overconfident while rotation is timid.
    assert blocks.coverage["rotation"][0.95] - blocks.coverage["xy"][0.95] > 0.04
    assert blocks.sigma_rotation_deg > 1.5 * joint.sigma_rotation_deg
    assert raw.coverage["pose"][0.95] < 0.7
    assert joint.nll < blocks.nll - 0.1 and joint.nll < raw.nll
    assert joint.poses + sum(joint.rejected.values()) == 200


def test_the_report_is_written_whole(report: CalibrationReport, tmp_path: Path) -> None:
    write_report(report, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "calibration.json").read_text(encoding="utf-8"))
    assert data["checks"]["joint"]["coverage"]["pose"]["0.95"] == report.checks["joint"].coverage["pose"][0.95]
    assert data["calibration"]["modes"] == report.calibration.modes.tolist()
    picture = cv2.imread(str(tmp_path / "out" / "reliability.png"))
    assert picture is not None and picture.std() > 5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["calibration.json", "reliability.png"]
    assert "block_diagonal" in report.table()


def test_oracle_crops_need_no_locate_stage() -> None:
    world = World()
    views = PaintedViews(world, 12)
    found = collect(estimator_of(world), views, CalibrationOptions(crops="oracle"))
    assert world.locate_runs == 0 and world.zoom_runs == 12
    assert len(found.matches) == 12


def test_hidden_and_truncated_objects_are_neither_sought_nor_false_alarms() -> None:
    world = World()
    views = PaintedViews(world, 10)
    views.truncated = {2, 5}
    found = collect(estimator_of(world), views, CalibrationOptions())
    assert (found.labels, len(found.matches), found.unmatched) == (8, 8, 0)
    found = collect(estimator_of(world), views, CalibrationOptions(truncated=True), limit=6)
    assert (found.labels, len(found.matches), found.views) == (6, 6, 6)


def test_matching_takes_the_nearest_and_the_equivalent_pose_of_a_symmetric_object() -> None:
    half_turn = Pose(exp_so3(np.array([0.0, 0.0, np.pi])), np.zeros(3))
    plate = ObjectModel("plate", MODELS[0].keypoints_3d, 0.14, Symmetries(discrete=(half_turn,)))
    truth = Pose(exp_so3(np.array([0.3, 0.2, 0.1])), np.array([0.0, 0.0, 0.7]))
    far = Pose(truth.rotation, np.array([0.2, 0.0, 0.7]))
    xy = VGA.project((truth @ half_turn).transform(plate.keypoints_3d)) + 1.0
    K = len(xy)
    instance = VoteInstance(
        0, 0.9, Keypoints(xy, np.eye(2 * K), np.ones(K)), keypoint_box(xy), 5, np.tile(np.eye(2), (K, 1, 1)), np.ones(K)
    )
    pairs, unmatched = match([instance, instance], [(0, far, True), (0, truth, True)], VGA, [plate], 0.5)
    assert len(pairs) == 1 and unmatched == 1  # a label answers for one instance only
    np.testing.assert_allclose(pairs[0][1].matrix(), (truth @ half_turn).matrix(), atol=1e-12)


def test_an_ignorant_model_is_an_error() -> None:
    world = World(blind_zoom=True)
    with pytest.raises(ValueError, match="No instance matches"):
        calibrate(estimator_of(world), PaintedViews(world, 5))


@pytest.mark.parametrize(
    ("change", "name"), [({"crops": "guess"}, "crops"), ({"folds": 1}, "folds"), ({"min_visible": 2.0}, "min_visible")]
)
def test_bad_options_are_named(change: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        CalibrationOptions(**change)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Painted:
    """What the public entry reads of a bundle itself."""

    name: str
    calibration: Calibration
    objects: tuple[ObjectModel, ...] = tuple(MODELS)


Seen = Callable[[Pose, FloatArray], tuple[FloatArray, FloatArray]]


def _matches(rng: np.random.Generator, count: int, seen: Seen) -> list[Match]:
    """Instances with keypoints, and doubt about each [K, 2] px, as `seen(truth, the true ones)` has them."""
    matches = []
    for view in range(count):
        truth = Pose(exp_so3(rng.normal(0.0, 1.5, 3)), [*rng.uniform(-0.15, 0.15, 2), rng.uniform(0.5, 1.0)])
        true = VGA.project(truth.transform(MODELS[0].keypoints_3d))
        xy, doubt = seen(truth, true)
        blocks = doubt[:, :, None] * doubt[:, None, :] + 0.1 * np.mean(doubt**2) * np.eye(2)
        cov = np.zeros((2 * len(xy), 2 * len(xy)))
        for k, block in enumerate(blocks):
            cov[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = block
        points = Keypoints(xy, cov, np.ones(len(xy)))
        instance = VoteInstance(0, 0.9, points, keypoint_box(xy), 1, blocks, np.ones(len(xy)))
        matches.append(Match(instance, truth, VGA, view))
    return matches


def _too_far(matches: list[Match], shrinkage: float) -> float:
    """Median of depth over true depth less one."""
    errors = []
    for item in matches:
        points = spread(item, shrinkage).instance.keypoints
        found = solve_pnp(MODELS[0].keypoints_3d, points, VGA, PnpOptions(gate_p_value=0.0), item.truth)
        if isinstance(found, PnpSolution):
            errors.append(found.T_camera_object.translation[2] / item.truth.translation[2] - 1.0)
    assert len(errors) > 0.9 * len(matches)
    return float(np.median(errors))


def test_the_shrinkage_of_a_doubtful_network_is_found(rng: np.random.Generator) -> None:
    """A shape seen as the mean of copies turned by +-a is cos(a) of its size: the poses are brought back."""

    def seen(_: Pose, true: FloatArray) -> tuple[FloatArray, FloatArray]:
        angle, centred = rng.uniform(0.1, 0.4), true - true.mean(axis=0)
        return true.mean(axis=0) + np.cos(angle) * centred, np.sin(angle) * centred[:, ::-1] * [-1.0, 1.0]

    matches = _matches(rng, 120, seen)
    shrinkage = fit_shrinkage(matches, MODELS)
    assert _too_far(matches, 0.0) > 0.01
    assert 0.3 < shrinkage < 0.7  # small a: the wanted factor is 1 + a^2 / 2 and the share tan^2(a)
    assert abs(_too_far(matches, shrinkage)) < 0.003
    # and nothing is drawn together where poses are too near as they are
    near = [spread(item, 3.0 * shrinkage) for item in matches]
    assert _too_far(near, 0.0) < -0.01 and fit_shrinkage(near, MODELS) == 0.0


def test_a_wrong_turn_is_no_shrinkage(rng: np.random.Generator) -> None:
    """An object seen turned by 20 degrees has its keypoints where a smaller one might have them, and its true depth."""

    def seen(truth: Pose, true: FloatArray) -> tuple[FloatArray, FloatArray]:
        axis = rng.normal(0.0, 1.0, 3)
        turned = Pose(exp_so3(np.radians(20.0) * axis / np.linalg.norm(axis)) @ truth.rotation, truth.translation)
        xy = VGA.project(turned.transform(MODELS[0].keypoints_3d))
        return xy, xy - true

    matches = _matches(rng, 120, seen)
    slopes = []
    for item in matches:
        true = VGA.project(item.truth.transform(MODELS[0].keypoints_3d))
        true, found = (x - x.mean(axis=0) for x in (true, item.instance.keypoints.xy))
        slopes.append((found * true).sum() / (true**2).sum())
    assert np.median(slopes) < 0.97
    assert fit_shrinkage(matches, MODELS) < 0.02


def test_doubt_that_grows_faster_than_predicted_is_found(rng: np.random.Generator) -> None:
    """Errors drawn with (share / reference)^0.8 times the predicted variance: the exponent comes back."""
    n, count = 600, 9
    xy = rng.normal(0.0, 40.0, (n, count, 2)) + 300.0
    blocks = (
        np.exp(rng.uniform(np.log(2.0), np.log(40.0), n))[:, None, None, None] * np.eye(2) * np.ones((1, count, 1, 1))
    )
    share = shrink_share(xy, blocks)
    factor = (share / np.exp(np.log(share).mean())) ** 0.8
    error = rng.normal(0.0, 1.0, (n, 2 * count)) * np.sqrt(blocks[:, 0, 0, 0] * factor)[:, None]
    jacobian = rng.normal(0.0, 300.0, (n, 2 * count, 6))
    samples = ErrorSamples(error, blocks, np.ones((n, count)), xy, jacobian, np.arange(n))
    exponent, reference = fit_doubt(samples, share)
    assert exponent == pytest.approx(0.8, abs=0.1)
    assert reference == pytest.approx(float(np.exp(np.log(share).mean())))
    calibration = Calibration(doubt_exponent=exponent, doubt_reference=reference)
    repaired = widened(blocks, share, calibration)
    ratio = (error**2).mean(axis=1) / repaired[:, 0, 0, 0]
    assert abs(np.corrcoef(np.log(ratio), np.log(share))[0, 1]) < 0.12


def test_the_result_is_stored_in_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The public entry opens model and data, stores exactly what it reports, and says where it comes from."""
    world = World(votes=(3, 16))
    stored: dict[str, object] = {}

    def opened(bundle: Painted) -> PoseEstimator:
        assert bundle.calibration.shrinkage == 0.0, "keypoints are judged before any correction"
        return estimator_of(world)

    def store(path: Path, calibration: Calibration, provenance: dict[str, object]) -> None:
        stored.update(path=path, calibration=calibration, provenance=provenance)

    monkeypatch.setattr(module, "find_model", lambda name: Path(name))
    monkeypatch.setattr(module, "load_bundle", lambda root: Painted("painted", Calibration(shrinkage=3.0)))
    monkeypatch.setattr(module, "PoseEstimator", lambda bundle, backend, options: opened(bundle))
    monkeypatch.setattr(module, "BopDataset", lambda root, names: PaintedViews(world, 60))
    monkeypatch.setattr(module, "update_calibration", store)
    monkeypatch.setattr(module, "check_bop", lambda views, chosen, objects: stored.update(checked=list(chosen)))
    options = CalibrationOptions(folds=2, crops="oracle")
    report = module.calibrate_model(
        tmp_path, tmp_path / "renders", limit=50, out=tmp_path / "out", progress=False, options=options
    )
    assert stored["path"] == tmp_path and stored["calibration"] is report.calibration
    assert stored["checked"] == list(range(50)), "a faulty folder is refused before the first view is judged"
    assert report.calibration.conformal_level == 0.95 and 2.5 < report.calibration.conformal_radius < 5.5
    assert report.views == 50 and report.dataset == "renders" and report.model == "painted"
    kept = stored["provenance"]["calibrated_on"]  # type: ignore[index]
    assert kept["data"] == "renders" and kept["matched"] == report.matched
    assert (tmp_path / "out" / "calibration.json").is_file()


def test_a_handful_of_real_frames_mends_a_covariance_that_is_too_small(tmp_path: Path) -> None:
    """What renders taught is nine times too sure; frames 20..79 say so, and the others agree."""
    world = World(votes=(3, 16))
    estimator = estimator_of(world)
    views = PaintedViews(world, 160)
    fitted = calibrate(estimator, views, CalibrationOptions(folds=2)).calibration
    estimator.calibration = replace(fitted, block_factor=fitted.block_factor / 9, modes=fitted.modes / 9)
    few = collect(estimator, _Part(views, range(20)), CalibrationOptions())
    found = recalibrate(estimator, few.matches, range(20))
    assert found.before.coverage["pose"][0.95] < 0.5
    assert 4.0 < found.factor < 16.0 and 15 <= found.blocks <= 20
    assert 0.9 < found.level <= 0.95 and found.radius > 0
    estimator.calibration = found.calibration
    rest = collect(estimator, _Part(views, range(20, 160)), CalibrationOptions())
    again = recalibrate(estimator, rest.matches, range(140))
    assert 0.85 <= again.before.coverage["pose"][0.95] <= 1.0
    # and the radius holds what it promised for new views like these
    squares = []
    for item in rest.matches:
        answer = estimator.solve(item.camera, item.instance)
        if not isinstance(answer, Rejection):
            squares.append(float(nees(item.truth.minus(answer.T_camera_object), answer.cov)))
    assert len(squares) > 100 and np.mean(np.array(squares) <= found.radius**2) >= found.level - 0.08
    assert "times" in found.table() and json.loads(json.dumps(found.as_data()))["blocks"] == found.blocks
    with pytest.raises(ValueError, match="label more frames"):
        recalibrate(estimator, few.matches[:3], range(20))
    with pytest.raises(ValueError, match="label more frames"):
        recalibrate(estimator, few.matches, [0] * 20)
    estimator.calibration = Calibration()
    with pytest.raises(ValueError, match="calibrated on renders first"):
        recalibrate(estimator, few.matches, range(20))
    with pytest.raises(ValueError, match="block_views: say how many"):
        module.recalibrate_model("spray_bottle", tmp_path)


class _Part:
    """Some views of a data set."""

    def __init__(self, views: PaintedViews, indices: range) -> None:
        self.views, self.indices = views, indices

    def __len__(self) -> int:
        return len(self.indices)

    def view(self, index: int) -> LabelledView:
        return self.views.view(self.indices[index])


@pytest.mark.parametrize("chosen", [0, 1])
def test_squares_and_views_stay_together_when_the_scaled_fit_solves_fewer_poses(
    chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wider covariance is refused more often; the fit that is chosen brings its own views."""
    checks = [SimpleNamespace(number=0), SimpleNamespace(number=1)]
    solved = zip(checks, (5, 3), strict=True)
    answers = iter([(check, {"pose": np.arange(n)}, np.zeros(n), np.arange(n)) for check, n in solved])
    fit = CrossFit(Calibration(), "likelihood", {}, np.zeros(5), (Calibration(),))
    monkeypatch.setattr(module, "check_poses", lambda *arguments: next(answers))
    monkeypatch.setattr(module, "cover", lambda fit, values, fold: fit)
    monkeypatch.setattr(module, "_score", lambda check: HeldOut(float(check.number != chosen), 0.0))
    judged = module._judge(None, [], fit)  # type: ignore[arg-type]
    assert len(judged.view) == len(judged.squares["pose"]) == (5, 3)[chosen]


def test_only_the_frames_asked_for_are_used_and_strange_objects_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    views = PaintedViews(World(), 30)
    monkeypatch.setattr(module, "BopDataset", lambda root, names: views)
    checked: list[int] = []
    monkeypatch.setattr(module, "check_bop", lambda data, chosen, objects: checked.extend(chosen))
    found = module._open(tmp_path, MODELS, CalibrationOptions(ids=(50, 120)), 3, None)
    assert found.blocks(3) == [0, 0, 0, 1, 1, 2, 2]  # a second scene begins anew
    assert list(found.indices) == [5, 6, 7, 8, 9, 10, 11] and checked == [5, 6, 7]
    with pytest.raises(BopError, match="no images with ids from 1000"):
        module._open(tmp_path, MODELS, CalibrationOptions(ids=(1000, 2000)), None, None)
    strange = [replace(MODELS[0], name="teapot")]
    with pytest.raises(BopError, match="the model teapot: none in common. Say which is which with --name ID=NAME"):
        module._open(tmp_path, strange, CalibrationOptions(), None, None)


def test_the_joint_form_is_shipped_unless_held_out_views_speak_against_it() -> None:
    good = HeldOut(-17.0, 0.01)
    assert module._form({"joint": HeldOut(-16.95, 0.015), "block_diagonal": good}) == "joint"  # too close to tell
    assert module._form({"joint": HeldOut(-16.5, 0.01), "block_diagonal": good}) == "block_diagonal"
    assert module._form({"joint": HeldOut(-17.0, 0.04), "block_diagonal": good}) == "block_diagonal"
    assert module._form({"joint": good, "block_diagonal": HeldOut(-16.0, 0.3)}) == "joint"
