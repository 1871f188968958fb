# SPDX-License-Identifier: Apache-2.0
"""Messages read as their consumers read them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from ros.ros_graph import estimate_of, object_model, some_cov, some_pose
from scipy.spatial.transform import Rotation
from std_msgs.msg import Header
from visualization_msgs.msg import Marker

from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.estimate import Rejection, RejectReason
from ukd_ros.geometry.pose import Pose
from ukd_ros.geometry.view import View
from ukd_ros.ros.markers import MarkerHistory, covariance_ellipsoid, object_markers
from ukd_ros.ros.messages import (
    CLOUD_DTYPE,
    KnownObjects,
    cloud_message,
    keypoint_rows,
    pose_message,
    pose_with_covariance,
)
from ukd_ros.ros.outputs import topic_token
from ukd_ros.ros.overlay import draw_overlay

CAMERA = Camera(640, 480, np.array([[610.0, 0.0, 318.0], [0.0, 612.0, 242.0], [0.0, 0.0, 1.0]]))
MODEL = object_model()
OBJECTS = KnownObjects.of((object_model("first"), MODEL))


def header() -> Header:
    message = Header(frame_id="camera_optical")
    message.stamp.sec = 7
    return message


def test_points_lie_behind_their_pixels_whatever_a_symmetric_object_is_called() -> None:
    """Followed as the half-turned twin of what the network named, the cloud still shows the network's keypoints."""
    pose = some_pose()
    twin = pose @ Pose(np.diag([-1.0, -1.0, 1.0]), np.array([0.01, 0.0, 0.0]))
    seen = estimate_of(MODEL, pose, some_cov(), CAMERA)
    renamed = replace(seen, T_camera_object=twin, T_camera_keypoints=pose)
    for field in ("x", "y", "z", "u", "v"):
        rows, others = (keypoint_rows([item], [], OBJECTS) for item in (seen, renamed))
        np.testing.assert_array_equal(rows[field], others[field])


def test_a_consumer_finds_the_error_distributed_as_the_covariance_says() -> None:
    """REP-103: row-major, x y z and rotation about the fixed axes; truths drawn so must give NEES 6."""
    pose, cov = some_pose(), some_cov()
    message = pose_with_covariance(header(), pose_message(pose), cov)
    read_cov = np.array(message.pose.covariance).reshape(6, 6)
    q, p = message.pose.pose.orientation, message.pose.pose.position
    read_R = Rotation.from_quat([q.x, q.y, q.z, q.w])
    read_t = np.array([p.x, p.y, p.z])
    rng = np.random.default_rng(11)
    draws = rng.multivariate_normal(np.zeros(6), cov, 2000)
    nees = []
    for draw in draws:
        truth = pose.retract(draw)
        turn = (Rotation.from_matrix(truth.rotation) * read_R.inv()).as_rotvec()
        error = np.concatenate([truth.translation - read_t, turn])
        nees.append(error @ np.linalg.solve(read_cov, error))
    assert abs(np.mean(nees) - 6.0) < 4.0 * np.sqrt(12.0 / 2000)


def test_the_cloud_is_what_its_fields_say() -> None:
    estimate = estimate_of(MODEL, some_pose(), some_cov(), CAMERA, instance=2)
    rejection = Rejection(RejectReason.DEGENERATE, "flat", "first", estimate.keypoints)
    silent = Rejection(RejectReason.NOTHING_FOUND, "nothing")
    message = cloud_message(header(), keypoint_rows([estimate], [rejection, silent], OBJECTS))
    kinds = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}
    layout = np.dtype(
        {
            "names": [f.name for f in message.fields],
            "formats": [kinds[f.datatype] for f in message.fields],
            "offsets": [f.offset for f in message.fields],
            "itemsize": message.point_step,
        }
    )
    assert layout == CLOUD_DTYPE and message.row_step == message.width * message.point_step == len(message.data)
    rows = np.frombuffer(bytes(message.data), dtype=layout)
    assert len(rows) == 18
    found, refused = rows[rows["instance"] == 2], rows[rows["instance"] == -1]
    assert set(found["object"]) == {1} and set(refused["object"]) == {0}
    np.testing.assert_array_equal(found["keypoint"], np.arange(9))
    np.testing.assert_allclose(np.stack([found["u"], found["v"]], 1), estimate.keypoints.xy, rtol=1e-6)
    for k, row in enumerate(found):
        block = estimate.keypoints.block(k)
        np.testing.assert_allclose(
            [row["cov_uu"], row["cov_uv"], row["cov_vv"]], block[[0, 0, 1], [0, 1, 1]], rtol=1e-6
        )
    xyz = np.stack([found["x"], found["y"], found["z"]], 1).astype(np.float64)
    np.testing.assert_allclose(CAMERA.project(xyz), estimate.keypoints.xy, atol=1e-3)
    assert np.isnan(refused["x"]).all() and np.isfinite(refused["u"]).all()


