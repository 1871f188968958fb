# SPDX-License-Identifier: Apache-2.0
"""Things that are made when they are asked for, of which only so many are kept: more frames than memory holds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

MOST_BYTES = 2**29
"""Kept at once: some 400 views of 640x480 with their masks."""


class Numbered(Protocol[T_co]):
    """Things by number, such as a list has them; making one may take a while."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def __getitem__(self, number: int, /) -> T_co:
        """Return one of them."""
        ...


class Decoded(Generic[T]):
    """The things 0 .. count - 1, made by number; those asked for last are kept, `most_bytes` of them at most.

    What `make` gives must depend on the number alone. Several threads may ask.
    """

    def __init__(
        self, count: int, make: Callable[[int], T], size: Callable[[T], int], most_bytes: int = MOST_BYTES
    ) -> None:
        """`size` of one in bytes; the newest is always kept."""
        self._count, self._make, self._size, self._most = count, make, size, most_bytes
        self._kept: OrderedDict[int, T] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many there are."""
        return self._count

    def __iter__(self) -> Iterator[T]:
        """Yield all in their order."""
        for number in range(self._count):
            yield self[number]

    def __getitem__(self, number: int, /) -> T:
        """Return one of them; IndexError beyond the last."""
        if not 0 <= number < self._count:
            raise IndexError(f"there are {self._count}, and number {number} is none of them")
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        made = self._make(number)
        with self._lock:
            if number not in self._kept:
                self._kept[number] = made
                self._bytes += self._size(made)
            while self._bytes > self._most and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= self._size(oldest)
        return made
