# SPDX-License-Identifier: Apache-2.0
"""Symmetries as people declare them: `z` for any turn about an axis, `z:180` for one turn and its multiples."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.object_model import Mesh, Symmetries
from ukd_ros.geometry.pose import Pose, exp_so3

AXES = {"x": 0, "y": 1, "z": 2}

_DECLARED = re.compile(r"([xyz])(?::(180|120|90|60))?")


def symmetries_of(words: Sequence[str], mesh: Mesh) -> Symmetries:
    """Return the symmetries that were declared: z (any turn about the axis) or z:180 (that turn and its multiples).

    Axes are those of the mesh and go through the middle of its bounding box. ValueError for another word.
    """
    middle = 0.5 * (mesh.vertices.min(axis=0) + mesh.vertices.max(axis=0))
    discrete: list[Pose] = []
    continuous: list[tuple[FloatArray, FloatArray]] = []
    for word in words:
        match = _DECLARED.fullmatch(word)
        if match is None:
            raise ValueError(
                f"symmetry {word!r}: write an axis (z), or an axis and an angle (z:180, z:120, z:90, z:60)"
            )
        axis = np.eye(3)[AXES[match[1]]]
        if match[2] is None:
            continuous.append((axis, middle))
        else:
            step = int(match[2])
            discrete += [turn_about(axis, angle, middle) for angle in range(step, 360, step)]
    return Symmetries(tuple(discrete), tuple(continuous))


def turn_about(axis: FloatArray, degrees: float, middle: FloatArray) -> Pose:
    """Return the motion that turns by ``degrees`` about the axis [3] through the point ``middle`` [3] m."""
    R = exp_so3(axis * np.radians(degrees))
    return Pose(R, middle - R @ middle)
