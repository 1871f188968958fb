# SPDX-License-Identifier: Apache-2.0
"""The walls between the rooms: imports go one way, heavy packages stay in their files, a robot loads few of them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ukd_ros"
FILES = sorted(PACKAGE.rglob("*.py"))

ROOMS: dict[str, set[str]] = {
    "geometry": set(),
    "perception": {"geometry", "config"},
    "data": {"geometry", "perception", "config"},
    "distillation": {"geometry", "perception", "data", "config"},
    "ros": {"geometry", "perception", "config"},
    "config": set(),
}

EXCEPTIONS = {
    # the demo plays and records bags; distill_node alone imports the teachers' room
    "ros/demo.py": {"data"},
    "ros/demo_listener.py": {"data"},
    "ros/demo_player.py": {"data"},
    "ros/demo_report.py": {"data"},
    "ros/distill_node.py": {"data", "distillation"},
}

# Who may import a package that a robot does not need. A name ending in / is a room.
PLACES = {
    "torch": ("distillation/", "perception/network.py", "perception/backends.py"),
    "safetensors": ("distillation/", "perception/backends.py"),
    "onnxruntime": ("perception/backends.py",),
    "onnx": ("distillation/",),
    "onnxslim": ("distillation/",),
    "ot": ("distillation/transport.py",),
    "scipy": ("distillation/",),
    "matplotlib": ("distillation/",),
    "tqdm": ("data/", "distillation/"),
    "moderngl": ("data/renderer.py",),
    "trimesh": ("data/meshes.py",),
    "PIL": ("data/meshes.py", "data/bop_check.py"),
    "rosbags": ("data/rosbag/writer.py", "data/rosbag/ros1.py", "data/rosbag/message_types.py"),
    "lz4": ("data/rosbag/compression.py",),
    "backports": ("data/rosbag/compression.py",),
    "cv2": ("perception/", "data/", "distillation/", "ros/"),
    "rclpy": ("ros/",),
    "cv_bridge": ("ros/interop.py",),
    "tf_transformations": ("ros/interop.py",),
    "sensor_msgs_py": ("ros/interop.py",),
    "tf2_ros": ("ros/interop.py",),
    "vision_msgs": ("ros/interop.py",),
}

NOT_ON_A_ROBOT = ("torch", "ot", "rosbags", "moderngl", "trimesh", "scipy", "matplotlib", "onnx", "onnxslim", "tqdm")


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted name of every import in a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            # `from ukd_ros import config` names the room in the alias
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", [p for p in FILES if "/" in place(p)], ids=place)
def test_imports_go_one_way(path: Path) -> None:
    room = place(path).split("/")[0]
    allowed = {room} | ROOMS[room] | EXCEPTIONS.get(place(path), set())
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("ukd_ros.")}
    assert rooms <= allowed, (
        f"{place(path)} imports {sorted(rooms - allowed)}, but {room} may only see {sorted(allowed)}"
    )


@pytest.mark.parametrize("path", FILES, ids=place)
def test_packages_stay_in_their_places(path: Path) -> None:
    for name in imported(path):
        top = name.split(".")[0]
        places = PLACES.get(top, (place(path),))
        assert any(place(path) == p or (p.endswith("/") and place(path).startswith(p)) for p in places), (
            f"{place(path)} imports {name}; {top} belongs in {', '.join(places)}"
        )


@pytest.mark.parametrize("path", sorted((PACKAGE / "data" / "rosbag").glob("*.py")), ids=place)
def test_what_does_the_work_on_bags_does_not_import_their_front(path: Path) -> None:
    assert not [name for name in imported(path) if f"{name}.".startswith("ukd_ros.data.bags.")]


def test_geometry_needs_numpy_only() -> None:
    outside = {
        name.split(".")[0] for path in (PACKAGE / "geometry").glob("*.py") for name in imported(path)
    } - sys.stdlib_module_names
    assert outside == {"numpy", "ukd_ros"}


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules of a new process after `statement`."""
    code = f"{statement}\nimport sys; print('\\n'.join(sorted({{n.split('.')[0] for n in sys.modules}})))"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_pose_node_loads_nothing_that_a_robot_lacks() -> None:
    pytest.importorskip("rclpy", reason="ROS 2 is neither sourced nor installed as wheels")
    assert not loaded_by("import ukd_ros.ros.pose_node") & set(NOT_ON_A_ROBOT)


def test_the_walls_can_be_seen_to_fall() -> None:
    """The probe itself works: it sees a heavy module where there is one."""
    pytest.importorskip("scipy")
    assert "scipy" in loaded_by("import scipy.optimize")


def test_perception_and_the_command_line_load_without_ros_and_without_extras() -> None:
    modules = loaded_by("import ukd_ros.cli, ukd_ros.perception.estimator, ukd_ros.perception.images")
    assert not modules & {*NOT_ON_A_ROBOT, "rclpy", "onnxruntime", "sensor_msgs"}


@pytest.mark.parametrize("path", FILES, ids=place)
def test_no_room_is_a_lumber_room(path: Path) -> None:
    parts = {part.removesuffix(".py").strip("_") for part in path.relative_to(PACKAGE).parts}
    assert not parts & {"utils", "util", "common", "core", "misc", "helpers", "helper"}


def sources() -> list[Path]:
    folders = ("ukd_ros", "test", "benchmarks", "launch", "tools")
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py")) + [ROOT / "setup.py"]


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_source_names_its_licence_and_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    head = text.splitlines()[:2]
    assert "# SPDX-License-Identifier: Apache-2.0" in head, "the first line (or the one after #!) is the licence"
    for folder in ("work", "home", "root"):  # spelt in pieces, or this file would fail itself
        assert f'"/{folder}/' not in text and f"'/{folder}/" not in text, "an absolute path of one machine"


@pytest.mark.parametrize("path", FILES, ids=place)
def test_nothing_that_runs_foreign_code_is_called(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {a.name for a in node.names} | {getattr(node, "module", None) or ""}
            assert not names & {"pickle", "dill", "joblib", "shelve", "marshal"}
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{place(path)}:{node.lineno}: a bare except"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        where = f"{place(path)}:{node.lineno}: {called}"
        assert called not in {"eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"}, where
        assert not any(k.arg == "shell" for k in node.keywords), where
        if called == "torch.load":
            flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert flags.get("weights_only") == "True", where
        if called in {"np.load", "numpy.load"}:
            assert not any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords), where
        if called == "print" and place(path) not in PRINTERS:
            raise AssertionError(f"{where}: a library logs")


PRINTERS = {"commands.py", "ros/demo.py", "ros/demo_player.py", "ros/demo_listener.py"}
"""Programs whose output is for a person, or for the process that started them."""
