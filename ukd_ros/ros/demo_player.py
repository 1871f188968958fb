# SPDX-License-Identifier: Apache-2.0
"""Plays the camera of a bag into the graph as a driver would; a process of its own, started by ``demo.py``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import rclpy
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from ukd_ros.data.bags import INFO_TYPE, BagReader

MESSAGE_TYPES: dict[str, Any] = {
    INFO_TYPE: CameraInfo,
    "sensor_msgs/msg/CompressedImage": CompressedImage,
    "sensor_msgs/msg/Image": Image,
}
MATCH_TIMEOUT_S = 60.0
LINGER_S = 0.5
"""A best-effort sample that is on its way when its writer goes is lost."""


class NoListenerError(RuntimeError):
    """Nobody subscribed in time."""


class Player:
    """Publishes an image topic and its camera_info, message by message unchanged, at the bag's pace or another."""

    def __init__(self, node: Node, bag: BagReader, image_topic: str, info_topic: str) -> None:
        """Offer both topics as a camera driver does: best effort, a short queue."""
        qos = QoSProfile(reliability=ReliabilityPolicy.BEST_EFFORT, history=HistoryPolicy.KEEP_LAST, depth=10)
        self._node = node
        self._bag = bag
        self._image_topic = image_topic
        self._publishers = {
            topic: node.create_publisher(MESSAGE_TYPES[bag.topics[topic]], topic, qos)
            for topic in (image_topic, info_topic)
        }

    def wait_for_listeners(self, listeners: int) -> None:
        """Wait until ``listeners`` subscriptions have matched each topic; NoListenerError after a minute."""
        end = time.monotonic() + MATCH_TIMEOUT_S
        while any(p.get_subscription_count() < listeners for p in self._publishers.values()):
            if time.monotonic() > end:
                counts = {topic: p.get_subscription_count() for topic, p in self._publishers.items()}
                raise NoListenerError(f"{listeners} subscriptions were expected on each topic, there are {counts}.")
            rclpy.spin_once(self._node, timeout_sec=0.05)

    def play(self, rate_hz: float | None) -> int:
        """Publish everything, images ``rate_hz`` apart (None: as recorded); return how many images were sent."""
        sent = 0
        first_ns: int | None = None
        start = time.monotonic()
        for message in self._bag.messages(self._publishers):
            first_ns = message.time_ns if first_ns is None else first_ns
            due_s = (message.time_ns - first_ns) * 1e-9 if rate_hz is None else sent / rate_hz
            time.sleep(max(0.0, start + due_s - time.monotonic()))
            self._publishers[message.topic].publish(message.data)
            sent += message.topic == self._image_topic
        return sent


def main(arguments: list[str] | None = None) -> int:
    """Play; print one line of JSON with the number of images sent; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bag", required=True)
    parser.add_argument("--image-topic", required=True)
    parser.add_argument("--info-topic", required=True)
    parser.add_argument("--rate", type=float, default=None, help="images per second; default: as recorded")
    parser.add_argument("--listeners", type=int, default=1, help="subscriptions to wait for on each topic")
    options = parser.parse_args(arguments)
    rclpy.init()
    node = rclpy.create_node("demo_camera")
    try:
        with BagReader(options.bag) as bag:
            player = Player(node, bag, options.image_topic, options.info_topic)
            player.wait_for_listeners(options.listeners)
            sent = player.play(options.rate)
        time.sleep(LINGER_S)
    except NoListenerError as error:
        node.get_logger().error(str(error))
        return 1
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
    sys.stdout.write(json.dumps({"sent": sent}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
