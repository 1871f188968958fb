# SPDX-License-Identifier: Apache-2.0
"""Entropic optimal transport between small weighted sets, many problems in one call.

One problem aligns n student votes with m teacher votes. For a cost C [n,m] and masses a [n], b [m] it is

    min over π ≥ 0 of  <π, C> + ε KL(π | a⊗b) + ρ KL(π 1 | a) + ρ KL(πᵀ1 | b),     KL(p|q) = Σ p log(p/q) − p + q

(unbalanced; with ρ = ∞ the marginals are a and b themselves: balanced). Sinkhorn's iterations in the log domain, ε
annealed from the cost's own size down (Schmitzer, SIAM J. Sci. Comput. 2019), and for the unbalanced problem the best
common shift of the potentials after every iteration (Séjourné et al., AISTATS 2022), without which ε << ρ takes 1/ε
iterations. The plan returned is the solved problem's own coupling, a_i b_j exp((f_i + g_j − C_ij) / ε).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_EXPONENT = 60.0
_SMALLEST_EXPONENT = -600.0
"""Below this an exponential is nothing beside the others; underflow costs a processor forty times as long."""

_CHECK_EVERY = 10
_RELAXATION = 1.8
"""How far a step of the scalings goes beyond its aim (Thibault et al. 2021): a third of the iterations remain."""


@dataclass(frozen=True)
class TransportOptions:
    """How a problem is regularised and solved.

    `blur`: square root of ε, in the unit of the cost's square root. `reach`: square root of ρ in the same unit, the
    distance beyond which mass is rather given up than moved; infinite: balanced. `scaling`: factor of the blur from one
    stage of the annealing to the next. `iterations`: at most so many at the last ε; they end earlier when the largest
    change of a potential in one is below `tolerance` times ε.
    """

    blur: float = 1e-2
    reach: float = math.inf
    scaling: float = 0.5
    iterations: int = 300
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse what cannot be solved; ValueError names the field."""
        for name in ("blur", "reach", "tolerance"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"transport.{name}: must be positive, not {getattr(self, name)}")
        if not 0.0 < self.scaling < 1.0:
            raise ValueError(f"transport.scaling: must be inside 0..1, not {self.scaling}")
        if self.iterations < 1:
            raise ValueError(f"transport.iterations: must be at least 1, not {self.iterations}")

    @property
    def epsilon(self) -> float:
        """Weight ε of the entropy."""
        return self.blur**2

    @property
    def rho(self) -> float:
        """Weight ρ of the marginals; infinite when balanced."""
        return self.reach**2


@dataclass(frozen=True)
class Transport:
    """The solution of a batch of problems.

    `value` [...]: the minimum above; differentiable with respect to cost and masses (envelope theorem: the potentials
    are held). `plan` [...,n,m]: the coupling, without gradient.
    """

    value: Tensor
    plan: Tensor


def solve(cost: Tensor, a: Tensor, b: Tensor, options: TransportOptions) -> Transport:
    """Solve every problem of a batch: `cost` [...,n,m], masses `a` [...,n] and `b` [...,m], non-negative.

    Votes that only pad a set have mass 0; they get no plan and no gradient but that of their mass. A problem with an
    empty side has an empty plan; its value is what giving up the other side costs (unbalanced) or 0 (balanced).
    Computed in float64 whatever comes in (ε is a millionth of the costs in ADLP's setting), returned as it came.
    ValueError when shapes disagree, or in the balanced case masses are not equal to 1e-3 (relative).
    """
    if cost.shape[:-1] != a.shape or cost.shape[:-2] + cost.shape[-1:] != b.shape:
        raise ValueError(f"cost {tuple(cost.shape)} does not fit masses {tuple(a.shape)} and {tuple(b.shape)}")
    balanced = math.isinf(options.rho)
    C, p, q = cost.double(), a.double(), b.double()
    if cost.shape[-1] == 0 or cost.shape[-2] == 0:
        left_over = torch.zeros_like(p.sum(-1)) if balanced else options.rho * (p.sum(-1) + q.sum(-1))
        return Transport(left_over.to(cost.dtype), torch.zeros_like(cost))
    with torch.no_grad():
        if balanced:
            _require_equal(p.sum(-1), q.sum(-1))
        f, g = _potentials(C, p, q, options)
    exponent = (f[..., :, None] + g[..., None, :] - C) / options.epsilon
    exponent = exponent.clamp(_SMALLEST_EXPONENT, _LARGEST_EXPONENT)
    coupling = p[..., :, None] * q[..., None, :] * torch.exp(exponent)
    slack = options.epsilon * (p.sum(-1) * q.sum(-1) - coupling.sum((-2, -1)))
    if balanced:
        value = (p * f).sum(-1) + (q * g).sum(-1) + slack
        nothing = (p.sum(-1) <= 0) | (q.sum(-1) <= 0)
        value = torch.where(nothing, torch.zeros_like(value), value)
    else:
        rho = options.rho
        given_up = [
            torch.where((other.sum(-1) > 0)[..., None], -torch.expm1(-potential / rho), 1.0)
            for potential, other in ((f, q), (g, p))
        ]
        value = rho * ((p * given_up[0]).sum(-1) + (q * given_up[1]).sum(-1)) + slack
    return Transport(value.to(cost.dtype), coupling.detach().to(cost.dtype))


