# SPDX-License-Identifier: Apache-2.0
"""Batches of windows with their targets, made ahead of time in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ukd_ros.data.dataset import Windows
from ukd_ros.distillation.assignment import Assignment, assign
from ukd_ros.distillation.parallel import Processes


@dataclass(frozen=True)
class BatchShape:
    """Windows a step and a micro-batch, and positive cells an object."""

    batch_size: int
    micro_batch: int
    positives: int


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Windows by `numbers`, their `image` [B,3,S,S] uint8 and their `targets`."""

    numbers: range
    image: Tensor
    targets: Assignment


class Batches:
    """Makes this process's micro-batches ahead of time in a thread; iteration starts at `step` and never ends."""

    def __init__(
        self, data: Windows, shape: BatchShape, classes: int, keypoints: int, step: int, processes: Processes
    ) -> None:
        self._make = (data, shape, classes, keypoints, processes)
        self._queue: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(maxsize=3)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(step,), name="batches", daemon=True)
        self._thread.start()

    def _run(self, step: int) -> None:
        try:
            while not self._stop.is_set():
                self._put(self._batch(step))
                step += 1
        except BaseException as error:  # handed to the training loop, which raises it
            self._put(error)

    def _put(self, item: list[MicroBatch] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _batch(self, step: int) -> list[MicroBatch]:
        data, shape, classes, keypoints, processes = self._make
        out = []
        for micro in range(processes.rank, shape.batch_size // shape.micro_batch, processes.count):
            first = step * shape.batch_size + micro * shape.micro_batch
            samples = [data.sample(first + i) for i in range(shape.micro_batch)]
            image = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2)
            targets = assign(samples, classes, keypoints, shape.positives)
            out.append(MicroBatch(range(first, first + shape.micro_batch), image, targets))
        return out

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        while True:
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        self._thread.join(timeout=10)
