# SPDX-License-Identifier: Apache-2.0
"""A student learns from labels and from an ensemble of teachers: `ukd distill`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ukd_ros.data.dataset import MixedWindows, TrainingSample, WindowDataset, Windows
from ukd_ros.distillation.beginning import new_network
from ukd_ros.distillation.device import check_forks, train_device
from ukd_ros.distillation.folders import object_models, open_folders
from ukd_ros.distillation.forked import together
from ukd_ros.distillation.guidance import Guidance
from ukd_ros.distillation.guide import Guide, GuideOptions
from ukd_ros.distillation.parallel import Processes
from ukd_ros.distillation.teacher import Ensemble
from ukd_ros.distillation.teacher_cache import open_cache
from ukd_ros.distillation.train import TrainResult, train
from ukd_ros.distillation.train_config import TrainConfig
from ukd_ros.distillation.unlabelled import open_unlabelled
from ukd_ros.geometry.object_model import ObjectModel


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """How a student is distilled: how it is trained, and what the teachers tell it.

    `guide`: the losses. `windows`: how many different windows there are; the run goes over them again and again, and
    the teachers are asked about each once (0: as many as the run sees). `window_seed`: which windows these are,
    whatever the student's `seed`, so that students of several seeds share one cache; a student that begins with all the
    weights of an earlier run differs by this alone. `unlabelled_share`: share of windows cut from views without labels,
    where there are any. `single_teacher`: learn from one network alone, which cannot say where it is unsure.
    """

    guide: GuideOptions = field(default_factory=GuideOptions)
    windows: int = 0
    window_seed: int = 0
    unlabelled_share: float = 0.3
    single_teacher: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot run."""
        super().__post_init__()
        if self.windows < 0:
            raise ValueError(f"distill.windows: must not be negative, not {self.windows}")
        if not 0.0 < self.unlabelled_share < 1.0:
            raise ValueError(f"distill.unlabelled_share: must be inside 0..1, not {self.unlabelled_share}")

    @property
    def window_count(self) -> int:
        """Return the number of different windows."""
        return self.windows or self.steps * self.batch_size


class Repeated:
    """The first `count` windows of a data set, over and over."""

    def __init__(self, data: Windows, count: int) -> None:
        self._data, self._count = data, count

    def sample(self, index: int) -> TrainingSample:
        """Return window number `index`."""
        return self._data.sample(index % self._count)

    def fingerprint(self) -> str:
        """Return what tells these windows from any others."""
        return self._data.fingerprint()


def distill(
    config: DistillConfig,
    ensemble: Ensemble,
    data: Windows,
    models: Sequence[ObjectModel],
    out: Path,
    *,
    cache: Path | None = None,
    heard: Callable[[Guidance, Sequence[int]], Guidance] | None = None,
    held_out: WindowDataset | None = None,
    resume: bool = False,
    time_budget_s: float | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train a student beside its teachers; see `train`. What the teachers say is kept in `cache` (`out`/teachers).

    `heard`: what becomes of the guidance of windows (by number) on its way to the student, for experiments. CacheError
    when the cache is that of other teachers or windows.
    """
    if (out / "checkpoint.pt").exists() and not resume:
        raise FileExistsError(f"{out}: there is a training run already; go on with --resume or choose another folder")
    options = config.guide
    needs_features = options.features > 0.0 or options.planned_features > 0.0
    kept = open_cache(
        cache or out / "teachers",
        ensemble,
        data,
        config.window_count,
        positives=config.positives,
        votes=options.votes,
        features=needs_features,
        processes=Processes.from_environment(),
        progress=progress,
    )
    widths = new_network(config, models).pyramid_width, ensemble.networks[0].pyramid_width
    torch.manual_seed(config.seed)

    def guidance(numbers: Sequence[int]) -> Guidance:
        said = kept.guidance(numbers)
        return said if heard is None else heard(said, [n % config.window_count for n in numbers])

    guide = Guide(options, guidance, *widths, identity=kept.identity)
    return train(
        config,
        Repeated(data, config.window_count),
        models,
        out,
        guide=guide,
        held_out=held_out,
        resume=resume,
        time_budget_s=time_budget_s,
        progress=progress,
    )


def distill_on_folders(
    config: DistillConfig,
    teachers: Sequence[Path],
    datasets: Sequence[Path],
    out: Path,
    *,
    objects: Sequence[str] = (),
    unlabelled: Sequence[Path] = (),
    cache: Path | None = None,
    held_out: Path | None = None,
    resume: bool = False,
    time_budget_s: float | None = None,
    processes: int = 1,
    progress: bool = True,
) -> TrainResult:
    """Distil teachers (checkpoints or runs) into a student on BOP-format folders; see `distill`.

    `unlabelled`: folders whose views have no labels, or whose labels are not to be read. `processes` as in
    `train_on_folders`; they also share out the asking of the teachers. TeacherError for teachers that
    cannot teach this student, BopError or ValueError as `open_folders`, before anything is decoded.
    """
    check_forks(config, processes)
    _, models = object_models(config, datasets, objects)
    device = train_device(config, Processes.from_environment())
    ensemble = Ensemble.load(teachers, models, config.window.size, device, single=config.single_teacher)
    data, models, checked = open_folders(
        config, datasets, objects=objects, held_out=held_out, progress=progress, seed=config.window_seed
    )
    windows: Windows = data
    if unlabelled:
        strange = open_unlabelled(unlabelled, ensemble, models, config.window, config.window_seed, progress)
        windows = MixedWindows(data, [(strange, config.unlabelled_share)], config.window_seed)

    def work() -> TrainResult:
        return distill(
            config,
            ensemble,
            windows,
            models,
            out,
            cache=cache,
            held_out=checked,
            resume=resume,
            time_budget_s=time_budget_s,
            progress=progress,
        )

    return together(processes, work)
