# SPDX-License-Identifier: Apache-2.0
"""What can be asked of `ukd new-object`, and what is refused before any work."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ukd_ros.config import to_mapping
from ukd_ros.data.augment import AugmentConfig
from ukd_ros.data.dataset import WindowConfig
from ukd_ros.data.render_dataset import DEMO, RENDERER, MeshSource
from ukd_ros.data.rosbag.options import BagOptions
from ukd_ros.data.scenes import SceneConfig
from ukd_ros.distillation.guide import GuideOptions
from ukd_ros.distillation.new_object_part import PartFacts, file_digest
from ukd_ros.distillation.new_object_plan import LEAST_BUDGET_S, TEACHERS_FROM_S
from ukd_ros.distillation.new_object_state import WorkState
from ukd_ros.distillation.train_config import TrainConfig
from ukd_ros.perception.bundle import find_model, load_bundle

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,59}")


class NewObjectError(RuntimeError):
    """A part cannot be learned as asked; the message says why and what to do. What was done is kept."""


@dataclass(frozen=True)
class NewObjectRequest:
    """What is asked for: a mesh file (or demo) and its unit, the part's name, bags of it without labels, the budget in
    seconds, the model's folder, the work folder, and whether a model that is there may be replaced.
    """

    mesh: str
    unit: str | None
    name: str
    budget_s: float
    out: Path
    work: Path
    bags: tuple[Path, ...] = ()
    overwrite: bool = False


def scenes_for_a_part() -> SceneConfig:
    """Return the scenes of an unknown part: upright on a table or held up, the views that a robot's camera has of it.

    Views over all rotations are many more to learn in the same time, so they are asked for
    (`--set scene.view=uniform`). Crowds, collages and colours that are brighter and fuller than the mesh's make a
    student that also works on photographs, and cost nothing on renders (docs/results.md, "Bags and budgets").
    """
    return SceneConfig(
        width=480, height=360, fov_deg=(45.0, 65.0), targets=(2, 4), distractors=(4, 14), elevation_deg=(5.0, 85.0),
        roll_sigma_deg=15.0, occluded_fraction=0.3, min_visible=0.4, truncated_fraction=0.05, crowded_fraction=0.6,
        busy_fraction=0.6, texture_pool=48, target_gain=(0.65, 2.2), target_saturation=(0.7, 2.2),
    )  # fmt: skip


def training_of_a_part() -> TrainConfig:
    """Return how a part is learned: on the demo student's layers, a head start (docs/results.md)."""
    return TrainConfig(
        initial="spray_bottle", micro_batch=16, warmup=0.05, positives=24, checkpoint_every=100, validate_every=0,
        window=WindowConfig(rotation_deg=10.0, zoom_fraction=0.7, augment=AugmentConfig(cover_probability=0.2)),
    )  # fmt: skip


