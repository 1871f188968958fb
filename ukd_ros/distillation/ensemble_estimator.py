# SPDX-License-Identifier: Apache-2.0
"""The ensemble as an estimator: its mean votes go through the very locate, zoom and solve that run on the robot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ukd_ros.data.dataset import WindowConfig
from ukd_ros.distillation.export import ExportOptions, network_manifest, trained_options
from ukd_ros.distillation.guidance import raw_votes
from ukd_ros.distillation.teacher import Ensemble
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.perception.backends import BackendError, RawVotes
from ukd_ros.perception.bundle import Bundle, GraphSpec
from ukd_ros.perception.estimator import EstimatorOptions, PoseEstimator
from ukd_ros.perception.votes import Calibration


class EnsembleBackend:
    """What `perception.backends` gives for one graph, from all members: their mean votes, and a variance that is the
    mean of their own plus that between them.
    """

    name = "ensemble"

    def __init__(self, ensemble: Ensemble, width: int, height: int) -> None:
        """`width`, `height` of the images to come, px."""
        self.width, self.height = width, height
        self._ensemble = ensemble
        self._device = next(ensemble.networks[0].parameters()).device

    def run(self, image: npt.NDArray[np.uint8]) -> RawVotes:
        """Return the votes for one RGB image [height,width,3]; BackendError where they are not finite."""
        blob = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
        votes = raw_votes(self._ensemble.predict(blob.to(self._device, torch.float32)), 0)
        if not all(np.isfinite(part).all() for part in (votes.score, votes.xy, votes.scale)):
            raise BackendError(f"{', '.join(self._ensemble.names)}: one of them gives votes that are not finite.")
        return votes


def ensemble_estimator(
    ensemble: Ensemble,
    models: Sequence[ObjectModel],
    sizes: ExportOptions,
    options: EstimatorOptions | None = None,
    calibration: Calibration | None = None,
) -> PoseEstimator:
    """Return the estimator whose network is the whole ensemble.

    `sizes` of the two graphs as `ukd export` would choose them (`trained_options`); `calibration` as
    `distillation.calibrate.calibrate` gives it for this very estimator (none: the votes' own error bars).
    """
    bundle = Bundle(
        root=Path(),
        name="ensemble",
        objects=tuple(models),
        bounds=(),
        network=network_manifest(ensemble.networks[0]),
        graphs={
            "locate": GraphSpec("", sizes.locate_width, sizes.locate_height),
            "zoom": GraphSpec("", sizes.zoom_size, sizes.zoom_size, sizes.context),
        },
        weights=None,
        calibration=calibration or Calibration(),
        provenance={},
    )
    locate = EnsembleBackend(ensemble, sizes.locate_width, sizes.locate_height)
    zoom = EnsembleBackend(ensemble, sizes.zoom_size, sizes.zoom_size)
    return PoseEstimator(bundle, options=options, locate=locate, zoom=zoom)


def window_sizes(window: WindowConfig) -> ExportOptions:
    """Return the graphs' sizes for a network that learns on such windows."""
    return trained_options({"window": asdict(window)})
