# SPDX-License-Identifier: Apache-2.0
"""Every lens model against OpenCV, its Jacobians by central differences, its inverse, and where it ends."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.camera import Camera, DistortionModel
from ukd_ros.geometry.pose import exp_so3

K = np.array([[600.0, 0.0, 311.0], [0.0, 620.0, 247.0], [0.0, 0.0, 1.0]])
SKEWED = K + np.array([[0, 1.5, 0], [0, 0, 0], [0, 0, 0]])

LENSES: dict[str, tuple[DistortionModel, list[float]]] = {
    "none": (DistortionModel.NONE, []),
    "plumb_bob_4": (DistortionModel.PLUMB_BOB, [-0.3, 0.1, 0.001, -0.002]),
    "plumb_bob_5": (DistortionModel.PLUMB_BOB, [-0.28, 0.12, -0.0015, 0.001, -0.02]),
    "pincushion": (DistortionModel.PLUMB_BOB, [0.25, 0.05, 0.001, 0.002, 0.01]),
    "plumb_bob_zeros": (DistortionModel.PLUMB_BOB, [0.0] * 5),
    "rational": (DistortionModel.RATIONAL_POLYNOMIAL, [0.4, -0.3, 0.001, -0.0007, 0.05, 0.7, -0.2, 0.02]),
    "equidistant": (DistortionModel.EQUIDISTANT, [-0.02, 0.01, -0.004, 0.0005]),
    "equidistant_zeros": (DistortionModel.EQUIDISTANT, [0.0] * 4),
}


def camera_of(name: str, matrix: FloatArray = K) -> Camera:
    model, distortion = LENSES[name]
    return Camera(640, 480, matrix, model, np.array(distortion))


def points(seed: int, count: int = 50) -> FloatArray:
    rng = np.random.default_rng(seed)
    z = rng.uniform(0.3, 2.0, count)
    return np.stack([rng.uniform(-0.5, 0.5, count) * z, rng.uniform(-0.38, 0.38, count) * z, z], axis=1)


def differences(function: Callable[[FloatArray], FloatArray], at: FloatArray, h: float) -> FloatArray:
    """Return [N, 2, d], central differences of a map of rows."""
    columns = []
    for axis in range(at.shape[1]):
        step = np.zeros(at.shape[1])
        step[axis] = h
        columns.append((function(at + step) - function(at - step)) / (2 * h))
    return np.stack(columns, axis=2)


def by_opencv(camera: Camera, X: FloatArray) -> FloatArray:
    zero = np.zeros(3)
    if camera.distortion_model is DistortionModel.EQUIDISTANT:
        out = cv2.fisheye.projectPoints(X[:, None], zero, zero, camera.matrix, camera.distortion)[0]
    else:
        distortion = camera.distortion if len(camera.distortion) else np.zeros(5)
        out = cv2.projectPoints(X, zero, zero, camera.matrix, distortion)[0]
    return np.asarray(out, dtype=np.float64).reshape(-1, 2)


@pytest.mark.parametrize("name", LENSES)
def test_projects_as_opencv_does(name: str) -> None:
    X = points(1)
    X = np.concatenate([X, [[0.0, 0.0, 1.0], [1e-9, 0.0, 1.0]]])
    camera = camera_of(name)
    assert np.abs(camera.project(X) - by_opencv(camera, X)).max() < 1e-9


@pytest.mark.parametrize("name", LENSES)
def test_projection_jacobian_by_central_differences(name: str) -> None:
    X = np.concatenate([points(2), [[0.0, 0.0, 1.0]]])
    camera = camera_of(name, SKEWED)
    xy, jacobian = camera.project_with_jacobian(X)
    assert np.array_equal(xy, camera.project(X))
    assert np.abs(jacobian - differences(camera.project, X, 1e-6)).max() < 1e-5


@pytest.mark.parametrize("name", [name for name in LENSES if not name.startswith("equidistant")])
def test_projection_jacobian_as_opencv_has_it(name: str) -> None:
    X, t = points(3), np.array([0.01, -0.02, 0.1])
    camera = camera_of(name)
    distortion = camera.distortion if len(camera.distortion) else np.zeros(5)
    theirs = np.asarray(cv2.projectPoints(X, np.zeros(3), t, camera.matrix, distortion)[1])
    ours = camera.project_with_jacobian(X + t)[1]
    assert np.abs(ours - theirs.reshape(-1, 2, theirs.shape[1])[:, :, 3:6]).max() < 1e-8


@pytest.mark.parametrize("name", LENSES)
def test_undistort_is_the_inverse_and_so_is_its_jacobian(name: str) -> None:
    camera = camera_of(name, SKEWED)
    u, v = np.meshgrid(np.linspace(0, 639, 15), np.linspace(0, 479, 12))
    xy = np.stack([u.ravel(), v.ravel()], axis=1)
    ideal, jacobian = camera.undistort_with_jacobian(xy)
    assert np.isfinite(ideal).all()
    assert np.array_equal(ideal, camera.undistort(xy))
    rays = camera.rays(xy)
    assert np.all(rays[:, 2] == 1)
    assert np.abs(camera.project(rays) - xy).max() < 1e-8
    assert np.abs(camera.pinhole().project(rays) - ideal).max() < 1e-9
    inner = xy[(np.abs(xy - [320, 240]) < [310, 230]).all(axis=1)]
    numeric = differences(camera.undistort, inner, 1e-3)
    assert np.abs(camera.undistort_with_jacobian(inner)[1] - numeric).max() < 1e-5


def test_behind_near_and_nan_are_nan_in_values_and_jacobians() -> None:
    bad = np.array([[0.1, 0.1, -1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1e-7], [np.nan, 0.0, 1.0], [0.0, 0.0, np.nan]])
    for name in LENSES:
        xy, jacobian = camera_of(name).project_with_jacobian(np.concatenate([bad, [[0.0, 0.0, 1.0]]]))
        assert np.isnan(xy[:3]).all() and np.isnan(jacobian[:3]).all(), name
        assert np.isnan(xy[3:5]).any(axis=1).all(), name
        assert np.isfinite(xy[5]).all() and np.isfinite(jacobian[5]).all(), name


@pytest.mark.parametrize(
    ("model", "distortion", "limit"),
    [
        # r (1 - 0.3 r^2) grows until 0.9 r^2 = 1.
        (DistortionModel.PLUMB_BOB, [-0.3, 0, 0, 0, 0], np.sqrt(1 / 0.9)),
        # r / (1 + 0.5 r^2) grows until 0.5 r^2 = 1.
        (DistortionModel.RATIONAL_POLYNOMIAL, [0, 0, 0, 0, 0, 0.5, 0, 0], np.sqrt(2)),
        # theta (1 - 0.4 theta^2) grows until 1.2 theta^2 = 1.
        (DistortionModel.EQUIDISTANT, [-0.4, 0, 0, 0], np.tan(np.sqrt(1 / 1.2))),
    ],
)
def test_points_beyond_the_fold_do_not_return_into_the_image(
    model: DistortionModel, distortion: list[float], limit: float
) -> None:
    camera = Camera(640, 480, K, model, np.array(distortion))
    directions = exp_so3(np.stack([np.zeros(8), np.zeros(8), np.linspace(0, 6, 8)], axis=1))[:, :2, 0]
    for radius, seen in ((0.999 * limit, True), (1.001 * limit, False), (3 * limit, False), (1e9, False)):
        X = np.concatenate([radius * directions, np.ones((8, 1))], axis=1)
        xy, jacobian = camera.project_with_jacobian(X)
        assert np.isfinite(xy).all() == seen and np.isfinite(jacobian).all() == seen
        if seen:
            assert np.abs(camera.rays(xy)[:, :2] - X[:, :2]).max() < 1e-6
        else:
            assert np.isnan(xy).all()
    # What no point in front of the camera can reach has no ideal pixel either.
    edge = camera.project(np.array([[0.9999999 * limit, 0, 1.0]]))[0, 0]
    ideal, jacobian = camera.undistort_with_jacobian(np.array([[edge + 5, K[1, 2]]]))
    assert np.isnan(ideal).all() and np.isnan(jacobian).all()


def test_tangential_terms_fold_too() -> None:
    camera = Camera(640, 480, K, DistortionModel.PLUMB_BOB, np.array([0.0, 0.0, 0.0, 0.5]))
    # Along -x: x_d = x + 1.5 x^2 turns back at x = -1/3.
    xy = camera.project(np.array([[-0.33, 0.0, 1.0], [-0.34, 0.0, 1.0]]))
    assert np.isfinite(xy[0]).all() and np.isnan(xy[1]).all()


@pytest.mark.parametrize("name", LENSES)
def test_resized_camera_keeps_pixel_areas(name: str) -> None:
    """A pixel is an area: the point at a fraction of the image, edges included, stays at that fraction."""
    camera, X = camera_of(name, SKEWED), points(4)
    small = camera.resized(320, 120)
    assert (small.width, small.height) == (320, 120)
    expected = (camera.project(X) + 0.5) * [0.5, 0.25] - 0.5
    assert np.abs(small.project(X) - expected).max() < 1e-10


@pytest.mark.parametrize("name", LENSES)
def test_cropped_camera_shifts_pixels(name: str) -> None:
    camera, X = camera_of(name), points(5)
    window = camera.cropped(-10, 30, 200, 100)
    assert (window.width, window.height) == (200, 100)
    assert np.abs(window.project(X) - (camera.project(X) - [-10, 30])).max() < 1e-10


def test_warped_matrix_projects_to_warped_pixels() -> None:
    camera, X = camera_of("none"), points(6)
    A = np.array([[0.5, 0.2, 3.0], [-0.2, 0.5, -7.0]])
    image = X @ camera.warped(A).T
    expected = camera.project(X) @ A[:, :2].T + A[:, 2]
    assert np.abs(image[:, :2] / image[:, 2:] - expected).max() < 1e-10


def test_zero_coefficients_of_perspective_models_are_no_distortion() -> None:
    for model, count in ((DistortionModel.PLUMB_BOB, 5), (DistortionModel.RATIONAL_POLYNOMIAL, 8)):
        assert not Camera(640, 480, K, model, np.zeros(count)).distorted
        assert not Camera(640, 480, K, model, np.zeros(0)).distorted
    assert Camera(640, 480, K, DistortionModel.EQUIDISTANT, np.zeros(4)).distorted


def test_long_coefficient_lists_are_read_only_when_the_rest_is_zero() -> None:
    eight = LENSES["rational"][1]
    padded = Camera(640, 480, K, DistortionModel.RATIONAL_POLYNOMIAL, np.array(eight + [0.0] * 6))
    X = points(7)
    assert np.array_equal(padded.project(X), camera_of("rational").project(X))
    with pytest.raises(ValueError, match="thin-prism and tilt"):
        Camera(640, 480, K, DistortionModel.RATIONAL_POLYNOMIAL, np.array(eight + [1e-3] + [0.0] * 3))
    with pytest.raises(ValueError, match="not supported"):
        Camera(640, 480, K, DistortionModel.PLUMB_BOB, np.array(eight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "^width"),
        ({"height": 1.5}, "^height"),
        ({"matrix": np.zeros((3, 3))}, "not calibrated"),
        ({"matrix": K.T}, "upper triangular"),
        ({"matrix": K * np.nan}, "^matrix"),
        ({"distortion_model": "kannala"}, "kannala"),
        ({"distortion_model": "plumb_bob", "distortion": np.ones(3)}, "needs 5"),
        ({"distortion_model": "equidistant", "distortion": np.zeros(0)}, "needs 4"),
        ({"distortion": np.ones(4)}, "^distortion"),
    ],
)
def test_what_is_no_camera_is_refused_by_name(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"width": 640, "height": 480, "matrix": K} | change
    with pytest.raises(ValueError, match=message):
        Camera(**arguments)  # type: ignore[arg-type]