def divergence(
    cost: Tensor, cost_a: Tensor, cost_b: Tensor, a: Tensor, b: Tensor, options: TransportOptions
) -> Transport:
    """Return the debiased value V(a,b) − ½V(a,a) − ½V(b,b) + ½ε(|a| − |b|)² and the plan of V(a,b).

    `cost_a` [...,n,n] and `cost_b` [...,m,m] are the costs within each set. Zero when both sets are the same
    (Feydy et al., AISTATS 2019; with masses, Séjourné et al. 2019). All three problems are solved in one call.
    """
    n, m = cost.shape[-2:]
    side = max(n, m)

    def square(matrix: Tensor) -> Tensor:
        rows, columns = side - matrix.shape[-2], side - matrix.shape[-1]
        return torch.nn.functional.pad(matrix, (0, columns, 0, rows))

    left = torch.nn.functional.pad(a, (0, side - n))
    right = torch.nn.functional.pad(b, (0, side - m))
    solved = solve(
        torch.stack((square(cost), square(cost_a), square(cost_b))),
        torch.stack((left, left, right)),
        torch.stack((right, left, right)),
        options,
    )
    between, within_a, within_b = solved.value
    masses = 0.5 * options.epsilon * (a.sum(-1) - b.sum(-1)) ** 2
    return Transport(between - 0.5 * (within_a + within_b) + masses, solved.plan[0, ..., :n, :m])


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return half the squared distance [...,n,m] between `x` [...,n,D] and `y` [...,m,D]: geomloss' cost, p=2."""
    return 0.5 * (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)


def gaussian_distance(x: Tensor, cov_x: Tensor, y: Tensor, cov_y: Tensor) -> Tensor:
    """Return half the squared 2-Wasserstein distance [...,n,m] between plane Gaussians.

    `x` [...,n,2] with `cov_x` [...,n,2,2], `y` [...,m,2] with `cov_y` [...,m,2,2]:
    |x − y|² + tr(A + B − 2 (B^½ A B^½)^½), where in the plane tr(B^½ A B^½)^½ = (tr AB + 2 (det A det B)^½)^½.
    """
    A, B = cov_x[..., :, None, :, :], cov_y[..., None, :, :, :]
    product = (A * B).sum((-2, -1))  # both are symmetric, so this is tr AB
    areas = torch.linalg.det(cov_x).clamp(min=0)[..., :, None] * torch.linalg.det(cov_y).clamp(min=0)[..., None, :]
    tiny = torch.finfo(product.dtype).tiny
    root = (product + 2.0 * areas.clamp(min=tiny).sqrt()).clamp(min=tiny).sqrt()
    traces = A.diagonal(dim1=-2, dim2=-1).sum(-1) + B.diagonal(dim1=-2, dim2=-1).sum(-1)
    distance: Tensor = squared_distance(x, y) + 0.5 * (traces - 2.0 * root)
    return distance


def _require_equal(left: Tensor, right: Tensor) -> None:
    """Refuse balanced problems whose sides weigh differently; those with an empty side are none."""
    both = (left > 0) & (right > 0)
    if bool((((left - right).abs() > 1e-3 * torch.maximum(left, right)) & both).any()):
        raise ValueError("balanced transport needs equal masses on both sides: normalise them, or give a reach")


def _potentials(C: Tensor, a: Tensor, b: Tensor, options: TransportOptions) -> tuple[Tensor, Tensor]:
    """Return the dual potentials f [...,n] and g [...,m]; 0 where there is no mass."""
    # the problems stand last in memory, where a processor takes several at once
    n, m = C.shape[-2:]
    a_last, b_last = a.reshape(-1, n).T.contiguous(), b.reshape(-1, m).T.contiguous()
    f, g = _solved(C.reshape(-1, n, m).permute(1, 2, 0).contiguous(), a_last, b_last, options)
    return f.T.reshape(a.shape), g.T.reshape(b.shape)


