# SPDX-License-Identifier: Apache-2.0
"""The offline node: what it refuses, how it speaks while its job runs, and how it ends."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rcl_interfaces.srv import GetParameters
from rclpy.exceptions import ParameterException
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from ros import distill_jobs
from ros.ros_graph import Graph

from ukd_ros.config import ConfigError, load_config
from ukd_ros.data.progress import Bar
from ukd_ros.ros.distill_ending import Ending
from ukd_ros.ros.distill_node import DistillNode, distill_bags, main
from ukd_ros.ros.distill_options import (
    DistillNodeOptions,
    as_argument,
    check_inputs,
    launch_line,
    options_file,
    path_of,
)

CONFIG = Path(__file__).resolve().parents[2] / "config" / "distill_node.yaml"
LATCHED = QoSProfile(depth=50, durability=DurabilityPolicy.TRANSIENT_LOCAL)


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Return the parameters that must be given, with something at their paths."""
    for name in ("monday.mcap", "teachers"):
        (tmp_path / name).touch()
    return {
        "bag": [str(tmp_path / "monday.mcap")],
        "teacher": str(tmp_path / "teachers"),
        "out": str(tmp_path / "run"),
    }


def node_of(graph: Graph, job: Any, **values: Any) -> DistillNode:
    """Put the real node around ``job`` into the graph, not started yet."""
    overrides = [Parameter(name, value=value) for name, value in values.items()]
    node = DistillNode(job, context=graph.context, parameter_overrides=overrides)
    graph.node = node
    graph.executor.add_node(node)
    return node


def ending_of(graph: Graph, node: DistillNode) -> Ending:
    """Spin until the job has ended and return how."""
    graph.spin_until(lambda: node.ending is not None, 20.0)
    assert node.ending is not None
    return node.ending


def words(arguments: dict[str, Any]) -> list[str]:
    """Return parameters as arguments of a process."""
    pairs = [
        f"{name}:={value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).strip()}"
        for name, value in arguments.items()
    ]
    return ["--ros-args", *(word for pair in pairs for word in ("-p", pair))]


def values_of(array: Any) -> dict[str, str]:
    return {pair.key: pair.value for pair in array.status[0].values}


def wait_for(process: subprocess.Popen[str], seen: Callable[[], bool]) -> None:
    """Wait until ``seen``, while the process lives."""
    end = time.monotonic() + 60.0
    while not seen():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


# -- while it runs, and its end -------------------------------------------------------------------------------------


def test_progress_tells_every_stage_and_late_listeners_get_the_last_word(graph: Graph, given: dict[str, Any]) -> None:
    node = node_of(graph, distill_jobs.count, **given)
    heard = graph.listen(DiagnosticArray, "/distill_node/progress", LATCHED)
    health = graph.listen(DiagnosticArray, "/diagnostics")
    graph.spin_until(lambda: node.count_subscribers("/distill_node/progress") > 0)
    node.start()
    graph.spin_until(lambda: node.ending is not None and values_of(heard[-1])["state"] == "finished", 20.0)
    running = [values_of(array) for array in heard[:-1]]
    training = [values for values in running if values["stage"] == "training"]
    assert training and all(values["state"] == "running" for values in running)
    done = [int(values["done"]) for values in training]
    assert done == sorted(done) and done[-1] > done[0] and training[-1]["total"] == "60"
    assert training[-1]["unit"] == "step" and float(training[-1]["loss"]) > 0.0
    assert float(training[-1]["rate (1/s)"]) > 0.0 and training[-1]["ETA of this stage (s)"].isdecimal()
    assert all(values["out"] == given["out"] for values in running)
    last = heard[-1].status[0]
    assert last.level == DiagnosticStatus.OK and last.name == "/distill_node: distillation"
    assert values_of(heard[-1])["launch"] == "ros2 launch ukd_ros pose.launch.py model:=part"
    assert values_of(heard[-1])["model"] in last.message and values_of(heard[-1])["launch"] in last.message
    assert heard[-1].header.stamp.sec > 0
    late: list[Any] = []
    graph.probe.create_subscription(DiagnosticArray, "/distill_node/progress", late.append, LATCHED)
    graph.spin_until(lambda: bool(late))
    assert [array.status[0] for array in late] == [last]
    graph.spin_until(lambda: bool(health) and health[-1].status[0] == last)


