# SPDX-License-Identifier: Apache-2.0
"""Put the cube views and what other rooms' tests share on the path of these tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
