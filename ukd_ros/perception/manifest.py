# SPDX-License-Identifier: Apache-2.0
"""What model.yaml says, read strictly: every key is known, of the right type, in range, or the error names it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ukd_ros.geometry.arrays import FloatArray, frozen_array
from ukd_ros.geometry.object_model import ObjectModel, Symmetries
from ukd_ros.perception.votes import Calibration

SCHEMA_VERSIONS = (1,)
"""Versions of model.yaml that this release reads; it writes the last."""

OPSET = 11
"""The ONNX opset of every graph: the newest one that OpenCV 4.5 reads completely."""

PREPROCESSING = "RGB 0..255, normalised in the graph"
GRAPHS = ("locate", "zoom")
PROVENANCE_KEYS = ("data", "teacher", "commit", "command", "date")
"""Where a model comes from: these are always there ("unknown" is an answer); others may follow."""

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_SIDE = 4096
_MAX_DIAMETER_M = 100.0


class BundleError(ValueError):
    """A model folder that cannot be used: says which file, which key in it, what is wrong and what to do."""

    def __init__(self, path: Path | str, key: str, message: str) -> None:
        """Compose "<path>: <key>: <message>"; ``key`` may be empty where the whole file is meant."""
        self.path, self.key, self.message = Path(path), key, message
        super().__init__(f"{path}: {key}: {message}" if key else f"{path}: {message}")


@dataclass(frozen=True)
class NetworkManifest:
    """The network that the graphs were exported from.

    architecture: its name in perception/network.py. classes: object names in the order of the class axis.
    keypoints: K, per class. strides: of the levels whose cells vote (px). options: the other fields of its
    configuration, needed by the torch backend only.
    """

    architecture: str
    classes: tuple[str, ...]
    keypoints: int
    strides: tuple[int, ...] = (8, 16, 32)
    options: Mapping[str, Any] = field(default_factory=dict)

    def cells(self, width: int, height: int) -> int:
        """Return N, the number of voting cells for an input of ``width`` x ``height`` px."""
        return sum((width // stride) * (height // stride) for stride in self.strides)


@dataclass(frozen=True)
class GraphSpec:
    """One exported graph: its file in the model folder and the size (px) of the image it takes.

    context: side of the square crop over the longer side of the object's box, as the network was trained with; None
    where the graph sees the whole frame.
    """

    file: str
    width: int
    height: int
    context: float | None = None


@dataclass(frozen=True, eq=False)
class Manifest:
    """The contents of model.yaml; the fields are explained in `Bundle`. files: name to (bytes, sha256)."""

    name: str
    objects: tuple[ObjectModel, ...]
    bounds: tuple[FloatArray, ...]
    network: NetworkManifest
    graphs: Mapping[str, GraphSpec]
    weights: str | None
    calibration: Calibration
    provenance: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]


class _Node:
    """A value in the file together with its place, so that every complaint can name it."""

    def __init__(self, path: Path, key: str, value: Any) -> None:
        self.path, self.key, self.value = path, key, value

    def error(self, message: str) -> BundleError:
        """Return the complaint about this value."""
        return BundleError(self.path, self.key, message)

    def members(self, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, _Node]:
        """Return the members of a mapping with exactly these keys."""
        required = list(required)
        known = [*required, *optional]
        if not isinstance(self.value, dict):
            raise self.error(f"must be a mapping with the keys {', '.join(known)}, not {_shown(self.value)}.")
        for key in self.value:
            if key not in known:
                raise self.error(f"has the unknown key {key!r}; known are {', '.join(known)}. Remove or correct it.")
        for key in required:
            if key not in self.value:
                raise self.error(f"lacks the key {key!r}. Add it, or export the model again with ukd export.")
        return {key: _Node(self.path, f"{self.key}.{key}".lstrip("."), value) for key, value in self.value.items()}

    def items(self, least: int, most: int) -> list[_Node]:
        """Return the entries of a list of ``least`` to ``most``."""
        if not isinstance(self.value, list) or not least <= len(self.value) <= most:
            count = f"{len(self.value)} entries" if isinstance(self.value, list) else _shown(self.value)
            raise self.error(f"must be a list of {least} to {most} entries, not {count}.")
        return [_Node(self.path, f"{self.key}[{index}]", value) for index, value in enumerate(self.value)]

    def text(self, pattern: re.Pattern[str] | None = None, least: int = 1) -> str:
        """Return a text of at least ``least`` characters."""
        if not isinstance(self.value, str) or not least <= len(self.value) <= 10_000:
            raise self.error(f"must be a text, not {_shown(self.value)}.")
        if pattern is not None and not pattern.fullmatch(self.value):
            raise self.error(
                f"must be a plain file name of letters, digits, '.', '_' and '-' inside the model folder, "
                f"not {_shown(self.value)}."
            )
        return self.value

    def whole(self, least: int, most: int) -> int:
        """Return a whole number in range."""
        if type(self.value) is not int or not least <= self.value <= most:
            raise self.error(f"must be a whole number from {least} to {most}, not {_shown(self.value)}.")
        return self.value

    def number(self, least: float, most: float) -> float:
        """Return a finite number in range."""
        if type(self.value) not in (int, float) or not math.isfinite(self.value):
            hint = " (YAML needs 1.0e-5, not 1e-5)" if isinstance(self.value, str) else ""
            raise self.error(f"must be a number, not {_shown(self.value)}{hint}.")
        if not least <= self.value <= most:
            raise self.error(f"must be a number from {least:g} to {most:g}, not {_shown(self.value)}.")
        return float(self.value)

    def array(self, rows: tuple[int, int], columns: int, limit: float) -> FloatArray:
        """Return ``rows[0]`` to ``rows[1]`` rows of ``columns`` numbers within ±limit."""
        out = [[n.number(-limit, limit) for n in row.items(columns, columns)] for row in self.items(*rows)]
        return frozen_array(np.asarray(out, dtype=np.float64).reshape(-1, columns), (None, columns), self.key)

    def plain(self, depth: int = 6) -> Any:
        """Return a value made of texts, finite numbers, truth values, lists and mappings."""
        value = self.value
        if value is None or isinstance(value, bool | str | int):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        if depth and isinstance(value, list):
            return [node.plain(depth - 1) for node in self.items(0, 1000)]
        if depth and isinstance(value, dict) and all(isinstance(key, str) for key in value) and len(value) <= 200:
            return {key: _Node(self.path, f"{self.key}.{key}", item).plain(depth - 1) for key, item in value.items()}
        raise self.error(f"must be text, finite numbers or lists and mappings of them, not {_shown(value)}.")


def _shown(value: Any) -> str:
    """Return a value as it is quoted in a complaint: short."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def parse_manifest(data: Any, path: Path) -> Manifest:
    """Return the manifest that the loaded YAML ``data`` of ``path`` describes; raises BundleError."""
    _check_version(data, path)
    required = ("schema_version", "name", "unit", "objects", "network", "graphs", "preprocessing", "opset")
    top = _Node(path, "", data).members([*required, "calibration", "files", "provenance"], ["weights"])
    if top["unit"].text() != "m":
        raise top["unit"].error(f"must be m (metres), not {top['unit'].text()!r}. Export the model again.")
    if top["preprocessing"].text() != PREPROCESSING:
        raise top["preprocessing"].error(f"must be {PREPROCESSING!r}: no other preprocessing is known.")
    top["opset"].whole(OPSET, OPSET)
    network = _network(top["network"])
    objects, bounds = _objects(top["objects"], network)
    graphs = _graphs(top["graphs"], network)
    files = _files(top["files"])
    weights = top["weights"].text(_FILE_NAME) if "weights" in top else None
    for name in [*(spec.file for spec in graphs.values()), *([weights] if weights else [])]:
        if name not in files:
            raise top["files"].error(f"lacks {name!r}, which the model uses. Export the model again with ukd export.")
    return Manifest(
        name=top["name"].text(_FILE_NAME),
        objects=objects,
        bounds=bounds,
        network=network,
        graphs=graphs,
        weights=weights,
        calibration=_calibration(top["calibration"]),
        provenance=_provenance(top["provenance"]),
        files=files,
    )


