# SPDX-License-Identifier: Apache-2.0
"""What distilling buys: one student per row and seed, same windows, same schedule, and the difference to the plain one.

The rows stand in a YAML file: `objects`, `distill` (settings of `ukd distill` that all share), `rows` (name: `plain`
for a student without teachers, `set` for settings of its own, `corrupt` for teachers made wrong on purpose) and
`seeds`. All students see the same windows in the same order and differ by their seed, so differences are paired. What
is done is kept in OUT, so an interrupted call goes on, and --workers of them share the decoded views.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from _measuring import machine, write  # noqa: E402
from _students import as_table, draw, measured, numbers, summarised  # noqa: E402
from scaling import OPEN, _renamed  # noqa: E402


@dataclass(frozen=True)
class Corruption:
    """Teachers made wrong on `objects`: every keypoint of every window is off by `sigma_px` (standard deviation).

    `uncertain`: they know it, and their members differ by as much; otherwise they are wrong and certain.
    """

    objects: tuple[str, ...]
    sigma_px: float = 12.0
    uncertain: bool = True


@dataclass(frozen=True)
class Row:
    """One way to train: without teachers (`plain`), or with settings of its own; `seeds` over those of the file."""

    plain: bool = False
    set: tuple[str, ...] = ()
    corrupt: Corruption | None = None
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Table:
    """The file."""

    objects: tuple[str, ...]
    distill: str
    rows: dict[str, Row]
    set: tuple[str, ...] = ()
    seeds: tuple[int, ...] = field(default=(0,))

    def __post_init__(self) -> None:
        """Refuse a table without the row that all are compared with."""
        if not any(row.plain for row in self.rows.values()):
            raise ValueError("rows: one must be plain, the student without teachers that the others are compared with.")


def corruption(row: Row, names: Sequence[str]) -> Callable[[Any, Sequence[int]], Any] | None:
    """Return what makes the teachers of a row wrong; the same window is always wrong by the same."""
    wrong = row.corrupt
    if wrong is None:
        return None
    classes = [list(names).index(name) for name in wrong.objects]

    def heard(said: Any, numbers: Sequence[int]) -> Any:
        xy, spread = said.xy.copy(), said.spread.copy()
        for i in np.flatnonzero(np.isin(said.class_index, classes)):
            number = numbers[int(said.window[i])]
            rng = np.random.default_rng((int(number), int(said.class_index[i]), 7))
            xy[i] += wrong.sigma_px * rng.normal(size=(1, *xy.shape[2:]))
            if wrong.uncertain:
                spread[i] += np.float32(wrong.sigma_px**2) * np.array([1, 0, 1], np.float32)
        return replace(said, xy=xy.astype(np.float32), spread=spread)

    return heard


class Bench:
    """What all rows share; the views are decoded once."""

    def __init__(self, table: Table, options: argparse.Namespace) -> None:
        self.table, self.options = table, options
        self._opened: dict[str, Any] = {}

    def config(self, row: Row, seed: int) -> Any:
        """Return the settings of one run."""
        from ukd_ros.config import load_config
        from ukd_ros.distillation.distill import DistillConfig

        words = [*self.table.set, *self.options.set, *row.set, f"seed={seed}"]
        last = {word.partition("=")[0]: word for word in words}  # a row's own over what all share
        return load_config(DistillConfig, self.options.config.parent / self.table.distill, list(last.values()))

    def open(self, config: Any) -> tuple[Any, Any]:
        """Return windows and models."""
        from ukd_ros.distillation.folders import open_folders

        if "data" not in self._opened:
            self._opened["data"] = open_folders(
                config, self.options.dataset, objects=self.table.objects, seed=config.window_seed
            )[:2]
        return tuple(self._opened["data"])

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Train and measure one student; the result is kept."""
        row = self.table.rows[name]
        config = self.config(row, seed)
        folder = self.options.out / f"{name}-{seed}-{self._key(config, row)}"
        kept = folder / "row.json"
        if kept.is_file():
            return dict(json.loads(kept.read_text(encoding="utf-8")))
        started = time.monotonic()
        result = self._train(config, row, folder)
        found: dict[str, Any] = {"row": name, "seed": seed, "samples": config.steps * config.batch_size}
        found |= {"train_s": time.monotonic() - started, **self._measure(result)}
        temporary = kept.with_suffix(".new")
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, kept)
        return found

    def _key(self, config: Any, row: Row) -> str:
        from ukd_ros.config import to_mapping

        o = self.options
        # not the seeds of the row: one more of them is no other question
        asked = [
            to_mapping(config),
            to_mapping(replace(row, seeds=())),
            self.table.objects,
            o.dataset,
            o.calibrate,
            o.data,
            o.name,
            OPEN,
        ]
        if not row.plain:
            asked.append(self._teachers())
        return hashlib.sha256(json.dumps(asked, default=str, sort_keys=True).encode()).hexdigest()[:10]

    def _teachers(self) -> list[str]:
        """Return the digests of the teachers' files."""
        from ukd_ros.distillation.teacher import member_files

        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in member_files(self.options.teacher)]

    def _train(self, config: Any, row: Row, folder: Path) -> Path:
        """Train one student and return its checkpoint."""
        from ukd_ros.distillation.device import train_device
        from ukd_ros.distillation.distill import Repeated, distill
        from ukd_ros.distillation.parallel import Processes
        from ukd_ros.distillation.teacher import Ensemble, member_files
        from ukd_ros.distillation.teacher_cache import open_cache
        from ukd_ros.distillation.train import train

        data, models = self.open(config)
        if row.plain:
            windows = Repeated(data, config.window_count)
            return train(config, windows, models, folder, resume=True).checkpoint
        files = member_files(self.options.teacher)
        files = files[:1] if config.single_teacher else files
        device = train_device(config, Processes())
        ensemble = Ensemble.load(files, models, config.window.size, device, single=config.single_teacher)
        cache = self.options.out / f"teachers-{ensemble.identity[:8]}-{config.guide.votes}"
        # with features, whether this row needs them or not: one cache serves all rows
        open_cache(cache, ensemble, data, config.window_count, positives=config.positives, votes=config.guide.votes,
                   features=True)  # fmt: skip
        heard = corruption(row, self.table.objects)
        return distill(config, ensemble, data, models, folder, cache=cache, heard=heard, resume=True).checkpoint

    def _measure(self, checkpoint: Path) -> dict[str, Any]:
        """Export, calibrate and evaluate."""
        from ukd_ros.distillation.calibrate import CalibrationOptions, calibrate_model
        from ukd_ros.distillation.evaluate import EvaluationOptions, evaluate_model
        from ukd_ros.distillation.export import export_checkpoint
        from ukd_ros.perception.estimator import EstimatorOptions

        found: dict[str, Any] = {}
        o = self.options
        with tempfile.TemporaryDirectory() as place:
            student = Path(place) / "student"
            export_checkpoint(checkpoint, student)
            try:
                calibrate_model(
                    student, o.calibrate, o.calibrate_limit, None, "auto", False, options=CalibrationOptions()
                )
            except ValueError as error:  # a student that has learnt too little: its error bars are the network's own
                found["uncalibrated"] = str(error)
            for name, data, ids, crops in o.data:
                gates = EstimatorOptions(**OPEN)
                settings = EvaluationOptions(ids=ids, crops=crops, estimator=gates)
                report = evaluate_model(student, data, settings, names=dict(o.name))
                found[name] = numbers(report)
        return found


