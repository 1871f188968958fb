# SPDX-License-Identifier: Apache-2.0
"""What the teachers said of frames, on disk: asked once, shared out between processes, gone on with after a stop."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ukd_ros.data.whole_files import write_bytes
from ukd_ros.distillation.checkpoint import writing_in
from ukd_ros.distillation.parallel import Processes
from ukd_ros.distillation.pseudo_labels import PseudoLabel, PseudoLabels
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.pose import Pose, nearest_rotation

FORMAT = 1
SHARD = 64
"""Frames in a shard."""
NOTE = "labels.json"

Box = tuple[int, FloatArray]
"""Where something was seen: the frame's number, and [4] x0 y0 x1 y1 px."""

T = TypeVar("T")


class LabelError(ValueError):
    """Stored answers that cannot be used; the message names the file and says what to do."""


def stored_labels(
    folder: Path,
    note: dict[str, Any],
    frames: int,
    label: Callable[[range], PseudoLabels],
    processes: Processes | None = None,
) -> PseudoLabels:
    """Return the labels of frames 0 .. frames - 1: those in `folder`, and what is missing from `label` (a shard's).

    `note` tells these teachers, frames and settings from any others; LabelError when the folder holds others'. Under
    torchrun every process labels its share of the shards and reads the rest.
    """
    parts = _stored(folder, note, frames, lambda shard: _as_data(label(shard)), _labels, processes)
    refused: Counter[str] = Counter()
    for part in parts:
        refused.update(part.refused)
    return PseudoLabels(tuple(item for part in parts for item in part.labels), frames, dict(refused))


def stored_boxes(
    folder: Path,
    note: dict[str, Any],
    frames: int,
    look: Callable[[range], list[Box]],
    processes: Processes | None = None,
) -> list[Box]:
    """Return where something is seen in frames 0 .. frames - 1, kept as `stored_labels` keeps labels."""

    def ask(shard: range) -> dict[str, Any]:
        return {"boxes": [[number, box.tolist()] for number, box in look(shard)]}

    return [box for part in _stored(folder, note, frames, ask, _boxes, processes) for box in part]


def _stored(
    folder: Path,
    note: dict[str, Any],
    frames: int,
    ask: Callable[[range], dict[str, Any]],
    read: Callable[[Any, range], T],
    processes: Processes | None,
) -> list[T]:
    """Return the answers on all shards: those that are there, and what is missing from `ask`."""
    processes = processes or Processes()
    shards = [range(first, min(first + SHARD, frames)) for first in range(0, frames, SHARD)]
    with ExitStack() as held:
        if processes.rank == 0:
            _claim(folder, note)
            held.enter_context(writing_in(folder, (NOTE, "shard-*.json")))
        processes.any(False)  # nobody looks before the note is there
        if processes.rank > 0:
            held.enter_context(writing_in(folder))
        for number, shard in enumerate(shards):
            path = folder / f"shard-{number:05d}.json"
            if number % processes.count == processes.rank and not path.is_file():
                write_bytes(path, (json.dumps(ask(shard)) + "\n").encode())
        processes.any(False)  # all shares are done
    return [_read(folder / f"shard-{number:05d}.json", shard, read) for number, shard in enumerate(shards)]


def _claim(folder: Path, note: dict[str, Any]) -> None:
    """Write the note, or compare with the one that is there."""
    mine = {"format": FORMAT, **note}
    path = folder / NOTE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, (json.dumps(mine, indent=1) + "\n").encode())
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LabelError(f"{path}: is no JSON ({error}); delete the folder, and the labels are made again") from error
    differing = [key for key in mine if not isinstance(theirs, dict) or theirs.get(key) != mine[key]]
    if differing:
        raise LabelError(
            f"{path}: what is here was asked with other {', '.join(differing)}; delete {folder}, or choose another "
            "folder for this run"
        )


def _as_data(labels: PseudoLabels) -> dict[str, Any]:
    rows = [
        {
            "frame": item.frame,
            "class": item.class_index,
            "rotation": item.T_camera_object.rotation.reshape(9).tolist(),
            "translation": item.T_camera_object.translation.tolist(),
            "cov": item.cov.reshape(36).tolist(),
            "score": item.score,
            "probability": item.probability,
            "patches": np.round(item.patches, 2).tolist(),
            "refused": item.refused,
        }
        for item in labels.labels
    ]
    return {"refused": labels.refused, "labels": rows}


def _read(path: Path, shard: range, read: Callable[[Any, range], T]) -> T:
    """Read one shard; nothing in it is believed."""
    try:
        return read(json.loads(path.read_text(encoding="utf-8")), shard)
    except FileNotFoundError as error:
        raise LabelError(f"{path}: is missing; every process must see the same folder") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabelError(f"{path}: cannot be read ({error}); delete it, and it is made again") from error


def _boxes(data: Any, shard: range) -> list[Box]:
    found: list[Box] = [(int(number), np.array(box, np.float64).reshape(4)) for number, box in data["boxes"]]
    if not all(number in shard and np.isfinite(box).all() for number, box in found):
        raise ValueError("a box is of no frame of this shard, or not finite")
    return found


def _labels(data: Any, shard: range) -> PseudoLabels:
    refused = {str(reason): int(count) for reason, count in data["refused"].items()}
    return PseudoLabels(tuple(_label(row, shard) for row in data["labels"]), len(shard), refused)


def _label(row: dict[str, Any], shard: range) -> PseudoLabel:
    numbers = {key: np.asarray(row[key], np.float64) for key in ("rotation", "translation", "cov", "patches")}
    if not all(np.isfinite(values).all() for values in numbers.values()):
        raise ValueError("a number is not finite")
    if row["frame"] not in shard:
        raise ValueError(f"frame {row['frame']} is not in this shard")
    pose = Pose(nearest_rotation(numbers["rotation"].reshape(3, 3)), numbers["translation"].reshape(3))
    return PseudoLabel(
        int(row["frame"]),
        int(row["class"]),
        pose,
        numbers["cov"].reshape(6, 6),
        float(row["score"]),
        float(row["probability"]),
        numbers["patches"].reshape(-1, 4),
        str(row["refused"]),
    )
