# SPDX-License-Identifier: Apache-2.0
"""What the estimator answers: a pose with its covariance, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ukd_ros.geometry.arrays import BoolArray, FloatArray, frozen_array
from ukd_ros.geometry.keypoints import Keypoints
from ukd_ros.geometry.pose import Pose


class RejectReason(str, Enum):
    """Why there is no pose. A rejection is a normal answer, not an error."""

    NOTHING_FOUND = "nothing_found"
    """No cell of the network voted for the object."""
    LOW_SCORE = "low_score"
    """Something was found, but with less than the asked score or number of votes."""
    TOO_FEW_KEYPOINTS = "too_few_keypoints"
    """Fewer usable or mutually consistent keypoints than a pose needs."""
    INVALID_KEYPOINTS = "invalid_keypoints"
    """The keypoints' covariance is not positive definite."""
    NO_CONVERGENCE = "no_convergence"
    """No solver found a pose, or the refinement did not settle."""
    BEHIND_CAMERA = "behind_camera"
    """The only pose that fits lies behind the camera or outside what its lens model covers."""
    INCONSISTENT = "inconsistent"
    """The residuals are larger than the keypoints' covariance allows (chi-square gate)."""
    DEGENERATE = "degenerate"
    """The keypoints do not determine all six degrees of freedom."""
    AMBIGUOUS = "ambiguous"
    """Another pose explains the keypoints nearly as well, far from the first: one covariance cannot say both."""
    TOO_UNCERTAIN = "too_uncertain"
    """The pose's standard deviation exceeds what the options allow."""
    LOST = "lost"
    """A tracked object was not found again."""


@dataclass(frozen=True, eq=False)
class PoseEstimate:
    """The pose of one instance of one object, with everything needed to judge it.

    object_name, instance: which object, and its running number in this frame (0 is the best).
    T_camera_object: pose of the object in the camera's optical frame, m.
    cov: [6, 6], Cov(delta) in the tangent of ``Pose``: (x y z rotX rotY rotZ), m and rad, optical axes.
    score: 0..1, how sure the network is that the object is there.
    keypoints: in full-image pixels, with their covariance.
    inliers: [K], the keypoints that the pose was computed from.
    chi2, dof: squared length of the inliers' whitened residuals and its expectation, 2 * inliers - 6.
    ambiguity: likelihood of the second-best pose (the depth-mirrored one of a flat or far object) over that of this
        one: 0 none, 1 as likely. ``cov`` describes the neighbourhood of this pose only.
    T_camera_keypoints: the pose in which the model's 3D keypoints lie where ``keypoints`` are seen. None: that is
        T_camera_object. Another one only for a symmetric object followed under another name than the network's.
    """

    object_name: str
    instance: int
    T_camera_object: Pose
    cov: FloatArray
    score: float
    keypoints: Keypoints
    inliers: BoolArray
    chi2: float
    dof: int
    ambiguity: float = 0.0
    T_camera_keypoints: Pose | None = None

    def __post_init__(self) -> None:
        """Check and freeze the arrays."""
        object.__setattr__(self, "cov", frozen_array(self.cov, (6, 6), "cov"))
        inliers = frozen_array(self.inliers, (len(self.keypoints),), "inliers", bool)
        object.__setattr__(self, "inliers", inliers)


@dataclass(frozen=True, eq=False)
class Rejection:
    """Why there is no pose: the reason, a sentence for the log, and what was seen when something was."""

    reason: RejectReason
    detail: str
    object_name: str = ""
    keypoints: Keypoints | None = None
