# SPDX-License-Identifier: Apache-2.0
"""Mesh files (.ply .obj .stl) become `Mesh` values in metres, and meshes become `ObjectModel` values.

Files come from anywhere, so nothing in them is trusted: the unit must be said by the caller, an implausible size is
refused, and a texture that lies outside the mesh's own folder is refused instead of followed.
"""

from __future__ import annotations

import logging
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.data.whole_files import write_bytes
from ukd_ros.geometry.object_model import Mesh, ObjectModel, Symmetries, box_corners, diameter_of, farthest_points

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float64]

UNIT_METRES = {"mm": 1e-3, "cm": 1e-2, "m": 1.0}
SUFFIXES = (".ply", ".obj", ".stl")
MIN_DIAMETER = 0.005
MAX_DIAMETER = 5.0


class MeshError(ValueError):
    """A mesh file cannot be used; the message names the file and says what to do."""


def load_mesh(path: str | Path, unit: str | None, max_texture: int = 1024) -> Mesh:
    """Read a .ply, .obj or .stl file into a `Mesh` in metres.

    `unit` is the length that one unit of the file means ("mm", "cm" or "m"): mesh files do not say it. Scenes with
    several parts are merged, normals are computed where the file has none, textures are limited to `max_texture` px.
    Raises MeshError for a missing or unreadable file, an unknown unit, an empty mesh, a texture outside the mesh's
    folder, or a diameter outside 5 mm to 5 m.
    """
    path = Path(path)
    if unit not in UNIT_METRES:
        raise MeshError(
            f"{path}: the unit of a mesh file must be said, got {unit!r}: give one of {', '.join(UNIT_METRES)} "
            "(CAD exports and BOP models are usually mm, scanned YCB models m)."
        )
    if path.suffix.lower() not in SUFFIXES:
        raise MeshError(f"{path}: a mesh must be one of {', '.join(SUFFIXES)}, convert it first.")
    if not path.is_file():
        raise MeshError(f"{path}: there is no such mesh file.")
    parts = _read_parts(path)
    mesh = _merge(path, parts, max_texture, UNIT_METRES[unit])
    _require_plausible(path, diameter_of(mesh.vertices), unit)
    return mesh


def object_model(
    name: str,
    mesh: Mesh,
    keypoints: int = 12,
    kind: str = "farthest",
    symmetries: Symmetries | None = None,
) -> ObjectModel:
    """Make the `ObjectModel` of a mesh: its keypoints [K,3] m in the mesh frame and its exact diameter.

    `kind` "farthest" picks `keypoints` vertices by farthest-point sampling (deterministic), "box" the eight corners of
    the bounding box as WDRNet does. Raises MeshError for another kind or fewer than 4 keypoints.
    """
    if kind == "farthest":
        if not 4 <= keypoints <= len(mesh.vertices):
            raise MeshError(
                f"object {name!r}: {keypoints} keypoints asked for, from 4 to {len(mesh.vertices)} work; or take the "
                "corners of its bounds (keypoint_kind=box)."
            )
        points = farthest_points(mesh.vertices, keypoints)
    elif kind == "box":
        points = box_corners(mesh.vertices)
    else:
        raise MeshError(f"object {name!r}: keypoint kind {kind!r} is unknown, use 'farthest' or 'box'.")
    return ObjectModel(
        name=name,
        keypoints_3d=points,
        diameter=diameter_of(mesh.vertices),
        symmetries=symmetries if symmetries is not None else Symmetries((), ()),
        mesh=mesh,
    )


def vertex_normals(vertices: npt.ArrayLike, faces: npt.ArrayLike) -> FloatArray:
    """Return unit vertex normals [V,3]: face normals averaged by area (vertices without a face get +z)."""
    v = np.asarray(vertices, dtype=np.float64)
    f = np.asarray(faces, dtype=np.int64)
    area = np.cross(v[f[:, 1]] - v[f[:, 0]], v[f[:, 2]] - v[f[:, 0]])
    total = np.zeros_like(v)
    for corner in range(3):
        np.add.at(total, f[:, corner], area)
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return np.where(length > 1e-30, total / np.maximum(length, 1e-30), np.array([0.0, 0.0, 1.0]))


