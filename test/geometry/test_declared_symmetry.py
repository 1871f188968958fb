# SPDX-License-Identifier: Apache-2.0
"""What people declare and what BOP's readers then find."""

from __future__ import annotations

import numpy as np
import pytest

from ukd_ros.data.demo_object import demo_mesh
from ukd_ros.geometry.declared_symmetry import symmetries_of


def test_declared_symmetries_are_motions_about_the_middle_of_the_part() -> None:
    mesh = demo_mesh()
    middle = 0.5 * (mesh.vertices.min(axis=0) + mesh.vertices.max(axis=0))
    quarter = symmetries_of(["z:90"], mesh)
    assert len(quarter.discrete) == 3
    for pose in quarter.discrete:
        np.testing.assert_allclose(pose.transform(middle[None])[0], middle, atol=1e-12)
    assert symmetries_of(["x"], mesh).continuous[0][0].tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="z:45"):
        symmetries_of(["z:45"], mesh)
