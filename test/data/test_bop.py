# SPDX-License-Identifier: Apache-2.0
"""BOP folders: what is written reads back in metres, LM-O reads as published, and broken folders are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from ukd_ros.data.bop import BopDataset, BopError, BopWriter, gt_entry, model_info
from ukd_ros.data.demo_object import demo_mesh
from ukd_ros.data.meshes import write_ply
from ukd_ros.geometry.object_model import Symmetries
from ukd_ros.geometry.pose import Pose, exp_so3

K = [100.0, 0.0, 31.0, 0.0, 101.0, 23.0, 0.0, 0.0, 1.0]


def poses() -> list[Pose]:
    rng = np.random.default_rng(3)
    return [Pose(exp_so3(rng.normal(size=3)), rng.normal(size=3) + [0, 0, 2]) for _ in range(4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    writer = BopWriter(root)
    mask = np.zeros((48, 64), bool)
    mask[10:20, 5:30] = True
    info = {"bbox_obj": [5, 10, 25, 10], "bbox_visib": [5, 10, 20, 10], "px_count_all": 250, "px_count_valid": 250,
            "px_count_visib": 200, "visib_fract": 0.8}  # fmt: skip
    for i in range(2):
        pair = poses()[2 * i : 2 * i + 2]
        ok, jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), (10, 20, 200), np.uint8))
        assert ok
        record = {"scene_gt": [gt_entry(4, p) for p in pair], "scene_gt_info": [info, info],
                  "scene_camera": {"cam_K": K, "depth_scale": 1.0, "width": 64, "height": 48}}  # fmt: skip
        writer.write_image(i, jpeg.tobytes(), [mask, ~mask], record)
    assert writer.done() == {0, 1}
    writer.finish(2)
    (root / "models").mkdir()
    write_ply(root / "models" / "obj_000004.ply", demo_mesh())
    turn = Symmetries((Pose(np.diag([-1.0, -1.0, 1.0]), np.array([0.001, 0, 0])),), ())
    (root / "models" / "models_info.json").write_text(json.dumps({"4": model_info("bottle", demo_mesh(), turn)}))
    return root


def test_what_is_written_reads_back_in_metres(folder: Path) -> None:
    data = BopDataset(folder)
    assert len(data) == 2 and data.object_ids == (4,) and data.object_id("bottle") == 4
    for i in range(2):
        view = data.view(i)
        assert view.camera.matrix.reshape(-1).tolist() == K and view.image.shape == (48, 64, 3)
        assert np.abs(view.image[0, 0].astype(int) - [200, 20, 10]).max() < 6
        for label, pose in zip(view.objects, poses()[2 * i : 2 * i + 2], strict=True):
            assert label.object_name == "bottle" and label.visible_fraction == 0.8 and not label.truncated
            assert np.abs(label.T_camera_object.minus(pose)).max() < 1e-9
        assert view.objects[0].mask is not None and view.objects[0].mask.sum() == 250
        assert data.boxes(i).tolist() == [[5, 10, 25, 10]] * 2 and data.boxes(i, visible=True)[0, 2] == 20
    model = data.object_model(4)
    assert model.diameter == pytest.approx(model_info("x", demo_mesh())["diameter"] / 1000, rel=1e-6)
    assert model.symmetries.discrete[0].translation[0] == pytest.approx(0.001)
    for path in (folder, folder / "train", folder / "train" / "000000"):
        assert len(BopDataset(path)) == 2


def test_lmo_reads_as_published(lmo_root: Path) -> None:
    data = BopDataset(lmo_root, "test", {8: "driller"})
    assert len(data) == 156 and data.images[0].image_id == 3 and len(data.object_ids) == 8
    view = data.view(0)
    assert view.image.shape == (480, 640, 3)
    driller = next(label for label in view.objects if label.object_name == "driller")
    assert driller.T_camera_object.translation.tolist() == pytest.approx([0.10211878, -0.08897942, 1.0337719], abs=1e-6)
    assert driller.mask is None
    assert len(data.targets()) == 1146
    assert data.object_model(10).symmetries.discrete and not data.object_model(8).symmetries
    # the published box of the object is where its mesh projects to
    pixels = view.camera.project(driller.T_camera_object.transform(data.mesh(8).vertices))
    box = data.boxes(0)[[label.object_name for label in view.objects].index("driller")]
    assert np.abs(pixels.min(axis=0) - box[:2]).max() < 3 and np.abs(pixels.max(axis=0) - box[:2] - box[2:]).max() < 3


def test_broken_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BopError, match="no such folder"):
        BopDataset(tmp_path / "none")
    with pytest.raises(BopError, match="holds no BOP scene"):
        BopDataset(folder, "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BopError, match="no BOP folder"):
        BopDataset(tmp_path / "empty")
    with pytest.raises(BopError, match="no object is called 'cup'"):
        BopDataset(folder).object_id("cup")
    with pytest.raises(BopError, match=r"test_targets_bop19\.json: is missing"):
        BopDataset(folder).targets()


def test_images_and_json_must_agree(folder: Path) -> None:
    scene = folder / "train" / "000000"
    (scene / "rgb" / "000001.jpg").rename(scene / "rgb" / "000007.jpg")
    with pytest.raises(BopError, match=r"scene_camera\.json.*image 7"):
        BopDataset(folder)
    (scene / "rgb" / "000007.jpg").unlink()
    with pytest.raises(BopError, match="labels image 1 "):
        BopDataset(folder)


def test_sizes_must_agree_and_tell_what_is_truncated(folder: Path) -> None:
    scene = folder / "train" / "000000"
    info = json.loads((scene / "scene_gt_info.json").read_text())
    info["0"][0]["bbox_obj"] = [50, 10, 25, 10]
    info["0"][1]["bbox_obj"] = [39, 10, 25, 10]
    (scene / "scene_gt_info.json").write_text(json.dumps(info))
    assert [label.truncated for label in BopDataset(folder).view(0).objects] == [True, False]
    cv2.imwrite(str(scene / "rgb" / "000000.jpg"), np.zeros((24, 32, 3), np.uint8))
    with pytest.raises(BopError, match=r"000000\.jpg: is 32x24.*64x48"):
        BopDataset(folder).view(0)
    cv2.imwrite(str(scene / "mask_visib" / "000001_000000.png"), np.zeros((24, 32), np.uint8))
    with pytest.raises(BopError, match=r"000001\.jpg.*mask_visib"):
        BopDataset(folder).view(1)


def test_bad_content_is_named_when_it_is_read(folder: Path) -> None:
    scene = folder / "train" / "000000"
    truth = json.loads((scene / "scene_gt.json").read_text())
    truth["0"][0]["cam_R_m2c"] = [1.0] * 9
    truth["1"][0]["obj_id"] = 5
    (scene / "scene_gt.json").write_text(json.dumps(truth))
    data = BopDataset(folder)
    with pytest.raises(BopError, match=r"scene_gt\.json: image 0.*rotation"):
        data.labels(0)
    with pytest.raises(BopError, match="object 5 is unknown"):
        data.labels(1)
    (scene / "mask_visib" / "000000_000000.png").unlink()
    with pytest.raises(BopError, match=r"000000_000000\.png"):
        data.view(0)
    (scene / "rgb" / "000000.jpg").write_bytes(b"no picture")
    with pytest.raises(BopError, match=r"000000\.jpg.*decoded"):
        data.view(0)
    (scene / "scene_gt.json").write_text("{")
    with pytest.raises(BopError, match=r"scene_gt\.json.*JSON"):
        BopDataset(folder)
    shutil.rmtree(folder / "models")
    (scene / "scene_gt.json").write_text("{}")
    with pytest.raises(BopError, match="models"):
        BopDataset(folder).mesh(4)
