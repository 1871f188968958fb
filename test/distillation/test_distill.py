# SPDX-License-Identifier: Apache-2.0
"""Distilling: what the teachers say is asked once, kept, refused where it does not fit, and changes the student."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cubes import CAMERA, CUBE, CubeViews
from torch import Tensor

from ukd_ros.config import load_config
from ukd_ros.data.augment import AugmentConfig
from ukd_ros.data.dataset import MixedWindows, TrainingSample, UnlabelledWindows, WindowConfig, WindowDataset
from ukd_ros.distillation.assignment import assign
from ukd_ros.distillation.checkpoint import load_checkpoint, save_checkpoint
from ukd_ros.distillation.distill import DistillConfig, distill
from ukd_ros.distillation.guidance import PADDING, Guidance, teach
from ukd_ros.distillation.guide import TERMS, Guide, GuideOptions
from ukd_ros.distillation.teacher import Ensemble, EnsembleVotes, TeacherError
from ukd_ros.distillation.teacher_cache import SHARD, CacheError, open_cache
from ukd_ros.distillation.train import TrainingDiverged, train
from ukd_ros.distillation.train_config import TrainConfig
from ukd_ros.distillation.transport import TransportOptions
from ukd_ros.distillation.unlabelled import propose
from ukd_ros.distillation.vote_losses import AlignOptions
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.view import View
from ukd_ros.perception.network import KeypointNetwork, NetworkConfig, RawOutput, cell_features

WINDOW = WindowConfig(size=64, zoom_fill_spread=1.1)
TINY = DistillConfig(
    steps=4, batch_size=8, micro_batch=4, checkpoint_every=2, log_every=1, validate_every=0, width_factor=0.25,
    threads=1, device="cpu", window=WINDOW, windows=16, keypoints=8,
)  # fmt: skip
CACHE = {"positives": 10, "votes": 4, "features": True}
SURE = AlignOptions(TransportOptions(blur=1e-2, reach=0.5))


def member(seed: int, width: float = 0.25) -> KeypointNetwork:
    """A network that has learnt nothing and answers boldly."""
    torch.manual_seed(seed)
    made = KeypointNetwork(NetworkConfig("lean", ("cube",), 8, width))
    for layer in (made.head.offset, made.head.scale, made.head.score):
        torch.nn.init.normal_(layer.weight, std=0.3)
    torch.nn.init.zeros_(made.head.score.bias)  # type: ignore[arg-type]
    return made.eval()


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return Ensemble([member(seed) for seed in range(3)], identity="three")


@pytest.fixture(scope="module")
def data() -> WindowDataset:
    return WindowDataset(CubeViews(6), [CUBE], WINDOW, seed=0)


@pytest.fixture(scope="module")
def unlabelled() -> UnlabelledWindows:
    views = [CubeViews(4, seed=9).view(i) for i in range(4)]
    boxes = [(i, np.array([100.0, 60.0, 220.0, 180.0])) for i in range(4)]
    return UnlabelledWindows([View(v.image, v.camera) for v in views], boxes, [CUBE], WINDOW, 0)


def guide(options: GuideOptions, guidance: Guidance, width: int) -> Guide:
    return Guide(options, lambda numbers: guidance, width, guidance.features.shape[-1])


def told(
    options: GuideOptions, student: KeypointNetwork, data: WindowDataset, ensemble: Ensemble, count: int = 4
) -> tuple[dict[str, Tensor], Guidance, RawOutput]:
    samples = [data.sample(i) for i in range(count)]
    guidance = teach(ensemble, samples, 10, options.votes)
    pyramid = student.pyramid(torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).float())
    raw = student.raw_votes(pyramid)
    raw.offset.retain_grad()
    terms = guide(options, guidance, student.pyramid_width).terms(
        raw, cell_features(pyramid), assign(samples, 1, 8), guidance, 64
    )
    return terms, guidance, raw


# ---- what the teachers say -------------------------------------------------------------------------------------


def test_guidance_is_the_ensembles_best_votes_of_each_labelled_object(data: WindowDataset, ensemble: Ensemble) -> None:
    samples = [data.sample(i) for i in range(6)]
    found = teach(ensemble, samples, 10, 4)
    targets = assign(samples, 1, 8)
    image = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).float()
    votes = ensemble.predict(image)
    assert len(found) == len({int(b) for b in targets.batch})
    for i, b in enumerate(found.window):
        cells = targets.cell[targets.batch == b]
        scores = votes.score[b, cells, 0].numpy()
        best = cells[np.argsort(-scores, kind="stable")[:4]]
        np.testing.assert_array_equal(found.cell[i, : len(best)], best)
        np.testing.assert_allclose(found.xy[i, 0], votes.xy[b, best[0], 0].numpy(), atol=1e-4)
        np.testing.assert_allclose(found.spread[i, 1], votes.spread[b, best[1], 0].numpy(), rtol=1e-4)
        np.testing.assert_allclose(found.features[i, 0], votes.features[b, best[0]].numpy(), atol=1e-5)
        assert (found.score[i, len(best) :] == 0).all() and (found.cell[i, len(best) :] == PADDING).all()


def test_a_window_without_labels_is_read_by_the_teachers_themselves(
    unlabelled: UnlabelledWindows, ensemble: Ensemble
) -> None:
    samples = [unlabelled.sample(i) for i in range(4)]
    assert not any(s.labelled or s.objects or s.mask.any() for s in samples)
    assert (assign(samples, 1, 8).state == -1).all()
    found = teach(ensemble, samples, 10, 4)
    assert len(found) > 0
    assert (found.score[:, 0] >= 0.3).all()  # the estimator's own threshold
    with torch.no_grad():
        for network in (blind := [member(0), member(1)]):
            network.head.score.bias.fill_(-30.0)
    assert len(teach(Ensemble(blind), samples, 10, 4)) == 0


def test_the_teachers_propose_boxes_in_pixels_of_the_frame(ensemble: Ensemble) -> None:
    views = [View(v.image, v.camera) for v in (CubeViews(2).view(i) for i in range(2))]
    boxes = propose(ensemble, enumerate(views), 160, progress=False)
    assert boxes and {number for number, _ in boxes} <= {0, 1}
    size = np.array([CAMERA.width, CAMERA.height])
    middle = np.array([(box[:2] + box[2:]) / 2 for _, box in boxes])
    assert (middle > -size).all() and (middle < 2 * size).all()
    assert np.ptp(middle, axis=0).max() > 20  # in the frame, not in one corner at the network's scale


def test_a_frames_shape_does_not_decide_how_much_memory_is_asked_for(
    ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bag may say that its images are 8 px wide and 4,000 high."""
    sizes = []

    def predict(images: Tensor) -> EnsembleVotes:
        sizes.append(tuple(images.shape))
        return Ensemble.predict(ensemble, images)

    monkeypatch.setattr(ensemble, "predict", predict)
    strange = Camera(8, 4000, CAMERA.matrix)
    views = [CubeViews(1).view(0), View(np.zeros((4000, 8, 3), np.uint8), strange)]
    propose(ensemble, enumerate(views), 160, progress=False)
    assert sizes == [(1, 3, 128, 160)] * 2


