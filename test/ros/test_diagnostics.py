# SPDX-License-Identifier: Apache-2.0
"""Health: what is counted, what is said and how often, and when the input is called lossy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticStatus

from ukd_ros.ros.diagnostics import (
    SAY_AGAIN_S,
    FrameStatistics,
    Input,
    ProblemLog,
    diagnostic_array,
    silence,
    statistics_values,
)


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_kind_of_problem_is_logged_once_in_ten_seconds_and_every_kind_for_itself() -> None:
    clock, said = ManualClock(), list[str]()
    log = ProblemLog(said.append, clock)
    for _ in range(5):
        log.report("image", "bad image")
    log.report("camera_info", "bad info")
    assert said == ["bad image", "bad info"]
    clock.now += SAY_AGAIN_S
    log.report("image", "worse image")
    assert said[-1] == "worse image (4 more like this since it was last logged)"
    assert log.counts() == {"image": 6, "camera_info": 1}
    assert [problem.text for problem in log.fresh()] == ["worse image"]
    clock.now += 60.0
    assert log.fresh() == [] and log.last() == ("worse image", 60.0)


def arrivals(rate_hz: float, keep: npt.NDArray[np.bool_], infos: bool) -> FrameStatistics:
    clock = ManualClock()
    statistics = FrameStatistics(clock)
    for i, kept in enumerate(keep):
        clock.now = 100.0 + i / rate_hz
        if infos:
            statistics.info_arrived()
        if kept:
            statistics.image_arrived(round(clock.now * 1e9), dropped=False)
    return statistics


@pytest.mark.parametrize(
    ("keep", "infos", "lossy"),
    [
        (np.ones(120, bool), True, False),
        (np.ones(120, bool), False, False),
        (np.random.default_rng(0).random(150) < 0.9, True, False),
        (np.random.default_rng(0).random(150) < 0.33, False, True),  # some neighbours get through: the stamps tell
        (np.arange(150) % 3 == 0, True, True),  # none does: camera_info tells
        (np.arange(30) % 3 == 0, True, False),  # too few to judge
    ],
)
def test_lost_images_are_noticed_by_stamps_or_by_camera_info(
    keep: npt.NDArray[np.bool_], infos: bool, lossy: bool
) -> None:
    statistics = arrivals(30.0, keep, infos)
    sentence = statistics.lossy()
    assert (sentence is not None) == lossy
    if sentence:
        assert "30.0 Hz" in sentence and "FASTDDS_DEFAULT_PROFILES_FILE" in sentence


def test_percentiles_and_counters_reach_the_diagnostics() -> None:
    statistics = FrameStatistics()
    statistics.image_arrived(5, dropped=True)
    for latency in range(1, 101):
        statistics.frame_done(float(latency), {"estimator": 2.0}, poses=latency % 2, reasons=["part low_score"])
    values = statistics_values(statistics, node_now_ns=2_000_000_005)
    assert values["latency p50 (ms)"] == "50.50" and values["latency p95 (ms)"] == "95.05"
    assert values["frames with a pose"] == "50" and values["images dropped for a newer one"] == "1"
    assert values["rejected: part low_score"] == "100" and values["last stamp's age (s)"] == "2.000"
    array = diagnostic_array(Time(sec=3), "/arm/pose_node", "model", DiagnosticStatus.WARN, "text", values)
    assert array.status[0].name == "/arm/pose_node: pose estimation" and array.header.stamp.sec == 3
    assert {v.key: v.value for v in array.status[0].values} == values


def test_silence_tells_a_missing_publisher_from_a_mute_one() -> None:
    other = Input("/camera_info", 40, 1)
    assert "remapping" in silence(Input("/image", 0, 0), other, 6.0)
    assert "quality of service" in silence(Input("/image", 0, 1), other, 6.0)
    assert "40 messages came on /camera_info" in silence(Input("/image", 0, 1), other, 6.0)
