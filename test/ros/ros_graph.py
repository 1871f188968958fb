# SPDX-License-Identifier: Apache-2.0
"""A real ROS graph for each test, with a fake estimator behind the real node."""

from __future__ import annotations

import array
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.estimate import PoseEstimate, Rejection, RejectReason
from ukd_ros.geometry.keypoints import Keypoints
from ukd_ros.geometry.object_model import ObjectModel, Symmetries
from ukd_ros.geometry.pose import Pose, exp_so3

MATRIX = np.array([[610.0, 0.0, 318.0], [0.0, 612.0, 242.0], [0.0, 0.0, 1.0]])
FRAME = "camera_optical"
STAMP = (1_700_000_000, 123_456_789)

_domains = itertools.count(os.getpid() * 13)


def object_model(name: str = "part", seed: int = 3, count: int = 9) -> ObjectModel:
    """Return an object of about 10 cm with ``count`` keypoints."""
    points = np.random.default_rng(seed).uniform(-0.04, 0.05, (count, 3))
    return ObjectModel(name, points, 0.12, Symmetries())


def some_pose(seed: int = 1) -> Pose:
    """Return a pose about 0.6 m in front of the camera."""
    rng = np.random.default_rng(seed)
    return Pose(exp_so3(rng.normal(size=3)), np.array([0.02, -0.03, 0.6]) + rng.normal(scale=0.02, size=3))


def some_cov(seed: int = 1) -> npt.NDArray[np.float64]:
    """Return a full positive definite [6, 6] with millimetres and hundredths of rad."""
    root = np.random.default_rng(seed).normal(size=(6, 6)) * np.array([1e-3, 1e-3, 4e-3, 0.01, 0.02, 0.03])[:, None]
    return np.asarray(root @ root.T + np.diag([1e-7] * 3 + [1e-5] * 3), dtype=np.float64)


def estimate_of(
    model: ObjectModel, pose: Pose, cov: npt.NDArray[np.float64], camera: Camera, instance: int = 0
) -> PoseEstimate:
    """Return the estimate whose keypoints are exactly where ``pose`` puts them."""
    count = len(model.keypoints_3d)
    root = np.random.default_rng(5).normal(size=(2 * count, 2 * count))
    xy = camera.project(pose.transform(model.keypoints_3d))
    keypoints = Keypoints(xy, root @ root.T / count + np.eye(2 * count), np.linspace(0.5, 0.9, count, dtype=np.float64))
    inliers = np.arange(count) != 2
    return PoseEstimate(model.name, instance, pose, cov, 0.9 - 0.1 * instance, keypoints, inliers, 4.0, 2 * count - 8)


