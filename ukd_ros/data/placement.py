# SPDX-License-Identifier: Apache-2.0
"""Draws scenes at random: where the camera is, what stands on a table or hangs in the air, what hides and lights it.

A table's world frame has z up; all poses that leave this file are in the camera's optical frame, metres.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ukd_ros.data.clutter import random_color
from ukd_ros.data.renderer import Light, Lighting, Material
from ukd_ros.data.scenes import Body, Scene, SceneConfig
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.object_model import Mesh
from ukd_ros.geometry.pose import Pose, exp_so3

FloatArray = npt.NDArray[np.float64]
Range = tuple[float, float]
Scale = tuple[float, float, float]
HIGHEST_TABLE_VIEW_DEG = 88.0
LOWEST_TABLE_VIEW_DEG = 12.0  # below, a table is a line and nothing can be placed on it; such views float in the air


def view_rotation(azimuth: float, elevation: float, roll: float) -> FloatArray:
    """Return R_camera_object [3,3] of a camera at azimuth, elevation (rad, object's z is up), rolled about its axis."""
    ca, sa, ce, se = np.cos(azimuth), np.sin(azimuth), np.cos(elevation), np.sin(elevation)
    forward = -np.array([ce * ca, ce * sa, se])
    down = -np.array([-se * ca, -se * sa, ce])
    upright = np.stack([np.cross(down, forward), down, forward])
    c, s = np.cos(roll), np.sin(roll)
    return np.asarray(np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]) @ upright)


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


@dataclass(frozen=True, eq=False)
class _Crowd:
    """Things standing together: around `centre` [2] px with `spread` px, `gap` of the usual distance apart."""

    centre: FloatArray
    spread: float
    gap: float


