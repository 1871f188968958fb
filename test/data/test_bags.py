# SPDX-License-Identifier: Apache-2.0
"""Bags: what is written is read back, whole or not at all, and what is broken is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ukd_ros.data.bags import BagError, BagReader, BagWriter, bag_truth, bag_views, write_bag
from ukd_ros.data.rosbag.from_bop import bag_from_bop
from ukd_ros.geometry.camera import Camera, DistortionModel
from ukd_ros.geometry.pose import Pose, exp_so3
from ukd_ros.geometry.view import LabelledView, ObjectLabel, View
from ukd_ros.perception.images import CameraInfoError

MATRIX = np.array([[300.0, 0.0, 80.5], [0.0, 301.0, 60.25], [0.0, 0.0, 1.0]])
LENS = np.array([0.05, -0.01, 0.001, 0.002, 0.0])


def views(count: int = 4, lens: bool = False) -> list[LabelledView]:
    rng = np.random.default_rng(3)
    out = []
    for i in range(count):
        model, coefficients = (DistortionModel.PLUMB_BOB, LENS) if lens else (DistortionModel.NONE, np.zeros(0))
        camera = Camera(160, 120, MATRIX, model, coefficients)
        image = rng.integers(0, 255, (120, 160, 3), dtype=np.uint8)
        pose = Pose(exp_so3(rng.normal(size=3)), rng.normal(size=3))
        labels = (ObjectLabel("part", pose), ObjectLabel("other", pose.inverse()))
        out.append(LabelledView(image, camera, 10**9 + i * 33_333_333, "camera_optical", labels))
    return out


@pytest.mark.parametrize("lens", [False, True])
def test_views_and_truth_survive_the_round_trip(tmp_path: Path, lens: bool) -> None:
    written = views(lens=lens)
    assert write_bag(tmp_path / "bag", written, codec="png") == 4
    read = list(bag_views(tmp_path / "bag"))
    assert len(read) == 4
    for a, b in zip(written, read, strict=True):
        assert isinstance(b, View)
        np.testing.assert_array_equal(a.image, b.image)
        assert (a.stamp_ns, a.frame_id) == (b.stamp_ns, b.frame_id)
        np.testing.assert_array_equal(a.camera.matrix, b.camera.matrix)
        points = np.array([[0.1, 0.05, 1.0], [-0.2, 0.1, 0.8]])
        np.testing.assert_allclose(a.camera.project(points), b.camera.project(points), atol=1e-12)
    truth = bag_truth(tmp_path / "bag")
    assert set(truth) == {"part", "other"}
    for view in written:
        for label in view.objects:
            np.testing.assert_allclose(
                truth[label.object_name][view.stamp_ns].minus(label.T_camera_object), 0.0, atol=1e-12
            )


def test_jpeg_keeps_colours_in_their_order(tmp_path: Path) -> None:
    view = views(1)[0]
    red = np.zeros((120, 160, 3), dtype=np.uint8)
    red[..., 0] = 220
    write_bag(tmp_path / "bag", [View(red, view.camera, view.stamp_ns, view.frame_id)])
    read = next(iter(bag_views(tmp_path / "bag")))
    assert isinstance(read, View)
    np.testing.assert_allclose(read.image[60, 80], [220, 0, 0], atol=4)


def test_messages_come_in_order_of_time_and_camera_info_before_its_image(tmp_path: Path) -> None:
    write_bag(tmp_path / "bag", views())
    with BagReader(tmp_path / "bag") as bag:
        messages = list(bag.messages())
        assert bag.counts["/camera/image/compressed"] == 4
        assert bag.topics["/truth/part/pose"] == "geometry_msgs/msg/PoseStamped"
    times = [m.time_ns for m in messages]
    assert times == sorted(times)
    order = [m.topic for m in messages if m.topic.startswith("/camera")]
    assert order == ["/camera/camera_info", "/camera/image/compressed"] * 4


def test_a_lone_mcap_file_is_a_bag_too(tmp_path: Path) -> None:
    write_bag(tmp_path / "bag", views())
    assert len(list(bag_views(tmp_path / "bag" / "bag.mcap"))) == 4


def test_an_interrupted_bag_does_not_appear(tmp_path: Path) -> None:
    def breaking() -> Iterator[View]:
        yield views(1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bag(tmp_path / "bag", breaking())
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    write_bag(tmp_path / "bag", views())
    with pytest.raises(BagError, match="exists already"):
        write_bag(tmp_path / "bag", views())
    with pytest.raises(BagError, match="nowhere"):
        BagReader(tmp_path / "nowhere")
    with pytest.raises(BagError, match="not after"):
        write_bag(tmp_path / "other", [views(1)[0], views(1)[0]])
    with pytest.raises(BagError, match="'/video'"):
        list(bag_views(tmp_path / "bag", image_topic="/video"))
    (tmp_path / "junk.mcap").write_bytes(b"this is no mcap file at all")
    with pytest.raises(BagError, match="junk.mcap"):
        BagReader(tmp_path / "junk.mcap")


def test_a_truncated_bag_is_an_error_not_a_short_bag(tmp_path: Path) -> None:
    write_bag(tmp_path / "bag", views())
    file = tmp_path / "bag" / "bag.mcap"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(BagError, match="bag"):
        list(bag_views(tmp_path / "bag"))


def test_bytes_that_are_no_message_are_refused(tmp_path: Path) -> None:
    with BagWriter(tmp_path / "bag") as bag:
        bag.write("/image", "sensor_msgs/msg/Image", 1, b"\x00\x01\x00\x00\x05")
    with BagReader(tmp_path / "bag") as read, pytest.raises(BagError, match="/image"):
        next(iter(read.messages())).decoded()


def test_images_without_camera_info_give_the_error_as_a_value(tmp_path: Path) -> None:
    write_bag(tmp_path / "bag", views(2))
    with BagReader(tmp_path / "bag") as read, BagWriter(tmp_path / "cut") as cut:
        for message in read.messages():
            if message.topic != "/camera/camera_info":
                cut.write(message.topic, message.kind, message.time_ns, message.data)
        empty = next(m for m in read.messages(["/camera/camera_info"])).decoded()
        empty.header.frame_id = "another"
        cut.write_message("/camera/camera_info", "sensor_msgs/msg/CameraInfo", 1, empty)
    answers = list(bag_views(tmp_path / "cut"))
    assert len(answers) == 2 and all(isinstance(a, CameraInfoError) for a in answers)


def test_photographs_become_a_bag_without_losing_a_pixel(tmp_path: Path, lmo_root: Path) -> None:
    from ukd_ros.data.bop import BopDataset

    data = BopDataset(lmo_root)
    ids = [image.image_id for image in data.images[5:8]]
    name = data.name(8)
    assert bag_from_bop(lmo_root, tmp_path / "bag", ids, [name], rate_hz=5.0) == 3
    read = list(bag_views(tmp_path / "bag"))
    for index, view in zip(range(5, 8), read, strict=True):
        assert isinstance(view, View)
        np.testing.assert_array_equal(view.image, data.image(index))
    assert np.diff([v.stamp_ns for v in read if isinstance(v, View)]).tolist() == [200_000_000] * 2
    truth = bag_truth(tmp_path / "bag")
    assert list(truth) == [name] and len(truth[name]) == 3
