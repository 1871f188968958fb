# SPDX-License-Identifier: Apache-2.0
"""What a bag without labels is worth: students adapted on it beside the same students without it, seed by seed.

Of one seed every student starts from the same weights (--initial), takes the same number of steps beside the same
teachers, and is calibrated on the same renders; `unadapted` sees renders alone, the other rows of the YAML file
(`FromBagsConfig` settings over the file's own) also the bag. The bag is made from a BOP folder whose labels are kept
back; where they are known, accepted labels are compared with them. What is done is kept in OUT, so an interrupted call
goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from _measuring import machine, write  # noqa: E402
from _students import as_table, draw, measured, numbers, summarised  # noqa: E402
from scaling import OPEN, _renamed  # noqa: E402

UNADAPTED = "unadapted"
RATE_HZ = 1.0
"""Of the bag that is made: photographs of one sequence, with gaps."""


@dataclass(frozen=True)
class Row:
    """One way to use the bag: settings of `FromBagsConfig` over those of the file."""

    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """The file: `from_bags` names the settings that all rows share (a file beside it), `set` some over them."""

    objects: tuple[str, ...]
    from_bags: str
    rows: dict[str, Row]
    set: tuple[str, ...] = ()


class Bench:
    """What all runs share."""

    def __init__(self, table: Table, options: argparse.Namespace) -> None:
        self.table, self.options = table, options

    def config(self, row: Row, seed: int) -> Any:
        """Return the settings of one run."""
        from ukd_ros.config import load_config
        from ukd_ros.distillation.from_bags_request import FromBagsConfig

        words = [*self.table.set, *row.set, *self.options.set, f"distill.seed={seed}"]
        if self.options.initial:
            words.append(f"distill.initial={self.options.initial[seed % len(self.options.initial)]}")
        last = {word.partition("=")[0]: word for word in words}
        return load_config(FromBagsConfig, self.options.config.parent / self.table.from_bags, list(last.values()))

    def bag(self) -> Path:
        """Return the bag of the unlabelled photographs."""
        from ukd_ros.data.bop import BopDataset
        from ukd_ros.data.rosbag.from_bop import bag_from_bop

        _, folder, ids, _ = self.options.unlabelled
        path: Path = self.options.out / "bag"
        if not path.exists():
            first, last = ids or (0, 2**62)
            chosen = [i.image_id for i in BopDataset(folder).images if first <= i.image_id < last]
            bag_from_bop(folder, path, chosen, (), rate_hz=RATE_HZ)
        return path

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Train and measure one student; the result is kept."""
        kept = self.options.out / f"{name}-{seed}" / "row.json"
        if kept.is_file():
            return dict(json.loads(kept.read_text(encoding="utf-8")))
        started = time.monotonic()
        model = self._unadapted(seed) if name == UNADAPTED else self._adapted(name, seed)
        found: dict[str, Any] = {"row": name, "seed": seed, "train_s": time.monotonic() - started}
        for part, data, ids, crops in self.options.data:
            found[part] = self._measure(model, data, ids, crops)
        if name != UNADAPTED:
            found["labels"] = self._labels(name, seed)
        temporary = kept.with_suffix(".new")
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, kept)
        return found

    def _measure(self, model: Path, data: Path, ids: Any, crops: str) -> dict[str, float | None]:
        from ukd_ros.distillation.evaluate import EvaluationOptions, evaluate_model
        from ukd_ros.perception.estimator import EstimatorOptions

        gates = EstimatorOptions(**OPEN, zoom_rounds=self.options.zoom_rounds)
        settings = EvaluationOptions(ids=ids, crops=crops, estimator=gates)
        report = evaluate_model(model, data, settings, names=dict(self.options.name), progress=not self.options.quiet)
        found: dict[str, float | None] = numbers(report)
        return found

    def _unadapted(self, seed: int) -> Path:
        """Distil on renders alone and calibrate."""
        from ukd_ros.distillation.calibrate import calibrate_model
        from ukd_ros.distillation.distill import distill_on_folders
        from ukd_ros.distillation.export import export_checkpoint

        o, config = self.options, self.config(Row(), seed)
        folder = o.out / f"{UNADAPTED}-{seed}"
        result = distill_on_folders(
            config.distill,
            o.teacher,
            o.renders,
            folder / "run",
            objects=self.table.objects,
            cache=o.out / "guidance",
            resume=True,
            progress=not o.quiet,
        )
        model: Path = folder / "model"
        shutil.rmtree(model, ignore_errors=True)
        export_checkpoint(result.checkpoint, model)
        calibrate_model(model, o.held_out, config.calibrate_views, progress=not o.quiet)
        return model

    def _adapted(self, name: str, seed: int) -> Path:
        """Do what `ukd distill --bag` does; frames and labels of an earlier run serve."""
        from ukd_ros.distillation.from_bags import distill_from_bags

        o = self.options
        out = o.out / f"{name}-{seed}"
        for other in sorted(o.out.glob(f"{name}-*/result.json")):
            for part in ("frames", "labels", "teachers", "teachers.json"):
                source, target = other.parent / part, out / part
                if source.exists() and not target.exists():
                    out.mkdir(parents=True, exist_ok=True)
                    copy = shutil.copytree if source.is_dir() else shutil.copyfile
                    copy(source, target)
            break
        return distill_from_bags(
            self.config(self.table.rows[name], seed),
            [self.bag()],
            o.teacher,
            out,
            renders=o.renders,
            held_out=o.held_out,
            objects=self.table.objects,
            progress=not o.quiet,
        ).model

    def _labels(self, name: str, seed: int) -> dict[str, Any]:
        """Compare the accepted labels with the truth that was kept back: how many are right at which probability."""
        from ukd_ros.data.bop import BopDataset
        from ukd_ros.distillation.frames import Frames
        from ukd_ros.geometry.metrics import add
        from ukd_ros.geometry.pose import Pose

        _, folder, ids, _ = self.options.unlabelled
        data = BopDataset(folder, names=dict(self.options.name))
        first, last = ids or (0, 2**62)
        chosen = [i for i, image in enumerate(data.images) if first <= image.image_id < last]
        models = {m: data.object_model(data.object_id(m)) for m in self.table.objects}
        frames = Frames(self.options.out / f"{name}-{seed}" / "frames", "train")
        rows: list[tuple[float, float, str]] = []
        for path in sorted((self.options.out / f"{name}-{seed}" / "labels" / "train").glob("shard-*.json")):
            for row in json.loads(path.read_text(encoding="utf-8"))["labels"]:
                stamp = frames.places[row["frame"]][1]
                index = chosen[round((stamp / 1e9 - 1.0) * RATE_HZ)]
                model = models[self.table.objects[row["class"]]]
                pose = Pose(np.array(row["rotation"]).reshape(3, 3), np.array(row["translation"]))
                points = model.keypoints_3d
                near = [
                    add(pose, label.T_camera_object, points) / model.diameter
                    for label in data.labels(index, masks=False)
                    if label.object_name == model.name
                ]
                rows.append((float(row["probability"]), min(near, default=np.inf), str(row["refused"])))
        accepted = [error < 0.1 for _, error, refused in rows if not refused]
        ordered = sorted((r for r in rows), key=lambda r: -r[0])
        right = np.cumsum([error < 0.1 for _, error, _ in ordered])
        curve = [
            {"accepted": n, "probability": ordered[n - 1][0], "precision": float(right[n - 1] / n)}
            for n in sorted({1, *np.unique(np.geomspace(5, max(5, len(ordered)), 25).astype(int)).tolist()})
            if n <= len(ordered)
        ]
        share = float(np.mean(accepted)) if accepted else None
        return {
            "frames": len(frames),
            "instances": len(rows),
            "accepted": len(accepted),
            "right": share,
            "curve": curve,
        }


