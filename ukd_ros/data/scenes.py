# SPDX-License-Identifier: Apache-2.0
"""Domain randomisation: a `SceneConfig` and an image index become one rendered, labelled image.

The generator of image i is keyed by (seed, i) and by nothing else, so any number of workers gives the same images.
Camera frame is the optical one; a table's world frame has z up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ukd_ros.data.clutter import backdrop, photographs, primitive_meshes, quad_mesh, random_texture
from ukd_ros.data.meshes import simplified
from ukd_ros.data.renderer import GpuMesh, Item, Light, Lighting, Material, Renderer, Silhouette, smooth_outlines
from ukd_ros.data.sensor import SensorConfig, expose
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.object_model import Mesh
from ukd_ros.geometry.pose import Pose, exp_so3

FloatArray = npt.NDArray[np.float64]
Range = tuple[float, float]
VIEWS = ("upright", "uniform")


@dataclass(frozen=True)
class SceneConfig:
    """What may happen in a rendered image. Ranges are (low, high); a yaml file may give any subset of the fields."""

    width: int = field(default=640, metadata={"help": "image width", "unit": "px"})
    height: int = field(default=480, metadata={"help": "image height", "unit": "px"})
    camera_matrix: tuple[float, ...] | None = field(
        default=None, metadata={"help": "nine numbers of K row by row; none: the field of view is drawn", "unit": "px"}
    )
    fov_deg: Range = field(default=(45.0, 70.0), metadata={"help": "horizontal field of view", "unit": "deg"})
    targets: tuple[int, int] = field(default=(2, 5), metadata={"help": "instances of the targets in an image"})
    distractors: tuple[int, int] = field(default=(4, 14), metadata={"help": "other things in an image"})
    distance: Range = field(default=(0.5, 1.6), metadata={"help": "camera to object, log-uniform", "unit": "m"})
    view: str = field(default="upright", metadata={"help": "upright (ranges below) or uniform (any rotation)"})
    elevation_deg: Range = field(default=(-8.0, 90.0), metadata={"help": "camera above the object", "unit": "deg"})
    azimuth_deg: Range = field(default=(-180.0, 180.0), metadata={"help": "camera around the object", "unit": "deg"})
    roll_sigma_deg: float = field(default=20.0, metadata={"help": "sigma of the camera's roll", "unit": "deg"})
    roll_uniform_fraction: float = field(default=0.0, metadata={"help": "share of images with any roll"})
    tilt_sigma_deg: float = field(default=4.0, metadata={"help": "sigma of an object's tilt on the table"})
    table_fraction: float = field(default=0.55, metadata={"help": "share of images with a table"})
    occluded_fraction: float = field(default=0.5, metadata={"help": "share of targets with something put before them"})
    min_visible: float = field(default=0.3, metadata={"help": "occluders leave at least this share visible"})
    truncated_fraction: float = field(default=0.12, metadata={"help": "share of targets that may cross the border"})
    target_gain: Range = field(default=(0.65, 1.25), metadata={"help": "brightness factor of a target's colours, log-uniform"})
    target_saturation: Range = field(default=(0.7, 1.2), metadata={"help": "saturation factor of a target's colours"})
    max_lights: int = field(default=3, metadata={"help": "lights besides the ambient one, 1 to 4"})
    photo_folder: str | None = field(default=None, metadata={"help": "folder of photographs for backgrounds"})
    texture_pool: int = field(default=96, metadata={"help": "procedural textures made per seed"})
    sensor: SensorConfig = field(default_factory=SensorConfig, metadata={"help": "the camera's behaviour"})

    def __post_init__(self) -> None:
        """Refuse what cannot be rendered; ValueError names the field and says what is allowed."""
        for name in ("fov_deg", "targets", "distractors", "distance", "elevation_deg", "azimuth_deg", "target_gain",
                     "target_saturation"):  # fmt: skip
            pair = tuple(getattr(self, name))
            if len(pair) != 2 or not pair[0] <= pair[1]:
                raise ValueError(f"{name}: must be (low, high) with low <= high, got {pair}.")
            object.__setattr__(self, name, pair)
        for name in ("roll_uniform_fraction", "table_fraction", "occluded_fraction", "min_visible",
                     "truncated_fraction"):  # fmt: skip
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: must lie in 0..1, got {getattr(self, name)}.")
        if self.target_gain[0] <= 0:
            raise ValueError(f"target_gain: must be positive, got {self.target_gain}.")
        if self.view not in VIEWS:
            raise ValueError(f"view: must be one of {', '.join(VIEWS)}, got {self.view!r}.")
        if self.distance[0] < 0.05 or self.distance[1] > 30:
            raise ValueError(f"distance: must lie in 0.05..30 m, got {self.distance}.")
        if self.elevation_deg[0] < -90 or self.elevation_deg[1] > 90:
            raise ValueError(f"elevation_deg: must lie in -90..90, got {self.elevation_deg}.")
        if self.targets[0] < 1 or self.distractors[0] < 0:
            raise ValueError(f"targets, distractors: need at least 1 and 0, got {self.targets}, {self.distractors}.")
        if not (16 <= self.width <= 4096 and 16 <= self.height <= 4096):
            raise ValueError(f"width, height: must lie in 16..4096 px, got {self.width}x{self.height}.")
        if not 1 <= self.max_lights <= 4:
            raise ValueError(f"max_lights: must lie in 1..4, got {self.max_lights}.")
        if not 5 <= self.fov_deg[0] <= self.fov_deg[1] <= 150:
            raise ValueError(f"fov_deg: must lie in 5..150, got {self.fov_deg}.")
        if self.camera_matrix is not None:
            values = tuple(float(v) for v in self.camera_matrix)
            if len(values) != 9:
                raise ValueError(f"camera_matrix: needs nine numbers, got {len(values)}.")
            object.__setattr__(self, "camera_matrix", values)
        if isinstance(self.sensor, dict):
            object.__setattr__(self, "sensor", SensorConfig(**self.sensor))


@dataclass(frozen=True, eq=False)
class Body:
    """One placed thing: a mesh (by key), its pose and size; `target` is the index of the target or -1."""

    mesh: int
    pose: Pose
    material: Material
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    texture: int | None = None
    target: int = -1


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything that is drawn: camera, light, table (or none), bodies, the targets first."""

    camera: Camera
    lighting: Lighting
    bodies: tuple[Body, ...]
    table: Body | None
    up: FloatArray


