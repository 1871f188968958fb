# SPDX-License-Identifier: Apache-2.0
"""What a run of `ukd new-object` remembers in its work folder: arguments, decisions, finished stages and their time.

Decisions that depend on the clock (how many steps, how many renders) are made once and kept, so that a run that was
killed goes on to the very model that it would have made.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ukd_ros.data.whole_files import write_bytes

FORMAT = 3
WAIT_S = 3.0
"""So long the forks of a process that was killed may hold its folder."""
STATE = "state.json"


class WorkError(RuntimeError):
    """A work folder that cannot be gone on with; the message says why and what to do."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a work folder for this process; WorkError when another one works there.

    A dead process holds it until its forks, which work there too, have noticed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + WAIT_S
    with (folder / ".lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > end:
                    busy = f"{folder}: another ukd new-object is working there; wait for it, or stop it."
                    raise WorkError(busy) from error
                time.sleep(0.1)
        yield


class WorkState:
    """The content of state.json; every change is on disk before the call returns."""

    def __init__(self, folder: Path, arguments: Mapping[str, Any]) -> None:
        """Open a work folder, or go on with one of the same arguments (plain data); WorkError names one that differs.

        In a folder that holds anything else nothing is begun; nothing binds a folder before `begin`.
        """
        self.path = folder / STATE
        wanted = json.loads(json.dumps(dict(arguments)))
        if self.path.is_file():
            self._data = self._read(wanted)
        else:
            strange = sorted(item.name for item in folder.iterdir() if item.name not in (".lock", ".gitignore"))
            if strange:
                raise WorkError(f"{folder}: holds {strange[0]} but no {STATE}; give another --work folder.")
            write_bytes(folder / ".gitignore", b"*\n")
            self._data = {"format": FORMAT, "arguments": wanted, "decisions": {}, "stages": {}, "kept_s": {}}
        self.chain = _hash(wanted)

    def begin(self) -> None:
        """Write down what the folder is for: called when nothing is left that would refuse it."""
        if not self.path.is_file():
            self._write()

    def _read(self, wanted: dict[str, Any]) -> dict[str, Any]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            shapes = [isinstance(data[key], dict) for key in ("arguments", "decisions", "stages", "kept_s")]
            right = data["format"] == FORMAT and all(shapes)
        except (ValueError, KeyError, TypeError) as error:
            raise WorkError(f"{self.path}: is damaged ({error}); delete its folder and start again.") from error
        if not right:
            raise WorkError(f"{self.path}: is of another version; delete its folder and start again.")
        for key in sorted(set(wanted) | set(data["arguments"])):
            there, asked = data["arguments"].get(key), wanted.get(key)
            if there != asked:
                raise WorkError(
                    f"{self.path}: this work was begun with {_difference(key, there, asked)}; give the same to go on, "
                    "another --work folder, or delete this one."
                )
        return dict(data)

    def digest(self, stage: str, inputs: Mapping[str, Any]) -> str:
        """Return the digest of a stage and of all before it, which the next stage's builds upon."""
        self.chain = _hash([self.chain, stage, dict(inputs)])
        return self.chain

    def result(self, stage: str, digest: str) -> dict[str, Any] | None:
        """Return what a finished stage of the same inputs gave, or None."""
        entry = self._data["stages"].get(stage)
        return dict(entry["result"]) if entry is not None and entry["digest"] == digest else None

    def finish(self, stage: str, digest: str, seconds: float, result: Mapping[str, Any]) -> None:
        """Note that a stage is finished, after `seconds` of work in all calls."""
        self._data["stages"][stage] = {"digest": digest, "seconds": round(seconds, 3), "result": dict(result)}
        self._data["kept_s"].pop(stage, None)
        self._write()

    def keep(self, stage: str, seconds: float) -> None:
        """Note so many seconds of an unfinished stage whose work is on disk."""
        self._data["kept_s"][stage] = round(seconds, 3)
        self._write()

    def kept_s(self, stage: str) -> float:
        """Return the seconds of an unfinished stage whose work is on disk."""
        return float(self._data["kept_s"].get(stage, 0.0))

    def decide(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a decision (plain data): that of an earlier call, else a new one, which is kept."""
        if name not in self._data["decisions"]:
            self._data["decisions"][name] = make()
            self._write()
        return self._data["decisions"][name]

    def decided(self, name: str) -> bool:
        """Return whether a decision was made."""
        return name in self._data["decisions"]

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds of every stage so far, unfinished ones as far as their work is on disk."""
        done = {name: float(entry["seconds"]) for name, entry in self._data["stages"].items()}
        return done | {name: float(value) for name, value in self._data["kept_s"].items()}

    def _write(self) -> None:
        write_bytes(self.path, (json.dumps(self._data, indent=1) + "\n").encode())


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _difference(key: str, there: Any, asked: Any) -> str:
    """Name what differs, down to the single setting."""
    if isinstance(there, dict) and isinstance(asked, dict):
        for inner in sorted(set(there) | set(asked)):
            if there.get(inner) != asked.get(inner):
                return _difference(f"{key}.{inner}", there.get(inner), asked.get(inner))
    return f"{key} = {there}, not {asked}"
