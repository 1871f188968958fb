# SPDX-License-Identifier: Apache-2.0
"""Bags and teachers become a student: ros2 launch ukd_ros distill.launch.py bag:=monday,tuesday teacher:=runs out:=run.

The launch ends with the node: with 0 when the model is finished, else with 1, the only other status that ros2 launch
has (the node's own is in the last line: 130 stopped, 1 failed, 2 refused). There is no bar here, since launch shows
the node's output by whole lines: a line every ten seconds says how far it is, and so does ~/progress.
"""

from __future__ import annotations

from typing import Any, List  # noqa: UP035

import yaml
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, Shutdown
from launch.events.process import ProcessExited
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from ukd_ros.ros.distill_options import NAME, DistillNodeOptions, option_fields
from ukd_ros.ros.fastdds import share_file
from ukd_ros.ros.launch_arguments import full_name, in_parameter_file, logger_name

ARGUMENTS: dict[str, tuple[str, str]] = {
    "namespace": ("", "Namespace of the node."),
    "params_file": ("", "YAML file of parameters; empty: config/distill_node.yaml of this package."),
    "log_level": ("info", "debug, info, warn, error or fatal."),
}

PATIENCE_S = 5.0
"""So much longer than the node's own limit may stopping take before launch kills it."""


def listed(name: str, value: str) -> list[str]:
    """Return a launch argument's values, parted by commas; a YAML list where one has a comma itself."""
    if not value.startswith("["):
        return [text for text in value.split(",") if text]
    try:
        texts = yaml.safe_load(value)
    except yaml.YAMLError:
        texts = None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RuntimeError(f"launch argument {name}:={value} is no list of texts, such as {name}:='[\"a,b\", c]'.")
    return texts


def as_kind(name: str, default: Any, value: str) -> Any:
    """Return a launch argument as its parameter's kind; RuntimeError when it is none."""
    if isinstance(default, tuple):
        return listed(name, value)
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise RuntimeError(f"launch argument {name}:={value} is neither true nor false.")
        return value.lower() == "true"
    if isinstance(default, float):
        try:
            return float(value)
        except ValueError as error:
            raise RuntimeError(f"launch argument {name}:={value} is no number.") from error
    return value


def given_parameters(context: LaunchContext) -> dict[str, Any]:
    """Return the node parameters that were given as launch arguments."""
    given: dict[str, Any] = {}
    for leaf in option_fields():
        value = LaunchConfiguration(leaf.name).perform(context)
        if value:
            given[leaf.name] = as_kind(leaf.name, getattr(DistillNodeOptions(), leaf.name), value)
    return given


def as_it_is(value: Any) -> Any:
    """Return a parameter of which launch_ros reads no text as YAML: a bag 2026 or yes is text and stays it."""
    if isinstance(value, str):
        return ParameterValue(value, value_type=str)
    # typing.List is what launch's documentation names; it compares types itself
    return ParameterValue(value, value_type=List[str]) if isinstance(value, list) else value  # noqa: UP006


def pass_on(event: ProcessExited, context: LaunchContext) -> Shutdown:
    """End the launch with the node; an exception is the only way to another status than 0."""
    if event.returncode != 0:
        raise RuntimeError(f"{NAME} ended with status {event.returncode}; its last line says why.")
    return Shutdown(reason=f"{NAME} is done")


def stopping_s(given: dict[str, Any], params_file: str, node: str) -> float:
    """Return how long the node may take to stop: by its launch argument, else by the file, else by default."""
    value = given.get("stop_within_s", in_parameter_file(params_file, node, "stop_within_s"))
    # the node refuses whatever else a file may hold there
    return value if isinstance(value, float) else DistillNodeOptions().stop_within_s


def start(context: LaunchContext) -> list[Any]:
    """Return the node that the arguments ask for."""
    argument = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    given = given_parameters(context)
    params_file = argument["params_file"] or str(share_file("config/distill_node.yaml"))
    node = full_name(NAME, argument["namespace"], context.launch_configurations.get("ros_namespace", ""))
    return [
        Node(
            package="ukd_ros",
            executable=NAME,
            name=NAME,
            namespace=argument["namespace"],
            output="screen",
            parameters=[
                params_file,
                {name: as_it_is(value) for name, value in given.items()},
            ],
            arguments=["--ros-args", "--log-level", f"{logger_name(node)}:={argument['log_level']}"],
            sigterm_timeout=str(stopping_s(given, params_file, node) + PATIENCE_S),
            on_exit=pass_on,
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments, the parameters' own among them, and start the node with them."""
    declared = [
        DeclareLaunchArgument(
            leaf.name,
            default_value="",
            description=leaf.field.metadata["help"]
            + (" Several: parted by commas." if isinstance(getattr(DistillNodeOptions(), leaf.name), tuple) else ""),
        )
        for leaf in option_fields()
    ]
    declared += [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in ARGUMENTS.items()
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start)])
