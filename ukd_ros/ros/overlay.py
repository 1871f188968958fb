# SPDX-License-Identifier: Apache-2.0
"""The picture that the node publishes: drawn by the perception room, for the objects that the node knows."""

from __future__ import annotations

from collections.abc import Iterable

from ukd_ros.geometry.estimate import PoseEstimate, Rejection
from ukd_ros.geometry.view import View
from ukd_ros.perception import overlay
from ukd_ros.ros.messages import KnownObjects


def draw_overlay(
    view: View, estimates: Iterable[PoseEstimate], rejections: Iterable[Rejection], objects: KnownObjects
) -> overlay.Image:
    """Return a copy of the view's image [H, W, 3] RGB with everything that was found in it."""
    return overlay.draw_overlay(view, estimates, rejections, objects.models)
