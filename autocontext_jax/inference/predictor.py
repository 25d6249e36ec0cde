"""Masks of whole scans: tile by tile, level by level, through programs that are compiled once.

A level is predicted in rows of tiles along z. The softmax maps of one row add up on the device in a canvas of fixed
size;
planes that no later row touches leave it in chunks: as maps for the next level's context, or enlarged to the scan's own
grid and reduced to a mask, a few planes at a time. Neither device nor host ever holds K volumes at full resolution.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from autocontext_jax.data.resampling import downsample_image
from autocontext_jax.data.store import AIR
from autocontext_jax.geometry import Triple, level_shape
from autocontext_jax.inference.tiling import (
    AxisTiles,
    Blend,
    gaussian,
    largest_extents,
    native_lookup,
    pyramid_tiles,
)
from autocontext_jax.models.pyramid import Pyramid

LevelTiles = tuple[AxisTiles, AxisTiles, AxisTiles]


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """How scans are tiled.

    Attributes:
      tile: T, edge of a tile in voxels of each level; need not be the training patch's. Larger is faster, to what the
        device's memory holds.
      overlap: share of a tile that the next one covers again.
      plane: native voxels in plane (height or width) that the programs are compiled for. A larger scan costs one more
        compilation; smaller ones none.
    """

    tile: int = 96
    overlap: float = 0.5
    plane: int = 512


class Predictor:
    """A trained pyramid ready for scans of any size.

    Args:
      model: as `state.inference_model` gives it.
      config: see there.
      blend: weights of a tile's axis; Gaussian unless given.
      align: what tile starts must be a multiple of: the network's divisor.
    """

    # Native planes that are enlarged and reduced at a time.
    GROUP = 8

    def __init__(self, model: Pyramid, config: PredictorConfig, *, align: int, blend: Blend | None = None):
        self.config = config
        self._blend = gaussian(config.tile) if blend is None else blend
        self._align = max(2, align)
        useful = config.tile - 2 * self._blend.border
        self._stride = max(1, int(useful * (1 - config.overlap)) // self._align) * self._align
        self._graph, self._state = nnx.split(model)
        self._levels: int = model.config.levels
        self._classes: int = model.config.classes
        self._plane = config.plane
        self._canvas: list[tuple[int, int]] = [(0, 0)] * self._levels
        self._add_tile = [self._make_add_tile(level) for level in range(1, self._levels + 1)]

    def masks(
        self,
        voxels: np.ndarray,
        factors: tuple[tuple[float, float, float], ...],
        *,
        levels: tuple[int, ...] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[int, np.ndarray]:
        """Predicts one scan.

        Args:
          voxels: [D, H, W] int16 HU, canonical.
          factors: for each level, coarsest first, native voxels per voxel along (z, y, x).
          levels: whose masks are wanted; () or None means the finest's.
          progress: called with the tiles done and their total, after each row of tiles.

        Returns:
          For each wanted level its mask [D, H, W] uint8 on the scan's grid.
        """
        wanted = levels or (self._levels,)
        # Coarser grids are exact halves of the finest: a tile's context always lies on them.
        finest = level_shape(_shape(voxels), factors[-1])
        plan = pyramid_tiles(finest, self._levels, self._blend, stride=self._stride, align=self._align)
        self._reserve(_shape(voxels), factors[-1])
        tiles = [int(np.prod([len(axis.starts) for axis in level])) for level in plan]
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, sum(tiles))

        masks: dict[int, np.ndarray] = {}
        maps: np.ndarray | None = None
        for level, (axes, factor) in enumerate(zip(plan, factors, strict=True), start=1):
            image = downsample_image(voxels, factor)
            last = level == self._levels
            coarser, maps = maps, None if last else self._empty_maps(axes)
            writer = _MaskWriter(self, voxels.shape, image.shape, factor) if level in wanted else None
            for z, chunk in self._chunks(level, image, axes, coarser, plan, advance):
                if maps is not None:
                    _place(maps, np.asarray(_as_half(chunk)), z, axes)
                if writer is not None:
                    writer.add(z, chunk, axes)
            if writer is not None:
                masks[level] = writer.mask
        return masks

    def compilations(self) -> int:
        """Programs compiled so far, for tests and for whoever wonders."""
        jitted: list[Any] = [*self._add_tile, _shift, _as_half, _native_masks]
        return sum(program._cache_size() for program in jitted)

    def _reserve(self, shape: Triple, factors: tuple[float, float, float]) -> None:
        """Makes the compiled sizes large enough for this scan: they only grow, so scans within `plane` share them."""
        plane = max(shape[1:])
        if plane > self._plane:
            self._plane = -(-plane // 64) * 64
        # What scans of the full plane may take, from this scan's own factors of the finest level.
        _, *full = level_shape((1, self._plane, self._plane), factors)
        extents = [
            largest_extents(size, self._levels, self._blend, stride=self._stride, align=self._align) for size in full
        ]
        for level, needed in enumerate(zip(*extents, strict=True)):
            have = self._canvas[level]
            self._canvas[level] = (max(have[0], needed[0]), max(have[1], needed[1]))

    def _chunks(
        self,
        level: int,
        image: np.ndarray,
        axes: LevelTiles,
        coarser: np.ndarray | None,
        plan: tuple[LevelTiles, ...],
        advance: Callable[[int], None] = lambda tiles: None,
    ) -> Iterator[tuple[int, jax.Array]]:
        """Finished maps of one level from top to bottom: (z of the first plane, [stride, canvas y, canvas x, K])."""
        tile, stride = self.config.tile, self._stride
        z_axis, y_axis, x_axis = axes
        canvas = jnp.zeros((tile, *self._canvas[level - 1], self._classes), jnp.float32)
        for z_start, z_weights in zip(z_axis.starts, z_axis.weights, strict=True):
            for y_start, y_weights in zip(y_axis.starts, y_axis.weights, strict=True):
                for x_start, x_weights in zip(x_axis.starts, x_axis.weights, strict=True):
                    start = (int(z_start), int(y_start), int(x_start))
                    canvas = self._add_tile[level - 1](
                        canvas,
                        self._state,
                        crop(image, start, (tile,) * 3, AIR),
                        None if coarser is None else self._context(coarser, start, plan[level - 2]),
                        (z_weights, y_weights, x_weights),
                        (start[1] - y_axis.starts[0], start[2] - x_axis.starts[0]),
                    )
            rows = 1 if z_start != z_axis.starts[-1] else -(-(z_axis.high - int(z_start)) // stride)
            for row in range(rows):
                yield int(z_start) + row * stride, canvas[:stride]
                canvas = _shift(canvas, stride)
            advance(len(y_axis.starts) * len(x_axis.starts))

    def _context(self, maps: np.ndarray, start: Triple, coarser: LevelTiles) -> np.ndarray:
        """The coarser level's maps under a tile, with their halo of one voxel."""
        first = [s // 2 - 1 - axis.low for s, axis in zip(start, coarser, strict=True)]
        size = self.config.tile // 2 + 2
        return maps[tuple(slice(f, f + size) for f in first)]

    def _empty_maps(self, axes: LevelTiles) -> np.ndarray:
        """Room for a level's maps over the region that the next level needs, in half precision."""
        return np.zeros((*(axis.high - axis.low for axis in axes), self._classes), np.float16)

    def _make_add_tile(self, level: int):
        graph = self._graph

        @functools.partial(jax.jit, donate_argnums=0)
        def add_tile(canvas, state, image, maps, weights, corner):
            model: Pyramid = nnx.merge(graph, state, copy=True)
            logits = model.level(level, image[None], None if maps is None else maps[None])[0]
            z, y, x = (w.reshape([-1 if i == axis else 1 for i in range(4)]) for axis, w in enumerate(weights))
            blended = jax.nn.softmax(logits) * (z * y * x)
            where = (0, *corner, 0)
            return lax.dynamic_update_slice(canvas, lax.dynamic_slice(canvas, where, blended.shape) + blended, where)

        return add_tile


class _MaskWriter:
    """Turns a level's chunks of maps, as they come, into a mask on the scan's own grid."""

    def __init__(self, predictor: Predictor, native: tuple[int, ...], level: tuple[int, ...], factor):
        self.mask = np.zeros(native, np.uint8)
        self._lookups = [native_lookup(n, f, size) for n, f, size in zip(native, factor, level, strict=True)]
        self._plane, self._group = predictor._plane, predictor.GROUP
        self._done = 0
        self._previous: jax.Array | None = None

    def add(self, z: int, chunk: jax.Array, axes: LevelTiles) -> None:
        """Writes the native planes that this chunk completes.

        Args:
          z: of the chunk's first plane, level voxels.
          chunk: [stride, canvas y, canvas x, K].
          axes: the level's tiles, which say where the canvas begins.
        """
        before = chunk[:1] if self._previous is None else self._previous
        planes = jnp.concatenate([before, chunk])  # planes z - 1 ... z + stride - 1
        self._previous = chunk[-1:]
        z_low, z_weight = self._lookups[0]
        # A native plane is ready when both its level planes are there; past the scan's last plane, all are.
        have = z + chunk.shape[0]
        end = int(np.searchsorted(z_low, have - 1)) if have < axes[0].high else len(z_low)
        in_plane = []
        for (low, weight), axis in zip(self._lookups[1:], axes[1:], strict=True):
            in_plane += [_padded(low - int(axis.starts[0]), self._plane), _padded(weight, self._plane)]
        height, width = self.mask.shape[1:]
        for first in range(self._done, end, self._group):
            last = min(first + self._group, end)
            slab = _native_masks(
                planes,
                _padded(z_low[first:last] - (z - 1), self._group),
                _padded(z_weight[first:last], self._group),
                *in_plane,
            )
            self.mask[first:last] = np.asarray(slab)[: last - first, :height, :width]
        self._done = max(self._done, end)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _shift(canvas: jax.Array, stride: int) -> jax.Array:
    """Drops the first planes of a canvas and appends empty ones."""
    return jnp.concatenate([canvas[stride:], jnp.zeros_like(canvas[:stride])])


@jax.jit
def _as_half(chunk: jax.Array) -> jax.Array:
    return chunk.astype(jnp.float16)


@jax.jit
def _native_masks(planes, z_low, z_weight, y_low, y_weight, x_low, x_weight) -> jax.Array:
    """The class of the largest linearly interpolated map at each native voxel.

    `planes` are [n, canvas y, canvas x, K]; the lookups are `tiling.native_lookup`'s: [GROUP] along z into `planes`,
    [plane] along y and x into the canvas. The result is [GROUP, plane, plane] uint8.
    """

    def between(maps, low, weight, axis):
        here = jnp.take(maps, low, axis=axis, mode="clip")
        after = jnp.take(maps, low + 1, axis=axis, mode="clip")
        return here + weight.reshape([-1 if i == axis else 1 for i in range(maps.ndim)]) * (after - here)

    def one_plane(lookup):
        low, weight = lookup
        maps = planes[low] + weight * (planes[jnp.minimum(low + 1, planes.shape[0] - 1)] - planes[low])
        maps = between(between(maps, y_low, y_weight, 0), x_low, x_weight, 1)
        return jnp.argmax(maps, axis=-1).astype(jnp.uint8)

    return lax.map(one_plane, (z_low, z_weight))


def crop(volume: np.ndarray, start: tuple[int, ...], size: tuple[int, ...], fill: int) -> np.ndarray:
    """A copy of `volume[start : start + size]` along its axes, `fill` where that leaves the volume."""
    out = np.full(size, fill, volume.dtype)
    source = tuple(slice(max(0, s), max(0, s + n)) for s, n in zip(start, size, strict=True))
    inside = volume[source]
    target = tuple(slice(max(0, -s), max(0, -s) + n) for s, n in zip(start, inside.shape, strict=True))
    out[target] = inside
    return out


def _place(maps: np.ndarray, chunk: np.ndarray, z: int, axes: LevelTiles) -> None:
    """Copies the part of a canvas chunk that the next level needs into its maps."""
    z_axis, y_axis, x_axis = axes
    first, last = max(z, z_axis.low), min(z + len(chunk), z_axis.high)
    if first < last:
        y, x = (axis.low - axis.starts[0] for axis in (y_axis, x_axis))
        height, width = maps.shape[1:3]
        maps[first - z_axis.low : last - z_axis.low] = chunk[first - z : last - z, y : y + height, x : x + width]


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """`values` with their last repeated to a fixed size."""
    return np.pad(values, (0, size - len(values)), mode="edge")


def _shape(volume: np.ndarray) -> Triple:
    depth, height, width = volume.shape
    return depth, height, width
