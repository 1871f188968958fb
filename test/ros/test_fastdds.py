# SPDX-License-Identifier: Apache-2.0
"""The Fast DDS profile fits the shared memory that there is, and the user's own choice is left alone."""

from __future__ import annotations

import importlib.util
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from ukd_ros.ros.fastdds import VARIABLES, WANTED_BYTES, profile_environment, segment_bytes, share_file

SPACE = {"d": "http://www.eprosima.com/XMLSchemas/fastRTPS_Profiles"}


def segment_of(path: Path) -> int:
    found = ElementTree.parse(path).getroot().findall(".//d:segment_size", SPACE)
    assert len(found) == 1
    return int(found[0].text or "0")


def test_plenty_of_memory_takes_the_shipped_profile() -> None:
    variables, sentence = profile_environment({}, free=2**30)
    assert set(variables) == set(VARIABLES) and "32 MB" in sentence
    path = Path(variables[VARIABLES[0]])
    assert path == share_file("config/fastdds.xml") and segment_of(path) == WANTED_BYTES
    root = ElementTree.parse(path).getroot()
    declared = {e.text for e in root.findall(".//d:transport_descriptor/d:transport_id", SPACE)}
    used = {e.text for e in root.findall(".//d:userTransports/d:transport_id", SPACE)}
    assert declared == used and len(used) == 2


def test_a_containers_small_memory_gets_a_smaller_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    variables, sentence = profile_environment({}, free=64 * 2**20)
    assert segment_of(Path(variables[VARIABLES[1]])) == 16 * 2**20 and "16 MB" in sentence
    assert Path(variables[VARIABLES[1]]).is_relative_to(tmp_path)


def test_too_little_memory_is_said_and_nothing_set() -> None:
    variables, sentence = profile_environment({}, free=4 * 2**20)
    assert variables == {} and "4 MB free" in sentence and "compressed:=true" in sentence
    assert segment_bytes(0) == 0


@pytest.mark.parametrize("name", VARIABLES)
def test_the_users_own_profile_stays(name: str) -> None:
    variables, sentence = profile_environment({name: "mine.xml"}, free=2**30)
    assert variables == {} and "mine.xml" in sentence


def test_the_launch_file_declares_its_arguments() -> None:
    pytest.importorskip("launch_ros")
    from launch.actions import DeclareLaunchArgument

    path = Path(__file__).resolve().parents[2] / "launch" / "pose.launch.py"
    spec = importlib.util.spec_from_file_location("pose_launch", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    description = module.generate_launch_description()
    declared = {a.name: a for a in description.entities if isinstance(a, DeclareLaunchArgument)}
    assert {"model", "image", "camera_info", "params_file", "rviz", "dds_profile"} <= set(declared)
    assert all(argument.description for argument in declared.values())
    assert module.camera_info_beside("/cam/image_raw") == "/cam/camera_info"
    assert module.camera_info_beside("image") == "camera_info"