def simplified(mesh: Mesh, max_faces: int) -> Mesh:
    """Return the mesh with at most about `max_faces` faces, by merging vertices in a grid (for rendering only).

    Vertices of one cell and one texture island become one, so colours and uv survive; it lies where it is nearest to
    the planes of their faces (quadric placement, Lindstrom, SIGGRAPH 2000): their mean would lie inside every curve,
    and a thing 2 % too small is a depth 2 % wrong. The grid is coarsened until the budget holds. A mesh within the
    budget is returned as it is.
    """
    if len(mesh.faces) <= max_faces:
        return mesh
    low = mesh.vertices.min(axis=0)
    size = float(np.ptp(mesh.vertices, axis=0).max())
    for cells in (256, 192, 144, 108, 80, 60, 45, 34, 25, 19, 14, 10):
        out = _clustered(mesh, low, size / cells)
        if len(out.faces) <= max_faces:
            return out
    return out


def write_ply(path: str | Path, mesh: Mesh, unit: str = "mm") -> None:
    """Write a binary .ply in `unit` as BOP has it: normals, and vertex colours or uv (with the texture as a .png)."""
    path = Path(path)
    scale = 1.0 / UNIT_METRES[unit]
    fields: list[tuple[str, str]] = [(n, "<f4") for n in ("x", "y", "z", "nx", "ny", "nz")]
    columns: list[npt.NDArray[Any]] = [*(mesh.vertices * scale).T, *mesh.normals.T]
    header = ["ply", "format binary_little_endian 1.0"]
    if mesh.uv is not None and mesh.texture is not None:
        picture = path.with_suffix(".png")
        header.append(f"comment TextureFile {picture.name}")
        fields += [("texture_u", "<f4"), ("texture_v", "<f4")]
        columns += [*mesh.uv.T]
        ok, png = cv2.imencode(".png", cv2.cvtColor(np.array(mesh.texture), cv2.COLOR_RGB2BGR))
        if not ok:
            raise MeshError(f"{picture}: OpenCV could not encode the texture.")
        write_bytes(picture, png.tobytes())
    if mesh.colors is not None:
        fields += [(n, "u1") for n in ("red", "green", "blue")]
        columns += [*mesh.colors.T]
    vertices = np.zeros(len(mesh.vertices), dtype=fields)
    for (name, _), column in zip(fields, columns, strict=True):
        vertices[name] = column
    faces = np.zeros(len(mesh.faces), dtype=[("n", "u1"), ("v", "<i4", 3)])
    faces["n"], faces["v"] = 3, mesh.faces
    header.append(f"element vertex {len(vertices)}")
    header += [f"property {'uchar' if kind == 'u1' else 'float'} {name}" for name, kind in fields]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header", ""]
    write_bytes(path, "\n".join(header).encode() + vertices.tobytes() + faces.tobytes())


def _clustered(mesh: Mesh, low: FloatArray, cell: float) -> Mesh:
    keys = np.floor((mesh.vertices - low) / cell).astype(np.int64)
    if mesh.uv is not None:  # far uv must not be averaged over a seam
        keys = np.hstack([keys, np.floor(mesh.uv * 16).astype(np.int64)])
    # opposite sides of a thin wall must not fall together
    keys = np.hstack([keys, (mesh.normals > 0.0).astype(np.int64)])
    _, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.reshape(-1)
    count = np.bincount(group).astype(np.float64)

    def mean(values: npt.NDArray[Any]) -> FloatArray:
        columns = [np.bincount(group, weights=values[:, i].astype(np.float64)) / count for i in range(values.shape[1])]
        return np.stack(columns, axis=1)

    faces = group[mesh.faces]
    keep = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 0] != faces[:, 2])
    normals = mean(mesh.normals)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    normals = np.where(length > 1e-9, normals / np.maximum(length, 1e-9), np.array([0.0, 0.0, 1.0]))
    return Mesh(
        vertices=_placed(mesh, group, mean(mesh.vertices), cell),
        faces=faces[keep],
        normals=normals,
        colors=None if mesh.colors is None else np.clip(np.rint(mean(mesh.colors)), 0, 255).astype(np.uint8),
        uv=None if mesh.uv is None else mean(mesh.uv),
        texture=mesh.texture,
    )


