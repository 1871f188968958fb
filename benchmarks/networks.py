# SPDX-License-Identifier: Apache-2.0
"""What each network costs: parameters, GMAC, milliseconds on two cores, and training windows a second on one core.

GMAC are multiply-accumulates of the convolutions. Milliseconds are of the exported graph in onnxruntime, beside the
first network's as a ratio of neighbouring runs. Training is forward, losses' shape and backward on random windows, with
one thread as two runs side by side have it, in float32 and, where the processor has it, in bfloat16; the data loader's
own rate stands beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _measuring import CORES, interleaved_ms, machine, ratio, summary, use_two_cores, write  # noqa: E402

NETWORKS = (
    ("lean", 1.0), ("darknet53", 0.25), ("darknet53", 0.5), ("darknet53", 1.0), ("darknet_tiny_h", 1.0),
    ("darknet_tiny", 1.0),
)  # fmt: skip
SIZE, KEYPOINTS, BATCH = 128, 12, 32


def gmac(network: Any, side: int) -> float:
    """Return the multiply-accumulates of all convolutions for one image of `side` x `side` px, in 1e9."""
    import torch

    total = 0

    def count(module: Any, _: Any, output: Any) -> None:
        nonlocal total
        total += output.shape[2] * output.shape[3] * module.weight.numel()

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    with torch.inference_mode():
        network(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return total / 1e9


def settled(network: Any) -> Any:
    """Return an untrained network whose batch norms have seen a batch: else its activations grow with every layer."""
    import torch

    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.inference_mode():
        network.train()(255 * torch.rand(8, 3, SIZE, SIZE))
    return network.eval()


def training_rates(network: Any, seconds: float) -> dict[str, float]:
    """Return windows a second through forward and backward on one thread, in each precision this processor has.

    Steps of the precisions take turns, so that what else runs slows them alike.
    """
    import torch

    from ukd_ros.distillation.device import half_precision

    precisions = ["float32", *(["bfloat16"] if half_precision("auto", torch.device("cpu")) else [])]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    network = network.train().channels_last()
    batch = torch.rand(BATCH, 3, SIZE, SIZE).mul(255).contiguous(memory_format=torch.channels_last)

    def step(precision: str) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            raw = network.raw(batch)
        (raw.logit.mean() + raw.offset.square().mean() + raw.scale.square().mean()).backward()
        return time.perf_counter() - start

    for precision in precisions:
        step(precision)
    spent, steps = dict.fromkeys(precisions, 0.0), 0
    while sum(spent.values()) < seconds * len(precisions):
        for precision in precisions:
            spent[precision] += step(precision)
        steps += 1
    torch.set_num_threads(before)
    return {precision: BATCH * steps / taken for precision, taken in spent.items()}


def loading_rate(dataset: Path, seconds: float) -> float:
    """Return windows a second that one thread cuts out of a data set's first 200 views and augments."""
    import cv2

    from ukd_ros.data.bop import BopDataset
    from ukd_ros.data.dataset import WindowConfig, WindowDataset

    cv2.setNumThreads(1)
    data = BopDataset(dataset)

    class First:
        def __len__(self) -> int:
            return min(200, len(data))

        def view(self, index: int) -> Any:
            return data.view(index)

    models = [data.object_model(i, KEYPOINTS) for i in data.object_ids]
    windows = WindowDataset(First(), models, WindowConfig(size=SIZE), seed=0)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        windows.sample(count)
        count += 1
    return count / (time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and write results/networks.json."""
    parser = argparse.ArgumentParser(prog="ukd bench networks", description=__doc__)
    parser.add_argument("--classes", type=int, default=3, help="objects a network knows (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="per training rate (default %(default)s)")
    parser.add_argument("--dataset", type=Path, help="BOP folder with masks, for the loader's own rate")
    options = parser.parse_args(arguments)
    use_two_cores()
    about = machine()
    import numpy as np

    from ukd_ros.distillation.export import ExportOptions, export_model
    from ukd_ros.geometry.object_model import ObjectModel
    from ukd_ros.perception.backends import open_backend
    from ukd_ros.perception.network import KeypointNetwork, NetworkConfig

    rng = np.random.default_rng(0)
    names = tuple(f"part{i}" for i in range(options.classes))
    models = [ObjectModel(name, rng.uniform(-0.05, 0.05, (KEYPOINTS, 3)), 0.1) for name in names]
    image = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Any] = {}
    for architecture, factor in NETWORKS:
        label = architecture if factor == 1.0 else f"{architecture} x {factor:g}"
        network = settled(KeypointNetwork(NetworkConfig(architecture, names, KEYPOINTS, factor)))
        with tempfile.TemporaryDirectory() as folder:
            graphs = ExportOptions(locate_width=SIZE, locate_height=SIZE, zoom_size=SIZE)
            bundle = export_model(network, models, Path(folder) / "model", graphs).bundle
            backend = open_backend("onnxruntime", bundle, "zoom", CORES)
        runs[label] = lambda backend=backend: backend.run(image)
        rows[label] = {
            "parameters": sum(p.numel() for p in network.parameters()),
            "gmac_128": gmac(network, 128),
            "gmac_256": gmac(network, 256),
            "training_windows_per_s": training_rates(network, options.seconds),
        }
    times = interleaved_ms(runs, options.rounds)
    first = next(iter(rows))
    for label, row in rows.items():
        row |= {"zoom_128": summary(times[label]), "ratio": ratio(times, label, first)}
    loader = loading_rate(options.dataset, options.seconds) if options.dataset is not None else None
    path = write("networks", {"machine": about, "classes": options.classes, "networks": rows, "loader_per_s": loader})
    if about["warning"]:
        print(about["warning"])
    print(
        "| network | parameters | GMAC at 128, 256 px | ms at 128 px, two cores "
        "| training windows/s, one core (float32, bfloat16) |"
    )
    print("|---|---|---|---|---|")
    for label, row in rows.items():
        rates = ", ".join(f"{rate:.0f}" for rate in row["training_windows_per_s"].values())
        print(
            f"| {label} | {row['parameters'] / 1e6:.2f} M | {row['gmac_128']:.3f}, {row['gmac_256']:.2f} | "
            f"{row['zoom_128']['median_ms']:.1f} ({row['ratio']:.1f} x) | {rates} |"
        )
    if loader is not None:
        print(f"the loader alone: {loader:.0f} windows/s on one core")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
