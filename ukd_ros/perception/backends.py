# SPDX-License-Identifier: Apache-2.0
"""Running the exported network: one small interface, three runtimes (ONNX Runtime, OpenCV's dnn, torch).

This is the only file of the pose node that imports onnxruntime or torch, and it does so when such a backend is opened,
so a robot needs the one runtime that it uses. Every backend gives the same numbers for the same image (tested).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.perception.cells import cell_anchors

if TYPE_CHECKING:
    from ukd_ros.perception.bundle import Bundle
    from ukd_ros.perception.network import KeypointNetwork

logger = logging.getLogger(__name__)

BACKENDS = ("onnxruntime", "opencv", "torch")
"""The backends in the order in which ``auto`` tries them."""

OUTPUTS = ("score", "xy", "scale")
"""Names of the graph's outputs."""

INSTALL = {
    "onnxruntime": "pip install onnxruntime",
    "opencv": "sudo apt install python3-opencv (or pip install opencv-python-headless)",
    "torch": "pip install torch safetensors (or pip install 'ukd_ros[train]')",
}


class BackendError(RuntimeError):
    """A runtime that is missing, refuses the graph, or returned numbers that are not finite."""


class MissingBackendError(BackendError):
    """A runtime that is not installed; the text says how to install it."""


@dataclass(frozen=True, eq=False)
class RawVotes:
    """What the network says about one image: one vote per cell, object class and keypoint.

    ``score`` [N,C] is the confidence 0..1 that the cell sees the class, ``xy`` [N,C,K,2] the keypoints in pixels of the
    network's input, ``scale`` [N,C,K,3] their predicted (sigma_u px, sigma_v px, correlation). ``anchor`` [N] px: the
    apparent size that each cell's level is made for (see `cells.level_share`). All float32, finite.
    """

    score: npt.NDArray[np.float32]
    xy: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    anchor: npt.NDArray[np.float32]


class Backend(Protocol):
    """A loaded graph."""

    name: str
    width: int
    height: int

    def run(self, image: npt.NDArray[np.uint8]) -> RawVotes:
        """Return the votes for one RGB ``image`` [height,width,3] of exactly the graph's size; raise BackendError."""
        ...


def open_backend(kind: str, bundle: Bundle, graph: str, threads: int = 0) -> Backend:
    """Return a running backend for the graph "locate" or "zoom" of a model.

    ``kind`` is one of BACKENDS, or "auto" for the first of them that is installed. ``threads`` limits the cores used; 0
    leaves it to the runtime. Raises BackendError when the runtime is missing or refuses the graph, BundleError when the
    graph's shapes are not those that model.yaml says.
    """
    if kind not in ("auto", *BACKENDS):
        raise BackendError(f"backend: {kind!r} is none of auto, {', '.join(BACKENDS)}.")
    if threads < 0:
        raise BackendError(f"threads: is {threads}, but 0 (the runtime's own choice) or more is needed.")
    missing = []
    for name in BACKENDS if kind == "auto" else (kind,):
        try:
            backend = _OPENERS[name](bundle, graph, threads)
        except ImportError as error:
            missing.append(f"{name} ({error}): {INSTALL[name]}")
            continue
        chosen = " (auto)" if kind == "auto" else ""
        logger.info("The %s graph of model %s runs in %s%s.", graph, bundle.name, backend.name, chosen)
        return backend
    raise MissingBackendError(f"backend {kind}: cannot be imported. Install it, then try again: {'; '.join(missing)}")


