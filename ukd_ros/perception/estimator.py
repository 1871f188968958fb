# SPDX-License-Identifier: Apache-2.0
"""From a view to poses: locate in the frame, zoom into each candidate, solve, gate, and follow over frames."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ukd_ros.geometry.arrays import FloatArray
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.estimate import PoseEstimate, Rejection, RejectReason
from ukd_ros.geometry.object_model import ObjectModel
from ukd_ros.geometry.pose import Pose
from ukd_ros.geometry.symmetry import canonical, covariance_at, nearest, with_free_turns
from ukd_ros.geometry.view import View
from ukd_ros.perception.backends import Backend, open_backend
from ukd_ros.perception.crop import letterbox, square_crop
from ukd_ros.perception.pnp import PnpOptions, PnpSolution, solve_pnp
from ukd_ros.perception.tracks import Track, TrackBook
from ukd_ros.perception.votes import (
    VoteInstance,
    VoteOptions,
    box_overlap,
    collect_instances,
    keypoint_box,
)

if TYPE_CHECKING:
    from ukd_ros.perception.bundle import Bundle

logger = logging.getLogger(__name__)

STAGES = ("locate", "crop", "zoom", "votes", "pnp", "total")
"""Keys of ``FrameResult.timings_ms``: the network on the frame, cutting and warping, the network on the crops, votes to
instances, poses from keypoints, and everything."""

SAME_BOX = 0.5
"""Intersection over union from which two boxes of a symmetric object are of one and the same."""

DEFAULT_CONTEXT = 1.5
"""Side of the zoomed square over the longer side of the keypoint box, where the model does not say its own."""


@dataclass(frozen=True)
class EstimatorOptions:
    """How frames become poses and what a pose must satisfy to be reported."""

    votes: VoteOptions = field(default_factory=VoteOptions, metadata={"help": "How votes become instances."})
    pnp: PnpOptions = field(default_factory=PnpOptions, metadata={"help": "How keypoints become poses."})
    zoom_factor: float = field(
        default=0.0,
        metadata={
            "help": "Side of the zoomed square over the longer side of the object's keypoint box; 0 takes what the "
            "model was trained with.",
            "unit": "",
        },
    )
    min_zoom_side: float = field(
        default=24.0, metadata={"help": "The zoomed square is at least this large in the image.", "unit": "px"}
    )
    zoom_rounds: int = field(
        default=1,
        metadata={
            "help": "Zoom again, up to this many times in all, when the first zoom shows the object elsewhere or of "
            "another size than its crop assumed.",
            "unit": "rounds",
        },
    )
    zoom_moved: float = field(
        default=0.12,
        metadata={"help": "What counts as elsewhere: shift or growth over the crop's side.", "unit": "fraction"},
    )
    confirm_overlap: float = field(
        default=0.15,
        metadata={
            "help": "The zoom confirms a candidate when it sees the same object in a box that overlaps the "
            "candidate's by this much (intersection over union).",
            "unit": "0..1",
        },
    )
    max_candidates: int = field(
        default=8, metadata={"help": "At most this many candidates are zoomed into per frame.", "unit": "candidates"}
    )
    min_score: float = field(
        default=0.4, metadata={"help": "A zoomed instance with a lower score is rejected.", "unit": "0..1"}
    )
    max_sigma_position: float = field(
        default=0.5,
        metadata={
            "help": "A pose whose largest standard deviation of position exceeds this fraction of the object's "
            "diameter is rejected.",
            "unit": "diameters",
        },
    )
    max_sigma_rotation_deg: float = field(
        default=40.0,
        metadata={
            "help": "A pose whose largest standard deviation of rotation exceeds this is rejected.",
            "unit": "deg",
        },
    )
    max_ambiguity: float = field(
        default=0.5,
        metadata={
            "help": "A pose is rejected when a second one, with its depth mirrored, is more than this times as likely "
            "(flat objects and far ones; no covariance describes two poses); 1 never rejects.",
            "unit": "0..1",
        },
    )
    duplicate_distance: float = field(
        default=0.25,
        metadata={
            "help": "Two poses of one object closer than this (median keypoint distance over the longer side of the "
            "box) are one; the better score is kept.",
            "unit": "fraction",
        },
    )
    tracking: bool = field(
        default=True, metadata={"help": "Look first where the objects of the last frame are; needs ordered frames."}
    )
    track_timeout_s: float = field(
        default=0.5, metadata={"help": "An object not seen for longer is forgotten, with its number.", "unit": "s"}
    )
    relocate_every: int = field(
        default=30,
        metadata={
            "help": "While tracking, search the whole frame again every so many frames; 0 never.",
            "unit": "frames",
        },
    )
    expected_instances: int = field(
        default=1,
        metadata={"help": "While fewer objects than this are tracked, every frame is searched.", "unit": "objects"},
    )
    constant_velocity: bool = field(
        default=False, metadata={"help": "Look where an object's last motion takes it instead of where it was."}
    )

    def __post_init__(self) -> None:
        """Refuse values that cannot work; ValueError names the field."""
        positive = ("min_zoom_side", "max_sigma_position", "max_sigma_rotation_deg", "duplicate_distance", "zoom_moved")
        for name in positive:
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name}: is {getattr(self, name)}, but a positive number is needed.")
        if self.zoom_factor != 0.0 and not 1.0 <= self.zoom_factor <= 10.0:
            raise ValueError(f"zoom_factor: is {self.zoom_factor}, but 0 or 1..10 is needed.")
        for name in ("confirm_overlap", "min_score", "max_ambiguity"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: is {getattr(self, name)}, but 0..1 is needed.")
        for name, least in (
            ("zoom_rounds", 1),
            ("max_candidates", 1),
            ("relocate_every", 0),
            ("expected_instances", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: is {getattr(self, name)}, but at least {least} is needed.")
        if not self.track_timeout_s >= 0.0:
            raise ValueError(f"track_timeout_s: is {self.track_timeout_s}, but 0 or more is needed.")


@dataclass(frozen=True, eq=False)
class FrameResult:
    """What one frame gave.

    estimates: poses, best score first; with tracking their ``instance`` is the same object's in every frame.
    rejections: why there is no pose where one was sought; one NOTHING_FOUND when the frame is empty.
    timings_ms: by stage, see STAGES. tracked: the crops came from the last poses and the frame was not searched.
    """

    estimates: tuple[PoseEstimate, ...]
    rejections: tuple[Rejection, ...]
    timings_ms: dict[str, float]
    tracked: bool


class PoseEstimator:
    """Finds the objects of a model in views of one camera; holds the tracks, so one estimator serves one stream."""

    def __init__(
        self,
        bundle: Bundle,
        backend: str = "auto",
        options: EstimatorOptions | None = None,
        *,
        threads: int = 0,
        locate: Backend | None = None,
        zoom: Backend | None = None,
    ) -> None:
        """Open both graphs of the bundle with the backend kind, or take backends that are open already.

        Raises BackendError when the runtime is missing or refuses the graph.
        """
        self.options = options or EstimatorOptions()
        self.objects = bundle.objects
        self.calibration = bundle.calibration
        self._locate = locate or open_backend(backend, bundle, "locate", threads)
        self._zoom = zoom or open_backend(backend, bundle, "zoom", threads)
        if self._zoom.width != self._zoom.height:
            raise ValueError(f"The zoom graph takes {self._zoom.width}x{self._zoom.height} px, but a square is needed.")
        self._context = bundle.graphs["zoom"].context or DEFAULT_CONTEXT
        self._book = TrackBook()
        self._camera: Camera | None = None
        self._frame_id = ""
        self._since_located = 0
        self._spent: dict[str, float] = {}

    @property
    def backend_name(self) -> str:
        """Name of the runtime that zooms (and locates)."""
        return self._zoom.name

    def reset(self) -> None:
        """Forget all tracks: the next frame is searched whole and identities start again at 0."""
        self._book.clear()
        self._camera = None
        self._since_located = 0

    def estimate(self, view: View) -> FrameResult:
        """Return the poses of the objects in a view, in the camera's optical frame (m), with their covariance."""
        start = time.perf_counter()
        self._spent = dict.fromkeys(STAGES, 0.0)
        self._follow_stream(view)
        estimates: list[PoseEstimate] = []
        rejections: list[Rejection] = []
        lost = self._follow_tracks(view, estimates) if self.options.tracking else []
        searched = self._must_search(len(estimates), bool(lost))
        if searched:
            self._search(view, estimates, rejections)
            self._since_located = 0
        else:
            self._since_located += 1
        found = {(estimate.object_name, estimate.instance) for estimate in estimates}
        rejections += [reason for track, reason in lost if (reason.object_name, track.instance) not in found]
        if not estimates and not rejections:
            rejections.append(Rejection(RejectReason.NOTHING_FOUND, "no object was found in the frame"))
        estimates.sort(key=lambda estimate: -estimate.score)
        self._spent["total"] = time.perf_counter() - start
        timings = {stage: 1e3 * seconds for stage, seconds in self._spent.items()}
        return FrameResult(tuple(estimates), tuple(rejections), timings, not searched)

    def observe(self, view: View) -> list[VoteInstance]:
        """Return the zoomed instances of a view in full-image pixels, best first, without solving or tracking.

        This is what calibration fits: every candidate that the zoom confirms, whatever its score.
        """
        self._spent = dict.fromkeys(STAGES, 0.0)
        found: list[VoteInstance] = []
        for candidate in self.locate(view)[: self.options.max_candidates]:
            instance = self.zoom(view, candidate.class_index, candidate.box)
            if instance is not None and not any(self._same(instance, other) for other in found):
                found.append(instance)
        return sorted(found, key=lambda instance: -instance.score)

    def locate(self, view: View) -> list[VoteInstance]:
        """Return the candidates that the locate graph sees in the whole frame, in full-image pixels, best first."""
        with self._timed("crop"):
            crop = letterbox((view.camera.width, view.camera.height), (self._locate.width, self._locate.height))
            image = crop.warp(view.image)
        with self._timed("locate"):
            raw = self._locate.run(image)
        with self._timed("votes"):
            found = collect_instances(raw, self.options.votes, self.calibration)
            return [instance.to_source(crop) for instance in found]

    def zoom(self, view: View, class_index: int, box: FloatArray) -> VoteInstance | None:
        """Return the instance that the zoom graph sees where an object's keypoint box [4] (image px) was expected.

        None when it does not see that object there. With ``zoom_rounds`` > 1 the crop follows what it shows.
        """
        instance: VoteInstance | None = None
        for _ in range(self.options.zoom_rounds):
            seen = self._zoom_once(view, class_index, box)
            if seen is None:
                break
            instance = seen
            if not self._moved(box, seen.box):
                break
            box = seen.box
        return instance

    def _zoom_once(self, view: View, class_index: int, box: FloatArray) -> VoteInstance | None:
        """Cut the square about the box, run the network and return the instance that fits the box best."""
        with self._timed("crop"):
            side = max(self._factor() * _longer_side(box), self.options.min_zoom_side)
            crop = square_crop(0.5 * (box[:2] + box[2:]), side, self._zoom.width)
            image = crop.warp(view.image)
        with self._timed("zoom"):
            raw = self._zoom.run(image)
        with self._timed("votes"):
            found = collect_instances(raw, self.options.votes, self.calibration)
            same = [instance.to_source(crop) for instance in found if instance.class_index == class_index]
            if not same:
                return None
            overlaps = box_overlap(box, np.array([instance.box for instance in same]))
            best = int(np.argmax(overlaps))
            return same[best] if overlaps[best] >= self.options.confirm_overlap else None

    def _factor(self) -> float:
        """Return the side of the zoomed square over the longer side of the keypoint box."""
        return self.options.zoom_factor or self._context

    def _moved(self, box: FloatArray, seen: FloatArray) -> bool:
        """Return whether what the crop shows is elsewhere or of another size than its box assumed."""
        side = self._factor() * _longer_side(box)
        shift = 0.5 * float(np.abs(box[:2] + box[2:] - seen[:2] - seen[2:]).max())
        growth = abs(_longer_side(seen) - _longer_side(box))
        return max(shift, growth) > self.options.zoom_moved * side

    def _follow_stream(self, view: View) -> None:
        """Start over when another camera or frame begins, and forget what was not seen for too long."""
        if self._camera is not None and not (
            _same_camera(self._camera, view.camera) and self._frame_id == view.frame_id
        ):
            if self.options.tracking:
                logger.info("The camera changed (%dx%d): tracks are dropped.", view.camera.width, view.camera.height)
            self.reset()
        self._camera, self._frame_id = view.camera, view.frame_id
        self._book.forget(view.stamp_ns, self.options.track_timeout_s)

    def _must_search(self, tracked: int, lost: bool) -> bool:
        """Return whether the whole frame is to be searched."""
        options = self.options
        if not options.tracking or tracked == 0 or lost or tracked < options.expected_instances:
            return True
        return 0 < options.relocate_every <= self._since_located + 1

    def _follow_tracks(self, view: View, estimates: list[PoseEstimate]) -> list[tuple[Track, Rejection]]:
        """Zoom where the last frame's objects are expected; add their estimates and return the lost ones."""
        lost: list[tuple[Track, Rejection]] = []
        for track in self._book.alive():
            model = self.objects[track.object_index]
            # the network names one of the poses that look alike; what was published may be another
            expected = canonical(track.predict(view.stamp_ns, self.options.constant_velocity), model.symmetries)
            xy = view.camera.project(expected.transform(model.keypoints_3d))
            answer: PoseEstimate | Rejection = Rejection(
                RejectReason.LOST, f"instance {track.instance} is not seen where it is expected", model.name
            )
            if np.isfinite(xy).all() and _within(keypoint_box(xy), view.camera):
                instance = self.zoom(view, track.object_index, keypoint_box(xy))
                if instance is not None:
                    answer = self.solve(view.camera, instance, expected)
            if isinstance(answer, PoseEstimate) and not self._duplicate(answer, estimates):
                answer = _named_like(answer, track.pose, model)
                track.see(answer.T_camera_object, view.stamp_ns)
                estimates.append(replace(answer, instance=track.instance))
                continue
            self._book.miss(track)
            if isinstance(answer, Rejection):
                lost.append((track, answer))
        return lost

    def _search(self, view: View, estimates: list[PoseEstimate], rejections: list[Rejection]) -> None:
        """Locate in the whole frame and solve every candidate that is not an object already estimated."""
        numbers = dict.fromkeys(range(len(self.objects)), 0)
        for candidate in self.locate(view)[: self.options.max_candidates]:
            if any(self._covers(estimate, candidate) for estimate in estimates):
                continue
            name = self.objects[candidate.class_index].name
            instance = self.zoom(view, candidate.class_index, candidate.box)
            if instance is None:
                detail = f"a candidate with score {candidate.score:.2f} is not confirmed by its zoomed crop"
                rejections.append(Rejection(RejectReason.LOW_SCORE, detail, name, candidate.keypoints))
                continue
            answer = self.solve(view.camera, instance)
            if isinstance(answer, Rejection):
                rejections.append(answer)
            elif not self._duplicate(answer, estimates):
                estimates.append(self._numbered(view, candidate.class_index, answer, numbers))

    def _numbered(self, view: View, class_index: int, estimate: PoseEstimate, numbers: dict[int, int]) -> PoseEstimate:
        """Return a newly found object with its instance number: a track's when tracking, else counted in the frame."""
        if not self.options.tracking:
            numbers[class_index] += 1
            return replace(estimate, instance=numbers[class_index] - 1)
        model = self.objects[class_index]
        track = self._book.assign(class_index, model, estimate.T_camera_object, view.stamp_ns, view.camera)
        return _named_like(replace(estimate, instance=track.instance), track.pose, model)

    def solve(self, camera: Camera, instance: VoteInstance, initial: Pose | None = None) -> PoseEstimate | Rejection:
        """Return the gated pose of one instance given in full-image pixels; ``initial`` is where it was expected."""
        model = self.objects[instance.class_index]
        if instance.score < self.options.min_score:
            detail = f"score {instance.score:.2f} is below {self.options.min_score:.2f}"
            return Rejection(RejectReason.LOW_SCORE, detail, model.name, instance.keypoints)
        with self._timed("pnp"):
            solution = solve_pnp(model.keypoints_3d, instance.keypoints, camera, self.options.pnp, initial)
        if isinstance(solution, Rejection):
            return replace(solution, object_name=model.name, keypoints=instance.keypoints)
        failed = self._gate(solution, model.diameter)
        if failed is not None:
            return Rejection(failed[0], failed[1], model.name, instance.keypoints)
        return PoseEstimate(
            object_name=model.name,
            instance=0,
            T_camera_object=solution.T_camera_object,
            cov=with_free_turns(solution.cov, solution.T_camera_object, model.symmetries),
            score=instance.score,
            keypoints=instance.keypoints,
            inliers=solution.inliers,
            chi2=solution.chi2,
            dof=solution.dof,
            ambiguity=solution.ambiguity,
        )

    def _gate(self, solution: PnpSolution, diameter: float) -> tuple[RejectReason, str] | None:
        """Return why a pose is not to be reported, or None (that its residuals fit is solve_pnp's own gate)."""
        position = math.sqrt(float(np.linalg.eigvalsh(solution.cov[:3, :3])[-1]))
        if position > self.options.max_sigma_position * diameter:
            detail = f"position is known to {position:.3f} m only, the diameter is {diameter:.3f} m"
            return RejectReason.TOO_UNCERTAIN, detail
        rotation = math.degrees(math.sqrt(float(np.linalg.eigvalsh(solution.cov[3:, 3:])[-1])))
        if rotation > self.options.max_sigma_rotation_deg:
            return RejectReason.TOO_UNCERTAIN, f"rotation is known to {rotation:.0f} deg only"
        if solution.ambiguity > self.options.max_ambiguity:
            detail = f"the pose with mirrored depth is {solution.ambiguity:.2f} times as likely as this one"
            return RejectReason.AMBIGUOUS, detail
        return None

    def _duplicate(self, estimate: PoseEstimate, estimates: list[PoseEstimate]) -> bool:
        """Return whether an estimate is of an object that is estimated already."""
        return any(
            other.object_name == estimate.object_name
            and self._alike(other.object_name, estimate.keypoints.xy, other.keypoints.xy)
            for other in estimates
        )

    def _same(self, instance: VoteInstance, other: VoteInstance) -> bool:
        """Return whether two instances are one object."""
        name = self.objects[instance.class_index].name
        return instance.class_index == other.class_index and self._alike(
            name, instance.keypoints.xy, other.keypoints.xy
        )

    def _covers(self, estimate: PoseEstimate, candidate: VoteInstance) -> bool:
        """Return whether a candidate of the coarse search is an object already estimated.

        Looser than ``_duplicate``, because the keypoints of the whole frame are coarse.
        """
        name = self.objects[candidate.class_index].name
        return estimate.object_name == name and self._alike(
            name, candidate.keypoints.xy, estimate.keypoints.xy, looser=2.0
        )

    def _alike(self, name: str, xy: FloatArray, other: FloatArray, looser: float = 1.0) -> bool:
        """Return whether keypoints [K, 2] of an object, seen twice, are of one and the same.

        The keypoints of a symmetric object may be named differently the second time; then the boxes are compared.
        """
        model = next(model for model in self.objects if model.name == name)
        if model.symmetries:
            return bool(box_overlap(keypoint_box(xy), keypoint_box(other)[None])[0] > SAME_BOX / looser)
        return _near(xy, other, looser * self.options.duplicate_distance)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[stage] = self._spent.get(stage, 0.0) + time.perf_counter() - start


