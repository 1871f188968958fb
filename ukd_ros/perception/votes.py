# SPDX-License-Identifier: Apache-2.0
"""From the votes of cells to object instances: which votes mean the same object, and what they know together.

A vote is one cell's opinion on all K keypoints of one object class: a mean and a 2x2 covariance for each. Votes that
agree become one instance; its keypoints are the information-weighted means of its votes. Errors are shared twice, and
the covariance says so: between the votes of a keypoint (averaging does not remove what they have in common), and
between the keypoints of an instance (a network errs by a common shift, scale and turn of the whole crop).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ukd_ros.geometry.arrays import FloatArray, frozen_array
from ukd_ros.geometry.keypoints import Keypoints
from ukd_ros.perception.cells import level_share

if TYPE_CHECKING:
    from ukd_ros.perception.backends import RawVotes
    from ukd_ros.perception.crop import Crop

MODES = 4
"""Common modes of an instance's keypoints: shift along u, shift along v, scale, in-plane turn."""

_OUTLIER_SCALES = 3.0
_DUPLICATE_IOU = 0.7
_MOST_SPREAD = 0.3


@dataclass(frozen=True, eq=False)
class Calibration:
    """How far the network's own error bars are to be believed; fitted by ``ukd calibrate`` on held-out renders.

    block_factor: factor on each keypoint's fused 2x2 block (1: the predicted scales are right), > 0.
    vote_correlation: correlation 0..1 between the errors of two votes for one keypoint.
    modes: [4] >= 0, variance of the common shift u, shift v, scale and in-plane turn of all keypoints, in units of
        the instance's mean predicted variance per vote.
    views, instances: how many images and object instances it was fitted on (0: it is a default, not a fit).
    outlier_fraction: share of those instances that the fit set aside as gross errors.
    shrinkage: >= 0, how far fused keypoints are drawn to their centre by doubt; see `unshrunk` (0: not at all).
    doubt_exponent: how much faster than the predicted variance the true one grows; see `widened` (0: just as fast).
    doubt_reference: > 0, the share (see `shrink_share`) at which `widened` changes nothing.
    conformal_level, conformal_radius: the ellipsoid {d: d^T cov^-1 d <= radius^2} of a published pose covariance held
        this share of poses in blocks like those it was calibrated on; level 0: nobody has looked.
    ValueError names the field that is out of range.
    """

    block_factor: float = 1.0
    vote_correlation: float = 0.5
    modes: FloatArray = field(default_factory=lambda: np.zeros(MODES))
    views: int = 0
    instances: int = 0
    outlier_fraction: float = 0.0
    shrinkage: float = 0.0
    doubt_exponent: float = 0.0
    doubt_reference: float = 1.0
    conformal_level: float = 0.0
    conformal_radius: float = 0.0

    def __post_init__(self) -> None:
        """Check and freeze the fields."""
        modes = frozen_array(self.modes, (MODES,), "modes")
        if (modes < 0.0).any():
            raise ValueError(f"modes: must not be negative, got {modes.tolist()}.")
        if not (np.isfinite(self.block_factor) and self.block_factor > 0.0):
            raise ValueError(f"block_factor: is {self.block_factor}, but a positive number is needed.")
        if not 0.0 <= self.vote_correlation <= 1.0:
            raise ValueError(f"vote_correlation: is {self.vote_correlation}, but 0..1 is needed.")
        if self.views < 0 or self.instances < 0:
            raise ValueError(f"views, instances: must not be negative, got {self.views} and {self.instances}.")
        if not 0.0 <= self.outlier_fraction <= 1.0:
            raise ValueError(f"outlier_fraction: is {self.outlier_fraction}, but 0..1 is needed.")
        if not 0.0 <= self.shrinkage <= 10.0:
            raise ValueError(f"shrinkage: is {self.shrinkage}, but 0..10 is needed.")
        if not (-2.0 <= self.doubt_exponent <= 4.0 and 0.0 < self.doubt_reference < np.inf):
            values = f"{self.doubt_exponent} and {self.doubt_reference}"
            raise ValueError(
                f"doubt_exponent, doubt_reference: are {values}, but -2..4 and a positive number are needed."
            )
        if not 0.0 <= self.conformal_level < 1.0 or not 0.0 <= self.conformal_radius < np.inf:
            values = f"{self.conformal_level} and {self.conformal_radius}"
            raise ValueError(f"conformal_level, conformal_radius: are {values}, but 0..1 and 0 or more are needed.")
        object.__setattr__(self, "modes", modes)


