# SPDX-License-Identifier: Apache-2.0
"""The demo: the real pose node in its own process, a bag played into it over DDS, a third process listening.

Prints how many frames were answered, how well and how fast, writes pictures and a bag, and fails when it falls short.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ukd_ros.data.bags import IMAGE_TYPES, INFO_TYPE, BagError, BagReader
from ukd_ros.perception.bundle import BundleError, find_model, load_bundle
from ukd_ros.ros.demo_plot import summary_plot
from ukd_ros.ros.demo_processes import Children, free_domain, local_environment
from ukd_ros.ros.demo_report import (
    Summary,
    camera_views,
    figures,
    read_run,
    summarise,
    truth_of,
    write_overlays,
    write_picture,
)
from ukd_ros.ros.fastdds import share_file
from ukd_ros.ros.messages import KnownObjects

SAMPLE_BAG = "models/sample_bag"
MODEL = "spray_bottle"
LISTENERS = 2
"""The pose node and the recorder subscribe to the camera."""

SLACK_S = 120.0
COMPRESSED = "/compressed"


class DemoError(RuntimeError):
    """The demo cannot run; the text says why and what to do."""


@dataclass(frozen=True)
class Camera:
    """The camera of the played bag: its topics, and how long it lasts (s) at the pace asked for."""

    image_topic: str
    info_topic: str
    images: int
    seconds: float

    @property
    def compressed(self) -> bool:
        """Return whether the images are compressed."""
        return self.image_topic.endswith(COMPRESSED)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    out = argparse.ArgumentParser(prog="ukd demo", description=__doc__)
    out.add_argument("--model", default=MODEL, help="model folder or name of an installed model (default %(default)s)")
    out.add_argument("--bag", type=Path, default=None, help="bag to play (default: the sample that is installed)")
    out.add_argument("--object", default="", help="object to measure (default: the model's first)")
    out.add_argument("--rate", type=float, default=None, help="images per second (default: as recorded)")
    out.add_argument("--out", type=Path, default=Path("demo_out"), help="folder to write (default %(default)s)")
    out.add_argument("--image-topic", default=None, help="needed when the bag has several")
    out.add_argument("--info-topic", default=None, help="needed when the bag has several")
    out.add_argument(
        "-p", "--parameter", action="append", default=[], metavar="NAME:=VALUE", help="parameter of the pose node"
    )
    return out


def inspect(bag: Path, image_topic: str | None, info_topic: str | None, rate_hz: float | None) -> Camera:
    """Return the camera in ``bag``; BagError or DemoError when it cannot be played."""
    with BagReader(bag) as reader:
        image = reader.topic_of(IMAGE_TYPES, image_topic)
        info = reader.topic_of((INFO_TYPE,), info_topic)
        times = [message.time_ns for message in reader.messages((image,))]
        compressed = reader.topics[image] == IMAGE_TYPES[1]
    if not times:
        raise DemoError(f"{bag}: {image} has no images.")
    if compressed != image.endswith(COMPRESSED):
        raise DemoError(f"{bag}: compressed images must be on a topic that ends with {COMPRESSED}, not on {image}.")
    seconds = (times[-1] - times[0]) * 1e-9 if rate_hz is None else len(times) / rate_hz
    return Camera(image, info, len(times), seconds)


def node_arguments(options: argparse.Namespace, camera: Camera) -> list[str]:
    """Return the pose node's command line."""
    image = camera.image_topic[: -len(COMPRESSED)] if camera.compressed else camera.image_topic
    values = {
        "model": str(find_model(options.model)),
        "compressed": str(camera.compressed).lower(),
        "object": f"'{options.object}'",
    }
    words = ["--ros-args", "-r", f"image:={image}", "-r", f"camera_info:={camera.info_topic}"]
    for assignment in [f"{name}:={value}" for name, value in values.items()] + options.parameter:
        words += ["-p", assignment]
    return words


