# SPDX-License-Identifier: Apache-2.0
"""The pose node on a real ROS graph: what it answers, and what it makes of everything that is wrong."""

from __future__ import annotations

import array
import time
from typing import Any

import cv2
import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import DescribeParameters, SetParameters
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from ros.ros_graph import (
    FRAME,
    STAMP,
    FakeResult,
    Graph,
    estimate_of,
    image_message,
    info_message,
    object_model,
    some_cov,
    some_pose,
    stamp_of,
)
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from std_srvs.srv import SetBool
from visualization_msgs.msg import Marker, MarkerArray

from ukd_ros.ros.messages import CLOUD_DTYPE


def running(graph: Graph, **values: Any) -> tuple[Any, Any, list[Any]]:
    """Start the node; return (image publisher, camera_info publisher, the clouds it publishes)."""
    graph.start(**values)
    clouds = graph.listen(PointCloud2, "/pose_node/keypoints")
    images = graph.sender(Image, "image")
    infos = graph.sender(CameraInfo, "camera_info")
    graph.spin_until(lambda: graph.node.count_subscribers("/pose_node/keypoints") > 0)
    return images, infos, clouds


def with_info(graph: Graph, infos: Any, message: Any = None) -> None:
    """Send a camera_info and wait until the node has it."""
    before = graph.node.statistics.camera_infos
    infos.publish(info_message() if message is None else message)
    graph.spin_until(lambda: graph.node.statistics.camera_infos > before)


def change_state(graph: Graph, transition: int) -> bool:
    request = ChangeState.Request()
    request.transition.id = transition
    return bool(graph.call(ChangeState, "/pose_node/change_state", request).success)


def state_of(graph: Graph) -> int:
    return int(graph.call(GetState, "/pose_node/get_state", GetState.Request()).current_state.id)


def set_parameter(graph: Graph, name: str, value: Any) -> Any:
    request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
    return graph.call(SetParameters, "/pose_node/set_parameters", request).results[0]


def test_a_pose_and_its_covariance_come_under_the_images_own_header(graph: Graph) -> None:
    images, infos, clouds = running(graph)
    poses = graph.listen(PoseStamped, "/pose_node/pose")
    named = graph.listen(PoseStamped, "/pose_node/part/pose")
    with_cov = graph.listen(PoseWithCovarianceStamped, "/pose_node/pose_with_covariance")
    named_cov = graph.listen(PoseWithCovarianceStamped, "/pose_node/part/pose_with_covariance")
    with_info(graph, infos)
    images.publish(image_message())
    graph.spin_until(lambda: all(len(m) for m in (poses, named, with_cov, named_cov, clouds)))
    for message in (poses[0], named[0], with_cov[0], named_cov[0], clouds[0]):
        assert stamp_of(message) == STAMP
        assert message.header.frame_id == FRAME
    truth = some_pose()
    position, orientation = with_cov[0].pose.pose.position, with_cov[0].pose.pose.orientation
    np.testing.assert_allclose([position.x, position.y, position.z], truth.translation)
    np.testing.assert_allclose([orientation.x, orientation.y, orientation.z, orientation.w], truth.quaternion())
    np.testing.assert_allclose(np.reshape(with_cov[0].pose.covariance, (6, 6)), some_cov(), rtol=1e-12)
    assert poses[0].pose == with_cov[0].pose.pose == named[0].pose
    rows = np.frombuffer(clouds[0].data, dtype=CLOUD_DTYPE)
    assert len(rows) == 9 == clouds[0].width
    xyz = truth.transform(graph.fake.objects[0].keypoints_3d)
    np.testing.assert_allclose(np.stack([rows["x"], rows["y"], rows["z"]], axis=1), xyz, atol=1e-6)


def test_a_frame_with_nothing_in_it_gives_an_empty_cloud_and_no_pose(graph: Graph) -> None:
    images, infos, clouds = running(graph)
    poses = graph.listen(PoseStamped, "/pose_node/pose")
    graph.fake.answer = graph.fake.nothing
    with_info(graph, infos)
    images.publish(image_message(number=5))
    graph.spin_until(lambda: len(clouds) == 1)
    assert clouds[0].width == 0 and len(clouds[0].data) == 0 and len(clouds[0].fields) == len(CLOUD_DTYPE.names or ())
    assert stamp_of(clouds[0]) == (STAMP[0], STAMP[1] + 5)
    assert not poses