# ---- what the student is told ----------------------------------------------------------------------------------


def test_a_student_that_is_the_teacher_is_told_nothing_new(data: WindowDataset) -> None:
    same = Ensemble([member(5), member(5)])
    options = GuideOptions(naive=1.0, features=1.0, transport=1.0, gaussian=False, scale=0.0, planned_features=1.0,
                           project=False, align=SURE)  # fmt: skip
    terms, _, _ = told(options, member(5), data, same)
    assert terms["kd_naive"].item() == pytest.approx(0.0, abs=1e-6)
    assert terms["kd_features"].item() == pytest.approx(0.0, abs=1e-5)
    assert terms["kd_transport"].item() == pytest.approx(0.0, abs=1e-4)
    other, _, _ = told(options, member(6), data, same)
    assert all(other[name].item() > 10 * abs(terms[name].item()) + 1e-3 for name in ("kd_naive", "kd_features"))
    assert other["kd_transport"].item() > 1e-3 and other["kd_planned"].item() > terms["kd_planned"].item()


def test_every_term_moves_the_student_and_only_what_it_should(data: WindowDataset, ensemble: Ensemble) -> None:
    student = member(7)
    only: dict[str, GuideOptions] = {
        "kd_naive": GuideOptions(naive=1.0, transport=0.0, planned_features=0.0),
        "kd_features": GuideOptions(features=1.0, transport=0.0, planned_features=0.0),
        "kd_transport": GuideOptions(planned_features=0.0),
        "kd_scale": GuideOptions(planned_features=0.0),
        "kd_planned": GuideOptions(),
    }
    assert set(only) == set(TERMS)
    reach = {"kd_naive": "head.offset", "kd_transport": "head.offset", "kd_scale": "head.scale"}
    for name, options in only.items():
        student.zero_grad()
        terms, _, _ = told(options, student, data, ensemble)
        terms[name].backward()  # type: ignore[no-untyped-call]
        moved = {n for n, p in student.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
        assert any(n.startswith("lateral.") for n in moved), name
        heads = {n.rsplit(".", 1)[0] for n in moved if n.startswith(("head.offset", "head.scale", "head.score"))}
        assert heads == ({reach[name]} if name in reach else set()), name


def test_doubt_about_one_keypoint_changes_what_the_student_hears(data: WindowDataset, ensemble: Ensemble) -> None:
    for weighting, gaussian in itertools.product((("cost",), ("mass",), ("keypoint",)), (True, False)):
        options = GuideOptions(planned_features=0.0, gaussian=gaussian, align=replace(SURE, weighting=weighting))
        _, guidance, _ = told(options, member(7), data, ensemble)
        guidance = replace(
            guidance,
            spread=0 * guidance.spread,
            cov=np.broadcast_to(np.array([1, 0, 1], np.float32), guidance.cov.shape).copy(),
        )
        spread = guidance.spread.copy()
        spread[:, :, 2] += np.array([400.0, 0.0, 400.0], np.float32)
        pulls = []
        for told_of in (guidance, replace(guidance, spread=spread)):
            samples = [data.sample(i) for i in range(4)]
            student = member(7)
            image = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).float()
            pyramid = student.pyramid(image)
            raw = student.raw_votes(pyramid)
            raw.offset.retain_grad()
            terms = guide(options, told_of, student.pyramid_width).terms(
                raw, cell_features(pyramid), assign(samples, 1, 8), told_of, 64
            )
            terms["kd_transport"].backward()  # type: ignore[no-untyped-call]
            assert raw.offset.grad is not None
            pulls.append(raw.offset.grad.square().sum((0, 1, 2, 4)).sqrt().numpy())
        share = [pull / pull.sum() for pull in pulls]
        assert share[1][2] < 0.7 * share[0][2], weighting