def _placed(mesh: Mesh, group: npt.NDArray[np.int64], mean: FloatArray, cell: float) -> FloatArray:
    """Return for each group of vertices the point nearest to the planes of their faces, within a cell of `mean`."""
    corners = mesh.vertices[mesh.faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])  # longer for larger faces
    A = np.zeros((len(mean), 3, 3))
    b = np.zeros((len(mean), 3))
    for corner in range(3):
        owner = group[mesh.faces[:, corner]]
        offset = np.einsum("ni,ni->n", normal, corners[:, corner] - mean[owner])
        for i in range(3):
            b[:, i] += np.bincount(owner, weights=normal[:, i] * offset, minlength=len(mean))
            for j in range(3):
                A[:, i, j] += np.bincount(owner, weights=normal[:, i] * normal[:, j], minlength=len(mean))
    # along a plane the quadric says nothing: there the mean stays
    size = np.trace(A, axis1=1, axis2=2)
    step = np.linalg.solve(A + (0.02 * size + 1e-30)[:, None, None] * np.eye(3), b[..., None])[..., 0]
    length = np.linalg.norm(step, axis=1, keepdims=True)
    return np.asarray(mean + step * np.minimum(1.0, cell / np.maximum(length, 1e-30)))


def _read_parts(path: Path) -> list[Any]:
    import trimesh
    from trimesh.resolvers import Resolver

    root = path.parent.resolve()

    class FolderResolver(Resolver):
        """Opens what a mesh file refers to, only inside the mesh's own folder."""

        def __init__(self) -> None:
            """Nothing to keep: the folder is that of the mesh."""

        def get(self, name: str) -> bytes:
            wanted = (root / name.strip()).resolve()
            if not wanted.is_relative_to(root):
                raise MeshError(
                    f"{path}: refers to {name!r} outside its folder; copy that beside the mesh if you trust it."
                )
            return _utf8(wanted.read_bytes()) if wanted.suffix.lower() == ".mtl" else wanted.read_bytes()

        def write(self, name: str, data: Any) -> None:
            raise MeshError(f"{path}: reading a mesh writes nothing, yet {name!r} was to be written.")

        def keys(self) -> list[str]:
            return [str(p.relative_to(root)) for p in root.iterdir()]

        def namespaced(self, namespace: str) -> FolderResolver:
            return self

    _require_texture_files(path, root)
    try:
        loaded = trimesh.load_scene(
            BytesIO(_readable(path)), file_type=path.suffix.lower()[1:], resolver=FolderResolver(), process=False
        )
        parts = [g for g in loaded.geometry.values() if isinstance(g, trimesh.Trimesh) and len(g.faces) > 0]
    except MeshError:
        raise
    except Exception as error:  # trimesh raises whatever its parsers meet: all of them mean an unreadable file
        raise MeshError(f"{path}: cannot be read as {path.suffix}: {type(error).__name__}: {error}.") from error
    if not parts:
        raise MeshError(f"{path}: contains no triangles; export a surface mesh, not points or curves.")
    return parts


