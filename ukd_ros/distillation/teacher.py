# SPDX-License-Identifier: Apache-2.0
"""The deep ensemble: what M independently seeded teachers say of each vote, and how far they agree.

Lakshminarayanan et al. (NeurIPS 2017): the members' mean is the prediction, the covariance between them is what
training left undecided (epistemic), and the mean of what each predicts itself is the noise it sees (aleatoric).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ukd_ros.distillation.checkpoint import load_checkpoint
from ukd_ros.distillation.teacher_store import SUFFIX, StoredTeacher, load_teacher
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.perception.network import KeypointNetwork, cell_features

SAME_POINT = 1e-6
"""Keypoints of teacher and student may differ by this much, m."""


class TeacherError(ValueError):
    """These teachers cannot teach that student; the message names the checkpoint and what differs."""


@dataclass(frozen=True)
class EnsembleVotes:
    """The ensemble's votes for a batch: `score` [B,N,C], `xy` [B,N,C,K,2] px, their means over the members; `spread`
    and `cov` [B,N,C,K,3] px², each (uu, uv, vv): the covariance between members, and the mean of their own.
    `features` [B,N,F]: the pyramid's cells of the first member (those of another seed are in another basis).
    `anchor` [N] px: the apparent size that each cell's level is made for.
    """

    score: Tensor
    xy: Tensor
    spread: Tensor
    cov: Tensor
    features: Tensor
    anchor: Tensor


class Ensemble:
    """M trained networks of one kind; `predict` asks all of them."""

    def __init__(
        self,
        networks: Sequence[KeypointNetwork],
        names: Sequence[str] = (),
        identity: str = "",
        *,
        single: bool = False,
    ) -> None:
        """`names` are for messages (one each); `identity` tells this ensemble from any other.

        TeacherError for less than two members (one cannot disagree with itself; `single` asks for exactly that: its
        spread is zero), or members of different kinds.
        """
        names = list(names) or [f"member {i}" for i in range(len(networks))]
        if len(networks) < (1 if single else 2):
            raise TeacherError(
                f"{', '.join(names) or 'no teacher'}: an ensemble needs two members or more, for one alone cannot say "
                "where it is unsure; train more seeds with ukd train --ensemble"
            )
        first = networks[0].config
        for name, network in zip(names[1:], networks[1:], strict=True):
            for key in ("classes", "keypoints"):
                one, other = getattr(first, key), getattr(network.config, key)
                if one != other:
                    raise TeacherError(f"{name}: has {key} {other}, but {names[0]} has {one}")
        self.networks = [network.eval().requires_grad_(False) for network in networks]
        self.names = tuple(names)
        self.identity = identity

    @classmethod
    def load(
        cls,
        checkpoints: Sequence[Path],
        models: Sequence[ObjectModel],
        window: int,
        device: torch.device,
        *,
        single: bool = False,
    ) -> Ensemble:
        """Read checkpoints (files or folders of runs) that must know the student's objects, keypoints and window side.

        A folder that `ukd train --ensemble` wrote stands for all its members. TeacherError names the file and what
        differs; CheckpointError for what cannot be read.
        """
        networks, names = [], []
        digest = hashlib.sha256()
        files = member_files(checkpoints)
        digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
        for number, path in enumerate(files):
            twin = next((p for p in files[:number] if path in digests and digests[p] == digests[path]), None)
            if twin is not None:
                raise TeacherError(f"{path}: is the same teacher as {twin}, and would count twice; name it once")
        for path in files:
            content = _read(path)
            _require_same(path, content.models, models)
            side = content.window or window
            if side != window:
                raise TeacherError(f"{path}: was trained on windows of {side} px, but the student's have {window} px")
            digest.update(bytes.fromhex(digests[path]))
            networks.append(content.network.to(device))
            names.append(str(path))
        return cls(networks, names, digest.hexdigest(), single=single)

    def __len__(self) -> int:
        """Return the number of members."""
        return len(self.networks)

    @torch.no_grad()
    def predict(self, images: Tensor) -> EnsembleVotes:
        """Return the votes for images [B,3,H,W] float32 RGB 0..255."""
        score: Tensor | None = None
        for count, network in enumerate(self.networks, start=1):
            network.fix_input(images.shape[3], images.shape[2])
            pyramid = network.pyramid(images)
            s, xy, scale = network.decode(network.raw_votes(pyramid))
            own = _covariance(scale)
            if score is None:
                score, mean, cov = s.clone(), xy.clone(), own
                scatter = torch.zeros_like(own)
                features = cell_features(pyramid)
                continue
            # Welford: one member in memory at a time, and no small difference of large squares
            delta = xy - mean
            mean = mean + delta / count
            rest = xy - mean
            scatter = scatter + torch.stack(
                (delta[..., 0] * rest[..., 0], delta[..., 0] * rest[..., 1], delta[..., 1] * rest[..., 1]), -1
            )
            score = score + (s - score) / count
            cov = cov + (own - cov) / count
        assert score is not None  # one member at least
        anchor = self.networks[0].anchor.flatten()
        return EnsembleVotes(score, mean, scatter / max(1, len(self.networks) - 1), cov, features, anchor)


def _read(path: Path) -> StoredTeacher:
    """Read a teacher from a stored file or a checkpoint."""
    if path.suffix == SUFFIX:
        return load_teacher(path)
    content = load_checkpoint(path)
    return StoredTeacher(content.network, content.models, int(content.config.get("window", {}).get("size", 0)))


def member_files(given: Sequence[Path]) -> list[Path]:
    """Return the files meant by files, folders of runs, and folders of ensembles or stored teachers (seed-0, …)."""
    found: list[Path] = []
    for path in given:
        runs, stored = sorted(path.glob("seed-*/checkpoint.pt")), sorted(path.glob(f"*{SUFFIX}"))
        if runs and stored:
            raise TeacherError(f"{path}: holds runs and stored teachers, perhaps the same ones; name the files")
        members = runs or stored
        own = path / "checkpoint.pt"
        found += members if members and not own.is_file() else [own if path.is_dir() else path]
    return found


def member_models(path: Path) -> tuple[ObjectModel, ...]:
    """Return the objects that a teacher's file knows (without meshes when it is a stored teacher)."""
    return tuple(_read(path).models)


