# SPDX-License-Identifier: Apache-2.0
"""Estimates as visualization_msgs markers: axes, keypoints, box, name and the position's 3-sigma ellipsoid."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from builtin_interfaces.msg import Duration
from geometry_msgs.msg import Point
from std_msgs.msg import ColorRGBA, Header
from visualization_msgs.msg import Marker, MarkerArray

from ukd_ros.geometry.estimate import PoseEstimate
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose
from ukd_ros.ros.messages import KnownObjects, pose_message

RED = ColorRGBA(r=0.9, g=0.15, b=0.15, a=1.0)
GREEN = ColorRGBA(r=0.15, g=0.75, b=0.2, a=1.0)
BLUE = ColorRGBA(r=0.2, g=0.35, b=0.95, a=1.0)
YELLOW = ColorRGBA(r=1.0, g=0.8, b=0.1, a=1.0)
WHITE = ColorRGBA(r=1.0, g=1.0, b=1.0, a=1.0)
FAINT = ColorRGBA(r=1.0, g=0.8, b=0.1, a=0.35)

SIGMAS = 3.0
"""Half axes of the ellipsoid in standard deviations."""

MIN_EXTENT_M = 1e-4
"""Viewers refuse or hide a marker without extent."""

BOX_EDGES = np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 1, 3, 4, 6, 5, 7, 0, 4, 1, 5, 2, 6, 3, 7])
"""Corner numbers of the twelve edges; corner i has its upper z when i & 1, upper y when i & 2, upper x when i & 4."""


def bounding_box(model: ObjectModel) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return (lowest, highest) corner [3] in the object's frame, m, of its mesh, or of its keypoints without a mesh."""
    points = model.keypoints_3d if model.mesh is None else model.mesh.vertices
    return points.min(axis=0), points.max(axis=0)


def covariance_ellipsoid(cov: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return (rotation [3, 3], standard deviations [3]) of the principal axes of ``cov`` [3, 3]; a proper rotation."""
    variances, axes = np.linalg.eigh(cov)
    if np.linalg.det(axes) < 0.0:
        axes[:, 0] = -axes[:, 0]
    return axes, np.sqrt(np.maximum(variances, 0.0))


def _points(xyz: npt.NDArray[np.float64]) -> list[Point]:
    return [Point(x=x, y=y, z=z) for x, y, z in xyz.tolist()]


def _marker(header: Header, namespace: str, instance: int, kind: int, lifetime: Duration, pose: Pose) -> Marker:
    marker = Marker(header=header, ns=namespace, id=instance, type=kind, action=Marker.ADD, lifetime=lifetime)
    marker.pose = pose_message(pose)
    return marker


def object_markers(header: Header, estimate: PoseEstimate, model: ObjectModel, lifetime_s: float) -> list[Marker]:
    """Return the markers of one estimate; they vanish ``lifetime_s`` after they were shown (0: never)."""
    nanoseconds = round(lifetime_s * 1e9)
    lifetime = Duration(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)
    name, instance, pose = estimate.object_name, estimate.instance, estimate.T_camera_object
    size = model.diameter

    axes = _marker(header, f"{name}/axes", instance, Marker.LINE_LIST, lifetime, pose)
    axes.scale.x = 0.02 * size
    axes.points = _points(np.stack([np.zeros((3, 3)), 0.6 * size * np.eye(3)], axis=1).reshape(6, 3))
    axes.colors = [RED, RED, GREEN, GREEN, BLUE, BLUE]

    named = estimate.T_camera_keypoints or pose
    keypoints = _marker(header, f"{name}/keypoints", instance, Marker.SPHERE_LIST, lifetime, named)
    keypoints.scale.x = keypoints.scale.y = keypoints.scale.z = 0.03 * size
    keypoints.points = _points(model.keypoints_3d)
    keypoints.colors = [YELLOW if inlier else RED for inlier in estimate.inliers.tolist()]

    low, high = bounding_box(model)
    corners = np.array([[(low, high)[(i >> (2 - axis)) & 1][axis] for axis in range(3)] for i in range(8)])
    box = _marker(header, f"{name}/box", instance, Marker.LINE_LIST, lifetime, pose)
    box.scale.x = 0.008 * size
    box.points = _points(corners[BOX_EDGES])
    box.color = WHITE

    # The optical frame's y axis points down, so "above" the object is -y.
    above = Pose(np.eye(3), pose.translation - np.array([0.0, 0.6 * size, 0.0]))
    text = _marker(header, f"{name}/name", instance, Marker.TEXT_VIEW_FACING, lifetime, above)
    sigma_mm = 1e3 * np.sqrt(np.trace(estimate.cov[:3, :3]))
    text.text = f"{name} {estimate.score:.2f} ±{sigma_mm:.1f} mm"
    text.scale.z = 0.15 * size
    text.color = WHITE

    rotation, sigmas = covariance_ellipsoid(estimate.cov[:3, :3])
    ellipsoid = _marker(
        header, f"{name}/position_3_sigma", instance, Marker.SPHERE, lifetime, Pose(rotation, pose.translation)
    )
    extents = np.maximum(2.0 * SIGMAS * sigmas, MIN_EXTENT_M).tolist()
    ellipsoid.scale.x, ellipsoid.scale.y, ellipsoid.scale.z = extents
    ellipsoid.color = FAINT
    return [axes, keypoints, box, text, ellipsoid]


class MarkerHistory:
    """Makes the marker array of each frame, with a DELETE for whatever was shown before and is there no more."""

    def __init__(self, objects: KnownObjects) -> None:
        """Remember nothing shown."""
        self._objects = objects
        self._shown: dict[tuple[str, int], str] = {}

    def frame(self, header: Header, estimates: Iterable[PoseEstimate], lifetime_s: float) -> MarkerArray:
        """Return this frame's markers; DELETEs are stamped with this frame's header."""
        markers: list[Marker] = []
        for estimate in estimates:
            markers += object_markers(header, estimate, self._objects.models[estimate.object_name], lifetime_s)
        present = {(m.ns, m.id): m.header.frame_id for m in markers}
        gone = [self._delete(header, key) for key in self._shown if key not in present]
        self._shown = present
        return MarkerArray(markers=gone + markers)

    def all_gone(self, header: Header) -> MarkerArray:
        """Forget what was shown and return the array that removes it."""
        gone = [self._delete(header, key) for key in self._shown]
        self._shown = {}
        return MarkerArray(markers=gone)

    @staticmethod
    def _delete(header: Header, key: tuple[str, int]) -> Marker:
        return Marker(header=header, ns=key[0], id=key[1], action=Marker.DELETE)
