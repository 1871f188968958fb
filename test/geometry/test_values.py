# SPDX-License-Identifier: Apache-2.0
"""The value types refuse what cannot be, by name, and cannot be changed afterwards."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ukd_ros.geometry.arrays import frozen_array
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.estimate import PoseEstimate, Rejection, RejectReason
from ukd_ros.geometry.keypoints import Keypoints
from ukd_ros.geometry.pose import Pose
from ukd_ros.geometry.view import LabelledView, ObjectLabel, View

CAMERA = Camera(6, 4, np.array([[5.0, 0, 2.5], [0, 5.0, 1.5], [0, 0, 1]]))


def test_frozen_array_copies_checks_and_locks() -> None:
    given = np.arange(6.0).reshape(2, 3).T
    array = frozen_array(given, (None, 2), "field")
    given[0, 0] = 9
    assert array[0, 0] == 0 and array.flags.c_contiguous and array.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1
    with pytest.raises(ValueError, match=r"^field: has shape \[3, 2\], but \[any, 3\]"):
        frozen_array(given, (None, 3), "field")
    with pytest.raises(ValueError, match="^field: holds NaN"):
        frozen_array([1.0, np.inf], (2,), "field")
    with pytest.raises(ValueError, match="^field: cannot be read"):
        frozen_array(["a"], (1,), "field")
    with pytest.raises(ValueError, match="^field: holds values that uint8"):
        frozen_array(np.array([300]), (1,), "field", np.uint8)
    with pytest.raises(ValueError, match="^field: holds values that int64"):
        frozen_array([0.5], (1,), "field", np.int64)
    assert np.isnan(frozen_array([np.nan], (1,), "field", finite=False)).all()


def test_keypoints_blocks_and_sigmas() -> None:
    A = np.random.default_rng(1).normal(size=(6, 6))
    cov = A @ A.T
    keypoints = Keypoints(np.zeros((3, 2)), cov, np.ones(3))
    assert len(keypoints) == 3
    assert np.allclose(keypoints.block(1), cov[2:4, 2:4], rtol=0, atol=1e-14)
    assert np.array_equal(keypoints.blocks()[2], keypoints.block(2))
    assert np.array_equal(keypoints.block(-1), keypoints.block(2))
    assert keypoints.sigma()[0] == pytest.approx(np.sqrt((cov[0, 0] + cov[1, 1]) / 2))
    with pytest.raises(IndexError):
        keypoints.block(3)
    round_error = cov + np.triu(np.full((6, 6), 1e-12), 1)
    assert np.array_equal(*(lambda c: (c, c.T))(Keypoints(np.zeros((3, 2)), round_error, np.ones(3)).cov))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xy": np.zeros((3, 3))}, "^xy"),
        ({"cov": np.eye(4)}, "^cov"),
        ({"cov": np.zeros((3, 2, 2))}, "^cov"),
        ({"score": np.ones(2)}, "^score"),
    ],
)
def test_keypoints_name_the_wrong_field(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"xy": np.zeros((3, 2)), "cov": np.eye(6), "score": np.ones(3)} | change
    with pytest.raises(ValueError, match=message):
        Keypoints(**arguments)  # type: ignore[arg-type]


def test_a_view_holds_a_read_only_window_on_an_image_of_its_cameras_size() -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    view = View(image, CAMERA, stamp_ns=5, frame_id="cam")
    assert np.shares_memory(view.image, image) and image.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        view.image[0, 0, 0] = 1
    with pytest.raises(ValueError, match="4x6, but its camera says 6x4"):
        View(np.zeros((6, 4, 3), np.uint8), CAMERA)
    with pytest.raises(ValueError, match="float32"):
        View(np.zeros((4, 6, 3), np.float32), CAMERA)
    with pytest.raises(ValueError, match="^image"):
        View(np.zeros((4, 6), np.uint8), CAMERA)


def test_labels_fit_their_view() -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    label = ObjectLabel("part", Pose.identity(), 0.5, np.ones((4, 6), bool))
    assert LabelledView(image, CAMERA, objects=(label,)).objects[0].visible_fraction == 0.5
    with pytest.raises(ValueError, match="mask of part"):
        LabelledView(image, CAMERA, objects=(ObjectLabel("part", Pose.identity(), mask=np.ones((2, 2), bool)),))
    with pytest.raises(ValueError, match="^visible_fraction"):
        ObjectLabel("part", Pose.identity(), visible_fraction=1.2)
    with pytest.raises(ValueError, match="^image"):
        LabelledView(image[:2], CAMERA)


def test_estimates_are_checked_and_rejections_say_why() -> None:
    keypoints = Keypoints(np.zeros((4, 2)), np.eye(8), np.ones(4))
    estimate = PoseEstimate("part", 0, Pose.identity(), np.eye(6), 0.9, keypoints, np.ones(4, bool), 1.0, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate.score = 1.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="^cov"):
        dataclasses.replace(estimate, cov=np.eye(3))
    with pytest.raises(ValueError, match="^inliers"):
        dataclasses.replace(estimate, inliers=np.ones(3, bool))
    # The reason is a string that survives a log line or a YAML file.
    rejection = Rejection(RejectReason.INCONSISTENT, "chi2 is 90 for 6 degrees of freedom")
    assert rejection.reason == "inconsistent" and RejectReason("inconsistent") is rejection.reason
