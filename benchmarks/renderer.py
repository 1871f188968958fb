# SPDX-License-Identifier: Apache-2.0
"""How many fully randomised images a second `ukd render` makes, on two cores, written to disk."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _measuring import CORES, machine, table, use_two_cores, write  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write results/renderer.json."""
    parser = argparse.ArgumentParser(prog="ukd bench renderer", description=__doc__)
    parser.add_argument("--config", type=Path, help="scene settings (default: the defaults, 640x480)")
    parser.add_argument("--count", type=int, default=300, help="images (default %(default)s)")
    options = parser.parse_args(arguments)
    use_two_cores()
    from ukd_ros.config import load_config
    from ukd_ros.data.render_dataset import DEMO, MeshSource, render_dataset
    from ukd_ros.data.scenes import SceneConfig

    config = load_config(SceneConfig, options.config)
    about = machine()
    spent = {}
    with tempfile.TemporaryDirectory() as folder:
        # two runs: their difference leaves out what starting the processes and making the textures takes once
        for count in (2 * CORES, 2 * CORES + options.count):
            start = time.monotonic()
            render_dataset(config, [MeshSource(DEMO)], Path(folder) / str(count), count, workers=CORES, progress=False)
            spent[count] = time.monotonic() - start
    short, long = sorted(spent)
    rate = (long - short) / (spent[long] - spent[short])
    data = {
        "machine": about,
        "size": [config.width, config.height],
        "images_per_s": rate,
        "images_per_s_with_start": long / spent[long],
        "start_s": spent[short],
    }
    rows = [
        (f"images/s at {config.width}x{config.height}, {CORES} processes", f"{rate:.1f}", ">= 10"),
        (f"  with the start, {long} images", f"{long / spent[long]:.1f}", ""),
    ]
    sys.stdout.write(table(rows, about) + f"\nwritten: {write('renderer', data)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