def _readable(path: Path) -> bytes:
    """Return a mesh file whose text is UTF-8: trimesh asks a package that may be missing what other text may be.

    A name or comment of another encoding loses its strange letters; numbers never have any.
    """
    data = path.read_bytes()
    if path.suffix.lower() == ".ply":
        header, end, rest = data.partition(b"end_header")
        return _utf8(header) + end + (rest if b"format binary" in header else _utf8(rest))
    if path.suffix.lower() == ".stl" and len(data) >= 84:
        (faces,) = struct.unpack_from("<I", data, 80)
        if len(data) == 84 + 50 * faces:  # binary
            return data
        if not data.lstrip().lower().startswith(b"solid"):
            raise MeshError(
                f"{path}: promises {faces} triangles, which are {84 + 50 * faces} bytes, and has {len(data)}: it is "
                "cut off or damaged; export it again."
            )
    return _utf8(data)


def _utf8(data: bytes) -> bytes:
    """Return text as it is where it is UTF-8, else with ? for every byte that is not ASCII (trimesh counts bytes)."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("ascii", "replace").encode("ascii", "replace")
    return data


def _require_texture_files(path: Path, root: Path) -> None:
    """Refuse references that leave the folder before the loader, which only logs resolver errors, sees them."""
    if path.suffix.lower() == ".ply":
        with path.open("rb") as stream:
            header = stream.read(65536).split(b"end_header")[0].decode("ascii", "replace")
        comments = [line for line in header.splitlines() if line.lower().startswith("comment texturefile ")]
        _inside(path, root, [line.split(None, 2)[2] for line in comments])
    if path.suffix.lower() != ".obj":
        return
    libraries = _obj_values(path, "mtllib")
    _inside(path, root, libraries)
    for library in libraries:
        if not (root / library).is_file():
            raise MeshError(f"{path}: its material file {library!r} is missing; put it beside the mesh.")
        textures = _obj_values(root / library, "map_Kd")
        _inside(root / library, root, textures)
        for texture in textures:
            if not (root / texture).is_file():
                raise MeshError(f"{root / library}: its texture {texture!r} is missing; put it beside the mesh.")


def _obj_values(path: Path, key: str) -> list[str]:
    values = []
    with path.open("r", encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if line.lower().lstrip().startswith(key.lower() + " "):
                values.append(line.strip().split(None, 1)[1])
    return values


def _inside(path: Path, root: Path, names: list[str]) -> None:
    for name in names:
        if not (root / name).resolve().is_relative_to(root):
            raise MeshError(
                f"{path}: refers to {name!r}, which lies outside its folder; copy it beside the mesh if you trust it."
            )


def _merge(path: Path, parts: list[Any], max_texture: int, scale: float) -> Mesh:
    textures = [_texture_of(part, max_texture) for part in parts]
    textured = [t for t in textures if t is not None]
    texture: npt.NDArray[np.uint8] | None = None
    if len(textured) > 1:
        uvs, texture = _stacked_textures(parts, textures)
    else:
        texture = textured[0] if textured else None
        uvs = [
            np.zeros((len(part.vertices), 2)) if t is None else _uv_of(part)
            for part, t in zip(parts, textures, strict=True)
        ]
    colors = [_colors_of(part, t is not None) for part, t in zip(parts, textures, strict=True)]
    has_colors = any(c is not None for c in colors)
    vertices, faces, normals, offset = [], [], [], 0
    for part in parts:
        v = np.asarray(part.vertices, dtype=np.float64) * scale
        f = np.asarray(part.faces, dtype=np.int64)
        vertices.append(v)
        faces.append(f + offset)
        offset += len(v)
        given = part._cache.cache.get("vertex_normals")  # only what the file itself said
        usable = given is not None and np.all(np.isfinite(given)) and bool(np.all(np.linalg.norm(given, axis=1) > 0.5))
        normals.append(np.asarray(given, dtype=np.float64) if usable else _smooth_normals(v, f))
    if not np.all(np.isfinite(np.vstack(vertices))):
        raise MeshError(f"{path}: has vertices that are not finite numbers; repair the mesh.")
    white = [np.full((len(v), 3), 255, np.uint8) if c is None else c for v, c in zip(vertices, colors, strict=True)]
    return Mesh(
        vertices=np.vstack(vertices),
        faces=np.vstack(faces),
        normals=np.vstack(normals),
        colors=np.vstack(white) if has_colors else None,
        uv=np.vstack(uvs) if texture is not None else None,
        texture=texture,
    )


def _smooth_normals(vertices: FloatArray, faces: npt.NDArray[np.int64]) -> FloatArray:
    """Smooth normals over coincident vertices, which .stl and textured files repeat at every face or seam."""
    _, group = np.unique(np.round(vertices, 9), axis=0, return_inverse=True)
    group = group.reshape(-1)
    merged = np.zeros((group.max() + 1, 3))
    merged[group] = vertices
    return vertex_normals(merged, group[faces])[group]


def _stacked_textures(
    parts: list[Any], textures: list[npt.NDArray[np.uint8] | None]
) -> tuple[list[FloatArray], npt.NDArray[np.uint8]]:
    """Put the textures of several parts under one another in one image and move each part's uv accordingly."""
    width = max(t.shape[1] for t in textures if t is not None)
    tiles: list[npt.NDArray[Any]] = []
    uvs: list[FloatArray] = []
    top = 0
    height = sum(t.shape[0] for t in textures if t is not None)
    for part, tile in zip(parts, textures, strict=True):
        if tile is None:
            uvs.append(np.zeros((len(part.vertices), 2)))
            continue
        uv = np.mod(_uv_of(part), 1.0 + 1e-9)
        tiles.append(cv2.resize(tile, (width, tile.shape[0]), interpolation=cv2.INTER_AREA))
        rows = top + (1.0 - uv[:, 1]) * tile.shape[0]
        uvs.append(np.stack([uv[:, 0], 1.0 - rows / height], axis=1))
        top += tile.shape[0]
    return uvs, np.vstack(tiles).astype(np.uint8)


