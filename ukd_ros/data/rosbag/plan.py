# SPDX-License-Identifier: Apache-2.0
"""Which frames of which bags become which scenes, and which scenes are held out: by bag or by time, never by frame.

Blocks are cut, held out and guarded by the times of recording. A block is one scene, or several where the camera's own
clock was set back in it: in a scene time goes on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ukd_ros.data.rosbag.options import BagOptions
from ukd_ros.data.rosbag.storage import BagError
from ukd_ros.data.rosbag.survey import TOLERANCE_NS, Frame, Survey

TRAIN, HELD_OUT = "train", "held_out"

MOST = 2.0
"""A bag is held out whole when it has between one and so many times the share that is asked for."""


CLOCK_SET_NS = 10**18
"""Times of recording before it (September 2001) are of a clock that was never set, or of a simulation: those of two
bags tell nothing of one another."""


@dataclass(frozen=True)
class ScenePlan:
    """One scene: its number, split, the number of its bag, and its frames by their stamps."""

    scene_id: int
    split: str
    bag: int
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class Plan:
    """All scenes, and per bag how many frames the guard and max_frames left out; `by` is "bag", "block" or ""."""

    scenes: tuple[ScenePlan, ...]
    guarded: tuple[int, ...]
    beyond_limit: tuple[int, ...]
    by: str


@dataclass
class _Block:
    bag: int
    start_ns: int
    end_ns: int
    frames: list[Frame]
    split: str = TRAIN


def make_plan(surveys: Sequence[Survey], options: BagOptions) -> Plan:
    """Cut the frames of all bags into scenes; BagError when they are too short to hold the share out.

    It depends on the surveys and options only, so that every process, and a call after a kill, makes the same.
    """
    held_bag = _bag_to_hold_out([len(survey.frames) for survey in surveys], options.held_out)
    by_block = options.held_out > 0 and held_bag is None
    blocks = [b for n, survey in enumerate(surveys) for b in _blocks(n, survey, _block_ns(surveys, options, by_block))]
    if held_bag is not None:
        for block in blocks:
            block.split = HELD_OUT if block.bag == held_bag else TRAIN
    elif by_block:
        _hold_out(blocks, options.held_out)
    guarded = _guard(blocks, round(options.guard_s * 1e9), len(surveys))
    split = held_bag is not None or (by_block and any(survey.frames for survey in surveys))
    if split and _splits(blocks) != {TRAIN, HELD_OUT}:
        raise BagError(_too_short(surveys, options))
    beyond = _limit(blocks, options.max_frames, len(surveys))
    if split and _splits(blocks) != {TRAIN, HELD_OUT}:
        raise BagError(
            f"max_frames: of {options.max_frames} frames none is left to train on, or none to hold out; give more, or "
            "set held_out=0."
        )
    kept = [(block, frames) for block in blocks for frames in _stretches(block.frames)]
    scenes = tuple(ScenePlan(n, block.split, block.bag, tuple(frames)) for n, (block, frames) in enumerate(kept))
    return Plan(scenes, tuple(guarded), tuple(beyond), "bag" if held_bag is not None else "block" if by_block else "")


def _too_short(surveys: Sequence[Survey], options: BagOptions) -> str:
    """Return the sentence for bags that cannot be split by time."""
    frames, seconds = sum(len(s.frames) for s in surveys), sum(s.duration_ns for s in surveys) / 1e9
    thinned = sum(survey.thinned for survey in surveys)
    still = f"{thinned} more look like the one before: move the camera or the part, or lower min_change; "
    still = still if thinned > 0 else ""
    return (
        f"{', '.join(s.bag for s in surveys)}: {frames} frames in {seconds:.1f} s are too few to hold out a share of "
        f"{options.held_out:g} with {options.guard_s:g} s between it and the rest; {still}give a longer bag or "
        "several, lower guard_s, or set held_out=0."
    )


def _splits(blocks: Sequence[_Block]) -> set[str]:
    return {block.split for block in blocks if block.frames}


def _bag_to_hold_out(counts: list[int], share: float) -> int | None:
    """Return the smallest bag that is enough and not far too much; None where there is none."""
    total = sum(counts)
    fitting = [n for n, count in enumerate(counts) if share * total <= count <= MOST * share * total and count < total]
    return min(fitting, key=lambda n: counts[n]) if share > 0 and fitting else None


def _block_ns(surveys: Sequence[Survey], options: BagOptions, by_block: bool) -> int:
    """Return the longest block: short enough that one is about the share of all."""
    longest = options.block_s * 1e9
    if by_block:
        longest = min(longest, sum(s.duration_ns for s in surveys) * min(options.held_out, 1 - options.held_out))
    return max(1, round(longest))


def _blocks(bag: int, survey: Survey, longest_ns: int) -> list[_Block]:
    """Cut every segment of a bag into equal blocks of about ``longest_ns``."""
    out: list[_Block] = []
    for segment in sorted({frame.segment for frame in survey.frames}):
        frames = [frame for frame in survey.frames if frame.segment == segment]
        start, end = frames[0].elapsed_ns, frames[-1].elapsed_ns + 1
        count = min(len(frames), max(1, round((end - start) / longest_ns)))
        edges = [start + (end - start) * n // count for n in range(count + 1)]
        blocks = [_Block(bag, a, b, []) for a, b in zip(edges, edges[1:], strict=False)]
        for frame in frames:
            blocks[int(np.searchsorted(edges, frame.elapsed_ns, side="right")) - 1].frames.append(frame)
        out += [block for block in blocks if block.frames]
    return out


def _stretches(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Cut frames where the camera's clock was set back, and put each piece in the order of its stamps.

    So what is near by its stamps in a piece was near in time. It is done last: a stamp that jumps to and fro must not
    decide what is held out. A stamp of 0 is a driver's that sets none.
    """
    out: list[list[Frame]] = []
    newest = 0
    for frame in frames:
        if not out or 0 < frame.stamp_ns < newest - TOLERANCE_NS:
            out.append([])
            newest = 0
        newest = max(newest, frame.stamp_ns)
        out[-1].append(frame)
    return [sorted(piece, key=lambda frame: frame.stamp_ns) for piece in out]


