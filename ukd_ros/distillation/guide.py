# SPDX-License-Identifier: Apache-2.0
"""The teachers' part of a training step: their guidance beside the student's votes, and what it costs to differ.

The training loop knows no teacher; it hands every micro-batch to a guide and adds what comes back (`train.train`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ukd_ros.distillation.assignment import Assignment, object_rows
from ukd_ros.distillation.guidance import PADDING, Guidance
from ukd_ros.distillation.teacher import as_matrices
from ukd_ros.distillation.transport import TransportOptions
from ukd_ros.distillation.vote_losses import (
    AlignOptions,
    Votes,
    align,
    feature_loss,
    gaussian_align,
    keypoint_weights,
    naive_loss,
    planned_feature_loss,
)
from ukd_ros.perception.network import RawOutput, cell_geometry, decode_scale

TERMS = ("kd_naive", "kd_features", "kd_transport", "kd_scale", "kd_planned")


@dataclass(frozen=True)
class GuideOptions:
    """What the student is told, each with its weight (0: not said). Coordinates are fractions of the window's side.

    `votes`: best votes of either side that take part. `naive`: |difference| of the votes of the same cells, mean over
    keypoints. `features` (FKD): features of the same cells. `transport`: optimal transport between the votes of each
    keypoint, by `align`; with `gaussian` its plan is that between Gaussians and `scale` weighs the cross-entropy from
    which the student's covariance learns. `planned_features` (PFKD): features over the transport's plan. `project`: the
    student's features pass a learned 1x1 projection before they are compared; always where widths differ, else where
    asked for.
    """

    votes: int = 10
    naive: float = 0.0
    features: float = 0.0
    transport: float = 50.0
    gaussian: bool = True
    scale: float = 0.2
    planned_features: float = 2.0
    project: bool = True
    align: AlignOptions = field(
        default_factory=lambda: AlignOptions(
            TransportOptions(blur=2e-2, reach=0.5, scaling=0.25, iterations=20), weighting=("cost",)
        )
    )

    def __post_init__(self) -> None:
        """Refuse what says nothing; ValueError names the field."""
        if self.votes < 1:
            raise ValueError(f"guide.votes: must be at least 1, not {self.votes}")
        for name in ("naive", "features", "transport", "scale", "planned_features"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"guide.{name}: must not be negative, not {getattr(self, name)}")
        if self.planned_features > 0.0 and not self.transport > 0.0:
            raise ValueError("guide.planned_features: needs the plan of a transport; give guide.transport a weight")
        if not any((self.naive, self.features, self.transport)):
            raise ValueError("guide: nothing is said: give naive, features or transport a weight, or use ukd train")


class Guide:
    """Turns guidance into loss terms; `module` holds what it learns itself (the projection)."""

    def __init__(
        self,
        options: GuideOptions,
        guidance: Callable[[Sequence[int]], Guidance],
        student_width: int,
        teacher_width: int,
        identity: str = "",
    ) -> None:
        """`guidance` returns the teachers' votes for windows by number; the widths are channels of the pyramids.

        `identity` tells these teachers and windows from any others: a run is not resumed with another.
        """
        self.identity = identity
        self.options = options
        self.guidance = guidance
        self.needs_features = options.features > 0.0 or options.planned_features > 0.0
        self.module = nn.ModuleDict()
        if self.needs_features and (options.project or student_width != teacher_width):
            projection = nn.Linear(student_width, teacher_width)
            if student_width == teacher_width:
                nn.init.eye_(projection.weight)
                nn.init.zeros_(projection.bias)
            self.module["projection"] = projection

    @property
    def weights(self) -> dict[str, float]:
        """Return the weight of every term."""
        o = self.options
        scale = o.scale if o.gaussian and o.transport else 0.0
        return dict(zip(TERMS, (o.naive, o.features, o.transport, scale, o.planned_features), strict=True))

    def terms(
        self, raw: RawOutput, features: Tensor | None, targets: Assignment, guidance: Guidance, side: int
    ) -> dict[str, Tensor]:
        """Return the terms of a micro-batch by name, unweighted, each a sum over its objects (mean over keypoints).

        `raw` and `features` [B,N,F] are the student's, `side` the window's. ValueError when the guidance does not fit
        the assignment (it was made for other windows).
        """
        o = self.options
        # what the guide learns always has a gradient, also in a process whose windows show nothing
        zero = 0.0 * torch.stack([raw.logit.sum(), *(p.sum() for p in self.module.parameters())]).sum()
        terms = dict.fromkeys(TERMS, zero)
        if len(guidance) == 0:
            return terms
        if int(guidance.cell.max()) >= raw.logit.shape[1] or int(guidance.class_index.max()) >= raw.logit.shape[2]:
            raise ValueError("the teachers speak of cells or objects that the student does not have")
        teacher = _teacher_votes(guidance, side, raw.logit.device)
        own = _student_cells(raw, targets, guidance, o.votes)
        student = self._student(raw, features, guidance, own, side)
        if o.naive or o.features:
            same = self._student(raw, features, guidance, guidance.cell, side)
            if o.naive:
                terms["kd_naive"] = naive_loss(same, teacher).mean(-1).sum()
            if o.features:
                terms["kd_features"] = feature_loss(same, teacher).sum()
        if o.transport:
            if o.gaussian:
                moved, scale, plan = gaussian_align(student, teacher, o.align)
                terms["kd_scale"] = scale.mean(-1).sum()
            else:
                moved, plan = align(student, teacher, o.align)
            terms["kd_transport"] = moved.mean(-1).sum()
            if o.planned_features:
                sure = keypoint_weights(teacher, o.align) if "keypoint" in o.align.weighting else None
                terms["kd_planned"] = planned_feature_loss(student, teacher, plan, sure).sum()
        return terms

    def _student(
        self, raw: RawOutput, features: Tensor | None, guidance: Guidance, cells: npt.NDArray[np.int64], side: int
    ) -> Votes:
        """Return the student's votes at `cells` [P,n] of every guided object."""
        device = raw.logit.device
        centres, anchors = (x.to(device) for x in cell_geometry(side, side))
        taken = torch.from_numpy(np.maximum(cells, 0)).to(device)
        there = torch.from_numpy(cells != PADDING).to(device)
        b, c = (torch.from_numpy(x).to(device)[:, None] for x in (guidance.window, guidance.class_index))
        anchor = anchors[taken][..., None, None]
        xy = (centres[taken][..., None, :] + anchor * raw.offset[b, taken, c].float()) / side
        scale = decode_scale(raw.scale[b, taken, c].float(), anchor)
        u, v, rho = scale[..., 0] / side, scale[..., 1] / side, scale[..., 2]
        cov = as_matrices(torch.stack((u * u, rho * u * v, v * v), -1))
        mass = torch.sigmoid(raw.logit[b, taken, c].float()) * there
        own = None
        if self.needs_features and features is not None:
            own = features[b, taken].float()
            if "projection" in self.module:
                own = self.module["projection"](own)
        return Votes(xy, cov, mass, features=own)


