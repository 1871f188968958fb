# SPDX-License-Identifier: Apache-2.0
"""The command line: every command's settings, what it says about mistakes, and one part from mesh to pose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ukd_ros.cli import main

COMMANDS = ("render", "train", "export", "calibrate", "evaluate", "infer")
SMALL_SCENES = ["width=160", "height=128", "targets=[1, 2]", "distractors=[0, 1]", "texture_pool=2", "max_lights=1"]
SMALL_NETWORK = ["steps=2", "batch_size=2", "micro_batch=2", "width_factor=0.25", "validate_every=0", "window.size=64"]


@pytest.mark.parametrize("command", [*COMMANDS, "demo"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command == "demo":
        pytest.importorskip("rclpy")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"ukd {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_settings_printed_are_settings_read(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--settings"]) == 0
    printed = capsys.readouterr().out
    assert isinstance(yaml.safe_load(printed), dict)
    (tmp_path / "settings.yaml").write_text(printed)
    assert main([command, "--settings", "--config", str(tmp_path / "settings.yaml")]) == 0
    assert capsys.readouterr().out == printed


def test_the_shipped_settings_are_settings(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("render", "train"):
        files = sorted((repo_root / "config").glob(f"{command}_*.yaml"))
        assert files
        for path in files:
            assert main([command, "--settings", "--config", str(path)]) == 0, path
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["render", "--count", "1"], "--mesh and --out must be given"),
        (["render", "--mesh", "a.stl", "--out", "o", "--count", "1"], "unit"),
        (["render", "--mesh", "a", "--unit", "mm", "--out", "o"], "--count must be given"),
        (
            [
                "render",
                "--mesh",
                "a",
                "--mesh",
                "b",
                "--mesh",
                "c",
                "--unit",
                "mm",
                "--unit",
                "m",
                "--out",
                "o",
                "--count",
                "1",
            ],
            "--unit is given 2 times for 3 meshes",
        ),
        (
            ["render", "--mesh", "a", "--mesh", "b", "--name", "x", "--out", "o", "--count", "1"],
            "--name is given 1 times for 2 meshes",
        ),
        (
            "render --mesh a.ply --mesh b.ply --symmetry z:180 --out o --count 1".split(),
            "--symmetry z:180: write NAME=z:180 with NAME one of a, b",
        ),
        ("render --mesh demo --symmetry z:45 --out o --count 1".split(), "symmetry 'z:45': write an axis"),
        (["train", "--set", "stps=3"], "--set stps: is not a setting; did you mean 'steps'?"),
        (["train", "--set", "steps=0"], "must be at least 1"),
        (["train", "--dataset", "nowhere", "--out", "o"], "nowhere"),
        (["export", "--checkpoint", "nowhere.pt", "--out", "o"], "nowhere.pt"),
        (["calibrate", "--dataset", "d"], "--model must be given"),
        (["evaluate", "--model", "no_such_model", "--dataset", "d"], "no such model"),
        (["evaluate", "--set", "crops=orcale"], "crops"),
        (["infer", "--model", "m", "--image", "a/x.png", "--image", "b/x.png"], "same name"),
        (["infer", "--model", "m", "--image", "a.png"], "the camera is missing"),
        (["infer", "--model", "m", "--image", "a.png", "--fx", "500"], "a.png"),
        (["infer", "--model", "m", "--image", "a.png", "--camera", "c.yaml"], "c.yaml"),
        (["bench", "speed"], "no benchmark 'speed'"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith(f"ukd {words[0]}: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="steps"):
        main(["train", "--set", "steps=0", "--debug"])


@pytest.mark.parametrize(
    "words", [["evaluate", "--name", "driller"], ["train", "--time-budget", "9"], ["render", "--count", "0"], ["fly"]]
)
def test_words_that_cannot_be_read_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert words[-1].strip("-") in capsys.readouterr().err


def test_from_a_mesh_to_a_pose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command does its part on tiny inputs: the files that the next one needs are there and fit."""
    for package in ("torch", "moderngl", "onnx"):
        pytest.importorskip(package)
    data, run, model = (str(tmp_path / name) for name in ("data", "run", "model"))
    words = ["render", "--mesh", "demo", "--out", data, "--count", "4", "--seed", "1", "--workers", "1", "--quiet"]
    assert main([*words, "--preview", "--set", *SMALL_SCENES]) == 0, capsys.readouterr().err
    assert (tmp_path / "data" / "preview.png").is_file()

    words = ["train", "--dataset", data, "--out", run, "--quiet", "--set", *SMALL_NETWORK]
    assert main(words) == 0, capsys.readouterr().err
    assert main(words) == 2, "a run is not trained over"
    assert "--resume" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0

    words = ["export", "--checkpoint", run, "--out", model, "--set", "locate_width=160", "locate_height=128"]
    assert main([*words, "zoom_size=64"]) == 0, capsys.readouterr().err
    assert main(words) == 2, "a model is not overwritten unasked"
    capsys.readouterr()

    image = next((tmp_path / "data").rglob("rgb/*"))
    words = ["infer", "--model", model, "--image", str(image), "--fx", "150", "--out", str(tmp_path / "answers")]
    assert main(words) == 0, capsys.readouterr().err
    answer = json.loads((tmp_path / "answers" / f"{image.stem}.json").read_text())
    assert answer["estimates"] or answer["rejections"]
    assert (tmp_path / "answers" / f"{image.stem}.png").stat().st_size > 1000

    words = ["evaluate", "--model", model, "--dataset", data, "--out", str(tmp_path / "report"), "--quiet"]
    assert main(words) == 0, capsys.readouterr().err
    assert "targets" in capsys.readouterr().out and (tmp_path / "report" / "report.json").is_file()
    assert main(["calibrate", "--model", model, "--dataset", data, "--quiet"]) == 2, "two steps find nothing to fit"
