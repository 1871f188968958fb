# SPDX-License-Identifier: Apache-2.0
"""Scenes: same seed, same pixels; labels agree with pixels; views keep their ranges; the sensor's closed forms."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.stats import chi2

from ukd_ros.data import render_dataset as job
from ukd_ros.data.bop import BopDataset
from ukd_ros.data.clutter import collage, photographs, primitive_meshes, random_texture
from ukd_ros.data.demo_object import demo_mesh, write_demo_mesh
from ukd_ros.data.placement import (
    SceneSampler,
    hue_matrix,
    random_rotation,
    rotation_between,
    view_angles,
    view_rotation,
)
from ukd_ros.data.preview import write_contact_sheet
from ukd_ros.data.render_dataset import MeshSource, RenderError, render_dataset
from ukd_ros.data.renderer import Item, Lighting, Material, RendererError
from ukd_ros.data.scene_renderer import SceneRenderer
from ukd_ros.data.scenes import Body, SceneConfig
from ukd_ros.data.sensor import SensorConfig, expose
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.object_model import Mesh
from ukd_ros.geometry.pose import Pose, log_so3

SMALL = SceneConfig(width=160, height=120, targets=(2, 3), distractors=(1, 3), texture_pool=8)
DEMO = [MeshSource("demo")]


@pytest.fixture(scope="module")
def renderer() -> Iterator[SceneRenderer]:
    opened = SceneRenderer(SMALL, [demo_mesh()], [], seed=5)
    yield opened
    opened.close()


def sampler(collages: int = 0, **changes: object) -> SceneSampler:
    config = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    meshes = [demo_mesh(), *primitive_meshes(np.random.default_rng(0))]
    return SceneSampler(config, meshes, 1, 0, 8, collages)


def test_an_image_depends_on_its_index_alone(renderer: SceneRenderer) -> None:
    first = {i: renderer.render(i)[0].image for i in (0, 1, 2)}
    again = SceneRenderer(SMALL, [demo_mesh()], [], seed=5)
    for i in (2, 0):
        assert np.array_equal(again.render(i)[0].image, first[i])
    again.close()
    other = SceneRenderer(SMALL, [demo_mesh()], [], seed=6)
    assert not np.array_equal(other.render(0)[0].image, first[0])
    other.close()


def test_labels_agree_with_the_pixels(renderer: SceneRenderer) -> None:
    vertices = demo_mesh().vertices
    checked = 0
    for index in range(12):
        scene, _ = renderer.render(index)
        union = np.zeros((120, 160), int)
        for instance in scene.instances:
            union += instance.mask
            assert 0 <= instance.pixels_visible == instance.mask.sum() <= instance.silhouette.pixels
            pixels = scene.camera.project(instance.pose.transform(vertices))
            x, y, w, h = instance.silhouette.box
            if min(x, y) < -40 or x + w > 200 or y + h > 150:
                continue  # leaves the doubled canvas' neighbourhood: its outline is cut
            assert np.abs(pixels.min(axis=0) - [x, y]).max() < 1.5
            assert np.abs(pixels.max(axis=0) - [x + w - 1, y + h - 1]).max() < 1.5
            checked += 1
        assert union.max() <= 1  # a pixel belongs to one instance
    assert checked > 10


def test_occluders_leave_what_was_promised() -> None:
    config = dataclasses.replace(SMALL, targets=(1, 1), occluded_fraction=1.0, min_visible=0.4, truncated_fraction=0.0)
    opened = SceneRenderer(config, [demo_mesh()], [], seed=1)
    shares = []
    for index in range(25):
        scene, _ = opened.render(index)
        shares += [i.pixels_visible / i.silhouette.pixels for i in scene.instances]
    opened.close()
    assert min(shares) >= 0.4
    assert np.mean(np.array(shares) < 0.95) > 0.3  # and they do occlude


def test_views_in_the_air_keep_their_ranges() -> None:
    draws = sampler(table_fraction=0.0, elevation_deg=(-8.0, 40.0), azimuth_deg=(10.0, 60.0), roll_sigma_deg=5.0)
    rolls = []
    for index in range(150):
        for body in draws.sample(np.random.default_rng(index)).bodies:
            if body.target < 0:
                continue
            ray = body.pose.translation / np.linalg.norm(body.pose.translation)
            seen = rotation_between(ray, np.array([0.0, 0.0, 1.0])) @ body.pose.rotation
            azimuth, elevation, roll = np.degrees(view_angles(seen))
            assert 10 - 1e-6 <= azimuth <= 60 + 1e-6 and -8 - 1e-6 <= elevation <= 40 + 1e-6
            assert 0.5 <= np.linalg.norm(body.pose.translation) <= 1.6
            rolls.append(roll)
    n = len(rolls)
    assert chi2.ppf(0.0005, n) < np.sum(np.square(rolls)) / 25 < chi2.ppf(0.9995, n)


def test_things_stand_on_the_table() -> None:
    draws = sampler(table_fraction=1.0)
    for index in range(40):
        scene = draws.sample(np.random.default_rng(index))
        assert scene.table is not None
        up, foot = scene.up, scene.table.pose.translation
        assert np.allclose(scene.table.pose.rotation[:, 2], up)
        for body in scene.bodies:
            if body.target < 0:
                continue
            heights = (body.pose.transform(demo_mesh().vertices) - foot) @ up
            assert abs(heights.min()) < 1e-9
            assert np.degrees(np.arccos(body.pose.rotation[:, 2] @ up)) < 25


def test_a_crowd_stands_together() -> None:
    def spread(crowded: float) -> float:
        draws = sampler(table_fraction=1.0, targets=(4, 6), distractors=(0, 0), crowded_fraction=crowded,
                        occluded_fraction=0.0)  # fmt: skip
        spreads = []
        for index in range(60):
            scene = draws.sample(np.random.default_rng(index))
            places = np.array([b.pose.translation for b in scene.bodies if b.target >= 0])
            if len(places) > 2:
                pixels = scene.camera.project(places)
                spreads.append(float(np.std(pixels, axis=0).mean()) / scene.camera.width)
        assert len(spreads) > 30
        return float(np.median(spreads))

    assert spread(1.0) < 0.75 * spread(0.0)
    draws = sampler(table_fraction=1.0, targets=(4, 6), distractors=(0, 0), crowded_fraction=1.0, occluded_fraction=0.0)
    pairs = 0
    for index in range(60):
        scene = draws.sample(np.random.default_rng(index))
        assert scene.table is not None
        places = np.array([b.pose.translation for b in scene.bodies if b.target >= 0])
        feet = places - np.outer((places - scene.table.pose.translation) @ scene.up, scene.up)
        for i in range(1, len(feet)):  # the first may stand where no free place was found
            apart = np.linalg.norm(feet[i] - feet[:i], axis=1)
            assert apart.min() > 0.5 * 1.5 * draws.radius[0]  # not inside one another
            pairs += i
    assert pairs > 100


def test_a_busy_scene_takes_collages_and_others_never_do() -> None:
    for share, expected in ((1.0, True), (0.0, False)):
        draws = sampler(collages=5, table_fraction=1.0, busy_fraction=share)
        for index in range(10):
            scene = draws.sample(np.random.default_rng(index))
            assert scene.busy is expected and scene.table is not None and scene.table.texture is not None
            assert (8 <= scene.table.texture < 13) is expected
    # what is switched off draws nothing: older settings keep their images
    plain, off = sampler(), sampler(collages=5, busy_fraction=0.0, crowded_fraction=0.0)
    for index in range(5):
        one, other = (draws.sample(np.random.default_rng(index)) for draws in (plain, off))
        assert np.array_equal(one.bodies[-1].pose.translation, other.bodies[-1].pose.translation)


def test_far_things_are_drawn_with_fewer_faces_and_look_the_same(lmo_root: Path) -> None:
    mesh = BopDataset(lmo_root, "test").mesh(8)
    opened = SceneRenderer(dataclasses.replace(SMALL, width=640, height=480), [mesh], [], seed=3)
    camera = Camera(640, 480, np.array([[570.0, 0, 320], [0, 570.0, 240], [0, 0, 1.0]]))
    lighting = Lighting((), np.full(3, 0.5), np.full(3, 0.5), np.array([0.0, -1.0, 0.0]), 1.0, 0.0)
    material, finest = Material(np.eye(3)), opened.gpu[0][0]
    for distance, finer in ((0.6, True), (2.6, False)):
        pose = Pose(np.eye(3), np.array([0.0, 0.0, distance]))
        body = Body(0, pose, material, target=0)
        assert (opened.mesh_of(body, camera) is finest) is finer
        seen = []
        for gpu in (finest, opened.mesh_of(body, camera)):
            item = Item(gpu, pose, 1, material, (1.0, 1.0, 1.0), None)
            behind = np.full((480, 640, 3), 128, np.uint8)
            seen.append(opened.renderer.shade([item], camera, lighting, behind).astype(int))
            outline = opened.renderer.silhouettes([item], camera)[0]
            seen.append(outline.pixels)
        assert abs(seen[3] / seen[1] - 1) < 0.03
        covered = np.abs(seen[0] - 128).max(axis=2) > 3
        assert np.abs(seen[0] - seen[2])[covered].mean() < 8
    opened.close()


def test_uniform_views_are_uniform() -> None:
    rng = np.random.default_rng(11)
    n = 4000
    R = np.array([random_rotation(rng) for _ in range(n)])
    assert np.allclose(R @ R.transpose(0, 2, 1), np.eye(3), atol=1e-12) and np.all(np.linalg.det(R) > 0)
    # every entry has mean 0 and variance 1/3, and they are uncorrelated
    assert chi2.ppf(0.0005, 9) < 3 * n * np.square(R.mean(axis=0)).sum() < chi2.ppf(0.9995, 9)
    # the angle's density is (1 - cos a)/pi, so a/pi - sin(a)/pi is uniform
    angle = np.linalg.norm(log_so3(R), axis=1)
    level = np.sort((angle - np.sin(angle)) / np.pi)
    assert np.abs(level - (np.arange(n) + 0.5) / n).max() < 1.95 / np.sqrt(n)  # Kolmogorov-Smirnov, 0.1 %


def test_view_angles_invert_view_rotation() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        angles = rng.uniform([-np.pi, -1.5, -np.pi], [np.pi, 1.5, np.pi])
        assert np.allclose(view_angles(view_rotation(*angles)), angles)
    # from the front, unrolled: the object's z is up in the image and the camera looks along -x
    assert np.allclose(view_rotation(0.0, 0.0, 0.0), [[0, 1, 0], [0, 0, -1], [-1, 0, 0]])


def test_hue_matrix_keeps_grey_and_inverts() -> None:
    assert np.allclose(hue_matrix(1.1, 0.4) @ np.ones(3), np.ones(3))
    assert np.allclose(hue_matrix(0.7, 2.0) @ hue_matrix(-0.7, 0.5), np.eye(3))


QUIET = SensorConfig(
    exposure_strength=0.0, white_balance=0.0, gamma=(2.0, 2.0), contrast=(0.0, 0.0), saturation=(1.0, 1.0),
    vignetting=(0.0, 0.0), defocus_px=(0.0, 0.0), motion_fraction=0.0, read_noise=(1e-9, 1e-9),
    shot_noise=(1e-9, 1e-9), sharpen_fraction=0.0,
)  # fmt: skip


def test_an_ideal_sensor_changes_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    error = np.abs(expose(image, QUIET, np.random.default_rng(1)).astype(int) - image)
    assert error[image > 30].max() <= 1  # the table of the tone curve is coarse in the dark
    assert error.max() <= 4


def bare_colors(config: SceneConfig, mesh: Mesh) -> FloatArray:
    """Return the mean colour [n,3] (0..255) that each of some instances shows, one an image and alone."""
    alone = dataclasses.replace(config, targets=(1, 1), distractors=(0, 0), occluded_fraction=0.0, table_fraction=0.0)
    renderer = SceneRenderer(alone, [mesh], [], seed=8)
    means = []
    for i in range(24):
        scene = renderer.render(i)[0]
        means += [scene.image[instance.mask].mean(axis=0) for instance in scene.instances]
    renderer.close()
    return np.array(means)


def test_a_mesh_without_colours_is_drawn_in_any_or_in_the_one_that_was_said() -> None:
    bare = dataclasses.replace(demo_mesh(), texture=None, uv=None)
    any_color = bare_colors(SMALL, bare)
    assert np.ptp(any_color.mean(axis=1)) > 100  # dark ones and bright ones
    assert np.ptp(any_color, axis=1).max() > 60  # and some that are neither grey nor white
    red = bare_colors(dataclasses.replace(SMALL, target_color=(200, 20, 20)), bare)
    assert (red.argmax(axis=1) == 0).mean() > 0.9 > 0.7 > (any_color.argmax(axis=1) == 0).mean()
    painted = dataclasses.replace(bare, colors=np.full((len(bare.vertices), 3), (20, 20, 200), np.uint8))
    blue = bare_colors(dataclasses.replace(SMALL, target_color=(200, 20, 20)), painted)
    assert (blue.argmax(axis=1) == 2).mean() > 0.9  # a mesh's own colours are the part's


def test_sensor_noise_has_its_variance() -> None:
    config = dataclasses.replace(QUIET, read_noise=(0.004, 0.004), shot_noise=(0.02, 0.02))
    image = np.full((200, 200, 3), 160, np.uint8)
    light = (160 / 255) ** 2
    seen = expose(image, config, np.random.default_rng(4)).astype(np.float64) / 255
    expected = 0.004**2 + 0.02**2 * light
    ratio = (seen**2).var() / expected
    assert 0.85 < ratio < 1.3  # rounding to 8 bits adds (2 sqrt(L) / 255)^2 / 12, demosaicing correlates


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"distance": (2.0, 1.0)}, "distance"), ({"view": "sideways"}, "view"), ({"table_fraction": 1.5}, "table"),
     ({"camera_matrix": (1.0, 2.0)}, "camera_matrix"), ({"targets": (0, 1)}, "targets"),
     ({"fov_deg": (1, 200)}, "fov"), ({"elevation_deg": (-100.0, 0.0)}, "elevation_deg"), ({"width": 2}, "width"),
     ({"target_gain": (0.0, 1.0)}, "gain"), ({"target_color": (1, 2)}, "target_color"),
     ({"target_color": (0, 256, 0)}, "target_color")],
)  # fmt: skip
def test_impossible_settings_are_named(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        SceneConfig(**changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shot_noise"):
        SensorConfig(shot_noise=(0.0, 1.0))


def test_clutter_is_well_formed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        texture = random_texture(rng)
        assert texture.shape == (256, 256, 3) and texture.dtype == np.uint8
    textures = [random_texture(rng) for _ in range(4)]
    busy = collage(rng, textures, [])
    assert busy.shape == (512, 512, 3) and busy.dtype == np.uint8
    for mesh in primitive_meshes(rng):
        assert np.ptp(mesh.vertices, axis=0).max() <= 1.0 + 1e-9
        assert np.allclose(np.linalg.norm(mesh.normals, axis=1), 1, atol=1e-6)
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((200, 300, 3), np.uint8))
    assert photographs(str(tmp_path))[0].shape == (200, 300, 3)
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.jpg"):
        photographs(str(tmp_path))
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ValueError, match="no .jpg or .png"):
        photographs(str(tmp_path))


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_a_data_set_is_the_same_for_any_number_of_workers_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = render_dataset(SMALL, DEMO, tmp_path / "one", 10, seed=3, workers=1, progress=False)
    two = render_dataset(SMALL, DEMO, tmp_path / "two", 10, seed=3, workers=2, progress=False)
    whole = contents(one)
    assert whole == contents(two)
    # interrupted: one record and the merged files are gone, and an image is half there
    (two / "train/000000/.records/000004.json").unlink()
    (two / "train/000000/rgb/000004.jpg").unlink()
    (two / "train/000000/scene_gt.json").unlink()
    render_dataset(SMALL, DEMO, two, 10, seed=3, workers=1, progress=False)
    assert whole == contents(two)
    data = BopDataset(two)
    assert len(data) == 10 and data.object_ids == (1,) and data.name(1) == "spray_bottle"
    view = data.view(0)
    assert view.objects and all(label.mask is not None for label in view.objects)
    sheet = cv2.imread(str(write_contact_sheet(two, tmp_path / "sheet.png", n=4, columns=2, width=100)))
    assert sheet is not None and sheet.shape == (150, 200, 3)

    def fail(*_: object) -> None:
        raise AssertionError("nothing was left to render")

    monkeypatch.setattr(job, "_run", fail)
    render_dataset(SMALL, DEMO, two, 10, seed=3, workers=1, progress=False)
    with pytest.raises(RenderError, match=r"render\.yaml.*seed"):
        render_dataset(SMALL, DEMO, two, 10, seed=4, progress=False)
    with pytest.raises(RenderError, match=r"scene\.distance"):
        render_dataset(dataclasses.replace(SMALL, distance=(0.3, 0.9)), DEMO, two, 10, seed=3, progress=False)
    with pytest.raises(RenderError, match="at least 10"):  # fewer would leave images that no label belongs to
        render_dataset(SMALL, DEMO, two, 7, seed=3, progress=False)
    assert whole == contents(two)


@pytest.mark.slow
def test_declared_symmetries_are_the_data_sets(tmp_path: Path) -> None:
    target = [MeshSource("demo", symmetry=("z:180", "x"))]
    out = render_dataset(SMALL, target, tmp_path / "alike", 1, workers=1, progress=False)
    read = BopDataset(out).symmetries(1)
    middle = 0.5 * (demo_mesh().vertices.min(axis=0) + demo_mesh().vertices.max(axis=0))
    assert len(read.discrete) == len(read.continuous) == 1
    np.testing.assert_allclose(read.discrete[0].transform(middle[None])[0], middle, atol=1e-9)
    render_dataset(SMALL, target, out, 1, workers=1, progress=False)  # the same job is known again
    with pytest.raises(RenderError, match=r"render\.yaml.*symmetry"):
        render_dataset(SMALL, DEMO, out, 1, workers=1, progress=False)


def test_wrong_jobs_are_refused_before_anything_is_rendered(tmp_path: Path) -> None:
    with pytest.raises(RenderError, match="spray_bottle: symmetry 'z:45'"):
        render_dataset(SMALL, [MeshSource("demo", symmetry=("z:45",))], tmp_path / "a", 1)
    assert not (tmp_path / "a").exists()
    with pytest.raises(RenderError, match="count"):
        render_dataset(SMALL, DEMO, tmp_path / "a", 0)
    with pytest.raises(RenderError, match="at least one mesh"):
        render_dataset(SMALL, [], tmp_path / "a", 1)
    with pytest.raises(RenderError, match="twice"):
        render_dataset(SMALL, DEMO * 2, tmp_path / "a", 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "holiday.jpg").write_text("mine")
    with pytest.raises(RenderError, match="not empty"):
        render_dataset(SMALL, DEMO, tmp_path / "b", 1)
    path = write_demo_mesh(tmp_path / "mesh")
    with pytest.raises(ValueError, match=r"spray_bottle\.obj.*unit"):
        render_dataset(SMALL, [MeshSource(str(path))], tmp_path / "c", 1)
    with pytest.raises(ValueError, match=r"spray_bottle\.obj.*unit m "):
        render_dataset(SMALL, [MeshSource(str(path), "mm")], tmp_path / "c", 1)
    assert not (tmp_path / "a").exists() and not (tmp_path / "c").exists()


def test_what_fails_in_a_worker_is_said_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "SceneRenderer", _no_opengl)
    with pytest.raises(RendererError, match="libegl1"):
        job._start((SMALL, DEMO, [], 0, tmp_path, "train"))


def _no_opengl(*_: object) -> None:
    raise RendererError("no headless OpenGL: apt install libegl1")


def test_the_records_are_bop(tmp_path: Path) -> None:
    out = render_dataset(SMALL, DEMO, tmp_path / "set", 1, seed=8, workers=1, progress=False)
    scene = out / "train" / "000000"
    truth = json.loads((scene / "scene_gt.json").read_text())["0"]
    info = json.loads((scene / "scene_gt_info.json").read_text())["0"]
    camera = json.loads((scene / "scene_camera.json").read_text())["0"]
    assert set(truth[0]) == {"cam_R_m2c", "cam_t_m2c", "obj_id"} and truth[0]["cam_t_m2c"][2] > 300  # mm
    assert {"bbox_obj", "bbox_visib", "px_count_all", "px_count_valid", "px_count_visib", "visib_fract"} <= set(info[0])
    assert len(camera["cam_K"]) == 9 and camera["depth_scale"] == 1.0
    models = json.loads((out / "models" / "models_info.json").read_text())["1"]
    assert 200 < models["diameter"] < 230 and models["size_z"] > 190
