# SPDX-License-Identifier: Apache-2.0
"""Conformal radii hold what they promise, also where samples come in blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ukd_ros.distillation.conformal import block_quantile, conformal_radius, effective_size, highest_level
from ukd_ros.distillation.recalibrate import scale_factor
from ukd_ros.geometry.chi_square import chi2_quantile


def test_blocks_of_one_follow_the_rule_of_n_plus_1() -> None:
    squares = np.arange(1.0, 20.0)
    assert conformal_radius(squares, np.arange(19), 0.95) == pytest.approx(math.sqrt(19.0))
    assert conformal_radius(squares[:18], np.arange(18), 0.95) == math.inf
    assert conformal_radius(squares, np.arange(19), 0.5) == pytest.approx(math.sqrt(10.0))
    assert highest_level(19) == 0.95


def test_every_block_counts_alike() -> None:
    squares = np.array([1.0] * 97 + [4.0, 9.0, 16.0])
    block = np.array([0] * 97 + [1, 2, 3])
    assert conformal_radius(squares, block, 0.4) == pytest.approx(2.0)  # a pooled one would say 1
    assert block_quantile(squares, block, 0.5) == 4.0 and block_quantile(squares, np.zeros(100), 0.5) == 1.0
    assert block_quantile(squares, block, 1.0) == 16.0
    with pytest.raises(ValueError, match="same number"):
        conformal_radius([], [], 0.9)


def test_new_blocks_are_covered_and_pooling_would_promise_too_much(rng: np.random.Generator) -> None:
    """Blocks with scales of their own: over many draws the promise holds for a new block."""
    level, blocks, size = 0.9, 12, 25
    kept, pooled = [], []
    for _ in range(1500):
        scale = np.exp(rng.normal(0.0, 1.0, blocks + 1))
        squares = scale[:, None] * rng.chisquare(6, (blocks + 1, size))
        seen, new = squares[:-1].ravel(), squares[-1]
        block = np.repeat(np.arange(blocks), size)
        kept.append(np.mean(new <= conformal_radius(seen, block, level) ** 2))
        pooled.append(np.mean(new <= conformal_radius(seen, np.arange(len(seen)), level) ** 2))
    assert level - 0.01 <= np.mean(kept) <= level + 0.08
    assert np.mean(pooled) < np.mean(kept) - 0.01


def test_samples_that_resemble_each_other_are_worth_less(rng: np.random.Generator) -> None:
    block = np.repeat(np.arange(40), 10)
    same = np.repeat(rng.random(40) < 0.7, 10)
    assert effective_size(same, block) == pytest.approx(40.0)
    independent = rng.random(400) < 0.7
    assert effective_size(independent, block) > 280
    mixed = np.where(rng.random(400) < 0.5, same, independent)
    assert 60 < effective_size(mixed, block) < 280
    assert effective_size([True, True], [0, 0]) == 1.0
    assert effective_size([True, False, True], [0, 1, 2]) == 3.0


def test_the_factor_is_found_and_few_samples_are_believed_less(rng: np.random.Generator) -> None:
    many = 4.0 * rng.chisquare(6, 2000)
    assert scale_factor(many, np.arange(2000)) == pytest.approx(4.0, rel=0.1)
    few = np.full(6, 4.0 * chi2_quantile(0.6, 6))
    assert 1.5 < scale_factor(few, np.arange(6)) < 4.5
    assert scale_factor(few, np.zeros(6)) < scale_factor(few, np.arange(6))  # one block: one sample
