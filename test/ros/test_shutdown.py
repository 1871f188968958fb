# SPDX-License-Identifier: Apache-2.0
"""The node as a process: it comes up, says what is wrong, and goes quietly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ukd_ros.ros.demo_processes import free_domain


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_node_without_a_traceback(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "log"
    with log.open("w", encoding="utf-8") as stream:
        node = subprocess.Popen(
            [sys.executable, "-m", "ukd_ros.ros.pose_node", "--ros-args", "-p", "model:=/no/such/model"],
            stdout=stream,
            stderr=stream,
            env=dict(os.environ, ROS_DOMAIN_ID=str(free_domain())),
        )
    try:
        end = time.monotonic() + 120.0
        while "configure failed" not in log.read_text(encoding="utf-8"):
            assert node.poll() is None and time.monotonic() < end, log.read_text(encoding="utf-8")
            time.sleep(0.05)
        node.send_signal(number)
        assert node.wait(60.0) == 0
    finally:
        node.kill()
        node.wait()
    said = log.read_text(encoding="utf-8")
    assert "Traceback" not in said and "/no/such/model" in said


def test_a_wrong_parameter_ends_the_start_with_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ukd_ros.ros.pose_node", "--ros-args", "-p", "estimator.min_score:=7.0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120.0,
        env=dict(os.environ, ROS_DOMAIN_ID=str(free_domain())),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "estimator.min_score" in done.stderr and "0..1" in done.stderr
