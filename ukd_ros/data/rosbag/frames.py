# SPDX-License-Identifier: Apache-2.0
"""Bags become a BOP folder: frames that show something new, without lens, in scenes that are trained on or held out.

A raw image becomes a PNG; a compressed one stays the very file that was recorded where the camera has no lens model,
else a PNG too: a second generation of JPEG would cost more accuracy than its space is worth. Next to BOP's files every
scene has `frames.json`: bag, topic, stamp, time of recording and frame_id of each image.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from ukd_ros.config import to_mapping
from ukd_ros.data.progress import Bar
from ukd_ros.data.rosbag.folder import find_files, shown
from ukd_ros.data.rosbag.frames_report import BagFramesReport as BagFramesReport
from ukd_ros.data.rosbag.frames_report import make_report
from ukd_ros.data.rosbag.options import BagOptions as BagOptions
from ukd_ros.data.rosbag.plan import HELD_OUT, TRAIN, Plan, ScenePlan, make_plan
from ukd_ros.data.rosbag.reader import BagReader
from ukd_ros.data.rosbag.scenes import scene_folder, write_scene
from ukd_ros.data.rosbag.storage import BagError
from ukd_ros.data.rosbag.survey import Survey, dumps, loads, survey_bag
from ukd_ros.data.whole_files import write_bytes

logger = logging.getLogger(__name__)

SOURCE_FILE = "bags.json"
REPORT_FILE = "report.json"
SURVEYS = ".surveys"
VERSION = 3
"""Raised whenever the same bags and options give other frames: a folder begun before is not continued."""

PLANNED = ("max_frames", "held_out", "block_s", "guard_s")
"""Options that matter only after the bags were looked through."""

SAMPLE_BYTES = 2**20


class Processes(Protocol):
    """This process's `rank` among `count`, as `distillation.parallel.Processes` has it."""

    @property
    def rank(self) -> int:
        """Return this process's number."""

    @property
    def count(self) -> int:
        """Return the number of processes."""


def bags_to_bop(
    bags: Sequence[Path | str],
    out: Path | str,
    options: BagOptions,
    *,
    names: Mapping[str, int] | None = None,
    progress: bool = True,
    processes: Processes | tuple[int, int] = (0, 1),
) -> BagFramesReport:
    """Write the frames of ``bags`` that show something new as the BOP folder ``out``, splits train and held_out.

    names: object name -> BOP id of the labels (None: 1, 2, … in the order of the alphabet). processes: (rank, count);
    processes share out bags and scenes, and each returns when its own scenes are there. A call that was killed goes on
    where it was; a finished one returns at once.
    BagError: a bag that cannot be read, has no images or camera_info, or several topics to choose from; a folder of
    other bags or options; a disk without space (whole scenes stay).
    """
    paths, out = [Path(bag) for bag in bags], Path(out)
    rank, size = processes if isinstance(processes, tuple) else (processes.rank, processes.count)
    if not paths:
        raise BagError("bags: at least one bag is needed.")
    labels = _bag_names(paths)
    try:
        description = _description(paths, labels, options, names)
        _claim(out, description)
        surveys = _surveys(paths, description, out, options, rank, size, progress)
        if not any(survey.frames for survey in surveys):
            raise BagError(_nothing(paths, surveys))
        plan = make_plan(surveys, options)
        objects = _object_ids(surveys, names)
        _write_scenes(paths, surveys, plan, objects, out, rank, size, progress)
        report = make_report(out, surveys, plan, objects)
        write_bytes(out / REPORT_FILE, json.dumps(report.to_mapping(), indent=2).encode())
    except OSError as error:
        raise BagError(
            f"{error.filename or out}: {error.strerror or error}; the scenes that are whole stay, and the same call "
            "goes on from there."
        ) from error
    return report


