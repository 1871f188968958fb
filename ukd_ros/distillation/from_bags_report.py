# SPDX-License-Identifier: Apache-2.0
"""What came of bags: tables and pictures on one page, for the one who has to decide whether to use the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ukd_ros.data.preview import draw_axes
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.distillation.bag_calibration import BagCalibration
from ukd_ros.distillation.frames import Frames
from ukd_ros.distillation.from_bags_request import launch_line
from ukd_ros.distillation.html_page import html_page, html_picture, html_text
from ukd_ros.distillation.pictures import COLUMNS, TILE, TRUTH, Image, encode_image
from ukd_ros.distillation.pseudo_labels import PseudoLabel, PseudoLabels
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.perception.bundle import object_bounds
from ukd_ros.perception.crop import square_crop
from ukd_ros.perception.votes import keypoint_box

SHOWN = 25

ADVICE = {
    "nothing_found": "look whether the frames show the object (ukd bag to-bop), lit and large enough, and whether the "
    "teachers know it (ukd evaluate on renders)",
    "unsure": "train the teachers longer, record closer to the object, or lower labels.sure (and look at labels.png)",
    "inconsistent": "look whether the camera_info is that of the images: a wrong focal length bends every pose",
    "disagrees_in_time": "look at labels_refused.png: the teachers jump between poses; train them longer",
    "low_score": "record closer to the object, or train the teachers on renders that look more like the place",
    "ambiguous": "record from more oblique sides and closer: from afar two poses look alike",
    "too_few_keypoints": "record the object less hidden",
    "no_convergence": "train the teachers longer, on renders that look more like the place: what they see is no pose",
    "behind_camera": "look whether the camera_info is that of the images, lens included: poses come out where it sees "
    "nothing",
    "degenerate": "record the object less hidden and closer: what is seen of it leaves its pose open",
    "invalid_keypoints": "train the teachers longer: their error bars are no covariance",
    "too_uncertain": "record closer to the object, or train the teachers longer",
    "uncalibrated": "give renders that nobody was trained on (held_out), so that the teachers' doubt is measured",
}
"""What to try, by the reason for which most was refused."""


@dataclass(frozen=True, eq=False)
class BagStory:
    """Everything that the report tells: see `from_bags`. trouble: what is wrong with the labels' threshold, if any."""

    taken: str
    frames: Frames
    strange: Frames | None
    labels: dict[str, PseudoLabels]
    models: tuple[ObjectModel, ...]
    model: Path
    run: Path
    calibrated: BagCalibration
    trouble: str = ""


def write_story(story: BagStory, out: Path) -> tuple[Path, str]:
    """Write report.html, labels.png and labels_refused.png into a folder; return the page and one sentence."""
    learnt = story.labels["train"]
    accepted = len(learnt.accepted)
    summary = (
        f"{len(story.frames)} frames, {accepted} labels accepted, {sum(learnt.refused.values())} refused; "
        f"{_coverage(story.calibrated)}"
    )
    sections = [html_text("Summary", summary)]
    sections.append(html_text("Start it", launch_line(story.model)))
    sections.append(html_text("What the bags gave", story.taken))
    sections.append(html_text("What the teachers were sure of", _counts(story.labels)))
    if story.trouble:
        sections.append(html_text("How sure a label must be", story.trouble))
    if accepted == 0:
        said = f"The teachers' votes taught, but no pose. {advice(learnt)}."
        sections.append(html_text("No frame was labelled", said))
    else:
        sections.append(html_text("To have more", advice(learnt)))
    chosen = {
        "labels": sorted(learnt.accepted, key=lambda label: label.probability),
        "labels_refused": sorted(
            (label for label in learnt.labels if label.refused), key=lambda label: -label.probability
        ),
    }
    titles = {
        "labels": "Accepted labels, the least sure first: look whether the outlines fit",
        "labels_refused": "Refused, the surest first",
    }
    for name, labels in chosen.items():
        if labels:
            sheet = label_sheet(labels[:SHOWN], story.frames, story.models)
            write_bytes(out / f"{name}.png", encode_image(sheet, "png"))
            sections.append(html_picture(titles[name], encode_image(sheet, "jpeg"), "jpeg"))
    curves = story.run / "curves.png"
    if curves.is_file():
        sections.append(html_picture("Training", curves.read_bytes(), "png"))
    sections.append(html_text("How sure the student may be", story.calibrated.table()))
    path = out / "report.html"
    write_bytes(path, html_page(f"{story.model.name}: from bags to a student", sections).encode())
    return path, summary


