# SPDX-License-Identifier: Apache-2.0
"""A bag being read, whatever its format: where its messages are, one message at a time, and what is broken in it.

Only message types that are known here are deserialised (`message_types`): a bag's own definitions are never used.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from ukd_ros.data.rosbag.compression import unpack_file
from ukd_ros.data.rosbag.folder import compare, find_files, shown
from ukd_ros.data.rosbag.mcap import McapFile
from ukd_ros.data.rosbag.message_types import BagMessage, unpacked_message
from ukd_ros.data.rosbag.ros1 import Ros1File
from ukd_ros.data.rosbag.sqlite import SqliteFile
from ukd_ros.data.rosbag.storage import (
    BagError,
    BrokenMessage,
    Channel,
    Damage,
    IntArray,
    NoRoom,
    Places,
    Storage,
    no_places,
)

STORAGES: dict[str, Callable[[Path], Storage]] = {".mcap": McapFile, ".db3": SqliteFile, ".bag": Ros1File}


class Entry(NamedTuple):
    """Where one message is: what `BagReader.read` takes. `time_ns` is when it was recorded."""

    time_ns: int
    file: int
    channel: int
    first: int
    second: int


@dataclass(frozen=True, eq=False)
class BagIndex:
    """Where the messages of some topics are, without having read one, in the order in which they were recorded.

    times_ns [n]: when each was recorded. rows [n, 4]: the file, the channel in it, and two numbers of its own.
    """

    times_ns: IntArray
    rows: IntArray

    def __len__(self) -> int:
        """Return the number of messages."""
        return len(self.times_ns)

    def __getitem__(self, number: int) -> Entry:
        """Return message `number` in the order of recording."""
        return Entry(int(self.times_ns[number]), *(int(value) for value in self.rows[number]))

    def by_time(self) -> BagIndex:
        """Return the same messages in order of time; equal times stay as recorded."""
        order = np.argsort(self.times_ns, kind="stable")
        return BagIndex(self.times_ns[order], self.rows[order])


@dataclass
class _Unreadable:
    """A file of which nothing can be read. It keeps its place among a bag's files: an Entry names them by number."""

    path: Path
    size: int
    damage: Damage
    channels: list[Channel] = field(default_factory=list)

    def places(self, channels: set[int]) -> Places:
        """Return the places of no message."""
        return no_places()

    def data(self, first: int, second: int) -> bytes:
        """Raise BrokenMessage."""
        raise BrokenMessage("lies in a file that cannot be read.")

    def close(self) -> None:
        """Do nothing: it is not open."""


