# SPDX-License-Identifier: Apache-2.0
"""Lets the tests of bags share their makers of bags."""

from __future__ import annotations

import sys
from pathlib import Path

# They are imported as data.rosbag.making; pytest's importlib mode puts no folder on the path itself.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
