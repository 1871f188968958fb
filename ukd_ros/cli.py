# SPDX-License-Identifier: Apache-2.0
"""The command line `ukd`: what is typed becomes one call of the room that does the work; no logic lives here.

Every command's heavy imports happen inside it, so that `ukd --help` is quick and works without the extras. What a user
can mend is one line on stderr and exit status 2 (`--debug` shows the traceback); an interrupt is 130.
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ukd_ros.config import COMMAND_LINE, ConfigError, load_config, parse_duration, to_mapping

if TYPE_CHECKING:
    from ukd_ros.geometry.camera import Camera

PASSED_ON = ("demo", "bench")
"""Commands with a command line of their own."""

EXTRAS = {
    "train": ("torch", "ot", "onnx", "onnxslim", "safetensors", "scipy", "matplotlib", "tqdm", "moderngl", "trimesh"),
    "demo": ("rosbags", "lz4", "backports"),
    "onnxruntime": ("onnxruntime",),
}


class UsageError(ValueError):
    """Arguments that contradict each other or are not enough."""


# ---- the commands ----------------------------------------------------------------------------------------------


def render(options: argparse.Namespace) -> int:
    """Render a BOP-format data set from meshes."""
    from ukd_ros.data.preview import write_contact_sheet
    from ukd_ros.data.render_dataset import DEMO, MeshSource, render_dataset
    from ukd_ros.data.scenes import SceneConfig

    config = load_config(SceneConfig, options.config, options.set)
    if options.settings:
        return _show(config)
    _needs(options, "mesh", "out", "count")
    units = _one_each("unit", options.unit, len(options.mesh))
    names = _one_each("name", options.name, len(options.mesh), share=False)
    ids = _one_each("id", options.id, len(options.mesh), share=False)
    targets = [
        MeshSource(mesh, None if mesh == DEMO else unit, name or "", number or 0)
        for mesh, unit, name, number in zip(options.mesh, units, names, ids, strict=True)
    ]
    distractor_units = _one_each("distractor-unit", options.distractor_unit, len(options.distractor))
    distractors = [MeshSource(mesh, unit) for mesh, unit in zip(options.distractor, distractor_units, strict=True)]
    out = render_dataset(
        config,
        targets,
        options.out,
        options.count,
        seed=options.seed,
        distractors=distractors,
        workers=options.workers,
        progress=not options.quiet,
        split=options.split,
    )
    print(f"{options.count} images in {out}")
    if options.preview is not None:
        print(f"contact sheet {write_contact_sheet(out, options.preview or out / 'preview.png', split=options.split)}")
    return 0


def train(options: argparse.Namespace) -> int:
    """Train a network on BOP-format folders."""
    from ukd_ros.distillation.ensemble import train_ensemble
    from ukd_ros.distillation.train import TrainConfig, open_folders, train_on_folders

    config = load_config(TrainConfig, options.config, options.set)
    if options.settings:
        return _show(config)
    _needs(options, "dataset", "out")
    if options.ensemble is not None:
        data, models, held_out = open_folders(
            config,
            options.dataset,
            objects=options.object,
            held_out=options.held_out,
            progress=not options.quiet,
        )
        results = train_ensemble(
            config,
            options.ensemble,
            data,
            models,
            options.out,
            held_out=held_out,
            resume=options.resume,
            time_budget_s=options.time_budget,
            progress=not options.quiet,
        )
        for member in results:
            print(f"{member.checkpoint}: {member.step} of {config.steps} steps")
        return 0
    result = train_on_folders(
        config,
        options.dataset,
        options.out,
        objects=options.object,
        held_out=options.held_out,
        resume=options.resume,
        time_budget_s=options.time_budget,
        progress=not options.quiet,
    )
    if result.finished:
        print(f"trained {result.step} steps; next: ukd export --checkpoint {result.checkpoint} --out models/NAME")
    else:
        print(f"stopped at step {result.step} of {config.steps}; go on with --resume")
    return 0


def distill(options: argparse.Namespace) -> int:
    """Train a student beside an ensemble of teachers."""
    from ukd_ros.distillation.distill import DistillConfig, distill_on_folders

    if options.bag:
        return _distill_bags(options)
    config = load_config(DistillConfig, options.config, options.set)
    if options.settings:
        return _show(config)
    _needs(options, "teacher", "dataset", "out")
    result = distill_on_folders(
        config,
        options.teacher,
        options.dataset,
        options.out,
        objects=options.object,
        unlabelled=options.unlabelled,
        cache=options.cache,
        held_out=options.held_out,
        resume=options.resume,
        time_budget_s=options.time_budget,
        progress=not options.quiet,
    )
    if result.finished:
        print(f"distilled {result.step} steps; next: ukd export --checkpoint {result.checkpoint} --out models/NAME")
    else:
        print(f"stopped at step {result.step} of {config.steps}; go on with --resume")
    return 0


def _distill_bags(options: argparse.Namespace) -> int:
    from ukd_ros.distillation.from_bags import FromBagsConfig, distill_from_bags

    config = load_config(FromBagsConfig, options.config, options.set)
    if options.settings:
        return _show(config)
    _needs(options, "teacher", "out")
    if options.unlabelled or options.cache:
        raise UsageError("--unlabelled and --cache are for folders; with --bag everything is kept under --out")
    result = distill_from_bags(
        config,
        options.bag,
        options.teacher,
        options.out,
        renders=options.dataset,
        held_out=options.held_out,
        objects=options.object,
        time_budget_s=options.time_budget,
        progress=not options.quiet,
    )
    print(f"{result.summary}\n{result.report}: pictures and tables\n{result.launch}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a model folder from a checkpoint."""
    from ukd_ros.distillation.checkpoint import load_checkpoint
    from ukd_ros.distillation.export import ExportOptions, export_checkpoint, trained_options

    if options.settings and options.checkpoint is None:
        return _show(load_config(ExportOptions, options.config, options.set))
    _needs(options, "checkpoint", "out")
    checkpoint = options.checkpoint / "checkpoint.pt" if options.checkpoint.is_dir() else options.checkpoint
    if options.teacher:
        from ukd_ros.distillation.teacher_store import save_teacher

        if options.out.suffix != ".safetensors":
            raise UsageError(
                f"--out {options.out}: a teacher is one file, such as models/teachers/NAME/seed-0.safetensors"
            )
        if options.out.exists() and not options.overwrite:
            raise UsageError(f"{options.out}: is there already; --overwrite replaces it")
        save_teacher(options.out, load_checkpoint(checkpoint), options.bits)
        print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB; for ukd distill --teacher")
        return 0
    words = [*options.set, *(["overwrite=true"] if options.overwrite else [])]
    words += [f"name={options.name}"] if options.name else []
    trained = trained_options(load_checkpoint(checkpoint).config)
    config = load_config(ExportOptions, options.config, words, base=trained)
    if options.settings:
        return _show(config)
    report = export_checkpoint(checkpoint, options.out, config)
    for difference in report.differences:
        print(difference)
    print(f"{report.bundle.root}: {report.size / 1e6:.1f} MB")
    return 0


