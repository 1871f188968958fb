# SPDX-License-Identifier: Apache-2.0
"""A world for tests: images that carry their own coordinates in their colours, and a network that knows the truth.

The fake network reads from the pixels of its crop where that crop was cut, and votes for the true keypoints there with
errors of known size and correlation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose
from ukd_ros.geometry.view import View
from ukd_ros.perception.backends import RawVotes
from ukd_ros.perception.votes import common_modes

Array = npt.NDArray[np.float64]

CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
BOX = ObjectModel("box", CORNERS * [0.04, 0.03, 0.05], 0.14)
ROD = ObjectModel("rod", CORNERS * [0.08, 0.015, 0.02], 0.17)
VGA = Camera(640, 480, np.array([[600.0, 0.0, 319.5], [0.0, 600.0, 239.5], [0.0, 0.0, 1.0]]))


@dataclass
class World:
    """The truth that the fake network sees: which objects are where, and how well it sees them."""

    camera: Camera = VGA
    objects: list[tuple[int, Pose]] = field(default_factory=list)
    blind_zoom: bool = False
    vote_correlation: float = 0.0
    modes: Array = field(default_factory=lambda: np.zeros(4))
    votes: tuple[int, int] = (10, 10)
    zoom_runs: int = 0
    locate_runs: int = 0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def view(self, stamp_ns: int = 0) -> View:
        """Return an image whose red and green channels are the column and row."""
        size = (self.camera.height, self.camera.width)
        image = np.zeros((*size, 3), np.uint8)
        v, u = np.mgrid[0 : size[0], 0 : size[1]]
        # Dithered, so that rounding to 256 colours averages out over a crop.
        dither = np.random.default_rng(0).uniform(0.0, 1.0, (2, *size))
        image[..., 0] = np.floor(u * 254.0 / (size[1] - 1) + dither[0])
        image[..., 1] = np.floor(v * 254.0 / (size[0] - 1) + dither[1])
        return View(image, self.camera, stamp_ns, "camera")


MODELS = (BOX, ROD)


class FakeBackend:
    """Votes that are the truth plus noise of the announced size, for objects that show in the image at a fair size."""

    name = "fake"

    def __init__(self, world: World, width: int, height: int, noise: float, locate: bool) -> None:
        self.world, self.width, self.height, self.noise, self.locate = world, width, height, noise, locate

    def run(self, image: npt.NDArray[np.uint8]) -> RawVotes:
        assert image.shape == (self.height, self.width, 3)
        world = self.world
        if self.locate:
            world.locate_runs += 1
        else:
            world.zoom_runs += 1
        cells, classes, count = 300, len(MODELS), len(CORNERS)
        score = world.rng.uniform(0.0, 0.1, (cells, classes)).astype(np.float32)
        xy = world.rng.uniform(0.0, self.width, (cells, classes, count, 2)).astype(np.float32)
        scale = np.tile(np.array([self.noise, self.noise, 0.0], np.float32), (cells, classes, count, 1))
        if self.locate or not world.blind_zoom:
            matrix = self._cut_at(image)
            for number, (index, pose) in enumerate(world.objects):
                points = world.camera.project(pose.transform(MODELS[index].keypoints_3d))
                target = points @ matrix[:, :2].T + matrix[:, 2]
                size, middle = np.ptp(target, axis=0).max(), target.mean(axis=0)
                if (middle < 0).any() or (middle > [self.width, self.height]).any() or not 12 < size < 1.2 * self.width:
                    continue
                votes = int(world.rng.integers(world.votes[0], world.votes[1] + 1))
                rows = np.arange(votes) + 30 * number
                score[rows, index] = 0.9 - 0.05 * number
                xy[rows, index] = target + self._errors(target, votes)
        return RawVotes(score, xy, scale, np.full(cells, 64.0, np.float32))

    def _errors(self, target: Array, votes: int) -> Array:
        """Draw the errors [votes, K, 2] px: shared by the whole object, by the votes of a keypoint, and their own."""
        world, count = self.world, len(target)
        whole = common_modes(target) @ (self.noise * np.sqrt(world.modes) * world.rng.normal(size=4))
        together = self.noise * np.sqrt(world.vote_correlation) * world.rng.normal(size=(count, 2))
        own = self.noise * np.sqrt(1.0 - world.vote_correlation) * world.rng.normal(size=(votes, count, 2))
        return np.asarray(whole.reshape(count, 2) + together + own)

    def _cut_at(self, image: npt.NDArray[np.uint8]) -> Array:
        """Return the affine [2, 3] from source px to this image's px, read from the colours."""
        v, u = 2 * np.array(np.nonzero(image[::2, ::2, 2] == 0))
        design = np.column_stack([u, v, np.ones(len(u))]).astype(np.float64)
        extent = np.array([self.world.camera.width - 1, self.world.camera.height - 1]) / 254.0
        back = np.linalg.lstsq(design, image[v, u, :2] * extent, rcond=None)[0].T
        inverse = np.linalg.inv(back[:, :2])
        return np.column_stack([inverse, -inverse @ back[:, 2]])