def _named_like(estimate: PoseEstimate, reference: Pose, model: ObjectModel) -> PoseEstimate:
    """Return the estimate with that of its equivalent poses that is nearest to ``reference``: nothing spins."""
    if not model.symmetries:
        return estimate
    pose = nearest(estimate.T_camera_object, reference, model.symmetries)
    cov = covariance_at(estimate.cov, estimate.T_camera_object, pose)
    named = estimate.T_camera_keypoints or estimate.T_camera_object
    return replace(estimate, T_camera_object=pose, cov=cov, T_camera_keypoints=named)


def _longer_side(box: FloatArray) -> float:
    """Return the longer side (px) of a box [4]."""
    return float(max(box[2] - box[0], box[3] - box[1]))


def _within(box: FloatArray, camera: Camera) -> bool:
    """Return whether the centre of a box [4] lies in the image."""
    center = 0.5 * (box[:2] + box[2:])
    return bool((center >= -0.5).all() and center[0] < camera.width and center[1] < camera.height)


def _near(xy: FloatArray, other: FloatArray, fraction: float) -> bool:
    """Return whether the median distance of keypoints is below a fraction of the longer side of their box."""
    distance = float(np.median(np.linalg.norm(xy - other, axis=1)))
    return distance < fraction * max(_longer_side(keypoint_box(xy)), _longer_side(keypoint_box(other)))


def _same_camera(camera: Camera, other: Camera) -> bool:
    """Return whether two cameras take the same pixels."""
    return (
        (camera.width, camera.height, camera.distortion_model) == (other.width, other.height, other.distortion_model)
        and np.array_equal(camera.matrix, other.matrix)
        and np.array_equal(camera.distortion, other.distortion)
    )
