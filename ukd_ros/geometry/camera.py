# SPDX-License-Identifier: Apache-2.0
"""The camera: from points in its optical frame to pixels and back, with Jacobians.

Optical axes: x right, y down, z forward. Pixel (0, 0) is the *centre* of the top-left pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.arrays import FloatArray, frozen_array
from ukd_ros.geometry.lens import EquidistantLens, Lens, RationalLens

MIN_DEPTH = 1e-6
"""Points nearer than this (m, along the optical axis) count as behind the camera."""


class DistortionModel(str, Enum):
    """The lens models of sensor_msgs/CameraInfo that this package reads."""

    NONE = "none"
    PLUMB_BOB = "plumb_bob"
    RATIONAL_POLYNOMIAL = "rational_polynomial"
    EQUIDISTANT = "equidistant"


COEFFICIENTS = {
    DistortionModel.NONE: 0,
    DistortionModel.PLUMB_BOB: 5,
    DistortionModel.RATIONAL_POLYNOMIAL: 8,
    DistortionModel.EQUIDISTANT: 4,
}
"""How many coefficients of each model mean something here."""


def _checked_distortion(model: DistortionModel, distortion: npt.ArrayLike) -> FloatArray:
    """Return the coefficients; shorter lists are accepted where the model is defined so, longer ones if zero."""
    given = frozen_array(distortion, (None,), "distortion")
    meant = COEFFICIENTS[model]
    if np.any(given[meant:] != 0):
        extra = "thin-prism and tilt terms are" if model is DistortionModel.RATIONAL_POLYNOMIAL else "they are"
        raise ValueError(
            f"distortion: {model.value} has {meant} coefficients, but {len(given)} are given and those after the first "
            f"{meant} are not zero; {extra} not supported: calibrate with a supported model or feed rectified images."
        )
    # plumb_bob without k3 (4) is an old form of it; drivers without calibration publish empty lists.
    shortest = {DistortionModel.PLUMB_BOB: 4}.get(model, meant)
    if 0 < len(given) < shortest or (len(given) == 0 and model is DistortionModel.EQUIDISTANT):
        raise ValueError(f"distortion: {model.value} needs {meant} coefficients, but {len(given)} are given.")
    return given


def _lens_of(model: DistortionModel, distortion: FloatArray) -> Lens | None:
    """Return the lens, or None for a pinhole camera (also when all coefficients of a perspective model are zero)."""
    if model is DistortionModel.EQUIDISTANT:
        return EquidistantLens(distortion[:4])
    if not np.any(distortion):
        return None
    coefficients = np.zeros(8)
    coefficients[: min(len(distortion), 8)] = distortion[:8]
    return RationalLens(coefficients)


@dataclass(frozen=True, eq=False)
class Camera:
    """A calibrated camera.

    width, height: px.
    matrix: [3, 3] px, upper triangular, last row 0 0 1 (CameraInfo's K for a raw image, P[:3, :3] for a rectified
        one).
    distortion_model: how ``distortion`` is to be read.
    distortion: coefficients in OpenCV's and CameraInfo's order (k1 k2 p1 p2 [k3 [k4 k5 k6]]; k1..k4 for
        equidistant). A longer list is accepted when the rest is zero.
    ValueError names the field that is wrong.
    """

    width: int
    height: int
    matrix: FloatArray
    distortion_model: DistortionModel = DistortionModel.NONE
    distortion: FloatArray = field(default_factory=lambda: np.zeros(0))
    _lens: Lens | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        """Check and freeze the fields."""
        for name, size in (("width", self.width), ("height", self.height)):
            if int(size) != size or size < 1:
                raise ValueError(f"{name}: is {size}, but a whole number of pixels of at least 1 is needed.")
            object.__setattr__(self, name, int(size))
        K = frozen_array(self.matrix, (3, 3), "matrix")
        if K[0, 0] <= 0 or K[1, 1] <= 0:
            raise ValueError(f"matrix: the focal lengths are {K[0, 0]:g}, {K[1, 1]:g}; the camera is not calibrated.")
        if K[1, 0] != 0 or np.any(K[2] != (0, 0, 1)):
            raise ValueError("matrix: is not upper triangular with a last row of 0 0 1.")
        model = DistortionModel(self.distortion_model)
        distortion = _checked_distortion(model, self.distortion)
        object.__setattr__(self, "matrix", K)
        object.__setattr__(self, "distortion_model", model)
        object.__setattr__(self, "distortion", distortion)
        object.__setattr__(self, "_lens", _lens_of(model, distortion))

    @property
    def distorted(self) -> bool:
        """Return whether pixels differ from those of the pinhole camera with the same matrix."""
        return self._lens is not None

    def pinhole(self) -> Camera:
        """Return the ideal camera with the same size and matrix."""
        return Camera(self.width, self.height, self.matrix)

    def project(self, points_camera: npt.ArrayLike) -> FloatArray:
        """Return the pixels [N, 2] of points [N, 3] m in the optical frame.

        NaN for points behind the camera or nearer than 1 um, and beyond the radius where the lens model folds.
        """
        return self.project_with_jacobian(points_camera)[0]

    def project_with_jacobian(self, points_camera: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return the pixels [N, 2] and their derivatives [N, 2, 3] px/m with respect to the points; NaN together."""
        points = np.asarray(points_camera, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != 3:
            raise ValueError(f"points_camera: has shape {list(points.shape)}, but [any, 3] is needed.")
        depth = points[:, 2]
        inverse_z = 1 / np.where(depth > MIN_DEPTH, depth, np.nan)[:, None]
        xy = points[:, :2] * inverse_z
        scale = self.matrix[:2, :2]
        # d(x/z) = (dx - (x/z) dz) / z, then the lens, then the matrix.
        jacobian = np.empty((len(points), 2, 3))
        if self._lens is None:
            centred = xy @ scale.T
            jacobian[:, :, :2] = scale * inverse_z[:, :, None]
            jacobian[:, :, 2] = centred * -inverse_z
            return centred + self.matrix[:2, 2], jacobian
        plane = xy
        xy, bent = self._lens.distort(plane)
        bent = scale @ bent * inverse_z[:, :, None]
        jacobian[:, :, :2] = bent
        jacobian[:, :, 2] = -(bent @ plane[:, :, None])[:, :, 0]
        return xy @ scale.T + self.matrix[:2, 2], jacobian

    def _normalised(self, xy: npt.ArrayLike) -> FloatArray:
        """Return pixels [N, 2] on the plane z = 1, still distorted."""
        pixels = np.asarray(xy, dtype=np.float64)
        if pixels.ndim != 2 or pixels.shape[1] != 2:
            raise ValueError(f"xy: has shape {list(pixels.shape)}, but [any, 2] is needed.")
        K = self.matrix
        y = (pixels[:, 1] - K[1, 2]) / K[1, 1]
        return np.stack([(pixels[:, 0] - K[0, 2] - K[0, 1] * y) / K[0, 0], y], axis=1)

    def undistort(self, xy: npt.ArrayLike) -> FloatArray:
        """Return the pixels [N, 2] that the ideal pinhole camera with the same matrix would see for pixels ``xy``.

        It solves the true model by Newton's method; NaN where no point in front of the camera is seen at ``xy``.
        """
        normalised = self._normalised(xy)
        if self._lens is None:
            return np.array(xy, dtype=np.float64)
        return np.asarray(self._lens.undistort(normalised) @ self.matrix[:2, :2].T + self.matrix[:2, 2])

    def undistort_with_jacobian(self, xy: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return ``undistort(xy)`` and its derivatives [N, 2, 2] px/px (inverse function theorem); NaN together."""
        normalised = self._normalised(xy)
        if self._lens is None:
            return np.array(xy, dtype=np.float64), np.tile(np.eye(2), (len(normalised), 1, 1))
        ideal = self._lens.undistort(normalised)
        bent = self._lens.distort(ideal)[1]
        with np.errstate(all="ignore"):
            determinant = bent[:, 0, 0] * bent[:, 1, 1] - bent[:, 0, 1] * bent[:, 1, 0]
            inverse = np.empty_like(bent)
            inverse[:, 0, 0], inverse[:, 1, 1] = bent[:, 1, 1], bent[:, 0, 0]
            inverse[:, 0, 1], inverse[:, 1, 0] = -bent[:, 0, 1], -bent[:, 1, 0]
            inverse /= determinant[:, None, None]
        scale = self.matrix[:2, :2]
        return np.asarray(ideal @ scale.T + self.matrix[:2, 2]), scale @ inverse @ np.linalg.inv(scale)

    def rays(self, xy: npt.ArrayLike) -> FloatArray:
        """Return the directions [N, 3], z = 1, in which the camera sees the pixels [N, 2]; NaN where undefined."""
        plane = self._normalised(xy)
        if self._lens is not None:
            plane = self._lens.undistort(plane)
        return np.concatenate([plane, np.ones((len(plane), 1))], axis=1)

    def resized(self, width: int, height: int) -> Camera:
        """Return the camera of this image resampled to another size: pixel c goes to ``(c + 0.5) s - 0.5``."""
        sx, sy = width / self.width, height / self.height
        A = np.array([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5], [0, 0, 1]])
        return Camera(width, height, A @ self.matrix, self.distortion_model, self.distortion)

    def cropped(self, x: int, y: int, width: int, height: int) -> Camera:
        """Return the camera of the window whose top-left pixel is (x, y); the window may leave the image."""
        A = np.array([[1.0, 0, -x], [0, 1.0, -y], [0, 0, 1]])
        return Camera(width, height, A @ self.matrix, self.distortion_model, self.distortion)

    def warped(self, A: npt.ArrayLike) -> FloatArray:
        """Return the projection matrix [3, 3] after the affine map ``A`` [2, 3] of pixels (source px -> crop px).

        It holds the pinhole part only: undistort the pixels first, or the image where the difference matters.
        """
        affine = np.eye(3)
        affine[:2] = frozen_array(A, (2, 3), "A")
        return np.asarray(affine @ self.matrix)
