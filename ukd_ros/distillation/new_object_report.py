# SPDX-License-Identifier: Apache-2.0
"""What came of `ukd new-object`: how good the student is, what would make it better, and pictures of all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ukd_ros.data.whole_files import write_bytes
from ukd_ros.distillation.html_page import html_page, html_picture, html_text
from ukd_ros.distillation.new_object_part import HOLES, PartFacts
from ukd_ros.distillation.new_object_plan import TEACHERS_FROM_S, Plan

if TYPE_CHECKING:
    from ukd_ros.distillation.new_object_request import NewObjectConfig

GOOD, FAIR = 0.75, 0.4
"""ADD-0.1d on held-out renders from which a student is called good, and fair."""

COVERAGE_BAND = (0.90, 0.98)
ENOUGH_ANSWERS = 100
"""Below so many answered poses a coverage of 95 % is told to no better than four points."""


@dataclass(frozen=True, eq=False)
class Story:
    """Everything that the report tells; the mappings are the results of the stages of those names."""

    name: str
    out: Path
    part: PartFacts
    budget_s: float
    plan: Plan
    images: Mapping[str, int]
    cut: bool
    config: NewObjectConfig
    trained: Mapping[str, Any]
    calibrated: Mapping[str, Any]
    evaluated: Mapping[str, Any]
    adapted: Mapping[str, Any]
    bags: int
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]


def launch_line(model: Path) -> str:
    """Return the line that starts the pose node on a model."""
    return f"ros2 launch ukd_ros pose.launch.py model:={model.resolve()}"


def verdict(story: Story) -> str:
    """Return one paragraph: how good the student is, on what, and how far its error bars are to be believed."""
    found = story.evaluated
    recall, coverage = found["add_recall"], found["coverage"]
    word = "good" if recall >= GOOD else "fair" if recall >= FAIR else "weak"
    near, far = story.config.scene_for(story.part.diameter_m).distance
    text = (
        f"A {word} student: {recall:.1%} of {found['targets']} parts in {found['images']} held-out renders are found "
        f"to within a tenth of the diameter ({100 * story.part.diameter_m:.1f} cm), {found['detected']:.1%} are found "
        f"at all. The renders show it {near:.2f} to {far:.2f} m away, {_views(story.config)}. "
    )
    if coverage is None:
        return text + "It answered none of them, so nothing is known of its error bars."
    low, high = COVERAGE_BAND
    believed = "as promised" if low <= coverage <= high else "not the 90 to 98 % that are aimed at"
    if found["answered"] < ENOUGH_ANSWERS:
        believed += f" (of fewer than {ENOUGH_ANSWERS} poses, so roughly)"
    return text + (
        f"Half of its answers are off by less than {found['translation_mm']:.1f} mm and {found['rotation_deg']:.1f} "
        f"degrees. Its 95 % ellipsoid holds {coverage:.1%} of {found['answered']} poses, {believed}."
    )


def advice(story: Story) -> list[str]:
    """Say what would make the student better, most useful first, by rules on what was measured."""
    return [*_about_time(story), *_about_part(story), *_about_errors(story), *_about_place(story)]


def _about_time(story: Story) -> list[str]:
    said, found = [], story.evaluated
    windows = (story.trained["before"] + story.trained["steps"]) * story.config.train.batch_size
    if found["add_recall"] < GOOD:
        longer = "20m" if story.budget_s < 1200 else "2h" if story.budget_s < 7200 else "a GPU, or a day"
        said.append(
            f"More time: it has seen {windows:,} windows, and accuracy still grows after 300,000. Give --budget "
            f"{longer} (and another --name, or --overwrite with another --work)."
        )
    if story.cut:
        said.append("Other programs slowed the training down, and it was ended early: run it on an idle machine.")
    if story.calibrated["crops"] == "oracle":
        said.append(
            "It found too few parts by itself to be calibrated on what it finds, and was calibrated on crops around "
            "the truth: take its error bars as a guess, and give it more time before a robot relies on it."
        )
    return said


def _about_part(story: Story) -> list[str]:
    said, part = [], story.part
    if not part.coloured:
        said.append(
            "The mesh has one colour or none: the student knows the shape alone. A textured mesh (.obj with its "
            "picture, a coloured .ply), or a bag of the real part with --budget 1h, shows what the part looks like."
        )
    if part.open_edges > HOLES:
        said.append(
            f"{part.open_edges:.0%} of the mesh's edges have not two faces (holes, loose sheets): look at renders.jpg, "
            "whether it shows your part; repair the mesh if not."
        )
    left = [word for word in part.alike if word not in story.config.symmetry]
    if left:
        words = " ".join(f"--symmetry {word}" for word in left)
        said.append(
            f"The shape is the same after turns about {', '.join(left)}. If the colours do not tell them apart either, "
            f"say so ({words}): a student that must tell what nobody can tell learns neither."
        )
    return said


def _about_errors(story: Story) -> list[str]:
    said, found = [], story.evaluated
    causes: Mapping[str, int] = found["causes"]
    wrong, targets = sum(causes.values()), max(1, found["targets"])
    low, high = COVERAGE_BAND
    coverage = found["coverage"]
    if coverage is not None and not low <= coverage <= high:
        few = found["answered"] < ENOUGH_ANSWERS
        reason = f"{found['answered']} poses tell it only roughly" if few else "more views to calibrate on would help"
        said.append(f"The 95 % ellipsoid holds {coverage:.1%}: {reason}; a larger budget renders more of them.")
    if wrong > 0.1 * targets:
        if causes.get("flipped", 0) > 0.25 * wrong and not story.part.alike:
            said.append(
                "A quarter of what is wrong is turned by more than 60 degrees: the part looks alike from several "
                "sides. A texture tells them apart; where nothing does, declare it with --symmetry."
            )
        if causes.get("depth", 0) > 0.4 * wrong:
            said.append(
                "Most errors are of depth, which one camera tells from the part's size alone: work closer to it, or "
                "with a longer lens, and fuse with another sensor where depth matters (the covariance says how much)."
            )
        if causes.get("not found", 0) + causes.get("unsure", 0) > 0.4 * wrong:
            said.append(
                "Most of what is wrong was not found at all: more time; or fewer kinds of views, if you know them "
                "(--set scene.elevation_deg=[30,80] scene.roll_sigma_deg=5 distances=[2,3])."
            )
    return said


def _about_place(story: Story) -> list[str]:
    said = []
    if not story.bags:
        said.append(
            "All numbers are of renders. Record a bag of the part where it will be used, without labels, and give it "
            "with --bag and --budget 1h or more."
        )
    elif story.budget_s < TEACHERS_FROM_S:
        said.append("The bag was not used: it needs teachers, which need --budget 1h or more.")
    if story.config.scene.view == "upright":
        said.append("A part that lies on any side needs --set scene.view=uniform, and several times the time.")
    return said


def write_story(story: Story, work: Path) -> Path:
    """Write report.html, which needs nothing beside it, into the work folder; return it."""
    sections = [html_text("How good it is", verdict(story))]
    sections.append(html_text("Start it", launch_line(story.out)))
    said = "\n".join(f"{number}. {text}" for number, text in enumerate(advice(story), start=1))
    sections.append(html_text("What would make it better", said or "Nothing that the measurements tell."))
    if story.warnings:
        sections.append(html_text("What was left out", "\n".join(story.warnings)))
    sections.append(html_text("What was done", _table(story)))
    if story.adapted.get("report"):
        sections.append(html_text("Adapted to the bag", f"{story.adapted['summary']}\nsee {story.adapted['report']}"))
    pictures = {
        "What it learned from (look whether it is your part, in its colours)": "renders.jpg",
        "Held-out renders, the best": "evaluation/best.png",
        "Held-out renders, the worst": "evaluation/worst.png",
        "Accuracy and reliability on them": "evaluation/summary.png",
        "Reliability when it was calibrated": "calibration/reliability.png",
        "Training, what it has in common with its teachers": _trunk_curves(work),
        "Training": "student/curves.png",
        "The last cycle of the training": "last/curves.png" if story.cut else "",
    }
    for title, name in pictures.items():
        if name and (work / name).is_file():
            kind = "jpeg" if name.endswith(".jpg") else "png"
            sections.append(html_picture(title, (work / name).read_bytes(), kind))
    path = work / "report.html"
    write_bytes(path, html_page(f"{story.name}: from a mesh to a model", sections).encode())
    return path


def _trunk_curves(work: Path) -> str:
    """Return the curves of what teachers and student have in common, below the work folder; empty without any."""
    return next((str(path.relative_to(work)) for path in sorted(work.glob("trunk/*/curves.png"))), "")


def _views(config: NewObjectConfig) -> str:
    """Return the views in words."""
    if config.scene.view == "uniform":
        return "turned in any way"
    low, high = config.scene.elevation_deg
    return f"upright (its z up), from {low:g} to {high:g} degrees above"


def _table(story: Story) -> str:
    """Return counts and times as text."""
    images = ", ".join(f"{count} to {kind}" for kind, count in story.images.items())
    before = story.trained["before"]
    steps = before + story.trained["steps"]
    taught = f", {before} of the steps before there were teachers" if before else ""
    windows = f"{steps * story.config.train.batch_size:,} windows{taught}"
    rows = [f"renders      {images}", f"training     {steps} steps, {windows}"]
    rows.append(f"teachers     {story.plan.teachers or f'none (from --budget {TEACHERS_FROM_S / 3600:.0f}h on)'}")
    rows.append(f"calibrated   on {story.calibrated['matched']} parts in {story.calibrated['views']} renders")
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in story.seconds.items())
    rows.append(f"time         {sum(story.seconds.values()):.0f} s of {story.budget_s:.0f} s: {times}")
    return "\n".join(rows)