@dataclass(frozen=True, eq=False)
class Instance:
    """The truth about one target in a rendered image; boxes are (x, y, w, h) px, pixels are counts."""

    target: int
    pose: Pose
    mask: npt.NDArray[np.bool_]
    box_visible: tuple[int, int, int, int]
    pixels_visible: int
    silhouette: Silhouette


@dataclass(frozen=True, eq=False)
class RenderedScene:
    """One finished image [H,W,3] uint8 RGB and the truth about it."""

    image: npt.NDArray[np.uint8]
    camera: Camera
    instances: tuple[Instance, ...]


def view_rotation(azimuth: float, elevation: float, roll: float) -> FloatArray:
    """Return R_camera_object [3,3] of a camera at azimuth and elevation (rad, object's z is up) rolled about its axis."""
    ca, sa, ce, se = np.cos(azimuth), np.sin(azimuth), np.cos(elevation), np.sin(elevation)
    forward = -np.array([ce * ca, ce * sa, se])
    down = -np.array([-se * ca, -se * sa, ce])
    upright = np.stack([np.cross(down, forward), down, forward])
    c, s = np.cos(roll), np.sin(roll)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]) @ upright


def view_angles(rotation: FloatArray) -> tuple[float, float, float]:
    """Return azimuth, elevation and roll (rad) of R_camera_object [3,3]; the inverse of `view_rotation`."""
    forward = rotation[2]
    elevation = float(np.arcsin(np.clip(-forward[2], -1, 1)))
    azimuth = float(np.arctan2(-forward[1], -forward[0]))
    upright = view_rotation(azimuth, elevation, 0.0)
    turn = rotation @ upright.T
    return azimuth, elevation, float(np.arctan2(turn[1, 0], turn[0, 0]))


def random_rotation(rng: np.random.Generator) -> FloatArray:
    """Return a rotation [3,3] uniform over SO(3) (from a normalised Gaussian quaternion)."""
    x, y, z, w = (q := rng.normal(size=4)) / np.linalg.norm(q)
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip


