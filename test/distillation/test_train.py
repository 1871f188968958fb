# SPDX-License-Identifier: Apache-2.0
"""Training: resumed and shared-out runs take the same steps, and learning happens."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cubes import CUBE, CubeViews

from ukd_ros.data.augment import AugmentConfig
from ukd_ros.data.dataset import WindowConfig, WindowDataset
from ukd_ros.distillation.beginning import OBJECT_LAYERS
from ukd_ros.distillation.checkpoint import CheckpointError, load_checkpoint, writing_in
from ukd_ros.distillation.curves import trim_metrics
from ukd_ros.distillation.export import ExportOptions, export_model
from ukd_ros.distillation.train import TrainingDiverged, train, train_on_folders
from ukd_ros.distillation.train_config import TrainConfig, learning_rate
from ukd_ros.geometry.pose import Pose
from ukd_ros.geometry.view import LabelledView
from ukd_ros.perception.bundle import BundleError

TINY = TrainConfig(
    steps=6,
    batch_size=8,
    micro_batch=4,
    checkpoint_every=3,
    log_every=1,
    validate_every=0,
    width_factor=0.25,
    threads=1,
    device="cpu",
    window=WindowConfig(size=64, zoom_fill_spread=1.1),
)


@pytest.fixture(scope="module")
def data() -> WindowDataset:
    return WindowDataset(CubeViews(6), [CUBE], TINY.window, seed=0)


def _losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_resuming_gives_the_numbers_of_an_unbroken_run(data: WindowDataset, tmp_path: Path) -> None:
    whole = train(replace(TINY, keep_every=4), data, [CUBE], tmp_path / "whole", progress=False)
    assert whole.finished and whole.step == 6
    assert load_checkpoint(tmp_path / "whole" / "step-000004.pt").step == 4
    broken = tmp_path / "broken"
    first = train(TINY, data, [CUBE], broken, progress=False, time_budget_s=0.0)
    assert not first.finished and first.step == 1
    second = train(TINY, data, [CUBE], broken, progress=False, resume=True)
    assert second.finished
    assert _losses(broken) == pytest.approx(_losses(tmp_path / "whole"), abs=1e-6)
    one = load_checkpoint(whole.checkpoint).network.state_dict()
    other = load_checkpoint(second.checkpoint).network.state_dict()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6, msg=name)
    assert (broken / "curves.png").stat().st_size > 1000


def _told(out: Path) -> list[dict[str, float]]:
    """Return what a run told of its steps, but not how fast it was."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in lines]


