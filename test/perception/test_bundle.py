# SPDX-License-Identifier: Apache-2.0
"""A model folder is read strictly, written whole, and found where it should be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ukd_ros.geometry.object_model import ObjectModel, Symmetries
from ukd_ros.geometry.pose import Pose, exp_so3
from ukd_ros.perception.bundle import (
    Bundle,
    BundleError,
    GraphSpec,
    NetworkManifest,
    find_model,
    load_bundle,
    save_bundle,
    update_calibration,
)
from ukd_ros.perception.votes import Calibration

CORNERS = 0.05 * np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
TURN = Pose(exp_so3(np.array([0.0, 0.0, np.pi])), np.array([0.0, 0.0, 0.001]))
OBJECTS = (
    ObjectModel("cube", CORNERS, 0.18),
    ObjectModel(
        "wheel", 0.5 * CORNERS, 0.09, Symmetries((TURN,), ((np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.01, 0.0])),))
    ),
)
CALIBRATION = Calibration(1.7, 0.25, np.array([0.1, 0.2, 0.0, 1e-7]), views=100, instances=80)


def save(root: Path, source: Path, **changes: Any) -> Bundle:
    """Save a model whose graphs are a few bytes."""
    source.mkdir(exist_ok=True)
    files = {}
    for name in ("locate.onnx", "zoom.onnx", "student.safetensors"):
        (source / name).write_bytes(f"bytes of {name}".encode())
        files[name] = source / name
    parts: dict[str, Any] = {
        "name": "parts",
        "objects": OBJECTS,
        "network": NetworkManifest(
            "lean", ("cube", "wheel"), 8, options={"width_factor": 1.0, "mean": (1.0, 2.0, 3.0)}
        ),
        "graphs": {"locate": GraphSpec("locate.onnx", 640, 480), "zoom": GraphSpec("zoom.onnx", 128, 128, 1.4)},
        "weights": "student.safetensors",
        "calibration": CALIBRATION,
        "provenance": {"data": "renders", "teacher": "none", "commit": "abc", "command": "ukd export", "date": "today"},
        "files": files,
    }
    return save_bundle(root, **{**parts, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a saved model."""
    save(tmp_path / "models" / "parts", tmp_path / "source")
    return tmp_path / "models" / "parts"


def test_what_is_saved_is_loaded(folder: Path) -> None:
    bundle = load_bundle(folder)
    for model, original in zip(bundle.objects, OBJECTS, strict=True):
        assert model.name == original.name and model.diameter == original.diameter
        assert np.array_equal(model.keypoints_3d, original.keypoints_3d)
    wheel = bundle.objects[1].symmetries
    assert np.allclose(wheel.discrete[0].matrix(), TURN.matrix(), atol=1e-12)
    assert np.allclose(wheel.continuous[0][1], [0, 0.01, 0])
    assert np.allclose(bundle.bounds[0], [[-0.05] * 3, [0.05] * 3])
    assert bundle.graphs["zoom"] == GraphSpec("zoom.onnx", 128, 128, 1.4)
    assert bundle.cells("locate") == 80 * 60 + 40 * 30 + 20 * 15
    assert np.array_equal(bundle.calibration.modes, CALIBRATION.modes)
    assert (bundle.calibration.block_factor, bundle.calibration.instances) == (1.7, 80)
    assert bundle.network.options["mean"] == [1.0, 2.0, 3.0]
    assert bundle.provenance["data"] == "renders"


Edit = Callable[[dict[str, Any]], None]


def put(*path: Any) -> Edit:
    """Return an edit that sets the value at a path (the last argument) in the YAML data."""
    *keys, last, value = path

    def edit(data: dict[str, Any]) -> None:
        node: Any = data
        for key in keys:
            node = node[key]
        node[last] = value

    return edit


def drop(*path: Any) -> Edit:
    """Return an edit that removes the key at a path."""
    *keys, last = path

    def edit(data: dict[str, Any]) -> None:
        node: Any = data
        for key in keys:
            node = node[key]
        del node[last]

    return edit


NAN = float("nan")


