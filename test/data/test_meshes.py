# SPDX-License-Identifier: Apache-2.0
"""Mesh files: units, formats, normals, textures, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import trimesh

from ukd_ros.data.demo_object import demo_mesh, write_demo_mesh
from ukd_ros.data.meshes import MeshError, load_mesh, object_model, simplified, vertex_normals, write_ply
from ukd_ros.geometry.object_model import Mesh, diameter_of

CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=np.float64)
SIDES = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
TRIANGLES = np.array([t for a, b, c, d in SIDES for t in ((a, b, c), (a, c, d))])


def write_ascii_ply(path: Path, scale: float) -> Path:
    lines = ["ply", "format ascii 1.0", "element vertex 8", "property float x", "property float y", "property float z",
             "property uchar red", "property uchar green", "property uchar blue", "property uchar alpha",
             "element face 12", "property list uchar int vertex_indices", "end_header"]  # fmt: skip
    lines += [f"{x * scale} {y * scale} {z * scale} {int(200 * x)} {int(100 * y)} 7 255" for x, y, z in CUBE]
    lines += [f"3 {a} {b} {c}" for a, b, c in TRIANGLES]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_binary_stl(path: Path, scale: float) -> Path:
    body = b"".join(struct.pack("<12fH", 0, 0, 0, *(CUBE[triangle] * scale).reshape(-1), 0) for triangle in TRIANGLES)
    path.write_bytes(b"\0" * 80 + struct.pack("<I", len(TRIANGLES)) + body)
    return path


def write_obj(folder: Path, texture: str = "t.png", library: str = "m.mtl") -> Path:
    lines = [f"mtllib {library}", "usemtl a"] + [f"v {x * 0.1} {y * 0.1} {z * 0.1}" for x, y, z in CUBE]
    lines += ["vt 0 0", "vt 1 0", "vt 1 1", "vt 0 1"]
    lines += [f"f {a + 1}/1 {b + 1}/2 {c + 1}/3" for a, b, c in TRIANGLES]
    (folder / "cube.obj").write_text("\n".join(lines) + "\n")
    (folder / "m.mtl").write_text(f"newmtl a\nKd 1 1 1\nmap_Kd {texture}\n")
    cv2.imwrite(str(folder / "t.png"), np.full((4, 4, 3), 90, np.uint8))
    return folder / "cube.obj"


@pytest.mark.parametrize(("unit", "scale"), [("mm", 100.0), ("cm", 10.0), ("m", 0.1)])
def test_the_unit_scales_to_metres(tmp_path: Path, unit: str, scale: float) -> None:
    for path in (write_ascii_ply(tmp_path / "a.ply", scale), write_binary_stl(tmp_path / "a.stl", scale)):
        mesh = load_mesh(path, unit)
        assert np.allclose(np.ptp(mesh.vertices, axis=0), 0.1, atol=1e-7)
        assert diameter_of(mesh.vertices) == pytest.approx(0.1 * np.sqrt(3), rel=1e-6)


def test_ascii_ply_keeps_vertex_colours(tmp_path: Path) -> None:
    mesh = load_mesh(write_ascii_ply(tmp_path / "a.ply", 100.0), "mm")
    assert mesh.colors is not None
    far = int(np.argmax(mesh.vertices.sum(axis=1)))
    assert mesh.colors[far].tolist() == [200, 100, 7]


def test_computed_normals_are_unit_and_point_outwards(tmp_path: Path) -> None:
    for path in (write_ascii_ply(tmp_path / "a.ply", 100.0), write_binary_stl(tmp_path / "a.stl", 100.0)):
        mesh = load_mesh(path, "mm")
        outward = mesh.vertices - 0.05
        assert np.allclose(np.linalg.norm(mesh.normals, axis=1), 1.0)
        assert np.all(np.einsum("ij,ij->i", outward, mesh.normals) > 0)


@pytest.mark.parametrize("unit", [None, "", "inch"])
def test_a_mesh_without_a_known_unit_is_refused(tmp_path: Path, unit: str | None) -> None:
    path = write_ascii_ply(tmp_path / "part.ply", 100.0)
    with pytest.raises(MeshError, match=r"part\.ply.*unit.*mm, cm, m"):
        load_mesh(path, unit)


@pytest.mark.parametrize(
    ("scale", "unit", "hint"), [(100.0, "m", "mm or cm"), (0.1, "mm", "unit m "), (1e9, "mm", "no unit")]
)
def test_an_implausible_diameter_names_the_plausible_unit(tmp_path: Path, scale: float, unit: str, hint: str) -> None:
    with pytest.raises(MeshError, match=hint):
        load_mesh(write_ascii_ply(tmp_path / "a.ply", scale), unit)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(MeshError, match=r"none\.ply.*no such"):
        load_mesh(tmp_path / "none.ply", "mm")
    (tmp_path / "a.step").write_text("x")
    with pytest.raises(MeshError, match=r"a\.step.*\.ply"):
        load_mesh(tmp_path / "a.step", "mm")
    (tmp_path / "cut.ply").write_bytes(write_ascii_ply(tmp_path / "a.ply", 100.0).read_bytes()[:300])
    with pytest.raises(MeshError, match=r"cut\.ply"):
        load_mesh(tmp_path / "cut.ply", "mm")


def test_obj_texture_is_read_and_limited(tmp_path: Path) -> None:
    path = write_obj(tmp_path)
    cv2.imwrite(str(tmp_path / "t.png"), np.full((300, 200, 3), (10, 20, 30), np.uint8))
    mesh = load_mesh(path, "m", max_texture=60)
    assert mesh.texture is not None and mesh.uv is not None
    assert mesh.texture.shape == (60, 40, 3)
    assert mesh.texture[0, 0].tolist() == [30, 20, 10]  # OpenCV wrote BGR, a mesh holds RGB


def test_a_texture_outside_the_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    cv2.imwrite(str(tmp_path / "secret.png"), np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(MeshError, match="outside"):
        load_mesh(write_obj(inside, texture="../secret.png"), "m")
    with pytest.raises(MeshError, match="outside"):
        load_mesh(write_obj(inside, texture=str(tmp_path / "secret.png")), "m")
    with pytest.raises(MeshError, match="outside"):
        load_mesh(write_obj(inside, library="../m.mtl"), "m")
    with pytest.raises(MeshError, match="missing"):
        load_mesh(write_obj(inside, texture="lost.png"), "m")


def test_a_ply_texture_outside_the_folder_is_refused(tmp_path: Path) -> None:
    text = write_ascii_ply(tmp_path / "a.ply", 100.0).read_text()
    (tmp_path / "b.ply").write_text(text.replace("ascii 1.0\n", "ascii 1.0\ncomment TextureFile ../x.png\n"))
    with pytest.raises(MeshError, match="outside"):
        load_mesh(tmp_path / "b.ply", "mm")


@pytest.mark.parametrize("textured", [True, False])
def test_written_ply_reads_back(tmp_path: Path, textured: bool) -> None:
    mesh = demo_mesh()
    if not textured:
        colors = np.random.default_rng(0).integers(0, 256, (len(mesh.vertices), 3)).astype(np.uint8)
        mesh = Mesh(mesh.vertices, mesh.faces, mesh.normals, colors=colors)
    write_ply(tmp_path / "o.ply", mesh, "mm")
    back = load_mesh(tmp_path / "o.ply", "mm")
    assert np.allclose(back.vertices, mesh.vertices, atol=1e-7)
    assert np.array_equal(back.faces, mesh.faces)
    assert np.allclose(back.normals, mesh.normals, atol=1e-3)
    if textured:
        assert back.uv is not None and mesh.uv is not None
        assert back.texture is not None and mesh.texture is not None
        assert np.allclose(back.uv, mesh.uv, atol=1e-6)
        assert np.array_equal(back.texture, mesh.texture)
    else:
        assert back.colors is not None and mesh.colors is not None
        assert np.array_equal(back.colors, mesh.colors)


def test_simplified_keeps_the_shape_within_a_cell() -> None:
    mesh = demo_mesh()
    out = simplified(mesh, 1500)
    assert len(out.faces) <= 1500
    assert np.abs(out.vertices.min(axis=0) - mesh.vertices.min(axis=0)).max() < 0.004
    assert np.abs(out.vertices.max(axis=0) - mesh.vertices.max(axis=0)).max() < 0.004
    assert simplified(mesh, 10**6) is mesh


def test_simplified_shrinks_nothing() -> None:
    # the mean of a cell's vertices lies inside every curve: 4 % of the area of an outline went that way
    ball = trimesh.creation.icosphere(subdivisions=5, radius=0.1)
    normals = vertex_normals(ball.vertices, ball.faces)
    out = simplified(Mesh(np.asarray(ball.vertices), np.asarray(ball.faces), normals), 2000)
    assert 500 < len(out.faces) <= 2000
    volume = trimesh.Trimesh(out.vertices, out.faces, process=False).volume
    assert volume == pytest.approx(ball.volume, rel=0.01)
    radius = np.linalg.norm(out.vertices, axis=1)
    assert abs(radius.mean() - 0.1) < 0.0005 and np.ptp(radius) < 0.004
    box = trimesh.creation.box(extents=(0.1, 0.2, 0.3)).subdivide().subdivide().subdivide().subdivide().subdivide()
    faces = np.asarray(box.faces)
    out = simplified(Mesh(np.asarray(box.vertices), faces, vertex_normals(box.vertices, faces)), 3000)
    assert len(out.faces) <= 3000
    assert np.allclose(np.ptp(out.vertices, axis=0), (0.1, 0.2, 0.3), atol=0.001)  # corners stay corners


def test_text_that_is_not_utf_8_is_read(tmp_path: Path) -> None:
    """CAD programs on Windows write the part's name in Latin-1."""
    ply = write_ascii_ply(tmp_path / "a.ply", 100.0)
    ply.write_bytes(ply.read_bytes().replace(b" 1.0\n", b" 1.0\ncomment Pr\xfcfling\n", 1))
    obj = write_obj(tmp_path)
    obj.write_bytes(b"# Pr\xfcfling\n" + obj.read_bytes())
    (tmp_path / "m.mtl").write_bytes(b"# Gr\xfcn\nnewmtl a\nKd 0 1 0\n")
    solid = trimesh.Trimesh(CUBE * 100.0, TRIANGLES).export(file_type="stl_ascii")
    stl = tmp_path / "a.stl"
    stl.write_bytes(solid.encode().replace(b"solid", b"solid Pr\xfcfling", 1))
    for path, unit in ((ply, "mm"), (obj, "m"), (stl, "mm")):
        assert diameter_of(load_mesh(path, unit).vertices) == pytest.approx(0.1 * np.sqrt(3))


