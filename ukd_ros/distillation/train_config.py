# SPDX-License-Identifier: Apache-2.0
"""What a training is asked for: the network, the schedule, the losses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ukd_ros.data.dataset import WindowConfig


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained.

    `architecture` and `width_factor` choose the network, `keypoints` and `keypoint_kind` (farthest or box) its points.
    `initial`: an earlier run, its checkpoint, a stored teacher, or a model (folder or name), whose weights the network
    starts from (empty: random ones). What depends on the objects (the last layers) is taken where they are the same,
    and begins anew where not: the student of another part is a head start.
    `steps` of `batch_size` windows each, taken in micro-batches of `micro_batch` (the unit of batch norm; the same for
    any number of processes). `optimizer`: muon (orthogonal steps for the hidden layers, AdamW for the rest) or adamw.
    `learning_rate` is the peak of AdamW's one-cycle schedule with `warmup` as the rising fraction and `hold` as the
    fraction that stays at the peak before it falls (with 1 it never falls), Muon's is ten times as large;
    `weight_decay` is decoupled; `clip_norm` bounds the gradient. `positives`: cells that vote for one object.
    `focal_weight`, `ray_weight`, `pose_weight`, `nll_weight`: the loss. `checkpoint_every`, `log_every`,
    `validate_every`: in steps (0 = never validate). `keep_every`: steps after which a copy `step-000500.pt` is kept
    besides the newest checkpoint, for a curve of accuracy against samples (0 = none). `device`: auto, cpu or cuda;
    `precision` of the convolutions: float32, bfloat16, or auto (bfloat16 on processors that have it); `threads`:
    torch's (0 = its own choice).
    """

    architecture: str = "lean"
    width_factor: float = 1.0
    keypoints: int = 12
    keypoint_kind: str = "farthest"
    initial: str = ""
    steps: int = 6000
    batch_size: int = 32
    micro_batch: int = 16
    optimizer: str = "muon"
    learning_rate: float = 2e-3
    warmup: float = 0.08
    hold: float = 0.0
    weight_decay: float = 0.02
    clip_norm: float = 5.0
    positives: int = 10
    focal_weight: float = 1.0
    ray_weight: float = 10.0
    pose_weight: float = 2.0
    nll_weight: float = 0.2
    seed: int = 0
    checkpoint_every: int = 250
    keep_every: int = 0
    log_every: int = 25
    validate_every: int = 500
    validate_windows: int = 512
    device: str = "auto"
    precision: str = "auto"
    threads: int = 0
    window: WindowConfig = field(default_factory=WindowConfig)

    def __post_init__(self) -> None:
        """Refuse schedules that cannot run."""
        for name in ("steps", "batch_size", "micro_batch", "positives", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}: must be at least 1, not {getattr(self, name)}")
        if self.batch_size % self.micro_batch:
            raise ValueError(f"train.batch_size: {self.batch_size} is no multiple of micro_batch {self.micro_batch}")
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"train.optimizer: {self.optimizer!r} is none of muon, adamw")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"train.device: {self.device!r} is none of auto, cpu, cuda")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"train.precision: {self.precision!r} is none of auto, float32, bfloat16")
        for name in ("focal_weight", "ray_weight", "pose_weight", "nll_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:  # what is minimised must be an error
                raise ValueError(f"train.{name}: must be a number of at least 0, not {getattr(self, name)}")
        if not 0.0 < self.warmup < 1.0:
            raise ValueError(f"train.warmup: must be inside 0..1, not {self.warmup}")
        if not 0.0 <= self.hold <= 1.0:
            raise ValueError(f"train.hold: must be from 0 to 1, not {self.hold}")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the one-cycle learning rate of a step: linear to the peak, which it holds, then half a cosine to a
    thousandth of it.
    """
    rising = max(1, round(config.warmup * config.steps))
    if step < rising:
        return config.learning_rate * (step + 1) / rising
    falling = rising + round(config.hold * config.steps)
    progress = max(0, step - falling) / max(1, config.steps - falling)
    return config.learning_rate * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * progress)))
