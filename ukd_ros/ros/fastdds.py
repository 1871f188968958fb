# SPDX-License-Identifier: Apache-2.0
"""Shared memory large enough for camera images: which Fast DDS profile a process is to be started with.

Measured here: 640x480 rgb8, best effort, 30 Hz between two processes: 10 of 90 images arrive with the stock 512 KB
segment, 90 of 90 with the 32 MB of config/fastdds.xml on both sides. No ROS is imported, so launch files can use it.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
"""Older and newer name; each distribution reads one of them."""

WANTED_BYTES = 32 * 2**20
SMALLEST_BYTES = 2 * 2**20
"""Below two small images the profile would help nobody."""

PARTICIPANTS = 4
"""Camera, pose node, and two more processes share /dev/shm, each with a segment of its own."""

SHARED_MEMORY = Path("/dev/shm")


def share_file(relative: str) -> Path:
    """Return a file of this package's share: below AMENT_PREFIX_PATH, below sys.prefix, or in the checkout.

    FileNotFoundError names the places that were looked at.
    """
    prefixes = [prefix for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if prefix]
    places = [Path(prefix) / "share" / "ukd_ros" for prefix in (*prefixes, sys.prefix)]
    places.append(Path(__file__).resolve().parents[2])
    for place in places:
        if (place / relative).exists():
            return place / relative
    raise FileNotFoundError(f"{relative} is in none of {', '.join(map(str, places))}: install ukd_ros again.")


def free_shared_memory(folder: Path = SHARED_MEMORY) -> int:
    """Return the free bytes of shared memory, 0 where there is none."""
    try:
        facts = os.statvfs(folder)
    except OSError:
        return 0
    return facts.f_bavail * facts.f_frsize


def segment_bytes(free: int) -> int:
    """Return the segment size (bytes) that ``PARTICIPANTS`` processes can each have, 0 when it is not worth it."""
    each = min(free // PARTICIPANTS, WANTED_BYTES)
    return each if each >= SMALLEST_BYTES else 0


def sized_profile(text: str, size: int) -> str:
    """Return the profile ``text`` with a segment of ``size`` bytes; ValueError when it has no segment_size."""
    changed, count = re.subn(r"<segment_size>\d+</segment_size>", f"<segment_size>{size}</segment_size>", text)
    if count != 1:
        raise ValueError(f"the Fast DDS profile has {count} segment_size elements, but one is needed.")
    return changed


def profile_environment(
    environment: Mapping[str, str] | None = None, free: int | None = None
) -> tuple[dict[str, str], str]:
    """Return (variables to set, a sentence for the log) for processes that exchange images on this machine.

    Nothing is set where the user has chosen a profile already or shared memory is too small. Where it is only small, a
    profile with a smaller segment is written to the user's temporary folder. ``free`` bytes of shared memory.
    """
    environment = os.environ if environment is None else environment
    chosen = [name for name in VARIABLES if environment.get(name)]
    if chosen:
        return {}, f"Fast DDS profile: {environment[chosen[0]]}, as {chosen[0]} already says."
    free = free_shared_memory() if free is None else free
    size = segment_bytes(free)
    if size == 0:
        return {}, (
            f"Fast DDS profile: none, because {SHARED_MEMORY} has only {free / 2**20:.0f} MB free. Large images "
            "between processes may be lost; give the container more (docker run --shm-size=512m), or use "
            "compressed:=true."
        )
    profile = share_file("config/fastdds.xml")
    if size < WANTED_BYTES:
        profile = _written(sized_profile(profile.read_text(encoding="utf-8"), size), size)
    return dict.fromkeys(VARIABLES, str(profile)), f"Fast DDS profile: {profile} ({size / 2**20:.0f} MB segment)."


def _written(text: str, size: int) -> Path:
    folder = Path(tempfile.gettempdir()) / f"ukd_ros_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"fastdds_{size}.xml"
    handle, name = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(name, path)
    return path