class _Runner:
    """What the backends share: the size check, the layout of the input and the checks of what comes out."""

    name: str = ""

    def __init__(self, bundle: Bundle, graph: str) -> None:
        spec = bundle.graphs[graph]
        self.width, self.height = spec.width, spec.height
        self._file = bundle.graph_path(graph)
        votes = (bundle.cells(graph), len(bundle.network.classes))
        keypoints = bundle.network.keypoints
        self._shapes = (votes, (*votes, keypoints, 2), (*votes, keypoints, 3))
        self._anchor = cell_anchors(spec.width, spec.height, bundle.network.strides)
        self._blob = np.zeros((1, 3, spec.height, spec.width), dtype=np.float32)

    def _refuse_shape(
        self, bundle: Bundle, graph: str, name: str, found: Sequence[Any], expected: Sequence[int]
    ) -> None:
        """Raise BundleError unless a declared shape is the one that the manifest implies."""
        if list(found) != list(expected):
            raise bundle.graph_error(
                graph,
                f"{name!r} has the shape {list(found)}, but model.yaml (size, classes, keypoints, strides) implies "
                f"{list(expected)}: graph and manifest are not of one export. Export the model again with ukd export.",
            )

    def _check_dry(self, bundle: Bundle, graph: str, outputs: Sequence[npt.NDArray[np.float32]]) -> None:
        """Raise BundleError unless the outputs of a dry run have the shapes that the manifest implies."""
        for name, output, shape in zip(OUTPUTS, outputs, self._shapes, strict=True):
            self._refuse_shape(bundle, graph, name, output.shape, (1, *shape))

    def _fill(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the image as float32 [1,3,H,W], 0..255; the array is reused by the next call."""
        if image.shape != (self.height, self.width, 3) or image.dtype != np.uint8:
            raise BackendError(
                f"{self._file.name} takes uint8 images [{self.height}, {self.width}, 3], not {image.dtype} "
                f"{list(image.shape)}."
            )
        np.copyto(self._blob[0], image.transpose(2, 0, 1))
        return self._blob

    def _votes(self, outputs: Sequence[npt.NDArray[np.float32]]) -> RawVotes:
        """Return the outputs without the batch axis; BackendError when a number in them is not finite."""
        for name, output in zip(OUTPUTS, outputs, strict=True):
            if not np.isfinite(output).all():
                raise BackendError(
                    f"{self._file} gave NaN or infinity in {name!r} ({self.name}); this frame is dropped. If every "
                    "frame does so the weights are damaged: export the model again, or choose another backend."
                )
        score, xy, scale = (out.reshape(shape) for out, shape in zip(outputs, self._shapes, strict=True))
        return RawVotes(score, xy, scale, self._anchor)

    def _refused(self, error: Exception) -> BackendError:
        """Return the complaint about a graph that a runtime cannot read or run."""
        problem = " ".join(str(error).split())[:500]
        return BackendError(
            f"{self._file}: {self.name} cannot run this graph ({problem}). Update {self.name}, choose another "
            "backend, or export the model again with ukd export."
        )


class OnnxRuntimeBackend(_Runner):
    """ONNX Runtime on the CPU: the quickest."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, graph: str, threads: int = 0) -> None:
        """Open the graph; ImportError when onnxruntime is not installed, else as `open_backend`."""
        import onnxruntime

        super().__init__(bundle, graph)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        # Workers spin between the layers of a frame (a third faster on two cores) and sleep between frames: spinning on
        # would take whole cores from the rest of the robot.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = onnxruntime.InferenceSession(str(self._file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no other base
            raise self._refused(error) from error
        inputs = {item.name: item.shape for item in self._session.get_inputs()}
        outputs = {item.name: item.shape for item in self._session.get_outputs()}
        if set(inputs) != {"image"} or set(outputs) != set(OUTPUTS):
            raise bundle.graph_error(
                graph,
                f"has the inputs {sorted(inputs)} and outputs {sorted(outputs)}, but ['image'] and {sorted(OUTPUTS)} "
                "are needed. Export the model again with ukd export.",
            )
        self._refuse_shape(bundle, graph, "image", inputs["image"], self._blob.shape)
        for name, shape in zip(OUTPUTS, self._shapes, strict=True):
            self._refuse_shape(bundle, graph, name, outputs[name], (1, *shape))

    def run(self, image: npt.NDArray[np.uint8]) -> RawVotes:
        """Return the votes for one image; see `Backend.run`."""
        blob = self._fill(image)
        try:
            outputs = self._session.run(list(OUTPUTS), {"image": blob})
        except Exception as error:  # onnxruntime's exceptions share no other base
            raise self._refused(error) from error
        return self._votes(outputs)


class OpenCvBackend(_Runner):
    """OpenCV's dnn module, 4.5.4 and newer: nothing to install on a robot that has python3-opencv."""

    name = "opencv"

    def __init__(self, bundle: Bundle, graph: str, threads: int = 0) -> None:
        """Open the graph and run it once; ImportError when OpenCV was built without dnn, else as `open_backend`."""
        if not hasattr(cv2, "dnn"):
            raise ImportError("this OpenCV was built without its dnn module")
        super().__init__(bundle, graph)
        if threads:
            cv2.setNumThreads(threads)  # OpenCV knows one number for the whole process
        try:
            self._net = cv2.dnn.readNetFromONNX(str(self._file))
            outputs = self._forward(np.zeros((self.height, self.width, 3), np.uint8))
        except cv2.error as error:
            raise self._refused(error) from error
        # OpenCV tells no declared shapes: what a first run gives is compared instead.
        self._check_dry(bundle, graph, outputs)

    def _forward(self, image: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        """Return copies of the outputs: OpenCV's own arrays are overwritten by the next run."""
        self._net.setInput(self._fill(image), "image")
        return [np.array(output, dtype=np.float32) for output in self._net.forward(list(OUTPUTS))]

    def run(self, image: npt.NDArray[np.uint8]) -> RawVotes:
        """Return the votes for one image; see `Backend.run`."""
        try:
            outputs = self._forward(image)
        except cv2.error as error:
            raise self._refused(error) from error
        return self._votes(outputs)


def torch_network(bundle: Bundle, graph: str = "zoom") -> KeypointNetwork:
    """Return the network of a model folder with its safetensors weights, for torch; needs the packages of ``[train]``.

    Raises BackendError when the folder holds none, and as `Bundle.graph_error` when they are of another network.
    """
    import safetensors.torch

    from ukd_ros.perception.network import KeypointNetwork, NetworkConfig

    if bundle.weights is None:
        raise BackendError(f"{bundle.root}: the model has no torch weights. Choose onnxruntime or opencv.")
    file, manifest = bundle.root / bundle.weights, bundle.network
    options: dict[str, Any] = {
        key: tuple(item) if isinstance(item, list) else item for key, item in manifest.options.items()
    }
    try:
        network = KeypointNetwork(NetworkConfig(manifest.architecture, manifest.classes, manifest.keypoints, **options))
        network.load_state_dict({key: value.float() for key, value in safetensors.torch.load_file(file).items()})
    except (TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise bundle.graph_error(
            graph, f"{file.name} is not a {manifest.architecture} network ({error}). Export the model again."
        ) from error
    return network


class TorchBackend(_Runner):
    """The network itself in eager torch, from the safetensors weights: for development and comparison."""

    name = "torch"

    def __init__(self, bundle: Bundle, graph: str, threads: int = 0) -> None:
        """Build the network; ImportError when torch or safetensors is not installed, else as `open_backend`."""
        import torch

        super().__init__(bundle, graph)
        self._torch = torch
        if threads:
            torch.set_num_threads(threads)
        self._network = torch_network(bundle, graph)
        self._network.eval()
        self._check_dry(bundle, graph, self._forward(np.zeros((self.height, self.width, 3), np.uint8)))

    def _forward(self, image: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        """Return the outputs."""
        with self._torch.inference_mode():
            return [output.numpy() for output in self._network(self._torch.from_numpy(self._fill(image)))]

    def run(self, image: npt.NDArray[np.uint8]) -> RawVotes:
        """Return the votes for one image; see `Backend.run`."""
        return self._votes(self._forward(image))


_OPENERS: dict[str, type[OnnxRuntimeBackend] | type[OpenCvBackend] | type[TorchBackend]] = {
    "onnxruntime": OnnxRuntimeBackend,
    "opencv": OpenCvBackend,
    "torch": TorchBackend,
}
