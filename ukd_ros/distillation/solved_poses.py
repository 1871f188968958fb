# SPDX-License-Identifier: Apache-2.0
"""Matched instances solved as on the robot, beside the truth: what calibrating and recalibrating judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ukd_ros.distillation.corrections import Match
from ukd_ros.distillation.pose_check import PoseCheck, pose_check
from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.estimate import Rejection
from ukd_ros.geometry.symmetry import without_free_turns
from ukd_ros.perception.estimator import PoseEstimator
from ukd_ros.perception.votes import VoteInstance


@dataclass(frozen=True, eq=False)
class SolvedPoses:
    """The check of the poses that were solved, their NEES [m] per part, and which matches they are of, `kept` [m]."""

    check: PoseCheck
    squares: dict[str, FloatArray]
    kept: npt.NDArray[np.int64]


def solve_poses(estimator: PoseEstimator, matches: Sequence[Match], instances: Sequence[VoteInstance]) -> SolvedPoses:
    """Solve one instance for every match, such as the match's own with another covariance.

    ValueError when none was solved.
    """
    deltas, covs, known, free, kept = [], [], [], [], []
    rejected: Counter[str] = Counter()
    for number, (item, instance) in enumerate(zip(matches, instances, strict=True)):
        answer = estimator.solve(item.camera, instance)
        if isinstance(answer, Rejection):
            rejected[answer.reason.value] += 1
            continue
        symmetries = estimator.objects[item.instance.class_index].symmetries
        deltas.append(item.truth.minus(answer.T_camera_object))
        covs.append(answer.cov)
        known.append(without_free_turns(answer.cov, answer.T_camera_object, symmetries))
        free.append(len(symmetries.continuous))
        kept.append(number)
    if not deltas:
        raise ValueError(
            f"No pose was solved from {len(matches)} matched instances ({dict(rejected)}): the student is too unsure "
            "to be calibrated, train it longer."
        )
    check, squares = pose_check(np.array(deltas), np.array(covs), dict(rejected), free, np.array(known))
    return SolvedPoses(check, squares, np.array(kept, dtype=np.int64))