@dataclass
class FakeResult:
    """What the node reads of an estimator's answer."""

    estimates: tuple[PoseEstimate, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    timings_ms: dict[str, float] = field(default_factory=dict)
    tracked: bool = False


class FakeEstimator:
    """Answers each view by ``answer`` after ``delay_s``; remembers the views and the options it was given."""

    def __init__(self, objects: tuple[ObjectModel, ...]) -> None:
        self.objects = objects
        self.views: list[Any] = []
        self.delay_s = 0.0
        self.applied: list[Any] = []
        self.answer: Callable[[Any], FakeResult] = self.first_object

    def first_object(self, view: Any) -> FakeResult:
        """Find the first object, in the pose and with the covariance of the seed 1."""
        return FakeResult((estimate_of(self.objects[0], some_pose(), some_cov(), view.camera),))

    @staticmethod
    def nothing(view: Any) -> FakeResult:
        """Find nothing."""
        return FakeResult((), (Rejection(RejectReason.NOTHING_FOUND, "no object was found in the frame"),))

    def estimate(self, view: Any) -> FakeResult:
        """Answer one view."""
        self.views.append(view)
        time.sleep(self.delay_s)
        return self.answer(view)

    def reset(self) -> None:
        """Forget the warm-up."""
        self.views.clear()


class Graph:
    """One node under test and one probe in a domain of their own, spun by the test itself."""

    def __init__(self) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor

        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=1 + next(_domains) % 100)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.probe = rclpy.create_node("probe", context=self.context)
        self.executor.add_node(self.probe)
        self.fake = FakeEstimator((object_model(),))
        self.node: Any = None
        self.heard: dict[str, list[Any]] = {}

    def start(
        self, factory: Any = None, autostart: bool = True, remap: dict[str, str] | None = None, **values: Any
    ) -> Any:
        """Start the real node with parameters ``values`` ("__" stands for a dot) and the fake estimator."""
        from rclpy.parameter import Parameter

        from ukd_ros.ros.loading import LoadedModel
        from ukd_ros.ros.pose_node import PoseNode

        def load(options: Any, estimator_options: Any) -> LoadedModel:
            camera = Camera(64, 48, np.array([[60.0, 0, 32], [0, 60.0, 24], [0, 0, 1]]))
            return LoadedModel(self.fake, self.fake.objects, "fake model", "fake", camera, self.fake.applied.append)

        overrides = [Parameter(name.replace("__", "."), value=value) for name, value in values.items()]
        overrides.append(Parameter("autostart", value=autostart))
        rules = [word for a, b in (remap or {}).items() for word in ("-r", f"{a}:={b}")]
        self.node = PoseNode(
            factory or load,
            context=self.context,
            parameter_overrides=overrides,
            cli_args=["--ros-args", *rules] if rules else None,
        )
        self.executor.add_node(self.node)
        self.node.autostart()
        return self.node

    def listen(self, kind: Any, topic: str, qos: Any = 50) -> list[Any]:
        """Collect what comes on ``topic``."""
        messages: list[Any] = []
        self.heard[topic] = messages
        self.probe.create_subscription(kind, topic, messages.append, qos)
        return messages

    def sender(self, kind: Any, topic: str) -> Any:
        """Return a publisher once the node's subscription has matched it."""
        publisher = self.probe.create_publisher(kind, topic, 10)
        self.spin_until(lambda: publisher.get_subscription_count() > 0)
        return publisher

    def spin_until(self, done: Callable[[], bool], timeout_s: float = 8.0) -> bool:
        """Spin until ``done``; fail the test after ``timeout_s``."""
        end = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > end:
                heard = {topic: len(messages) for topic, messages in self.heard.items()}
                pytest.fail(f"nothing within {timeout_s} s; heard {heard}")
            self.executor.spin_once(timeout_sec=0.05)
        return True

    def spin_for(self, seconds: float) -> None:
        """Spin that long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.02)

    def call(self, kind: Any, name: str, request: Any) -> Any:
        """Call a service and return its response."""
        client = self.probe.create_client(kind, name)
        self.spin_until(client.service_is_ready)
        future = client.call_async(request)
        self.spin_until(future.done)
        return future.result()

    def close(self) -> None:
        """Take everything down."""
        self.executor.shutdown()
        if self.node is not None:
            self.node.destroy_node()
        self.probe.destroy_node()
        self.context.try_shutdown()


def info_message(width: int = 640, height: int = 480, frame: str = FRAME, **changes: Any) -> Any:
    """Return a good CameraInfo, with ``changes`` to its fields."""
    from sensor_msgs.msg import CameraInfo

    info = CameraInfo(width=width, height=height, distortion_model="plumb_bob", d=[0.0] * 5)
    info.k = MATRIX.reshape(9)
    info.p = np.hstack([MATRIX, np.zeros((3, 1))]).reshape(12)
    info.r = np.eye(3).reshape(9)
    info.header.frame_id = frame
    for name, value in changes.items():
        setattr(info, name, value)
    return info


def image_message(width: int = 640, height: int = 480, frame: str = FRAME, number: int = 0) -> Any:
    """Return a good rgb8 Image whose stamp is STAMP plus ``number`` ns."""
    from sensor_msgs.msg import Image

    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    image = Image(width=width, height=height, encoding="rgb8", step=3 * width)
    image.data = array.array("B", pixels.tobytes())
    image.header.frame_id = frame
    image.header.stamp.sec, image.header.stamp.nanosec = STAMP[0], STAMP[1] + number
    return image


def stamp_of(message: Any) -> tuple[int, int]:
    """Return (sec, nanosec) of a message's header."""
    return message.header.stamp.sec, message.header.stamp.nanosec
