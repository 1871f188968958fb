# SPDX-License-Identifier: Apache-2.0
"""Headless OpenGL: meshes at poses before a pinhole camera become colour, instance ids, depth and silhouettes.

Everything is in the camera's optical frame (x right, y down, z forward, metres); pixel (0, 0) is the centre of the
top-left pixel, as in `Camera`. Lens distortion is not rendered. Without a GPU, Mesa's llvmpipe does the work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ukd_ros.data.shaders import (
    BACKDROP_FRAGMENT,
    BACKDROP_VERTEX,
    IDENT_FRAGMENT,
    IDENT_VERTEX,
    SHADE_FRAGMENT,
    SHADE_VERTEX,
    SHADOW_FRAGMENT,
    SHADOW_VERTEX,
    SILHOUETTE_FRAGMENT,
)
from ukd_ros.geometry.camera import Camera, DistortionModel
from ukd_ros.geometry.object_model import Mesh
from ukd_ros.geometry.pose import Pose

FloatArray = npt.NDArray[np.float64]
MAX_LIGHTS = 4
NEAR = 0.02
FAR = 60.0


class RendererError(RuntimeError):
    """Rendering is impossible here; the message says what to install or change."""


@dataclass(frozen=True, eq=False)
class Light:
    """A light in the camera frame: `position` [3] is a direction towards it, or a place (m) when `is_point`."""

    position: FloatArray
    color: FloatArray
    is_point: bool = False


@dataclass(frozen=True, eq=False)
class Material:
    """How a surface answers light; `color_matrix` [3,3] acts on the linear surface colour (tint, hue, saturation)."""

    color_matrix: FloatArray = field(default_factory=lambda: np.eye(3))
    specular: float = 0.04
    roughness: float = 0.5
    reflection: float = 0.0
    texture_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Item:
    """One mesh in the scene: `ident` > 0 in the id image, `scale` [3] along its own axes."""

    mesh: GpuMesh
    pose: Pose
    ident: int
    material: Material = field(default_factory=Material)
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    texture: Any = None
    casts_shadow: bool = True


@dataclass(frozen=True, eq=False)
class Lighting:
    """All light of a scene: ambient from above and below (`up` [3] in the camera frame) and up to four lights.

    The first light casts the shadow; `shadow_softness` is the shadow edge's width in shadow-map texels.
    """

    lights: tuple[Light, ...]
    sky: FloatArray
    ground: FloatArray
    up: FloatArray
    shadow_softness: float = 1.5
    shadow_strength: float = 1.0


@dataclass(frozen=True, eq=False)
class Rendering:
    """One image: colour, ids and depth.

    color: [H,W,3] uint8 RGB, the square root of linear light. ident: [H,W], 0 where there is nothing. depth: [H,W] m
    along the optical axis, 0 where there is nothing.
    """

    color: npt.NDArray[np.uint8]
    ident: npt.NDArray[np.uint16]
    depth: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Silhouette:
    """The whole outline of one instance, also outside the image: `box` (x, y, w, h) px and its pixel count."""

    box: tuple[int, int, int, int]
    pixels: int


class GpuMesh:
    """A mesh on the graphics side; made by `Renderer.upload`."""

    def __init__(self, vao: dict[str, Any], texture: Any, mesh: Mesh) -> None:
        """Keep the vertex arrays, the texture (or None) and what the bounds need."""
        self.vao = vao
        self.texture = texture
        self.has_colors = mesh.colors is not None
        self.vertices = mesh.vertices
        self.radius = float(np.linalg.norm(mesh.vertices, axis=1).max())


_current: Renderer | None = None  # whose context the process holds


class Renderer:
    """Renders images of one size, in one thread. Close it (or use `with`) to free the context."""

    def __init__(self, width: int, height: int, samples: int = 1, shadow_size: int = 1024) -> None:
        """Open a standalone EGL context; raises RendererError with the packages to install when that fails.

        `samples` 4 is multisampling, which doubles the time on llvmpipe; 1 leaves outlines to `smooth_outlines`.
        """
        global _current
        self.width, self.height = width, height
        self.context = _open_context()
        _current = self
        gl = self.context
        self._software = "llvmpipe" in gl.info["GL_RENDERER"] or "softpipe" in gl.info["GL_RENDERER"]
        samples = min(samples, gl.max_samples)
        self._shade = gl.program(vertex_shader=SHADE_VERTEX, fragment_shader=SHADE_FRAGMENT)
        self._ident = gl.program(vertex_shader=IDENT_VERTEX, fragment_shader=IDENT_FRAGMENT)
        self._silhouette = gl.program(vertex_shader=IDENT_VERTEX, fragment_shader=SILHOUETTE_FRAGMENT)
        self._shadow = gl.program(vertex_shader=SHADOW_VERTEX, fragment_shader=SHADOW_FRAGMENT)
        self._backdrop = gl.program(vertex_shader=BACKDROP_VERTEX, fragment_shader=BACKDROP_FRAGMENT)
        quad = gl.buffer(np.array([-1, -1, 3, -1, -1, 3], dtype="f4").tobytes())
        self._backdrop_vao = gl.vertex_array(self._backdrop, [(quad, "2f", "in_corner")])
        size = (width, height)
        self._color = gl.framebuffer([gl.renderbuffer(size, 4)], gl.depth_renderbuffer(size))
        self._multi = self._color
        if samples > 1:
            self._multi = gl.framebuffer(
                [gl.renderbuffer(size, 4, samples=samples)], gl.depth_renderbuffer(size, samples=samples)
            )
        self._labels = gl.framebuffer([gl.texture(size, 2, dtype="f4")], gl.depth_renderbuffer(size))
        # twice the size, so that what leaves the image by up to half its size still counts as part of the silhouette
        self._wide = gl.framebuffer([gl.renderbuffer((2 * width, 2 * height), 4)])
        self._shadow_map = gl.depth_texture((shadow_size, shadow_size))
        self._shadow_map.compare_func = "<="
        self._shadow_map.repeat_x = self._shadow_map.repeat_y = False
        self._shadow_fbo = gl.framebuffer(depth_attachment=self._shadow_map)
        self._white = self.texture(np.full((1, 1, 3), 255, np.uint8))

    def _activate(self) -> None:
        """Make this context the current one, when a renderer opened later took its place."""
        global _current
        if _current is not self:
            self.context.__enter__()
            _current = self

    def __enter__(self) -> Renderer:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the context."""
        self.close()

    def close(self) -> None:
        """Free the context and all that lives in it."""
        self._activate()
        self.context.release()

    def upload(self, mesh: Mesh) -> GpuMesh:
        """Copy a mesh (with its texture) to the graphics side."""
        self._activate()
        colors = np.full((len(mesh.vertices), 3), 255, np.uint8) if mesh.colors is None else mesh.colors
        uv = np.zeros((len(mesh.vertices), 2)) if mesh.uv is None else mesh.uv
        linear = (colors.astype(np.float32) / 255.0) ** 2  # square-root encoding throughout, see Rendering
        data = np.hstack([mesh.vertices, mesh.normals, linear, uv]).astype("f4")
        buffer = self.context.buffer(np.ascontiguousarray(data).tobytes())
        index = self.context.buffer(np.ascontiguousarray(mesh.faces, dtype="i4").tobytes())
        full = [(buffer, "3f 3f 3f 2f", "in_position", "in_normal", "in_color", "in_uv")]
        bare = [(buffer, "3f 32x", "in_position")]
        vao = {
            "shade": self.context.vertex_array(self._shade, full, index),
            "ident": self.context.vertex_array(self._ident, bare, index),
            "silhouette": self.context.vertex_array(self._silhouette, bare, index),
            "shadow": self.context.vertex_array(self._shadow, bare, index),
        }
        return GpuMesh(vao, None if mesh.texture is None else self.texture(mesh.texture), mesh)

    def texture(self, image: npt.NDArray[np.uint8], mipmaps: bool = True) -> Any:
        """Copy an RGB image [h,w,3] to the graphics side, first row on top (uv v = 1)."""
        self._activate()
        rows = np.ascontiguousarray(image[::-1])
        texture = self.context.texture((image.shape[1], image.shape[0]), 3, rows.tobytes(), alignment=1)
        if mipmaps:
            texture.build_mipmaps()
            texture.filter = (self.context.LINEAR_MIPMAP_LINEAR, self.context.LINEAR)
            if not self._software:  # on a CPU it costs a third of the whole image
                texture.anisotropy = min(4.0, self.context.max_anisotropy)
        return texture

    def labels(self, items: list[Item], camera: Camera) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float32]]:
        """Return the id image [H,W] and depth [H,W] (m) of the nearest surfaces."""
        self._begin(camera)
        gl = self.context
        self._labels.use()
        self._labels.clear(0.0, 0.0, 0.0, 0.0)
        gl.enable_only(gl.DEPTH_TEST)
        clip = clip_matrix(camera)
        for item in items:
            self._ident["clip"].write(_columns(clip @ _model(item)))
            self._ident["ident"].value = float(item.ident)
            item.mesh.vao["ident"].render()
        data = np.frombuffer(self._labels.read(components=2, dtype="f4"), dtype="f4")
        data = data.reshape(self.height, self.width, 2)
        return data[..., 0].astype(np.uint16), data[..., 1].copy()

    def silhouettes(self, items: list[Item], camera: Camera) -> list[Silhouette]:
        """Return each item's whole outline as if it were alone, counted up to half an image beyond the borders."""
        self._begin(camera)
        gl = self.context
        clip = clip_matrix(camera, (2 * self.width, 2 * self.height), (self.width // 2, self.height // 2))
        out = []
        for start in range(0, len(items), 4):  # four instances share the four channels of one buffer
            group = items[start : start + 4]
            self._wide.color_mask = (True, True, True, True)
            self._wide.use()
            self._wide.clear(0.0, 0.0, 0.0, 0.0)
            gl.enable_only(gl.NOTHING)
            for channel, item in enumerate(group):
                self._wide.color_mask = tuple(channel == c for c in range(4))
                self._wide.use()  # the mask takes effect here
                self._silhouette["clip"].write(_columns(clip @ _model(item)))
                item.mesh.vao["silhouette"].render()
            for channel, item in enumerate(group):
                out.append(self._read_silhouette(channel, item, camera))
        self._wide.color_mask = (True, True, True, True)
        return out

    def _read_silhouette(self, channel: int, item: Item, camera: Camera) -> Silhouette:
        wide, high, left, top = 2 * self.width, 2 * self.height, self.width // 2, self.height // 2
        points = item.pose.transform(item.mesh.vertices * np.array(item.scale))
        front = points[points[:, 2] > NEAR]
        if len(front) == 0:
            return Silhouette((0, 0, 0, 0), 0)
        xy = front[:, :2] / front[:, 2:] @ camera.matrix[:2, :2].T + camera.matrix[:2, 2]
        low = np.floor(xy.min(axis=0)).astype(int) + [left - 1, top - 1]
        high_xy = np.ceil(xy.max(axis=0)).astype(int) + [left + 2, top + 2]
        x0, y0 = int(np.clip(low[0], 0, wide)), int(np.clip(low[1], 0, high))
        x1, y1 = int(np.clip(high_xy[0], 0, wide)), int(np.clip(high_xy[1], 0, high))
        if len(front) < len(points):
            x0, y0, x1, y1 = 0, 0, wide, high
        if x1 <= x0 or y1 <= y0:
            return Silhouette((0, 0, 0, 0), 0)
        data = np.frombuffer(self._wide.read(viewport=(x0, y0, x1 - x0, y1 - y0), components=4), dtype=np.uint8)
        mask = np.ascontiguousarray(data.reshape(y1 - y0, x1 - x0, 4)[..., channel])
        pixels = int(cv2.countNonZero(mask))
        x, y, w, h = cv2.boundingRect(mask)
        return Silhouette((x + x0 - left, y + y0 - top, w, h), pixels)

    def shade(
        self, items: list[Item], camera: Camera, lighting: Lighting, backdrop: npt.NDArray[np.uint8] | None = None
    ) -> npt.NDArray[np.uint8]:
        """Return the colour image [H,W,3] uint8, square-root encoded; `backdrop` (same encoding) fills the rest."""
        self._begin(camera)
        gl = self.context
        shadow = self._draw_shadow_map(items, lighting)
        self._multi.use()
        self._multi.clear(0.0, 0.0, 0.0, 1.0)
        if backdrop is not None:
            gl.enable_only(gl.NOTHING)
            texture = self.texture(backdrop, mipmaps=False)
            texture.use(0)
            self._backdrop_vao.render(vertices=3)
            texture.release()
        gl.enable_only(gl.DEPTH_TEST)
        self._set_lighting(lighting, shadow)
        clip = clip_matrix(camera)
        for item in sorted(items, key=_nearest):  # what is hidden is then never shaded
            self._draw_shaded(item, clip)
        if self._multi is not self._color:
            gl.copy_framebuffer(self._color, self._multi)
        data = np.frombuffer(self._color.read(components=3, alignment=1), dtype=np.uint8)
        return data.reshape(self.height, self.width, 3)

    def draw(
        self, items: list[Item], camera: Camera, lighting: Lighting, backdrop: npt.NDArray[np.uint8] | None = None
    ) -> Rendering:
        """Return colour, ids and depth of a scene."""
        ident, depth = self.labels(items, camera)
        return Rendering(self.shade(items, camera, lighting, backdrop), ident, depth)

    def _draw_shaded(self, item: Item, clip: FloatArray) -> None:
        program, model = self._shade, _model(item)
        program["clip"].write(_columns(clip @ model))
        program["model"].write(_columns(model))
        program["normal_matrix"].write(_columns(item.pose.rotation / np.array(item.scale)))
        program["color_matrix"].write(_columns(item.material.color_matrix))
        program["surface"].value = (
            item.material.specular,
            max(item.material.roughness, 0.05),
            item.material.reflection,
            item.material.texture_scale,
        )
        texture = item.texture if item.texture is not None else item.mesh.texture
        (texture if texture is not None else self._white).use(0)
        item.mesh.vao["shade"].render()

    def _set_lighting(self, lighting: Lighting, shadow: FloatArray) -> None:
        program = self._shade
        lights = lighting.lights[:MAX_LIGHTS]
        place = np.zeros((MAX_LIGHTS, 4), dtype="f4")
        color = np.zeros((MAX_LIGHTS, 3), dtype="f4")
        for i, light in enumerate(lights):
            place[i] = [*light.position, 1.0 if light.is_point else 0.0]
            color[i] = light.color
        program["light_place"].write(place.tobytes())
        program["light_color"].write(color.tobytes())
        program["light_count"].value = len(lights)
        program["sky"].value = tuple(float(c) for c in lighting.sky)
        program["ground"].value = tuple(float(c) for c in lighting.ground)
        program["up"].value = tuple(float(c) for c in lighting.up)
        program["shadow_matrix"].write(_columns(shadow))
        softness = lighting.shadow_softness / self._shadow_map.width
        program["shadow_shape"].value = (softness, lighting.shadow_strength)
        program["texture_map"].value = 0
        program["shadow_map"].value = 1
        self._shadow_map.use(1)

    def _draw_shadow_map(self, items: list[Item], lighting: Lighting) -> FloatArray:
        """Draw what the first light sees and return camera frame -> shadow texture coordinates [4,4]."""
        gl = self.context
        casters = [item for item in items if item.casts_shadow]
        self._shadow_fbo.use()
        self._shadow_fbo.clear(depth=1.0)
        if not casters or not lighting.lights:
            return np.eye(4)
        centres = np.array([item.pose.translation for item in casters])
        radii = np.array([item.mesh.radius * max(item.scale) for item in casters])
        middle = (centres - radii[:, None]).min(axis=0) / 2 + (centres + radii[:, None]).max(axis=0) / 2
        reach = float((np.linalg.norm(centres - middle, axis=1) + radii).max()) * 1.01
        view = light_matrix(lighting.lights[0], middle, reach)
        gl.enable_only(gl.DEPTH_TEST)
        for item in casters:
            self._shadow["clip"].write(_columns(view @ _model(item)))
            item.mesh.vao["shadow"].render()
        return np.array([[0.5, 0, 0, 0.5], [0, 0.5, 0, 0.5], [0, 0, 0.5, 0.5], [0, 0, 0, 1.0]]) @ view

    def _begin(self, camera: Camera) -> None:
        self._activate()
        if (camera.width, camera.height) != (self.width, self.height):
            raise ValueError(
                f"camera is {camera.width}x{camera.height}, the renderer was opened for {self.width}x{self.height}."
            )
        if camera.distortion_model is not DistortionModel.NONE:
            raise ValueError("the renderer draws ideal pinhole images: give a camera without distortion.")


def smooth_outlines(
    color: npt.NDArray[np.uint8], ident: npt.NDArray[np.uint16], depth: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    """Soften stairs where the id or the depth jumps (by more than 2 cm); a cheap stand-in for multisampling."""
    edge = np.zeros(ident.shape, np.uint8)
    for axis in (0, 1):
        a, b = (slice(1, None), slice(None)) if axis == 0 else (slice(None), slice(1, None))
        c, d = (slice(None, -1), slice(None)) if axis == 0 else (slice(None), slice(None, -1))
        jump = (ident[a, b] != ident[c, d]) | (np.abs(depth[a, b] - depth[c, d]) > 0.02)
        edge[a, b] |= jump
        edge[c, d] |= jump
    out = color.copy()
    cv2.copyTo(cv2.GaussianBlur(color, (3, 3), 0.5), edge, out)
    return out


def clip_matrix(camera: Camera, size: tuple[int, int] | None = None, offset: tuple[int, int] = (0, 0)) -> FloatArray:
    """Return camera frame -> OpenGL clip space [4,4] so that framebuffer row 0 is image row 0.

    A pixel's centre lies half a pixel inside its corner, hence the + 0.5. `size` and `offset` (px) enlarge the canvas.
    """
    width, height = size if size is not None else (camera.width, camera.height)
    fx, skew_px, cx = camera.matrix[0]
    _, fy, cy = camera.matrix[1]
    out = np.zeros((4, 4))
    out[0, :3] = [2 * fx / width, 2 * skew_px / width, 2 * (cx + 0.5 + offset[0]) / width - 1]
    out[1, :3] = [0, 2 * fy / height, 2 * (cy + 0.5 + offset[1]) / height - 1]
    out[2, 2:] = [(FAR + NEAR) / (FAR - NEAR), -2 * FAR * NEAR / (FAR - NEAR)]
    out[3, 2] = 1.0
    return out


def light_matrix(light: Light, middle: FloatArray, reach: float) -> FloatArray:
    """Return a light's orthographic view [4,4] of the sphere (`middle`, `reach`); a point light is taken as far."""
    towards = light.position - middle if light.is_point else light.position
    z = -towards / np.linalg.norm(towards)
    x = np.cross(z, np.array([0.0, 1.0, 0.0]) if abs(z[1]) < 0.9 else np.array([1.0, 0.0, 0.0]))
    x /= np.linalg.norm(x)
    rotation = np.stack([x, np.cross(z, x), z])
    out = np.eye(4)
    out[:3, :3] = rotation / reach
    out[:3, 3] = -rotation @ middle / reach
    return out


def _nearest(item: Item) -> float:
    return float(item.pose.translation[2]) - (item.mesh.radius * max(item.scale) if item.casts_shadow else -FAR)


def _model(item: Item) -> FloatArray:
    return np.asarray(item.pose.matrix() @ np.diag([*item.scale, 1.0]))


def _columns(matrix: FloatArray) -> bytes:
    return np.ascontiguousarray(matrix.T, dtype="f4").tobytes()


def _open_context() -> Any:
    try:
        import moderngl
    except ImportError as error:
        raise RendererError("rendering needs the Python package moderngl: pip install 'ukd_ros[train]'.") from error
    settings: dict[str, Any] = {"backend": "egl"}
    try:
        return moderngl.create_context(require=330, standalone=True, **settings)
    except Exception as error:  # moderngl and glcontext raise bare Exception for every EGL failure
        raise RendererError(
            f"no headless OpenGL 3.3 context could be opened ({error}). On Debian and Ubuntu: "
            "sudo apt install libegl1 libgl1-mesa-dri libgles2"
        ) from error
