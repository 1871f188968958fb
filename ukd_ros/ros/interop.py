# SPDX-License-Identifier: Apache-2.0
"""The packages that a ROS installation has and a plain pip install has not.

Asked for and missing is an error at configure, with the apt line that cures it. Not asked for is never imported.

This file is the only importer of cv_bridge, tf_transformations, sensor_msgs_py, tf2_ros and vision_msgs. Each has one
call site and, save vision_msgs (whose messages nothing can stand in for), an equivalent of our own behind the same
function. The parameter ``conversions`` asks: ``ros`` for theirs, ``own`` for ours, ``auto`` for theirs where installed.
"""

from __future__ import annotations

import array
import importlib
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from sensor_msgs.msg import Image, PointCloud2
from std_msgs.msg import Header

from ukd_ros.geometry.estimate import PoseEstimate
from ukd_ros.geometry.pose import Pose
from ukd_ros.perception import images
from ukd_ros.ros.markers import bounding_box
from ukd_ros.ros.messages import KnownObjects, cloud_message, point_fields, pose_message

logger = logging.getLogger(__name__)

CHOICES = ("auto", "ros", "own")

APT_PACKAGES = {
    "cv_bridge": "ros-$ROS_DISTRO-cv-bridge",
    "tf_transformations": "ros-$ROS_DISTRO-tf-transformations",
    "sensor_msgs_py": "ros-$ROS_DISTRO-sensor-msgs-py",
    "vision_msgs": "ros-$ROS_DISTRO-vision-msgs",
    "tf2_ros": "ros-$ROS_DISTRO-tf2-ros-py",
}

NUMPY_REMEDY = (
    "cv_bridge from apt is built for NumPy 1 and does not work with the NumPy {version} that this Python has. Remedy: "
    "'pip install \"numpy<2\"' in this environment, or the parameter conversions:=own, which does without cv_bridge."
)

PROBE = (
    "import numpy as np; from cv_bridge import CvBridge; b = CvBridge(); "
    "a = np.arange(12, dtype=np.uint8).reshape(2, 2, 3); m = b.cv2_to_imgmsg(a, 'rgb8'); "
    "assert (b.imgmsg_to_cv2(m, 'bgr8')[..., ::-1] == a).all()"
)
"""Run in a child: a cv_bridge built for another NumPy may raise, or may end the process."""

PROBE_TIMEOUT_S = 30.0


class InteropError(RuntimeError):
    """A package that was asked for is missing or does not work; the text says how to cure it."""


