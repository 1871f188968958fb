# SPDX-License-Identifier: Apache-2.0
"""Forks of one process take the steps of one, hear when it stops, and say why they fail."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cubes import CUBE, CubeViews

from ukd_ros.cli import main
from ukd_ros.data.dataset import WindowConfig, WindowDataset
from ukd_ros.distillation.checkpoint import load_checkpoint
from ukd_ros.distillation.device import check_forks
from ukd_ros.distillation.forked import together
from ukd_ros.distillation.train import train
from ukd_ros.distillation.train_config import TrainConfig

TINY = TrainConfig(steps=4, batch_size=8, micro_batch=4, log_every=1, validate_every=0, width_factor=0.25, threads=1,
                   device="cpu", seed=4, window=WindowConfig(size=64))  # fmt: skip
START = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_forked import *
from ukd_ros.data.progress import Stopped, listening
from ukd_ros.distillation.forked import ForkError, together
from ukd_ros.distillation.parallel import Processes
parent, out = os.getpid(), Path(sys.argv[2])
data = WindowDataset(CubeViews(4), [CUBE], TINY.window, seed=TINY.seed)
def work():
    if "before" in globals():
        before(os.getpid() == parent)
    return train(TINY, data, [CUBE], out, resume=True, progress=False)
"""


def run(out: Path, script: str) -> str:
    """Run in a process of its own: pytest's has threads, which no fork survives."""
    call = [sys.executable, "-c", START + script, str(Path(__file__).parent), str(out)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_two_forks_take_the_steps_of_one_process(tmp_path: Path) -> None:
    said = run(tmp_path / "two", "print(together(2, work).finished, together(2, lambda: Processes.from_environment()))")
    assert said == "True Processes(rank=0, count=2)"
    data = WindowDataset(CubeViews(4), [CUBE], TINY.window, seed=4)
    train(TINY, data, [CUBE], tmp_path / "one", progress=False)
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pt").network.state_dict() for name in ("one", "two"))
    for name, value in one.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_who_listens_hears_each_step_once_and_stops_all(tmp_path: Path) -> None:
    script = """
heard = []
def listen(progress):
    heard.append(progress.done)
    if os.getpid() != parent:
        print("a fork speaks")
    if progress.done == 2:
        raise Stopped("enough")
try:
    with listening(listen):
        together(2, work)
except Stopped as stop:
    print("stopped:", stop)
print(heard)
print(together(2, work).step)
"""
    stopped, heard, step = run(tmp_path, script).splitlines()
    assert stopped.startswith("stopped: ") and "step 2 of 4" in stopped
    assert heard == "[0, 1, 2]"
    assert step == "4"  # and the same call goes on


@pytest.mark.parametrize(
    ("fate", "reason"),
    [
        ("raise OSError('no room left')", "process 2 of 2: OSError: no room left"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "process 2 of 2: its process was killed"),
    ],
)
def test_a_fork_that_fails_ends_all_and_says_why(fate: str, reason: str, tmp_path: Path) -> None:
    script = f"""
def before(first):
    if not first:
        {fate}
try:
    together(2, work)
except ForkError as error:
    print(error)
"""
    assert run(tmp_path, script).startswith(reason)


def test_two_forks_distil_as_one_process_does(tmp_path: Path) -> None:
    """The teachers were used by this process, on several threads, before the fork."""
    script = """
from test_distill import DistillConfig, Ensemble, TINY as KD, WINDOW, distill, member, losses
import torch
torch.set_num_threads(4)
ensemble = Ensemble([member(seed) for seed in range(3)], identity="three")
for network in ensemble.networks:
    network(torch.zeros(4, 3, 64, 64))  # OpenMP's threads of this process run
windows = WindowDataset(CubeViews(6), [CUBE], WINDOW, seed=0)
config = replace(KD, steps=3)
for name, count in (("two", 2), ("one", 1)):
    together(count, lambda: distill(config, ensemble, windows, [CUBE], out / name, progress=False))
print(max(abs(a - b) / abs(b) for a, b in zip(losses(out / "two"), losses(out / "one"), strict=True)) < 1e-3)
"""
    assert run(tmp_path, script) == "True"


def test_a_signal_to_a_fork_alone_stops_and_keeps(tmp_path: Path) -> None:
    script = """
def before(first):
    if not first:
        raise KeyboardInterrupt
try:
    together(2, work)
except Stopped as stop:
    print(stop)
"""
    assert "interrupted; the last checkpoint is kept" in run(tmp_path, script)


def test_a_fork_that_never_comes_is_not_waited_for(tmp_path: Path) -> None:
    script = """
from ukd_ros.distillation import forked
def touch(path):
    raise OSError("no memory")
Path.touch = touch
try:
    together(2, work)
except ForkError as error:
    print(error)
"""
    assert run(tmp_path, script) == "process 2 of 2: OSError: no memory"


def test_a_loss_that_is_not_finite_is_said_as_it_is_by_one_process(tmp_path: Path) -> None:
    script = """
from dataclasses import replace
from ukd_ros.distillation.train import TrainingDiverged
wild = replace(TINY, learning_rate=1e30, clip_norm=1e30)
try:
    together(2, lambda: train(wild, data, [CUBE], out, progress=False))
except TrainingDiverged as error:
    print(error)
"""
    assert "is not finite; the last good checkpoint is" in run(tmp_path, script)


def test_an_error_here_is_raised_here_and_leaves_nobody(tmp_path: Path) -> None:
    script = """
import multiprocessing
def before(first):
    if first:
        raise KeyError("mine")
try:
    together(2, work)
except KeyError as error:
    print(error, multiprocessing.active_children())
"""
    assert run(tmp_path, script) == "'mine' []"


def test_what_cannot_be_shared_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="2 micro-batches a step cannot be shared evenly by 3 processes"):
        check_forks(TINY, 3)
    with pytest.raises(ValueError, match="one thread each, not on 4"):
        check_forks(replace(TINY, threads=4), 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_forks(TINY, 2)  # on the CPU, as asked for
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="torchrun, one process for each GPU"):
        check_forks(replace(TINY, device="auto"), 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="torchrun"):
        together(2, lambda: None)
    assert together(1, lambda: 5) == 5
    words = ["train", "--dataset", str(tmp_path), "--out", str(tmp_path / "out"), "--processes", "2"]
    assert main([*words, "--ensemble", "2"]) == 2
    assert "members of --ensemble are processes already" in capsys.readouterr().err
    assert main([*words, "--set", "micro_batch=32"]) == 2
    assert "micro_batch" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["focal_weight", "ray_weight", "pose_weight", "nll_weight"])
def test_a_loss_that_would_be_raised_is_refused(name: str) -> None:
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=name):
            replace(TINY, **{name: value})
