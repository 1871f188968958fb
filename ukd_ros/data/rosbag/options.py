# SPDX-License-Identifier: Apache-2.0
"""How frames are taken out of bags: which topics, which labels, which frames, and which of them are held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ukd_ros.perception.images import rectified_topic


@dataclass(frozen=True)
class BagOptions:
    """What `bags_to_bop` takes from bags; ValueError names a setting that cannot be."""

    image_topic: str = field(default="", metadata={"help": "Topic of the images; empty: the only one there is."})
    info_topic: str = field(
        default="",
        metadata={"help": "Topic of their CameraInfo; empty: camera_info beside the images, or the only one."},
    )
    rectified: Literal["auto", "true", "false"] = field(
        default="auto",
        metadata={"help": "The images are rectified; auto: if their topic's name says so (image_rect, …)."},
    )
    label_topics: Mapping[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "Topics of poses to the name of the object that each is of; a Detection3DArray has its class "
            "names from `classes`, its value here is empty."
        },
    )
    classes: Mapping[str, str] = field(
        default_factory=dict,
        metadata={"help": "class_id of a Detection3DArray to object name; a class not named keeps its id as name."},
    )
    label_frames: Mapping[str, str] = field(
        default_factory=dict, metadata={"help": "Frames of /tf to the name of the object that each is fixed to."}
    )
    truth_topics: bool = field(
        default=True, metadata={"help": "Also take /truth/OBJECT/pose, as this package's own bags have it."}
    )
    label_max_gap_s: float = field(
        default=0.1,
        metadata={"help": "A label is interpolated between neighbours at most so far from the image.", "unit": "s"},
    )
    min_change: float = field(
        default=4.0,
        metadata={
            "help": "A frame is left out when less changed since the last one kept: mean of the most changed 2 % of a "
            "thumbnail; 0 keeps all.",
            "unit": "grey levels",
        },
    )
    max_frames: int = field(
        default=0, metadata={"help": "At most so many frames of all bags, evenly spread; 0: all.", "unit": "frames"}
    )
    held_out: float = field(
        default=0.2, metadata={"help": "Share that is held out, by bag or block.", "unit": "0..0.9"}
    )
    block_s: float = field(
        default=30.0,
        metadata={"help": "Longest block of time, one scene each where the clock is not set back.", "unit": "s"},
    )
    guard_s: float = field(
        default=2.0, metadata={"help": "No training frame is nearer than this to a held-out block.", "unit": "s"}
    )

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0.0 <= self.held_out <= 0.9:
            raise ValueError(f"held_out: is {self.held_out}, but a share between 0 and 0.9 is needed.")
        if not 0.1 <= self.block_s < 1e6:
            raise ValueError(f"block_s: is {self.block_s}, but 0.1 s or more are needed.")
        if not 0.0 <= self.label_max_gap_s <= 10.0:
            raise ValueError(f"label_max_gap_s: is {self.label_max_gap_s}, but 0 to 10 s are needed.")
        for name, value in (
            ("guard_s", self.guard_s),
            ("min_change", self.min_change),
            ("max_frames", self.max_frames),
        ):
            if not 0 <= value < 1e9:
                raise ValueError(f"{name}: is {value}, but 0 or more is needed.")

    def rectified_for(self, topic: str) -> bool:
        """Return whether the images of ``topic`` are rectified."""
        return rectified_topic(topic) if self.rectified == "auto" else self.rectified == "true"
