"""Where the tiles of every level lie, and with which weights overlapping tiles are blended.

The tiles of a level form a regular grid. The weight of a voxel in a tile is a product of one factor for each axis, and
so is the sum of the weights of all tiles at a voxel. The factors are divided by that sum here, along each axis alone.
The weights then form a partition of unity: predictions times weights only need to be added, without a second array for
the sum of the weights.

Positions are voxels of the level's grid. They may be negative or beyond the scan, where there is air: tiles reach
farther than what they cover.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from autocontext_jax.errors import require
from autocontext_jax.geometry import Triple

MOST_CHUNKS = 8  # of a tile, see `AxisTiles.chunk`
# Voxels of a tile along an axis that the network does not look along. It predicts each slice by itself, so these tiles
# need no overlap.
SLICES = 4


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """How scans are divided into tiles.

    Attributes:
      tile: (z, y, x) voxels of a tile, the same at every level; it can differ from the training patch. One number,
        (64,), is that of all axes; (0,) chooses boxes for each level of each scan, see `boxes`; with `model.norm`
        instance or group it is the training patch, since results depend on it. In 2D z is 1, and four slices are
        predicted at a time.
      margin: voxels by which a tile reaches beyond the middle between it and the next; at most a quarter of a `tile`.
      memory: GB that the boxes of a level may take on the device; 0 means a part of what is free.
      crop_to_body: whether only the box around the body is predicted, see `body`. Outside it is background.
    """

    tile: tuple[int, ...] = (0,)
    margin: int = 8
    memory: float = 0.0
    crop_to_body: bool = True

    def __post_init__(self):
        good = self.boxes or (len(self.tile) in (1, 3) and all(1 <= size <= 4096 for size in self.tile))
        require(good, self, "tile", "(z, y, x), each from 1 to 4096, or one number for all, such as (64,), or (0,)")
        require(0 <= self.margin <= 512, self, "margin", "a number from 0 to 512")
        require(self.memory >= 0, self, "memory", "GB, 0 or more")

    @property
    def boxes(self) -> bool:
        """Whether sizes are chosen for each level of each scan."""
        return self.tile == (0,)


@dataclasses.dataclass(frozen=True)
class Blend:
    """Weights along one axis of a tile.

    Attributes:
      weights: [T], not negative.
      border: number of voxels at each end with weight zero. Tiles are placed so that every voxel of the scan is
        in the inner part of at least one tile.
    """

    weights: np.ndarray
    border: int = 0


# Weights along one axis of a tile from its size.
MakeBlend = Callable[[int], Blend]


def gaussian(tile: int) -> Blend:
    """Gaussian weights around the centre of the tile, as in nnU-Net: the standard deviation is an eighth of the tile.

    Args:
      tile: T, voxels.
    """
    offsets = np.arange(tile) - (tile - 1) / 2
    return Blend(np.exp(-0.5 * (offsets / (tile / 8)) ** 2).astype(np.float32))


@dataclasses.dataclass(frozen=True)
class AxisTiles:
    """The tiles of one level along one axis.

    Attributes:
      low, high: the tiles cover the voxels [low, high).
      starts: [n], first voxel of each tile, at equal distances.
      weights: [n, T] float32; at each voxel of [low, high) the weights of all tiles add up to 1.
      stride: distance between the starts of tiles.
    """

    low: int
    high: int
    starts: np.ndarray
    weights: np.ndarray
    stride: int

    @property
    def size(self) -> int:
        """T, voxels of a tile."""
        return self.weights.shape[1]

    @property
    def chunk(self) -> int:
        """See `map_chunk`."""
        return map_chunk(self.size, self.stride)

    @property
    def extent(self) -> int:
        """Number of voxels from the start of the first tile to the end of the last."""
        return int(self.starts[-1] - self.starts[0]) + self.size


def map_chunk(size: int, stride: int) -> int:
    """Depth of the parts in which maps are kept along z: few parts, which together are little deeper than a tile.

    Args:
      size: voxels of a tile along z.
      stride: distance between the starts of tiles, a multiple of the result.
    """
    possible = [depth for depth in range(1, stride + 1) if stride % depth == 0 and depth * MOST_CHUNKS >= size]
    return min(possible or [stride], key=lambda depth: (-(-size // depth) * depth, -depth))


LevelTiles = tuple[AxisTiles, AxisTiles, AxisTiles]  # along z, y, x


def tile_shape(axes: LevelTiles) -> Triple:
    """Voxels of each tile of a level."""
    z, y, x = (axis.size for axis in axes)
    return z, y, x


def axis_tiles(low: int, high: int, blend: Blend, *, stride: int, align: int) -> AxisTiles:
    """Covers the voxels [low, high) with as few tiles as the stride allows; what they cover in excess is centred.

    Args:
      low: first voxel to cover.
      high: end of the voxels to cover.
      blend: weights of one tile, before they are normalised.
      stride: distance between the starts of tiles; a multiple of `align`, at most the tile without its borders.
      align: every start is a multiple of it, so that the pooling grids of all tiles coincide, and so do the voxels of
        the coarser level below them.

    Raises:
      ValueError: the stride is not possible.
    """
    tile, border = len(blend.weights), blend.border
    useful = tile - 2 * border
    if not 0 < stride <= useful or stride % align:
        raise ValueError(f"stride {stride} must be a multiple of {align} and at most {useful}")
    # The first start is a multiple of `align` in [lowest, highest]. If it were larger, the first tile would not reach
    # `low`; if smaller, the last tile would not reach `high`.
    highest = (low - border) // align * align
    count = axis_count(low, high, tile, border, stride=stride, align=align)
    lowest = -(-(high - border - useful - stride * (count - 1)) // align) * align
    first = (lowest + highest) // (2 * align) * align
    starts = first + stride * np.arange(count)
    total = np.zeros(starts[-1] - first + tile)
    for start in starts:
        total[start - first : start - first + tile] += blend.weights
    rows = [blend.weights / np.maximum(total[s - first : s - first + tile], 1e-30) for s in starts]
    return AxisTiles(low, high, starts, np.stack(rows).astype(np.float32), stride)


def axis_count(low: int, high: int, tile: int, border: int = 0, *, stride: int, align: int) -> int:
    """How many tiles `axis_tiles` needs."""
    highest = (low - border) // align * align
    return 1 + max(0, -(-(high - highest - tile + border) // stride))


# The weights of a tile and the distance of tiles along z, y, x, for the voxels [low, high) to cover along each.
Chooser = Callable[[Sequence[tuple[int, int]]], Sequence[tuple[Blend, int]]]


def pyramid_tiles(
    finest: Sequence[tuple[int, int]], steps: Sequence[Triple], choose: Chooser, *, align: Triple
) -> tuple[LevelTiles, ...]:
    """The tiles of every level.

    The finest level covers a region. Each coarser level covers the context of all tiles of the next finer level.

    Args:
      finest: the voxels [low, high) of the finest level's grid to cover along z, y, x.
      steps: for each level, coarsest first, its voxels for one of the level before along each axis, 1 or 2.
      choose: gives the tiles of a level, called for the finest level first.
      align: see `axis_tiles`; even along axes that levels halve, so that the context of a tile starts at a voxel of the
        coarser level.

    Returns:
      For each level, coarsest first, the tiles along z, y and x.
    """
    covered = list(finest)
    plan: list[LevelTiles] = []
    for step in reversed(steps):
        z, y, x = (
            axis_tiles(low, high, blend, stride=stride, align=along)
            for (low, high), (blend, stride), along in zip(covered, choose(covered), align, strict=True)
        )
        plan.append((z, y, x))
        covered = [_context_of(axis, by) for axis, by in zip(plan[-1], step, strict=True)]
    return tuple(reversed(plan))


def _context_of(axis: AxisTiles, step: int) -> tuple[int, int]:
    """The region of tiles in voxels of the coarser level; if it is coarser, one more on each side to upsample them."""
    start, end = int(axis.starts[0]), int(axis.starts[0]) + axis.extent
    return (start // 2 - 1, end // 2 + 1) if step == 2 else (start, end)


def native_lookup(native: int, factor: float, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights that interpolate linearly from a level's grid to the scan's own grid, along one axis.

    The value at a voxel of the scan is (1 - weight) v[low] + weight v[low + 1], with v the values at the level's voxel
    centres. Beyond the outermost centres it is constant.

    Args:
      native: number of voxels of the scan.
      factor: voxels of the scan per voxel of the level.
      level: number of voxels of the level.

    Returns:
      low [native] int32 and weight [native] float32. If the level has a single voxel, low + 1 is out of range and its
      weight is 0.
    """
    position = np.clip((np.arange(native) + 0.5) / factor - 0.5, 0, level - 1)
    low = np.minimum(np.floor(position), max(0, level - 2)).astype(np.int32)
    return low, (position - low).astype(np.float32)


def crop(volume: np.ndarray, start: tuple[int, ...], size: tuple[int, ...], fill: np.ndarray | int) -> np.ndarray:
    """Copies a region out of a volume.

    Args:
      volume: [..., D, H, W].
      start: first voxel of the region, (z, y, x); may be negative.
      size: of the region, (z, y, x).
      fill: values where the region extends beyond the volume, a number or [..., 1, 1, 1].
    """
    out = np.empty((*volume.shape[:-3], *size), volume.dtype)
    out[...] = fill
    z, y, x = (slice(max(0, s), max(0, s + n)) for s, n in zip(start, size, strict=True))
    inside = volume[..., z, y, x]
    z, y, x = (slice(max(0, -s), max(0, -s) + n) for s, n in zip(start, inside.shape[-3:], strict=True))
    out[..., z, y, x] = inside
    return out
