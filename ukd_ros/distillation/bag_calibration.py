# SPDX-License-Identifier: Apache-2.0
"""Calibrating a student that learnt from bags: on renders first, then on frames of the bags that were held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ukd_ros.distillation.against_teachers import AgainstTeachers, against_teachers, enlarged
from ukd_ros.distillation.calibrate import (
    UNGATED,
    CalibrationOptions,
    CalibrationReport,
    calibrate_model,
    collect,
)
from ukd_ros.distillation.frames import Frames
from ukd_ros.distillation.pseudo_labels import PseudoLabels
from ukd_ros.distillation.recalibrate import Recalibration, recalibrate
from ukd_ros.perception.bundle import load_bundle, update_calibration
from ukd_ros.perception.estimator import PoseEstimator

BLOCK_FRAMES = 10
"""Neighbouring frames of a bag that count as one block, after near-duplicates were thinned."""

MANY = 1_000_000
"""More blocks than a scene has."""


@dataclass(frozen=True, eq=False)
class BagCalibration:
    """What was done: on renders, on labelled frames of the bags, and beside the teachers on unlabelled ones."""

    renders: CalibrationReport | None
    labelled: Recalibration | None
    teachers: AgainstTeachers | None
    trouble: str = ""

    def table(self) -> str:
        """Return everything as text."""
        parts = []
        if self.renders is not None:
            parts.append(f"on held-out renders\n{self.renders.table()}")
        if self.labelled is not None:
            parts.append(f"on labelled frames of the bags that were held out\n{self.labelled.table()}")
        if self.teachers is not None:
            parts.append(f"beside the teachers, on frames that were held out\n{self.teachers.table()}")
        if self.trouble:
            parts.append(self.trouble)
        return "\n\n".join(parts)


def calibrate_student(
    model: Path,
    renders: Path | None,
    views: int,
    frames: Frames | None,
    labels: PseudoLabels | None,
    out: Path,
    progress: bool,
) -> BagCalibration:
    """Calibrate a model folder in place, as far as the data go.

    Labelled frames give one factor (`recalibrate`); without labels the teachers' poses on all held-out frames can only
    enlarge the covariance (`against_teachers`). What cannot be done is said in `trouble`, and is no error: the model
    then keeps the network's own error bars.
    """
    if renders is None:
        return BagCalibration(None, None, None, "NOT CALIBRATED: no held-out renders were given.")
    try:
        on_renders = calibrate_model(model, renders, views, out, progress=progress)
    except ValueError as error:
        return BagCalibration(None, None, None, f"NOT CALIBRATED: {error}")
    if frames is None:
        return BagCalibration(on_renders, None, None)
    bundle = load_bundle(model)
    estimator = PoseEstimator(bundle, options=UNGATED)
    # what was thinned still resembles its neighbours
    blocks = [scene * MANY + number // BLOCK_FRAMES for number, scene in enumerate(frames.blocks)]
    trouble = ""
    if frames.labelled:
        try:
            found = collect(estimator, frames.data, CalibrationOptions(), progress=progress)
            labelled = recalibrate(estimator, found.matches, blocks)
            told = {"frames": len(frames), "poses": labelled.poses, "factor": round(labelled.factor, 4)}
            update_calibration(model, labelled.calibration, {"recalibrated_on": told})
            return BagCalibration(on_renders, labelled, None)
        except ValueError as error:
            trouble = f"the labels of the held-out frames could not be used: {error}"
    if labels is None or not labels.labels:
        return BagCalibration(on_renders, None, None, trouble)
    compared = against_teachers(
        estimator, frames.some(range(len(frames))), labels.labels, blocks, len(frames), progress
    )
    said = {"frames": compared.frames, "factor": round(compared.factor, 4), "poses": compared.all.both}
    update_calibration(model, enlarged(bundle.calibration, compared.factor), {"compared_with_teachers": said})
    return BagCalibration(on_renders, None, compared, trouble)