def test_a_binary_stl_cut_off_says_so(tmp_path: Path) -> None:
    path = write_binary_stl(tmp_path / "a.stl", 100.0)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(MeshError, match=r"a\.stl: promises 12 triangles.*cut off"):
        load_mesh(path, "mm")


def test_normals_of_a_sphere_are_its_radii() -> None:
    t, p = np.meshgrid(np.linspace(0, 2 * np.pi, 60), np.linspace(0.02, np.pi - 0.02, 60))
    v = np.stack([np.sin(p) * np.cos(t), np.sin(p) * np.sin(t), np.cos(p)], axis=-1).reshape(-1, 3)
    index = np.arange(3600).reshape(60, 60)
    a, b, c = index[:-1, :-1].ravel(), index[1:, :-1].ravel(), index[:-1, 1:].ravel()
    d = index[1:, 1:].ravel()
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([b, d, c], 1)])
    inner = (np.abs(v[:, 2]) < 0.9) & (np.abs(t.ravel() - np.pi) < 3.0)
    assert np.einsum("ij,ij->i", vertex_normals(v, faces), v)[inner].min() > 0.995


def test_object_model_has_its_keypoints_on_the_surface(tmp_path: Path) -> None:
    mesh = load_mesh(write_demo_mesh(tmp_path), "m")
    model = object_model("bottle", mesh, 12)
    gap = np.linalg.norm(mesh.vertices[:, None] - model.keypoints_3d[None], axis=2).min(axis=0)
    assert model.keypoints_3d.shape == (12, 3) and gap.max() < 1e-12
    assert object_model("bottle", mesh, kind="box").keypoints_3d.shape == (8, 3)
    with pytest.raises(MeshError, match="keypoints"):
        object_model("bottle", mesh, 3)
    with pytest.raises(MeshError, match="kind"):
        object_model("bottle", mesh, kind="corner")


def test_lmo_driller_has_its_published_diameter(lmo_root: Path) -> None:
    mesh = load_mesh(lmo_root / "models" / "obj_000008.ply", "mm")
    assert diameter_of(mesh.vertices) == pytest.approx(0.261472, abs=2e-4)
    assert mesh.colors is not None
