# SPDX-License-Identifier: Apache-2.0
"""What a training window goes through besides geometry: covers, blur, colour response and noise.

Everything is a function of the `numpy.random.Generator` handed in, so that a sample is keyed by its index alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.uint8]

_NOISE_SIDE = 512
_LEVELS = np.linspace(0.0, 1.0, 256, dtype=np.float32)[:, None]
_noise_bank: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class AugmentConfig:
    """Strength of each augmentation; zero switches it off.

    `cover_probability`: chance that patches hide parts of the window; `cover_max`: largest patch side as a fraction
    of the window. `blur_probability`, `blur_sigma_px`: Gaussian blur. `motion_probability`, `motion_px`: linear motion
    blur. `coarse_probability`: chance that the window is shrunk and enlarged again (a lower-resolution camera).
    `brightness`, `contrast`, `gamma`, `colour_cast`, `saturation`: half-ranges (relative). `grey_probability`: chance
    of a grey image. `noise_sigma`: largest standard deviation of additive noise (0..255).
    """

    cover_probability: float = 0.3
    cover_max: float = 0.45
    blur_probability: float = 0.35
    blur_sigma_px: float = 1.4
    motion_probability: float = 0.1
    motion_px: float = 7.0
    coarse_probability: float = 0.15
    brightness: float = 0.2
    contrast: float = 0.2
    gamma: float = 0.25
    colour_cast: float = 0.15
    saturation: float = 0.35
    grey_probability: float = 0.02
    noise_sigma: float = 6.0

    def __post_init__(self) -> None:
        """Refuse negative strengths."""
        for name, value in vars(self).items():
            if not value >= 0.0:
                raise ValueError(f"augment.{name}: must be zero or positive, not {value}")


def augment(
    image: Image, mask: Mask, donor: Image, config: AugmentConfig, rng: np.random.Generator
) -> tuple[Image, Mask]:
    """Return an altered copy of the window and its instance mask (0 = background, covered pixels become 0).

    `image`, `donor` [H,W,3] uint8 RGB, `mask` [H,W] uint8. Covers are textured with pieces of `donor`.
    """
    if rng.random() < config.cover_probability:
        image, mask = _cover(image, mask, donor, config, rng)
    image = _optics(image, config, rng)
    image = _colour(image, config, rng)
    return _noise(image, config, rng), mask


def _cover(
    image: Image, mask: Mask, donor: Image, config: AugmentConfig, rng: np.random.Generator
) -> tuple[Image, Mask]:
    """Hide parts behind one to three rotated rectangles or ellipses, filled with the donor or a flat colour."""
    height, width = mask.shape
    stencil = np.zeros((height, width), np.uint8)
    for _ in range(int(rng.integers(1, 4))):
        centre = (float(rng.uniform(0, width)), float(rng.uniform(0, height)))
        sides = (
            float(rng.uniform(0.08, config.cover_max + 0.08)) * width,
            float(rng.uniform(0.08, config.cover_max + 0.08)) * height * float(rng.uniform(0.3, 1.0)),
        )
        box = (centre, sides, float(rng.uniform(0, 180)))
        if rng.random() < 0.5:
            cv2.ellipse(stencil, box, 1, -1)
        else:
            cv2.fillConvexPoly(stencil, cv2.boxPoints(box).astype(np.int32), 1)
    area = mask > 0
    if area.any() and stencil[area].mean() > 0.75:  # nothing left to learn from
        return image, mask
    fill = donor if rng.random() < 0.7 else np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), image.shape)
    hidden = stencil.astype(bool)
    image, mask = image.copy(), mask.copy()
    image[hidden] = fill[hidden]
    mask[hidden] = 0
    return image, mask


def _optics(image: Image, config: AugmentConfig, rng: np.random.Generator) -> Image:
    """Defocus, motion and a coarser sensor."""
    if rng.random() < config.coarse_probability:
        factor = float(rng.uniform(0.4, 0.8))
        small = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_LINEAR)  # type: ignore[assignment]
    if rng.random() < config.blur_probability and config.blur_sigma_px > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.3, config.blur_sigma_px)))  # type: ignore[assignment]
    if rng.random() < config.motion_probability and config.motion_px > 2.0:
        image = cv2.filter2D(
            image, -1, motion_kernel(float(rng.uniform(2.0, config.motion_px)), float(rng.uniform(0, np.pi)))
        )  # type: ignore[assignment]
    return image


def motion_kernel(length_px: float, angle: float) -> npt.NDArray[np.float32]:
    """Return a normalised, centred line kernel of the given length (px) and direction (rad)."""
    half = int(np.ceil(length_px / 2))
    kernel = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    reach = np.array([np.cos(angle), np.sin(angle)]) * length_px / 2
    start, end = (half - reach) * 16, (half + reach) * 16
    cv2.line(
        kernel,
        (int(round(start[0])), int(round(start[1]))),
        (int(round(end[0])), int(round(end[1]))),
        1.0,
        1,
        cv2.LINE_AA,
        4,
    )
    kernel += kernel[::-1, ::-1].copy()  # the drawn line may lie up to half a pixel off, and the labels do not move
    if kernel.sum() == 0:
        kernel[half, half] = 1.0
    normalised: npt.NDArray[np.float32] = kernel / kernel.sum()
    return normalised


def _colour(image: Image, config: AugmentConfig, rng: np.random.Generator) -> Image:
    """Saturation by mixing with grey, then one lookup table per channel for exposure, contrast, gamma and cast."""
    saturation = 0.0 if rng.random() < config.grey_probability else 1.0 + float(rng.uniform(-1, 1)) * config.saturation
    if abs(saturation - 1.0) > 0.02:
        grey = np.array([0.299, 0.587, 0.114], np.float32)
        mix = np.eye(3, dtype=np.float32) * saturation + (1.0 - saturation) * grey[None, :]
        image = cv2.transform(image, mix)  # type: ignore[assignment]
    gamma = np.exp(rng.uniform(-1, 1) * config.gamma)
    contrast = 1.0 + rng.uniform(-1, 1) * config.contrast
    gain = np.exp(rng.uniform(-1, 1) * config.brightness + rng.uniform(-1, 1, 3) * config.colour_cast)
    table = ((_LEVELS**gamma) * gain - 0.5 * gain.mean()) * contrast + 0.5 * gain.mean()
    lookup = np.clip(table * 255.0 + 0.5, 0, 255).astype(np.uint8).reshape(256, 1, 3)
    return cv2.LUT(image, lookup)  # type: ignore[return-value]


def _noise(image: Image, config: AugmentConfig, rng: np.random.Generator) -> Image:
    """Add Gaussian noise cut out of a bank (drawing a fresh field costs more than a training step's share)."""
    global _noise_bank
    if _noise_bank is None:
        _noise_bank = np.random.default_rng(0).standard_normal((_NOISE_SIDE, _NOISE_SIDE, 3)).astype(np.float32)
    sigma = float(rng.uniform(0, config.noise_sigma))
    height, width = image.shape[:2]
    if sigma < 0.5:
        return image
    if height > _NOISE_SIDE or width > _NOISE_SIDE:
        noise = rng.standard_normal(image.shape).astype(np.float32)
    else:
        top, left = int(rng.integers(0, _NOISE_SIDE - height + 1)), int(rng.integers(0, _NOISE_SIDE - width + 1))
        noise = _noise_bank[top : top + height, left : left + width]
    return cv2.addWeighted(image.astype(np.float32), 1.0, noise, sigma, 0.5).clip(0, 255).astype(np.uint8)
