# SPDX-License-Identifier: Apache-2.0
"""BOP folders: reading any of them lazily (metres out) and writing our own renders (mm on disk, as BOP has it).

Format: https://github.com/thodan/bop_toolkit/blob/master/docs/bop_datasets_format.md
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.data.meshes import load_mesh, object_model
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.object_model import Mesh, ObjectModel, Symmetries, diameter_of
from ukd_ros.geometry.pose import Pose, nearest_rotation
from ukd_ros.geometry.view import LabelledView, ObjectLabel

MM = 1e-3
IMAGE_FOLDERS = ("rgb", "gray")
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg", ".tif")
TARGETS_FILE = "test_targets_bop19.json"
SCENE_FILES = ("scene_gt.json", "scene_gt_info.json", "scene_camera.json")


class BopError(ValueError):
    """A BOP folder cannot be used; the message names the file and the id and says what to do."""


@dataclass(frozen=True)
class BopImage:
    """One image of the data set: where it is and what its ids are."""

    scene_id: int
    image_id: int
    path: Path


@dataclass(frozen=True)
class BopTarget:
    """One line of test_targets_bop19.json: how many instances of an object an image is tested for."""

    scene_id: int
    image_id: int
    object_id: int
    count: int


class BopDataset:
    """Reads a BOP folder; images are decoded when asked for, poses come out in metres.

    `root` is the data set's folder, or with `split` None also one of its split folders or scene folders. `names` maps
    object ids to names; otherwise a name in models_info.json is taken, or "obj_000008".
    """

    def __init__(
        self, root: str | Path, split: str | None = None, names: dict[int, str] | None = None,
        models: str | None = None,
    ) -> None:  # fmt: skip
        """Find the scenes and read their json files; BopError when something is missing or disagrees."""
        root = Path(root)
        if not root.is_dir():
            raise BopError(f"{root}: there is no such folder.")
        self.root, scenes = _find_scenes(root, split)
        self.models_folder = _models_folder(self.root, models)
        self._info = _read_table(self.models_folder / "models_info.json") if self.models_folder is not None else {}
        common = self.root / "camera.json"
        self._common_camera = _read_table(common) if common.is_file() else {}
        self._names = {int(key): str(value.get("name", f"obj_{int(key):06d}")) for key, value in self._info.items()}
        self._names.update(names or {})
        self._scenes: dict[int, dict[str, dict[str, Any]]] = {}
        self._folders: dict[int, Path] = {}
        self.images: tuple[BopImage, ...] = tuple(image for scene in scenes for image in self._open_scene(scene))
        if not self.images:
            raise BopError(f"{root}: holds no images.")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    @property
    def object_ids(self) -> tuple[int, ...]:
        """Return the ids of the known models, ascending."""
        return tuple(sorted(int(key) for key in self._info))

    @property
    def scene_folders(self) -> dict[int, Path]:
        """Return the scenes' folders by scene id."""
        return dict(self._folders)

    def model_facts(self, object_id: int) -> dict[str, Any]:
        """Return an object's entry of models_info.json (mm); BopError when there is none."""
        self.name(object_id)
        return dict(self._info.get(str(object_id), {}))

    def camera_size(self, index: int) -> tuple[int, int] | None:
        """Return width and height that the folder states for image `index`, px: its scene's file or camera.json's.

        camera.json speaks for the images that have its focal length. None where nothing is said.
        """
        entry = self.images[index]
        record = self._scenes[entry.scene_id]["scene_camera.json"][str(entry.image_id)]
        common = self._common_camera
        try:
            if record.get("width") is not None and record.get("height") is not None:
                return int(record["width"]), int(record["height"])
            if not {"width", "height", "fx"} <= common.keys() or not record.get("cam_K"):
                return None
            focal, usual = float(np.asarray(record["cam_K"], dtype=np.float64).reshape(-1)[0]), float(common["fx"])
            same = usual > 0 and abs(focal / usual - 1.0) < 0.01
            return (int(common["width"]), int(common["height"])) if same else None
        except (TypeError, ValueError, AttributeError) as error:
            place = self._folders[entry.scene_id] / "scene_camera.json"
            raise BopError(f"{place} or {self.root / 'camera.json'}: image {entry.image_id}: {error}.") from error

    def name(self, object_id: int) -> str:
        """Return the name of an object; BopError when the data set has no such model."""
        if object_id not in self._names:
            raise BopError(f"{self.root}: object {object_id} is unknown, models_info.json has {list(self._names)}.")
        return self._names[object_id]

    def object_id(self, name: str) -> int:
        """Return the id of a named object; BopError lists the names when there is none."""
        for key, value in self._names.items():
            if value == name:
                return key
        raise BopError(f"{self.root}: no object is called {name!r}; there are {sorted(self._names.values())}.")

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        """Return image `index` [H,W,3] uint8 RGB."""
        path = self.images[index].path
        data = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if data is None:
            raise BopError(f"{path}: cannot be decoded as an image; copy it again.")
        return np.asarray(cv2.cvtColor(data, cv2.COLOR_BGR2RGB), dtype=np.uint8)

    def camera(self, index: int, size: tuple[int, int] | None = None) -> Camera:
        """Return the camera of image `index`; `size` (width, height) saves opening the image to learn it."""
        entry = self.images[index]
        width, height = size if size is not None else self._size(entry)
        record = self._scenes[entry.scene_id]["scene_camera.json"][str(entry.image_id)]
        try:
            K = np.asarray(record.get("cam_K", ()), dtype=np.float64)
        except (TypeError, ValueError, AttributeError):
            K = np.zeros(0)
        if K.size != 9:
            raise BopError(f"{self._folders[entry.scene_id]}/scene_camera.json: image {entry.image_id} has no cam_K.")
        return Camera(width, height, K.reshape(3, 3))

    def labels(self, index: int, masks: bool = True, size: tuple[int, int] | None = None) -> tuple[ObjectLabel, ...]:
        """Return the labelled objects of image `index` (metres), with visible masks where the folder has them.

        `size` (width, height) px tells what is truncated, where scene_camera.json does not (it does in our renders).
        """
        try:
            return self._labels(index, masks, size)
        except (KeyError, TypeError, AttributeError) as error:
            entry = self.images[index]
            raise BopError(
                f"{self._folders[entry.scene_id]}: scene_gt.json or scene_gt_info.json has a malformed entry for image "
                f"{entry.image_id} ({type(error).__name__}: {error}); write it as BOP has it."
            ) from error

    def _labels(self, index: int, masks: bool, size: tuple[int, int] | None) -> tuple[ObjectLabel, ...]:
        entry = self.images[index]
        scene = self._scenes[entry.scene_id]
        truth = scene["scene_gt.json"].get(str(entry.image_id), [])
        info = scene["scene_gt_info.json"].get(str(entry.image_id))
        if info is not None and len(info) != len(truth):
            raise BopError(
                f"{self._folders[entry.scene_id]}: image {entry.image_id} has {len(truth)} poses in scene_gt.json but "
                f"{len(info)} entries in scene_gt_info.json; write them again."
            )
        out = []
        for i, label in enumerate(truth):
            facts = info[i] if info is not None else {}
            mask = self._mask(entry, i) if masks else None
            out.append(
                ObjectLabel(
                    object_name=self.name(int(label["obj_id"])),
                    T_camera_object=_pose_of(label, self._folders[entry.scene_id], entry.image_id),
                    visible_fraction=_share(facts, self._folders[entry.scene_id], entry.image_id),
                    mask=mask,
                    truncated=self._truncated(facts, entry, size),
                )
            )
        return tuple(out)

    def boxes(self, index: int, visible: bool = False) -> npt.NDArray[np.float64]:
        """Return the objects' boxes [N,4] (x, y, w, h) px, whole or visible part; NaN where the folder has none."""
        entry = self.images[index]
        scene = self._scenes[entry.scene_id]
        key = "bbox_visib" if visible else "bbox_obj"
        truth = scene["scene_gt.json"].get(str(entry.image_id), [])
        info = scene["scene_gt_info.json"].get(str(entry.image_id)) or [{}] * len(truth)
        missing = [float("nan")] * 4
        return np.array([facts.get(key, missing) for facts in info], dtype=np.float64).reshape(-1, 4)

    def view(self, index: int, masks: bool = True) -> LabelledView:
        """Return image `index` with its camera and labels."""
        image = self.image(index)
        size = (int(image.shape[1]), int(image.shape[0]))
        entry = self.images[index]
        said = self.camera_size(index)
        if said is not None and said != size:
            raise BopError(
                f"{entry.path}: is {size[0]}x{size[1]}, but the camera of image {entry.image_id} is "
                f"{said[0]}x{said[1]}; its cam_K would be wrong for it."
            )
        labels = self.labels(index, masks, size)
        for label in labels:
            if label.mask is not None and label.mask.shape != image.shape[:2]:
                raise BopError(f"{entry.path}: its mask_visib images are of another size; write them again.")
        return LabelledView(image=image, camera=self.camera(index, size), objects=labels)

    def targets(self) -> tuple[BopTarget, ...]:
        """Return what test_targets_bop19.json asks for, of the images present; BopError when there is no such file."""
        path = self.root / TARGETS_FILE
        rows = _read_json(path)
        present = {(image.scene_id, image.image_id) for image in self.images}
        try:
            out = [BopTarget(int(r["scene_id"]), int(r["im_id"]), int(r["obj_id"]), int(r["inst_count"])) for r in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise BopError(
                f"{path}: must be a list of scene_id, im_id, obj_id, inst_count ({type(error).__name__}: {error})."
            ) from error
        return tuple(t for t in out if (t.scene_id, t.image_id) in present)

    @property
    def has_targets(self) -> bool:
        """Whether a target list speaks for these images: other splits than test number theirs alike."""
        tested = all(folder.parent.name.startswith("test") for folder in self._folders.values())
        return tested and (self.root / TARGETS_FILE).is_file()

    def mesh(self, object_id: int, evaluation: bool = False) -> Mesh:
        """Return an object's mesh in metres; for ``evaluation`` the lighter one of models_eval/ where there is one."""
        if self.models_folder is None:
            raise BopError(f"{self.root}: has no models folder, so there is no mesh of object {object_id}.")
        name = f"obj_{object_id:06d}.ply"
        lighter = self.root / "models_eval" / name
        return load_mesh(lighter if evaluation and lighter.is_file() else self.models_folder / name, "mm")

    def symmetries(self, object_id: int) -> Symmetries:
        """Return an object's symmetries (metres) as models_info.json states them."""
        self.name(object_id)
        return Symmetries.from_bop(self._info.get(str(object_id), {}), MM)

    def object_model(self, object_id: int, keypoints: int = 12, kind: str = "farthest") -> ObjectModel:
        """Return an object's model: mesh, keypoints, diameter, symmetries, in metres."""
        return object_model(self.name(object_id), self.mesh(object_id), keypoints, kind, self.symmetries(object_id))

    def _open_scene(self, folder: Path) -> list[BopImage]:
        scene_id = int(folder.name)
        self._folders[scene_id] = folder
        files = {name: _read_table(folder / name) if (folder / name).is_file() else {} for name in SCENE_FILES}
        self._scenes[scene_id] = files
        images = _image_files(folder)
        for image_id, path in images.items():
            if str(image_id) not in files["scene_camera.json"]:
                raise BopError(f"{folder / 'scene_camera.json'}: has no camera for image {image_id} ({path.name}).")
        known = set(files["scene_gt.json"]) if files["scene_gt.json"] else set()
        absent = sorted(int(key) for key in known if int(key) not in images)
        if absent:
            raise BopError(
                f"{folder}: scene_gt.json labels image {absent[0]} (and {len(absent) - 1} more) that its image folder "
                "does not hold; copy the images or cut the json."
            )
        return [BopImage(scene_id, image_id, path) for image_id, path in sorted(images.items())]

    def _size(self, entry: BopImage) -> tuple[int, int]:
        data = cv2.imread(str(entry.path), cv2.IMREAD_COLOR)
        if data is None:
            raise BopError(f"{entry.path}: cannot be decoded as an image; copy it again.")
        return int(data.shape[1]), int(data.shape[0])

    def _mask(self, entry: BopImage, index: int) -> npt.NDArray[np.bool_] | None:
        folder = self._folders[entry.scene_id] / "mask_visib"
        if not folder.is_dir():
            return None
        path = folder / f"{entry.image_id:06d}_{index:06d}.png"
        mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        if mask is None:
            raise BopError(f"{path}: is missing or cannot be decoded, though mask_visib exists; write it again.")
        return np.asarray(mask > 0, dtype=np.bool_)

    def _truncated(self, facts: dict[str, Any], entry: BopImage, size: tuple[int, int] | None) -> bool:
        box = facts.get("bbox_obj")
        if box is None:
            return False
        record = self._scenes[entry.scene_id]["scene_camera.json"][str(entry.image_id)]
        width, height = size if size is not None else (record.get("width"), record.get("height"))
        beyond = width is not None and height is not None and (box[0] + box[2] > width or box[1] + box[3] > height)
        return bool(box[0] < 0 or box[1] < 0 or beyond)


class BopWriter:
    """Writes rendered images into one scene folder; each image is complete or absent, and known by its record.

    Records wait in `<scene>/.records/`; `finish` merges them into the three scene json files by rename.
    """

    def __init__(self, root: str | Path, split: str = "train", scene_id: int = 0) -> None:
        """Make the folders."""
        self.root = Path(root)
        self.scene = self.root / split / f"{scene_id:06d}"
        for name in ("rgb", "mask_visib", ".records"):
            (self.scene / name).mkdir(parents=True, exist_ok=True)

    def done(self) -> set[int]:
        """Return the ids of the images that are complete."""
        return {int(path.stem) for path in (self.scene / ".records").glob("[0-9]*.json")}

    def write_image(
        self, image_id: int, jpeg: bytes, masks: list[npt.NDArray[np.bool_]], record: dict[str, Any]
    ) -> None:
        """Write one image: pixels first, its record last, all by rename.

        `record` holds the image's entries under "scene_gt", "scene_gt_info" and "scene_camera".
        """
        write_bytes(self.scene / "rgb" / f"{image_id:06d}.jpg", jpeg)
        for i, mask in enumerate(masks):
            ok, png = cv2.imencode(".png", mask.astype(np.uint8) * 255, [cv2.IMWRITE_PNG_COMPRESSION, 1])
            if not ok:
                raise RuntimeError("OpenCV could not encode a mask as PNG.")
            write_bytes(self.scene / "mask_visib" / f"{image_id:06d}_{i:06d}.png", png.tobytes())
        write_bytes(self.scene / ".records" / f"{image_id:06d}.json", json.dumps(record).encode())

    def finish(self, count: int) -> None:
        """Merge the records of images 0 .. count-1 into the scene json files."""
        merged: dict[str, dict[str, Any]] = {"scene_gt": {}, "scene_gt_info": {}, "scene_camera": {}}
        for image_id in range(count):
            record = _read_json(self.scene / ".records" / f"{image_id:06d}.json")
            for name, entries in merged.items():
                entries[str(image_id)] = record[name]
        for name, entries in merged.items():
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
            write_bytes(self.scene / f"{name}.json", ("{\n" + lines + "\n}\n").encode())


def gt_entry(object_id: int, pose: Pose) -> dict[str, Any]:
    """Return one entry of scene_gt.json (mm)."""
    return {
        "cam_R_m2c": [float(v) for v in pose.rotation.reshape(-1)],
        "cam_t_m2c": [float(v) / MM for v in pose.translation],
        "obj_id": object_id,
    }


def model_info(name: str, mesh: Mesh, symmetries: Symmetries | None = None) -> dict[str, Any]:
    """Return one entry of models_info.json (mm); `name` is our addition, BOP's readers skip it."""
    low, size = mesh.vertices.min(axis=0) / MM, np.ptp(mesh.vertices, axis=0) / MM
    out: dict[str, Any] = {"name": name, "diameter": diameter_of(mesh.vertices) / MM}
    for i, axis in enumerate("xyz"):
        out[f"min_{axis}"], out[f"size_{axis}"] = float(low[i]), float(size[i])
    if symmetries is not None:
        out.update(symmetries.to_bop(MM))
    return out


def _pose_of(label: dict[str, Any], folder: Path, image_id: int) -> Pose:
    R = np.asarray(label.get("cam_R_m2c", ()), dtype=np.float64)
    t = np.asarray(label.get("cam_t_m2c", ()), dtype=np.float64)
    if R.size != 9 or t.size != 3:
        raise BopError(f"{folder}/scene_gt.json: image {image_id} has a pose without 9 + 3 numbers.")
    try:
        return Pose(nearest_rotation(R.reshape(3, 3)), t * MM)
    except ValueError as error:
        raise BopError(f"{folder}/scene_gt.json: image {image_id}: {error}") from error


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise BopError(f"{path}: is missing; copy it from the data set.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BopError(f"{path}: is not valid JSON ({error}); copy it again.") from error


def _read_table(path: Path) -> dict[str, Any]:
    """Read a file that must map ids or names to values."""
    content = _read_json(path)
    if not isinstance(content, dict):
        raise BopError(f"{path}: must be a mapping, as BOP has it, not a {type(content).__name__}.")
    return content


def _share(facts: dict[str, Any], folder: Path, image_id: int) -> float:
    """Return the visible fraction, 1 where nothing is said."""
    share = facts.get("visib_fract", 1.0)
    if not isinstance(share, (int, float)) or not np.isfinite(share):
        raise BopError(f"{folder}/scene_gt_info.json: image {image_id} has visib_fract {share!r}, not a number.")
    return float(np.clip(share, 0.0, 1.0))


def _is_scene(folder: Path) -> bool:
    return folder.is_dir() and folder.name.isdigit() and any((folder / name).is_dir() for name in IMAGE_FOLDERS)


def _find_scenes(root: Path, split: str | None) -> tuple[Path, list[Path]]:
    """Return the data set's folder and its scene folders."""
    if split is not None:
        folder = root / split
        scenes = sorted(p for p in folder.iterdir() if _is_scene(p)) if folder.is_dir() else []
        if not scenes:
            raise BopError(f"{folder}: holds no BOP scene (a folder of digits with rgb/ inside).")
        return root, scenes
    if _is_scene(root):
        return root.parent.parent, [root]
    scenes = sorted(p for p in root.iterdir() if _is_scene(p))
    if scenes:
        return root.parent, scenes
    splits = [p for p in sorted(root.iterdir()) if p.is_dir() and any(_is_scene(s) for s in p.iterdir())]
    if len(splits) == 1:
        return root, sorted(p for p in splits[0].iterdir() if _is_scene(p))
    if splits:
        raise BopError(f"{root}: has several splits ({', '.join(p.name for p in splits)}); say which one.")
    raise BopError(
        f"{root}: is no BOP folder: no split with a scene of digits and rgb/ inside was found. Photographs "
        "alone need SPLIT/000000/rgb/000000.png and so on, and cam_K of each in SPLIT/000000/scene_camera.json."
    )


def _models_folder(root: Path, wanted: str | None) -> Path | None:
    for name in (wanted,) if wanted is not None else ("models", "models_eval"):
        if (root / name / "models_info.json").is_file():
            return root / name
    if wanted is not None:
        raise BopError(f"{root / wanted}: has no models_info.json.")
    return None


def _image_files(folder: Path) -> dict[int, Path]:
    images: dict[int, Path] = {}
    for name in IMAGE_FOLDERS:
        place = folder / name
        if place.is_dir():
            for path in place.iterdir():
                if path.suffix.lower() in IMAGE_SUFFIXES and path.stem.isdigit():
                    images[int(path.stem)] = path
            break
    return images
