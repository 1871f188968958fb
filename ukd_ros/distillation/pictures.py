# SPDX-License-Identifier: Apache-2.0
"""Pictures of an evaluation: what was answered where, and how errors and covariances are spread."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ukd_ros.data.bop import BopDataset
from ukd_ros.distillation.error_model import PARTS
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.metrics import coverage
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.view import LabelledView
from ukd_ros.perception.crop import square_crop
from ukd_ros.perception.votes import keypoint_box

if TYPE_CHECKING:
    from ukd_ros.distillation.scores import EvaluationReport, TargetResult

Image = npt.NDArray[np.uint8]

TILE = 240
COLUMNS = 5
ELLIPSE_SIGMAS = 2.0
TRUTH, FOUND, OUTLIER = (60, 255, 60), (255, 205, 30), (255, 60, 200)
AXES = ((240, 60, 60), (60, 220, 60), (70, 120, 255))


def contact_sheet(results: Sequence[TargetResult], data: BopDataset, objects: Sequence[ObjectModel]) -> Image:
    """Return a sheet of crops around targets, RGB: the true outline (green), keypoints with 2-sigma ellipses, axes."""
    models = {model.name: model for model in objects}
    outlines = {
        model.name: data.mesh(data.object_id(model.name)).vertices
        for model in objects
        if any(item.object_name == model.name for item in results)
    }
    tiles = [_tile(item, data, models[item.object_name], outlines[item.object_name]) for item in results]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % COLUMNS)
    rows = [np.hstack(tiles[i : i + COLUMNS]) for i in range(0, len(tiles), COLUMNS)]
    return np.asarray(np.vstack(rows), dtype=np.uint8)


def _tile(item: TargetResult, data: BopDataset, model: ObjectModel, vertices: FloatArray) -> Image:
    """Return the picture of one target."""
    view = data.view(item.image, masks=False)
    surface = view.camera.project(item.truth.transform(vertices))
    surface = surface[np.isfinite(surface).all(axis=1)]
    if not len(surface):
        surface = np.array([[0.0, 0.0], [view.camera.width, view.camera.height]])
    box = keypoint_box(surface)
    crop = square_crop(0.5 * (box[:2] + box[2:]), 1.6 * float(max(box[2:] - box[:2])), TILE)
    tile = np.ascontiguousarray(crop.warp(view.image))
    matrix = crop.matrix
    hull = cv2.convexHull((surface @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32))
    cv2.polylines(tile, [np.round(hull).astype(np.int32)], True, TRUTH, 1, cv2.LINE_AA)
    if item.estimate is not None:
        _draw_estimate(tile, item, view, model, matrix)
    ratio = f"ADD {item.add / model.diameter:.2f} d" if np.isfinite(item.add) else item.missed
    tile[:34] //= 3  # dark behind the text
    for line, text in enumerate((f"{item.object_name} #{item.image_id}", ratio)):
        place = (4, 14 + 15 * line)
        cv2.putText(tile, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
    return tile


def _draw_estimate(tile: Image, item: TargetResult, view: LabelledView, model: ObjectModel, matrix: FloatArray) -> None:
    """Draw keypoints, ellipses and axes of an estimate into its tile; ``matrix`` [2,3] maps image to tile px."""
    estimate = item.estimate
    if estimate is None:
        return
    scale, shift = matrix[:, :2], matrix[:, 2]
    for k, xy in enumerate(estimate.keypoints.xy):
        color = FOUND if estimate.inliers[k] else OUTLIER
        center = _pixel(scale @ xy + shift)
        cov = scale @ estimate.keypoints.block(k) @ scale.T
        if center is None or not np.isfinite(cov).all():
            continue
        cv2.circle(tile, center, 2, color, -1, cv2.LINE_AA)
        variances, axes = np.linalg.eigh(cov)
        size = np.maximum(1, np.round(ELLIPSE_SIGMAS * np.sqrt(np.maximum(variances, 0)))).astype(int)
        if size.max() < TILE:
            angle = float(np.degrees(np.arctan2(axes[1, 1], axes[0, 1])))
            cv2.ellipse(tile, center, (int(size[1]), int(size[0])), angle, 0, 360, color, 1, cv2.LINE_AA)
    tips = np.vstack([np.zeros(3), 0.4 * model.diameter * np.eye(3)])
    pixels = [_pixel(scale @ xy + shift) for xy in view.camera.project(estimate.T_camera_object.transform(tips))]
    for tip, axis_color in zip(pixels[1:], AXES, strict=True):
        if pixels[0] is not None and tip is not None:
            cv2.line(tile, pixels[0], tip, axis_color, 2, cv2.LINE_AA)


def _pixel(xy: FloatArray) -> tuple[int, int] | None:
    """Return whole pixels, or None for what OpenCV cannot draw."""
    if not np.isfinite(xy).all() or np.abs(xy).max() > 1e5:
        return None
    return round(float(xy[0])), round(float(xy[1]))


def encode_image(image: Image, kind: str) -> bytes:
    """Return an RGB image as a file, png or jpeg."""
    suffix = {"png": ".png", "jpeg": ".jpg"}[kind]
    ok, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not ok:
        raise RuntimeError(f"OpenCV could not encode a picture as {kind}.")
    return bytes(data.tobytes())


def draw_summary(report: EvaluationReport, diameters: Mapping[str, float]) -> bytes:
    """Return a PNG: recall over the threshold, error against visibility, detection, what refusing the doubtful buys,
    reliability, and predicted against true error.
    """
    figure = Figure(figsize=(15, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    ratios = np.array([item.add / diameters[item.object_name] for item in report.results])
    visible = np.array([item.visible_fraction for item in report.results])
    _plot_recall(axes[0, 0], ratios, report)
    found = np.isfinite(ratios)
    axes[0, 1].semilogy(visible[found], ratios[found], ".", label="found")
    axes[0, 1].plot(visible[~found], np.full(int((~found).sum()), 3.0), "x", color="tab:red", label="missed")
    axes[0, 1].axhline(0.1, color="grey", lw=0.8)
    axes[0, 1].set(xlabel="visible fraction", ylabel="ADD(-S) / diameter", title="error against visibility")
    axes[0, 1].legend()
    _plot_detection(axes[0, 2], report)
    _plot_reliability(axes[1, 0], report)
    _plot_sigma(axes[1, 1], report)
    _plot_risk(axes[1, 2], report)
    figure.suptitle(f"{report.model} on {report.dataset}, crops {report.options.crops}")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90)
    return stream.getvalue()


def _plot_recall(axes: Axes, ratios: FloatArray, report: EvaluationReport) -> None:
    """Plot the share of targets below each ADD threshold."""
    thresholds = np.linspace(0, 0.5, 200)
    recall = [100 * float((ratios < t).mean()) if len(ratios) else 0.0 for t in thresholds]
    axes.plot(thresholds, recall)
    axes.axvline(0.1, color="grey", lw=0.8)
    title = f"ADD-0.1d {100 * report.overall.add_recall:.1f} %, detected {100 * report.overall.detection_rate:.1f} %"
    axes.set(xlabel="threshold / diameter", ylabel="recall, %", ylim=(0, 100), title=title)


def _plot_detection(axes: Axes, report: EvaluationReport) -> None:
    """Plot the share of targets with an estimate at the object, by visible fraction and apparent size."""
    bars = [item for bins in report.detection.values() for item in bins.items()]
    rows = [(f"{name}\n(n={count})", share) for name, (share, count) in bars]
    colours = [c for c, bins in zip(("C0", "C1"), report.detection.values(), strict=False) for _ in bins]
    axes.bar(range(len(rows)), [100 * share for _, share in rows], color=colours)
    axes.set_xticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
    title = "detected, by " + " and by ".join(report.detection)
    axes.set(ylabel="detected, %", ylim=(0, 100), title=title)


def _plot_risk(axes: Axes, report: EvaluationReport) -> None:
    """Plot how right the answers are that remain when the most uncertain are refused."""
    if report.risk:
        axes.plot([100 * p.kept for p in report.risk], [100 * p.accuracy for p in report.risk], ".-")
    axes.set(xlabel="surest answers kept, % of targets", ylabel="of them right (ADD-0.1d), %", ylim=(0, 100))
    axes.set(xlim=(0, 100), title="what refusing the doubtful buys")


def _plot_reliability(axes: Axes, report: EvaluationReport) -> None:
    """Plot observed against nominal coverage of every part; dashed without the keypoints' correlations."""
    levels = np.linspace(0.02, 0.99, 50)
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8)
    for variant, style in (("joint", "-"), ("block_diagonal", ":")):
        for color, (part, where) in zip(("C0", "C1", "C2", "C3"), PARTS.items(), strict=True):
            if variant in report.squares:
                values, dof = report.squares[variant][part], where.stop - where.start
                label = part if variant == "joint" else None
                axes.plot(levels, [coverage(values, dof, float(p)) for p in levels], style, color=color, label=label)
    axes.set(xlabel="nominal coverage", ylabel="observed", title="reliability (dotted: correlations dropped)")
    if report.squares:
        axes.legend()


def _plot_sigma(axes: Axes, report: EvaluationReport) -> None:
    """Plot the error of the position against its predicted standard deviation."""
    found = [(item.truth, item.estimate) for item in report.results if item.estimate is not None]
    if found:
        error = [1e3 * float(np.linalg.norm(t.translation - e.T_camera_object.translation)) for t, e in found]
        sigma = [1e3 * float(np.sqrt(np.trace(e.cov[:3, :3]))) for _, e in found]
        axes.loglog(sigma, error, ".")
        span = np.array([min(sigma), max(sigma)])
        axes.plot(span, span, color="grey", lw=0.8)
    axes.set(xlabel="predicted rms position error, mm", ylabel="true, mm", title="is it known where it fails?")
