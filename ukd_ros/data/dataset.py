# SPDX-License-Identifier: Apache-2.0
"""Training windows: what the network sees of labelled views, in both framings (`locate` and `zoom`).

A sample is keyed by its index alone: the same seed and index give the same pixels, whatever process draws it and
in whatever order. All geometry of a window is one affine map from the source image, so keypoints, masks and viewing
rays stay exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.data.augment import AugmentConfig, augment
from ukd_ros.data.decoded import MOST_BYTES, Decoded, Numbered
from ukd_ros.data.progress import Bar
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose, exp_so3
from ukd_ros.geometry.symmetry import canonical
from ukd_ros.geometry.view import LabelledView, ObjectLabel, View
from ukd_ros.perception.crop import Crop

FloatArray = npt.NDArray[np.float64]


class Windows(Protocol):
    """Training windows by number, such as those of `WindowDataset`."""

    def sample(self, index: int) -> TrainingSample:
        """Return window number `index`, any non-negative integer."""
        ...

    def fingerprint(self) -> str:
        """Return what tells these windows from any others."""
        ...


class LabelledViews(Protocol):
    """Anything with a length that returns a labelled view by number, such as `BopDataset`."""

    def __len__(self) -> int:
        """Return the number of views."""
        ...

    def view(self, index: int) -> LabelledView:
        """Return one view with its labels."""
        ...


@dataclass(frozen=True)
class WindowConfig:
    """How windows are cut out of views.

    `size`: side of a window, px (a multiple of 32). `zoom_fraction`: share of windows framed as the zoom stage frames
    them; the rest are framed as the locate stage does. `zoom_fill`: the object's box as a fraction of the zoom window,
    centre of its log-uniform range, `zoom_fill_spread` the factor up and down, `zoom_shift` the largest offset of the
    object from the window's centre (fraction of the window). `locate_width`: the width (px) to which a frame is brought
    for the locate stage, `locate_spread` the factor up and down about that scale. `empty_fraction`: share of locate
    windows put anywhere in the frame. `rotation_deg`: half-range of in-plane rotation. `min_visible`: objects less
    visible than this fraction are neither learned nor taken as background. `min_size_px`: likewise for smaller boxes
    in the window.
    """

    size: int = 128
    zoom_fraction: float = 0.65
    zoom_fill: float = 0.66
    zoom_fill_spread: float = 1.3
    zoom_shift: float = 0.13
    locate_width: int = 320
    locate_spread: float = 1.3
    empty_fraction: float = 0.35
    rotation_deg: float = 20.0
    min_visible: float = 0.2
    min_size_px: float = 12.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        """Refuse windows that the network cannot take."""
        if self.size < 32 or self.size % 32:
            raise ValueError(f"window.size: must be a multiple of 32, not {self.size}")
        for name in ("zoom_fraction", "empty_fraction", "min_visible"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"window.{name}: must be in 0..1, not {getattr(self, name)}")
        if self.zoom_fill_spread < 1.0 or self.locate_spread < 1.0:
            raise ValueError("window: zoom_fill_spread and locate_spread are factors of at least 1")


@dataclass(frozen=True, eq=False)
class WindowObject:
    """One labelled object in a window.

    `xy` [K,2] keypoints in window px, `points_camera` [K,3] the same in the optical frame (m), `size_px` the long side
    of the keypoints' box, `ignored`: too hidden or too small to be learned, yet not background.
    """

    class_index: int
    xy: FloatArray
    points_camera: FloatArray
    diameter: float
    size_px: float
    ignored: bool


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """A window: `image` [S,S,3] uint8 RGB, `mask` [S,S] uint8 (1 + number of the object), and its objects.

    `ray_matrix` [3,3] takes homogeneous window px to viewing rays of the source camera's optical frame. `labelled`:
    whether anybody has said what is in it (a labelled window without objects is known to be empty). `supposed`: its
    labels are somebody's estimates, and there may be more objects than they say.
    """

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    objects: tuple[WindowObject, ...]
    ray_matrix: FloatArray
    labelled: bool = True
    supposed: bool = False


@dataclass(frozen=True, eq=False)
class _Frame:
    """A decoded view as the windows need it.

    `instances` numbers its objects' visible pixels from 1; `poses`, `visible` and `area` (px²) are one per object.
    """

    image: npt.NDArray[np.uint8]
    instances: npt.NDArray[np.uint8]
    camera: Camera
    objects: tuple[WindowObject, ...]
    poses: tuple[Pose, ...]
    visible: tuple[float, ...]
    area: FloatArray

    def bytes(self) -> int:
        """Return what its pixels take."""
        return self.image.nbytes + self.instances.nbytes


class WindowDataset:
    """Windows of labelled views, by sample number.

    All views are decoded once and kept in memory (0.9 MB and 0.3 MB of mask per 640x480 view). ValueError where a view
    lacks masks or no view shows a known object.
    """

    def __init__(
        self,
        views: LabelledViews,
        models: Sequence[ObjectModel],
        config: WindowConfig,
        seed: int,
        progress: bool = False,
    ) -> None:
        self.config = config
        self.models = tuple(models)
        self.seed = seed
        self.frames: Numbered[_Frame]
        with ThreadPoolExecutor(max_workers=2) as pool:
            loaded = pool.map(lambda i: _load_frame(views.view(i), self.models), range(len(views)))
            self.frames = list(Bar(loaded, total=len(views), desc="decoding views", disable=not progress, unit="view"))
        self._anchor(progress=False)

    def _anchor(self, progress: bool) -> None:
        """Note the objects that windows are centred on; ValueError when there is none."""
        self.anchors = [
            (f, o)
            for f, frame in enumerate(self._all(progress))
            for o, item in enumerate(frame.objects)
            if not item.ignored and frame.visible[o] >= self.config.min_visible
        ]
        if not self.anchors:
            names = ", ".join(m.name for m in self.models)
            raise ValueError(
                f"none of the {len(self.frames)} views shows {names} at least {self.config.min_visible:.0%} visible"
            )

    def _all(self, progress: bool) -> Iterator[_Frame]:
        """Yield all frames, and digest them on the way."""
        found = hashlib.sha256(repr((self.config, self.seed, [m.name for m in self.models])).encode())
        for model in self.models:
            found.update(np.ascontiguousarray(model.keypoints_3d).tobytes())
        numbers = Bar(range(len(self.frames)), desc="looking through views", unit="view", disable=not progress)
        for number in numbers:
            frame = self.frames[number]
            found.update(np.ascontiguousarray(frame.image[::16, ::16]).tobytes())
            found.update(np.ascontiguousarray(frame.instances[::16, ::16]).tobytes())
            found.update(repr((frame.visible, [item.ignored for item in frame.objects])).encode())
            for item in frame.objects:
                found.update(np.ascontiguousarray(item.xy).tobytes())
            yield frame
        self._fingerprint = found.hexdigest()

    def __len__(self) -> int:
        """Return the number of objects that windows are centred on: one pass over the data."""
        return len(self.anchors)

    def fingerprint(self) -> str:
        """Return a digest of the settings, the seed, the objects and the views (of every 16th pixel either way)."""
        return self._fingerprint

    def sample(self, index: int) -> TrainingSample:
        """Return window number `index` (any non-negative integer; passes over the data are shuffled anew)."""
        rng = np.random.default_rng((self.seed, index))
        order = _order(self.seed, index // len(self), len(self))
        frame_index, object_index = self.anchors[order[index % len(self)]]
        frame = self.frames[frame_index]
        warp = self._framing(frame, object_index, rng)
        donor = self.frames[int(rng.integers(len(self.frames)))].image
        return self._cut(frame, warp, donor, rng)

    def _framing(self, frame: _Frame, object_index: int, rng: np.random.Generator) -> FloatArray:
        """Draw the affine map [2,3] from source px to window px."""
        c = self.config
        target = frame.objects[object_index]
        low, high = target.xy.min(axis=0), target.xy.max(axis=0)
        centre = (low + high) / 2
        height, width = frame.image.shape[:2]
        if rng.random() < c.zoom_fraction:
            fill = c.zoom_fill * c.zoom_fill_spread ** rng.uniform(-1, 1)
            scale = fill * c.size / max(target.size_px, 1.0)
            shift = rng.uniform(-c.zoom_shift, c.zoom_shift, 2) * c.size
        else:
            scale = c.locate_width / width * c.locate_spread ** rng.uniform(-1, 1)
            shift = rng.uniform(-0.5, 0.5, 2) * c.size
            if rng.random() < c.empty_fraction:
                centre = rng.uniform(0, 1, 2) * (width, height)
        angle = np.deg2rad(c.rotation_deg) * rng.uniform(-1, 1)
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        middle = (c.size - 1) / 2 + shift
        return np.column_stack((turn, middle - turn @ centre))

    def _cut(
        self, frame: _Frame, warp: FloatArray, donor: npt.NDArray[np.uint8], rng: np.random.Generator
    ) -> TrainingSample:
        """Warp pixels and labels, then augment the pixels."""
        size = self.config.size
        # the estimator's own sampling, so that training sees what the robot will
        image = Crop(warp, (size, size)).warp(frame.image)
        mask = cv2.warpAffine(
            frame.instances,
            warp,
            (size, size),
            flags=cv2.INTER_NEAREST,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=0.0,
        ).astype(np.uint8)
        area_scale = float(np.abs(np.linalg.det(warp[:, :2])))
        inside = np.bincount(mask.ravel(), minlength=len(frame.objects) + 1)[1:]
        whole = frame.area * area_scale
        objects: list[WindowObject] = []
        renumber = np.zeros(256, np.uint8)
        for number, item in enumerate(frame.objects):
            if inside[number] == 0:
                continue
            size_px = item.size_px * float(np.sqrt(area_scale))
            hidden = frame.visible[number] < self.config.min_visible or inside[number] < 0.35 * whole[number]
            item = self._named(item, frame, number, warp)
            xy = item.xy @ warp[:, :2].T + warp[:, 2]
            ignored = item.ignored or hidden or size_px < self.config.min_size_px
            objects.append(
                WindowObject(item.class_index, xy, item.points_camera, item.diameter, size_px, bool(ignored))
            )
            renumber[number + 1] = len(objects)
        mask = renumber[mask]
        top = int(rng.integers(0, max(donor.shape[0] - size, 0) + 1))
        left = int(rng.integers(0, max(donor.shape[1] - size, 0) + 1))
        patch = np.ascontiguousarray(donor[top : top + size, left : left + size])
        if patch.shape != image.shape:
            patch = cv2.resize(patch, (size, size))  # type: ignore[assignment]
        image, mask = augment(image, mask, patch, self.config.augment, rng)
        homogeneous = np.vstack((warp, (0.0, 0.0, 1.0)))
        rays: FloatArray = np.linalg.inv(homogeneous @ frame.camera.matrix).astype(np.float64)
        return TrainingSample(image, mask, tuple(objects), rays)

    def _named(self, item: WindowObject, frame: _Frame, number: int, warp: FloatArray) -> WindowObject:
        """Return the object with the keypoints of its canonical pose, as this window shows it.

        The window may be turned, and what looks alike in it must have one label, so the choice is made here.
        """
        model = self.models[item.class_index]
        if not model.symmetries or item.ignored:
            return item
        angle = float(np.arctan2(warp[1, 0], warp[0, 0]))
        turn = Pose(exp_so3(np.array([0.0, 0.0, angle])), np.zeros(3))
        pose = turn.inverse() @ canonical(turn @ frame.poses[number], model.symmetries)
        points = pose.transform(model.keypoints_3d)
        return replace(item, xy=frame.camera.project(points), points_camera=points)


class UnlabelledWindows(WindowDataset):
    """Windows of views without labels, framed on boxes in which somebody supposes an object.

    Cut and augmented as labelled ones are; their samples have no objects and are not `labelled`. Views are asked for
    again and again, and only `most_bytes` of them are kept: bags have more frames than memory holds.
    """

    def __init__(
        self,
        views: Numbered[View],
        boxes: Sequence[tuple[int, FloatArray]],
        models: Sequence[ObjectModel],
        config: WindowConfig,
        seed: int,
        progress: bool = False,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """`boxes`: number of the view and [4] x0 y0 x1 y1 px; ValueError when there is none."""
        if not boxes:
            raise ValueError(f"none of the {len(views)} views without labels has anything to frame")
        self.config, self.models, self.seed = config, tuple(models), seed
        proposed: dict[int, list[WindowObject]] = {}
        for number, box in boxes:
            corners = np.array([box[:2], box[2:]], np.float64)
            size = float(np.ptp(corners, axis=0).max())
            proposed.setdefault(number, []).append(WindowObject(0, corners, np.zeros((2, 3)), 1.0, size, False))

        def frame(number: int) -> _Frame:
            view, items = views[number], tuple(proposed.get(number, ()))
            nobody = np.zeros(view.image.shape[:2], np.uint8)
            return _Frame(view.image, nobody, view.camera, items, (), (1.0,) * len(items), np.zeros(len(items)))

        self.frames = Decoded(len(views), frame, _Frame.bytes, most_bytes)
        self.anchors = [(f, o) for f, seen in enumerate(self._all(progress)) for o in range(len(seen.objects))]

    def sample(self, index: int) -> TrainingSample:
        """Return window number `index`, without labels."""
        return replace(super().sample(index), labelled=False)


@dataclass(frozen=True, eq=False)
class SupposedObject:
    """What somebody takes for an object of the models in a view: its class, pose, and visible pixels [H,W] bool."""

    class_index: int
    T_camera_object: Pose
    mask: npt.NDArray[np.bool_]


class SupposedWindows(WindowDataset):
    """Windows of views that somebody labelled with estimates: what was labelled is learnt, the rest is nothing known.

    Cut and augmented as labelled ones are; samples are `supposed`. Views are kept as by `UnlabelledWindows`.
    """

    def __init__(
        self,
        views: Numbered[tuple[View, Sequence[SupposedObject]]],
        models: Sequence[ObjectModel],
        config: WindowConfig,
        seed: int,
        progress: bool = False,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """ValueError when nothing is labelled in any view."""
        self.config, self.models, self.seed = config, tuple(models), seed

        def frame(number: int) -> _Frame:
            view, objects = views[number]
            labels = (ObjectLabel(models[o.class_index].name, o.T_camera_object, mask=o.mask) for o in objects)
            labelled = LabelledView(view.image, view.camera, view.stamp_ns, view.frame_id, tuple(labels))
            return _load_frame(labelled, self.models)

        self.frames = Decoded(len(views), frame, _Frame.bytes, most_bytes)
        self._anchor(progress)

    def sample(self, index: int) -> TrainingSample:
        """Return window number `index`, as supposed."""
        return replace(super().sample(index), supposed=True)


class MixedWindows:
    """Windows of a first data set, and among them shares of others; the numbers say which, whatever the order."""

    def __init__(self, first: Windows, others: Sequence[tuple[Windows, float]], seed: int) -> None:
        """`others` with their shares, each above 0 and below 1 in sum."""
        shares = [share for _, share in others]
        if min(shares, default=0.0) <= 0.0 or sum(shares) >= 1.0:
            raise ValueError(f"the shares of other windows must be positive and below 1 in sum, not {shares}")
        self._parts, self._seed = (*(windows for windows, _ in others), first), seed
        self._ends = np.cumsum(shares)

    def fingerprint(self) -> str:
        """Return a digest of all parts and their shares."""
        words = repr((*(part.fingerprint() for part in self._parts), self._ends.tolist(), self._seed))
        return hashlib.sha256(words.encode()).hexdigest()

    def sample(self, index: int) -> TrainingSample:
        """Return window number `index`."""
        chance = np.random.default_rng((self._seed, 0x3A7E, index)).random()
        return self._parts[int(np.searchsorted(self._ends, chance, side="right"))].sample(index)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Return the shuffled order of one pass over the data."""
    return np.random.default_rng((seed, 0x0E90C4, epoch)).permutation(count)


