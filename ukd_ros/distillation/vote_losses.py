# SPDX-License-Identifier: Apache-2.0
"""What the student is told about the teachers' votes: prediction, feature and transport losses, each a pure function.

Letters: P objects in the batch's windows, V or n student votes and m teacher votes of each (padded: mass 0), K
keypoints, D feature channels. Coordinates are fractions of the window's side, so that one set of weights serves every
size. Our reading of UAKD and PFKD (arXiv 2503.13053), whose exact formula we could not read, after ADLP (arXiv
2205.14971): docs/distillation.md says what was published and what is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ukd_ros.distillation.transport import (
    Transport,
    TransportOptions,
    gaussian_distance,
    solve,
    squared_distance,
)

WEIGHTINGS = ("mass", "cost", "keypoint")
COVARIANCES = ("entropy", "w2")


@dataclass(frozen=True)
class Votes:
    """Votes of P objects: `xy` [P,V,K,2], `cov` [P,V,K,2,2] (how sure each says it is), `mass` [P,V] (score, 0 pads).

    A teacher ensemble's `cov` is the mean over its members of what they predict (aleatoric), and `spread` [P,V,K,2,2]
    the covariance between its members (epistemic); a student has none. `features` [P,V,D] are the pyramid's cells.
    """

    xy: Tensor
    cov: Tensor
    mass: Tensor
    spread: Tensor | None = None
    features: Tensor | None = None


@dataclass(frozen=True)
class AlignOptions:
    """How student and teacher votes are aligned.

    `transport`: the solver. `normalise`: masses of either side sum to 1; otherwise they are the scores, and the
    transport must be unbalanced. `debias`: subtract what each set costs within itself (as ADLP does). `weighting`:
    where the teachers' uncertainty acts, any of "mass" (an uncertain vote weighs less), "cost" (its misses cost less),
    and "keypoint" (an uncertain keypoint's whole problem counts less; weights sum to K). `softness`: the standard
    deviation, as a fraction of the window's side, at which a vote has half the say of a certain one. `aleatoric`: count
    what the teachers predict themselves as uncertain, besides what they disagree on. `covariance`: how the student's
    covariance learns in Gaussian transport, by the cross-entropy ("entropy") or from the transport's own value ("w2").
    """

    transport: TransportOptions = TransportOptions(blur=1e-2, reach=0.5)
    normalise: bool = True
    debias: bool = True
    weighting: tuple[str, ...] = ()
    softness: float = 0.02
    aleatoric: bool = True
    covariance: str = "entropy"

    def __post_init__(self) -> None:
        """Refuse weightings that do nothing; ValueError names the field."""
        unknown = set(self.weighting) - set(WEIGHTINGS)
        if unknown:
            raise ValueError(f"align.weighting: {', '.join(sorted(unknown))} is none of {', '.join(WEIGHTINGS)}")
        if self.covariance not in COVARIANCES:
            raise ValueError(f"align.covariance: {self.covariance!r} is none of {', '.join(COVARIANCES)}")
        if not self.softness > 0.0:
            raise ValueError(f"align.softness: must be positive, not {self.softness}")
        if self.transport.reach == float("inf"):
            if not self.normalise:
                raise ValueError("align.normalise: balanced transport (no reach) needs normalised masses")
            if "mass" in self.weighting:
                # equal marginals cancel what a keypoint's votes share: the weighting would be a pretence
                raise ValueError("align.weighting: mass acts only in unbalanced transport; give transport.reach")


def certainty(teacher: Votes, options: AlignOptions) -> Tensor:
    """Return how much say each teacher vote has per keypoint, [P,m,K] in 0..1: s² / (s² + tr Σ / 2)."""
    cov = torch.zeros_like(teacher.cov) if teacher.spread is None else teacher.spread
    cov = cov + teacher.cov if options.aleatoric else cov
    variance = 0.5 * cov.diagonal(dim1=-2, dim2=-1).sum(-1)
    return options.softness**2 / (options.softness**2 + variance)


def keypoint_weights(teacher: Votes, options: AlignOptions) -> Tensor:
    """Return w [P,K], Σ_k w_k = K: the mass-weighted mean certainty of each keypoint, relative to the others'."""
    sure = (certainty(teacher, options) * teacher.mass[..., None]).sum(1)
    return sure * sure.shape[-1] / sure.sum(-1, keepdim=True).clamp(min=torch.finfo(sure.dtype).tiny)


def naive_loss(student: Votes, teacher: Votes) -> Tensor:
    """Return [P,K]: Σ_v m_v |x_v − y_v|₁ / Σ_v m_v over votes of the same cells (prediction to prediction).

    Both sides' votes must come from the same cells in the same order; m is the teacher's mass where the student votes.
    """
    mass = torch.where(student.mass > 0, teacher.mass, torch.zeros_like(teacher.mass))[..., None]
    missed = (student.xy - teacher.xy).abs().sum(-1)
    return (mass * missed).sum(1) / mass.sum(1).clamp(min=torch.finfo(mass.dtype).tiny)


def align(student: Votes, teacher: Votes, options: AlignOptions) -> tuple[Tensor, Tensor]:
    """Return the transport loss [P,K] and the plan [P,K,n,m] (detached) between the votes of each keypoint.

    Per object and keypoint k the problem of `transport.solve` with cost ½|x_i − y_j|² and masses from the scores.
    ADLP as published: `normalise` false, no weighting. UAKD: the weightings of `AlignOptions`.
    With "cost", C_ij = ½ s² δᵀ (s² I + Σ_j)⁻¹ δ: a certain teacher's cost is the plain one. Debiased, the metric is one
    for each object and keypoint, the mass-weighted mean of s² (s² I + Σ_j)⁻¹: what a set costs within itself must be
    measured as what it costs to the other, or the difference pushes the student's votes apart where teachers doubt.
    """
    x, y = student.xy.transpose(1, 2), teacher.xy.transpose(1, 2)
    a, b = _masses(student, teacher, options)
    if "cost" in options.weighting and not options.debias:
        cost = _precision_cost(x, y, teacher, options)
    else:
        if "cost" in options.weighting:
            root = _mean_metric(teacher, options)
            x, y = x @ root, y @ root
        cost = squared_distance(x, y)
    found = solve(cost, a, b, options.transport)
    if options.debias:
        within = solve_within(x, a, options), solve_within(y, b, options)
        shift = 0.5 * options.transport.epsilon * (a.sum(-1) - b.sum(-1)) ** 2
        found = Transport(found.value - 0.5 * (within[0] + within[1]) + shift, found.plan)
    loss = found.value
    if "keypoint" in options.weighting:
        loss = loss * keypoint_weights(teacher, options)
    return loss, found.plan


def solve_within(points: Tensor, mass: Tensor, options: AlignOptions) -> Tensor:
    """Return what a set of votes [P,K,n,2] costs against itself, [P,K]."""
    return solve(squared_distance(points, points), mass, mass, options.transport).value


def gaussian_align(student: Votes, teacher: Votes, options: AlignOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Return the transport loss [P,K], the scale loss [P,K] and the plan [P,K,n,m] between votes taken as Gaussians.

    The plan is that of half the squared 2-Wasserstein distance, with teacher covariance Σ_j = `cov` + `spread`. The
    transport loss moves the means over it: Σ_ij π_ij C_ij, C as in `align`. The scale loss is the cross-entropy of the
    student's Gaussian under the teacher's,

        Σ_ij π_ij ½ [log|S_i| + tr S_i⁻¹ (Σ_j + δ_ij δ_ijᵀ)] / Σ_ij π_ij,   δ detached,

    whose optimum is the teacher's covariance plus the student's own miss, in the unit of the window's side. With
    `covariance` "w2" there is none; the transport loss has the distance's other half besides,

        Σ_ij π_ij ½ tr(S_i + Σ_j − 2 (Σ_j^½ S_i Σ_j^½)^½),

    whose optimum is the teacher's covariance alone: a student that misses by more is surer than it may be.
    """
    x, y = student.xy.transpose(1, 2), teacher.xy.transpose(1, 2)
    S, T = student.cov.transpose(1, 2), _total(teacher).transpose(1, 2)
    a, b = _masses(student, teacher, options)
    with torch.no_grad():
        plan = solve(gaussian_distance(x, S, y, T), a, b, options.transport).plan
    cost = _precision_cost(x, y, teacher, options) if "cost" in options.weighting else squared_distance(x, y)
    loss = (plan * cost).sum((-2, -1))
    if options.covariance == "w2":
        nowhere = torch.zeros_like(x), torch.zeros_like(y)
        loss = loss + (plan * gaussian_distance(nowhere[0], S, nowhere[1], T)).sum((-2, -1))
        scale_loss = torch.zeros_like(loss)
    else:
        scale_loss = _scale_loss(x, S, y, T, plan)
    if "keypoint" in options.weighting:
        weights = keypoint_weights(teacher, options)
        loss, scale_loss = loss * weights, scale_loss * weights
    return loss, scale_loss, plan


def _scale_loss(x: Tensor, S: Tensor, y: Tensor, T: Tensor, plan: Tensor) -> Tensor:
    """Return the mean cross-entropy over the plan [P,K]; see `gaussian_align`."""
    delta = (x[..., :, None, :] - y[..., None, :, :]).detach()
    second = T[..., None, :, :, :] + delta[..., :, None] * delta[..., None, :]
    u, v, c = S[..., 0, 0], S[..., 1, 1], S[..., 0, 1]
    determinant = (u * v - c * c).clamp(min=torch.finfo(u.dtype).tiny)
    inverse = torch.stack((torch.stack((v, -c), -1), torch.stack((-c, u), -1)), -2) / determinant[..., None, None]
    fit = (inverse[..., :, None, :, :] * second).sum((-2, -1))
    entropy = 0.5 * (determinant.log()[..., :, None] + fit)
    moved = plan.sum((-2, -1))
    told = (plan * entropy).sum((-2, -1)) / moved.clamp(min=torch.finfo(plan.dtype).tiny)
    return torch.where(moved > 0, told, torch.zeros_like(told))


def feature_loss(student: Votes, teacher: Votes) -> Tensor:
    """Return [P]: Σ_v m_v |f_v − t_v|² / (D Σ_v m_v), features of the same cells, each scaled to unit variance (FKD).

    Student features must have the teacher's D channels (project them first).
    """
    f, t = _features(student), _features(teacher)
    mass = torch.where(student.mass > 0, teacher.mass, torch.zeros_like(teacher.mass))
    missed = (f - t).square().mean(-1)
    return (mass * missed).sum(1) / mass.sum(1).clamp(min=torch.finfo(mass.dtype).tiny)


def planned_feature_loss(student: Votes, teacher: Votes, plan: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return [P]: Σ_ij π̄_ij |f_i − t_j|² / (D Σ_ij π̄_ij), which cells to copy being what the votes' plan says (PFKD).

    `plan` [P,K,n,m] detached; π̄ is its mean over keypoints, weighted with `weights` [P,K] where given. Features as in
    `feature_loss`. Zero where nothing was moved.
    """
    mean = plan.mean(1) if weights is None else (plan * weights[..., None, None]).sum(1) / plan.shape[1]
    f, t = _features(student), _features(teacher)
    missed = (f[:, :, None, :] - t[:, None, :, :]).square().mean(-1)
    return (mean * missed).sum((1, 2)) / mean.sum((1, 2)).clamp(min=torch.finfo(mean.dtype).tiny)


def _masses(student: Votes, teacher: Votes, options: AlignOptions) -> tuple[Tensor, Tensor]:
    """Return the masses a [P,K,n] and b [P,K,m]."""
    keypoints = student.xy.shape[2]
    a, b = student.mass.detach() if options.normalise else student.mass, teacher.mass
    if options.normalise:
        tiny = torch.finfo(a.dtype).tiny
        a, b = (mass / mass.sum(-1, keepdim=True).clamp(min=tiny) for mass in (a, b))
        # an object that one side does not see is no problem to solve
        both = ((a.sum(-1) > 0) & (b.sum(-1) > 0))[:, None].to(a.dtype)
        a, b = a * both, b * both
    wide_a = a[:, None, :].expand(-1, keypoints, -1)
    wide_b = b[:, None, :].expand(-1, keypoints, -1)
    if "mass" in options.weighting:
        wide_b = wide_b * certainty(teacher, options).transpose(1, 2)
    return wide_a, wide_b


def _mean_metric(teacher: Votes, options: AlignOptions) -> Tensor:
    """Return L [P,K,2,2] with L Lᵀ = Σ_j b_j s² (s² I + Σ_j)⁻¹ / Σ_j b_j, the metric in which |Lᵀδ|² is measured."""
    weight = (teacher.mass / teacher.mass.sum(1, keepdim=True).clamp(min=torch.finfo(teacher.mass.dtype).tiny))[:, None]
    mean = (weight[..., None, None] * _precision(teacher, options)).sum(2)
    # an object without votes has no metric, and no problem to measure
    empty = (teacher.mass.sum(1) <= 0)[:, None, None, None]
    root: Tensor = torch.linalg.cholesky(torch.where(empty, torch.eye(2, dtype=mean.dtype, device=mean.device), mean))
    return root


def _precision(teacher: Votes, options: AlignOptions) -> Tensor:
    """Return s² (s² I + Σ_j)⁻¹, [P,K,m,2,2]."""
    cov = torch.zeros_like(teacher.cov) if teacher.spread is None else teacher.spread
    cov = (cov + teacher.cov if options.aleatoric else cov).transpose(1, 2)
    soft = options.softness**2
    found: Tensor = soft * torch.linalg.inv(cov + soft * torch.eye(2, dtype=cov.dtype, device=cov.device))
    return found


def _precision_cost(x: Tensor, y: Tensor, teacher: Votes, options: AlignOptions) -> Tensor:
    """Return ½ s² δᵀ (s² I + Σ_j)⁻¹ δ, [P,K,n,m]."""
    precision = _precision(teacher, options)
    delta = x[..., :, None, :] - y[..., None, :, :]
    return 0.5 * torch.einsum("pknmi,pkmij,pknmj->pknm", delta, precision, delta)


def _total(teacher: Votes) -> Tensor:
    """Return the teachers' whole covariance of each vote."""
    return teacher.cov if teacher.spread is None else teacher.cov + teacher.spread


def _features(votes: Votes) -> Tensor:
    """Return features [P,V,D] with mean 0 and variance 1 over their channels; ValueError when there are none."""
    if votes.features is None:
        raise ValueError("these votes carry no features")
    return torch.nn.functional.layer_norm(votes.features, votes.features.shape[-1:])