class SceneSampler:
    """Draws scenes; knows the sizes of the meshes but no graphics."""

    def __init__(self, config: SceneConfig, meshes: list[Mesh], targets: int, extra: int, textures: int) -> None:
        """`meshes` lists `targets` target meshes, then `extra` distractor meshes, then the primitives."""
        self.config = config
        self.meshes = meshes
        self.targets = targets
        self.extra = extra
        self.textures = textures
        self.radius = [float(np.linalg.norm(m.vertices, axis=1).max()) for m in meshes]

    def sample(self, rng: np.random.Generator) -> Scene:
        """Return a random scene."""
        config = self.config
        camera = self._camera(rng)
        on_table = rng.random() < config.table_fraction
        count = int(rng.integers(config.targets[0], config.targets[1] + 1))
        wanted = [int(rng.integers(self.targets)) for _ in range(count)]
        if on_table:
            bodies, table, up = self._on_table(rng, camera, wanted)
        else:
            bodies, up = self._floating(rng, camera, wanted)
            table = None
        return Scene(camera, self._lighting(rng, up), tuple(bodies), table, up)

    # ------------------------------------------------------------------ camera, views, light

    def _camera(self, rng: np.random.Generator) -> Camera:
        c = self.config
        if c.camera_matrix is not None:
            return Camera(c.width, c.height, np.array(c.camera_matrix).reshape(3, 3))
        f = c.width / 2 / np.tan(np.radians(rng.uniform(*c.fov_deg)) / 2)
        cx = (c.width - 1) / 2 + rng.normal(0, 0.015) * c.width
        cy = (c.height - 1) / 2 + rng.normal(0, 0.015) * c.height
        return Camera(c.width, c.height, np.array([[f, 0, cx], [0, f * rng.uniform(0.995, 1.005), cy], [0, 0, 1.0]]))

    def _roll(self, rng: np.random.Generator) -> float:
        if rng.random() < self.config.roll_uniform_fraction:
            return float(rng.uniform(-np.pi, np.pi))
        return float(np.radians(rng.normal(0, self.config.roll_sigma_deg)))

    def _rotation(self, rng: np.random.Generator) -> FloatArray:
        """R_camera_object for an object on the optical axis."""
        if self.config.view == "uniform":
            return random_rotation(rng)
        azimuth = np.radians(rng.uniform(*self.config.azimuth_deg))
        elevation = np.radians(rng.uniform(*self.config.elevation_deg))
        return view_rotation(float(azimuth), float(elevation), self._roll(rng))

    def _distance(self, rng: np.random.Generator) -> float:
        low, high = self.config.distance
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    def _lighting(self, rng: np.random.Generator, up: FloatArray) -> Lighting:
        lights = []
        for i in range(int(rng.integers(1, self.config.max_lights + 1))):
            side = rng.normal(size=3)
            towards = up * rng.uniform(0.35, 1.6) + side / np.linalg.norm(side)
            power = rng.uniform(0.4, 1.2) if i == 0 else rng.uniform(0.05, 0.4)
            color = power * np.exp(rng.normal(0, 0.06, 3))
            near = rng.random() < 0.3
            place = np.array([0, 0, 0.9]) + towards * rng.uniform(0.8, 2.0) if near else towards / np.linalg.norm(towards)
            lights.append(Light(place, color, near))
        sky = rng.uniform(0.08, 0.45) * np.exp(rng.normal(0, 0.06, 3))
        ground = sky * rng.uniform(0.25, 0.8) * np.exp(rng.normal(0, 0.08, 3))
        return Lighting(
            tuple(lights), sky, ground, up, float(rng.uniform(0.7, 9.0)), float(rng.uniform(0.5, 1.0))
        )

    # ------------------------------------------------------------------ materials and distractors

    def _target_material(self, rng: np.random.Generator) -> Material:
        saturation = rng.uniform(*self.config.target_saturation)
        matrix = hue_matrix(rng.normal(0, 0.10), saturation) * np.exp(rng.normal(0, 0.07, 3))[:, None]
        return Material(
            matrix * np.exp(rng.uniform(*np.log(self.config.target_gain))), rng.choice([0.0, rng.uniform(0.02, 0.35)]), rng.uniform(0.2, 0.8),
            rng.choice([0.0, rng.uniform(0.1, 0.7)]),
        )  # fmt: skip

    def _distractor(self, rng: np.random.Generator) -> tuple[int, tuple[float, float, float], int | None, Material]:
        """Return mesh key, scale, texture key and material of something that is not a target."""
        free = hue_matrix(rng.uniform(-np.pi, np.pi), rng.uniform(0.4, 1.3)) * rng.uniform(0.4, 1.3)
        material = Material(
            free, rng.choice([0.0, rng.uniform(0.02, 0.5)]), rng.uniform(0.15, 0.9), rng.choice([0.0, rng.uniform(0, 0.9)]),
            rng.choice([1.0, 1.0, 2.0, 0.5]),
        )  # fmt: skip
        if self.extra and rng.random() < 0.55:
            key = self.targets + int(rng.integers(self.extra))
            small = hue_matrix(rng.normal(0, 0.3), rng.uniform(0.6, 1.2)) * rng.uniform(0.6, 1.2)
            return key, (1.0, 1.0, 1.0), None, Material(small, material.specular, material.roughness, material.reflection)
        key = int(rng.integers(self.targets + self.extra, len(self.meshes)))
        size = np.exp(rng.uniform(np.log(0.04), np.log(0.24)))
        scale = size * np.exp(rng.normal(0, 0.4, 3))
        if rng.random() < 0.3:  # thin things: books, sticks, sheets
            scale[int(rng.integers(3))] *= rng.uniform(0.05, 0.3)
        texture = int(rng.integers(self.textures))
        return key, (float(scale[0]), float(scale[1]), float(scale[2])), texture, material

    # ------------------------------------------------------------------ things in the air

    def _floating(
        self, rng: np.random.Generator, camera: Camera, wanted: list[int]
    ) -> tuple[list[Body], FloatArray]:
        bodies: list[Body] = []
        spots: list[tuple[FloatArray, float]] = []
        for target in wanted:
            for _ in range(12):
                distance = self._distance(rng)
                size = self.radius[target] / distance * camera.matrix[0, 0]
                pixel = self._pixel(rng, camera, size)
                if all(np.linalg.norm(pixel - p) > 0.62 * (size + s) for p, s in spots):
                    break
            else:
                if bodies:
                    continue
            ray = camera.rays(pixel[None])[0]
            ray /= np.linalg.norm(ray)
            rotation = rotation_between(np.array([0.0, 0.0, 1.0]), ray) @ self._rotation(rng)
            spots.append((pixel, size))
            bodies.append(Body(target, Pose(rotation, ray * distance), self._target_material(rng), target=target))
        up = bodies[0].pose.rotation[:, 2].copy() if self.config.view == "upright" else random_rotation(rng)[0]
        bodies += self._floating_distractors(rng, camera, bodies)
        return bodies, up

    def _pixel(self, rng: np.random.Generator, camera: Camera, size: float) -> FloatArray:
        """A place in the image; mostly so that the object lies inside."""
        margin = 0.0 if rng.random() < self.config.truncated_fraction else min(0.9 * size, 0.45 * camera.height)
        low, high = np.array([margin, margin]), np.array([camera.width - margin, camera.height - margin])
        return rng.uniform(low, high)

    def _floating_distractors(self, rng: np.random.Generator, camera: Camera, targets: list[Body]) -> list[Body]:
        out = []
        farthest = max(float(np.linalg.norm(t.pose.translation)) for t in targets)
        for _ in range(int(rng.integers(self.config.distractors[0], self.config.distractors[1] + 1))):
            key, scale, texture, material = self._distractor(rng)
            ray = camera.rays(rng.uniform([0, 0], [camera.width, camera.height])[None])[0]
            depth = farthest * rng.uniform(1.05, 2.2) + 0.1
            pose = Pose(random_rotation(rng), ray * depth)
            grown = (scale[0] * 1.8, scale[1] * 1.8, scale[2] * 1.8) if texture is not None else scale
            out.append(Body(key, pose, material, grown, texture))
        for target in targets:
            if rng.random() < self.config.occluded_fraction:
                out.append(self._occluder(rng, target))
        return out

    def _occluder(self, rng: np.random.Generator, target: Body) -> Body:
        """Something between the camera and the rim of a target."""
        key, scale, texture, material = self._distractor(rng)
        reach = self.radius[target.mesh]
        size = self.radius[key] * max(scale)
        centre = target.pose.translation
        distance = float(np.linalg.norm(centre))
        near = max(distance - reach - size - rng.uniform(0.0, 0.15), 0.45 * distance)
        side = rng.normal(size=3)
        side -= centre * (side @ centre) / distance**2
        side *= rng.uniform(0.1, 0.8) * (0.5 * reach + 0.55 * size) / max(float(np.linalg.norm(side)), 1e-9)
        place = (centre + side) * (near / distance)
        return Body(key, Pose(random_rotation(rng), place), material, scale, texture)

    # ------------------------------------------------------------------ things on a table

    def _on_table(
        self, rng: np.random.Generator, camera: Camera, wanted: list[int]
    ) -> tuple[list[Body], Body, FloatArray]:
        config = self.config
        low = max(config.elevation_deg[0], 12.0) if config.view == "upright" else 12.0
        high = max(min(config.elevation_deg[1], 88.0), low + 1.0) if config.view == "upright" else 88.0
        elevation = np.radians(rng.uniform(low, high))
        R = view_rotation(float(rng.uniform(-np.pi, np.pi)), float(elevation), self._roll(rng))
        up = R[:, 2].copy()
        centre = np.array([0.0, 0.0, self._distance(rng)])
        bodies: list[Body] = []
        spots: list[tuple[FloatArray, float]] = []
        for target in wanted:
            spot = self._free_spot(rng, camera, centre, up, self.radius[target] * 0.75, spots, config.distance)
            if spot is None and bodies:
                continue
            standing = self._standing(rng, target, config.view == "upright", config.tilt_sigma_deg)
            pose = self._placed(R, standing, target, (1.0, 1.0, 1.0), centre if spot is None else spot)
            spots.append((pose.translation, self.radius[target] * 0.75))
            bodies.append(Body(target, pose, self._target_material(rng), target=target))
        bodies += self._table_distractors(rng, camera, R, centre, spots, bodies)
        half = rng.uniform(0.5, 1.2) if rng.random() < 0.5 else 6.0
        shift = R @ np.array([rng.normal(0, 0.2), rng.normal(0, 0.2), 0.0])
        turned = R @ exp_so3(np.array([0.0, 0.0, rng.uniform(-np.pi, np.pi)]))
        muted = hue_matrix(rng.normal(0, 0.5), rng.uniform(0.2, 1.1)) * rng.uniform(0.35, 1.2)
        material = Material(muted, rng.choice([0.0, rng.uniform(0, 0.3)]), rng.uniform(0.2, 0.9),
                            rng.choice([0.0, rng.uniform(0, 0.35)]), half * rng.uniform(0.6, 3.0))  # fmt: skip
        table = Body(-1, Pose(turned, centre + shift), material, (half, half, 1.0), int(rng.integers(self.textures)))
        return bodies, table, up

    def _standing(self, rng: np.random.Generator, key: int, upright: bool, tilt_deg: float) -> FloatArray:
        """R_world_object of something resting on the table."""
        if not upright:
            return random_rotation(rng)
        low, high = np.radians(self.config.azimuth_deg)
        yaw = rng.uniform(-np.pi, np.pi) if high - low >= 2 * np.pi - 1e-6 else -rng.uniform(low, high)
        tilt = np.radians(tilt_deg) * rng.normal(size=2)
        return exp_so3(np.array([tilt[0], tilt[1], 0.0])) @ exp_so3(np.array([0.0, 0.0, yaw]))

    def _placed(
        self, R: FloatArray, standing: FloatArray, key: int, scale: tuple[float, float, float], spot: FloatArray
    ) -> Pose:
        """T_camera_object with the lowest vertex touching the table at `spot`."""
        heights = (self.meshes[key].vertices * np.array(scale)) @ standing[2]
        return Pose(R @ standing, spot - R[:, 2] * float(heights.min()))

    def _free_spot(
        self, rng: np.random.Generator, camera: Camera, centre: FloatArray, up: FloatArray, radius: float,
        spots: list[tuple[FloatArray, float]], limits: Range,
    ) -> FloatArray | None:  # fmt: skip
        """Return a point of the table seen by the camera within `limits` of distance, clear of `spots`, or None."""
        for _ in range(24):
            size = radius / float(centre[2]) * camera.matrix[0, 0]
            ray = camera.rays(self._pixel(rng, camera, size)[None])[0]
            slope = float(ray @ up)
            if slope > -1e-3:
                continue
            point = ray * float(centre @ up) / slope
            if not limits[0] <= float(np.linalg.norm(point)) <= limits[1]:
                continue
            if all(np.linalg.norm(point - p) > radius + r for p, r in spots):
                return np.asarray(point, dtype=np.float64)
        return None

    def _table_distractors(
        self, rng: np.random.Generator, camera: Camera, R: FloatArray, centre: FloatArray,
        spots: list[tuple[FloatArray, float]], targets: list[Body],
    ) -> list[Body]:  # fmt: skip
        out = []
        up = R[:, 2]
        limits = (0.6 * self.config.distance[0], 1.8 * self.config.distance[1])
        for _ in range(int(rng.integers(self.config.distractors[0], self.config.distractors[1] + 1))):
            key, scale, texture, material = self._distractor(rng)
            radius = self.radius[key] * max(scale) * 0.6
            spot = self._free_spot(rng, camera, centre, up, radius, spots, limits)
            if spot is not None:
                spots.append((spot, radius))
                out.append(self._resting(rng, R, key, scale, texture, material, spot))
        for _ in range(int(rng.integers(0, 6))):  # sheets of paper, magazines, boards
            flat = (float(rng.uniform(0.08, 0.45)), float(rng.uniform(0.08, 0.45)), float(rng.uniform(0.001, 0.008)))
            spot = self._free_spot(rng, camera, centre, up, 0.0, [], limits)
            if spot is not None:
                _, _, texture, material = 0, 0, int(rng.integers(self.textures)), Material(np.eye(3) * rng.uniform(0.5, 1.1))
                out.append(self._resting(rng, R, self.targets + self.extra, flat, texture, material, spot, flat_down=True))
        for target in targets:
            if rng.random() < self.config.occluded_fraction:
                steep = -up[2] > 0.6  # seen from above, things beside a target cover nothing of it
                hovers = rng.random() < (0.7 if steep else 0.25)
                out.append(self._occluder(rng, target) if hovers else self._occluder_on_table(rng, R, target))
        return out

    def _resting(
        self, rng: np.random.Generator, R: FloatArray, key: int, scale: tuple[float, float, float],
        texture: int | None, material: Material, spot: FloatArray, flat_down: bool = False,
    ) -> Body:  # fmt: skip
        if flat_down or rng.random() < 0.6:
            standing = exp_so3(np.array([0.0, 0.0, rng.uniform(-np.pi, np.pi)]))
        else:
            standing = random_rotation(rng)
        return Body(key, self._placed(R, standing, key, scale, spot), material, scale, texture)

    def _occluder_on_table(self, rng: np.random.Generator, R: FloatArray, target: Body) -> Body:
        """Something on the table (or on top of other things) between the camera and a target."""
        key, scale, texture, material = self._distractor(rng)
        reach = self.radius[target.mesh] * 0.6 + self.radius[key] * max(scale) * 0.6
        up = R[:, 2]
        foot = target.pose.translation - up * self.radius[target.mesh] * 0.5
        towards = -foot - up * float(-foot @ up)
        length = float(np.linalg.norm(towards))
        towards = towards / length if length > 1e-6 else R[:, 0]
        side = np.cross(up, towards)
        spot = foot + towards * reach * rng.uniform(0.8, 1.4) + side * reach * rng.uniform(-0.9, 0.9)
        return self._resting(rng, R, key, scale, texture, material, spot)


