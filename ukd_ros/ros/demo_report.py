# SPDX-License-Identifier: Apache-2.0
"""What a recorded run shows: how many frames were answered, how well, and whether the covariance can be believed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.data.bags import BagReader, bag_truth, bag_views
from ukd_ros.geometry.estimate import PoseEstimate
from ukd_ros.geometry.keypoints import Keypoints
from ukd_ros.geometry.metrics import coverage, nees, rotation_error_deg
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose
from ukd_ros.geometry.view import View
from ukd_ros.ros.demo_listener import CLOUD_TOPIC, DIAGNOSTICS_TOPIC, POSE_TOPIC
from ukd_ros.ros.messages import CLOUD_DTYPE, KnownObjects
from ukd_ros.ros.overlay import draw_overlay

LEVEL = 0.95
MIN_ANSWERED = 0.95
MAX_ERROR_DIAMETERS = 0.05
COVERAGE_BAND = (0.85, 0.99)
OVERLAYS = 8


@dataclass(frozen=True, eq=False)
class Answer:
    """The node's answer to one image: the pose with its covariance, and its keypoint rows (``CLOUD_DTYPE``)."""

    stamp_ns: int
    pose: Pose
    cov: npt.NDArray[np.float64]
    rows: npt.NDArray[np.void]


@dataclass(frozen=True, eq=False)
class Run:
    """What was recorded: the answers by stamp, the stamps of all clouds, and the node's last diagnostics."""

    answers: dict[int, Answer]
    processed: frozenset[int]
    diagnostics: dict[str, str]


@dataclass(frozen=True, eq=False)
class Summary:
    """The figures of a run; errors and NEES [n] are of the answered frames whose truth is known, in order of time.

    Translations in m, rotations in degrees, latencies in ms; deltas [n, 6] = truth minus estimate in ``Pose``'s
    tangent; sigmas [n, 2] = root of the trace of the position's (m) and the rotation's (rad) block.
    """

    sent: int
    received: int
    answered: int
    stamps_ns: npt.NDArray[np.int64]
    translation: npt.NDArray[np.float64]
    rotation_deg: npt.NDArray[np.float64]
    deltas: npt.NDArray[np.float64]
    sigmas: npt.NDArray[np.float64]
    nees: npt.NDArray[np.float64]
    diameter: float
    latency: dict[str, str] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """Return the share of poses inside their own 95 % ellipsoid; NaN without any."""
        return coverage(self.nees, 6, LEVEL) if len(self.nees) else float("nan")

    def shortcomings(self) -> list[str]:
        """Return what falls short of the demo's promises, one sentence each; empty when all is well."""
        found = []
        if self.received == 0 or self.answered < MIN_ANSWERED * self.received:
            found.append(f"only {self.answered} of {self.received} received frames were answered with a pose.")
        if not len(self.nees):
            found.append("no answered frame has a known truth.")
            return found
        median = float(np.median(self.translation))
        if median > MAX_ERROR_DIAMETERS * self.diameter:
            found.append(f"the median error of {1e3 * median:.1f} mm exceeds 5 % of the diameter.")
        if not COVERAGE_BAND[0] <= self.coverage <= COVERAGE_BAND[1]:
            found.append(f"the 95 % ellipsoids hold {100 * self.coverage:.1f} % of the truths, not 85 to 99 %.")
        return found

    def text(self) -> str:
        """Return the table that is printed."""
        lines = [
            f"frames          {self.sent} sent, {self.received} received by the node, "
            f"{self.answered} answered with a pose"
        ]
        if len(self.nees):
            median, p90 = np.percentile(self.translation, [50, 90])
            turn, turn90 = np.percentile(self.rotation_deg, [50, 90])
            share = 100 * median / self.diameter
            sigma_mm, sigma_deg = 1e3 * np.median(self.sigmas[:, 0]), np.degrees(np.median(self.sigmas[:, 1]))
            lines += [
                f"translation     median {1e3 * median:.2f} mm ({share:.2f} % of the diameter), "
                f"90 % below {1e3 * p90:.2f} mm",
                f"rotation        median {turn:.2f} deg, 90 % below {turn90:.2f} deg",
                f"covariance      {100 * self.coverage:.1f} % of the truths in the 95 % ellipsoid (6x6), "
                f"mean NEES {np.mean(self.nees):.1f} (6 expected)",
                f"sharpness       median sigma {sigma_mm:.2f} mm, {sigma_deg:.2f} deg",
            ]
        for name in ("latency", "estimator", "overhead"):
            p50, p95 = (self.latency.get(f"{name} {level} (ms)") for level in ("p50", "p95"))
            if p50 is not None and p95 is not None:
                lines.append(f"{name:<15} p50 {p50} ms, p95 {p95} ms")
        return "\n".join(lines)


def read_run(path: Path) -> Run:
    """Read the listener's bag."""
    poses: dict[int, tuple[Pose, npt.NDArray[np.float64]]] = {}
    clouds: dict[int, npt.NDArray[np.void]] = {}
    diagnostics: dict[str, str] = {}
    with BagReader(path) as bag:
        for message in bag.messages((POSE_TOPIC, CLOUD_TOPIC, DIAGNOSTICS_TOPIC)):
            decoded = message.decoded()
            stamp = decoded.header.stamp.sec * 10**9 + decoded.header.stamp.nanosec
            if message.topic == DIAGNOSTICS_TOPIC:
                diagnostics = {v.key: v.value for status in decoded.status for v in status.values}
            elif message.topic == CLOUD_TOPIC:
                clouds[stamp] = np.frombuffer(bytes(decoded.data), dtype=CLOUD_DTYPE)
            else:
                p, q = decoded.pose.pose.position, decoded.pose.pose.orientation
                pose = Pose.from_quaternion([q.x, q.y, q.z, q.w], [p.x, p.y, p.z])
                poses[stamp] = (pose, np.asarray(decoded.pose.covariance, dtype=np.float64).reshape(6, 6))
    nothing = np.empty(0, dtype=CLOUD_DTYPE)
    answers = {s: Answer(s, pose, cov, clouds.get(s, nothing)) for s, (pose, cov) in sorted(poses.items())}
    return Run(answers, frozenset(clouds), diagnostics)