def _nothing(paths: Sequence[Path], surveys: Sequence[Survey]) -> str:
    """Return why no image of the bags can be used."""
    told = [
        f"{path}: none of its {survey.seen} images can be used ("
        + "; ".join(
            [f"{count} times: {shown(reason, 240)}" for reason, count in survey.broken.items()]
            + ([f"{survey.without_camera_info} without camera_info"] if survey.without_camera_info else [])
        )
        + ")"
        for path, survey in zip(paths, surveys, strict=True)
    ]
    return " ".join(told)


def _bag_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for every bag: its file's or folder's, with the folder before it where two are alike."""
    names = [path.resolve().name for path in paths]
    return [
        name if names.count(name) == 1 else f"{path.resolve().parent.name}/{name}"
        for name, path in zip(names, paths, strict=True)
    ]


def _description(
    paths: Sequence[Path], labels: Sequence[str], options: BagOptions, names: Mapping[str, int] | None
) -> dict[str, Any]:
    """Everything that decides what is written, in plain types."""
    bags = [{"name": label, **bag_identity(path)} for path, label in zip(paths, labels, strict=True)]
    for number, bag in enumerate(bags):
        twin = next((n for n in range(number) if bags[n]["sha256"] == bag["sha256"]), None)
        if twin is not None:
            raise BagError(f"{paths[number]}: is the same bag as {paths[twin]}; give each once.")
    return {
        "version": VERSION,
        "bags": bags,
        "options": to_mapping(options),
        "names": dict(sorted(names.items())) if names is not None else None,
    }


def bag_identity(path: Path) -> dict[str, Any]:
    """Return a bag's size and a digest of the beginning, middle and end of its files: all of 50 GB takes minutes."""
    digest, total = hashlib.sha256(), 0
    for file in find_files(path).files:
        size = file.stat().st_size
        total += size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as stream:
            for at in sorted({0, max(0, size // 2 - SAMPLE_BYTES // 2), max(0, size - SAMPLE_BYTES)}):
                stream.seek(at)
                digest.update(stream.read(SAMPLE_BYTES))
    return {"bytes": total, "sha256": digest.hexdigest()}


def _claim(out: Path, description: dict[str, Any]) -> None:
    """Write bags.json, or compare with the one that is there."""
    there = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    if not there.is_dir():
        raise BagError(f"{out}: {there} is a file, not a folder; give another folder.")
    path = out / SOURCE_FILE
    # Listed before it is looked for: another process may be making this very folder, beginning with that file.
    others = out.exists() and any(not p.name.startswith((SOURCE_FILE, f".{SOURCE_FILE}")) for p in out.iterdir())
    if path.is_file():
        try:
            present = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BagError(f"{path}: is not valid JSON ({error}); delete this folder or give another.") from error
        if present != description and not any(any((out / split).glob("[0-9]*")) for split in (TRAIN, HELD_OUT)):
            write_bytes(path, json.dumps(description, indent=2).encode())  # the call before failed: it wrote no scene
        elif present != description:
            raise BagError(
                f"{path}: this folder was made of {_difference(present, description)}; give another folder, or delete "
                "this one."
            )
        return
    if others:
        raise BagError(f"{out}: is not empty and has no {SOURCE_FILE}; give a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(path, json.dumps(description, indent=2).encode())


def _difference(present: Any, wanted: dict[str, Any]) -> str:
    """Name what differs first."""
    if not isinstance(present, dict) or present.get("version") != wanted["version"]:
        return "bags by another version of this package"
    there = [bag.get("name") for bag in present.get("bags", [])]
    asked = [bag["name"] for bag in wanted["bags"]]
    if there != asked:
        return f"other bags ({', '.join(map(str, there))} there, {', '.join(asked)} asked for)"
    for before, now in zip(present["bags"], wanted["bags"], strict=True):
        if before != now:
            return f"a bag {now['name']} of other content ({before.get('bytes')} bytes then, {now['bytes']} now)"
    for key, value in wanted["options"].items():
        if present.get("options", {}).get(key) != value:
            return f"the same bags with another {key} ({present.get('options', {}).get(key)!r} there, {value!r} now)"
    return f"the same bags with other names ({present.get('names')} there, {wanted['names']} asked for)"


def _surveys(
    paths: Sequence[Path],
    description: Mapping[str, Any],
    out: Path,
    options: BagOptions,
    rank: int,
    size: int,
    progress: bool,
) -> list[Survey]:
    """Look through the bags that nobody has looked through yet; each process begins with others.

    Only then it waits for what others still look through, and makes up for those that died.
    """
    folder = out / SURVEYS
    folder.mkdir(exist_ok=True)
    settings = {key: value for key, value in description["options"].items() if key not in PLANNED}
    files = []
    for bag in description["bags"]:
        key = hashlib.sha256(json.dumps([VERSION, bag, settings], sort_keys=True).encode()).hexdigest()[:16]
        files.append(folder / f"{key}.jsonl")
    first = rank * len(paths) // size
    for wait in (False, True):
        for number in [*range(first, len(paths)), *range(first)]:
            if files[number].is_file():
                continue
            with _held(files[number].with_suffix(".lock"), wait) if size > 1 else nullcontext(True) as held:
                if held and not files[number].is_file():  # who held it before may have made it
                    survey = survey_bag(paths[number], description["bags"][number]["name"], options, progress)
                    write_bytes(files[number], dumps(survey))
    return [loads(file.read_bytes()) for file in files]


@contextmanager
def _held(lock: Path, wait: bool) -> Iterator[bool]:
    """Keep a bag from the other processes and yield True; False where one of them has it, or wait until none has.

    A process that ends, however it ends, has none any more.
    """
    import fcntl  # not everywhere, and not needed by a process that is alone

    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:  # several may look through one bag: they find the same, and the last rename counts
            logger.warning("%s: cannot be locked (%s); bags may be looked through more than once", lock, error)
        try:
            yield True
        finally:
            lock.unlink(missing_ok=True)


def _object_ids(surveys: Sequence[Survey], names: Mapping[str, int] | None) -> dict[str, int]:
    """Return object name -> id of all labels; BagError when ``names`` lacks one."""
    seen = sorted({label["name"] for survey in surveys for frame in survey.frames for label in frame.labels})
    if names is None:
        return {name: number for number, name in enumerate(seen, 1)}
    missing = [name for name in seen if name not in names]
    if missing:
        raise BagError(
            f"names: the bags label {missing[0]!r}, which has no id; known are {', '.join(names) or 'none'}."
        )
    return dict(names)


def _remove_halves(out: Path, rank: int, size: int) -> None:
    """Remove what a call that was killed left of this process's scenes: this plan may not have them."""
    for split in (TRAIN, HELD_OUT):
        for half in (out / split).glob(".*.partial"):
            number = half.name.split(".")[1]
            if number.isdecimal() and int(number) % size == rank:
                shutil.rmtree(half, ignore_errors=True)


def _write_scenes(
    paths: Sequence[Path],
    surveys: Sequence[Survey],
    plan: Plan,
    objects: Mapping[str, int],
    out: Path,
    rank: int,
    size: int,
    progress: bool,
) -> None:
    """Write this process's scenes that are not there yet, bag by bag."""
    _remove_halves(out, rank, size)
    mine = [scene for scene in plan.scenes if scene.scene_id % size == rank]
    todo = [scene for scene in mine if not scene_folder(out, scene).is_dir()]
    total = sum(len(scene.frames) for scene in mine)
    missing = sum(len(scene.frames) for scene in todo)
    if not todo:
        logger.info("%s: all %d images are there", out, total)
        return
    with Bar(total=total, initial=total - missing, desc="writing frames", unit="image", disable=not progress) as bar:
        for number, path in enumerate(paths):
            of_bag: list[ScenePlan] = [scene for scene in todo if scene.bag == number]
            if not of_bag:
                continue
            with BagReader(path, partial=True) as reader:
                reader.index([surveys[number].image_topic])  # finds broken chunks again, before they are asked for
                for scene in of_bag:
                    write_scene(out, scene, reader, surveys[number], objects, bar.update)
