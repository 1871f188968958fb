# SPDX-License-Identifier: Apache-2.0
"""Which files a bag has. A folder is listed; its metadata.yaml is compared with what is there and never followed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ukd_ros.data.rosbag.storage import BagError

METADATA = "metadata.yaml"
MAX_METADATA = 8 * 2**20
MAX_DEPTH, MAX_WORD = 50, 4096
"""Of metadata: lists within lists, and characters without quotes: to read 1:1:1:... as a number takes their square."""

SUFFIXES = (".mcap", ".db3", ".mcap.zstd", ".db3.zstd")
KINDS = {"mcap": ".mcap", "sqlite3": ".db3"}
PLAUSIBLE_NS = 366 * 86400 * 10**9
"""No recording lasts longer than a year."""


@dataclass(frozen=True)
class Claims:
    """What a metadata.yaml says; None or empty where it says nothing that can be used."""

    files: tuple[str, ...] = ()
    storage: str = ""
    messages: int | None = None
    duration_ns: int | None = None
    topics: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class BagFiles:
    """The files of a bag in the order of their numbers, what its metadata claim, and what is odd about them."""

    files: tuple[Path, ...]
    claims: Claims | None
    warnings: tuple[str, ...]


def find_files(path: Path) -> BagFiles:
    """Return the files of the bag at `path`: itself, or those inside the folder; BagError when there are none."""
    if path.is_file():
        if not path.name.endswith((*SUFFIXES, ".bag")):
            raise BagError(f"{path}: is neither a folder nor a file of one of {', '.join((*SUFFIXES, '.bag'))}.")
        return BagFiles((path,), None, ())
    if not path.is_dir():
        raise BagError(f"{path}: this bag cannot be read: there is no such file or folder.")
    warnings: list[str] = []
    found = []
    for entry in sorted(path.iterdir(), key=_natural):
        if not entry.name.endswith(SUFFIXES) or entry.name.startswith("."):
            continue
        if entry.is_symlink() and not _leads_into(entry, path):
            warnings.append(
                f"{entry.name} is a link that leads out of the bag or nowhere; not followed (name its target instead)"
            )
        elif entry.is_file():
            found.append(entry)
    claims = _read_claims(path / METADATA, warnings)
    found = _without_doubles(found, claims, warnings)
    if claims is not None:
        _compare_files(claims, found, warnings)
    if not found:
        told = f" ({'; '.join(warnings)})" if warnings else ""
        inside = _bags_in(path)
        if inside:
            raise BagError(f"{path}: is no bag but a folder of bags; name those that you mean: {', '.join(inside)}.")
        raise BagError(f"{path}: holds no file of a bag ({', '.join(SUFFIXES)}){told}.")
    return BagFiles(tuple(found), claims, tuple(warnings))


def compare(claims: Claims, counts: dict[str, int], duration_ns: int, whole: bool) -> list[str]:
    """Return where the metadata contradict what was found; a damaged bag is expected to hold less."""
    out = []
    total = sum(counts.values())
    if claims.messages is not None and claims.messages != total and (whole or claims.messages < total):
        out.append(f"{METADATA} claims {claims.messages} messages, {total} are there")
    for topic, count in claims.topics:
        if count != counts.get(topic, 0) and (whole or count < counts.get(topic, 0)):
            out.append(f"{METADATA} claims {count} messages of {shown(topic)}, {counts.get(topic, 0)} are there")
    if claims.duration_ns is not None and total and whole and abs(claims.duration_ns - duration_ns) > 10**9:
        absurd = " (absurd)" if not 0 <= claims.duration_ns <= PLAUSIBLE_NS else ""
        out.append(
            f"{METADATA} claims {claims.duration_ns / 1e9:.1f} s{absurd}, the messages span {duration_ns / 1e9:.1f}"
        )
    return out[:10]


def shown(text: str, length: int = 120) -> str:
    """Return a text of a bag fit for a terminal: no control characters, no endless lines."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= length else clean[: length - 3] + "..."


def _leads_into(link: Path, folder: Path) -> bool:
    """Return whether a link ends at something inside of a folder; one that ends nowhere or at itself does not."""
    try:
        return folder.resolve() in link.resolve(strict=True).parents
    except (OSError, RuntimeError):  # RuntimeError: a loop, before Python 3.13
        return False


