"""Masks of whole scans: tile by tile, all levels hand in hand, through programs that are compiled once.

Each level goes down the scan in rows of tiles. The softmax maps of a row add up on the device in slabs of fixed size.
A slab that no later row touches leaves as a chunk of finished maps: to the level's mask, and to the next level, which
asks for no more of them than its own next row lies on. So neither the device's memory, nor the host's beyond the scan,
its downsampled images and the masks, grows with the scan's length.

Nothing in the loop over tiles waits for the device.
"""

import collections
import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from autocontext_jax.data.resampling import downsample_image
from autocontext_jax.data.store.level_grids import AIR
from autocontext_jax.errors import require
from autocontext_jax.geometry import Triple, halving, level_shape
from autocontext_jax.inference.masks import MaskWriter, native_masks
from autocontext_jax.inference.tiling import SLICES, Blend, LevelTiles, gaussian, largest_extents, pyramid_tiles
from autocontext_jax.models.pyramid import Pyramid
from autocontext_jax.runtime import compiler_options

Chunks = Iterator[tuple[int, jax.Array]]  # z of the first plane in level voxels, [stride, canvas y, canvas x, K]


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """How scans are tiled.

    Attributes:
      tile: T, edge of a tile in voxels of each level; need not be the training patch's. Larger is faster, to what the
        device's memory holds. In 2D a tile is `tiling.SLICES` such squares.
      overlap: share of a tile that the next one covers again.
      plane: native voxels in plane (height or width) that the programs are compiled for. A larger scan costs one more
        compilation; smaller ones none.
      space: devices of this process that share the depth of a tile, which must divide by `space` times the network's
        divisor. The activations, what a large tile needs most memory for, are split; finished maps are not.
    """

    tile: int = 96
    overlap: float = 0.5
    plane: int = 512
    space: int = 1

    def __post_init__(self):
        for name, largest in (("tile", 4096), ("plane", 2**16)):
            require(1 <= getattr(self, name) <= largest, self, name, f"a number from 1 to {largest}")
        require(0 <= self.overlap < 1, self, "overlap", "a fraction in [0, 1)")
        require(self.space >= 1, self, "space", "at least 1")


