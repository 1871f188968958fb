# SPDX-License-Identifier: Apache-2.0
"""From a bag without labels to a calibrated student: on the shipped bag, with teachers that know its object."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
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
from ukd_ros.distillation.from_bags_request import (
    FromBagsConfig,
    FromBagsRequest,
    FromBagsResult,
    launch_line,
)
from ukd_ros.distillation.from_bags_request import finished as finished_before
from ukd_ros.distillation.held_out_renders import open_held_out, parted
from ukd_ros.distillation.label_store import LabelError
from ukd_ros.distillation.parallel import Processes
from ukd_ros.distillation.pseudo_labels import PseudoLabelOptions
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
    labels=PseudoLabelOptions(sure=0.9),  # forty renders cannot say more of these teachers
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
    asked = json.loads((out / "teachers.json").read_text())
    assert set(asked["views"][0]).isdisjoint(asked["views"][1]) and len(asked["least"]) == 1
    for split in ("train", "held_out"):
        frames = Frames(out / "frames", split)  # neighbours are sought in one scene of one bag
        assert len({place for place, _ in frames.places}) == len(set(frames.blocks))
    assert len(set(Frames(out / "frames", "train").blocks)) >= 2


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
    ("stage", "after", "there"),
    [
        ("calibrating", 5, ["frames"]),
        ("asking the teachers for labels", 11, ["frames", "teachers.json"]),  # in the second shard
        ("looking for objects", 5, ["frames", "teachers.json", "labels"]),
        ("training", 1, ["frames", "teachers.json", "labels", "proposals"]),
    ],
)
def test_stopped_anywhere_the_same_call_gives_the_same_student(
    stage: str,
    after: int,
    there: list[str],
    finished: tuple[Path, FromBagsResult],
    teachers: Path,
    held_out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What earlier stages left is taken from the finished run, to save its time."""

    seen = 0

    def stop(progress: Progress) -> None:
        nonlocal seen
        seen += progress.stage == stage and progress.done >= 1
        if seen >= after:
            raise Stopped("enough")

    if "labels" not in there:  # those that are there were kept in larger ones
        monkeypatch.setattr("ukd_ros.distillation.label_store.SHARD", 8)
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
    assert_same_student(finished[0], out)


