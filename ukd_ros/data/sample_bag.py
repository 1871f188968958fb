# SPDX-License-Identifier: Apache-2.0
"""The demo's sample bag: a camera moves smoothly about the demo object on a cluttered table, with the truth.

Scenes are drawn as for training, but from a seed that no training set uses; within a scene only the camera moves.
Several follow one another, because one alone says little about a covariance: its frames err alike.
``python -m ukd_ros.data.sample_bag models/sample_bag`` writes the bag that is shipped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ukd_ros.data.bags import write_bag
from ukd_ros.data.demo_object import DEMO_NAME, demo_mesh
from ukd_ros.data.placement import view_angles, view_rotation
from ukd_ros.data.renderer import Item, Light, Lighting, Material, smooth_outlines
from ukd_ros.data.scene_renderer import TABLE_IDENT, SceneRenderer
from ukd_ros.data.scenes import Body, Scene, SceneConfig
from ukd_ros.data.sensor import SensorConfig, expose
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.object_model import Mesh
from ukd_ros.geometry.pose import Pose
from ukd_ros.geometry.view import LabelledView, ObjectLabel

SEED = 900_001
"""Never a training seed."""

START_NS = 1_000_000_000
FRAME_ID = "camera_optical"
WIDE_TABLE_M = 6.0
MIN_VISIBLE = 0.55
"""A scene in which clutter hides more of the object, somewhere on the way, is passed over."""

TABLE_CONTRAST = (4.0, 26.0)
WARMER = 25.0
"""Grey levels: contrast of the desk's texture, and how much more red than blue it is."""

DESK_TEXTURE_SCALE = 14.0
"""Repetitions of the texture over the table."""

MAX_SCENES = 200


@dataclass(frozen=True)
class SampleOptions:
    """Length, pace and size of the bag, and how the camera moves; every angle is about the object's middle."""

    frames: int = field(default=150, metadata={"help": "images"})
    scenes: int = field(default=6, metadata={"help": "scenes that share the images evenly"})
    rate_hz: float = field(default=12.5, metadata={"help": "images per second", "unit": "Hz"})
    jpeg_quality: int = field(default=78, metadata={"help": "of the stored images, 1..100"})
    focal_px: float = field(default=600.0, metadata={"help": "focal length of the 640x480 camera", "unit": "px"})
    azimuth_deg: float = field(
        default=55.0, metadata={"help": "the camera swings this far to each side", "unit": "deg"}
    )
    elevation_deg: tuple[float, float] = field(
        default=(30.0, 58.0), metadata={"help": "lowest, highest", "unit": "deg"}
    )
    distance: tuple[float, float] = field(default=(0.32, 0.5), metadata={"help": "nearest, farthest", "unit": "m"})
    roll_deg: float = field(default=9.0, metadata={"help": "largest roll of the camera", "unit": "deg"})

    def __post_init__(self) -> None:
        """Refuse what gives no bag; ValueError names the field."""
        if not 1 <= self.scenes <= self.frames:
            raise ValueError(f"scenes: is {self.scenes}, but 1 to {self.frames} (frames) are needed.")
        if self.frames < 2 or not self.rate_hz > 0.0 or not 1 <= self.jpeg_quality <= 100:
            raise ValueError("frames, rate_hz, jpeg_quality: at least 2, a positive number and 1..100 are needed.")


SENSOR = SensorConfig(
    exposure=(0.26, 0.26),
    white_balance=0.0,
    gamma=(2.2, 2.2),
    contrast=(0.15, 0.15),
    saturation=(0.95, 0.95),
    vignetting=(0.15, 0.15),
    defocus_px=(0.4, 0.6),
    motion_fraction=0.15,
    motion_px=(1.5, 3.0),
    read_noise=(0.002, 0.002),
    shot_noise=(0.006, 0.006),
    sharpen_fraction=0.0,
)
"""One camera, not a new one for each image: only noise and blur change."""


def camera_pose(options: SampleOptions, camera: Camera, first: Pose, phase: float) -> Pose:
    """Return T_camera_object at ``phase`` 0..1 of the way; the camera swings about the azimuth of ``first``."""
    turn = 2.0 * np.pi * phase
    azimuth = view_angles(first.rotation)[0] + np.radians(options.azimuth_deg) * np.sin(turn)
    low, high = np.radians(options.elevation_deg)
    elevation = 0.5 * (low + high) + 0.5 * (high - low) * np.cos(2.0 * turn + 0.6)
    near, far = options.distance
    distance = 0.5 * (near + far) + 0.5 * (far - near) * np.sin(1.0 * turn + 2.2)
    roll = np.radians(options.roll_deg) * np.sin(3.0 * turn + 1.0)
    pixel = np.array([0.5, 0.5]) + np.array([0.13 * np.sin(2.0 * turn), 0.08 * np.sin(3.0 * turn + 0.4)])
    ray = camera.rays((pixel * [camera.width, camera.height])[None])[0]
    return Pose(view_rotation(float(azimuth), float(elevation), float(roll)), distance * ray / np.linalg.norm(ray))


