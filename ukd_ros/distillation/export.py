# SPDX-License-Identifier: Apache-2.0
"""From a trained network to a model folder: two ONNX graphs that every runtime reads alike, the weights and model.yaml.

The graphs are written for the oldest reader that counts, OpenCV 4.5's dnn: opset 11, static shapes, decode grids as
constants, no Identity nodes. Before the folder appears, every installed runtime must give torch's numbers.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import io
import logging
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import onnxslim
import safetensors.torch
import torch
from torch import Tensor

from ukd_ros.distillation.checkpoint import load_checkpoint
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.perception.backends import BACKENDS, OUTPUTS, BackendError, MissingBackendError, RawVotes, open_backend
from ukd_ros.perception.bundle import Bundle, BundleError, GraphSpec, NetworkManifest, load_bundle, save_bundle
from ukd_ros.perception.cells import STRIDES, cell_anchors
from ukd_ros.perception.manifest import OPSET
from ukd_ros.perception.network import KeypointNetwork, cell_count
from ukd_ros.perception.votes import Calibration

logger = logging.getLogger(__name__)

WEIGHTS = "student.safetensors"
MAX_MODEL_BYTES = 5_000_000
"""A model folder larger than this is reported: students are to be shipped in repositories and images."""

SCORE_TOLERANCE = 1e-4
XY_TOLERANCE_PX = 1e-2
SCALE_TOLERANCE = 1e-3
RELATIVE_TOLERANCE = 1e-4
"""How far a runtime may be from torch: score (absolute), xy (px, plus the relative part for cells that vote far outside
of the image), sigma (relative) and correlation (absolute)."""


class ExportError(RuntimeError):
    """A network that cannot be exported, or a runtime that does not give torch's numbers; nothing was written."""