def _uv_of(part: Any) -> FloatArray:
    return np.asarray(part.visual.uv, dtype=np.float64)


def _texture_of(part: Any, max_texture: int) -> npt.NDArray[np.uint8] | None:
    if getattr(part.visual, "uv", None) is None:
        return None
    material = getattr(part.visual, "material", None)
    image = getattr(material, "image", None)
    if image is None:
        image = getattr(material, "baseColorTexture", None)
    if image is None:
        return None
    texture = np.asarray(image.convert("RGB"), dtype=np.uint8)
    longest = max(texture.shape[:2])
    if longest > max_texture:
        size = (max(1, texture.shape[1] * max_texture // longest), max(1, texture.shape[0] * max_texture // longest))
        texture = np.asarray(cv2.resize(texture, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return texture


def _colors_of(part: Any, textured: bool) -> npt.NDArray[np.uint8] | None:
    if textured:
        return None
    visual = part.visual
    if getattr(visual, "kind", None) in ("vertex", "face"):
        return np.asarray(visual.vertex_colors, dtype=np.uint8)[:, :3]
    diffuse = getattr(getattr(visual, "material", None), "main_color", None)
    if diffuse is not None:
        return np.tile(np.asarray(diffuse, dtype=np.uint8)[:3], (len(part.vertices), 1))
    return None


def _require_plausible(path: Path, diameter: float, unit: str) -> None:
    if MIN_DIAMETER <= diameter <= MAX_DIAMETER:
        return
    raw = diameter / UNIT_METRES[unit]
    fits = [u for u, metres in UNIT_METRES.items() if MIN_DIAMETER <= raw * metres <= MAX_DIAMETER]
    hint = f"with unit {' or '.join(fits)} it would be plausible" if fits else "no unit makes it plausible"
    raise MeshError(
        f"{path}: read in {unit} the object would be {diameter:.4g} m across, outside {MIN_DIAMETER} to "
        f"{MAX_DIAMETER:g} m; {hint}. Check the unit."
    )
