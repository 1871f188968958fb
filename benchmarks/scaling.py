# SPDX-License-Identifier: Apache-2.0
"""Accuracy against training samples: every checkpoint that a run kept, calibrated and evaluated alike.

Train with `keep_every` first. A checkpoint in the middle of the schedule still has a high learning rate, so it is worse
than a run that ended there. What is done is kept in RUN/scaling, so an interrupted call goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _measuring import machine, table, write  # noqa: E402

OPEN = {"max_sigma_position": 100.0, "max_sigma_rotation_deg": 1000.0, "max_ambiguity": 1.0}
"""The gates on uncertainty are open; that of the score and the solver's own stay as they are."""


def _data(text: str) -> tuple[str, Path, tuple[int, int] | None]:
    """Return name, folder and image ids of NAME=DIR or NAME=DIR:FIRST-LAST."""
    found = re.fullmatch(r"(\w+)=(.+?)(?::(\d+)-(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR or NAME=DIR:FIRST-LAST")
    name, folder, first, last = found.groups()
    return name, Path(folder), None if first is None else (int(first), int(last))


def _renamed(text: str) -> tuple[int, str]:
    number, _, name = text.partition("=")
    if not number.isdigit() or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=NAME")
    return int(number), name


def checkpoints(run: Path) -> list[Path]:
    """Return the kept checkpoints of a run, oldest first, the last one being the end of the run."""
    kept = sorted(run.glob("step-*.pt"))
    return [*kept, run / "checkpoint.pt"] if (run / "checkpoint.pt").is_file() else kept


def key(step: int, options: argparse.Namespace) -> str:
    """Return the name under which a checkpoint's result is kept: another question has another name."""
    asked = [step, options.calibrate, options.calibrate_limit, options.data, options.name, OPEN]
    return f"{step:06d}-{hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:12]}"


def measure(checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Export, calibrate and evaluate one checkpoint."""
    from ukd_ros.distillation.calibrate import CalibrationOptions, calibrate_model
    from ukd_ros.distillation.checkpoint import load_checkpoint
    from ukd_ros.distillation.evaluate import EvaluationOptions, evaluate_model
    from ukd_ros.distillation.export import export_checkpoint
    from ukd_ros.perception.estimator import EstimatorOptions

    content = load_checkpoint(checkpoint)
    result: dict[str, Any] = {"step": content.step, "samples": content.step * content.config["batch_size"]}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "student"
        export_checkpoint(checkpoint, model)
        calibrate_model(
            model,
            options.calibrate,
            options.calibrate_limit or None,
            None,
            "auto",
            False,
            options=CalibrationOptions(),
        )
        gates = EstimatorOptions(**OPEN)  # type: ignore[arg-type]
        for name, data, ids in options.data:
            settings = EvaluationOptions(ids=ids, estimator=gates)
            score = evaluate_model(model, data, settings, names=dict(options.name), progress=True).overall
            result[name] = {
                "targets": score.targets,
                "add_recall": score.add_recall,
                "detection_rate": score.detection_rate,
                "keypoint_px": score.keypoint_px,
                "translation_mm": score.translation_mm,
            }
    return result


def draw(rows: list[dict[str, Any]], names: list[str], out: Path) -> None:
    """Draw accuracy and keypoint error against samples, a line per data set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    samples = [row["samples"] / 1000 for row in rows]
    for name in names:
        left.plot(samples, [100 * row[name]["add_recall"] for row in rows], "o-", label=name)
        right.plot(samples, [row[name]["keypoint_px"] for row in rows], "o-", label=name)
    left.set(xlabel="training windows, thousands", ylabel="ADD(-S)-0.1d, %, gates open", ylim=(0, None))
    right.set(xlabel="training windows, thousands", ylabel="median keypoint error, px of the image", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=90)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write results/scaling_RUN.json and the picture beside it."""
    parser = argparse.ArgumentParser(prog="ukd bench scaling", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a training run with kept checkpoints")
    parser.add_argument("--calibrate", type=Path, required=True, help="labelled data that the run did not see")
    parser.add_argument("--calibrate-limit", type=int, default=120, help="images of it (default %(default)s)")
    parser.add_argument("--data", type=_data, action="append", required=True, metavar="NAME=DIR[:FIRST-LAST]")
    parser.add_argument("--name", type=_renamed, action="append", default=[], metavar="ID=NAME")
    options = parser.parse_args(arguments)
    from ukd_ros.distillation.checkpoint import load_checkpoint

    found = checkpoints(options.run)
    if not found:
        parser.error(f"{options.run}: holds no checkpoint; train with keep_every")
    cache = options.run / "scaling"
    cache.mkdir(exist_ok=True)
    results: dict[int, dict[str, Any]] = {}
    for checkpoint in found:
        step = load_checkpoint(checkpoint).step
        kept = cache / f"{key(step, options)}.json"
        if not kept.is_file():
            row = measure(checkpoint, options)
            temporary = kept.with_suffix(".new")
            temporary.write_text(json.dumps(row) + "\n", encoding="utf-8")
            os.replace(temporary, kept)
        results[step] = json.loads(kept.read_text(encoding="utf-8"))
    rows = [results[step] for step in sorted(results)]
    names = [name for name, _, _ in options.data]
    name = f"scaling_{options.run.name}"
    path = write(name, {"machine": machine(), "run": options.run.name, "gates": OPEN, "rows": rows})
    draw(rows, names, path.with_suffix(".png"))
    lines = []
    for row in rows:
        shares = ", ".join(f"{n} {100 * row[n]['add_recall']:.1f} %" for n in names)
        lines.append((f"{row['samples']:,} windows", shares, ""))
    sys.stdout.write(table(lines, {"warning": ""}) + f"\nwritten: {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