BAD_IMAGES: dict[str, dict[str, Any]] = {
    "unknown encoding": {"encoding": "rgb7"},
    "depth": {"encoding": "32FC1"},
    "no size": {"width": 0, "height": 0},
    "short data": {"data": array.array("B", b"\x00" * 100)},
    "no data": {"data": array.array("B")},
    "step below the row": {"step": 100},
    "huge": {"width": 2**31, "height": 2**31},
}


def test_bad_images_are_answered_with_an_empty_cloud_and_the_next_good_one_rightly(graph: Graph) -> None:
    images, infos, clouds = running(graph)
    with_info(graph, infos)
    for number, changes in enumerate(BAD_IMAGES.values()):
        message = image_message(number=number)
        for name, value in changes.items():
            setattr(message, name, value)
        images.publish(message)
        graph.spin_until(lambda count=number: len(clouds) > count)  # type: ignore[misc]
        assert clouds[-1].width == 0
        assert stamp_of(clouds[-1])[1] == STAMP[1] + number
    assert graph.node.statistics.bad_images == len(BAD_IMAGES)
    last = graph.node.problems.last()
    assert last is not None and last[0].startswith("/image: ")
    images.publish(image_message(number=99))
    graph.spin_until(lambda: len(clouds) > len(BAD_IMAGES))
    assert clouds[-1].width == 9


def test_a_padded_step_is_read_rightly(graph: Graph) -> None:
    images, infos, clouds = running(graph)
    with_info(graph, infos)
    message = image_message()
    pixels = np.frombuffer(message.data, dtype=np.uint8).reshape(480, 1920)
    padded = np.full((480, 1923), 7, dtype=np.uint8)
    padded[:, :1920] = pixels
    message.step, message.data = 1923, array.array("B", padded.tobytes())
    images.publish(message)
    graph.spin_until(lambda: len(clouds) == 1)
    np.testing.assert_array_equal(graph.fake.views[0].image.reshape(480, 1920), pixels)


BAD_INFOS: dict[str, tuple[Any, str]] = {
    "all zeros": (lambda: CameraInfo(), "camera_info only came for ''"),
    "zero K": (lambda: info_message(k=np.zeros(9), p=np.zeros(12)), "not calibrated"),
    "NaN": (lambda: info_message(k=np.full(9, np.nan)), "NaN"),
    "another size": (lambda: info_message(width=320, height=240), "320x240"),
    "another frame": (lambda: info_message(frame="other_optical"), "'other_optical'"),
}


@pytest.mark.parametrize("name", BAD_INFOS)
def test_a_wrong_camera_info_is_said_and_the_next_right_one_serves(graph: Graph, name: str) -> None:
    images, infos, clouds = running(graph)
    make, said = BAD_INFOS[name]
    with_info(graph, infos, make())
    images.publish(image_message())
    graph.spin_until(lambda: len(clouds) == 1)
    assert clouds[0].width == 0 and not graph.fake.views
    last = graph.node.problems.last()
    assert last is not None and said in last[0]
    with_info(graph, infos)
    images.publish(image_message(number=1))
    graph.spin_until(lambda: len(clouds) == 2)
    assert clouds[1].width == 9
    np.testing.assert_allclose(graph.fake.views[0].camera.matrix[0, 0], 610.0)


def test_the_newest_image_wins_and_the_dropped_are_counted(graph: Graph) -> None:
    images, infos, clouds = running(graph)
    with_info(graph, infos)
    graph.fake.delay_s = 0.3
    for number in range(8):
        images.publish(image_message(number=number))
        graph.spin_for(0.02)
    graph.spin_until(lambda: graph.node.statistics.received == 8)
    graph.spin_until(lambda: len(clouds) >= 2)
    graph.spin_for(0.4)
    answered = [stamp_of(cloud)[1] - STAMP[1] for cloud in clouds]
    assert answered[-1] == 7
    assert len(answered) + graph.node.statistics.dropped == 8
    assert graph.node.statistics.dropped >= 4