def draw_precision(curve: list[dict[str, float]], title: str, out: Path) -> None:
    """Draw how many of the surest labels are right against how many are taken."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    taken = [point["accepted"] for point in curve]
    axes.plot(taken, [100 * point["precision"] for point in curve], ".-", label="right (ADD-0.1d)")
    axes.plot(taken, [100 * point["probability"] for point in curve], "--", label="said of the last one taken")
    axes.set(xlabel="labels taken, the surest first", ylabel="%", ylim=(0, 102), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=80)


def main(arguments: list[str] | None = None) -> int:
    """Train and measure; print the tables and write results/adaptation_NAME.json and pictures."""
    from ukd_ros.config import load_config

    parser = argparse.ArgumentParser(prog="ukd bench adaptation", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the rows")
    parser.add_argument("--teacher", type=Path, action="append", required=True, help="run of a teacher; again for more")
    words = "run that a student starts from, one for each seed: from the same weights seeds would not differ"
    parser.add_argument("--initial", type=Path, nargs="+", default=[], metavar="RUN", help=words)
    parser.add_argument("--renders", type=Path, action="append", required=True, help="BOP folder to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="labelled renders to calibrate on")
    words = "photographs for the bag"
    parser.add_argument("--unlabelled", type=measured, required=True, metavar="NAME=DIR[:FIRST-LAST]", help=words)
    parser.add_argument(
        "--data", type=measured, action="append", required=True, metavar="NAME=DIR[:FIRST-LAST][@oracle]"
    )
    parser.add_argument("--name", type=_renamed, action="append", default=[], metavar="ID=NAME")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows only (unadapted is one)")
    parser.add_argument("--zoom-rounds", type=int, default=3, help="of the evaluation (default %(default)s)")
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args(arguments)
    table = load_config(Table, options.config)
    bench = Bench(table, options)
    options.out.mkdir(parents=True, exist_ok=True)
    names = [UNADAPTED, *table.rows]
    unknown = set(options.only or ()) - set(names)
    if unknown:
        parser.error(f"{options.config}: has no rows {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    wanted = [name for name in names if options.only is None or name in options.only]
    rows = [bench.run(name, seed) for seed in options.seeds for name in wanted]
    if options.only is not None:
        return 0
    title = f"adaptation_{options.config.stem.removeprefix('adaptation_')}"
    summary = {name: summarised(rows, UNADAPTED, name) for name, *_ in options.data}
    path = write(title, {"machine": machine(), "gates": OPEN, "rows": rows, "summary": summary})
    for name, entries in summary.items():
        sys.stdout.write(f"\n{name}\n\n{as_table(entries)}")
        draw(entries, name, path.with_name(f"{title}_{name}.png"))
    labels = next((row["labels"] for row in rows if "labels" in row), None)
    if labels is not None:
        sys.stdout.write(f"\n{json.dumps({k: v for k, v in labels.items() if k != 'curve'})}\n")
        draw_precision(labels["curve"], table.objects[0], path.with_name(f"{title}_precision.png"))
    sys.stdout.write(f"written: {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
