# SPDX-License-Identifier: Apache-2.0
"""What a camera does to the light: blur, exposure, white balance, noise, tone, colour, sharpening, JPEG."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

ByteImage = npt.NDArray[np.uint8]
FloatImage = npt.NDArray[np.float32]
Range = tuple[float, float]


@dataclass(frozen=True)
class SensorConfig:
    """Ranges of the camera's behaviour; every value is drawn uniformly for each image unless said otherwise."""

    exposure: Range = field(default=(0.10, 0.34), metadata={"help": "mean linear brightness aimed at", "unit": "0..1"})
    exposure_strength: float = field(default=0.7, metadata={"help": "how far auto-exposure goes towards it, 0..1"})
    white_balance: float = field(default=0.10, metadata={"help": "sigma of the log gains of red and blue"})
    gamma: Range = field(default=(1.8, 2.5), metadata={"help": "tone curve exponent"})
    contrast: Range = field(default=(-0.1, 0.45), metadata={"help": "strength of the S-shaped tone curve"})
    saturation: Range = field(default=(0.55, 1.25), metadata={"help": "colour saturation, 1 leaves it"})
    vignetting: Range = field(default=(0.0, 0.35), metadata={"help": "light lost in the corners, 0..1"})
    defocus_px: Range = field(default=(0.0, 1.3), metadata={"help": "sigma of the defocus blur", "unit": "px"})
    motion_fraction: float = field(default=0.2, metadata={"help": "share of images with motion blur"})
    motion_px: Range = field(default=(1.5, 7.0), metadata={"help": "length of the motion blur", "unit": "px"})
    read_noise: Range = field(default=(0.0005, 0.006), metadata={"help": "sigma, linear light, log-uniform"})
    shot_noise: Range = field(default=(0.002, 0.020), metadata={"help": "sigma at full light, log-uniform"})
    sharpen_fraction: float = field(default=0.5, metadata={"help": "share of images sharpened by the camera"})
    jpeg_quality: tuple[int, int] = field(default=(55, 97), metadata={"help": "JPEG quality of the stored image"})

    def __post_init__(self) -> None:
        """Refuse ranges that are upside down and shares outside 0..1; ValueError names the field."""
        for name in ("exposure", "gamma", "contrast", "saturation", "vignetting", "defocus_px", "motion_px",
                     "read_noise", "shot_noise", "jpeg_quality"):  # fmt: skip
            pair = tuple(getattr(self, name))
            if len(pair) != 2 or not pair[0] <= pair[1]:
                raise ValueError(f"sensor.{name}: must be (low, high), got {pair}.")
            object.__setattr__(self, name, pair)
        for name in ("exposure_strength", "motion_fraction", "sharpen_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"sensor.{name}: must lie in 0..1, got {getattr(self, name)}.")
        for name in ("read_noise", "shot_noise", "gamma", "exposure"):
            if getattr(self, name)[0] <= 0:
                raise ValueError(f"sensor.{name}: must be positive, got {getattr(self, name)}.")
        if not (1 <= self.jpeg_quality[0] and self.jpeg_quality[1] <= 100):
            raise ValueError(f"sensor.jpeg_quality: must lie in 1..100, got {self.jpeg_quality}.")


def expose(image: ByteImage, config: SensorConfig, rng: np.random.Generator) -> ByteImage:
    """Turn a rendering [H,W,3] (square-root encoded linear light) into what a camera would deliver, uint8 RGB."""
    light = _gained(image, config, rng)
    light = _blurred(light, config, rng)
    height, width = light.shape[:2]
    loss = rng.uniform(*config.vignetting)
    if loss > 0.02:
        y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        light *= (1.0 - np.float32(loss) * 0.5 * (x * x + y * y))[..., None]
    _add_noise(light, config, rng)
    out = _toned(light, config, rng)
    out = _saturated(out, rng.uniform(*config.saturation))
    if rng.random() < config.sharpen_fraction:
        soft = cv2.GaussianBlur(out, (0, 0), float(rng.uniform(0.7, 1.6)))
        amount = float(rng.uniform(0.2, 1.0))
        out = np.asarray(cv2.addWeighted(out, 1 + amount, soft, -amount, 0), dtype=np.uint8)
    return out


def jpeg_bytes(image: ByteImage, config: SensorConfig, rng: np.random.Generator) -> bytes:
    """Encode an RGB image as JPEG with a quality drawn from the configuration."""
    low, high = config.jpeg_quality
    quality = int(rng.integers(low, high + 1))
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise RuntimeError("OpenCV could not encode a JPEG image.")
    return bytes(data.tobytes())


def _gained(image: ByteImage, config: SensorConfig, rng: np.random.Generator) -> FloatImage:
    """Linear light times exposure and white balance, as one table look-up per channel."""
    sample = image[::8, ::8].astype(np.float32) / 255.0
    mean = float((sample * sample).mean())
    wanted = rng.uniform(*config.exposure)
    gain = (wanted / max(mean, 1e-3)) ** config.exposure_strength
    gains = gain * np.exp(rng.normal(0, config.white_balance, 3) * [1.0, 0.25, 1.0])
    codes = np.arange(256, dtype=np.float32) / 255.0
    table = (codes * codes)[:, None] * gains.astype(np.float32)
    return np.asarray(cv2.LUT(image, np.ascontiguousarray(table[None])), dtype=np.float32)


def _blurred(light: FloatImage, config: SensorConfig, rng: np.random.Generator) -> FloatImage:
    sigma = rng.uniform(*config.defocus_px)
    if rng.random() < config.motion_fraction:
        length, angle = rng.uniform(*config.motion_px), rng.uniform(0, np.pi)
        light = np.asarray(cv2.filter2D(light, -1, _motion_kernel(length, angle)), dtype=np.float32)
    if sigma > 0.25:
        radius = 2 if sigma < 0.8 else 4
        light = np.asarray(cv2.GaussianBlur(light, (2 * radius + 1,) * 2, sigma), dtype=np.float32)
    return light


def _motion_kernel(length: float, angle: float) -> FloatImage:
    size = 2 * int(np.ceil(length / 2)) + 1
    kernel = np.zeros((size, size), np.float32)
    for t in np.linspace(-length / 2, length / 2, 32):
        x, y = size // 2 + t * np.cos(angle), size // 2 + t * np.sin(angle)
        kernel[round(y), round(x)] += 1.0
    return np.asarray(kernel / kernel.sum(), dtype=np.float32)


def _log_uniform(rng: np.random.Generator, limits: Range) -> float:
    return float(np.exp(rng.uniform(np.log(limits[0]), np.log(limits[1]))))


# what a 3x3 Gaussian of sigma 0.7 takes from the deviation of independent noise, given back
_SMOOTHED_GAIN = np.float32(1.0 / np.square(cv2.getGaussianKernel(3, 0.7)).sum())


@lru_cache(maxsize=2)
def _noise_pool(size: int) -> FloatImage:
    """Normal numbers to cut every image's noise from: drawing them anew would cost a tenth of the rendering."""
    return np.random.default_rng(7).standard_normal(size + 600_011, dtype=np.float32)


def _add_noise(light: FloatImage, config: SensorConfig, rng: np.random.Generator) -> None:
    """Add shot noise (variance grows with light) and read noise, in place."""
    read, shot = _log_uniform(rng, config.read_noise), _log_uniform(rng, config.shot_noise)
    pool = _noise_pool(light.size)
    start = int(rng.integers(0, pool.size - light.size))
    noise = pool[start : start + light.size].reshape(light.shape)
    if rng.random() < 0.5:
        noise = noise[::-1, ::-1]
    if rng.random() < 0.5:  # demosaicing and denoising make the noise of neighbours alike
        noise = np.asarray(cv2.GaussianBlur(noise, (3, 3), 0.7), dtype=np.float32) * _SMOOTHED_GAIN
    sigma = np.sqrt(np.maximum(light, np.float32(0)) * np.float32(shot * shot) + np.float32(read * read))
    light += noise * sigma


def _toned(light: FloatImage, config: SensorConfig, rng: np.random.Generator) -> ByteImage:
    """Tone curve with clipping, through a table of 4096 steps."""
    gamma, contrast = rng.uniform(*config.gamma), rng.uniform(*config.contrast)
    x = np.linspace(0, 1, 4096) ** (1 / gamma)
    curve = x + contrast * (x * x * (3 - 2 * x) - x)
    table = np.clip(np.rint(curve * 255), 0, 255).astype(np.uint8)
    codes = np.clip(light * np.float32(4095), 0, 4095)
    return np.asarray(table[codes.astype(np.uint16)], dtype=np.uint8)


def _saturated(image: ByteImage, amount: float) -> ByteImage:
    """Mix every pixel with its grey value."""
    weights = np.array([0.299, 0.587, 0.114])
    matrix = np.eye(3) * amount + np.tile(weights, (3, 1)) * (1 - amount)
    return np.asarray(cv2.transform(image, matrix), dtype=np.uint8)
