# SPDX-License-Identifier: Apache-2.0
"""Supervised training: one visible loop over windows of labelled views.

A step is a function of its number: sample indices, learning rate and micro-batches follow from it, so that an
interrupted run continues with the same numbers, and several processes (torchrun) take the same steps as one: they share
out the micro-batches, the loss is normalised by counts over the whole batch, and batch norm never looks beyond a
micro-batch.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ukd_ros.data.bop import BopDataset
from ukd_ros.data.bop_check import check_bop
from ukd_ros.data.dataset import WindowConfig, WindowDataset, Windows
from ukd_ros.data.progress import Bar, Stopped, deferred_interrupt
from ukd_ros.distillation.assignment import Assignment, assign, object_rows
from ukd_ros.distillation.batches import Batches, BatchShape, MicroBatch
from ukd_ros.distillation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ukd_ros.distillation.curves import draw_curves
from ukd_ros.distillation.device import check_forks, half_precision, train_device
from ukd_ros.distillation.forked import together
from ukd_ros.distillation.guide import Guide
from ukd_ros.distillation.losses import focal_loss, gaussian_nll, pose_loss, ray_loss
from ukd_ros.distillation.muon import Muon, Together
from ukd_ros.distillation.norms import NormStatistics
from ukd_ros.distillation.parallel import Processes
from ukd_ros.distillation.teacher_store import SUFFIX, load_teacher
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.view import LabelledView
from ukd_ros.perception.backends import torch_network
from ukd_ros.perception.bundle import find_model, load_bundle
from ukd_ros.perception.network import (
    KeypointNetwork,
    NetworkConfig,
    RawOutput,
    cell_features,
    cell_geometry,
    decode_scale,
)

logger = logging.getLogger(__name__)

OBJECT_LAYERS = ("head.score.", "head.offset.", "head.scale.")
"""Names of the weights whose shape and meaning depend on the objects."""


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained.

    `architecture` and `width_factor` choose the network, `keypoints` and `keypoint_kind` (farthest or box) its points.
    `initial`: an earlier run, its checkpoint, a stored teacher, or a model (folder or name), whose weights the network
    starts from (empty: random ones). What depends on the objects (the last layers) is taken where they are the same,
    and begins anew where not: the student of another part is a head start.
    `steps` of `batch_size` windows each, taken in micro-batches of `micro_batch` (the unit of batch norm; the same for
    any number of processes). `optimizer`: muon (orthogonal steps for the hidden layers, AdamW for the rest) or adamw.
    `learning_rate` is the peak of AdamW's one-cycle schedule with `warmup` as the rising fraction, Muon's is ten times
    as large; `weight_decay` is decoupled; `clip_norm` bounds the gradient. `positives`: cells that vote for one
    object. `focal_weight`, `ray_weight`, `pose_weight`, `nll_weight`: the loss. `checkpoint_every`, `log_every`,
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


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a call of `train` did: the step it reached, whether that is the last one, and the newest checkpoint."""

    step: int
    finished: bool
    checkpoint: Path