def summarise(run: Run, truth: dict[int, Pose], model: ObjectModel, sent: int) -> Summary:
    """Compare the answers with ``truth`` (stamp -> pose of ``model``; the nearest of its symmetric equals counts)."""
    symmetries = model.symmetries.poses()
    kept = [(answer, truth[stamp]) for stamp, answer in run.answers.items() if stamp in truth]
    nearest = []
    for answer, pose in kept:
        equals = [pose @ symmetry for symmetry in symmetries]
        nearest.append(min(equals, key=lambda equal, a=answer: rotation_error_deg(a.pose, equal)))  # type: ignore[misc]
    deltas = np.array([equal.minus(answer.pose) for (answer, _), equal in zip(kept, nearest, strict=True)])
    deltas = deltas.reshape(-1, 6)
    covs = np.array([answer.cov for answer, _ in kept]).reshape(-1, 6, 6)
    traces = np.stack([np.trace(covs[:, :3, :3], axis1=1, axis2=2), np.trace(covs[:, 3:, 3:], axis1=1, axis2=2)], 1)
    return Summary(
        sent=sent,
        received=int(run.diagnostics.get("images received", "0")),
        answered=len(run.answers),
        stamps_ns=np.array([answer.stamp_ns for answer, _ in kept], dtype=np.int64),
        translation=np.linalg.norm(deltas[:, :3], axis=1),
        rotation_deg=np.degrees(np.linalg.norm(deltas[:, 3:], axis=1)),
        deltas=deltas,
        sigmas=np.sqrt(traces),
        nees=nees(deltas, covs) if len(kept) else np.empty(0),
        diameter=model.diameter,
        latency={key: value for key, value in run.diagnostics.items() if key.endswith("(ms)")},
    )


def _estimate(answer: Answer, model: ObjectModel, number: int) -> PoseEstimate | None:
    """Return the answer as an estimate again, its keypoints uncorrelated (the cloud holds their own blocks only)."""
    rows = answer.rows[(answer.rows["object"] == number) & (answer.rows["instance"] >= 0)]
    rows = rows[rows["instance"] == rows["instance"].min()] if len(rows) else rows
    count = len(model.keypoints_3d)
    if len(rows) != count:
        return None
    cov = np.zeros((2 * count, 2 * count))
    u, v = np.arange(0, 2 * count, 2), np.arange(1, 2 * count, 2)
    cov[u, u], cov[v, v], cov[u, v], cov[v, u] = rows["cov_uu"], rows["cov_vv"], rows["cov_uv"], rows["cov_uv"]
    keypoints = Keypoints(np.stack([rows["u"], rows["v"]], axis=1), cov, rows["score"])
    score = float(rows["score"].mean())
    return PoseEstimate(model.name, 0, answer.pose, answer.cov, score, keypoints, np.ones(count, bool), 0.0, 0)


def write_overlays(run: Run, views: Iterator[View], objects: KnownObjects, name: str, out: Path) -> int:
    """Write about ``OVERLAYS`` evenly spaced answered frames with axes and ellipses as PNG; return how many."""
    stamps = sorted(run.answers)
    if not stamps:
        return 0
    chosen = np.unique(np.linspace(0, len(stamps) - 1, OVERLAYS).round().astype(int))
    wanted, written = {stamps[i] for i in chosen}, 0
    for view in views:
        if view.stamp_ns not in wanted:
            continue
        estimate = _estimate(run.answers[view.stamp_ns], objects.models[name], objects.numbers[name])
        drawn = draw_overlay(view, [] if estimate is None else [estimate], [], objects)
        write_picture(out / f"overlay_{written:02d}.png", drawn)
        written += 1
    return written


def write_picture(path: Path, image: npt.NDArray[np.uint8]) -> None:
    """Write RGB [H, W, 3] as PNG, whole or not at all."""
    beside = path.with_name(f".{path.name}")
    _, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    beside.write_bytes(encoded.tobytes())
    os.replace(beside, path)


def camera_views(bag: Path, image_topic: str, info_topic: str) -> Iterator[View]:
    """Yield the images of a bag that can be read."""
    return (view for view in bag_views(bag, image_topic, info_topic) if isinstance(view, View))


def truth_of(bag: Path, object_name: str) -> dict[int, Pose]:
    """Return the bag's truth of one object by stamp; empty when it has none."""
    return bag_truth(bag).get(object_name, {})


def figures(summary: Summary) -> dict[str, Any]:
    """Return the summary as plain numbers for a JSON file."""
    median = float(np.median(summary.translation)) if len(summary.nees) else None
    return {
        "sent": summary.sent,
        "received": summary.received,
        "answered": summary.answered,
        "median_translation_m": median,
        "median_translation_diameters": None if median is None else median / summary.diameter,
        "median_rotation_deg": float(np.median(summary.rotation_deg)) if len(summary.nees) else None,
        "coverage_95": summary.coverage if len(summary.nees) else None,
        "mean_nees": float(np.mean(summary.nees)) if len(summary.nees) else None,
        "latency": summary.latency,
        "shortcomings": summary.shortcomings(),
    }
