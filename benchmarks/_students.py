# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of students share: what is measured of one, and how rows of seeds become a table."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = {
    "add": "ADD(-S)-0.1d %",
    "auc": "AUC %",
    "mspd": "AR MSPD %",
    "px": "keypoints px",
    "kp_nll": "keypoint NLL",
    "pose_nll": "pose NLL",
    "nees": "NEES",
    "coverage": "95 % coverage",
    "sharpness": "predicted sigma z, mm",
}
HIGHER = ("add", "auc", "mspd")


def measured(text: str) -> tuple[str, Path, tuple[int, int] | None, str]:
    """Return name, folder, image ids and crops of NAME=DIR[:FIRST-LAST][@oracle]."""
    found = re.fullmatch(r"(\w+)=(.+?)(?::(\d+)-(\d+))?(@oracle)?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR, NAME=DIR:FIRST-LAST or either with @oracle")
    name, folder, first, last, oracle = found.groups()
    ids = None if first is None else (int(first), int(last))
    return name, Path(folder), ids, "oracle" if oracle else "estimator"


def numbers(report: Any) -> dict[str, float | None]:
    """Return the columns of one evaluation."""
    score, joint, points = report.overall, report.checks.get("joint"), report.keypoints
    found: dict[str, float | None] = {
        "targets": score.targets,
        "add": 100 * score.add_recall,
        "auc": 100 * score.add_auc,
        "mspd": 100 * score.ar_mspd,
        "px": score.keypoint_px,
        "detection": 100 * score.detection_rate,
        "kp_nll": None if points is None else points.nll,
    }
    if joint is not None:
        found |= {"pose_nll": joint.nll, "nees": joint.nees, "coverage": 100 * joint.coverage["pose"][0.95]}
        found["sharpness"] = joint.sigma_z_mm
    return found


def summarised(rows: list[dict[str, Any]], plain: str, data: str) -> list[dict[str, Any]]:
    """Return per row the mean of every column, its standard error, and the paired difference to the plain row.

    Differences are between students of the same seed; the interval is ±1 standard error of their mean.
    """
    base = {r["seed"]: r[data] for r in rows if r["row"] == plain}
    out = []
    for name in dict.fromkeys(r["row"] for r in rows):
        mine = [r for r in rows if r["row"] == name]
        entry: dict[str, Any] = {"row": name, "seeds": len(mine)}
        for column in COLUMNS:
            values = np.array([_value(r[data], column) for r in mine])
            paired = [_value(r[data], column) - _value(base[r["seed"]], column) for r in mine if r["seed"] in base]
            entry[column] = [*_mean(values), *_mean(np.array(paired))]
        out.append(entry)
    return out


def _value(numbers: dict[str, Any], column: str) -> float:
    value = numbers.get(column)
    return math.nan if value is None else float(value)


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """Return mean and standard error (NaN for one value)."""
    if len(values) == 0:
        return math.nan, math.nan
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error


def as_table(entries: list[dict[str, Any]]) -> str:
    """Return the summary as Markdown: mean ± standard error (difference to the plain student ± its error)."""
    lines = ["| row | seeds | " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * (len(COLUMNS) + 2)]
    for entry in entries:
        cells = [entry["row"], str(entry["seeds"])]
        for column in COLUMNS:
            mean, error, difference, uncertainty = entry[column]
            text = f"{mean:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
            if not math.isnan(difference) and difference != 0.0:
                text += f" ({difference:+.2f}" + ("" if math.isnan(uncertainty) else f" ± {uncertainty:.2f}") + ")"
            cells.append(text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(entries: list[dict[str, Any]], title: str, out: Path) -> None:
    """Draw the paired differences of three columns, a bar per row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = ("auc", "mspd", "kp_nll")
    figure = Figure(figsize=(13, 0.5 + 0.32 * len(entries)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shown), sharey=True)
    names = [entry["row"] for entry in entries][::-1]
    for panel, column in zip(panels, shown, strict=True):
        values = np.array([entry[column][2] for entry in entries][::-1])
        errors = np.nan_to_num(np.array([entry[column][3] for entry in entries][::-1]))
        better = values > 0 if column in HIGHER else values < 0
        panel.barh(names, values, xerr=errors, color=np.where(better, "tab:green", "tab:red"), alpha=0.8)
        panel.axvline(0.0, color="black", linewidth=0.8)
        panel.set_title(f"{COLUMNS[column]}: difference to undistilled")
        panel.grid(alpha=0.3, axis="x")
    figure.suptitle(title)
    figure.savefig(out, dpi=80)
