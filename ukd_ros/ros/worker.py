# SPDX-License-Identifier: Apache-2.0
"""The thread that turns the newest image into answers, so that callbacks never wait for the network."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ukd_ros.geometry.estimate import PoseEstimate, Rejection
from ukd_ros.geometry.view import View
from ukd_ros.perception.backends import BackendError
from ukd_ros.perception.images import CameraInfoError, ImageError
from ukd_ros.ros.diagnostics import FrameStatistics, ProblemLog
from ukd_ros.ros.inputs import CameraInfoCache, NewestSlot
from ukd_ros.ros.interop import Conversions


class Result(Protocol):
    """What an estimator answers to one view (perception.estimator.FrameResult)."""

    @property
    def estimates(self) -> tuple[PoseEstimate, ...]:
        """The poses found."""
        ...

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """Why others were not."""
        ...

    @property
    def timings_ms(self) -> dict[str, float]:
        """What each stage took."""
        ...


@dataclass(frozen=True)
class Job:
    """An image message and when its callback was entered (monotonic s)."""

    message: Any
    arrived_s: float


@dataclass(frozen=True)
class FrameTools:
    """Everything a frame needs on its way; the callables are swapped by the node when parameters change."""

    topic: str
    conversions: Conversions
    cameras: CameraInfoCache
    estimate: Callable[[View], Result]
    publish: Callable[[Any, View | None, tuple[PoseEstimate, ...], tuple[Rejection, ...]], None]
    statistics: FrameStatistics
    problems: ProblemLog
    log_change: Callable[[str], None]


class FrameWorker(threading.Thread):
    """Answers every image it takes from its slot, also a bad one: with an empty cloud and a reported problem."""

    def __init__(self, tools: FrameTools) -> None:
        """Prepare; ``start`` begins to work."""
        super().__init__(name="ukd_pose_worker", daemon=True)
        self.slot: NewestSlot[Job] = NewestSlot()
        self._tools = tools
        self._state: dict[str, str] = {}

    def stop(self) -> None:
        """Finish the frame at hand and end the thread."""
        self.slot.close()
        self.join()

    def run(self) -> None:
        """Work until the slot is closed."""
        while (job := self.slot.take()) is not None:
            try:
                self._answer(job)
            except Exception:  # a thread that dies silently is worse than any single frame
                text = traceback.format_exc().strip()
                self._tools.problems.report("internal", f"a frame was lost to an error inside the node:\n{text}")

    def _answer(self, job: Job) -> None:
        tools, header = self._tools, job.message.header
        taken_s = time.monotonic()
        try:
            view = self._view(job.message)
        except (ImageError, CameraInfoError) as error:
            kind = "image" if isinstance(error, ImageError) else "camera_info"
            tools.problems.report(kind, f"{tools.topic}: {error}")
            if kind == "image":
                tools.statistics.bad_image()
            tools.publish(header, None, (), ())
            return
        decoded_s = time.monotonic()
        try:
            result = tools.estimate(view)
        except (BackendError, ArithmeticError, ValueError) as error:
            tools.problems.report("estimator", f"{tools.topic}: this image could not be evaluated: {error}")
            tools.publish(header, view, (), ())
            return
        estimated_s = time.monotonic()
        tools.publish(header, view, result.estimates, result.rejections)
        done_s = time.monotonic()
        parts = {
            "waiting": 1e3 * (taken_s - job.arrived_s),
            "decoding": 1e3 * (decoded_s - taken_s),
            "estimator": 1e3 * (estimated_s - decoded_s),
            "publishing": 1e3 * (done_s - estimated_s),
            "overhead": 1e3 * (done_s - estimated_s + decoded_s - job.arrived_s),
        }
        parts |= {f"estimator {stage}": spent for stage, spent in result.timings_ms.items()}
        reasons = [f"{r.object_name or 'frame'} {r.reason.value}" for r in result.rejections]
        tools.statistics.frame_done(1e3 * (done_s - job.arrived_s), parts, len(result.estimates), reasons)
        self._tell_changes(result)

    def _view(self, message: Any) -> View:
        image = self._tools.conversions.image_from_message(message)
        height, width = image.shape[:2]
        camera = self._tools.cameras.camera_for(message.header.frame_id, width, height)
        stamp = message.header.stamp
        return View(image, camera, stamp.sec * 10**9 + stamp.nanosec, message.header.frame_id)

    def _tell_changes(self, result: Result) -> None:
        """Log when an object is found or lost, not at every frame: nothing in sight is a normal answer."""
        state = {r.object_name: f"{r.reason.value}: {r.detail}" for r in result.rejections if r.object_name}
        state.update({e.object_name: "" for e in result.estimates})
        for name, reason in state.items():
            before = self._state.get(name)
            if before is None or bool(before) != bool(reason):
                self._tools.log_change(f"{name}: lost ({reason})" if reason else f"{name}: found")
        self._state.update(state)
