# SPDX-License-Identifier: Apache-2.0
"""The command line `ukd`: which words there are, and what is said of mistakes. `commands` does what they ask for.

What a user can mend is one line on stderr and exit status 2 (`--debug` shows the traceback); an interrupt is 130.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ukd_ros.commands import (
    bag,
    bench,
    calibrate,
    compare,
    demo,
    distill,
    evaluate,
    export,
    infer,
    new_object,
    render,
    train,
)
from ukd_ros.config import COMMAND_LINE, ConfigError, parse_duration

PASSED_ON = ("demo", "bench")
"""Commands with a command line of their own."""

EXTRAS = {
    "train": ("torch", "ot", "onnx", "onnxslim", "safetensors", "scipy", "matplotlib", "tqdm", "moderngl", "trimesh"),
    "demo": ("rosbags", "lz4", "backports"),
    "onnxruntime": ("onnxruntime",),
}


# ---- what can be typed -----------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="ukd", description="Train, calibrate and run small pose estimators.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_render(commands)
    _add_train(commands)
    _add_distill(commands)
    _add_export(commands)
    _add_calibrate(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_infer(commands)
    _add_bag(commands)
    _add_new_object(commands)
    commands.add_parser("demo", help="play a bag into the real node and measure its answers", add_help=False)
    commands.add_parser("bench", help="run a benchmark (from a checkout)", add_help=False)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    """Add one command with what all of them share."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=run)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
    words = "settings over those of the file (dots between nested keys)"
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=words)
    parser.add_argument("--settings", action="store_true", help="print the settings as YAML and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    return parser


def _add_render(commands: Any) -> None:
    parser = _command(commands, "render", render, "render a BOP-format data set of your parts from their meshes")
    add = parser.add_argument
    add("--mesh", action="append", default=[], metavar="FILE", help=".ply, .obj or .stl; again for more parts; or demo")
    add("--unit", action="append", default=[], choices=("mm", "cm", "m"), help="unit of the mesh files")
    add("--name", action="append", default=[], help="the part's name, once per mesh (default: the file's)")
    add("--id", action="append", default=[], type=_positive, help="the part's BOP object id, once per mesh")
    words = "a turn that nobody can tell: z:180 (that one), z (any about z); with several meshes NAME=z:180"
    add("--symmetry", action="append", default=[], metavar="[NAME=]z:180", help=words)
    add("--distractor", action="append", default=[], metavar="FILE", help="mesh of something else to put around")
    add("--distractor-unit", action="append", default=[], choices=("mm", "cm", "m"), help="unit of the distractors")
    add("--out", type=Path, metavar="DIR", help="the data set's folder; an interrupted one is continued")
    add("--count", type=_positive, metavar="N", help="number of images")
    add("--seed", type=int, default=0, help="images depend on settings, seed and their number only (default 0)")
    add("--split", default="train", help="name of the split (default train)")
    add("--workers", type=int, default=0, help="processes (default: one per core)")
    add("--preview", nargs="?", const="", metavar="PNG", help="also write a contact sheet")


def _add_train(commands: Any) -> None:
    parser = _command(commands, "train", train, "train a network on BOP-format folders with masks")
    add = parser.add_argument
    _add_training(parser)
    add("--ensemble", type=_positive, metavar="M", help="train M seeds side by side into OUT/seed-N, sharing the views")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", action="append", default=[], type=Path, metavar="DIR", help="BOP-format folder; again for more")
    add("--object", action="append", default=[], metavar="NAME", help="object to learn; again for more (default: all)")
    add("--held-out", type=Path, metavar="DIR", help="BOP-format folder that is only validated on")
    add("--out", type=Path, metavar="DIR", help="checkpoint.pt, metrics.jsonl and curves.png appear here")
    add("--resume", action="store_true", help="go on where the run in --out stopped, with the same numbers")
    add("--time-budget", type=_duration, metavar="9m", help="stop and checkpoint then; the schedule does not change")
    words = "processes that share out every step, on CPUs faster than threads; micro_batch must divide (default 1)"
    add("--processes", type=_positive, default=1, metavar="N", help=words)


def _add_distill(commands: Any) -> None:
    parser = _command(commands, "distill", distill, "train a student beside an ensemble of teachers")
    add = parser.add_argument
    words = "a teacher's run or file, or a folder of several, such as that of ukd train --ensemble; again for more"
    add("--teacher", action="append", default=[], type=Path, metavar="RUN", help=words)
    _add_training(parser)
    words = "rosbag to learn from without labels; again for more; the same call goes on where it stopped"
    add("--bag", action="append", default=[], type=Path, metavar="BAG", help=words)
    words = "BOP-format folder whose labels, if any, are not read; again for more"
    add("--unlabelled", action="append", default=[], type=Path, metavar="DIR", help=words)
    add("--cache", type=Path, metavar="DIR", help="where the teachers' answers are kept (default OUT/teachers)")


def _add_export(commands: Any) -> None:
    parser = _command(commands, "export", export, "write a model folder that the node can load")
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="checkpoint.pt, or the folder of the training run")
    add("--out", type=Path, metavar="DIR", help="the model's folder, such as models/NAME")
    add("--name", help="the model's name (default: the folder's)")
    add("--overwrite", action="store_true", help="replace a model that is there")
    add("--teacher", action="store_true", help="write one .safetensors file for ukd distill --teacher instead")
    add("--bits", type=int, choices=(8, 16), default=8, help="of a teacher's weights (default %(default)s)")


