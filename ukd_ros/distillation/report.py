# SPDX-License-Identifier: Apache-2.0
"""An evaluation as files: table, JSON, pictures, and one HTML page that holds them all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ukd_ros.data.bop import BopDataset
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.distillation.failures import CAUSES, cause_of
from ukd_ros.distillation.html_page import html_page, html_picture, html_table
from ukd_ros.distillation.scores import EvaluationReport
from ukd_ros.geometry.object_model import ObjectModel

ATLAS_TILES = 15
"""Most failures of one cause that the page shows, the worst ones."""


def write_report(report: EvaluationReport, data: BopDataset, objects: Sequence[ObjectModel], out: Path) -> None:
    """Write report.html, report.txt, report.json, summary.png, best.png and worst.png into a folder, each by rename.

    The page needs nothing beside it: its pictures are inside.
    """
    from ukd_ros.distillation.pictures import contact_sheet, draw_summary, encode_image  # brings matplotlib

    out.mkdir(parents=True, exist_ok=True)
    write_bytes(out / "report.txt", (report.table() + "\n").encode())
    write_bytes(out / "report.json", json.dumps(_without_nan(report.as_data()), indent=1, allow_nan=False).encode())
    ordered = sorted(report.results, key=lambda item: item.add)
    sheets = {}
    for name, chosen in (("best", ordered[:20]), ("worst", ordered[::-1][:20])):
        if chosen:
            sheets[name] = contact_sheet(chosen, data, objects)
            write_bytes(out / f"{name}.png", encode_image(sheets[name], "png"))
    summary = draw_summary(report, {model.name: model.diameter for model in objects})
    write_bytes(out / "summary.png", summary)
    models = {model.name: model for model in objects}
    sections = [html_picture("Summary", summary, "png")]
    for cause, meaning in CAUSES.items():
        items = [item for item in reversed(ordered) if cause_of(item, models[item.object_name]) == cause]
        if items:
            title = f"{cause}: {len(items)} of {len(report.results)}"
            # among those without an estimate the most visible ones are the most telling
            worst = sorted(items, key=lambda i: (-i.add if np.isfinite(i.add) else 0.0, -i.visible_fraction))
            sheet = contact_sheet(worst[:ATLAS_TILES], data, objects)
            sections.append(html_picture(title, encode_image(sheet, "jpeg"), "jpeg", meaning))
    if "best" in sheets:
        sections.append(html_picture("The best", encode_image(sheets["best"], "jpeg"), "jpeg"))
    write_bytes(out / "report.html", _page(report, sections).encode())


def _page(report: EvaluationReport, sections: Sequence[str]) -> str:
    """Return the HTML page."""
    head = ["object", "targets", *(f"ADD(-S) {t} d" for t in report.overall.add_recalls)]
    head += ["AUC 0.1 m", "AR MSSD", "AR MSPD", "proj. 5 px", "detected", "mm", "deg", "keypoint px"]
    rows = []
    for name, score in [*report.objects.items(), ("all", report.overall)]:
        shares = [*score.add_recalls.values(), score.add_auc, score.ar_mssd, score.ar_mspd]
        shares += [score.projection_recall, score.detection_rate]
        values = [f"{100 * share:.1f} %" for share in shares]
        values += [f"{score.translation_mm:.1f}", f"{score.rotation_deg:.1f}", f"{score.keypoint_px:.2f}"]
        rows.append([name, str(score.targets), *values])
    legend = "Failures by kind. Green: true outline; ellipses: keypoints at two sigma; axes: the estimate."
    about = f"<p>{report.images} images, crops by {escape(report.options.crops)}, {escape(report.backend)}.</p>"
    told = f"<pre>{escape(report.table())}</pre><p>{legend}</p>"
    return html_page(f"{report.model} on {report.dataset}", [about, html_table(head, rows), told, *sections])


def _without_nan(value: Any) -> Any:
    """Return plain data with None for what is not a finite number: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
