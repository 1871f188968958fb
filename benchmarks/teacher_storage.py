# SPDX-License-Identifier: Apache-2.0
"""What storing teachers in 16 or 8 bits costs, and what their mean is worth: errors on held-out windows."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _measuring import machine, write  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and write results/teacher_storage.json."""
    import numpy as np
    import torch

    from ukd_ros.config import from_mapping
    from ukd_ros.data.bop import BopDataset
    from ukd_ros.data.dataset import WindowDataset
    from ukd_ros.distillation.checkpoint import load_checkpoint
    from ukd_ros.distillation.teacher import Ensemble, member_files
    from ukd_ros.distillation.teacher_store import load_teacher, save_teacher
    from ukd_ros.distillation.train import validate
    from ukd_ros.distillation.train_config import TrainConfig

    parser = argparse.ArgumentParser(prog="ukd bench teacher_storage", description=__doc__)
    parser.add_argument("--teacher", type=Path, action="append", required=True, help="run or checkpoint")
    parser.add_argument("--dataset", type=Path, required=True, help="held-out BOP folder with masks")
    parser.add_argument("--windows", type=int, default=512, help="windows (default %(default)s)")
    parser.add_argument("--views", type=int, default=150, help="views that they are cut from (default %(default)s)")
    options = parser.parse_args(arguments)
    data = BopDataset(options.dataset)

    class First:
        def __len__(self) -> int:
            return int(min(options.views, len(data)))

        def view(self, index: int) -> Any:
            return data.view(index)

    class Mean(torch.nn.Module):
        """The mean of all members, as a network answers."""

        def __init__(self, ensemble: Ensemble) -> None:
            super().__init__()
            self.ensemble, self.members = ensemble, torch.nn.ModuleList(ensemble.networks)

        def forward(self, image: Any) -> tuple[Any, Any, Any]:
            found = self.ensemble.predict(image)
            return found.score, found.xy, found.cov

    rows: dict[str, list[tuple[float, float, float]]] = {"32 bits": [], "16 bits": [], "8 bits": []}
    members = []
    windows: WindowDataset | None = None
    for path in member_files(options.teacher):
        content = load_checkpoint(path)
        settings = {k: v for k, v in content.config.items() if k in TrainConfig.__dataclass_fields__}
        config = from_mapping(
            TrainConfig, {**settings, "validate_windows": options.windows, "device": "cpu"}, str(path)
        )
        windows = windows or WindowDataset(First(), content.models, config.window, 12345)
        for name in rows:
            network = content.network
            size = 4.0 * sum(p.numel() for p in network.parameters())
            if name != "32 bits":
                with tempfile.TemporaryDirectory() as place:
                    stored = Path(place) / "teacher.safetensors"
                    save_teacher(stored, content, int(name.split()[0]))
                    size = stored.stat().st_size
                    network = load_teacher(stored).network
            found = validate(network, windows, config)
            rows[name].append((found["val_px"], found["val_found"], size / 1e6))
        members.append(content.network)
    assert windows is not None  # an ensemble of none is refused by the next line
    found = validate(Mean(Ensemble(members)), windows, config)  # type: ignore[arg-type]
    rows["mean of the members"] = [(found["val_px"], found["val_found"], sum(r[2] for r in rows["32 bits"]))]
    write("teacher_storage", {"machine": machine(), "windows": options.windows, "rows": rows})
    sys.stdout.write(
        "| storage | median keypoint error, px of the window | found | MB a teacher |\n|---|---|---|---|\n"
    )
    for name, values in rows.items():
        px, seen, size = np.mean(values, axis=0)
        sys.stdout.write(f"| {name} | {px:.3f} | {100 * seen:.2f} % | {size:.2f} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
