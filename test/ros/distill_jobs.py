# SPDX-License-Identifier: Apache-2.0
"""Small jobs in place of a distillation, and the real node around one: python test/ros/distill_jobs.py NAME ..."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ukd_ros.data.progress import Bar, Stopped
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.ros.distill_options import DistillNodeOptions, path_of

STEPS = 60


@dataclass(frozen=True)
class FakeResult:
    """What the node reads of a result."""

    model: Path
    report: Path
    launch: str
    summary: str = "as good as can be"


def count(options: DistillNodeOptions, progress: bool, step_s: float = 0.02, steps: int = STEPS) -> FakeResult:
    """Label a little, then count to ``steps``, by way of a checkpoint that goes on; objects of the name "bad" fail."""
    out = path_of(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for _ in Bar(range(3), desc="labelling", unit="view", disable=not progress):
        time.sleep(step_s)
    if "bad" in options.object:
        raise ValueError(f"{options.bag[0]}: none of 3 views shows the object 'bad'; name another.")
    checkpoint = out / "checkpoint"
    done = int(checkpoint.read_bytes()) if options.resume and checkpoint.exists() else 0
    with Bar(total=steps, initial=done, desc="training", unit="step", disable=not progress) as bar:
        while done < steps:
            time.sleep(step_s)
            done += 1
            try:
                bar.set_postfix(loss=f"{1.0 / done:.3f}")
                bar.update()
            except Stopped as stop:
                write_bytes(checkpoint, str(done).encode())
                raise Stopped(f"{checkpoint}: {stop} at step {done}, which is kept; go on with --resume") from stop
    write_bytes(checkpoint, str(done).encode())
    return FakeResult(out / "models" / "part", out / "report.html", "ros2 launch ukd_ros pose.launch.py model:=part")


def slow(options: DistillNodeOptions, progress: bool) -> FakeResult:
    """Count so slowly that a test can stop it."""
    return count(options, progress, step_s=0.05, steps=100_000)


def quick_again(options: DistillNodeOptions, progress: bool) -> FakeResult:
    """Count on from the checkpoint there is: ten steps more."""
    done = int((path_of(options.out) / "checkpoint").read_bytes())
    return count(options, progress, step_s=0.01, steps=done + 10)


def stuck(options: DistillNodeOptions, progress: bool) -> FakeResult:
    """Begin a step that does not end, with a process of its own."""
    import multiprocessing

    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600.0,))
    child.start()
    path_of(options.out).mkdir(parents=True)
    (path_of(options.out) / "child").write_text(str(child.pid))
    for _ in Bar(range(2), desc="thinking", unit="thought", disable=True):
        time.sleep(600.0)
    raise AssertionError("nobody waits that long")


def start(name: str, *arguments: str, **streams: Any) -> subprocess.Popen[str]:
    """Start the real node as a process, in a domain of its own, around the job called ``name``."""
    from ukd_ros.ros.demo_processes import free_domain, local_environment

    environment, _ = local_environment(free_domain())
    path = [str(Path(__file__).resolve().parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    return subprocess.Popen([sys.executable, __file__, name, *arguments], env=environment, text=True, **streams)


if __name__ == "__main__":
    from ukd_ros.ros.distill_node import main

    jobs = {job.__name__: job for job in (count, slow, quick_again, stuck)}
    sys.exit(main(sys.argv[2:], job=jobs[sys.argv[1]]))
