"""Predicts masks of whole scans in overlapping tiles.

Streams z-slabs through all levels. Beyond the depth of the largest tiles, the device's memory does not depend on the
scan's length.

How one level is predicted:

1. Overlapping tiles on a regular grid cover the part of the level that is needed (`tiling`): at the finest level the
   box around the body (`body`). Tiles with the same start along z form a row. Rows are predicted in the order of z; the
   distance between the starts of two rows is the z stride.
2. The device holds slabs: arrays of one chunk in depth, as high and wide as all tiles of a row together (the canvas).
   There are as many consecutive slabs as the depth of a tile needs. The maps of each tile, times its blending
   weights, are added to them.
3. After a row, no later tile reaches the first slabs, one z stride of them, so the maps in them are finished. Each
   leaves as a chunk. Its memory is then set to zero and becomes the last slab.

How the levels are connected:

1. Each level is a Python generator of chunks.
2. Before each row, the generator draws chunks from that of the next coarser level until they contain the context of
   the row, and drops older ones (`context`).
3. On its way a chunk also passes through the level's `masks.MaskWriter`, if the mask of this level is requested.
4. `Predictor.masks` runs the generator of the finest level, which drives all others.

So each level holds the slabs and the context of one row. The host holds the scan, its downsampled images and the masks.

Sizes of arrays on the device follow from the tiles and the canvas, which scans with bodies of similar sizes share; they
share their compiled programs too. The loop over tiles only queues work; a mask writer waits for a chunk after the next
one's work has been queued. With several devices in this process each takes one tile of a row at a time; those for which
the row has none repeat another.
"""

import collections
import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from autocontext_jax.data.body import THRESHOLD
from autocontext_jax.data.resampling import downsample_image
from autocontext_jax.geometry import Triple, product
from autocontext_jax.inference.boxes import SMALLEST
from autocontext_jax.inference.context import MAP_DTYPE, Chunks, ContextWindow
from autocontext_jax.inference.masks import MaskWriter, native_maps, native_masks
from autocontext_jax.inference.scan_tiles import ScanTiles
from autocontext_jax.inference.tile_memory import bytes_a_voxel
from autocontext_jax.inference.tile_programs import ONCE, Mirroring, add_tile, clear, make_tile_program, shape_of
from autocontext_jax.inference.tiling import (
    SLICES,
    LevelTiles,
    MakeBlend,
    PredictorConfig,
    crop,
    gaussian,
    tile_shape,
)
from autocontext_jax.models.ensemble import Ensemble
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig

log = logging.getLogger(__name__)


