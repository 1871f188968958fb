# SPDX-License-Identifier: Apache-2.0
"""The teachers' guidance on disk: asked once, read in every training that looks at the same windows.

A cache is a folder of compressed shards with a note that says of which teachers and which windows; any other is
refused. Shards appear whole or not at all, so an interrupted call goes on, and several processes share the work.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ukd_ros.data.dataset import TrainingSample, Windows
from ukd_ros.data.progress import Bar
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.distillation.guidance import PADDING, Guidance, teach
from ukd_ros.distillation.parallel import Processes
from ukd_ros.distillation.teacher import Ensemble
from ukd_ros.perception.network import NetworkConfig

FORMAT = 1
SHARD = 512
"""Windows in a shard."""
BATCH = 32
_MOST_CELLS = np.iinfo(np.int16).max + 1
NOTE = "cache.json"


class CacheError(ValueError):
    """A cache that cannot be used; the message names the file, what differs and what to do."""


class TeacherCache:
    """Guidance of the windows 0 .. count - 1 of a data set."""

    def __init__(self, folder: Path, count: int, votes: int, network: NetworkConfig, identity: str) -> None:
        """Use `open_cache`, which makes sure that the folder holds what it should."""
        self.folder = folder
        self.count = count
        self.identity = identity
        self._votes, self._network = votes, network
        self._shard = lru_cache(maxsize=4)(self._read)

    def guidance(self, numbers: Sequence[int]) -> Guidance:
        """Return the guidance of windows by number (modulo `count`), as that of a batch in this order."""
        parts = []
        for number in numbers:
            shard, inside = divmod(number % self.count, SHARD)
            parts.append(self._shard(shard).of_windows(inside, inside + 1))
        return Guidance.joined(parts, [1] * len(parts))

    def _read(self, shard: int) -> Guidance:
        path = _shard_file(self.folder, shard, self.count)
        try:
            with np.load(path, allow_pickle=False) as content:
                parts = {f.name: content[f.name] for f in fields(Guidance)}
            fault = self._fault(parts)
            if fault:
                raise CacheError(f"{path}: {fault}; delete it, and it is made again")
            return Guidance(**{name: _widened(array) for name, array in parts.items()})
        except CacheError:
            raise
        except (
            OSError,
            EOFError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            zlib.error,
            zipfile.BadZipFile,
        ) as e:
            raise CacheError(f"{path}: cannot be read ({e}); delete it, and it is made again") from e

    def _fault(self, parts: dict[str, npt.NDArray[Any]]) -> str:
        """Say what is wrong with a shard's arrays, "" when nothing is: nothing in a file is believed."""
        count, keypoints = len(parts["window"]), self._network.keypoints
        votes = (count, self._votes)
        shapes = {"window": (count,), "class_index": (count,), "cell": votes, "score": votes}
        shapes |= {"xy": (*votes, keypoints, 2), "spread": (*votes, keypoints, 3), "cov": (*votes, keypoints, 3)}
        for name, array in parts.items():
            expected = shapes.get(name, (*votes, array.shape[-1]))
            if array.shape != expected:
                return f"{name} has the shape {array.shape}, not {expected}"
            whole = name in ("window", "class_index", "cell")
            if array.dtype.kind != ("i" if whole else "f"):
                return f"{name} is {array.dtype}"
            if not whole and not np.isfinite(array).all():
                return f"{name} is not finite"
        ends = {"window": (0, SHARD), "class_index": (0, len(self._network.classes)), "cell": (PADDING, _MOST_CELLS)}
        for name, (first, end) in ends.items():
            if count and not (first <= int(parts[name].min()) and int(parts[name].max()) < end):
                return f"{name} is outside {first}..{end - 1}"
        return ""


