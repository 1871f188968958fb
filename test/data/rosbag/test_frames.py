# SPDX-License-Identifier: Apache-2.0
"""Bags become BOP folders: new frames only, without lens, split by bag or time, whole or not at all, as asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from data.rosbag.making import (
    CAMERA,
    START,
    STEP,
    K,
    McapShape,
    Recorded,
    header,
    info,
    packed,
    painting,
    raw_image,
    stream,
    write_mcap,
    write_ros1,
    write_ros2,
)

from ukd_ros.data.bags import BagError, write_bag
from ukd_ros.data.bop import BopDataset
from ukd_ros.data.rosbag.frames import BagFramesReport, BagOptions, bags_to_bop
from ukd_ros.data.rosbag.message_types import IMAGE_TYPES, INFO_TYPE, store
from ukd_ros.data.rosbag.plan import make_plan
from ukd_ros.data.rosbag.survey import Frame, Survey, dumps, loads, survey_bag, timeline
from ukd_ros.data.undistortion import undistorted
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.geometry.camera import Camera, DistortionModel
from ukd_ros.geometry.view import View

ALL = BagOptions(held_out=0.0, min_change=0.0)
SPLIT = BagOptions(held_out=0.2, min_change=0.0, guard_s=0.25)
IMAGE, INFO = "/camera/image_raw", "/camera/camera_info"


def convert(bags: list[Path] | Path, out: Path, options: BagOptions = ALL, **more: Any) -> BagFramesReport:
    paths = bags if isinstance(bags, list) else [bags]
    return bags_to_bop(paths, out, options, progress=False, **more)


def notes(out: Path, split: str) -> list[dict[str, Any]]:
    """Return the entries of every frames.json of a split, in the order of scenes and images."""
    found = []
    for file in sorted((out / split).glob("[0-9]*/frames.json")):
        table = json.loads(file.read_text())
        found += [table[key] for key in sorted(table, key=int)]
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- what is written ---------------------------------------------------------------------------------------------


def test_raw_images_come_out_pixel_by_pixel_with_camera_and_stamp(tmp_path: Path) -> None:
    bag, out = write_ros2(tmp_path / "run7", stream(5)), tmp_path / "out"
    report = convert(bag, out)
    data = BopDataset(out, split="train")
    assert (len(data), report.train, report.held_out, report.scenes) == (5, 5, 0, 1)
    for number in range(5):
        np.testing.assert_array_equal(data.image(number), painting(number))
        view = data.view(number)
        np.testing.assert_array_equal(view.camera.matrix, K)
        assert view.objects == ()
    for number, note in enumerate(notes(out, "train")):
        at = START + number * STEP
        assert note == {"bag": "run7", "topic": IMAGE, "stamp_ns": at, "recorded_ns": at, "frame_id": "camera_optical"}
    assert json.loads((out / "report.json").read_text())["bags"][0]["written"] == 5


@pytest.mark.parametrize("codec", ["png", "jpeg"])
def test_compressed_images_stay_the_very_file(codec: str, tmp_path: Path) -> None:
    views = [View(painting(n), CAMERA, START + n * STEP, "cam") for n in range(3)]
    write_bag(tmp_path / "bag", views, codec=codec)
    convert(tmp_path / "bag", tmp_path / "out")
    data = BopDataset(tmp_path / "out", split="train")
    extension = ".jpg" if codec == "jpeg" else ".png"
    for number, view in enumerate(views):
        assert data.images[number].path.suffix == extension
        settings = [cv2.IMWRITE_JPEG_QUALITY, 90] if codec == "jpeg" else [cv2.IMWRITE_PNG_COMPRESSION, 3]
        encoded = cv2.imencode(extension, cv2.cvtColor(view.image, cv2.COLOR_RGB2BGR), settings)[1]
        assert data.images[number].path.read_bytes() == encoded.tobytes()


def test_a_jpeg_that_readers_would_see_otherwise_becomes_a_png_of_what_it_means(tmp_path: Path) -> None:
    kind = IMAGE_TYPES[1]
    jpeg = cv2.imencode(".jpg", painting(1), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].reshape(-1)
    # "rgb8; jpeg compressed" without "bgr": red and blue are exchanged in the file.
    message = store().types[kind](header=header(START), format="rgb8; jpeg compressed rgb8", data=jpeg)
    messages = [Recorded(INFO, INFO_TYPE, START, info(START)), Recorded("/i", kind, START, packed(kind, message))]
    convert(write_ros2(tmp_path / "bag", messages), tmp_path / "out")
    data = BopDataset(tmp_path / "out", split="train")
    assert data.images[0].path.suffix == ".png"
    np.testing.assert_array_equal(data.image(0), cv2.imdecode(jpeg, cv2.IMREAD_COLOR))


@pytest.mark.parametrize("model", [DistortionModel.PLUMB_BOB, DistortionModel.EQUIDISTANT])
def test_the_lens_is_taken_out_exactly(model: DistortionModel, tmp_path: Path) -> None:
    """A pattern that is linear in the ray's direction is linear in the pinhole image, wherever the lens bent it."""
    coefficients = {
        DistortionModel.PLUMB_BOB: [-0.25, 0.06, 0.001, -0.002, 0.0],
        DistortionModel.EQUIDISTANT: [0.02, -0.004, 0.001, 0.0],
    }[model]
    camera = Camera(160, 120, K, model, np.array(coefficients))
    pixels = np.stack(np.meshgrid(np.arange(160.0), np.arange(120.0)), axis=-1).reshape(-1, 2)
    rays = camera.rays(pixels)

    def pattern(directions: Any) -> Any:
        values = 128 + 90 * directions[:, :1] + 60 * directions[:, 1:2]
        return np.repeat(np.nan_to_num(values), 3, axis=1).clip(0, 255).round().astype(np.uint8).reshape(120, 160, 3)

    straight = undistorted(pattern(rays), camera)
    expected = pattern(camera.pinhole().rays(pixels))
    seen = camera.project(camera.pinhole().rays(pixels)).reshape(120, 160, 2)
    inside = ((seen > 1) & (seen < [158, 118])).all(axis=2)
    assert inside.mean() > 0.5
    assert np.abs(straight.astype(int) - expected.astype(int))[inside].max() <= 2
    outside = (seen < -1).any(axis=2) | (seen > [161, 121]).any(axis=2)
    assert (straight[outside] == 0).all()

    bag = write_ros2(tmp_path / "bag", stream(2, camera=camera))
    convert(bag, tmp_path / "out")
    data = BopDataset(tmp_path / "out", split="train")
    np.testing.assert_array_equal(data.image(1), undistorted(painting(1), camera))
    assert not data.camera(0).distorted