def as_matrices(terms: Tensor) -> Tensor:
    """Return covariance terms [...,3] (uu, uv, vv) as matrices [...,2,2]."""
    uu, uv, vv = terms.unbind(-1)
    return torch.stack((torch.stack((uu, uv), -1), torch.stack((uv, vv), -1)), -2)


def _covariance(scale: Tensor) -> Tensor:
    """Return (uu, uv, vv) px² of a network's (σ_u, σ_v px, ρ) [...,3]."""
    u, v, rho = scale.unbind(-1)
    return torch.stack((u * u, rho * u * v, v * v), -1)


def _require_same(path: Path, taught: Sequence[ObjectModel], wanted: Sequence[ObjectModel]) -> None:
    """Refuse a teacher of other objects or keypoints."""
    names, needed = tuple(m.name for m in taught), tuple(m.name for m in wanted)
    if names != needed:
        raise TeacherError(
            f"{path}: knows the objects {', '.join(names)}, but the student learns {', '.join(needed)}; give it "
            "the teacher's objects, in its order, with --object"
        )
    for one, other in zip(taught, wanted, strict=True):
        if one.keypoints_3d.shape != other.keypoints_3d.shape:
            counts = len(one.keypoints_3d), len(other.keypoints_3d)
            raise TeacherError(f"{path}: has {counts[0]} keypoints on {one.name}, but the student has {counts[1]}")
        if one.symmetries.to_bop() != other.symmetries.to_bop():
            raise TeacherError(
                f"{path}: was trained with other symmetries of {one.name}, which name keypoints otherwise"
            )
        apart = float(abs(one.keypoints_3d - other.keypoints_3d).max())
        if apart > SAME_POINT:
            raise TeacherError(
                f"{path}: its keypoints on {one.name} lie up to {1e3 * apart:.3g} mm beside the student's; train both "
                "with the same keypoint_kind on the same mesh"
            )
