# SPDX-License-Identifier: Apache-2.0
"""The pose node as a process: its start, its first answer, its overhead, and its private memory over many frames."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _measuring import machine, table, use_two_cores, write  # noqa: E402

STATUS = "pose estimation"
ACTIVE = "active: images from"


def private_mb(pid: int) -> float:
    """Return the private memory of a process, MB: what it alone costs the machine."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))) / 1024


class Probe:
    """A camera that waits for each answer, and an ear on /diagnostics."""

    def __init__(self) -> None:
        """Make the node and its topics."""
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from rclpy.qos import QoSProfile, qos_profile_sensor_data
        from sensor_msgs.msg import CameraInfo, Image, PointCloud2

        rclpy.init()
        self.rclpy = rclpy
        self.node = rclpy.create_node("bench_camera")
        self.images = self.node.create_publisher(Image, "image", QoSProfile(depth=5))
        self.infos = self.node.create_publisher(CameraInfo, "camera_info", qos_profile_sensor_data)
        self.answers = 0
        self.diagnostics: dict[str, str] = {}
        self.node.create_subscription(PointCloud2, "/pose_node/keypoints", self._answered, 10)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._told, 10)

    def _answered(self, _: Any) -> None:
        self.answers += 1

    def _told(self, message: Any) -> None:
        for status in message.status:
            if STATUS in status.name:
                self.diagnostics = {item.key: item.value for item in status.values}

    def spin_until(self, done: Any, timeout_s: float) -> bool:
        """Handle messages until `done()`; False after the time."""
        end = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > end:
                return False
            self.rclpy.spin_once(self.node, timeout_sec=0.05)
        return True

    def send(self, image: Any, info: Any) -> bool:
        """Publish one frame and wait for its answer; False when none came within two seconds."""
        before = self.answers
        self.infos.publish(info)
        self.images.publish(image)
        return self.spin_until(lambda: self.answers > before, 2.0)

    def close(self) -> None:
        """End the node."""
        self.node.destroy_node()
        self.rclpy.try_shutdown()


def messages(bag: Path, limit: int = 100) -> list[tuple[Any, Any]]:
    """Return frames of a bag as raw rgb8 images with their CameraInfo."""
    import array

    from sensor_msgs.msg import CameraInfo, Image

    from ukd_ros.data.bags import bag_views
    from ukd_ros.geometry.view import View

    made = []
    for view in bag_views(bag):
        if not isinstance(view, View):
            continue
        height, width = view.image.shape[:2]
        image = Image(height=height, width=width, encoding="rgb8", step=3 * width)
        image.data = array.array("B", view.image.tobytes())
        model = view.camera.distortion_model.value
        info = CameraInfo(height=height, width=width, distortion_model="plumb_bob" if model == "none" else model)
        info.k = view.camera.matrix.reshape(9)
        info.d = view.camera.distortion.tolist() or [0.0] * 5
        for message in (image, info):
            message.header.frame_id = view.frame_id
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(view.stamp_ns, 10**9)
        made.append((image, info))
        if len(made) >= limit:
            break
    return made


def there_and_back(count: int) -> Iterator[int]:
    """Yield 0, 1, ..., count-1, count-2, ..., 1, 0, 1, ... : a bag played to and fro never jumps."""
    while True:
        yield from range(count)
        yield from range(count - 2, 0, -1)