def record(options: argparse.Namespace, bag: Path, camera: Camera, work: Path) -> int:
    """Run the three processes until the bag is played and the answers recorded; return how many images were sent."""
    environment, sentence = local_environment(free_domain())
    print(f"graph           domain {environment['ROS_DOMAIN_ID']}, this machine only. {sentence}")
    topics = ["--image-topic", camera.image_topic, "--info-topic", camera.info_topic]
    pace = [] if options.rate is None else ["--rate", str(options.rate)]
    with Children(environment) as children:
        node = children.start("ukd_ros.ros.pose_node", node_arguments(options, camera), work / "pose_node.log")
        listener = children.start(
            "ukd_ros.ros.demo_listener", ["--bag", str(bag), "--out", str(work / "bag"), *topics], work / "listener.log"
        )
        player = children.start(
            "ukd_ros.ros.demo_player",
            ["--bag", str(bag), "--listeners", str(LISTENERS), *topics, *pace],
            work / "player.log",
        )
        finished = children.wait_for([listener, player], camera.seconds + SLACK_S)
        if not finished or listener.returncode != 0 or player.returncode != 0:
            raise DemoError(f"the run broke off. {_last_words(work)}")
        said = player.stdout.read() if player.stdout is not None else ""
        status = children.stop(node)
        if status != 0:
            raise DemoError(f"the pose node ended with status {status}. {_last_words(work)}")
    return int(json.loads(said)["sent"])


def _last_words(work: Path) -> str:
    said = []
    for log in sorted(work.glob("*.log")):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if lines:
            said.append(f"{log.stem}: {lines[-1]}")
    return " | ".join(said) or "No process said why."


def replace_folder(made: Path, wanted: Path) -> None:
    """Put the folder ``made`` in the place of ``wanted``, which must be the output of an earlier run or absent."""
    if wanted.exists():
        if not (wanted / "summary.json").is_file():
            raise DemoError(
                f"{wanted}: is not the output of an earlier demo and is not overwritten. Name another --out."
            )
        old = made.with_name(f"{made.name}.old")
        os.rename(wanted, old)
        os.rename(made, wanted)
        shutil.rmtree(old)
    else:
        os.rename(made, wanted)


def report(options: argparse.Namespace, bag: Path, camera: Camera, sent: int, work: Path) -> Summary:
    """Measure the recorded run and write pictures and figures into ``work``."""
    bundle = load_bundle(find_model(options.model))
    objects = KnownObjects.of(bundle.objects)
    name = options.object or bundle.objects[0].name
    run = read_run(work / "bag")
    summary = summarise(run, truth_of(bag, name), objects.models[name], sent)
    views = camera_views(bag, camera.image_topic, camera.info_topic)
    write_overlays(run, views, objects, name, work)
    if len(summary.nees):
        write_picture(work / "summary.png", summary_plot(summary))
    (work / "summary.json").write_text(json.dumps(figures(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; return 0 when it keeps its promises, 1 when it falls short, 2 when it cannot run."""
    options = parser().parse_args(arguments)
    out: Path = options.out.resolve()
    work: Path | None = None
    try:
        bag = options.bag if options.bag is not None else share_file(SAMPLE_BAG)
        find_model(options.model)
        camera = inspect(bag, options.image_topic, options.info_topic, options.rate)
        print(f"bag             {bag}: {camera.images} images on {camera.image_topic}, {camera.seconds:.0f} s")
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        sent = record(options, bag, camera, work)
        summary = report(options, bag, camera, sent, work)
        replace_folder(work, out)
    except (BagError, BundleError, DemoError, OSError) as error:
        print(f"ukd demo: {error}", file=sys.stderr)
        return 2
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    print(summary.text())
    print(f"written         {out}: overlays, summary.png, summary.json, logs, and bag/ for RViz or Foxglove")
    for shortcoming in summary.shortcomings():
        print(f"falls short     {shortcoming}")
    return 1 if summary.shortcomings() else 0


if __name__ == "__main__":
    sys.exit(main())