def _add_calibrate(commands: Any) -> None:
    parser = _command(commands, "calibrate", calibrate, "fit a model's covariance on labelled views it has never seen")
    add = parser.add_argument
    _add_model(parser)
    add("--dataset", type=Path, metavar="DIR", help="BOP-format folder")
    add("--crops", choices=("locate", "oracle"), help="where crops come from (default: locate)")
    _add_names(parser)
    add("--limit", type=_positive, metavar="N", help="at most so many views")
    words = "keep what renders taught, and fit one factor on a handful of labelled real frames"
    add("--recalibrate", action="store_true", help=words)
    add("--out", type=Path, metavar="DIR", help="write calibration.json and reliability.png here")


def _add_evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", evaluate, "score a model on labelled images, with its covariance")
    add = parser.add_argument
    _add_model(parser)
    add("--dataset", type=Path, metavar="DIR", help="BOP-format folder")
    add("--split", help="split folder (default: the only one)")
    _add_names(parser)
    add("--limit", type=_positive, metavar="N", help="at most so many images, evenly spread")
    add("--crops", choices=("estimator", "oracle"), help="crops as on the robot (default), or from the truth")
    add("--out", type=Path, metavar="DIR", help="write report.txt, report.json and pictures here")


def _add_compare(commands: Any) -> None:
    words = "say whether one model is better than another on the same images, with an interval"
    parser = _command(commands, "compare", compare, words)
    parser.add_argument(
        "before", nargs="?", type=Path, metavar="BEFORE", help="report.json of ukd evaluate, or its folder"
    )
    parser.add_argument("after", nargs="?", type=Path, metavar="AFTER", help="the other model's, on the same targets")


def _add_names(parser: argparse.ArgumentParser) -> None:
    words = "the data set's object ID is the model's NAME"
    parser.add_argument("--name", action="append", default=[], type=_object_name, metavar="ID=NAME", help=words)
    parser.add_argument("--ids", metavar="[FIRST,LAST]", help="only images with FIRST <= id < LAST")


def _add_infer(commands: Any) -> None:
    parser = _command(commands, "infer", infer, "estimate the poses in photographs")
    add = parser.add_argument
    _add_model(parser)
    add("--image", action="append", default=[], type=Path, metavar="FILE", help="a photograph; again for more")
    add("--camera", type=Path, metavar="YAML", help="calibration file of ROS' camera_calibration")
    add("--rectified", action="store_true", help="the photographs are rectified: use projection_matrix")
    for name in ("fx", "fy", "cx", "cy"):
        add(f"--{name}", type=float, metavar="PX", help=argparse.SUPPRESS if name != "fx" else "fx, fy, cx, cy instead")
    add("--out", type=Path, default=Path("infer_out"), metavar="DIR", help="pictures and JSON (default %(default)s)")


