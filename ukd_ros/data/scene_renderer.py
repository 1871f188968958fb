# SPDX-License-Identifier: Apache-2.0
"""Image `index` of a configuration and a seed: the scene is drawn, rendered, and seen through a camera.

The generator of an image is keyed by (seed, index) and by nothing else, so any number of workers gives the same images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ukd_ros.data.clutter import backdrop, collage, photographs, primitive_meshes, quad_mesh, random_texture
from ukd_ros.data.meshes import simplified
from ukd_ros.data.placement import SceneSampler
from ukd_ros.data.renderer import GpuMesh, Item, Renderer, Silhouette, smooth_outlines
from ukd_ros.data.scenes import Body, Instance, RenderedScene, Scene, SceneConfig
from ukd_ros.data.sensor import expose
from ukd_ros.geometry.camera import Camera
from ukd_ros.geometry.object_model import Mesh

TABLE_IDENT = 65535
TARGET_FACES = 12000  # enough for a millimetre on a hand tool; a scan's 25,000 would double the time of an image
DISTRACTOR_FACES = 5000
COARSER = ((150.0, 5000), (75.0, 2000))
"""Below so many pixels across, so many faces do: a face still covers no more than some four pixels."""


class SceneRenderer:
    """Renders image `index` of a configuration and seed; holds the graphics context of one process."""

    def __init__(self, config: SceneConfig, targets: list[Mesh], distractors: list[Mesh], seed: int) -> None:
        """Upload meshes and textures; RendererError when there is no headless OpenGL."""
        self.config, self.seed = config, seed
        pool = np.random.default_rng([seed, 2**31 - 1])
        self.photos = photographs(config.photo_folder)
        self.textures = [random_texture(pool) for _ in range(config.texture_pool)]
        primitives = primitive_meshes(pool)
        count = config.texture_pool // 3 if config.busy_fraction > 0 else 0
        self.collages = [collage(pool, self.textures, self.photos) for _ in range(count)]
        meshes = [simplified(m, TARGET_FACES) for m in targets]
        meshes += [simplified(m, DISTRACTOR_FACES) for m in distractors] + primitives
        self.sampler = SceneSampler(config, meshes, len(targets), len(distractors), len(self.textures), count)
        self.renderer = Renderer(config.width, config.height)
        self.gpu: list[tuple[GpuMesh, ...]] = [self._levels(m) for m in meshes]
        self.quad = self.renderer.upload(quad_mesh())
        self.gpu_textures: list[Any] = [self.renderer.texture(t) for t in (*self.textures, *self.collages)]

    def _levels(self, mesh: Mesh) -> tuple[GpuMesh, ...]:
        """Upload a mesh, finest first, and one for each size in `COARSER`."""
        levels = [self.renderer.upload(mesh)]
        for _, faces in COARSER:
            coarse = len(mesh.faces) > 1.5 * faces
            levels.append(self.renderer.upload(simplified(mesh, faces)) if coarse else levels[-1])
        return tuple(levels)

    def mesh_of(self, body: Body, camera: Camera) -> GpuMesh:
        """Return the mesh that a body is drawn with, as fine as its size in the image asks for."""
        if body.mesh < 0:
            return self.quad
        distance = max(float(np.linalg.norm(body.pose.translation)), 1e-3)
        across = 2.0 * self.sampler.radius[body.mesh] * max(body.scale) * float(camera.matrix[0, 0]) / distance
        return self.gpu[body.mesh][sum(across < limit for limit, _ in COARSER)]

    def close(self) -> None:
        """Free the graphics context."""
        self.renderer.close()

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """Return scene `index` and its generator, to be continued for the picture itself."""
        rng = np.random.default_rng([self.seed, index])
        return self.sampler.sample(rng), rng

    def render(self, index: int) -> tuple[RenderedScene, np.random.Generator]:
        """Return image `index` with its truth, and the generator for what follows (JPEG quality)."""
        scene, rng = self.scene(index)
        table = [self._item(scene.table, TABLE_IDENT, scene.camera)] if scene.table is not None else []
        items = [self._item(body, i + 1, scene.camera) for i, body in enumerate(scene.bodies)]
        targets = sum(1 for body in scene.bodies if body.target >= 0)
        outlines = self.renderer.silhouettes(items[:targets], scene.camera)
        items, ident, depth = self._uncovered(items, table, targets, outlines, scene.camera)
        textures = self.collages if scene.busy else self.textures
        behind = backdrop(rng, self.config.width, self.config.height, textures, self.photos, scene.busy)
        color = self.renderer.shade([*items, *table], scene.camera, scene.lighting, behind)
        color = smooth_outlines(color, ident, depth)
        image = expose(color, self.config.sensor, rng)
        instances = []
        for i in range(targets):
            instance = _instance(scene.bodies[i], ident == i + 1, outlines[i])
            if instance.silhouette.pixels > 0:
                instances.append(instance)
        return RenderedScene(image, scene.camera, tuple(instances)), rng

    def _item(self, body: Body, ident: int, camera: Camera) -> Item:
        mesh = self.mesh_of(body, camera)
        texture = None if body.texture is None else self.gpu_textures[body.texture]
        shadow = body.mesh >= 0 and min(body.scale) > 0.01  # a sheet's own shadow is thinner than the map resolves
        return Item(mesh, body.pose, ident, body.material, body.scale, texture, casts_shadow=shadow)

    def _uncovered(
        self, items: list[Item], table: list[Item], targets: int, outlines: list[Silhouette], camera: Camera
    ) -> tuple[list[Item], npt.NDArray[np.uint16], npt.NDArray[np.float32]]:
        """Take away what covers a target too much (at most a few times); return what stays, its ids and depth."""
        for _ in range(6):
            ident, depth = self.renderer.labels([*items, *table], camera)
            seen = np.bincount(ident.reshape(-1), minlength=targets + 1)
            culprits: set[int] = set()
            for i in range(targets):
                x, y, w, h = outlines[i].box
                if seen[i + 1] >= self.config.min_visible * outlines[i].pixels:
                    continue
                over = ident[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)]
                counts = np.bincount(over.reshape(-1), minlength=2)
                counts[: targets + 1] = 0
                counts = counts[:TABLE_IDENT]
                if counts.size and counts.max() > 0.1 * outlines[i].pixels:
                    culprits.add(int(counts.argmax()))
            if not culprits:
                break
            items = [item for item in items if item.ident not in culprits]
        return items, ident, depth


def _instance(body: Body, mask: npt.NDArray[np.bool_], outline: Silhouette) -> Instance:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (0, 0, 0, 0)
    if rows.size:
        box = (int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1))
    return Instance(body.target, body.pose, mask, box, int(mask.sum()), outline)
