# SPDX-License-Identifier: Apache-2.0
"""Opening the model that the node answers with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.view import View
from ukd_ros.perception.bundle import find_model, load_bundle
from ukd_ros.perception.estimator import EstimatorOptions, PoseEstimator
from ukd_ros.ros.node_options import NodeOptions


class Estimator(Protocol):
    """What the node needs of perception.estimator.PoseEstimator."""

    def estimate(self, view: View) -> Any:
        """Answer one view."""
        ...

    def reset(self) -> None:
        """Forget the track."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to answer: its objects, how it is called in logs, and how to apply changed options."""

    estimator: Estimator
    objects: tuple[ObjectModel, ...]
    description: str
    backend: str
    warm_up_camera: Camera
    apply: Callable[[EstimatorOptions], None]


EstimatorFactory = Callable[[NodeOptions, EstimatorOptions], LoadedModel]


def load_model(options: NodeOptions, estimator_options: EstimatorOptions) -> LoadedModel:
    """Find, check and open the model; BundleError or BackendError say what is wrong and what cures it."""
    bundle = load_bundle(find_model(options.model))
    estimator = PoseEstimator(bundle, options.backend, estimator_options, threads=options.threads)
    return LoadedModel(
        estimator=estimator,
        objects=bundle.objects,
        description=str(bundle.root),
        backend=estimator.backend_name,
        warm_up_camera=_warm_up_camera(),
        apply=lambda changed: setattr(estimator, "options", changed),
    )


def _warm_up_camera() -> Camera:
    return Camera(640, 480, np.array([[600.0, 0.0, 319.5], [0.0, 600.0, 239.5], [0.0, 0.0, 1.0]]))