def assert_same_student(one: Path, other: Path) -> None:
    whole, resumed = (load_checkpoint(path / "run" / "checkpoint.pt").network for path in (one, other))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_without_held_out_renders_nothing_is_labelled_or_calibrated_and_that_is_said(
    teachers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = distill_from_bags(SHORT, [BAG], [teachers], tmp_path / "out", progress=False)
    assert "NOT CALIBRATED" in result.summary and "0 labels accepted" in result.summary
    assert "how sure the teachers may be" in caplog.text
    assert load_bundle(result.model).calibration.instances == 0
    frames = [len(Frames(tmp_path / "out" / "frames", split)) for split in ("train", "held_out")]
    counts = re.search(r"uncalibrated\s+(\d+)\s+(\d+)", result.report.read_text())
    assert counts is not None and [int(text) for text in counts.groups()] == frames and frames[0] != frames[1]


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
    """kill -9 in the middle of the training, then the same words again: the student of a run that nobody killed."""
    words = [sys.executable, "-m", "ukd_ros", "distill", "--bag", str(BAG), "--teacher", str(teachers)]
    words += ["--out", str(tmp_path / "out"), "--config", "config/distill_bags.yaml"]
    words += [
        "--set",
        "distill.steps=8",
        "distill.threads=1",
        "name=bottle",
        "distill.batch_size=4",
        "distill.micro_batch=4",
        "bags.max_frames=12",
    ]
    words += ["distill.checkpoint_every=1", "distill.device=cpu", "bags.guard_s=0.5", "bags.block_s=2"]
    words += ["calibrate_views=50", "bags.truth_topics=false", "distill.windows=24", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    checkpoint = tmp_path / "out" / "run" / "checkpoint.pt"
    end = time.monotonic() + 240
    while not checkpoint.is_file() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and load_checkpoint(checkpoint).step < 8
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "ros2 launch ukd_ros pose.launch.py model:=" in done.stdout
    words[words.index("--out") + 1] = str(tmp_path / "whole")
    shutil.copytree(tmp_path / "out" / "frames", tmp_path / "whole" / "frames")
    subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, timeout=300, check=True)
    assert_same_student(tmp_path / "whole", tmp_path / "out")


TOGETHER = """
import sys
from dataclasses import replace
from pathlib import Path
from test_from_bags import BAG, SHORT, _Work, distill_from_bags
_Work.finish = lambda work, checkpoint: checkpoint
config = replace(SHORT, distill=replace(SHORT.distill, micro_batch=4))
teachers, held_out, out = (Path(text) for text in sys.argv[1:])
distill_from_bags(config, [BAG], [teachers], out, held_out=held_out, progress=False)
"""


def test_two_processes_make_one_student(
    finished: tuple[Path, FromBagsResult], teachers: Path, held_out: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copyfile(finished[0] / "teachers.json", out / "teachers.json")
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-c"]
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    words = [*words[:-1], str(script), str(teachers), str(held_out), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_checkpoint(out / "run" / "checkpoint.pt").step == SHORT.distill.steps
    for part in ("labels/train", "labels/held_out", "proposals"):
        one, other = (sorted((folder / part).glob("shard-*.json")) for folder in (finished[0], out))
        assert [file.read_text() for file in one] == [file.read_text() for file in other] != []


def test_waiting_for_the_first_process_takes_longer_than_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrating and exporting are the first one's alone; torch's own patience is half an hour."""
    asked = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, answer in (("is_initialized", False), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **given: asked.update(given))
    assert Processes.from_environment().count == 2 and asked["timeout"] >= timedelta(hours=12)


# ---- what a folder is for --------------------------------------------------------------------------------------


def test_what_cannot_calibrate_is_refused_before_anything_is_written(
    teachers: Path, held_out: Path, tmp_path: Path
) -> None:
    faulty = tmp_path / "faulty"
    shutil.copytree(held_out, faulty)
    next(faulty.glob("*/*/scene_camera.json")).write_text("{}")
    for wrong, words in ((tmp_path / "nowhere", "nowhere"), (faulty, "scene_camera"), (held_out, "held out")):
        with pytest.raises(ValueError, match=words):
            distill_from_bags(
                SHORT, [BAG], [teachers], tmp_path / "out", renders=[held_out], held_out=wrong, progress=False
            )
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_does_not_answer_for_what_has_changed_since(teachers: Path, tmp_path: Path) -> None:
    bag, mine = tmp_path / "bag", tmp_path / "teachers"
    shutil.copytree(BAG, bag)
    shutil.copytree(teachers, mine)

    def request() -> FromBagsRequest:
        return FromBagsRequest(SHORT, (bag,), (mine,), tmp_path / "out")

    request().compare(resume=True)
    (tmp_path / "out").mkdir()
    request().claim()
    request().compare(resume=True)
    part = next(file for file in bag.iterdir() if file.suffix in (".mcap", ".db3"))
    content = bytearray(part.read_bytes())
    content[-40] ^= 1
    part.write_bytes(content)
    with pytest.raises(ValueError, match="other bags;"):
        request().compare(resume=True)
    content[-40] ^= 1
    part.write_bytes(content)
    next(mine.glob("seed-1.*")).unlink()
    with pytest.raises(ValueError, match="other teachers;"):
        request().compare(resume=True)


def test_a_model_that_is_gone_is_made_again_and_paths_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path("out") / "models" / "part"
    model.mkdir(parents=True)
    for file in (model / "model.yaml", Path("out/report.html")):
        file.touch()
    FromBagsResult(model, Path("out/report.html"), "line", "good").keep(Path("out"))
    monkeypatch.chdir("/")
    done = finished_before(tmp_path / "out")
    assert done is not None and done.model == tmp_path / model
    shutil.rmtree(tmp_path / model)
    assert finished_before(tmp_path / "out") is None and "is gone" in caplog.text
    (tmp_path / "out" / "result.json").write_text("{}")
    with pytest.raises(ValueError, match=r"result\.json: cannot be read"):
        finished_before(tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(teachers: Path, tmp_path: Path) -> None:
    """A model of the same name in it would be overwritten; what a killed call leaves behind is no hindrance."""
    (tmp_path / "models" / "part").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds models, but no request"):
        distill_from_bags(SHORT, [BAG], [teachers], tmp_path, progress=False)
    begun = tmp_path / "begun"
    (begun / "frames").mkdir(parents=True)
    (begun / ".request.json.abc").touch()
    FromBagsRequest(SHORT, (BAG,), (teachers,), begun).compare(resume=True)


def test_the_same_call_from_another_folder_is_the_same_call(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(teachers.parent)
    architecture = load_bundle(ROOT / "models" / "spray_bottle").network.architecture
    config = replace(
        SHORT,
        distill=replace(SHORT.distill, architecture=architecture),
        labels=replace(SHORT.labels, min_score=0.1),
    )
    work = _Work(FromBagsRequest(config, (BAG,), (Path(teachers.name),), tmp_path / "out"), False)
    work.open()
    assert Path(work.config.distill.initial).is_absolute() and Path(work.config.distill.initial).is_file()
    assert work.estimator().options.min_score == 0.1  # a score that labels may have is not refused before


# ---- how long, how much ----------------------------------------------------------------------------------------


def test_the_budget_is_that_of_everything(
    finished: tuple[Path, FromBagsResult], teachers: Path, held_out: Path, tmp_path: Path
) -> None:
    """It ends in the middle of labelling, which is long before the training."""
    (tmp_path / "out").mkdir()
    for name in ("frames", "teachers.json"):
        source = finished[0] / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tmp_path / "out" / name)  # type: ignore[operator]
    heard: list[str] = []
    with (
        pytest.raises(Stopped, match="the time is up.*the same call goes on"),
        listening(lambda progress: heard.append(progress.stage)),
    ):
        distill_from_bags(
            SHORT, [BAG], [teachers], tmp_path / "out", held_out=held_out, time_budget_s=1e-3, progress=False
        )
    assert heard and "training" not in heard  # who listened is told as before


def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(work: _Work) -> FromBagsResult:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "labels"))

    monkeypatch.setattr(_Work, "all", full)
    with pytest.raises(OSError, match="goes on once there is room") as caught:
        distill_from_bags(SHORT, [BAG], [tmp_path], tmp_path / "out", progress=False)
    assert caught.value.filename == str(tmp_path / "labels") and caught.value.errno == errno.ENOSPC


def test_the_line_that_starts_the_node_is_one_for_a_shell(tmp_path: Path) -> None:
    assert launch_line(tmp_path / "my part").endswith(f" 'model:={tmp_path.resolve()}/my part'")


def test_the_renders_that_calibrate_do_not_say_how_sure_a_label_must_be(
    held_out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for views, wanted in ((1000, 300), (600, 300), (599, 300), (150, 300), (60, 300)):
        fitted, chosen = parted(views, wanted)
        assert len(fitted) == len(chosen) == min(wanted, views // 2) and set(fitted).isdisjoint(chosen)
        assert max(chosen) < views
    assert parted(59, 300) == (range(59), range(59)) and parted(20, 300) == (range(20), range(20))
    model = load_bundle(ROOT / "models" / "spray_bottle").objects[0]
    renders = open_held_out(held_out, [], [model], 40)
    assert renders.trouble == "" and len(renders.views) >= 60
    few = open_held_out(held_out, [], [model], 20)
    assert few.fitted != few.chosen
    # other renders at the same place are others
    other = tmp_path / "other"
    shutil.copytree(held_out, other)
    assert open_held_out(other, [], [model], 40).digest() == renders.digest()
    place = next(other.glob("*/*/scene_gt.json"))
    place.write_text(place.read_text().replace("1", "2", 1))
    assert open_held_out(other, [], [model], 40).digest() != renders.digest()


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