def _check_version(data: Any, path: Path) -> None:
    """Raise BundleError unless the schema version is one of ours: before all else, as it explains all else."""
    if not isinstance(data, dict) or "schema_version" not in data:
        raise BundleError(path, "schema_version", "is missing: this is no model of this package. Use ukd export.")
    version = data["schema_version"]
    if version not in SCHEMA_VERSIONS or type(version) is not int:
        known = ", ".join(map(str, SCHEMA_VERSIONS))
        cure = "Export the model again with this release's ukd export"
        if type(version) is int and version > max(SCHEMA_VERSIONS):
            cure = "The model is newer than this package: update ukd_ros, or export the model with this release"
        raise BundleError(path, "schema_version", f"is {_shown(version)}; understood: {known}. {cure}.")


def _network(node: _Node) -> NetworkManifest:
    """Return the section ``network``."""
    members = node.members(["architecture", "classes", "keypoints", "strides"], ["options"])
    classes = tuple(item.text() for item in members["classes"].items(1, 1000))
    if len(set(classes)) != len(classes):
        raise members["classes"].error("names an object twice.")
    strides = tuple(item.whole(1, 256) for item in members["strides"].items(1, 8))
    options = members["options"].plain() if "options" in members else {}
    if not isinstance(options, dict):
        raise members["options"].error("must be a mapping.")
    return NetworkManifest(
        members["architecture"].text(), classes, members["keypoints"].whole(4, 1000), strides, options
    )


