# SPDX-License-Identifier: Apache-2.0
"""A .bag file of ROS 1: the rosbags library reads its index, its chunks are unpacked here within a limit."""

from __future__ import annotations

import struct
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rosbags.rosbag1 import Reader, ReaderError
from rosbags.rosbag1.reader import Chunk, IndexData

from ukd_ros.data.rosbag.compression import decompressed
from ukd_ros.data.rosbag.storage import (
    FAR_NS,
    MAX_BYTES,
    BagError,
    BrokenMessage,
    Channel,
    Damage,
    Places,
    no_places,
)

CACHED_CHUNKS = 2
MESSAGE, CONNECTION = 2, 7

# What a damaged index makes the library raise besides its own error.
ODD_ERRORS = (AssertionError, IndexError, KeyError, OverflowError, TypeError, ValueError, MemoryError, struct.error)


class _Frugal(Reader):
    """The library's reader, which reads every byte of an index at most once.

    An index may name one chunk many times, or chunks inside of one another: a few bytes each for a million entries.
    """

    _index_bytes = 0

    def read_chunk(self) -> Chunk:
        """Read the head of a chunk; ReaderError when too much was read."""
        start = self._place()
        chunk = super().read_chunk()
        self._count(chunk.datapos - start)
        return chunk

    def read_index_data(self, pos: int, indexes: dict[int, list[IndexData]]) -> None:
        """Read the index behind a chunk for one connection; ReaderError when too much was read."""
        start = self._place()
        super().read_index_data(pos, indexes)
        self._count(self._place() - start)

    def _place(self) -> int:
        return 0 if self.bio is None else self.bio.tell()

    def _count(self, size: int) -> None:
        self._index_bytes += size
        if self._index_bytes > self.path.stat().st_size:
            raise ReaderError("its index points at the same bytes again and again.")


class Ros1File:
    """A .bag file."""

    def __init__(self, path: Path) -> None:
        """Read the index of `path`; BagError when it has none."""
        self.path = path
        self.damage = Damage()
        self.size = path.stat().st_size
        reader = _Frugal(path)
        try:
            reader.open()
        except (ReaderError, OSError, *ODD_ERRORS) as error:
            cure = " Write its index with: rosbag reindex." if "index" in str(error) else ""
            raise BagError(f"{path}: this bag cannot be read: {error}{cure}") from error
        self._reader = reader
        self._file: BinaryIO = path.open("rb")
        self._unpacked: OrderedDict[int, bytes] = OrderedDict()
        self._refused: set[int] = set()
        self.channels = [
            Channel(c.id, c.topic, c.msgtype, "ros1", len(reader.indexes.get(c.id, ()))) for c in reader.connections
        ]

    def close(self) -> None:
        """Close the file."""
        self._unpacked.clear()
        self._reader.close()
        self._file.close()

    def places(self, channels: set[int]) -> Places:
        """Return where the messages of these connections lie, in the order in which they were written."""
        rows = [
            (entry.time, number, entry.chunk_pos, entry.offset)
            for number in sorted(channels)
            for entry in self._reader.indexes.get(number, ())
            if entry.time < FAR_NS
        ]
        if not rows:
            return no_places()
        table = np.array(rows, dtype=np.int64)
        table = table[np.lexsort((table[:, 3], table[:, 2]))]
        return Places(table[:, 0], table[:, 1], table[:, 2:])

    def data(self, first: int, second: int) -> bytes:
        """Return the bytes of the message at `second` in the chunk at `first`."""
        content = self._content(first)
        at = second
        try:
            while True:
                head, start, length = _record(content, at)
                if head.get("op") != bytes([CONNECTION]):
                    break
                at = start + length  # a connection may stand before its first message
        except (struct.error, ValueError) as error:
            raise BrokenMessage("its index points at something that is no record.") from error
        if head.get("op") != bytes([MESSAGE]) or start + length > len(content):
            raise BrokenMessage("its index points at something else.")
        return content[start : start + length]

    def _content(self, position: int) -> bytes:
        if position in self._unpacked:
            self._unpacked.move_to_end(position)
            return self._unpacked[position]
        chunk = self._reader.chunks.get(position)
        if chunk is None or position in self._refused:
            raise BrokenMessage("lies in a chunk that is broken.")
        try:
            if chunk.datasize > MAX_BYTES:
                raise BrokenMessage(f"claims {chunk.datasize} bytes; more than {MAX_BYTES} are refused.")
            self._file.seek(position)
            head, start, length = _record(self._file.read(min(4096, self.size - position)), 0)
            (claimed,) = struct.unpack("<I", head["size"])
            self._file.seek(position + start)
            packed = self._file.read(length)
            if len(packed) < length or claimed > MAX_BYTES:
                raise BrokenMessage(f"has {len(packed)} of {length} bytes and claims to unpack to {claimed}.")
            content = decompressed(packed, head["compression"].decode(), claimed)
        except (BrokenMessage, KeyError, ValueError, struct.error) as error:
            self._refused.add(position)
            self.damage.add(f"the chunk at byte {position} cannot be read: it {error}", chunk.datasize)
            raise BrokenMessage(f"lies in a chunk that {error}") from error
        while len(self._unpacked) >= CACHED_CHUNKS:
            self._unpacked.popitem(last=False)
        self._unpacked[position] = content
        return content


def _record(content: bytes, at: int) -> tuple[dict[str, bytes], int, int]:
    """Return a record's header fields, where its data start and their length; struct.error or ValueError if broken."""
    (size,) = struct.unpack_from("<I", content, at)
    fields: dict[str, bytes] = {}
    here, end = at + 4, at + 4 + size
    if end > len(content):
        raise ValueError("the header is cut off")
    while here < end:
        (length,) = struct.unpack_from("<I", content, here)
        name, equals, value = content[here + 4 : here + 4 + length].partition(b"=")
        if not equals:
            raise ValueError("a field has no name")
        fields[name.decode()] = value
        here += 4 + length
    (length,) = struct.unpack_from("<I", content, end)
    return fields, end + 4, length
