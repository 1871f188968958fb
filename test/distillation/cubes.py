# SPDX-License-Identifier: Apache-2.0
"""A cube with six colours, drawn by projecting its faces: labelled views for training tests, without OpenGL."""

from __future__ import annotations

import cv2
import numpy as np

from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.object_model import ObjectModel, Symmetries
from ukd_ros.geometry.pose import Pose, exp_so3
from ukd_ros.geometry.view import LabelledView, ObjectLabel

SIDE = 0.1
CAMERA = Camera(320, 240, np.array([[300.0, 0, 159.5], [0, 300.0, 119.5], [0, 0, 1]]))
CORNERS = SIDE / 2 * np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
FACES = ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3))
COLOURS = ((220, 40, 40), (40, 200, 40), (50, 60, 220), (230, 210, 40), (220, 40, 210), (40, 210, 220))
CUBE = ObjectModel("cube", CORNERS, SIDE * np.sqrt(3), Symmetries())


class CubeViews:
    """`count` views of one cube each on a noisy background."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def view(self, index: int) -> LabelledView:
        rng = np.random.default_rng((self.seed, index))
        noise = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        image = cv2.resize(noise, (320, 240), interpolation=cv2.INTER_CUBIC)
        axis = rng.normal(size=3)
        turn = exp_so3(axis / np.linalg.norm(axis) * rng.uniform(0, np.pi))
        pose = Pose(turn, np.array([rng.uniform(-0.1, 0.1), rng.uniform(-0.06, 0.06), rng.uniform(0.35, 0.6)]))
        corners = pose.transform(CORNERS)
        xy = CAMERA.project(corners)
        mask = np.zeros((240, 320), np.uint8)
        for face, colour in zip(FACES, COLOURS, strict=True):
            a, b, c = corners[list(face[:3])]
            normal = np.cross(b - a, c - a)
            if normal @ a < 0:
                continue
            polygon = np.round(xy[list(face)] * 16).astype(np.int32)
            cv2.fillConvexPoly(image, polygon, colour, cv2.LINE_AA, 4)
            cv2.fillConvexPoly(mask, polygon, 1, cv2.LINE_8, 4)
        return LabelledView(image, CAMERA, objects=(ObjectLabel("cube", pose, 1.0, mask.astype(bool)),))
