# SPDX-License-Identifier: Apache-2.0
"""An ensemble's members are the runs of their seeds, and one that fails is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cubes import CUBE, CubeViews

from ukd_ros.data.dataset import WindowConfig, WindowDataset
from ukd_ros.distillation import ensemble as ensemble_module
from ukd_ros.distillation.checkpoint import load_checkpoint
from ukd_ros.distillation.ensemble import train_ensemble
from ukd_ros.distillation.train import train
from ukd_ros.distillation.train_config import TrainConfig

TINY = TrainConfig(steps=3, batch_size=4, micro_batch=4, log_every=1, validate_every=0, width_factor=0.25, threads=1,
                   device="cpu", seed=4, window=WindowConfig(size=64))  # fmt: skip
LONG = replace(TINY, steps=100_000, checkpoint_every=1)
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_ensemble import *
import cv2, numpy as np
from ukd_ros.distillation.ensemble import EnsembleError, train_ensemble
cv2.setNumThreads(2)
cv2.GaussianBlur(np.zeros((1500, 1500), np.float32), (31, 31), 0)  # OpenCV's threads run before the fork
data = WindowDataset(CubeViews(4), [CUBE], TINY.window, seed=TINY.seed)
try:
    waited = []
    results = train_ensemble(
        TINY, 2, data, [CUBE], Path(sys.argv[2]), resume="resume" in sys.argv, waiting=lambda: waited.append(1),
        progress=False,
    )
    assert waited
    print([(r.step, r.finished, r.checkpoint.parent.name) for r in results])
except EnsembleError as error:
    print(error)
"""


def ensemble(out: Path, *words: str) -> str:
    """Train in a process of its own: pytest's has threads, which no fork survives."""
    call = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(out), *words]
    run = subprocess.run(call, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_members_are_the_runs_of_their_seeds(tmp_path: Path) -> None:
    assert ensemble(tmp_path / "both").strip() == "[(3, True, 'seed-4'), (3, True, 'seed-5')]"
    weights = []
    for seed in (4, 5):
        data = WindowDataset(CubeViews(4), [CUBE], TINY.window, seed=seed)
        train(replace(TINY, seed=seed), data, [CUBE], tmp_path / str(seed), progress=False)
        alone = load_checkpoint(tmp_path / str(seed) / "checkpoint.pt").network.state_dict()
        member = load_checkpoint(tmp_path / "both" / f"seed-{seed}" / "checkpoint.pt").network.state_dict()
        for name, value in alone.items():
            torch.testing.assert_close(member[name], value, rtol=0, atol=1e-6, msg=name)
        weights.append(alone["head.offset.weight"])
    assert not torch.allclose(weights[0], weights[1])


def test_a_member_that_fails_is_named_and_the_other_goes_on(tmp_path: Path) -> None:
    train(replace(TINY, seed=5), WindowDataset(CubeViews(4), [CUBE], TINY.window, 5), [CUBE], tmp_path / "seed-5",
          progress=False)  # fmt: skip
    assert "seed-5: FileExistsError: " in ensemble(tmp_path)
    assert load_checkpoint(tmp_path / "seed-4" / "checkpoint.pt").step == 3
    assert "(3, True, 'seed-5')" in ensemble(tmp_path, "resume")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_parent_leaves_no_orphans_and_checkpoints(stop: signal.Signals, tmp_path: Path) -> None:
    # a background job of a shell ignores SIGINT, and its children with it
    awake = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script = awake + SCRIPT.replace("TINY, 2,", "LONG, 2,")
    call = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    parent = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    files = [tmp_path / f"seed-{seed}" / "checkpoint.pt" for seed in (4, 5)]
    deadline = time.monotonic() + 120
    while not all(file.is_file() for file in files):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    parent.send_signal(stop)
    assert parent.wait(30) != 0
    deadline = time.monotonic() + 20
    while True:  # nobody of the session is left
        try:
            os.killpg(parent.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert all(load_checkpoint(file).step >= 1 for file in files)


def test_where_forks_cannot_have_the_gpu_members_come_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ensemble_module.side_by_side()
    monkeypatch.setattr(ensemble_module, "side_by_side", lambda: False)
    monkeypatch.setattr(ensemble_module, "Forked", lambda: pytest.fail("it forks"))
    data = WindowDataset(CubeViews(4), [CUBE], TINY.window, seed=0)
    results = train_ensemble(TINY, 2, data, [CUBE], tmp_path, progress=False)
    assert [(r.step, r.finished, r.checkpoint.parent.name) for r in results] == [
        (3, True, "seed-4"),
        (3, True, "seed-5"),
    ]
    weights = [load_checkpoint(r.checkpoint).network.state_dict()["head.offset.weight"] for r in results]
    assert not torch.allclose(*weights)
    late = train_ensemble(LONG, 2, data, [CUBE], tmp_path / "late", time_budget_s=0.2, progress=False)
    assert all(not r.finished and r.step >= 1 for r in late)


@pytest.mark.parametrize("members", [0, -1])
def test_an_ensemble_of_none_is_refused(members: int, tmp_path: Path) -> None:
    from ukd_ros.distillation.ensemble import train_ensemble

    data = WindowDataset(CubeViews(2), [CUBE], TINY.window, seed=0)
    with pytest.raises(ValueError, match="at least one member"):
        train_ensemble(TINY, members, data, [CUBE], tmp_path)


def test_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ukd_ros.distillation.ensemble import train_ensemble

    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="torchrun"):
        train_ensemble(TINY, 2, WindowDataset(CubeViews(2), [CUBE], TINY.window, 0), [CUBE], tmp_path)
