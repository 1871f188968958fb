# SPDX-License-Identifier: Apache-2.0
"""The three runtimes give the same votes, and say what is wrong with a graph before the first frame."""

from __future__ import annotations

import builtins
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from perception.exported_models import export_small

from ukd_ros.perception.backends import BACKENDS, BackendError, MissingBackendError, open_backend
from ukd_ros.perception.bundle import Bundle, BundleError, load_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a small exported model of two classes."""
    return export_small(tmp_path_factory.mktemp("models") / "small", classes=2).bundle


def noise(width: int, height: int, seed: int = 5) -> npt.NDArray[np.uint8]:
    """Return an image unlike those that the export compares."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("graph", ["locate", "zoom"])
def test_all_runtimes_give_the_same_votes(bundle: Bundle, graph: str) -> None:
    spec = bundle.graphs[graph]
    image = noise(spec.width, spec.height)
    votes = [open_backend(kind, bundle, graph, threads=1).run(image) for kind in BACKENDS]
    reference = votes[-1]
    assert reference.score.shape == (bundle.cells(graph), 2)
    assert np.ptp(reference.score) > 0.05 and np.ptp(reference.scale[..., 0]) > 1.0
    for other in votes[:-1]:
        assert np.abs(other.score - reference.score).max() < 1e-5
        assert np.abs(other.xy - reference.xy).max() < 1e-2
        assert np.allclose(other.scale, reference.scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", BACKENDS)
def test_votes_are_not_overwritten_by_the_next_image_and_see_its_channels(bundle: Bundle, kind: str) -> None:
    backend = open_backend(kind, bundle, "zoom")
    image = noise(64, 64)
    first = backend.run(image)
    kept = first.xy.copy()
    second = backend.run(np.ascontiguousarray(image[..., ::-1]))
    assert np.array_equal(first.xy, kept)
    assert np.abs(second.xy - kept).max() > 0.1
    assert np.array_equal(backend.run(image).xy, kept)


@pytest.mark.parametrize("kind", BACKENDS)
def test_an_image_of_another_size_or_type_is_refused(bundle: Bundle, kind: str) -> None:
    backend = open_backend(kind, bundle, "zoom")
    for image in (noise(96, 64), noise(64, 64).astype(np.float32), noise(64, 64)[..., 0]):
        with pytest.raises(BackendError, match=r"\[64, 64, 3\]"):
            backend.run(image)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        {"network": {"keypoints": 6}},
        {"network": {"classes": ("part_0", "part_1", "part_2")}},
        {"graphs": {"width": 128, "height": 128}},
    ],
)
def test_a_graph_that_is_not_the_manifests_is_named(bundle: Bundle, kind: str, change: dict[str, Any]) -> None:
    network, zoom = replace(bundle.network, **change.get("network", {})), bundle.graphs["zoom"]
    zoom = replace(zoom, **change.get("graphs", {}))
    wrong = replace(bundle, network=network, graphs={**bundle.graphs, "zoom": zoom})
    if kind == "torch" and "graphs" in change:
        return  # torch takes any size
    # OpenCV runs a graph of another input size into an error of its own.
    with pytest.raises((BundleError, BackendError), match="zoom.onnx|student.safetensors") as caught:
        open_backend(kind, wrong, "zoom")
    assert "again" in str(caught.value)


def damaged(bundle: Bundle, tmp_path: Path, data: bytes) -> Bundle:
    """Return the model with other bytes in its zoom graph, as if they had passed the checksum."""
    (tmp_path / "zoom.onnx").write_bytes(data)
    return replace(bundle, root=tmp_path)


@pytest.mark.parametrize("kind", ["onnxruntime", "opencv"])
def test_a_file_that_is_no_graph_is_refused(bundle: Bundle, kind: str, tmp_path: Path) -> None:
    whole = bundle.graph_path("zoom").read_bytes()
    for data in (b"no graph", whole[: len(whole) // 2]):
        with pytest.raises(BackendError, match="zoom.onnx"):
            open_backend(kind, damaged(bundle, tmp_path, data), "zoom")


@pytest.mark.parametrize("kind", ["onnxruntime", "opencv"])
def test_numbers_that_are_not_finite_are_an_error_not_a_pose(bundle: Bundle, kind: str, tmp_path: Path) -> None:
    graph = onnx.load(str(bundle.graph_path("zoom")))
    for constant in graph.graph.initializer:
        values = onnx.numpy_helper.to_array(constant)
        if values.ndim == 4 and values.shape[0] == 2 * 5 * 2:  # the convolution that predicts xy
            constant.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(np.nan), constant.name))
    backend = open_backend(kind, damaged(bundle, tmp_path, graph.SerializeToString()), "zoom")
    with pytest.raises(BackendError, match="NaN or infinity in 'xy'"):
        backend.run(noise(64, 64))


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make packages impossible to import."""
    real = builtins.__import__

    def importer(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in names:
            raise ImportError(f"No module named '{name}'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importer)


def test_auto_takes_the_first_that_is_there_and_says_which(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert open_backend("auto", bundle, "zoom").name == "onnxruntime"
    assert "runs in onnxruntime (auto)" in caplog.text
    hide(monkeypatch, "onnxruntime")
    assert open_backend("auto", bundle, "zoom").name == "opencv"
    assert "runs in opencv (auto)" in caplog.text


def test_a_runtime_asked_for_and_missing_is_an_error_with_its_cure(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "onnxruntime", "torch")
    with pytest.raises(MissingBackendError, match="pip install onnxruntime"):
        open_backend("onnxruntime", bundle, "zoom")
    with pytest.raises(MissingBackendError, match="pip install torch"):
        open_backend("torch", bundle, "zoom")
    with pytest.raises(BackendError, match="none of auto"):
        open_backend("tensorrt", bundle, "zoom")
    with pytest.raises(BackendError, match="threads"):
        open_backend("auto", bundle, "zoom", threads=-1)


def test_a_robot_needs_neither_torch_nor_onnxruntime_for_opencv(bundle: Bundle) -> None:
    program = (
        "import sys, numpy\n"
        "from ukd_ros.perception.backends import open_backend\n"
        "from ukd_ros.perception.bundle import load_bundle\n"
        f"backend = open_backend('opencv', load_bundle({str(bundle.root)!r}), 'zoom')\n"
        "backend.run(numpy.zeros((64, 64, 3), numpy.uint8))\n"
        "print([name for name in ('torch', 'onnxruntime', 'scipy', 'onnx') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=root)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_loading_again_gives_the_same_model(bundle: Bundle) -> None:
    again = load_bundle(bundle.root)
    assert again.graphs == bundle.graphs and again.network == bundle.network