def open_cache(
    folder: Path,
    ensemble: Ensemble,
    data: Windows,
    count: int,
    *,
    positives: int,
    votes: int,
    features: bool,
    processes: Processes | None = None,
    progress: bool = True,
) -> TeacherCache:
    """Return the guidance of the first `count` windows; what is missing is asked of the ensemble and written.

    Several processes make a share of the shards each, and wait for the others'. CacheError when the folder
    holds that of another ensemble, other windows or other settings.
    """
    processes = processes or Processes()
    mine = {
        "format": FORMAT,
        "teachers": ensemble.identity,
        "data": data.fingerprint(),
        "positives": positives,
        "votes": votes,
        "features": features,
    }
    if processes.rank == 0:
        _claim(folder, mine)
    processes.any(False)  # nobody looks before the note is there
    features = _claim(folder, mine)
    shards = range((count + SHARD - 1) // SHARD)
    missing = [s for s in shards if not _shard_file(folder, s, count).is_file()]
    own = [s for s in missing if s % processes.count == processes.rank]
    bar = Bar(
        total=sum(_windows(s, count) for s in own),
        desc="asking the teachers",
        unit="window",
        disable=not progress or processes.rank > 0,
    )
    for shard in own:
        # another program may have made it meanwhile
        if not _shard_file(folder, shard, count).is_file():
            _make(folder, shard, count, ensemble, data, positives, votes, features, bar)
    bar.close()
    processes.any(False)  # all shares are done
    absent = [path for path in (_shard_file(folder, s, count) for s in shards) if not path.is_file()]
    if absent:
        raise CacheError(f"{absent[0]}: is missing; every process must see the same folder")
    identity = hashlib.sha256(json.dumps([mine["teachers"], mine["data"]]).encode()).hexdigest()
    return TeacherCache(folder, count, votes, ensemble.networks[0].config, identity)


def _make(
    folder: Path,
    shard: int,
    count: int,
    ensemble: Ensemble,
    data: Windows,
    positives: int,
    votes: int,
    features: bool,
    bar: Bar,
) -> None:
    """Ask about one shard's windows and write it."""
    parts, sizes = [], []
    end = shard * SHARD + _windows(shard, count)
    for first in range(shard * SHARD, end, BATCH):
        samples: list[TrainingSample] = [data.sample(i) for i in range(first, min(first + BATCH, end))]
        parts.append(teach(ensemble, samples, positives, votes))
        sizes.append(len(samples))
        bar.update(len(samples))
    whole = Guidance.joined(parts, sizes)
    arrays = {f.name: _narrowed(f.name, getattr(whole, f.name)) for f in fields(Guidance)}
    if not features:
        arrays["features"] = arrays["features"][..., :0]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(_shard_file(folder, shard, count), buffer.getvalue())


def _claim(folder: Path, mine: dict[str, Any]) -> bool:
    """Write the note, or compare with the one that is there; return whether the cache holds features.

    One that holds them serves those who need none.
    """
    note = folder / NOTE
    if not note.is_file():
        # hidden files are what another process is just writing, or left when it was killed
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise CacheError(f"{folder}: holds files but no {NOTE}; choose an empty folder for the teachers' cache")
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(note, (json.dumps(mine, indent=1) + "\n").encode())
        return bool(mine["features"])
    try:
        theirs = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CacheError(f"{note}: is no JSON ({error}); delete the folder, and it is made again") from error
    if not isinstance(theirs, dict):
        raise CacheError(f"{note}: is no mapping; delete the folder, and it is made again")
    words = {"teachers": "by other teachers", "data": "for another data set, other windows or another seed"}
    for key, value in mine.items():
        if theirs.get(key) != value and not (key == "features" and theirs.get(key) is True):
            what = words.get(key, f"with {key} {theirs.get(key)}, not {value}")
            raise CacheError(f"{note}: was made {what}; choose another folder for this run's cache")
    return bool(theirs["features"])


def _narrowed(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return what is stored: half floats (0.06 px in a window of 128) and short integers."""
    if name == "window":
        return array
    if array.dtype.kind != "f":
        return array.astype(np.int16)
    largest = np.finfo(np.float16).max
    return array.clip(-largest, largest).astype(np.float16)


def _widened(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)


def _windows(shard: int, count: int) -> int:
    """Return how many of `count` windows are in a shard."""
    return min(SHARD, count - shard * SHARD)


def _shard_file(folder: Path, shard: int, count: int) -> Path:
    """Return the file of a shard; the last one of a cache may hold fewer windows, and its name says how many."""
    whole = folder / f"shard-{shard:05d}.npz"
    if _windows(shard, count) == SHARD or whole.is_file():
        return whole
    return folder / f"shard-{shard:05d}-{_windows(shard, count)}.npz"
