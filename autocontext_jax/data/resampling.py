"""From a scan's native grid to a level's: image by mean over area, label by majority of area.

A level with real factor f along an axis has ceil(n / f) voxels. With f >= 1 its voxel i covers native voxels
[f i, f (i + 1)), edge to edge, so its centre lies at native coordinate f (i + 0.5) - 0.5; a last partial voxel averages
what exists of it. Grids of factors 2f and f therefore nest exactly.
"""

from collections.abc import Iterator

import numpy as np

from autocontext_jax.data.labels import IGNORE
from autocontext_jax.geometry import level_shape

_SLAB = 16  # native slices in float32 at a time: bounds memory, still feeds the matrix products
_NOISE = 1e-6  # of a native voxel: a part smaller than this is float noise
_Weights = tuple[np.ndarray | None, ...]  # (z, y, x), each [level, native], or None for an axis that stays as it is


def axis_weights(native: int, factor: float) -> np.ndarray:
    """What each native voxel gives to each of a level's voxels along one axis.

    Args:
      native: voxels along the axis of the scan's own grid.
      factor: native voxels per voxel of the level, any positive number.

    Returns:
      [level, native] float32, rows sum to 1: the area average where factor >= 1, linear interpolation between voxel
      centres where factor < 1, with the outermost voxels continued to the edges.
    """
    size, _, _ = level_shape((native, 1, 1), (factor, 1, 1))
    level, voxel = np.arange(size)[:, None], np.arange(native)
    if factor >= 1:
        shared = np.minimum(factor * (level + 1), voxel + 1) - np.maximum(factor * level, voxel)
        weights = np.where(shared > _NOISE, shared, 0)
    else:
        centre = np.clip(factor * (level + 0.5) - 0.5, 0, native - 1)
        weights = np.maximum(1 - abs(centre - voxel), 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def downsample_image(voxels: np.ndarray, factors: tuple[float, float, float]) -> np.ndarray:
    """The image on a level's grid.

    Args:
      voxels: [..., D, H, W], int16 or float32.
      factors: native voxels per voxel of the level along (z, y, x).

    Returns:
      [..., D', H', W'] of the same type: means over area; of integers rounded half to even.
    """
    if all(factor == 1 for factor in factors):
        return voxels
    *channels, depth, height, width = voxels.shape
    native = (depth, height, width)
    level = np.empty((*channels, *level_shape(native, factors)), voxels.dtype)
    for rows, slices, weights in _slabs(native, factors):
        for channel in np.ndindex(*channels):
            mean = _mean(voxels[channel][slices], weights)
            level[channel][rows] = np.rint(mean) if voxels.dtype == np.int16 else mean
    return level


def downsample_label(
    labels: np.ndarray, factors: tuple[float, float, float], numbers: int, *, ignore: bool = False
) -> np.ndarray:
    """The label on a level's grid: in each voxel the number with the largest area.

    A tie goes to the larger number, so that background never wins one: a vessel as wide as half a voxel stays.

    Args:
      labels: [D, H, W] uint8, each below `numbers`, or `IGNORE`.
      factors: native voxels per voxel of the level along (z, y, x).
      numbers: V, how many there are, background included.
      ignore: whether there may be voxels of `IGNORE`, which counts as one number more.

    Returns:
      [D', H', W'] uint8.
    """
    if all(factor == 1 for factor in factors):
        return labels
    level = np.zeros(level_shape(labels.shape, factors), np.uint8)
    for rows, slices, weights in _slabs(labels.shape, factors):
        slab, winner = labels[slices], level[rows]
        areas = {}
        for number in (*range(1, numbers), *[IGNORE] * ignore):
            if (mask := slab == number).any():
                areas[number] = _area(mask, weights)
        largest = 1 - sum(areas.values(), np.zeros(winner.shape, np.float32))  # background: what the others leave
        for number, area in areas.items():
            wins = area >= largest * np.float32(1 - 1e-5)  # equal areas may differ by the sums' rounding
            winner[wins] = number
            np.maximum(largest, area, out=largest)
    return level


def _slabs(
    native: tuple[int, int, int], factors: tuple[float, float, float]
) -> Iterator[tuple[slice, slice, _Weights]]:
    """Some slices of the level at a time, the native slices they need, and the weights from these to those."""
    z, *plane = (axis_weights(*pair) if pair[1] != 1 else None for pair in zip(native, factors, strict=True))
    rows = max(1, int(_SLAB / factors[0]))
    for start in range(0, level_shape(native, factors)[0], rows):
        level = slice(start, start + rows)
        if z is None:
            yield level, level, (None, *plane)
        else:
            used = np.flatnonzero(z[level].any(0))
            slices = slice(used[0], used[-1] + 1)
            yield level, slices, (z[level, slices], *plane)


def _mean(slab: np.ndarray, weights: _Weights) -> np.ndarray:
    """[d, h, w] of any type to [d', h', w'] float32; x goes first, because rows are contiguous."""
    z, y, x = weights
    slab = slab.astype(np.float32)
    slab = slab if x is None else slab @ x.T
    slab = slab if y is None else y @ slab
    return slab if z is None else np.tensordot(z, slab, 1)


def _area(mask: np.ndarray, weights: _Weights) -> np.ndarray:
    """The share of each of the level's voxels that a mask covers, float32. Only the mask's bounding box is computed."""
    box, inside = [slice(None)] * 3, list(weights)
    for axis, matrix in enumerate(weights):
        if matrix is not None:
            used = np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis})))
            box[axis] = slice(used[0], used[-1] + 1)
            inside[axis] = matrix[:, box[axis]]
    return _mean(mask[tuple(box)], tuple(inside))