def test_rectified_images_use_the_projection_matrix(tmp_path: Path) -> None:
    lens = Camera(160, 120, K, DistortionModel.PLUMB_BOB, np.array([-0.3, 0.1, 0, 0, 0]))
    bag = write_ros2(tmp_path / "bag", stream(2, image_topic="/camera/image_rect_color", camera=lens))
    convert(bag, tmp_path / "auto")
    np.testing.assert_array_equal(BopDataset(tmp_path / "auto", split="train").image(0), painting(0))
    convert(bag, tmp_path / "raw", replace(ALL, rectified="false"))
    assert (BopDataset(tmp_path / "raw", split="train").image(0) != painting(0)).any()


def test_every_kind_of_bag_gives_the_same_folder(tmp_path: Path) -> None:
    made = [
        write_ros2(tmp_path / "a" / "bag", stream(4)),
        write_ros2(tmp_path / "b" / "bag", stream(4), "sqlite3", "message"),
        write_ros1(tmp_path / "c.bag", stream(4, ros1=True), "lz4"),
        write_mcap(tmp_path / "d.mcap", stream(4), McapShape(chunk=0)),
    ]
    pictures = []
    for number, bag in enumerate(made):
        convert(bag, tmp_path / f"out{number}")
        files = tree(tmp_path / f"out{number}" / "train")
        pictures.append({name: data for name, data in files.items() if not name.endswith("frames.json")})
    assert all(p == pictures[0] for p in pictures) and len(pictures[0]) == 5


# ---- which frames ------------------------------------------------------------------------------------------------


