# SPDX-License-Identifier: Apache-2.0
"""More frames than memory holds: only so many are kept, and no window depends on which."""

from __future__ import annotations

import errno
import gc
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distillation"))

from cubes import CUBE, CubeViews  # noqa: E402

from ukd_ros.data.dataset import SupposedObject, SupposedWindows, UnlabelledWindows, WindowConfig  # noqa: E402
from ukd_ros.data.decoded import Decoded  # noqa: E402
from ukd_ros.data.progress import Bar, Progress, Stopped, listening, within  # noqa: E402
from ukd_ros.data.whole_files import write_bytes  # noqa: E402
from ukd_ros.geometry.view import View  # noqa: E402

WINDOW = WindowConfig(size=64)


class Stored:
    """Views that are made when asked for, and how many of their images are alive."""

    def __init__(self, count: int) -> None:
        self.views = CubeViews(count)
        self.alive = self.most = self.made = 0

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, number: int, /) -> View:
        view = self.views.view(number)
        made = View(view.image.copy(), view.camera)
        weakref.finalize(made.image, self._gone)
        self.alive += 1
        self.made += 1
        self.most = max(self.most, self.alive)
        return made

    def _gone(self) -> None:
        self.alive -= 1


class Supposed(Stored):
    """The same with labels."""

    def __getitem__(self, number: int, /) -> tuple[View, Sequence[SupposedObject]]:  # type: ignore[override]
        truth = self.views.view(number).objects[0]
        assert truth.mask is not None
        return super().__getitem__(number), [SupposedObject(0, truth.T_camera_object, truth.mask)]


def test_those_asked_for_last_are_kept() -> None:
    made: list[int] = []

    def make(number: int) -> list[int]:
        made.append(number)
        return [number] * number

    things = Decoded(6, make, len, most_bytes=7)
    assert [len(thing) for thing in things] == [0, 1, 2, 3, 4, 5] and made == [0, 1, 2, 3, 4, 5]
    assert things[5] == [5] * 5 and len(made) == 6  # the last of them is still there
    assert things[2] == [2, 2] and things[5] == [5] * 5 and made[6:] == [2]
    assert things[4] == [4] * 4 and things[2] == [2, 2] and made[7:] == [4, 2]  # 5 was the oldest, then 2
    with pytest.raises(IndexError, match="number 6"):
        things[6]


@pytest.mark.parametrize("kind", ["unlabelled", "supposed"])
def test_a_window_depends_on_its_number_alone_and_few_frames_are_held(kind: str) -> None:
    count, frame = 24, CubeViews(1).view(0).image.nbytes * 4 // 3

    def windows(source: Stored, most: int) -> UnlabelledWindows | SupposedWindows:
        if kind == "supposed":
            return SupposedWindows(source, [CUBE], WINDOW, 3, most_bytes=most)  # type: ignore[arg-type]
        boxes = [(n, np.array([100.0, 60.0, 220.0, 180.0])) for n in range(0, count, 2)]
        return UnlabelledWindows(source, boxes, [CUBE], WINDOW, 3, most_bytes=most)

    make = Supposed if kind == "supposed" else Stored
    held, streamed = make(count), make(count)
    whole, few = windows(held, 10**9), windows(streamed, 3 * frame)
    assert whole.fingerprint() == few.fingerprint() and len(whole) == len(few)
    for number in (7, 40, 3, 7, 100):
        one, other = whole.sample(number), few.sample(number)
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.mask, other.mask)
    gc.collect()
    assert held.made == count < streamed.made  # what was not kept is made again
    if kind == "unlabelled":  # labels make a copy of the image
        assert held.most == count and streamed.most <= 6  # what is kept, and what is being made or cut


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "labels.json"
    write_bytes(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "chmod", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_bytes(path, b"new")
    assert caught.value.filename == str(path) and path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_work_ends_at_its_first_step_after_the_time_is_up() -> None:
    heard: list[Progress] = []
    with listening(heard.append):
        with within(None, "never"), within(1000.0, "never"):
            assert list(Bar(range(3), disable=True)) == [0, 1, 2]
        told = len(heard)
        with pytest.raises(Stopped, match="the time is up"), within(-1.0, "the time is up"):
            for number in Bar(range(3), disable=True):
                assert number == 0
        assert told >= 3 and len(heard) > told
        # a stage that kept what it had, and worded that for its own command
        with pytest.raises(Stopped, match="the time is up") as caught, within(-1.0, "the time is up"):
            raise Stopped("go on with --resume")
        assert str(caught.value.__cause__) == "go on with --resume"
        with pytest.raises(Stopped, match="Ctrl-C"), within(1000.0, "the time is up"):
            raise Stopped("Ctrl-C")
        Bar(range(1), disable=True)  # nobody is stopped after it
