# SPDX-License-Identifier: Apache-2.0
"""The keypoint network: backbone, feature pyramid, one head shared over levels, votes decoded to pixels in the graph.

Every cell of every level votes, per object class, for the K keypoints of the object that covers it: a mean in input
pixels and the 2x2 covariance of that vote. The family is WDRNet's (Hu et al., CVPR 2021, arXiv 2104.00633) with the
anchors of the ukd paper's benchmarks (32 * 2^k at stride 8 * 2^k). Preprocessing and decoding are part of the graph, so
that training and every runtime read the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ukd_ros.perception.cells import ANCHORS, STRIDES

SCALE_TERMS = 3
"""sigma_u, sigma_v (px) and the correlation rho of one vote."""

_LOG_SIGMA_CENTRE = -2.5
_LOG_SIGMA_REACH = 3.5
_RHO_REACH = 0.95


@dataclass(frozen=True)
class _Width:
    """Channel plan of one architecture; see `ARCHITECTURES`."""

    stem: int
    stages: tuple[int, int, int, int, int]  # channels at strides 2, 4, 8, 16, 32
    blocks: tuple[int, int, int, int, int]  # residual blocks behind each downsampling
    pyramid: int
    head_convs: int
    separate_towers: bool


ARCHITECTURES: dict[str, _Width] = {
    "darknet53": _Width(32, (64, 128, 256, 512, 1024), (1, 2, 8, 8, 4), 256, 4, True),
    "darknet_tiny": _Width(16, (32, 64, 128, 256, 512), (0, 0, 0, 0, 0), 256, 4, True),
    "darknet_tiny_h": _Width(8, (16, 32, 64, 128, 256), (0, 0, 0, 0, 0), 128, 4, True),
    "lean": _Width(0, (16, 24, 48, 80, 112), (0, 1, 2, 3, 2), 64, 2, False),
}


@dataclass(frozen=True)
class NetworkConfig:
    """What the network looks like and which objects it knows.

    `architecture`: a key of `ARCHITECTURES`. `classes`: object names, in the order of the class axis.
    `keypoints`: K, the same for every class. `width_factor`: multiplies every channel count (rounded to 8).
    """

    architecture: str = "lean"
    classes: tuple[str, ...] = ()
    keypoints: int = 12
    width_factor: float = 1.0
    mean: tuple[float, float, float] = field(default=(114.0, 114.0, 114.0))
    std: tuple[float, float, float] = field(default=(58.0, 58.0, 58.0))

    def __post_init__(self) -> None:
        """Refuse what no network can be built from."""
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: {self.architecture!r} is none of {', '.join(ARCHITECTURES)}")
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes: needs at least one name, each once, not {self.classes!r}")
        if self.keypoints < 4:
            raise ValueError(f"keypoints: a pose needs at least 4, not {self.keypoints}")
        if not 0.125 <= self.width_factor <= 4.0:
            raise ValueError(f"width_factor: {self.width_factor} is outside 0.125..4")


def cell_count(width: int, height: int) -> int:
    """Return N, the number of cells over all levels for an input of `width` x `height` px (multiples of 32)."""
    if width % STRIDES[-1] or height % STRIDES[-1]:
        raise ValueError(f"input {width}x{height}: both sides must be multiples of {STRIDES[-1]}")
    return sum((width // s) * (height // s) for s in STRIDES)


def cell_geometry(width: int, height: int) -> tuple[Tensor, Tensor]:
    """Return cell centres [N, 2] px (pixel (0, 0) is the centre of the top-left pixel) and anchors [N] px."""
    centres, anchors = [], []
    for stride, anchor in zip(STRIDES, ANCHORS, strict=True):
        v, u = torch.meshgrid(torch.arange(height // stride), torch.arange(width // stride), indexing="ij")
        centres.append((torch.stack((u, v), -1).reshape(-1, 2) + 0.5) * stride - 0.5)
        anchors.append(torch.full(((height // stride) * (width // stride),), anchor))
    return torch.cat(centres).float(), torch.cat(anchors)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, leaky ReLU: Darknet's unit."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.1, inplace=True),
    )


class _Residual(nn.Module):
    """Darknet's bottleneck: 1x1 to half the channels, 3x3 back, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = _conv(channels, channels // 2, 1)
        self.expand = _conv(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus its transformation."""
        expanded: Tensor = self.expand(self.squeeze(x))
        return x + expanded


class _Backbone(nn.Module):
    """Features at strides 8, 16 and 32."""

    def __init__(self, width: _Width, scaled: _Width) -> None:
        super().__init__()
        channels = scaled.stem or 3
        stages: list[nn.Module] = []
        if scaled.stem:
            stages.append(_conv(3, channels, 3))
        self.taps: list[int] = []
        for level, (outputs, blocks) in enumerate(zip(scaled.stages, width.blocks, strict=True)):
            stages.append(nn.Sequential(_conv(channels, outputs, 3, 2), *(_Residual(outputs) for _ in range(blocks))))
            channels = outputs
            if level >= 2:
                self.taps.append(len(stages) - 1)
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the three tapped feature maps."""
        features = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.taps:
                features.append(x)
        return features


class _SharedConv(nn.Module):
    """A 3x3 convolution unit whose weights serve every pyramid level.

    While training, batch norm looks at all levels together: normalised level by level, their statistics would differ,
    and the single running average that inference uses would fit none of them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.activation = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Return the transformed levels."""
        maps = [self.conv(level) for level in levels]
        if not self.training:
            return [self.activation(self.norm(x)) for x in maps]
        batch, channels = maps[0].shape[:2]
        sizes = [x.shape[2] * x.shape[3] for x in maps]
        joined = torch.cat([x.permute(0, 2, 3, 1).reshape(batch, -1, channels) for x in maps], 1)
        normed = self.activation(self.norm(joined.permute(0, 2, 1).unsqueeze(-1)))
        parts = normed.split(sizes, 2)
        return [part.reshape(x.shape) for part, x in zip(parts, maps, strict=True)]


class _Head(nn.Module):
    """Score, keypoint and scale maps of the pyramid levels; the same weights serve every level."""

    def __init__(self, channels: int, width: _Width, classes: int, keypoints: int) -> None:
        super().__init__()
        self.regress = nn.Sequential(*(_SharedConv(channels) for _ in range(width.head_convs)))
        self.classify = (
            nn.Sequential(*(_SharedConv(channels) for _ in range(width.head_convs))) if width.separate_towers else None
        )
        self.score = nn.Conv2d(channels, classes, 1)
        self.offset = nn.Conv2d(channels, classes * keypoints * 2, 1)
        self.scale = nn.Conv2d(channels, classes * keypoints * SCALE_TERMS, 1)
        nn.init.constant_(self.score.bias, -math.log((1 - 0.01) / 0.01))  # type: ignore[arg-type]
        for layer in (self.score, self.offset, self.scale):
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.scale.bias)  # type: ignore[arg-type]

    def forward(self, levels: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return raw maps [B, C, h, w], [B, C*K*2, h, w], [B, C*K*3, h, w] for every level."""
        regressed: list[Tensor] = self.regress(levels)
        classified: list[Tensor] = regressed if self.classify is None else self.classify(levels)
        if regressed[0].dtype == torch.float32:
            return self._maps(classified, regressed)
        # a vote's offset has eight bits in bfloat16: half a pixel
        with torch.autocast(regressed[0].device.type, enabled=False):
            return self._maps([c.float() for c in classified], [r.float() for r in regressed])

    def _maps(self, classified: list[Tensor], regressed: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the maps of every level, calculated as precisely as the features given."""
        return [(self.score(c), self.offset(r), self.scale(r)) for c, r in zip(classified, regressed, strict=True)]


@dataclass(frozen=True)
class RawOutput:
    """Undecoded votes: `logit` [B,N,C], `offset` [B,N,C,K,2] in anchors, `scale` [B,N,C,K,3] before squashing."""

    logit: Tensor
    offset: Tensor
    scale: Tensor


class KeypointNetwork(nn.Module):
    """Image [B,3,H,W] float32 RGB 0..255 → score [B,N,C], xy [B,N,C,K,2] px, scale [B,N,C,K,3] (σ_u px, σ_v px, ρ).

    N runs over the levels in the order of `STRIDES`, row-major within each. For export the input size must be static:
    call `fix_input(width, height)` first, which stores the decode grids as buffers (OpenCV's importer refuses arange).
    """

    grid: Tensor
    anchor: Tensor
    mean: Tensor
    inverse_std: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        width = ARCHITECTURES[config.architecture]
        scaled = _scaled(width, config.width_factor)
        self.backbone = _Backbone(width, scaled)
        self.lateral = nn.ModuleList(nn.Conv2d(c, scaled.pyramid, 1) for c in scaled.stages[2:])
        self.smooth = (
            nn.ModuleList(_conv(scaled.pyramid, scaled.pyramid, 3) for _ in STRIDES) if width.separate_towers else None
        )
        self.head = _Head(scaled.pyramid, width, len(config.classes), config.keypoints)
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("inverse_std", 1.0 / torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("grid", torch.zeros(1, 0, 1, 1, 2), persistent=False)
        self.register_buffer("anchor", torch.zeros(1, 0, 1, 1, 1), persistent=False)
        self._fixed: tuple[int, int] = (0, 0)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu")

    def fix_input(self, width: int, height: int) -> KeypointNetwork:
        """Prepare the decode grids for inputs of `width` x `height` px (multiples of 32); returns self."""
        if self._fixed != (width, height):
            cell_count(width, height)
            centres, anchors = cell_geometry(width, height)
            device = self.grid.device
            self.grid = centres.view(1, -1, 1, 1, 2).to(device)
            self.anchor = anchors.view(1, -1, 1, 1, 1).to(device)
            self._fixed = (width, height)
        return self

    @property
    def pyramid_width(self) -> int:
        """Return the channels F of the feature pyramid."""
        return self.head.score.in_channels

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """Return the feature pyramid [B, F, H/s, W/s] at the three strides: what feature distillation aligns."""
        features = self.backbone((image - self.mean) * self.inverse_std)
        levels = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for upper in (1, 0):
            levels[upper] = levels[upper] + nn.functional.interpolate(
                levels[upper + 1], scale_factor=2.0, mode="nearest"
            )
        if self.smooth is None:
            return levels
        return [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]

    def channels_last(self) -> KeypointNetwork:
        """Store the convolution weights channels-last, the faster layout on CPUs and tensor cores; returns self."""
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    def raw(self, image: Tensor) -> RawOutput:
        """Return the undecoded votes, for the losses."""
        return self.raw_votes(self.pyramid(image))

    def raw_votes(self, pyramid: list[Tensor]) -> RawOutput:
        """Return the undecoded votes that the head makes of a feature pyramid."""
        classes, keypoints = len(self.config.classes), self.config.keypoints
        logit, offset, scale = [], [], []
        batch = pyramid[0].shape[0]
        for s, o, d in self.head(pyramid):
            logit.append(s.permute(0, 2, 3, 1).reshape(batch, -1, classes))
            offset.append(o.permute(0, 2, 3, 1).reshape(batch, -1, classes, keypoints, 2))
            scale.append(d.permute(0, 2, 3, 1).reshape(batch, -1, classes, keypoints, SCALE_TERMS))
        return RawOutput(torch.cat(logit, 1), torch.cat(offset, 1), torch.cat(scale, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return decoded score, xy and scale; see the class docstring."""
        if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self.fix_input(image.shape[3], image.shape[2])
        return self.decode(self.raw(image))

    def decode(self, out: RawOutput) -> tuple[Tensor, Tensor, Tensor]:
        """Return the votes in pixels of the input that `fix_input` was told of; see the class docstring."""
        # OpenCV 4.5/4.6 broadcast a constant only along axis 1 of a tensor of at most four axes (along others they
        # return wrong numbers without a word), so classes and keypoints share an axis here and u and v are apart.
        offset, scale = out.offset.flatten(2, 3), out.scale.flatten(2, 3)
        anchor = self.anchor[..., 0]
        u = self.grid[..., 0] + anchor * offset[..., :1]
        v = self.grid[..., 1] + anchor * offset[..., 1:]
        xy = torch.cat((u, v), -1).reshape(out.offset.shape)
        return torch.sigmoid(out.logit), xy, decode_scale(scale, anchor).reshape(out.scale.shape)


def cell_features(pyramid: list[Tensor]) -> Tensor:
    """Return the features of every cell, [B,N,F], in the order of the votes."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in pyramid], 1)


def decode_scale(raw: Tensor, anchor: Tensor) -> Tensor:
    """Squash raw scale [..., 3] to (σ_u px, σ_v px, ρ): log σ/anchor in -6..1, |ρ| < 0.95, both smooth everywhere.

    `anchor` broadcasts against [..., 1].
    """
    sigma = anchor * torch.exp(_LOG_SIGMA_REACH * _tanh(raw[..., :2] / _LOG_SIGMA_REACH) + _LOG_SIGMA_CENTRE)
    return torch.cat((sigma, _RHO_REACH * _tanh(raw[..., 2:])), -1)


def _tanh(x: Tensor) -> Tensor:
    """Return tanh(x) by the sigmoid: OpenCV 5.0's own tanh is NaN above 44."""
    return 2.0 * torch.sigmoid(2.0 * x) - 1.0


def _scaled(width: _Width, factor: float) -> _Width:
    """Return the plan with every channel count multiplied and rounded to 8."""
    if factor == 1.0:
        return width

    def times(channels: int) -> int:
        return max(8, round(channels * factor / 8) * 8) if channels else 0

    s = width.stages
    stages = (times(s[0]), times(s[1]), times(s[2]), times(s[3]), times(s[4]))
    return _Width(
        times(width.stem), stages, width.blocks, times(width.pyramid), width.head_convs, width.separate_towers
    )
