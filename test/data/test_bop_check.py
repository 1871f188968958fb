# SPDX-License-Identifier: Apache-2.0
"""A faulty BOP folder is refused before any long work starts, with the file and the id."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from ukd_ros.data.bop import BopDataset, BopError, BopWriter, gt_entry, model_info
from ukd_ros.data.bop_check import check_bop
from ukd_ros.data.demo_object import demo_mesh
from ukd_ros.data.meshes import write_ply
from ukd_ros.geometry.pose import Pose

K = [100.0, 0.0, 31.0, 0.0, 101.0, 23.0, 0.0, 0.0, 1.0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images with one object each, its mask, and a target list."""
    root = tmp_path / "set"
    writer = BopWriter(root)
    mask = np.ones((48, 64), bool)
    info = {"bbox_obj": [5, 10, 25, 10], "bbox_visib": [5, 10, 20, 10], "visib_fract": 0.8}
    ok, jpeg = cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))
    assert ok
    for i in range(2):
        pose = gt_entry(4, Pose(np.eye(3), np.array([0.0, 0.0, 1.0])))
        camera = {"cam_K": K, "depth_scale": 1.0, "width": 64, "height": 48}
        record = {"scene_gt": [pose], "scene_gt_info": [info], "scene_camera": camera}
        writer.write_image(i, jpeg.tobytes(), [mask], record)
    writer.finish(2)
    (root / "models").mkdir()
    write_ply(root / "models" / "obj_000004.ply", demo_mesh())
    (root / "models" / "models_info.json").write_text(json.dumps({"4": model_info("bottle", demo_mesh())}))
    target = {"scene_id": 0, "im_id": 1, "obj_id": 4, "inst_count": 1}
    (root / "test_targets_bop19.json").write_text(json.dumps([target]))
    return root


