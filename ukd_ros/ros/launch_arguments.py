# SPDX-License-Identifier: Apache-2.0
"""What the launch files work out from their arguments before there is a node; it needs neither launch nor rclpy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def full_name(node: str, namespace: str, outer: str = "") -> str:
    """Return a node's full name, such as /a/b/node.

    `outer` is what PushRosNamespace gave to the launch file; a `namespace` that begins with a slash is not below it.
    """
    folders = namespace if namespace.startswith("/") else f"{outer}/{namespace}"
    return "/".join(["", *(token for token in folders.split("/") if token), node])


def logger_name(full: str) -> str:
    """Return the name of the logger that rclpy gives to the node of this full name: --log-level knows no other."""
    return full.strip("/").replace("/", ".")


def in_parameter_file(path: str, full: str, name: str) -> Any:
    """Return what a ROS file of parameters gives to the parameter `name` of the node of this full name.

    None when it has nothing for it, or is no such file: that, the node itself refuses with a sentence. As rcl does,
    `*` in a node's name stands for one part of it, `**` for any number, and what is further below in the file wins.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    found = None
    for node, parameters in _sections(tree):
        if isinstance(parameters, dict) and re.fullmatch(_pattern(node), full):
            found = parameters.get(name, found)
    return found


def _sections(tree: Any, node: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nodes' names, which a file may nest by namespaces, and their parameters."""
    for key, below in tree.items() if isinstance(tree, dict) else ():
        if key == "ros__parameters":
            yield node, below
        else:
            yield from _sections(below, f"{node}/{str(key).strip('/')}")


def _pattern(node: str) -> str:
    """Return the regular expression of the full names that a node's name in a file stands for."""
    wild = {"*": "/[^/]+", "**": "(/[^/]+)*"}
    return "".join(wild.get(token, "/" + re.escape(token)) for token in node.split("/") if token)
