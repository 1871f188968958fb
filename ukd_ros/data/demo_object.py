# SPDX-License-Identifier: Apache-2.0
"""The demo object: a hand-sized trigger spray bottle, built by code so that the package can ship what it is trained on.

Frame: origin at the centre of the bounding box, x towards the nozzle (front), z up, metres. Front and back carry
different labels and the two sides different stripes, so no two views look alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.data.meshes import vertex_normals
from ukd_ros.data.whole_files import write_bytes
from ukd_ros.geometry.object_model import Mesh

FloatArray = npt.NDArray[np.float64]
ByteImage = npt.NDArray[np.uint8]
Color = tuple[int, int, int]

DEMO_NAME = "spray_bottle"
TEXTURE_SIZE = 512
BODY_ROWS = 360  # rows of the texture that wrap the body; the rest are swatches for the head
SWATCHES = ("head", "head_top", "trigger", "nozzle", "collar", "bottom", "logo", "dark")

WHITE: Color = (238, 236, 228)
BLUE: Color = (28, 70, 158)
NAVY: Color = (18, 32, 84)
ORANGE: Color = (238, 120, 24)
GREEN: Color = (40, 150, 84)
YELLOW: Color = (246, 204, 40)
RED: Color = (200, 34, 40)
GREY: Color = (58, 62, 70)


class _Builder:
    """Collects lofted surfaces with their uv; every surface has its own vertices."""

    def __init__(self) -> None:
        self.vertices: list[FloatArray] = []
        self.faces: list[npt.NDArray[np.int64]] = []
        self.normals: list[FloatArray] = []
        self.uv: list[FloatArray] = []
        self.count = 0

    def loft(self, rings: FloatArray, uv: FloatArray) -> None:
        """Join rings [n,m,3] (closed: the first column equals the last) into a tube with `uv` [n,m,2]."""
        n, m, _ = rings.shape
        index = np.arange(n * m).reshape(n, m)
        a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
        faces = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)])
        vertices = rings.reshape(-1, 3)
        normals = vertex_normals(vertices, faces).reshape(n, m, 3)
        seam = normals[:, 0] + normals[:, -1]  # the seam is one line on the surface: one normal for both sides
        seam /= np.maximum(np.linalg.norm(seam, axis=1, keepdims=True), 1e-12)
        normals[:, 0] = seam
        normals[:, -1] = seam
        self._add(vertices, faces, normals.reshape(-1, 3), uv.reshape(-1, 2))

    def cap(self, ring: FloatArray, uv: FloatArray, outward: FloatArray) -> None:
        """Close a ring [m,3] with a flat fan around its centre, facing `outward` [3]."""
        m = len(ring)
        vertices = np.vstack([ring, ring[:-1].mean(axis=0)])
        fan = np.stack([np.arange(m - 1), np.arange(1, m), np.full(m - 1, m)], axis=1)
        first = np.cross(vertices[fan[0, 1]] - vertices[fan[0, 0]], vertices[fan[0, 2]] - vertices[fan[0, 0]])
        if float(first @ outward) < 0:
            fan = fan[:, ::-1]
        self._add(vertices, fan, np.tile(outward, (m + 1, 1)), np.vstack([uv, uv[:-1].mean(axis=0)]))

    def _add(self, vertices: FloatArray, faces: npt.NDArray[np.int64], normals: FloatArray, uv: FloatArray) -> None:
        self.vertices.append(vertices)
        self.faces.append(faces + self.count)
        self.normals.append(normals)
        self.uv.append(uv)
        self.count += len(vertices)


def demo_mesh() -> Mesh:
    """Return the spray bottle's mesh (metres, 0.20 m tall, uv texture 512x512, fewer than 6,000 faces)."""
    builder = _Builder()
    _add_body(builder)
    _add_collar(builder)
    _add_head(builder)
    _add_trigger(builder)
    vertices = np.vstack(builder.vertices)
    centre = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
    return Mesh(
        vertices=vertices - centre,
        faces=np.vstack(builder.faces),
        normals=np.vstack(builder.normals),
        colors=None,
        uv=np.vstack(builder.uv),
        texture=demo_texture(),
    )


