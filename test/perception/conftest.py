# SPDX-License-Identifier: Apache-2.0
"""Let these tests import what they share as perception.painted_world (pytest's importlib mode adds no path)."""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = str(Path(__file__).resolve().parents[1])
if _TESTS not in sys.path:
    sys.path.insert(0, _TESTS)
