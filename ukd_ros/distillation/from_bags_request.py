# SPDX-License-Identifier: Apache-2.0
"""What can be asked of `ukd distill --bag`, and what a folder knows of what it was asked for before."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ukd_ros.config import to_mapping
from ukd_ros.data.rosbag.options import BagOptions
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.distillation.beginning import FREE, as_today
from ukd_ros.distillation.distill import DistillConfig
from ukd_ros.distillation.pseudo_labels import PseudoLabelOptions
from ukd_ros.distillation.teacher import TeacherError, member_files
from ukd_ros.perception.bundle import MANIFEST

logger = logging.getLogger(__name__)

RESULT, REQUEST = "result.json", "request.json"

PARTS = {"frames", "teachers.json", "labels", "proposals", "teachers"}
"""What may be in a folder without a request: each knows what it is of, and is refused where it is another's."""


@dataclass(frozen=True)
class FromBagsConfig:
    """How bags become a student.

    `bags`: how frames are taken. `labels`: when a teacher's pose is a label. `distill`: how the student is trained; its
    `unlabelled_share` of windows is cut from frames without looking at labels, and there the teachers' votes alone
    teach. `supposed_share`: share of windows cut around accepted labels, less where that were more than
    `windows_per_label` of each: few labels would be learnt by heart. `calibrate_views`: renders of `held_out` used
    for the teachers' calibration, as many others for the threshold of labels (half each where there are fewer), and for
    the student's calibration. `name` of the model (empty: that of the folder).
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
        """Return what decides the student, as plain data; bags and teachers by what is in them, too.

        BagError or TeacherError for one that is not there.
        """
        from ukd_ros.data.rosbag.frames import bag_identity  # reads bags: needs rosbags

        return {
            "config": json.loads(json.dumps(to_mapping(self.config), default=str)),
            "bags": [{"path": str(path.resolve()), **bag_identity(path)} for path in self.bags],
            "teachers": [
                {"path": str(path.resolve()), "sha256": _sha256(path)} for path in member_files(self.teachers)
            ],
            "renders": [str(path.resolve()) for path in self.renders],
            "held_out": None if self.held_out is None else str(self.held_out.resolve()),
            "objects": list(self.objects),
        }

    def compare(self, resume: bool) -> None:
        """Refuse a folder of something else, and one of an earlier run with another request.

        ValueError names what differs.
        """
        path = self.out / REQUEST
        if not path.is_file():
            # hidden files are left by a call that was killed while it wrote
            others = sorted(p.name for p in self.out.glob("[!.]*") if p.name not in PARTS) if self.out.exists() else []
            if others:
                raise ValueError(
                    f"{self.out}: holds {others[0]}, but no {REQUEST}: it is no folder of such a run; choose an empty "
                    "or a new one"
                )
            return
        mine = self.as_data()
        if not resume:
            raise FileExistsError(f"{self.out}: holds an earlier run; resume it, or choose another folder")
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            as_today(theirs["config"]["distill"])
            differing = _other_settings(theirs.get("config"), mine.pop("config"))
            differing += [key for key in mine if theirs.get(key) != mine[key]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
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
        told = {
            "model": str(self.model.resolve()),
            "report": str(self.report.resolve()),
            "launch": self.launch,
            "summary": self.summary,
        }
        write_bytes(out / RESULT, (json.dumps(told, indent=1) + "\n").encode())


def finished(out: Path) -> FromBagsResult | None:
    """Return the result of an earlier call in this folder, None when there is none, or when its model is gone."""
    path = out / RESULT
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        done = FromBagsResult(Path(told["model"]), Path(told["report"]), str(told["launch"]), str(told["summary"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete it, and the ending is done again") from error
    missing = [place for place in (done.model / MANIFEST, done.report) if not place.is_file()]
    if missing:
        logger.warning("%s: is gone; it is made again", missing[0])
        return None
    return done


def launch_line(model: Path) -> str:
    """Return the line, for a shell, that starts the pose node on a model."""
    return f"ros2 launch ukd_ros pose.launch.py {shlex.quote(f'model:={model.resolve()}')}"


def _other_settings(then: Any, now: Any, key: str = "") -> list[str]:
    """Return the settings, with both values, in which two configurations as plain data differ; `FREE` ones may."""
    if isinstance(then, dict) and isinstance(now, dict):
        names = dict.fromkeys([*now, *then])
        return [
            told
            for name in names
            for told in _other_settings(then.get(name), now.get(name), f"{key}.{name}" if key else str(name))
        ]
    free = key.startswith("distill.") and key.removeprefix("distill.") in FREE
    return [] if then == now or free else [f"{key or 'config'} (then {then}, now {now})"]


def _sha256(path: Path) -> str:
    """Return the digest of a teacher's file; TeacherError when it is not there."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise TeacherError(f"{path}: cannot be read ({error.strerror}); name a teacher's run or file") from error