def _hold_out(blocks: list[_Block], share: float) -> None:
    """Hold out blocks, evenly spread, until they have the share of all frames."""
    debt = 0.0
    for block in blocks:
        debt += share * len(block.frames)
        if debt >= 0.5 * len(block.frames):
            block.split = HELD_OUT
            debt -= len(block.frames)
    if len(blocks) > 1:
        if all(block.split == TRAIN for block in blocks):
            min(blocks, key=lambda block: len(block.frames)).split = HELD_OUT
        elif all(block.split == HELD_OUT for block in blocks):
            min(blocks, key=lambda block: len(block.frames)).split = TRAIN


def _guard(blocks: list[_Block], guard_ns: int, bags: int) -> list[int]:
    """Take away the training frames that are too near to a held-out block, and return how many of each bag.

    Within a bag by the time that passed, between bags by the times of recording: the files of one recording, given one
    by one, follow each other at once.
    """
    out = [0] * bags
    held = [block for block in blocks if block.split == HELD_OUT]
    elsewhere = [sorted(f.entry[0] for h in held if h.bag != bag for f in h.frames) for bag in range(bags)]
    for block in blocks:
        if block.split == HELD_OUT:
            continue
        near = [(h.frames[0].elapsed_ns, h.frames[-1].elapsed_ns) for h in held if h.bag == block.bag]
        kept = [f for f in block.frames if not any(a - guard_ns < f.elapsed_ns < b + guard_ns for a, b in near)]
        kept = [f for f in kept if not _near(f.entry[0], elsewhere[block.bag], guard_ns)]
        out[block.bag] += len(block.frames) - len(kept)
        block.frames = kept
    return out


def _near(at_ns: int, times_ns: Sequence[int], guard_ns: int) -> bool:
    """Return whether one of the sorted times is nearer than the guard; a clock that was not set is near to nothing."""
    place = bisect_left(times_ns, at_ns)
    return at_ns > CLOCK_SET_NS and any(abs(at_ns - t) < guard_ns for t in times_ns[max(0, place - 1) : place + 1])


def _limit(blocks: list[_Block], most: int, bags: int) -> list[int]:
    """Keep at most ``most`` frames of all, evenly spread, and return how many of each bag were left out."""
    out = [0] * bags
    total = sum(len(block.frames) for block in blocks)
    if not 0 < most < total:
        return out
    chosen = {(2 * n + 1) * total // (2 * most) for n in range(most)}
    number = 0
    for block in blocks:
        kept = [frame for place, frame in enumerate(block.frames, number) if place in chosen]
        number += len(block.frames)
        out[block.bag] += len(block.frames) - len(kept)
        block.frames = kept
    return out