def _load_frame(view: LabelledView, models: tuple[ObjectModel, ...]) -> _Frame:
    """Decode one view and project its known objects; ValueError for a missing mask or a distorted camera."""
    if np.any(view.camera.distortion):
        raise ValueError("training windows are affine and need an undistorted camera; undistort the data set first")
    index_of = {model.name: i for i, model in enumerate(models)}
    instances = np.zeros(view.image.shape[:2], np.uint8)
    objects: list[WindowObject] = []
    poses: list[Pose] = []
    visible: list[float] = []
    for label in view.objects:
        if label.object_name not in index_of:
            continue
        if label.mask is None:
            raise ValueError(f"{label.object_name}: training needs the visible mask of every labelled object")
        class_index = index_of[label.object_name]
        model = models[class_index]
        points = label.T_camera_object.transform(model.keypoints_3d)
        xy = view.camera.project(points)
        bad = not np.isfinite(xy).all()
        xy = np.nan_to_num(xy)
        size = float(np.ptp(xy, axis=0).max())
        objects.append(WindowObject(class_index, xy, points, model.diameter, size, bad))
        poses.append(label.T_camera_object)
        visible.append(label.visible_fraction)
        instances[label.mask] = len(objects)
    area = np.bincount(instances.ravel(), minlength=len(objects) + 1)[1:].astype(np.float64)
    image = np.ascontiguousarray(view.image)
    return _Frame(image, instances, view.camera, tuple(objects), tuple(poses), tuple(visible), area)
