# SPDX-License-Identifier: Apache-2.0
"""Affine crops between the full image and a network's input.

Pixel (0, 0) is the centre of the top-left pixel, so a resize by s maps a coordinate c to ``(c + 0.5) * s - 0.5``.
Every crop here keeps the aspect ratio: one scale for both axes, so circles stay circles and a covariance only scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
ImageArray = npt.NDArray[np.uint8]

# What lies outside the photograph is filled with the mean grey that the network is trained to see there.
BORDER_GREY = 114


@dataclass(frozen=True, eq=False)
class Crop:
    """A map from source pixels to the pixels of a network input: ``x_crop = matrix[:, :2] @ x_source + matrix[:, 2]``.

    matrix: [2, 3] affine, source px to crop px, invertible. size: (width, height) of the crop, px.
    Raises ValueError when the matrix is not finite, not invertible or mirrors, or the size is not positive.
    """

    matrix: FloatArray
    size: tuple[int, int]

    def __post_init__(self) -> None:
        """Check and freeze the fields."""
        matrix = np.array(self.matrix, dtype=np.float64)
        if matrix.shape != (2, 3) or not np.isfinite(matrix).all():
            raise ValueError(f"Crop.matrix must be a finite [2, 3] array, got shape {matrix.shape}.")
        if not matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0] > 0.0:
            raise ValueError("Crop.matrix must be invertible and must not mirror the image.")
        width, height = int(self.size[0]), int(self.size[1])
        if width <= 0 or height <= 0:
            raise ValueError(f"Crop.size must be positive (width, height), got {self.size}.")
        matrix.setflags(write=False)
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "size", (width, height))

    @property
    def scale(self) -> float:
        """Crop pixels per source pixel (the square root of the area ratio)."""
        linear = self.matrix[:, :2]
        return math.sqrt(linear[0, 0] * linear[1, 1] - linear[0, 1] * linear[1, 0])

    def inverse_matrix(self) -> FloatArray:
        """Return the [2, 3] affine from crop pixels back to source pixels."""
        (a, b, c), (d, e, f) = self.matrix.tolist()
        det = a * e - b * d
        return np.asarray(np.array([[e, -b, b * f - c * e], [-d, a, c * d - a * f]]) / det)

    def to_crop(self, xy: npt.ArrayLike) -> FloatArray:
        """Map points [..., 2] from source px to crop px."""
        return np.asarray(np.asarray(xy, dtype=np.float64) @ self.matrix[:, :2].T + self.matrix[:, 2])

    def to_source(self, xy: npt.ArrayLike) -> FloatArray:
        """Map points [..., 2] from crop px to source px."""
        inverse = self.inverse_matrix()
        return np.asarray(np.asarray(xy, dtype=np.float64) @ inverse[:, :2].T + inverse[:, 2])

    def cov_to_source(self, cov: npt.ArrayLike) -> FloatArray:
        """Map a covariance from crop px² to source px².

        Accepts the joint covariance of K points, [2K, 2K] ordered u0 v0 u1 v1 ..., or a stack of blocks [..., 2, 2]
        (which for one point is the same thing). Raises ValueError for any other shape.
        """
        cov = np.asarray(cov, dtype=np.float64)
        linear = self.inverse_matrix()[:, :2]
        if cov.ndim >= 2 and cov.shape[-2:] == (2, 2):
            return np.asarray(linear @ cov @ linear.T)
        if cov.ndim == 2 and cov.shape[0] == cov.shape[1] and cov.shape[0] % 2 == 0:
            count = cov.shape[0] // 2
            blocks = cov.reshape(count, 2, count, 2).transpose(0, 2, 1, 3)
            return np.asarray((linear @ blocks @ linear.T).transpose(0, 2, 1, 3).reshape(cov.shape))
        raise ValueError(f"A covariance must be [2K, 2K] or [..., 2, 2], got {cov.shape}.")

    def warp(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Sample the source image [H, W] or [H, W, 3] uint8 into the crop's [height, width, ...].

        Bilinear where the crop enlarges. Where it shrinks, the source is first averaged over whole blocks of pixels and
        what remains is smoothed, because sampling a shrunken image without averaging folds its texture into noise
        (aliasing). Outside the source the crop is BORDER_GREY. Raises ValueError for an empty image.
        """
        if image.ndim not in (2, 3) or image.shape[0] == 0 or image.shape[1] == 0:
            raise ValueError(f"Cannot crop an image of shape {image.shape}: [H, W] or [H, W, 3] is needed.")
        matrix = np.array(self.matrix)
        if self.size == (image.shape[1], image.shape[0]) and np.array_equal(matrix, _IDENTITY):
            return image.copy()
        shrink = 1.0 / self.scale
        if shrink > _SMOOTH_FROM:
            image, matrix, shrink = self._averaged(image, matrix, shrink)
        if shrink > _SMOOTH_FROM:
            image, matrix = self._smoothed(image, matrix)
        return cv2.warpAffine(
            image,
            matrix,
            self.size,
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=(BORDER_GREY, BORDER_GREY, BORDER_GREY),
        )

    def _source_window(self, image: npt.NDArray[Any], margin: int) -> tuple[int, int, int, int] | None:
        """Return x0, y0, x1, y1 of the source pixels that the crop can touch, or None when it touches none."""
        width, height = self.size
        corners = self.to_source([[-0.5, -0.5], [width - 0.5, -0.5], [-0.5, height - 0.5], [width - 0.5, height - 0.5]])
        low = np.floor(corners.min(axis=0)).astype(np.int64) - margin
        high = np.ceil(corners.max(axis=0)).astype(np.int64) + margin + 1
        x0, y0 = max(int(low[0]), 0), max(int(low[1]), 0)
        x1, y1 = min(int(high[0]), image.shape[1]), min(int(high[1]), image.shape[0])
        return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None

    def _averaged(
        self, image: npt.NDArray[Any], matrix: FloatArray, shrink: float
    ) -> tuple[npt.NDArray[Any], FloatArray, float]:
        """Average the window over n x n blocks, n the largest whole factor not above the shrinking."""
        block = int(shrink + 1e-9)
        window = self._source_window(image, margin=block) if block >= 2 else None
        if window is None:
            return image, matrix, shrink
        x0, y0, x1, y1 = window
        columns, rows = -(-(x1 - x0) // block), -(-(y1 - y0) // block)
        patch = image[y0 : y0 + rows * block, x0 : x0 + columns * block]
        missing_y, missing_x = rows * block - patch.shape[0], columns * block - patch.shape[1]
        if missing_x or missing_y:
            # A last block that hangs over the image's edge is completed by repeating the edge.
            patch = cv2.copyMakeBorder(patch, 0, missing_y, 0, missing_x, cv2.BORDER_REPLICATE)
        small = cv2.resize(patch, (columns, rows), interpolation=cv2.INTER_AREA)
        # The centre of block b lies at source coordinate x0 + b * n + (n - 1) / 2.
        origin = np.array([x0 + (block - 1) / 2.0, y0 + (block - 1) / 2.0])
        linear = matrix[:, :2]
        moved = np.column_stack([linear * block, linear @ origin + matrix[:, 2]])
        return small, moved, shrink / block

    def _smoothed(self, image: npt.NDArray[Any], matrix: FloatArray) -> tuple[npt.NDArray[Any], FloatArray]:
        """Blur the window so that what bilinear sampling skips at the remaining shrinking (below 2) does not alias."""
        window = Crop(matrix, self.size)._source_window(image, margin=3)
        if window is None:
            return image, matrix
        x0, y0, x1, y1 = window
        # A box of r pixels has variance (r^2 - 1) / 12 beyond one pixel's own and bilinear sampling leaves more than a
        # box would: the binomial 1-2-1 (variance 1/2) suits the whole range, and OpenCV has a fast path for just it.
        blurred = cv2.GaussianBlur(image[y0:y1, x0:x1], (3, 3), 0, borderType=cv2.BORDER_REPLICATE)
        linear = matrix[:, :2]
        return blurred, np.column_stack([linear, linear @ np.array([x0, y0], dtype=np.float64) + matrix[:, 2]])


_IDENTITY = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
# Below this shrinking, bilinear sampling alone skips too little to matter.
_SMOOTH_FROM = 1.3


def letterbox(camera_size: tuple[int, int], size: tuple[int, int]) -> Crop:
    """Fit a whole frame of camera_size (width, height) into size (width, height), centred, aspect ratio kept.

    What the frame does not cover becomes grey. Raises ValueError when a size is not positive.
    """
    (source_w, source_h), (width, height) = camera_size, size
    if source_w <= 0 or source_h <= 0 or width <= 0 or height <= 0:
        raise ValueError(f"letterbox needs positive sizes, got {camera_size} into {size}.")
    scale = min(width / source_w, height / source_h)
    # The frame's centre (source_w - 1) / 2 goes to the input's centre: (c + 0.5) * s - 0.5, then an offset.
    offset_x = (width - scale * source_w) / 2.0 + 0.5 * scale - 0.5
    offset_y = (height - scale * source_h) / 2.0 + 0.5 * scale - 0.5
    return Crop(np.array([[scale, 0.0, offset_x], [0.0, scale, offset_y]]), (width, height))


def square_crop(center: npt.ArrayLike, side: float, size: int) -> Crop:
    """Cut the square of `side` source px about `center` [2] (source px) and bring it to size x size.

    It may reach over the image's edge. Raises ValueError when the side or the size is not positive and finite.
    """
    point = np.asarray(center, dtype=np.float64)
    if point.shape != (2,) or not np.isfinite(point).all():
        raise ValueError(f"square_crop needs a finite centre [2], got {center!r}.")
    if not (math.isfinite(side) and side > 0.0 and size > 0):
        raise ValueError(f"square_crop needs a positive side and size, got {side} and {size}.")
    scale = size / side
    middle = (size - 1) / 2.0
    return Crop(
        np.array([[scale, 0.0, middle - scale * point[0]], [0.0, scale, middle - scale * point[1]]]), (size, size)
    )
