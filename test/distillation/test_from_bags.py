# SPDX-License-Identifier: Apache-2.0
"""From a bag without labels to a calibrated student: on the shipped bag, with teachers that know its object."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bottle import BAG, labelled_views, save_teachers

from ukd_ros.config import load_config
from ukd_ros.data.bags import BagWriter, bag_truth
from ukd_ros.data.progress import Progress, Stopped, listening
from ukd_ros.data.rosbag.frames import BagOptions
from ukd_ros.distillation.checkpoint import load_checkpoint
from ukd_ros.distillation.distill import DistillConfig
from ukd_ros.distillation.frames import Frames
from ukd_ros.distillation.from_bags import _Work, distill_from_bags, supposed_windows_share
from ukd_ros.distillation.from_bags_request import FromBagsConfig, FromBagsResult
from ukd_ros.distillation.label_store import LabelError
from ukd_ros.geometry.metrics import add
from ukd_ros.geometry.pose import Pose
from ukd_ros.perception.bundle import load_bundle

ROOT = Path(__file__).resolve().parents[2]
SHORT = FromBagsConfig(
    bags=BagOptions(max_frames=24, truth_topics=False, guard_s=0.5, block_s=2.0),
    distill=DistillConfig(
        steps=3, batch_size=8, micro_batch=8, log_every=1, checkpoint_every=1, validate_every=0, threads=1,
        device="cpu", positives=10, learning_rate=1e-5,
    ),
    calibrate_views=40,
)  # fmt: skip


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teachers(tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_views(tmp_path_factory.mktemp("views") / "held_out")


@pytest.fixture(scope="module")
def finished(teachers: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FromBagsResult]:
    out = tmp_path_factory.mktemp("from_bags") / "bottle"
    return out, distill_from_bags(SHORT, [BAG], [teachers], out, held_out=held_out, progress=False)


def test_a_bag_without_labels_becomes_a_calibrated_model(finished: tuple[Path, FromBagsResult]) -> None:
    out, result = finished
    bundle = load_bundle(result.model)
    assert result.model == out / "models" / "bottle" and bundle.name == "bottle"
    assert bundle.calibration.instances >= 30
    assert bundle.provenance["pseudo_labels"]["accepted"] >= 10
    assert str(result.model.resolve()) in result.launch and result.launch.startswith("ros2 launch ukd_ros")
    page = result.report.read_text()
    for words in (
        "What the teachers were sure of",
        "Accepted labels",
        "How sure the student may be",
        "beside the teach",
    ):
        assert words in page
    assert (out / "labels.png").is_file() and "labels accepted" in result.summary


def test_accepted_labels_are_right(finished: tuple[Path, FromBagsResult]) -> None:
    out, _ = finished
    truth = bag_truth(BAG)["spray_bottle"]
    frames = Frames(out / "frames", "train")
    model = load_bundle(finished[1].model).objects[0]
    wrong = []
    for path in sorted((out / "labels" / "train").glob("shard-*.json")):
        for row in json.loads(path.read_text())["labels"]:
            if row["refused"]:
                continue
            found = Pose(np.array(row["rotation"]).reshape(3, 3), np.array(row["translation"]))
            true = truth[frames.places[row["frame"]][1]]
            wrong.append(add(found, true, model.keypoints_3d) > 0.1 * model.diameter)
    assert len(wrong) >= 10 and np.mean(wrong) <= 0.1


def test_a_finished_run_is_told_and_another_request_refused(
    finished: tuple[Path, FromBagsResult], teachers: Path, held_out: Path
) -> None:
    out, result = finished
    assert distill_from_bags(SHORT, [BAG], [teachers], out, held_out=held_out, progress=False) == result
    with pytest.raises(ValueError, match=r"request\.json.*other held_out"):
        distill_from_bags(SHORT, [BAG], [teachers], out, progress=False)
    with pytest.raises(FileExistsError, match="resume it"):
        distill_from_bags(SHORT, [BAG], [teachers], out, held_out=held_out, resume=False, progress=False)


@pytest.mark.parametrize(
    ("stage", "there"),
    [
        ("asking the teachers for labels", ["frames", "teachers.json"]),
        ("asking the teachers", ["frames", "teachers.json", "labels"]),
        ("training", ["frames", "teachers.json", "labels"]),
    ],
)
def test_stopped_anywhere_the_same_call_gives_the_same_student(
    stage: str,
    there: list[str],
    finished: tuple[Path, FromBagsResult],
    teachers: Path,
    held_out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What earlier stages left is taken from the finished run, to save its time."""

    def stop(progress: Progress) -> None:
        if progress.stage == stage and progress.done >= 1:
            raise Stopped("enough")

    out = tmp_path / "bottle"
    for name in there:
        source = finished[0] / name
        out.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, out / name)  # type: ignore[operator]
    with pytest.raises(Stopped, match="enough"), listening(stop):
        distill_from_bags(SHORT, [BAG], [teachers], out, held_out=held_out, progress=False)
    assert not (out / "models").exists()
    # exporting and calibrating are the same from the same checkpoint, and slow
    monkeypatch.setattr(_Work, "finish", lambda work, checkpoint: checkpoint)
    distill_from_bags(SHORT, [BAG], [teachers], out, held_out=held_out, progress=False)
    whole, resumed = (load_checkpoint(path / "run" / "checkpoint.pt").network for path in (finished[0], out))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_without_held_out_renders_nothing_is_labelled_or_calibrated_and_that_is_said(
    teachers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = distill_from_bags(SHORT, [BAG], [teachers], tmp_path / "out", progress=False)
    assert "NOT CALIBRATED" in result.summary and "0 labels accepted" in result.summary
    assert "how sure the teachers may be" in caplog.text
    assert load_bundle(result.model).calibration.instances == 0


def test_teachers_that_see_nothing_say_why_and_what_to_try(
    finished: tuple[Path, FromBagsResult], teachers: Path, held_out: Path, tmp_path: Path
) -> None:
    """A bag of grey pictures: nothing in them."""
    from ukd_ros.data.bags import bag_views
    from ukd_ros.geometry.view import View

    views = [view for view in bag_views(BAG) if isinstance(view, View)][:30:3]
    rng = np.random.default_rng(0)
    with BagWriter(tmp_path / "grey") as bag:
        for view in views:
            flat = np.full_like(view.image, 114)
            flat[:40, : 20 + 10 * int(rng.integers(8))] = 60  # something changes, or all but one would be thinned
            bag.write_view(View(flat, view.camera, view.stamp_ns, view.frame_id))
    config = replace(SHORT, bags=replace(SHORT.bags, held_out=0.0))
    (tmp_path / "out").mkdir()
    shutil.copyfile(finished[0] / "teachers.json", tmp_path / "out" / "teachers.json")
    with pytest.raises(ValueError, match=r"see nothing in any of the \d+ frames: 0 accepted, \d+ nothing_found\. look"):
        distill_from_bags(config, [tmp_path / "grey"], [teachers], tmp_path / "out", held_out=held_out, progress=False)


def test_teachers_of_another_object_are_refused_before_the_bag_is_read(
    teachers: Path, held_out: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="knows spray_bottle, not driller"):
        distill_from_bags(
            SHORT, [BAG], [teachers], tmp_path / "out", held_out=held_out, objects=["driller"], progress=False
        )
    assert not (tmp_path / "out").exists()  # the right words may follow in the same folder
    with pytest.raises(ValueError, match="nowhere"):
        distill_from_bags(SHORT, [BAG], [tmp_path / "nowhere"], tmp_path / "out", held_out=held_out, progress=False)
    with pytest.raises(RuntimeError, match="nowhere"):
        distill_from_bags(SHORT, [tmp_path / "nowhere"], [teachers], tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "request.json").exists()


def test_damaged_labels_are_named(finished: tuple[Path, FromBagsResult], teachers: Path, held_out: Path) -> None:
    out, result = finished
    shard = out / "labels" / "train" / "shard-00000.json"
    kept, told = shard.read_bytes(), (out / "result.json").read_bytes()
    shard.write_text("{}")
    (out / "result.json").unlink()
    try:
        with pytest.raises(LabelError, match="shard-00000"):
            distill_from_bags(SHORT, [BAG], [teachers], out, held_out=held_out, progress=False)
    finally:
        shard.write_bytes(kept)
        (out / "result.json").write_bytes(told)


def test_the_command_is_killed_and_goes_on(teachers: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of the training, then the same words again; --time-budget stops it once on the way."""
    words = [sys.executable, "-m", "ukd_ros", "distill", "--bag", str(BAG), "--teacher", str(teachers)]
    words += ["--out", str(tmp_path / "out"), "--config", "config/distill_bags.yaml"]
    words += ["--set", "distill.steps=6", "distill.batch_size=4", "distill.micro_batch=4", "bags.max_frames=12"]
    words += ["distill.checkpoint_every=1", "distill.device=cpu", "bags.guard_s=0.5", "bags.block_s=2"]
    words += ["calibrate_views=50", "bags.truth_topics=false", "distill.windows=24", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    checkpoint = tmp_path / "out" / "run" / "checkpoint.pt"
    end = time.monotonic() + 240
    while not checkpoint.is_file() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.is_file()
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "ros2 launch ukd_ros pose.launch.py model:=" in done.stdout


def test_few_labels_are_not_learnt_by_heart() -> None:
    config = FromBagsConfig(distill=DistillConfig(steps=300, batch_size=32))
    assert supposed_windows_share(config, 0) == 0.0
    assert supposed_windows_share(config, 10) == pytest.approx(10 * 40 / 9600)
    assert supposed_windows_share(config, 1000) == config.supposed_share
    with pytest.raises(ValueError, match="windows_per_label"):
        FromBagsConfig(windows_per_label=0)


def test_the_shipped_settings_load() -> None:
    config = load_config(FromBagsConfig, ROOT / "config" / "distill_bags.yaml")
    assert config.distill.guide.gaussian and config.supposed_share > 0.0
    with pytest.raises(ValueError, match="supposed_share"):
        load_config(FromBagsConfig, ROOT / "config" / "distill_bags.yaml", ["supposed_share=0.9"])
