# SPDX-License-Identifier: Apache-2.0
"""Supervised training: one visible loop over windows of labelled views.

A step is a function of its number: sample indices, learning rate and micro-batches follow from it, so that an
interrupted run continues with the same numbers, and several processes (torchrun) take the same steps as one: they share
out the micro-batches, the loss is normalised by counts over the whole batch, and batch norm never looks beyond a
micro-batch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ukd_ros.data.dataset import WindowDataset, Windows
from ukd_ros.data.progress import Bar, Stopped, deferred_interrupt
from ukd_ros.distillation.assignment import Assignment, assign, object_rows
from ukd_ros.distillation.batches import Batches, BatchShape, MicroBatch
from ukd_ros.distillation.beginning import new_network, new_optimizer, restore, start_from
from ukd_ros.distillation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, writing_in
from ukd_ros.distillation.curves import add_metrics, draw_curves, trim_metrics
from ukd_ros.distillation.device import check_forks, half_precision, train_device
from ukd_ros.distillation.folders import open_folders
from ukd_ros.distillation.forked import together
from ukd_ros.distillation.guide import Guide
from ukd_ros.distillation.losses import focal_loss, gaussian_nll, pose_loss, ray_loss
from ukd_ros.distillation.norms import NormStatistics
from ukd_ros.distillation.parallel import Processes
from ukd_ros.distillation.train_config import TrainConfig, learning_rate
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.perception.network import (
    KeypointNetwork,
    RawOutput,
    cell_features,
    cell_geometry,
    decode_scale,
)

logger = logging.getLogger(__name__)

WRITTEN = "checkpoint.pt", "step-*.pt", "metrics.jsonl", "curves"
"""The names of the files of a run, as far as a killed writer's leavings begin with them."""


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a call of `train` did: the step it reached, whether that is the last one, and the newest checkpoint."""

    step: int
    finished: bool
    checkpoint: Path


class TrainingDiverged(RuntimeError):
    """A loss became NaN or infinite; the last good checkpoint is kept."""


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
        start_from(Path(config.initial), network)
    network = network.to(device).channels_last()
    learner = nn.ModuleList([network, *([guide.module.to(device)] if guide else [])])
    optimizer = new_optimizer(network, config, guide.module if guide else None)
    norms = NormStatistics(network)
    if path.exists() and not resume:
        raise FileExistsError(
            f"{path}: there is a training run already; continue it with --resume or choose another folder"
        )
    step = restore(path, network, optimizer, norms, config, guide) if path.exists() else 0
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
    held = ExitStack()
    interrupted = held.enter_context(deferred_interrupt())
    window = load_checkpoint(path).untold if step else []
    tick, tick_step = time.monotonic(), step
    network.train()
    try:
        if processes.rank == 0:
            held.enter_context(writing_in(out, WRITTEN))
            trim_metrics(out / "metrics.jsonl", step)
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
                    add_metrics(out / "metrics.jsonl", record)
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
                        network, optimizer.state_dict(), step, asdict(config), tuple(models), extra, taught, window
                    )
                    save_checkpoint(path, now)
                    if kept:
                        save_checkpoint(out / f"step-{step:06d}.pt", now)
                    draw_curves(out / "metrics.jsonl", out / "curves.png")
            if step == config.steps or over:
                break
    finally:
        held.close()
        batches.close()
        bar.close()
    if stopped and step < config.steps:
        raise Stopped(f"{path}: {stopped} at step {step} of {config.steps}, which is kept; go on with --resume")
    return TrainResult(step, step >= config.steps, path)


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


def _record(step: int, window: list[dict[str, float]], config: TrainConfig, steps_per_s: float) -> dict[str, float]:
    """Return one line of metrics: means since the last line."""
    record = {name: float(np.mean([terms[name] for terms in window])) for name in window[0]}
    record |= {"step": step, "samples": step * config.batch_size, "lr": learning_rate(step - 1, config)}
    return record | {"images_per_s": steps_per_s * config.batch_size}