def _teacher_votes(guidance: Guidance, side: int, device: torch.device) -> Votes:
    """Return the guidance as votes in fractions of the window's side."""
    score, xy, spread, cov, features = (
        torch.from_numpy(x).to(device)
        for x in (guidance.score, guidance.xy, guidance.spread, guidance.cov, guidance.features)
    )
    area = float(side) ** 2
    return Votes(xy / side, as_matrices(cov / area), score, as_matrices(spread / area), features)


def _student_cells(raw: RawOutput, targets: Assignment, guidance: Guidance, votes: int) -> npt.NDArray[np.int64]:
    """Return the student's best `votes` cells [P,votes] of every guided object.

    Of a labelled object these are among the cells that the label assigned, of any other the teachers' own.
    """
    ranges = object_rows(targets)
    assigned: dict[tuple[int, int], list[npt.NDArray[np.int64]]] = {}
    for first, last in ranges:
        where = int(targets.batch[first]), int(targets.class_index[first])
        assigned.setdefault(where, []).append(targets.cell[first:last])
    labelled = set(targets.batch.tolist())
    score = raw.logit.detach().float().cpu().numpy()
    chosen = np.full((len(guidance), votes), PADDING, np.int64)
    for i, (b, c) in enumerate(zip(guidance.window.tolist(), guidance.class_index.tolist(), strict=True)):
        if b in labelled:
            if not assigned.get((b, c)):
                raise ValueError(f"window {b}: the teachers speak of an object that its labels do not have")
            cells = assigned[b, c].pop(0)
        else:
            cells = guidance.cell[i][guidance.cell[i] != PADDING]
        best = cells[np.argsort(-score[b, cells, c], kind="stable")[:votes]]
        chosen[i, : len(best)] = best
    return chosen