class Predictor:
    """A trained pyramid ready for scans of any size.

    Args:
      model: as `state.inference_model` gives it.
      config: see there.
      blend: weights of a tile's axis; Gaussian unless given.
      align: what tile starts must be a multiple of: the network's divisor.
      mirror_classes: the class that each class is in a mirror, as `geometry.SpatialLimits` has them: every tile is then
        seen twice, as it is and mirrored right for left, and its maps are the mean of both. () sees it once.
    """

    # What maps are kept in between levels.
    MAPS = jnp.float16

    def __init__(
        self,
        model: Pyramid,
        config: PredictorConfig,
        *,
        align: int,
        blend: Blend | None = None,
        mirror_classes: tuple[int, ...] = (),
    ):
        self.config = config
        self._mirror_classes = mirror_classes
        self._blend = gaussian(config.tile) if blend is None else blend
        self._align = max(2, align)
        useful = config.tile - 2 * self._blend.border
        self._stride = max(1, int(useful * (1 - config.overlap)) // self._align) * self._align
        self._spatial_dims: int = model.config.spatial_dims
        # Along z, of a tile and from row to row.
        depth, self._descent = (config.tile, self._stride) if self._spatial_dims == 3 else (SLICES, SLICES)
        self._tile: Triple = (depth, config.tile, config.tile)
        # Alone a device needs no mesh, and the programs go to whichever their arguments lie on.
        self._mesh: Mesh | None = None
        self._whole: NamedSharding | None = None
        self._slab_sharding: NamedSharding | None = None
        if config.space > 1:
            devices = jax.local_devices()[: config.space]
            self._mesh = jax.make_mesh((config.space,), ("space",), axis_types=(AxisType.Auto,), devices=devices)
            self._whole = NamedSharding(self._mesh, PartitionSpec())
            even = self._descent % config.space == 0
            self._slab_sharding = NamedSharding(self._mesh, PartitionSpec("space")) if even else self._whole
        self._graph, state = nnx.split(model)
        self._state = jax.device_put(state, self._whole)
        self._levels: int = model.config.levels
        self._classes: int = model.config.classes
        self._plane = config.plane
        self._canvas: list[tuple[int, int]] = [(0, 0)] * self._levels
        # Zeros in a slab's own memory.
        self._cleared = jax.jit(jnp.zeros_like, donate_argnums=0, keep_unused=True, out_shardings=self._slab_sharding)
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
          progress: called with the tiles handed to the device and their total, after each row of tiles.

        Returns:
          For each wanted level its mask [D, H, W] uint8 on the scan's grid.
        """
        wanted = levels or (self._levels,)
        # Coarser grids are exact halves of the finest: a tile's context always lies on them.
        finest = level_shape(_shape(voxels), factors[-1])
        grid = {"stride": self._stride, "align": self._align, "spatial_dims": self._spatial_dims}
        plan = pyramid_tiles(finest, self._levels, self._blend, **grid)[: max(wanted)]
        self._reserve(_shape(voxels), factors[-1])
        total = sum(int(np.prod([len(axis.starts) for axis in axes])) for axes in plan)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        writers: dict[int, MaskWriter] = {}
        streams: list[Chunks] = []
        for level, (axes, factor) in enumerate(zip(plan, factors, strict=False), start=1):
            image = downsample_image(voxels, factor)
            context = None
            if streams:
                context = _Context(
                    streams[-1], plan[level - 2], self._tile, self._descent, self._spatial_dims, self._whole
                )
            chunks = self._chunks(level, image, axes, context, advance)
            if level in wanted:
                writers[level] = MaskWriter(_shape(voxels), _shape(image), factor, axes, self._plane)
                chunks = writers[level].watch(chunks)
            streams.append(chunks)
        # The finest level draws the coarser ones along; what it did not ask for of them comes after.
        for chunks in reversed(streams):
            collections.deque(chunks, maxlen=0)
        return {level: writer.mask() for level, writer in writers.items()}

    def compilations(self) -> int:
        """Programs compiled so far, for tests and for whoever wonders."""
        jitted: list[Any] = [*self._add_tile, self._cleared, native_masks]
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
        context: "_Context | None",
        advance: Callable[[int], None] = lambda tiles: None,
    ) -> Chunks:
        """Finished maps of one level from top to bottom, as they are asked for; each lasts until the next is."""
        descent = self._descent
        z_axis, y_axis, x_axis = axes
        slabs = tuple(
            jnp.zeros((descent, *self._canvas[level - 1], self._classes), jnp.float32, device=self._slab_sharding)
            for _ in range(-(-self._tile[0] // descent))
        )
        for z_start, z_weights in zip(z_axis.starts, z_axis.weights, strict=True):
            start = (int(z_start), int(y_axis.starts[0]), int(x_axis.starts[0]))
            maps, first = (None, None) if context is None else context.under(start)
            for y_start, y_weights in zip(y_axis.starts, y_axis.weights, strict=True):
                for x_start, x_weights in zip(x_axis.starts, x_axis.weights, strict=True):
                    piece = crop(image, (start[0], int(y_start), int(x_start)), self._tile, AIR)
                    corner = np.array([0, y_start - start[1], x_start - start[2]], np.int32)
                    under = None if first is None else first + corner // 2
                    weights = (z_weights, y_weights, x_weights)
                    with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
                        slabs = self._add_tile[level - 1](slabs, self._state, piece, maps, weights, corner, under)
            advance(len(y_axis.starts) * len(x_axis.starts))
            rows = 1 if z_start != z_axis.starts[-1] else -(-(z_axis.high - start[0]) // descent)
            for number in range(rows):
                finished, *others = slabs
                yield start[0] + number * descent, finished
                slabs = (*others, self._cleared(finished))

    def _make_add_tile(self, level: int):
        graph, descent, mirror = self._graph, self._descent, np.array(self._mirror_classes, int)
        context_size = _context_size(self._tile, self._spatial_dims)

        depth = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec(None, "space"))

        @functools.partial(
            jax.jit,
            donate_argnums=0,
            out_shardings=self._slab_sharding,
            compiler_options=compiler_options(jax.default_backend()),
        )
        def add_tile(slabs, state, image, maps, weights, corner, under):
            """Predicts one tile of a row and adds its maps to the slabs.

            Args:
              slabs: arrays [n, canvas y, canvas x, K], one below the other.
              state: of the model.
              image: [T, T, T] int16 HU; in 2D [SLICES, T, T].
              maps: the coarser level's chunks about the row, one below the other; None at level 1.
              weights: [T] each, along z, y, x.
              corner: [3], the tile's first voxel in the slabs, (0, y, x).
              under: [3], the first voxel of its context in `maps`.
            """
            model: Pyramid = nnx.merge(graph, state, copy=True)
            images = image[None] if depth is None else lax.with_sharding_constraint(image[None], depth)
            context = None if maps is None else _window(maps, under, context_size)[None]
            z, y, x = weights
            weight = z[:, None, None] * y[:, None] * x
            if mirror.size:
                images = jnp.concatenate([images, images[..., ::-1]])
                if context is not None:
                    context = jnp.concatenate([context, context[..., ::-1, mirror]])
                logits = model.level(level, images, context)
                turned_back = logits[1][:, :, ::-1, mirror]
                blended = _weighted_softmax(logits[0], weight / 2) + _weighted_softmax(turned_back, weight / 2)
            else:
                blended = _weighted_softmax(model.level(level, images, context)[0], weight)
            where, added = (*corner, 0), []
            for number, slab in enumerate(slabs):
                part = blended[number * descent : (number + 1) * descent]
                added.append(lax.dynamic_update_slice(slab, lax.dynamic_slice(slab, where, part.shape) + part, where))
            return tuple(added)

        return add_tile


class _Context:
    """The coarser level's maps about a row of tiles: as few chunks as always hold them, moving down with the rows."""

    def __init__(self, chunks: Chunks, axes: LevelTiles, tile: Triple, descent: int, spatial_dims: int, sharding: Any):
        self._source, self._axes, self._descent, self._spatial_dims = chunks, axes, descent, spatial_dims
        self._sharding = sharding
        self._depth = _context_size(tile, spatial_dims)[0]
        self._count = (self._depth + descent - 2) // descent + 1  # the first of them may begin at a chunk's last plane
        self._held: collections.deque[jax.Array] = collections.deque(maxlen=self._count)
        self._end = int(axes[0].starts[0])  # of the chunks held, level voxels

    def under(self, start: Triple) -> tuple[tuple[jax.Array, ...], np.ndarray]:
        """The chunks, and where the context of a tile that starts at `start` of the finer level lies in them."""
        # With a halo of one voxel where the level halves.
        halves = [step == 2 for step in halving(self._spatial_dims)]
        first = np.array([s // 2 - 1 if half else s for s, half in zip(start, halves, strict=True)], np.int32)
        while self._end < first[0] + self._depth:
            z, chunk = next(self._source)
            self._held.append(jax.device_put(jnp.array(chunk, Predictor.MAPS), self._sharding))
            self._end = z + self._descent
        # Short of chunks at the top: the first stands in for those that would lie above it.
        held = (self._held[0],) * (self._count - len(self._held)) + tuple(self._held)
        origin = (self._end - self._count * self._descent, *(int(axis.starts[0]) for axis in self._axes[1:]))
        return held, first - np.array(origin, np.int32)


def _context_size(tile: Triple, spatial_dims: int) -> Triple:
    """Voxels of the coarser level under a tile, with the halo of one that upsampling consumes; in 2D in plane."""
    z, y, x = tile
    return (z // 2 + 2 if spatial_dims == 3 else z), y // 2 + 2, x // 2 + 2


def _window(maps: tuple[jax.Array, ...], first: jax.Array, size: Triple) -> jax.Array:
    """[*size, K] at `first` [3] of arrays [n, y, x, K] one below the other."""
    below = [lax.dynamic_slice(m, (0, first[1], first[2], 0), (m.shape[0], *size[1:], m.shape[3])) for m in maps]
    return lax.dynamic_slice_in_dim(jnp.concatenate(below), first[0], size[0])


def _weighted_softmax(logits: jax.Array, weights: jax.Array) -> jax.Array:
    """Softmax over the last axis of [z, y, x, K], times [z, y, x].

    Few classes one by one: on the CPU XLA takes up to 2.5 times as long to reduce over an axis of 4 or 8.
    """
    if logits.shape[-1] >= 16:
        return jax.nn.softmax(logits) * weights[..., None]
    classes = range(logits.shape[-1])
    powers = jnp.exp(logits - functools.reduce(jnp.maximum, (logits[..., k] for k in classes))[..., None])
    return powers * (weights / functools.reduce(operator.add, (powers[..., k] for k in classes)))[..., None]


def crop(volume: np.ndarray, start: tuple[int, ...], size: tuple[int, ...], fill: int) -> np.ndarray:
    """A copy of `volume[start : start + size]` along its axes, `fill` where that leaves the volume."""
    out = np.full(size, fill, volume.dtype)
    source = tuple(slice(max(0, s), max(0, s + n)) for s, n in zip(start, size, strict=True))
    inside = volume[source]
    target = tuple(slice(max(0, -s), max(0, -s) + n) for s, n in zip(start, inside.shape, strict=True))
    out[target] = inside
    return out


def _shape(volume: np.ndarray) -> Triple:
    depth, height, width = volume.shape
    return depth, height, width
