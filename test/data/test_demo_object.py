# SPDX-License-Identifier: Apache-2.0
"""The demo object is closed in itself, of the promised size, and looks different from every side."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ukd_ros.data.demo_object import DEMO_NAME, demo_mesh, demo_texture, write_demo_mesh
from ukd_ros.data.meshes import load_mesh
from ukd_ros.data.placement import view_rotation
from ukd_ros.data.renderer import Item, Light, Lighting, Material, Renderer
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.pose import Pose


def test_size_budget_and_centre() -> None:
    mesh = demo_mesh()
    assert len(mesh.faces) < 6000
    assert np.allclose(mesh.vertices.min(axis=0), -mesh.vertices.max(axis=0), atol=1e-9)
    size = np.ptp(mesh.vertices, axis=0)
    assert 0.19 < size[2] < 0.22 and 0.07 < size[1] < 0.09 and size[0] < 0.1
    assert mesh.uv is not None and mesh.uv.min() >= 0 and mesh.uv.max() <= 1
    assert mesh.texture is not None and max(mesh.texture.shape[:2]) <= 512


def test_normals_agree_with_the_faces() -> None:
    mesh = demo_mesh()
    a, b, c = (mesh.vertices[mesh.faces[:, i]] for i in range(3))
    flat = np.cross(b - a, c - a)
    area = np.linalg.norm(flat, axis=1)
    agree = np.einsum("ij,ij->i", flat, mesh.normals[mesh.faces].mean(axis=1)) / np.maximum(area, 1e-15)
    assert np.mean(agree[area > 1e-9] > 0.3) > 0.99


def test_it_is_the_same_every_time() -> None:
    assert np.array_equal(demo_texture(), demo_texture())
    assert np.array_equal(demo_mesh().vertices, demo_mesh().vertices)


def test_written_files_read_back(tmp_path: Path) -> None:
    path = write_demo_mesh(tmp_path)
    assert path.name == f"{DEMO_NAME}.obj"
    back, mesh = load_mesh(path, "m"), demo_mesh()
    assert np.allclose(back.vertices, mesh.vertices, atol=1e-6)
    assert back.texture is not None and mesh.texture is not None
    assert np.array_equal(back.texture, mesh.texture)


def test_no_two_sides_look_alike() -> None:
    camera = Camera(120, 120, np.array([[240.0, 0, 59.5], [0, 240.0, 59.5], [0, 0, 1]]))
    light = Lighting((Light(np.array([0.0, -0.4, -1.0]), np.full(3, 0.7)),), np.full(3, 0.3), np.full(3, 0.3),
                     np.array([0.0, -1.0, 0.0]))  # fmt: skip
    views = []
    with Renderer(120, 120) as renderer:
        bottle = renderer.upload(demo_mesh())
        for azimuth in np.radians([0, 90, 180, 270]):
            pose = Pose(view_rotation(float(azimuth), 0.2, 0.0), np.array([0, 0, 0.5]))
            views.append(renderer.shade([Item(bottle, pose, 1, Material(specular=0.0))], camera, light).astype(float))
    for i in range(4):
        for j in range(i):
            best = min(np.abs(views[i] - v).mean() for v in (views[j], views[j][:, ::-1]))
            assert best > 4.0
