# SPDX-License-Identifier: Apache-2.0
"""The chi-square functions against scipy and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ukd_ros.geometry.chi_square import chi2_cdf, chi2_quantile, chi2_tail

DOFS = [0.5, 1, 2, 3, 4, 5, 6, 7, 18, 50, 999, 12_000]


@pytest.mark.parametrize("dof", DOFS)
def test_both_tails_agree_with_scipy(dof: float) -> None:
    x = np.concatenate([stats.chi2.ppf([1e-9, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9], dof), [dof, dof + 2]])
    assert chi2_cdf(x, dof) == pytest.approx(stats.chi2.cdf(x, dof), rel=1e-9)
    assert chi2_tail(x, dof) == pytest.approx(stats.chi2.sf(x, dof), rel=1e-9)


@pytest.mark.parametrize("dof", DOFS)
@pytest.mark.parametrize("level", [1e-6, 0.01, 0.3, 0.5, 0.95, 0.999, 1 - 1e-9])
def test_quantiles_agree_with_scipy(level: float, dof: float) -> None:
    assert chi2_quantile(level, dof) == pytest.approx(stats.chi2.ppf(level, dof), rel=1e-9, abs=1e-290)


def test_closed_forms() -> None:
    x = np.array([0.0, 0.5, 3.0, 40.0, 400.0])
    assert chi2_tail(x, 2) == pytest.approx(np.exp(-x / 2), rel=1e-13)
    assert chi2_tail(x, 4) == pytest.approx(np.exp(-x / 2) * (1 + x / 2), rel=1e-13)
    assert chi2_tail(x[1:3], 1) == pytest.approx([math.erfc(math.sqrt(v / 2)) for v in x[1:3]], rel=1e-13)
    # The table every tracker knows by heart.
    assert [round(chi2_quantile(0.95, d), 3) for d in (1, 2, 3, 6)] == [3.841, 5.991, 7.815, 12.592]


def test_edges() -> None:
    assert chi2_cdf([-1.0, 0.0, np.inf], 6).tolist() == [0, 0, 1]
    assert chi2_tail([-1.0, 0.0, np.inf], 6).tolist() == [1, 1, 0]
    assert np.isnan(chi2_cdf(np.nan, 6))
    assert chi2_cdf(np.ones((2, 3)), 6).shape == (2, 3)
    assert chi2_quantile(0.0, 6) == 0
    with pytest.raises(ValueError, match="^level"):
        chi2_quantile(1.0, 6)
    with pytest.raises(ValueError, match="^dof"):
        chi2_cdf(1.0, 0)
