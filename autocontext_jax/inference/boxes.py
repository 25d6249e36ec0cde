"""Tiles as boxes: of the sizes that compute few voxels of a level within the memory that there is.

A network computes every voxel of a tile, so that what matters is how often tiles overlap and how far they reach beyond
the level. Few large tiles are best; where memory forbids one for the whole level, boxes that are nearly cubes overlap
least. Sizes are few, so that scans of similar sizes share their compiled programs. On accelerators a program takes
longer to compile than many scans to predict, so that there are fewer sizes, and for a level that one small box holds
only three along each axis.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from autocontext_jax.geometry import Triple
from autocontext_jax.inference.tiling import MakeBlend, axis_count

SMALLEST = 64  # voxels along an axis of a box that does not hold the level along it
# Voxels of a box beyond which a larger one hardly computes fewer: its overlap is some percent by then.
LARGEST = 8 << 20
# On accelerators: sizes along each axis of a box that holds all of a small level. One H200 computes the paper's network
# for 128^3 voxels in about 10 ms, and took up to 40 s to compile a program of one size, as it times cuDNN's algorithms.
SMALL = (64, 96, 128)


@dataclasses.dataclass(frozen=True)
class Box:
    """The tiles of a level.

    Attributes:
      size: voxels along z, y, x.
      stride: distance between the starts of tiles along each axis.
      extent: voxels from the start of the first tile to the end of the last along each axis.
    """

    size: Triple
    stride: Triple
    extent: Triple


def box_sizes(align: int, largest: int, step: int = 8) -> list[int]:
    """The sizes that a box may have along an axis, up to the first that is not below `largest`.

    They are few, so that scans of similar sizes have the same ones, and near each other.

    Args:
      align: all are multiples of it.
      largest: number of voxels.
      step: each size is larger than the one before by a share of 1 / step at most, or by `align`; a power of two.
    """
    sizes = [align]
    while sizes[-1] < largest:
        share = max(align, (1 << (sizes[-1].bit_length() - 1)) // step)
        sizes.append((sizes[-1] // align + -(-share // align)) * align)
    return sizes


def choose_box(
    regions: Sequence[tuple[int, int]],
    *,
    margin: int,
    align: Triple,
    blend: MakeBlend,
    fits: Callable[[Box], bool],
    step: int = 8,
    small: Sequence[int] = (),
) -> Box:
    """The box whose tiles cover a level with the fewest voxels computed, or one of the `small` sizes.

    Args:
      regions: voxels [low, high) of the level to cover, along z, y, x.
      margin: voxels by which a tile reaches beyond the middle between it and the next.
      align: starts and sizes along each axis are multiples of it.
      blend: weights of a tile; a border of theirs is at most the margin.
      fits: whether a box fits the memory. If none does, the smallest is taken.
      step: of the sizes, see `box_sizes`.
      small: sizes such as `SMALL`. If a box of such sizes holds all of the level, the smallest such box is taken, even
        if another computes fewer voxels. () means none.

    Returns:
      The box. Among equals it is the smallest.
    """
    held = _small_box(regions, align, blend, small)
    if held is not None and fits(held):
        return held
    axes = []
    for (low, high), unit in zip(regions, align, strict=True):
        choices = []  # size, stride, number of tiles
        sizes = box_sizes(unit, high - low + 2 * unit + 2 * blend(unit).border, step)
        # Of several tiles the stride is one of the sizes; each tile is larger than the stride by two margins.
        strides = {size + -(-2 * margin // unit) * unit: size for size in sizes}
        for size in sorted({*strides, *sizes}):
            if _holds(size, (low, high), unit, blend):
                choices.append((size, _stride_of_one(size, unit, blend), 1))
                break
            if size >= SMALLEST and size in strides:
                count = axis_count(low, high, size, blend(size).border, stride=strides[size], align=unit)
                choices.append((size, strides[size], count))
        axes.append(choices)
    options = []
    for choice in itertools.product(*axes):
        (z, z_stride, z_count), (y, y_stride, y_count), (x, x_stride, x_count) = choice
        extent = z + (z_count - 1) * z_stride, y + (y_count - 1) * y_stride, x + (x_count - 1) * x_stride
        box = Box((z, y, x), (z_stride, y_stride, x_stride), extent)
        options.append((z * y * x * z_count * y_count * x_count, z * y * x, box))
    options.sort(key=lambda option: option[:2])
    smallest = min(options, key=lambda option: option[1])[2]
    return next((box for _, voxels, box in options if voxels <= LARGEST and fits(box)), smallest)


def _small_box(regions: Sequence[tuple[int, int]], align: Triple, blend: MakeBlend, small: Sequence[int]) -> Box | None:
    """The box of `small` sizes that holds all of a level; None if none does."""
    sizes, strides = [], []
    for region, unit in zip(regions, align, strict=True):
        aligned = (-(-size // unit) * unit for size in small)
        size = next((size for size in aligned if _holds(size, region, unit, blend)), None)
        if size is None:
            return None
        sizes.append(size)
        strides.append(_stride_of_one(size, unit, blend))
    (z, y, x), (z_stride, y_stride, x_stride) = sizes, strides
    return Box((z, y, x), (z_stride, y_stride, x_stride), (z, y, x))


def _holds(size: int, region: tuple[int, int], unit: int, blend: MakeBlend) -> bool:
    """Whether one tile of a size covers the voxels [low, high) of a level along an axis."""
    return axis_count(*region, size, blend(size).border, stride=size, align=unit) == 1


def _stride_of_one(size: int, unit: int, blend: MakeBlend) -> int:
    """The stride of a single tile along an axis: a multiple of the unit within which no weight is zero."""
    return max(unit, (size - 2 * blend(size).border) // unit * unit)


def tile_stride(size: int, margin: int, align: int) -> int:
    """The distance between the starts of tiles of a given size along an axis; their margin is at most a quarter."""
    return max(align, max(size - 2 * margin, size // 2) // align * align)