@pytest.mark.parametrize(
    ("edit", "key", "words"),
    [
        (put("schema_version", 2), "schema_version", "understood: 1.*update ukd_ros"),
        (put("schema_version", 0), "schema_version", "Export the model again"),
        (put("schema_version", True), "schema_version", "understood"),
        (drop("schema_version"), "schema_version", "missing"),
        (put("colour", "red"), "", "unknown key 'colour'"),
        (drop("network"), "", "lacks the key 'network'"),
        (put("unit", "mm"), "unit", "metres"),
        (put("opset", 18), "opset", "11"),
        (put("preprocessing", "BGR"), "preprocessing", "RGB"),
        (put("objects", []), "objects", "2 to 2 entries"),
        (put("objects", 0, "keypoints_m", 3, 1, NAN), "objects[0].keypoints_m[3][1]", "number"),
        (put("objects", 0, "keypoints_m", 3, [0.0, 0.0]), "objects[0].keypoints_m[3]", "3 to 3 entries"),
        (put("objects", 0, "keypoints_m", [[0.0] * 3] * 7), "objects[0].keypoints_m", "8 to 8 entries, not 7"),
        (put("objects", 0, "keypoints_m", [[5.0 * i] * 3 for i in range(8)]), "objects[0].keypoints_m", "unit is"),
        (put("objects", 0, "diameter_m", 0.05), "objects[0].keypoints_m", "unit is wrong"),
        (put("objects", 0, "diameter_m", -0.1), "objects[0].diameter_m", "from"),
        (put("objects", 0, "diameter_m", "1e-1"), "objects[0].diameter_m", "1.0e-5, not 1e-5"),
        (put("objects", 0, "diameter_m", True), "objects[0].diameter_m", "number"),
        (put("objects", 1, "name", "cube"), "objects", "network.classes"),
        (put("objects", 0, "bounds_m", 0, [1.0, 1.0, 1.0]), "objects[0].bounds_m", "lower corner"),
        (put("objects", 1, "symmetries", "symmetries_discrete", [[2.0] * 16]), "objects[1].symmetries", "rotation"),
        (put("network", "keypoints", 12), "objects[0].keypoints_m", "12 to 12"),
        (put("network", "keypoints", 3), "network.keypoints", "4"),
        (put("network", "classes", ["cube", "cube"]), "network.classes", "twice"),
        (put("graphs", "locate", "width", 650), "graphs.locate.width", "multiple of 32"),
        (put("graphs", "locate", "width", 640.0), "graphs.locate.width", "whole number"),
        (put("graphs", "zoom", "height", 160), "graphs.zoom", "square"),
        (drop("graphs", "zoom", "context"), "graphs.zoom", "context"),
        (put("graphs", "zoom", "file", "../zoom.onnx"), "graphs.zoom.file", "inside the model folder"),
        (put("graphs", "zoom", "file", "/etc/passwd"), "graphs.zoom.file", "inside the model folder"),
        (put("graphs", "zoom", "file", "other.onnx"), "files", "other.onnx"),
        (put("weights", ".."), "weights", "inside the model folder"),
        (put("calibration", "block_factor", 0.0), "calibration", "block_factor"),
        (put("calibration", "modes", [0.1, 0.1, 0.1]), "calibration.modes", "4 to 4"),
        (put("calibration", "modes", 0, float("inf")), "calibration.modes[0]", "number"),
        (drop("calibration", "vote_correlation"), "calibration", "vote_correlation"),
        (put("files", "zoom.onnx", "bytes", 3), "files.zoom.onnx", "more than 3 bytes"),
        (put("files", "zoom.onnx", "bytes", 2**35), "files.zoom.onnx.bytes", "at most"),
        (put("files", "zoom.onnx", "sha256", "0" * 64), "files.zoom.onnx", "sha256"),
        (put("files", "zoom.onnx", "sha256", "zz"), "files.zoom.onnx.sha256", "hexadecimal"),
        (put("provenance", "accuracy", NAN), "provenance.accuracy", "finite"),
        (drop("provenance", "commit"), "provenance", "commit"),
        (put("provenance", []), "provenance", "mapping"),
    ],
)
def test_every_wrong_entry_is_named_with_its_file(folder: Path, edit: Edit, key: str, words: str) -> None:
    path = folder / "model.yaml"
    data = yaml.safe_load(path.read_text())
    edit(data)
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(BundleError, match=words) as caught:
        load_bundle(folder)
    assert caught.value.key == key
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "schema_version"),
        (b"just text", "schema_version"),
        (b"a: [1, 2", "not valid YAML"),
        (b"\xff\xfe\x00", "not UTF-8|not valid YAML"),
        (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
        (b"#" * (2 << 20), "larger than"),
    ],
)
def test_a_manifest_that_is_no_yaml_of_ours_is_refused(folder: Path, content: bytes, words: str) -> None:
    (folder / "model.yaml").write_bytes(content)
    with pytest.raises(BundleError, match=words):
        load_bundle(folder)


