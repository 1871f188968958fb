# SPDX-License-Identifier: Apache-2.0
"""Windows keep pixels and labels together, whatever process draws them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distillation"))

from cubes import CAMERA, CUBE, CubeViews  # noqa: E402

from ukd_ros.data.augment import AugmentConfig, augment, motion_kernel  # noqa: E402
from ukd_ros.data.dataset import WindowConfig, WindowDataset  # noqa: E402
from ukd_ros.geometry.object_model import ObjectModel, Symmetries  # noqa: E402
from ukd_ros.geometry.pose import Pose, exp_so3  # noqa: E402
from ukd_ros.geometry.view import LabelledView, ObjectLabel  # noqa: E402

PLAIN = AugmentConfig(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def test_a_window_depends_on_its_index_alone() -> None:
    one = WindowDataset(CubeViews(6), [CUBE], WindowConfig(), seed=3)
    other = WindowDataset(CubeViews(6), [CUBE], WindowConfig(), seed=3)
    later = [other.sample(i) for i in (40, 7, 12)]
    for index, sample in zip((40, 7, 12), later, strict=True):
        again = one.sample(index)
        np.testing.assert_array_equal(again.image, sample.image)
        np.testing.assert_array_equal(again.mask, sample.mask)
        np.testing.assert_allclose(again.ray_matrix, sample.ray_matrix)
    assert not np.array_equal(one.sample(7).image, one.sample(8).image)
    reseeded = WindowDataset(CubeViews(6), [CUBE], WindowConfig(), seed=4)
    assert not np.array_equal(one.sample(7).image, reseeded.sample(7).image)


def test_every_pass_visits_every_object_once() -> None:
    data = WindowDataset(CubeViews(8), [CUBE], WindowConfig(zoom_fraction=1.0), seed=0)
    for epoch in range(2):
        seen = {
            float(o.points_camera[0, 0]) for i in range(len(data)) for o in data.sample(epoch * len(data) + i).objects
        }
        assert len(seen) == len(data) == 8


def test_rays_through_the_keypoints_meet_the_true_points() -> None:
    """Keypoints, affine map, rotation and ray matrix agree: the ray of each keypoint passes through its 3D point."""
    data = WindowDataset(CubeViews(10), [CUBE], WindowConfig(rotation_deg=180.0), seed=1)
    checked = 0
    for index in range(30):
        sample = data.sample(index)
        for item in sample.objects:
            ray = np.column_stack((item.xy, np.ones(len(item.xy)))) @ sample.ray_matrix.T
            points = item.points_camera
            np.testing.assert_allclose(points[:, :2] / points[:, 2:], ray[:, :2] / ray[:, 2:], atol=1e-9)
            checked += 1
    assert checked > 20


@pytest.mark.parametrize(("zoom_fraction", "locate_width"), [(1.0, 320), (0.0, 160)])
def test_mask_and_keypoints_land_on_the_drawn_pixels(zoom_fraction: float, locate_width: int) -> None:
    """The mask's centroid stays within a pixel of where the source mask's centroid is taken by the keypoints' map."""
    window = WindowConfig(
        zoom_fraction=zoom_fraction,
        locate_width=locate_width,
        empty_fraction=0,
        rotation_deg=45,
        zoom_shift=0.02,
        augment=PLAIN,
    )
    views = CubeViews(12)
    data = WindowDataset(views, [CUBE], window, seed=2)
    sources = {}
    for i in range(12):
        label = views.view(i).objects[0]
        sources[round(float(label.T_camera_object.transform(CUBE.keypoints_3d)[0, 0]), 9)] = label
    compared = 0
    for index in range(24):
        sample = data.sample(index)
        for number, item in enumerate(sample.objects):
            label = sources[round(float(item.points_camera[0, 0]), 9)]
            assert label.mask is not None
            v, u = np.nonzero(label.mask)
            xy = CAMERA.project(item.points_camera)
            solution = np.linalg.lstsq(np.column_stack((xy, np.ones(len(xy)))), item.xy, rcond=None)[0]
            expected = np.array([u.mean(), v.mean(), 1.0]) @ solution
            wv, wu = np.nonzero(sample.mask == number + 1)
            if wu.min() > 0 and wv.min() > 0 and wu.max() < 127 and wv.max() < 127:
                np.testing.assert_allclose([wu.mean(), wv.mean()], expected, atol=0.7)
                compared += 1
    assert compared > 8


def test_shrinking_does_not_shift_the_picture() -> None:
    """A bright disc drawn at a known place is found there in the window, for enlarging and shrinking windows."""

    class Disc:
        def __len__(self) -> int:
            return 1

        def view(self, index: int) -> LabelledView:
            source = CubeViews(1).view(0)
            label = source.objects[0]
            xy = CAMERA.project(label.T_camera_object.transform(CUBE.keypoints_3d))[0]
            v, u = np.mgrid[:240, :320]
            image = np.repeat((250 * np.exp(-((u - xy[0]) ** 2 + (v - xy[1]) ** 2) / 18.0))[..., None], 3, 2)
            return LabelledView(image.astype(np.uint8), CAMERA, objects=(label,))

    for width in (120, 240, 480):
        window = WindowConfig(
            zoom_fraction=0, locate_width=width, locate_spread=1, empty_fraction=0, rotation_deg=0, augment=PLAIN
        )
        data = WindowDataset(Disc(), [CUBE], window, seed=0)
        compared = 0
        for index in range(20):
            sample = data.sample(index)
            expected = sample.objects[0].xy[0] if sample.objects else np.array([-1.0, -1.0])
            if not (15 < expected).all() or not (expected < 112).all():
                continue
            weight = sample.image[..., 0].astype(float) * (sample.image[..., 0] != 114)
            v, u = np.mgrid[:128, :128]
            near = np.hypot(u - expected[0], v - expected[1]) < 12 * width / 320
            weight = weight * near
            found = np.array([(u * weight).sum(), (v * weight).sum()]) / weight.sum()
            np.testing.assert_allclose(found, expected, atol=0.35)
            compared += 1
        assert compared >= 3