def _add_bag(commands: Any) -> None:
    parser = _command(commands, "bag", bag, "say what rosbags hold, or take their frames as a BOP-format folder")
    add = parser.add_argument
    add("action", choices=("info", "to-bop"), help="what to do with them")
    add("bag", nargs="*", type=Path, metavar="BAG", help="folder of rosbag2, or an .mcap, .db3 or .bag file")
    add("--out", type=Path, metavar="DIR", help="the folder of to-bop; an interrupted one is continued")
    words = "BOP id of a labelled object; again for more (default: numbered by the alphabet)"
    add("--name", action="append", default=[], type=_object_name, metavar="ID=NAME", help=words)


def _add_new_object(commands: Any) -> None:
    parser = _command(commands, "new-object", new_object, "make a model of a part from its mesh, in a given time")
    add = parser.add_argument
    add("--mesh", metavar="FILE", help=".ply, .obj or .stl; or demo")
    add("--unit", choices=("mm", "cm", "m"), help="unit of the mesh file")
    add("--name", help="the part's and the model's name: letters, digits and underscores")
    add("--bag", action="append", default=[], type=Path, metavar="BAG", help="rosbag of it, without labels; from 1h on")
    add("--budget", type=_duration, metavar="20m", help="it ends in this time: 5m or more; from 1h on with teachers")
    add("--symmetry", action="append", default=[], metavar="z:180", help="a turn that nobody can tell (z: any about z)")
    add("--out", type=Path, metavar="DIR", help="the model's folder (default models/NAME)")
    add("--work", type=Path, metavar="DIR", help="renders, checkpoints and the report (default work/NAME)")
    add("--overwrite", action="store_true", help="replace a model that is there")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="an installed model, or its folder")
    kinds = ("auto", "onnxruntime", "opencv", "torch")
    parser.add_argument("--backend", choices=kinds, help="runtime (default auto: the first present)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _object_name(text: str) -> tuple[int, str]:
    number, equals, name = text.partition("=")
    if not equals or not number.isdecimal() or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ID=NAME, such as 8=driller")
    return int(number), name


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# ---- running it ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ukd`; return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    command = next((word for word in words if not word.startswith("-")), "")
    try:
        if command in PASSED_ON:
            rest = words[words.index(command) + 1 :]
            return demo(rest) if command == "demo" else bench(rest)
        options = build_parser().parse_args(words)
        return int(options.run(options))
    except KeyboardInterrupt as stop:  # also data.progress.Stopped, which says what is kept
        sys.stderr.write(f"ukd {command}: {str(stop) or 'stopped'}\n")
        return 130
    except BrokenPipeError:  # `ukd ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if debug:
            raise
        sys.stderr.write(f"ukd {command}: {_sentence(error)}\n")
        return 2


def _sentence(error: Exception) -> str:
    """Word an error as one line with its cure."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = error.name.split(".")[0]
        for extra, modules in EXTRAS.items():
            if top in modules:
                return f"needs {top}, which is not installed: pip install 'ukd_ros[{extra}]'"
    if isinstance(error, ImportError) and str(error.name).startswith(("rclpy", "sensor_msgs", "geometry_msgs")):
        return f"needs ROS 2 ({error.name}): source its setup file, or pip install 'ukd_ros[ros-wheels]'"
    if isinstance(error, ConfigError) and error.source == COMMAND_LINE:
        return f"--set {error.key}: {error.problem}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error) in (RuntimeError, ValueError, ImportError):  # not one of ours: say how to see where
        text += " (--debug shows where)"
    return text


if __name__ == "__main__":
    sys.exit(main())
