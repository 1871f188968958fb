# SPDX-License-Identifier: Apache-2.0
"""What a training told of itself, line by line, and its curves as a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ukd_ros.data.whole_files import write_bytes


def add_metrics(path: Path, record: dict[str, float]) -> None:
    """Add one JSON line; OSError names the file, and may leave half of the line there."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        error.filename = str(path)  # writing tells of none
        raise


def trim_metrics(path: Path, step: int) -> None:
    """Leave the whole lines up to a step, each step's first: what a run that goes on from there would have told.

    Gone are the line that a full disk cut, and those of steps after the checkpoint that a killed run took. OSError
    leaves the file as it is.
    """
    if not path.is_file():
        return
    told = path.read_bytes()
    kept: list[bytes] = []
    last = 0
    for line in told.splitlines():
        number = _step(line)
        if last < number <= step:
            kept.append(line + b"\n")
            last = number
    if b"".join(kept) != told:
        write_bytes(path, b"".join(kept))


def _step(line: bytes) -> int:
    """Return the step that a line tells of, 0 where it is no whole line."""
    try:
        number = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return 0
    return number if isinstance(number, int) else 0


def draw_curves(metrics: Path, out: Path) -> None:
    """Draw loss terms, errors and learning rate from a metrics.jsonl file as a PNG, whole or not at all."""
    if not metrics.is_file():  # stopped before its first line
        return
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not records:
        return
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    samples = np.array([r["samples"] for r in records])
    told = sorted({name for r in records for name in r if name.startswith("kd_") and name != "kd_scale"})
    for name in ("loss", "focal", "ray", *told):
        values = np.array([r.get(name, np.nan) for r in records], float)
        panels[0].plot(samples, np.where(values > 0, values, np.nan), label=name)
    panels[0].set_yscale("log")
    panels[0].set_title("loss")
    missed = np.array([r["error_px"] for r in records], float)
    panels[1].plot(samples, np.where(missed > 0, missed, np.nan), label="training votes (mean)")
    checked = [r for r in records if "val_px" in r]
    if checked:
        panels[1].plot([r["samples"] for r in checked], [r["val_px"] for r in checked], "o-", label="held out (median)")
    panels[1].set_yscale("log")
    panels[1].set_title("keypoint error, px of the window")
    panels[2].plot(samples, [r["nll"] for r in records], label="scale NLL")
    if any("kd_scale" in r for r in records):
        panels[2].plot(samples, [r.get("kd_scale", np.nan) for r in records], label="kd_scale (fractions of the side)")
    panels[2].set_title("negative log-likelihood of the votes")
    for panel in panels:
        panel.set_xlabel("training windows")
        panel.grid(alpha=0.3)
        panel.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=90, format="png")
    write_bytes(out, picture.getvalue())