class SceneSampler:
    """Draws scenes; knows the sizes of the meshes but no graphics."""

    def __init__(
        self, config: SceneConfig, meshes: list[Mesh], targets: int, extra: int, textures: int, collages: int = 0
    ) -> None:
        """`meshes` lists `targets` target meshes, then `extra` distractor meshes, then the primitives.

        `textures` counts the plain textures, `collages` the busy ones behind them.
        """
        self.config = config
        self.meshes = meshes
        self.targets = targets
        self.extra = extra
        self.textures = textures
        self.collages = collages
        self.bare = [mesh.bare for mesh in meshes[:targets]]
        self.radius = [float(np.linalg.norm(m.vertices, axis=1).max()) for m in meshes]

    def sample(self, rng: np.random.Generator) -> Scene:
        """Return a random scene."""
        config = self.config
        camera = self._camera(rng)
        # a range of views that lies wholly below a table's edge has no table
        possible = config.view == "uniform" or config.elevation_deg[1] > LOWEST_TABLE_VIEW_DEG
        on_table = rng.random() < config.table_fraction and possible
        count = int(rng.integers(config.targets[0], config.targets[1] + 1))
        wanted = [int(rng.integers(self.targets)) for _ in range(count)]
        # what is switched off draws nothing, so that older settings keep their scenes
        busy = config.busy_fraction > 0 and rng.random() < config.busy_fraction and self.collages > 0
        crowded = on_table and config.crowded_fraction > 0 and rng.random() < config.crowded_fraction
        if on_table:
            bodies, table, up = self._on_table(rng, camera, wanted, self._crowd(rng, camera) if crowded else None, busy)
        else:
            bodies, up = self._floating(rng, camera, wanted)
            table = None
        return Scene(camera, self._lighting(rng, up), tuple(bodies), table, up, busy)

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
            far = towards / np.linalg.norm(towards)
            place = np.array([0, 0, 0.9]) + towards * rng.uniform(0.8, 2.0) if near else far
            lights.append(Light(place, color, near))
        sky = rng.uniform(0.08, 0.45) * np.exp(rng.normal(0, 0.06, 3))
        ground = sky * rng.uniform(0.25, 0.8) * np.exp(rng.normal(0, 0.08, 3))
        return Lighting(tuple(lights), sky, ground, up, float(rng.uniform(0.7, 9.0)), float(rng.uniform(0.5, 1.0)))

    # ------------------------------------------------------------------ materials and distractors

    def _target(self, rng: np.random.Generator, target: int, pose: Pose) -> Body:
        return Body(target, pose, self._target_material(rng, self.bare[target]), target=target)

    def _target_material(self, rng: np.random.Generator, bare: bool) -> Material:
        saturation = rng.uniform(*self.config.target_saturation)
        matrix = hue_matrix(rng.normal(0, 0.10), saturation) * np.exp(rng.normal(0, 0.07, 3))[:, None]
        if bare:
            matrix = matrix @ np.diag(linear_color(self._bare_color(rng)))
        return Material(
            matrix * np.exp(rng.uniform(*np.log(self.config.target_gain))),
            rng.choice([0.0, rng.uniform(0.02, 0.35)]), rng.uniform(0.2, 0.8), rng.choice([0.0, rng.uniform(0.1, 0.7)]),
        )  # fmt: skip

    def _bare_color(self, rng: np.random.Generator) -> tuple[int, ...]:
        """Return the colour of an instance whose mesh has none: the part's, if it was said, or anything.

        White, as which such a mesh would be drawn, is only one of the colours that a part can have.
        """
        return random_color(rng) if self.config.target_color is None else self.config.target_color

    def _distractor(self, rng: np.random.Generator) -> tuple[int, tuple[float, float, float], int | None, Material]:
        """Return mesh key, scale, texture key and material of something that is not a target."""
        free = hue_matrix(rng.uniform(-np.pi, np.pi), rng.uniform(0.4, 1.3)) * rng.uniform(0.4, 1.3)
        material = Material(
            free, rng.choice([0.0, rng.uniform(0.02, 0.5)]), rng.uniform(0.15, 0.9),
            rng.choice([0.0, rng.uniform(0, 0.9)]), rng.choice([1.0, 1.0, 2.0, 0.5]),
        )  # fmt: skip
        if self.extra and rng.random() < 0.55:
            key = self.targets + int(rng.integers(self.extra))
            small = hue_matrix(rng.normal(0, 0.3), rng.uniform(0.6, 1.2)) * rng.uniform(0.6, 1.2)
            return key, (1.0, 1.0, 1.0), None, replace(material, color_matrix=small, texture_scale=1.0)
        key = int(rng.integers(self.targets + self.extra, len(self.meshes)))
        size = np.exp(rng.uniform(np.log(0.04), np.log(0.24)))
        scale = size * np.exp(rng.normal(0, 0.4, 3))
        if rng.random() < 0.3:  # thin things: books, sticks, sheets
            scale[int(rng.integers(3))] *= rng.uniform(0.05, 0.3)
        texture = int(rng.integers(self.textures))
        return key, (float(scale[0]), float(scale[1]), float(scale[2])), texture, material

    # ------------------------------------------------------------------ things in the air

    def _floating(self, rng: np.random.Generator, camera: Camera, wanted: list[int]) -> tuple[list[Body], FloatArray]:
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
            bodies.append(self._target(rng, target, Pose(rotation, ray * distance)))
        up = bodies[0].pose.rotation[:, 2].copy() if self.config.view == "upright" else random_rotation(rng)[0]
        bodies += self._floating_distractors(rng, camera, bodies)
        return bodies, up

    def _crowd(self, rng: np.random.Generator, camera: Camera) -> _Crowd:
        """Where in the image things stand together."""
        middle = rng.uniform(0.3, 0.7, 2) * (camera.width, camera.height)
        return _Crowd(middle, float(rng.uniform(0.12, 0.22)) * camera.width, float(rng.uniform(0.5, 0.8)))

    def _pixel(self, rng: np.random.Generator, camera: Camera, size: float, crowd: _Crowd | None = None) -> FloatArray:
        """A place in the image; mostly so that the object lies inside."""
        if crowd is not None:
            return np.clip(rng.normal(crowd.centre, crowd.spread), 0.0, (camera.width, camera.height))
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
        self, rng: np.random.Generator, camera: Camera, wanted: list[int], crowd: _Crowd | None, busy: bool
    ) -> tuple[list[Body], Body, FloatArray]:
        config = self.config
        low, high = LOWEST_TABLE_VIEW_DEG, HIGHEST_TABLE_VIEW_DEG
        if config.view == "upright":
            low, high = max(config.elevation_deg[0], low), min(config.elevation_deg[1], high)
        elevation = np.radians(rng.uniform(low, high))
        R = view_rotation(float(rng.uniform(-np.pi, np.pi)), float(elevation), self._roll(rng))
        up = R[:, 2].copy()
        centre = np.array([0.0, 0.0, self._distance(rng)])
        bodies: list[Body] = []
        spots: list[tuple[FloatArray, float]] = []
        for target in wanted:
            spot = self._free_spot(rng, camera, centre, up, self.radius[target] * 0.75, spots, config.distance, crowd)
            if spot is None and bodies:
                continue
            standing = self._standing(rng, config.view == "upright", config.tilt_sigma_deg)
            pose = self._placed(R, standing, target, (1.0, 1.0, 1.0), centre if spot is None else spot)
            # the foot, not the centre above it: in a crowd the height would count as clearance
            taken = pose.translation if crowd is None or spot is None else spot
            spots.append((taken, self.radius[target] * 0.75))
            bodies.append(self._target(rng, target, pose))
        bodies += self._table_distractors(rng, camera, R, centre, spots, bodies, crowd)
        half = rng.uniform(0.5, 1.2) if rng.random() < 0.5 else 6.0
        shift = R @ np.array([rng.normal(0, 0.2), rng.normal(0, 0.2), 0.0])
        turned = R @ exp_so3(np.array([0.0, 0.0, rng.uniform(-np.pi, np.pi)]))
        muted = hue_matrix(rng.normal(0, 0.5), rng.uniform(0.2, 1.1)) * rng.uniform(0.35, 1.2)
        material = Material(muted, rng.choice([0.0, rng.uniform(0, 0.3)]), rng.uniform(0.2, 0.9),
                            rng.choice([0.0, rng.uniform(0, 0.35)]), half * rng.uniform(0.6, 3.0))  # fmt: skip
        texture = int(rng.integers(self.textures))
        if busy:
            texture = self.textures + int(rng.integers(self.collages))
            printed = hue_matrix(rng.normal(0, 0.3), rng.uniform(0.7, 1.2)) * rng.uniform(0.4, 1.1)
            material = replace(material, color_matrix=printed, texture_scale=half * rng.uniform(0.8, 2.2))
        table = Body(-1, Pose(turned, centre + shift), material, (half, half, 1.0), texture)
        return bodies, table, up

    def _standing(self, rng: np.random.Generator, upright: bool, tilt_deg: float) -> FloatArray:
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
        spots: list[tuple[FloatArray, float]], limits: Range, crowd: _Crowd | None = None,
    ) -> FloatArray | None:  # fmt: skip
        """Return a point of the table seen by the camera within `limits` of distance, clear of `spots`, or None."""
        gap = 1.0 if crowd is None else crowd.gap
        for _ in range(24):
            size = radius / float(centre[2]) * camera.matrix[0, 0]
            ray = camera.rays(self._pixel(rng, camera, size, crowd)[None])[0]
            slope = float(ray @ up)
            if slope > -1e-3:
                continue
            point = ray * float(centre @ up) / slope
            if not limits[0] <= float(np.linalg.norm(point)) <= limits[1]:
                continue
            if all(np.linalg.norm(point - p) > gap * (radius + r) for p, r in spots):
                return np.asarray(point, dtype=np.float64)
        return None

    def _table_distractors(
        self, rng: np.random.Generator, camera: Camera, R: FloatArray, centre: FloatArray,
        spots: list[tuple[FloatArray, float]], targets: list[Body], crowd: _Crowd | None,
    ) -> list[Body]:  # fmt: skip
        out = []
        up = R[:, 2]
        wide = None if crowd is None else replace(crowd, spread=1.5 * crowd.spread)
        limits = (0.6 * self.config.distance[0], 1.8 * self.config.distance[1])
        for _ in range(int(rng.integers(self.config.distractors[0], self.config.distractors[1] + 1))):
            key, scale, texture, material = self._distractor(rng)
            radius = self.radius[key] * max(scale) * 0.6
            spot = self._free_spot(rng, camera, centre, up, radius, spots, limits, wide)
            if spot is not None:
                spots.append((spot, radius))
                out.append(self._resting(rng, R, key, scale, texture, material, spot))
        for _ in range(int(rng.integers(0, 6))):  # sheets of paper, magazines, boards
            flat = (float(rng.uniform(0.08, 0.45)), float(rng.uniform(0.08, 0.45)), float(rng.uniform(0.001, 0.008)))
            spot = self._free_spot(rng, camera, centre, up, 0.0, [], limits)
            if spot is not None:
                texture, paper = int(rng.integers(self.textures)), Material(np.eye(3) * rng.uniform(0.5, 1.1))
                box = self.targets + self.extra  # the first primitive
                out.append(self._resting(rng, R, box, flat, texture, paper, spot, flat_down=True))
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
    return np.asarray(turn @ (grey + saturation * (np.eye(3) - grey)))


def linear_color(color: tuple[int, ...]) -> FloatArray:
    """Return an RGB colour (0..255) [3] as the renderer's shaders reckon: by squares, 0..1."""
    return np.asarray((np.array(color, dtype=np.float64) / 255.0) ** 2)


def rotation_between(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the smallest rotation [3,3] that takes the unit vector a to the unit vector b (not opposite)."""
    cross, cosine = np.cross(a, b), float(a @ b)
    sine = float(np.linalg.norm(cross))
    return np.eye(3) if sine < 1e-12 else exp_so3(cross / sine * np.arctan2(sine, cosine))
