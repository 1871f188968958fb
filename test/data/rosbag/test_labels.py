# SPDX-License-Identifier: Apache-2.0
"""Labels out of bags: at the image's own stamp, in its own frame, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.rosbag.making import (
    START,
    STEP,
    Recorded,
    header,
    packed,
    pose,
    pose_stamped,
    stream,
    write_ros1,
    write_ros2,
)

from ukd_ros.data.bags import BagError, BagReader
from ukd_ros.data.bop import BopDataset
from ukd_ros.data.rosbag.frames import BagFramesReport, BagOptions, bags_to_bop
from ukd_ros.data.rosbag.labels import Stamped, read_labels
from ukd_ros.data.rosbag.message_types import DETECTIONS_TYPE, POSE_TYPE, POSE_TYPES, TF_TYPES, store
from ukd_ros.data.rosbag.poses import FrameTree, PoseSeries, Unknown
from ukd_ros.geometry.pose import Pose, exp_so3

TURN = np.array([0.1, -0.4, 0.7])
SPEED = np.array([0.02, -0.01, 0.05, 0.3, -0.5, 0.2])  # m/s and rad/s, constant: interpolation is exact
TF = TF_TYPES[0]


def truth(stamp_ns: int) -> Pose:
    """Return the pose of a part that moves and turns steadily before the camera."""
    seconds = (stamp_ns - START) / 1e9
    return Pose(exp_so3(SPEED[3:] * seconds) @ exp_so3(TURN), np.array([0.05, 0.02, 0.6]) + SPEED[:3] * seconds)


def options(**more: Any) -> BagOptions:
    return BagOptions(held_out=0.0, min_change=0.0, **more)


def convert(tmp_path: Path, messages: list[Recorded], chosen: BagOptions, **more: Any) -> BagFramesReport:
    messages = sorted(messages, key=lambda m: m.time_ns)
    bag = write_ros2(tmp_path / "bag", messages)
    return bags_to_bop([bag], tmp_path / "out", chosen, progress=False, **more)


def labels(tmp_path: Path, name: str = "part", number: int = 1) -> dict[int, Pose]:
    """Return image -> pose as a reader of BOP folders sees it."""
    data = BopDataset(tmp_path / "out", split="train", names={number: name})
    return {i: data.labels(i, size=(160, 120))[0].T_camera_object for i in range(len(data)) if data.labels(i)}


def stamped(at: int, value: Pose, topic: str = "/part/pose", frame: str = "camera_optical") -> Recorded:
    return Recorded(topic, POSE_TYPE, at, pose_stamped(at, value, frame))


def transforms(at: int, *edges: tuple[str, str, Pose], topic: str = "/tf") -> Recorded:
    types = store().types
    made = [
        types["geometry_msgs/msg/TransformStamped"](
            header=header(at, parent), child_frame_id=child, transform=pose("Transform", T_parent_child)
        )
        for parent, child, T_parent_child in edges
    ]
    return Recorded(topic, TF, at, packed(TF, types[TF](transforms=made)))


def detections(at: int, *found: tuple[str, float, Pose], frame: str = "camera_optical") -> Recorded:
    types = store().types
    rows = []
    for name, score, value in found:
        with_covariance = types["geometry_msgs/msg/PoseWithCovariance"](
            pose=pose("Pose", value), covariance=np.zeros(36)
        )
        hypothesis = types["vision_msgs/msg/ObjectHypothesis"](class_id=name, score=score)
        result = types["vision_msgs/msg/ObjectHypothesisWithPose"](hypothesis=hypothesis, pose=with_covariance)
        size = types["geometry_msgs/msg/Vector3"](x=0.1, y=0.1, z=0.1)
        box = types["vision_msgs/msg/BoundingBox3D"](center=pose("Pose", value), size=size)
        rows.append(types["vision_msgs/msg/Detection3D"](header=header(at, frame), results=[result], bbox=box, id=""))
    message = types[DETECTIONS_TYPE](header=header(at, frame), detections=rows)
    return Recorded("/detections", DETECTIONS_TYPE, at, packed(DETECTIONS_TYPE, message))


def assert_true(found: dict[int, Pose], images: range | list[int], atol: float = 1e-9) -> None:
    assert sorted(found) == list(images)
    for number, value in found.items():
        np.testing.assert_allclose(value.minus(truth(START + number * STEP)), 0, atol=atol)


def test_poses_are_interpolated_at_the_images_stamp(tmp_path: Path) -> None:
    between = [stamped(at, truth(at)) for at in (START + n * STEP - STEP // 3 for n in range(7))]
    report = convert(tmp_path, [*stream(6), *between], options(label_topics={"/part/pose": "part"}))
    assert_true(labels(tmp_path), range(6), atol=1e-6)
    assert report.bags[0].labelled == 6 and report.objects == {"part": 1}


def test_topics_that_could_give_labels_are_listed_where_none_was_named(tmp_path: Path) -> None:
    poses = [stamped(at, truth(at)) for at in (START, START + STEP)]
    seen = [detections(START, ("part", 0.9, truth(START)))]
    (told,) = convert(tmp_path / "silent", [*stream(3), *poses, *seen], options()).bags[0].warnings
    assert "/detections, /part/pose" in told and "label_topics" in told
    named = convert(tmp_path / "named", [*stream(3), *poses, *seen], options(label_topics={"/part/pose": "part"}))
    assert not named.bags[0].warnings and not convert(tmp_path / "none", stream(3), options()).bags[0].warnings


def test_stamps_are_matched_not_times_of_recording(tmp_path: Path) -> None:
    late = [stamped(at, truth(at))._replace(time_ns=at + 3 * 10**9) for at in (START + n * STEP for n in range(6))]
    convert(tmp_path, [*stream(6), *late], options(label_topics={"/part/pose": "part"}))
    assert_true(labels(tmp_path), range(6))


def test_a_gap_is_not_bridged_and_nothing_is_extrapolated(tmp_path: Path) -> None:
    some = [stamped(at, truth(at)) for at in (START + round(n * STEP) for n in (0.5, 1.5, 4.6, 5.0))]
    chosen = options(label_topics={"/part/pose": "part"}, label_max_gap_s=0.06)
    report = convert(tmp_path, [*stream(8), *some], chosen)
    assert_true(labels(tmp_path), [1, 5], atol=1e-6)
    refused = report.bags[0].labels_refused
    assert refused["part: no pose on both sides of the image's stamp"] == 3  # 0, 6, 7
    assert refused["part: the nearest poses are too far from the image's stamp (label_max_gap_s)"] == 3  # 2, 3, 4


def test_poses_with_covariance_and_names_with_ids(tmp_path: Path) -> None:
    types, kind = store().types, POSE_TYPES[1]
    rows = []
    for number in range(3):
        at = START + number * STEP
        inner = types["geometry_msgs/msg/PoseWithCovariance"](pose=pose("Pose", truth(at)), covariance=np.zeros(36))
        rows.append(Recorded("/p", kind, at, packed(kind, types[kind](header=header(at), pose=inner))))
    report = convert(tmp_path, [*stream(3), *rows], options(label_topics={"/p": "gear"}), names={"gear": 8, "nut": 2})
    assert_true(labels(tmp_path, "gear", 8), range(3))
    assert report.objects == {"gear": 8, "nut": 2} and "--name 8=gear" in report.table()
    with pytest.raises(BagError, match="'gear', which has no id"):
        bags_to_bop([tmp_path / "bag"], tmp_path / "o", options(label_topics={"/p": "gear"}), names={"nut": 2})


def test_truth_topics_of_our_own_bags_are_taken_unless_not_wanted(tmp_path: Path) -> None:
    rows = [stamped(START + n * STEP, truth(START + n * STEP), "/truth/part/pose") for n in range(3)]
    convert(tmp_path, [*stream(3), *rows], options())
    assert_true(labels(tmp_path), range(3))
    report = bags_to_bop([tmp_path / "bag"], tmp_path / "none", options(truth_topics=False), progress=False)
    assert report.bags[0].labelled == 0 and not list((tmp_path / "none").rglob("scene_gt.json"))


def test_a_pose_in_another_frame_is_brought_over_by_tf(tmp_path: Path) -> None:
    """base -> link (moves) -> camera (fixed); the part's pose is given in base."""
    T_link_camera = Pose(exp_so3(np.array([-1.2, 0.3, 0.4])), np.array([0.1, 0.0, 0.05]))

    def link(at: int) -> Pose:
        seconds = (at - START) / 1e9
        return Pose(exp_so3(np.array([0.0, 0.0, 0.8]) * seconds), np.array([0.3, 0.2 * seconds, 0.5]))

    messages = stream(5)
    messages.append(transforms(START, ("/link", "camera_optical", T_link_camera), topic="/tf_static"))
    for half in range(-1, 12):
        at = START + half * STEP // 2 - STEP // 7
        messages.append(transforms(at, ("base", "link", link(at))))
    for number in range(5):
        at = START + number * STEP
        T_base_part = link(at) @ T_link_camera @ truth(at)
        messages.append(stamped(at, T_base_part, frame="base"))
    convert(tmp_path, messages, options(label_topics={"/part/pose": "part"}))
    assert_true(labels(tmp_path), range(5), atol=1e-6)


