# SPDX-License-Identifier: Apache-2.0
"""What became of the images of every bag: a table for people, plain values for programs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ukd_ros.data.rosbag.folder import shown
from ukd_ros.data.rosbag.plan import HELD_OUT, TRAIN, Plan
from ukd_ros.data.rosbag.survey import Survey


@dataclass(frozen=True)
class BagReport:
    """What became of one bag's images (all counts are images unless they say otherwise).

    seen: found in the bag. thinned: like the one kept before. broken: reason -> count. guarded: too near to a held-out
    block. beyond_limit: left out by max_frames. written: of these held_out, labelled. labels_refused: reason -> count.
    """

    bag: str
    image_topic: str
    seen: int
    thinned: int
    without_camera_info: int
    broken: Mapping[str, int]
    guarded: int
    beyond_limit: int
    written: int
    held_out: int
    labelled: int
    labels_refused: Mapping[str, int]
    clock_jumps: int
    duration_s: float
    size: int
    lost_bytes: int
    damage: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class BagFramesReport:
    """What `bags_to_bop` made: the folder, its images per split, scenes, object ids, and every bag's account.

    `split_by` is "bag", "block" or "" (nothing held out).
    """

    out: Path
    train: int
    held_out: int
    scenes: int
    split_by: str
    objects: Mapping[str, int]
    bags: tuple[BagReport, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for report.json; the folder is left out, so that equal data give equal files."""
        content = asdict(self)
        del content["out"]
        return content

    def table(self) -> str:
        """Return the account of every bag as text."""
        columns = "seen thinned without_camera_info guarded beyond_limit written held_out labelled clock_jumps".split()
        titles = ["bag", "seen", "thinned", "no camera_info", "guard", "beyond limit", "written", "held out"]
        titles += ["labelled", "clock jumps", "broken", "lost"]
        rows = [titles]
        for bag in self.bags:
            lost = f"{bag.lost_bytes} B ({100 * bag.lost_bytes / max(1, bag.size):.1f} %)" if bag.lost_bytes else "0"
            numbers = [str(getattr(bag, name)) for name in columns]
            rows.append([shown(bag.bag, 40), *numbers, str(sum(bag.broken.values())), lost])
        widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        for bag in self.bags:
            notes = [f"broken, {count} times: {reason}" for reason, count in bag.broken.items()]
            notes += [f"no label, {count} times: {reason}" for reason, count in bag.labels_refused.items()]
            notes += [f"damage: {text}" for text in bag.damage] + [f"warning: {text}" for text in bag.warnings]
            lines += [f"{shown(bag.bag, 40)}: {shown(note, 240)}" for note in notes]
        how = {"bag": "a whole bag held out", "block": "blocks of time held out", "": "nothing held out"}[self.split_by]
        lines.append(f"{self.train} images to train on, {self.held_out} held out, in {self.scenes} scenes ({how})")
        if self.objects:
            # Names come out of the bag, and this line is made to be pasted into a shell.
            words = [f"--name {shlex.quote(f'{key}={shown(name)}')}" for name, key in self.objects.items()]
            lines.append(f"labelled objects: {' '.join(words)}")
        return "\n".join(lines)


def make_report(out: Path, surveys: Sequence[Survey], plan: Plan, objects: Mapping[str, int]) -> BagFramesReport:
    """Return the report of a plan that is carried out."""
    bags = []
    for number, survey in enumerate(surveys):
        frames = [(scene.split, frame) for scene in plan.scenes if scene.bag == number for frame in scene.frames]
        bags.append(
            BagReport(
                bag=survey.bag,
                image_topic=survey.image_topic,
                seen=survey.seen,
                thinned=survey.thinned,
                without_camera_info=survey.without_camera_info,
                broken=survey.broken,
                guarded=plan.guarded[number],
                beyond_limit=plan.beyond_limit[number],
                written=len(frames),
                held_out=sum(split == HELD_OUT for split, _ in frames),
                labelled=sum(bool(frame.labels) for _, frame in frames),
                labels_refused=survey.labels_refused,
                clock_jumps=survey.clock_jumps,
                duration_s=survey.duration_ns / 1e9,
                size=survey.size,
                lost_bytes=survey.lost_bytes,
                damage=tuple(survey.damage),
                warnings=tuple(survey.warnings),
            )
        )
    written = {split: sum(len(s.frames) for s in plan.scenes if s.split == split) for split in (TRAIN, HELD_OUT)}
    return BagFramesReport(out, written[TRAIN], written[HELD_OUT], len(plan.scenes), plan.by, objects, tuple(bags))