class Predictor:
    """Predicts masks of scans of any size with a trained pyramid.

    Attributes:
      tiles: divides scans into tiles.

    Args:
      model: a pyramid in inference mode, as `state.inference_model` returns it, or an ensemble of them.
      config: how scans are divided into tiles.
      align: starts of tiles along each axis are multiples of it, see `pyramid.divisor`.
      blend: weights along an axis of a tile; Gaussian by default.
      mirroring: whether every tile is predicted as its mirror images too. Its classes are those of `SpatialRanges`; of
        regions they are counted from 0, since the network has no map of the background.
    """

    def __init__(
        self,
        model: Pyramid | Ensemble,
        config: PredictorConfig,
        *,
        align: Triple,
        blend: MakeBlend = gaussian,
        mirroring: Mirroring = ONCE,
    ):
        self._pyramid: PyramidConfig = model.config
        self._levels, self._classes = self._pyramid.levels, self._pyramid.classes
        self._seen = [math.isfinite(spacing) for spacing in self._pyramid.spacing]
        # Starts are even along axes that levels halve; those of boxes along all, so that sizes are few.
        even = self._seen if config.boxes else [by > 1 for by in product(self._pyramid.steps)]
        z, y, x = (max(1 + two, along) for two, along in zip(even, align, strict=True))
        self._align = z, y, x
        self.tiles = ScanTiles(config, self._pyramid, align=self._align, blend=blend, bytes_a_voxel=self._bytes_a_voxel)
        devices = jax.local_devices()
        # A single device needs no mesh: programs run on the device that holds their arguments.
        self._mesh, self._whole = None, None
        if len(devices) > 1:
            self._mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
            self._whole = NamedSharding(self._mesh, PartitionSpec())
        self._first, self._together = devices[0], len(devices)
        graph, state = nnx.split(model)
        self._state = jax.device_put(state, self._whole)
        self._programs = [
            make_tile_program(graph, level, mirroring=mirroring, mesh=self._mesh)
            for level in range(1, self._levels + 1)
        ]

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
          voxels: [C, D, H, W] as stored, see `images.spec`, in canonical orientation.
          factors: for each level, coarsest first, voxels of the scan per voxel of the level along (z, y, x).
          levels: the levels to return masks of, 1 = coarsest; None or () means the finest.
          progress: called after each row with the number of tiles queued so far and the total number of tiles.

        Returns:
          {level: mask}, each mask [D, H, W] uint8 on the scan's grid: numbers of classes; of regions the number, from
          1, of the last that holds the voxel, or 0.

        Raises:
          UserError: the device's memory is too small for the smallest tile.
        """
        levels = levels or (self._levels,)
        writers = self._predict(voxels, factors, levels, progress)
        if writers is None:
            return {level: np.zeros(voxels.shape[1:], np.uint8) for level in levels}
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
          The mask [D, H, W] uint8 and the maps [D, H, W, K] float32, on the scan's grid.
        """
        writers = self._predict(voxels, factors, (self._levels,), progress, keep_maps=True)
        if writers is None:
            native = voxels.shape[1:]
            maps = np.zeros((*native, self._classes), np.float32)
            if self._pyramid.activation == "softmax":
                maps[..., 0] = 1
            return np.zeros(native, np.uint8), maps
        return writers[self._levels].mask(), writers[self._levels].maps()

    def compilations(self) -> int:
        """Number of programs compiled so far; it stays the same for further scans of the same size."""
        jitted: list[Any] = [*self._programs, add_tile, clear, native_masks, native_maps]
        return sum(program._cache_size() for program in jitted)

    def _predict(
        self,
        voxels: np.ndarray,
        factors: tuple[tuple[float, float, float], ...],
        requested: tuple[int, ...],
        progress: Callable[[int, int], None],
        *,
        keep_maps: bool = False,
    ) -> dict[int, MaskWriter] | None:
        """Each requested level's writer after all chunks; None if the scan holds nothing but air."""
        images = [downsample_image(voxels, factor) for factor in factors[: max(requested)]]
        classes = self._classes if keep_maps else 0
        native, ct = shape_of(voxels[0]), self._pyramid.image.ct
        coarsest = images[0][ct[0]] if ct else None
        while True:
            planned = self.tiles.plan(native, factors, coarsest)
            if planned is None:
                log.warning("the scan holds no body: nothing in it is above %d HU, its mask is background", THRESHOLD)
                return None
            tiles, box = planned
            writers = {
                level: MaskWriter(
                    native, box, shape_of(images[level - 1][0]), factors[level - 1], tiles[level - 1],
                    classes=classes, activation=self._pyramid.activation,
                )
                for level in requested
            }  # fmt: skip
            try:
                self._run(images, tiles[: len(images)], writers, progress)
                return writers
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                self.tiles.shrink(tiles)

    def _run(
        self,
        images: list[np.ndarray],
        tiles: tuple[LevelTiles, ...],
        writers: dict[int, MaskWriter],
        progress: Callable[[int, int], None],
    ) -> None:
        """Predicts all levels; the writers of those that are requested record them."""
        done, total = 0, sum(math.prod(len(axis.starts) for axis in axes) for axes in tiles)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        streams: list[Chunks] = []
        for level, (image, axes) in enumerate(zip(images, tiles, strict=True), start=1):
            context = None
            if streams:
                step = self._pyramid.steps[level - 1]
                context = ContextWindow(streams[-1], tiles[level - 2], axes, step, self._whole)
            chunks = self._chunks(level, image, axes, context, advance)
            streams.append(writers[level].record(chunks) if level in writers else chunks)
        # Running the finest level's generator drives the others. Afterwards each coarser level is run to its end, for
        # the part of its mask that no context needed.
        for chunks in reversed(streams):
            collections.deque(chunks, maxlen=0)
        for writer in writers.values():
            writer.mask()  # waits for the device, so that its errors are raised here

    def _bytes_a_voxel(self) -> float:
        """Bytes that a tile's program takes for each of its voxels at the finest level."""
        z, y, x = (
            -(-SMALLEST // along) * along if seen else SLICES
            for along, seen in zip(self._align, self._seen, strict=True)
        )
        with self._on_devices():
            return bytes_a_voxel(
                self._programs[-1], self._state, (z, y, x), pyramid=self._pyramid, level=self._levels,
                devices=self._together,
            )  # fmt: skip

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
          image: [C, D, H, W], the scan on the level's grid.
          axes: the tiles of the level.
          context: maps of the coarser level; None at level 1.
          advance: called after each row with its number of tiles.
        """
        z_axis, y_axis, x_axis = axes
        size, chunk = tile_shape(axes), z_axis.chunk
        slabs = tuple(
            jnp.zeros((chunk, y_axis.extent, x_axis.extent, self._classes), MAP_DTYPE, device=self._first)
            for _ in range(-(-size[0] // chunk))
        )
        for z_start, z_weights in zip(z_axis.starts, z_axis.weights, strict=True):
            row_start = (int(z_start), int(y_axis.starts[0]), int(x_axis.starts[0]))
            maps, row_offset = (None, None) if context is None else context.move_to(row_start)
            row = [
                _Tile(
                    start=(row_start[0], int(y_start), int(x_start)),
                    place=np.array([0, y_start - row_start[1], x_start - row_start[2]], np.int32),
                    weights=(z_weights, y_weights, x_weights),
                )
                for y_start, y_weights in zip(y_axis.starts, y_axis.weights, strict=True)
                for x_start, x_weights in zip(x_axis.starts, x_axis.weights, strict=True)
            ]
            for number in range(0, len(row), self._together):
                group = row[number : number + self._together]
                found = self._predict_tiles(level, image, group, size, maps, row_offset)
                for tile, tile_maps in zip(group, found, strict=True):
                    slabs = add_tile(slabs, tile_maps, tile.place[1:])
            advance(len(row))
            # The first slabs are finished; after the last row, all that reach into the covered region.
            planes = z_axis.stride if z_start != z_axis.starts[-1] else z_axis.high - row_start[0]
            for number in range(-(-planes // chunk)):
                finished, *others = slabs
                yield row_start[0] + number * chunk, finished
                slabs = (*others, clear(finished))

    def _predict_tiles(
        self,
        level: int,
        image: np.ndarray,
        tiles: Sequence["_Tile"],
        size: Triple,
        maps: tuple[jax.Array, ...] | None,
        row_offset: np.ndarray | None,
    ) -> list[jax.Array]:
        """Each tile's weighted maps, [1, z, y, x, K], on the first device.

        Args:
          level: 1 = coarsest.
          image: as `_chunks`.
          tiles: as many as there are devices, or fewer.
          size: voxels of a tile.
          maps: of the coarser level, see `context`; None at level 1.
          row_offset: first voxel [3] of the context of the row's first tile in them.
        """
        images = [crop(image, tile.start, size, self._pyramid.image.padding) for tile in tiles]
        # Devices for which no tile is left repeat the last one.
        places = [*range(len(tiles)), *[len(tiles) - 1] * (self._together - len(tiles))]
        stacked = images[0][None] if len(places) == 1 else np.stack([images[place] for place in places])
        z, y, x = (np.stack([tiles[place].weights[axis] for place in places]) for axis in range(3))
        offsets = None
        if row_offset is not None:
            step = np.array(self._pyramid.steps[level - 1], np.int32)
            offsets = np.stack([row_offset + tiles[place].place // step for place in places])
        with self._on_devices():
            found = self._programs[level - 1](self._state, stacked, maps, (z, y, x), offsets)
        if self._mesh is None:
            return [found]
        shards = sorted(found.addressable_shards, key=lambda shard: shard.index[0].start)
        return [jax.device_put(shard.data, self._first) for shard in shards[: len(tiles)]]

    def _on_devices(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A tile of a row.

    Attributes:
      start: its first voxel, of the level's grid.
      place: [3], the same from the start of the row's first tile.
      weights: along z, y, x.
    """

    start: Triple
    place: np.ndarray
    weights: tuple[np.ndarray, np.ndarray, np.ndarray]
