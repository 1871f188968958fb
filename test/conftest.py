# SPDX-License-Identifier: Apache-2.0
"""What every room's tests may ask for: folders, data when it is there, and a random generator of their own."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def _data(name: str) -> Path:
    folder = ROOT.parent / "shared" / "data" / name
    if not folder.is_dir():
        pytest.skip(f"the data set {name} is not on this machine (../shared/data/{name})")
    return folder


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Return the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def lmo_root() -> Path:
    """Return LINEMOD-Occluded in BOP layout; skips the test where it is absent."""
    return _data("lmo")


@pytest.fixture(scope="session")
def ycb_root() -> Path:
    """Return the YCB meshes; skips the test where they are absent."""
    return _data("ycb")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Return a generator keyed by the test's name: the same numbers alone, in any order and in any selection."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))