@dataclass(frozen=True)
class ExportOptions:
    """What is exported."""

    name: str = field(default="", metadata={"help": "Name of the model; empty: the folder's name."})
    locate_width: int = field(default=640, metadata={"help": "Width of the whole frame's graph.", "unit": "px"})
    locate_height: int = field(default=480, metadata={"help": "Height of the whole frame's graph.", "unit": "px"})
    zoom_size: int = field(default=256, metadata={"help": "Side of the zoomed crop's graph.", "unit": "px"})
    context: float = field(
        default=1.5,
        metadata={"help": "Side of the zoomed crop over the longer side of the object's keypoint box.", "unit": ""},
    )
    weights: str = field(
        default="float16",
        metadata={"help": "Type of the stored convolution weights: float16 (half the size) or float32."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a model of the same name."})

    def __post_init__(self) -> None:
        """Refuse sizes that no network takes; ValueError names the field."""
        for name in ("locate_width", "locate_height", "zoom_size"):
            value = getattr(self, name)
            if not STRIDES[-1] <= value <= 4096 or value % STRIDES[-1]:
                raise ValueError(f"{name}: is {value}, but a multiple of {STRIDES[-1]} up to 4096 is needed.")
        if not 1.0 <= self.context <= 10.0:
            raise ValueError(f"context: is {self.context}, but 1..10 is needed.")
        if self.weights not in ("float16", "float32"):
            raise ValueError(f"weights: is {self.weights!r}, but float16 or float32 is needed.")


@dataclass(frozen=True)
class Difference:
    """The largest differences from torch of one runtime on one graph: xy in px, sigma relative, the others absolute."""

    backend: str
    graph: str
    score: float
    xy_px: float
    sigma: float
    correlation: float
    agrees: bool

    def __str__(self) -> str:
        """Return one line for the log."""
        return (
            f"{self.graph} in {self.backend}: score {self.score:.1e}, xy {self.xy_px:.1e} px, "
            f"sigma {self.sigma:.1e} (relative), correlation {self.correlation:.1e}"
        )


@dataclass(frozen=True, eq=False)
class ExportReport:
    """What was written: the model, its size (bytes) and how far every installed runtime is from torch."""

    bundle: Bundle
    size: int
    differences: tuple[Difference, ...]


def trained_options(config: Mapping[str, Any]) -> ExportOptions:
    """Return the sizes that a network was trained for, from the training settings kept in its checkpoint.

    The frame's graph is for frames of 4:3; others are letterboxed into it.
    """
    window, default = config.get("window", {}), ExportOptions()
    step = STRIDES[-1]
    width = -(-int(window.get("locate_width", default.locate_width)) // step) * step
    height = -(-width * 3 // (4 * step)) * step
    context = round(1.0 / float(window.get("zoom_fill", 1.0 / default.context)), 3)
    return ExportOptions(
        locate_width=width,
        locate_height=height,
        zoom_size=int(window.get("size", default.zoom_size)),
        context=min(max(context, 1.0), 10.0),
    )


def export_checkpoint(
    checkpoint: Path,
    out_dir: Path,
    options: ExportOptions | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Export the network of a training checkpoint; CheckpointError when it cannot be read, else as `export_model`.

    Without ``options`` the graphs take the sizes that the network was trained for.
    """
    content = load_checkpoint(Path(checkpoint))
    options = options or trained_options(content.config)
    training = {"steps_done": content.step, **content.config}
    # the identity of teachers and windows; what they told the student stands in training.guide
    taught = {"teacher": f"an ensemble (identity {content.taught[:12]})"} if content.taught else {}
    told = {"training": training, **taught, **(provenance or {})}
    return export_model(content.network, content.models, out_dir, options, told)


def export_model(
    network: KeypointNetwork,
    objects: Sequence[ObjectModel],
    out_dir: Path,
    options: ExportOptions | None = None,
    provenance: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> ExportReport:
    """Write a model folder for a network that knows ``objects`` (in the order of its classes, lengths in m).

    ``provenance`` should say "data" and "teacher"; commit, command and date are filled in. The network itself is not
    changed. Raises ExportError when a runtime disagrees with torch, BundleError when the folder is in the way or
    would not load; nothing is written then.
    """
    options, target = options or ExportOptions(), Path(out_dir)
    names = tuple(model.name for model in objects)
    if names != network.config.classes:
        raise ExportError(f"objects: are {names}, but the network's classes are {network.config.classes}.")
    if target.exists() and not options.overwrite:
        raise BundleError(target, "", "exists already. Choose another name, or allow overwriting (--overwrite).")
    frozen = _rounded(network, options.weights)
    graphs = {
        "locate": GraphSpec("locate.onnx", options.locate_width, options.locate_height),
        "zoom": GraphSpec("zoom.onnx", options.zoom_size, options.zoom_size, options.context),
    }
    with tempfile.TemporaryDirectory(prefix="ukd_export_") as folder:
        files = {WEIGHTS: _write_weights(frozen, Path(folder) / WEIGHTS, options.weights)}
        for spec in graphs.values():
            files[spec.file] = write_graph(frozen, spec.width, spec.height, Path(folder) / spec.file)
        parts: dict[str, Any] = {
            "name": options.name or target.name,
            "objects": tuple(objects),
            "network": network_manifest(network),
            "graphs": graphs,
            "weights": WEIGHTS,
            "calibration": calibration or Calibration(),
            "provenance": _provenance(provenance or {}),
            "files": files,
        }
        trial = save_bundle(Path(folder) / "trial", **parts)
        differences = compare_backends(trial, frozen)
        bundle = save_bundle(target, overwrite=options.overwrite, **parts)
    size = sum(path.stat().st_size for path in target.iterdir())
    if size > MAX_MODEL_BYTES:
        logger.warning("%s has %.1f MB, more than the %.0f MB of a student.", target, size / 1e6, MAX_MODEL_BYTES / 1e6)
    return ExportReport(load_bundle(bundle.root), size, differences)


def _rounded(network: KeypointNetwork, weights: str) -> KeypointNetwork:
    """Return a copy for inference in float32 on the CPU whose weights survive being stored as ``weights`` unchanged.

    The graphs are made from the rounded weights too, so graphs and weights are one network.
    """
    frozen = copy.deepcopy(network).cpu().float().eval()
    if weights == "float16":
        with torch.no_grad():
            for parameter in frozen.parameters():
                if parameter.dim() == 4:
                    parameter.copy_(parameter.half().float())
    for name, tensor in frozen.state_dict().items():
        if not torch.isfinite(tensor.float()).all():
            raise ExportError(f"{name}: holds NaN or infinite weights. Export an earlier checkpoint, or train again.")
    return frozen


def _write_weights(network: KeypointNetwork, path: Path, weights: str) -> Path:
    """Write the weights as safetensors; batch norm's stay float32, as their range is not float16's."""
    state = {
        name: (tensor.half() if weights == "float16" and tensor.dim() == 4 else tensor).contiguous()
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }
    safetensors.torch.save_file(state, path)
    return path


def network_manifest(network: KeypointNetwork) -> NetworkManifest:
    """Return what model.yaml says about a network."""
    fields = asdict(network.config)
    named = {key: fields.pop(key) for key in ("architecture", "classes", "keypoints")}
    return NetworkManifest(named["architecture"], tuple(named["classes"]), named["keypoints"], STRIDES, fields)


def write_graph(network: KeypointNetwork, width: int, height: int, path: Path) -> Path:
    """Write a network in inference mode as an ONNX graph for images of one size (px); raises ExportError."""
    network.fix_input(width, height)
    example = torch.full((1, 3, height, width), 128.0)
    # The dynamo exporter writes opset 18, which OpenCV 4 cannot read; the older one warns that it is the older one.
    with (
        tempfile.TemporaryDirectory(prefix="ukd_graph_") as folder,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        raw = Path(folder) / "raw.onnx"
        torch.onnx.export(
            network,
            (example,),
            raw,
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(OUTPUTS),
        )
        # The exporter leaves Identity nodes on shared constants, which OpenCV 4.5 does not read; onnxslim removes them.
        graph = onnxslim.slim(onnx.load(str(raw)))
    _share_constants(graph)
    _check_graph(graph, cell_count(width, height), network)
    path.write_bytes(graph.SerializeToString())
    return path


def _share_constants(graph: onnx.ModelProto) -> None:
    """Store equal constants once: the exporter folds batch norm into the head anew for every level that it serves."""
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    for constant in list(graph.graph.initializer):
        content = onnx.numpy_helper.to_array(constant).tobytes()
        name = first.setdefault((constant.data_type, tuple(constant.dims), content), constant.name)
        if name != constant.name:
            renamed[constant.name] = name
            graph.graph.initializer.remove(constant)
    for node in graph.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)


def _check_graph(graph: onnx.ModelProto, cells: int, network: KeypointNetwork) -> None:
    """Raise ExportError when the exporter did something that an old reader does not understand."""
    onnx.checker.check_model(graph)
    opsets = {item.domain: item.version for item in graph.opset_import}
    if opsets != {"": OPSET}:
        raise ExportError(
            f"The exporter wrote the opsets {opsets}, not {OPSET}. Use the pinned versions of torch and onnx."
        )
    if any(node.op_type == "Identity" for node in graph.graph.node):
        raise ExportError("The graph holds Identity nodes, which OpenCV 4.5 cannot read. Use the pinned onnxslim.")
    classes, keypoints = len(network.config.classes), network.config.keypoints
    expected = {
        "score": [1, cells, classes],
        "xy": [1, cells, classes, keypoints, 2],
        "scale": [1, cells, classes, keypoints, 3],
    }
    for output in graph.graph.output:
        found = [dimension.dim_value for dimension in output.type.tensor_type.shape.dim]
        if found != expected[output.name]:
            raise ExportError(
                f"The graph's {output.name} has the shape {found}, but {expected[output.name]} is expected."
            )


def compare_backends(bundle: Bundle, network: KeypointNetwork) -> tuple[Difference, ...]:
    """Return how far every installed runtime is from ``network`` on both graphs; ExportError when one is too far."""
    truth = {
        graph: [(image, torch_votes(network, image)) for image in example_images(spec.width, spec.height)]
        for graph, spec in bundle.graphs.items()
    }
    differences = []
    for kind in BACKENDS:
        for graph, examples in truth.items():
            try:
                backend = open_backend(kind, bundle, graph)
                pairs = [(backend.run(image), expected) for image, expected in examples]
            except MissingBackendError as error:
                logger.warning("The graphs are not compared in %s: %s", kind, error)
                break
            except BackendError as error:
                raise ExportError(f"The exported model does not run, nothing was written: {error}") from error
            difference = _worst(kind, graph, pairs)
            logger.info("%s", difference)
            differences.append(difference)
    wrong = [str(difference) for difference in differences if not difference.agrees]
    if wrong:
        raise ExportError(f"Runtimes disagree with torch, nothing was written: {'; '.join(wrong)}.")
    return tuple(differences)


def torch_votes(network: KeypointNetwork, image: npt.NDArray[np.uint8]) -> RawVotes:
    """Return torch's votes for an RGB image [H,W,3]."""
    with torch.inference_mode():
        blob: Tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()[None]
        score, xy, scale = (output[0].numpy() for output in network(blob))
    return RawVotes(score, xy, scale, cell_anchors(image.shape[1], image.shape[0]))


def example_images(width: int, height: int) -> list[npt.NDArray[np.uint8]]:
    """Return images [height,width,3] for comparing runtimes: noise and a smooth picture."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    return [noise, smooth]


def _worst(kind: str, graph: str, pairs: Sequence[tuple[RawVotes, RawVotes]]) -> Difference:
    """Return the largest differences over (runtime's, torch's) votes."""
    largest, agrees = np.zeros(4), True
    for found, true in pairs:
        xy = np.abs(found.xy - true.xy)
        errors = np.array(
            [
                np.abs(found.score - true.score).max(),
                xy.max(),
                np.abs(found.scale[..., :2] / true.scale[..., :2] - 1).max(),
                np.abs(found.scale[..., 2] - true.scale[..., 2]).max(),
            ]
        )
        agrees &= bool((errors <= (SCORE_TOLERANCE, np.inf, SCALE_TOLERANCE, SCALE_TOLERANCE)).all())
        agrees &= bool((xy <= XY_TOLERANCE_PX + RELATIVE_TOLERANCE * np.abs(true.xy)).all())
        largest = np.maximum(largest, errors)
    score, position, sigma, correlation = map(float, largest)
    return Difference(kind, graph, score, position, sigma, correlation, agrees)


def _provenance(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the model comes from, completed with the commit, the command and the time."""
    program, *arguments = sys.argv or [""]
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    return {
        "data": "unknown",
        "teacher": "none",
        "commit": _commit(),
        "command": shlex.join([Path(program).name, *arguments]),
        "date": now.isoformat(),
        **given,
    }


def _commit() -> str:
    """Return the checkout's commit, marked when files differ from it; "unknown" outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