class TrainingDiverged(RuntimeError):
    """A loss became NaN or infinite; the last good checkpoint is kept."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the one-cycle learning rate of a step: linear to the peak, then half a cosine to a thousandth of it."""
    rising = max(1, round(config.warmup * config.steps))
    if step < rising:
        return config.learning_rate * (step + 1) / rising
    progress = (step - rising) / max(1, config.steps - rising)
    return config.learning_rate * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    config: TrainConfig,
    data: Windows,
    models: Sequence[ObjectModel],
    out: Path,
    *,
    guide: Guide | None = None,
    held_out: WindowDataset | None = None,
    resume: bool = False,
    time_budget_s: float | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train a network on `data`; checkpoints, metrics.jsonl and curves.png appear under `out`.

    `guide`: what teachers add to the loss (`distill`); windows without labels teach by it alone.
    `time_budget_s` stops and checkpoints when the time is up; the schedule does not change, `resume` goes on.
    FileExistsError when `out` holds a run and `resume` is False; ValueError when the run there had another
    configuration; TrainingDiverged when a loss is not finite; Stopped when it was asked to stop (Ctrl-C, or by who
    listens to its progress) before its end, after a checkpoint.
    """
    started = time.monotonic()
    processes = Processes.from_environment()
    device = train_device(config, processes)
    if config.threads:
        torch.set_num_threads(config.threads)
    cv2.setNumThreads(1)  # the batches are made in a thread of their own
    torch.manual_seed(config.seed)
    keypoints = models[0].keypoints_3d.shape[0]
    network = new_network(config, models)
    path = out / "checkpoint.pt"
    if config.initial and not path.exists():
        _start_from(Path(config.initial), network)
    network = network.to(device).channels_last()
    learner = nn.ModuleList([network, *([guide.module.to(device)] if guide else [])])
    optimizer = _optimizer(network, config, guide.module if guide else None)
    norms = NormStatistics(network)
    if path.exists() and not resume:
        raise FileExistsError(
            f"{path}: there is a training run already; continue it with --resume or choose another folder"
        )
    step = _restore(path, network, optimizer, norms, config, guide) if path.exists() else 0
    if step >= config.steps:
        logger.info("%s: all %d steps are done already", path, step)
        return TrainResult(step, True, path)
    out.mkdir(parents=True, exist_ok=True)
    shape = BatchShape(config.batch_size, config.micro_batch, config.positives)
    batches = Batches(data, shape, len(models), keypoints, step, processes)
    bar = Bar(
        total=config.steps, initial=step, desc="training", unit="step", disable=not progress or processes.rank > 0
    )
    stopped = ""
    interrupts = ExitStack()
    interrupted = interrupts.enter_context(deferred_interrupt())
    window: list[dict[str, float]] = []
    tick, tick_step = time.monotonic(), step
    network.train()
    try:
        for micro_batches in batches:
            # 1. gradients of this process's share, normalised by counts over the whole batch
            optimizer.zero_grad(set_to_none=True)
            terms = backward(network, norms, micro_batches, config, processes, device, guide)
            processes.sum_gradients(learner)
            if not math.isfinite(terms["loss"]):
                bad = [name for name, value in terms.items() if not math.isfinite(value)]
                raise TrainingDiverged(
                    f"step {step}: {', '.join(bad)} is not finite; the last good checkpoint is {path}"
                )
            # 2. the step
            nn.utils.clip_grad_norm_(learner.parameters(), config.clip_norm)
            optimizer.set_learning_rate(learning_rate(step, config))
            optimizer.step()
            norms.update(processes)
            step += 1
            window.append(terms)
            try:
                bar.update()
            except Stopped as stop:
                stopped = str(stop)
            stopped = stopped or ("interrupted" if interrupted() else "")
            # 3. what people and programs read
            if step % config.log_every == 0 or step == config.steps:
                record = _record(step, window, config, (step - tick_step) / (time.monotonic() - tick))
                if (
                    held_out is not None
                    and config.validate_every
                    and (step % config.validate_every == 0 or step == config.steps)
                ):
                    norms.store()
                    record |= validate(network, held_out, config)
                if processes.rank == 0:
                    _append(out / "metrics.jsonl", record)
                bar.set_postfix(loss=f"{record['loss']:.3f}", px=f"{record['error_px']:.2f}")
                window, tick, tick_step = [], time.monotonic(), step
            late = time_budget_s is not None and time.monotonic() - started > time_budget_s
            over = processes.any(late or bool(stopped))
            newest = step % config.checkpoint_every == 0 or step == config.steps or over
            kept = config.keep_every > 0 and step % config.keep_every == 0
            if newest or kept:
                norms.store()
                if processes.rank == 0:
                    extra = guide.module.state_dict() if guide else {}
                    taught = guide.identity if guide else ""
                    now = Checkpoint(
                        network, optimizer.state_dict(), step, asdict(config), tuple(models), extra, taught
                    )
                    save_checkpoint(path, now)
                    if kept:
                        save_checkpoint(out / f"step-{step:06d}.pt", now)
                    draw_curves(out / "metrics.jsonl", out / "curves.png")
            if step == config.steps or over:
                break
    finally:
        interrupts.close()
        batches.close()
        bar.close()
    if stopped and step < config.steps:
        raise Stopped(f"{path}: {stopped} at step {step} of {config.steps}, which is kept; go on with --resume")
    return TrainResult(step, step >= config.steps, path)


def new_network(config: TrainConfig, models: Sequence[ObjectModel]) -> KeypointNetwork:
    """Return the untrained network of a run."""
    names = tuple(m.name for m in models)
    keypoints = models[0].keypoints_3d.shape[0]
    return KeypointNetwork(NetworkConfig(config.architecture, names, keypoints, config.width_factor))


def train_on_folders(
    config: TrainConfig,
    datasets: Sequence[Path],
    out: Path,
    *,
    objects: Sequence[str] = (),
    held_out: Path | None = None,
    resume: bool = False,
    time_budget_s: float | None = None,
    processes: int = 1,
    progress: bool = True,
) -> TrainResult:
    """Train on BOP-format folders, such as `ukd render` writes them; see `train`.

    `objects`: names to learn (default: all models of the first folder). `held_out`: a folder for validation.
    `processes` share out every batch and one copy of the views, and take the steps of one (`forked`).
    BopError or ValueError as `open_folders`; ValueError or ForkError as `together`.
    """
    check_forks(config, processes)
    data, models, checked = open_folders(config, datasets, objects=objects, held_out=held_out, progress=progress)

    def work() -> TrainResult:
        return train(
            config, data, models, out, held_out=checked, resume=resume, time_budget_s=time_budget_s, progress=progress
        )

    return together(processes, work)


def open_folders(
    config: TrainConfig,
    datasets: Sequence[Path],
    *,
    objects: Sequence[str] = (),
    held_out: Path | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> tuple[WindowDataset, list[ObjectModel], WindowDataset | None]:
    """Check and decode BOP-format folders; return the windows, the objects' models and the windows to validate on.

    `seed` of the windows (default: the run's).
    BopError or ValueError when a folder, its masks or an object is missing or a folder is faulty.
    """
    Bar.monitor_interval = 0  # its thread would not survive the fork of an ensemble
    folders, models = object_models(config, datasets, objects)
    ids = [folders[0].object_id(model.name) for model in models]
    for folder in [*folders, *([BopDataset(held_out)] if held_out else [])]:
        check_bop(folder, objects=ids if folder is folders[0] else (), masks=True)
    seed = config.seed if seed is None else seed
    data = WindowDataset(_Joined(folders), models, config.window, seed, progress)
    checked = WindowDataset(BopDataset(held_out), models, config.window, seed + 1, progress) if held_out else None
    return data, models, checked


def object_models(
    config: TrainConfig, datasets: Sequence[Path], objects: Sequence[str]
) -> tuple[list[BopDataset], list[ObjectModel]]:
    """Open BOP-format folders; return them and the models of the objects (all of the first folder by default).

    BopError or ValueError when a folder or an object is missing.
    """
    folders = [BopDataset(path) for path in datasets]
    if not folders:
        raise ValueError("train: needs at least one BOP-format data set")
    first = folders[0]
    ids = [first.object_id(name) for name in objects] if objects else list(first.object_ids)
    return folders, [first.object_model(i, config.keypoints, config.keypoint_kind) for i in ids]


class _Joined:
    """Several data sets as one."""

    def __init__(self, parts: Sequence[BopDataset]) -> None:
        self._where = [(part, i) for part in parts for i in range(len(part))]

    def __len__(self) -> int:
        return len(self._where)

    def view(self, index: int) -> LabelledView:
        part, i = self._where[index]
        return part.view(i)


def backward(
    network: KeypointNetwork,
    norms: NormStatistics,
    micro_batches: list[MicroBatch],
    config: TrainConfig,
    processes: Processes,
    device: torch.device,
    guide: Guide | None = None,
) -> dict[str, float]:
    """Accumulate gradients over this process's micro-batches; return the loss terms of the whole batch."""
    guidance = [guide.guidance(m.numbers) if guide else None for m in micro_batches]
    counts = [sum(len(m.targets.batch) for m in micro_batches), sum(len(g) for g in guidance if g is not None)]
    votes, objects = processes.sum(torch.tensor(counts, dtype=torch.float64)).clamp(min=1.0).tolist()
    sums: dict[str, float] = {}
    for micro, guided in zip(micro_batches, guidance, strict=True):
        image = micro.image.to(device, torch.float32).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=half_precision(config.precision, device)):
            pyramid = network.pyramid(image)
            raw = network.raw_votes(pyramid)
        norms.collect()
        terms = _labelled_terms(raw, micro.targets, config, votes)
        loss = (
            config.focal_weight * terms["focal"]
            + config.ray_weight * terms["ray"]
            + config.pose_weight * terms["pose"]
            + config.nll_weight * terms["nll"]
        )
        if guide is not None and guided is not None:
            features = cell_features(pyramid) if guide.needs_features else None
            told = guide.terms(raw, features, micro.targets, guided, config.window.size)
            for name, weight in guide.weights.items():
                if weight > 0.0:
                    terms[name] = told[name] / objects
                    loss = loss + weight * terms[name]
        loss.backward()  # type: ignore[no-untyped-call]
        for name, value in [("loss", loss), *terms.items()]:
            sums[name] = sums.get(name, 0.0) + float(value.detach())
    totals = processes.sum(torch.tensor(list(sums.values()), dtype=torch.float64))
    return dict(zip(sums, totals.tolist(), strict=True))


