# SPDX-License-Identifier: Apache-2.0
"""What each choice of the data and its augmentation buys: one training per arm, same budget, same seed, one switch off.

The arms stand in a YAML file: `objects`, `train` (settings of `ukd train` that all share), `arms` (name: `dataset`, a
folder under --root, and `set`, settings of its own). Every arm is trained, exported and evaluated on --data with the
gates on uncertainty open. What is done is kept in OUT, so an interrupted call goes on, and two calls with different
--only share the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _measuring import machine, write  # noqa: E402
from scaling import OPEN, _data, _renamed  # noqa: E402

MODES = ("oracle", "estimator")


@dataclass(frozen=True)
class Arm:
    """One training: the data set's folder under the root, and the settings in which it differs."""

    dataset: str
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ablation:
    """The file: what is learnt, with which settings, and the arms."""

    objects: tuple[str, ...]
    train: str
    arms: dict[str, Arm]
    set: tuple[str, ...] = ()
    seeds: tuple[int, ...] = field(default=(0,))

    def __post_init__(self) -> None:
        """Refuse a comparison of nothing."""
        if len(self.arms) < 2 or not self.seeds:
            raise ValueError("arms, seeds: at least two arms and one seed are needed.")


def run_arm(name: str, seed: int, ablation: Ablation, file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train, export and evaluate one arm; the row is kept under --out."""
    from ukd_ros.config import load_config, to_mapping
    from ukd_ros.distillation.evaluate import EvaluationOptions, evaluate_model
    from ukd_ros.distillation.export import export_checkpoint
    from ukd_ros.distillation.train import train_on_folders
    from ukd_ros.distillation.train_config import TrainConfig
    from ukd_ros.perception.estimator import EstimatorOptions

    arm = ablation.arms[name]
    config = load_config(TrainConfig, file.parent / ablation.train, [*ablation.set, *arm.set, f"seed={seed}"])
    question = [to_mapping(config), ablation.objects, options.root / arm.dataset, options.data, options.name, OPEN]
    asked = json.dumps(question, default=str, sort_keys=True)
    folder = options.out / f"{name}-{seed}-{hashlib.sha256(asked.encode()).hexdigest()[:10]}"
    kept = folder / "row.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    result = train_on_folders(config, [options.root / arm.dataset], folder, objects=ablation.objects, resume=True)
    row: dict[str, Any] = {"arm": name, "seed": seed, "samples": result.step * config.batch_size, "set": arm.set}
    with tempfile.TemporaryDirectory() as place:
        student = Path(place) / "student"
        export_checkpoint(result.checkpoint, student)
        for label, data, ids in options.data:
            for crops in MODES:
                gates = EstimatorOptions(**OPEN)
                settings = EvaluationOptions(ids=ids, crops=crops, estimator=gates)
                score = evaluate_model(student, data, settings, names=dict(options.name)).overall
                row[f"{label}, {crops}"] = {
                    "targets": score.targets,
                    "keypoint_px": score.keypoint_px,
                    "add_auc": score.add_auc,
                    "add_recall": score.add_recall,
                    "ar_mspd": score.ar_mspd,
                    "detection_rate": score.detection_rate,
                }
    temporary = kept.with_suffix(".new")
    temporary.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, kept)
    return row


def as_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, a column group per data set and kind of crop."""
    groups = [name for name, value in rows[0].items() if isinstance(value, dict)]
    head = ["arm"] + [f"{g}: keypoints px, AUC, AR MSPD, ADD-0.1d, found" for g in groups]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{row['arm']} ({row['seed']})"]
        for g in groups:
            s = row[g]
            shares = (100 * s[k] for k in ("add_auc", "ar_mspd", "add_recall", "detection_rate"))
            cells.append(f"{s['keypoint_px']:.1f}, " + ", ".join(f"{v:.1f} %" for v in shares))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Train and measure the arms; print the table and write results/ablation_NAME.json."""
    from ukd_ros.config import load_config

    parser = argparse.ArgumentParser(prog="ukd bench ablation", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the arms")
    parser.add_argument("--root", type=Path, required=True, help="folder that the arms' data sets lie in")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--data", type=_data, action="append", required=True, metavar="NAME=DIR[:FIRST-LAST]")
    parser.add_argument(
        "--name", type=_renamed, action="append", default=[], metavar="ID=NAME", help="ids of --data's objects"
    )
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms only")
    options = parser.parse_args(arguments)
    ablation = load_config(Ablation, options.config)
    unknown = set(options.only or ()) - set(ablation.arms)
    if unknown:
        parser.error(f"{options.config}: has no arms {', '.join(sorted(unknown))}; it has {', '.join(ablation.arms)}")
    names = [name for name in ablation.arms if options.only is None or name in options.only]
    rows = [run_arm(name, seed, ablation, options.config, options) for seed in ablation.seeds for name in names]
    if options.only is None:
        path = write(f"ablation_{options.config.stem}", {"machine": machine(), "gates": OPEN, "rows": rows})
        sys.stdout.write(f"written: {path}\n")
    sys.stdout.write(as_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
