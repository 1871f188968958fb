# SPDX-License-Identifier: Apache-2.0
"""A short trial of this machine at the start of `ukd new-object`: how long renders and training steps take here."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ukd_ros.data.progress import Progress, Stopped, listening
from ukd_ros.data.render_dataset import CHUNK
from ukd_ros.data.scenes import SceneConfig
from ukd_ros.distillation.device import train_device
from ukd_ros.distillation.ensemble import member_folder, side_by_side, train_ensemble
from ukd_ros.distillation.folders import open_folders
from ukd_ros.distillation.forked import CAN_FORK, ForkError
from ukd_ros.distillation.new_object_plan import MOST, Rates
from ukd_ros.distillation.parallel import Processes
from ukd_ros.distillation.train import train_on_folders
from ukd_ros.distillation.train_config import TrainConfig

logger = logging.getLogger(__name__)

PROBE_IMAGES = 4 * CHUNK
MEMORY_PART = 0.6
VIEW_BYTES_PER_PIXEL = 4.3
"""Measured: 6,000 views of 480x360 take 4.5 GB, with their masks and labels."""

PROBE_STEPS = 6
SLOWER = "slower than one thread of one process"


@dataclass(frozen=True)
class Trial:
    """Times a `training` of a few steps on the renders of `scene` in `data`, below the folder `work`.

    `left_s`: the seconds that the trial may still take; `now`: the clock.
    """

    training: TrainConfig
    scene: SceneConfig
    data: Path
    work: Path
    left_s: Callable[[], float]
    now: Callable[[], float] = time.monotonic

    def rates(self, render: Callable[[int], None], teachers: int) -> Rates:
        """Return what this machine does; `render` makes so many views in `data`, `teachers` is 0 for none.

        Stopped when the time is up, RendererError without headless OpenGL.
        """
        render_start_s, image_s = self._time_renders(render)
        start_s, step_s = self._time_steps(1, 1, limit_s=max(1.0, self.left_s()))
        rates = Rates(render_start_s, image_s, start_s, step_s, threads=1, core_step_s=step_s)
        for threads, processes in sharings(self.training, teachers > 0):
            try:
                timed = self._time_steps(threads, processes, limit_s=min(PROBE_STEPS * rates.step_s, self.left_s()))
            except Stopped as stop:  # threads that wait for cores in use by others are slower than one
                if SLOWER not in str(stop):  # somebody asked for it
                    raise
                continue
            except ForkError as error:
                logger.warning("the training stays in one process: %s", error)
                continue
            if timed[1] < rates.step_s:
                rates = replace(rates, train_start_s=timed[0], step_s=timed[1], threads=threads, processes=processes)
        if teachers:
            start_s, step_s = self._time_teachers(teachers)
            rates = replace(rates, train_start_s=max(start_s, rates.train_start_s), teach_step_s=step_s)
        return replace(rates, most_views=min(rates.most_views, views_in_memory(self.scene)))

    def _time_renders(self, render: Callable[[int], None]) -> tuple[float, float]:
        """Return the seconds until the renderer runs, and per image."""
        shutil.rmtree(self.data, ignore_errors=True)  # of an interrupted trial: it would take no time
        ticks: list[tuple[int, float]] = []
        start = self.now()

        def watch(progress: Progress) -> None:
            ticks.append((progress.done, self.now()))
            if self.left_s() <= 0.0:
                raise Stopped("the time for the trial is up")

        with listening(watch):
            render(PROBE_IMAGES)
        took = self.now() - start
        # the first half comes with the start of the processes; with many of them everything comes at once
        done, when = next(tick for tick in ticks if tick[0] >= PROBE_IMAGES // 2)
        late = (ticks[-1][1] - when) / max(1, PROBE_IMAGES - done)
        image_s = max(late, 0.5 * took / PROBE_IMAGES)
        return max(0.0, took - PROBE_IMAGES * image_s), image_s

    def _time_steps(self, threads: int, processes: int, limit_s: float) -> tuple[float, float]:
        """Return the seconds until the first step, and per step, of a training with so many threads and processes.

        Stopped when steps take longer than `limit_s` together.
        """
        ticks: list[float] = []

        def watch(progress: Progress) -> None:
            if progress.stage == "training":
                ticks.append(self.now())
                if ticks[-1] - ticks[0] > limit_s:
                    raise Stopped(SLOWER)

        with self._run() as (folder, config), listening(watch):
            start = self.now()
            config = replace(config, threads=threads)
            train_on_folders(config, [self.data], folder, processes=processes, progress=False)
            took = self.now() - start
        step_s = (ticks[-1] - ticks[1]) / (len(ticks) - 2)  # the first step warms up
        return max(0.0, took - PROBE_STEPS * step_s), step_s

    def _time_teachers(self, count: int) -> tuple[float, float]:
        """Return the seconds until the first step, and per step, of so many teachers side by side."""
        with self._run() as (folder, config):
            start = self.now()
            data, models, _ = open_folders(config, [self.data], progress=False)
            train_ensemble(config, count, data, models, folder, progress=False)
            took = self.now() - start
            step_s = float(np.median(logged_steps_s(member_folder(folder, config.seed), config)[1:]))
            step_s *= 1 if side_by_side() else count
        return max(0.0, took - PROBE_STEPS * step_s), step_s

    @contextmanager
    def _run(self) -> Iterator[tuple[Path, TrainConfig]]:
        """Yield the folder and the configuration of a training of a few steps, which is thrown away."""
        folder = self.work / "probe"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            yield folder, replace(self.training, steps=PROBE_STEPS, log_every=1)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def views_in_memory(scene: SceneConfig) -> int:
    """Return how many decoded views of a scene fit into the part of the memory that a training may take."""
    try:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), free)
    except (OSError, ValueError):  # a system that does not say
        return MOST["train"]
    return int(MEMORY_PART * free / (VIEW_BYTES_PER_PIXEL * scene.width * scene.height))


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def sharings(config: TrainConfig, ensemble: bool) -> list[tuple[int, int]]:
    """Return the threads and processes of a student's training that are worth trying besides one of each.

    Processes run on one thread each. Many threads are tried last: a fork cannot use several once this process has. So
    where an `ensemble` follows, whose members may, none are tried, and processes only where they take all cores.
    """
    count = cores()
    parts = config.batch_size // config.micro_batch
    alone = train_device(config, Processes()).type == "cuda" or not CAN_FORK or "RANK" in os.environ
    shares = 1 if alone else max(n for n in range(1, min(count, parts) + 1) if parts % n == 0)
    tried = [(1, shares)] if shares > 1 else []
    if ensemble:
        return tried if count == shares else []
    return tried + ([(count, 1)] if count > shares else [])


def logged_steps_s(folder: Path, config: TrainConfig) -> list[float]:
    """Return the seconds of a step, of every line of a run's metrics; a minute, without any, for a run cut at once."""
    if not (folder / "metrics.jsonl").is_file():
        return [60.0]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [config.batch_size / float(json.loads(line)["images_per_s"]) for line in lines]
