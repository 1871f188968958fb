# SPDX-License-Identifier: Apache-2.0
"""Matched instances, and what a doubtful network gets wrong in all of them alike: their size and their error bars.

The two corrections of `Calibration` that come before its error model: `shrinkage` and the doubt exponent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy.optimize import brentq

from ukd_ros.distillation.error_model import ErrorSamples, SharedErrors
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.keypoints import Keypoints
from ukd_ros.geometry.metrics import nees
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose
from ukd_ros.perception.pnp import PnpOptions, PnpSolution, projection_jacobian, solve_pnp
from ukd_ros.perception.votes import (
    Calibration,
    VoteInstance,
    joint_covariance,
    keypoint_box,
    shrink_share,
    unshrunk,
    widened,
)

_SHRINKAGES = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper ends among which the shrinkage is bracketed; the last is the most that `Calibration` takes."""


@dataclass(frozen=True, eq=False)
class Match:
    """An instance that the estimator found and the labelled object that it is of, in view number ``view``."""

    instance: VoteInstance
    truth: Pose
    camera: Camera
    view: int


def error_samples(matches: Sequence[Match], objects: Sequence[ObjectModel]) -> ErrorSamples:
    """Return the keypoint errors of the matches with what the error model needs; ValueError when there are none."""
    if not matches:
        raise ValueError("No instance matches a label: the model does not know these objects, or is not trained yet.")
    errors, jacobians = [], []
    for item in matches:
        model = objects[item.instance.class_index]
        pose = item.truth
        xy, jacobian = projection_jacobian(model.keypoints_3d, pose.rotation, pose.translation, item.camera)
        errors.append((item.instance.keypoints.xy - xy).reshape(-1))
        jacobians.append(jacobian.reshape(-1, 6))
    return ErrorSamples(
        error=np.array(errors),
        mean_blocks=np.array([item.instance.mean_blocks for item in matches]),
        effective_votes=np.array([item.instance.effective_votes for item in matches]),
        xy=np.array([item.instance.keypoints.xy for item in matches]),
        jacobian=np.array(jacobians),
        view=np.array([item.view for item in matches]),
    )


def fit_shrinkage(matches: Sequence[Match], objects: Sequence[ObjectModel]) -> float:
    """Return the shrinkage of `Calibration` at which the median pose is neither too far nor too near; 0 when it is so.

    Judged by solved poses, not by the slope of the keypoints on the true ones: that is below one also for an object
    that is seen turned another way and at its true depth.
    """
    widening = _widening(matches, objects)

    @cache
    def too_far(shrinkage: float) -> float:
        return _median_depth_error([spread(item, shrinkage) for item in matches], objects, widening)

    if too_far(0.0) <= 0.0:
        return 0.0
    for upper in _SHRINKAGES:
        if too_far(upper) <= 0.0:
            return float(brentq(too_far, 0.0, upper, xtol=0.005 * upper))
    return _SHRINKAGES[-1]


def _widening(matches: Sequence[Match], objects: Sequence[ObjectModel]) -> float:
    """Return the factor, at least 1, that makes the network's own error bars as wide as its errors.

    With narrower ones the solver would leave out keypoints, and whole poses.
    """
    squares = []
    for item in matches:
        points = item.instance.keypoints
        true = item.camera.project(item.truth.transform(objects[item.instance.class_index].keypoints_3d))
        error = (points.xy - true).reshape(-1)
        squares.append(float(error @ np.linalg.solve(points.cov, error)) / error.size)
    return max(1.0, float(np.median(squares))) if squares else 1.0


def _median_depth_error(matches: Sequence[Match], objects: Sequence[ObjectModel], widening: float) -> float:
    """Return the median of depth over true depth less one, of the matches that can be solved (0 when none can)."""
    depths = []
    for item in matches:
        points = item.instance.keypoints
        wide = Keypoints(points.xy, widening * points.cov, points.score)
        model = objects[item.instance.class_index].keypoints_3d
        found = solve_pnp(model, wide, item.camera, PnpOptions(gate_p_value=0.0), item.truth)
        if isinstance(found, PnpSolution):
            depths.append(found.T_camera_object.translation[2] / item.truth.translation[2] - 1.0)
    return float(np.median(depths)) if depths else 0.0


def fit_doubt(samples: ErrorSamples, share: FloatArray) -> tuple[float, float]:
    """Return doubt_exponent and doubt_reference of `Calibration`; share [n]: of each instance, before any correction.

    Squared pose errors in units of their predicted covariance are chi-square distributed up to a factor. Where that
    factor grows with the share, the slope of its logarithm is the exponent. Linearised poses; a straight line by
    iterated least squares in which the logarithm of a squared error counts less the further it lies from the line.
    """
    reference = float(np.exp(np.mean(np.log(share))))
    delta, cov = SharedErrors(samples).pose_errors(Calibration())
    y, x = np.log(np.maximum(nees(delta, cov), 1e-6)), np.log(share / reference)
    if float(np.var(x)) < 1e-6:
        return 0.0, reference
    weight = np.ones_like(x)
    slope = 0.0
    for _ in range(10):
        slope, offset = np.polyfit(x, y, 1, w=np.sqrt(weight))
        residual = y - slope * x - offset
        weight = 1.0 / (1.0 + (residual / (2.0 * np.median(np.abs(residual)))) ** 2)
    return float(np.clip(slope, -2.0, 4.0)), reference


def shares_of(matches: Sequence[Match]) -> FloatArray:
    """Return the share [n] of each match; see `shrink_share`."""
    xy = np.array([item.instance.keypoints.xy for item in matches])
    return shrink_share(xy, np.array([item.instance.mean_blocks for item in matches]))


def corrected(item: Match, calibration: Calibration) -> Match:
    """Return the match as the estimator will find it once the shrinkage and the doubt of a calibration are stored."""
    share = shrink_share(item.instance.keypoints.xy, item.instance.mean_blocks)
    item = spread(item, calibration.shrinkage)
    blocks = widened(item.instance.mean_blocks, share, calibration)
    return replace(item, instance=replace(item.instance, mean_blocks=blocks))


def spread(item: Match, shrinkage: float) -> Match:
    """Return the match with its keypoints as the estimator will give them once the shrinkage is stored."""
    instance = item.instance
    xy = unshrunk(instance.keypoints.xy, instance.mean_blocks, shrinkage)
    keypoints = Keypoints(xy, instance.keypoints.cov, instance.keypoints.score)
    return replace(item, instance=replace(instance, keypoints=keypoints, box=keypoint_box(xy)))


def recalibrated(instance: VoteInstance, calibration: Calibration) -> VoteInstance:
    """Return the instance with the covariance that another calibration gives."""
    points = instance.keypoints
    cov = joint_covariance(points.xy, instance.mean_blocks, instance.effective_votes, calibration)
    return replace(instance, keypoints=Keypoints(points.xy, cov, points.score))
