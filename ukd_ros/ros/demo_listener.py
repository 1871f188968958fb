# SPDX-License-Identifier: Apache-2.0
"""Records what the pose node answers, what it saw, and the truth into a bag; a process started by ``demo.py``."""

from __future__ import annotations

import argparse
import struct
import sys
import time
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseWithCovarianceStamped
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, PointCloud2

from ukd_ros.data.bags import INFO_TYPE, POSE_TYPE, TRUTH_PREFIX, BagReader, BagWriter
from ukd_ros.ros.demo_player import MESSAGE_TYPES

NODE = "/pose_node"
POSE_TOPIC = f"{NODE}/pose_with_covariance"
CLOUD_TOPIC = f"{NODE}/keypoints"
DIAGNOSTICS_TOPIC = "/diagnostics"
OUTPUTS: dict[str, tuple[str, Any]] = {
    POSE_TOPIC: ("geometry_msgs/msg/PoseWithCovarianceStamped", PoseWithCovarianceStamped),
    CLOUD_TOPIC: ("sensor_msgs/msg/PointCloud2", PointCloud2),
    DIAGNOSTICS_TOPIC: ("diagnostic_msgs/msg/DiagnosticArray", DiagnosticArray),
}
START_TIMEOUT_S = 60.0
IDLE_S = 5.0
"""So long after the last camera image or answer the recording ends, whatever is missing."""

DEPTH = 200


def stamp_ns(serialised: bytes) -> int:
    """Return the stamp (ns) of a serialised little-endian CDR message that begins with a std_msgs/Header."""
    sec, nanosec = struct.unpack_from("<iI", serialised, 4)
    return int(sec) * 10**9 + int(nanosec)


class Listener:
    """Subscribes to the node's outputs first, and to the camera only once the node is heard.

    The player waits for the camera's subscriptions, so that nothing is sent before somebody records the answer.
    """

    def __init__(self, node: Node, bag: BagWriter, truth: BagReader, image: str, info: str, last_ns: int) -> None:
        """Record into ``bag`` until the image stamped ``last_ns`` is answered; truths come from ``truth``."""
        self._node = node
        self._bag = bag
        self._truths: dict[int, list[tuple[str, bytes]]] = {}
        for message in truth.messages([t for t, kind in truth.topics.items() if kind == POSE_TYPE]):
            if message.topic.startswith(TRUTH_PREFIX):
                self._truths.setdefault(stamp_ns(message.data), []).append((message.topic, message.data))
        self._camera = {image: truth.topics[image], info: INFO_TYPE}
        self._image = image
        self._last_ns = last_ns
        self._last_answered = False
        self._told_after_last = False
        self._heard = False
        self._newest_s = time.monotonic()
        self._begun = False
        reliable = QoSProfile(reliability=ReliabilityPolicy.RELIABLE, history=HistoryPolicy.KEEP_LAST, depth=DEPTH)
        for topic, (kind, message_type) in OUTPUTS.items():
            self._subscribe(message_type, topic, kind, reliable)

    def _subscribe(self, message_type: Any, topic: str, kind: str, qos: QoSProfile) -> None:
        self._node.create_subscription(message_type, topic, lambda data: self._record(topic, kind, data), qos, raw=True)

    def _record(self, topic: str, kind: str, data: bytes) -> None:
        now_ns = time.time_ns()
        self._bag.write(topic, kind, now_ns, data)
        if topic == DIAGNOSTICS_TOPIC:
            self._heard = True
            self._told_after_last = self._last_answered
            return
        self._newest_s = time.monotonic()
        if topic == self._image:
            self._begun = True
            for truth_topic, truth in self._truths.pop(stamp_ns(data), []):
                self._bag.write(truth_topic, POSE_TYPE, now_ns, truth)
        if topic == CLOUD_TOPIC and stamp_ns(data) >= self._last_ns:
            self._last_answered = True

    def _outputs_matched(self) -> bool:
        return self._heard and all(self._node.count_publishers(topic) > 0 for topic in OUTPUTS)

    def run(self) -> bool:
        """Record to the end; return whether the camera was ever heard."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._outputs_matched():
            if time.monotonic() > deadline:
                return False
            rclpy.spin_once(self._node, timeout_sec=0.1)
        camera = QoSProfile(reliability=ReliabilityPolicy.BEST_EFFORT, history=HistoryPolicy.KEEP_LAST, depth=DEPTH)
        for topic, kind in self._camera.items():
            self._subscribe(CameraInfo if kind == INFO_TYPE else MESSAGE_TYPES[kind], topic, kind, camera)
        while not self._told_after_last:
            idle_s = time.monotonic() - self._newest_s
            if idle_s > (IDLE_S if self._begun else START_TIMEOUT_S):
                break
            rclpy.spin_once(self._node, timeout_sec=0.1)
        return self._begun


def last_stamp_ns(bag: BagReader, image_topic: str) -> int:
    """Return the stamp of the last image of a bag; 0 when it has none."""
    last = 0
    for message in bag.messages((image_topic,)):
        last = stamp_ns(message.data)
    return last


def main(arguments: list[str] | None = None) -> int:
    """Record; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bag", required=True, help="the bag that is played: its truth is recorded too")
    parser.add_argument("--image-topic", required=True)
    parser.add_argument("--info-topic", required=True)
    parser.add_argument("--out", required=True, help="the bag to write")
    options = parser.parse_args(arguments)
    rclpy.init()
    node = rclpy.create_node("demo_listener")
    try:
        with BagReader(options.bag) as played, BagWriter(options.out) as out:
            last_ns = last_stamp_ns(played, options.image_topic)
            listener = Listener(node, out, played, options.image_topic, options.info_topic, last_ns)
            heard = listener.run()
        if not heard:
            node.get_logger().error(f"neither {NODE} nor the camera was heard within {START_TIMEOUT_S:.0f} s.")
        return 0 if heard else 1
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
