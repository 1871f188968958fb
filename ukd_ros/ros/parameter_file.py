# SPDX-License-Identifier: Apache-2.0
"""Writes config/pose.yaml from the options themselves: python -m ukd_ros.ros.parameter_file > config/pose.yaml."""

from __future__ import annotations

import sys
import textwrap
from typing import Any

from ukd_ros.perception.estimator import EstimatorOptions
from ukd_ros.ros.node_options import NodeOptions
from ukd_ros.ros.parameters import parameter_fields, to_parameter, value_at

HEAD = """\
# SPDX-License-Identifier: Apache-2.0
# Every parameter of the pose node with its default; a launch argument of the same name overrides the value here.
# Those marked (configure) are read when the node is configured, the others may be changed while it runs.
# Written by: python -m ukd_ros.ros.parameter_file
/**:
  ros__parameters:
"""
LINE_WIDTH = 118


def yaml_scalar(value: Any) -> str:
    """Return a boolean, number or string as YAML reads it back with the same type."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    text = repr(value)
    # YAML takes 1e-06 for a string: a float needs its point.
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text


def parameter_file(groups: dict[str, Any]) -> str:
    """Return the parameter file of ``groups`` (prefix -> options), every value commented by its own help."""
    lines = [HEAD.rstrip("\n")]
    above: tuple[str, ...] = ()
    for prefix, options in groups.items():
        for leaf in parameter_fields(options, prefix):
            *folders, name = leaf.name.split(".")
            for depth in range(len(folders)):
                if above[: depth + 1] != tuple(folders[: depth + 1]):
                    lines.append("  " * (2 + depth) + f"{folders[depth]}:")
            above = tuple(folders)
            indent = "  " * (2 + len(folders))
            metadata = leaf.field.metadata
            unit = f" [{metadata['unit']}]" if metadata.get("unit") else ""
            choices = f" One of: {', '.join(metadata['choices'])}." if metadata.get("choices") else ""
            fixed = "" if leaf.live else " (configure)"
            comment = f"{metadata.get('help', leaf.name)}{unit}{choices}{fixed}"
            lines += [f"{indent}# {line}" for line in textwrap.wrap(comment, LINE_WIDTH - len(indent))]
            lines.append(f"{indent}{name}: {yaml_scalar(to_parameter(value_at(options, leaf.path)))}")
    return "\n".join(lines) + "\n"


def pose_node_groups() -> dict[str, Any]:
    """Return the pose node's options by prefix, at their defaults."""
    return {"": NodeOptions(), "estimator": EstimatorOptions()}


if __name__ == "__main__":
    sys.stdout.write(parameter_file(pose_node_groups()))
