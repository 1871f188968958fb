# SPDX-License-Identifier: Apache-2.0
"""Estimates as ROS messages: pure conversions, no node needed.

Every header is the image's own: its stamp and its frame_id (the camera's optical frame), never the present time.
A 6x6 covariance goes out as it is: ``PoseEstimate.cov`` is Cov(x y z rotX rotY rotZ) about the fixed axes of the
header's frame, which is what geometry_msgs/PoseWithCovariance is defined to hold (row-major).
"""

from __future__ import annotations

import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from geometry_msgs.msg import Point, PoseStamped, PoseWithCovarianceStamped, Quaternion
from geometry_msgs.msg import Pose as PoseMessage
from sensor_msgs.msg import PointCloud2, PointField
from std_msgs.msg import Header

from ukd_ros.geometry.estimate import PoseEstimate, Rejection
from ukd_ros.geometry.keypoints import Keypoints
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose

CLOUD_DTYPE = np.dtype(
    [
        *((name, "<f4") for name in ("x", "y", "z", "u", "v", "score", "cov_uu", "cov_uv", "cov_vv")),
        *((name, "<i4") for name in ("object", "instance", "keypoint")),
    ]
)
"""One keypoint in the cloud: x y z (m, optical frame, NaN without a pose), u v (px), score (0..1), cov_* (px^2), the
object's number in the model, the instance (0 is the best, -1 when there is no pose) and the keypoint's number."""

_DATATYPES = {np.dtype("<f4"): PointField.FLOAT32, np.dtype("<i4"): PointField.INT32}


def point_fields(dtype: np.dtype[np.void] = CLOUD_DTYPE) -> list[PointField]:
    """Return the PointField list of a packed structured ``dtype`` of float32 and int32 scalars."""
    fields = []
    for name in dtype.names or ():
        kind, offset = dtype.fields[name][:2]  # type: ignore[index]
        fields.append(PointField(name=name, offset=int(offset), datatype=_DATATYPES[kind], count=1))
    return fields


@dataclass(frozen=True)
class KnownObjects:
    """The model's objects by name, with their numbers in the model."""

    numbers: Mapping[str, int]
    models: Mapping[str, ObjectModel]

    @staticmethod
    def of(objects: Sequence[ObjectModel]) -> KnownObjects:
        """Number ``objects`` in their order."""
        return KnownObjects({o.name: i for i, o in enumerate(objects)}, {o.name: o for o in objects})


def pose_message(pose: Pose, xyzw: npt.NDArray[np.float64] | None = None) -> PoseMessage:
    """Return ``pose`` as geometry_msgs/Pose (m, unit quaternion with w >= 0, or ``xyzw`` where it is known)."""
    x, y, z = pose.translation.tolist()
    qx, qy, qz, qw = (pose.quaternion() if xyzw is None else xyzw).tolist()
    return PoseMessage(position=Point(x=x, y=y, z=z), orientation=Quaternion(x=qx, y=qy, z=qz, w=qw))


def pose_stamped(header: Header, pose: PoseMessage) -> PoseStamped:
    """Return ``pose`` under ``header``."""
    return PoseStamped(header=header, pose=pose)


def pose_with_covariance(header: Header, pose: PoseMessage, cov: npt.NDArray[np.float64]) -> PoseWithCovarianceStamped:
    """Return ``pose`` with ``cov`` [6, 6] = Cov(x y z rotX rotY rotZ), m and rad, about the header frame's axes."""
    message = PoseWithCovarianceStamped(header=header)
    message.pose.pose = pose
    message.pose.covariance = np.ascontiguousarray(cov, dtype=np.float64).reshape(36)
    return message


def _rows(
    keypoints: Keypoints, xyz: npt.NDArray[np.float64] | None, number: int, instance: int
) -> npt.NDArray[np.void]:
    rows = np.empty(len(keypoints), dtype=CLOUD_DTYPE)
    blocks = keypoints.blocks()
    for axis, name in enumerate("xyz"):
        rows[name] = np.nan if xyz is None else xyz[:, axis]
    rows["u"], rows["v"] = keypoints.xy[:, 0], keypoints.xy[:, 1]
    rows["score"] = keypoints.score
    rows["cov_uu"], rows["cov_uv"], rows["cov_vv"] = blocks[:, 0, 0], blocks[:, 0, 1], blocks[:, 1, 1]
    rows["object"], rows["instance"] = number, instance
    rows["keypoint"] = np.arange(len(keypoints))
    return rows


def keypoint_rows(
    estimates: Iterable[PoseEstimate], rejections: Iterable[Rejection], objects: KnownObjects
) -> npt.NDArray[np.void]:
    """Return every keypoint of a frame as ``CLOUD_DTYPE`` rows, those of rejected instances with x y z NaN."""
    parts: list[npt.NDArray[np.void]] = [np.empty(0, dtype=CLOUD_DTYPE)]
    for estimate in estimates:
        model = objects.models[estimate.object_name]
        xyz = (estimate.T_camera_keypoints or estimate.T_camera_object).transform(model.keypoints_3d)
        parts.append(_rows(estimate.keypoints, xyz, objects.numbers[estimate.object_name], estimate.instance))
    for rejection in rejections:
        if rejection.keypoints is not None:
            parts.append(_rows(rejection.keypoints, None, objects.numbers.get(rejection.object_name, -1), -1))
    return np.concatenate(parts)


def cloud_message(header: Header, rows: npt.NDArray[np.void]) -> PointCloud2:
    """Return ``rows`` (a packed structured array) as an unordered cloud; no rows give a valid cloud without points."""
    message = PointCloud2(header=header, height=1, width=len(rows), is_bigendian=False, is_dense=False)
    message.fields = point_fields(rows.dtype)
    message.point_step = rows.dtype.itemsize
    message.row_step = rows.dtype.itemsize * len(rows)
    # A bytes object would be checked element by element by some distributions' generated setter, array.array is not.
    message.data = array.array("B", rows.tobytes())
    return message
