# SPDX-License-Identifier: Apache-2.0
"""How fast bags are read and decoded, how long an index of 10,000 frames takes, and whether memory stays flat."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _measuring import machine, table, use_two_cores, write  # noqa: E402

SIZE = (640, 480)
STEP_NS = 33_333_333


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write results/bags.json."""
    parser = argparse.ArgumentParser(prog="ukd bench bags", description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="images of the bags read (default %(default)s)")
    parser.add_argument("--indexed", type=int, default=10_000, help="frames of the bags indexed (default %(default)s)")
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)  # what the child processes are asked
    options = parser.parse_args(arguments)
    use_two_cores()
    if options.peak is not None:
        sys.stdout.write(f"{_peak_mb(options.peak)}\n")
        return 0
    about = machine()
    data: dict[str, Any] = {"machine": about, "size": SIZE, "images": options.images}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for codec in ("raw", "jpeg"):
            for storage in ("mcap", "sqlite3"):
                bag = _record(place / f"{codec}_{storage}", _images(codec, options.images), storage)
                data[f"{codec}_{storage}_per_s"] = max(_rate(bag) for _ in range(3))
        for storage in ("mcap", "sqlite3"):
            bag = _record(place / f"index_{storage}", _images("small", options.indexed), storage)
            data[f"index_{storage}_s"] = min(_index_s(bag, options.indexed) for _ in range(2))
        for name, count in (("short", options.images // 4), ("long", 10 * (options.images // 4))):
            bag = _record(place / name, _images("raw", count), "mcap")
            data[f"{name}_peak_mb"], data[f"{name}_bag_mb"] = _child_peak_mb(bag), _size_mb(bag)
    sys.stdout.write(table(_rows(data, options.indexed), about) + f"\nwritten: {write('bags', data)}\n")
    return 0


def _rows(data: dict[str, Any], indexed: int) -> list[tuple[str, str, str]]:
    rows = []
    for codec, aim in (("raw", ">= 200"), ("jpeg", ">= 60")):
        for storage in ("mcap", "sqlite3"):
            name = f"{codec} 640x480 read and decoded, {storage}, one process, images/s"
            rows.append((name, f"{data[f'{codec}_{storage}_per_s']:.0f}", aim))
    for storage in ("mcap", "sqlite3"):
        rows.append(
            (f"opening and indexing {indexed} frames, {storage}, s", f"{data[f'index_{storage}_s']:.2f}", "<= 5")
        )
    for name in ("short", "long"):
        bag = f"peak memory of ukd bag to-bop, {data[f'{name}_bag_mb']:.0f} MB bag, MB"
        rows.append((bag, f"{data[f'{name}_peak_mb']:.0f}", "flat"))
    return rows


def _images(codec: str, count: int) -> Iterator[tuple[str, int, bytes]]:
    """Yield (type, stamp, serialised message): camera_info and image in turn, moving texture with a sensor's noise."""
    import cv2
    import numpy as np

    from ukd_ros.data.rosbag.message_types import IMAGE_TYPES, INFO_TYPE, store
    from ukd_ros.data.rosbag.writer import camera_info
    from ukd_ros.geometry.camera import Camera

    rng = np.random.default_rng(0)
    types = store().types
    width, height = SIZE if codec != "small" else (64, 48)
    wide = cv2.resize(rng.integers(0, 256, (12, 32, 3), dtype=np.uint8), (2 * width, height))
    wide = (wide.astype(int) + rng.normal(0, 3, wide.shape)).clip(0, 255).astype(np.uint8)
    camera = Camera(width, height, np.array([[600.0, 0, width / 2], [0, 600, height / 2], [0, 0, 1]]))
    for number in range(count):
        at = 10**18 + number * STEP_NS
        stamp = types["builtin_interfaces/msg/Time"](sec=at // 10**9, nanosec=at % 10**9)
        header = types["std_msgs/msg/Header"](stamp=stamp, frame_id="camera")
        yield INFO_TYPE, at, bytes(store().serialize_cdr(camera_info(camera, header), INFO_TYPE))
        first = (7 * number) % width
        image = np.ascontiguousarray(wide[:, first : first + width])
        if codec == "jpeg":
            kind, coded = IMAGE_TYPES[1], cv2.imencode(".jpg", image)[1].reshape(-1)
            message = types[kind](header=header, format="bgr8; jpeg compressed bgr8", data=coded)
        else:
            kind, size = IMAGE_TYPES[0], {"height": height, "width": width, "step": 3 * width}
            pixels = image.reshape(-1)
            message = types[kind](header=header, encoding="bgr8", is_bigendian=0, data=pixels, **size)
        yield kind, at, bytes(store().serialize_cdr(message, kind))


def _record(path: Path, messages: Iterator[tuple[str, int, bytes]], storage: str) -> Path:
    """Write an rosbag2 folder of this storage."""
    from rosbags.rosbag2 import StoragePlugin, Writer

    from ukd_ros.data.rosbag.message_types import INFO_TYPE, store

    writer = Writer(path, version=8, storage_plugin=StoragePlugin[storage.upper()])
    writer.open()
    known: dict[str, Any] = {}
    for kind, at, data in messages:
        if kind not in known:
            topic = "/camera/camera_info" if kind == INFO_TYPE else "/camera/image_raw"
            known[kind] = writer.add_connection(topic, kind, typestore=store())
        writer.write(known[kind], at, data)
    writer.close()
    return path


def _rate(bag: Path) -> float:
    """Return the views a second that a bag gives, opening and camera_info included."""
    from ukd_ros.data.bags import bag_views
    from ukd_ros.geometry.view import View

    start = time.perf_counter()
    count = sum(isinstance(view, View) for view in bag_views(bag))
    return count / (time.perf_counter() - start)


def _index_s(bag: Path, count: int) -> float:
    from ukd_ros.data.bags import BagReader

    start = time.perf_counter()
    with BagReader(bag) as reader:
        found = len(reader.index(["/camera/image_raw"]))
    spent = time.perf_counter() - start
    if found != count:
        raise RuntimeError(f"{bag}: {found} of {count} frames were indexed.")
    return spent


def _peak_mb(bag: Path) -> float:
    """Return this process's peak memory after it took the frames of a bag."""
    from ukd_ros.data.rosbag.frames import BagOptions, bags_to_bop

    with tempfile.TemporaryDirectory() as folder:
        bags_to_bop([bag], Path(folder) / "out", BagOptions(held_out=0.0, max_frames=20), progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _child_peak_mb(bag: Path) -> float:
    words = [sys.executable, "-m", "ukd_ros", "bench", "bags", "--peak", str(bag)]
    root = Path(__file__).resolve().parents[1]
    return float(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, cwd=root).stdout)


def _size_mb(bag: Path) -> float:
    return sum(file.stat().st_size for file in bag.iterdir()) / 1e6


if __name__ == "__main__":
    sys.exit(main())
