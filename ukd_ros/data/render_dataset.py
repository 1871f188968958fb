# SPDX-License-Identifier: Apache-2.0
"""Render a whole BOP data set: many processes, resumable, refused when the folder holds another configuration."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from ukd_ros.config import to_mapping
from ukd_ros.data.bop import BopWriter, gt_entry, model_info
from ukd_ros.data.demo_object import DEMO_NAME, demo_mesh
from ukd_ros.data.meshes import load_mesh, write_ply
from ukd_ros.data.scene_renderer import SceneRenderer
from ukd_ros.data.scenes import RenderedScene, SceneConfig
from ukd_ros.data.sensor import jpeg_bytes
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.geometry.declared_symmetry import symmetries_of
from ukd_ros.geometry.object_model import Mesh

logger = logging.getLogger(__name__)

DEMO = "demo"
CHUNK = 8


RENDERER = 3
"""Raised whenever the same settings give other pixels or labels: a folder begun before is not continued."""


class RenderError(RuntimeError):
    """A data set cannot be rendered as asked; the message says what to change."""


@dataclass(frozen=True)
class MeshSource:
    """Where a mesh comes from: a file and its unit, or path "demo" for the demo object.

    `name`, `object_id` and `symmetry` (turns that nobody can tell, see `symmetries_of`) matter for targets only; an
    empty name becomes the file's stem.
    """

    path: str
    unit: str | None = None
    name: str = ""
    object_id: int = 0
    symmetry: tuple[str, ...] = ()

    def load(self) -> Mesh:
        """Return the mesh in metres."""
        return demo_mesh() if self.path == DEMO else load_mesh(self.path, self.unit)

    def label(self) -> str:
        """Return the object's name."""
        return self.name or (DEMO_NAME if self.path == DEMO else Path(self.path).stem)


def render_dataset(
    config: SceneConfig,
    targets: list[MeshSource],
    out: str | Path,
    count: int,
    seed: int = 0,
    distractors: list[MeshSource] | None = None,
    workers: int = 0,
    progress: bool = True,
    split: str = "train",
) -> Path:
    """Render `count` images of the targets into the BOP folder `out` and return it.

    Image i depends on the configuration, `seed` and i only, never on `workers` (0: one per CPU). Complete images are
    kept, so an interrupted run continues and a finished one returns at once; a folder of another configuration is
    refused with RenderError, and so is one that holds more images already. MeshError and RendererError come through.
    """
    out = Path(out)
    if count < 1:
        raise RenderError(f"count: at least one image must be rendered, got {count}.")
    sources = _numbered(targets)
    others = list(distractors or [])
    loaded = _first_look(out, sources, others)
    _claim(out, _description(config, sources, others, seed))
    writer = BopWriter(out, split)
    done = writer.done()
    if done and max(done) >= count:
        raise RenderError(
            f"{out}: holds images up to number {max(done)} already, which --count {count} would leave without labels; "
            f"ask for at least {max(done) + 1}, or use another folder."
        )
    missing = sorted(set(range(count)) - done)
    if not missing and _is_finished(writer, out, count):
        logger.info("%s: all %d images are there already", out, count)
        return out
    if loaded:
        _write_models(out, sources, loaded, config)
    if missing:
        arguments = (config, sources, others, seed, out, split)
        _run(arguments, missing, count, workers, progress)
    writer.finish(count)
    return out


def _numbered(targets: list[MeshSource]) -> list[MeshSource]:
    if not targets:
        raise RenderError("targets: at least one mesh is needed.")
    used: set[int] = set()
    names: set[str] = set()
    out = []
    for i, source in enumerate(targets):
        key = source.object_id or i + 1
        name = source.label()
        if key in used or name in names:
            raise RenderError(f"targets: object id {key} or name {name!r} is given twice.")
        used.add(key)
        names.add(name)
        out.append(replace(source, name=name, object_id=key))
    return out


def _description(config: SceneConfig, targets: list[MeshSource], others: list[MeshSource], seed: int) -> dict[str, Any]:
    """Everything that decides the pixels and the models, in plain types."""
    return {
        "renderer": RENDERER,
        "seed": seed,
        "targets": [_plain(t) for t in targets],
        "distractors": [{"path": d.path, "unit": d.unit} for d in others],
        "scene": to_mapping(config),
    }


def _plain(target: MeshSource) -> dict[str, Any]:
    plain = asdict(target)
    declared = list(plain.pop("symmetry"))
    return plain | ({"symmetry": declared} if declared else {})  # folders from before there was any are resumed


def _first_look(out: Path, targets: list[MeshSource], others: list[MeshSource]) -> list[Mesh]:
    """Load every mesh before a folder is begun, so that a wrong unit leaves nothing behind; [] in one begun before."""
    if (out / "models" / "models_info.json").is_file():
        return []
    for source in others:
        source.load()
    meshes = [source.load() for source in targets]
    for source, mesh in zip(targets, meshes, strict=True):
        try:
            symmetries_of(source.symmetry, mesh)
        except ValueError as error:
            raise RenderError(f"{source.label()}: {error}") from error
    return meshes


