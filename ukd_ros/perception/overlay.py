# SPDX-License-Identifier: Apache-2.0
"""An estimate drawn into its image: axes, keypoints with their 2-sigma ellipses, and a label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.estimate import PoseEstimate, Rejection
from ukd_ros.geometry.keypoints import Keypoints
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.view import View

Image = npt.NDArray[np.uint8]
Color = tuple[int, int, int]

AXIS_COLORS: tuple[Color, Color, Color] = ((230, 40, 40), (40, 190, 50), (50, 90, 245))
INLIER: Color = (255, 205, 30)
OUTLIER: Color = (255, 90, 200)
ELLIPSE_SIGMAS = 2.0
MAX_COORDINATE_PX = 1e5
"""OpenCV draws with 32-bit integers: whatever projects beyond is left out."""


def _pixel(xy: npt.NDArray[np.float64]) -> tuple[int, int] | None:
    if not np.all(np.isfinite(xy)) or np.abs(xy).max() > MAX_COORDINATE_PX:
        return None
    return round(float(xy[0])), round(float(xy[1]))


def draw_ellipse(image: Image, center: npt.NDArray[np.float64], cov: npt.NDArray[np.float64], color: Color) -> None:
    """Draw the ``ELLIPSE_SIGMAS`` ellipse of ``cov`` [2, 2] px^2 around ``center`` [2] px; nothing when not finite."""
    pixel = _pixel(center)
    if pixel is None or not np.all(np.isfinite(cov)):
        return
    variances, axes = np.linalg.eigh(cov)
    halves = ELLIPSE_SIGMAS * np.sqrt(np.maximum(variances, 0.0))
    if halves.max() > max(image.shape):
        return
    angle_deg = float(np.degrees(np.arctan2(axes[1, 1], axes[0, 1])))
    size = (max(round(float(halves[1])), 1), max(round(float(halves[0])), 1))
    cv2.ellipse(image, pixel, size, angle_deg, 0.0, 360.0, color, 1, cv2.LINE_AA)


def draw_keypoints(image: Image, keypoints: Keypoints, inliers: npt.NDArray[np.bool_] | None) -> None:
    """Draw every measured keypoint with its ellipse, outliers (or all, without a pose) in another colour."""
    blocks = keypoints.blocks()
    for k, xy in enumerate(keypoints.xy):
        pixel = _pixel(xy)
        if pixel is None:
            continue
        color = INLIER if inliers is not None and inliers[k] else OUTLIER
        cv2.circle(image, pixel, 2, color, -1, cv2.LINE_AA)
        draw_ellipse(image, xy, blocks[k], color)


def draw_axes(image: Image, view: View, estimate: PoseEstimate, length: float) -> None:
    """Draw the object's x y z axes, ``length`` m long, in red, green and blue through the camera's own lens model."""
    tips = np.vstack([np.zeros(3), length * np.eye(3)])
    xy = view.camera.project(estimate.T_camera_object.transform(tips))
    origin = _pixel(xy[0])
    for tip_xy, color in zip(xy[1:], AXIS_COLORS, strict=True):
        tip = _pixel(tip_xy)
        if origin is not None and tip is not None:
            cv2.line(image, origin, tip, color, 2, cv2.LINE_AA)


def draw_text(image: Image, text: str, line: int) -> None:
    """Write ``text`` into the ``line``-th line from the top, readable on any background."""
    at = (6, 18 + 18 * line)
    # A dark bar, not an outline: OpenCV 5 spaces thick letters more widely than thin ones.
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
    cv2.rectangle(image, (at[0] - 3, at[1] - height - 3), (at[0] + width + 3, at[1] + below), (30, 32, 38), -1)
    cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA)


def label(estimate: PoseEstimate) -> str:
    """Return name, score, distance and standard deviations (mm, degrees) in one short line, ASCII for OpenCV's font."""
    sigma_mm = 1e3 * float(np.sqrt(np.trace(estimate.cov[:3, :3])))
    sigma_deg = float(np.degrees(np.sqrt(np.trace(estimate.cov[3:, 3:]))))
    z_m = float(estimate.T_camera_object.translation[2])
    return f"{estimate.object_name} {estimate.score:.2f}  z {z_m:.3f} m  +-{sigma_mm:.1f} mm  +-{sigma_deg:.1f} deg"


def draw_overlay(
    view: View, estimates: Iterable[PoseEstimate], rejections: Iterable[Rejection], models: Mapping[str, ObjectModel]
) -> Image:
    """Return a copy of the view's image [H, W, 3] RGB with everything that was found in it; models by name."""
    image: Image = view.image.copy()
    lines = 0
    for rejection in rejections:
        if rejection.keypoints is not None:
            draw_keypoints(image, rejection.keypoints, None)
        draw_text(image, f"{rejection.object_name or 'frame'}: {rejection.reason.value}", lines)
        lines += 1
    for estimate in estimates:
        draw_keypoints(image, estimate.keypoints, estimate.inliers)
        draw_axes(image, view, estimate, 0.5 * models[estimate.object_name].diameter)
        draw_text(image, label(estimate), lines)
        lines += 1
    return image
