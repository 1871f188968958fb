# SPDX-License-Identifier: Apache-2.0
"""Where an mcap file goes on behind a damaged place, by the chunk index in its summary; nothing else is asked of it."""

from __future__ import annotations

import struct
from typing import BinaryIO

MAGIC = b"\x89MCAP0\r\n"
FOOTER_BYTES = 9 + 20 + len(MAGIC)
CHUNK, CHUNK_INDEX = 6, 8
MAX_SUMMARY = 2**26


def next_chunk(file: BinaryIO, size: int, after: int) -> int | None:
    """Return the first place behind `after` where the summary and the file agree that a chunk begins; None for none."""
    file.seek(max(0, size - FOOTER_BYTES))
    footer = file.read(FOOTER_BYTES)
    if len(footer) < FOOTER_BYTES or not footer.endswith(MAGIC) or footer[0] != 2:
        return None
    (start,) = struct.unpack_from("<Q", footer, 9)
    if not 0 < start < size or size - start > MAX_SUMMARY:
        return None
    file.seek(start)
    summary = file.read(size - FOOTER_BYTES - start)
    found = []
    at = 0
    while at + 9 <= len(summary):
        op, length = struct.unpack_from("<BQ", summary, at)
        if op == CHUNK_INDEX and length >= 32 and at + 9 + 24 <= len(summary):
            found.append(struct.unpack_from("<Q", summary, at + 9 + 16)[0])
        at += 9 + length
    for place in sorted(place for place in found if after < place < start):
        file.seek(place)
        op, length = struct.unpack("<BQ", file.read(9))
        if op == CHUNK and place + 9 + length <= start:
            return int(place)
    return None
