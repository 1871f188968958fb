# SPDX-License-Identifier: Apache-2.0
"""The distillation losses against values worked out by hand, and the student's gradient against doubt."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ukd_ros.distillation.transport import TransportOptions
from ukd_ros.distillation.vote_losses import (
    AlignOptions,
    Votes,
    align,
    certainty,
    feature_loss,
    gaussian_align,
    keypoint_weights,
    naive_loss,
    planned_feature_loss,
)

P, N, M, K = 2, 4, 5, 3
UNBALANCED = TransportOptions(blur=1e-2, reach=0.5)
BALANCED = TransportOptions(blur=1e-2)


def votes(seed: int, count: int, spread: float = 0.0, features: int = 0) -> Votes:
    generator = torch.Generator().manual_seed(seed)
    xy = 0.4 + 0.2 * torch.rand(P, count, K, 2, generator=generator, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64).expand(P, count, K, 2, 2)
    mass = 0.5 + 0.5 * torch.rand(P, count, generator=generator, dtype=torch.float64)
    drawn = torch.randn(P, count, features, generator=generator, dtype=torch.float64) if features else None
    return Votes(xy, eye * 0.01**2, mass, eye * spread**2, drawn)


def doubtful(teacher: Votes, keypoint: int, sigma: float) -> Votes:
    """The teacher with one keypoint of the first object on which its members disagree."""
    assert teacher.spread is not None
    spread = teacher.spread.clone()
    spread[0, :, keypoint] += sigma**2 * torch.eye(2, dtype=torch.float64)
    return replace(teacher, spread=spread)


def pull(student: Votes, teacher: Votes, options: AlignOptions) -> Tensor:
    """Length of the student's gradient per object and keypoint, [P,K]."""
    xy = student.xy.clone().requires_grad_(True)
    align(replace(student, xy=xy), teacher, options)[0].sum().backward()  # type: ignore[no-untyped-call]
    assert xy.grad is not None
    return xy.grad.square().sum((1, 3)).sqrt()


@pytest.mark.parametrize("weighting", [("mass",), ("cost",), ("keypoint",), ("mass", "cost", "keypoint")])
def test_an_uncertain_keypoint_pulls_less(weighting: tuple[str, ...]) -> None:
    student, teacher = votes(0, N), votes(1, M)
    options = AlignOptions(UNBALANCED, weighting=weighting)
    before, after = pull(student, teacher, options), pull(student, doubtful(teacher, 1, 0.1), options)
    assert float(after[0, 1]) < 0.5 * float(before[0, 1])
    assert torch.allclose(after[1], before[1])  # another object's keypoints are left alone
    others = (after[0, [0, 2]] / before[0, [0, 2]]).tolist()
    if "keypoint" in weighting:
        assert min(others) > 1.05  # the weights sum to K: the sure ones count more
    else:
        assert others == pytest.approx([1.0, 1.0])


def test_without_a_weighting_doubt_changes_nothing() -> None:
    student, teacher = votes(0, N), votes(1, M)
    for transport in (UNBALANCED, BALANCED):
        options = AlignOptions(transport)
        assert torch.equal(pull(student, teacher, options), pull(student, doubtful(teacher, 1, 0.1), options))


def test_weights_by_hand() -> None:
    teacher = doubtful(votes(1, M), 2, 0.02)
    options = AlignOptions(UNBALANCED, softness=0.02, aleatoric=False)
    sure = certainty(teacher, options)
    assert torch.allclose(sure[0, :, 2], torch.full((M,), 0.5, dtype=torch.float64))  # s² / (s² + s²)
    assert torch.allclose(sure[0, :, :2], torch.ones(M, 2, dtype=torch.float64))
    assert keypoint_weights(teacher, options)[0].tolist() == pytest.approx([1.2, 1.2, 0.6])
    assert keypoint_weights(teacher, options).sum(1).tolist() == pytest.approx([K, K])
    both = certainty(teacher, replace(options, aleatoric=True))
    assert float(both[1, 0, 0]) == pytest.approx(0.02**2 / (0.02**2 + 0.01**2))


def test_aligned_votes_cost_nothing_and_an_offset_its_square() -> None:
    student = votes(0, N)
    for options in (AlignOptions(BALANCED), AlignOptions(UNBALANCED), AlignOptions(UNBALANCED, normalise=False)):
        same, plan = align(student, student, options)
        assert torch.allclose(same, torch.zeros_like(same), atol=1e-8) and plan.shape == (P, K, N, N)
    moved = replace(student, xy=student.xy + torch.tensor([0.03, 0.04], dtype=torch.float64))
    loss, _ = align(moved, student, AlignOptions(BALANCED))
    # the optimal plan of a shift is the shift itself, and the debiased value is half its square
    assert torch.allclose(loss, torch.full_like(loss, 0.5 * 0.05**2), rtol=1e-3)


