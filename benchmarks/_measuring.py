# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: interleaved timing on two cores, and results as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
CORES = 2


def use_two_cores() -> None:
    """Keep this process and its children on two cores; call it before a runtime makes its threads."""
    available = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, available[:CORES])
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, str(CORES))


def interleaved_ms(runs: Mapping[str, Callable[[], object]], rounds: int, each: int = 3) -> dict[str, list[float]]:
    """Time every run `each` times in turn, `rounds` times over, and return the times [ms] by name.

    In turn, so that whatever else the machine does meets all of them alike; one untimed round goes before.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for _ in range(each):
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def summary(times_ms: list[float]) -> dict[str, float]:
    """Return median, the 10th and the 95th percentile, ms."""
    p10, p50, p95 = np.percentile(times_ms, [10, 50, 95])
    return {"median_ms": float(p50), "p10_ms": float(p10), "p95_ms": float(p95), "runs": len(times_ms)}


def ratio(times: Mapping[str, list[float]], name: str, other: str) -> float:
    """Return the median over the rounds of the quotient of neighbouring runs, which shared the machine's mood."""
    return float(np.median(np.asarray(times[name]) / np.asarray(times[other])))


def busy() -> str:
    """Return a warning when other programs compete for the cores, else "".

    Threads of one run then wait for each other across time slices: torch takes twentyfold, and ratios mean nothing.
    """
    load = os.getloadavg()[0]
    if load <= 0.5:
        return ""
    return f"the machine is busy (load {load:.1f}): its times do not count, measure on an idle one"


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "cores_used": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "warning": busy(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(name: str, data: Mapping[str, Any]) -> Path:
    """Write results/NAME.json by rename and return its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".json.new")
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def table(rows: list[tuple[str, str, str]], about: Mapping[str, Any]) -> str:
    """Return rows of (what, measured, aim) as text, below the warning of `machine()` when it has one."""
    rows = [("what", "measured", "aim"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [about["warning"]] if about["warning"] else []
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
