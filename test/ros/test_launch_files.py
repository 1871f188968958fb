# SPDX-License-Identifier: Apache-2.0
"""What the launch files give to the nodes, with stand-ins for launch and launch_ros, which no index of wheels has."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rclpy.node import Node
from ros.ros_graph import Graph

from ukd_ros.ros.launch_arguments import full_name, in_parameter_file

MODULES = (
    "launch", "launch.actions", "launch.events", "launch.events.process", "launch.substitutions", "launch_ros",
    "launch_ros.actions", "launch_ros.parameter_descriptions",
)  # fmt: skip
POSE = {"dds_profile": "false", "rviz": "true"}


def started(
    monkeypatch: pytest.MonkeyPatch, root: Path, name: str, given: dict[str, str], outer: str | None = None
) -> list[dict[str, Any]]:
    """Return what the launch file starts when it is given these arguments, inside PushRosNamespace(outer)."""

    class Configuration:
        def __init__(self, name: str) -> None:
            self.name = name

        def perform(self, context: object) -> str:
            return given.get(self.name, "")

    anything: dict[str, Any] = dict.fromkeys(("LaunchContext", "LaunchDescription", "ProcessExited"))
    anything |= dict.fromkeys(("DeclareLaunchArgument", "OpaqueFunction", "Shutdown", "LogInfo"))
    anything |= {"SetEnvironmentVariable": None, "LaunchConfiguration": Configuration}
    anything |= dict.fromkeys(("Node", "LifecycleNode"), lambda **asked: asked)
    anything |= {"ParameterValue": lambda value, value_type: ("kept", value, value_type)}
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**anything))
    spec = importlib.util.spec_from_file_location("launch_alone", root / "launch" / f"{name}.launch.py")
    assert spec is not None and spec.loader is not None
    module_of_file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module_of_file)
    context = SimpleNamespace(launch_configurations={} if outer is None else {"ros_namespace": outer})
    return list(module_of_file.start(context))


def test_text_stays_what_it_is(monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> None:
    """launch_ros reads plain text as YAML: a bag called 2026 or yes would be a number or a truth value to the node."""
    given = {"bag": "2026,yes", "teacher": "07", "out": "12", "resume": "false", "stop_within_s": "5"}
    values = started(monkeypatch, repo_root, "distill", given)[0]["parameters"][1]
    texts = typing.List[str]  # noqa: UP006
    assert values["bag"] == ("kept", ["2026", "yes"], texts) and values["teacher"] == ("kept", ["07"], texts)
    assert values["out"] == ("kept", "12", str)
    assert values["resume"] is False and values["stop_within_s"] == 5.0


@pytest.mark.parametrize(
    ("namespace", "outer", "folder"),
    [
        ("", None, "/"),
        ("robot", None, "/robot"),
        ("/a/b/", None, "/a/b"),
        ("arm", "/cell", "/cell/arm"),
        ("", "cell", "/cell"),
        ("/arm", "/cell", "/arm"),
    ],
)
def test_the_log_level_reaches_the_nodes_logger(
    monkeypatch: pytest.MonkeyPatch, repo_root: Path, namespace: str, outer: str | None, folder: str
) -> None:
    given = {"namespace": namespace, "log_level": "debug"}
    distill = started(monkeypatch, repo_root, "distill", given, outer)[0]
    pose, rviz = started(monkeypatch, repo_root, "pose", given | POSE, outer)
    assert dict(rviz["remappings"])["/pose_node/markers"] == f"{folder.rstrip('/')}/pose_node/markers"
    code = (
        "import rclpy, sys\n"
        "from rclpy.node import Node\n"
        "rclpy.init(args=sys.argv)\n"
        "print(Node(sys.argv[1]).get_logger().get_effective_level().name)"
    )
    for asked in (distill, pose):
        assert asked["namespace"] == namespace
        words = [asked["name"], *asked["arguments"], "-r", f"__ns:={folder}"]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "DEBUG", f"{asked['arguments']} does not name the logger of a node in {folder}"


@pytest.mark.parametrize(
    ("text", "argument", "patience_s"),
    [
        ("/**: {ros__parameters: {stop_within_s: 60.0}}", "", 65.0),
        ("/**: {ros__parameters: {stop_within_s: 60.0}}", "5", 10.0),
        ("robot: {distill_node: {ros__parameters: {stop_within_s: 30.0}}}", "", 35.0),
        ("other: {ros__parameters: {stop_within_s: 60.0}}", "", 7.0),
        ("/**: {ros__parameters: {stop_within_s: soon}}", "", 7.0),
        ("/**: {ros__parameters: }", "", 7.0),
        ("a: [", "", 7.0),
        ("", "", 7.0),
        (None, "", 7.0),
    ],
)
def test_launch_waits_longer_than_the_node_may_take_to_stop(
    monkeypatch: pytest.MonkeyPatch, repo_root: Path, tmp_path: Path, text: str | None, argument: str, patience_s: float
) -> None:
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    given = {"params_file": str(file), "stop_within_s": argument, "namespace": "robot"}
    node = started(monkeypatch, repo_root, "distill", given)[0]
    assert float(node["sigterm_timeout"]) == patience_s and node["parameters"][0] == str(file)


def test_a_file_of_parameters_means_what_it_means_to_the_node(graph: Graph, tmp_path: Path) -> None:
    files: list[dict[str, Any]] = [
        {"/**": 3.0},
        {"**": 3.0},
        {"/*": 3.0},
        {"distill_node": 3.0},
        {"/robot/distill": 3.0},
        {"/robot": {"distill_node": 3.0}},
        {"/*/distill_node": 3.0},
        {"/**/distill_node": 3.0},
        {"/robot/**": 3.0, "/other": 4.0},
        {"/**": {"distill_node": 3.0}},
        {"/**": 3.0, "/robot/distill_node": 4.0},
        {"/robot/distill_node": 4.0, "/**": 3.0},
        {"/robot/distill": 3.0},
    ]
    path, read = tmp_path / "parameters.yaml", []

    def as_sections(tree: Any) -> Any:
        if isinstance(tree, float):
            return {"ros__parameters": {"stop_within_s": tree}}
        return {name: as_sections(below) for name, below in tree.items()}

    for namespace in ("", "robot"):
        for file in files:
            path.write_text(yaml.safe_dump(as_sections(file), sort_keys=False), encoding="utf-8")
            node = Node(
                "distill_node", namespace=namespace, context=graph.context, enable_rosout=False,
                start_parameter_services=False, automatically_declare_parameters_from_overrides=True,
                cli_args=["--ros-args", "--params-file", str(path)],
            )  # fmt: skip
            meant = node.get_parameter_or("stop_within_s").value
            full = node.get_fully_qualified_name()
            node.destroy_node()
            assert full == full_name("distill_node", namespace)
            assert in_parameter_file(str(path), full, "stop_within_s") == meant, (full, file)
            read.append(meant)
    assert {None, 3.0, 4.0} == set(read)