def _labelled_terms(raw: RawOutput, targets: Assignment, config: TrainConfig, votes: float) -> dict[str, Tensor]:
    """Return the terms that labels give, for a batch of `votes` positive votes: focal, ray, nll and the error in px."""
    device = raw.logit.device
    size = config.window.size
    centres, anchors = (x.to(device) for x in cell_geometry(size, size))
    state = torch.from_numpy(targets.state).to(device)
    b, n, c = (torch.from_numpy(x).to(device) for x in (targets.batch, targets.cell, targets.class_index))
    keypoints = raw.offset.shape[3]
    anchor = anchors[n][:, None, None]
    xy = centres[n][:, None, :] + anchor * raw.offset[b, n, c].float()
    scale = decode_scale(raw.scale[b, n, c].float(), anchor)
    target = torch.from_numpy(targets.xy).to(device)
    error = target - xy
    parts = targets.points_camera, targets.ray_matrix, targets.diameter
    points, rays, diameter = (torch.from_numpy(part).to(device) for part in parts)
    # estimated labels do not say how far they are off: the scale learns from the truth (and from teachers) alone
    sure = torch.from_numpy(~targets.supposed).to(device)
    return {
        "focal": focal_loss(raw.logit.float(), state) / votes,
        "ray": ray_loss(xy, points, rays, diameter) / (votes * keypoints),
        "pose": pose_loss(xy, target, points, rays, diameter) / votes,
        "nll": gaussian_nll(error.detach()[sure], scale[sure]) / (votes * keypoints),
        "error_px": error.detach().norm(dim=-1).sum() / (votes * keypoints),
    }


