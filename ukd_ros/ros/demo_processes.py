# SPDX-License-Identifier: Apache-2.0
"""Child processes that end with their parent, in a ROS domain that nobody else on this machine uses."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ukd_ros.ros.fastdds import profile_environment

PR_SET_PDEATHSIG = 1
STOP_S = 5.0
DOMAINS = range(1, 102)
"""Above 101 the ports of a domain reach into Linux's ephemeral range."""


def domain_ports(domain: int) -> tuple[int, int]:
    """Return the discovery ports (multicast, first participant's unicast) of a domain, RTPS 2.2 section 9.6.1."""
    return 7400 + 250 * domain, 7400 + 250 * domain + 10


def is_free(domain: int) -> bool:
    """Return whether no participant of ``domain`` listens on this machine."""
    for port in domain_ports(domain):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                return False
    return True


def free_domain() -> int:
    """Return a domain that nobody on this machine uses, a random one, so that two that ask at once seldom collide."""
    for domain in random.sample(DOMAINS, len(DOMAINS)):
        if is_free(domain):
            return domain
    raise OSError("every ROS domain from 1 to 101 is in use on this machine: end some ROS programs.")


def local_environment(domain: int) -> tuple[dict[str, str], str]:
    """Return this process's environment for a graph that stays on this machine, and a sentence on the DDS profile."""
    environment = dict(os.environ, ROS_DOMAIN_ID=str(domain), PYTHONUNBUFFERED="1")
    if environment.get("ROS_DISTRO") in ("foxy", "galactic", "humble"):
        environment["ROS_LOCALHOST_ONLY"] = "1"
    else:
        environment.pop("ROS_LOCALHOST_ONLY", None)
        environment["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    variables, sentence = profile_environment(environment)
    return environment | variables, sentence


def _die_with_parent() -> None:
    # Also where the parent is killed outright: nobody may be left publishing.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Children:
    """Runs modules of this package as child processes; every one has ended when the ``with`` block has."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Remember the environment that they get."""
        self._environment = environment
        self._running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Children:
        """Turn SIGTERM into an exception, so that the block is left in order."""
        self._before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all of them."""
        for child in self._running:
            self.stop(child)
        signal.signal(signal.SIGTERM, self._before)

    def start(self, module: str, arguments: Sequence[str], log: Path) -> subprocess.Popen[str]:
        """Start ``python -m module arguments``; its errors go to the file ``log``, its output can be read."""
        with log.open("w", encoding="utf-8") as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                preexec_fn=_die_with_parent,
            )
        self._running.append(child)
        return child

    @staticmethod
    def stop(child: subprocess.Popen[str]) -> int:
        """End ``child`` (SIGTERM, after five seconds SIGKILL) and return its exit status."""
        if child.poll() is None:
            # A background job of a non-interactive shell ignores SIGINT: terminate.
            child.terminate()
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
        return child.wait()

    def wait_for(self, wanted: Sequence[subprocess.Popen[str]], timeout_s: float) -> bool:
        """Wait until all of ``wanted`` have ended; False when another child ends first or the time is over."""
        end = time.monotonic() + timeout_s
        others = [child for child in self._running if child not in wanted]
        while any(child.poll() is None for child in wanted):
            if time.monotonic() > end or any(other.poll() is not None for other in others):
                return False
            time.sleep(0.1)
        return True
