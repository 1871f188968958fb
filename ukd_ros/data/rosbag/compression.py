# SPDX-License-Identifier: Apache-2.0
"""Decompression that believes no size: what grows beyond its limit is refused before it fills memory or disk."""

from __future__ import annotations

import bz2
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lz4.frame import LZ4FrameDecompressor

from ukd_ros.data.rosbag.storage import BagError, BrokenMessage, NoRoom

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

BLOCK = 2**20

MAX_GROWTH = 1000
"""A compressed file that becomes longer than this many times its size is a bomb; a black video grows some 300 times."""

LEAST_FRAME, SPARE_FRAMES = 4096, 16
"""A file of smaller frames, bytes each, is read up to so many more: every frame costs a copy of what is behind it."""

SPARE_BYTES = 2**30
"""What is left free on the disk where a compressed bag is unpacked."""

_CODECS: dict[str, Callable[[], Any]] = {
    "zstd": zstd.ZstdDecompressor,
    "lz4": LZ4FrameDecompressor,
    "bz2": bz2.BZ2Decompressor,
}


def decompressed(data: bytes, codec: str, limit: int) -> bytes:
    """Return `data` unpacked (codec "" or none, lz4, zstd, bz2); BrokenMessage when damaged or beyond `limit` bytes."""
    if codec in ("", "none"):
        return data
    if codec not in _CODECS:
        raise BrokenMessage(f"is compressed by {codec[:20]!r}; lz4, zstd and bz2 are understood.")
    unpacker = _CODECS[codec]()
    try:
        out: bytes = unpacker.decompress(data, max_length=limit)
        # At the limit exactly, only one byte more tells a message of that size from the start of a bomb.
        if not unpacker.eof and len(out) >= limit and unpacker.decompress(b"", max_length=1):
            raise BrokenMessage(f"unpacks to more than the {limit} bytes that it may have.")
    except (zstd.ZstdError, RuntimeError, OSError, EOFError, ValueError, MemoryError) as error:
        if isinstance(error, BrokenMessage):
            raise
        raise BrokenMessage(f"cannot be unpacked: {error}") from error
    if not unpacker.eof:
        raise BrokenMessage("ends before its compressed data does.")
    return out


def unpack_file(packed: Path, out: Path) -> bool:
    """Unpack a .zstd file as far as it goes and return whether it was whole.

    BagError when it grows absurdly, NoRoom when the disk under `out` is too full. Memory does not depend on its size.
    """
    written, most = 0, MAX_GROWTH * packed.stat().st_size
    room = shutil.disk_usage(out.parent).free - SPARE_BYTES
    with packed.open("rb") as source, out.open("wb") as target:
        unpacker, frames = zstd.ZstdDecompressor(), 0
        while True:
            if unpacker.eof:  # parallel compressors write one frame after the other
                block, frames = unpacker.unused_data or source.read(BLOCK), frames + 1
                if not block:
                    return True
                if frames > SPARE_FRAMES + packed.stat().st_size // LEAST_FRAME:
                    return False
                unpacker = zstd.ZstdDecompressor()
            else:
                block = source.read(BLOCK) if unpacker.needs_input else b""
                if unpacker.needs_input and not block:
                    return False
            try:
                data = unpacker.decompress(block, max_length=BLOCK)
            except zstd.ZstdError:
                return False
            written += len(data)
            if written > most:
                raise BagError(f"{packed}: unpacks to more than {MAX_GROWTH} times its size; it is refused.")
            if written > room:
                raise NoRoom(
                    f"{packed}: unpacked it does not fit into {out.parent}; free some space there, set TMPDIR to a "
                    f"larger disk, or unpack it yourself (zstd -d) and give the unpacked file."
                )
            target.write(data)
