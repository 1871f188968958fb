# SPDX-License-Identifier: Apache-2.0
"""The object that is looked for: its surface, its keypoints, its size and its symmetries. Metres throughout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.arrays import FloatArray, frozen_array
from ukd_ros.geometry.pose import Pose, exp_so3, nearest_rotation


@dataclass(frozen=True, eq=False)
class Mesh:
    """A triangle mesh in the object's frame.

    vertices: [V, 3] m. faces: [F, 3] indices, counter-clockwise seen from outside. normals: [V, 3] unit length.
    colors: [V, 3] uint8 RGB or None. uv: [V, 2] or None, (0, 0) is the texture's bottom-left corner as OpenGL has
    it. texture: [h, w, 3] uint8 RGB, first row on top, or None; it needs uv.
    ValueError names the field that is wrong.
    """

    vertices: FloatArray
    faces: npt.NDArray[np.int64]
    normals: FloatArray
    colors: npt.NDArray[np.uint8] | None = None
    uv: FloatArray | None = None
    texture: npt.NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        """Check and freeze the arrays."""
        vertices = frozen_array(self.vertices, (None, 3), "vertices")
        faces = frozen_array(self.faces, (None, 3), "faces", np.int64)
        if len(vertices) == 0 or len(faces) == 0:
            raise ValueError(f"vertices, faces: the mesh is empty ({len(vertices)} vertices, {len(faces)} faces).")
        if faces.min() < 0 or faces.max() >= len(vertices):
            raise ValueError(f"faces: refers to vertex {faces.max()} (or a negative one) of {len(vertices)}.")
        object.__setattr__(self, "vertices", vertices)
        object.__setattr__(self, "faces", faces)
        object.__setattr__(self, "normals", frozen_array(self.normals, (len(vertices), 3), "normals"))
        if self.colors is not None:
            object.__setattr__(self, "colors", frozen_array(self.colors, (len(vertices), 3), "colors", np.uint8))
        if self.uv is not None:
            object.__setattr__(self, "uv", frozen_array(self.uv, (len(vertices), 2), "uv"))
        if self.texture is not None:
            if self.uv is None:
                raise ValueError("texture: needs uv coordinates, and uv is None.")
            object.__setattr__(self, "texture", frozen_array(self.texture, (None, None, 3), "texture", np.uint8))

    @property
    def bare(self) -> bool:
        """Whether nothing is known of its colours, as with every .stl."""
        return self.colors is None and self.texture is None


@dataclass(frozen=True, eq=False)
class Symmetries:
    """The motions of an object onto itself, as BOP's models_info.json states them.

    discrete: poses ``S`` such that the object in ``T`` looks as in ``T @ S``; the identity need not be listed.
    continuous: (axis [3], offset [3] m) pairs: any turn about the axis through the point ``offset``.
    """

    discrete: tuple[Pose, ...] = ()
    continuous: tuple[tuple[FloatArray, FloatArray], ...] = ()

    def __post_init__(self) -> None:
        """Freeze the arrays and make the axes unit vectors; ValueError for an axis of no length."""
        object.__setattr__(self, "discrete", tuple(self.discrete))
        checked = []
        for axis, offset in self.continuous:
            direction = frozen_array(axis, (3,), "continuous axis")
            length = float(np.linalg.norm(direction))
            if length < 1e-9:
                raise ValueError("continuous: a symmetry axis has no length.")
            unit = frozen_array(direction / length, (3,), "continuous axis")
            checked.append((unit, frozen_array(offset, (3,), "continuous offset")))
        object.__setattr__(self, "continuous", tuple(checked))

    def __bool__(self) -> bool:
        """Return whether there is any symmetry besides the identity."""
        return bool(self.discrete or self.continuous)

    @staticmethod
    def from_bop(info: Mapping[str, Any], unit_scale: float = 1e-3) -> Symmetries:
        """Read the entry of one object of models_info.json; ``unit_scale`` is metres per unit of length there."""
        discrete = []
        for flat in info.get("symmetries_discrete", ()):
            T = frozen_array(flat, (16,), "symmetries_discrete").reshape(4, 4)
            discrete.append(Pose(nearest_rotation(T[:3, :3]), T[:3, 3] * unit_scale))
        continuous = [
            (np.asarray(entry["axis"], dtype=np.float64), np.asarray(entry["offset"], dtype=np.float64) * unit_scale)
            for entry in info.get("symmetries_continuous", ())
        ]
        return Symmetries(tuple(discrete), tuple(continuous))

    def to_bop(self, unit_scale: float = 1e-3) -> dict[str, Any]:
        """Return the two entries of models_info.json (absent where empty); the inverse of ``from_bop``."""
        out: dict[str, Any] = {}
        if self.discrete:
            rows = []
            for pose in self.discrete:
                T = pose.matrix()
                T[:3, 3] /= unit_scale
                rows.append(T.reshape(-1).tolist())
            out["symmetries_discrete"] = rows
        if self.continuous:
            out["symmetries_continuous"] = [
                {"axis": axis.tolist(), "offset": (offset / unit_scale).tolist()} for axis, offset in self.continuous
            ]
        return out

    def poses(self, continuous_steps: int = 36) -> list[Pose]:
        """Return all symmetry motions, the identity first; continuous ones in ``continuous_steps`` equal turns.

        As in BOP each discrete motion is followed by each turn; turns about different axes are not chained.
        """
        if continuous_steps < 1:
            raise ValueError(f"continuous_steps: is {continuous_steps}, but at least 1 is needed.")
        turns = [Pose.identity()]
        for axis, offset in self.continuous:
            for step in range(1, continuous_steps):
                R = exp_so3(axis * (2 * np.pi * step / continuous_steps))
                turns.append(Pose(R, offset - R @ offset))
        motions = [Pose.identity()]
        for pose in self.discrete:
            if np.abs(pose.matrix() - np.eye(4)).max() > 1e-9:
                motions.append(pose)
        return [turn @ motion for motion in motions for turn in turns]


@dataclass(frozen=True, eq=False)
class ObjectModel:
    """One object that can be looked for.

    name: unique in a model. keypoints_3d: [K, 3] m in the object's frame, K >= 4. diameter: m, the largest distance
    between two surface points. symmetries and mesh: for metrics, rendering and drawing.
    ValueError names the field that is wrong.
    """

    name: str
    keypoints_3d: FloatArray
    diameter: float
    symmetries: Symmetries = Symmetries()
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        """Check and freeze the fields."""
        if not self.name:
            raise ValueError("name: is empty.")
        keypoints = frozen_array(self.keypoints_3d, (None, 3), "keypoints_3d")
        if len(keypoints) < 4:
            raise ValueError(f"keypoints_3d: has {len(keypoints)} points, but a pose needs at least 4.")
        if not (np.isfinite(self.diameter) and self.diameter > 0):
            raise ValueError(f"diameter: is {self.diameter}, but a positive length in metres is needed.")
        object.__setattr__(self, "keypoints_3d", keypoints)
        object.__setattr__(self, "diameter", float(self.diameter))


def farthest_points(vertices: npt.ArrayLike, count: int) -> FloatArray:
    """Return ``count`` of the vertices [V, 3], spread over the surface: each is farthest from all before it.

    The first is the one farthest from the mean; ties go to the smaller index, so the answer is deterministic.
    ValueError when there are fewer distinct vertices than asked for.
    """
    points = frozen_array(vertices, (None, 3), "vertices")
    if not 1 <= count <= len(points):
        raise ValueError(f"count: is {count}, but 1..{len(points)} vertices can be chosen.")
    distance = np.sum((points - points.mean(axis=0)) ** 2, axis=1)
    chosen = [int(np.argmax(distance))]
    distance = np.sum((points - points[chosen[0]]) ** 2, axis=1)
    while len(chosen) < count:
        best = int(np.argmax(distance))
        if distance[best] == 0.0:
            raise ValueError(f"count: is {count}, but there are only {len(chosen)} distinct vertices.")
        chosen.append(best)
        distance = np.minimum(distance, np.sum((points - points[best]) ** 2, axis=1))
    return np.ascontiguousarray(points[chosen])


def box_corners(vertices: npt.ArrayLike) -> FloatArray:
    """Return the 8 corners [8, 3] of the axis-aligned box about the vertices [V, 3].

    Corner ``i`` takes the maximum of x, y, z where bit 2, 1, 0 of ``i`` is set (x varies slowest).
    """
    points = frozen_array(vertices, (None, 3), "vertices")
    if len(points) == 0:
        raise ValueError("vertices: is empty.")
    limits = np.stack([points.min(axis=0), points.max(axis=0)])
    bits = (np.arange(8)[:, None] >> np.array([2, 1, 0])) & 1
    return np.asarray(limits[bits, np.arange(3)])


def diameter_of(vertices: npt.ArrayLike, chunk: int = 1024) -> float:
    """Return the largest distance between two of the vertices [V, 3], exactly.

    Vertices are visited from the outside in; with distances r from the centre, a pair can only be r_i + r_j apart,
    so the search ends as soon as no pair left can beat the best one.
    """
    points = frozen_array(vertices, (None, 3), "vertices")
    if len(points) == 0:
        raise ValueError("vertices: is empty.")
    points = points - 0.5 * (points.min(axis=0) + points.max(axis=0))
    radius = np.sqrt(np.sum(points**2, axis=1))
    order = np.argsort(-radius, kind="stable")
    points, radius = points[order], radius[order]
    best = 0.0
    for start in range(0, len(points), chunk):
        if 2 * radius[start] <= best:
            break
        head = points[start : start + chunk]
        # Partners still worth a look: r_j > best - r_start, and not visited before.
        stop = int(np.searchsorted(-radius, radius[start] - best, side="right"))
        tail = points[start : max(stop, start + 1)]
        squared = np.sum(head**2, axis=1)[:, None] + np.sum(tail**2, axis=1) - 2 * (head @ tail.T)
        i, j = np.unravel_index(int(np.argmax(squared)), squared.shape)
        best = max(best, float(np.linalg.norm(head[i] - tail[j])))
    return best