@torch.no_grad()
def validate(network: KeypointNetwork, data: WindowDataset, config: TrainConfig, batch: int = 32) -> dict[str, float]:
    """Return the error of the best-scored vote of each learnable object in held-out windows.

    `val_px`: median error (px of the window), `val_found`: fraction of objects whose best cell scores above 0.3.
    """
    device = next(network.parameters()).device
    network.eval()
    errors: list[float] = []
    scores: list[float] = []
    for start in range(0, config.validate_windows, batch):
        samples = [data.sample(i) for i in range(start, min(start + batch, config.validate_windows))]
        image = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).to(device, torch.float32)
        score, xy, _ = network(image)
        targets = assign(samples, score.shape[2], xy.shape[3], config.positives)
        for first, last in object_rows(targets):
            b, c = targets.batch[first], targets.class_index[first]
            own = targets.cell[first:last]
            best = int(own[int(score[b, own, c].argmax())])
            scores.append(float(score[b, best, c]))
            errors.append(float(np.linalg.norm(xy[b, best, c].cpu().numpy() - targets.xy[first], axis=1).mean()))
    network.train()
    if not errors:
        return {"val_px": float("nan"), "val_found": float("nan")}
    return {"val_px": float(np.median(errors)), "val_found": float(np.mean(np.array(scores) > 0.3))}