def _claim(out: Path, description: dict[str, Any]) -> None:
    """Write render.yaml, or compare with the one that is there."""
    path = out / "render.yaml"
    if path.is_file():
        present = yaml.safe_load(path.read_text(encoding="utf-8"))
        if present != description:
            differing = _difference(present, description)
            raise RenderError(
                f"{path}: this folder was rendered with another {differing}; use another folder, or delete this one."
            )
        return
    if out.exists() and any(out.iterdir()):
        raise RenderError(f"{out}: is not empty and has no render.yaml; give a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(path, yaml.safe_dump(description, sort_keys=False).encode())


def _difference(present: Any, wanted: dict[str, Any]) -> str:
    if not isinstance(present, dict):
        return "configuration"
    for key, value in wanted.items():
        if present.get(key) != value:
            if isinstance(value, dict) and isinstance(present.get(key), dict):
                return f"{key}.{_difference(present[key], value)}"
            return f"{key} ({present.get(key)!r} there, {value!r} asked for)"
    return "configuration"


def _is_finished(writer: BopWriter, out: Path, count: int) -> bool:
    truth = writer.scene / "scene_gt.json"
    if not (truth.is_file() and (out / "models" / "models_info.json").is_file()):
        return False
    with truth.open("rb") as stream:
        return sum(1 for _ in stream) == count + 2  # one line an image and the two braces, see BopWriter.finish


def _write_models(out: Path, targets: list[MeshSource], meshes: list[Mesh], config: SceneConfig) -> None:
    folder = out / "models"
    folder.mkdir(exist_ok=True)
    infos = {}
    for source, mesh in zip(targets, meshes, strict=True):
        write_ply(folder / f"obj_{source.object_id:06d}.ply", mesh, "mm")
        infos[str(source.object_id)] = model_info(source.label(), mesh, symmetries_of(source.symmetry, mesh))
    f = config.width / 2 / np.tan(np.radians(np.mean(config.fov_deg)) / 2)
    K = config.camera_matrix or (f, 0, (config.width - 1) / 2, 0, f, (config.height - 1) / 2, 0, 0, 1)
    camera = {"cx": K[2], "cy": K[5], "depth_scale": 1.0, "fx": K[0], "fy": K[4],
              "height": config.height, "width": config.width}  # fmt: skip
    write_bytes(out / "camera.json", json.dumps(camera, indent=2).encode())
    write_bytes(folder / "models_info.json", json.dumps(infos, indent=2).encode())  # last: it says that all is there


Arguments = tuple[SceneConfig, list[MeshSource], list[MeshSource], int, Path, str]
_state: tuple[SceneRenderer, BopWriter, list[MeshSource], SceneConfig] | None = None


def _start(arguments: Arguments) -> None:
    """Prepare one worker process: one thread each, its own graphics context."""
    global _state
    config, targets, others, seed, out, split = arguments
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer, once
    os.environ.setdefault("LP_NUM_THREADS", "1")  # llvmpipe's own threads would only fight the other workers
    cv2.setNumThreads(1)
    renderer = SceneRenderer(config, [t.load() for t in targets], [d.load() for d in others], seed)
    _state = (renderer, BopWriter(out, split), targets, config)


def _render_chunk(indices: list[int]) -> int:
    if _state is None:
        raise RenderError("the rendering process was not prepared.")
    renderer, writer, targets, config = _state
    for index in indices:
        scene, rng = renderer.render(index)
        jpeg = jpeg_bytes(scene.image, config.sensor, rng)
        writer.write_image(index, jpeg, [i.mask for i in scene.instances], _record(scene, targets))
    return len(indices)


def _record(scene: RenderedScene, targets: list[MeshSource]) -> dict[str, Any]:
    truth, info = [], []
    for instance in scene.instances:
        truth.append(gt_entry(targets[instance.target].object_id, instance.pose))
        whole = instance.silhouette.pixels
        info.append({
            "bbox_obj": list(instance.silhouette.box), "bbox_visib": list(instance.box_visible),
            "px_count_all": whole, "px_count_valid": whole, "px_count_visib": instance.pixels_visible,
            "visib_fract": min(1.0, instance.pixels_visible / whole),
        })  # fmt: skip
    camera = {
        "cam_K": [float(v) for v in scene.camera.matrix.reshape(-1)],
        "depth_scale": 1.0,
        "width": scene.camera.width,
        "height": scene.camera.height,
    }
    return {"scene_gt": truth, "scene_gt_info": info, "scene_camera": camera}


def _chunks(indices: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(indices), CHUNK):
        yield indices[start : start + CHUNK]


def _run(arguments: Arguments, missing: list[int], count: int, workers: int, progress: bool) -> None:
    from ukd_ros.data.progress import Bar

    workers = workers if workers > 0 else (os.cpu_count() or 1)
    workers = min(workers, (len(missing) + CHUNK - 1) // CHUNK)
    with Bar(total=count, initial=count - len(missing), unit="image", disable=not progress, smoothing=0.05) as bar:
        context = multiprocessing.get_context("spawn")  # a forked OpenGL context is undefined
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(arguments,)) as pool:
            try:
                for done in _in_flight(pool, _chunks(missing), 2 * workers):
                    bar.update(done)
            except BrokenProcessPool as error:
                pool.shutdown(wait=False, cancel_futures=True)
                # the initializer's own message was lost in the child: repeat it here, in the open
                _start(arguments)
                raise RenderError("a rendering process died, perhaps for want of memory: try fewer workers.") from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _in_flight(pool: ProcessPoolExecutor, chunks: Iterable[list[int]], limit: int) -> Iterator[int]:
    """Keep at most `limit` chunks queued, so that an interrupt ends quickly, and yield what each one finished."""
    pending: set[Future[int]] = set()
    for chunk in chunks:
        pending.add(pool.submit(_render_chunk, chunk))
        if len(pending) >= limit:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    for future in pending:
        yield future.result()
