# SPDX-License-Identifier: Apache-2.0
"""The model folder: where it is found, how it is checked when it is loaded, and how it is written whole.

Nothing in it is executed: model.yaml is read with a safe loader, the weights are safetensors, and every file is
compared with its checksum before a runtime sees it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import site
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ukd_ros.geometry.arrays import FloatArray, frozen_array
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.perception.manifest import (
    BundleError,
    GraphSpec,
    Manifest,
    NetworkManifest,
    calibration_data,
    manifest_data,
    parse_manifest,
    plain_data,
)
from ukd_ros.perception.votes import Calibration

__all__ = [
    "Bundle",
    "BundleError",
    "GraphSpec",
    "NetworkManifest",
    "find_model",
    "load_bundle",
    "object_bounds",
    "save_bundle",
    "update_calibration",
]

MANIFEST = "model.yaml"
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 30

_HEADER = "# Written by ukd export. Lengths in metres, images in pixels; docs/architecture.md explains the keys.\n"
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, eq=False)
class Bundle:
    """A checked model folder.

    root: the folder. name: the model's. objects: in the order of the class axis, lengths in m.
    bounds: per object [2,3] m, lower and upper corner of its bounding box in its own frame.
    network: what was exported. graphs: "locate" and "zoom". weights: file with the torch weights, or None.
    calibration: how the network's error bars are to be read. provenance: data, teacher, commit, command, date and
    what was measured.
    """

    root: Path
    name: str
    objects: tuple[ObjectModel, ...]
    bounds: tuple[FloatArray, ...]
    network: NetworkManifest
    graphs: Mapping[str, GraphSpec]
    weights: str | None
    calibration: Calibration
    provenance: Mapping[str, Any]

    def graph_path(self, graph: str) -> Path:
        """Return the file of the graph "locate" or "zoom"."""
        return self.root / self.graphs[graph].file

    def cells(self, graph: str) -> int:
        """Return N, the number of voting cells of a graph."""
        return self.network.cells(self.graphs[graph].width, self.graphs[graph].height)

    def graph_error(self, graph: str, message: str) -> BundleError:
        """Return the complaint about the file of a graph."""
        return BundleError(self.graph_path(graph), f"graphs.{graph}", message)


def load_bundle(path: Path | str) -> Bundle:
    """Return the model in a folder, every file and every key of it checked.

    Raises BundleError naming the file, the key and the cure. Takes about 10 ms for a 5 MB model.
    """
    root = Path(path)
    manifest = parse_manifest(_read_yaml(root), root / MANIFEST)
    for name, (size, digest) in manifest.files.items():
        _check_file(root, name, size, digest)
    return Bundle(
        root=root,
        name=manifest.name,
        objects=manifest.objects,
        bounds=manifest.bounds,
        network=manifest.network,
        graphs=manifest.graphs,
        weights=manifest.weights,
        calibration=manifest.calibration,
        provenance=manifest.provenance,
    )


def _read_yaml(root: Path) -> Any:
    """Return the data in a folder's model.yaml."""
    path = root / MANIFEST
    if not root.is_dir():
        raise BundleError(root, "", "is not a folder. Give the folder that holds model.yaml.")
    text = _read_limited(path, MAX_MANIFEST_BYTES)
    try:
        return yaml.load(text.decode("utf-8"), Loader=_Loader)  # noqa: S506 - a safe loader
    except UnicodeDecodeError as error:
        raise BundleError(path, "", f"is not UTF-8 text ({error}). Copy or export the model again.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise BundleError(path, "", f"is not valid YAML ({problem}). Correct it or export the model again.") from error


def _read_limited(path: Path, limit: int) -> bytes:
    """Return a file's bytes; BundleError when it is missing, unreadable or too large."""
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except FileNotFoundError as error:
        raise BundleError(path, "", "does not exist. Copy the whole model folder, or export it again.") from error
    except OSError as error:
        raise BundleError(path, "", f"cannot be read ({error.strerror}). Check its type and permissions.") from error
    if len(data) > limit:
        raise BundleError(path, "", f"is larger than {limit} bytes, the limit. This is no file of a model.")
    return data


def _check_file(root: Path, name: str, size: int, digest: str) -> None:
    """Raise BundleError unless the file is there and has the size and the sha256 that model.yaml gives."""
    path, key = root / name, f"files.{name}"
    if size > MAX_FILE_BYTES:
        raise BundleError(root / MANIFEST, f"{key}.bytes", f"is {size}; at most {MAX_FILE_BYTES} are accepted.")
    cure = "Copy the model folder again (git lfs users: git lfs pull) or export it again."
    try:
        found_size, found_digest = _measured(path, size)
    except FileNotFoundError as error:
        raise BundleError(path, key, f"does not exist. {cure}") from error
    except OSError as error:
        raise BundleError(path, key, f"cannot be read ({error.strerror}). Check its type and permissions.") from error
    if found_size != size:
        found = f"has {found_size} bytes" if found_size < size else f"has more than {size} bytes"
        raise BundleError(path, key, f"{found}, but {MANIFEST} says {size}: truncated or replaced. {cure}")
    if found_digest != digest:
        raise BundleError(path, key, f"does not have the sha256 that {MANIFEST} gives: damaged or replaced. {cure}")


def object_bounds(model: ObjectModel) -> FloatArray:
    """Return the bounding box [2,3] m of an object in its frame: of its mesh, else of its keypoints."""
    points = model.keypoints_3d if model.mesh is None else model.mesh.vertices
    return frozen_array(np.stack([points.min(axis=0), points.max(axis=0)]), (2, 3), "bounds")


def save_bundle(
    root: Path | str,
    *,
    name: str,
    objects: tuple[ObjectModel, ...],
    network: NetworkManifest,
    graphs: Mapping[str, GraphSpec],
    weights: str | None,
    calibration: Calibration,
    provenance: Mapping[str, Any],
    files: Mapping[str, Path],
    overwrite: bool = False,
) -> Bundle:
    """Write a model folder whole and return it loaded: it is complete and checked before it appears under ``root``.

    ``files`` maps the names in the folder to the files to copy. Raises BundleError when ``root`` exists and
    ``overwrite`` is False, when ``root`` holds something that is not a model, or when what was written does not load.
    """
    target = Path(root)
    if target.exists() or target.is_symlink():
        if not overwrite:
            raise BundleError(target, "", "exists already. Choose another name, or allow overwriting (--overwrite).")
        if not (target / MANIFEST).is_file():
            raise BundleError(target, "", f"is not a model folder (it holds no {MANIFEST}), so it is not overwritten.")
    manifest = Manifest(
        name=name,
        objects=objects,
        bounds=tuple(object_bounds(model) for model in objects),
        network=network,
        graphs=graphs,
        weights=weights,
        calibration=calibration,
        provenance=provenance,
        files={file: _measured(source) for file, source in files.items()},
    )
    with _new_folder(target) as folder:
        for file, source in files.items():
            shutil.copyfile(source, folder / file)
        _write_yaml(folder / MANIFEST, manifest_data(manifest))
        load_bundle(folder)
    return load_bundle(target)


def _measured(path: Path, limit: int = MAX_FILE_BYTES) -> tuple[int, str]:
    """Return the size and the sha256 of a file; reading ends soon after ``limit`` bytes. Raises OSError."""
    size, digest = 0, hashlib.sha256()
    with path.open("rb") as stream:
        while size <= limit and (chunk := stream.read(1 << 20)):
            size += len(chunk)
            digest.update(chunk)
    return size, digest.hexdigest()


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that takes ``target``'s place when the block ends well, and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh = work / "new"
        fresh.mkdir()
        yield fresh
        if target.exists():
            os.replace(target, work / "old")
        try:
            os.replace(fresh, target)
        except OSError:
            with suppress(OSError):
                os.replace(work / "old", target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_yaml(path: Path, data: Any) -> None:
    """Write YAML by rename, so that a reader sees the old or the new file, never a part."""
    text = _HEADER + yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with work.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def update_calibration(
    path: Path | str, calibration: Calibration, provenance: Mapping[str, Any] | None = None
) -> Bundle:
    """Replace the calibration in a folder's model.yaml, add to its provenance, and return the model loaded anew.

    What `provenance` calls None is taken out of it.
    Only model.yaml is rewritten, by rename. Raises BundleError, and leaves the folder as it was, when it was not a
    valid model before or would not be one afterwards.
    """
    root = Path(path)
    load_bundle(root)
    data = _read_yaml(root)
    data["calibration"] = calibration_data(calibration)
    told = {**data["provenance"], **dict(provenance or {})}
    data["provenance"] = plain_data({key: value for key, value in told.items() if value is not None})
    parse_manifest(data, root / MANIFEST)
    _write_yaml(root / MANIFEST, data)
    return load_bundle(root)


def model_folders() -> list[Path]:
    """Return the places where installed models are looked for, first the ROS workspace, last the checkout.

    The ament index is the environment variable AMENT_PREFIX_PATH (ament_index_python reads nothing else); then the
    Python environment, the user's packages, and the folder next to this package.
    """
    prefixes = [Path(entry) for entry in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if entry]
    prefixes += [Path(sys.prefix), Path(site.getuserbase())]
    return [*(prefix / "share" / "ukd_ros" / "models" for prefix in prefixes), Path(__file__).parents[2] / "models"]


def find_model(name_or_path: Path | str) -> Path:
    """Return the folder of a model: a path to it, or the name of an installed one.

    Raises BundleError that lists what was searched and which models are there.
    """
    given = Path(name_or_path).expanduser()
    if not str(name_or_path):
        raise BundleError("model", "", "no name or folder is given. Name a model or the folder that holds model.yaml.")
    if (given / MANIFEST).is_file():
        return given
    searched = [given]
    if len(given.parts) == 1 and given.name not in ("", ".", ".."):
        for folder in model_folders():
            if (folder / given / MANIFEST).is_file():
                return folder / given
            searched.append(folder / given)
    places = ", ".join(str(place / MANIFEST) for place in searched)
    names = sorted({found.parent.name for folder in model_folders() for found in folder.glob(f"*/{MANIFEST}")})
    there = f"Installed models: {', '.join(names)}." if names else "No model is installed."
    raise BundleError(given, "", f"no such model; looked for {places}. {there} Make one: ukd train, then ukd export.")