def test_guidance_of_other_windows_is_refused(data: WindowDataset, ensemble: Ensemble) -> None:
    samples = [data.sample(i) for i in range(4)]
    guidance = teach(ensemble, samples, 10, 4)
    twice = Guidance.joined([guidance, guidance], [0, 4])
    student = member(0)
    raw = student.raw(torch.zeros(4, 3, 64, 64))
    options = GuideOptions(votes=4, planned_features=0.0)
    with pytest.raises(ValueError, match="cells or objects that the student does not have"):
        strange = replace(guidance, cell=guidance.cell + 1000)
        guide(options, strange, student.pyramid_width).terms(raw, None, assign(samples, 1, 8), strange, 64)
    with pytest.raises(ValueError, match="labels do not have"):
        guide(options, twice, student.pyramid_width).terms(raw, None, assign(samples, 1, 8), twice, 64)


def test_a_narrow_student_gets_a_projection_and_an_equal_one_only_when_asked() -> None:
    def ask(numbers: Sequence[int]) -> Guidance:
        raise AssertionError

    assert "projection" in Guide(GuideOptions(project=False), ask, 16, 64).module
    assert "projection" not in Guide(GuideOptions(project=False), ask, 64, 64).module
    own = Guide(GuideOptions(project=True), ask, 64, 64).module["projection"]
    assert torch.equal(own.weight, torch.eye(64))
    assert len(Guide(GuideOptions(planned_features=0.0), ask, 16, 64).module) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"votes": 0}, "guide.votes"),
        ({"transport": -1.0}, "guide.transport"),
        ({"transport": 0.0}, "guide.planned_features"),
        ({"transport": 0.0, "planned_features": 0.0}, "use ukd train"),
    ],
)
def test_options_that_say_nothing_are_refused(words: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GuideOptions(**words)  # type: ignore[arg-type]


# ---- the cache -------------------------------------------------------------------------------------------------


def test_a_cache_gives_back_what_was_said(data: WindowDataset, ensemble: Ensemble, tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "c", ensemble, data, 20, **CACHE, progress=False)  # type: ignore[arg-type]
    numbers = [3, 17, 3, 20 + 5]
    kept = cache.guidance(numbers)
    said = teach(ensemble, [data.sample(i % 20) for i in numbers], 10, 4)
    for f in fields(Guidance):
        expected = np.clip(getattr(said, f.name), -65504, 65504)  # a half float's largest
        slack = {"xy": 0.07, "features": 1e-3, "score": 1e-3}.get(f.name, 0.02)
        np.testing.assert_allclose(getattr(kept, f.name), expected, rtol=2e-3, atol=slack, err_msg=f.name)
    np.testing.assert_array_equal(kept.window, said.window)
    np.testing.assert_array_equal(kept.cell, said.cell)


def test_an_interrupted_cache_goes_on(
    data: WindowDataset, ensemble: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    open_cache(folder, ensemble, data, 2 * SHARD, **CACHE, progress=False)  # type: ignore[arg-type]
    first, second = sorted(folder.glob("shard-*.npz"))
    whole = [dict(np.load(path)) for path in (first, second)]
    second.unlink()
    asked: list[int] = []
    sample = data.sample

    def asking(index: int) -> TrainingSample:
        asked.append(index)
        return sample(index)

    monkeypatch.setattr(data, "sample", asking)
    open_cache(folder, ensemble, data, 2 * SHARD, **CACHE, progress=False)  # type: ignore[arg-type]
    assert min(asked) == SHARD and len(asked) == SHARD
    for name, array in np.load(second).items():
        np.testing.assert_array_equal(array, whole[1][name])
    second.write_bytes(second.read_bytes()[:200])
    cache = open_cache(folder, ensemble, data, 2 * SHARD, **CACHE, progress=False)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match=r"shard-00001\.npz: cannot be read"):
        cache.guidance([SHARD + 1])


def test_the_cache_of_others_is_refused(data: WindowDataset, ensemble: Ensemble, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    open_cache(folder, ensemble, data, 1, **CACHE, progress=False)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="by other teachers"):
        others = Ensemble(ensemble.networks, identity="others")
        open_cache(folder, others, data, 1, **CACHE, progress=False)  # type: ignore[arg-type]
    for changed in (
        WindowDataset(CubeViews(6), [CUBE], WINDOW, seed=1),
        WindowDataset(CubeViews(5), [CUBE], WINDOW, seed=0),
        WindowDataset(CubeViews(6, seed=1), [CUBE], WINDOW, seed=0),
        WindowDataset(CubeViews(6), [CUBE], replace(WINDOW, rotation_deg=5.0), seed=0),
        WindowDataset(CubeViews(6), [CUBE], replace(WINDOW, augment=AugmentConfig(contrast=0.9)), seed=0),
    ):
        with pytest.raises(CacheError, match="another data set"):
            open_cache(folder, ensemble, changed, 1, **CACHE, progress=False)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="with votes 4, not 5"):
        open_cache(folder, ensemble, data, 1, **{**CACHE, "votes": 5}, progress=False)  # type: ignore[arg-type]
    assert open_cache(
        folder, ensemble, data, 1, **{**CACHE, "features": False}, progress=False  # type: ignore[arg-type]
    ).guidance([0]).features.shape[-1] == 16  # fmt: skip
    stray = tmp_path / "stray"
    stray.mkdir()
    (stray / "holiday.jpg").write_bytes(b"")
    with pytest.raises(CacheError, match=r"no cache\.json"):
        open_cache(stray, ensemble, data, 1, **CACHE, progress=False)  # type: ignore[arg-type]
    (folder / "cache.json").write_text("[]")
    with pytest.raises(CacheError, match="no mapping"):
        open_cache(folder, ensemble, data, 1, **CACHE, progress=False)  # type: ignore[arg-type]


