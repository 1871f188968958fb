# SPDX-License-Identifier: Apache-2.0
"""The program that docs/your_object.md gives for MoveIt runs beside the pose node as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import rclpy
import rclpy.node
from geometry_msgs.msg import Pose, PoseWithCovarianceStamped
from ros.ros_graph import FRAME, STAMP, FakeResult, Graph, estimate_of, image_message, info_message, some_pose, stamp_of
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header


class CollisionObject:
    """A stand-in with the fields and constants of moveit_msgs/msg/CollisionObject, which no index of wheels has."""

    ADD, REMOVE, APPEND, MOVE = b"\x00", b"\x01", b"\x02", b"\x03"
    __slots__ = (
        "header", "pose", "id", "type", "primitives", "primitive_poses", "meshes", "mesh_poses", "planes",
        "plane_poses", "subframe_names", "subframe_poses", "operation",
    )  # fmt: skip
    header: Header
    pose: Pose
    id: str
    primitives: list[Any]
    primitive_poses: list[Pose]

    def __init__(self, **fields: Any) -> None:
        self.header, self.pose, self.operation = Header(), Pose(), self.ADD
        for name, value in fields.items():
            setattr(self, name, value)


def program(repo_root: Path) -> str:
    """Return the tutorial's program for MoveIt."""
    text = (repo_root / "docs" / "your_object.md").read_text(encoding="utf-8")
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "moveit_msgs" in block]
    return str(found)


def started(graph: Graph, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> list[CollisionObject]:
    """Run the program in the graph of the test; return what it will have sent to MoveIt."""
    sent: list[CollisionObject] = []

    class InGraph(rclpy.node.Node):
        def __init__(self, name: str) -> None:
            super().__init__(name, context=graph.context)

        def create_publisher(self, kind: Any, topic: str, qos: Any, **more: Any) -> Any:
            if kind is not CollisionObject:
                return super().create_publisher(kind, topic, qos, **more)
            assert topic == "/collision_object"
            return type("Publisher", (), {"publish": staticmethod(sent.append)})

    messages = ModuleType("moveit_msgs.msg")
    messages.CollisionObject = CollisionObject  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "moveit_msgs", ModuleType("moveit_msgs"))
        patch.setitem(sys.modules, "moveit_msgs.msg", messages)
        patch.setattr(rclpy.node, "Node", InGraph)
        patch.setattr(rclpy, "init", lambda: None)
        patch.setattr(rclpy, "spin", graph.executor.add_node)
        exec(compile(program(repo_root), "docs/your_object.md", "exec"), {})  # our own document
    return sent


def test_the_part_enters_moveits_scene_when_it_is_seen_well_enough(
    graph: Graph, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = started(graph, repo_root, monkeypatch)
    well = np.diag([1e-3, 1e-3, 8e-3, 0.02, 0.02, 0.02]) ** 2
    doubtful = {"aside": (0, 0.02), "across": (1, 0.02), "in depth": (2, 0.05)}

    def seen_with(cov: Any) -> None:
        graph.fake.answer = lambda view: FakeResult(
            (estimate_of(graph.fake.objects[0], some_pose(), cov, view.camera),)
        )

    graph.start(estimator__tracking=False)
    images, infos = graph.sender(Image, "image"), graph.sender(CameraInfo, "camera_info")
    poses = graph.listen(PoseWithCovarianceStamped, "/pose_node/pose_with_covariance")
    graph.spin_until(lambda: graph.node.count_subscribers("/pose_node/pose_with_covariance") == 2)
    infos.publish(info_message())
    graph.spin_until(lambda: graph.node.statistics.camera_infos > 0)
    for number, (axis, sigma) in enumerate(doubtful.values(), start=1):
        cov = well.copy()
        cov[axis, axis] = sigma**2
        seen_with(cov)
        images.publish(image_message(number=number))
        graph.spin_until(lambda count=number: len(poses) == count)  # type: ignore[misc]
    seen_with(well)
    images.publish(image_message())
    graph.spin_until(lambda: len(sent) > 0)
    (part,) = sent
    assert part.operation == CollisionObject.ADD and part.id == "part"
    assert part.header.frame_id == FRAME and stamp_of(part) == STAMP
    assert part.pose == poses[-1].pose.pose
    np.testing.assert_allclose(
        [part.pose.position.x, part.pose.position.y, part.pose.position.z], some_pose().translation
    )
    # shapes are relative to the object's pose (moveit_msgs/CollisionObject), and a box is centred on its own
    (box,), (within,) = part.primitives, part.primitive_poses
    assert box.type == box.BOX and within.orientation == Pose().orientation
    centre = np.array([within.position.x, within.position.y, within.position.z])
    np.testing.assert_allclose(centre - np.array(box.dimensions) / 2, 0.0, atol=1e-12, err_msg="origin is not a corner")
