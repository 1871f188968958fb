# SPDX-License-Identifier: Apache-2.0
"""What every file of a bag can say, whatever its format: its channels, where their messages lie, what is lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

MAX_BYTES = 256 * 2**20
"""Larger chunks and messages are refused unread: an image of 50 megapixels, the largest accepted, is 150 MB of rgb8."""

FAR_NS = 2**62
"""Times beyond it (the year 2116) are no times; they would overflow differences."""


class BagError(RuntimeError):
    """A bag that cannot be read or written; the text names it."""


class NoRoom(BagError):
    """A file that cannot be opened for now, as something else than its content is in the way: it may well be whole."""


class BrokenMessage(BagError):
    """One message or chunk that cannot be read; the rest of the bag can."""


@dataclass(frozen=True)
class Channel:
    """One topic of one file: its number there, name, type (ROS 2 spelling), and how its bytes are serialised."""

    number: int
    topic: str
    kind: str
    encoding: str = "cdr"
    count: int = 0


@dataclass(frozen=True, eq=False)
class Places:
    """Where messages lie in one file, in the order in which they were recorded.

    times_ns [n]: when each was recorded. channels [n]: the number of its channel. where [n, 2]: what `Storage.data`
    takes.
    """

    times_ns: IntArray
    channels: IntArray
    where: IntArray

    def __len__(self) -> int:
        """Return the number of messages."""
        return len(self.times_ns)


def no_places() -> Places:
    """Return the places of no message."""
    return Places(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 2), np.int64))


@dataclass
class Damage:
    """What of one file cannot be read: the bytes that it takes there and the reasons, the first few in words."""

    lost_bytes: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, reason: str, lost_bytes: int = 0) -> None:
        """Count a loss; of a file with thousands of broken chunks the first ones are described, each once."""
        self.lost_bytes += lost_bytes
        if len(self.reasons) < 5 and reason not in self.reasons:
            self.reasons.append(reason)


class Storage(Protocol):
    """One open file of a bag."""

    path: Path
    size: int
    damage: Damage
    channels: list[Channel]

    def places(self, channels: set[int]) -> Places:
        """Return where the messages of these channels lie, without reading them."""

    def data(self, first: int, second: int) -> bytes:
        """Return the bytes of the message at a place; BrokenMessage when they cannot be had."""

    def close(self) -> None:
        """Close the file."""
