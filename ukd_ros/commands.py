# SPDX-License-Identifier: Apache-2.0
"""The commands of `ukd`: what was typed becomes one call of the room that does the work, and its answer is printed.

Every command's heavy imports happen inside it, so that `ukd --help` is quick and works without the extras.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ukd_ros.config import load_config, to_mapping

if TYPE_CHECKING:
    from ukd_ros.distillation.train import TrainResult
    from ukd_ros.geometry.camera import Camera


class UsageError(ValueError):
    """Arguments that contradict each other or are not enough."""


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
    declared = _declared_symmetries(options.symmetry, [target.label() for target in targets])
    targets = [replace(target, symmetry=declared[target.label()]) for target in targets]
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
    from ukd_ros.distillation.folders import open_folders
    from ukd_ros.distillation.train import train_on_folders
    from ukd_ros.distillation.train_config import TrainConfig

    config = load_config(TrainConfig, options.config, options.set)
    if options.settings:
        return _show(config)
    _needs(options, "dataset", "out")
    if options.ensemble is not None:
        if options.processes > 1:
            raise UsageError("--processes: the members of --ensemble are processes already; leave it out")
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
    result = train_on_folders(config, options.dataset, options.out, **_training(options))
    return _tell("trained", result, config.steps)


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
        unlabelled=options.unlabelled,
        cache=options.cache,
        **_training(options),
    )
    return _tell("distilled", result, config.steps)


def _distill_bags(options: argparse.Namespace) -> int:
    from ukd_ros.distillation.from_bags import distill_from_bags

    if options.processes > 1:
        raise UsageError("--processes: with --bag, start the processes with torchrun (docs/distillation.md)")
    from ukd_ros.distillation.from_bags_request import FromBagsConfig

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


def compare(options: argparse.Namespace) -> int:
    """Compare two reports of evaluate, target by target."""
    from ukd_ros.distillation.paired import CompareConfig, compare_reports

    config = load_config(CompareConfig, options.config, options.set)
    if options.settings:
        return _show(config)
    if options.before is None or options.after is None:
        raise UsageError("two reports must be given, BEFORE and AFTER; see ukd compare --help")
    print(compare_reports(options.before, options.after, config).table())
    return 0


def infer(options: argparse.Namespace) -> int:
    """Estimate the poses in photographs."""
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
    from ukd_ros.data.rosbag.frames import BagOptions, bags_to_bop
    from ukd_ros.data.rosbag.info import bag_info
    from ukd_ros.data.rosbag.storage import BagError

    config = load_config(BagOptions, options.config, options.set)
    if options.settings:
        return _show(config)
    if not options.bag:
        raise UsageError(f"no bag is named; see ukd {options.command} --help")
    if options.action == "info":
        broken = 0
        for path in options.bag:
            try:
                print(bag_info(path, config).text())
            except (BagError, OSError) as error:
                if len(options.bag) == 1:
                    raise
                broken += 1
                sys.stderr.write(f"ukd bag: {' '.join(str(error).split())}\n")
        return 2 if broken else 0
    _needs(options, "out")
    names = {name: number for number, name in options.name} or None
    report = bags_to_bop(options.bag, options.out, config, names=names, progress=not options.quiet)
    print(f"{report.table()}\n{options.out}: a BOP-format folder (report.json for programs)")
    return 0


def new_object(options: argparse.Namespace) -> int:
    """Make a model of a part from its mesh, in a given time."""
    from ukd_ros.data.progress import Stopped
    from ukd_ros.data.render_dataset import DEMO
    from ukd_ros.distillation.new_object import new_object as make
    from ukd_ros.distillation.new_object_request import NewObjectConfig, NewObjectRequest

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
    try:
        result = make(config, request, progress=not options.quiet)
    except KeyboardInterrupt as stop:  # a stage words it for the command that it belongs to otherwise
        raise Stopped(f"stopped; what is done is kept in {request.work}, and the same line goes on") from stop
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


# ---- what several of them share ---------------------------------------------------------------------------------


def _training(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `ukd train` and `ukd distill` ask of a training alike, by the names that the room has for it."""
    return {
        "objects": options.object,
        "held_out": options.held_out,
        "resume": options.resume,
        "time_budget_s": options.time_budget,
        "processes": options.processes,
        "progress": not options.quiet,
    }


def _tell(done: str, result: TrainResult, steps: int) -> int:
    """Say how far a training of so many steps is, and what to type next."""
    if result.finished:
        print(f"{done} {result.step} steps; next: ukd export --checkpoint {result.checkpoint} --out models/NAME")
    else:
        print(f"stopped at step {result.step} of {steps}; go on with --resume")
    return 0


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


def _declared_symmetries(words: Sequence[str], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the words of --symmetry by the name of the part that each is about."""
    declared: dict[str, list[str]] = {name: [] for name in names}
    for word in words:
        name, named, turn = word.rpartition("=")
        if not named and len(names) == 1:
            name = names[0]
        if name not in declared:
            raise UsageError(f"--symmetry {word}: write NAME={turn} with NAME one of {', '.join(names)}")
        declared[name].append(turn)
    return {name: tuple(turns) for name, turns in declared.items()}


def _needs(options: argparse.Namespace, *names: str) -> None:
    missing = [f"--{name.replace('_', '-')}" for name in names if not getattr(options, name)]
    if missing:
        raise UsageError(f"{' and '.join(missing)} must be given; see ukd {options.command} --help")


def _show(config: Any) -> int:
    import yaml

    sys.stdout.write(yaml.safe_dump(to_mapping(config), sort_keys=False))
    return 0