def require(module: str, asked_by: str) -> Any:
    """Import ``module``, a package of APT_PACKAGES or inside one; InteropError with the apt line if absent."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InteropError(
            f"{asked_by} needs {package}, which cannot be imported ({error}). Remedy: "
            f"'sudo apt install {APT_PACKAGES[package]}' and source the ROS installation."
        ) from error


def installed(module: str) -> bool:
    """Return whether ``module`` could be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def _check_bridge(asked_by: str) -> None:
    """Raise InteropError when cv_bridge was built for another NumPy; only NumPy 2 is worth the child process."""
    if int(np.__version__.split(".")[0]) < 2:
        return
    try:
        probe = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InteropError(f"{asked_by}: cv_bridge did not answer a first try within {PROBE_TIMEOUT_S} s.") from error
    if probe.returncode != 0:
        last = (probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"])[-1]
        raise InteropError(f"{asked_by}: {NUMPY_REMEDY.format(version=np.__version__)} (Its first try ended: {last})")


class Conversions:
    """Images, quaternions and clouds to and from messages, by ROS's own packages or by ours, with equal results."""

    def __init__(self, bridge: Any | None, transformations: Any | None, point_cloud2: Any | None) -> None:
        """Take a CvBridge and the modules tf_transformations and sensor_msgs_py.point_cloud2; None means ours."""
        self._bridge = bridge
        self._transformations = transformations
        self._point_cloud2 = point_cloud2

    def describe(self) -> str:
        """Return which package does what, for the log."""
        names = {
            "images": "own" if self._bridge is None else "cv_bridge",
            "quaternions": "own" if self._transformations is None else "tf_transformations",
            "clouds": "own" if self._point_cloud2 is None else "sensor_msgs_py",
        }
        return ", ".join(f"{what} by {who}" for what, who in names.items())

    def image_from_message(self, message: Any) -> npt.NDArray[np.uint8]:
        """Return sensor_msgs/Image or CompressedImage as RGB [H, W, 3]; images.ImageError says what is wrong with it.

        cv_bridge does what it reads rightly. What it cannot, or would skew without a word (rows whose padding is no
        whole number of pixels), and compressed images are ours in either case.
        """
        if self._bridge is None or not hasattr(message, "encoding") or not self._bridge_reads(message):
            return images.image_from_message(message)
        try:
            converted = self._bridge.imgmsg_to_cv2(message, desired_encoding="rgb8")
        except (cv2.error, RuntimeError, TypeError, ValueError) as error:
            raise images.ImageError(f"cv_bridge cannot make rgb8 of encoding '{message.encoding}': {error}") from error
        return np.ascontiguousarray(converted, dtype=np.uint8)

    def _bridge_reads(self, message: Any) -> bool:
        bridge: Any = self._bridge
        try:
            dtype, channels = bridge.encoding_to_dtype_with_channels(message.encoding)
        except (KeyError, RuntimeError, TypeError, ValueError):
            return False
        pixel = np.dtype(dtype).itemsize * int(channels)
        whole = message.step % pixel == 0 and message.step >= message.width * pixel
        enough = len(message.data) >= message.step * message.height
        return bool(min(message.width, message.height) > 0 and whole and enough)

    def image_to_message(self, header: Header, image: npt.NDArray[np.uint8]) -> Image:
        """Return RGB [H, W, 3] as sensor_msgs/Image of encoding rgb8 under ``header``."""
        if self._bridge is not None:
            message = self._bridge.cv2_to_imgmsg(image, encoding="rgb8")
            message.header = header
            return message
        height, width = image.shape[:2]
        message = Image(header=header, height=height, width=width, encoding="rgb8", is_bigendian=0, step=3 * width)
        message.data = array.array("B", np.ascontiguousarray(image).tobytes())
        return message

    def quaternion(self, pose: Pose) -> npt.NDArray[np.float64]:
        """Return the rotation as a unit quaternion x y z w with w >= 0."""
        if self._transformations is None:
            return pose.quaternion()
        xyzw = np.asarray(self._transformations.quaternion_from_matrix(pose.matrix()), dtype=np.float64)
        return -xyzw if xyzw[3] < 0.0 else xyzw

    def cloud(self, header: Header, rows: npt.NDArray[np.void]) -> PointCloud2:
        """Return the structured ``rows`` as a PointCloud2 under ``header``."""
        if self._point_cloud2 is None or len(rows) == 0:
            return cloud_message(header, rows)
        cloud = self._point_cloud2.create_cloud(header, point_fields(rows.dtype), rows)
        cloud.is_dense = False
        return cloud


def open_conversions(choice: str) -> Conversions:
    """Return the conversions that ``choice`` (auto, ros, own) asks for; InteropError when ``ros`` cannot be had."""
    if choice not in CHOICES:
        raise InteropError(f"conversions: is '{choice}', but one of {', '.join(CHOICES)} is needed.")
    if choice == "own":
        return Conversions(None, None, None)
    asked_by = f"conversions:={choice}"
    bridge = transformations = point_cloud2 = None
    if choice == "ros" or installed("cv_bridge"):
        try:
            bridge_module = require("cv_bridge", asked_by) if choice == "ros" else None
            _check_bridge(asked_by)
            bridge = (bridge_module or require("cv_bridge", asked_by)).CvBridge()
        except InteropError as error:
            if choice == "ros":
                raise
            logger.warning("%s Going on with our own image conversion.", error)
    if choice == "ros" or installed("tf_transformations"):
        transformations = require("tf_transformations", asked_by)
    if choice == "ros" or installed("sensor_msgs_py"):
        point_cloud2 = require("sensor_msgs_py.point_cloud2", asked_by)
    return Conversions(bridge, transformations, point_cloud2)


class Detections:
    """Estimates as vision_msgs/Detection3DArray."""

    def __init__(self) -> None:
        """Import vision_msgs; InteropError with the apt line when it is missing."""
        self._messages = require("vision_msgs.msg", "detections:=true")

    @property
    def message_type(self) -> Any:
        """Return the type to publish."""
        return self._messages.Detection3DArray

    def message(self, header: Header, estimates: Iterable[PoseEstimate], objects: KnownObjects) -> Any:
        """Return all estimates; the box is centred on the object's extent (not on its origin), its size in metres."""
        found = self._messages.Detection3DArray(header=header)
        for estimate in estimates:
            low, high = bounding_box(objects.models[estimate.object_name])
            hypothesis = self._messages.ObjectHypothesisWithPose()
            hypothesis.hypothesis.class_id = estimate.object_name
            hypothesis.hypothesis.score = float(estimate.score)
            hypothesis.pose.pose = pose_message(estimate.T_camera_object)
            hypothesis.pose.covariance = np.ascontiguousarray(estimate.cov).reshape(36)
            detection = self._messages.Detection3D(header=header)
            detection.id = f"{estimate.object_name}/{estimate.instance}"
            detection.results.append(hypothesis)
            center = Pose(np.eye(3), 0.5 * (low + high))
            detection.bbox.center = pose_message(estimate.T_camera_object @ center)
            detection.bbox.size.x, detection.bbox.size.y, detection.bbox.size.z = (high - low).tolist()
            found.detections.append(detection)
        return found