def test_truncated_replaced_and_missing_files_are_named(folder: Path) -> None:
    graph = folder / "zoom.onnx"
    original = graph.read_bytes()
    graph.write_bytes(original[:-3])
    with pytest.raises(BundleError, match=rf"zoom.onnx.*has {len(original) - 3} bytes.*truncated"):
        load_bundle(folder)
    graph.write_bytes(original[:-1] + b"?")
    with pytest.raises(BundleError, match="zoom.onnx.*sha256.*damaged"):
        load_bundle(folder)
    graph.unlink()
    with pytest.raises(BundleError, match="zoom.onnx.*does not exist"):
        load_bundle(folder)
    graph.mkdir()
    with pytest.raises(BundleError, match="zoom.onnx.*cannot be read"):
        load_bundle(folder)


def test_folders_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a folder"):
        load_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"model.yaml.*does not exist"):
        load_bundle(tmp_path)


def test_a_model_is_overwritten_only_when_asked_and_nothing_is_left_beside_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="exists already"):
        save(folder, tmp_path / "source", name="other")
    assert load_bundle(folder).name == "parts"
    assert save(folder, tmp_path / "source", name="other", overwrite=True).name == "other"
    assert os.listdir(folder.parent) == ["parts"]
    other = tmp_path / "models" / "photos"
    other.mkdir()
    (other / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(BundleError, match="not a model folder"):
        save(other, tmp_path / "source", overwrite=True)
    assert (other / "holiday.jpg").exists()


def test_a_model_that_would_not_load_never_appears(folder: Path, tmp_path: Path) -> None:
    new = folder.parent / "new"
    bad = NetworkManifest("lean", ("cube", "bolt"), 8)
    with pytest.raises(BundleError, match="network.classes"):
        save(new, tmp_path / "source", network=bad)
    with pytest.raises(BundleError, match="network.classes"):
        save(folder, tmp_path / "source", network=bad, overwrite=True)
    assert os.listdir(folder.parent) == ["parts"]
    assert load_bundle(folder).name == "parts"


def test_a_new_calibration_changes_the_manifest_only(folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "model.yaml"}
    fitted = Calibration(2.5, 0.5, np.array([0.0, 1.0, 2.0, 3.0]), views=7, instances=9)
    bundle = update_calibration(folder, fitted, {"calibration": {"coverage": np.float64(0.95)}})
    assert bundle.calibration.block_factor == 2.5
    assert bundle.calibration.modes.tolist() == [0, 1, 2, 3]
    assert bundle.provenance["calibration"] == {"coverage": 0.95}
    assert bundle.provenance["data"] == "renders"
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "model.yaml"} == before
    with pytest.raises(BundleError, match="finite"):
        update_calibration(folder, CALIBRATION, {"calibration": NAN})
    assert load_bundle(folder).calibration.block_factor == 2.5
    assert sorted(os.listdir(folder)) == sorted([*before, "model.yaml"])


def test_models_are_found_by_path_ament_prefix_and_checkout(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_model(folder) == folder
    workspace = tmp_path / "install"
    installed = workspace / "share" / "ukd_ros" / "models"
    installed.parent.mkdir(parents=True)
    installed.symlink_to(folder.parent)  # colcon build --symlink-install
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match="no such model") as caught:
        find_model("parts")
    assert "ukd_ros/models/parts" in str(caught.value)
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"{tmp_path / 'underlay'}{os.pathsep}{workspace}")
    assert load_bundle(find_model("parts")).name == "parts"
    with pytest.raises(BundleError, match="Installed models: .*parts"):
        find_model("prats")
    for name in ("..", "", "a/../b"):
        with pytest.raises(BundleError):
            find_model(name)


def test_a_model_in_the_working_directory_comes_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path))
    monkeypatch.chdir(folder.parent)
    assert find_model("parts") == Path("parts")