def _fork(bench: Bench, wanted: list[tuple[str, int]], workers: int) -> None:
    """Do the runs in processes forked after the views are decoded; ChildProcessError when one failed."""
    import cv2

    cv2.setNumThreads(1)  # a fork does not copy OpenCV's threads, and would wait for them
    name, seed = wanted[0]
    bench.open(bench.config(bench.table.rows[name], seed))
    context = multiprocessing.get_context("fork")
    turn = context.Value("i", 0)
    children = [context.Process(target=_run_all, args=(bench, wanted, turn)) for _ in range(workers)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    if any(child.exitcode for child in children):
        raise ChildProcessError("a worker failed; its message is above, and a second call goes on where it stopped")


def _run_all(bench: Bench, wanted: list[tuple[str, int]], turn: Any) -> None:
    """Do the next run that no other worker has taken, until there is none."""
    while True:
        with turn.get_lock():
            number = turn.value
            turn.value += 1
        if number >= len(wanted):
            return
        bench.run(*wanted[number])


def main(arguments: list[str] | None = None) -> int:
    """Train and measure; print the tables and write results/distillation_NAME.json and .png."""
    from ukd_ros.config import load_config

    parser = argparse.ArgumentParser(prog="ukd bench distillation", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the rows")
    parser.add_argument("--teacher", type=Path, action="append", required=True, help="run of a teacher; again for more")
    parser.add_argument("--dataset", type=Path, action="append", required=True, help="BOP folder to train on")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the teachers' answers")
    parser.add_argument("--calibrate", type=Path, required=True, help="labelled data that no run sees")
    parser.add_argument("--calibrate-limit", type=int, default=80, help="images of it (default %(default)s)")
    parser.add_argument(
        "--data", type=measured, action="append", required=True, metavar="NAME=DIR[:FIRST-LAST][@oracle]"
    )
    parser.add_argument("--name", type=_renamed, action="append", default=[], metavar="ID=NAME")
    words = "settings over those that all rows share"
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=words)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows only")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes, which share the decoded views")
    options = parser.parse_args(arguments)
    table = load_config(Table, options.config)
    unknown = set(options.only or ()) - set(table.rows)
    if unknown:
        parser.error(f"{options.config}: has no rows {', '.join(sorted(unknown))}; it has {', '.join(table.rows)}")
    wanted = [(name, seed) for name, row in table.rows.items() for seed in row.seeds or table.seeds]
    wanted = [(name, seed) for name, seed in wanted if options.only is None or name in options.only]
    wanted.sort(key=lambda run: run[1])  # every row once comes first
    bench = Bench(table, options)
    if options.workers > 1:
        _fork(bench, wanted, options.workers)
    rows = [bench.run(name, seed) for name, seed in wanted]
    if options.only is not None:
        return 0
    plain = next(name for name, row in table.rows.items() if row.plain)
    summary = {name: summarised(rows, plain, name) for name, _, _, _ in options.data}
    title = f"distillation_{options.config.stem}"
    path = write(title, {"machine": machine(), "gates": OPEN, "rows": rows, "summary": summary})
    for name, entries in summary.items():
        sys.stdout.write(f"\n{name}\n\n{as_table(entries)}")
        draw(entries, name, path.with_name(f"{title}_{name}.png"))
    sys.stdout.write(f"written: {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