@dataclass(frozen=True)
class NewObjectConfig:
    """How a part's student is made; the budget decides how long."""

    distances: tuple[float, float] = field(
        default=(2.0, 4.5),
        metadata={"help": "Camera to part in the renders; replaces scene.distance.", "unit": "diameters"},
    )
    symmetry: tuple[str, ...] = field(
        default=(), metadata={"help": "Turns that nobody can tell: z (any turn about z), z:180, z:120, z:90 or z:60."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of renders and training."})
    teachers: int = field(default=2, metadata={"help": "Teachers, trained side by side, from a budget of 1h on."})
    scene: SceneConfig = field(default_factory=scenes_for_a_part, metadata={"help": "The renders, as in ukd render."})
    train: TrainConfig = field(
        default_factory=training_of_a_part, metadata={"help": "The training, as in ukd train; the budget sets steps."}
    )
    guide: GuideOptions = field(
        default_factory=GuideOptions, metadata={"help": "What teachers tell the student, as in ukd distill."}
    )
    bags: BagOptions = field(
        default_factory=BagOptions, metadata={"help": "How frames are taken from the bags, as in ukd bag to-bop."}
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be rendered or taught; ValueError names the field."""
        if len(self.distances) != 2 or not 1.0 <= self.distances[0] <= self.distances[1] <= 50.0:
            raise ValueError(f"distances: must be (low, high) within 1..50 diameters, got {tuple(self.distances)}.")
        if not 2 <= self.teachers <= 8:
            raise ValueError(f"teachers: is {self.teachers}, but 2..8 are needed: one alone cannot disagree.")

    def scene_for(self, diameter_m: float) -> SceneConfig:
        """Return the scenes of a part of this size; nothing is nearer than 8 cm, where cameras are out of focus."""
        low, high = (max(0.08, factor * diameter_m) for factor in self.distances)
        return replace(self.scene, distance=(round(low, 4), round(max(high, 1.5 * low), 4)))


def checked_source(config: NewObjectConfig, request: NewObjectRequest) -> MeshSource:
    """Return the mesh to learn from; NewObjectError or BundleError for what can be seen at once."""
    if request.budget_s < LEAST_BUDGET_S:
        raise NewObjectError(
            f"budget: {request.budget_s:.0f} s are too few to render, train and calibrate; give 5m or more (20m is a "
            "good start)."
        )
    if not NAME.fullmatch(request.name):
        raise NewObjectError(
            f"name: {request.name!r} cannot be part of a ROS topic; use a letter, then letters, digits or underscores."
        )
    if request.work.resolve() in (request.out.resolve(), *request.out.resolve().parents):
        raise NewObjectError(f"{request.work}: the work folder must not hold the model's folder {request.out}.")
    for bag in request.bags:
        if not bag.exists():
            raise NewObjectError(f"{bag}: there is no such bag.")
    if request.budget_s >= TEACHERS_FROM_S:
        _check_bags(request.bags, config.bags)
    initial = config.train.initial
    if initial and not Path(initial).exists():
        load_bundle(find_model(initial))
    path = request.mesh if request.mesh == DEMO else str(Path(request.mesh).resolve())
    return MeshSource(path, None if request.mesh == DEMO else request.unit, request.name)


def _check_bags(bags: Sequence[Path], options: BagOptions) -> None:
    """Refuse a bag without images, without camera_info or with several to choose from now, not after the teachers."""
    if not bags:
        return
    from ukd_ros.data.rosbag.reader import BagReader  # needs rosbags
    from ukd_ros.data.rosbag.storage import BagError
    from ukd_ros.data.rosbag.topics import choose_topics

    for path in bags:
        try:
            with BagReader(path, partial=True) as bag:
                choose_topics(bag, options)
        except BagError as error:
            how = " Name it with --set bags.image_topic=… or bags.info_topic=…" if "_topic" in str(error) else ""
            raise NewObjectError(f"{error}{how}") from error


def arguments(config: NewObjectConfig, request: NewObjectRequest, part: PartFacts) -> dict[str, Any]:
    """Return everything that decides the student from renders, in plain data, under the names that a user knows.

    Where the model goes may change from call to call, and so may how frames are taken from the bags: what came before
    that stays good, and an adaptation that found nothing is tried again with other settings.
    """
    settings = to_mapping(config)
    del settings["bags"]
    return {
        "mesh": Path(request.mesh).name,
        "mesh content": part.digest,
        "unit": request.unit,
        "name": request.name,
        "budget": f"{request.budget_s:g} s",
        "bags": {str(bag.resolve()): file_digest(bag) for bag in request.bags},
        "settings": settings,
        "renderer": RENDERER,
    }


def publishing(out: Path) -> str:
    """Return the decision that marks a model folder as this work's own, also when it was killed right then."""
    return f"publishing {out.resolve()}"


def check_model_folder(request: NewObjectRequest, state: WorkState) -> None:
    """Refuse to put the model where something else is, or where nothing can be written: now, not after hours.

    What this very work has put there is its own.
    """
    out = request.out.resolve()
    if out.exists() and not state.decided(publishing(out)):
        if not request.overwrite:
            raise NewObjectError(f"{request.out}: exists already; choose another --name or --out, or give --overwrite.")
        load_bundle(request.out)  # only a model is replaced
    there = next(folder for folder in out.parents if folder.exists())
    if not there.is_dir():
        raise NewObjectError(f"{request.out}: {there} is a file, not a folder; choose another --out.")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise NewObjectError(
            f"{request.out}: nothing can be written in {there} ({error.strerror or error}); choose another --out."
        ) from error
