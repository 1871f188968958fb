# SPDX-License-Identifier: Apache-2.0
"""What the teachers say of windows: for every object its best votes, how sure they are, and their features.

Where a window is labelled, the label says which cells are whose; elsewhere the teachers' own agreement does, as on the
robot (`perception.votes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ukd_ros.data.dataset import TrainingSample
from ukd_ros.distillation.assignment import Assignment, assign, object_rows
from ukd_ros.distillation.teacher import Ensemble, EnsembleVotes, TeacherError
from ukd_ros.perception.backends import RawVotes
from ukd_ros.perception.votes import Calibration, VoteInstance, VoteOptions, collect_instances

PADDING = -1
"""Cell of a vote that is none."""


@dataclass(frozen=True, eq=False)
class Guidance:
    """The teachers' votes for P objects in a batch of windows, at most m each.

    `window` [P] number of the window in the batch, `class_index` [P]; `cell` [P,m] (PADDING where there is no vote),
    `score` [P,m] (0 there), `xy` [P,m,K,2] px of the window, `spread` and `cov` [P,m,K,3] px² (uu, uv, vv; between the
    members, and the mean of what they predict), `features` [P,m,F]. The objects of a labelled window stand in the order
    of its assignment.
    """

    window: npt.NDArray[np.int64]
    class_index: npt.NDArray[np.int64]
    cell: npt.NDArray[np.int64]
    score: npt.NDArray[np.float32]
    xy: npt.NDArray[np.float32]
    spread: npt.NDArray[np.float32]
    cov: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.window)

    def of_windows(self, first: int, last: int) -> Guidance:
        """Return the part of the windows first..last, which are counted from 0 anew."""
        chosen = (self.window >= first) & (self.window < last)
        parts = {f.name: getattr(self, f.name)[chosen] for f in fields(self)}
        return Guidance(**{**parts, "window": parts["window"] - first})

    @staticmethod
    def joined(parts: Sequence[Guidance], windows: Sequence[int]) -> Guidance:
        """Return the guidance of several batches as that of one; `windows` says how many each has."""
        starts = np.cumsum([0, *windows[:-1]])
        whole = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Guidance)}
        moved = [part.window + start for part, start in zip(parts, starts, strict=True)]
        return Guidance(**{**whole, "window": np.concatenate(moved)})


def teach(ensemble: Ensemble, samples: Sequence[TrainingSample], positives: int, votes: int) -> Guidance:
    """Ask the ensemble about a batch of windows: of each object its `votes` best votes.

    `positives`: cells an object has in a labelled window, as in training.
    """
    config = ensemble.networks[0].config
    device = next(ensemble.networks[0].parameters()).device
    image = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2)
    found = ensemble.predict(image.to(device, torch.float32))
    if not all(bool(torch.isfinite(x).all()) for x in (found.score, found.xy, found.spread, found.cov, found.features)):
        raise TeacherError(f"{', '.join(ensemble.names)}: one of them gives votes that are not finite; train it again")
    targets = assign(samples, len(config.classes), config.keypoints, positives)
    rows: list[tuple[int, int, npt.NDArray[np.int64]]] = []
    labelled = object_rows(targets)
    for b, sample in enumerate(samples):
        if sample.labelled:
            rows += _labelled(labelled, targets, b)
        else:
            rows += [(b, instance.class_index, instance.cells) for instance in seen(found, b)]
    return _best(found, rows, votes, config.keypoints)


def _labelled(
    ranges: list[tuple[int, int]], targets: Assignment, window: int
) -> list[tuple[int, int, npt.NDArray[np.int64]]]:
    """Return window, class and cells of each labelled object of one window."""
    return [
        (window, int(targets.class_index[first]), targets.cell[first:last])
        for first, last in ranges
        if targets.batch[first] == window
    ]


def raw_votes(found: EnsembleVotes, window: int) -> RawVotes:
    """Return the ensemble's mean votes for one window as a network's own; their variance is the members' mean and what
    is between them.
    """
    terms = found.cov[window] + found.spread[window]
    sigma = terms[..., [0, 2]].clamp(min=1e-6).sqrt()
    rho = (terms[..., 1:2] / sigma.prod(-1, keepdim=True)).clamp(-0.95, 0.95)
    parts = (found.score[window], found.xy[window], torch.cat((sigma, rho), -1), found.anchor)
    return RawVotes(*(part.cpu().numpy() for part in parts))


def seen(found: EnsembleVotes, window: int) -> list[VoteInstance]:
    """Return the objects that the ensemble itself sees in a window, gathered from its mean votes as on the robot."""
    return collect_instances(raw_votes(found, window), VoteOptions(), Calibration())


def _best(
    found: EnsembleVotes, rows: list[tuple[int, int, npt.NDArray[np.int64]]], votes: int, keypoints: int
) -> Guidance:
    """Gather the best votes of every object."""
    count, width = len(rows), found.features.shape[-1]
    window = np.array([r[0] for r in rows], np.int64)
    kind = np.array([r[1] for r in rows], np.int64)
    cell = np.full((count, votes), PADDING, np.int64)
    score = found.score.cpu().numpy()
    for i, (b, c, cells) in enumerate(rows):
        best = cells[np.argsort(-score[b, cells, c], kind="stable")[:votes]]
        cell[i, : len(best)] = best
    taken = torch.from_numpy(np.maximum(cell, 0)).to(found.score.device)
    at, of = (torch.from_numpy(x).to(taken.device)[:, None] for x in (window, kind))
    there = (cell != PADDING).astype(np.float32)

    def gathered(values: Tensor, *shape: int) -> npt.NDArray[np.float32]:
        array = values.float().cpu().numpy().reshape(count, votes, *shape)
        return np.asarray(array * there.reshape(count, votes, *(1 for _ in shape)), np.float32)

    return Guidance(
        window,
        kind,
        cell,
        gathered(found.score[at, taken, of]),
        gathered(found.xy[at, taken, of], keypoints, 2),
        gathered(found.spread[at, taken, of], keypoints, 3),
        gathered(found.cov[at, taken, of], keypoints, 3),
        gathered(found.features[at, taken], width),
    )
