# SPDX-License-Identifier: Apache-2.0
"""An mcap file read without its summary: the records themselves say what is there, so a file cut anywhere is readable.

Format: https://mcap.dev/spec. A recorder that dies writes no summary, and a summary may say anything; walking over the
records costs two small reads a chunk and serves both. Message times come from the index records behind every chunk.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ukd_ros.data.rosbag.compression import decompressed
from ukd_ros.data.rosbag.mcap_summary import MAGIC, next_chunk
from ukd_ros.data.rosbag.storage import (
    FAR_NS,
    MAX_BYTES,
    BagError,
    BrokenMessage,
    Channel,
    Damage,
    IntArray,
    Places,
    no_places,
)

HEADER, FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, MESSAGE_INDEX, DATA_END = 1, 2, 3, 4, 5, 6, 7, 15
LARGEST_OP = 15
MESSAGE_HEAD = struct.Struct("<HIQQ")
INDEX_ENTRY = np.dtype([("time", "<u8"), ("offset", "<u8")])
CACHED_CHUNKS = 4
MAX_GAPS = 100  # each asks the summary again

MAX_RECORDS = 5 * 10**6
MAX_SCANNED, SCAN_GROWTH = 2**30, 100
"""Chunks without an index are read through up to so many records of a file, and so many bytes and times its size: a
megabyte can hold gigabytes of empty messages."""


class _Chunk(NamedTuple):
    """A chunk record: where its data lie in the file, how large they are in there and unpacked, and their checksum."""

    start: int
    length: int
    codec: str
    unpacked: int
    crc: int


class McapFile:
    """An mcap file, whole or not, with or without chunks and index."""

    def __init__(self, path: Path) -> None:
        """Walk over the records of `path`; BagError when it is no mcap file."""
        self.path = path
        self.damage = Damage()
        self._file: BinaryIO = path.open("rb")
        self.size = path.stat().st_size
        self._chunks: list[_Chunk] = []
        self._unpacked: OrderedDict[int, bytes] = OrderedDict()
        self._refused: set[int] = set()
        self._schemas: dict[int, str] = {}
        self._named: dict[int, tuple[int, str, str]] = {}  # channel -> schema, topic, encoding
        self._blocks: dict[int, array[int]] = {}  # channel -> chunk, place of its index record, entries; and so on
        self._loose: dict[int, array[int]] = {}  # channel -> time, place of the message; and so on: outside of chunks
        self._scanned: dict[int, dict[int, array[int]]] = {}  # chunk without index -> channel -> time, offset; …
        self._records_left, self._bytes_left = MAX_RECORDS, MAX_SCANNED + SCAN_GROWTH * self.size
        try:
            if self._file.read(len(MAGIC)) != MAGIC:
                raise BagError(f"{path}: is no mcap file (its first bytes are not those of one).")
            self._walk()
            self._find_names()
        except BaseException:
            self._file.close()
            raise
        self.channels = [self._channel(number) for number in sorted(self._numbers()) if number in self._named]

    def close(self) -> None:
        """Close the file."""
        self._unpacked.clear()
        self._file.close()

    def places(self, channels: set[int]) -> Places:
        """Return where the messages of these channels lie, in the order in which they were recorded."""
        parts: list[tuple[IntArray, int, IntArray]] = []
        for number in sorted(channels):
            parts += [(entries[0], number, entries[1]) for entries in self._entries(number)]
        if not parts:
            return no_places()
        times = np.concatenate([times for times, _, _ in parts])
        numbers = np.concatenate([np.full(len(times), number, np.int64) for times, number, _ in parts])
        where = np.concatenate([where for _, _, where in parts])
        dated, placed = (times >= 0) & (times < FAR_NS), where[:, 1] >= 0
        if not dated.all():
            self.damage.add(f"{int((~dated).sum())} messages are stamped beyond the year 2116 and left out.")
        if not placed.all():
            self.damage.add(f"the index of {int((~placed).sum())} messages points outside of the file; left out.")
        good = dated & placed
        # Loose messages (chunk -1) and chunks by their place in the file; there is one kind or the other in practice.
        order = np.lexsort((where[good][:, 1], where[good][:, 0]))
        return Places(times[good][order], numbers[good][order], where[good][order])

    def data(self, first: int, second: int) -> bytes:
        """Return the bytes of the message at `second` in chunk `first` (-1: in the file itself)."""
        if first >= 0:
            content = self._content(first)
            if second + 9 > len(content) or content[second] != MESSAGE:
                raise BrokenMessage("its index points at something else.")
            (length,) = struct.unpack_from("<Q", content, second + 1)
            start = second + 9
            if length < MESSAGE_HEAD.size or start + length > len(content):
                raise BrokenMessage("is longer than its chunk.")
            return content[start + MESSAGE_HEAD.size : start + length]
        self._file.seek(second + 1)
        (length,) = struct.unpack("<Q", self._file.read(8))
        if length > MAX_BYTES:
            raise BrokenMessage(f"claims {length} bytes; more than {MAX_BYTES} are refused.")
        return self._file.read(length)[MESSAGE_HEAD.size :]

    # ---- walking -----------------------------------------------------------------------------------------------

    def _walk(self) -> None:
        """Note every record of the file; what comes after the last whole one is lost."""
        at, last_chunk, ended, gaps, torn = len(MAGIC), -1, False, 0, False
        while not ended and at + 9 <= self.size:
            self._file.seek(at)
            op, length = struct.unpack("<BQ", self._file.read(9))
            if not 0 < op or at + 9 + length > self.size or (op > LARGEST_OP and op < 0x80):
                gaps += 1
                there = next_chunk(self._file, self.size, at) if gaps <= MAX_GAPS else None
                if there is None:
                    break
                self.damage.add(f"bytes {at} to {there} are no records; the next indexed chunk goes on.", there - at)
                at, torn = there, True
                continue
            try:
                if op == CHUNK:
                    self._index_behind(last_chunk, torn)
                    last_chunk, torn = self._note_chunk(at, length), False
                elif op == MESSAGE_INDEX and last_chunk >= 0:
                    self._note_index(last_chunk, at, length)
                else:
                    self._note(op, at, length)
            except (struct.error, UnicodeDecodeError, IndexError):
                self.damage.add(f"a record at byte {at} is malformed and left out.", 9 + length)
                torn = True
            at += 9 + length
            ended = op == FOOTER
        self._index_behind(last_chunk, torn or not ended)
        if not ended:
            lost = self.size - at
            self.damage.add(
                f"the file breaks off: what follows byte {at} is no whole record ({lost} bytes, "
                f"{100 * lost / self.size:.1f} % of the file)." if lost else "the file was not closed by its recorder.",
                lost,
            )  # fmt: skip

    def _note(self, op: int, at: int, length: int) -> None:
        """Note a record that is neither a chunk nor its index."""
        if op == MESSAGE:
            number, _, time, _ = MESSAGE_HEAD.unpack(self._file.read(MESSAGE_HEAD.size))
            self._loose.setdefault(number, array("Q")).extend((time, at))
        elif op in (SCHEMA, CHANNEL):
            if length > MAX_BYTES:
                raise struct.error("too long")
            self._note_name(op, self._file.read(length))

    def _note_name(self, op: int, content: bytes) -> None:
        (number,) = struct.unpack_from("<H", content, 0)
        if op == SCHEMA:
            self._schemas.setdefault(number, _text(content, 2)[0])
            return
        (schema,) = struct.unpack_from("<H", content, 2)
        topic, end = _text(content, 4)
        self._named.setdefault(number, (schema, topic, _text(content, end)[0]))

    def _note_chunk(self, at: int, length: int) -> int:
        self._file.seek(at + 9)  # reading the chunk before this one may have moved it
        head = self._file.read(min(length, 64))
        _, _, unpacked, crc = struct.unpack_from("<QQQI", head, 0)
        codec, end = _text(head, 28)
        (packed,) = struct.unpack_from("<Q", head, end)
        start = at + 9 + end + 8
        chunk = _Chunk(start, packed, codec, unpacked, crc)
        if start + packed > at + 9 + length:
            chunk = chunk._replace(length=0, unpacked=-1)
            self.damage.add(f"the chunk at byte {at} claims more than its record and is left out.", length)
        elif max(packed, unpacked) > MAX_BYTES:
            chunk = chunk._replace(unpacked=-1)
            self.damage.add(
                f"the chunk at byte {at} claims {max(packed, unpacked)} bytes; more than {MAX_BYTES} are refused.",
                packed,
            )
        self._chunks.append(chunk)
        if chunk.unpacked < 0:
            self._refused.add(len(self._chunks) - 1)
        return len(self._chunks) - 1

    def _note_index(self, chunk: int, at: int, length: int) -> None:
        number, size = struct.unpack("<HI", self._file.read(6))
        if size % INDEX_ENTRY.itemsize or size + 6 > length:
            raise struct.error("index")
        if size and chunk not in self._refused:
            blocks = self._blocks.setdefault(number, array("Q"))
            blocks.extend((chunk, at + 15, size // INDEX_ENTRY.itemsize))
        self._scanned.setdefault(chunk, {})[number] = array("Q")  # it has an index, if only an empty one

    def _index_behind(self, chunk: int, torn: bool) -> None:
        """Read through a chunk that no index record followed, or (`torn`) perhaps not one for each of its channels."""
        indexed = self._scanned.pop(chunk, None)
        if chunk < 0 or chunk in self._refused or (indexed is not None and not torn):
            return
        for blocks in (self._blocks.get(number) for number in indexed or ()):
            while blocks and blocks[-3] == chunk:
                del blocks[-3:]
        found: dict[int, array[int]] = {}
        try:
            for op, start, content in self._scan(chunk):
                if op == MESSAGE:
                    number, _, time, _ = MESSAGE_HEAD.unpack_from(content, start + 9)
                    found.setdefault(number, array("Q")).extend((time, start))
                elif op in (SCHEMA, CHANNEL):
                    self._note_name(op, _payload(content, start))
        except BrokenMessage:
            return  # counted by _content
        except (struct.error, UnicodeDecodeError, IndexError):
            self.damage.add(f"the chunk at byte {self._chunks[chunk].start} ends in something that is no record.")
        self._scanned[chunk] = found

    def _scan(self, chunk: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield the records of a chunk; what is too much for the file ends there, and its bytes are counted as lost."""
        what = self._chunks[chunk]
        self._bytes_left -= max(0, what.unpacked)
        for record in _records(self._content(chunk)) if min(self._records_left, self._bytes_left) >= 0 else ():
            self._records_left -= 1
            if self._records_left < 0:
                break
            yield record
        if min(self._records_left, self._bytes_left) < 0:
            self.damage.add(f"the chunk at byte {what.start} has no index and holds too much to be read.", what.length)

    def _find_names(self) -> None:
        """Look into chunks for channels that no summary names: the first that has messages of one must introduce it."""
        for number in sorted(self._numbers()):
            blocks = self._blocks.get(number, ())
            for chunk in list(blocks[:9:3]):
                if number in self._named and self._named[number][0] in self._schemas:
                    break
                try:
                    for op, start, content in self._scan(int(chunk)):
                        if op in (SCHEMA, CHANNEL):
                            self._note_name(op, _payload(content, start))
                except (BrokenMessage, struct.error, UnicodeDecodeError, IndexError):
                    continue
            if number not in self._named:
                self.damage.add(f"channel {number} has messages, but nothing says which topic it is; left out.")

    # ---- reading -----------------------------------------------------------------------------------------------

    def _numbers(self) -> set[int]:
        scanned = {number for found in self._scanned.values() for number in found}
        return {*self._named, *self._blocks, *self._loose, *scanned}

    def _channel(self, number: int) -> Channel:
        schema, topic, encoding = self._named[number]
        count = sum(self._blocks.get(number, array("Q"))[2::3]) + len(self._loose.get(number, ())) // 2
        count += sum(len(found.get(number, ())) // 2 for found in self._scanned.values())
        return Channel(number, topic, _ros2_name(self._schemas.get(schema, "")), encoding, count)

    def _entries(self, number: int) -> Iterator[tuple[IntArray, IntArray]]:
        """Yield times [n] and places [n, 2] of a channel's messages."""
        blocks = np.frombuffer(self._blocks.get(number, array("Q")), dtype=np.uint64).reshape(-1, 3).astype(np.int64)
        for chunk, at, count in blocks:
            self._file.seek(int(at))
            entries = np.frombuffer(self._file.read(int(count) * INDEX_ENTRY.itemsize), dtype=INDEX_ENTRY)
            yield _whole(entries["time"]), np.stack([np.full(count, chunk), _whole(entries["offset"])], axis=1)
        spread = [(-1, self._loose.get(number))] + [(c, found.get(number)) for c, found in self._scanned.items()]
        for chunk, noted in spread:
            if noted is not None:
                table = _whole(np.frombuffer(noted, dtype=np.uint64)).reshape(-1, 2)
                yield table[:, 0], np.stack([np.full(len(table), chunk), table[:, 1]], axis=1)

    def _content(self, chunk: int) -> bytes:
        """Return a chunk unpacked; BrokenMessage, and its bytes are counted as lost, when it cannot be."""
        if chunk in self._unpacked:
            self._unpacked.move_to_end(chunk)
            return self._unpacked[chunk]
        if chunk in self._refused or not 0 <= chunk < len(self._chunks):
            raise BrokenMessage("lies in a chunk that is broken.")
        what = self._chunks[chunk]
        self._file.seek(what.start)
        try:
            content = decompressed(self._file.read(what.length), what.codec, what.unpacked)
            if len(content) != what.unpacked:
                raise BrokenMessage(f"unpacks to {len(content)} bytes, not the {what.unpacked} that it claims.")
            if what.crc and zlib.crc32(content) != what.crc:
                raise BrokenMessage("does not fit its checksum.")
        except BrokenMessage as error:
            self._refused.add(chunk)
            self.damage.add(f"the chunk at byte {what.start} {error}", what.length)
            raise
        while self._unpacked and (
            len(self._unpacked) >= CACHED_CHUNKS or sum(map(len, self._unpacked.values())) + len(content) > MAX_BYTES
        ):
            self._unpacked.popitem(last=False)
        self._unpacked[chunk] = content
        return content


def _records(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (op, start, content) of the records of an unpacked chunk; IndexError where one is longer than the chunk."""
    at = 0
    while at < len(content):
        op, length = struct.unpack_from("<BQ", content, at)
        if at + 9 + length > len(content):
            raise IndexError("record")
        yield op, at, content
        at += 9 + length


def _payload(content: bytes, start: int) -> bytes:
    (length,) = struct.unpack_from("<Q", content, start + 1)
    return content[start + 9 : start + 9 + length]


def _text(content: bytes, at: int) -> tuple[str, int]:
    """Return the text at `at` and where it ends."""
    (length,) = struct.unpack_from("<I", content, at)
    if at + 4 + length > len(content):
        raise IndexError("text")
    return content[at + 4 : at + 4 + length].decode(), at + 4 + length


def _whole(values: object) -> IntArray:
    """Return unsigned numbers as signed ones; what does not fit becomes negative, which `places` leaves out."""
    return np.asarray(values, dtype=np.uint64).astype(np.int64)


def _ros2_name(kind: str) -> str:
    """Spell a ROS 1 type as ROS 2 does."""
    package, slash, name = kind.partition("/")
    return f"{package}/msg/{name}" if slash and "/" not in name else kind
