# SPDX-License-Identifier: Apache-2.0
"""Several parts of one kind in view: each label is compared with those of its own part, or with none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from perception.painted_world import BOX

from ukd_ros.distillation.neighbours import DISAGREES, agreeing
from ukd_ros.distillation.pseudo_labels import UNSURE, PseudoLabel, PseudoLabelOptions, PseudoLabels
from ukd_ros.geometry.object_model import ObjectModel, Symmetries
from ukd_ros.geometry.pose import Pose, exp_so3

SURE = PseudoLabelOptions()
STEP = 66_000_000
HALF_TURN = Pose(np.diag([-1.0, -1.0, 1.0]), np.array([0.1, 0.0, 0.0]))
"""About an axis along z that is 5 cm from the origin."""


def label(frame: int, pose: Pose, refused: str = "") -> PseudoLabel:
    return PseudoLabel(frame, 0, pose, 1e-6 * np.eye(6), 0.9, 0.95, np.array([[0.0, 0.0, 8.0, 8.0]]), refused)


def judged(rows: list[PseudoLabel], model: ObjectModel = BOX) -> list[str]:
    """Return why each label is refused, of frames 66 ms apart."""
    count = 1 + max(row.frame for row in rows)
    places = [(0, number * STEP) for number in range(count)]
    return [row.refused for row in agreeing(PseudoLabels(tuple(rows), count, {}), places, [model], SURE).labels]


def at(*xyz: float) -> Pose:
    return Pose(np.eye(3), np.array(xyz))


def row_of_parts(rng: np.random.Generator, spacing: float, shift: float, frames: int = 80) -> list[PseudoLabel]:
    """Four parts beside each other; the camera moves along them by `shift` (m) a frame; half are refused."""
    rows = []
    for frame in range(frames):
        for part in range(4):
            turn = exp_so3(np.array([0.0, 0.0, 0.3 * part]) + 0.02 * rng.normal(size=3))
            place = np.array([spacing * part - shift * frame, 0.0, 0.6]) + 0.002 * rng.normal(size=3)
            rows.append(label(frame, Pose(turn, place), UNSURE if rng.random() < 0.5 else ""))
    return rows


@pytest.mark.parametrize("both", [True, False])
def test_two_parts_that_are_accepted_in_turn_do_not_speak_against_each_other(both: bool) -> None:
    """Where only one is ever seen, it is one part that jumps."""
    rows = [
        label(frame, at(0.3 * part, 0.0, 0.6), "" if frame % 2 == part else UNSURE)
        for frame in range(20)
        for part in range(2)
        if both or frame % 2 == part
    ]
    assert (DISAGREES in judged(rows)) != both


def test_three_parts_seen_now_and_then_do_not_speak_against_each_other() -> None:
    """What is missing is not even refused: which parts there are, the frames beside tell."""
    rng = np.random.default_rng(0)
    seen = [(frame, part) for frame in range(100) for part in range(3) if rng.random() < 0.5]
    found = judged([label(frame, at(0.3 * part, 0.0, 0.6)) for frame, part in seen])
    assert found.count(DISAGREES) <= 0.03 * len(seen)


@pytest.mark.parametrize("spacing", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("shift", [0.0, 0.01, 0.03, 0.05, 0.08, 0.12])
def test_a_camera_that_moves_along_parts_refuses_none_of_them(spacing: float, shift: float) -> None:
    """However far it moves between frames: by less than to the next part, as far, or beyond it."""
    assert DISAGREES not in judged(row_of_parts(np.random.default_rng(0), spacing, shift))


@pytest.mark.parametrize("wrong", [Pose(np.diag([1.0, -1.0, -1.0]), np.zeros(3)), at(0.0, 0.0, 0.05)])
def test_a_wrong_label_among_several_parts_is_refused(wrong: Pose) -> None:
    """Turned over, or a third of the diameter too far away, in a twentieth of the labels."""
    rng = np.random.default_rng(0)
    rows = [replace(row, refused="") for row in row_of_parts(rng, 0.2, 0.01)]
    bad = rng.random(len(rows)) < 0.05
    for number in np.flatnonzero(bad):
        pose = rows[number].T_camera_object
        moved = Pose(pose.rotation @ wrong.rotation, pose.translation + wrong.translation)
        rows[number] = replace(rows[number], T_camera_object=moved)
    refused = np.array([why == DISAGREES for why in judged(rows)])
    assert refused[bad].mean() > 0.8 and refused[~bad].mean() < 0.05


def test_a_part_that_is_alone_is_followed_however_far_it_jumps() -> None:
    rows = [label(frame, at(0.0, 0.0, 1.1 if frame == 5 else 0.6)) for frame in range(10)]
    assert [frame for frame, why in enumerate(judged(rows)) if why] == [5]


def test_symmetric_parts_are_followed_whichever_name_their_poses_have() -> None:
    """Another name puts origin and keypoints 8 to 10 cm away, for they lie off the axis; a wrong pose is still told."""
    model = replace(BOX, keypoints_3d=BOX.keypoints_3d + [0.09, 0.0, 0.0], symmetries=Symmetries((HALF_TURN,)))
    rng = np.random.default_rng(0)
    rows = []
    for frame in range(30):
        for part in range(2):
            pose = at(0.3 * part, 0.0, 0.6 + 0.05 * (frame == 10 and part == 0))
            rows.append(label(frame, pose @ HALF_TURN if rng.random() < 0.5 else pose))
    assert [number for number, why in enumerate(judged(rows, model)) if why] == [20]