def calibrate(options: argparse.Namespace) -> int:
    """Fit how sure a model may be, on labelled views that it was not trained on."""
    from ukd_ros.distillation.calibrate import CalibrationOptions, calibrate_model, recalibrate_model

    given = {name: getattr(options, name) for name in ("crops", "ids")}
    words = [*options.set, *(f"{name}={value}" for name, value in given.items() if value)]
    config = load_config(CalibrationOptions, options.config, words)
    if options.settings:
        return _show(config)
    _needs(options, "model", "dataset")
    fit = recalibrate_model if options.recalibrate else calibrate_model
    report = fit(
        options.model,
        options.dataset,
        options.limit,
        options.out,
        options.backend or "auto",
        not options.quiet,
        options=config,
        names=dict(options.name),
    )
    print(report.table())
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """Score a model on labelled images."""
    from ukd_ros.distillation.evaluate import EvaluationOptions, evaluate_model

    given = {name: getattr(options, name) for name in ("backend", "crops", "limit", "split", "ids")}
    words = [f"{name}={value}" for name, value in given.items() if value not in (None, "")]
    config = load_config(EvaluationOptions, options.config, [*options.set, *words])
    if options.settings:
        return _show(config)
    _needs(options, "model", "dataset")
    report = evaluate_model(
        options.model,
        options.dataset,
        config,
        out=options.out,
        progress=not options.quiet,
        names=dict(options.name),
    )
    print(report.table())
    if options.out is not None:
        print(f"{options.out / 'report.html'}: tables, pictures and failures by their cause (report.json for programs)")
    return 0


def infer(options: argparse.Namespace) -> int:
    """Estimate the poses in photographs."""
    from dataclasses import replace

    from ukd_ros.perception.bundle import find_model, load_bundle
    from ukd_ros.perception.estimator import EstimatorOptions, PoseEstimator
    from ukd_ros.perception.photograph import infer_photograph, read_view

    config = replace(load_config(EstimatorOptions, options.config, options.set), tracking=False)
    if options.settings:
        return _show(config)
    _needs(options, "model", "image")
    stems = [image.stem for image in options.image]
    if len(set(stems)) < len(stems):
        raise UsageError("two images have the same name, and the answers are named after them: infer them separately")
    camera = _camera(options)
    bundle = load_bundle(find_model(options.model))
    estimator = PoseEstimator(bundle, options.backend or "auto", config)
    models = {model.name: model for model in bundle.objects}
    for image in options.image:
        result = infer_photograph(estimator, models, read_view(image, camera), options.out, image.stem)
        for estimate in result.estimates:
            x, y, z = estimate.T_camera_object.translation
            print(f"{image}: {estimate.object_name} score {estimate.score:.2f} at {x:.4f} {y:.4f} {z:.4f} m")
        for rejection in result.rejections:
            print(f"{image}: {rejection.object_name or 'nothing'}: {rejection.detail}")
    print(f"pictures and JSON in {options.out}")
    return 0


