# SPDX-License-Identifier: Apache-2.0
"""An sqlite3 file of rosbag2, read by its tables: the rows in the order in which they were written, one blob at a time.

The file is opened immutable (nothing is written beside it), its schema is not trusted, and a row's length is asked for
before its bytes are. A file cut short is read up to the first missing page.
"""

from __future__ import annotations

import sqlite3
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

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

MAGIC = b"SQLite format 3\x00"
MAX_TOPICS = 10_000

# sqlite columns hold what was put there, whatever the schema says: only whole numbers are topics and rows.
NUMBERED = "typeof(topic_id) = 'integer' AND typeof(rowid) = 'integer'"


class SqliteFile:
    """A .db3 file."""

    def __init__(self, path: Path) -> None:
        """Open `path` and read its topics; BagError when it is no database of rosbag2."""
        self.path = path
        self.damage = Damage()
        self.size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(100)
        if not head.startswith(MAGIC):
            raise BagError(f"{path}: is no sqlite3 file (its first bytes are not those of one).")
        self._note_missing(head)
        try:
            place = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
            self._base = sqlite3.connect(place, uri=True, check_same_thread=False)
        except sqlite3.Error as error:  # nothing of its content was looked at yet
            raise OSError(str(error)) from error
        try:
            self._base.execute("PRAGMA trusted_schema=OFF")
            if self.damage.lost_bytes:  # else sqlite refuses every page of a file with fewer than its header claims
                self._base.execute("PRAGMA writable_schema=ON")
            self.channels = self._read_topics()
        except (sqlite3.Error, ValueError, OverflowError) as error:
            self._base.close()
            raise BagError(f"{path}: this database cannot be read: {error}") from error
        except BagError:
            self._base.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    def places(self, channels: set[int]) -> Places:
        """Return where the messages of these topics lie, in the order in which they were written."""
        if not channels:
            return no_places()
        found = array("q")
        marks = ",".join("?" for _ in channels)
        # The index by time lies at the end of the file, which may be missing.
        query = (
            f"SELECT rowid, timestamp, topic_id FROM messages NOT INDEXED WHERE {NUMBERED} AND topic_id IN ({marks}) "
            f"AND typeof(timestamp) = 'integer' AND timestamp BETWEEN 0 AND {FAR_NS} ORDER BY rowid"
        )
        try:
            for row in self._base.execute(query, sorted(channels)):  # one by one: a block is lost with its last row
                found.extend(row)
        except sqlite3.Error:
            del found[len(found) // 3 * 3 :]  # noted as damage when the topics were counted
        table = np.frombuffer(found, dtype=np.int64).reshape(-1, 3)
        where = np.stack([np.zeros(len(table), np.int64), table[:, 0]], axis=1)
        return Places(table[:, 1].copy(), table[:, 2].copy(), where)

    def data(self, first: int, second: int) -> bytes:
        """Return the blob of row `second`."""
        try:
            query = "SELECT length(data), CASE WHEN length(data) <= ? THEN data END FROM messages WHERE rowid = ?"
            row = self._base.execute(query, (MAX_BYTES, second)).fetchone()
        except (sqlite3.Error, OverflowError, MemoryError) as error:
            self.damage.add(f"message {second} cannot be read: {error}.")
            raise BrokenMessage(f"cannot be read: {error}.") from error
        if row is None or not isinstance(row[1], bytes):
            length = row[0] if row is not None else None
            raise BrokenMessage(f"is no blob of at most {MAX_BYTES} bytes (length {length}).")
        return row[1]

    def _note_missing(self, head: bytes) -> None:
        """Compare the file with the number of pages in its header, and look for a log that was not merged."""
        page = int.from_bytes(head[16:18], "big")
        claimed = (65536 if page == 1 else page) * int.from_bytes(head[28:32], "big")
        if claimed > self.size:
            lost = claimed - self.size
            self.damage.add(f"the file breaks off: its header claims {claimed} bytes, {self.size} are there.", lost)
        log = self.path.with_name(f"{self.path.name}-wal")
        if log.is_file() and log.stat().st_size:
            self.damage.add(
                f"{log.stat().st_size} bytes in {log.name} were never merged into the file and are not read: the "
                f"recorder died; merge them with: sqlite3 {self.path.name} 'PRAGMA wal_checkpoint'."
            )

    def _read_topics(self) -> list[Channel]:
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND upper(sql) LIKE 'CREATE TABLE%'"
        tables = {row[0] for row in self._base.execute(query)}
        if not {"topics", "messages"} <= tables:
            raise BagError(f"{self.path}: has no tables topics and messages, so it is no bag.")
        # A generated column is computed before its length is known: a few bytes make as much of it as they like.
        columns = [
            *self._base.execute("PRAGMA table_xinfo(topics)"),
            *self._base.execute("PRAGMA table_xinfo(messages)"),
        ]
        if any(hidden for *_, hidden in columns):
            raise BagError(f"{self.path}: its tables compute columns, which no recorder does; it is refused.")
        counts: Counter[int] = Counter()
        query = f"SELECT topic_id FROM messages NOT INDEXED WHERE {NUMBERED} ORDER BY rowid"
        try:
            for (number,) in self._base.execute(query):
                counts[number] += 1
        except sqlite3.Error as error:
            self.damage.add(f"the table of messages breaks off after {counts.total()} of them: {error}.")
        query = "SELECT id, name, type, serialization_format FROM topics ORDER BY id LIMIT ?"
        topics = list(self._base.execute(query, (MAX_TOPICS,)))
        if not all(isinstance(t[0], int) and all(isinstance(text, str) for text in t[1:]) for t in topics):
            raise BagError(f"{self.path}: its table of topics holds something else than names and types.")
        return [Channel(t[0], t[1], t[2], t[3], counts[t[0]]) for t in topics]
