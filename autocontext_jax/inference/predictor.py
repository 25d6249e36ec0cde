"""Predicts masks of whole scans in overlapping tiles.

Streams z-slabs through all levels; the device's memory does not depend on the scan's length.

How one level is predicted:

1. Overlapping tiles on a regular grid cover the level (`tiling`). Tiles with the same start along z form a row. Rows
   are predicted in the order of z; the distance between the starts of two rows is the z stride.
2. The device holds slabs: arrays of one z stride in depth, as high and wide as all tiles of a row together (the
   canvas). As many consecutive slabs are kept as the depth of a tile needs. The softmax maps of each tile, times its
   blending weights, are added to them.
3. After a row, no later tile reaches the first slab, so the maps in it are finished. They leave as a chunk. The memory
   of the slab is then set to zero and becomes the last slab.

How the levels are connected:

1. Each level is a Python generator of chunks.
2. Before each row, the generator draws chunks from that of the next coarser level until they contain the context of
   the row, and drops older ones (`context`).
3. On its way a chunk also passes through the level's `masks.MaskWriter`, if the mask of this level is requested.
4. `Predictor.masks` runs the generator of the finest level, which drives all others.

So each level holds the slabs and the context of one row. The host holds the scan, its downsampled images and the masks.

Sizes of arrays on the device follow from the tiles and the canvas. With cubes they depend on the configuration, not on
the scan, up to `PredictorConfig.plane`; with boxes scans of similar sizes share them. So programs are seldom compiled.
The loop over tiles only queues work; a mask writer waits for a chunk after the next one's work has been queued.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from autocontext_jax.data.resampling import downsample_image
from autocontext_jax.data.store.level_grids import AIR
from autocontext_jax.geometry import Triple, level_shape
from autocontext_jax.inference.boxes import FITS, SMALLEST, Box, choose_box
from autocontext_jax.inference.context import Chunks, ContextWindow, context_size, cut_window
from autocontext_jax.inference.masks import MaskWriter, native_maps, native_masks, weighted_softmax
from autocontext_jax.inference.tile_memory import bytes_a_voxel, free_bytes
from autocontext_jax.inference.tiling import (
    SLICES,
    Blend,
    LevelTiles,
    PredictorConfig,
    crop,
    cubes,
    gaussian,
    largest_extents,
    pyramid_tiles,
    tile_shape,
)
from autocontext_jax.models.pyramid import Pyramid
from autocontext_jax.runtime import compiler_options


class Predictor:
    """Predicts masks of scans of any size with a trained pyramid.

    Args:
      model: a pyramid in inference mode, as `state.inference_model` returns it.
      config: how scans are divided into tiles.
      align: starts of tiles are multiples of this number, the network's divisor.
      blend: weights along an axis of a tile; Gaussian by default.
      mirror_classes: if given, every tile is predicted twice, once mirrored left to right, and the maps are averaged.
        Entry k is the class that class k becomes in the mirror image, see `geometry.SpatialLimits`.
    """

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
        self._align = max(2, align)
        self._spatial_dims: int = model.config.spatial_dims
        self._cubes = config.tile > 0 or blend is not None
        if self._cubes:
            self._blend = gaussian(config.tile) if blend is None else blend
            useful = config.tile - 2 * self._blend.border
            self._stride = max(1, int(useful * (1 - config.overlap)) // self._align) * self._align
        # A single device needs no mesh: programs run on the device that holds their arguments.
        self._mesh: Mesh | None = None
        self._whole: NamedSharding | None = None
        self._slab_sharding: NamedSharding | None = None
        if config.space > 1:
            devices = jax.local_devices()[: config.space]
            self._mesh = jax.make_mesh((config.space,), ("space",), axis_types=(AxisType.Auto,), devices=devices)
            self._whole = NamedSharding(self._mesh, PartitionSpec())
            even = (self._stride if self._spatial_dims == 3 else SLICES) % config.space == 0
            self._slab_sharding = NamedSharding(self._mesh, PartitionSpec("space")) if even else self._whole
        self._graph, state = nnx.split(model)
        self._state = jax.device_put(state, self._whole)
        self._levels: int = model.config.levels
        self._classes: int = model.config.classes
        self._plane = config.plane
        self._canvas: list[tuple[int, int]] = [(0, 0)] * self._levels  # height and width at each level
        # Sets a slab to zero in place: the argument is donated.
        self._clear = jax.jit(jnp.zeros_like, donate_argnums=0, keep_unused=True, out_shardings=self._slab_sharding)
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
          voxels: [D, H, W] int16, HU, in canonical orientation.
          factors: for each level, coarsest first, voxels of the scan per voxel of the level along (z, y, x).
          levels: the levels to return masks of, 1 = coarsest; None or () means the finest.
          progress: called after each row with the number of tiles queued so far and the total number of tiles.

        Returns:
          {level: mask}, each mask [D, H, W] uint8 on the scan's grid.
        """
        writers = self._predict(voxels, factors, levels or (self._levels,), progress)
        return {level: writer.mask() for level, writer in writers.items()}

    def mask_and_maps(
        self,
        voxels: np.ndarray,
        factors: tuple[tuple[float, float, float], ...],
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predicts one scan at the finest level; arguments as `masks`.

        Returns:
          The mask [D, H, W] uint8 and the softmax maps [D, H, W, K] float32, on the scan's grid.
        """
        writer = self._predict(voxels, factors, (self._levels,), progress, keep_maps=True)[self._levels]
        return writer.mask(), writer.maps()

    def _predict(
        self,
        voxels: np.ndarray,
        factors: tuple[tuple[float, float, float], ...],
        requested: tuple[int, ...],
        progress: Callable[[int, int], None],
        *,
        keep_maps: bool = False,
    ) -> dict[int, MaskWriter]:
        # Tiles follow from the finest grid alone: coarser grids have half its voxels, so that contexts nest exactly.
        finest = level_shape(_shape(voxels), factors[-1])
        choose = cubes(self._blend, self._stride) if self._cubes else self._boxes
        plan = pyramid_tiles(finest, self._levels, choose, align=self._align, spatial_dims=self._spatial_dims)
        plan = plan[: max(requested)]
        if self._cubes:
            self._grow_canvas(_shape(voxels), factors[-1])
            plane = self._plane, self._plane
        else:
            self._canvas = [(y.extent, x.extent) for _, y, x in plan]
            plane = -(-voxels.shape[1] // 64) * 64, -(-voxels.shape[2] // 64) * 64  # similar sizes share a program
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
                context = ContextWindow(streams[-1], plan[level - 2], plan[level - 1], self._spatial_dims, self._whole)
            chunks = self._chunks(level, image, axes, context, advance)
            if level in requested:
                writers[level] = MaskWriter(
                    _shape(voxels), _shape(image), factor, axes, plane,
                    classes=self._classes if keep_maps else 0,
                )  # fmt: skip
                chunks = writers[level].record(chunks)
            streams.append(chunks)
        # Running the finest level's generator drives the others. Afterwards each coarser level is run to its end, for
        # the part of its mask that no context needed.
        for chunks in reversed(streams):
            collections.deque(chunks, maxlen=0)
        return writers

    def _boxes(self, regions: Sequence[tuple[int, int]]) -> list[tuple[Blend, int]]:
        """The tiles of a level, see `boxes`."""
        flat = [(0, SLICES)] * (3 - len(regions))  # in 2D a tile is a stack of squares

        def fits(box: Box, extent: Triple) -> bool:
            voxels, (depth, *_) = int(np.prod(box.size)), box.size
            slabs = -(-depth // box.stride[0]) * box.stride[0] * extent[1] * extent[2] * self._classes * 4
            return voxels <= FITS or voxels * self._bytes_a_voxel + slabs <= self._limit

        box = choose_box([*flat, *regions], margin=self.config.margin, align=self._align, fits=fits)
        return list(zip(box.blends, box.stride, strict=True))[len(flat) :]

    @functools.cached_property
    def _limit(self) -> float:
        """Bytes that a tile may take on the device."""
        return 1e9 * self.config.memory if self.config.memory else free_bytes()

    @functools.cached_property
    def _bytes_a_voxel(self) -> float:
        """Bytes that a tile's program takes for each of its voxels at the finest level."""
        edge = -(-SMALLEST // self._align) * self._align
        tile = (edge if self._spatial_dims == 3 else SLICES, edge, edge)
        context = context_size(tile, self._spatial_dims) if self._levels > 1 else None
        return bytes_a_voxel(self._add_tile[-1], self._state, tile, context, self._classes)

    def compilations(self) -> int:
        """Number of programs compiled so far; it should stay the same from the second scan on."""
        jitted: list[Any] = [*self._add_tile, self._clear, native_masks, native_maps]
        return sum(program._cache_size() for program in jitted)

    def _grow_canvas(self, shape: Triple, factors: tuple[float, float, float]) -> None:
        """Makes the canvas of each level large enough for this scan and for all scans up to `plane`.

        It never shrinks, since every other size means another compilation.

        Args:
          shape: (D, H, W) of the scan.
          factors: voxels of the scan per voxel of the finest level.
        """
        plane = max(shape[1:])
        if plane > self._plane:
            self._plane = -(-plane // 64) * 64
        # Height and width at the finest level of a scan as large as `plane`, with the factors of this scan.
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
        context: ContextWindow | None,
        advance: Callable[[int], None] = lambda tiles: None,
    ) -> Chunks:
        """Predicts one level row by row and yields its finished maps in the order of z.

        A chunk is only valid until the next one is drawn: its memory is used again.

        Args:
          level: 1 = coarsest.
          image: [D, H, W] int16, HU, the scan on the level's grid.
          axes: the tiles of the level.
          context: maps of the coarser level; None at level 1.
          advance: called after each row with its number of tiles.
        """
        z_axis, y_axis, x_axis = axes
        size, z_stride = tile_shape(axes), z_axis.stride
        slabs = tuple(
            jnp.zeros((z_stride, *self._canvas[level - 1], self._classes), jnp.float32, device=self._slab_sharding)
            for _ in range(-(-size[0] // z_stride))
        )
        for z_start, z_weights in zip(z_axis.starts, z_axis.weights, strict=True):
            row_start = (int(z_start), int(y_axis.starts[0]), int(x_axis.starts[0]))
            maps, row_offset = (None, None) if context is None else context.move_to(row_start)
            for y_start, y_weights in zip(y_axis.starts, y_axis.weights, strict=True):
                for x_start, x_weights in zip(x_axis.starts, x_axis.weights, strict=True):
                    tile = crop(image, (row_start[0], int(y_start), int(x_start)), size, AIR)
                    place = np.array([0, y_start - row_start[1], x_start - row_start[2]], np.int32)
                    offset = None if row_offset is None else row_offset + place // 2
                    weights = (z_weights, y_weights, x_weights)
                    with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
                        slabs = self._add_tile[level - 1](slabs, self._state, tile, maps, weights, place, offset)
            advance(len(y_axis.starts) * len(x_axis.starts))
            # The first slab is finished; after the last row, all slabs that reach into the covered region.
            count = 1 if z_start != z_axis.starts[-1] else -(-(z_axis.high - row_start[0]) // z_stride)
            for number in range(count):
                finished, *others = slabs
                yield row_start[0] + number * z_stride, finished
                slabs = (*others, self._clear(finished))

    def _make_add_tile(self, level: int):
        """The jitted program that predicts one tile of a level."""
        graph, mirror, spatial_dims = self._graph, np.array(self._mirror_classes, int), self._spatial_dims
        depth = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec(None, "space"))

        @functools.partial(
            jax.jit,
            donate_argnums=0,
            out_shardings=self._slab_sharding,
            compiler_options=compiler_options(jax.default_backend()),
        )
        def add_tile(slabs, state, image, maps, weights, place, offset):
            """Predicts one tile of a row and adds its weighted softmax maps to the slabs.

            Args:
              slabs: arrays [z stride, canvas height, canvas width, K], consecutive along z.
              state: of the model.
              image: [T, T, T] int16, HU; in 2D [SLICES, T, T].
              maps: consecutive chunks of the coarser level that contain the context of the row; None at level 1.
              weights: along z, y and x, [T] each; in 2D along z [SLICES].
              place: [3], first voxel of the tile in the slabs, (0, y, x).
              offset: [3], first voxel of the tile's context in `maps`; None at level 1.

            Returns:
              The slabs, in the same memory.
            """
            model: Pyramid = nnx.merge(graph, state, copy=True)
            images = image[None] if depth is None else lax.with_sharding_constraint(image[None], depth)
            size = context_size(_shape(image), spatial_dims)
            context = None if maps is None else cut_window(maps, offset, size)[None]
            z_stride = slabs[0].shape[0]
            z, y, x = weights
            weight = z[:, None, None] * y[:, None] * x
            if mirror.size:
                images = jnp.concatenate([images, images[..., ::-1]])
                if context is not None:
                    context = jnp.concatenate([context, context[..., ::-1, mirror]])
                logits = model.level(level, images, context)
                mirrored_back = logits[1][:, :, ::-1, mirror]
                blended = weighted_softmax(logits[0], weight / 2) + weighted_softmax(mirrored_back, weight / 2)
            else:
                blended = weighted_softmax(model.level(level, images, context)[0], weight)
            start, added = (*place, 0), []
            for number, slab in enumerate(slabs):
                part = blended[number * z_stride : (number + 1) * z_stride]
                added.append(lax.dynamic_update_slice(slab, lax.dynamic_slice(slab, start, part.shape) + part, start))
            return tuple(added)

        return add_tile


def _shape(volume: Any) -> Triple:
    depth, height, width = volume.shape
    return depth, height, width
