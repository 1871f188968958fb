# SPDX-License-Identifier: Apache-2.0
"""An exported model is the trained network, readable by old runtimes, or it does not appear at all."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from perception.exported_models import SMALL, lively_network, objects

from ukd_ros.distillation import export as export_module
from ukd_ros.distillation.checkpoint import Checkpoint, save_checkpoint
from ukd_ros.distillation.export import (
    ExportError,
    ExportOptions,
    ExportReport,
    example_images,
    export_checkpoint,
    export_model,
    torch_votes,
    trained_options,
)
from ukd_ros.perception.backends import open_backend
from ukd_ros.perception.bundle import BundleError, load_bundle


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """Return a small network exported through a checkpoint, in float32."""
    folder = tmp_path_factory.mktemp("export")
    network = lively_network()
    config = {"steps": 9, "window": {"size": 64, "locate_width": 96, "zoom_fill": 0.625}}
    save_checkpoint(folder / "checkpoint.pt", Checkpoint(network, {}, 7, config, objects(1, 5), taught="c0ffee" * 9))
    options = replace(trained_options(config), weights="float32")
    return export_checkpoint(folder / "checkpoint.pt", folder / "part", options, {"data": "noise"})


def test_the_sizes_are_those_of_training(report: ExportReport) -> None:
    graphs = report.bundle.graphs
    assert (graphs["locate"].width, graphs["locate"].height) == (96, 96)  # 4:3 of 96 is 72, rounded up to 32s
    assert (graphs["zoom"].width, graphs["zoom"].context) == (64, 1.6)
    assert trained_options({}) == ExportOptions()


def test_every_runtime_gives_the_trained_networks_votes(report: ExportReport) -> None:
    network = lively_network()
    for graph, spec in report.bundle.graphs.items():
        image = example_images(spec.width, spec.height)[1][::-1].copy()
        votes = open_backend("onnxruntime", report.bundle, graph).run(image)
        expected = torch_votes(network, image)
        assert np.abs(votes.score - expected.score).max() < 1e-5
        assert np.abs(votes.xy - expected.xy).max() < 1e-2
        assert np.allclose(votes.scale, expected.scale, rtol=1e-3, atol=1e-4)
    assert {(item.backend, item.graph) for item in report.differences} == {
        (kind, graph) for kind in ("onnxruntime", "opencv", "torch") for graph in ("locate", "zoom")
    }


def test_the_graph_is_one_that_old_readers_understand(report: ExportReport) -> None:
    for graph in report.bundle.graphs:
        model = onnx.load(str(report.bundle.graph_path(graph)))
        assert {item.domain: item.version for item in model.opset_import} == {"": 11}
        kinds = {node.op_type for node in model.graph.node}
        # What OpenCV 4.5.5 and 4.6.0 were checked to read right; a new one has to be checked there first.
        assert kinds <= {
            *("Add", "Concat", "Conv", "Div", "Exp", "LeakyRelu", "Mul", "Reshape", "Resize", "Sigmoid"),
            *("Slice", "Sub", "Transpose"),
        }
        names = {item.name for item in model.graph.initializer}
        assert names == {item for node in model.graph.node for item in node.input} & names
        assert str(Path(__file__).parents[2]).encode() not in model.SerializeToString()


def test_weights_are_stored_once_per_graph(report: ExportReport) -> None:
    count = sum(parameter.numel() for parameter in lively_network().parameters())
    for graph in report.bundle.graphs:
        constants = onnx.load(str(report.bundle.graph_path(graph))).graph.initializer
        assert sum(int(np.prod(item.dims)) for item in constants) < 1.25 * count


def test_provenance_says_where_it_comes_from(report: ExportReport) -> None:
    provenance = load_bundle(report.bundle.root).provenance
    assert provenance["data"] == "noise" and "an ensemble (identity c0ffeec0ffee)" in provenance["teacher"]
    assert provenance["training"]["steps_done"] == 7
    assert provenance["date"][:2] == "20" and provenance["commit"]
    assert not Path(provenance["command"].split()[0]).is_absolute()


def test_half_precision_weights_are_the_same_network_as_the_graphs(tmp_path: Path) -> None:
    network = lively_network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    report = export_model(network, objects(1, 5), tmp_path / "half", SMALL)
    stored = safetensors.torch.load_file(tmp_path / "half" / "student.safetensors")
    assert {value.dtype for value in stored.values() if value.dim() == 4} == {torch.float16}
    assert {value.dtype for value in stored.values() if value.dim() == 1} == {torch.float32}
    torch_against_itself = [item for item in report.differences if item.backend == "torch"]
    assert all(item.xy_px == 0.0 for item in torch_against_itself)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_a_runtime_that_disagrees_stops_the_export_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export_module.torch_votes

    def shifted(network, image):  # type: ignore[no-untyped-def]
        votes = real(network, image)
        return replace(votes, xy=votes.xy + np.float32(0.1))

    monkeypatch.setattr(export_module, "torch_votes", shifted)
    # The graphs themselves are those of another test; only the comparison is at stake.
    with pytest.raises(ExportError, match=r"disagree with torch.*xy 1\.0e-01 px"):
        export_model(lively_network(), objects(1, 5), tmp_path / "part", SMALL)
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_exported_is_refused_before_work_begins(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="part_0.*classes"):
        export_model(lively_network(), objects(2, 5), tmp_path / "part", SMALL)
    (tmp_path / "there").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        export_model(lively_network(), objects(1, 5), tmp_path / "there", SMALL)
    broken = lively_network()
    with torch.no_grad():
        broken.head.score.weight[0, 0] = float("nan")
    with pytest.raises(ExportError, match="head.score.weight"):
        export_model(broken, objects(1, 5), tmp_path / "part", SMALL)
    with pytest.raises(ValueError, match="zoom_size"):
        ExportOptions(zoom_size=100)
    with pytest.raises(ValueError, match="weights"):
        ExportOptions(weights="int8")
