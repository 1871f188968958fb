# SPDX-License-Identifier: Apache-2.0
"""Calibration from views to model.yaml: errors of known correlation are recovered, and coverage becomes nominal."""

from __future__ import annotations

import json
import sys
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
from ukd_ros.distillation.corrections import fit_doubt, fit_shrinkage  # noqa: E402
from ukd_ros.distillation.error_model import CrossFit, ErrorSamples, HeldOut  # noqa: E402
from ukd_ros.distillation.recalibrate import recalibrate  # noqa: E402
from ukd_ros.geometry.estimate import Rejection  # noqa: E402
from ukd_ros.geometry.keypoints import Keypoints  # noqa: E402
from ukd_ros.geometry.metrics import nees  # noqa: E402
from ukd_ros.geometry.object_model import ObjectModel, Symmetries  # noqa: E402
from ukd_ros.geometry.pose import Pose, exp_so3  # noqa: E402
from ukd_ros.geometry.view import LabelledView, ObjectLabel  # noqa: E402
from ukd_ros.perception.estimator import EstimatorOptions, PoseEstimator  # noqa: E402
from ukd_ros.perception.manifest import GraphSpec  # noqa: E402
from ukd_ros.perception.votes import Calibration, VoteInstance, keypoint_box, shrink_share, unshrunk, widened  # noqa: E402

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


def test_the_shrinkage_of_a_doubtful_network_is_found(rng: np.random.Generator) -> None:
    """A shape seen as the mean of copies turned by +-a is cos(a) of its size, with variance r^2 sin^2(a).

    Small a: the wanted factor is 1 + a^2 / 2 and the share tan^2(a), so the shrinkage is one half.
    """
    n, count = 400, 9
    true = rng.normal(0.0, 40.0, (n, count, 2)) + rng.uniform(100, 400, (n, 1, 2))
    angle = rng.uniform(0.05, 0.3, n)[:, None, None]
    centred = true - true.mean(axis=1, keepdims=True)
    found = true.mean(axis=1, keepdims=True) + np.cos(angle) * centred * rng.normal(1.0, 0.004, (n, 1, 1))
    turned = centred[..., ::-1] * [-1.0, 1.0]
    blocks = (np.sin(angle) ** 2)[..., None] * turned[..., :, None] * turned[..., None, :] + 1e-3 * np.eye(2)
    samples = ErrorSamples(
        error=(found - true).reshape(n, -1),
        mean_blocks=blocks,
        effective_votes=np.ones((n, count)),
        xy=found,
        jacobian=np.zeros((n, 2 * count, 6)),
        view=np.arange(n),
    )
    shrinkage = fit_shrinkage(samples)
    assert shrinkage == pytest.approx(0.5, abs=0.08)
    repaired = np.array([unshrunk(xy, block, shrinkage) for xy, block in zip(found, blocks, strict=True)])
    size = np.linalg.norm(repaired - repaired.mean(1, keepdims=True), axis=(1, 2)) / np.linalg.norm(
        centred, axis=(1, 2)
    )
    assert np.median(size) == pytest.approx(1.0, abs=0.002)
    np.testing.assert_allclose(repaired.mean(axis=1), found.mean(axis=1), atol=1e-9)


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