def _solved(C: Tensor, a: Tensor, b: Tensor, options: TransportOptions) -> tuple[Tensor, Tensor]:
    """Return the dual potentials f [n,P] and g [m,P] of P problems: `C` [n,m,P], `a` [n,P], `b` [m,P]."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    live = (a[:, None] > 0) & (b[None] > 0)
    largest = float(C.masked_fill(~live, 0.0).max()) if C.numel() else 0.0
    if not math.isfinite(largest):
        return f, g  # the value will not be finite either, and the caller learns whose it is
    for epsilon in _stages(max(largest, options.epsilon), options):
        # in the log domain, which takes whatever the last stage left
        f, g = _steps_by_logs(C, f, g, a, b, epsilon, options.rho)
    remaining, relaxation, last = options.iterations, _RELAXATION, math.inf
    while remaining > 0:
        count = min(remaining, _CHECK_EVERY)
        new_f, new_g, moved = _steps_by_kernel(C, f, g, a, b, options, count, relaxation)
        remaining -= count
        if not math.isfinite(moved) or moved > 2.0 * last:  # too far beyond: from here on without
            relaxation, last = 1.0, math.inf
            f, g = _steps_by_logs(C, f, g, a, b, options.epsilon, options.rho)
            continue
        f, g, last = new_f, new_g, moved
        if moved < options.tolerance * options.epsilon:
            break
    # a step beyond its aim leaves the marginals off by as much: the last one is plain
    return _steps_by_logs(C, f, g, a, b, options.epsilon, options.rho)


def _steps_by_kernel(
    C: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    options: TransportOptions,
    count: int,
    relaxation: float,
) -> tuple[Tensor, Tensor, float]:
    """Take `count` iterations with the kernel of the potentials given; return the new ones and how far the last moved.

    Stabilised scaling (Schmitzer 2019): the potentials are absorbed into exp((f + g − C)/ε), so that the scalings stay
    near 1 and an iteration costs two products of a matrix and a vector instead of n·m exponentials.
    """
    epsilon, rho = options.epsilon, options.rho
    damping, softness = (1.0, 0.0) if math.isinf(rho) else (rho / (rho + epsilon), epsilon / rho)
    has_a, has_b = a > 0, b > 0
    both = has_a.any(0) & has_b.any(0)  # a problem with an empty side has no potential
    F, G = f / epsilon, g / epsilon
    exponent = (F[:, None] + G[None] - C / epsilon).clamp(_SMALLEST_EXPONENT, _LARGEST_EXPONENT)
    padding = ~(has_a[:, None] & has_b[None])  # it weighs nothing; its scalings are kept near 1
    kernel = torch.exp(exponent.masked_fill(padding, 0.0))
    tiny = torch.finfo(a.dtype).tiny
    to_u, to_v = kernel * b[None], kernel * a[:, None]
    aim_u, aim_v = (damping - 1.0) * F, (damping - 1.0) * G
    kept_a, kept_b = both * a * torch.exp(-softness * F), both * b * torch.exp(-softness * G)
    u, v, before = torch.zeros_like(F), torch.zeros_like(G), torch.zeros_like(F)  # logarithms of the scalings
    for _ in range(count):
        before = u
        left = (to_u * torch.exp(v)[None]).sum(1)
        u = torch.lerp(u, torch.sub(aim_u, torch.log(left + tiny), alpha=damping), relaxation)
        right = (to_v * torch.exp(u)[:, None]).sum(0)
        v = torch.lerp(v, torch.sub(aim_v, torch.log(right + tiny), alpha=damping), relaxation)
        if softness > 0.0:  # the best common shift, as in `_shifted`
            left, right = (kept_a * torch.exp(-softness * u)).sum(0), (kept_b * torch.exp(-softness * v)).sum(0)
            shift = torch.log((left + tiny) / (right + tiny)) * (0.5 / softness)
            u, v = u + shift, v - shift
    f, g = (epsilon * torch.where(has & both, x, 0.0) for has, x in ((has_a, F + u), (has_b, G + v)))
    return f, g, epsilon * float(torch.where(has_a & both, u - before, 0.0).abs().max())


def _steps_by_logs(
    C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: float, rho: float
) -> tuple[Tensor, Tensor]:
    """Take one iteration in the log domain."""
    scaled = C / epsilon
    f = _step((b.log() + g / epsilon)[None] - scaled, 1, a, epsilon, rho)
    g = _step((a.log() + f / epsilon)[:, None] - scaled, 0, b, epsilon, rho)
    return _shifted(f, g, a, b, rho)


def _stages(largest: float, options: TransportOptions) -> list[float]:
    """Return the annealed ε, from the size of the costs down to the last."""
    steps = max(0, math.ceil(math.log(options.epsilon / largest) / math.log(options.scaling**2)))
    return [largest * options.scaling ** (2 * k) for k in range(steps)] + [options.epsilon]


def _step(exponent: Tensor, other: int, mass: Tensor, epsilon: float, rho: float) -> Tensor:
    """Return the potential of one side that is best for the other's, which is the dimension `other` of `exponent`."""
    largest = exponent.amax(other, keepdim=True)
    powers = torch.exp((exponent - largest).clamp(min=_SMALLEST_EXPONENT))
    soft = -epsilon * (powers.sum(other).log() + largest.squeeze(other))
    damped = soft if math.isinf(rho) else soft * (rho / (rho + epsilon))
    return torch.where((mass > 0) & torch.isfinite(damped), damped, 0.0)


def _shifted(f: Tensor, g: Tensor, a: Tensor, b: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Return (f + t, g − t) with the t that is best: it leaves f + g alone and settles the masses at once."""
    if math.isinf(rho):
        return f, g
    left = (a * torch.exp(-f / rho)).sum(0)
    right = (b * torch.exp(-g / rho)).sum(0)
    both = (left > 0) & (right > 0)
    shift = 0.5 * rho * torch.log(torch.where(both, left, 1.0) / torch.where(both, right, 1.0))
    return (f + shift) * (a > 0), (g - shift) * (b > 0)