def write_demo_mesh(folder: str | Path) -> Path:
    """Write the demo mesh as `spray_bottle.obj` with its material and texture (metres) and return the .obj's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mesh = demo_mesh()
    if mesh.uv is None or mesh.texture is None:
        raise RuntimeError("the demo mesh lost its texture")
    lines = [f"mtllib {DEMO_NAME}.mtl", f"o {DEMO_NAME}", "usemtl label"]
    lines += ["v {:.6f} {:.6f} {:.6f}".format(*v) for v in mesh.vertices]
    lines += ["vt {:.6f} {:.6f}".format(*t) for t in mesh.uv]
    lines += ["vn {:.5f} {:.5f} {:.5f}".format(*n) for n in mesh.normals]
    lines += ["f {0}/{0}/{0} {1}/{1}/{1} {2}/{2}/{2}".format(*(f + 1)) for f in mesh.faces]
    ok, png = cv2.imencode(".png", cv2.cvtColor(np.array(mesh.texture), cv2.COLOR_RGB2BGR))
    if not ok:
        raise RuntimeError("OpenCV could not encode the demo texture as PNG")
    material = f"newmtl label\nKa 1 1 1\nKd 1 1 1\nKs 0.2 0.2 0.2\nNs 40\nmap_Kd {DEMO_NAME}.png\n"
    write_bytes(folder / f"{DEMO_NAME}.png", png.tobytes())
    write_bytes(folder / f"{DEMO_NAME}.mtl", material.encode())
    write_bytes(folder / f"{DEMO_NAME}.obj", ("\n".join(lines) + "\n").encode())
    return folder / f"{DEMO_NAME}.obj"


def _superellipse(
    t: npt.NDArray[np.floating[Any]], a: float, b: float, exponent: float
) -> tuple[FloatArray, FloatArray]:
    c, s = np.cos(t), np.sin(t)
    return a * np.sign(c) * np.abs(c) ** (2 / exponent), b * np.sign(s) * np.abs(s) ** (2 / exponent)


def _even_angles(columns: int, exponent: float) -> FloatArray:
    """Angles that step evenly along the outline of the body, from the -y side round by the front (+x)."""
    fine = np.linspace(-np.pi / 2, 1.5 * np.pi, 4001)
    x, y = _superellipse(fine, 0.0275, 0.04, exponent)
    length = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
    return np.asarray(np.interp(np.linspace(0, length[-1], columns), length, fine), dtype=np.float64)


def _add_body(builder: _Builder) -> None:
    #        z       half x   half y  exponent
    profile = np.array([
        [0.0000, 0.0220, 0.0345, 3.4], [0.0008, 0.0245, 0.0370, 3.4], [0.0030, 0.0262, 0.0388, 3.4],
        [0.0070, 0.0272, 0.0397, 3.4], [0.0140, 0.0275, 0.0400, 3.4], [0.0400, 0.0275, 0.0400, 3.4],
        [0.0700, 0.0275, 0.0400, 3.4], [0.0950, 0.0275, 0.0400, 3.4], [0.1060, 0.0272, 0.0394, 3.3],
        [0.1140, 0.0262, 0.0374, 3.1], [0.1210, 0.0245, 0.0338, 2.9], [0.1270, 0.0224, 0.0290, 2.6],
        [0.1320, 0.0200, 0.0240, 2.4], [0.1360, 0.0178, 0.0198, 2.2], [0.1390, 0.0160, 0.0168, 2.0],
        [0.1415, 0.0150, 0.0150, 2.0], [0.1460, 0.0146, 0.0146, 2.0],
    ])  # fmt: skip
    columns = 61
    t = _even_angles(columns, 3.4)
    rings, uv = [], []
    for z, a, b, exponent in profile:
        x, y = _superellipse(t, a, b, exponent)
        rings.append(np.stack([x, y, np.full(columns, z)], axis=1))
        row = (1.0 - z / 0.146) * (BODY_ROWS - 2) + 1
        uv.append(np.stack([np.linspace(0.5, TEXTURE_SIZE - 0.5, columns) / TEXTURE_SIZE,
                            np.full(columns, 1 - row / TEXTURE_SIZE)], axis=1))  # fmt: skip
    builder.loft(np.array(rings), np.array(uv))
    builder.cap(rings[0], _swatch_uv("bottom", columns), np.array([0.0, 0.0, -1.0]))


def _swatch_uv(name: str, count: int, spread: FloatArray | None = None) -> FloatArray:
    """Return uv [count,2] inside one swatch; `spread` [count,2] in 0..1 addresses points of it (default: centre)."""
    index = SWATCHES.index(name)
    width = TEXTURE_SIZE // 4
    height = (TEXTURE_SIZE - BODY_ROWS) // 2
    left, top = (index % 4) * width, BODY_ROWS + (index // 4) * height
    inner = np.full((count, 2), 0.5) if spread is None else spread
    x = left + 6 + inner[:, 0] * (width - 12)
    y = top + 6 + inner[:, 1] * (height - 12)
    return np.stack([x / TEXTURE_SIZE, 1 - y / TEXTURE_SIZE], axis=1)


def _tube(
    builder: _Builder, axis: FloatArray, profile: FloatArray, columns: int, swatch: str, origin: FloatArray
) -> None:
    """Add a round tube along `axis` from `origin`, `profile` rows (distance along, radius), closed at its end."""
    side = np.cross(axis, np.array([0.0, 1.0, 0.0]))
    if np.linalg.norm(side) < 1e-6:
        side = np.array([1.0, 0.0, 0.0])
    side /= np.linalg.norm(side)
    other = np.cross(axis, side)
    t = np.linspace(0, 2 * np.pi, columns)
    circle = np.cos(t)[:, None] * side + np.sin(t)[:, None] * other
    rings = np.array([origin + axis * d + circle * r for d, r in profile])
    spread = np.stack(np.meshgrid(np.linspace(0, 1, columns), np.linspace(0, 1, len(profile))), axis=-1)
    uv = np.array([_swatch_uv(swatch, columns, row) for row in spread])
    builder.loft(rings, uv)
    builder.cap(rings[-1], _swatch_uv(swatch, columns), axis)


def _add_collar(builder: _Builder) -> None:
    up = np.array([0.0, 0.0, 1.0])
    profile = np.array([[0.0, 0.0155], [0.0, 0.0172], [0.001, 0.0180], [0.013, 0.0176], [0.0145, 0.0166],
                        [0.0150, 0.0140]])  # fmt: skip
    _tube(builder, up, profile, 37, "collar", np.array([0.0, 0.0, 0.1425]))


def _add_head(builder: _Builder) -> None:
    #        x        centre z  half y   half z  exponent
    sections = np.array([
        [-0.0310, 0.1830, 0.0030, 0.0040, 2.0], [-0.0300, 0.1830, 0.0070, 0.0085, 2.3],
        [-0.0270, 0.1828, 0.0100, 0.0125, 2.6], [-0.0220, 0.1815, 0.0118, 0.0160, 2.8],
        [-0.0150, 0.1790, 0.0126, 0.0195, 3.0], [-0.0050, 0.1785, 0.0128, 0.0210, 3.0],
        [0.0060, 0.1788, 0.0126, 0.0212, 3.0], [0.0150, 0.1805, 0.0120, 0.0195, 3.0],
        [0.0200, 0.1845, 0.0114, 0.0150, 2.8], [0.0250, 0.1872, 0.0108, 0.0118, 2.6],
        [0.0330, 0.1880, 0.0102, 0.0104, 2.5], [0.0420, 0.1882, 0.0096, 0.0098, 2.4],
        [0.0450, 0.1882, 0.0088, 0.0090, 2.2],
    ])  # fmt: skip
    columns = 33
    t = np.linspace(-np.pi / 2, 1.5 * np.pi, columns)  # the seam runs along the underside
    rings, uv = [], []
    for x, z, half_y, half_z, exponent in sections:
        y, dz = _superellipse(t, half_y, half_z, exponent)
        rings.append(np.stack([np.full(columns, x), y, z + dz], axis=1))
        across = np.stack([np.full(columns, (x + 0.031) / 0.076), np.abs(np.linspace(-1, 1, columns))], axis=1)
        uv.append(_swatch_uv("head", columns, across))
    builder.loft(np.array(rings), np.array(uv))
    builder.cap(rings[0], _swatch_uv("logo", columns), np.array([-1.0, 0.0, 0.0]))
    builder.cap(rings[-1], _swatch_uv("dark", columns), np.array([1.0, 0.0, 0.0]))
    nozzle = np.array([[0.0, 0.0086], [0.002, 0.0092], [0.010, 0.0088], [0.012, 0.0076], [0.012, 0.0034],
                       [0.0105, 0.0030]])  # fmt: skip
    _tube(builder, np.array([1.0, 0.0, 0.0]), nozzle, 25, "nozzle", np.array([0.0445, 0.0, 0.1882]))
    # a raised stripe along the top, as the lid of the pump
    lid = np.array([[-0.020, 0.1985, 0.0040], [-0.017, 0.2010, 0.0060], [0.006, 0.2030, 0.0066],
                    [0.020, 0.2005, 0.0060], [0.034, 0.1990, 0.0050], [0.036, 0.1970, 0.0040]])  # fmt: skip
    circle = np.linspace(0, 2 * np.pi, 17)
    strip = np.array([np.stack([np.full(17, x), np.cos(circle) * w, z - 0.004 + np.sin(circle) * 0.004], axis=1)
                      for x, z, w in lid])  # fmt: skip
    builder.loft(strip, np.array([_swatch_uv("head_top", 17) for _ in lid]))


def _add_trigger(builder: _Builder) -> None:
    #        x        z       half width y, half thickness
    spine = np.array([
        [0.0200, 0.1760, 0.0060, 0.0040], [0.0255, 0.1735, 0.0062, 0.0044], [0.0300, 0.1680, 0.0062, 0.0042],
        [0.0318, 0.1600, 0.0060, 0.0036], [0.0312, 0.1520, 0.0058, 0.0032], [0.0325, 0.1445, 0.0056, 0.0030],
        [0.0362, 0.1380, 0.0054, 0.0028], [0.0400, 0.1345, 0.0040, 0.0018],
    ])  # fmt: skip
    tangent = np.gradient(spine[:, :2], axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    columns = 17
    t = np.linspace(0, 2 * np.pi, columns)
    rings = []
    for (x, z, width, thick), (tx, tz) in zip(spine, tangent, strict=True):
        y, n = _superellipse(t, width, thick, 2.6)
        rings.append(np.stack([x - tz * n, y, z + tx * n], axis=1))
    along = np.linspace(0, 1, len(spine))
    uv = np.array([_swatch_uv("trigger", columns, np.full((columns, 2), [0.5, a])) for a in along])
    builder.loft(np.array(rings), uv)
    builder.cap(rings[-1], uv[-1], np.array([0.75, 0.0, -0.66]))


def demo_texture() -> ByteImage:
    """Draw the bottle's texture [512,512,3] RGB: the body's wrap above, eight swatches for the head below."""
    image = np.zeros((TEXTURE_SIZE, TEXTURE_SIZE, 3), np.uint8)
    image[:BODY_ROWS] = WHITE
    _draw_body(image[:BODY_ROWS])
    width, height = TEXTURE_SIZE // 4, (TEXTURE_SIZE - BODY_ROWS) // 2
    painters: dict[str, Callable[[ByteImage], None]] = {
        "head": _draw_head, "head_top": lambda a: a.__setitem__(slice(None), RED),
        "trigger": lambda a: a.__setitem__(slice(None), RED), "nozzle": _draw_nozzle, "collar": _draw_collar,
        "bottom": lambda a: a.__setitem__(slice(None), (150, 152, 150)),
        "logo": lambda a: a.__setitem__(slice(None), YELLOW), "dark": lambda a: a.__setitem__(slice(None), GREY),
    }  # fmt: skip
    for index, name in enumerate(SWATCHES):
        left, top = (index % 4) * width, BODY_ROWS + (index // 4) * height
        painters[name](image[top : top + height, left : left + width])
    return image


def _text(image: ByteImage, text: str, x: int, y: int, scale: float, color: Color, thickness: int = 1) -> None:
    cv2.putText(image, text, (x, y), cv2.FONT_HERSHEY_DUPLEX, scale, color, thickness, cv2.LINE_AA)


def _draw_body(image: ByteImage) -> None:
    """Front label around column 128, +y side 256, back label 384, -y side at the seam (0 and 512)."""
    rows = np.linspace(0, 1, 110)[:, None]
    image[:110] = (np.array(BLUE) * (1 - rows) + np.array(WHITE) * rows * 0.98)[:, None, :].astype(np.uint8)
    image[:70] = BLUE
    image[70:76] = YELLOW
    image[236:276, :] = (image[236:276, :] * 0.97).astype(np.uint8)
    # sides: an orange stripe on +y, green blocks on -y
    image[76:, 238:274] = ORANGE
    for y in range(96, 350, 44):
        cv2.fillConvexPoly(image, np.array([[242, y + 16], [256, y], [270, y + 16], [256, y + 10]]), WHITE, cv2.LINE_AA)
    for x0, x1 in ((0, 18), (494, 512)):
        image[76:, x0:x1] = GREEN
        for y in range(92, 350, 52):
            image[y : y + 22, x0:x1] = NAVY
    _draw_front(image[:, 34:222])
    _draw_back(image[:, 290:478])


def _draw_front(label: ByteImage) -> None:
    """The front label on a canvas 188 px wide."""
    cv2.rectangle(label, (2, 96), (185, 340), YELLOW, -1)
    cv2.rectangle(label, (2, 96), (185, 340), NAVY, 2, cv2.LINE_AA)
    cv2.rectangle(label, (2, 96), (185, 170), NAVY, -1)
    _text(label, "UKD", 26, 154, 2.0, WHITE, 4)
    _text(label, "robot cleaner", 20, 190, 0.62, NAVY, 1)
    # a drop and a sparkling arc
    cv2.circle(label, (58, 258), 30, BLUE, -1, cv2.LINE_AA)
    cv2.fillConvexPoly(label, np.array([[58, 200], [33, 243], [83, 243]]), BLUE, cv2.LINE_AA)
    cv2.ellipse(label, (58, 258), (18, 18), 0, 100, 190, WHITE, 4, cv2.LINE_AA)
    cv2.circle(label, (136, 240), 34, RED, -1, cv2.LINE_AA)
    _text(label, "3x", 112, 251, 1.0, WHITE, 2)
    cv2.rectangle(label, (2, 302), (185, 340), RED, -1)
    _text(label, "750 ml", 14, 329, 0.8, WHITE, 2)
    cv2.arrowedLine(label, (128, 321), (176, 321), WHITE, 4, cv2.LINE_AA, 0, 0.4)


def _draw_back(label: ByteImage) -> None:
    """The back label on a canvas 188 px wide: barcode, small print, a hazard diamond and an arrow."""
    cv2.rectangle(label, (2, 90), (185, 346), (250, 250, 248), -1)
    cv2.rectangle(label, (2, 90), (185, 346), (120, 120, 126), 1, cv2.LINE_AA)
    cv2.rectangle(label, (2, 90), (185, 122), GREEN, -1)
    _text(label, "HOW TO USE", 22, 113, 0.66, WHITE, 1)
    rng = np.random.default_rng(20)
    for y in range(134, 226, 9):
        x = 12
        while x < 104:
            word = int(rng.integers(6, 22))
            cv2.line(label, (x, y), (min(x + word, 106), y), (60, 60, 66), 2)
            x += word + 5
    diamond = np.array([[146, 136], [178, 168], [146, 200], [114, 168]])
    cv2.fillConvexPoly(label, diamond, (252, 252, 252), cv2.LINE_AA)
    cv2.polylines(label, [diamond], True, RED, 4, cv2.LINE_AA)
    _text(label, "!", 139, 181, 1.1, (20, 20, 20), 3)
    x = 16
    while x < 120:
        bar, gap = int(rng.integers(1, 5)), int(rng.integers(2, 5))
        cv2.rectangle(label, (x, 246), (x + bar, 320), (16, 16, 16), -1)
        x += bar + gap
    _text(label, "4 006381 333", 14, 337, 0.42, (16, 16, 16), 1)
    cv2.rectangle(label, (130, 214), (180, 334), BLUE, -1)
    cv2.arrowedLine(label, (155, 324), (155, 226), WHITE, 6, cv2.LINE_AA, 0, 0.35)


def _draw_head(swatch: ByteImage) -> None:
    """Columns run from the back of the head to the nozzle, rows from underside to top of one side."""
    swatch[:] = GREY
    swatch[:, -22:] = (84, 90, 100)
    swatch[: swatch.shape[0] // 3] = (46, 48, 56)
    cv2.rectangle(swatch, (30, 30), (60, 50), (210, 210, 214), -1)


def _draw_nozzle(swatch: ByteImage) -> None:
    swatch[:] = ORANGE
    for x in range(8, swatch.shape[1], 20):
        swatch[:, x : x + 6] = (206, 94, 10)


def _draw_collar(swatch: ByteImage) -> None:
    swatch[:] = (222, 222, 218)
    for x in range(0, swatch.shape[1], 8):
        swatch[:, x : x + 3] = (176, 176, 174)
