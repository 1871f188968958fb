# SPDX-License-Identifier: Apache-2.0
"""Meshes, symmetries, keypoints and diameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ukd_ros.geometry.object_model import Mesh, ObjectModel, Symmetries, box_corners, diameter_of, farthest_points
from ukd_ros.geometry.pose import Pose, exp_so3

TRIANGLE: dict[str, Any] = {
    "vertices": np.eye(3),
    "faces": np.array([[0, 1, 2]], np.int32),
    "normals": np.full((3, 3), 3**-0.5),
}


def test_a_mesh_names_what_is_wrong() -> None:
    mesh = Mesh(**TRIANGLE, colors=np.zeros((3, 3), np.uint8), uv=np.zeros((3, 2)))
    assert mesh.faces.dtype == np.int64
    for change, message in (
        ({"faces": np.array([[0, 1, 3]])}, "refers to vertex 3 .* of 3"),
        ({"faces": np.array([[0, 1, -1]])}, "^faces"),
        ({"vertices": np.zeros((0, 3)), "normals": np.zeros((0, 3))}, "empty"),
        ({"normals": np.ones((2, 3))}, "^normals"),
        ({"colors": np.zeros((3, 4), np.uint8)}, "^colors"),
        ({"texture": np.zeros((2, 2, 3), np.uint8)}, "^texture: needs uv"),
    ):
        with pytest.raises(ValueError, match=message):
            Mesh(**(TRIANGLE | change))


def test_an_object_model_names_what_is_wrong() -> None:
    corners = box_corners(np.eye(3))
    assert ObjectModel("part", corners, 0.1).symmetries.poses()[0].matrix() == pytest.approx(np.eye(4))
    for arguments, message in (
        (("", corners, 0.1), "^name"),
        (("part", corners[:3], 0.1), "^keypoints_3d"),
        (("part", corners, 0.0), "^diameter"),
        (("part", corners, float("nan")), "^diameter"),
    ):
        with pytest.raises(ValueError, match=message):
            ObjectModel(*arguments)


def test_box_corners_are_in_bit_order() -> None:
    corners = box_corners([[0, 0, 0], [1, 2, 3]])
    assert corners.tolist() == [[x, y, z] for x in (0, 1) for y in (0, 2) for z in (0, 3)]


def test_farthest_points_of_a_grid_are_its_corners_first() -> None:
    x, y = np.meshgrid(np.linspace(0, 1, 5), np.linspace(0, 1, 5))
    grid = np.stack([x.ravel(), y.ravel(), np.zeros(25)], axis=1)
    chosen = farthest_points(grid, 5)
    assert {tuple(p) for p in chosen[:4].tolist()} == {(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)}
    assert chosen[4].tolist() == [0.5, 0.5, 0]
    assert np.array_equal(chosen, farthest_points(grid, 5))


def test_farthest_points_cover_the_surface_greedily() -> None:
    """Each next point is the farthest from those before, so the gap it closes never grows."""
    vertices = np.random.default_rng(1).normal(size=(300, 3))
    chosen = farthest_points(vertices, 20)
    assert len({tuple(p) for p in chosen}) == 20
    gaps = []
    for k in range(1, 20):
        gap = np.linalg.norm(vertices[:, None] - chosen[None, :k], axis=2).min(axis=1)
        gaps.append(gap.max())
        assert np.linalg.norm(chosen[k] - chosen[:k], axis=1).min() == pytest.approx(gap.max(), abs=1e-12)
    assert np.all(np.diff(gaps) <= 1e-12)
    with pytest.raises(ValueError, match="only 2 distinct"):
        farthest_points([[0, 0, 0], [0, 0, 0], [1, 0, 0]], 3)
    with pytest.raises(ValueError, match="^count"):
        farthest_points(vertices, 0)


@pytest.mark.parametrize("shape", ["cloud", "sphere", "needle", "one"])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_diameter_is_the_largest_pairwise_distance(shape: str, chunk: int) -> None:
    points = np.random.default_rng(2).normal(size=(200, 3))
    if shape == "sphere":
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    elif shape == "needle":
        points *= [1, 0.01, 0.01]
    elif shape == "one":
        points = points[:1]
    points = 0.1 * points + 5.0
    brute = np.linalg.norm(points[:, None] - points[None], axis=2).max()
    assert diameter_of(points, chunk) == pytest.approx(brute, abs=1e-14)


def test_symmetries_leave_their_object_as_it_is() -> None:
    """A square prism whose axis passes through (0.3, 0, 0.1) looks the same after each of its four quarter turns."""
    offset = np.array([0.3, 0.0, 0.1])
    prism = box_corners([[-1, -1, -2], [1, 1, 2]]) + offset
    quarter = exp_so3([0, 0, np.pi / 2])
    turn = Pose(quarter, offset - quarter @ offset)
    symmetries = Symmetries(discrete=(turn, turn @ turn, turn.inverse()))
    poses = symmetries.poses()
    assert len(poses) == 4
    for S in poses:
        moved = S.transform(prism)
        gap = np.linalg.norm(moved[:, None] - prism[None], axis=2).min(axis=1)
        assert gap.max() < 1e-14
    continuous = Symmetries(continuous=((np.array([0, 0, 2.0]), offset),))
    assert len(continuous.poses(4)) == 4
    for S, T in zip(continuous.poses(4), [Pose.identity(), turn, turn @ turn, turn.inverse()], strict=True):
        assert np.abs(S.matrix() - T.matrix()).max() < 1e-14
    both = Symmetries(discrete=(Pose(exp_so3([np.pi, 0, 0]), np.array([0, 0, 0.2])),), continuous=continuous.continuous)
    assert len(both.poses(36)) == 72
    assert bool(both) and not bool(Symmetries())


def test_symmetries_go_to_bop_and_back_in_millimetres() -> None:
    info: dict[str, Any] = {
        "symmetries_discrete": [[-1, 0, 0, 12.0, 0, -1, 0, 30.0, 0, 0, 1, 0, 0, 0, 0, 1]],
        "symmetries_continuous": [{"axis": [0, 0, 1], "offset": [0, 250.0, 0]}],
    }
    symmetries = Symmetries.from_bop(info)
    assert symmetries.discrete[0].translation == pytest.approx(np.array([0.012, 0.03, 0]))
    assert symmetries.continuous[0][1] == pytest.approx(np.array([0, 0.25, 0]))
    back = symmetries.to_bop()
    assert np.allclose(back["symmetries_discrete"], info["symmetries_discrete"])
    assert back["symmetries_continuous"] == info["symmetries_continuous"]
    assert Symmetries.from_bop({}).to_bop() == {}
    with pytest.raises(ValueError, match="no length"):
        Symmetries.from_bop({"symmetries_continuous": [{"axis": [0, 0, 0], "offset": [0, 0, 0]}]})