def test_compressed_images_follow_the_remapped_image_topic(graph: Graph) -> None:
    graph.start(compressed=True, remap={"image": "/cam/image_raw", "camera_info": "/cam/camera_info"})
    clouds = graph.listen(PointCloud2, "/pose_node/keypoints")
    images = graph.sender(CompressedImage, "/cam/image_raw/compressed")
    infos = graph.sender(CameraInfo, "/cam/camera_info")
    with_info(graph, infos)
    picture = np.zeros((480, 640, 3), dtype=np.uint8)
    picture[..., 2] = 200  # red, as OpenCV orders it
    message = CompressedImage(format="jpeg", data=array.array("B", cv2.imencode(".jpg", picture)[1].tobytes()))
    message.header = image_message().header
    images.publish(message)
    graph.spin_until(lambda: len(clouds) == 1)
    assert clouds[0].width == 9
    red, green, blue = graph.fake.views[0].image[240, 320]
    assert red > 190 and max(green, blue) < 10
    message.data = array.array("B", b"no jpeg at all")
    images.publish(message)
    graph.spin_until(lambda: len(clouds) == 2)
    assert clouds[1].width == 0 and graph.node.statistics.bad_images == 1


def test_rectified_topics_use_p_and_raw_ones_k(graph: Graph) -> None:
    graph.start(remap={"image": "/cam/image_rect"})
    images = graph.sender(Image, "/cam/image_rect")
    infos = graph.sender(CameraInfo, "camera_info")
    info = info_message(d=[0.1, 0.0, 0.0, 0.0, 0.0])
    projection = np.array(info.p).reshape(3, 4)
    projection[0, 0] = 555.0
    info.p = projection.reshape(12)
    with_info(graph, infos, info)
    images.publish(image_message())
    graph.spin_until(lambda: len(graph.fake.views) == 1)
    assert graph.fake.views[0].camera.matrix[0, 0] == 555.0
    assert not np.any(graph.fake.views[0].camera.distortion)


def test_lifecycle_transitions_release_and_take_up_again(graph: Graph) -> None:
    graph.start(autostart=False)
    assert state_of(graph) == State.PRIMARY_STATE_UNCONFIGURED
    for _ in range(2):
        assert change_state(graph, Transition.TRANSITION_CONFIGURE)
        assert state_of(graph) == State.PRIMARY_STATE_INACTIVE
        assert graph.node.count_subscribers("/image") == 0
        assert change_state(graph, Transition.TRANSITION_ACTIVATE)
        assert state_of(graph) == State.PRIMARY_STATE_ACTIVE
        assert change_state(graph, Transition.TRANSITION_DEACTIVATE)
        assert change_state(graph, Transition.TRANSITION_CLEANUP)
    graph.node.trigger_configure()
    graph.node.trigger_activate()
    clouds = graph.listen(PointCloud2, "/pose_node/keypoints")
    images, infos = graph.sender(Image, "image"), graph.sender(CameraInfo, "camera_info")
    with_info(graph, infos)
    images.publish(image_message())
    graph.spin_until(lambda: len(clouds) == 1)
    assert change_state(graph, Transition.TRANSITION_ACTIVE_SHUTDOWN)


def test_a_failed_configure_leaves_the_node_unconfigured_with_the_reason(graph: Graph) -> None:
    diagnostics = graph.listen(DiagnosticArray, "/diagnostics")
    graph.start(model="/no/such/model", factory=__import__("ukd_ros.ros.loading", fromlist=["x"]).load_model)
    assert state_of(graph) == State.PRIMARY_STATE_UNCONFIGURED
    graph.spin_until(lambda: len(diagnostics) > 0)
    status = diagnostics[-1].status[0]
    assert status.level == DiagnosticStatus.ERROR
    assert "/no/such/model" in status.message and "configure failed" in status.message


def test_an_unforeseen_error_in_configure_is_not_swallowed(graph: Graph) -> None:
    def broken(options: Any, estimator_options: Any) -> Any:
        raise ZeroDivisionError("seldom")

    diagnostics = graph.listen(DiagnosticArray, "/diagnostics")
    graph.start(factory=broken)
    assert state_of(graph) == State.PRIMARY_STATE_UNCONFIGURED
    graph.spin_until(lambda: len(diagnostics) > 0)
    assert "ZeroDivisionError" in diagnostics[-1].status[0].message


