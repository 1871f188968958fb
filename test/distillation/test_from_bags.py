# SPDX-License-Identifier: Apache-2.0
"""From a bag without labels to a calibrated student: on the shipped bag, with teachers that know its object."""

from __future__ import annotations

import errno
import html
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
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from bottle import BAG, labelled_views, save_teachers

from ukd_ros.config import load_config
from ukd_ros.data.bags import BagWriter, bag_truth
from ukd_ros.data.bop import BopDataset
from ukd_ros.data.dataset import MixedWindows, Windows
from ukd_ros.data.demo_object import demo_mesh
from ukd_ros.data.progress import Progress, Stopped, listening
from ukd_ros.data.rosbag.frames import BagOptions
from ukd_ros.distillation.bag_calibration import BagCalibration
from ukd_ros.distillation.checkpoint import load_checkpoint
from ukd_ros.distillation.distill import DistillConfig
from ukd_ros.distillation.frames import Frames
from ukd_ros.distillation.from_bags import _Work, distill_from_bags, supposed_windows_share
from ukd_ros.distillation.from_bags_report import ADVICE, BagStory, advice, write_story
from ukd_ros.distillation.from_bags_request import (
    FromBagsConfig,
    FromBagsRequest,
    FromBagsResult,
    launch_line,
)
from ukd_ros.distillation.from_bags_request import finished as finished_before
from ukd_ros.distillation.held_out_renders import open_held_out, parted
from ukd_ros.distillation.label_store import LabelError
from ukd_ros.distillation.neighbours import DISAGREES
from ukd_ros.distillation.parallel import Processes
from ukd_ros.distillation.pseudo_labels import (
    INCONSISTENT,
    LOW_SCORE,
    NOTHING,
    UNSURE,
    PseudoLabel,
    PseudoLabelOptions,
    PseudoLabels,
)
from ukd_ros.distillation.teacher import TeacherError
from ukd_ros.geometry.estimate import RejectReason
from ukd_ros.geometry.metrics import add
from ukd_ros.geometry.pose import Pose
from ukd_ros.perception.bundle import load_bundle
from ukd_ros.perception.estimator import PoseEstimator
from ukd_ros.perception.votes import Calibration

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


def renders_of(held_out: Path, out: Path) -> Path:
    """Copy labelled frames and add the masks that renders have: the outline of the mesh."""
    shutil.copytree(held_out, out)
    data = BopDataset(out)
    for number, image in enumerate(data.images):
        height, width = data.image(number).shape[:2]
        folder = data.scene_folders[image.scene_id] / "mask_visib"
        folder.mkdir(exist_ok=True)
        for row, label in enumerate(data.labels(number, masks=False)):
            seen = data.camera(number, (width, height)).project(label.T_camera_object.transform(demo_mesh().vertices))
            mask = np.zeros((height, width), np.uint8)
            cv2.fillConvexPoly(mask, cv2.convexHull(np.round(seen).astype(np.int32)), 255)
            cv2.imwrite(str(folder / f"{image.image_id:06d}_{row:06d}.png"), mask)
    return out


