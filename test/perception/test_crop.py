# SPDX-License-Identifier: Apache-2.0
"""Crops: the pixel-centre convention, on coordinates and on image content."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from ukd_ros.perception.crop import BORDER_GREY, Crop, letterbox, square_crop

Array = npt.NDArray[np.float64]


def _dot(width: int, height: int, x: float, y: float, sigma: float) -> npt.NDArray[np.uint8]:
    v, u = np.mgrid[0:height, 0:width]
    bump = 200.0 * np.exp(-0.5 * ((u - x) ** 2 + (v - y) ** 2) / sigma**2)
    return np.repeat(np.rint(bump).astype(np.uint8)[..., None], 3, axis=2)


def _centroid(image: npt.NDArray[np.uint8], near: Array, radius: float) -> Array:
    weight = image[..., 0].astype(np.float64)
    v, u = np.mgrid[0 : weight.shape[0], 0 : weight.shape[1]]
    weight[(weight < 4) | (np.hypot(u - near[0], v - near[1]) > radius)] = 0.0
    return np.asarray(np.array([(u * weight).sum(), (v * weight).sum()]) / weight.sum())


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.8, 1.0, 2.0])
def test_letterbox_is_the_pixel_centre_resize(scale: float) -> None:
    crop = letterbox((640, 480), (int(640 * scale), int(480 * scale)))
    points = np.array([[0.0, 0.0], [639.0, 479.0], [100.25, 33.5]])
    np.testing.assert_allclose(crop.to_crop(points), (points + 0.5) * scale - 0.5, atol=1e-9)


def test_letterbox_centres_another_aspect_ratio() -> None:
    crop = letterbox((1280, 720), (640, 480))
    np.testing.assert_allclose(crop.to_crop([639.5, 359.5]), [319.5, 239.5])
    np.testing.assert_allclose(crop.to_crop([-0.5, -0.5]), [-0.5, 59.5])


def test_points_and_covariances_make_the_round_trip() -> None:
    rng = np.random.default_rng(7)
    angle = 0.4
    linear = 0.7 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    crop = Crop(np.column_stack([linear, [3.0, -8.0]]), (128, 96))
    points = rng.normal(size=(20, 2)) * 100.0
    np.testing.assert_allclose(crop.to_source(crop.to_crop(points)), points, atol=1e-9)
    factor = rng.normal(size=(8, 8))
    cov_source = factor @ factor.T
    jacobian = np.kron(np.eye(4), linear)
    np.testing.assert_allclose(crop.cov_to_source(jacobian @ cov_source @ jacobian.T), cov_source, atol=1e-9)
    blocks = np.stack([cov_source[i : i + 2, i : i + 2] for i in (0, 2, 4, 6)])
    np.testing.assert_allclose(crop.cov_to_source(linear @ blocks @ linear.T), blocks, atol=1e-9)
    with pytest.raises(ValueError, match="2K"):
        crop.cov_to_source(np.eye(3))


def test_square_crop_covers_exactly_its_square() -> None:
    crop = square_crop([100.0, 50.0], 64.0, 128)
    np.testing.assert_allclose(crop.to_source([-0.5, -0.5]), [68.0, 18.0])
    np.testing.assert_allclose(crop.to_source([127.5, 127.5]), [132.0, 82.0])
    assert crop.scale == pytest.approx(2.0)


@pytest.mark.parametrize("side", [60.0, 128.0, 150.0, 190.0, 256.0, 300.0, 333.0, 471.0])
def test_a_bright_dot_lands_where_the_matrix_says(side: float) -> None:
    rng = np.random.default_rng(int(side))
    for _ in range(6):
        x, y = rng.uniform([270.0, 220.0], [370.0, 260.0])
        sigma = max(2.0, side / 60.0)
        crop = square_crop([x, y] + rng.uniform(-0.2, 0.2, 2) * side, side, 128)
        expected = crop.to_crop([x, y])
        image = crop.warp(_dot(640, 480, x, y, sigma))
        np.testing.assert_allclose(_centroid(image, expected, 4.5 * sigma * crop.scale + 2), expected, atol=0.1)


@pytest.mark.parametrize("camera_size", [(640, 480), (1280, 720), (1920, 1080), (801, 603), (320, 240)])
def test_a_dot_survives_the_letterbox(camera_size: tuple[int, int]) -> None:
    x, y = 0.61 * camera_size[0], 0.37 * camera_size[1]
    crop = letterbox(camera_size, (640, 480))
    image = crop.warp(_dot(*camera_size, x, y, sigma=4.0 / crop.scale))
    assert image.shape == (480, 640, 3)
    expected = crop.to_crop([x, y])
    np.testing.assert_allclose(_centroid(image, expected, 20.0), expected, atol=0.1)


@pytest.mark.parametrize("side", [230.0, 256.0, 310.0, 384.0, 640.0])
def test_shrinking_does_not_alias(side: float) -> None:
    """One-pixel black and white stripes are beyond the crop's resolution: they must turn grey, not into moire."""
    image = np.zeros((480, 640, 3), np.uint8)
    image[:, ::2] = 255
    crop = square_crop([320.0, 240.0], side, 128)
    warped = crop.warp(image)
    rows = np.abs(crop.to_source(np.column_stack([np.zeros(128), np.arange(128.0)]))[:, 1] - 239.5) < 200
    inner = warped[rows][:, 20:108].astype(float)
    assert inner.std() < 30.0  # nearest or plain bilinear sampling gives 40 to 128
    assert inner.mean() == pytest.approx(127.5, abs=4.0)


def test_outside_is_grey_and_identity_is_exact() -> None:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(letterbox((64, 48), (64, 48)).warp(image), image)
    np.testing.assert_array_equal(square_crop([23.5, 23.5], 48.0, 48).warp(image), image[:, :48])
    far = square_crop([1000.0, 1000.0], 300.0, 32).warp(image)
    assert (far == BORDER_GREY).all()
    half = square_crop([0.0, 24.0], 40.0, 40).warp(image)
    assert (half[:, :18] == BORDER_GREY).all()


def test_bad_crops_are_refused() -> None:
    with pytest.raises(ValueError, match="invertible"):
        Crop(np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), (8, 8))
    with pytest.raises(ValueError, match="finite"):
        square_crop([np.nan, 0.0], 10.0, 8)
    with pytest.raises(ValueError, match="positive"):
        square_crop([0.0, 0.0], 0.0, 8)
    with pytest.raises(ValueError, match="positive"):
        letterbox((0, 480), (64, 64))
    with pytest.raises(ValueError, match="shape"):
        square_crop([0.0, 0.0], 4.0, 8).warp(np.zeros((0, 3, 3), np.uint8))
