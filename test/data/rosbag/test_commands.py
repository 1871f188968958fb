# SPDX-License-Identifier: Apache-2.0
"""`ukd bag info` and `ukd bag to-bop`: what they print and refuse."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from data.rosbag.making import START, Recorded, pose_stamped, stream, write_mcap, write_ros2

from ukd_ros.cli import main
from ukd_ros.data.bop import BopDataset
from ukd_ros.data.rosbag.message_types import INFO_TYPE, POSE_TYPE
from ukd_ros.geometry.pose import Pose


def test_info_says_what_is_there_and_what_would_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = Recorded("/od\x1b[31md", "my_msgs/msg/Odd", START, b"123")
    bag = write_ros2(tmp_path / "bag", [*stream(11), odd])
    assert main(["bag", "info", str(bag)]) == 0
    said = capsys.readouterr().out
    for text in ("/camera/image_raw", "sensor_msgs/msg/Image", "11", "10.0 Hz", "1.0 s", "160x120", "fx 150.0",
                 "frames: /camera/image_raw with /camera/camera_info", "not understood"):  # fmt: skip
        assert text in said, said
    assert "\x1b" not in said, "a topic's name does not steer the terminal"


def test_info_of_a_damaged_bag_says_how_much_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag = write_mcap(tmp_path / "bag.mcap", stream(10))
    bag.write_bytes(bag.read_bytes()[: bag.stat().st_size // 2])
    assert main(["bag", "info", str(bag)]) == 0
    said = capsys.readouterr().out
    assert "bytes cannot be read" in said and "breaks off" in said


def test_info_of_two_cameras_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [*stream(3), *stream(3, "/right/image_raw", "/right/camera_info", "right_optical", first=9)]
    assert main(["bag", "info", str(write_ros2(tmp_path / "bag", messages))]) == 0
    said = capsys.readouterr().out
    assert "name one with image_topic" in said and "/right/image_raw" in said
    assert "'right_optical'" in said and "'camera_optical'" in said


def test_info_of_several_bags_goes_on_behind_a_broken_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag = write_ros2(tmp_path / "bag", stream(3))
    (tmp_path / "broken.mcap").write_bytes(b"")
    assert main(["bag", "info", str(tmp_path / "broken.mcap"), str(bag)]) == 2
    said = capsys.readouterr()
    assert "/camera/image_raw" in said.out
    assert said.err.count("\n") == 1 and "broken.mcap: is empty" in said.err


def test_info_says_when_images_and_camera_info_are_of_different_frames(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = [*stream(2, info_topic=None), *[m for m in stream(2, frame_id="camera_link") if m.kind == INFO_TYPE]]
    assert main(["bag", "info", str(write_ros2(tmp_path / "bag", odd))]) == 0
    said = capsys.readouterr().out
    assert "'camera_optical', that of /camera/camera_info 'camera_link'" in said
    assert main(["bag", "info", str(write_ros2(tmp_path / "good", stream(2)))]) == 0
    assert "not of one camera" not in capsys.readouterr().out


def test_to_bop_writes_a_folder_and_its_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag, out = write_ros2(tmp_path / "bag", stream(50)), tmp_path / "out"
    words = ["bag", "to-bop", str(bag), "--out", str(out), "--quiet", "--set", "guard_s=0.2", "max_frames=30"]
    assert main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "held out" in said and "30" in said
    report = json.loads((out / "report.json").read_text())
    total = len(BopDataset(out, split="train")) + len(BopDataset(out, split="held_out"))
    assert total == report["train"] + report["held_out"] == 30


@pytest.mark.parametrize(
    ("name", "word"),
    [("part", "1=part"), ("\x1b[31m$(touch x)", "1=?[31m$(touch x)"), ("a b'; rm x", "1=a b'; rm x")],
)
def test_to_bop_names_the_objects_of_a_bag_in_words_that_a_shell_leaves_alone(
    name: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pose = pose_stamped(START, Pose(np.eye(3), np.array([0.0, 0.0, 0.5])))
    bag = write_ros2(tmp_path / "bag", [*stream(3), Recorded(f"/truth/{name}/pose", POSE_TYPE, START, pose)])
    words = ["bag", "to-bop", str(bag), "--out", str(tmp_path / "out"), "--quiet", "--set", "held_out=0"]
    assert main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("labelled objects: ")]
    assert shlex.split(line)[2:] == ["--name", word]
    assert shlex.quote(word) in line and "\x1b" not in said


def test_settings_printed_are_settings_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bag", "to-bop", "--settings"]
    assert main([*words, "--set", "label_topics={/p: part}", "rectified=true"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["label_topics"] == {"/p": "part"}
    (tmp_path / "s.yaml").write_text(printed)
    assert main([*words, "--config", str(tmp_path / "s.yaml")]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["info"], "no bag is named"),
        (["info", "nowhere"], "nowhere"),
        (["to-bop", "bag"], "--out must be given"),
        (["to-bop", "nowhere", "--out", "o"], "nowhere"),
        (["to-bop", "bag", "--out", "o", "--set", "held_out=2"], "held_out"),
        (["to-bop", "bag", "--out", "o", "--set", "imagetopic=x"], "did you mean 'image_topic'"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bag", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("ukd bag: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing is left behind"