def _objects(node: _Node, network: NetworkManifest) -> tuple[tuple[ObjectModel, ...], tuple[FloatArray, ...]]:
    """Return the section ``objects`` as models and their bounding boxes."""
    objects, bounds = [], []
    for item in node.items(len(network.classes), len(network.classes)):
        keys = ["name", "diameter_m", "keypoints_m", "bounds_m"]
        members = item.members(keys, ["symmetries"])
        diameter = members["diameter_m"].number(1e-4, _MAX_DIAMETER_M)
        points = members["keypoints_m"].array((network.keypoints, network.keypoints), 3, _MAX_DIAMETER_M)
        if np.linalg.norm(points[:, None] - points, axis=-1).max() > 1.8 * diameter:
            # The corners of a bounding box are at most sqrt(3) diameters apart.
            raise members["keypoints_m"].error(f"lie far outside the diameter of {diameter} m: a unit is wrong.")
        box = members["bounds_m"].array((2, 2), 3, _MAX_DIAMETER_M)
        if not (box[0] <= box[1]).all():
            raise members["bounds_m"].error("must be the lower corner, then the upper corner.")
        symmetries = _symmetries(members["symmetries"]) if "symmetries" in members else Symmetries()
        try:
            objects.append(ObjectModel(members["name"].text(), points, diameter, symmetries))
        except ValueError as error:
            raise item.error(str(error)) from error
        bounds.append(box)
    names = tuple(model.name for model in objects)
    if names != network.classes:
        expected = ", ".join(network.classes)
        raise node.error(f"are {', '.join(names)}, but network.classes says {expected}: the same in the same order.")
    return tuple(objects), tuple(bounds)


def _symmetries(node: _Node) -> Symmetries:
    """Return an object's symmetries, written as in BOP's models_info.json but in metres."""
    members = node.members([], ["symmetries_discrete", "symmetries_continuous"])
    info: dict[str, Any] = {}
    if "symmetries_discrete" in members:
        rows = members["symmetries_discrete"].array((1, 1000), 16, _MAX_DIAMETER_M)
        info["symmetries_discrete"] = rows.tolist()
    if "symmetries_continuous" in members:
        info["symmetries_continuous"] = []
        for item in members["symmetries_continuous"].items(1, 100):
            parts = item.members(["axis", "offset"])
            vectors = {key: [n.number(-100.0, 100.0) for n in part.items(3, 3)] for key, part in parts.items()}
            info["symmetries_continuous"].append(vectors)
    try:
        return Symmetries.from_bop(info, 1.0)
    except ValueError as error:
        raise node.error(str(error)) from error


