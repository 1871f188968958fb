# SPDX-License-Identifier: Apache-2.0
"""Images of a lens as its ideal pinhole camera would have taken them: BOP's cam_K knows no lens."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.camera import Camera, DistortionModel

MAX_SIDE = 32766
"""OpenCV's remap counts pixels in 16 bits: it takes no image that is wider or higher."""


def undistorted(image: npt.NDArray[np.uint8], camera: Camera) -> npt.NDArray[np.uint8]:
    """Return the image [H,W,3] that ``camera.pinhole()`` would see: same size, same matrix, no lens.

    Every pixel asks the lens model where its ray falls; what the lens never saw, or where its model folds, is black.
    """
    if not camera.distorted:
        return image
    across, down = _maps(
        camera.width,
        camera.height,
        tuple(camera.matrix.reshape(-1).tolist()),
        camera.distortion_model,
        tuple(camera.distortion.tolist()),
    )
    return np.asarray(cv2.remap(image, across, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT), dtype=np.uint8)


@lru_cache(maxsize=4)
def _maps(
    width: int, height: int, matrix: tuple[float, ...], model: DistortionModel, distortion: tuple[float, ...]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return where each pixel of the pinhole image lies in the distorted one, x and y [H,W] px."""
    camera = Camera(width, height, np.reshape(matrix, (3, 3)), model, np.array(distortion))
    pinhole = camera.pinhole()
    out = np.empty((height, width, 2), dtype=np.float32)
    for row in range(height):  # row by row: the Jacobians of a whole large image would take gigabytes
        pixels = np.stack([np.arange(width, dtype=np.float64), np.full(width, float(row))], axis=1)
        out[row] = camera.project(pinhole.rays(pixels))
    # Outside, and where the model says nothing, remap takes the border's black.
    fit = np.nan_to_num(out, nan=-1e4, posinf=-1e4, neginf=-1e4).clip(-1e4, 1e5)
    return np.ascontiguousarray(fit[..., 0]), np.ascontiguousarray(fit[..., 1])