def test_a_run_in_pieces_tells_what_an_unbroken_one_tells(data: WindowDataset, tmp_path: Path) -> None:
    """Stopped between two lines, killed after a line that no checkpoint has, and while it wrote the next."""
    config = replace(TINY, log_every=2, validate_every=4, validate_windows=4)
    checked = WindowDataset(CubeViews(3, seed=1), [CUBE], TINY.window, seed=1)
    out = tmp_path / "pieces"
    train(config, data, [CUBE], tmp_path / "whole", held_out=checked, progress=False)
    for _ in range(3):
        train(config, data, [CUBE], out, held_out=checked, resume=True, progress=False, time_budget_s=0.0)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99.0, "samples": 32}\n{"step": 5, "lo')
    assert train(config, data, [CUBE], out, held_out=checked, resume=True, progress=False).finished
    assert _told(out) == _told(tmp_path / "whole") and [line["step"] for line in _told(out)] == [2, 4, 6]


def test_a_disk_that_fills_while_metrics_are_told_does_not_spoil_the_run(data: WindowDataset, tmp_path: Path) -> None:
    out, config = tmp_path / "run", replace(TINY, checkpoint_every=100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        with pytest.raises(OSError, match="metrics.jsonl"):
            train(config, data, [CUBE], out, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not (out / "metrics.jsonl").read_text().endswith("\n")
    assert train(config, data, [CUBE], out, progress=False).finished
    assert [line["step"] for line in _told(out)] == [1, 2, 3, 4, 5, 6]


def test_metrics_keep_the_whole_lines_up_to_a_step_each_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    trim_metrics(path, 9)
    assert not path.exists()
    lines = [b'{"step": 1}', b'{"step": 2, "loss": NaN}', b'{"st{"step": 3}', b'{"step": 2}', b"[3]", b"\xff\x00"]
    path.write_bytes(b"\n".join([*lines, b'{"step": 4}', b'{"step": "4"}', b'{"step": 5}', b'{"ste']))
    trim_metrics(path, 4)
    assert path.read_bytes().splitlines() == [*lines[:2], b'{"step": 4}'] and path.read_bytes().endswith(b"}\n")
    kept = path.stat().st_ino
    trim_metrics(path, 4)
    assert path.stat().st_ino == kept  # a full disk is no hindrance where there is nothing to mend
    trim_metrics(path, 0)
    assert path.read_bytes() == b""


def test_what_a_killed_run_left_half_written_is_deleted_unless_somebody_writes(
    data: WindowDataset, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    left = [
        ".checkpoint.pt.77",
        ".step-000004.pt.77",
        ".metrics.jsonl.ab12_cd3",
        ".curves.77.png",
        ".curves.png.ab12_cd3",
    ]
    for name in (*left, ".other.png", "notes.txt"):
        (out / name).touch()
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)  # as a process that writes there does
    train(replace(TINY, steps=2), data, [CUBE], out, progress=False, time_budget_s=0.0)
    assert all((out / name).exists() for name in left)
    os.close(other)
    train(replace(TINY, steps=2), data, [CUBE], out, resume=True, progress=False)
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == [".other.png"]
    assert (out / "notes.txt").exists()
    with writing_in(out), writing_in(out, ["other"]):  # two who write: nothing is deleted
        assert (out / ".other.png").exists()


def test_two_processes_take_the_steps_of_one(data: WindowDataset, tmp_path: Path) -> None:
    """The same global batch over torchrun with gloo: the loss curve agrees to 1e-4."""
    train(TINY, data, [CUBE], tmp_path / "one", progress=False)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_train import *\n"
        "data = WindowDataset(CubeViews(6), [CUBE], TINY.window, seed=0)\n"
        "train(TINY, data, [CUBE], Path(sys.argv[2]), progress=False)\n"
    )
    (tmp_path / "run.py").write_text(script)
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "run.py"),
    ]
    done = subprocess.run(
        [*command, str(Path(__file__).parent), str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), abs=1e-4)
    one = load_checkpoint(tmp_path / "one" / "checkpoint.pt").network.state_dict()
    two = load_checkpoint(tmp_path / "two" / "checkpoint.pt").network.state_dict()
    for name, value in one.items():
        if name.endswith("num_batches_tracked"):
            continue  # torch's own counter of forward passes, unused: statistics are averaged by `NormStatistics`
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_few_steps_learn(tmp_path: Path) -> None:
    """Eight cubes without augmentation, 60 steps: the keypoint error falls to less than half."""
    window = WindowConfig(zoom_fraction=1.0, rotation_deg=0, augment=AugmentConfig(*(0.0,) * 14))
    config = TrainConfig(
        steps=60,
        batch_size=8,
        micro_batch=8,
        learning_rate=4e-3,
        width_factor=0.5,
        log_every=10,
        validate_every=0,
        device="cpu",
        window=replace(window, size=96),
    )
    train(config, WindowDataset(CubeViews(8), [CUBE], config.window, seed=0), [CUBE], tmp_path / "run", progress=False)
    errors = [json.loads(line)["error_px"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert errors[-1] < 0.5 * errors[0]


def test_the_schedule_rises_once_and_falls_to_nearly_nothing() -> None:
    config = TrainConfig(steps=1000, warmup=0.1, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(1000)]
    assert max(rates) == pytest.approx(1.0) and rates.index(max(rates)) in (99, 100)
    assert all(a < b for a, b in zip(rates[:99], rates[1:100], strict=True))
    assert all(a >= b for a, b in zip(rates[100:-1], rates[101:], strict=True)) and rates[-1] < 2e-3


def test_a_held_schedule_stays_at_its_peak_before_it_falls() -> None:
    config = TrainConfig(steps=1000, warmup=0.1, hold=0.5, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(1000)]
    assert rates[99:600] == [1.0] * 501 and 0.9 < rates[650] < 1.0 and rates[-1] < 2e-3
    forever = replace(config, hold=1.0)
    assert [learning_rate(step, forever) for step in (100, 500, 999)] == [1.0] * 3


def test_wrong_resumptions_are_refused(data: WindowDataset, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(replace(TINY, steps=3), data, [CUBE], out, progress=False)
    with pytest.raises(FileExistsError, match="--resume"):
        train(replace(TINY, steps=3), data, [CUBE], out, progress=False)
    with pytest.raises(ValueError, match="learning_rate"):
        train(replace(TINY, steps=3, learning_rate=0.5), data, [CUBE], out, progress=False, resume=True)
    checkpoint = out / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="checkpoint.pt"):
        train(replace(TINY, steps=3), data, [CUBE], out, progress=False, resume=True)


def test_a_full_disk_keeps_the_checkpoint_and_leaves_nothing_half_written(data: WindowDataset, tmp_path: Path) -> None:
    whole = train(replace(TINY, checkpoint_every=1), data, [CUBE], tmp_path / "whole", progress=False)
    out = tmp_path / "run"
    train(replace(TINY, checkpoint_every=1), data, [CUBE], out, progress=False, time_budget_s=0.0)
    step = load_checkpoint(out / "checkpoint.pt").step
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )  # then writing beyond the limit is an error, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written .* the one before it is kept; make room"):
            train(replace(TINY, checkpoint_every=1), data, [CUBE], out, progress=False, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert load_checkpoint(out / "checkpoint.pt").step == step
    assert not list(out.glob(".checkpoint*"))
    again = train(replace(TINY, checkpoint_every=1), data, [CUBE], out, progress=False, resume=True)
    one, other = (load_checkpoint(path.checkpoint).network.state_dict() for path in (whole, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(data: WindowDataset, tmp_path: Path) -> None:
    out = tmp_path / "run"
    wild = replace(TINY, steps=40, learning_rate=1e30, warmup=0.9, clip_norm=1e30, checkpoint_every=1)
    with pytest.raises(TrainingDiverged, match="not finite"):
        train(wild, data, [CUBE], out, progress=False)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("steps", 0, "steps"),
        ("micro_batch", 3, "micro_batch"),
        ("device", "tpu", "device"),
        ("optimizer", "sgd", "optimizer"),
        ("precision", "float8", "precision"),
        ("warmup", 1.5, "warmup"),
        ("hold", 1.5, "hold"),
    ],
)
def test_settings_that_cannot_run_are_refused(field: str, value: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        replace(TrainConfig(), **{field: value})


def test_a_run_can_start_from_the_weights_of_another(data: WindowDataset, tmp_path: Path) -> None:
    first = train(replace(TINY, steps=3), data, [CUBE], tmp_path / "first", progress=False)
    second = replace(TINY, steps=1, initial=str(first.checkpoint), learning_rate=1e-9)
    result = train(second, data, [CUBE], tmp_path / "second", progress=False)
    before = load_checkpoint(first.checkpoint).network.state_dict()
    after = load_checkpoint(result.checkpoint).network.state_dict()
    torch.testing.assert_close(after["head.offset.weight"], before["head.offset.weight"], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="initial"):
        train(replace(second, width_factor=0.5), data, [CUBE], tmp_path / "third", progress=False)


def test_a_run_can_start_from_the_student_of_another_part(
    data: WindowDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Backbone and towers are taken over, from a checkpoint or a model folder; the last layers begin anew."""
    first = train(replace(TINY, steps=3), data, [CUBE], tmp_path / "first", progress=False)
    network = load_checkpoint(first.checkpoint).network
    options = ExportOptions(locate_width=64, locate_height=64, zoom_size=64, weights="float32")
    export_model(network, [CUBE], tmp_path / "model", options)
    other = replace(CUBE, name="die")

    class Dice(CubeViews):
        def view(self, index: int) -> LabelledView:
            view = super().view(index)
            return replace(view, objects=tuple(replace(label, object_name="die") for label in view.objects))

    dice = WindowDataset(Dice(6), [other], TINY.window, seed=0)
    before = network.state_dict()
    for number, initial in enumerate((first.checkpoint, tmp_path / "first", tmp_path / "model")):
        config = replace(TINY, steps=1, initial=str(initial), learning_rate=1e-9, seed=5)
        with caplog.at_level("INFO"):
            result = train(config, dice, [other], tmp_path / f"next{number}", progress=False)
        assert "begin anew" in caplog.text
        after = load_checkpoint(result.checkpoint).network.state_dict()
        compared = 0
        for name, value in after.items():
            if name.startswith("head.offset.weight"):
                assert (value - before[name]).abs().max() > 1e-3
            elif value.dim() > 1 and not name.startswith(OBJECT_LAYERS):
                compared += 1
                torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0, msg=name)
        assert compared > 20
    with pytest.raises(BundleError, match="nowhere"):
        train(replace(TINY, initial=str(tmp_path / "nowhere")), dice, [other], tmp_path / "last", progress=False)


def test_a_data_set_without_masks_is_named(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from test_evaluate import write_dataset

    root = write_dataset(tmp_path / "bop", [[Pose(np.eye(3), np.array([0.0, 0.0, 0.6]))]])
    with pytest.raises(ValueError, match=r"000003/mask_visib: is missing"):
        train_on_folders(replace(TINY, keypoints=8), [root], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_run_from_before_there_was_muon_can_be_resumed(data: WindowDataset, tmp_path: Path) -> None:
    """Its checkpoint names no optimizer and holds AdamW's state alone; the steps go on as if nothing had happened."""
    config = replace(TINY, optimizer="adamw")
    train(config, data, [CUBE], tmp_path / "whole", progress=False)
    first = train(config, data, [CUBE], tmp_path / "old", progress=False, time_budget_s=0.0)
    content = torch.load(first.checkpoint, weights_only=True)
    (content["optimizer"],) = content["optimizer"]["parts"]
    del content["config"]["optimizer"]
    torch.save(content, first.checkpoint)
    assert train(config, data, [CUBE], tmp_path / "old", progress=False, resume=True).finished
    assert _losses(tmp_path / "old") == pytest.approx(_losses(tmp_path / "whole"), abs=1e-6)