def _bags_in(path: Path) -> list[str]:
    """Return the bags that a folder holds, each as it can be named; the first twenty."""
    entries = [entry for entry in sorted(path.iterdir(), key=_natural) if not entry.name.startswith(".")]
    found = [
        shown(str(entry))
        for entry in entries
        if entry.suffix == ".bag" or (entry.is_dir() and any(p.name.endswith(SUFFIXES) for p in entry.iterdir()))
    ]
    return found[:20]


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort bag_10 after bag_9."""
    parts = re.split(r"(\d+)", path.name)
    return [(1, int(p[:18]), p) if p.isdecimal() else (0, 0, p) for p in parts]


def _without_doubles(found: list[Path], claims: Claims | None, warnings: list[str]) -> list[Path]:
    """Leave out what holds the same messages again: a .zstd beside its unpacked file, a converted copy."""
    names = {p.name for p in found}
    for entry in [p for p in found if p.suffix == ".zstd" and p.stem in names]:
        warnings.append(f"{entry.name} is left aside: {entry.stem} is there unpacked")
        found = [p for p in found if p != entry]
    kinds = {suffix for suffix in KINDS.values() if any(suffix in p.suffixes for p in found)}
    if len(kinds) > 1:
        kept = KINDS.get(claims.storage if claims else "", ".mcap")
        warnings.append(f"there are mcap and sqlite3 files; only those of {kept} are read")
        found = [p for p in found if kept in p.suffixes]
    return found


def _compare_files(claims: Claims, found: list[Path], warnings: list[str]) -> None:
    names = {p.name for p in found}
    named = set()
    for text in claims.files:
        name = text.replace("\\", "/").rsplit("/", 1)[-1]
        named.add(name)
        # Before version 4 of the format the path began with the bag's own folder.
        if text.startswith("/") or ".." in Path(text).parts:
            warnings.append(f"{METADATA} names {shown(text)}, a path outside of the bag; not followed")
        elif name not in names:
            warnings.append(f"{METADATA} names {shown(text)}, which is not there")
    if named:
        warnings += [f"{p.name} is not named in {METADATA}; it is read" for p in found if p.name not in named]


def _read_claims(path: Path, warnings: list[str]) -> Claims | None:
    """Return what metadata.yaml says; None with a warning where it cannot be understood."""
    if not path.is_file() or path.is_symlink():
        warnings.append(f"there is no {METADATA}: the recorder may have died")
        return None
    if path.stat().st_size > MAX_METADATA:
        warnings.append(f"{METADATA} has {path.stat().st_size} bytes; it is not read")
        return None
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        text = path.read_text(encoding="utf-8")
        _refuse_bombs(yaml.parse(text, loader))
        content = yaml.load(text, loader)  # noqa: S506 - a SafeLoader
        about = content["rosbag2_bagfile_information"]
        storage = about.get("storage_identifier")
        return Claims(
            tuple(text for text in _list(about.get("relative_file_paths")) if isinstance(text, str))[:100_000],
            storage if isinstance(storage, str) else "",
            _number(about.get("message_count")),
            _number(_mapping(about.get("duration")).get("nanoseconds")),
            tuple(_topics(_list(about.get("topics_with_message_count")))),
        )
    except (yaml.YAMLError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        words = " ".join(str(error).split())
        warnings.append(f"{METADATA} cannot be understood ({type(error).__name__}: {shown(words)}); it is not used")
        return None


def _refuse_bombs(events: Iterable[yaml.Event]) -> None:
    """Raise ValueError for YAML, no recorder's, that takes far more time, memory or stack than bytes once composed."""
    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:  # composed by recursion in C, which ends the process
            raise ValueError(f"its lists are nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent):  # a few bytes that stand for as much as one likes
            raise ValueError("it has YAML aliases")
        # implicit[1]: quoted and without a tag, so a text whatever it looks like, such as a QoS profile
        if isinstance(event, yaml.ScalarEvent) and not event.implicit[1] and len(event.value) > MAX_WORD:
            raise ValueError(f"it has a word or number of more than {MAX_WORD} characters")


def _topics(rows: list[Any]) -> list[tuple[str, int]]:
    out = []
    for row in rows[:100_000]:
        name, count = (
            _mapping(_mapping(row).get("topic_metadata")).get("name"),
            _number(_mapping(row).get("message_count")),
        )
        if isinstance(name, str) and count is not None:
            out.append((name, count))
    return out


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**80 else None
