# SPDX-License-Identifier: Apache-2.0
"""The chi-square distribution in plain numpy: a robot has no scipy, and every gate and every coverage needs it."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.arrays import FloatArray

MAX_TERMS = 100_000


def _lower_series(a: float, x: FloatArray) -> FloatArray:
    """Return sum_n x^n / (a (a+1) ... (a+n)): the lower incomplete gamma without its factor, for x < a + 1."""
    term = np.full_like(x, 1 / a)
    total = term.copy()
    for n in range(1, MAX_TERMS):
        term *= x / (a + n)
        total += term
        if not np.any(term > total * 1e-17):
            break
    return total


def _upper_fraction(a: float, x: FloatArray) -> FloatArray:
    """Return the continued fraction of the upper incomplete gamma (modified Lentz, Numerical Recipes 6.2)."""
    tiny = 1e-300
    b = x + 1 - a
    c = np.full_like(x, 1 / tiny)
    d = 1 / np.where(np.abs(b) < tiny, tiny, b)
    h = d.copy()
    for n in range(1, MAX_TERMS):
        numerator = -n * (n - a)
        b = b + 2
        d = numerator * d + b
        d = 1 / np.where(np.abs(d) < tiny, tiny, d)
        c = b + numerator / c
        c = np.where(np.abs(c) < tiny, tiny, c)
        h *= c * d
        if not np.any(np.abs(c * d - 1) > 1e-16):
            break
    return h


def _both_tails(x: npt.ArrayLike, dof: float) -> tuple[FloatArray, FloatArray]:
    """Return (P, Q), the lower and upper tail at ``x`` [...]; each is accurate where it is the small one."""
    if not (math.isfinite(dof) and dof > 0):
        raise ValueError(f"dof: is {dof}, but a positive number of degrees of freedom is needed.")
    value = np.asarray(x, dtype=np.float64)
    a, half = 0.5 * dof, np.atleast_1d(0.5 * value)
    lower = np.where(np.isnan(half), np.nan, np.where(half > 0, 1.0, 0.0))
    upper = 1 - lower
    inner = np.isfinite(half) & (half > 0)
    factor = np.exp(a * np.log(half[inner]) - half[inner] - math.lgamma(a))
    by_series = half[inner] < a + 1
    P = np.empty_like(factor)
    P[by_series] = factor[by_series] * _lower_series(a, half[inner][by_series])
    Q = 1 - P
    Q[~by_series] = factor[~by_series] * _upper_fraction(a, half[inner][~by_series])
    P[~by_series] = 1 - Q[~by_series]
    lower[inner], upper[inner] = P, Q
    return lower.reshape(value.shape), upper.reshape(value.shape)


def chi2_cdf(x: npt.ArrayLike, dof: float) -> FloatArray:
    """Return the probability that a chi-square variable with ``dof`` degrees of freedom is below ``x`` [...]."""
    return _both_tails(x, dof)[0]


def chi2_tail(x: npt.ArrayLike, dof: float) -> FloatArray:
    """Return the probability that it is above ``x`` [...] (the p-value), accurate also when tiny."""
    return _both_tails(x, dof)[1]


@lru_cache(maxsize=4096)
def chi2_quantile(level: float, dof: float) -> float:
    """Return the x below which a chi-square variable lies with probability ``level``, 0 <= level < 1.

    Newton's method on the smaller tail inside a shrinking bracket, from the Wilson-Hilferty cube.
    ValueError for a level outside that range.
    """
    if not 0 <= level < 1:
        raise ValueError(f"level: is {level}, but a probability in 0 <= level < 1 is needed.")
    if level == 0:
        return 0.0
    if dof == 2:
        return -2 * math.log1p(-level)
    low, high = 0.0, max(dof, 1.0)
    while float(chi2_cdf(high, dof)) < level:
        low, high = high, 2 * high
    x = 0.5 * (low + high)
    for _ in range(200):
        lower, upper = (float(tail) for tail in _both_tails(x, dof))
        excess = lower - level if level < 0.5 else (1 - level) - upper
        low, high = (low, x) if excess > 0 else (x, high)
        log_density = (0.5 * dof - 1) * math.log(0.5 * x) - 0.5 * x - math.lgamma(0.5 * dof) - math.log(2)
        step = excess * math.exp(-log_density) if log_density > -600 else math.inf
        newton = x - step
        previous, x = x, newton if low < newton < high else 0.5 * (low + high)
        if abs(x - previous) <= 1e-15 * x:
            break
    return x
