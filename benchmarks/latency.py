# SPDX-License-Identifier: Apache-2.0
"""How fast: the student against the paper's tiny-H, a tracked frame by stage, and the runtimes against each other.

One run on two cores; ratios are medians over neighbouring runs. `ukd bench latency` also starts the pose node for its
overhead, its start and its first answer (`--no-node` leaves that out; node_memory.py runs it over 10,000 frames).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _measuring import CORES, interleaved_ms, machine, ratio, summary, table, use_two_cores, write  # noqa: E402

SIZE = 256
KEYPOINTS = 12


def networks(rounds: int) -> dict[str, Any]:
    """Time lean in every runtime and the full-head tiny-H in torch eager, one class, SIZE x SIZE px."""
    import numpy as np
    import torch

    from ukd_ros.distillation.export import ExportOptions, export_model
    from ukd_ros.geometry.object_model import ObjectModel
    from ukd_ros.perception.backends import MissingBackendError, open_backend
    from ukd_ros.perception.network import KeypointNetwork, NetworkConfig

    torch.set_num_threads(CORES)
    points = np.random.default_rng(0).uniform(-0.05, 0.05, (KEYPOINTS, 3))
    image = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    tiny_h = KeypointNetwork(NetworkConfig("darknet_tiny_h", ("part",), KEYPOINTS)).eval()
    lean = KeypointNetwork(NetworkConfig("lean", ("part",), KEYPOINTS)).eval()
    options = ExportOptions(locate_width=SIZE, locate_height=SIZE, zoom_size=SIZE)

    def eager() -> None:
        with torch.inference_mode():
            tiny_h(batch)

    runs: dict[str, Any] = {"darknet_tiny_h, torch eager": eager}
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        report = export_model(lean, [ObjectModel("part", points, 0.1)], Path(folder) / "lean", options)
        for kind in ("onnxruntime", "opencv", "torch"):
            try:
                backend = open_backend(kind, report.bundle, "zoom", CORES)
            except MissingBackendError:
                missing.append(kind)
                continue
            runs[f"lean, {kind}"] = lambda backend=backend: backend.run(image)
        times = interleaved_ms(runs, rounds)
    best = "lean, onnxruntime" if "lean, onnxruntime" in times else "lean, opencv"
    return {
        "size": SIZE,
        "parameters": {
            name: sum(p.numel() for p in net.parameters()) for name, net in (("lean", lean), ("darknet_tiny_h", tiny_h))
        },
        "times": {name: summary(values) for name, values in times.items()},
        "missing": missing,
        "ratio_of": best,
        "ratio": ratio(times, best, "darknet_tiny_h, torch eager"),
    }


def tracked_frames(model: str, bag: Path, backend: str, limit: int) -> dict[str, Any]:
    """Time the stages of tracked frames of a bag, in this process."""
    import cv2
    import numpy as np

    from ukd_ros.data.bags import bag_views
    from ukd_ros.geometry.view import View
    from ukd_ros.perception.bundle import find_model, load_bundle
    from ukd_ros.perception.estimator import PoseEstimator

    cv2.setNumThreads(CORES)
    bundle = load_bundle(find_model(model))
    estimator = PoseEstimator(bundle, backend, threads=CORES)
    views = [view for view in bag_views(bag) if isinstance(view, View)][:limit]
    for view in views[:5]:
        estimator.estimate(view)
    spent: list[dict[str, float]] = []
    for view in views:
        result = estimator.estimate(view)
        if result.tracked and result.estimates:
            spent.append(result.timings_ms)
    if not spent:
        raise ValueError(f"{bag}: no frame was tracked by {model}: is it the model of the object in the bag?")
    rest = [sum(t[stage] for stage in ("crop", "votes", "pnp")) for t in spent]
    total = [t["total"] for t in spent]
    return {
        "model": bundle.name,
        "backend": estimator.backend_name,
        "frames": len(views),
        "tracked": len(spent),
        "stages_ms": {stage: float(np.median([t[stage] for t in spent])) for stage in spent[0]},
        "rest": summary(rest),
        "outside_the_network": summary([whole - t["zoom"] for whole, t in zip(total, spent, strict=True)]),
        "total": summary(total),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write results/latency.json."""
    parser = argparse.ArgumentParser(prog="ukd bench latency", description=__doc__)
    parser.add_argument("--model", default="spray_bottle", help="model for the tracked frames (default %(default)s)")
    parser.add_argument("--bag", type=Path, help="bag for the tracked frames (default: the shipped sample)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=30, help="of three runs each (default %(default)s)")
    parser.add_argument("--frames", type=int, default=300, help="at most so many frames of the bag")
    parser.add_argument("--no-node", action="store_true", help="leave the pose node out")
    options = parser.parse_args(arguments)
    use_two_cores()
    data: dict[str, Any] = {"machine": machine(), "networks": networks(options.rounds)}
    nets = data["networks"]
    rows = [(name, f"{t['median_ms']:.1f} ms (p95 {t['p95_ms']:.1f})", "") for name, t in nets["times"].items()]
    rows.append((f"{nets['ratio_of']} / tiny-H eager", f"1/{1 / nets['ratio']:.1f}", "<= 1/7"))
    bag = options.bag or Path(__file__).resolve().parents[1] / "models" / "sample_bag"
    frames = data["tracked_frame"] = tracked_frames(options.model, bag, options.backend, options.frames)
    rows.append(("tracked frame, all of it", f"{frames['total']['median_ms']:.1f} ms", ""))
    rows.append(("  crop, votes, PnP, covariance", f"{frames['rest']['median_ms']:.2f} ms", "<= 3 ms"))
    rows += [(f"  {stage}", f"{frames['stages_ms'][stage]:.2f} ms", "") for stage in ("crop", "zoom", "votes", "pnp")]
    if not options.no_node:
        from node_memory import measure, rows_of

        data["node"] = measure(options.model, bag, options.backend, frames=300)
        rows += rows_of(data["node"])
    sys.stdout.write(table(rows, data["machine"]) + f"\nwritten: {write('latency', data)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
