# SPDX-License-Identifier: Apache-2.0
"""What the teachers add to a training step: the same batches, forward to backward, with cached guidance and without."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _measuring import interleaved_ms, machine, ratio, summary, table, use_two_cores, write  # noqa: E402

WINDOWS = 128


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and write results/distill_step.json."""
    parser = argparse.ArgumentParser(prog="ukd bench distill_step", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="settings of ukd distill")
    parser.add_argument("--teacher", type=Path, action="append", required=True, help="as for ukd distill")
    parser.add_argument("--dataset", type=Path, required=True, help="BOP folder with masks; 60 views of it are read")
    parser.add_argument("--object", action="append", default=[], help="as for ukd distill")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of timing (default %(default)s)")
    options = parser.parse_args(arguments)
    use_two_cores()
    about = machine()
    import torch

    from ukd_ros.config import load_config
    from ukd_ros.data.dataset import WindowDataset
    from ukd_ros.distillation.batches import Batches, BatchShape
    from ukd_ros.distillation.beginning import new_network
    from ukd_ros.distillation.distill import DistillConfig
    from ukd_ros.distillation.folders import object_models
    from ukd_ros.distillation.guide import Guide
    from ukd_ros.distillation.norms import NormStatistics
    from ukd_ros.distillation.parallel import Processes
    from ukd_ros.distillation.teacher import Ensemble
    from ukd_ros.distillation.teacher_cache import open_cache
    from ukd_ros.distillation.train import backward

    config = load_config(DistillConfig, options.config)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    (folder,), models = object_models(config, [options.dataset], options.object)

    class First:
        def __len__(self) -> int:
            return min(60, len(folder))

        def view(self, index: int) -> Any:
            return folder.view(index)

    data = WindowDataset(First(), models, config.window, 0)
    ensemble = Ensemble.load(options.teacher, models, config.window.size, torch.device("cpu"))
    torch.manual_seed(0)
    network = new_network(config, models).channels_last().train()
    norms = NormStatistics(network)
    shape = BatchShape(config.batch_size, config.micro_batch, config.positives)
    with tempfile.TemporaryDirectory() as place:
        cache = open_cache(
            Path(place) / "cache", ensemble, data, WINDOWS, positives=config.positives, votes=config.guide.votes,
            features=True,
        )  # fmt: skip
        widths = network.pyramid_width, ensemble.networks[0].pyramid_width
        guide = Guide(config.guide, cache.guidance, *widths)
        batches = Batches(data, shape, len(models), config.keypoints, 0, Processes())
        made = [micro for micro, _ in zip(batches, range(max(1, WINDOWS // config.batch_size)), strict=False)]
        batches.close()
        turn = {"plain": 0, "distilled": 0}

        def step(name: str, taught: Guide | None) -> None:
            turn[name] += 1
            network.zero_grad(set_to_none=True)
            micro = made[turn[name] % len(made)]
            backward(network, norms, micro, config, Processes(), torch.device("cpu"), taught)

        runs = {"plain": lambda: step("plain", None), "distilled": lambda: step("distilled", guide)}
        times = interleaved_ms(runs, options.rounds, each=len(made))
    quotient = ratio(times, "distilled", "plain")
    rows = [
        (name, f"{summary(times[name])['median_ms']:.0f} ms", "" if name == "plain" else f"{quotient:.2f} x (aim 1.2)")
        for name in runs
    ]
    data_out = {"machine": about, "runs": {name: summary(times[name]) for name in runs}, "ratio": quotient}
    path = write("distill_step", data_out)
    sys.stdout.write(table(rows, about) + f"\nwritten: {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