def _graphs(node: _Node, network: NetworkManifest) -> dict[str, GraphSpec]:
    """Return the section ``graphs``."""
    graphs = {}
    for name, item in node.members(GRAPHS).items():
        members = item.members(["file", "width", "height"], ["context"])
        width, height = (members[side].whole(1, _MAX_SIDE) for side in ("width", "height"))
        step = max(network.strides)
        for side in ("width", "height"):
            if members[side].value % step:
                raise members[side].error(f"is {members[side].value}, but must be a multiple of {step}.")
        if name == "zoom" and width != height:
            raise item.error(f"is {width}x{height}, but the zoomed crop must be a square.")
        context = members["context"].number(1.0, 10.0) if "context" in members else None
        if (name == "zoom") != (context is not None):
            raise item.error("zoom needs the key 'context', locate must not have it.")
        graphs[name] = GraphSpec(members["file"].text(_FILE_NAME), width, height, context)
    return graphs


def _files(node: _Node) -> dict[str, tuple[int, str]]:
    """Return the section ``files``: size and checksum of everything else in the folder."""
    if not isinstance(node.value, dict) or len(node.value) > 100:
        raise node.error("must be a mapping of file names to their size and sha256.")
    files = {}
    for name, value in node.value.items():
        key = _Node(node.path, node.key, name).text(_FILE_NAME)
        members = _Node(node.path, f"{node.key}.{key}", value).members(["bytes", "sha256"])
        digest = members["sha256"].text()
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise members["sha256"].error("must be 64 hexadecimal digits.")
        files[key] = (members["bytes"].whole(1, 2**40), digest)
    return files


def _calibration(node: _Node) -> Calibration:
    """Return the section ``calibration``, whose keys are the fields of `Calibration`."""
    names = [item.name for item in dataclasses.fields(Calibration)]
    later = [name for name in names if name.startswith("conformal_")]  # models from before there were any lack them
    members = node.members([name for name in names if name not in later], later)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(Calibration):
        if item.name not in members:
            continue
        member = members[item.name]
        if item.name == "modes":
            values[item.name] = [n.number(0.0, math.inf) for n in member.items(4, 4)]
        else:
            values[item.name] = member.plain()
    try:
        return Calibration(**values)
    except (ValueError, TypeError) as error:
        raise node.error(f"{error} Run ukd calibrate again.") from error


def _provenance(node: _Node) -> dict[str, Any]:
    """Return the section ``provenance``."""
    value = node.plain()
    if not isinstance(value, dict):
        raise node.error(f"must be a mapping with at least the keys {', '.join(PROVENANCE_KEYS)}.")
    for key in PROVENANCE_KEYS:
        if not isinstance(value.get(key), str):
            raise node.error(f"needs the key {key!r} with a text ('unknown' where it is).")
    return value


def manifest_data(manifest: Manifest) -> dict[str, Any]:
    """Return plain YAML data; the inverse of `parse_manifest`."""
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSIONS[-1],
        "name": manifest.name,
        "unit": "m",
        "objects": [_object_data(m, b) for m, b in zip(manifest.objects, manifest.bounds, strict=True)],
        "network": {
            "architecture": manifest.network.architecture,
            "classes": list(manifest.network.classes),
            "keypoints": manifest.network.keypoints,
            "strides": list(manifest.network.strides),
            "options": plain_data(manifest.network.options),
        },
        "graphs": {
            name: {key: value for key, value in dataclasses.asdict(spec).items() if value is not None}
            for name, spec in manifest.graphs.items()
        },
        "preprocessing": PREPROCESSING,
        "opset": OPSET,
        "calibration": calibration_data(manifest.calibration),
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in manifest.files.items()},
        "provenance": plain_data(manifest.provenance),
    }
    if manifest.weights is not None:
        data["weights"] = manifest.weights
    return data


def _object_data(model: ObjectModel, bounds: FloatArray) -> dict[str, Any]:
    """Return one entry of ``objects``."""
    data: dict[str, Any] = {
        "name": model.name,
        "diameter_m": model.diameter,
        "keypoints_m": model.keypoints_3d.tolist(),
        "bounds_m": bounds.tolist(),
    }
    symmetries = model.symmetries.to_bop(1.0)
    if symmetries:
        data["symmetries"] = symmetries
    return data


def calibration_data(calibration: Calibration) -> dict[str, Any]:
    """Return the section ``calibration``."""
    return {item.name: plain_data(getattr(calibration, item.name)) for item in dataclasses.fields(Calibration)}


def plain_data(value: Any) -> Any:
    """Return a value as YAML's own types: numpy scalars and arrays, tuples and paths become plain."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain_data(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value
