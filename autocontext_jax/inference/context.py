"""The context of a row of tiles: maps of the next coarser level, drawn chunk by chunk as the rows advance along z."""

import collections
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autocontext_jax.geometry import Triple
from autocontext_jax.inference.tiling import LevelTiles, tile_shape

# Finished maps of a level, see `predictor`: the first plane along z in voxels of the level, and
# [chunk, canvas height, canvas width, K].
Chunks = Iterator[tuple[int, jax.Array]]

# Precision of the maps of a level, in which tiles are added up and which it passes to the next finer level.
MAP_DTYPE = jnp.float16


class ContextWindow:
    """The chunks of the coarser level that contain the context of the current row of tiles.

    The number of chunks is fixed, so that the program for a tile is compiled once.

    Args:
      chunks: the generator of the coarser level.
      axes: the tiles of the coarser level.
      finer: the tiles of this level.
      step: voxels of this level for one of the coarser level along each axis, 1 or 2.
      sharding: of the maps; None on a single device.
    """

    def __init__(self, chunks: Chunks, axes: LevelTiles, finer: LevelTiles, step: Triple, sharding: Any):
        chunk = axes[0].chunk
        self._source, self._axes, self._chunk, self._step = chunks, axes, chunk, step
        self._sharding = sharding
        self._depth = context_size(tile_shape(finer), step)[0]
        # In the worst case the context starts at the last plane of the first chunk.
        self._count = (self._depth + chunk - 2) // chunk + 1
        self._held: collections.deque[jax.Array] = collections.deque(maxlen=self._count)
        self._end = int(axes[0].starts[0])  # end of the chunks along z, in voxels of the coarser level

    def move_to(self, row_start: Triple) -> tuple[tuple[jax.Array, ...], np.ndarray]:
        """Draws chunks until they cover the context of a row.

        Args:
          row_start: first voxel of the row's first tile, in voxels of the finer level.

        Returns:
          The chunks, and the first voxel [3] of the first tile's context in them.
        """
        # Where the finer level halves the voxels, the context includes one voxel more on each side for the upsampling.
        places = [s // 2 - 1 if by == 2 else s for s, by in zip(row_start, self._step, strict=True)]
        first = np.array(places, np.int32)
        while self._end < first[0] + self._depth:
            z, chunk = next(self._source)
            # A copy, because the generator uses the chunk's memory again.
            self._held.append(jax.device_put(jnp.array(chunk), self._sharding))
            self._end = z + self._chunk
        # At the first rows there are fewer chunks; copies of the first fill the places before it, which nothing reads.
        held = (self._held[0],) * (self._count - len(self._held)) + tuple(self._held)
        origin = (self._end - self._count * self._chunk, *(int(axis.starts[0]) for axis in self._axes[1:]))
        return held, first - np.array(origin, np.int32)


def context_size(tile: Triple, step: Triple) -> Triple:
    """Shape of a tile's context in voxels of the coarser level, with the voxel on each side that upsampling needs."""
    z, y, x = (size // 2 + 2 if by == 2 else size for size, by in zip(tile, step, strict=True))
    return z, y, x


def cut_window(chunks: tuple[jax.Array, ...], first: jax.Array, size: Triple) -> jax.Array:
    """Cuts a window out of consecutive chunks.

    Args:
      chunks: [n, canvas height, canvas width, K] each.
      first: [3], first voxel of the window.
      size: (z, y, x) of the window.

    Returns:
      [*size, K].
    """
    columns = [lax.dynamic_slice(c, (0, first[1], first[2], 0), (c.shape[0], *size[1:], c.shape[3])) for c in chunks]
    return lax.dynamic_slice_in_dim(jnp.concatenate(columns), first[0], size[0])
