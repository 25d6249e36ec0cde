"""From a level's maps, as they come from top to bottom, to the mask on the scan's own grid.

Maps are enlarged and reduced to classes on the device, a few planes at a time: nothing holds K volumes at full
resolution.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autocontext_jax.geometry import Triple
from autocontext_jax.inference.tiling import LevelTiles, native_lookup

# Native planes that are enlarged and reduced at a time.
GROUP = 8


class MaskWriter:
    """Fills the mask of one level.

    Args:
      native: [D, H, W] of the scan.
      level: [D, H, W] of the scan on the level's grid.
      factor: native voxels per voxel of the level along (z, y, x).
      axes: the level's tiles, which say where its maps begin and end.
      plane: native voxels in plane that the program is compiled for, at least H and W.
    """

    def __init__(self, native: Triple, level: Triple, factor: tuple[float, float, float], axes: LevelTiles, plane: int):
        self._mask = np.zeros(native, np.uint8)
        (self._z_low, self._z_weight), *in_plane = (
            native_lookup(n, f, size) for n, f, size in zip(native, factor, level, strict=True)
        )
        self._in_plane: list[np.ndarray] = []
        for (low, weight), axis in zip(in_plane, axes[1:], strict=True):
            self._in_plane += [_padded(low - int(axis.starts[0]), plane), _padded(weight, plane)]
        self._high = axes[0].high
        self._done = 0
        self._before: jax.Array | None = None
        self._waiting: list[tuple[int, int, jax.Array]] = []

    def watch(self, chunks: Iterator[tuple[int, jax.Array]]) -> Iterator[tuple[int, jax.Array]]:
        """Passes a level's chunks on and keeps their masks."""
        for z, chunk in chunks:
            self.add(z, chunk)
            yield z, chunk

    def add(self, z: int, chunk: jax.Array) -> None:
        """Starts the masks of the native planes that a chunk completes; waits for those of the chunk before.

        So the device always has work that nobody waits for.

        Args:
          z: of the chunk's first plane, level voxels.
          chunk: [n, canvas y, canvas x, K].
        """
        chunk = jax.device_put(chunk, jax.local_devices()[0])  # devices that share tiles hold a part each
        before = chunk[:1] if self._before is None else self._before
        self._before = chunk[-1:]
        # A native plane is ready when both its level planes are there; past the scan's last plane, all are.
        have = z + chunk.shape[0]
        end = int(np.searchsorted(self._z_low, have - 1)) if have < self._high else len(self._z_low)
        started = []
        for first in range(self._done, end, GROUP):
            last = min(first + GROUP, end)
            z_low = _padded(self._z_low[first:last] - z, GROUP)
            z_weight = _padded(self._z_weight[first:last], GROUP)
            planes = native_masks(before, chunk, z_low, z_weight, *self._in_plane)
            planes.copy_to_host_async()
            started.append((first, last, planes))
        self._done = max(self._done, end)
        self._collect()
        self._waiting = started

    def mask(self) -> np.ndarray:
        """[D, H, W] uint8, once all chunks have been added."""
        self._collect()
        return self._mask

    def _collect(self) -> None:
        _, height, width = self._mask.shape
        for first, last, planes in self._waiting:
            self._mask[first:last] = np.asarray(planes)[: last - first, :height, :width]
        self._waiting = []


@jax.jit
def native_masks(before, chunk, z_low, z_weight, y_low, y_weight, x_low, x_weight) -> jax.Array:
    """The class of the largest linearly interpolated map at each native voxel.

    Args:
      before: [1, canvas y, canvas x, K], the plane above `chunk`.
      chunk: [n, canvas y, canvas x, K].
      z_low: [GROUP] int32, `tiling.native_lookup` along z into `chunk`; -1 is `before`.
      z_weight: [GROUP] float32.
      y_low: [plane] int32, the lookup along y into the canvas.
      y_weight: [plane] float32.
      x_low: [plane] int32, along x.
      x_weight: [plane] float32.

    Returns:
      [GROUP, plane, plane] uint8.
    """

    def between(maps, low, weight, axis):
        here = jnp.take(maps, low, axis=axis, mode="clip")
        after = jnp.take(maps, low + 1, axis=axis, mode="clip")
        return here + weight.reshape([-1 if i == axis else 1 for i in range(maps.ndim)]) * (after - here)

    def one_plane(lookup):
        low, weight = lookup
        here = jnp.where(low < 0, before[0], chunk[jnp.maximum(low, 0)])
        maps = here + weight * (chunk[jnp.minimum(low + 1, chunk.shape[0] - 1)] - here)
        maps = between(between(maps, y_low, y_weight, 0), x_low, x_weight, 1)
        return jnp.argmax(maps, axis=-1).astype(jnp.uint8)

    return lax.map(one_plane, (z_low, z_weight))


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """`values` with their last repeated to a fixed size."""
    return np.pad(values, (0, size - len(values)), mode="edge")