def edited(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def check(folder: Path) -> None:
    check_bop(BopDataset(folder), masks=True, targets=True)


def test_a_sound_folder_passes(folder: Path) -> None:
    check(folder)


def test_the_photographs_pass(lmo_root: Path) -> None:
    check_bop(BopDataset(lmo_root, "test"), range(3), objects=(8,), targets=True)


def test_meshes_in_another_unit_are_refused(folder: Path) -> None:
    edited(folder, "models/models_info.json", lambda info: info["4"].update(diameter=info["4"]["diameter"] / 10))
    with pytest.raises(BopError, match=r"obj_000004\.ply is .* mm across, but models_info\.json says .* mm; BOP"):
        check(folder)


def test_images_of_another_size_are_refused(folder: Path) -> None:
    cv2.imwrite(str(folder / "train/000000/rgb/000001.jpg"), np.zeros((24, 32, 3), np.uint8))
    with pytest.raises(BopError, match=r"000001\.jpg: is 32x24, but the camera of image 1 is 64x48"):
        check(folder)
    (folder / "train/000000/rgb/000001.jpg").write_bytes(b"no picture")
    with pytest.raises(BopError, match=r"000001\.jpg: cannot be read as an image"):
        check(folder)


def test_the_common_camera_speaks_where_the_scene_says_no_size(folder: Path) -> None:
    def forget(cameras: Any) -> None:
        for record in cameras.values():
            del record["width"], record["height"]

    edited(folder, "train/000000/scene_camera.json", forget)
    (folder / "camera.json").write_text(json.dumps({"fx": 100.0, "width": 640, "height": 480}))
    with pytest.raises(BopError, match=r"000000\.jpg: is 64x48, but the camera of image 0 is 640x480"):
        check(folder)
    (folder / "camera.json").write_text(json.dumps({"fx": 800.0, "width": 640, "height": 480}))  # another camera's
    check(folder)


def test_cameras_that_are_none_are_refused(folder: Path) -> None:
    edited(folder, "train/000000/scene_camera.json", lambda cameras: cameras["1"].update(cam_K=[0.0] * 9))
    with pytest.raises(BopError, match=r"scene_camera\.json: image 1"):
        check(folder)
    edited(folder, "train/000000/scene_camera.json", lambda cameras: cameras["1"].update(cam_K=[1.0]))
    with pytest.raises(BopError, match=r"scene_camera\.json: image 1 has no cam_K"):
        check(folder)


def test_ids_that_do_not_match_are_refused(folder: Path) -> None:
    edited(folder, "test_targets_bop19.json", lambda rows: rows[0].update(inst_count=2))
    with pytest.raises(BopError, match="asks for 2 of object 4 in image 1 of scene 0, but scene_gt.json labels 1"):
        check(folder)
    edited(folder, "test_targets_bop19.json", lambda rows: rows[0].update(obj_id=9, inst_count=1))
    check(folder)  # a folder cut down to some of the objects is sound
    edited(folder, "train/000000/scene_gt.json", lambda truth: truth["1"][0].update(obj_id=5))
    with pytest.raises(BopError, match="object 5 is unknown"):
        check(folder)


def test_missing_masks_and_meshes_are_refused(folder: Path) -> None:
    (folder / "train/000000/mask_visib/000001_000000.png").unlink()
    with pytest.raises(BopError, match=r"mask_visib/000001_000000\.png: is missing"):
        check(folder)
    (folder / "train/000000/mask_visib/000000_000000.png").unlink()
    with pytest.raises(BopError, match="mask_visib: is missing"):
        check(folder)
    (folder / "models/obj_000004.ply").unlink()
    with pytest.raises(BopError, match=r"mesh of object 4: .*obj_000004\.ply"):
        check(folder)


def test_another_split_is_not_judged_by_the_test_list(folder: Path) -> None:
    edited(folder, "test_targets_bop19.json", lambda rows: rows[0].update(inst_count=3))
    assert not BopDataset(folder).has_targets  # its split is called train
    (folder / "train").rename(folder / "test_primesense")
    assert BopDataset(folder).has_targets
    with pytest.raises(BopError, match="asks for 3 of object 4"):
        check(folder)
    (folder / "test_primesense/000000/scene_gt.json").unlink()
    (folder / "test_primesense/000000/scene_gt_info.json").unlink()
    with pytest.raises(BopError, match=r"scene_gt\.json: is missing, so there is nothing to compare"):
        check(folder)


def test_an_image_on_its_side_has_the_size_it_is_read_with(folder: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (48, 64)).save(folder / "train/000000/rgb/000001.jpg", exif=tags)
    check(folder)
    assert BopDataset(folder).view(1).image.shape == (48, 64, 3)


@pytest.mark.parametrize(
    "name, change",
    [
        ("train/000000/scene_gt.json", lambda truth: truth["1"][0].pop("obj_id")),
        ("train/000000/scene_gt.json", lambda truth: truth.update({"1": [None]})),
        ("train/000000/scene_gt_info.json", lambda info: info.update({"1": [None]})),
        ("train/000000/scene_gt_info.json", lambda info: info["1"][0].update(visib_fract=None)),
        ("train/000000/scene_gt_info.json", lambda info: info["1"][0].update(visib_fract=float("nan"))),
        ("train/000000/scene_camera.json", lambda cameras: cameras.update({"1": None})),
        ("train/000000/scene_camera.json", lambda cameras: cameras["1"].update(cam_K="none")),
        ("train/000000/scene_camera.json", lambda cameras: cameras["1"].update(width="wide")),
        ("test_targets_bop19.json", lambda rows: rows[0].pop("inst_count")),
    ],
)
def test_malformed_entries_are_named(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    edited(folder, name, change)
    with pytest.raises(BopError, match=name.rpartition("/")[2].replace(".json", "")):
        check(folder)


@pytest.mark.parametrize("name", ["models/models_info.json", "camera.json", "train/000000/scene_gt.json"])
def test_a_list_is_no_mapping(folder: Path, name: str) -> None:
    (folder / name).write_text("[1, 2]")
    with pytest.raises(BopError, match=f"{name.rpartition('/')[2]}: must be a mapping"):
        BopDataset(folder)


def test_a_matrix_may_be_nested(folder: Path) -> None:
    def nest(cameras: Any) -> None:
        for record in cameras.values():
            record["cam_K"] = [K[:3], K[3:6], K[6:]]
            del record["width"], record["height"]

    edited(folder, "train/000000/scene_camera.json", nest)
    (folder / "camera.json").write_text(json.dumps({"fx": 100.0, "width": 64, "height": 48}))
    check(folder)