def test_an_error_in_the_estimator_costs_one_frame(graph: Graph) -> None:
    images, infos, clouds = running(graph)
    with_info(graph, infos)

    def broken(view: Any) -> FakeResult:
        raise FloatingPointError("overflow")

    graph.fake.answer = broken
    images.publish(image_message())
    graph.spin_until(lambda: len(clouds) == 1)
    graph.fake.answer = graph.fake.first_object
    images.publish(image_message(number=1))
    graph.spin_until(lambda: len(clouds) == 2)
    assert [cloud.width for cloud in clouds] == [0, 9]


def test_parameters_are_described_checked_and_applied_live(graph: Graph) -> None:
    images, infos, clouds = running(graph)
    with_info(graph, infos)
    names = ["model", "marker_lifetime_s", "estimator.min_score"]
    request = DescribeParameters.Request(names=names)
    described = graph.call(DescribeParameters, "/pose_node/describe_parameters", request).descriptors
    assert all(len(d.description) > 10 for d in described)
    assert described[1].floating_point_range[0].from_value == 0.0
    for name, value, reason in (
        ("estimator.min_score", 1.5, "0..1"),
        ("marker_lifetime_s", -1.0, "range"),
        ("model", "another", "configured"),
        ("rectified", "true", "configured"),
        ("object", "unheard_of", "unheard_of"),
        ("estimator.min_score", "much", "type"),
    ):
        result = set_parameter(graph, name, value)
        assert not result.successful and reason in result.reason, (name, result.reason)
    assert set_parameter(graph, "estimator.min_score", 0.7).successful
    images.publish(image_message())
    graph.spin_until(lambda: len(clouds) == 1)
    assert graph.fake.applied[-1].min_score == 0.7
    change_state(graph, Transition.TRANSITION_DEACTIVATE)
    change_state(graph, Transition.TRANSITION_CLEANUP)
    assert set_parameter(graph, "model", "another").successful
    result = set_parameter(graph, "rectified", "maybe")
    assert not result.successful and "auto, true, false" in result.reason


def test_set_enabled_stops_and_resumes(graph: Graph) -> None:
    images, infos, clouds = running(graph)
    with_info(graph, infos)
    assert graph.call(SetBool, "/pose_node/set_enabled", SetBool.Request(data=False)).success
    graph.spin_until(lambda: images.get_subscription_count() == 0)
    images.publish(image_message())
    graph.spin_for(0.2)
    assert not clouds
    assert graph.call(SetBool, "/pose_node/set_enabled", SetBool.Request(data=True)).success
    graph.spin_until(lambda: images.get_subscription_count() == 1)
    images.publish(image_message(number=1))
    graph.spin_until(lambda: len(clouds) == 1)


def test_the_object_parameter_chooses_whose_pose_is_published(graph: Graph) -> None:
    graph.fake.objects = (object_model("part"), object_model("other part", seed=9))
    images, infos, clouds = running(graph, object="other part")
    second = some_pose(seed=8)

    def both(view: Any) -> FakeResult:
        first, other = graph.fake.objects
        return FakeResult(
            (
                estimate_of(other, some_pose(seed=4), some_cov(), view.camera, instance=1),
                estimate_of(first, some_pose(), some_cov(), view.camera),
                estimate_of(other, second, some_cov(), view.camera),
            )
        )

    graph.fake.answer = both
    poses = graph.listen(PoseStamped, "/pose_node/pose")
    named = graph.listen(PoseStamped, "/pose_node/other_part/pose")
    with_info(graph, infos)
    images.publish(image_message())
    graph.spin_until(lambda: bool(poses and named and clouds))
    assert poses[0].pose.position.x == named[0].pose.position.x == second.translation[0]
    rows = np.frombuffer(clouds[0].data, dtype=CLOUD_DTYPE)
    assert sorted(set(zip(rows["object"].tolist(), rows["instance"].tolist(), strict=True))) == [(0, 0), (1, 0), (1, 1)]


