# SPDX-License-Identifier: Apache-2.0
"""How the offline job ends: finished, stopped or failed, with a sentence for people and a status for scripts."""

from __future__ import annotations

import importlib.util
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from diagnostic_msgs.msg import DiagnosticStatus

from ukd_ros.ros.distill_options import DistillNodeOptions, launch_line

FINISHED, FAILED, STOPPED = 0, 1, 130
"""Exit statuses."""

PACKAGES = {
    "torch": "torch",
    "ot": "POT",
    "onnx": "onnx",
    "onnxslim": "onnxslim",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "tqdm": "tqdm",
    "rosbags": "rosbags",
}
"""What the job imports and a robot does not have: module -> its name for pip."""


class Result(Protocol):
    """What is read of distillation.from_bags_request.FromBagsResult."""

    @property
    def model(self) -> Path:
        """The finished model folder."""
        ...

    @property
    def report(self) -> Path:
        """The report on it."""
        ...

    @property
    def launch(self) -> str:
        """The line that starts the pose node on it."""
        ...

    @property
    def summary(self) -> str:
        """How good it is, for people."""
        ...


class LackingPackages(RuntimeError):
    """Packages of the extra [train] that are not installed; the message has the line that installs them."""


def check_packages() -> None:
    """Raise LackingPackages unless everything that the job imports can be found; nothing is imported by it."""
    lacking = [module for module in PACKAGES if importlib.util.find_spec(module) is None]
    if lacking:
        names = " ".join(PACKAGES[module] for module in lacking)
        be = "is" if len(lacking) == 1 else "are"
        raise LackingPackages(f"needs {', '.join(lacking)}, which {be} not installed: pip install {names}")


@dataclass(frozen=True)
class Ending:
    """How the job ended: exit status, level and sentence for people, values for programs, more for the log.

    ``log``: the level at which ``detail`` is logged.
    """

    status: int
    state: str
    level: bytes
    sentence: str
    values: dict[str, str] = field(default_factory=dict)
    detail: str = ""
    log: str = "info"


def finished(result: Result) -> Ending:
    """Return the ending of a job that is done, with the line that starts the pose node."""
    return Ending(
        FINISHED,
        "finished",
        DiagnosticStatus.OK,
        f"finished: {result.model}, report {result.report}. Start the pose node on it: {result.launch}",
        {"model": str(result.model), "report": str(result.report), "launch": result.launch},
        result.summary,
    )


def stopped(said: str, options: DistillNodeOptions) -> Ending:
    """Return the ending of a job that was asked to stop and ``said`` what is kept, with the line that goes on."""
    again = launch_line(options)
    # The trainer speaks to users of the command line; here resuming is what happens anyway.
    said = said.removesuffix("; go on with --resume")
    return Ending(
        STOPPED, "stopped", DiagnosticStatus.WARN, f"{said}. To go on, start it again: {again}", {"go on": again}
    )


def failed(error: BaseException) -> Ending:
    """Return the ending by an error; of one that nobody foresaw the log shows where it happened."""
    foreseen = isinstance(error, (ValueError, RuntimeError, OSError, ImportError))
    detail = "".join(traceback.format_exception(error)).strip()
    sentence = sentence_of(error)
    # What is not one of our own errors was not written to be read alone.
    if foreseen and type(error) in (ValueError, RuntimeError):
        sentence += " (log level debug shows where)"
    return Ending(
        FAILED, "failed", DiagnosticStatus.ERROR, f"failed: {sentence}", {}, detail, "debug" if foreseen else "error"
    )


def sentence_of(error: BaseException) -> str:
    """Word an error as one line, with its cure where a package is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = error.name.split(".")[0]
        return f"needs {top}, which is not installed: pip install {PACKAGES.get(top, top)}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, RuntimeError, OSError)) and text else f"{type(error).__name__} {text}"