def test_hidden_and_small_objects_are_ignored_not_background() -> None:
    class Hidden(CubeViews):
        def view(self, index: int) -> LabelledView:
            source = super().view(index)
            label = source.objects[0]
            fraction = 0.1 if index == 0 else 1.0
            return LabelledView(
                source.image, CAMERA, objects=(ObjectLabel("cube", label.T_camera_object, fraction, label.mask),)
            )

    views = Hidden(2)
    data = WindowDataset(views, [CUBE], WindowConfig(zoom_fraction=1.0, augment=PLAIN), seed=0)
    assert len(data) == 1, "the hidden cube is no window's subject"
    small = WindowDataset(
        CubeViews(4), [CUBE], WindowConfig(zoom_fraction=0, locate_width=20, empty_fraction=0, augment=PLAIN), seed=0
    )
    assert all(o.ignored for i in range(8) for o in small.sample(i).objects)


def test_views_without_masks_or_objects_are_refused() -> None:
    class Bare(CubeViews):
        def view(self, index: int) -> LabelledView:
            source = super().view(index)
            label = source.objects[0]
            return LabelledView(source.image, CAMERA, objects=(ObjectLabel("cube", label.T_camera_object),))

    with pytest.raises(ValueError, match="mask"):
        WindowDataset(Bare(1), [CUBE], WindowConfig(), seed=0)
    stranger = ObjectModel("teapot", CUBE.keypoints_3d, CUBE.diameter, CUBE.symmetries)
    with pytest.raises(ValueError, match="teapot"):
        WindowDataset(CubeViews(2), [stranger], WindowConfig(), seed=0)


def test_augmentation_covers_mask_and_pixels_alike(rng: np.random.Generator) -> None:
    image = np.full((128, 128, 3), 200, np.uint8)
    donor = np.zeros_like(image)
    mask = np.ones((128, 128), np.uint8)
    only_cover = AugmentConfig(1.0, 0.45, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    covered = 0
    for _ in range(20):
        out, left = augment(image, mask, donor, only_cover, rng)
        changed = np.any(out != 200, axis=2)
        assert not (changed & (left > 0)).any()
        covered += int((left == 0).any())
    assert covered >= 15
    assert (image == 200).all() and (mask == 1).all(), "the inputs are not altered"
    same, _ = augment(image, mask, donor, PLAIN, rng)
    np.testing.assert_array_equal(same, image)


def test_motion_kernels_are_centred_and_normalised(rng: np.random.Generator) -> None:
    for _ in range(20):
        kernel = motion_kernel(float(rng.uniform(2, 9)), float(rng.uniform(0, np.pi)))
        v, u = np.mgrid[: kernel.shape[0], : kernel.shape[1]] - (kernel.shape[0] - 1) / 2
        assert kernel.sum() == pytest.approx(1.0, abs=1e-5)
        assert abs((u * kernel).sum()) < 1e-5 and abs((v * kernel).sum()) < 1e-5


def test_windows_that_look_alike_have_one_label() -> None:
    """Two data sets whose labels differ by a symmetry motion give the same keypoints, in turned windows too."""
    half = Pose(np.diag([-1.0, -1.0, 1.0]), np.array([0.002, 0.001, 0.0]))
    axis = (np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, 0.003]))
    for symmetries in (Symmetries(discrete=(half,)), Symmetries(continuous=(axis,))):
        model = replace(CUBE, symmetries=symmetries)

        class Renamed(CubeViews):
            def view(self, index: int) -> LabelledView:
                view = super().view(index)
                R = exp_so3(axis[0] * (0.3 + index))
                motion = half if symmetries.discrete else Pose(R, axis[1] - R @ axis[1])  # noqa: B023
                objects = tuple(replace(o, T_camera_object=o.T_camera_object @ motion) for o in view.objects)
                return replace(view, objects=objects)

        # zoomed windows are framed by the labels' own keypoints, so the locate framing is compared
        config = WindowConfig(rotation_deg=40.0, zoom_fraction=0.0, empty_fraction=1.0, augment=PLAIN)
        one, other = (WindowDataset(views, [model], config, seed=2) for views in (CubeViews(8), Renamed(8)))
        plain = WindowDataset(CubeViews(8), [CUBE], config, seed=2)
        seen = moved = 0
        for index in range(60):
            for a, b, c in zip(*(data.sample(index).objects for data in (one, other, plain)), strict=True):
                if a.ignored or b.ignored:
                    continue
                np.testing.assert_allclose(a.xy, b.xy, atol=1e-6)
                np.testing.assert_allclose(a.points_camera, b.points_camera, atol=1e-9)
                seen += 1
                moved += not np.allclose(a.xy, c.xy, atol=0.1)
        assert seen > 10 and moved > 3
