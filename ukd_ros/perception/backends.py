# SPDX-License-Identifier: Apache-2.0
"""Running the exported network: one small interface, three runtimes (ONNX Runtime, OpenCV's dnn, torch).

This is the only file of the pose node that imports onnxruntime or torch, and it does so when such a backend is opened,
so a robot needs the one runtime that it uses. Every backend gives the same numbers for the same image (tested).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ukd_ros.perception.bundle import Bundle, GraphSpec

logger = logging.getLogger(__name__)

BACKENDS = ("onnxruntime", "opencv", "torch")
"""The backends in the order in which ``auto`` tries them."""

OUTPUTS = ("score", "xy", "scale")
"""Names of the graph's outputs."""

INSTALL = {
    "onnxruntime": "pip install onnxruntime",
    "opencv": "sudo apt install python3-opencv (or pip install opencv-python-headless)",
    "torch": "pip install torch safetensors (or pip install 'ukd_ros[train]')",
}


class BackendError(RuntimeError):
    """A runtime that is missing, refuses the graph, or returned numbers that are not finite."""


@dataclass(frozen=True, eq=False)
class RawVotes:
    """What the network says about one image: one vote per cell, object class and keypoint.

    ``score`` [N,C] is the confidence 0..1 that the cell sees the class, ``xy`` [N,C,K,2] the keypoints in pixels of the
    network's input, ``scale`` [N,C,K,3] their predicted (sigma_u px, sigma_v px, correlation). All float32, finite.
    """

    score: npt.NDArray[np.float32]
    xy: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]


class Backend(Protocol):
    """A loaded graph."""

    name: str
    width: int
    height: int

    def run(self, image: npt.NDArray[np.uint8]) -> RawVotes:
        """Return the votes for one RGB ``image`` [height,width,3] of exactly the graph's size; raise BackendError."""
        ...