def bag(options: argparse.Namespace) -> int:
    """Say what bags hold, or write their frames as a BOP-format folder."""
    from ukd_ros.data.bag_frames import BagOptions, bags_to_bop
    from ukd_ros.data.bag_info import bag_info

    config = load_config(BagOptions, options.config, options.set)
    if options.settings:
        return _show(config)
    if not options.bag:
        raise UsageError(f"no bag is named; see ukd {options.command} --help")
    if options.action == "info":
        for path in options.bag:
            print(bag_info(path, config).text())
        return 0
    _needs(options, "out")
    names = {name: number for number, name in options.name} or None
    report = bags_to_bop(options.bag, options.out, config, names=names, progress=not options.quiet)
    print(f"{report.table()}\n{options.out}: a BOP-format folder (report.json for programs)")
    return 0


def new_object(options: argparse.Namespace) -> int:
    """Make a model of a part from its mesh, in a given time."""
    from ukd_ros.data.render_dataset import DEMO
    from ukd_ros.distillation.new_object import NewObjectRequest
    from ukd_ros.distillation.new_object import new_object as make
    from ukd_ros.distillation.new_object_stages import NewObjectConfig

    words = [*options.set, *([f"symmetry=[{','.join(map(repr, options.symmetry))}]"] if options.symmetry else [])]
    config = load_config(NewObjectConfig, options.config, words)
    if options.settings:
        return _show(config)
    _needs(options, "mesh", "name", "budget", *(() if options.mesh == DEMO else ("unit",)))
    request = NewObjectRequest(
        options.mesh,
        options.unit,
        options.name,
        options.budget,
        options.out or Path("models") / options.name,
        options.work or Path("work") / options.name,
        tuple(options.bag),
        options.overwrite,
    )
    result = make(config, request, progress=not options.quiet)
    covered = "nothing answered" if result.coverage is None else f"{result.coverage:.1%} in the 95 % ellipsoid"
    print(f"{result.model}: ADD-0.1d {result.add_recall:.1%} on held-out renders, {covered}; {result.seconds:.0f} s")
    print(f"{result.report}: how good it is and what would make it better (the work folder can be deleted)")
    print(result.launch)
    return 0


def demo(words: list[str]) -> int:
    """Play a bag into the real node and measure its answers."""
    from ukd_ros.ros.demo import main as run_demo

    return run_demo(words)


def bench(words: list[str]) -> int:
    """Run a benchmark of the checkout."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    if not names:
        raise UsageError("the benchmarks are not installed: run `ukd bench` from a checkout of the repository")
    if not words or words[0] not in names:
        if words and words[0] not in ("-h", "--help"):
            raise UsageError(f"there is no benchmark {words[0]!r}; there are {', '.join(names)}")
        print(f"usage: ukd bench {{{','.join(names)}}} ...")
        return 0
    script = folder / f"{words[0]}.py"
    saved, sys.argv = sys.argv, [str(script), *words[1:]]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = saved
    return 0


# ---- what is typed ---------------------------------------------------------------------------------------------


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


def _camera(options: argparse.Namespace) -> Camera:
    """Return the camera of `ukd infer`, from the file or from the four numbers."""
    from ukd_ros.perception.photograph import pinhole_camera, read_camera

    if options.camera is not None:
        return read_camera(options.camera, options.rectified)
    if options.fx is None:
        raise UsageError("the camera is missing: --camera FILE, or --fx with --fy, --cx and --cy (px)")
    return pinhole_camera(options.image[0], options.fx, options.fy, options.cx, options.cy)


def _one_each(option: str, given: Sequence[Any], count: int, share: bool = True) -> list[Any]:
    """Return one value per mesh: as given, one shared by all, or None for all."""
    if not given:
        return [None] * count
    if len(given) == count:
        return list(given)
    if share and len(given) == 1:
        return list(given) * count
    raise UsageError(f"--{option} is given {len(given)} times for {count} meshes; give it once per mesh")


def _needs(options: argparse.Namespace, *names: str) -> None:
    missing = [f"--{name.replace('_', '-')}" for name in names if not getattr(options, name)]
    if missing:
        raise UsageError(f"{' and '.join(missing)} must be given; see ukd {options.command} --help")


def _show(config: Any) -> int:
    import yaml

    sys.stdout.write(yaml.safe_dump(to_mapping(config), sort_keys=False))
    return 0


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
