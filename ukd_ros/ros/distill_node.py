# SPDX-License-Identifier: Apache-2.0
"""The offline node: bags of your own camera and teachers in, a finished model folder out; it ends with its job.

A plain node, not a lifecycle one: a job has one run, begins when it is started and is over when it is over, so there is
no state to go back to, and scripts and launch files read the outcome from the exit status: 0 finished, 130 stopped (it
goes on when it is started again), 1 failed, 2 refused at start.

The job runs in its own thread and tells `data.progress` of every step; the executor's thread publishes and logs, so
that the node answers all the time. `~/progress` and /diagnostics carry the same DiagnosticArray: the standard message
with a sentence, a level, numbers by name *and* a stamp, which every diagnostics viewer shows. `~/progress` comes twice
a second and is transient local: who listens while the node lives, however late, gets the last word.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.exceptions import ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args

from ukd_ros.config import load_config
from ukd_ros.ros.distill_ending import (
    FINISHED,
    STOPPED,
    Ending,
    Result,
    check_packages,
    failed,
    finished,
    sentence_of,
    stopped,
)
from ukd_ros.ros.distill_log import NodeLog
from ukd_ros.ros.distill_options import (
    NAME,
    DistillNodeOptions,
    check_inputs,
    declare_options,
    help_text,
    path_of,
)
from ukd_ros.ros.distill_progress import ProgressLog, progress_array
from ukd_ros.ros.fastdds import share_file

TICK_S = 0.1
"""Period of the look at the job."""

PROGRESS_S = 0.5
"""~/progress comes at most this often, and when the job ends."""

DIAGNOSTICS_S = 1.0
"""Period of /diagnostics, as for the pose node."""

OK: bytes = DiagnosticStatus.OK

FAREWELL_S = 0.8
"""Of the time in which a stop must be done, what the last words and leaving take."""

HEARD_S = 0.1
"""Time for listeners on a topic to say that they have its last message, and for the job's thread to return."""

Job = Callable[[DistillNodeOptions, bool], Result]
"""The work itself: it is given the options and whether to draw bars, and speaks through data.progress."""


def distill_bags(options: DistillNodeOptions, progress: bool) -> Result:
    """Do what the options say with distillation.from_bags; its errors are single sentences."""
    # torch and what comes with it: neither --help nor a refused parameter should wait for that
    from ukd_ros.distillation.from_bags import distill_from_bags
    from ukd_ros.distillation.from_bags_request import FromBagsConfig

    words = [*options.settings, *([f"name={options.name}"] if options.name else [])]
    file = path_of(options.config) if options.config else share_file("config/distill_bags.yaml")
    config = load_config(FromBagsConfig, file, words)
    result: Result = distill_from_bags(
        config,
        [path_of(text) for text in options.bag],
        [path_of(text) for text in options.teacher],
        path_of(options.out),
        renders=[path_of(text) for text in options.renders],
        held_out=path_of(options.held_out) if options.held_out else None,
        objects=options.object,
        resume=options.resume,
        time_budget_s=options.time_budget_s,
        progress=progress,
    )
    return result