def test_the_node_answers_while_its_job_keeps_python_busy(graph: Graph, given: dict[str, Any]) -> None:
    enough = threading.Event()

    def busy(options: Any, progress: bool) -> distill_jobs.FakeResult:
        for _ in Bar(iter(lambda: enough.is_set(), True), desc="thinking", unit="thought", disable=True):
            sum(range(20_000))
        return distill_jobs.FakeResult(Path("model"), Path("report"), "launch")

    node = node_of(graph, busy, **given)
    node.start()
    try:
        request = GetParameters.Request(names=["out", "bag", "stop_within_s"])
        answer = graph.call(GetParameters, "/distill_node/get_parameters", request)
        still_at_work = node.ending is None
    finally:
        enough.set()
    assert still_at_work and answer.values[0].string_value == given["out"]
    assert list(answer.values[1].string_array_value) == given["bag"] and answer.values[2].double_value == 2.0
    assert ending_of(graph, node).status == 0


def test_an_error_is_said_in_its_own_sentence_everywhere(graph: Graph, given: dict[str, Any]) -> None:
    node = node_of(graph, distill_jobs.count, object=["good", "bad"], **given)
    heard = graph.listen(DiagnosticArray, "/distill_node/progress", LATCHED)
    health = graph.listen(DiagnosticArray, "/diagnostics")
    node.start()
    graph.spin_until(
        lambda: all(said and said[-1].status[0].level == DiagnosticStatus.ERROR for said in (heard, health))
    )
    ending = ending_of(graph, node)
    assert ending.status == 1
    for said in (heard, health):
        assert "none of 3 views shows the object 'bad'; name another." in said[-1].status[0].message
        assert values_of(said[-1])["state"] == "failed" and values_of(said[-1])["stage"] == "labelling"
    assert "distill_jobs.py" in ending.detail, "the debug log shows where"


def test_an_error_that_nobody_foresaw_shows_where_it_happened(graph: Graph, given: dict[str, Any]) -> None:
    def broken(options: Any, progress: bool) -> Any:
        return dict[str, int]()["key"]

    node = node_of(graph, broken, **given)
    node.start()
    ending = ending_of(graph, node)
    assert ending.status == 1 and "KeyError 'key'" in ending.sentence
    assert ending.log == "error" and "in broken" in ending.detail


