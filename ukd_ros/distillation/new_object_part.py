# SPDX-License-Identifier: Apache-2.0
"""What a mesh says about a part before anything is rendered: size, colours, holes, and turns that may not be told."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from ukd_ros.data.meshes import MeshError
from ukd_ros.data.render_dataset import DEMO, MeshSource
from ukd_ros.data.scenes import SceneConfig
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.declared_symmetry import AXES, turn_about
from ukd_ros.geometry.object_model import Mesh, diameter_of

SAME_SHAPE = 0.01
"""A turn that moves the surface by less than this fraction of the diameter is one that a camera can hardly tell."""

SURFACE_POINTS = 4000
HOLES = 0.05
"""Share of open edges above which a mesh is said to have holes."""

ONE_COLOUR = 6.0
"""Colours that vary by less (standard deviation, 0..255) are one colour."""


@dataclass(frozen=True)
class PartFacts:
    """What was measured on a mesh.

    diameter_m; faces; coloured: more than one colour; bare: no colour at all; open_edges: share of edges that have not
    two faces (holes, loose sheets, faces that cross); alike: turns that leave the shape as it is, in words of
    `--symmetry`; keypoint_kind: farthest, or box for a mesh of too few corners; digest: of the surface and its colours.
    """

    diameter_m: float
    faces: int
    coloured: bool
    bare: bool
    open_edges: float
    alike: tuple[str, ...]
    keypoint_kind: str
    digest: str

    def as_data(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def sentences(self, name: str, declared: Sequence[str], scene: SceneConfig) -> list[str]:
        """Return what to look at before hours are spent on it: the size first, then what may be wrong."""
        said = [f"{name}: {100 * self.diameter_m:.1f} cm across, {self.faces} faces (another size? then another unit)"]
        left = [word for word in self.alike if word not in declared]
        if left:
            words = " ".join(f"--symmetry {word}" for word in left)
            said.append(
                f"{name}: the shape is the same after turns about {', '.join(left)}; if its colours do not tell them "
                f"apart either, stop and say so ({words})"
            )
        if self.bare and scene.target_color is None:
            said.append(
                f"{name}: the mesh has no colours and is rendered in any; if you know the part's, say so "
                "(--set 'scene.target_color=[r,g,b]', 0 to 255)"
            )
        if self.open_edges > HOLES:
            said.append(f"{name}: {self.open_edges:.0%} of the mesh's edges have not two faces (holes, loose sheets)")
        return said


def inspect_part(source: MeshSource, keypoints: int) -> PartFacts:
    """Load a mesh and look at it; MeshError as `load_mesh`, and for a flat mesh or one of fewer than four corners."""
    mesh = source.load()
    corners = np.unique(np.round(mesh.vertices, 7), axis=0)
    where = source.label() if source.path == DEMO else source.path
    if len(corners) < 4 or np.linalg.matrix_rank(corners - corners.mean(axis=0), tol=1e-6 * np.ptp(corners)) < 3:
        raise MeshError(f"{where}: all {len(corners)} corners lie in one plane; export a solid part.")
    return PartFacts(
        diameter_m=diameter_of(mesh.vertices),
        faces=len(mesh.faces),
        coloured=_coloured(mesh),
        bare=mesh.bare,
        open_edges=_open_edges(mesh),
        alike=_alike(mesh),
        keypoint_kind="farthest" if len(corners) >= keypoints else "box",
        digest=_digest(mesh),
    )


def _coloured(mesh: Mesh) -> bool:
    """Return whether the mesh has more than one colour."""
    seen: npt.NDArray[np.uint8] | None = mesh.texture if mesh.texture is not None else mesh.colors
    return seen is not None and float(seen.reshape(-1, 3).astype(np.float64).std(axis=0).max()) > ONE_COLOUR


def _open_edges(mesh: Mesh) -> float:
    """Return the share of edges that do not have two faces; vertices at one place count as one."""
    _, group = np.unique(np.round(mesh.vertices, 7), axis=0, return_inverse=True)
    faces = group.reshape(-1)[mesh.faces]
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    edges = edges[edges[:, 0] != edges[:, 1]]
    _, counts = np.unique(edges, axis=0, return_counts=True)
    return float((counts != 2).mean()) if len(counts) else 1.0


def _surface(mesh: Mesh, rng: np.random.Generator) -> FloatArray:
    """Return points [n,3] spread evenly over the surface."""
    corners = mesh.vertices[mesh.faces]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    chosen = rng.choice(len(areas), SURFACE_POINTS, p=areas / areas.sum())
    u, v = rng.random((2, SURFACE_POINTS, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    a, b, c = corners[chosen].transpose(1, 0, 2)
    return np.asarray(a + u * (b - a) + v * (c - a), dtype=np.float64)


def _alike(mesh: Mesh) -> tuple[str, ...]:
    """Return the turns about the axes, through the middle of the box, that leave the shape (not its colours) as it is.

    Compared with what another sample of the same surface is away, so that coarse samples do not hide a symmetry.
    """
    rng = np.random.default_rng(0)
    points, others = _surface(mesh, rng), _surface(mesh, rng)
    tree = cKDTree(others)
    middle = 0.5 * (mesh.vertices.min(axis=0) + mesh.vertices.max(axis=0))
    limit = float(np.quantile(tree.query(points)[0], 0.98)) + SAME_SHAPE * diameter_of(mesh.vertices)

    def same(axis: FloatArray, degrees: float) -> bool:
        away = tree.query(turn_about(axis, degrees, middle).transform(points))[0]
        return float(np.quantile(away, 0.98)) < limit

    found = []
    for name, number in AXES.items():
        axis = np.eye(3)[number]
        if all(same(axis, angle) for angle in (27.0, 74.0, 131.0)):
            found.append(name)
        else:
            found += [f"{name}:{step}" for step in (60, 90, 120, 180) if same(axis, step)][:1]
    return tuple(found)


def _digest(mesh: Mesh) -> str:
    """Return what tells this surface from any other."""
    parts = (mesh.vertices, mesh.faces, mesh.colors, mesh.uv, mesh.texture)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return what tells a bag from another: name, size and time of change; a bag may be too large to be read twice."""
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    facts = [f"{item.name} {item.stat().st_size} {item.stat().st_mtime_ns}" for item in files]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