class DistillNode(Node):
    """See the module's docstring; parameters in distill_options.py."""

    def __init__(self, job: Job = distill_bags, **node_arguments: Any) -> None:
        """Declare and check the parameters; ``node_arguments`` go to rclpy's node.

        ValueError or rclpy's ParameterException for a parameter that is unknown, missing or refused.
        """
        super().__init__(NAME, **node_arguments)
        # rclpy has no public way to ask which parameters a file named that nobody declared.
        self.options = declare_options(self, getattr(self, "_parameter_overrides", {}))
        check_inputs(self.options)
        self._job = job
        self._out = str(path_of(self.options.out).absolute())
        self._bar = sys.stderr.isatty()
        self.log = NodeLog(self.get_logger(), self._bar)
        self._progress = ProgressLog()
        self._stop_reason = ""
        self._deadline_s = 0.0
        self._came: Ending | None = None
        self.ending: Ending | None = None
        self._last_values: dict[str, str] = {}
        self._told = (-1, "")
        self._progress_due_s = self._diagnostics_due_s = 0.0
        last_word = QoSProfile(
            depth=1,
            history=HistoryPolicy.KEEP_LAST,
            reliability=ReliabilityPolicy.RELIABLE,
            durability=DurabilityPolicy.TRANSIENT_LOCAL,
        )
        self._progress_publisher = self.create_publisher(DiagnosticArray, "~/progress", last_word)
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._timer = self.create_timer(TICK_S, self.tick, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._thread = threading.Thread(target=self._work, name="distillation", daemon=True)

    def start(self) -> None:
        """Begin the job."""
        count = len(self.options.bag)
        bags = self.options.bag[0] if count == 1 else f"{count} bags"
        self.log.say("info", f"distilling {bags} into {self._out}; Ctrl-C stops and keeps a checkpoint")
        self._thread.start()

    def stop(self, reason: str) -> None:
        """Ask the job to end at its next step; what has not ended ``stop_within_s`` later is cut by `tick`."""
        if self._stop_reason or self.ending is not None:
            return
        self._deadline_s = time.monotonic() + self.options.stop_within_s - FAREWELL_S
        self._stop_reason = reason
        self.log.say("warning", f"{reason}: stopping after the step at hand")

    # -- in the job's thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        came = failed(RuntimeError("the work ended without a word"))
        try:
            came = self._run()
        finally:
            self._came = came

    def _run(self) -> Ending:
        try:
            check_packages()
            from ukd_ros.data.progress import Stopped, listening  # tqdm

            def heard(step: Any) -> None:
                if self._stop_reason:
                    raise Stopped(f"stopped by {self._stop_reason}")
                self._progress.note(step)

            with listening(heard):
                return finished(self._job(self.options, self._bar))
        except KeyboardInterrupt as stop:  # Stopped is one
            return stopped(str(stop) or "the work stopped itself", self.options)
        except Exception as error:
            if self._stop_reason:
                # a terminal's Ctrl-C also ends the job's own processes, and it fails for want of them
                return stopped(f"stopped by {self._stop_reason} ({sentence_of(error)})", self.options)
            return failed(error)

    # -- in the executor's thread ----------------------------------------------------------------------------------

    def tick(self) -> None:
        """Publish and log what is due, and end when the job has, or when a stop takes too long."""
        for line in self._progress.lines():
            self.log.say("info", line)
        now = time.monotonic()
        came = self._came
        if came is None and self._stop_reason and now >= self._deadline_s:
            came = stopped(
                f"stopped by {self._stop_reason}; the step at hand did not end within "
                f"{self.options.stop_within_s:g} s and was cut, what was written before it is kept",
                self.options,
            )
        if came is not None and self.ending is None:
            self._conclude(came)
        told = (self._progress.version, self._state())
        if told != self._told and (now >= self._progress_due_s or self.ending is not None):
            self._told, self._progress_due_s = told, now + PROGRESS_S
            self._progress_publisher.publish(self._array())
        if now >= self._diagnostics_due_s:
            self._diagnostics_due_s = now + DIAGNOSTICS_S
            self._diagnostics_publisher.publish(self._array())

    def _conclude(self, ending: Ending) -> None:
        self.ending = ending
        self._last_values = self._progress.values()
        self._diagnostics_due_s = 0.0
        if ending.detail:
            self.log.say(ending.log, ending.detail)
        level = {FINISHED: "info", STOPPED: "warning"}.get(ending.status, "error")
        self.log.say(level, ending.sentence)

    def _state(self) -> str:
        if self.ending is not None:
            return self.ending.state
        return "stopping" if self._stop_reason else "running"

    def _array(self) -> DiagnosticArray:
        ending = self.ending
        if ending is None:
            level, message, values = OK, self._progress.message(), self._progress.values()
        else:
            level, message, values = ending.level, ending.sentence, self._last_values | ending.values
        values = {"state": self._state(), "out": self._out, **values}
        stamp = self.get_clock().now().to_msg()
        return progress_array(stamp, self.get_fully_qualified_name(), self._out, level, message, values)

    def see_off(self) -> bool:
        """Wait until listeners have the last word; return whether the job's thread has ended too."""
        for publisher in (self._progress_publisher, self._diagnostics_publisher):
            publisher.wait_for_all_acked(Duration(seconds=HEARD_S))
        self._thread.join(HEARD_S)
        return not self._thread.is_alive()


def main(args: list[str] | None = None, job: Job = distill_bags) -> int:
    """Run the offline node until its job ends or SIGINT or SIGTERM comes; return the exit status."""
    words = sys.argv if args is None else args
    if "--help" in words or "-h" in words:
        sys.stdout.write(help_text())
        return 0
    came: list[str] = []
    # Our own handlers: rclpy's would pull the context away before the last word is said.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: came.append(signal.Signals(number).name))
    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:  # a file of parameters that is not there, a word that is no parameter
        rclpy.logging.get_logger(NAME).fatal(f"the node cannot start: {' '.join(str(error).split())}")
        return 2
    try:
        try:
            strange = remove_ros_args(words)[1 if args is None else 0 :]
            if strange:
                raise ValueError(f"argument {strange[0]}: parameters are given as --ros-args -p NAME:=VALUE (--help).")
            node = DistillNode(job)
        except (ParameterException, ValueError) as error:
            rclpy.logging.get_logger(NAME).fatal(f"the node cannot start: {error}")
            return 2
        return _serve(node, came)
    finally:
        rclpy.try_shutdown()


def _serve(node: DistillNode, came: list[str]) -> int:
    """Spin until the job has ended; return the exit status. ``came``: names of the signals so far."""
    log = logging.getLogger("ukd_ros")
    log.setLevel(logging.INFO)
    log.addHandler(node.log)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    node.start()
    while node.ending is None and rclpy.ok():
        executor.spin_once(timeout_sec=TICK_S)
        if came:
            node.stop(came[0])
    node.tick()
    whole = node.see_off()
    status = 1 if node.ending is None else node.ending.status
    if whole:
        executor.shutdown()
        node.destroy_node()
    if status != STOPPED:
        return status
    # All is said and written. Python would wait for the job's threads, and takes seconds to unload torch on a busy
    # machine; the log file, though, is written by the shutdown.
    rclpy.try_shutdown()
    for child in multiprocessing.active_children():
        child.kill()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
