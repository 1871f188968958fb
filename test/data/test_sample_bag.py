# SPDX-License-Identifier: Apache-2.0
"""The sample bag's scene: only the camera moves, smoothly, and the object stays in sight."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from ukd_ros.data.demo_object import DEMO_NAME, demo_mesh
from ukd_ros.data.renderer import Light, Lighting, Material, RendererError
from ukd_ros.data.sample_bag import SampleOptions, camera_pose, moved, sample_views
from ukd_ros.data.scenes import Body, Scene
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.pose import Pose, exp_so3

CAMERA = Camera(640, 480, np.array([[600.0, 0.0, 319.5], [0.0, 600.0, 239.5], [0.0, 0.0, 1.0]]))


def some(seed: int) -> Pose:
    rng = np.random.default_rng(seed)
    return Pose(exp_so3(rng.normal(size=3)), rng.normal(size=3))


def test_the_way_is_closed_and_smooth_and_keeps_the_object_in_the_image() -> None:
    options, points = SampleOptions(), demo_mesh().vertices
    way = [camera_pose(options, CAMERA, Pose.identity(), phase) for phase in np.arange(options.frames) / options.frames]
    steps = [a.minus(b) for a, b in zip(way, [way[-1], *way[:-1]], strict=True)]
    assert max(np.linalg.norm(s[:3]) for s in steps) < 0.05 and max(np.linalg.norm(s[3:]) for s in steps) < 0.12
    for pose in way:
        xy = CAMERA.project(pose.transform(points))
        assert np.isfinite(xy).all() and xy.min() > 0.0 and (xy < [640.0, 480.0]).all()


def test_moving_the_camera_moves_nothing_else() -> None:
    point, far = Light(np.array([0.1, 0.2, 0.3]), np.ones(3), True), Light(np.array([0.0, 0.6, 0.8]), np.ones(3), False)
    up = np.array([0.0, -1.0, 0.0])
    bodies = tuple(Body(i, some(i), Material()) for i in range(3))
    scene = Scene(CAMERA, Lighting((point, far), np.ones(3), np.ones(3), up), bodies, Body(-1, some(7), Material()), up)
    T = some(9)
    after = moved(scene, T, CAMERA)
    assert after.table is not None and scene.table is not None
    for old, new in zip((*scene.bodies, scene.table), (*after.bodies, after.table), strict=True):
        np.testing.assert_allclose((T.inverse() @ new.pose).minus(old.pose), 0.0, atol=1e-12)
        np.testing.assert_allclose(new.pose.rotation.T @ after.up, old.pose.rotation.T @ scene.up, atol=1e-12)
        for a, b in zip(scene.lighting.lights, after.lighting.lights, strict=True):
            if a.is_point:
                seen = new.pose.inverse().transform(b.position[None]), old.pose.inverse().transform(a.position[None])
            else:
                seen = new.pose.rotation.T @ b.position, old.pose.rotation.T @ a.position
            np.testing.assert_allclose(*seen, atol=1e-12)


def test_the_truth_is_where_the_object_is_drawn() -> None:
    """The object is the image's most saturated blue thing: its pixels lie within the projected mesh."""
    try:
        views = list(islice(sample_views(SampleOptions(frames=6), demo_mesh(), DEMO_NAME, []), 2))
    except RendererError as error:
        pytest.skip(f"no headless OpenGL here: {error}")
    assert views[0].stamp_ns < views[1].stamp_ns
    for view in views:
        image = view.image.astype(int)
        blue = (image[..., 2] > image[..., 0] + 60) & (image[..., 2] > image[..., 1] + 30)
        xy = view.camera.project(view.objects[0].T_camera_object.transform(demo_mesh().vertices))
        rows, columns = np.nonzero(blue)
        assert len(rows) > 100
        inside = (columns >= xy[:, 0].min()) & (columns <= xy[:, 0].max())
        inside &= (rows >= xy[:, 1].min()) & (rows <= xy[:, 1].max())
        assert inside.mean() > 0.95