def hue_matrix(angle: float, saturation: float) -> FloatArray:
    """Return the [3,3] matrix that turns linear colours about the grey axis by `angle` rad and scales saturation."""
    grey = np.full((3, 3), 1 / 3)
    turn = exp_so3(np.full(3, angle / np.sqrt(3)))
    return turn @ (grey + saturation * (np.eye(3) - grey))


def rotation_between(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the smallest rotation [3,3] that takes the unit vector a to the unit vector b (not opposite)."""
    cross, cosine = np.cross(a, b), float(a @ b)
    sine = float(np.linalg.norm(cross))
    return np.eye(3) if sine < 1e-12 else exp_so3(cross / sine * np.arctan2(sine, cosine))


class SceneRenderer:
    """Renders image `index` of a configuration and seed; holds the graphics context of one process."""

    def __init__(self, config: SceneConfig, targets: list[Mesh], distractors: list[Mesh], seed: int) -> None:
        """Upload meshes and textures; RendererError when there is no headless OpenGL."""
        self.config, self.seed = config, seed
        pool = np.random.default_rng([seed, 2**31 - 1])
        self.photos = photographs(config.photo_folder)
        self.textures = [random_texture(pool) for _ in range(config.texture_pool)]
        primitives = primitive_meshes(pool)
        meshes = [simplified(m, 40000) for m in targets] + [simplified(m, 6000) for m in distractors] + primitives
        self.sampler = SceneSampler(config, meshes, len(targets), len(distractors), len(self.textures))
        self.renderer = Renderer(config.width, config.height)
        self.gpu: list[GpuMesh] = [self.renderer.upload(m) for m in meshes]
        self.quad = self.renderer.upload(quad_mesh())
        self.gpu_textures: list[Any] = [self.renderer.texture(t) for t in self.textures]

    def close(self) -> None:
        """Free the graphics context."""
        self.renderer.close()

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """Return scene `index` and its generator, to be continued for the picture itself."""
        rng = np.random.default_rng([self.seed, index])
        return self.sampler.sample(rng), rng

    def render(self, index: int) -> tuple[RenderedScene, np.random.Generator]:
        """Return image `index` with its truth, and the generator for what follows (JPEG quality)."""
        scene, rng = self.scene(index)
        table = [self._item(scene.table, 65535)] if scene.table is not None else []
        items = [self._item(body, i + 1) for i, body in enumerate(scene.bodies)]
        targets = sum(1 for body in scene.bodies if body.target >= 0)
        outlines = self.renderer.silhouettes(items[:targets], scene.camera)
        items, ident, depth = self._uncovered(items, table, targets, outlines, scene.camera)
        behind = backdrop(rng, self.config.width, self.config.height, self.textures, self.photos)
        color = self.renderer.shade([*items, *table], scene.camera, scene.lighting, behind)
        color = smooth_outlines(color, ident, depth)
        image = expose(color, self.config.sensor, rng)
        instances = []
        for i in range(targets):
            instance = _instance(scene.bodies[i], ident == i + 1, outlines[i])
            if instance.silhouette.pixels > 0:
                instances.append(instance)
        return RenderedScene(image, scene.camera, tuple(instances)), rng

    def _item(self, body: Body, ident: int) -> Item:
        mesh = self.quad if body.mesh < 0 else self.gpu[body.mesh]
        texture = None if body.texture is None else self.gpu_textures[body.texture]
        return Item(mesh, body.pose, ident, body.material, body.scale, texture, casts_shadow=body.mesh >= 0 and min(body.scale) > 0.01)

    def _uncovered(
        self, items: list[Item], table: list[Item], targets: int, outlines: list[Silhouette], camera: Camera
    ) -> tuple[list[Item], npt.NDArray[np.uint16], npt.NDArray[np.float32]]:
        """Take away what covers a target too much (at most a few times); return what stays, its ids and depth."""
        for _ in range(6):
            ident, depth = self.renderer.labels([*items, *table], camera)
            seen = np.bincount(ident.reshape(-1), minlength=targets + 1)
            culprit = 0
            for i in range(targets):
                x, y, w, h = outlines[i].box
                if seen[i + 1] >= self.config.min_visible * outlines[i].pixels:
                    continue
                over = ident[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)]
                counts = np.bincount(over.reshape(-1), minlength=2)
                counts[: targets + 1] = 0
                counts = counts[:65535]
                if counts.size and counts.max() > 0.1 * outlines[i].pixels:
                    culprit = int(counts.argmax())
                    break
            if culprit == 0:
                break
            items = [item for item in items if item.ident != culprit]
        return items, ident, depth


def _instance(body: Body, mask: npt.NDArray[np.bool_], outline: Silhouette) -> Instance:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (0, 0, 0, 0)
    if rows.size:
        box = (int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1))
    return Instance(body.target, body.pose, mask, box, int(mask.sum()), outline)