def test_a_robot_that_stands_still_gives_one_frame(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    messages = []
    for number in range(60):
        at = START + number * STEP
        still = painting(0 if number < 50 else 1).astype(int) + noise.normal(0, 4, (120, 160, 3)).round().astype(int)
        image = still.clip(0, 255).astype(np.uint8)
        messages += [
            Recorded(INFO, INFO_TYPE, at, info(at)),
            Recorded(IMAGE, IMAGE_TYPES[0], at, raw_image(image, at)),
        ]
    report = convert(write_ros2(tmp_path / "bag", messages), tmp_path / "out", BagOptions(held_out=0.0))
    assert (report.train, report.bags[0].seen, report.bags[0].thinned) == (2, 60, 58)


def test_a_small_thing_that_moves_is_something_new(tmp_path: Path) -> None:
    messages = []
    for number in range(6):
        at = START + number * STEP
        image = painting(0).copy()
        image[40:60, 20 * number : 20 * number + 20] = (250, 20, 20)  # 2 % of the image
        messages += [
            Recorded(INFO, INFO_TYPE, at, info(at)),
            Recorded(IMAGE, IMAGE_TYPES[0], at, raw_image(image, at)),
        ]
    report = convert(write_ros2(tmp_path / "bag", messages), tmp_path / "out", BagOptions(held_out=0.0))
    assert report.train == 6


def test_at_most_so_many_frames_evenly_spread(tmp_path: Path) -> None:
    bags = [write_ros2(tmp_path / f"bag{n}", stream(20, first=20 * n)) for n in range(2)]
    report = convert(bags, tmp_path / "out", replace(ALL, max_frames=10))
    stamps = [note["stamp_ns"] for note in notes(tmp_path / "out", "train")]
    assert report.train == 10 and set(np.diff(stamps)) == {4 * STEP}
    assert [bag.beyond_limit for bag in report.bags] == [15, 15]


def test_a_split_by_time_keeps_its_guard_and_never_splits_frames_of_one_moment(tmp_path: Path) -> None:
    bag = write_ros2(tmp_path / "bag", stream(100))
    report = convert(bag, tmp_path / "out", SPLIT)
    train = np.array([note["stamp_ns"] for note in notes(tmp_path / "out", "train")])
    held = np.array([note["stamp_ns"] for note in notes(tmp_path / "out", "held_out")])
    assert report.split_by == "block" and len(held) == pytest.approx(20, abs=3)
    assert np.abs(train[:, None] - held[None]).min() >= 0.25e9
    assert len(train) + len(held) + report.bags[0].guarded == 100
    assert len(BopDataset(tmp_path / "out", split="held_out")) == len(held)
    for folder in (*(tmp_path / "out" / "train").iterdir(), *(tmp_path / "out" / "held_out").iterdir()):
        stamps = [note["stamp_ns"] for note in json.loads((folder / "frames.json").read_text()).values()]
        assert np.ptp(stamps) <= 2.1e9, "a scene is a block"


def test_one_of_several_bags_is_held_out_whole(tmp_path: Path) -> None:
    bags = [write_ros2(tmp_path / f"bag{n}", stream(10 + n, first=50 * n)) for n in range(5)]
    report = convert(bags, tmp_path / "out", SPLIT)
    assert report.split_by == "bag"
    held = {note["bag"] for note in notes(tmp_path / "out", "held_out")}
    assert len(held) == 1 and held.isdisjoint({note["bag"] for note in notes(tmp_path / "out", "train")})
    assert report.held_out == 12 and report.train == 48, "the smallest that is enough: 12 of 60"


def survey(name: str, count: int, step_ns: int = STEP, segments: int = 1) -> Survey:
    elapsed = [n * step_ns for n in range(count)]
    frames = [Frame((0, 0, 0, 0, n), 0, "c", at, n * segments // count, 0) for n, at in enumerate(elapsed)]
    return Survey(name, "/i", "/c", False, seen=count, duration_ns=elapsed[-1], frames=frames)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.35, 0.5, 0.8])
@pytest.mark.parametrize("counts", [[3000], [1000, 1000], [100, 5000, 70], [400] * 7])
def test_about_the_share_is_held_out_whatever_the_bags(share: float, counts: list[int]) -> None:
    options = BagOptions(held_out=share, guard_s=1.0)
    plan = make_plan([survey(str(n), count, segments=3) for n, count in enumerate(counts)], options)
    held = sum(len(s.frames) for s in plan.scenes if s.split == "held_out") / sum(counts)
    assert 0.6 * share <= held <= 2.0 * share
    for scene in plan.scenes:
        if scene.split == "held_out":
            continue
        for other in plan.scenes:
            if other.split == "held_out" and other.bag == scene.bag:
                gaps = [
                    abs(a.elapsed_ns - b.elapsed_ns)
                    for a in scene.frames
                    for b in other.frames[:: len(other.frames) - 1 or 1]
                ]
                assert min(gaps) >= 1e9


def test_a_bag_too_short_to_be_split_says_what_to_do(tmp_path: Path) -> None:
    bag = write_ros2(tmp_path / "bag", stream(6))
    with pytest.raises(BagError, match="held_out=0"):
        convert(bag, tmp_path / "out", BagOptions(min_change=0.0))


def test_a_camera_that_stood_still_is_said_so(tmp_path: Path) -> None:
    bag = write_ros2(tmp_path / "bag", stream(20, still=True))
    with pytest.raises(BagError, match="19 more look like the one before.*min_change"):
        convert(bag, tmp_path / "out", BagOptions())


@pytest.mark.parametrize("bags", [1, 5])
def test_a_limit_that_leaves_nothing_to_hold_out_is_refused(bags: int, tmp_path: Path) -> None:
    made = [write_ros2(tmp_path / f"bag{n}", stream(30 // bags, first=100 * n)) for n in range(bags)]
    with pytest.raises(BagError, match="max_frames"):
        convert(made, tmp_path / "out", replace(SPLIT, max_frames=1))
    report = convert(made, tmp_path / "out", replace(SPLIT, max_frames=10))
    assert report.train + report.held_out == 10 and report.held_out > 0 < report.train


def test_the_files_of_one_recording_keep_the_guard_between_them(tmp_path: Path) -> None:
    bags = [write_ros2(tmp_path / f"part{n}", stream(20, first=20 * n)) for n in range(3)]
    report = convert(bags, tmp_path / "out", replace(SPLIT, held_out=0.3))
    train = np.array([note["stamp_ns"] for note in notes(tmp_path / "out", "train")])
    held = np.array([note["stamp_ns"] for note in notes(tmp_path / "out", "held_out")])
    assert report.split_by == "bag" and np.abs(train[:, None] - held[None]).min() >= 0.25e9
    assert len(train) + 20 + sum(bag.guarded for bag in report.bags) == 60 and len(train) > 30
    assert convert(bags, tmp_path / "no", replace(SPLIT, held_out=0.3, guard_s=0.0)).train == 40


def test_bags_of_a_clock_that_was_never_set_do_not_guard_one_another(tmp_path: Path) -> None:
    bags = [write_ros2(tmp_path / f"b{n}", stream(20, first=20 * n, start_ns=-20 * n * STEP)) for n in range(3)]
    report = convert(bags, tmp_path / "out", replace(SPLIT, held_out=0.3))
    assert (report.train, report.held_out) == (40, 20)


# ---- clocks ------------------------------------------------------------------------------------------------------


def test_steps_of_the_clock_end_a_segment_and_have_no_length() -> None:
    s = 10**9
    times = np.array([0, 1, 2, 2 + 7200, 2 + 7201, 1, 2, 3], dtype=np.int64) * s
    elapsed, segments, jumps = timeline(times)
    np.testing.assert_array_equal(elapsed, np.array([0, 1, 2, 2, 3, 3, 4, 5]) * s)
    np.testing.assert_array_equal(segments, [0, 0, 0, 1, 1, 2, 2, 2])
    assert jumps == 2
    elapsed, segments, jumps = timeline(np.array([0, 100, 99, 200], dtype=np.int64) * 10**6)
    assert jumps == 0 and (np.diff(elapsed) >= 0).all(), "messages that overtook each other are no jump"


@pytest.mark.parametrize("jump_s", [-5, -3600, 7200])
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_clock_that_jumps_while_recording_mixes_no_blocks(jump_s: int, storage: str, tmp_path: Path) -> None:
    messages = stream(100)
    half = [m._replace(time_ns=m.time_ns + jump_s * 10**9) if n >= 100 else m for n, m in enumerate(messages)]
    report = convert(write_ros2(tmp_path / "bag", half, storage), tmp_path / "out", SPLIT)
    assert report.bags[0].clock_jumps == 1
    assert report.bags[0].duration_s == pytest.approx(9.8), "the jump has no length"
    true = {n["stamp_ns"]: split for split in ("train", "held_out") for n in notes(tmp_path / "out", split)}
    train = np.array([stamp for stamp, split in true.items() if split == "train"])
    held = np.array([stamp for stamp, split in true.items() if split == "held_out"])
    assert len(held) == pytest.approx(20, abs=6)
    assert np.abs(train[:, None] - held[None]).min() >= 0.25e9, "by the camera's own clock, which was right"


def off_by(*offsets_ns: int) -> list[Recorded]:
    """Return a stream recorded by a right clock, whose camera's clock is off by so much at each image."""
    messages = []
    for number, offset in enumerate(offsets_ns):
        at = START + number * STEP
        messages += [
            Recorded(INFO, INFO_TYPE, at, info(at + offset)),
            Recorded(IMAGE, IMAGE_TYPES[0], at, raw_image(painting(number), at + offset)),
        ]
    return messages


def scene_stamps(out: Path) -> list[list[int]]:
    """Return the stamps of every scene, in the order of its images."""
    tables = [json.loads(file.read_text()) for file in sorted(out.glob("[th]*/[0-9]*/frames.json"))]
    return [[table[key]["stamp_ns"] for key in sorted(table, key=int)] for table in tables]


def test_a_camera_clock_that_jumps_is_counted(tmp_path: Path) -> None:
    report = convert(write_ros2(tmp_path / "bag", off_by(*[0] * 10, *[-3600 * 10**9] * 10)), tmp_path / "out")
    assert report.bags[0].clock_jumps == 1 and report.train == 20 and report.scenes == 2


def test_what_a_camera_clock_set_back_lays_over_each_other_are_two_scenes(tmp_path: Path) -> None:
    convert(write_ros2(tmp_path / "bag", off_by(*[0] * 20, *[-(10**9)] * 20)), tmp_path / "out")
    before, after = scene_stamps(tmp_path / "out")
    assert before == [START + n * STEP for n in range(20)]
    assert after == [START + n * STEP for n in range(10, 30)], "neighbours in time are neighbours"


def test_images_that_overtook_each_other_are_one_scene_by_their_stamps(tmp_path: Path) -> None:
    offsets = [0, 0, STEP, -STEP, 0, 0]
    report = convert(write_ros2(tmp_path / "bag", off_by(*offsets)), tmp_path / "out")
    assert scene_stamps(tmp_path / "out") == [[START + n * STEP for n in range(6)]]
    assert report.bags[0].clock_jumps == 0
    np.testing.assert_array_equal(BopDataset(tmp_path / "out", split="train").image(2), painting(3))


def test_a_camera_without_a_clock_gives_one_scene(tmp_path: Path) -> None:
    offsets = [0, 0, -START - 2 * STEP, 0, -START - 4 * STEP, 0]
    report = convert(write_ros2(tmp_path / "bag", off_by(*offsets)), tmp_path / "out")
    assert report.scenes == 1 and report.train == 6


def test_a_camera_clock_has_no_say_in_what_is_held_out(tmp_path: Path) -> None:
    held = []
    for name, offsets in (
        ("right", [0] * 100),
        ("to_and_fro", [0, 3600 * 10**9] * 50),
        ("back", [0] * 50 + [-STEP * 20] * 50),
    ):
        report = convert(write_ros2(tmp_path / name, off_by(*offsets)), tmp_path / "out" / name, SPLIT)
        held.append(
            [sorted(n["recorded_ns"] for n in notes(tmp_path / "out" / name, s)) for s in ("train", "held_out")]
        )
        assert all(stamps == sorted(stamps) for stamps in scene_stamps(tmp_path / "out" / name))
        assert report.split_by == "block"
    assert held[0] == held[1] == held[2]


# ---- topics ------------------------------------------------------------------------------------------------------


def test_two_cameras_must_be_chosen_between(tmp_path: Path) -> None:
    other = stream(4, "/right/image_raw", "/right/camera_info", frame_id="right_optical", first=50)
    bag = write_ros2(tmp_path / "bag", [*stream(6), *other])
    with pytest.raises(BagError) as error:
        convert(bag, tmp_path / "out")
    for text in ("image_topic", IMAGE, "/right/image_raw", "6 messages", "4 messages", "10.0 Hz", IMAGE_TYPES[0]):
        assert text in str(error.value)
    report = convert(bag, tmp_path / "right", replace(ALL, image_topic="/right/image_raw"))
    assert report.train == 4, "its camera_info is the one beside it"
    with pytest.raises(BagError, match="/nowhere is no topic of images"):
        convert(bag, tmp_path / "no", replace(ALL, image_topic="/nowhere"))
    odd = write_ros2(tmp_path / "odd", [*stream(3, "/video"), *stream(3, "/v2", "/other/camera_info", first=9)])
    with pytest.raises(BagError, match="info_topic.*/other/camera_info"):
        convert(odd, tmp_path / "odd_out", replace(ALL, image_topic="/video"))


def test_depth_beside_colour_is_no_choice(tmp_path: Path) -> None:
    depth = store().types[IMAGE_TYPES[0]](
        header=header(START), height=2, width=2, encoding="16UC1", is_bigendian=0, step=4, data=np.zeros(8, np.uint8)
    )
    deep = Recorded("/camera/depth/image_raw", IMAGE_TYPES[0], START, packed(IMAGE_TYPES[0], depth))
    assert convert(write_ros2(tmp_path / "bag", [deep, *stream(3)]), tmp_path / "out").train == 3


def test_images_before_any_camera_info_are_served_by_the_first_one_of_their_camera(tmp_path: Path) -> None:
    wrong = Recorded(INFO, INFO_TYPE, START, info(START, "another", Camera(160, 120, 2 * np.diag([1.0, 1, 0.5]))))
    late = START + 10 * STEP
    messages = [wrong, *stream(6, info_topic=None), Recorded(INFO, INFO_TYPE, late, info(late))]
    report = convert(write_ros2(tmp_path / "bag", messages), tmp_path / "out")
    assert report.train == 6
    np.testing.assert_array_equal(BopDataset(tmp_path / "out", split="train").camera(0).matrix, K)


def test_no_camera_info_at_all_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(BagError, match="has no camera_info"):
        convert(write_ros2(tmp_path / "bag", stream(3, info_topic=None)), tmp_path / "out")
    foreign = [Recorded(INFO, INFO_TYPE, START, info(START, "another"))]
    with pytest.raises(BagError, match="none of the 3 images.*'camera_optical'.*'another'"):
        convert(write_ros2(tmp_path / "other", [*foreign, *stream(3, info_topic=None)]), tmp_path / "out2")


def test_bags_without_images_or_without_anything_are_errors(tmp_path: Path) -> None:
    with pytest.raises(BagError, match="holds no images.*camera_info"):
        convert(write_ros2(tmp_path / "bag", [m for m in stream(3) if m.topic == INFO]), tmp_path / "out")
    with pytest.raises(BagError, match="holds no images"):
        convert(write_ros2(tmp_path / "empty", []), tmp_path / "out2")
    with pytest.raises(BagError, match="at least one bag"):
        convert([], tmp_path / "out3")


def test_broken_images_are_counted_by_their_reason(tmp_path: Path) -> None:
    messages = stream(8)
    messages[3] = messages[3]._replace(data=messages[3].data[:5000])
    messages[7] = messages[7]._replace(data=b"\x00\x01\x00\x00junk")
    small = raw_image(painting(9, (80, 60)), START + 20 * STEP)
    messages.append(Recorded(IMAGE, IMAGE_TYPES[0], START + 20 * STEP, small))
    report = convert(write_ros2(tmp_path / "bag", messages), tmp_path / "out").bags[0]
    assert (report.seen, report.written, sum(report.broken.values())) == (9, 6, 3)
    assert any("CameraInfo describes" in reason for reason in report.broken)
    assert any("The image is 80x60, but its CameraInfo describes 160x120" in reason for reason in report.broken)
    assert sum("bytes" in r for r in report.broken) >= 1


def test_images_that_are_broken_alike_are_counted_together(tmp_path: Path) -> None:
    messages = [m._replace(data=m.data[: 9000 + n]) if m.topic == IMAGE else m for n, m in enumerate(stream(5))]
    messages += stream(1, first=9)
    (count,) = convert(write_ros2(tmp_path / "bag", messages), tmp_path / "out").bags[0].broken.values()
    assert count == 5


def test_a_bag_of_broken_images_is_an_error_with_its_reasons(tmp_path: Path) -> None:
    other = [m for m in stream(3) if m.topic == INFO] + [m for m in stream(3, camera=Camera(80, 60, K))][1::2]
    bag = write_ros2(tmp_path / "wrong", other)
    with pytest.raises(BagError, match="none of its 3 images.*3 times: The image is 80x60, but.*160x120"):
        convert(bag, tmp_path / "out")
    kind = IMAGE_TYPES[1]
    png = cv2.imencode(".png", np.full((120, 160), 900, np.uint16))[1].reshape(-1)
    message = store().types[kind](header=header(START), format="16UC1; png compressed ", data=png)
    deep = [Recorded(INFO, INFO_TYPE, START, info(START)), Recorded("/d", kind, START, packed(kind, message))]
    with pytest.raises(BagError, match="1 times: The image's format is '16UC1; png compressed ': depth"):
        convert(write_ros2(tmp_path / "deep", deep), tmp_path / "out2")
    both = write_ros2(tmp_path / "both", [*deep, *stream(3)])
    assert convert(both, tmp_path / "out3").train == 3, "depth beside colour is no choice"


def test_an_image_too_wide_for_its_lens_to_be_taken_out_is_broken(tmp_path: Path) -> None:
    lens = Camera(33000, 12, K, DistortionModel.PLUMB_BOB, np.array([-0.3, 0.1, 0, 0, 0]))
    bag = write_ros2(tmp_path / "bag", [*stream(1, camera=lens), *stream(2, first=5)])
    report = convert(bag, tmp_path / "out").bags[0]
    assert report.written == 2 and any("33000x12" in reason for reason in report.broken)


def test_opencv_failing_is_an_error_that_names_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise cv2.error("dst.cols < SHRT_MAX")

    bag = write_ros2(tmp_path / "bag", stream(1))
    monkeypatch.setattr("ukd_ros.data.rosbag.scenes.undistorted", failing)
    with pytest.raises(BagError, match="000000.*OpenCV"):
        convert(bag, tmp_path / "out")


def test_a_truncated_bag_gives_what_is_whole_and_says_what_is_lost(tmp_path: Path) -> None:
    bag = write_mcap(tmp_path / "bag.mcap", stream(10))
    bag.write_bytes(bag.read_bytes()[: bag.stat().st_size * 3 // 4])
    report = convert(bag, tmp_path / "out")
    assert 6 <= report.train < 10
    assert report.bags[0].lost_bytes > 0 and "breaks off" in report.table()


# ---- whole or not at all -----------------------------------------------------------------------------------------


def test_other_bags_or_options_in_the_same_folder_are_refused_by_name(tmp_path: Path) -> None:
    bag, other = write_ros2(tmp_path / "bag", stream(5)), write_ros2(tmp_path / "other", stream(6))
    convert(bag, tmp_path / "out")
    before = tree(tmp_path / "out")
    convert(bag, tmp_path / "out")
    with pytest.raises(BagError, match="other bags.*bag.*other"):
        convert(other, tmp_path / "out")
    with pytest.raises(BagError, match="another min_change"):
        convert(bag, tmp_path / "out", replace(ALL, min_change=3.0))
    with pytest.raises(BagError, match="other names"):
        convert(bag, tmp_path / "out", names={"part": 3})
    file = bag / "bag.mcap"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(BagError, match="other content"):
        convert(bag, tmp_path / "out")
    assert tree(tmp_path / "out") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(BagError, match="not empty"):
        convert(other, tmp_path / "full")
    with pytest.raises(BagError, match="thesis.txt is a file, not a folder"):
        convert(other, tmp_path / "full" / "thesis.txt")
    with pytest.raises(BagError, match="thesis.txt is a file, not a folder"):
        convert(other, tmp_path / "full" / "thesis.txt" / "out")
    with pytest.raises(BagError, match="same bag"):
        convert([other, tmp_path / "other" / "."], tmp_path / "twice")


def test_a_call_that_failed_before_it_wrote_a_scene_does_not_bind_the_folder(tmp_path: Path) -> None:
    other = stream(30, "/right/image_raw", "/right/camera_info", frame_id="right_optical", first=50)
    bag, out = write_ros2(tmp_path / "bag", [*stream(6), *other]), tmp_path / "out"
    with pytest.raises(BagError, match="image_topic"):
        convert(bag, out, SPLIT)
    right = replace(SPLIT, image_topic="/right/image_raw", guard_s=3.0)
    with pytest.raises(BagError, match="guard_s"):
        convert(bag, out, right)
    report = convert(bag, out, replace(right, guard_s=0.1))
    assert report.train > 10 and report.held_out > 3
    with pytest.raises(BagError, match="another guard_s"):
        convert(bag, out, right)


def test_a_full_disk_leaves_whole_scenes_and_the_next_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bag = write_ros2(tmp_path / "bag", stream(60))
    convert(bag, tmp_path / "unbroken", SPLIT)
    written = 0

    def filling(path: Path, data: bytes) -> None:
        nonlocal written
        written += 1
        if written > 25:
            raise OSError(28, "No space left on device", str(path))
        write_bytes(path, data)

    monkeypatch.setattr("ukd_ros.data.rosbag.scenes.write_bytes", filling)
    with pytest.raises(BagError, match="No space left on device.*goes on"):
        convert(bag, tmp_path / "out", SPLIT)
    scenes = [p for split in ("train", "held_out") for p in (tmp_path / "out" / split).glob("*")]
    assert scenes and not [p for p in scenes if p.name.startswith(".")], "nothing half written stays"
    assert all((p / "frames.json").is_file() for p in scenes)
    monkeypatch.undo()
    convert(bag, tmp_path / "out", SPLIT)
    assert tree(tmp_path / "out") == tree(tmp_path / "unbroken")


def test_killed_at_any_moment_it_goes_on_to_the_same_result(tmp_path: Path, repo_root: Path) -> None:
    bag = write_ros2(tmp_path / "bag", stream(80))
    convert(bag, tmp_path / "unbroken", SPLIT)
    out = tmp_path / "out"
    words = ["bag", "to-bop", str(bag), "--out", str(out), "--quiet", "--set", "min_change=0", "guard_s=0.25"]
    code = f"import time, ukd_ros.data.rosbag.scenes as s; w = s.write_bytes; \
s.write_bytes = lambda p, d: (time.sleep(0.03), w(p, d)); import ukd_ros.cli as c; c.main({words!r})"
    killed = 0
    for wanted in (1, 3):
        running = subprocess.Popen([sys.executable, "-c", code], cwd=repo_root)
        limit = time.monotonic() + 60
        while running.poll() is None and len(list(out.glob("[th]*/[0-9]*"))) < wanted and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.1)
        killed += running.poll() is None
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    assert killed, "at least once it was killed in the middle"
    done = len(list(out.glob("[th]*/[0-9]*")))
    assert 1 <= done
    report = convert(bag, out, SPLIT)
    assert tree(out) == tree(tmp_path / "unbroken") and report.scenes > done - 1


def test_a_first_scene_that_was_killed_binds_the_folder_to_nothing(tmp_path: Path) -> None:
    bag, out = write_ros2(tmp_path / "bag", stream(50)), tmp_path / "out"
    convert(bag, out)
    os.rename(out / "train" / "000000", out / "train" / ".000000.partial")  # as kill -9 leaves it
    (out / "train" / ".000007.partial").mkdir()
    report = convert(bag, out, SPLIT)
    assert report.split_by == "block" and not list(out.rglob(".*partial"))
    with pytest.raises(BagError, match="another held_out"):
        convert(bag, out)


def test_processes_look_through_every_bag_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bags = [write_ros2(tmp_path / f"bag{n}", stream(4, first=10 * n)) for n in range(2)]
    looked: list[str] = []

    def slowly(path: Path, *more: Any) -> Survey:
        looked.append(path.name)
        time.sleep(0.3 if path.name == "bag0" else 0.8)
        return survey_bag(path, *more)

    monkeypatch.setattr("ukd_ros.data.rosbag.frames.survey_bag", slowly)
    reports: dict[int, BagFramesReport] = {}

    def work(rank: int) -> None:
        reports[rank] = convert(bags, tmp_path / "out", processes=(rank, 2))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(looked) == ["bag0", "bag1"]
    assert reports[0].to_mapping() == reports[1].to_mapping() and reports[0].train == 8
    monkeypatch.undo()
    convert(bags, tmp_path / "alone")
    assert tree(tmp_path / "out") == tree(tmp_path / "alone"), "nothing of the waiting is left"


def test_a_bag_whose_process_dies_is_looked_through_by_another(
    tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bag, out = write_ros2(tmp_path / "bag", stream(4)), tmp_path / "out"
    code = f"""if True:
        import time, ukd_ros.data.rosbag.frames as f
        f.survey_bag = lambda *_: (print("looking", flush=True), time.sleep(600))
        f.bags_to_bop([{str(bag)!r}], {str(out)!r}, f.BagOptions(held_out=0.0, min_change=0.0), processes=(1, 2))"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=repo_root, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "looking\n"
    events: list[str] = []

    def kill() -> None:
        events.append("killed")
        other.kill()

    def watched(*arguments: Any) -> Survey:
        events.append("looked")
        return survey_bag(*arguments)

    monkeypatch.setattr("ukd_ros.data.rosbag.frames.survey_bag", watched)
    killer = threading.Timer(0.5, kill)
    killer.start()
    assert convert(bag, out, processes=(0, 2)).train == 4
    killer.join()
    other.communicate()
    assert events == ["killed", "looked"], "it waited as long as the other lived, and no longer"


def test_a_survey_of_many_frames_is_small_to_hold_write_and_read(tmp_path: Path) -> None:
    bag = write_ros2(tmp_path / "bag", stream(5))
    small = survey_bag(bag, "bag", ALL, False)
    label = {"name": "part", "R": [1.0, 0, 0, 0, 1, 0, 0, 0, 1], "t": [0.1, 0.2, 0.5]}
    small.frames[1] = replace(small.frames[1], labels=(label, label))
    assert loads(dumps(small)) == small
    assert len({id(frame.frame_id) for frame in small.frames}) == 1, "one text for all"

    count = 20_000
    times = [START + n * STEP for n in range(count)]
    frames = [Frame((at, 0, 1, 1000 + n, n), at, "camera", at - START, 0, 0) for n, at in enumerate(times)]
    many = replace(small, frames=frames)
    tracemalloc.start()
    try:
        data = dumps(many)
        written = tracemalloc.get_traced_memory()[1] / count
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        again = loads(data)
        read = (tracemalloc.get_traced_memory()[1] - before) / count
    finally:
        tracemalloc.stop()
    assert again == many and again.frames[0].frame_id is again.frames[-1].frame_id
    assert written < 250 and read < 360, f"{written:.0f} and {read:.0f} bytes a frame at the peak"


def test_processes_share_out_the_scenes(tmp_path: Path) -> None:
    bags = [write_ros2(tmp_path / f"bag{n}", stream(30, first=50 * n)) for n in range(2)]
    convert(bags, tmp_path / "alone", SPLIT)
    first = convert(bags, tmp_path / "shared", SPLIT, processes=(1, 2))
    half = len(list((tmp_path / "shared").glob("[th]*/[0-9]*")))
    assert 0 < half < first.scenes
    second = convert(bags, tmp_path / "shared", SPLIT, processes=(0, 2))
    assert tree(tmp_path / "shared") == tree(tmp_path / "alone")
    assert first.to_mapping() == second.to_mapping()


def test_a_listener_that_stops_the_work_leaves_whole_scenes(tmp_path: Path) -> None:
    from ukd_ros.data.progress import Progress, Stopped, listening

    stages = []

    def listener(progress: Progress) -> None:
        stages.append(progress.stage)
        if progress.stage == "writing frames" and progress.done == 30:
            raise Stopped("enough")

    bag = write_ros2(tmp_path / "bag", stream(60))
    with listening(listener), pytest.raises(Stopped):
        convert(bag, tmp_path / "out", SPLIT)
    assert set(stages) == {"looking through bag", "writing frames"}
    assert not list((tmp_path / "out").rglob(".*partial"))
    convert(bag, tmp_path / "out", SPLIT)
    convert(bag, tmp_path / "unbroken", SPLIT)
    assert tree(tmp_path / "out") == tree(tmp_path / "unbroken")


def test_options_that_cannot_be_are_refused_by_name() -> None:
    for name, value in (
        ("held_out", 0.95),
        ("block_s", 0.0),
        ("guard_s", -1.0),
        ("max_frames", -1),
        ("min_change", -1.0),
    ):
        with pytest.raises(ValueError, match=name):
            BagOptions(**{name: value})
