# SPDX-License-Identifier: Apache-2.0
"""Is the covariance of a pose the covariance of its error? Monte Carlo with noise drawn from Sigma, and bad input."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.camera import Camera, DistortionModel
from ukd_ros.geometry.estimate import Rejection, RejectReason
from ukd_ros.geometry.keypoints import Keypoints
from ukd_ros.geometry.metrics import coverage, nees, nees_band
from ukd_ros.geometry.object_model import box_corners
from ukd_ros.geometry.pose import Pose, left_jacobian_so3, log_so3, skew
from ukd_ros.perception.pnp import PnpOptions, PnpSolution, projection_jacobian, solve_pnp

K = np.array([[600.0, 0, 320], [0, 610, 240], [0, 0, 1]])
PINHOLE = Camera(640, 480, K)
PLUMB_BOB = Camera(640, 480, K, DistortionModel.PLUMB_BOB, np.array([-0.3, 0.1, 0.001, -0.002, 0.01]))
RATIONAL = Camera(
    640, 480, K, DistortionModel.RATIONAL_POLYNOMIAL, np.array([0.4, -0.3, 0.001, -0.0007, 0.05, 0.7, -0.2, 0.02])
)
FISHEYE = Camera(640, 480, 0.6 * K + np.diag([0, 0, 0.4]), DistortionModel.EQUIDISTANT, np.array([-0.02, 0.01, 0, 0]))

OBJECT = np.random.default_rng(0).uniform(-0.1, 0.1, (12, 3))
BOX = box_corners([[-0.1, -0.06, -0.04], [0.1, 0.06, 0.04]])
PLATE = OBJECT * [1, 1, 0]
PARTS = {"pose": slice(0, 6), "translation": slice(0, 3), "xy": slice(0, 2), "z": slice(2, 3), "rotation": slice(3, 6)}


def some_pose(rng: np.random.Generator, near: float = 0.5, far: float = 1.2) -> Pose:
    """Return a random pose whose object is in the image."""
    q = rng.normal(size=4)
    z = rng.uniform(near, far)
    return Pose.from_quaternion(q / np.linalg.norm(q), [rng.uniform(-0.2, 0.2) * z, rng.uniform(-0.15, 0.15) * z, z])


def independent(rng: np.random.Generator, xy: FloatArray) -> FloatArray:
    return np.asarray(np.kron(np.diag(rng.uniform(0.3, 1.5, len(xy)) ** 2), np.eye(2)), dtype=np.float64)


def anisotropic(rng: np.random.Generator, xy: FloatArray) -> FloatArray:
    """Return ellipses with an axis ratio of up to 10, in any direction."""
    cov = np.zeros((2 * len(xy), 2 * len(xy)))
    for k in range(len(xy)):
        angle = rng.uniform(0, np.pi)
        R = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        long = rng.uniform(1.0, 2.0)
        cov[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = R @ np.diag([long**2, (long * rng.uniform(0.1, 1)) ** 2]) @ R.T
    return cov


def common_modes(xy: FloatArray) -> FloatArray:
    """Return B [2K, 4] of docs/architecture.md: shift u, shift v, scale and in-plane turn about the mean."""
    centred = xy - xy.mean(axis=0)
    centred = centred / np.sqrt(np.mean(np.sum(centred**2, axis=1)))
    one = np.ones(len(xy))
    shift_u, shift_v = np.stack([one, 0 * one], axis=1), np.stack([0 * one, one], axis=1)
    turn = centred @ np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.stack([mode.ravel() for mode in (shift_u, shift_v, centred, turn)], axis=1)


def correlated(rng: np.random.Generator, xy: FloatArray) -> FloatArray:
    B = common_modes(xy)
    return np.asarray(anisotropic(rng, xy) + B @ np.diag([2.0, 1.5, 1.0, 0.8]) @ B.T, dtype=np.float64)


@dataclass(frozen=True)
class Outcomes:
    """The solves of one experiment that gave a pose."""

    truths: list[Pose]
    solutions: list[PnpSolution]
    rejections: list[Rejection]

    def deltas(self) -> FloatArray:
        return np.stack([T.minus(s.T_camera_object) for T, s in zip(self.truths, self.solutions, strict=True)])

    def covariances(self) -> FloatArray:
        return np.stack([s.cov for s in self.solutions])

    def nees(self, part: str = "pose") -> FloatArray:
        index = PARTS[part]
        return nees(self.deltas()[:, index], self.covariances()[:, index, index])


def simulate(
    seed: int,
    count: int,
    noise: object,
    *,
    points: FloatArray = OBJECT,
    camera: Camera = PINHOLE,
    tracked: bool = False,
    outliers: int = 0,
    believed: object = None,
    far: float = 1.2,
) -> Outcomes:
    """Solve ``count`` times with noise drawn from Sigma, or from one Sigma while another is believed."""
    rng = np.random.default_rng(seed)
    truths, solutions, rejections = [], [], []
    for _ in range(count):
        truth = some_pose(rng, far=far)
        clean = camera.project(truth.transform(points))
        cov = noise(rng, clean)  # type: ignore[operator]
        xy = clean + (np.linalg.cholesky(cov) @ rng.normal(size=len(cov))).reshape(-1, 2)
        wrong = rng.permutation(len(points))[:outliers]
        angle, length = rng.uniform(0, 2 * np.pi, outliers), rng.uniform(30, 200, outliers)
        xy[wrong] += length[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        told = cov if believed is None else believed(cov)  # type: ignore[operator]
        initial = None
        if tracked:
            initial = truth.retract(rng.normal(size=6) * [0.01, 0.01, 0.02, 0.05, 0.05, 0.05])
        keypoints = Keypoints(xy, told, np.ones(len(xy)))
        outcome = solve_pnp(points, keypoints, camera, initial=initial)
        if isinstance(outcome, Rejection):
            rejections.append(outcome)
            continue
        truths.append(truth)
        solutions.append(outcome)
        if outliers:
            assert not outcome.inliers[wrong].any()
    return Outcomes(truths, solutions, rejections)


def assert_calibrated(outcomes: Outcomes) -> None:
    count = len(outcomes.solutions)
    assert len(outcomes.rejections) <= 0.005 * count + 1
    for part, index in PARTS.items():
        dof = index.stop - index.start
        square = outcomes.nees(part)
        low, high = nees_band(count, dof, 0.999)
        assert low < square.mean() < high, f"{part}: mean NEES {square.mean():.2f} outside {low:.2f}..{high:.2f}"
        # 3.3 binomial standard deviations.
        slack = 3.3 * np.sqrt(0.95 * 0.05 / count)
        assert abs(coverage(square, dof, 0.95) - 0.95) < slack, f"{part}: {coverage(square, dof, 0.95):.3f}"
    low, high = nees_band(count, 2 * len(outcomes.solutions[0].inliers) - 6, 0.9999)
    # The residuals obey their own law too; leaving out a keypoint in a hundred takes a little away.
    assert 0.97 * low < np.mean([s.chi2 for s in outcomes.solutions]) < high


@pytest.fixture(scope="module")
def correlated_solves() -> Outcomes:
    return simulate(13, 1000, correlated, camera=PLUMB_BOB, tracked=True)


def test_independent_noise_gives_calibrated_poses() -> None:
    assert_calibrated(simulate(11, 500, independent))


def test_anisotropic_noise_behind_a_distorting_lens_gives_calibrated_poses() -> None:
    assert_calibrated(simulate(12, 500, anisotropic, camera=RATIONAL, tracked=True))


def test_correlated_noise_gives_calibrated_poses(correlated_solves: Outcomes) -> None:
    assert_calibrated(correlated_solves)


def test_correlated_noise_without_a_start_gives_calibrated_poses() -> None:
    assert_calibrated(simulate(14, 200, correlated, camera=FISHEYE))


def test_a_ros_consumer_reads_the_covariance_right(correlated_solves: Outcomes) -> None:
    """PoseWithCovariance: position, quaternion, and a row-major 6x6 of x y z rotX rotY rotZ about fixed axes."""
    square, as_left_se3 = [], []
    for truth, solution in zip(correlated_solves.truths, correlated_solves.solutions, strict=True):
        position = solution.T_camera_object.translation
        orientation = Rotation.from_quat(solution.T_camera_object.quaternion())
        covariance = np.array(solution.cov.ravel().tolist()).reshape(6, 6)
        turn = (Rotation.from_quat(truth.quaternion()) * orientation.inv()).as_rotvec()
        delta = np.concatenate([truth.translation - position, turn])
        square.append(float(nees(delta, covariance)))
        # What a left SE(3) perturbation (rho, phi), dt = rho + phi x t, would have put into the message.
        M = np.eye(6)
        M[:3, 3:] = skew(position)
        as_left_se3.append(float(nees(delta, M @ covariance @ M.T)))
    low, high = nees_band(len(square), 6, 0.999)
    assert low < np.mean(square) < high
    assert abs(coverage(square, 6, 0.95) - 0.95) < 0.023
    assert np.mean(as_left_se3) > 20


def test_ignoring_a_common_shift_is_overconfident() -> None:
    """With 60 % of the variance shared, blocks alone cover too little; no pose is better than its shared error."""

    def shared(rng: np.random.Generator, xy: FloatArray) -> FloatArray:
        return np.asarray(
            np.kron(0.4 * np.eye(len(xy)) + 0.6 * np.ones((len(xy), len(xy))), 2.0 * np.eye(2)), dtype=np.float64
        )

    def blocks_only(cov: FloatArray) -> FloatArray:
        return np.diag(np.diag(cov))

    whole = simulate(15, 300, shared, tracked=True)
    assert_calibrated(whole)
    blocks = simulate(15, 300, shared, tracked=True, believed=blocks_only)
    assert blocks.nees().mean() > 9
    assert coverage(blocks.nees("xy"), 2, 0.95) < 0.7
    assert coverage(blocks.nees("rotation"), 3, 0.95) > 0.98


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("noise", [independent, correlated])
def test_thirty_percent_gross_outliers_are_found_and_left_out(noise: object, tracked: bool) -> None:
    outcomes = simulate(16, 50, noise, outliers=4, camera=PLUMB_BOB, tracked=tracked)
    assert not outcomes.rejections
    low, high = nees_band(50, 6, 0.9999)
    assert low < outcomes.nees().mean() < high
    assert np.mean([s.inliers.sum() for s in outcomes.solutions]) > 7.9


@pytest.mark.parametrize(
    ("points", "outliers"),
    [(BOX, 0), (BOX, 2), (OBJECT[:4], 0), (OBJECT[:5], 0), (OBJECT[:7], 2)],
    ids=["box", "box_2_wrong", "4", "5", "7_2_wrong"],
)
def test_box_corners_and_few_keypoints(points: FloatArray, outliers: int) -> None:
    outcomes = simulate(17, 120, lambda rng, xy: 0.3 * independent(rng, xy), points=points, outliers=outliers, far=0.8)
    assert len(outcomes.rejections) <= 2
    # Where two minima compete a pose says so; its covariance is that of one of them.
    clear = [s.ambiguity < 0.01 for s in outcomes.solutions]
    assert np.mean(clear) > 0.85
    low, high = nees_band(int(np.sum(clear)), 6, 0.9999)
    assert low < outcomes.nees()[clear].mean() < high


def test_the_ambiguity_of_a_plate_is_a_probability() -> None:
    """Of two minima with likelihoods 1 : a, the second is the truth with probability a / (1 + a)."""
    outcomes = simulate(18, 220, lambda rng, xy: 9.0 * np.eye(2 * len(xy)), points=PLATE)
    chance = np.array([s.ambiguity / (1 + s.ambiguity) for s in outcomes.solutions])
    mistaken = []
    for truth, solution in zip(outcomes.truths, outcomes.solutions, strict=True):
        first = np.linalg.norm(truth.minus(solution.T_camera_object)[3:])
        second = np.inf if solution.second is None else np.linalg.norm(truth.minus(solution.second)[3:])
        mistaken.append(bool(second < first))
    assert chance.sum() > 10
    assert abs(np.sum(mistaken) - chance.sum()) < 3.5 * np.sqrt(np.sum(chance * (1 - chance)))
    # Where it claims to be sure, it is.
    clear = chance < 0.002
    assert clear.sum() > 100
    low, high = nees_band(int(clear.sum()), 6, 0.9999)
    assert low < outcomes.nees()[clear].mean() < high


def test_both_poses_of_a_distant_plate_are_reported() -> None:
    truth = Pose(Rotation.from_euler("xyz", [0.5, 0.2, 0.1]).as_matrix(), np.array([0.05, 0.02, 6.0]))
    xy = PINHOLE.project(truth.transform(PLATE))
    solution = solve_pnp(PLATE, Keypoints(xy, np.eye(24), np.ones(12)), PINHOLE)
    assert isinstance(solution, PnpSolution)
    assert solution.ambiguity > 0.5 and solution.second is not None
    assert np.linalg.norm(solution.second.minus(solution.T_camera_object)[3:]) > 0.3
    # The same plate at arm's length is clear.
    truth = Pose(truth.rotation, np.array([0.02, 0.01, 0.3]))
    xy = PINHOLE.project(truth.transform(PLATE))
    solution = solve_pnp(PLATE, Keypoints(xy, np.eye(24), np.ones(12)), PINHOLE)
    assert isinstance(solution, PnpSolution) and solution.ambiguity < 1e-6


@pytest.mark.parametrize("camera", [PINHOLE, PLUMB_BOB, RATIONAL, FISHEYE])
@pytest.mark.parametrize("points", [OBJECT, BOX, PLATE], ids=["object", "box", "plate"])
def test_clean_keypoints_give_the_pose_exactly(camera: Camera, points: FloatArray) -> None:
    rng = np.random.default_rng(19)
    for _ in range(10):
        truth = some_pose(rng)
        xy = camera.project(truth.transform(points))
        solution = solve_pnp(points, Keypoints(xy, 0.01 * np.eye(2 * len(xy)), np.ones(len(xy))), camera)
        assert isinstance(solution, PnpSolution)
        assert np.abs(truth.minus(solution.T_camera_object)).max() < 1e-7
        assert solution.inliers.all() and solution.chi2 < 1e-6 and solution.dof == 2 * len(points) - 6


@pytest.mark.parametrize("camera", [PINHOLE, PLUMB_BOB, RATIONAL, FISHEYE])
def test_projection_jacobian_by_central_differences(camera: Camera) -> None:
    truth, h = some_pose(np.random.default_rng(20)), 1e-6
    _, jacobian = projection_jacobian(OBJECT, truth.rotation, truth.translation, camera)
    for axis in range(6):
        step = np.zeros(6)
        step[axis] = h
        ahead, behind = (camera.project(truth.retract(s * step).transform(OBJECT)) for s in (1, -1))
        assert np.abs(jacobian[:, :, axis] - (ahead - behind) / (2 * h)).max() < 1e-5


@pytest.mark.parametrize("camera", [PINHOLE, PLUMB_BOB, RATIONAL])
def test_opencvs_jacobian_is_ours_after_the_left_jacobian(camera: Camera) -> None:
    """cv2.projectPoints differentiates by (rvec, tvec); Exp(v + d) = Exp(J_l(v) d) Exp(v) turns rvec into dtheta."""
    truth = some_pose(np.random.default_rng(21))
    rvec = log_so3(truth.rotation)
    distortion = camera.distortion if len(camera.distortion) else np.zeros(5)
    theirs = np.asarray(cv2.projectPoints(OBJECT, rvec, truth.translation, K, distortion)[1])
    theirs = theirs.reshape(len(OBJECT), 2, -1)[:, :, :6]
    _, ours = projection_jacobian(OBJECT, truth.rotation, truth.translation, camera)
    assert np.abs(ours[:, :, :3] - theirs[:, :, 3:]).max() < 1e-6
    assert np.abs(ours[:, :, 3:] @ left_jacobian_so3(rvec) - theirs[:, :, :3]).max() < 1e-6
    # Without the conversion they are not the same thing.
    assert np.abs(ours[:, :, 3:] - theirs[:, :, :3]).max() > 1


def test_covariance_is_the_inverse_information_of_the_inliers() -> None:
    rng = np.random.default_rng(22)
    truth = some_pose(rng)
    xy = PLUMB_BOB.project(truth.transform(OBJECT))
    cov = correlated(rng, xy)
    xy[3] += 100
    solution = solve_pnp(OBJECT, Keypoints(xy, cov, np.ones(12)), PLUMB_BOB)
    assert isinstance(solution, PnpSolution)
    assert np.flatnonzero(~solution.inliers).tolist() == [3] and solution.dof == 16
    rows = np.repeat(solution.inliers, 2)
    T = solution.T_camera_object
    J = projection_jacobian(OBJECT, T.rotation, T.translation, PLUMB_BOB)[1].reshape(-1, 6)[rows]
    expected = np.linalg.inv(J.T @ np.linalg.inv(cov[np.ix_(rows, rows)]) @ J)
    assert solution.cov == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert solution.cov == pytest.approx(solution.cov.T, rel=1e-12)


def test_thresholds_are_in_sigmas_so_a_larger_image_changes_nothing() -> None:
    rng = np.random.default_rng(23)
    large = PLUMB_BOB.resized(2560, 1920)
    for _ in range(20):
        truth = some_pose(rng)
        xy = PLUMB_BOB.project(truth.transform(OBJECT))
        xy += rng.normal(size=xy.shape)
        xy[:2] += rng.uniform(-9, 9, (2, 2))
        a = solve_pnp(OBJECT, Keypoints(xy, np.eye(24), np.ones(12)), PLUMB_BOB)
        b = solve_pnp(OBJECT, Keypoints((xy + 0.5) * 4 - 0.5, 16 * np.eye(24), np.ones(12)), large)
        assert isinstance(a, PnpSolution) and isinstance(b, PnpSolution)
        assert np.array_equal(a.inliers, b.inliers)
        assert np.abs(a.T_camera_object.minus(b.T_camera_object)).max() < 1e-5
        assert a.cov == pytest.approx(b.cov, rel=1e-3, abs=1e-12)


def test_an_uncertain_keypoint_is_not_an_outlier() -> None:
    truth = some_pose(np.random.default_rng(24))
    xy = PINHOLE.project(truth.transform(OBJECT))
    xy[5] += [40, -30]
    cov = np.eye(24)
    cov[10:12, 10:12] *= 40.0**2
    solution = solve_pnp(OBJECT, Keypoints(xy, cov, np.ones(12)), PINHOLE)
    assert isinstance(solution, PnpSolution) and solution.inliers.all()
    assert np.abs(truth.minus(solution.T_camera_object)).max() < 5e-3


def test_the_answer_repeats_and_a_wrong_start_does_no_harm() -> None:
    rng = np.random.default_rng(25)
    truth = some_pose(rng)
    xy = PINHOLE.project(truth.transform(OBJECT)) + rng.normal(size=(12, 2))
    xy[:4] += rng.uniform(30, 90, (4, 2))
    keypoints = Keypoints(xy, np.eye(24), np.ones(12))
    plain, again = (solve_pnp(OBJECT, keypoints, PINHOLE) for _ in range(2))
    assert isinstance(plain, PnpSolution) and isinstance(again, PnpSolution)
    assert np.array_equal(plain.T_camera_object.matrix(), again.T_camera_object.matrix())
    for start in (some_pose(rng), Pose(np.eye(3), np.array([0, 0, -1.0])), Pose(np.eye(3), np.array([9.0, 0, 1e-3]))):
        started = solve_pnp(OBJECT, keypoints, PINHOLE, initial=start)
        assert isinstance(started, PnpSolution)
        assert np.array_equal(started.inliers, plain.inliers)
        assert np.abs(started.T_camera_object.minus(plain.T_camera_object)).max() < 1e-4


def clean_keypoints(camera: Camera = PINHOLE, points: FloatArray = OBJECT) -> tuple[Pose, Keypoints]:
    truth = some_pose(np.random.default_rng(26))
    xy = camera.project(truth.transform(points))
    return truth, Keypoints(xy, np.eye(2 * len(xy)), np.ones(len(xy)))


def reason_of(outcome: PnpSolution | Rejection) -> str:
    assert isinstance(outcome, Rejection) and outcome.detail.endswith(".")
    return outcome.reason


def test_unusable_keypoints_are_left_out() -> None:
    truth, keypoints = clean_keypoints()
    xy, cov = keypoints.xy.copy(), keypoints.cov.copy()
    xy[0] = np.nan
    xy[1, 1] = np.inf
    cov[4, 4] = -1
    cov[6, 7] = cov[7, 6] = 2.0
    cov[8:10, :] = cov[:, 8:10] = np.nan
    solution = solve_pnp(OBJECT, replace(keypoints, xy=xy, cov=cov), PINHOLE)
    assert isinstance(solution, PnpSolution)
    assert np.flatnonzero(~solution.inliers).tolist() == [0, 1, 2, 3, 4]
    assert solution.dof == 8
    assert np.abs(truth.minus(solution.T_camera_object)).max() < 1e-6
    xy[:9] = np.nan
    outcome = solve_pnp(OBJECT, replace(keypoints, xy=xy), PINHOLE)
    assert reason_of(outcome) == RejectReason.TOO_FEW_KEYPOINTS
    assert isinstance(outcome, Rejection) and outcome.keypoints is not None


def test_a_covariance_that_is_none_is_rejected_and_lengths_must_match() -> None:
    _, keypoints = clean_keypoints()
    cov = keypoints.cov.copy()
    # Each block is fine, together they are not: a correlation of -0.9 among three.
    for i, j in ((0, 2), (0, 4), (2, 4)):
        cov[i, j] = cov[j, i] = -0.9
    assert reason_of(solve_pnp(OBJECT, replace(keypoints, cov=cov), PINHOLE)) == RejectReason.INVALID_KEYPOINTS
    with pytest.raises(ValueError, match="^keypoints_3d"):
        solve_pnp(OBJECT[:5], keypoints, PINHOLE)


def test_collinear_and_coinciding_keypoints_are_rejected() -> None:
    line = np.outer(np.linspace(-0.1, 0.1, 8), [1.0, 0.5, 0.2])
    for points in (line, np.zeros((8, 3))):
        truth, keypoints = clean_keypoints(points=points)
        for start in (None, truth):
            assert reason_of(solve_pnp(points, keypoints, PINHOLE, initial=start)) == RejectReason.DEGENERATE


def test_keypoints_near_a_line_are_degenerate_by_their_information() -> None:
    line = np.outer(np.linspace(-0.1, 0.1, 8), [1.0, 0.5, 0.2])
    almost = line + np.random.default_rng(30).normal(size=line.shape) * 1e-6
    truth, keypoints = clean_keypoints(points=almost)
    assert reason_of(solve_pnp(almost, keypoints, PINHOLE, initial=truth)) == RejectReason.DEGENERATE


def test_residuals_larger_than_sigma_allows_are_inconsistent() -> None:
    rng = np.random.default_rng(27)
    _, keypoints = clean_keypoints()
    noisy = replace(keypoints, xy=keypoints.xy + 2.2 * rng.normal(size=(12, 2)))
    lenient = PnpOptions(inlier_level=1 - 1e-12, gate_p_value=0)
    solution = solve_pnp(OBJECT, noisy, PINHOLE, lenient)
    assert isinstance(solution, PnpSolution) and solution.inliers.all()
    strict = replace(lenient, gate_p_value=1e-4)
    outcome = solve_pnp(OBJECT, noisy, PINHOLE, strict)
    assert reason_of(outcome) == RejectReason.INCONSISTENT


def test_keypoints_that_agree_on_nothing_give_no_pose() -> None:
    rng = np.random.default_rng(28)
    reasons = set()
    for _ in range(20):
        keypoints = Keypoints(rng.uniform([0, 0], [640, 480], (12, 2)), np.eye(24), np.ones(12))
        outcome = solve_pnp(OBJECT, keypoints, PINHOLE, PnpOptions(min_inlier_fraction=0.5))
        reasons.add(reason_of(outcome))
    assert RejectReason.TOO_FEW_KEYPOINTS in reasons


def test_an_object_partly_behind_the_camera_is_rejected() -> None:
    """Six corners of a long box in front are seen; the two that would be behind the camera are not."""
    box = box_corners([[-0.1, -0.1, -1.0], [0.1, 0.1, 1.0]])
    points = np.concatenate([box[box[:, 2] > 0], [[0.05, 0, 0.6], [0, -0.08, 0.8]], box[box[:, 2] < 0][:2]])
    truth = Pose(np.eye(3), np.array([0.0, 0.0, 0.3]))
    xy = PINHOLE.project(truth.transform(points))
    assert np.isnan(xy[6:]).all() and np.isfinite(xy[:6]).all()
    outcome = solve_pnp(points, Keypoints(xy, np.eye(16), np.ones(8)), PINHOLE)
    assert reason_of(outcome) == RejectReason.BEHIND_CAMERA
    in_front = solve_pnp(points[:6], Keypoints(xy[:6], np.eye(12), np.ones(6)), PINHOLE)
    assert isinstance(in_front, PnpSolution)


def test_no_data_raise() -> None:
    rng = np.random.default_rng(29)
    values = np.array([0.0, 1.0, -1.0, 1e-200, 1e200, np.nan, np.inf, 320.0])
    for trial in range(150):
        xy = rng.choice(values, (6, 2)) if trial % 2 else rng.uniform(-1e5, 1e5, (6, 2))
        A = rng.normal(size=(12, 12)) * rng.choice([1e-150, 1e-3, 1.0, 1e80])
        cov = A @ A.T if trial % 3 else rng.choice(values, (12, 12))
        points = rng.normal(size=(6, 3)) * rng.choice([0.0, 1e-9, 0.1, 1e6])
        camera = (PINHOLE, PLUMB_BOB, RATIONAL, FISHEYE)[trial % 4]
        outcome = solve_pnp(points, Keypoints(xy, cov, np.ones(6)), camera, initial=some_pose(rng))
        if isinstance(outcome, PnpSolution):
            assert np.isfinite(outcome.cov).all() and np.linalg.eigvalsh(outcome.cov)[0] > -1e-9 * outcome.cov.max()


@pytest.mark.parametrize(
    "change",
    [
        {"inlier_level": 1.0},
        {"inlier_level": 0.0},
        {"min_inliers": 3},
        {"min_inlier_fraction": 1.5},
        {"gate_p_value": 1.0},
        {"max_iterations": 0},
        {"max_condition": 0.5},
        {"seed": -1},
    ],
)
def test_options_out_of_range_are_refused_by_name(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        PnpOptions(**change)  # type: ignore[arg-type]