# ---- whole runs ------------------------------------------------------------------------------------------------


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_resuming_gives_the_numbers_of_an_unbroken_run(data: WindowDataset, ensemble: Ensemble, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    whole = distill(TINY, ensemble, data, [CUBE], tmp_path / "whole", cache=cache, progress=False)
    line = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"kd_transport", "kd_scale", "kd_planned", "ray"} <= set(line) and "kd_naive" not in line
    broken = tmp_path / "broken"
    first = distill(TINY, ensemble, data, [CUBE], broken, cache=cache, progress=False, time_budget_s=0.0)
    assert first.step == 1
    kept = load_checkpoint(first.checkpoint)
    del kept.config["guide"]["align"]["covariance"]  # as a run has it that began before there was a choice
    save_checkpoint(first.checkpoint, kept)
    assert distill(TINY, ensemble, data, [CUBE], broken, cache=cache, progress=False, resume=True).finished
    assert losses(broken) == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    one, other = load_checkpoint(whole.checkpoint), load_checkpoint(broken / "checkpoint.pt")
    for name, value in [*one.network.state_dict().items(), *one.extra.items()]:
        there = {**other.network.state_dict(), **other.extra}[name]
        torch.testing.assert_close(there, value, rtol=0, atol=1e-6, msg=name)
    assert not torch.equal(one.extra["projection.weight"], torch.eye(16))  # it has learnt
    plain = replace(TINY, guide=replace(TINY.guide, transport=123.0))
    with pytest.raises(ValueError, match="guide"):
        distill(plain, ensemble, data, [CUBE], broken, cache=cache, progress=False, resume=True)


