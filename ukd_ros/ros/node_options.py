# SPDX-License-Identifier: Apache-2.0
"""What the pose node itself can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from ukd_ros.ros.interop import CHOICES
from ukd_ros.ros.messages import KnownObjects


@dataclass(frozen=True)
class NodeOptions:
    """What the node itself can be told; the estimator's options follow under the prefix ``estimator``."""

    model: str = field(
        default="spray_bottle",
        metadata={"help": "Model folder: a path, or the name of an installed model.", "live": False},
    )
    backend: str = field(
        default="auto",
        metadata={
            "help": "Runtime of the network; auto takes the first that is installed.",
            "choices": ("auto", "onnxruntime", "opencv", "torch"),
            "live": False,
        },
    )
    object: str = field(
        default="", metadata={"help": "Object whose best instance is on ~/pose; empty: the model's first."}
    )
    compressed: bool = field(
        default=False, metadata={"help": "Subscribe to <image>/compressed instead of <image>.", "live": False}
    )
    rectified: str = field(
        default="auto",
        metadata={
            "help": "Whether images are rectified (true: P and no distortion, false: K and D); auto asks whether the "
            "topic's name (image_rect, image_rect_color, …).",
            "choices": ("auto", "true", "false"),
            "live": False,
        },
    )
    conversions: str = field(
        default="auto",
        metadata={
            "help": "Who converts messages: cv_bridge, tf_transformations, sensor_msgs_py (ros), this package (own), "
            "or the former where installed (auto).",
            "choices": CHOICES,
            "live": False,
        },
    )
    detections: bool = field(
        default=False, metadata={"help": "Publish ~/detections (needs vision_msgs).", "live": False}
    )
    marker_lifetime_s: float = field(
        default=1.0,
        metadata={
            "help": "Markers vanish this long after they were shown; 0: never.",
            "unit": "s",
            "min": 0.0,
            "max": 3600.0,
        },
    )
    input_timeout_s: float = field(
        default=5.0,
        metadata={"help": "Say so when an input has been silent this long.", "unit": "s", "min": 0.1, "max": 3600.0},
    )
    threads: int = field(
        default=0,
        metadata={"help": "Threads of the network's runtime; 0: its own choice.", "min": 0, "max": 256, "live": False},
    )
    autostart: bool = field(
        default=True, metadata={"help": "Configure and activate at start without being asked.", "live": False}
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if not self.model:
            raise ValueError("model: is empty, but a folder or the name of an installed model is needed.")


def check_object(name: str, objects: KnownObjects) -> None:
    """Raise ValueError when ``name`` is given and the model has no such object."""
    if name and name not in objects.numbers:
        raise ValueError(f"object: the model knows no '{name}', only {', '.join(objects.numbers)}.")
