# SPDX-License-Identifier: Apache-2.0
"""Views become poses: with a network that is replaced by the truth plus noise, everything else is the real thing.

The painted image tells the fake network where its crop was cut, so a wrong crop, letterbox or mapping back shows up as
a wrong pose.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from perception.painted_world import BOX, MODELS, VGA, FakeBackend, World
from scipy import stats

from ukd_ros.geometry.camera import Camera, DistortionModel
from ukd_ros.geometry.estimate import PoseEstimate, Rejection, RejectReason
from ukd_ros.geometry.keypoints import Keypoints
from ukd_ros.geometry.object_model import ObjectModel, Symmetries
from ukd_ros.geometry.pose import Pose, exp_so3
from ukd_ros.perception.estimator import EstimatorOptions, PoseEstimator
from ukd_ros.perception.manifest import GraphSpec
from ukd_ros.perception.pnp import PnpOptions
from ukd_ros.perception.votes import Calibration, VoteInstance, keypoint_box


def build(world: World, models: tuple[ObjectModel, ...] = MODELS, **options: object) -> PoseEstimator:
    graphs = {"locate": GraphSpec("locate.onnx", 320, 256), "zoom": GraphSpec("zoom.onnx", 128, 128, context=1.5)}
    bundle = SimpleNamespace(objects=models, graphs=graphs, calibration=Calibration(vote_correlation=0.0))
    return PoseEstimator(
        bundle,  # type: ignore[arg-type]
        options=EstimatorOptions(**options),  # type: ignore[arg-type]
        locate=FakeBackend(world, 320, 256, 1.5, locate=True),
        zoom=FakeBackend(world, 128, 128, 0.8, locate=False),
    )


def somewhere(x: float = 0.0, y: float = 0.0, z: float = 0.8, turn: float = 0.5) -> Pose:
    return Pose(exp_so3(np.array([turn, -0.4, 0.3])), np.array([x, y, z]))


def assert_near(pose: Pose, truth: Pose) -> None:
    delta = pose.minus(truth)
    assert np.abs(delta[:2]).max() < 0.004 and abs(delta[2]) < 0.03 and np.abs(delta[3:]).max() < np.deg2rad(6.0), delta


def test_one_object_is_found_with_its_pose() -> None:
    world = World(objects=[(0, somewhere())])
    result = build(world, tracking=False).estimate(world.view())
    (estimate,) = result.estimates
    assert (estimate.object_name, estimate.instance, result.tracked) == ("box", 0, False)
    assert_near(estimate.T_camera_object, world.objects[0][1])
    assert set(result.timings_ms) == {"locate", "crop", "zoom", "votes", "pnp", "total"}
    assert (
        0.0
        < sum(result.timings_ms[s] for s in ("locate", "crop", "zoom", "votes", "pnp"))
        <= result.timings_ms["total"]
    )
    assert result.rejections == ()


def test_pose_errors_match_their_covariance() -> None:
    """The mean NEES of the whole chain stays in its chi-square band, though crops, votes and PnP lie between."""
    world = World()
    estimator = build(world, tracking=False)
    rng = np.random.default_rng(11)
    nees = []
    for _ in range(80):
        truth = Pose(exp_so3(rng.normal(0.0, 1.0, 3)), np.array([*rng.uniform(-0.15, 0.15, 2), rng.uniform(0.5, 0.9)]))
        world.objects = [(0, truth)]
        for estimate in estimator.estimate(world.view()).estimates:
            delta = estimate.T_camera_object.minus(truth)
            nees.append(delta @ np.linalg.solve(estimate.cov, delta))
    assert len(nees) >= 76
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], 6 * len(nees)) / len(nees)
    # Robust fusion costs some percent of efficiency that this covariance, uncalibrated, does not know.
    assert low * 0.9 < np.mean(nees) < high * 1.12, np.mean(nees)


def test_several_instances_of_several_classes() -> None:
    poses = [somewhere(-0.2, -0.1), somewhere(0.2, 0.1, turn=1.2), somewhere(0.0, 0.15, 0.9, turn=-0.5)]
    world = World(objects=[(0, poses[0]), (0, poses[1]), (1, poses[2])])
    result = build(world, tracking=False).estimate(world.view())
    assert sorted((e.object_name, e.instance) for e in result.estimates) == [("box", 0), ("box", 1), ("rod", 0)]
    for estimate in result.estimates:
        _, truth = min(
            world.objects, key=lambda item: np.linalg.norm(item[1].translation - estimate.T_camera_object.translation)
        )
        assert_near(estimate.T_camera_object, truth)
    assert [e.score for e in result.estimates] == sorted((e.score for e in result.estimates), reverse=True)


def test_a_distorted_camera_of_another_size() -> None:
    matrix = np.array([[900.0, 0.0, 660.0], [0.0, 905.0, 350.0], [0.0, 0.0, 1.0]])
    camera = Camera(1280, 720, matrix, DistortionModel.PLUMB_BOB, np.array([-0.2, 0.05, 0.001, -0.001, 0.0]))
    world = World(camera=camera, objects=[(1, somewhere(0.3, -0.15))])
    (estimate,) = build(world).estimate(world.view()).estimates
    assert_near(estimate.T_camera_object, world.objects[0][1])


def test_an_empty_frame_says_so() -> None:
    world = World()
    result = build(world).estimate(world.view())
    assert result.estimates == ()
    assert [r.reason for r in result.rejections] == [RejectReason.NOTHING_FOUND]


def test_a_candidate_that_the_zoom_does_not_see_is_rejected() -> None:
    world = World(objects=[(0, somewhere())], blind_zoom=True)
    result = build(world).estimate(world.view())
    assert result.estimates == ()
    (rejection,) = result.rejections
    assert (rejection.reason, rejection.object_name) == (RejectReason.LOW_SCORE, "box")
    assert rejection.keypoints is not None and "not confirmed" in rejection.detail


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"min_score": 0.99}, RejectReason.LOW_SCORE),
        ({"max_sigma_position": 1e-4}, RejectReason.TOO_UNCERTAIN),
        ({"max_sigma_rotation_deg": 0.01}, RejectReason.TOO_UNCERTAIN),
        ({"pnp": PnpOptions(gate_p_value=0.999999)}, RejectReason.INCONSISTENT),
    ],
)
def test_the_gate_names_its_reason(options: dict[str, object], reason: RejectReason) -> None:
    world = World(objects=[(0, somewhere())])
    result = build(world, **options).estimate(world.view())
    assert result.estimates == ()
    assert [r.reason for r in result.rejections] == [reason]


def test_two_poses_that_explain_a_flat_object_alike_are_no_answer() -> None:
    """From far away a plate and its mirror image look the same; near, the perspective tells them apart."""
    plate = np.array([[x, y, 0.0] for x in (-0.06, 0.01, 0.06) for y in (-0.04, 0.0, 0.05)])
    graphs = {"locate": GraphSpec("locate.onnx", 320, 256), "zoom": GraphSpec("zoom.onnx", 128, 128, context=1.5)}
    model = ObjectModel("plate", plate, 0.15)
    bundle = SimpleNamespace(objects=(model,), graphs=graphs, calibration=Calibration())
    backend = FakeBackend(World(), 128, 128, 0.8, locate=False)

    def solved(depth: float, **options: float) -> object:
        estimator = PoseEstimator(
            bundle,  # type: ignore[arg-type]
            options=EstimatorOptions(max_sigma_position=100.0, max_sigma_rotation_deg=1000.0, **options),  # type: ignore[arg-type]
            locate=backend,
            zoom=backend,
        )
        xy = VGA.project(somewhere(0.05, 0.02, depth).transform(plate))
        keypoints = Keypoints(xy, 0.3 * np.eye(2 * len(plate)), np.ones(len(plate)))
        votes = np.ones((len(plate), 2, 2)), np.ones(len(plate))
        return estimator.solve(VGA, VoteInstance(0, 0.9, keypoints, keypoint_box(xy), 9, *votes))

    refused = solved(5.0)
    assert isinstance(refused, Rejection) and refused.reason is RejectReason.AMBIGUOUS
    assert "mirrored" in refused.detail and refused.object_name == "plate"
    shown = solved(5.0, max_ambiguity=1.0)
    assert isinstance(shown, PoseEstimate) and shown.ambiguity > 0.5
    clear = solved(0.4)
    assert isinstance(clear, PoseEstimate) and clear.ambiguity < 0.01


def test_tracking_skips_the_search_and_keeps_identities() -> None:
    """Two boxes move and exchange their places in the ranking; each keeps its number, and the frame is not searched."""
    world = World()
    estimator = build(world, expected_instances=2, relocate_every=0)
    for frame in range(12):
        offset = 0.008 * frame
        a, b = somewhere(-0.15 + offset, -0.1), somewhere(0.15 - offset, 0.1, turn=1.0)
        world.objects = [(0, a), (0, b)] if frame % 2 else [(0, b), (0, a)]
        result = estimator.estimate(world.view(frame * 33_000_000))
        by_number = {e.instance: e for e in result.estimates}
        assert set(by_number) == {0, 1}
        if frame == 0:
            first_is_b = by_number[0].T_camera_object.translation[1] > 0
        assert_near(by_number[0].T_camera_object, b if first_is_b else a)
        assert result.tracked == (frame > 0)
    assert world.locate_runs == 1


@pytest.mark.parametrize("relocate_every", [0, 2])
def test_a_still_cylinder_does_not_spin(relocate_every: int) -> None:
    """The network names any turn about the axis, another in every frame; the published pose keeps the first one.

    The covariance says that the turn is unknown, and only the turn.
    """
    axis, offset = np.array([0.0, 0.0, 1.0]), np.array([0.01, -0.005, 0.0])
    box = replace(BOX, symmetries=Symmetries(continuous=((axis, offset),)))
    world = World()
    estimator = build(world, (box, MODELS[1]), relocate_every=relocate_every)
    still = somewhere(0.1, -0.05)
    rng = np.random.default_rng(5)
    poses = []
    for frame in range(10):
        R = exp_so3(axis * rng.uniform(-np.pi, np.pi))
        world.objects = [(0, still @ Pose(R, offset - R @ offset))]
        (estimate,) = estimator.estimate(world.view(frame * 33_000_000)).estimates
        poses.append(estimate.T_camera_object)
        assert estimate.instance == 0
        # the pixels of a keypoint still belong to its point, under the name the network gave
        named = estimate.T_camera_keypoints or estimate.T_camera_object
        shown = VGA.project(named.transform(BOX.keypoints_3d))
        assert np.abs(shown - estimate.keypoints.xy).max() < 6.0
        turn = estimate.T_camera_object.rotation @ axis
        spread = estimate.cov[3:, 3:]
        assert np.sqrt(turn @ spread @ turn) > 1.5
        across = np.cross(turn, [1.0, 0.0, 0.0]) / np.linalg.norm(np.cross(turn, [1.0, 0.0, 0.0]))
        assert np.sqrt(across @ spread @ across) < np.deg2rad(6.0)
    for pose in poses[1:]:
        # about the axis as still as about the others: what is left is the noise of the votes
        assert np.abs(pose.minus(poses[0])[3:]).max() < np.deg2rad(8.0)
        assert np.abs(pose.minus(poses[0])[:2]).max() < 0.005


def test_the_frame_is_searched_again_now_and_then() -> None:
    world = World(objects=[(0, somewhere())])
    estimator = build(world, relocate_every=4)
    searched = [not estimator.estimate(world.view(i * 33_000_000)).tracked for i in range(9)]
    assert searched == [True, False, False, False, True, False, False, False, True]
    world.objects.append((1, somewhere(0.2, 0.1)))
    names = [{e.object_name for e in estimator.estimate(world.view((9 + i) * 33_000_000)).estimates} for i in range(4)]
    assert names[0] == {"box"} and names[3] == {"box", "rod"}  # the newcomer is seen with the next search


def test_fewer_than_expected_searches_every_frame() -> None:
    world = World(objects=[(0, somewhere())])
    estimator = build(world, expected_instances=2)
    assert [estimator.estimate(world.view(i)).tracked for i in range(3)] == [False, False, False]


def test_loss_and_return() -> None:
    """A jump is caught by a search in the same frame; what vanishes is LOST once, then the frame is empty."""
    world = World(objects=[(0, somewhere(-0.2))])
    estimator = build(world)
    estimator.estimate(world.view(0))
    world.objects = [(0, somewhere(0.2))]
    result = estimator.estimate(world.view(33_000_000))
    assert [e.instance for e in result.estimates] == [0] and not result.tracked and result.rejections == ()
    assert_near(result.estimates[0].T_camera_object, world.objects[0][1])
    world.objects = []
    reasons = [[r.reason for r in estimator.estimate(world.view(i * 33_000_000)).rejections] for i in (2, 3)]
    assert reasons == [[RejectReason.LOST], [RejectReason.NOTHING_FOUND]]


def test_a_missing_number_is_kept_until_the_timeout() -> None:
    """Two boxes; the first hides. While it is away the second keeps its number, and the first returns to its own."""
    a, b = somewhere(-0.2), somewhere(0.2)
    world = World(objects=[(0, a), (0, b)])
    estimator = build(world, expected_instances=2, track_timeout_s=0.5)

    def numbers(stamp_ms: int) -> dict[int, float]:
        result = estimator.estimate(world.view(stamp_ms * 1_000_000))
        return {e.instance: float(np.sign(e.T_camera_object.translation[0])) for e in result.estimates}

    assert numbers(0) == {0: -1.0, 1: 1.0}
    world.objects = [(0, b)]
    assert numbers(100) == {1: 1.0}
    world.objects = [(0, b), (0, a)]
    assert numbers(200) == {0: -1.0, 1: 1.0}
    world.objects = [(0, a)]
    assert numbers(300) == {0: -1.0}
    world.objects = [(0, a), (0, somewhere(0.0, 0.18))]
    assert numbers(400).keys() == {0, 1}


def test_constant_velocity_looks_ahead() -> None:
    """An object that crosses more than its own size per frame is only followed where its motion takes it."""

    def followed(constant_velocity: bool) -> int:
        world = World()
        estimator = build(world, constant_velocity=constant_velocity, relocate_every=0)
        count = 0
        for frame, x in enumerate((-0.36, -0.31, -0.22, -0.09, 0.06, 0.21, 0.36)):
            world.objects = [(0, somewhere(x))]
            count += estimator.estimate(world.view(frame * 33_000_000)).tracked
        return count

    assert followed(True) == 6
    assert followed(False) < 4


def test_another_camera_starts_over() -> None:
    world = World(objects=[(0, somewhere())])
    estimator = build(world)
    estimator.estimate(world.view(0))
    assert estimator.estimate(world.view(1)).tracked
    world.camera = VGA.resized(320, 240)
    result = estimator.estimate(world.view(2))
    assert not result.tracked and len(result.estimates) == 1
    assert_near(result.estimates[0].T_camera_object, world.objects[0][1])
    assert not estimator.estimate(world.view(1)).tracked  # time ran backwards: a bag began again


def test_zoom_rounds_follow_what_the_crop_shows() -> None:
    world = World(objects=[(0, somewhere())])
    xy = VGA.project(world.objects[0][1].transform(BOX.keypoints_3d))
    box = np.concatenate([xy.min(axis=0), xy.max(axis=0)])
    off = box + 0.35 * np.array([1.0, 0.0, 1.0, 0.0]) * (box[2] - box[0])
    for rounds, expected_runs in ((1, 1), (3, 2)):
        world.zoom_runs = 0
        instance = build(world, zoom_rounds=rounds).zoom(world.view(), 0, off)
        assert instance is not None and world.zoom_runs == expected_runs
        assert np.abs(instance.keypoints.xy - xy).max() < 2.5


def test_observe_returns_what_calibration_needs() -> None:
    world = World(objects=[(0, somewhere(-0.2)), (1, somewhere(0.2))])
    found = build(world).observe(world.view())
    assert sorted(instance.class_index for instance in found) == [0, 1]
    for instance in found:
        np.testing.assert_allclose(instance.effective_votes, 10.0, rtol=0.15)
        index, pose = world.objects[instance.class_index]
        truth = world.camera.project(pose.transform(MODELS[index].keypoints_3d))
        error = (instance.keypoints.xy - truth).reshape(-1)
        assert error @ np.linalg.solve(instance.keypoints.cov, error) < stats.chi2.ppf(1 - 1e-5, 16)


@pytest.mark.parametrize(
    "name", ["zoom_factor", "min_score", "relocate_every", "zoom_rounds", "track_timeout_s", "max_sigma_position"]
)
def test_bad_options_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        EstimatorOptions(**{name: -1})  # type: ignore[arg-type]


def test_the_estimator_imports_neither_torch_nor_scipy() -> None:
    code = (
        "import sys, ukd_ros.perception.estimator\n"
        "bad = {'torch', 'scipy', 'onnxruntime', 'matplotlib', 'ot', 'rosbags', 'trimesh'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(bad)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
