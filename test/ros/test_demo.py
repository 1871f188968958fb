# SPDX-License-Identifier: Apache-2.0
"""The demo: its figures by construction, its children's end, and one short run of the real thing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ros.ros_graph import object_model, some_cov, some_pose

from ukd_ros.data.bags import BagReader, BagWriter, bag_truth
from ukd_ros.geometry.object_model import ObjectModel, Symmetries
from ukd_ros.geometry.pose import Pose, exp_so3
from ukd_ros.perception.bundle import BundleError, find_model
from ukd_ros.ros.demo import MODEL, SAMPLE_BAG, DemoError, main, replace_folder
from ukd_ros.ros.demo_plot import PANEL, summary_plot
from ukd_ros.ros.demo_processes import Children, domain_ports, free_domain, is_free
from ukd_ros.ros.demo_report import Answer, Run, Summary, figures, summarise
from ukd_ros.ros.fastdds import share_file
from ukd_ros.ros.messages import CLOUD_DTYPE

LATENCY = {"latency p50 (ms)": "12.00", "latency p95 (ms)": "15.00"}
NOTHING = np.empty(0, dtype=CLOUD_DTYPE)


def run_of(count: int, scale: float = 1.0, turned: Pose | None = None) -> tuple[Run, dict[int, Pose]]:
    """Return answers whose errors are ``scale`` times what their covariance says, each optionally ``turned``."""
    rng = np.random.default_rng(4)
    answers, truth = {}, {}
    for i in range(count):
        pose, cov = some_pose(i), some_cov(i)
        delta = scale * rng.multivariate_normal(np.zeros(6), cov)
        truth[i] = pose.retract(delta) if turned is None else pose.retract(delta) @ turned
        answers[i] = Answer(i, pose, cov, NOTHING)
    return Run(answers, frozenset(answers), LATENCY | {"images received": str(count)}), truth


def summary_of(count: int = 400, scale: float = 1.0, **changes: object) -> Summary:
    run, truth = run_of(count, scale)
    summary = summarise(run, truth, object_model(), sent=count)
    return replace(summary, **{"diameter": 1.0, **changes})  # type: ignore[arg-type]


def test_a_covariance_that_holds_passes_and_one_that_does_not_fails() -> None:
    good = summary_of()
    assert abs(good.coverage - 0.95) < 4.0 * np.sqrt(0.95 * 0.05 / 400) and good.shortcomings() == []
    assert abs(np.mean(good.nees) - 6.0) < 4.0 * np.sqrt(12.0 / 400)
    overconfident = summary_of(scale=2.0)
    assert ["ellipsoids" in s for s in overconfident.shortcomings()] == [True]
    timid = summary_of(scale=0.3)
    assert timid.coverage == 1.0 and "100.0 %" in timid.shortcomings()[0]


def test_unanswered_frames_and_large_errors_fall_short() -> None:
    assert "answered" in summary_of(received=430).shortcomings()[0]
    assert summary_of(received=410).shortcomings() == []
    assert "5 % of the diameter" in summary_of(diameter=0.01).shortcomings()[0]
    nobody = summarise(Run({}, frozenset(), {}), {}, object_model(), sent=3)
    assert len(nobody.shortcomings()) == 2 and "0 answered" in nobody.text()


def test_errors_are_against_the_nearest_symmetric_equal() -> None:
    half_turn = Pose(exp_so3(np.array([0.0, 0.0, np.pi])), np.zeros(3))
    run, truth = run_of(50, turned=half_turn)
    plain = object_model()
    symmetric = ObjectModel(plain.name, plain.keypoints_3d, plain.diameter, Symmetries((half_turn,)))
    assert np.median(summarise(run, truth, plain, 50).rotation_deg) > 170.0
    assert np.median(summarise(run, truth, symmetric, 50).rotation_deg) < 10.0


def test_text_and_figures_say_the_same() -> None:
    summary = summary_of()
    numbers = json.loads(json.dumps(figures(summary)))
    assert f"{1e3 * numbers['median_translation_m']:.2f} mm" in summary.text()
    assert f"{100 * numbers['coverage_95']:.1f} %" in summary.text() and "p50 12.00 ms" in summary.text()
    assert numbers["sent"] == 400 and numbers["shortcomings"] == []


def test_the_plot_shows_four_panels() -> None:
    picture = summary_plot(summary_of(60))
    assert picture.shape == (2 * PANEL[1], 2 * PANEL[0], 3)
    for row in range(2):
        for column in range(2):
            panel = picture[row * PANEL[1] : (row + 1) * PANEL[1], column * PANEL[0] : (column + 1) * PANEL[0]]
            assert len(np.unique(panel.reshape(-1, 3), axis=0)) > 20
    with pytest.raises(ValueError, match="nothing to plot"):
        summary_plot(summarise(Run({}, frozenset(), {}), {}, object_model(), sent=3))


def test_a_domain_in_use_is_not_taken() -> None:
    domain = free_domain()
    assert is_free(domain)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("", domain_ports(domain)[1]))
        assert not is_free(domain)


def test_only_an_earlier_demo_is_overwritten(tmp_path: Path) -> None:
    def made(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "summary.json").write_text("{}", encoding="utf-8")
        return folder

    replace_folder(made("first"), tmp_path / "out")
    replace_folder(made("second"), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(DemoError, match="not overwritten"):
        replace_folder(made("third"), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_children_end_with_the_block_even_when_it_breaks(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Children(dict(os.environ)) as children:
        child = children.start("http.server", ["0", "--bind", "127.0.0.1"], tmp_path / "log")
        raise KeyboardInterrupt
    assert not alive(child.pid)


def test_children_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, sys, time; from pathlib import Path; from ukd_ros.ros.demo_processes import Children\n"
        "with Children(dict(os.environ)) as c:\n"
        f"    p = c.start('http.server', ['0', '--bind', '127.0.0.1'], Path({str(tmp_path / 'log')!r}))\n"
        "    print(p.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 20.0
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(pid)


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path), "--bag", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ukd demo: ") and str(tmp_path) in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def short_bag(tmp_path: Path) -> Path:
    """Return the first 30 images of the shipped bag, with camera_info and truth; skip while none is shipped."""
    try:
        find_model(MODEL)
        sample = share_file(SAMPLE_BAG)
    except (BundleError, FileNotFoundError) as error:
        pytest.skip(f"no demo model or bag yet: {error}")
    with BagReader(sample) as bag, BagWriter(tmp_path / "short") as short:
        first = next(bag.messages()).time_ns
        for message in bag.messages():
            if message.time_ns - first < 2.4e9:
                short.write(message.topic, message.kind, message.time_ns, message.data)
    return tmp_path / "short"


@pytest.mark.slow
def test_the_real_node_answers_the_sample_bag(short_bag: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["--bag", str(short_bag), "--out", str(out), "--rate", "8"])
    numbers = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert numbers["sent"] == 30 and numbers["received"] >= 29
    assert numbers["answered"] >= 0.9 * numbers["received"]
    assert numbers["median_translation_diameters"] < 0.1
    assert len(list(out.glob("overlay_*.png"))) == 8 and (out / "summary.png").stat().st_size > 10_000
    with BagReader(out / "bag") as bag:
        assert bag.counts["/pose_node/keypoints"] >= 29 and bag.counts["/camera/image/compressed"] >= 29
    assert len(bag_truth(out / "bag")["spray_bottle"]) >= 29
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
