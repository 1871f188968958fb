# SPDX-License-Identifier: Apache-2.0
"""A contact sheet of a BOP folder: images with the objects' boxes, outlines and axes, to look at before training."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.data.bop import BopDataset
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.pose import Pose

ByteImage = npt.NDArray[np.uint8]
AXIS_COLORS = ((235, 40, 40), (40, 200, 40), (50, 90, 255))


def write_contact_sheet(
    out: str | Path, path: str | Path, n: int = 24, split: str | None = None, columns: int = 6, width: int = 400
) -> Path:
    """Draw `n` images spread over the BOP folder `out` into one picture at `path`, which is returned."""
    data = BopDataset(out, split)
    chosen = np.unique(np.linspace(0, len(data) - 1, min(n, len(data))).astype(int))
    lengths = {data.name(i): 0.3 * float(np.ptp(data.mesh(i).vertices, axis=0).max()) for i in data.object_ids}
    tiles = [_tile(data, int(i), lengths, width) for i in chosen]
    height = max(tile.shape[0] for tile in tiles)
    columns = min(columns, len(tiles))
    rows = []
    for start in range(0, len(tiles), columns):
        row = np.zeros((height, columns * width, 3), np.uint8)
        for k, tile in enumerate(tiles[start : start + columns]):
            row[: tile.shape[0], k * width : k * width + tile.shape[1]] = tile
        rows.append(row)
    sheet = cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR)
    path = Path(path)
    ok, data_bytes = cv2.imencode(path.suffix or ".png", sheet)
    if not ok:
        raise ValueError(f"{path}: OpenCV cannot write this kind of picture; use .png or .jpg.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data_bytes.tobytes())
    return path


def draw_axes(image: ByteImage, camera: Camera, pose: Pose, length: float) -> None:
    """Draw an object's axes (x red, y green, z blue, `length` m) into an RGB image, in place."""
    points = camera.project(pose.transform(np.vstack([np.zeros(3), np.eye(3) * length])))
    if not np.all(np.isfinite(points)) or np.abs(points).max() > 1e5:
        return
    start = tuple(int(v) for v in np.rint(points[0]))
    for end, color in zip(points[1:], AXIS_COLORS, strict=True):
        cv2.line(image, start, (round(float(end[0])), round(float(end[1]))), color, 2, cv2.LINE_AA)


def _tile(data: BopDataset, index: int, lengths: dict[str, float], width: int) -> ByteImage:
    view = data.view(index)
    image = view.image.copy()
    for label, box in zip(view.objects, data.boxes(index), strict=True):
        color = (255, 230, 0) if label.visible_fraction > 0.5 else (255, 120, 0)
        if np.all(np.isfinite(box)):
            x, y, w, h = (int(v) for v in box)
            cv2.rectangle(image, (x, y), (x + w, y + h), color, 1)
            place = (x + 2, y + 14)
            cv2.putText(image, f"{label.visible_fraction:.2f}", place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, color, 1)
        if label.mask is not None:
            outlines, _ = cv2.findContours(label.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(image, outlines, -1, (255, 0, 255), 1)
        draw_axes(image, view.camera, label.T_camera_object, lengths[label.object_name])
    height = round(image.shape[0] * width / image.shape[1])
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)
