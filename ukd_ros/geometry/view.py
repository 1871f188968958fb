# SPDX-License-Identifier: Apache-2.0
"""What a camera saw, with or without what is known to be in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.arrays import BoolArray, frozen_array
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.pose import Pose


@dataclass(frozen=True, eq=False)
class View:
    """One image and the camera that took it.

    image: [H, W, 3] uint8 RGB. It is not copied (a megabyte per frame): the view holds a read-only window on it,
        and the caller does not write to it afterwards.
    camera: of exactly this image's size.
    stamp_ns: time of exposure (ns), as its source counts it.
    frame_id: name of the camera's optical frame.
    ValueError when the image is of another type or size.
    """

    image: npt.NDArray[np.uint8]
    camera: Camera
    stamp_ns: int = 0
    frame_id: str = ""

    def __post_init__(self) -> None:
        """Check the image and make the window on it read-only."""
        image = self.image
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            have = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"image: is {have}, but a uint8 RGB array [H, W, 3] is needed.")
        height, width = image.shape[:2]
        if (width, height) != (self.camera.width, self.camera.height):
            raise ValueError(
                f"image: is {width}x{height}, but its camera says {self.camera.width}x{self.camera.height}."
            )
        window = image.view()
        window.setflags(write=False)
        object.__setattr__(self, "image", window)


@dataclass(frozen=True, eq=False)
class ObjectLabel:
    """The truth about one object in a view.

    T_camera_object: its pose in the optical frame, m.
    visible_fraction: visible pixels divided by the pixels of its whole silhouette, 0..1.
    mask: [H, W] bool, its visible pixels; None when unknown.
    truncated: whether its silhouette leaves the image.
    """

    object_name: str
    T_camera_object: Pose
    visible_fraction: float = 1.0
    mask: BoolArray | None = None
    truncated: bool = False

    def __post_init__(self) -> None:
        """Check the fraction and freeze the mask."""
        if not 0.0 <= self.visible_fraction <= 1.0:
            raise ValueError(f"visible_fraction: is {self.visible_fraction}, but 0..1 is needed.")
        if self.mask is not None:
            object.__setattr__(self, "mask", frozen_array(self.mask, (None, None), "mask", np.bool_))


@dataclass(frozen=True, eq=False)
class LabelledView(View):
    """A view and every labelled object in it; ValueError when a mask has another size than the image."""

    objects: tuple[ObjectLabel, ...] = ()

    def __post_init__(self) -> None:
        """Check the image and that the masks fit it."""
        super().__post_init__()
        object.__setattr__(self, "objects", tuple(self.objects))
        for label in self.objects:
            if label.mask is not None and label.mask.shape != self.image.shape[:2]:
                raise ValueError(
                    f"objects: the mask of {label.object_name} is {list(label.mask.shape)}, "
                    f"but the image is {list(self.image.shape[:2])}."
                )
