# SPDX-License-Identifier: Apache-2.0
"""Nominal against measured coverage of pose covariances, as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ukd_ros.distillation.error_model import PARTS
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.metrics import coverage

_COLOURS = ("tab:blue", "tab:orange", "tab:gray", "tab:green")


def draw_reliability(squares: Mapping[str, Mapping[str, FloatArray]], title: str, out: Path) -> None:
    """Draw one panel per part of the pose: measured over nominal coverage, a line per variant; PNG, by rename.

    squares: variant -> part (the keys of PARTS) -> NEES [n]. The grey band is where 99 % of perfectly calibrated
    estimators of the first variant's sample size would lie (binomial, per level).
    """
    levels = np.concatenate([np.linspace(0.05, 0.95, 19), [0.97, 0.99]])
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    count = len(next(iter(squares.values()))["pose"])
    spread = 2.58 * np.sqrt(levels * (1.0 - levels) / count)
    for panel, (part, where) in zip(figure.subplots(1, len(PARTS), sharey=True), PARTS.items(), strict=True):
        dof = where.stop - where.start
        panel.fill_between(levels, levels - spread, levels + spread, color="0.85", label="99 % of perfect ones")
        panel.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
        for colour, (variant, values) in zip(_COLOURS, squares.items(), strict=False):
            measured = [coverage(values[part], dof, float(level)) for level in levels]
            at95 = coverage(values[part], dof, 0.95)
            label = f"{variant.replace('_', ' ')}: {100 * at95:.1f} % at 95"
            panel.plot(levels, measured, ".-", color=colour, markersize=4, label=label)
        panel.set_title(part)
        panel.set_xlabel("nominal coverage")
        panel.set_xlim(0, 1)
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.stem}.{os.getpid()}.png")
    figure.savefig(temporary, dpi=100)
    os.replace(temporary, out)