class BagReader:
    """A bag being read: an rosbag2 folder, a lone .mcap or .db3 file (also .zstd), or a .bag file of ROS 1.

    Messages are streamed in the order of their time; a bag larger than the memory is no problem. What is broken is a
    BagError, or with `partial` what is whole is read and `damage`, `lost_bytes` and `broken` say what is not. A file
    that cannot be opened for now (no right to, no room to unpack it) is no damage but always a BagError.
    """

    def __init__(self, path: Path | str, partial: bool = False) -> None:
        """Open the bag at ``path``; BagError says why it cannot be."""
        self.path = Path(path)
        self.partial = partial
        self.broken: Counter[str] = Counter()
        found = find_files(self.path)
        self.warnings = list(found.warnings)
        self._claims = found.claims
        self._files: list[Storage] = []
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None
        try:
            for file in found.files:
                self._files.append(self._opened(file))
            if all(isinstance(file, _Unreadable) for file in self._files):
                told = "none of its files can be read: " + "; ".join(self.damage)
                raise BagError(f"{self.path}: {self._files[0].damage.reasons[0] if self.path.is_file() else told}")
            self._refuse_damage()
        except BaseException:
            self.close()
            raise
        self._channels = self._of_one_type()

    def __enter__(self) -> BagReader:
        """Return the open bag."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close its files and remove what was unpacked."""
        while self._files:
            self._files.pop().close()
        if self._unpacked is not None:
            self._unpacked.cleanup()

    @property
    def topics(self) -> dict[str, str]:
        """Return topic -> message type; a serialisation that is not ROS' own stands behind the type."""
        return {c.topic: _kind(c) for channels in reversed(self._channels) for c in reversed(channels.values())}

    @property
    def counts(self) -> dict[str, int]:
        """Return topic -> number of messages, as counted, not as claimed."""
        counts: Counter[str] = Counter()
        for channels in self._channels:
            for channel in channels.values():
                counts[channel.topic] += channel.count
        return dict(counts)

    @property
    def size(self) -> int:
        """Return the size of its files, bytes."""
        return sum(file.size for file in self._files)

    @property
    def damage(self) -> list[str]:
        """Return what was found broken so far, in words."""
        return [f"{file.path.name}: {reason}" for file in self._files for reason in file.damage.reasons]

    @property
    def lost_bytes(self) -> int:
        """Return how many bytes of the files could not be read, as far as is known by now."""
        return sum(file.damage.lost_bytes for file in self._files)

    def index(self, topics: Collection[str] | None = None) -> BagIndex:
        """Return where the messages of ``topics`` (None: all) are; no message is read for it."""
        times: list[IntArray] = [np.zeros(0, np.int64)]
        rows: list[IntArray] = [np.zeros((0, 4), np.int64)]
        for number, (file, channels) in enumerate(zip(self._files, self._channels, strict=True)):
            chosen = {c.number for c in channels.values() if topics is None or c.topic in topics}
            places = file.places(chosen) if chosen else None
            if places is not None and len(places):
                times.append(places.times_ns)
                files = np.full((len(places), 1), number, np.int64)
                rows.append(np.hstack([files, places.channels[:, None], places.where]))
        self._refuse_damage()
        return BagIndex(np.concatenate(times), np.vstack(rows))

    def times_by_topic(self, index: BagIndex) -> dict[str, IntArray]:
        """Return topic -> times of recording (ns) of the messages of an index, in no particular order."""
        found: dict[str, list[IntArray]] = {}
        order = np.lexsort((index.rows[:, 1], index.rows[:, 0]))
        changes = np.any(np.diff(index.rows[order, :2], axis=0) != 0, axis=1)
        for part in np.split(order, np.flatnonzero(changes) + 1) if len(order) else ():
            first = index[int(part[0])]
            found.setdefault(self._channels[first.file][first.channel].topic, []).append(index.times_ns[part])
        return {topic: np.concatenate(times) for topic, times in found.items()}

    def read(self, entry: Entry) -> BagMessage:
        """Return one message; BrokenMessage (a BagError) when its bytes cannot be had."""
        channel = self._channels[entry.file][entry.channel]
        try:
            data = unpacked_message(self._files[entry.file].data(entry.first, entry.second), channel.encoding)
        except BrokenMessage as error:
            self.broken[channel.topic] += 1
            raise BrokenMessage(
                f"{self.path}: this bag breaks off or is damaged: a message of {shown(channel.topic)} {error}"
            ) from error
        return BagMessage(channel.topic, _kind(channel), entry.time_ns, data, channel.encoding == "ros1")

    def messages(self, topics: Collection[str] | None = None) -> Iterator[BagMessage]:
        """Yield the messages of ``topics`` (None: all) in order of time; with `partial` broken ones are left out."""
        yield from self.read_all(self.index(topics).by_time())

    def read_all(self, index: BagIndex) -> Iterator[BagMessage]:
        """Yield the messages of an index in its order; with `partial` broken ones are left out."""
        for number in range(len(index)):
            try:
                message = self.read(index[number])
            except BrokenMessage:
                if not self.partial:
                    raise
                continue
            yield message

    def contradictions(self, duration_ns: int) -> list[str]:
        """Return where its metadata.yaml contradicts what is there; ``duration_ns`` as measured over all messages."""
        return compare(self._claims, self.counts, duration_ns, not self.damage) if self._claims is not None else []

    def topic_of(self, kinds: Collection[str], wanted: str | None) -> str:
        """Return ``wanted`` if it is there, else the only topic of a type in ``kinds``; BagError names the choice."""
        fitting = sorted(topic for topic, kind in self.topics.items() if kind in kinds)
        if wanted is not None and wanted in fitting:
            return wanted
        if wanted is None and len(fitting) == 1:
            return fitting[0]
        asked = "none was named" if wanted is None else f"'{wanted}' is not one of them"
        names = ", ".join(shown(topic) for topic in fitting)
        raise BagError(f"{self.path}: {len(fitting)} topics of {', '.join(kinds)} ({names}); {asked}.")

    def _opened(self, file: Path) -> Storage:
        """Return a file open; with `partial` one whose content cannot be read at all is damage."""
        try:
            size = file.stat().st_size
            return self._storage(file, size)
        except OSError as error:  # what is in the way today says nothing about the content, and may be gone tomorrow
            raise BagError(f"{file}: this bag cannot be read: {error}") from error
        except BagError as error:
            if isinstance(error, NoRoom) or not self.partial:
                raise
            return _Unreadable(file, size, Damage(size, [str(error).removeprefix(f"{file}: ")]))

    def _storage(self, file: Path, size: int) -> Storage:
        """Return a file of this size (bytes) open, unpacked where it is compressed."""
        if size == 0:
            raise BagError(f"{file}: is empty: its recorder died before it wrote anything.")
        if file.suffix != ".zstd":
            return STORAGES[file.suffix](file)
        if self._unpacked is None:
            self._unpacked = tempfile.TemporaryDirectory(prefix="ukd_bag_")
        unpacked = Path(self._unpacked.name) / file.stem
        whole = unpack_file(file, unpacked)
        opened = STORAGES[unpacked.suffix](unpacked)
        if not whole:
            opened.damage.add("its compressed form (.zstd) breaks off or is damaged.")
        return opened

    def _of_one_type(self) -> list[dict[int, Channel]]:
        """Return number -> channel of every file, without those whose topic was of another type before."""
        every = [channel for file in self._files for channel in file.channels]
        kinds: dict[str, str] = {}
        for channel in sorted(every, key=lambda c: not c.kind):  # a type that was lost is not the topic's
            kinds.setdefault(channel.topic, _kind(channel))
        others: Counter[tuple[str, str]] = Counter()
        for channel in every:
            if _kind(channel) != kinds[channel.topic]:
                others[channel.topic, _kind(channel)] += channel.count
        self.warnings += [
            f"{count} messages of {shown(topic)} are {shown(kind)}, not {shown(kinds[topic])}; they are left out"
            for (topic, kind), count in list(others.items())[:10]
        ]
        return [{c.number: c for c in file.channels if _kind(c) == kinds[c.topic]} for file in self._files]

    def _refuse_damage(self) -> None:
        if not self.partial and self.damage:
            raise BagError(f"{self.path}: this bag breaks off or is damaged: {self.damage[0]}")


def _kind(channel: Channel) -> str:
    return channel.kind if channel.encoding in ("cdr", "ros1") else f"{channel.kind} ({channel.encoding})"