def _optimizer(network: KeypointNetwork, config: TrainConfig, extra: nn.Module | None = None) -> Together:
    """AdamW, or Muon for the hidden convolutions and AdamW for all else; biases and norms are not decayed.

    What `extra` learns is AdamW's.
    """
    parameters = list(network.parameters())
    ends = [network.head.score, network.head.offset, network.head.scale]
    outer = {id(p) for layer in ends for p in layer.parameters()} | {id(next(network.backbone.parameters()))}
    hidden = [p for p in parameters if p.dim() > 1 and config.optimizer == "muon" and id(p) not in outer]
    taken = {id(p) for p in hidden}
    parameters += [] if extra is None else list(extra.parameters())
    decay = [p for p in parameters if p.dim() > 1 and id(p) not in taken]
    rest = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99))]
    if hidden:
        parts.append(Muon(hidden, weight_decay=config.weight_decay))
    return Together(parts)


def _start_from(path: Path, network: KeypointNetwork) -> None:
    """Copy the weights of an earlier run or a model folder, all that fit; ValueError when the layers differ."""
    # a training run is a folder with a checkpoint in it; a model is another kind of folder, or the name of one
    path = path / "checkpoint.pt" if (path / "checkpoint.pt").is_file() else path
    if path.suffix == SUFFIX:
        earlier = load_teacher(path).network
    else:
        earlier = load_checkpoint(path).network if path.is_file() else torch_network(load_bundle(find_model(path)))
    weights, config, mine = earlier.state_dict(), earlier.config, network.config
    same = replace(config, classes=mine.classes, keypoints=mine.keypoints)
    if same != mine:
        raise ValueError(f"train.initial: {path} holds {config}, but this run trains {mine}: the layers differ")
    if config == mine:
        network.load_state_dict(weights)
        return
    kept = {name: value for name, value in weights.items() if not name.startswith(OBJECT_LAYERS)}
    missing, unknown = network.load_state_dict(kept, strict=False)
    if unknown or any(not name.startswith(OBJECT_LAYERS) for name in missing):
        raise ValueError(f"train.initial: {path} lacks {', '.join(missing)} or has unknown {', '.join(unknown)}")
    logger.info("%s knows %s: its last layers begin anew for %s", path, config.classes, mine.classes)


def _restore(
    path: Path,
    network: KeypointNetwork,
    optimizer: Together,
    norms: NormStatistics,
    config: TrainConfig,
    guide: Guide | None = None,
) -> int:
    """Load a checkpoint into the parts; ValueError naming the first setting that differs."""
    content = load_checkpoint(path)
    mine, theirs = _plain(asdict(config)), dict(_plain(content.config))
    for key, before_it in {"optimizer": "adamw", "pose_weight": 0.0, "precision": "auto"}.items():
        theirs.setdefault(key, before_it)
    theirs.get("guide", {}).get("align", {}).setdefault("covariance", "entropy")
    free = {"device", "threads", "checkpoint_every", "keep_every", "log_every", "validate_every", "validate_windows"}
    for key in sorted(set(mine) | set(theirs)):
        if key not in free and mine.get(key) != theirs.get(key):
            raise ValueError(
                f"{path}: was trained with {key} = {theirs.get(key)}, not {mine.get(key)}; --resume needs the same"
                + (f" (--set {key}={theirs[key]})" if isinstance(theirs.get(key), bool | int | float | str) else "")
            )
    if guide is not None and content.taught != guide.identity:
        raise ValueError(f"{path}: was taught by other teachers or on other windows; --resume needs the same")
    network.load_state_dict(content.network.state_dict())
    if guide is not None:
        guide.module.load_state_dict(content.extra)
    # before there was Muon, a checkpoint held the state of AdamW alone
    optimizer.load_state_dict(content.optimizer if "parts" in content.optimizer else {"parts": [content.optimizer]})
    norms.load()
    return content.step


def _plain(value: Any) -> Any:
    """Return settings as JSON would give them back, for comparison."""
    return json.loads(json.dumps(value))


def _record(step: int, window: list[dict[str, float]], config: TrainConfig, steps_per_s: float) -> dict[str, float]:
    """Return one line of metrics: means since the last line."""
    record = {name: float(np.mean([terms[name] for terms in window])) for name in window[0]}
    record |= {"step": step, "samples": step * config.batch_size, "lr": learning_rate(step - 1, config)}
    return record | {"images_per_s": steps_per_s * config.batch_size}


def _append(path: Path, record: dict[str, float]) -> None:
    """Add one JSON line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