@dataclass(frozen=True)
class VoteOptions:
    """How votes are gathered into instances; every length is relative to the instance, so crops of any size do."""

    min_score: float = field(
        default=0.3, metadata={"help": "A cell votes for an object when its score reaches this.", "unit": "0..1"}
    )
    max_cells: int = field(
        default=200, metadata={"help": "At most this many of the best cells per class are looked at.", "unit": "cells"}
    )
    max_votes: int = field(
        default=20, metadata={"help": "At most this many of an instance's best votes are fused.", "unit": "votes"}
    )
    min_votes: int = field(default=1, metadata={"help": "An instance with fewer votes is dropped.", "unit": "votes"})
    agreement: float = field(
        default=0.3,
        metadata={
            "help": "Votes belong together when the median distance of their keypoints is below this fraction of the "
            "seed's keypoint box.",
            "unit": "fraction",
        },
    )
    max_instances: int = field(
        default=16, metadata={"help": "At most this many instances per class are reported.", "unit": "instances"}
    )
    class_overlap: float = field(
        default=1.0,
        metadata={
            "help": "Of two instances of different classes whose boxes overlap by more than this (intersection over "
            "union) only the better one is kept; 1 keeps both.",
            "unit": "0..1",
        },
    )

    def __post_init__(self) -> None:
        """Refuse values that no gathering can work with."""
        if not 0.0 < self.min_score <= 1.0:
            raise ValueError(f"min_score: is {self.min_score}, but more than 0 and at most 1 is needed.")
        for name in ("max_cells", "max_votes", "min_votes", "max_instances"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: is {getattr(self, name)}, but at least 1 is needed.")
        if not self.agreement > 0.0:
            raise ValueError(f"agreement: is {self.agreement}, but a positive fraction is needed.")
        if not 0.0 <= self.class_overlap <= 1.0:
            raise ValueError(f"class_overlap: is {self.class_overlap}, but 0..1 is needed.")


@dataclass(frozen=True, eq=False)
class VoteInstance:
    """One instance as its votes describe it, in pixels of the image whose votes were collected.

    class_index: position in the model's objects. score: 0..1, the mean of the votes' own, weighted by their say.
    keypoints: fused, with the joint covariance that the calibration gives.
    box: [4] x0 y0 x1 y1 px, the bounding box of the fused keypoints.
    votes: how many votes were fused. cells: [votes] where they came from, the best first, in the
        network's input, which is the image itself or was ``crop``.
    mean_blocks: [K, 2, 2] px^2, the variance of a typical single vote. effective_votes: [K], how many equally good
        votes the fused ones are worth. These two and the calibration determine ``keypoints.cov``.
    """

    class_index: int
    score: float
    keypoints: Keypoints
    box: FloatArray
    votes: int
    mean_blocks: FloatArray
    effective_votes: FloatArray
    cells: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    crop: Crop | None = None

    def size(self) -> float:
        """Return the longer side of the box (px)."""
        return float(max(self.box[2] - self.box[0], self.box[3] - self.box[1]))

    def to_source(self, crop: Crop) -> VoteInstance:
        """Return the same instance in the pixels that ``crop`` was cut from."""
        xy = crop.to_source(self.keypoints.xy)
        return replace(
            self,
            keypoints=Keypoints(xy, crop.cov_to_source(self.keypoints.cov), self.keypoints.score),
            box=keypoint_box(xy),
            mean_blocks=crop.cov_to_source(self.mean_blocks),
            crop=crop,
        )


def keypoint_box(xy: FloatArray) -> FloatArray:
    """Return the bounding boxes [..., 4] (x0 y0 x1 y1) of keypoints [..., K, 2]."""
    return np.concatenate([xy.min(axis=-2), xy.max(axis=-2)], axis=-1)


def box_overlap(box: FloatArray, others: FloatArray) -> FloatArray:
    """Return the intersection over union [M] of one box [4] with others [M, 4]; 0 where both have no area."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.clip(high - low, 0.0, None).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - common
    return np.asarray(np.divide(common, union, out=np.zeros_like(common), where=union > 0.0))


def common_modes(xy: FloatArray) -> FloatArray:
    """Return B [..., 2K, 4] for keypoints [..., K, 2]: how shift u, shift v, scale and in-plane turn move each of them.

    Dimensionless: keypoints are taken relative to their mean and divided by their rms distance from it, so that a unit
    of every mode moves the keypoints by one pixel (rms).
    """
    centred = xy - xy.mean(axis=-2, keepdims=True)
    radius = np.sqrt((centred**2).sum(axis=-1).mean(axis=-1))[..., None, None]
    unit = centred / np.maximum(radius, 1e-9)
    modes = np.zeros((*xy.shape, MODES))
    modes[..., 0, 0] = 1.0
    modes[..., 1, 1] = 1.0
    modes[..., 2] = unit
    modes[..., 0, 3] = -unit[..., 1]
    modes[..., 1, 3] = unit[..., 0]
    return modes.reshape(*xy.shape[:-2], 2 * xy.shape[-2], MODES)


def shrink_share(xy: FloatArray, mean_blocks: FloatArray) -> FloatArray:
    """Return [...], the predicted variance of a keypoint (both axes) over the mean square radius of the keypoints.

    xy [..., K, 2], mean_blocks [..., K, 2, 2].
    """
    centred = xy - xy.mean(axis=-2, keepdims=True)
    square = (centred**2).sum(axis=-1).mean(axis=-1)
    return np.asarray(np.trace(mean_blocks, axis1=-2, axis2=-1).mean(axis=-1) / np.maximum(square, 1e-9))


def unshrunk(xy: FloatArray, mean_blocks: FloatArray, shrinkage: float) -> FloatArray:
    """Return keypoints [K, 2] spread about their centre by the factor 1 + shrinkage * variance / radius^2.

    A network trained to be near the truth on average answers with the mean over what it cannot tell apart (which way
    the object is turned, most of all). The mean of turned copies of a shape is a smaller copy: its square radius is
    the true one less the variance. Solved as it is, every pose would lie too far away by half to all of that share.
    """
    if shrinkage == 0.0:
        return xy
    factor = 1.0 + min(shrinkage * float(shrink_share(xy, mean_blocks)), _MOST_SPREAD)
    centre = xy.mean(axis=0)
    return np.asarray(centre + factor * (xy - centre))


def widened(mean_blocks: FloatArray, share: FloatArray, calibration: Calibration) -> FloatArray:
    """Return blocks [..., K, 2, 2] px^2 times (share / reference) ^ exponent, a factor that is kept within 1/16 to 16.

    A network's predicted variances differ less between clear and doubtful views than its errors do. share [...]: of
    the instance, from `shrink_share`.
    """
    if calibration.doubt_exponent == 0.0:
        return mean_blocks
    factor = np.clip((share / calibration.doubt_reference) ** calibration.doubt_exponent, 1.0 / 16.0, 16.0)
    return np.asarray(mean_blocks * np.asarray(factor)[..., None, None, None])


def joint_covariance(
    xy: FloatArray, mean_blocks: FloatArray, effective_votes: FloatArray, calibration: Calibration
) -> FloatArray:
    """Return the covariance [2K, 2K] px^2 of fused keypoints xy [K, 2].

    Per keypoint, the mean of N equally good votes of variance S with correlation rho has the covariance
    ``(rho + (1 - rho) / N) S``; N is the effective number, S the typical vote's ``mean_blocks`` [K, 2, 2]. These
    blocks times the block factor, plus ``s^2 B diag(modes) B^T`` for what the keypoints have in common, where s^2 is
    the mean predicted variance per vote and axis. s is taken *before* averaging over votes: what the whole crop gets
    wrong, every vote gets wrong alike.
    """
    rho = calibration.vote_correlation
    shared = rho + (1.0 - rho) / effective_votes
    count = len(xy)
    tiles = np.zeros((count, 2, count, 2))
    index = np.arange(count)
    tiles[index, :, index, :] = calibration.block_factor * shared[:, None, None] * mean_blocks
    cov: FloatArray = tiles.reshape(2 * count, 2 * count)
    if calibration.modes.any():
        variance = 0.5 * np.trace(mean_blocks, axis1=1, axis2=2).mean()
        modes = common_modes(xy)
        cov += (modes * (variance * calibration.modes)) @ modes.T
    return cov


def collect_instances(raw: RawVotes, options: VoteOptions, calibration: Calibration) -> list[VoteInstance]:
    """Gather the votes of one image into instances, best score first.

    Per class the best cell seeds an instance and takes the cells that agree with it; the best cell left over seeds
    the next. How good a cell is, and its say in what is fused, is its score times how well its level suits the size of
    the object that it sees. Instances that turn out to be the same object once fused are reported once.
    """
    found: list[VoteInstance] = []
    for class_index in range(raw.score.shape[1]):
        found += _collect_class(raw, class_index, options, calibration)
    found.sort(key=lambda instance: -instance.score)
    if options.class_overlap < 1.0 and len(found) > 1:
        found = _suppress_across_classes(found, options.class_overlap)
    return found


def _collect_class(
    raw: RawVotes, class_index: int, options: VoteOptions, calibration: Calibration
) -> list[VoteInstance]:
    """Return the instances of one class."""
    all_scores = raw.score[:, class_index]
    cells = np.flatnonzero(all_scores >= options.min_score)
    if len(cells) == 0:
        return []
    size = np.ptp(raw.xy[cells, class_index], axis=1).max(axis=1)
    say = all_scores[cells] * _fitness(size, raw.anchor[cells], raw.anchor)
    order = np.argsort(-say, kind="stable")[: options.max_cells]
    cells, say, size = cells[order], say[order], size[order]
    score = all_scores[cells].astype(np.float64)
    xy = raw.xy[cells, class_index].astype(np.float64)
    free = np.ones(len(cells), dtype=bool)
    found: list[VoteInstance] = []
    # Seeds that fuse to a duplicate or have too few votes yield nothing, so a few more seeds than instances are tried.
    for _ in range(2 * options.max_instances):
        if not free.any() or len(found) >= options.max_instances:
            break
        seed = int(np.argmax(free))
        candidates = np.flatnonzero(free)
        limit = (options.agreement * size[seed]) ** 2
        offset = xy[candidates] - xy[seed]
        distance = _median((offset * offset).sum(axis=2))
        members = candidates[(distance <= limit) | (candidates == seed)]
        free[members] = False
        if len(members) < options.min_votes:
            continue
        kept = members[: options.max_votes]
        scale = raw.scale[cells[kept], class_index].astype(np.float64)
        instance = _fuse(class_index, score[kept], say[kept], xy[kept], scale, calibration)
        instance = replace(instance, cells=cells[kept])
        if not any(_same_object(instance, other, options.agreement) for other in found):
            found.append(instance)
    return found


def _fitness(size: npt.NDArray[Any], anchor: npt.NDArray[Any], anchors: npt.NDArray[Any]) -> FloatArray:
    """Return [M] in 0..1 how well levels with `anchor` [M] px suit objects of `size` [M] px, the best of all `anchors`
    being 1.

    A fine level has many cells in a large object, which training did not ask: they err more, and alike.
    """
    best = level_share(size[:, None], np.unique(anchors)).max(axis=1)
    return np.asarray(level_share(size, anchor) / np.maximum(best, np.finfo(np.float64).tiny))


def _same_object(instance: VoteInstance, other: VoteInstance, agreement: float) -> bool:
    """Return whether two fused instances of one class describe one object."""
    distance = np.linalg.norm(instance.keypoints.xy - other.keypoints.xy, axis=1)
    if np.median(distance) <= agreement * max(instance.size(), other.size()):
        return True
    return bool(box_overlap(instance.box, other.box[None])[0] > _DUPLICATE_IOU)


def _suppress_across_classes(found: list[VoteInstance], overlap: float) -> list[VoteInstance]:
    """Drop instances whose box is taken by a better instance of another class."""
    kept: list[VoteInstance] = []
    for instance in found:
        others = [other.box for other in kept if other.class_index != instance.class_index]
        if not others or (box_overlap(instance.box, np.array(others)) <= overlap).all():
            kept.append(instance)
    return kept


def _fuse(
    class_index: int,
    score: FloatArray,
    say: FloatArray,
    xy: FloatArray,
    scale: FloatArray,
    calibration: Calibration,
) -> VoteInstance:
    """Fuse M agreeing votes: score [M], say [M], xy [M, K, 2], scale [M, K, 3] to one instance.

    The weight of a vote is its say times its information (inverse covariance). One round of reweighting takes the
    influence of votes that lie far from the weighted median. The typical vote's block is the inverse of the
    say-weighted mean information: the variance at which equally good votes would carry the same information.
    """
    uu, uv, vv = _information(scale)
    precision = 0.5 * (uu + vv)
    trust = np.repeat(say[:, None], xy.shape[1], axis=1)
    if len(score) >= 3:
        trust = trust * _robust_factor(xy, trust * precision)
    u, v = xy[..., 0], xy[..., 1]
    total = np.stack([trust * uu, trust * uv, trust * vv]).sum(axis=1)
    pull_u = (trust * (uu * u + uv * v)).sum(axis=0)
    pull_v = (trust * (uv * u + vv * v)).sum(axis=0)
    # The inverse of the total information, in closed form per keypoint.
    spread = (
        np.stack([total[2], -total[1], -total[1], total[0]], axis=-1) / (total[0] * total[2] - total[1] ** 2)[:, None]
    )
    mean = np.stack(
        [spread[:, 0] * pull_u + spread[:, 1] * pull_v, spread[:, 2] * pull_u + spread[:, 3] * pull_v], axis=-1
    )
    weight = trust * precision
    effective = weight.sum(axis=0) ** 2 / (weight**2).sum(axis=0)
    mean_blocks = spread.reshape(-1, 2, 2) * trust.sum(axis=0)[:, None, None]
    share = shrink_share(mean, mean_blocks)
    mean = unshrunk(mean, mean_blocks, calibration.shrinkage)
    mean_blocks = widened(mean_blocks, share, calibration)
    cov = joint_covariance(mean, mean_blocks, effective, calibration)
    # A keypoint on which the votes disagree scores less than the instance.
    keypoint_score = (trust * score[:, None]).sum(axis=0) / say.sum()
    return VoteInstance(
        class_index=class_index,
        score=float((say * score).sum() / say.sum()),
        keypoints=Keypoints(mean, cov, keypoint_score),
        box=keypoint_box(mean),
        votes=len(score),
        mean_blocks=mean_blocks,
        effective_votes=effective,
    )


def _information(scale: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the elements uu, uv, vv [...] of the inverse covariances (px^-2) of votes with scale [..., 3]."""
    inverse_u, inverse_v, rho = 1.0 / scale[..., 0], 1.0 / scale[..., 1], scale[..., 2]
    factor = 1.0 / (1.0 - rho * rho)
    scaled_u = inverse_u * factor
    return scaled_u * inverse_u, -rho * scaled_u * inverse_v, factor * inverse_v * inverse_v


def _median(values: FloatArray) -> FloatArray:
    """Return the upper median [M] of the rows of values [M, K] (np.median takes four times as long here)."""
    middle = values.shape[1] // 2
    return np.asarray(np.partition(values, middle, axis=1)[:, middle])


def _weighted_median(values: FloatArray, weight: FloatArray) -> FloatArray:
    """Return the weighted median over axis 0 of values [M, ...] with weights of the same shape."""
    order = np.argsort(values, axis=0)
    cumulative = np.cumsum(np.take_along_axis(weight, order, axis=0), axis=0)
    middle = (cumulative < 0.5 * cumulative[-1]).sum(axis=0)[None]
    return np.asarray(np.take_along_axis(values, np.take_along_axis(order, middle, axis=0), axis=0)[0])


def _robust_factor(xy: FloatArray, weight: FloatArray) -> FloatArray:
    """Return factors [M, K] <= 1 that fall off for votes far from the weighted median of their keypoint.

    Far is measured in the spread that the votes themselves show, not in what they claim: a wrong vote is often sure.
    """
    centre = _weighted_median(xy, np.broadcast_to(weight[..., None], xy.shape))
    distance = np.sqrt(((xy - centre) ** 2).sum(axis=-1))
    # 1.1774: median of a distance in the plane whose axes have unit variance.
    middle = np.sort(distance, axis=0)[len(distance) // 2]
    spread = np.maximum(middle / 1.1774, 1e-3)
    ratio = _OUTLIER_SCALES * spread / np.maximum(distance, 1e-9)
    return np.asarray(np.minimum(ratio, 1.0) ** 2)