def test_published_masses_dominate_and_normalised_ones_do_not() -> None:
    student = votes(0, N)
    weaker = replace(student, mass=0.5 * student.mass)
    published, _ = align(weaker, student, AlignOptions(UNBALANCED, normalise=False))
    total = student.mass.sum(1)
    lost = UNBALANCED.rho * (total.sqrt() - (0.5 * total).sqrt()).square()
    assert torch.allclose(published, lost[:, None].expand_as(published), rtol=0.05)
    normalised, _ = align(weaker, student, AlignOptions(UNBALANCED))
    assert float(normalised.abs().max()) < 1e-8


def test_naive_and_feature_losses_by_hand() -> None:
    teacher = votes(1, N, features=6)
    student = replace(votes(0, N, features=6), xy=teacher.xy + 0.01)
    assert torch.allclose(naive_loss(student, teacher), torch.full((P, K), 0.02, dtype=torch.float64))
    padded = replace(student, mass=student.mass * torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    far = padded.xy.clone()
    far[:, 2:] += 100.0  # padding may hold anything
    assert torch.allclose(naive_loss(replace(padded, xy=far), teacher), torch.full((P, K), 0.02, dtype=torch.float64))
    assert feature_loss(teacher, teacher).tolist() == pytest.approx([0.0, 0.0])
    opposite = replace(teacher, features=-teacher.features)  # type: ignore[operator]
    assert feature_loss(opposite, teacher).tolist() == pytest.approx([4.0, 4.0], rel=1e-3)  # |2 t|² of unit variance
    with pytest.raises(ValueError, match="no features"):
        feature_loss(replace(student, features=None), teacher)


def test_the_plan_says_which_features_to_copy() -> None:
    teacher = votes(1, N, features=8)
    order = [2, 0, 3, 1]
    assert teacher.features is not None
    student = replace(
        teacher, xy=teacher.xy[:, order], mass=teacher.mass[:, order], features=teacher.features[:, order]
    )
    _, plan = align(student, teacher, AlignOptions(TransportOptions(blur=1e-3)))
    assert planned_feature_loss(student, teacher, plan).max() < 0.02  # the permutation is found
    assert feature_loss(student, teacher).min() > 0.3  # cell by cell it is missed
    weights = torch.ones(P, K, dtype=torch.float64)
    assert torch.allclose(
        planned_feature_loss(student, teacher, plan, weights), planned_feature_loss(student, teacher, plan)
    )
    nothing = planned_feature_loss(student, teacher, torch.zeros_like(plan))
    assert nothing.tolist() == [0.0, 0.0]


def test_the_scale_learns_the_teachers_doubt_plus_its_own_miss() -> None:
    """One vote each: the cross-entropy's optimum is S = Σ + δδᵀ, and matching covariances would teach Σ alone."""
    teacher = votes(1, 1, spread=0.02)
    delta = torch.tensor([0.03, -0.01], dtype=torch.float64)
    student = replace(votes(1, 1), xy=teacher.xy + delta)
    root = torch.full((P, 1, K, 3), math.log(0.05), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([root], lr=0.5, max_iter=200, tolerance_grad=1e-12)

    def covariance() -> Tensor:
        u, v, c = root[..., 0].exp(), root[..., 1].exp(), 0.95 * torch.tanh(root[..., 2] - math.log(0.05))
        return torch.stack((torch.stack((u * u, c * u * v), -1), torch.stack((c * u * v, v * v), -1)), -2)

    def closure() -> float:
        optimizer.zero_grad()
        loss = gaussian_align(replace(student, cov=covariance()), teacher, AlignOptions(BALANCED))[1].sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    wanted = (0.01**2 + 0.02**2) * torch.eye(2, dtype=torch.float64) + torch.outer(delta, delta)
    assert torch.allclose(covariance()[0, 0, 0], wanted, rtol=1e-3)


def test_pure_transport_teaches_the_teachers_covariance_and_forgets_the_miss() -> None:
    """One vote each: ½ W2² is least at S = Σ whatever δ is, and there it is ½ |δ|²."""
    teacher = votes(1, 1, spread=0.02)
    delta = torch.tensor([0.03, -0.01], dtype=torch.float64)
    options = AlignOptions(BALANCED, covariance="w2")
    root = torch.full((P, 1, K, 2), math.log(0.05), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([root], lr=0.5, max_iter=300, tolerance_grad=1e-14, tolerance_change=1e-16)

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        student = replace(votes(1, 1), xy=teacher.xy + delta, cov=torch.diag_embed((2.0 * root).exp()))
        return gaussian_align(student, teacher, options)[:2]

    def closure() -> float:
        optimizer.zero_grad()
        loss = 1e4 * losses()[0].sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    moved, scale = losses()
    assert torch.allclose((2.0 * root).exp(), torch.full_like(root, 0.01**2 + 0.02**2), rtol=1e-2)
    assert torch.allclose(moved, torch.full_like(moved, 0.5 * float(delta @ delta)), rtol=1e-3)
    assert torch.count_nonzero(scale) == 0
    with pytest.raises(ValueError, match=r"align.covariance: 'bures' is none of entropy, w2"):
        AlignOptions(covariance="bures")


def test_the_scale_loss_leaves_the_mean_alone_and_the_other_the_scale() -> None:
    student, teacher = votes(0, N), votes(1, M)
    xy, cov = student.xy.clone().requires_grad_(True), student.cov.clone().requires_grad_(True)
    loss, scale, plan = gaussian_align(replace(student, xy=xy, cov=cov), teacher, AlignOptions(UNBALANCED))
    moved = torch.autograd.grad(loss.sum(), (xy, cov), allow_unused=True, retain_graph=True)
    widened = torch.autograd.grad(scale.sum(), (xy, cov), allow_unused=True)
    assert [grad is None for grad in moved] == [False, True] and moved[0].abs().max() > 0
    assert [grad is None for grad in widened] == [True, False] and widened[1].abs().max() > 0
    assert not plan.requires_grad


@pytest.mark.parametrize("options", [AlignOptions(UNBALANCED, weighting=("mass", "cost", "keypoint")),
                                     AlignOptions(BALANCED, weighting=("cost",)),
                                     AlignOptions(UNBALANCED, normalise=False, debias=False)])  # fmt: skip
def test_nothing_to_align_is_no_nan_in_float32(options: AlignOptions) -> None:
    def half(v: Votes, alive: list[float]) -> Votes:
        mass = v.mass * torch.tensor(alive, dtype=torch.float64)[:, None]
        return Votes(v.xy.float(), v.cov.float(), mass.float(), None if v.spread is None else v.spread.float())

    for student_alive, teacher_alive in (([1.0, 0.0], [1.0, 1.0]), ([0.0, 1.0], [0.0, 0.0])):
        student, teacher = half(votes(0, N), student_alive), half(votes(1, M), teacher_alive)
        xy = student.xy.clone().requires_grad_(True)
        loss, plan = align(replace(student, xy=xy), teacher, options)
        (grad,) = torch.autograd.grad(loss.sum(), xy)
        moved, scale, _ = gaussian_align(student, teacher, options)
        for value in (loss, plan, grad, moved, scale, naive_loss(student, half(votes(1, N), teacher_alive))):
            assert torch.isfinite(value).all()
        for p in range(P):
            if not (student_alive[p] and teacher_alive[p]):
                assert torch.count_nonzero(plan[p]) == 0 and torch.count_nonzero(grad[p]) == 0


def test_pretences_are_refused() -> None:
    with pytest.raises(ValueError, match="mass acts only in unbalanced"):
        AlignOptions(BALANCED, weighting=("mass",))
    with pytest.raises(ValueError, match="balanced transport .* needs normalised"):
        AlignOptions(BALANCED, normalise=False)
    with pytest.raises(ValueError, match="'outer'|outer is none of"):
        AlignOptions(weighting=("outer",))


@pytest.mark.parametrize("debias", [True, False])
def test_doubt_never_pushes_the_students_votes_apart(debias: bool) -> None:
    """Ten votes about a teacher's: whatever the doubt, the loss is no gain and pulls inwards, less with doubt."""
    generator = torch.Generator().manual_seed(3)
    shape = (1, 10, 1)
    teacher = Votes(
        0.5 + 0.001 * torch.randn(*shape, 2, generator=generator, dtype=torch.float64),
        1e-8 * torch.eye(2, dtype=torch.float64).expand(*shape, 2, 2),
        torch.ones(1, 10, dtype=torch.float64),
    )
    pulls = []
    for sigma in (0.0, 0.03, 0.1, 1.0):
        spread = sigma**2 * torch.eye(2, dtype=torch.float64).expand(*shape, 2, 2)
        offset = 0.05 * torch.randn(*shape, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        xy = (0.5 + offset).requires_grad_(True)
        student = Votes(xy, teacher.cov, teacher.mass)
        options = AlignOptions(UNBALANCED, weighting=("cost",), debias=debias)
        loss = align(student, replace(teacher, spread=spread), options)[0]
        assert float(loss.detach()) >= -1e-9
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert xy.grad is not None
        pulls.append(float((xy.grad * offset).sum()))
    assert all(pull > -1e-7 for pull in pulls), pulls
    assert pulls[0] > 2 * pulls[1] > 4 * pulls[2] > 0 and pulls[3] < 1e-3 * pulls[0]