def test_a_frame_of_tf_is_a_label(tmp_path: Path) -> None:
    """camera and part hang from the same base by chains of their own: up one and down the other."""
    T_base_camera = Pose(exp_so3(np.array([0.4, -0.2, 1.0])), np.array([1.0, 2.0, 0.5]))
    T_hand_part = Pose(exp_so3(np.array([0.0, 0.3, 0.0])), np.array([0.0, 0.0, 0.1]))
    messages = stream(5)
    static = [("base", "camera_optical", T_base_camera), ("hand", "part_frame", T_hand_part)]
    messages.append(transforms(START + 3 * STEP, *static, topic="/tf_static"))
    for number in range(6):
        at = START + number * STEP
        messages.append(transforms(at, ("base", "hand", T_base_camera @ truth(at) @ T_hand_part.inverse())))
    chosen = options(label_frames={"part_frame": "part", "nowhere": "ghost"})
    report = convert(tmp_path, messages, chosen)
    assert_true(labels(tmp_path), range(5), atol=1e-9)
    assert report.bags[0].labels_refused == {"ghost: /tf has no frame 'nowhere'": 5}


def test_a_frame_that_tf_does_not_connect_is_refused_with_its_reason(tmp_path: Path) -> None:
    messages = [*stream(3), *(stamped(START + n * STEP, truth(START), frame="map") for n in range(3))]
    messages.append(transforms(START, ("map", "odom", Pose.identity()), topic="/tf_static"))
    report = convert(tmp_path, messages, options(label_topics={"/part/pose": "part"}))
    assert report.bags[0].labelled == 0
    (reason,) = report.bags[0].labels_refused
    assert "does not connect 'map' with 'camera_optical'" in reason


