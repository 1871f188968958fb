# SPDX-License-Identifier: Apache-2.0
"""How long Ctrl-C takes: SIGINT to the offline node at several moments of a real job, until its process has ended.

First the demo object is rendered, and two teachers are made of its shipped student by a few small steps. The job is
started anew for every moment in the same folder, and goes on there. "cut": the step at hand did not end in time.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _measuring import machine, table, use_two_cores, write  # noqa: E402

AIM_S = 2.0
STOPPED = 130
SETTINGS = "['bags.max_frames=16', 'distill.steps=40']"
"""A small job: how long its stages take is not what is measured."""

MOMENTS = {
    "while it starts": "distilling ",
    "looking through the bag": "looking through ",
    "writing frames": "writing frames:",
    "calibrating the teachers": "calibrating:",
    "labelling": "asking the teachers for labels:",
    "asking for votes": "asking the teachers:",
    "training": "training:",
}
"""What is measured, and the words by which the node's log says that it has begun; in the order of the job."""


def inputs(work: Path, config: Path) -> list[str]:
    """Render the demo object and train its teachers; return the parameters of the job."""
    ukd = [sys.executable, "-m", "ukd_ros"]
    render = [*ukd, "render", "--quiet", "--mesh", "demo", "--config", str(config)]
    for name, seed in (("train", 0), ("val", 1)):
        words = ["--count", "24", "--seed", str(seed), "--out", str(work / name)]
        subprocess.run([*render, *words], check=True, stdout=subprocess.DEVNULL)
    settings = ["initial=spray_bottle", "steps=4", "learning_rate=0.00001", "validate_every=0"]
    words = ["--dataset", str(work / "train"), "--ensemble", "2", "--out", str(work / "teachers"), "--set", *settings]
    subprocess.run([*ukd, "train", "--quiet", *words], check=True, stdout=subprocess.DEVNULL)
    given = {"teacher": f"'{work / 'teachers'}'", "renders": f"['{work / 'train'}']", "held_out": f"'{work / 'val'}'"}
    return [*(f"{name}:={value}" for name, value in given.items()), f"settings:={SETTINGS}"]


def stop_s(words: list[str], said: str, after_s: float, log: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Start the node, send SIGINT `after_s` after it has `said` something; return how long it took to end.

    RuntimeError when it ended before.
    """
    from ukd_ros.ros.demo_processes import Children

    with Children(environment) as children:
        node = children.start("ukd_ros.ros.distill_node", words, log)
        while said not in log.read_text(encoding="utf-8"):
            if node.poll() is not None:
                raise RuntimeError(f"the node ended before it said {said!r}: {log.read_text(encoding='utf-8')[-600:]}")
            time.sleep(0.005)
        time.sleep(after_s)
        begun = time.monotonic()
        node.send_signal(signal.SIGINT)
        status = node.wait(60.0)
        took = time.monotonic() - begun
    return {"after_s": after_s, "took_s": took, "status": status, "cut": "was cut" in log.read_text(encoding="utf-8")}


def measure(work: Path, bag: Path, config: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Return what every moment's stops took."""
    from ukd_ros.ros.demo_processes import free_domain, local_environment

    environment, _ = local_environment(free_domain())
    given = inputs(work, config)
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        words = ["--ros-args"]
        for pair in [f"bag:=['{bag}']", f"out:='{work / f'run-{number}'}'", *given]:
            words += ["-p", pair]
        for moment, said in MOMENTS.items():
            after_s = 0.3 * number
            try:
                stop = stop_s(words, said, after_s, work / "log", environment)
            except RuntimeError as error:  # a stage that the call before has finished is not seen again
                stop = {"after_s": after_s, "missed": str(error)}
            found.setdefault(moment, []).append(stop)
    return found


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str, str]]:
    """Return the table's rows."""
    rows = []
    for moment, stops in found.items():
        seen = [stop for stop in stops if "took_s" in stop]
        times = ", ".join(f"{stop['took_s']:.2f} s{' (cut)' if stop['cut'] else ''}" for stop in seen)
        others = [str(stop["status"]) for stop in seen if stop["status"] != STOPPED]
        wrong = f"; status {', '.join(others)}" if others else ""
        missed = f"; missed {len(stops) - len(seen)}" if len(seen) < len(stops) else ""
        rows.append((f"Ctrl-C, {moment}", f"{times}{wrong}{missed}" if seen else "missed", f"<= {AIM_S:g} s"))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write results/stop.json."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(prog="ukd bench stop", description=__doc__)
    parser.add_argument("--bag", type=Path, default=root / "models" / "sample_bag")
    parser.add_argument("--rounds", type=int, default=3, help="stops at every moment, each a little later")
    options = parser.parse_args(arguments)
    use_two_cores()
    data: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        data["stops"] = measure(
            Path(folder), options.bag.resolve(), root / "config" / "render_demo.yaml", options.rounds
        )
    sys.stdout.write(table(rows_of(data["stops"]), data["machine"]) + f"\nwritten: {write('stop', data)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
