# SPDX-License-Identifier: Apache-2.0
"""Is one model better than another on the same images? Paired differences, and how far chance alone may move them.

Two reports of `ukd evaluate` are compared target by target. Neighbouring frames resemble each other, so blocks of
images are drawn again, not targets (cluster bootstrap; Efron and Tibshirani 1993). The interval is about other images
like these. It says nothing of another training run of the same recipe: that takes several seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ukd_ros.distillation.protocol import AUC_LIMIT
from ukd_ros.geometry.arrays import FloatArray

METRICS = ("found", "ADD(-S)-0.1d", "AUC 0.1 m")


class CompareError(ValueError):
    """Reports that cannot be read, or that are not about the same targets."""


@dataclass(frozen=True)
class CompareConfig:
    """How two reports are compared.

    `block`: images in order that are drawn together (1: every image for itself). `resamples`: of the bootstrap.
    `level`: of the interval, 0..1. `seed`: of the draws.
    """

    block: int = 10
    resamples: int = 4000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what gives no interval."""
        for name in ("block", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"compare.{name}: must be at least 1, not {getattr(self, name)}")
        if not 0.0 < self.level < 1.0:
            raise ValueError(f"compare.level: must be inside 0..1, not {self.level}")


@dataclass(frozen=True)
class Difference:
    """Shares 0..1 of all targets before and after, and the interval in which their difference lies."""

    metric: str
    before: float
    after: float
    low: float
    high: float

    @property
    def change(self) -> float:
        """Return after less before."""
        return self.after - self.before


@dataclass(frozen=True)
class Comparison:
    """What `compare_reports` found: the targets, the blocks of images that they stand in, a difference per metric."""

    targets: int
    blocks: int
    level: float
    differences: tuple[Difference, ...]

    def table(self) -> str:
        """Return the comparison as text."""
        head = f"{'':14s} {'before':>7s} {'after':>7s} {'change':>7s}   {100 * self.level:g} % interval"
        rows = [
            f"{d.metric:14s} {100 * d.before:7.1f} {100 * d.after:7.1f} {100 * d.change:+7.1f}   "
            f"{100 * d.low:+.1f} to {100 * d.high:+.1f}"
            for d in self.differences
        ]
        drawn = f"{self.blocks} blocks of images drawn again"
        said = f"in % of {self.targets} targets; {drawn}; nothing is said of other seeds"
        return "\n".join([head, *rows, said])


def compare_reports(before: Path, after: Path, config: CompareConfig) -> Comparison:
    """Compare two reports (report.json, or the folder with it) of `ukd evaluate` on the same targets.

    AUC is that of the targets' own errors (a target that was not found adds none). CompareError when a report cannot
    be read, or when they are about other targets.
    """
    old, new = _targets(before), _targets(after)
    _require_same(before, old, after, new)
    values = np.stack([_values(new, after), _values(old, before)], axis=1)  # [targets, 2, metrics]
    block = _blocks(old, config.block)
    count = int(block.max()) + 1
    sums = np.zeros((count, *values.shape[1:]))
    np.add.at(sums, block, values)
    sizes = np.bincount(block, minlength=count).astype(np.float64)
    drawn = np.random.default_rng(config.seed).multinomial(count, np.full(count, 1.0 / count), config.resamples)
    changes = (drawn @ (sums[:, 0] - sums[:, 1])) / (drawn @ sizes)[:, None]
    tail = 50.0 * (1.0 - config.level)
    low, high = np.percentile(changes, [tail, 100.0 - tail], axis=0)
    shares = values.mean(axis=0)
    differences = [
        Difference(name, float(shares[1, i]), float(shares[0, i]), float(low[i]), float(high[i]))
        for i, name in enumerate(METRICS)
    ]
    return Comparison(len(old), count, config.level, tuple(differences))


def _targets(path: Path) -> list[Mapping[str, Any]]:
    """Return the targets of a report."""
    file = path / "report.json" if path.is_dir() else path
    try:
        targets = json.loads(file.read_text(encoding="utf-8"))["targets"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompareError(f"{file}: is no report of ukd evaluate ({error})") from error
    if not isinstance(targets, list) or not targets or not all(isinstance(item, dict) for item in targets):
        raise CompareError(f"{file}: has no targets; evaluate on labelled images first")
    return targets


def _require_same(before: Path, old: Sequence[Any], after: Path, new: Sequence[Any]) -> None:
    if len(old) != len(new):
        raise CompareError(
            f"{before} has {len(old)} targets and {after} has {len(new)}: evaluate both on the same images and objects"
        )
    for number, (one, other) in enumerate(zip(old, new, strict=True)):
        for key in ("image_id", "object", "visible"):
            if one.get(key) != other.get(key):
                raise CompareError(
                    f"target {number}: {key} is {one.get(key)} in {before} and {other.get(key)} in {after}: "
                    "evaluate both on the same images and objects"
                )


def _values(targets: Sequence[Mapping[str, Any]], path: Path) -> FloatArray:
    """Return what each target counts, [targets, metrics]."""
    rows = []
    for number, item in enumerate(targets):
        try:
            away = item["add_m"]
            near = 0.0 if away is None else max(0.0, 1.0 - float(away) / AUC_LIMIT)
            rows.append((float(item["missed"] == ""), float(bool(item["correct"])), near))
        except (KeyError, TypeError, ValueError) as error:
            raise CompareError(f"{path}: target {number} is none of ukd evaluate's ({error})") from error
    return np.asarray(rows, dtype=np.float64)


def _blocks(targets: Sequence[Mapping[str, Any]], size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the block of each target; images in the order of the report."""
    images: dict[Any, int] = {}
    return np.array([images.setdefault(item["image_id"], len(images)) // size for item in targets], dtype=np.int64)