def test_windows_without_labels_teach_by_the_teachers_alone(
    data: WindowDataset, unlabelled: UnlabelledWindows, ensemble: Ensemble, tmp_path: Path
) -> None:
    mixed = MixedWindows(data, [(unlabelled, 0.5)], 0)
    drawn = [mixed.sample(i).labelled for i in range(16)]
    assert 3 <= sum(drawn) <= 13 and drawn == [mixed.sample(i).labelled for i in range(16)]
    assert mixed.fingerprint() != data.fingerprint()
    assert distill(TINY, ensemble, mixed, [CUBE], tmp_path / "mixed", progress=False).finished
    distill(replace(TINY, steps=1), ensemble, unlabelled, [CUBE], tmp_path / "alone", progress=False)
    line = json.loads((tmp_path / "alone" / "metrics.jsonl").read_text())
    assert line["focal"] == line["ray"] == line["nll"] == 0.0 and line["kd_transport"] > 0.0
    sure = TINY.guide
    expected = (
        sure.transport * line["kd_transport"]
        + sure.scale * line["kd_scale"]
        + sure.planned_features * line["kd_planned"]
    )
    assert line["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_batch_in_which_nothing_is_seen_changes_nothing(unlabelled: UnlabelledWindows, tmp_path: Path) -> None:
    blind = [member(0), member(1)]
    with torch.no_grad():
        for network in blind:
            network.head.score.bias.fill_(-30.0)
    distill(replace(TINY, steps=1), Ensemble(blind), unlabelled, [CUBE], tmp_path / "run", progress=False)
    assert losses(tmp_path / "run") == [0.0]


def test_a_term_that_is_not_finite_is_named(data: WindowDataset, ensemble: Ensemble, tmp_path: Path) -> None:
    def broken(said: Guidance, numbers: Sequence[int]) -> Guidance:
        return replace(said, xy=said.xy * np.float32(np.nan))

    with pytest.raises(TrainingDiverged, match=r"kd_transport.* is not finite; the last good checkpoint"):
        distill(TINY, ensemble, data, [CUBE], tmp_path / "run", heard=broken, progress=False)
    wild = [member(0), member(1)]
    with torch.no_grad():
        wild[0].head.offset.bias.fill_(float("nan"))
    with pytest.raises(TeacherError, match="votes that are not finite"):
        distill(TINY, Ensemble(wild), data, [CUBE], tmp_path / "other", progress=False)


def test_two_processes_take_the_steps_of_one(data: WindowDataset, ensemble: Ensemble, tmp_path: Path) -> None:
    config = replace(TINY, steps=3)
    distill(config, ensemble, data, [CUBE], tmp_path / "one", progress=False)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_distill import *\n"
        "data = WindowDataset(CubeViews(6), [CUBE], WINDOW, seed=0)\n"
        "ensemble = Ensemble([member(seed) for seed in range(3)], identity='three')\n"
        "distill(replace(TINY, steps=3), ensemble, data, [CUBE], Path(sys.argv[2]), progress=False)\n"
    )
    (tmp_path / "run.py").write_text(script)
    root = Path(__file__).parents[2]
    path = f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(Path(__file__).parent), str(tmp_path / "two")],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_a_process_that_sees_nothing_still_has_gradients_to_share(ensemble: Ensemble) -> None:
    """Gradients are summed as one message: a process without objects must send as many numbers as the others."""
    options = GuideOptions()
    student = member(0)
    samples = [WindowDataset(CubeViews(2), [CUBE], WINDOW, seed=0).sample(0)]
    said = teach(ensemble, samples, 10, 10).of_windows(5, 6)
    assert len(said) == 0
    taught = guide(options, said, student.pyramid_width)
    image = torch.zeros(1, 3, 64, 64)
    pyramid = student.pyramid(image)
    terms = taught.terms(student.raw_votes(pyramid), cell_features(pyramid), assign(samples, 1, 8), said, 64)
    sum(terms.values()).backward()  # type: ignore[union-attr, no-untyped-call]
    assert all(p.grad is not None and not p.grad.any() for p in taught.module.parameters())


