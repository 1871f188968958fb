# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a training: chosen by the processor, and never that of votes, losses or weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cubes import CUBE, CubeViews

from ukd_ros.data.dataset import WindowConfig, WindowDataset
from ukd_ros.distillation.checkpoint import load_checkpoint
from ukd_ros.distillation.device import half_precision
from ukd_ros.distillation.train import train
from ukd_ros.distillation.train_config import TrainConfig
from ukd_ros.perception.network import KeypointNetwork, NetworkConfig

SHORT = TrainConfig(
    steps=12,
    batch_size=8,
    micro_batch=8,
    log_every=12,
    validate_every=0,
    width_factor=0.5,
    threads=1,
    device="cpu",
    window=WindowConfig(size=64, zoom_fill_spread=1.1),
)


@pytest.mark.parametrize("built_for_it", ["avx512_bf16", "amx_bf16", ""])
def test_auto_asks_the_processor(monkeypatch: pytest.MonkeyPatch, built_for_it: str) -> None:
    names = ("avx512_f", "avx512_bf16", "amx_bf16")
    capable = {name: name in ("avx512_f", built_for_it) for name in names}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable, raising=False)
    cpu = torch.device("cpu")
    assert half_precision("auto", cpu) == bool(built_for_it)
    assert half_precision("bfloat16", cpu) and not half_precision("float32", cpu)
    assert half_precision("auto", torch.device("cuda")) and not half_precision("float32", torch.device("cuda"))


def test_votes_are_not_rounded_to_eight_bits() -> None:
    torch.manual_seed(0)
    network = KeypointNetwork(NetworkConfig("lean", ("part",), 8, 0.5)).train()
    image = 255.0 * torch.rand(4, 3, 64, 64)
    exact = network.raw(image)
    with torch.autocast("cpu", torch.bfloat16):
        pyramid = network.pyramid(image)
        raw = network.raw_votes(pyramid)
    assert pyramid[0].dtype == torch.bfloat16  # the convolutions were
    for name in ("logit", "offset", "scale"):
        votes = getattr(raw, name)
        assert votes.dtype == torch.float32, name
        rounded = votes.to(torch.bfloat16).float()
        assert float((votes != rounded).float().mean()) > 0.9, name
        assert float((votes - getattr(exact, name)).detach().abs().max()) < 0.02, name


def test_both_arithmetics_take_nearly_the_same_steps(tmp_path: Path) -> None:
    data = WindowDataset(CubeViews(6), [CUBE], SHORT.window, seed=0)
    losses = {}
    for precision in ("float32", "bfloat16"):
        run = train(replace(SHORT, precision=precision), data, [CUBE], tmp_path / precision, progress=False)
        network = load_checkpoint(run.checkpoint).network
        assert all(p.dtype == torch.float32 for p in network.parameters())
        losses[precision] = float(
            (tmp_path / precision / "metrics.jsonl").read_text().split('"loss": ')[1].split(",")[0]
        )
    assert np.isfinite(losses["float32"])
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]  # or the setting reached nothing
    with pytest.raises(ValueError, match="precision = bfloat16, not float32"):
        train(replace(SHORT, precision="float32"), data, [CUBE], tmp_path / "bfloat16", progress=False, resume=True)
