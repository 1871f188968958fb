# SPDX-License-Identifier: Apache-2.0
"""What may happen in a rendered image (`SceneConfig`) and what does in one (`Scene`), with the truth about it.

`placement.py` draws scenes, `scene_renderer.py` renders them. Poses are in the camera's optical frame, metres.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ukd_ros.data.renderer import Lighting, Material, Silhouette
from ukd_ros.data.sensor import SensorConfig
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.pose import Pose

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
    target_gain: Range = field(default=(0.65, 1.25), metadata={"help": "brightness of a target's colours, log-uniform"})
    target_saturation: Range = field(default=(0.7, 1.2), metadata={"help": "saturation factor of a target's colours"})
    target_color: tuple[int, ...] | None = field(
        default=None,
        metadata={"help": "red, green, blue (0 to 255) of a mesh without colours; none: not known, any are drawn"},
    )
    crowded_fraction: float = field(
        default=0.0, metadata={"help": "share of tables on which everything stands close together"}
    )
    busy_fraction: float = field(
        default=0.0, metadata={"help": "share of images whose table and background are collages of prints and pictures"}
    )
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
                     "truncated_fraction", "crowded_fraction", "busy_fraction"):  # fmt: skip
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: must lie in 0..1, got {getattr(self, name)}.")
        if self.target_gain[0] <= 0:
            raise ValueError(f"target_gain: must be positive, got {self.target_gain}.")
        if self.target_color is not None:
            color = tuple(self.target_color)
            if len(color) != 3 or not all(0 <= value <= 255 for value in color):
                raise ValueError(f"target_color: needs red, green and blue of 0 to 255, got {color}.")
            object.__setattr__(self, "target_color", color)
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
        if self.busy_fraction > 0 and self.texture_pool < 3:
            raise ValueError(f"texture_pool: busy_fraction needs at least 3 textures, got {self.texture_pool}.")
        if not 1 <= self.max_lights <= 4:
            raise ValueError(f"max_lights: must lie in 1..4, got {self.max_lights}.")
        if not 5 <= self.fov_deg[0] <= self.fov_deg[1] <= 150:
            raise ValueError(f"fov_deg: must lie in 5..150, got {self.fov_deg}.")
        if self.camera_matrix is not None:
            values = tuple(float(v) for v in self.camera_matrix)
            if len(values) != 9:
                raise ValueError(f"camera_matrix: needs nine numbers, got {len(values)}.")
            object.__setattr__(self, "camera_matrix", values)


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
    """Everything that is drawn: camera, light, table (or none), bodies, the targets first; a busy backdrop or not."""

    camera: Camera
    lighting: Lighting
    bodies: tuple[Body, ...]
    table: Body | None
    up: FloatArray
    busy: bool = False


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