def test_detections_of_several_classes_and_instances(tmp_path: Path) -> None:
    far = Pose(np.eye(3), np.array([0.0, 0.0, 2.0]))
    messages = stream(4)
    for number in range(4):
        at = START + number * STEP
        messages.append(detections(at, ("17", 0.9, truth(at)), ("nut", 0.8, far), ("nut", 0.7, far)))
    chosen = options(label_topics={"/detections": ""}, classes={"17": "part"})
    report = convert(tmp_path, messages, chosen)
    assert report.objects == {"nut": 1, "part": 2}
    data = BopDataset(tmp_path / "out", split="train", names={1: "nut", 2: "part"})
    for number in range(4):
        found = data.labels(number, size=(160, 120))
        assert sorted(label.object_name for label in found) == ["nut", "nut", "part"]
        (part,) = (label.T_camera_object for label in found if label.object_name == "part")
        np.testing.assert_allclose(part.minus(truth(START + number * STEP)), 0, atol=1e-9)


def test_ros1_transforms_are_understood(tmp_path: Path) -> None:
    types = store(True).types
    transform = types["geometry_msgs/msg/TransformStamped"](
        header=header(START, "/camera_optical", ros1=True),
        child_frame_id="part_frame",
        transform=types["geometry_msgs/msg/Transform"](
            translation=types["geometry_msgs/msg/Vector3"](x=0.0, y=0.1, z=0.7),
            rotation=types["geometry_msgs/msg/Quaternion"](x=0.0, y=0.0, z=0.0, w=1.0),
        ),
    )
    kind = TF_TYPES[0]
    tf = Recorded("/tf_static", kind, START, packed(kind, types[kind](transforms=[transform]), ros1=True))
    bag = write_ros1(tmp_path / "old.bag", [tf, *stream(2, ros1=True)])
    bags_to_bop([bag], tmp_path / "out", options(label_frames={"part_frame": "part"}), progress=False)
    np.testing.assert_allclose(labels(tmp_path)[1].translation, [0.0, 0.1, 0.7], atol=1e-12)


def test_nonsense_poses_are_counted_and_dropped(tmp_path: Path) -> None:
    types = store().types
    bad = pose("Pose", Pose.identity())
    bad.orientation.w = 0.0
    rows = [stamped(START + n * STEP, truth(START + n * STEP)) for n in range(2)]
    nonsense = packed(POSE_TYPE, types[POSE_TYPE](header=header(START + 2 * STEP), pose=bad))
    rows.append(Recorded("/part/pose", POSE_TYPE, START + 2 * STEP, nonsense))
    rows.append(Recorded("/part/pose", POSE_TYPE, START + 3 * STEP, b"\x00\x01\x00\x00"))
    rows.append(stamped(START + 3 * STEP, Pose(np.eye(3), np.array([0.0, 0.0, -1.0]))))
    report = convert(tmp_path, [*stream(4), *rows], options(label_topics={"/part/pose": "part"}, label_max_gap_s=0.01))
    assert_true(labels(tmp_path), range(2))
    said = " ".join(report.bags[0].labels_refused)
    assert "no unit quaternion" in said and "cannot be decoded" in said and "behind the camera" in said