def advice(labels: PseudoLabels) -> str:
    """Say what to try when few frames are labelled, by the reason for which most was refused."""
    reasons = sorted(labels.refused.items(), key=lambda item: -item[1])
    return next((ADVICE[reason] for reason, _ in reasons if reason in ADVICE), "look at the pictures of the report")


def label_sheet(labels: Sequence[PseudoLabel], frames: Frames, models: Sequence[ObjectModel]) -> Image:
    """Return a sheet of crops about labels, RGB: the object's outline in its pose, its axes, where it was seen."""
    tiles = [_tile(label, frames, models[label.class_index]) for label in labels]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % COLUMNS)
    rows = [np.hstack(tiles[i : i + COLUMNS]) for i in range(0, len(tiles), COLUMNS)]
    return np.asarray(np.vstack(rows), dtype=np.uint8)


def _tile(label: PseudoLabel, frames: Frames, model: ObjectModel) -> Image:
    view = frames.view(label.frame)
    image = view.image.copy()
    seen = label.mask(view.camera.width, view.camera.height).astype(np.uint8)
    contours, _ = cv2.findContours(seen, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, contours, -1, (255, 0, 255), 1)
    surface = view.camera.project(label.T_camera_object.transform(_surface(model)))
    surface = surface[np.isfinite(surface).all(axis=1)]
    if len(surface) and np.abs(surface).max() < 1e5:
        hull = cv2.convexHull(surface.astype(np.float32))
        cv2.polylines(image, [np.round(hull).astype(np.int32)], True, TRUTH, 1, cv2.LINE_AA)
    draw_axes(image, view.camera, label.T_camera_object, 0.4 * model.diameter)
    box = keypoint_box(surface if len(surface) else np.array([[0.0, 0.0], [view.camera.width, view.camera.height]]))
    crop = square_crop(0.5 * (box[:2] + box[2:]), 1.7 * max(float(max(box[2:] - box[:2])), 24.0), TILE)
    tile = np.ascontiguousarray(crop.warp(image))
    tile[:34] //= 3  # dark behind the text
    words = f"{model.name} #{label.frame}", f"{label.refused or 'label'}  p {label.probability:.2f}"
    for line, text in enumerate(words):
        place = (4, 14 + 15 * line)
        cv2.putText(tile, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
    return np.asarray(tile, dtype=np.uint8)


def _surface(model: ObjectModel) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return points [N,3] whose hull is the object's: of its mesh, or the corners of its bounds."""
    if model.mesh is not None:
        return np.asarray(model.mesh.vertices)
    low, high = object_bounds(model)
    corners = np.stack(np.meshgrid(*zip(low, high, strict=True)), axis=-1)
    return np.asarray(corners.reshape(-1, 3))


def _counts(labels: dict[str, PseudoLabels]) -> str:
    """Return the counts of both splits as a text table."""
    names = list(dict.fromkeys(name for found in labels.values() for name in found.counts()))
    rows = [f"{'':20} " + " ".join(f"{split:>9}" for split in labels)]
    rows.append(f"{'frames':20} " + " ".join(f"{found.frames:9d}" for found in labels.values()))
    rows += [
        f"{name:20} " + " ".join(f"{found.counts().get(name, 0):9d}" for found in labels.values()) for name in names
    ]
    return "\n".join(rows)


def _coverage(calibrated: BagCalibration) -> str:
    if calibrated.renders is None:
        return calibrated.trouble
    shown = calibrated.renders.checks[calibrated.renders.form].coverage["pose"][0.95]
    text = f"the 95 % ellipsoid holds {shown:.1%} of poses on held-out renders"
    if calibrated.teachers is not None and calibrated.teachers.all.both:
        text += f", and its covariance was then multiplied by {calibrated.teachers.factor:.2f} beside the teachers"
    return text