def measure(model: str, bag: Path, backend: str, frames: int) -> dict[str, Any]:
    """Start the node, play `frames` images one by one, and return what it took."""
    import os

    from ukd_ros.perception.bundle import find_model
    from ukd_ros.ros.demo_processes import Children, free_domain, local_environment

    environment, _ = local_environment(free_domain())
    os.environ.update(environment)
    frames_of_bag = messages(bag)
    words = ["--ros-args", "-p", f"model:={find_model(model)}", "-p", f"backend:={backend}", "-p", "rectified:='false'"]
    with tempfile.TemporaryDirectory() as folder, Children(environment) as children:
        log = Path(folder) / "node.log"
        started = time.monotonic()
        child = children.start("ukd_ros.ros.pose_node", words, log)
        while ACTIVE not in log.read_text(encoding="utf-8"):
            if child.poll() is not None or time.monotonic() - started > 60:
                raise RuntimeError(f"the pose node did not become active: {log.read_text(encoding='utf-8')[-400:]}")
            time.sleep(0.005)
        active_s = time.monotonic() - started
        probe = Probe()
        try:
            matched = probe.spin_until(
                lambda: min(probe.images.get_subscription_count(), probe.infos.get_subscription_count()) > 0, 30
            )
            if not matched:
                raise RuntimeError("the pose node's subscriptions were not found within 30 s")
            first = _first_answer(probe, *frames_of_bag[0])
            return {"start_to_active_s": active_s, "first_answer_ms": first} | _play(
                probe, frames_of_bag, frames, child.pid
            )
        finally:
            probe.close()


def _first_answer(probe: Probe, image: Any, info: Any) -> float:
    """Send one frame and return callback entry to publish return as the node tells it, ms."""
    if not probe.send(image, info):
        raise RuntimeError("the pose node did not answer the first image")
    probe.diagnostics = {}
    if not probe.spin_until(lambda: probe.diagnostics.get("frames processed", "0") != "0", 10):
        raise RuntimeError("the pose node's /diagnostics did not come within 10 s")
    return float(probe.diagnostics["latency p50 (ms)"])


def _play(probe: Probe, frames_of_bag: list[tuple[Any, Any]], frames: int, pid: int) -> dict[str, Any]:
    memory: list[tuple[int, float]] = []
    lost = 0
    order = there_and_back(len(frames_of_bag))
    for number in range(frames):
        lost += not probe.send(*frames_of_bag[next(order)])
        if number % max(1, frames // 100) == 0:
            memory.append((number, private_mb(pid)))
    memory.append((frames, private_mb(pid)))
    probe.diagnostics = {}
    probe.spin_until(lambda: bool(probe.diagnostics), 5)
    told = {key: value for key, value in probe.diagnostics.items() if key.endswith("(ms)")}
    warm = [mb for number, mb in memory if number >= frames // 10]
    return {
        "frames": frames,
        "unanswered": lost,
        "with_a_pose": int(probe.diagnostics.get("frames with a pose", -1)),
        "private_mb": memory[-1][1],
        "private_mb_peak": max(mb for _, mb in memory),
        "growth_mb": warm[-1] - warm[0],
        "memory_mb": memory,
        "diagnostics": told,
    }


def rows_of(node: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table's rows about the node."""
    told = node["diagnostics"]
    return [
        ("node: process start to active", f"{node['start_to_active_s']:.2f} s", "<= 2 s"),
        ("node: first image callback to pose", f"{node['first_answer_ms']:.0f} ms", "<= 100 ms"),
        ("node: overhead over the estimator, p50", f"{told.get('overhead p50 (ms)', '?')} ms", "<= 2 ms"),
        ("node: callback to publish return, p50", f"{told.get('latency p50 (ms)', '?')} ms", ""),
        ("node: private memory", f"{node['private_mb']:.0f} MB", "<= 250 MB"),
        (f"node: growth over the last 90 % of {node['frames']} frames", f"{node['growth_mb']:+.1f} MB", "flat"),
        ("node: frames unanswered", f"{node['unanswered']} of {node['frames']}", ""),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write results/node_memory.json."""
    parser = argparse.ArgumentParser(prog="ukd bench node_memory", description=__doc__)
    parser.add_argument("--model", default="spray_bottle")
    parser.add_argument("--bag", type=Path, default=Path(__file__).resolve().parents[1] / "models" / "sample_bag")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--frames", type=int, default=10_000)
    options = parser.parse_args(arguments)
    use_two_cores()
    data = {"machine": machine(), "node": measure(options.model, options.bag, options.backend, options.frames)}
    sys.stdout.write(table(rows_of(data["node"]), data["machine"]) + f"\nwritten: {write('node_memory', data)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
