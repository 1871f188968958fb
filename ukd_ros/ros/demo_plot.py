# SPDX-License-Identifier: Apache-2.0
"""One picture of a run, drawn with OpenCV alone: errors beside what the node said of them, and the calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.chi_square import chi2_quantile
from ukd_ros.geometry.metrics import coverage
from ukd_ros.ros.demo_report import LEVEL, Summary

Image = npt.NDArray[np.uint8]
Color = tuple[int, int, int]
FloatArray = npt.NDArray[np.float64]

PANEL = (560, 330)
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 40
INK: Color = (40, 44, 52)
GRID: Color = (226, 228, 232)
BLUE: Color = (45, 105, 205)
ORANGE: Color = (225, 120, 30)
GREY: Color = (150, 154, 162)


@dataclass(frozen=True)
class Axes:
    """The ranges of one panel."""

    x: tuple[float, float]
    y: tuple[float, float]

    def pixel(self, x: FloatArray, y: FloatArray) -> npt.NDArray[np.int32]:
        """Return panel pixels [n, 2] of data points, clipped into the panel."""
        width, height = PANEL[0] - LEFT - RIGHT, PANEL[1] - TOP - BOTTOM
        u = LEFT + width * np.clip((x - self.x[0]) / (self.x[1] - self.x[0]), 0.0, 1.0)
        v = TOP + height * (1.0 - np.clip((y - self.y[0]) / (self.y[1] - self.y[0]), 0.0, 1.0))
        return np.stack([u, v], axis=-1).round().astype(np.int32)


def _text(image: Image, text: str, at: tuple[int, int], color: Color = INK, size: float = 0.42) -> None:
    cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, color, 1, cv2.LINE_AA)


def _ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** np.floor(np.log10((high - low) / 3.0))
    for factor in (1.0, 2.0, 5.0, 10.0):
        if (high - low) / (factor * step) <= 6.0:
            step *= factor
            break
    first = np.ceil(low / step - 1e-9)
    return [float(i * step) + 0.0 for i in np.arange(first, np.floor(high / step + 1e-9) + 1)]  # + 0.0: no -0


def _frame(title: str, x_label: str, axes: Axes) -> Image:
    image: Image = np.full((PANEL[1], PANEL[0], 3), 255, dtype=np.uint8)
    for x in _ticks(*axes.x):
        u = int(axes.pixel(np.array(x), np.array(axes.y[0]))[0])
        cv2.line(image, (u, TOP), (u, PANEL[1] - BOTTOM), GRID, 1)
        _text(image, f"{x:g}", (u - 8, PANEL[1] - BOTTOM + 16), GREY)
    for y in _ticks(*axes.y):
        v = int(axes.pixel(np.array(axes.x[0]), np.array(y))[1])
        cv2.line(image, (LEFT, v), (PANEL[0] - RIGHT, v), GRID, 1)
        _text(image, f"{y:g}", (8, v + 4), GREY)
    cv2.rectangle(image, (LEFT, TOP), (PANEL[0] - RIGHT, PANEL[1] - BOTTOM), GREY, 1)
    _text(image, title, (LEFT, TOP - 12), INK, 0.5)
    _text(image, x_label, (PANEL[0] // 2 - 20, PANEL[1] - 8), GREY)
    return image


def _curve(image: Image, axes: Axes, x: FloatArray, y: FloatArray, color: Color, dots: bool) -> None:
    pixels = axes.pixel(x, y)
    if dots:
        for u, v in pixels.tolist():
            cv2.circle(image, (u, v), 2, color, -1, cv2.LINE_AA)
    else:
        cv2.polylines(image, [pixels.reshape(-1, 1, 2)], False, color, 2, cv2.LINE_AA)


def _legend(image: Image, entries: Sequence[tuple[str, Color]]) -> None:
    for line, (text, color) in enumerate(entries):
        y = TOP + 18 + 18 * line
        cv2.rectangle(image, (LEFT + 10, y - 8), (LEFT + 22, y), color, -1)
        _text(image, text, (LEFT + 28, y))


def _top(values: FloatArray) -> float:
    return max(1.15 * float(np.percentile(values, 98)), 1e-6)


def _errors(title: str, time_s: FloatArray, error: FloatArray, sigma: FloatArray) -> Image:
    axes = Axes((0.0, max(float(time_s[-1]), 1e-3)), (0.0, _top(np.concatenate([error, sigma]))))
    image = _frame(title, "time (s)", axes)
    _curve(image, axes, time_s, sigma, ORANGE, dots=False)
    _curve(image, axes, time_s, error, BLUE, dots=True)
    _legend(image, (("error against the truth", BLUE), ("standard deviation as published", ORANGE)))
    return image


def _nees(time_s: FloatArray, nees: FloatArray) -> Image:
    bound = chi2_quantile(LEVEL, 6)
    axes = Axes((0.0, max(float(time_s[-1]), 1e-3)), (0.0, max(_top(nees), 1.5 * bound)))
    image = _frame("NEES: squared error in units of the covariance", "time (s)", axes)
    _curve(image, axes, np.array(axes.x), np.full(2, bound), ORANGE, dots=False)
    _curve(image, axes, time_s, nees, BLUE, dots=True)
    _legend(image, (("NEES of the 6x6", BLUE), (f"95 % lie below {bound:.1f}", ORANGE)))
    return image


def _calibration(nees: FloatArray) -> Image:
    levels: FloatArray = np.linspace(0.02, 0.99, 50, dtype=np.float64)
    axes = Axes((0.0, 1.0), (0.0, 1.0))
    image = _frame("calibration: share of truths inside an ellipsoid", "level of the ellipsoid", axes)
    _curve(image, axes, np.array([0.0, 1.0]), np.array([0.0, 1.0]), GREY, dots=False)
    shares = np.array([coverage(nees, 6, float(level)) for level in levels])
    _curve(image, axes, levels, shares, BLUE, dots=False)
    _legend(image, (("measured", BLUE), ("ideal", GREY)))
    return image


def summary_plot(summary: Summary) -> Image:
    """Return the picture [H, W, 3] uint8 RGB; ValueError when no answered frame has a known truth."""
    if not len(summary.nees):
        raise ValueError("there is nothing to plot: no answered frame has a known truth.")
    time_s = (summary.stamps_ns - summary.stamps_ns[0]) * 1e-9
    translation = _errors("translation (mm)", time_s, 1e3 * summary.translation, 1e3 * summary.sigmas[:, 0])
    turns = np.degrees(summary.sigmas[:, 1])
    rotation = _errors("rotation (deg)", time_s, summary.rotation_deg, turns)
    upper = np.hstack([translation, rotation])
    return np.vstack([upper, np.hstack([_nees(time_s, summary.nees), _calibration(summary.nees)])])