def test_renders_teach_beside_the_bags(
    finished: tuple[Path, FromBagsResult],
    teachers: Path,
    held_out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From the bag to the model; what the teachers say is that of the finished run, to save its time."""
    learnt: list[Windows] = []
    windows = _Work.windows

    def noted(work: _Work) -> Windows:
        learnt.append(windows(work))
        return learnt[-1]

    monkeypatch.setattr(_Work, "windows", noted)
    renders, out = renders_of(held_out, tmp_path / "renders"), tmp_path / "out"
    out.mkdir()
    for name in ("frames", "labels", "proposals"):
        shutil.copytree(finished[0] / name, out / name)
    shutil.copyfile(finished[0] / "teachers.json", out / "teachers.json")
    (out / ".teachers.json.ab12_cd3").touch()  # half of what a killed call wrote
    with caplog.at_level("INFO"):
        result = distill_from_bags(
            SHORT,
            [BAG],
            [teachers],
            out,
            renders=[renders],
            held_out=held_out,
            objects=["spray_bottle"],
            progress=False,
        )
    assert "what the bags gave" in caplog.text and not list(out.glob(".*"))
    bundle = load_bundle(result.model)
    assert "renders" in bundle.provenance["data"] and bundle.provenance["pseudo_labels"]["accepted"] >= 10
    assert bundle.calibration.instances >= 30 and "held-out renders" in result.summary
    (mixed,) = learnt
    assert isinstance(mixed, MixedWindows)
    kinds = [(sample.labelled, sample.supposed) for sample in (mixed.sample(i) for i in range(60))]
    assert set(kinds) == {(True, False), (True, True), (False, False)}  # renders, accepted labels, votes alone
    mine, other = (load_checkpoint(path / "run" / "checkpoint.pt") for path in (out, finished[0]))
    assert mine.taught != other.taught  # by the same teachers, on other windows
    assert json.loads((out / "request.json").read_text())["renders"] == [str(renders)]


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


def test_no_teacher_is_an_error_whatever_is_asked_for(tmp_path: Path) -> None:
    for objects in ([], ["spray_bottle"]):
        with pytest.raises(TeacherError, match="no teacher was given"):
            distill_from_bags(SHORT, [BAG], [], tmp_path / "out", objects=objects, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_calibration_of_other_windows_is_not_taken(
    teachers: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but teachers.json is there when a call is killed before it has claimed its folder."""
    asked: list[int] = []

    def fitted(estimator: PoseEstimator, *_: object) -> SimpleNamespace:
        asked.append(estimator._locate.width)
        return SimpleNamespace(calibration=Calibration(instances=len(asked)), table=str)

    monkeypatch.setattr("ukd_ros.distillation.from_bags.calibrate", fitted)
    monkeypatch.setattr("ukd_ros.distillation.from_bags.required_on", lambda *_: (0.9,))
    for width, count in ((320, 1), (320, 1), (256, 2)):
        window = replace(SHORT.distill.window, locate_width=width)
        config = replace(SHORT, distill=replace(SHORT.distill, window=window))
        work = _Work(FromBagsRequest(config, (BAG,), (teachers,), tmp_path, held_out=held_out), False)
        work.open()
        work.calibrate_teachers()
        assert work.calibration is not None and work.calibration.instances == len(asked) == count
    assert asked == [320, 256]


def test_what_a_damaged_bag_lost_is_told_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bag = tmp_path / "cut"
    bag.mkdir()
    content = (BAG / "sample_bag.mcap").read_bytes()
    (bag / "sample_bag.mcap").write_bytes(content[: 2 * len(content) // 3])
    _Work(FromBagsRequest(SHORT, (bag,), (), tmp_path / "out"), False).take_frames()
    (record,) = [record for record in caplog.records if "what the bags gave" in record.getMessage()]
    assert record.levelname == "WARNING" and "cut: damage: " in record.getMessage()


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


def test_a_setting_that_differs_is_named_and_what_changes_no_student_may_differ(teachers: Path, tmp_path: Path) -> None:
    def ask(config: FromBagsConfig) -> None:
        FromBagsRequest(config, (BAG,), (teachers,), tmp_path).compare(resume=True)

    FromBagsRequest(SHORT, (BAG,), (teachers,), tmp_path).claim()
    ask(replace(SHORT, distill=replace(SHORT.distill, threads=2, device="auto", checkpoint_every=7, log_every=9)))
    other = replace(SHORT, labels=replace(SHORT.labels, sure=0.8), distill=replace(SHORT.distill, steps=4, threads=2))
    with pytest.raises(ValueError, match=r"labels\.sure \(then 0\.9, now 0\.8\), distill\.steps \(then 3, now 4\);"):
        ask(other)
    window = replace(SHORT.distill, window=replace(SHORT.distill.window, locate_width=256))
    with pytest.raises(ValueError, match=r"with other distill\.window\.locate_width \(then \d+, now 256\);"):
        ask(replace(SHORT, distill=window))
    asked = json.loads((tmp_path / "request.json").read_text())
    del asked["config"]["distill"]["hold"]  # of a folder from before there was this setting
    (tmp_path / "request.json").write_text(json.dumps(asked))
    ask(SHORT)
    (tmp_path / "request.json").write_text("[]")
    with pytest.raises(ValueError, match="is no request"):
        ask(SHORT)


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


# ---- why nothing was accepted ----------------------------------------------------------------------------------


def test_every_reason_has_its_advice_here_and_in_the_tutorial() -> None:
    """What only tracking says aside: frames of a bag are looked at one by one."""
    reasons = {reason.value for reason in RejectReason if reason is not RejectReason.LOST}
    reasons |= {UNSURE, INCONSISTENT, LOW_SCORE, NOTHING, DISAGREES, "uncalibrated"}
    assert set(ADVICE) == reasons
    tutorial = (ROOT / "docs" / "your_object.md").read_text()
    table = tutorial[tutorial.index("| refused as |") :]
    assert set(re.findall(r"^\| `(\w+)` \|", table[: table.index("\n\n")], re.MULTILINE)) == reasons
    assert advice(PseudoLabels((), 100, {"no_convergence": 99, LOW_SCORE: 1})) == ADVICE["no_convergence"]


@pytest.mark.parametrize("why", [UNSURE, INCONSISTENT, DISAGREES])
def test_objects_that_were_seen_and_not_accepted_are_shown_with_what_to_try(
    why: str, held_out: Path, tmp_path: Path
) -> None:
    model = load_bundle(ROOT / "models" / "spray_bottle").objects[0]
    frames = Frames(held_out, "train")
    pose = Pose(np.eye(3), np.array([0.0, 0.0, 0.6]))
    seen = [
        PseudoLabel(n, 0, pose, 1e-4 * np.eye(6), 0.9, 0.4, np.array([[9.0, 9.0, 30.0, 30.0]]), why) for n in range(3)
    ]
    labels = PseudoLabels(tuple(seen), len(frames), {why: 3, "degenerate": 2})
    calibrated = BagCalibration(None, None, None, "NOT CALIBRATED")
    story = BagStory("", frames, None, {"train": labels}, (model,), tmp_path / "part", tmp_path, calibrated)
    report, summary = write_story(story, tmp_path)
    assert "0 labels accepted, 5 refused" in summary
    page = html.unescape(report.read_text())
    assert f"The teachers' votes taught, but no pose. {ADVICE[why]}." in page and "To have more" not in page
    assert re.search(rf"{why}\s+3\b", page) and re.search(r"degenerate\s+2\b", page)
    assert (tmp_path / "labels_refused.png").is_file() and not (tmp_path / "labels.png").exists()


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
