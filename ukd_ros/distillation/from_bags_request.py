# SPDX-License-Identifier: Apache-2.0
"""What can be asked of `ukd distill --bag`, and what a folder knows of what it was asked for before."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ukd_ros.config import to_mapping
from ukd_ros.data.rosbag.options import BagOptions
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.distillation.distill import DistillConfig
from ukd_ros.distillation.pseudo_labels import PseudoLabelOptions

RESULT, REQUEST = "result.json", "request.json"


@dataclass(frozen=True)
class FromBagsConfig:
    """How bags become a student.

    `bags`: how frames are taken. `labels`: when a teacher's pose is a label. `distill`: how the student is trained; its
    `unlabelled_share` of windows is cut from frames without looking at labels, and there the teachers' votes alone
    teach. `supposed_share`: share of windows cut around accepted labels, less where that were more than
    `windows_per_label` of each: few labels would be learnt by heart. `calibrate_views`: renders of `held_out` used
    for the teachers' calibration and for the student's. `name` of the model (empty: that of the folder).
    """

    bags: BagOptions = field(default_factory=BagOptions)
    labels: PseudoLabelOptions = field(default_factory=PseudoLabelOptions)
    distill: DistillConfig = field(default_factory=DistillConfig)
    supposed_share: float = 0.25
    windows_per_label: int = 40
    calibrate_views: int = 300
    zoom_rounds: int = 3
    name: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot run; ValueError names the field."""
        if not 0.0 <= self.supposed_share < 1.0 - self.distill.unlabelled_share:
            raise ValueError(
                f"supposed_share: is {self.supposed_share}, but with distill.unlabelled_share "
                f"{self.distill.unlabelled_share} it must stay below {1.0 - self.distill.unlabelled_share:.2f}."
            )
        for name in ("calibrate_views", "zoom_rounds", "windows_per_label"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: is {getattr(self, name)}, but at least 1 is needed.")


@dataclass(frozen=True)
class FromBagsRequest:
    """What one call asks for: see `distill_from_bags`."""

    config: FromBagsConfig
    bags: tuple[Path, ...]
    teachers: tuple[Path, ...]
    out: Path
    renders: tuple[Path, ...] = ()
    held_out: Path | None = None
    objects: tuple[str, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """Return what decides the student, as plain data."""
        return {
            "config": json.loads(json.dumps(to_mapping(self.config), default=str)),
            "bags": [str(path.resolve()) for path in self.bags],
            "teachers": [str(path.resolve()) for path in self.teachers],
            "renders": [str(path.resolve()) for path in self.renders],
            "held_out": None if self.held_out is None else str(self.held_out.resolve()),
            "objects": list(self.objects),
        }

    def compare(self, resume: bool) -> None:
        """Refuse a folder that an earlier run with another request has; ValueError names what differs."""
        path, mine = self.out / REQUEST, self.as_data()
        if not path.is_file():
            return
        if not resume:
            raise FileExistsError(f"{self.out}: holds an earlier run; resume it, or choose another folder")
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key in mine if theirs.get(key) != mine[key]]
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: is no request of an earlier run ({error}); choose another folder") from error
        if differing:
            raise ValueError(
                f"{path}: the run in this folder was asked for with other {', '.join(differing)}; ask for the same "
                "again, or choose another folder"
            )

    def claim(self) -> None:
        """Write down what `out` is for, once."""
        if not (self.out / REQUEST).is_file():
            write_bytes(self.out / REQUEST, (json.dumps(self.as_data(), indent=1) + "\n").encode())


@dataclass(frozen=True)
class FromBagsResult:
    """The finished model, the report, the line that starts the pose node on it, and a sentence on how it went."""

    model: Path
    report: Path
    launch: str
    summary: str

    def keep(self, out: Path) -> None:
        """Write down that the run in a folder is finished."""
        told = {"model": str(self.model), "report": str(self.report), "launch": self.launch, "summary": self.summary}
        write_bytes(out / RESULT, (json.dumps(told, indent=1) + "\n").encode())


def finished(out: Path) -> FromBagsResult | None:
    """Return the result of an earlier call in this folder, None when there is none yet."""
    path = out / RESULT
    if not path.is_file():
        return None
    told = json.loads(path.read_text(encoding="utf-8"))
    return FromBagsResult(Path(told["model"]), Path(told["report"]), str(told["launch"]), str(told["summary"]))
