# SPDX-License-Identifier: Apache-2.0
"""Photographs and calibration files from disk."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from ukd_ros.config import ConfigError
from ukd_ros.perception.images import CameraInfoError, ImageError
from ukd_ros.perception.photograph import pinhole_camera, read_camera, read_view

CALIBRATION = {
    "image_width": 64,
    "image_height": 48,
    "camera_name": "narrow",
    "camera_matrix": {"rows": 3, "cols": 3, "data": [60.0, 0, 31, 0, 61.0, 23, 0, 0, 1]},
    "distortion_model": "plumb_bob",
    "distortion_coefficients": {"rows": 1, "cols": 5, "data": [0.1, -0.2, 0.001, 0.002, 0.0]},
    "projection_matrix": {"rows": 3, "cols": 4, "data": [58.0, 0, 30, 0, 0, 59.0, 22, 0, 0, 0, 1, 0]},
}


def write(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({key: value for key, value in {**CALIBRATION, **changes}.items() if value != "-"}))
    return path


def test_a_calibration_file_is_read_raw_and_rectified(tmp_path: Path) -> None:
    raw = read_camera(write(tmp_path / "c.yaml"))
    assert (raw.width, raw.height) == (64, 48)
    np.testing.assert_array_equal(raw.matrix, [[60.0, 0, 31], [0, 61.0, 23], [0, 0, 1]])
    np.testing.assert_array_equal(raw.distortion[:5], [0.1, -0.2, 0.001, 0.002, 0.0])
    rectified = read_camera(tmp_path / "c.yaml", rectified=True)
    np.testing.assert_array_equal(rectified.matrix, [[58.0, 0, 30], [0, 59.0, 22], [0, 0, 1]])
    assert not np.any(rectified.distortion)
    assert read_camera(write(tmp_path / "c.yaml", projection_matrix="-")).width == 64, "P is not needed for raw images"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"image_width": "-"}, "image_width"),
        ({"camera_matrix": "-"}, "camera_matrix"),
        ({"camera_matrix": {"data": [1, 2, "x"]}}, "camera_matrix"),
        ({"camera_matrix": {"data": [0.0] * 9}}, "calibrated"),
        ({"camera_matrix": {"data": [1.0] * 4}}, "K"),
        ({"distortion_model": "fish"}, "fish"),
    ],
)
def test_a_wrong_calibration_file_is_named_with_its_key(changes: dict[str, object], key: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", **changes)
    with pytest.raises(CameraInfoError) as caught:
        read_camera(path)
    assert str(path) in str(caught.value) and key in str(caught.value)


def test_a_file_that_is_no_yaml_or_absent_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    for name in ("list.yaml", "absent.yaml"):
        with pytest.raises(ConfigError, match=name):
            read_camera(tmp_path / name)


def test_a_photograph_is_read_as_rgb_and_must_fit_the_camera(tmp_path: Path) -> None:
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, :, 0] = 200  # blue, as OpenCV orders it
    cv2.imwrite(str(tmp_path / "blue.png"), image)
    camera = pinhole_camera(tmp_path / "blue.png", 60.0)
    np.testing.assert_array_equal(camera.matrix, [[60, 0, 31.5], [0, 60, 23.5], [0, 0, 1]])
    np.testing.assert_array_equal(read_view(tmp_path / "blue.png", camera).image[0, 0], [0, 0, 200])
    with pytest.raises(ImageError, match="32x24"):
        read_view(tmp_path / "blue.png", camera.resized(32, 24))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.png", "empty.png", "absent.png"):
        with pytest.raises(ImageError, match=name):
            read_view(tmp_path / name, camera)
