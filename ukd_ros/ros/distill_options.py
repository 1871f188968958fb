# SPDX-License-Identifier: Apache-2.0
"""What the offline node can be told, and the line that tells it: python -m ukd_ros.ros.distill_options writes the file.

Only what changes from run to run is a parameter: which bags, which teachers, where to. The hundred settings of the
distillation itself stay in one YAML file (``config``) with ``settings`` over it, as `ukd distill --config --set` takes
them: one file then serves the node and the command line, is checked by the same strict loader, and is kept beside the
run. As ROS parameters they would be written down twice and could only be set before a job starts anyway.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import shlex
import sys
import textwrap
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ukd_ros.config import parse_duration
from ukd_ros.ros.parameters import ParameterField, descriptor, from_parameter, parameter_fields

NAME = "distill_node"
LAUNCH = "ros2 launch ukd_ros distill.launch.py"

FILE_HEAD = """\
# SPDX-License-Identifier: Apache-2.0
# Every parameter of the offline node with its default; a launch argument of the same name overrides the value here.
# All are read once, at start. A list of one may be written as plain text.
# Written by: python -m ukd_ros.ros.distill_options
/**:
  ros__parameters:
"""

OF_EVERY_NODE = ("use_sim_time", "start_type_description_service")
"""Parameters that rclpy itself reads on any node; qos_overrides. are the others."""


@dataclass(frozen=True)
class DistillNodeOptions:
    """What the node is told; paths may start with ~, and what is relative is so to where the node was started."""

    bag: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Bags of your own camera, labelled or not: .mcap, .db3 or .bag files, or rosbag2 folders."},
    )
    teacher: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Teachers: runs of ukd train, files of ukd export --teacher, or folders of several."},
    )
    out: str = field(
        default="",
        metadata={"help": "Folder of the run; an unfinished one is continued. The model appears in its models/NAME."},
    )
    name: str = field(default="", metadata={"help": "The model's name; empty: as the settings say, or the folder's."})
    renders: tuple[str, ...] = field(
        default=(), metadata={"help": "BOP-format folders of rendered views with labels, learnt beside the bags."}
    )
    held_out: str = field(
        default="",
        metadata={
            "help": "BOP-format folder of renders that neither teachers nor student learn from: both are calibrated on "
            "it. Without one nothing says how sure the teachers may be, and no frame is labelled."
        },
    )
    object: tuple[str, ...] = field(
        default=(), metadata={"help": "Objects to learn; empty: all that the teachers know."}
    )
    config: str = field(
        default="",
        metadata={
            "help": "YAML file with the settings of the distillation, as ukd distill --bag --config takes it; empty: "
            "config/distill_bags.yaml of this package."
        },
    )
    settings: tuple[str, ...] = field(
        default=(), metadata={"help": "key=value over those of the file, as ukd distill --set takes them."}
    )
    time_budget: str = field(
        default="", metadata={"help": "Stop and keep a checkpoint then, such as 90s, 45m or 1h30m; empty: no limit."}
    )
    resume: bool = field(
        default=True, metadata={"help": "Go on with the run that is in the folder; false refuses one that is there."}
    )
    stop_within_s: float = field(
        default=2.0,
        metadata={
            "help": "After Ctrl-C the step at hand may end and be kept; what has not ended this much later is cut, and "
            "the checkpoint before it is the last.",
            "unit": "s",
            "min": 1.0,
            "max": 3600.0,
        },
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work whatever is on the disk."""
        for leaf in dataclasses.fields(self):
            value = getattr(self, leaf.name)
            if isinstance(value, tuple) and not all(value):
                raise ValueError(f"{leaf.name}: has an empty text among its values; leave it out.")
        wrong = [text for text in self.settings if "=" not in text]
        if wrong:
            raise ValueError(f"settings: {wrong[0]!r} is not of the form key=value (dots between nested keys).")
        if self.time_budget:
            try:
                parse_duration(self.time_budget)
            except ValueError as error:
                raise ValueError(f"time_budget: {error}.") from error

    @property
    def time_budget_s(self) -> float | None:
        """Return the budget in seconds, None without one."""
        return parse_duration(self.time_budget) if self.time_budget else None


def path_of(text: str) -> Path:
    """Return the path that a person meant, ~ included: no shell has looked at a launch argument's value."""
    return Path(text).expanduser()


def check_inputs(options: DistillNodeOptions) -> None:
    """Raise ValueError when what must be given is not, or is not on the disk; quick, before anything is imported."""
    for name in ("bag", "teacher", "out"):
        if not getattr(options, name):
            raise ValueError(f"parameter {name}: is missing. Start it as: {LAUNCH} bag:=BAG teacher:=RUN out:=FOLDER")
    single = {"held_out": options.held_out, "config": options.config}
    given = [(name, text) for name in ("bag", "teacher", "renders") for text in getattr(options, name)]
    for name, text in [*given, *((name, text) for name, text in single.items() if text)]:
        if not path_of(text).exists():
            several = "" if name in single or "," not in text else f"; several are a list: -p {name}:='[A, B]'"
            raise ValueError(f"parameter {name}: there is nothing at {path_of(text).absolute()}{several}.")


def option_fields() -> list[ParameterField]:
    """Return every parameter of the node."""
    return list(parameter_fields(DistillNodeOptions()))


def declare_options(node: Any, overrides: Iterable[str]) -> DistillNodeOptions:
    """Declare every parameter on ``node``, read-only, and return what it was given.

    ``overrides``: the names of all that the node was given. ValueError for one that it does not know and for values
    that the options refuse; rclpy's ParameterException subclasses for a wrong type or range.
    """
    leaves = option_fields()
    names = [leaf.name for leaf in leaves]
    for name in overrides:
        if name not in (*names, *OF_EVERY_NODE) and not name.startswith("qos_overrides."):
            close = difflib.get_close_matches(name, names, n=1)
            there_are = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}."
            raise ValueError(f"parameter {name}: the node has none of this name; {there_are}")
    given: dict[str, Any] = {}
    for leaf in leaves:
        described = descriptor(leaf)
        described.read_only = True
        described.additional_constraints = "read once, at start"
        listed = typing.get_origin(leaf.kind) is tuple
        # One bag may be given as plain text, and rclpy reads an empty list as a value of no type.
        described.dynamic_typing = listed
        default = [""] if listed else getattr(DistillNodeOptions(), leaf.name)
        value = node.declare_parameter(leaf.name, default, described).value
        given[leaf.name] = _texts(leaf.name, value) if listed else from_parameter(leaf.kind, value)
    try:
        return DistillNodeOptions(**given)
    except ValueError as error:
        raise ValueError(f"parameter {error}") from error


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if value is None or value == "" or value == [""]:
        return ()
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"parameter {name}: must be text or a list of texts, not {value!r}; quote what is a number.")
    return texts


def as_argument(values: Iterable[str]) -> str:
    """Return a list as one launch argument: parted by commas, or a YAML list where a value has a comma itself.

    Commas, because a colon (os.pathsep) is in the time stamps that bags are often named by.
    """
    texts = list(values)
    plain = not any("," in text or text != text.strip() for text in texts) and not texts[0].startswith("[")
    return ",".join(texts) if plain else json.dumps(texts, ensure_ascii=False)


def launch_line(options: DistillNodeOptions) -> str:
    """Return the line for a shell that goes on with a run; ``resume`` is its default."""
    words = []
    for leaf in option_fields():
        value = getattr(options, leaf.name)
        if leaf.name == "resume" or value == getattr(DistillNodeOptions(), leaf.name):
            continue
        text = as_argument(value) if isinstance(value, tuple) else str(value)
        words.append(f"{leaf.name}:={text}")
    return " ".join([LAUNCH, *(shlex.quote(word) for word in words)])


def options_file() -> str:
    """Return the text of config/distill_node.yaml."""
    # it knows the pose node's options too, and these bring OpenCV: not for --help
    from ukd_ros.ros.parameter_file import HEAD, parameter_file

    return FILE_HEAD + parameter_file({"": DistillNodeOptions()}).removeprefix(HEAD)


def help_text() -> str:
    """Return the answer to --help."""
    lines = [
        f"usage: {LAUNCH} bag:=BAG[,BAG] teacher:=RUN out:=FOLDER [NAME:=VALUE ...]",
        f"       ros2 run ukd_ros {NAME} --ros-args -p bag:=BAG -p teacher:=RUN -p out:=FOLDER [-p NAME:=VALUE ...]",
        "",
        "Distil teachers into a student for your own camera, from bags without labels. Ctrl-C stops and keeps a",
        "checkpoint; the same line goes on. Exit status: 0 finished, 130 stopped, 1 failed, 2 refused at start.",
        "",
    ]
    for leaf in option_fields():
        lines += textwrap.wrap(
            f"{leaf.name:<15}{leaf.field.metadata['help']}", 118, initial_indent="  ", subsequent_indent=" " * 17
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(options_file())
