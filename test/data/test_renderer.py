# SPDX-License-Identifier: Apache-2.0
"""The renderer against the camera model, closed forms of shading and shadow, and its refusals."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from ukd_ros.data.clutter import primitive_meshes, quad_mesh
from ukd_ros.data.renderer import Item, Light, Lighting, Material, Renderer, RendererError, smooth_outlines
from ukd_ros.geometry.camera import Camera, DistortionModel
from ukd_ros.geometry.object_model import Mesh
from ukd_ros.geometry.pose import Pose, exp_so3

WIDTH, HEIGHT = 160, 120
DARK = np.zeros(3)


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    with Renderer(WIDTH, HEIGHT) as opened:
        yield opened


def camera(cx: float = 79.5, cy: float = 59.5, skew: float = 0.0) -> Camera:
    return Camera(WIDTH, HEIGHT, np.array([[150.0, skew, cx], [0, 140.0, cy], [0, 0, 1]]))


def at(*place: float) -> Pose:
    return Pose(np.eye(3), np.array(place))


def facing_light(power: float = 1.0, towards: npt.ArrayLike = (0.0, 0.0, -1.0)) -> Lighting:
    direction = np.asarray(towards, dtype=np.float64)
    return Lighting((Light(direction, np.full(3, power)),), DARK, DARK, np.array([0.0, -1.0, 0.0]))


def ball() -> Mesh:
    return primitive_meshes(np.random.default_rng(0), turned=0)[5]


@pytest.mark.parametrize(("cx", "cy", "skew"), [(79.5, 59.5, 0), (20.0, 100.25, 0), (140.7, 8.1, 0), (60.2, 70.9, 5.0)])
def test_a_small_ball_lands_where_the_camera_projects_it(renderer: Renderer, cx: float, cy: float, skew: float) -> None:
    view = camera(cx, cy, skew)
    mesh = renderer.upload(ball())
    for place in ([0.02, -0.01, 1.0], [-0.3, 0.2, 1.4], [0.25, 0.22, 0.9]):
        wanted = view.project(np.array([place]))[0]
        if not (8 < wanted[0] < WIDTH - 8 and 8 < wanted[1] < HEIGHT - 8):
            continue
        ident, depth = renderer.labels([Item(mesh, at(*place), 7, scale=(0.05, 0.05, 0.05))], view)
        rows, columns = np.nonzero(ident == 7)
        assert np.hypot(columns.mean() - wanted[0], rows.mean() - wanted[1]) < 0.25
        assert depth[rows, columns].min() == pytest.approx(place[2] - 0.025, abs=2e-3)


def test_pixel_centres_are_at_whole_numbers(renderer: Renderer) -> None:
    view = camera(40.0, 30.0)
    # a square that covers pixels 50..69 x 40..49 to their very borders: u from 49.5 to 69.5, v from 39.5 to 49.5
    left, right = (49.5 - 40.0) / 150, (69.5 - 40.0) / 150
    top, bottom = (39.5 - 30.0) / 140, (49.5 - 30.0) / 140
    half = ((right - left) / 2, (bottom - top) / 2)
    pose = at((left + right) / 2, (top + bottom) / 2, 1.0)
    ident, _ = renderer.labels([Item(renderer.upload(quad_mesh()), pose, 3, scale=(*half, 1.0))], view)
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[40:50, 50:70] = True
    assert np.array_equal(ident == 3, expected)


def test_depth_of_a_tilted_plane_is_its_closed_form(renderer: Renderer) -> None:
    view = camera(70.0, 50.0)
    R = exp_so3(np.array([0.5, -0.4, 0.1]))
    pose = Pose(R, np.array([0.05, 0.02, 1.5]))
    ident, depth = renderer.labels([Item(renderer.upload(quad_mesh()), pose, 1, scale=(3.0, 3.0, 1.0))], view)
    rows, columns = np.nonzero(ident == 1)
    rays = view.rays(np.stack([columns, rows], axis=1).astype(np.float64))
    normal = R[:, 2]
    assert len(rows) > 10000
    assert np.allclose(depth[rows, columns], (pose.translation @ normal) / (rays @ normal), rtol=1e-4)


def test_the_nearer_one_wins_and_outlines_do_not_care(renderer: Renderer) -> None:
    mesh = renderer.upload(ball())
    near, far = Item(mesh, at(0.0, 0, 0.6), 1, scale=(0.1,) * 3), Item(mesh, at(0.02, 0, 1.2), 2, scale=(0.3,) * 3)
    alone, _ = renderer.labels([far], camera())
    both, _ = renderer.labels([far, near], camera())
    outlines = renderer.silhouettes([near, far], camera())
    assert (both == 1).sum() == outlines[0].pixels
    assert (both == 2).sum() < outlines[1].pixels == (alone == 2).sum()
    rows, columns = np.nonzero(alone == 2)
    x, y, w, h = outlines[1].box
    assert (x, y) == (columns.min(), rows.min())
    assert (x + w - 1, y + h - 1) == (columns.max(), rows.max())


def test_outlines_count_what_leaves_the_image(renderer: Renderer) -> None:
    mesh = renderer.upload(ball())
    inside = Item(mesh, at(0.0, 0.0, 1.0), 1, scale=(0.2,) * 3)
    # moved sideways in the plane of constant depth by exactly 80 px, half of it is beyond the border
    beyond = Item(mesh, at(80.0 / 150, 0.0, 1.0), 2, scale=(0.2,) * 3)
    whole, cut = renderer.silhouettes([inside, beyond], camera())
    assert cut.pixels == pytest.approx(whole.pixels, rel=0.15)  # perspective stretches it a little
    assert cut.box[0] + cut.box[2] > WIDTH
    ident, _ = renderer.labels([beyond], camera())
    assert 0.4 < (ident == 2).sum() / cut.pixels < 0.6


def test_more_outlines_than_channels(renderer: Renderer) -> None:
    mesh = renderer.upload(ball())
    items = [Item(mesh, at(0.02 * i, 0, 1.0), i + 1, scale=(0.05 + 0.02 * i,) * 3) for i in range(6)]
    together = [o.pixels for o in renderer.silhouettes(items, camera())]
    assert together == [renderer.silhouettes([item], camera())[0].pixels for item in items]
    assert together == sorted(together)


@pytest.mark.parametrize("angle", [0.0, 0.6, 1.2])
def test_a_matt_plane_obeys_lambert(renderer: Renderer, angle: float) -> None:
    light = facing_light(0.8, (np.sin(angle), 0.0, -np.cos(angle)))
    plane = Item(renderer.upload(quad_mesh()), at(0, 0, 1.0), 1, Material(np.eye(3) * 0.5, specular=0.0),
                 scale=(2.0, 2.0, 1.0), casts_shadow=False)  # fmt: skip
    image = renderer.shade([plane], camera(), light).astype(np.float64) / 255
    assert np.allclose(image[60, 80] ** 2, 0.5 * 0.8 * np.cos(angle), atol=0.006)


def test_a_shadow_lies_where_the_light_throws_it(renderer: Renderer) -> None:
    towards = np.array([0.6, 0.0, -0.8])
    plane = Item(renderer.upload(quad_mesh()), at(0, 0, 1.0), 1, Material(specular=0.0), scale=(2.0, 2.0, 1.0),
                 casts_shadow=False)  # fmt: skip
    blocker = Item(renderer.upload(ball()), at(0.0, 0.0, 0.8), 2, Material(specular=0.0), scale=(0.08,) * 3)
    image = renderer.shade([plane, blocker], camera(), facing_light(0.9, towards))
    shifted = np.array([0.0, 0.0, 0.8]) - towards * (0.2 / 0.8)  # from the ball along the light onto z = 1
    u, v = np.rint(camera().project(shifted[None])[0]).astype(int)
    mirrored = np.rint(camera().project(shifted[None] * [-1, 1, 1])[0]).astype(int)
    assert image[v, u].max() < 10
    assert image[mirrored[1], mirrored[0]].min() > 150


def test_textures_are_upright(renderer: Renderer) -> None:
    corners = np.zeros((2, 2, 3), np.uint8)
    corners[0, 0], corners[0, 1], corners[1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    texture = corners.repeat(32, axis=0).repeat(32, axis=1)
    # an object facing the camera with its y upwards: x right, y up, z towards the camera
    vertices = np.array([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * 0.3
    mesh = Mesh(vertices, np.array([[0, 1, 2], [0, 2, 3]]), np.tile([0.0, 0, 1], (4, 1)),
                uv=np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]]), texture=texture)  # fmt: skip
    pose = Pose(np.diag([1.0, -1.0, -1.0]), np.array([0, 0, 1.0]))
    item = Item(renderer.upload(mesh), pose, 1, Material(specular=0.0))
    image = renderer.shade([item], camera(), facing_light())
    for du, dv, color in ((-35, -32, (255, 0, 0)), (35, -32, (0, 255, 0)), (-35, 32, (0, 0, 255)), (35, 32, (0, 0, 0))):
        assert np.abs(image[60 + dv, 80 + du].astype(int) - color).max() < 12


def test_the_backdrop_is_shown_unchanged_and_upright(renderer: Renderer) -> None:
    backdrop = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    assert np.array_equal(renderer.shade([], camera(), facing_light(), backdrop), backdrop)


def test_multisampling_gives_the_same_inside() -> None:
    with Renderer(WIDTH, HEIGHT, samples=4) as smooth, Renderer(WIDTH, HEIGHT) as plain:
        images = []
        for opened in (smooth, plain):
            item = Item(opened.upload(ball()), at(0, 0, 1.0), 1, Material(specular=0.0), scale=(0.4,) * 3)
            images.append(opened.shade([item], camera(), facing_light()).astype(int))
            ident, depth = opened.labels([item], camera())
    differs = np.abs(images[0] - images[1]).max(axis=2) > 6
    assert 0 < differs.sum() < 400  # the outline only
    softened = smooth_outlines(images[1].astype(np.uint8), ident, depth).astype(int)
    assert np.square(softened - images[0]).sum() < 0.8 * np.square(images[1] - images[0]).sum()


def test_a_camera_of_another_size_or_with_a_lens_is_refused(renderer: Renderer) -> None:
    with pytest.raises(ValueError, match="10x10.*160x120"):
        renderer.labels([], Camera(10, 10, np.diag([9.0, 9.0, 1.0])))
    bent = Camera(WIDTH, HEIGHT, camera().matrix, DistortionModel.PLUMB_BOB, np.array([0.1, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match="distortion"):
        renderer.labels([], bent)


def test_without_opengl_the_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import moderngl

    def fail(**_: object) -> None:
        raise Exception("(standalone) eglGetDisplay: not found")

    monkeypatch.setattr(moderngl, "create_context", fail)
    with pytest.raises(RendererError, match="libegl1 libgl1-mesa-dri libgles2"):
        Renderer(8, 8)