def test_lacking_packages_are_named_with_the_line_that_installs_them(
    graph: Graph, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    missing = ("torch", "ot")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    began: list[Any] = []
    node = node_of(graph, lambda *given: began.append(given), **given)
    node.start()
    ending = ending_of(graph, node)
    assert ending.status == 1 and not began
    assert ending.sentence == "failed: needs torch, ot, which are not installed: pip install torch POT"


def test_a_stop_keeps_a_checkpoint_and_says_how_to_go_on(graph: Graph, given: dict[str, Any]) -> None:
    node = node_of(graph, distill_jobs.slow, settings=["steps=[1, 2]"], time_budget="1h30m", **given)
    heard = graph.listen(DiagnosticArray, "/distill_node/progress", LATCHED)
    node.start()
    graph.spin_until(lambda: bool(heard) and values_of(heard[-1])["stage"] == "training")
    node.stop("SIGINT")
    node.stop("SIGTERM")
    graph.spin_until(lambda: values_of(heard[-1])["state"] == "stopped")
    ending = ending_of(graph, node)
    assert ending.status == 130
    kept = int((path_of(given["out"]) / "checkpoint").read_text())
    assert f"stopped by SIGINT at step {kept}, which is kept. To go on" in ending.sentence
    assert "--resume" not in ending.sentence, "that is a word of the command line"
    assert heard[-1].status[0].level == DiagnosticStatus.WARN
    again = shlex.split(values_of(heard[-1])["go on"])
    assert again[:4] == ["ros2", "launch", "ukd_ros", "distill.launch.py"]
    assert set(again[4:]) == {
        f"bag:={given['bag'][0]}",
        f"teacher:={given['teacher']}",
        f"out:={given['out']}",
        'settings:=["steps=[1, 2]"]',
        "time_budget:=1h30m",
    }


def test_a_failure_of_a_job_that_was_asked_to_stop_is_a_stop(graph: Graph, given: dict[str, Any]) -> None:
    asked = threading.Event()

    def loses_its_workers(options: Any, progress: bool) -> Any:
        asked.wait(20.0)
        raise RuntimeError("a worker ended by itself")

    node = node_of(graph, loses_its_workers, **given)
    node.start()
    node.stop("SIGINT")
    asked.set()
    ending = ending_of(graph, node)
    assert ending.status == 130 and "a worker ended by itself" in ending.sentence


# -- the real job -----------------------------------------------------------------------------------------------------


def test_the_real_job_is_given_what_the_node_was_given(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from ukd_ros.distillation import from_bags
    from ukd_ros.distillation.from_bags_request import FromBagsConfig

    calls: list[Any] = []
    monkeypatch.setattr(from_bags, "distill_from_bags", lambda *a, **k: calls.append((a, k)))
    file = tmp_path / "mine.yaml"
    file.write_text("distill: {steps: 7}\nname: hers\n")
    bag, teacher, out = given["bag"][0], given["teacher"], given["out"]
    common = DistillNodeOptions((bag,), (teacher,), out, held_out="~/val", object=("can",), time_budget="2m")
    distill_bags(replace(common, config=str(file), settings=("distill.seed=5",), name="his", resume=False), True)
    (config, bags, teachers, folder), keywords = calls.pop()
    assert (config.distill.steps, config.distill.seed, config.name) == (7, 5, "his")
    assert (bags, teachers, folder) == ([Path(bag)], [Path(teacher)], Path(out))
    assert keywords == {
        "renders": [],
        "held_out": Path.home() / "val",
        "objects": ("can",),
        "resume": False,
        "time_budget_s": 120.0,
        "progress": True,
    }
    distill_bags(common, False)
    shipped = load_config(FromBagsConfig, CONFIG.with_name("distill_bags.yaml"))
    assert calls.pop()[0][0] == shipped, "without a file the settings are the package's"
    with pytest.raises(ConfigError, match="command line: distill.step: is not a setting; did you mean 'distill.steps'"):
        distill_bags(replace(common, settings=("distill.step=3",)), False)


def test_an_error_of_the_real_job_comes_out_whole(graph: Graph, given: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    node = node_of(graph, distill_bags, **given)
    node.start()
    graph.spin_until(lambda: node.ending is not None, 60.0)
    assert node.ending is not None and node.ending.status == 1 and node.ending.log == "debug"
    assert given["teacher"] in node.ending.sentence and "Traceback" not in node.ending.sentence


# -- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bag": [""]}, "parameter bag: is missing. Start it as: ros2 launch"),
        ({"teacher": "/no/such/teacher"}, "parameter teacher: there is nothing at /no/such/teacher"),
        ({"bag": "monday,tuesday"}, r"several are a list: -p bag:='\[A, B\]'"),
        ({"config": "no.yaml"}, "parameter config: there is nothing at .*no.yaml"),
        ({"bag": [1, 2]}, r"parameter bag: must be text or a list of texts, not \[1, 2\]"),
        ({"renders": ["a", ""]}, "parameter renders: has an empty text"),
        ({"settings": ["steps"]}, "parameter settings: 'steps' is not of the form key=value"),
        ({"time_budget": "90"}, "parameter time_budget: '90' is not a duration; write 90s"),
        ({"time_budget": 90}, "time_budget"),
        ({"stop_within_s": 0.1}, "stop_within_s"),
        ({"teachers": "x"}, "parameter teachers: the node has none of this name; did you mean teacher?"),
        ({"estimator.votes": 3}, "there are bag, teacher, out"),
    ],
)
def test_what_is_refused_at_start_is_named_with_its_reason(
    graph: Graph, given: dict[str, Any], change: dict[str, Any], reason: str
) -> None:
    overrides = [Parameter(name, value=value) for name, value in {**given, **change}.items()]
    with pytest.raises((ParameterException, ValueError), match=reason):
        DistillNode(distill_jobs.count, context=graph.context, parameter_overrides=overrides)


def test_parameters_are_described_ranged_and_fixed(graph: Graph, given: dict[str, Any]) -> None:
    node = node_of(graph, distill_jobs.count, use_sim_time=False, **given)
    assert node.options == DistillNodeOptions(tuple(given["bag"]), (given["teacher"],), given["out"])
    for name in ("bag", "out", "resume", "stop_within_s", "time_budget"):
        described = node.describe_parameter(name)
        assert described.read_only and described.description and described.additional_constraints
    limits = node.describe_parameter("stop_within_s").floating_point_range[0]
    assert (limits.from_value, limits.to_value) == (1.0, 3600.0)
    refused = node.set_parameters([Parameter("out", value="elsewhere")])[0]
    assert not refused.successful and "out" in refused.reason and node.options.out == given["out"]


def test_the_shipped_file_has_every_parameter_at_its_default(graph: Graph, given: dict[str, Any]) -> None:
    text = CONFIG.read_text(encoding="utf-8")
    assert text == options_file(), "write it again: python -m ukd_ros.ros.distill_options > config/distill_node.yaml"
    node = DistillNode(
        distill_jobs.count,
        context=graph.context,
        cli_args=["--ros-args", "--params-file", str(CONFIG)],
        parameter_overrides=[Parameter(name, value=value) for name, value in given.items()],
    )
    graph.node = node
    assert node.options == DistillNodeOptions(tuple(given["bag"]), (given["teacher"],), given["out"])


def test_a_path_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bag").mkdir()
    check_inputs(DistillNodeOptions(("~/bag",), ("~/bag",), "~/run"))
    assert path_of("~/bag") == tmp_path / "bag"


@pytest.mark.parametrize("values", [["a"], ["a b", "10:30.mcap"], ["a,b", "c"], ["[a"], [" a"]])
def test_a_list_survives_as_a_launch_argument(values: list[str]) -> None:
    text = as_argument(values)
    assert (yaml.safe_load(text) if text.startswith("[") else text.split(",")) == values


def test_the_line_that_goes_on_leaves_defaults_out_and_never_forbids_resuming() -> None:
    line = launch_line(DistillNodeOptions(("a b",), ("t",), "o", resume=False, stop_within_s=5.0))
    assert line == "ros2 launch ukd_ros distill.launch.py 'bag:=a b' teacher:=t out:=o stop_within_s:=5.0"


# -- as a process ---------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_process_with_130_and_the_same_line_goes_on(given: dict[str, Any]) -> None:
    checkpoint = path_of(given["out"]) / "checkpoint"
    node = distill_jobs.start("slow", *words(given), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_for(node, lambda: checkpoint.parent.exists())
        time.sleep(0.5)
        node.send_signal(signal.SIGINT)
        _, said = node.communicate(timeout=10.0)
    finally:
        node.kill()
    assert node.returncode == 130 and "Traceback" not in said
    kept = int(checkpoint.read_text())
    assert (
        f"stopped by SIGINT at step {kept}, which is kept" in said and "ros2 launch ukd_ros distill.launch.py" in said
    )
    assert "%|" not in said, "a bar is for terminals"
    again = distill_jobs.start("quick_again", *words(given), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, said = again.communicate(timeout=60.0)
    assert again.returncode == 0 and f"training: {kept} of {kept + 10} steps" in said
    assert "as good as can be" in said and "ros2 launch ukd_ros pose.launch.py model:=part" in said


def test_a_step_that_does_not_end_is_cut_with_its_processes(given: dict[str, Any]) -> None:
    note = path_of(given["out"]) / "child"
    node = distill_jobs.start("stuck", *words(given), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_for(node, lambda: note.exists() and note.read_text().isdecimal())
        node.send_signal(signal.SIGTERM)
        _, said = node.communicate(timeout=10.0)
    finally:
        node.kill()
    assert node.returncode == 130
    assert "did not end within 2 s and was cut" in said and "start it again: ros2 launch" in said
    child = int(note.read_text())
    end = time.monotonic() + 10.0
    while Path(f"/proc/{child}").exists() and "(zombie)" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < end, "the job's own process was left behind"
        time.sleep(0.05)


def test_a_terminal_shows_a_bar_and_an_error_is_status_1(given: dict[str, Any]) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    node = distill_jobs.start("count", *words({**given, "object": ["bad"]}), stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    assert node.wait(30.0) == 1
    text = shown.decode()
    assert "labelling" in text and "%|" in text
    assert "[ERROR]" in text and "none of 3 views shows the object 'bad'; name another." in text


def test_a_file_with_an_unknown_parameter_ends_the_start_with_one_line(given: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"/**": {"ros__parameters": {**given, "tiem_budget": "9m"}}}))
    node = distill_jobs.start("count", "--ros-args", "--params-file", str(file), stderr=subprocess.PIPE)
    _, said = node.communicate(timeout=60.0)
    assert node.returncode == 2 and "Traceback" not in said
    assert "parameter tiem_budget: the node has none of this name; did you mean time_budget?" in said


def test_a_file_that_is_not_there_ends_the_start_with_one_line() -> None:
    node = distill_jobs.start("count", "--ros-args", "--params-file", "/no/such/file.yaml", stderr=subprocess.PIPE)
    _, said = node.communicate(timeout=60.0)
    assert node.returncode == 2 and "Traceback" not in said
    assert "the node cannot start" in said and "/no/such/file.yaml" in said


def test_ros2_run_finds_the_node(repo_root: Path) -> None:
    entry = re.search(r'"distill_node = ([\w.]+):(\w+)"', (repo_root / "setup.py").read_text(encoding="utf-8"))
    assert entry is not None and getattr(importlib.import_module(entry[1]), entry[2]) is main


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from ukd_ros.ros.distill_node import main; assert main(['--help']) == 0\n"
        "heavy = {'torch', 'ot', 'rosbags', 'tqdm', 'scipy', 'cv2', 'onnx'} & set(sys.modules); assert not heavy, heavy"
    )
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in ("bag", "teacher", "out", "config", "time_budget"))


def test_the_launch_file_declares_every_parameter_and_hands_them_on() -> None:
    pytest.importorskip("launch_ros")
    from launch import LaunchContext
    from launch.actions import DeclareLaunchArgument

    path = CONFIG.parents[1] / "launch" / "distill.launch.py"
    spec = importlib.util.spec_from_file_location("distill_launch", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    declared = [e for e in module.generate_launch_description().entities if isinstance(e, DeclareLaunchArgument)]
    names = {argument.name for argument in declared}
    assert names == {*DistillNodeOptions.__dataclass_fields__, "namespace", "params_file", "log_level"}
    assert all(argument.description for argument in declared)
    context = LaunchContext()
    context.launch_configurations.update(dict.fromkeys(names, ""))
    context.launch_configurations.update(
        {"bag": "a,b", "teacher": '["t,1"]', "resume": "False", "stop_within_s": "5", "out": "12"}
    )
    assert module.given_parameters(context) == {
        "bag": ["a", "b"],
        "teacher": ["t,1"],
        "out": "12",
        "resume": False,
        "stop_within_s": 5.0,
    }
    for name, wrong in (("resume", "maybe"), ("stop_within_s", "soon"), ("bag", "[a, 1]")):
        context.launch_configurations[name] = wrong
        with pytest.raises(RuntimeError, match=f"launch argument {name}:="):
            module.given_parameters(context)
        context.launch_configurations[name] = ""
