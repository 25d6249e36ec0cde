"""Turns the maps of a level into a mask on the scan's own grid.

The maps arrive in chunks of z-planes, in the order of z. The device interpolates them to the scan's grid and takes the
class with the largest value, or of regions the last above one half, a few planes at a time, so the K maps never exist
at full resolution as a whole.
"""

import functools
import math
import operator
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autocontext_jax.geometry import Triple
from autocontext_jax.inference.tiling import LevelTiles, native_lookup
from autocontext_jax.models.activations import last_region

# Planes of the scan that one call of `native_masks` computes.
GROUP = 8
# Height and width of these planes are multiples of it, so that scans of similar sizes share the program.
ROUNDED = 64


class MaskWriter:
    """Computes the mask of one level, chunk by chunk.

    Args:
      native: (D, H, W) of the scan.
      box: voxels [low, high) of the scan to compute along z, y, x; the others are background: softmax maps of 1, 0,
        ..., sigmoid maps of 0.
      level: (D, H, W) of the level's grid over the scan.
      factor: the scan's voxels per voxel of the level along (z, y, x).
      axes: the tiles of the level, which determine where its maps start and end.
      classes: K, to keep the maps on the scan's grid too, see `maps`; 0 not to.
      activation: that gave the maps, see `activations`.
    """

    def __init__(
        self,
        native: Triple,
        box: Sequence[tuple[int, int]],
        level: Triple,
        factor: tuple[float, float, float],
        axes: LevelTiles,
        *,
        classes: int = 0,
        activation: str = "softmax",
    ):
        self._mask = np.zeros(native, np.uint8)
        self._maps = np.zeros((*native, classes), np.float32)
        if activation == "softmax":
            self._maps[..., :1] = 1
        self._activation = activation
        self._box = tuple(slice(*interval) for interval in box)
        (self._z_low, self._z_weight), *in_plane = (
            [values[inside] for values in native_lookup(n, f, size)]
            for n, f, size, inside in zip(native, factor, level, self._box, strict=True)
        )
        self._in_plane: list[np.ndarray] = []
        for (low, weight), axis in zip(in_plane, axes[1:], strict=True):
            size = -(-len(low) // ROUNDED) * ROUNDED
            self._in_plane += [_padded(low - int(axis.starts[0]), size), _padded(weight, size)]
        self._high = axes[0].high
        self._reach = math.ceil(GROUP / factor[0]) + 2
        self._next_plane = 0  # of the box, the first that has not been computed
        self._last_of_previous: jax.Array | None = None  # the last plane of the chunk before
        # First plane, end, masks and, if they are kept, maps that the device computes.
        self._pending: list[tuple[int, int, jax.Array, jax.Array | None]] = []

    def record(self, chunks: Iterator[tuple[int, jax.Array]]) -> Iterator[tuple[int, jax.Array]]:
        """Yields the chunks of a level unchanged and adds each to the mask on the way."""
        for z, chunk in chunks:
            self.add(z, chunk)
            yield z, chunk

    def add(self, z: int, chunk: jax.Array) -> None:
        """Starts to compute the planes of the mask that the maps up to this chunk determine.

        Then copies the planes of the chunk before to the host. Only this waits for the device, which has the work of
        the new chunk in its queue meanwhile.

        Args:
          z: first plane of the chunk, in voxels of the level.
          chunk: [n, canvas height, canvas width, K], maps; see `predictor` for the canvas.
        """
        before = chunk[:1] if self._last_of_previous is None else self._last_of_previous
        # A copy, because the chunk's memory is used again; a single plane would be the chunk itself.
        self._last_of_previous = jnp.array(chunk[-1:])
        # A plane of the scan lies between two planes of the level and needs both. After the last chunk all are there.
        chunk_end = z + chunk.shape[0]
        end = int(np.searchsorted(self._z_low, chunk_end - 1)) if chunk_end < self._high else len(self._z_low)
        started = []
        for first in range(self._next_plane, end, GROUP):
            last = min(first + GROUP, end)
            z_low = _padded(self._z_low[first:last] - z, GROUP)
            z_weight = _padded(self._z_weight[first:last], GROUP)
            place = (before, chunk, z_low, z_weight, *self._in_plane)
            reach = min(self._reach, chunk.shape[0])
            how = {"reach": reach, "activation": self._activation}
            planes = native_masks(*place, **how)
            maps = native_maps(*place, **how) if self._maps.size else None
            planes.copy_to_host_async()
            started.append((first, last, planes, maps))
        self._next_plane = max(self._next_plane, end)
        self._collect()
        self._pending = started

    def mask(self) -> np.ndarray:
        """The mask, [D, H, W] uint8. Call it after all chunks have been added."""
        self._collect()
        return self._mask

    def maps(self) -> np.ndarray:
        """The maps on the scan's grid, [D, H, W, K] float32. Call it after all chunks have been added."""
        self._collect()
        return self._maps

    def _collect(self) -> None:
        """Waits for the pending planes and writes them into the mask."""
        mask, kept = self._mask[self._box], self._maps[self._box]
        _, height, width = mask.shape
        for first, last, planes, maps in self._pending:
            mask[first:last] = np.asarray(planes)[: last - first, :height, :width]
            if maps is not None:
                kept[first:last] = np.asarray(maps)[: last - first, :height, :width]
        self._pending = []


@functools.partial(jax.jit, static_argnames=("reach", "activation"))
def native_masks(*place: jax.Array, reach: int, activation: str = "softmax") -> jax.Array:
    """Of maps at voxels of the scan the class with the largest value, [GROUP, height, width] uint8.

    Of regions it is the number, from 1, of the last above one half, see `activations.last_region`.
    """

    def finish(maps):
        if activation == "sigmoid":
            return last_region(maps > 0.5)
        return jnp.argmax(maps, axis=-1).astype(jnp.uint8)

    return _plane_by_plane(finish, *place, reach=reach)


@functools.partial(jax.jit, static_argnames=("reach", "activation"))
def native_maps(*place: jax.Array, reach: int, activation: str = "softmax") -> jax.Array:
    """Maps interpolated linearly to voxels of the scan, [GROUP, height, width, K] float32; see `_plane_by_plane`.

    Tiles are added in half precision, by which each value differs by up to two thousandths. Softmax maps are divided by
    their sum, which is then 1. Regions have no such sum, and each map's error is its own: none is common to divide by.
    They are limited to 1.
    """

    def finish(maps):
        return jnp.minimum(maps, 1) if activation == "sigmoid" else maps / jnp.sum(maps, axis=-1, keepdims=True)

    return _plane_by_plane(finish, *place, reach=reach)


def weighted_maps(logits: jax.Array, weights: jax.Array, activation: str) -> jax.Array:
    """Maps of logits [..., K], times a weight [...] for each voxel."""
    if activation == "sigmoid":
        return jax.nn.sigmoid(logits) * weights[..., None]
    return weighted_softmax(logits, weights)


def weighted_softmax(logits: jax.Array, weights: jax.Array) -> jax.Array:
    """Softmax over the classes, times a weight for each voxel.

    With few classes the reduction over them is written as a chain of element-wise operations: on CPUs, XLA takes up to
    2.5 times as long to reduce over an axis of length 4 or 8.

    Args:
      logits: [..., K].
      weights: [...].
    """
    if logits.shape[-1] >= 16:
        return jax.nn.softmax(logits) * weights[..., None]
    classes = range(logits.shape[-1])
    powers = jnp.exp(logits - functools.reduce(jnp.maximum, (logits[..., k] for k in classes))[..., None])
    return powers * (weights / functools.reduce(operator.add, (powers[..., k] for k in classes)))[..., None]


def _plane_by_plane(finish, before, chunk, z_low, z_weight, y_low, y_weight, x_low, x_weight, *, reach) -> jax.Array:
    """Interpolates maps linearly to voxels of the scan, a plane at a time.

    The indices and weights are those of `tiling.native_lookup` along each axis.

    Args:
      finish: what becomes of the maps of a plane, [plane, plane, K].
      before: [1, canvas height, canvas width, K], the plane of maps before `chunk`.
      chunk: [n, canvas height, canvas width, K], maps.
      z_low: [GROUP] int32, planes of `chunk`; -1 stands for `before`.
      z_weight: [GROUP] float32.
      y_low: [plane] int32, rows of the canvas.
      y_weight: [plane] float32.
      x_low: [plane] int32, columns of the canvas.
      x_weight: [plane] float32.
      reach: number of planes of maps between which GROUP planes of the scan can lie, at most n.

    Returns:
      For each of the planes what `finish` made of it, stacked.
    """

    def between(maps, low, weight, axis):
        here = jnp.take(maps, low, axis=axis, mode="clip")
        after = jnp.take(maps, low + 1, axis=axis, mode="clip")
        return here + weight.reshape([-1 if i == axis else 1 for i in range(maps.ndim)]) * (after - here)

    # The planes that the group needs, in float32: each is converted once, though two planes of the scan use it.
    first = jnp.clip(z_low[0], 0, chunk.shape[0] - reach)
    window = lax.dynamic_slice_in_dim(chunk, first, reach).astype(jnp.float32)
    previous = before[0].astype(jnp.float32)

    def one_plane(lookup):
        low, weight = lookup
        here = jnp.where(low < 0, previous, window[jnp.maximum(low - first, 0)])
        maps = here + weight * (window[jnp.minimum(low + 1 - first, reach - 1)] - here)
        maps = between(between(maps, y_low, y_weight, 0), x_low, x_weight, 1)
        return finish(maps)

    return lax.map(one_plane, (z_low, z_weight))


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last of the values until there are `size`."""
    return np.pad(values, (0, size - len(values)), mode="edge")
