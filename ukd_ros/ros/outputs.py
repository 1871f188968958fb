# SPDX-License-Identifier: Apache-2.0
"""What the pose node publishes, and when: one call per frame, whatever came of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import Image, PointCloud2
from std_msgs.msg import Header
from visualization_msgs.msg import MarkerArray

from ukd_ros.geometry.estimate import PoseEstimate, Rejection
from ukd_ros.geometry.view import View
from ukd_ros.ros.interop import Conversions, Detections
from ukd_ros.ros.markers import MarkerHistory
from ukd_ros.ros.messages import KnownObjects, keypoint_rows, pose_message, pose_stamped, pose_with_covariance
from ukd_ros.ros.overlay import draw_overlay

if TYPE_CHECKING:
    from rclpy.node import Node

QUEUE_DEPTH = 5


def topic_token(name: str) -> str:
    """Return ``name`` as one token of a topic name: letters, digits and underscores, not starting with a digit."""
    token = re.sub(r"[^A-Za-z0-9_]", "_", name)
    token = re.sub(r"__+", "_", token).strip("_")
    return token if token and not token[0].isdigit() else f"object_{token}"


class PoseOutputs:
    """The publishers of one configured node; called by the worker thread only."""

    def __init__(
        self, node: Node, objects: KnownObjects, conversions: Conversions, detections: Detections | None
    ) -> None:
        """Create every publisher; ValueError when two objects would share a topic."""
        self._node = node
        self._objects = objects
        self._conversions = conversions
        self._detections = detections
        self._publishers: list[Any] = []
        self._markers_shown = MarkerHistory(objects)
        tokens: dict[str, str] = {}
        for name in objects.numbers:
            other = tokens.setdefault(topic_token(name), name)
            if other != name:
                raise ValueError(f"objects '{other}' and '{name}' would share the topic ~/{topic_token(name)}/pose.")
        self.pose = self._publisher(PoseStamped, "~/pose")
        self.pose_with_covariance = self._publisher(PoseWithCovarianceStamped, "~/pose_with_covariance")
        self._by_object = {
            name: (
                self._publisher(PoseStamped, f"~/{token}/pose"),
                self._publisher(PoseWithCovarianceStamped, f"~/{token}/pose_with_covariance"),
            )
            for token, name in tokens.items()
        }
        self.keypoints = self._publisher(PointCloud2, "~/keypoints")
        self.markers = self._publisher(MarkerArray, "~/markers")
        self.overlay = self._publisher(Image, "~/overlay")
        self.detections = None if detections is None else self._publisher(detections.message_type, "~/detections")

    def _publisher(self, kind: Any, topic: str) -> Any:
        options = QoSOverridingOptions.with_default_policies()
        # A profile of its own: rclpy writes the user's qos_overrides into the object that it is given.
        qos = QoSProfile(reliability=ReliabilityPolicy.RELIABLE, history=HistoryPolicy.KEEP_LAST, depth=QUEUE_DEPTH)
        publisher = self._node.create_publisher(kind, topic, qos, qos_overriding_options=options)
        self._publishers.append(publisher)
        return publisher

    def publish(
        self,
        header: Header,
        view: View | None,
        estimates: Sequence[PoseEstimate],
        rejections: Sequence[Rejection],
        selected: str,
        marker_lifetime_s: float,
    ) -> None:
        """Publish one frame under the image's ``header``; ``view`` None means that the image could not be read.

        The poses first, because somebody waits for them; drawings only while somebody looks.
        """
        answered: set[str] = set()
        for estimate in sorted(estimates, key=lambda e: e.instance):
            if estimate.object_name in answered:
                continue  # instance 0 is the best; an object's pose topics carry its best instance
            answered.add(estimate.object_name)
            pose = pose_message(estimate.T_camera_object, self._conversions.quaternion(estimate.T_camera_object))
            stamped = pose_stamped(header, pose)
            with_covariance = pose_with_covariance(header, pose, estimate.cov)
            if estimate.object_name == selected:
                self.pose.publish(stamped)
                self.pose_with_covariance.publish(with_covariance)
            pose_publisher, covariance_publisher = self._by_object[estimate.object_name]
            pose_publisher.publish(stamped)
            covariance_publisher.publish(with_covariance)
        rows = keypoint_rows(estimates, rejections, self._objects)
        self.keypoints.publish(self._conversions.cloud(header, rows))
        if self._detections is not None and self.detections is not None:
            self.detections.publish(self._detections.message(header, estimates, self._objects))
        if self.markers.get_subscription_count() > 0:
            self.markers.publish(self._markers_shown.frame(header, estimates, marker_lifetime_s))
        if view is not None and self.overlay.get_subscription_count() > 0:
            image = draw_overlay(view, estimates, rejections, self._objects)
            self.overlay.publish(self._conversions.image_to_message(header, image))

    def clear(self, header: Header) -> None:
        """Remove the markers that are still shown."""
        gone = self._markers_shown.all_gone(header)
        if gone.markers:
            self.markers.publish(gone)

    def destroy(self) -> None:
        """Take every publisher off the graph."""
        for publisher in self._publishers:
            self._node.destroy_publisher(publisher)
        self._publishers.clear()
