# SPDX-License-Identifier: Apache-2.0
"""What package.xml, setup.py, the pins and the environments promise each other."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def tools() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "tools" / "environment.py"
    spec = importlib.util.spec_from_file_location("environment", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel from a copy of what git would ship, without build isolation (setuptools is in .venv)."""
    pytest.importorskip("setuptools")
    root, work = Path(__file__).resolve().parents[1], tmp_path_factory.mktemp("build")
    for name in ("setup.py", "setup.cfg", "package.xml", "README.md", "LICENSE"):
        shutil.copy(root / name, work)
    for name in ("ukd_ros", "launch", "config", "rviz", "models", "resource"):
        shutil.copytree(root / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=work, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next((work / "dist").glob("*.whl")))


def pins(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)(; python_version (?:<|>=) \"3\.11\")?", line)
            assert match is not None, f"{path.name}: {line!r} pins nothing"
            found.setdefault(match[1], []).append(match[3] or "")
    return found


def test_package_xml_names_what_a_robot_needs(repo_root: Path) -> None:
    root = ElementTree.parse(repo_root / "package.xml").getroot()
    assert root.get("format") == "3" and root.findtext("name") == "ukd_ros"
    assert root.findtext("export/build_type") == "ament_python"
    depends = {element.text for element in root.iter("exec_depend")}
    assert {"rclpy", "cv_bridge", "tf_transformations", "sensor_msgs_py", "python3-opencv", "python3-numpy"} <= depends
    assert not {"python3-torch", "torch", "pot"} & depends
    messages = {
        name.split(".")[0]
        for path in (repo_root / "ukd_ros" / "ros").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (name := node.module or "")
        if name.split(".")[0].endswith("_msgs") or name.split(".")[0] in ("std_srvs", "builtin_interfaces")
    }
    assert messages - {"vision_msgs"} <= depends, "a message package is imported and not named in package.xml"


def test_one_version_everywhere(repo_root: Path) -> None:
    root = ElementTree.parse(repo_root / "package.xml").getroot()
    assert f'version="{root.findtext("version")}"' in (repo_root / "setup.py").read_text(encoding="utf-8")


def test_the_wheel_holds_programs_models_and_everything_shared(wheel: zipfile.ZipFile, repo_root: Path) -> None:
    names = set(wheel.namelist())
    scripts = next(name for name in names if name.endswith("entry_points.txt"))
    text = wheel.read(scripts).decode()
    assert "pose_node = ukd_ros.ros.pose_node:main" in text and "ukd = ukd_ros.cli:main" in text
    data = {name.split(".data/data/", 1)[1] for name in names if ".data/data/" in name}
    assert "share/ament_index/resource_index/packages/ukd_ros" in data
    assert "share/ukd_ros/package.xml" in data
    for folder in ("launch", "config", "rviz", "models"):
        for path in (repo_root / folder).rglob("*"):
            if path.is_file() and not {"__pycache__", "teachers"} & set(path.parts):
                assert f"share/ukd_ros/{path.relative_to(repo_root).as_posix()}" in data
    assert not any("/teachers/" in name for name in data), "teachers are for those who train, not for robots"
    assert "ukd_ros/py.typed" in names
    assert not any(name.startswith(("test/", "benchmarks/", "tools/")) for name in names)


def test_scripts_go_where_ros2_run_looks(repo_root: Path) -> None:
    text = (repo_root / "setup.cfg").read_text(encoding="utf-8")
    assert "script_dir=$base/lib/ukd_ros" in text and "install_scripts=$base/lib/ukd_ros" in text


def test_every_requirement_is_pinned_for_every_python(repo_root: Path) -> None:
    wanted = set(re.findall(r'"([A-Za-z][\w-]*)(?:\[\w+\])?(?:[<>=]=|")', (repo_root / "setup.py").read_text()))
    folder = repo_root / "constraints"
    common = pins(folder / "python.txt")
    for name, markers in common.items():
        whole = [""], ['; python_version < "3.11"', '; python_version >= "3.11"'], ['; python_version < "3.11"']
        assert markers in whole, f"{name}: pinned twice for one Python, or not for all"
    for other in ("wheels.txt", "system-ros.txt"):
        pinned = pins(folder / other)
        assert not set(pinned) & set(common), "a package is pinned in two files at once"
        for name in ("torch", "POT", "onnxruntime", "rosbags", "scipy", "numpy", "opencv-python-headless", "pytest"):
            assert name in wanted
            assert name.lower() in common or name in pinned


def test_the_tool_names_every_lack_with_its_cure(tools: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    test, demo = tools.ENVIRONMENTS["test"], tools.ENVIRONMENTS["demo"]
    monkeypatch.setattr(tools.sys, "version_info", (3, 8, 1, "final", 0))
    assert "3.8" in tools.python_problems(test)[0] and "PYTHON=" in tools.python_problems(test)[0]
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: None)
    assert any("python3.8-venv" in line for line in tools.python_problems(test))
    monkeypatch.setenv("ROS_DISTRO", "humble")
    assert "humble" in tools.ros_problems(demo)[0] and "PYTHON=" in tools.ros_problems(demo)[0]
    monkeypatch.delenv("ROS_DISTRO")
    monkeypatch.setattr(tools.platform, "machine", lambda: "aarch64")
    assert "aarch64" in tools.ros_problems(demo)[0] and "install ROS 2" in tools.ros_problems(demo)[0]
    monkeypatch.setattr(tools.shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    assert "5 MB are free" in tools.disk_problems(demo)[0]

    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(tools.ctypes, "CDLL", no_library)
    assert "libegl1" in tools.egl_problems(test)[0] and "apt-get install" in tools.egl_problems(test)[0]
    assert not tools.egl_problems(demo), "the demo draws nothing by OpenGL"


def test_an_interrupted_or_outdated_environment_is_not_ready(
    tools: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_root: Path
) -> None:
    for name in ("constraints", "tools"):
        shutil.copytree(repo_root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg"):
        shutil.copy(repo_root / name, tmp_path)
    monkeypatch.setattr(tools, "ROOT", str(tmp_path))
    monkeypatch.delenv("ROS_DISTRO", raising=False)
    demo = tools.ENVIRONMENTS["demo"]
    (tmp_path / demo.folder).mkdir()
    assert not tools.is_ready(demo), "no stamp: interrupted"
    stamp = tmp_path / demo.folder / "ukd-stamp"
    stamp.write_text(tools.fingerprint(demo))
    assert tools.is_ready(demo)
    with (tmp_path / "constraints" / "wheels.txt").open("a") as file:
        file.write("# another pin\n")
    assert not tools.is_ready(demo), "the pins changed"
    stamp.write_text(tools.fingerprint(demo))
    monkeypatch.setenv("ROS_DISTRO", "jazzy")
    assert not tools.is_ready(demo), "ROS was sourced"


def test_the_tool_parses_on_an_old_python(repo_root: Path) -> None:
    ast.parse((repo_root / "tools" / "environment.py").read_text(encoding="utf-8"), feature_version=(3, 6))


def test_programs_may_be_run(repo_root: Path) -> None:
    for name in (".ci/run", "tools/environment.py"):
        assert os.access(repo_root / name, os.X_OK)