def moved(scene: Scene, T_new_old: Pose, camera: Camera) -> Scene:
    """Return the scene as the camera sees it after it has moved: everything else, light too, stays where it is."""

    def body(old: Body) -> Body:
        return replace(old, pose=T_new_old @ old.pose)

    lights = tuple(
        Light(
            T_new_old.transform(light.position[None])[0] if light.is_point else T_new_old.rotation @ light.position,
            light.color,
            light.is_point,
        )
        for light in scene.lighting.lights
    )
    up = T_new_old.rotation @ scene.up
    lighting: Lighting = replace(scene.lighting, lights=lights, up=up)
    table = None if scene.table is None else body(scene.table)
    return Scene(camera, lighting, tuple(body(b) for b in scene.bodies), table, up)


def _items(renderer: SceneRenderer, scene: Scene) -> list[Item]:
    items = []
    for number, body in enumerate([*scene.bodies, *([] if scene.table is None else [scene.table])]):
        ident = TABLE_IDENT if body is scene.table else number + 1
        mesh = renderer.mesh_of(body, scene.camera)
        texture = None if body.texture is None else renderer.gpu_textures[body.texture]
        shadow = body.mesh >= 0 and min(body.scale) > 0.01
        items.append(Item(mesh, body.pose, ident, body.material, body.scale, texture, casts_shadow=shadow))
    return items


def _visible(renderer: SceneRenderer, scene: Scene) -> float:
    items = _items(renderer, scene)
    whole = renderer.renderer.silhouettes(items[:1], scene.camera)[0].pixels
    ident, _ = renderer.renderer.labels(items, scene.camera)
    return float(np.count_nonzero(ident == 1)) / max(whole, 1)


def _desk(renderer: SceneRenderer, table: Body) -> Body:
    """Return the table with a dull surface of a warm, calm texture: a desk, neither camouflage nor a mirror."""
    for number, texture in enumerate(renderer.textures):
        red, _, blue = texture.reshape(-1, 3).mean(axis=0)
        if red > blue + WARMER and TABLE_CONTRAST[0] <= texture.mean(axis=2).std() <= TABLE_CONTRAST[1]:
            return replace(table, texture=number, material=Material(roughness=0.8, texture_scale=DESK_TEXTURE_SCALE))
    raise RuntimeError(f"no texture of seed {SEED} looks like a desk; allow more contrast.")


def _fitting_scene(
    renderer: SceneRenderer, options: SampleOptions, camera: Camera, start: int, phases: npt.NDArray[np.float64]
) -> tuple[int, Scene]:
    """Return the number and the first scene from `start` on a wide table that keeps the object in sight all the way."""
    for index in range(start, start + MAX_SCENES):
        scene, _ = renderer.scene(index)
        table = scene.table
        if table is None or table.scale[0] < WIDE_TABLE_M or len(scene.bodies) < 8:
            continue
        scene = replace(scene, table=_desk(renderer, table))
        first = scene.bodies[0].pose
        way = [camera_pose(options, camera, first, phase) for phase in phases]
        if all(_visible(renderer, moved(scene, pose @ first.inverse(), camera)) >= MIN_VISIBLE for pose in way):
            return index, scene
    raise RuntimeError(f"none of {MAX_SCENES} scenes of seed {SEED} keeps the object in sight; allow more clutter.")


def sample_views(options: SampleOptions, mesh: Mesh, name: str, distractors: list[Mesh]) -> Iterator[LabelledView]:
    """Yield the images of the moving camera, with the object's true pose; RendererError without headless OpenGL."""
    config = SceneConfig(
        targets=(1, 1), distractors=(9, 12), distance=(0.55, 0.65), elevation_deg=(35.0, 50.0), roll_sigma_deg=1.0,
        table_fraction=1.0, occluded_fraction=0.0, truncated_fraction=0.0, tilt_sigma_deg=0.0, sensor=SENSOR,
    )  # fmt: skip
    matrix: npt.NDArray[np.float64] = np.array(
        [[options.focal_px, 0.0, 319.5], [0.0, options.focal_px, 239.5], [0.0, 0.0, 1.0]]
    )
    camera = Camera(config.width, config.height, matrix)
    renderer = SceneRenderer(config, [mesh], distractors, SEED)
    try:
        drawn = -1
        starts = [part * options.frames // options.scenes for part in range(options.scenes)]
        for number in range(options.frames):
            if number in starts:
                end = [*starts, options.frames][starts.index(number) + 1]
                phases = np.linspace(number, end - 1, 4) / options.frames
                drawn, scene = _fitting_scene(renderer, options, camera, drawn + 1, phases)
                first = scene.bodies[0].pose
            pose = camera_pose(options, camera, first, number / options.frames)
            now = moved(scene, pose @ first.inverse(), camera)
            items = _items(renderer, now)
            ident, depth = renderer.renderer.labels(items, camera)
            color = smooth_outlines(renderer.renderer.shade(items, camera, now.lighting), ident, depth)
            image = expose(color, SENSOR, np.random.default_rng([SEED, number]))
            stamp_ns = START_NS + round(number * 1e9 / options.rate_hz)
            yield LabelledView(image, camera, stamp_ns, FRAME_ID, (ObjectLabel(name, pose),))
    finally:
        renderer.close()


def make_sample_bag(path: Path | str, options: SampleOptions | None = None) -> int:
    """Write the demo's bag; return its number of images. BagError when it exists, RendererError without OpenGL."""
    options = options or SampleOptions()
    views = sample_views(options, demo_mesh(), DEMO_NAME, [])
    return write_bag(path, views, jpeg_quality=options.jpeg_quality)


def main(arguments: list[str] | None = None) -> int:
    """Write the bag that is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="folder to make")
    make_sample_bag(parser.parse_args(arguments).path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