def test_a_run_goes_on_with_its_own_teachers_only(data: WindowDataset, ensemble: Ensemble, tmp_path: Path) -> None:
    out = tmp_path / "run"
    distill(TINY, ensemble, data, [CUBE], out, cache=tmp_path / "a", progress=False, time_budget_s=0.0)
    with pytest.raises(FileExistsError, match="--resume or choose another folder"):
        distill(TINY, ensemble, data, [CUBE], out, cache=tmp_path / "a", progress=False)
    others = Ensemble(ensemble.networks[:2], identity="two")
    with pytest.raises(ValueError, match="taught by other teachers"):
        distill(TINY, others, data, [CUBE], out, cache=tmp_path / "b", progress=False, resume=True)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("cell", lambda a: -a - 2, "cell is outside"),
        ("class_index", lambda a: a + 1, "class_index is outside"),
        ("xy", lambda a: a[..., :1], "xy has the shape"),
        ("score", lambda a: a * np.nan, "score is not finite"),
        ("spread", lambda a: a.astype(np.int16), "spread is int16"),
        ("window", lambda a: np.int64(3), "cannot be read"),
        ("features", lambda a: np.array(["x"] * len(a)), "cannot be read|features"),
    ],
)
def test_nothing_in_a_shard_is_believed(
    name: str, spoil: Any, said: str, data: WindowDataset, ensemble: Ensemble, tmp_path: Path
) -> None:
    cache = open_cache(tmp_path, ensemble, data, 4, **CACHE, progress=False)  # type: ignore[arg-type]
    path = tmp_path / "shard-00000-4.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, name: spoil(arrays[name])})
    with pytest.raises(CacheError, match=said):
        cache.guidance([0])
    path.write_bytes(b"")
    with pytest.raises(CacheError, match="cannot be read"):
        cache.guidance([0])


def test_a_single_teacher_must_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="two members or more"):
        Ensemble([member(0)])
    alone = Ensemble([member(0)], single=True)
    found = alone.predict(torch.zeros(1, 3, 64, 64))
    assert torch.count_nonzero(found.spread) == 0


def test_an_ensembles_folder_stands_for_its_members(data: WindowDataset, tmp_path: Path) -> None:
    settings = TrainConfig(steps=1, batch_size=4, micro_batch=4, log_every=1, validate_every=0, width_factor=0.25,
                           threads=1, device="cpu", window=WINDOW)  # fmt: skip
    for seed in (0, 1):
        train(replace(settings, seed=seed), data, [CUBE], tmp_path / f"seed-{seed}", progress=False)
    device = torch.device("cpu")
    whole = Ensemble.load([tmp_path], [CUBE], 64, device)
    assert whole.identity == Ensemble.load([tmp_path / "seed-0", tmp_path / "seed-1"], [CUBE], 64, device).identity


def test_the_shipped_settings_are_read() -> None:
    root = Path(__file__).parents[2]
    config = load_config(DistillConfig, root / "config" / "distill_lmo.yaml")
    assert config.guide.transport > 0 and config.keypoints == 12
    with pytest.raises(ValueError, match="unlabelled_share"):
        replace(config, unlabelled_share=1.0)
