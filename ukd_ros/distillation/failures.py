# SPDX-License-Identifier: Apache-2.0
"""Why a target is wrong or missing: one word for each, so that failures can be counted and looked at by kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ukd_ros.geometry.metrics import rotation_error_deg
from ukd_ros.geometry.object_model import ObjectModel

if TYPE_CHECKING:
    from ukd_ros.distillation.scores import TargetResult

HIDDEN = 0.3
"""Visible fraction below which a missed object is called hidden."""

FLIPPED_DEG = 60.0
"""Turn beyond which a pose is called flipped: another side of the object was named."""

CAUSES = {
    "hidden": "not found, and less than 30 % of it is visible",
    "not found": "nothing voted for it, or only elsewhere",
    "outranked": "found, but something else scored higher",
    "unsure": "something was seen there, with too low a score",
    "refused": "found and refused by a gate (the reasons are under missed)",
    "flipped": "turned by more than 60 degrees",
    "depth": "the error along the line of sight is larger than all across it",
    "sideways": "the error across the line of sight is larger than the turn's",
    "turned": "mostly a turn",
}
"""Every cause and what it means, in the order in which they are looked for."""


def cause_of(item: TargetResult, model: ObjectModel) -> str:
    """Return the cause, a key of CAUSES, or "" when the target is right.

    The turn counts by how far it moves the object's surface: its angle times half the diameter.
    """
    if item.correct:
        return ""
    if item.estimate is None:
        if item.missed == "outranked":
            return "outranked"
        if item.missed == "low_score":
            return "unsure"
        if item.missed not in ("nothing_found", "elsewhere", "lost"):
            return "refused"
        return "hidden" if item.visible_fraction < HIDDEN else "not found"
    pose = item.estimate.T_camera_object
    angle = rotation_error_deg(pose, item.truth)
    if angle > FLIPPED_DEG:
        return "flipped"
    shift = item.truth.translation - pose.translation
    sight = item.truth.translation / np.linalg.norm(item.truth.translation)
    depth = abs(float(shift @ sight))
    across = float(np.linalg.norm(shift - (shift @ sight) * sight))
    turn = np.radians(angle) * 0.5 * model.diameter
    if depth > max(across, turn):
        return "depth"
    return "sideways" if across > turn else "turned"