def test_the_ellipsoid_has_the_covariances_own_axes() -> None:
    cov = some_cov()[:3, :3]
    rotation, sigmas = covariance_ellipsoid(cov)
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0)
    np.testing.assert_allclose(rotation @ np.diag(sigmas**2) @ rotation.T, cov, atol=1e-15)
    estimate = estimate_of(MODEL, some_pose(), some_cov(), CAMERA)
    sphere = next(m for m in object_markers(header(), estimate, MODEL, 1.0) if m.type == Marker.SPHERE)
    np.testing.assert_allclose([sphere.scale.x, sphere.scale.y, sphere.scale.z], 6.0 * sigmas)
    q = sphere.pose.orientation
    read = Rotation.from_quat([q.x, q.y, q.z, q.w]).as_matrix()
    np.testing.assert_allclose(read @ np.diag(sigmas**2) @ read.T, cov, atol=1e-12)


def test_the_box_has_twelve_edges_along_the_objects_axes() -> None:
    estimate = estimate_of(MODEL, some_pose(), some_cov(), CAMERA)
    box = next(m for m in object_markers(header(), estimate, MODEL, 1.0) if m.ns.endswith("/box"))
    points = np.array([[p.x, p.y, p.z] for p in box.points]).reshape(12, 2, 3)
    edges = np.abs(points[:, 1] - points[:, 0])
    size = np.ptp(MODEL.keypoints_3d, axis=0)
    assert sorted(tuple(np.nonzero(e > 1e-12)[0]) for e in edges) == [(0,)] * 4 + [(1,)] * 4 + [(2,)] * 4
    np.testing.assert_allclose(edges.max(axis=0), size)
    assert len({tuple(np.round(p, 9)) for p in points.reshape(-1, 3)}) == 8


def test_markers_that_are_gone_are_deleted_once() -> None:
    history = MarkerHistory(OBJECTS)
    two = [estimate_of(MODEL, some_pose(i), some_cov(), CAMERA, instance=i) for i in range(2)]
    first = history.frame(header(), two, 1.0)
    second = history.frame(header(), two[:1], 1.0)
    third = history.frame(header(), two[:1], 1.0)
    assert all(m.action == Marker.ADD for m in first.markers) and len(first.markers) == 10
    assert {(m.ns, m.id) for m in second.markers if m.action == Marker.DELETE} == {
        (m.ns, 1) for m in first.markers if m.id == 1
    }
    assert all(m.action == Marker.ADD for m in third.markers)
    assert len(history.all_gone(header()).markers) == 5 and not history.all_gone(header()).markers


def test_the_overlay_marks_the_keypoints_and_leaves_the_view_alone() -> None:
    image = np.full((480, 640, 3), 90, dtype=np.uint8)
    view = View(image, CAMERA)
    estimate = estimate_of(MODEL, some_pose(), some_cov(), CAMERA)
    drawn = draw_overlay(view, [estimate], [], OBJECTS)
    assert (view.image == 90).all()
    changed = np.any(drawn != 90, axis=2)
    for u, v in np.round(estimate.keypoints.xy).astype(int):
        assert changed[v - 1 : v + 2, u - 1 : u + 2].any()
    far = np.ones_like(changed)
    far[:40] = False  # the label
    for u, v in estimate.keypoints.xy:
        far[max(int(v) - 60, 0) : int(v) + 60, max(int(u) - 60, 0) : int(u) + 60] = False
    origin = CAMERA.project(estimate.T_camera_object.translation[None])[0]
    far[int(origin[1]) - 90 : int(origin[1]) + 90, int(origin[0]) - 90 : int(origin[0]) + 90] = False
    assert far.any() and not changed[far].any()


def test_what_cannot_be_drawn_is_left_out() -> None:
    from ukd_ros.geometry.keypoints import Keypoints

    xy = np.array([[np.nan, 1.0], [1e9, 5.0], [50.0, 60.0]])
    cov = np.eye(6)
    cov[4, 4] = cov[5, 5] = 1e12
    keypoints = Keypoints(xy, cov, np.ones(3))
    view = View(np.zeros((480, 640, 3), dtype=np.uint8), CAMERA)
    rejection = Rejection(RejectReason.TOO_FEW_KEYPOINTS, "", "part", keypoints)
    assert draw_overlay(view, [], [rejection], OBJECTS)[58:63, 48:53].any()


def test_object_names_become_topic_names() -> None:
    names = {"part": "part", "obj_000008": "obj_000008", "8": "object_8", "a  b/c": "a_b_c", "Müller": "M_ller"}
    assert {name: topic_token(name) for name in names} == names
