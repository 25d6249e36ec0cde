"""How tiles cover a scan at every level, and how their overlaps blend.

Tiles of one level stand on a regular grid, so that blending weights are products of one axis's weights and so is their
sum: divided by it beforehand, weighted maps simply add up to a partition of unity and no second array is needed.
Positions are voxels of the level's grid and may be negative: tiles at a scan's edge reach into air.
"""

import dataclasses

import numpy as np

from autocontext_jax.geometry import Triple

# In 2D, slices to a tile: each is predicted by itself, so these tiles need no overlap.
SLICES = 4


@dataclasses.dataclass(frozen=True)
class Blend:
    """Weights along one axis of a tile.

    Attributes:
      weights: [T], not negative.
      border: voxels at each end whose weight is zero; no scan voxel may lie only there.
    """

    weights: np.ndarray
    border: int = 0


def gaussian(tile: int) -> Blend:
    """Weights of a Gaussian about the tile's centre with a deviation of an eighth of the tile (nnU-Net's choice)."""
    offsets = np.arange(tile) - (tile - 1) / 2
    return Blend(np.exp(-0.5 * (offsets / (tile / 8)) ** 2).astype(np.float32))


@dataclasses.dataclass(frozen=True)
class AxisTiles:
    """The tiles of one level along one axis.

    Attributes:
      low, high: the voxels [low, high) that must be predicted.
      starts: [n], first voxel of each tile, equally spaced.
      weights: [n, T] float32; over all tiles they add up to 1 at each voxel of [low, high).
    """

    low: int
    high: int
    starts: np.ndarray
    weights: np.ndarray

    @property
    def extent(self) -> int:
        """Voxels from the first tile's start to the last tile's end."""
        return int(self.starts[-1] - self.starts[0]) + self.weights.shape[1]


LevelTiles = tuple[AxisTiles, AxisTiles, AxisTiles]  # along z, y, x


def axis_tiles(low: int, high: int, blend: Blend, *, stride: int, align: int) -> AxisTiles:
    """Covers [low, high) with as few tiles as the stride allows, centred.

    Args:
      low: the voxels [low, high) must be predicted.
      high: see `low`.
      blend: weights of one tile.
      stride: between starts; a multiple of `align`, at most the tile less both borders.
      align: starts are multiples of it: pooling grids and the coarser level's voxels then coincide for all tiles.

    Returns:
      See there.
    """
    tile, border = len(blend.weights), blend.border
    useful = tile - 2 * border
    if not 0 < stride <= useful or stride % align:
        raise ValueError(f"stride {stride} must be a multiple of {align} and at most {useful}")
    # The first start is a multiple of `align` in [lowest, highest]; later than that it misses `low`, earlier `high`.
    highest = (low - border) // align * align
    count = 1 + max(0, -(-(high - highest - border - useful) // stride))
    lowest = -(-(high - border - useful - stride * (count - 1)) // align) * align
    first = (lowest + highest) // (2 * align) * align
    starts = first + stride * np.arange(count)
    total = np.zeros(starts[-1] - first + tile)
    for start in starts:
        total[start - first : start - first + tile] += blend.weights
    rows = [blend.weights / np.maximum(total[s - first : s - first + tile], 1e-30) for s in starts]
    return AxisTiles(low, high, starts, np.stack(rows).astype(np.float32))


def pyramid_tiles(
    finest: Triple, levels: int, blend: Blend, *, stride: int, align: int, spatial_dims: int = 3
) -> tuple[LevelTiles, ...]:
    """Tiles of every level, coarsest first, so that each tile finds the coarser level predicted wherever it lies.

    Args:
      finest: [D, H, W] of the scan at the finest level.
      levels: S.
      blend: weights along an axis, the same for all levels and axes.
      stride: between tiles' starts.
      align: see `axis_tiles`; even, so that a tile's context starts at a coarse voxel.
      spatial_dims: 3; in 2D tiles hold `SLICES` slices along z at every level.

    Returns:
      For each level the tiles along z, y, x.
    """
    slices = Blend(np.ones(SLICES, np.float32))
    through = [] if spatial_dims == 3 else [axis_tiles(0, finest[0], slices, stride=SLICES, align=1)]
    need = [(0, size) for size in finest[3 - spatial_dims :]]
    plan = []
    for _ in range(levels):
        halving = [axis_tiles(low, high, blend, stride=stride, align=align) for low, high in need]
        z, y, x = *through, *halving
        plan.append((z, y, x))
        # The region under the tiles in coarse voxels, with the halo of one that upsampling consumes.
        need = [(axis.starts[0] // 2 - 1, (axis.starts[0] + axis.extent) // 2 + 1) for axis in halving]
    return tuple(reversed(plan))


def largest_extents(size: int, levels: int, blend: Blend, *, stride: int, align: int) -> tuple[int, ...]:
    """The most voxels that the tiles of each level span along one axis of any scan within a size, coarsest first.

    Args:
      size: of the scan at the finest level, at most.
      levels: as for `pyramid_tiles`, like the rest.
      blend: see `levels`.
      stride: see `levels`.
      align: see `levels`.
    """
    tile, border = len(blend.weights), blend.border
    # How far before the first useful voxel an aligned start may have to lie; finer tiles start at multiples of `align`.
    finest_slack = -border % align
    coarser_slack = max((-1 - border) % align, (align // 2 - 1 - border) % align)
    extents: list[int] = []
    for _ in range(levels):
        slack = coarser_slack if extents else finest_slack
        count = 1 + max(0, -(-(size + slack - (tile - 2 * border)) // stride))
        extents.append(tile + stride * (count - 1))
        size = extents[-1] // 2 + 2
    return tuple(reversed(extents))


def native_lookup(native: int, factor: float, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Where native voxel centres lie on a level's grid, for linear interpolation along one axis.

    Args:
      native: voxels of the scan's own grid.
      factor: native voxels per voxel of the level.
      level: voxels of the level.

    Returns:
      low [native] int32 and weight [native] float32: the value is (1 - weight) v[low] + weight v[low + 1]; beyond the
      outermost centres it is constant. With a single level voxel, low + 1 is out of range and its weight 0.
    """
    position = np.clip((np.arange(native) + 0.5) / factor - 0.5, 0, level - 1)
    low = np.minimum(np.floor(position), max(0, level - 2)).astype(np.int32)
    return low, (position - low).astype(np.float32)
