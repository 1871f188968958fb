# SPDX-License-Identifier: Apache-2.0
"""Other colours for a mesh: what a network has seen in many coats of paint it knows by its shape, too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ukd_ros.data.clutter import random_color
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.object_model import Mesh

ByteColors = npt.NDArray[np.uint8]
MOST_TONES = 4
PAINTS = 24
"""Coats of paint that are made of a target and seed."""


def repainted(mesh: Mesh, rng: np.random.Generator) -> Mesh:
    """Return the mesh in other colours: each of its own replaced by another, or two to four painted over it.

    Where its colours end is where paint may end on the real part as well; a mesh of one colour is painted over.
    """
    own = own_colors(mesh)
    by_own = own is not None and rng.random() < 0.6
    groups = _color_groups(own, rng) if own is not None and by_own else _halves(mesh.vertices, rng)
    paint = np.array([random_color(rng) for _ in range(int(groups.max()) + 1)], dtype=np.float64)
    return replace(mesh, colors=paint[groups].astype(np.uint8), uv=None, texture=None)


def own_colors(mesh: Mesh) -> ByteColors | None:
    """Return the colours [V,3] of the vertices, from the texture where there is one; None for a mesh without any."""
    if mesh.texture is None or mesh.uv is None:
        return mesh.colors
    h, w = mesh.texture.shape[:2]
    column = np.floor(mesh.uv[:, 0] % 1.0 * w).astype(int)
    row = np.floor((1.0 - mesh.uv[:, 1]) % 1.0 * h).astype(int)
    return np.asarray(mesh.texture[np.minimum(row, h - 1), np.minimum(column, w - 1)])


def _color_groups(own: ByteColors, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return a group [V] for each vertex: that of the most alike among a few colours which the mesh has."""
    light = np.log(own.astype(np.float64) + 8.0)  # a dark part's colours differ by factors, not by steps
    chosen = light[rng.choice(len(light), size=int(rng.integers(2, MOST_TONES + 1)))]
    distance: FloatArray = np.linalg.norm(light[:, None] - chosen[None], axis=2)
    return np.asarray(distance.argmin(axis=1))


def _halves(vertices: FloatArray, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return a group [V] for each vertex: on which sides of one or two random planes it lies, or one for all."""
    groups: npt.NDArray[np.int64] = np.zeros(len(vertices), dtype=np.int64)
    for _ in range(int(rng.integers(0, 3))):
        normal = rng.normal(size=3)
        along = vertices @ (normal / np.linalg.norm(normal))
        groups += groups + (along > np.quantile(along, rng.uniform(0.2, 0.8)))
    return groups
