# SPDX-License-Identifier: Apache-2.0
"""Tests of this room need ROS 2 (a sourced installation or the wheels); without it they are not collected."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The tests' shared graph is imported as ros.ros_graph; pytest's importlib mode puts no folder on the path itself.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

collect_ignore_glob = [] if importlib.util.find_spec("rclpy") else ["test_*.py"]
os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")


@pytest.fixture
def graph() -> Iterator[Any]:
    """Yield a graph in a domain of its own with nothing started yet."""
    from ros.ros_graph import Graph

    made = Graph()
    yield made
    made.close()