def test_markers_and_overlay_come_while_somebody_looks_and_stale_markers_go(graph: Graph) -> None:
    images, infos, clouds = running(graph, marker_lifetime_s=2.5)
    with_info(graph, infos)
    markers = graph.listen(MarkerArray, "/pose_node/markers")
    overlays = graph.listen(Image, "/pose_node/overlay")
    graph.spin_until(lambda: graph.node.count_subscribers("/pose_node/overlay") > 0)
    images.publish(image_message())
    graph.spin_until(lambda: bool(markers and overlays))
    shown = {(m.ns, m.id) for m in markers[0].markers}
    assert len(shown) == 5
    assert all(m.action == Marker.ADD and m.lifetime.sec == 2 for m in markers[0].markers)
    assert all(stamp_of(m) == STAMP and m.header.frame_id == FRAME for m in markers[0].markers)
    assert (overlays[0].width, overlays[0].height, overlays[0].encoding) == (640, 480, "rgb8")
    assert bytes(overlays[0].data) != bytes(image_message().data)
    graph.fake.answer = graph.fake.nothing
    images.publish(image_message(number=1))
    graph.spin_until(lambda: len(markers) == 2)
    assert {(m.ns, m.id) for m in markers[1].markers} == shown
    assert all(m.action == Marker.DELETE for m in markers[1].markers)


def test_silence_on_the_inputs_is_said_with_both_topics(graph: Graph) -> None:
    diagnostics = graph.listen(DiagnosticArray, "/diagnostics")
    graph.start(input_timeout_s=0.2)
    graph.sender(Image, "image")
    graph.spin_until(lambda: any("no message on /camera_info" in d.status[0].message for d in diagnostics), 5.0)
    assert diagnostics[-1].status[0].level == DiagnosticStatus.WARN


def test_an_incompatible_quality_of_service_is_said(graph: Graph) -> None:
    override: dict[str, Any] = {"qos_overrides./image.subscription.reliability": "reliable"}
    graph.start(**override)
    graph.probe.create_publisher(Image, "image", QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT))
    graph.spin_until(lambda: graph.node.problems.last() is not None)
    last = graph.node.problems.last()
    assert last is not None and "RELIABILITY" in last[0].upper() and "/image" in last[0]


def test_a_best_effort_and_a_reliable_camera_are_both_heard(graph: Graph) -> None:
    images, infos, clouds = running(graph)
    with_info(graph, infos)
    best_effort = graph.probe.create_publisher(
        Image, "image", QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
    )
    graph.spin_until(lambda: best_effort.get_subscription_count() > 0)
    images.publish(image_message(number=1))
    graph.spin_until(lambda: len(clouds) == 1)
    best_effort.publish(image_message(number=2))
    graph.spin_until(lambda: len(clouds) == 2)


def test_diagnostics_tell_rates_latency_and_model(graph: Graph) -> None:
    diagnostics = graph.listen(DiagnosticArray, "/diagnostics")
    images, infos, clouds = running(graph)
    with_info(graph, infos)
    for number in range(30):
        images.publish(image_message(number=number))
        graph.spin_until(lambda count=number: len(clouds) > count)  # type: ignore[misc]
    seen = len(diagnostics)
    graph.spin_until(lambda: len(diagnostics) > seen, 3.0)
    status = diagnostics[-1].status[0]
    values = {v.key: v.value for v in status.values}
    assert status.level == DiagnosticStatus.OK and status.message == "active"
    assert values["images received"] == values["frames processed"] == values["frames with a pose"] == "30"
    assert values["model"] == "fake model" and values["state"] == "active"
    assert float(values["latency p50 (ms)"]) > 0.0
    assert float(values["input rate (Hz)"]) > 1.0


def test_shutdown_in_the_middle_of_a_frame_is_clean(graph: Graph) -> None:
    images, infos, _ = running(graph)
    with_info(graph, infos)
    graph.fake.delay_s = 0.3
    images.publish(image_message())
    graph.spin_until(lambda: len(graph.fake.views) == 1)
    start = time.monotonic()
    graph.node.destroy_node()
    assert time.monotonic() - start < 2.0
    graph.node = None