def test_label_topics_are_checked(tmp_path: Path) -> None:
    bag = write_ros2(tmp_path / "bag", [*stream(2), stamped(START, truth(START))])
    for topics, said in (
        ({"/nowhere": "part"}, "'/nowhere' is not in the bag"),
        ({"/camera/camera_info": "part"}, "CameraInfo; labels come from"),
        ({"/part/pose": ""}, "needs the name"),
    ):
        with BagReader(bag) as reader, pytest.raises(BagError, match=said):
            read_labels(reader, BagOptions(label_topics=topics), [Stamped(START, "camera_optical")])


# ---- poses over time -----------------------------------------------------------------------------------------------


def test_interpolation_is_exact_at_samples_and_on_screws(rng: np.random.Generator) -> None:
    stamps = rng.permutation(20) * 10**8
    between = rng.integers(0, 19 * 10**8, 50).tolist()
    series = PoseSeries([*between, *stamps.tolist(), 19 * 10**8 + 2000, 5 * 10**7])
    for stamp in stamps.tolist():  # in any order
        series.add(stamp, truth(START + stamp))
    for stamp in [*between, *stamps.tolist()]:
        np.testing.assert_allclose(series.at(stamp, 10**8).minus(truth(START + stamp)), 0, atol=1e-9)
    with pytest.raises(Unknown, match="both sides"):
        series.at(19 * 10**8 + 2000, 10**8)
    with pytest.raises(Unknown, match="too far"):
        series.at(5 * 10**7, 4 * 10**7)


def test_the_tree_goes_both_ways_and_refuses_what_is_ambiguous(rng: np.random.Generator) -> None:
    tree = FrameTree([0], 10**8)
    edges = {child: Pose(exp_so3(rng.normal(size=3)), rng.normal(size=3)) for child in "bcde"}
    for parent, child in ("ab", "bc", "ad", "de"):
        tree.add(parent, child, 0, edges[child], static=True)
    forth = tree.transform("c", "e", 0)
    expected = (edges["b"] @ edges["c"]).inverse() @ edges["d"] @ edges["e"]
    np.testing.assert_allclose(forth.minus(expected), 0, atol=1e-12)
    np.testing.assert_allclose((tree.transform("e", "c", 0) @ forth).minus(Pose.identity()), 0, atol=1e-12)
    tree.add("x", "e", 0, Pose.identity(), static=True)
    with pytest.raises(Unknown, match="two parents"):
        tree.transform("c", "e", 0)
    tree.add("q", "p", 0, Pose.identity(), static=True)
    tree.add("p", "q", 0, Pose.identity(), static=True)  # a loop
    with pytest.raises(Unknown, match="does not connect"):
        tree.transform("a", "p", 0)


def test_the_tree_keeps_only_what_an_image_may_ask_for() -> None:
    tree = FrameTree([10**9, 5 * 10**9], 10**8)
    for stamp in range(0, 10**10, 10**7):
        tree.add("a", "b", stamp, Pose.identity(), static=False)
    assert len(tree._moving["b"]) <= 3  # stretches beside two stamps
    tree.connect("b", "c")
    tree.keep(["/b", "a"])
    for stamp in range(0, 10**10, 10**7):
        tree.add("b", "c", stamp, Pose.identity(), static=False)
    assert "c" not in tree._moving  # nobody asks for that joint


def test_poses_between_wanted_stamps_are_not_kept_and_change_nothing(rng: np.random.Generator) -> None:
    wanted = np.sort(rng.integers(0, 10**9, 7))
    stamps = rng.integers(-(10**8), 11 * 10**8, 5000)
    stamps = np.concatenate([stamps, wanted[:2], stamps[:50], rng.integers(0, 3, 4) - 1 + wanted[2]])
    poses = [Pose(exp_so3(rng.normal(size=3)), rng.normal(size=3)) for _ in stamps]
    series, every = PoseSeries(wanted), PoseSeries([*wanted, *stamps])
    for number, stamp in enumerate(stamps.tolist()):
        series.add(stamp, poses[number])
        every.add(stamp, poses[number])
    assert len(series) <= 8
    for stamp in wanted.tolist():
        np.testing.assert_array_equal(series.at(stamp, 10**8).matrix(), every.at(stamp, 10**8).matrix())
    exact = dict(zip(stamps.tolist(), poses, strict=True))  # the last counts
    for stamp in wanted[:2].tolist():
        np.testing.assert_array_equal(series.at(stamp, 10**8).matrix(), exact[stamp].matrix())
