# SPDX-License-Identifier: Apache-2.0
"""One photograph on disk becomes poses, a picture of them and a JSON file: the estimator without a robot."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.config import read_mapping
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.view import View
from ukd_ros.perception.estimator import FrameResult, PoseEstimator
from ukd_ros.perception.images import CameraInfoError, ImageError, camera_from_message
from ukd_ros.perception.overlay import draw_overlay


def read_camera(path: str | Path, rectified: bool = False) -> Camera:
    """Read the YAML file that ROS' camera_calibration writes; `rectified` as in `camera_from_message`.

    ConfigError when it is no YAML mapping, CameraInfoError that names the file and the key when it is not such a file.
    """
    values = read_mapping(path)

    def numbers(key: str, needed: bool = True) -> list[float]:
        entry = values.get(key)
        data = entry.get("data") if isinstance(entry, Mapping) else None
        if data is None and not needed:
            return []
        if not isinstance(data, list) or not all(isinstance(x, (int, float)) for x in data):
            raise CameraInfoError(f"{path}: {key}: a mapping with a list of numbers called data is expected.")
        return [float(x) for x in data]

    for key in ("image_width", "image_height"):
        if not isinstance(values.get(key), int):
            raise CameraInfoError(f"{path}: {key}: an integer (px) is expected.")
    info = SimpleNamespace(
        width=values["image_width"],
        height=values["image_height"],
        k=numbers("camera_matrix"),
        p=numbers("projection_matrix", rectified),
        d=numbers("distortion_coefficients", False),
        distortion_model=str(values.get("distortion_model", "")),
        binning_x=0,
        binning_y=0,
        roi=SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0, do_rectify=False),
    )
    try:
        return camera_from_message(info, rectified)
    except CameraInfoError as error:
        raise CameraInfoError(f"{path}: {error}") from error


def pinhole_camera(
    path: str | Path, fx: float, fy: float | None = None, cx: float | None = None, cy: float | None = None
) -> Camera:
    """Return a camera without distortion for the image file `path`: fy as fx, and its middle, where not given (px)."""
    height, width = _read_image(path).shape[:2]
    fy = fx if fy is None else fy
    cx, cy = (width - 1) / 2 if cx is None else cx, (height - 1) / 2 if cy is None else cy
    return Camera(width, height, np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]))


def read_view(path: str | Path, camera: Camera) -> View:
    """Read an image file taken with `camera`; ImageError when it cannot be read or has another size."""
    image = _read_image(path)
    height, width = image.shape[:2]
    if (width, height) != (camera.width, camera.height):
        raise ImageError(
            f"{path}: is {width}x{height} px, but the camera is {camera.width}x{camera.height}. Give the calibration "
            "of this image's own resolution."
        )
    return View(image, camera)


def _read_image(path: str | Path) -> npt.NDArray[np.uint8]:
    try:
        data = np.frombuffer(Path(path).read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error}).") from error
    # a file's orientation flag is ignored: it turns the picture for people, and the camera's matrix with it
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(data, flags) if data.size else None
    if image is None:
        raise ImageError(f"{path}: is not an image that OpenCV can decode.")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def result_data(result: FrameResult) -> dict[str, Any]:
    """Return the answer as plain data for JSON: m, rad, px; quaternions xyzw; cov over (x y z rotX rotY rotZ)."""
    estimates = [
        {
            "object": estimate.object_name,
            "instance": estimate.instance,
            "score": float(estimate.score),
            "position_m": estimate.T_camera_object.translation.tolist(),
            "quaternion_xyzw": estimate.T_camera_object.quaternion().tolist(),
            "covariance": estimate.cov.tolist(),
            "keypoints_px": estimate.keypoints.xy.tolist(),
            "keypoint_sigma_px": estimate.keypoints.sigma().tolist(),
            "inliers": estimate.inliers.tolist(),
        }
        for estimate in result.estimates
    ]
    rejections = [
        {"object": rejection.object_name, "reason": rejection.reason.value, "detail": rejection.detail}
        for rejection in result.rejections
    ]
    return {"estimates": estimates, "rejections": rejections, "timings_ms": dict(result.timings_ms)}


def infer_photograph(
    estimator: PoseEstimator, models: Mapping[str, ObjectModel], view: View, out: str | Path, stem: str
) -> FrameResult:
    """Estimate the poses in one view and write `stem`.json and `stem`.png (the overlay) into the folder `out`.

    Both files appear by rename. OSError when `out` cannot be written.
    """
    estimator.reset()
    result = estimator.estimate(view)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw_overlay(view, result.estimates, result.rejections, models)
    encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
    text = json.dumps(result_data(result), indent=2) + "\n"
    for name, data in ((f"{stem}.png", encoded), (f"{stem}.json", text.encode())):
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_bytes(data)
        os.replace(temporary, folder / name)
    return result
