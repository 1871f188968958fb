# SPDX-License-Identifier: Apache-2.0
"""What surrounds the objects: procedural textures, backdrops and simple meshes, so that no download is needed."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.data.meshes import vertex_normals
from ukd_ros.geometry.object_model import Mesh

logger = logging.getLogger(__name__)

ByteImage = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]
TEXTURE = 256
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png")


def random_color(rng: np.random.Generator, muted: float = 0.5) -> tuple[int, int, int]:
    """Return an RGB colour; with probability `muted` one near grey, brown or beige as rooms mostly are."""
    if rng.random() < muted:
        value, saturation = rng.uniform(25, 245), rng.uniform(0, 60)
        hue = rng.uniform(0, 180) if rng.random() < 0.5 else rng.uniform(5, 25)
    else:
        value, saturation, hue = rng.uniform(60, 255), rng.uniform(90, 255), rng.uniform(0, 180)
    pixel = np.array([[[hue, saturation, value]]], dtype=np.uint8)
    r, g, b = cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0]
    return int(r), int(g), int(b)


def _plain(rng: np.random.Generator) -> ByteImage:
    image = np.empty((TEXTURE, TEXTURE, 3), np.uint8)
    image[:] = random_color(rng)
    return image


def _noise(rng: np.random.Generator) -> ByteImage:
    mix = np.zeros((TEXTURE, TEXTURE), np.float32)
    cells = int(rng.choice([2, 4, 8]))
    weight = 1.0
    while cells <= 128:
        grid = rng.random((cells + 1, cells + 1)).astype(np.float32)
        mix += weight * cv2.resize(grid, (TEXTURE, TEXTURE), interpolation=cv2.INTER_CUBIC)
        weight *= rng.uniform(0.4, 0.8)
        cells *= 2
    return _between(rng, mix)


def _between(rng: np.random.Generator, mix: npt.NDArray[np.float32]) -> ByteImage:
    """Blend two random colours by a scalar field."""
    low, high = float(mix.min()), float(mix.max())
    t = ((mix - low) / max(high - low, 1e-6))[..., None]
    a, b = np.array(random_color(rng), np.float32), np.array(random_color(rng), np.float32)
    return np.asarray(np.clip(a + (b - a) * t, 0, 255), dtype=np.uint8)


def _gradient(rng: np.random.Generator) -> ByteImage:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:TEXTURE, 0:TEXTURE].astype(np.float32)
    return _between(rng, np.asarray(np.cos(angle) * x + np.sin(angle) * y, dtype=np.float32))


def _stripes(rng: np.random.Generator) -> ByteImage:
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 80)
    y, x = np.mgrid[0:TEXTURE, 0:TEXTURE].astype(np.float32)
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * (2 * np.pi / period))
    sharp = rng.choice([1.0, 4.0, 50.0])
    return _between(rng, np.asarray(np.clip(wave * sharp, -1, 1), dtype=np.float32))


def _checker(rng: np.random.Generator) -> ByteImage:
    cell = int(rng.choice([8, 16, 32, 64]))
    y, x = np.mgrid[0:TEXTURE, 0:TEXTURE]
    return _between(rng, (((x // cell) + (y // cell)) % 2).astype(np.float32))


def _wood(rng: np.random.Generator) -> ByteImage:
    y, x = np.mgrid[0:TEXTURE, 0:TEXTURE].astype(np.float32)
    bend = cv2.resize(rng.random((5, 5)).astype(np.float32), (TEXTURE, TEXTURE), interpolation=cv2.INTER_CUBIC)
    fine = cv2.resize(rng.random((TEXTURE, 16)).astype(np.float32), (TEXTURE, TEXTURE))
    rings = np.sin((y + 60 * bend) * rng.uniform(0.05, 0.3)) * 0.5 + fine * rng.uniform(0.3, 1.0)
    hue, saturation = rng.uniform(8, 22), rng.uniform(40, 150)
    value = np.clip(rng.uniform(110, 220) + 28 * rings, 0, 255)
    hsv = np.dstack([np.full_like(value, hue), np.full_like(value, saturation), value]).astype(np.uint8)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), dtype=np.uint8)


def _print(rng: np.random.Generator) -> ByteImage:
    """A magazine page or a label: blocks of lines, headlines, a picture."""
    image = _plain(rng)
    if rng.random() < 0.5:
        image[:] = rng.integers(200, 256)
    for _ in range(int(rng.integers(1, 4))):
        x, y = (int(v) for v in rng.integers(0, 180, 2))
        w, h = (int(v) for v in rng.integers(40, 140, 2))
        patch = cv2.resize(_noise(rng) if rng.random() < 0.5 else _polygons(rng), (w, h))
        image[y : y + h, x : x + w] = patch[: TEXTURE - y, : TEXTURE - x]
    ink = random_color(rng)
    for _ in range(int(rng.integers(1, 4))):
        x, y = (int(v) for v in rng.integers(4, 160, 2))
        for line in range(int(rng.integers(4, 14))):
            for start in range(x, min(x + int(rng.integers(50, 120)), 250), int(rng.integers(9, 22))):
                cv2.line(image, (start, y + 7 * line), (start + int(rng.integers(3, 14)), y + 7 * line), ink, 2)
    for _ in range(int(rng.integers(0, 3))):
        word = "".join(chr(int(c)) for c in rng.integers(65, 91, int(rng.integers(2, 8))))
        place = (int(rng.integers(0, 140)), int(rng.integers(20, 250)))
        cv2.putText(image, word, place, cv2.FONT_HERSHEY_SIMPLEX, float(rng.uniform(0.5, 2.2)), random_color(rng, 0.2),
                    int(rng.integers(1, 5)), cv2.LINE_AA)  # fmt: skip
    return image


def _polygons(rng: np.random.Generator) -> ByteImage:
    image = _plain(rng)
    for _ in range(int(rng.integers(4, 24))):
        centre = rng.uniform(0, TEXTURE, 2)
        if rng.random() < 0.4:
            radius = int(rng.uniform(4, 60))
            cv2.circle(image, (int(centre[0]), int(centre[1])), radius, random_color(rng), -1, cv2.LINE_AA)
        else:
            points = (centre + rng.normal(0, rng.uniform(10, 70), (int(rng.integers(3, 6)), 2))).astype(np.int32)
            cv2.fillPoly(image, [points], random_color(rng), cv2.LINE_AA)
    return image


def _markers(rng: np.random.Generator) -> ByteImage:
    """Black squares with white glyphs on white paper, as calibration boards have them."""
    count = int(rng.integers(2, 6))
    cell = TEXTURE // count
    image = np.full((TEXTURE, TEXTURE, 3), int(rng.integers(200, 256)), np.uint8)
    for i in range(count):
        for j in range(count):
            x, y, m = i * cell, j * cell, max(2, cell // 6)
            cv2.rectangle(image, (x + m, y + m), (x + cell - m, y + cell - m), (12, 12, 14), -1)
            bits = (rng.random((4, 4)) < 0.35).astype(np.uint8) * 235
            inner = max(4, cell - 4 * m)
            glyph = cv2.resize(bits, (inner, inner), interpolation=cv2.INTER_NEAREST)
            image[y + 2 * m : y + 2 * m + inner, x + 2 * m : x + 2 * m + inner] = glyph[..., None]
    return image


def _speckle(rng: np.random.Generator) -> ByteImage:
    grain = rng.random((TEXTURE, TEXTURE)).astype(np.float32)
    return _between(rng, np.asarray(cv2.GaussianBlur(grain, (0, 0), float(rng.uniform(0.5, 2.5))), dtype=np.float32))


PAINTERS: tuple[tuple[Callable[[np.random.Generator], ByteImage], float], ...] = (
    (_plain, 2.0), (_noise, 3.0), (_gradient, 1.0), (_stripes, 1.0), (_checker, 0.7), (_wood, 2.0), (_print, 3.0),
    (_polygons, 2.0), (_markers, 0.8), (_speckle, 1.0),
)  # fmt: skip


def random_texture(rng: np.random.Generator) -> ByteImage:
    """Return one procedural texture [256,256,3] RGB."""
    weights = np.array([weight for _, weight in PAINTERS])
    painter = PAINTERS[int(rng.choice(len(PAINTERS), p=weights / weights.sum()))][0]
    return painter(rng)


def photographs(folder: str | None, longest: int = 800) -> list[ByteImage]:
    """Return photographs for backdrops: those of `folder`, and those inside scikit-image or scikit-learn if installed.

    Raises ValueError when `folder` is given and holds no readable .jpg or .png.
    """
    paths: list[Path] = []
    if folder is not None:
        paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in PHOTO_SUFFIXES)
        if not paths:
            raise ValueError(f"{folder}: holds no .jpg or .png photographs for backgrounds.")
    for package, inside in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or () if spec is not None else ():
            paths += sorted(p for p in (Path(place) / inside).glob("*") if p.suffix.lower() in PHOTO_SUFFIXES)
    images = []
    for path in paths:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError(f"{path}: cannot be read as a background photograph; remove it or repair it.")
        if min(image.shape[:2]) < 128:
            continue
        scale = min(1.0, longest / max(image.shape[:2]))
        size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
        images.append(np.asarray(cv2.cvtColor(cv2.resize(image, size), cv2.COLOR_BGR2RGB), dtype=np.uint8))
    return images


def collage(rng: np.random.Generator, textures: list[ByteImage], photos: list[ByteImage]) -> ByteImage:
    """Return a texture [512,512,3] RGB as busy as a lived-in desk: prints, pictures and labels over one another."""
    sources = [*textures, *photos] if photos and rng.random() < 0.75 else textures
    side = 2 * TEXTURE
    image = _crop(rng, sources[int(rng.integers(len(sources)))], side, side, (0.5, 1.0))
    for _ in range(int(rng.integers(8, 48))):
        # pictures are few beside the textures, yet the best there is
        pool = photos if photos and rng.random() < 0.5 else textures
        _paste(rng, image, _crop(rng, pool[int(rng.integers(len(pool)))], TEXTURE, TEXTURE, (0.3, 1.0)))
    return image


def backdrop(
    rng: np.random.Generator,
    width: int,
    height: int,
    textures: list[ByteImage],
    photos: list[ByteImage],
    busy: bool = False,
) -> ByteImage:
    """Compose a backdrop [height,width,3]: a photograph or a texture, patches warped over it, softly out of focus.

    `busy`: more patches (of `textures`, collages then) and sharper.
    """
    from_photo = bool(photos) and rng.random() < 0.5
    source = photos[int(rng.integers(len(photos)))] if from_photo else textures[int(rng.integers(len(textures)))]
    image = _crop(rng, source, width, height, (0.5, 1.0) if from_photo else (0.3, 1.0))
    for _ in range(int(rng.integers(4, 20) if busy else rng.integers(0, 3 if from_photo else 12))):
        _paste(rng, image, textures[int(rng.integers(len(textures)))])
    sigma = float(rng.choice([0.0, 0.0, 0.8, 1.6] if busy else [0.0, 0.8, 1.6, 3.0]))
    return image if sigma == 0.0 else np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), dtype=np.uint8)


def _crop(
    rng: np.random.Generator, source: ByteImage, width: int, height: int, share: tuple[float, float]
) -> ByteImage:
    h, w = source.shape[:2]
    scale = rng.uniform(*share)
    crop_w = max(8, int(min(w, h * width / height) * scale))
    crop_h = max(8, int(crop_w * height / width))
    x, y = int(rng.integers(0, max(1, w - crop_w))), int(rng.integers(0, max(1, h - crop_h)))
    piece = source[y : y + crop_h, x : x + crop_w]
    if rng.random() < 0.5:
        piece = piece[:, ::-1]
    return np.asarray(cv2.resize(piece, (width, height), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


def _paste(rng: np.random.Generator, image: ByteImage, texture: ByteImage) -> None:
    """Warp a texture as a quadrilateral into the image, only over its own bounding box."""
    height, width = image.shape[:2]
    centre = rng.uniform([0, 0], [width, height])
    size = rng.uniform(0.06, 0.35) * width
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 1.0)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [size, size * stretch] * 0.5
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    quad = corners @ turn.T + centre + rng.normal(0, size * 0.06, (4, 2))
    low = np.maximum(np.floor(quad.min(axis=0)).astype(int), 0)
    high = np.minimum(np.ceil(quad.max(axis=0)).astype(int), [width, height])
    if np.any(high - low < 4):
        return
    side = TEXTURE - 1
    frame = np.array([[0, 0], [side, 0], [side, side], [0, side]], dtype=np.float32)
    M = cv2.getPerspectiveTransform(frame, (quad - low).astype(np.float32))
    box = (int(high[0] - low[0]), int(high[1] - low[1]))
    patch = cv2.warpPerspective(cv2.resize(texture, (TEXTURE, TEXTURE)), M, box, flags=cv2.INTER_LINEAR)
    mask = np.zeros(box[::-1], np.uint8)
    cv2.fillConvexPoly(mask, np.rint(quad - low).astype(np.int32), 255)
    cv2.copyTo(patch, mask, image[low[1] : high[1], low[0] : high[0]])


def _lathe(profile: FloatArray, columns: int = 24, exponent: float = 2.0, open_top: bool = False) -> Mesh:
    """Turn a profile, rows (radius, z), about z; `exponent` > 2 squares the outline."""
    t = np.linspace(0, 2 * np.pi, columns + 1)
    c, s = np.cos(t), np.sin(t)
    x = np.sign(c) * np.abs(c) ** (2 / exponent)
    y = np.sign(s) * np.abs(s) ** (2 / exponent)
    rows = [np.stack([r * x, r * y, np.full_like(t, z)], axis=1) for r, z in profile]
    rows = [rows[0] * [0, 0, 1], *rows] if profile[0, 0] > 0 else rows
    rows = rows if open_top or profile[-1, 0] == 0 else [*rows, rows[-1] * [0, 0, 1]]
    rings = np.array(rows)
    n, m, _ = rings.shape
    index = np.arange(n * m).reshape(n, m)
    a, b, d, e = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
    faces = np.concatenate([np.stack([a, b, d], -1).reshape(-1, 3), np.stack([a, d, e], -1).reshape(-1, 3)])
    v = rings.reshape(-1, 3)
    area = np.linalg.norm(np.cross(v[faces[:, 1]] - v[faces[:, 0]], v[faces[:, 2]] - v[faces[:, 0]]), axis=1)
    uv = np.stack(np.meshgrid(np.linspace(0, 1, m), np.linspace(0, 1, n)), axis=-1).reshape(-1, 2)
    return _flat_where_sharp(v, faces[area > 1e-12], uv)


def _flat_where_sharp(vertices: FloatArray, faces: npt.NDArray[np.int64], uv: FloatArray, limit: float = 0.8) -> Mesh:
    """Split vertices between faces that meet at a sharp edge, keep the others smooth."""
    smooth = vertex_normals(vertices, faces)
    normal = np.cross(vertices[faces[:, 1]] - vertices[faces[:, 0]], vertices[faces[:, 2]] - vertices[faces[:, 0]])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-20)
    corner = faces.reshape(-1)
    flat = np.repeat(normal, 3, axis=0)
    agree = np.einsum("ij,ij->i", smooth[corner], flat) > limit
    normals = np.where(agree[:, None], smooth[corner], flat)
    return Mesh(vertices[corner], np.arange(len(corner)).reshape(-1, 3), normals, uv=uv[corner])


def box_mesh() -> Mesh:
    """Return a cube of side 1 about the origin, the whole texture on each face."""
    v: list[FloatArray] = []
    f: list[tuple[int, int, int]] = []
    uv: list[tuple[float, float]] = []
    for axis in range(3):
        for sign in (-0.5, 0.5):
            a, b = np.eye(3)[(axis + 1) % 3], np.eye(3)[(axis + 2) % 3]
            centre = np.eye(3)[axis] * sign
            quad = [centre + (i - 0.5) * a * np.sign(sign) + (j - 0.5) * b for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))]
            base = len(v)
            v += quad
            uv += [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
            f += [(base, base + 1, base + 2), (base, base + 2, base + 3)]
    vertices, faces = np.array(v), np.array(f)
    return Mesh(vertices, faces, vertex_normals(vertices, faces), uv=np.array(uv))


def quad_mesh() -> Mesh:
    """Return a square of side 2 in the plane z = 0 facing +z, uv in units of its half side."""
    vertices = np.array([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    return Mesh(vertices, np.array([[0, 1, 2], [0, 2, 3]]), np.tile([0.0, 0, 1], (4, 1)), uv=vertices[:, :2])


def primitive_meshes(rng: np.random.Generator, turned: int = 14) -> list[Mesh]:
    """Return simple meshes about 1 across: box, cylinders, balls, cones, rings and randomly turned vessels."""
    arc = np.linspace(0, np.pi, 13)
    ball = np.stack([0.5 * np.sin(arc), -0.5 * np.cos(arc)], axis=1)
    ball[[0, -1], 0] = 0.0
    meshes = [
        box_mesh(), box_mesh(), box_mesh(), _lathe(np.array([[0.5, -0.5], [0.5, 0.5]])),
        _lathe(np.array([[0.5, -0.5], [0.5, 0.5]]), exponent=4.0), _lathe(ball), _lathe(ball, exponent=3.5),
        _lathe(np.array([[0.5, -0.5], [0.12, 0.5]])), _lathe(np.array([[0.3, -0.5], [0.5, 0.5]]), open_top=True),
    ]  # fmt: skip
    for _ in range(turned):
        count = int(rng.integers(4, 9))
        z = np.linspace(-0.5, 0.5, count)
        radius = np.clip(0.35 + np.cumsum(rng.normal(0, 0.09, count)), 0.08, 0.5)
        fine = np.linspace(-0.5, 0.5, 3 * count)
        smooth = np.interp(fine, z, radius)
        if rng.random() < 0.6:
            smooth = np.convolve(np.pad(smooth, 1, mode="edge"), [0.25, 0.5, 0.25], mode="valid")
        meshes.append(_lathe(np.stack([smooth, fine], axis=1), exponent=float(rng.choice([2.0, 2.0, 4.0]))))
    for thick in (0.12, 0.2):
        meshes.append(_torus(0.5 - thick, thick))
    return meshes


def _torus(large: float, small: float) -> Mesh:
    t, p = np.meshgrid(np.linspace(0, 2 * np.pi, 25), np.linspace(0, 2 * np.pi, 13))
    x, y = (large + small * np.cos(p)) * np.cos(t), (large + small * np.cos(p)) * np.sin(t)
    v = np.stack([x, y, small * np.sin(p)], axis=-1).reshape(-1, 3)
    normal = np.stack([np.cos(p) * np.cos(t), np.cos(p) * np.sin(t), np.sin(p)], axis=-1).reshape(-1, 3)
    index = np.arange(v.shape[0]).reshape(t.shape)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
    faces = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)])
    uv = np.stack([t, p], axis=-1).reshape(-1, 2) / (2 * np.pi)
    return Mesh(v, faces, normal, uv=uv)
