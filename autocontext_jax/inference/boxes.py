"""Tiles as boxes: of the sizes that compute the fewest voxels of a level within the memory that there is.

A network computes every voxel of a tile, so that what matters is how often tiles overlap and how far they reach beyond
the level. Few large tiles are best; where memory forbids one for the whole level, boxes that are nearly cubes overlap
least. Sizes are few, so that scans of similar sizes share their compiled programs.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from autocontext_jax.geometry import Triple
from autocontext_jax.inference.tiling import Blend, axis_count, gaussian

SMALLEST = 64  # voxels along an axis of a box that does not hold the level along it
FITS = 96**3  # a box of so many voxels is taken to fit
# Voxels of a box beyond which a larger one hardly computes fewer: its overlap is some percent by then.
LARGEST = 6 << 20


@dataclasses.dataclass(frozen=True)
class Box:
    """The tiles of a level.

    Attributes:
      size: voxels along z, y, x.
      stride: distance between the starts of tiles along each axis.
    """

    size: Triple
    stride: Triple

    @property
    def blends(self) -> tuple[Blend, Blend, Blend]:
        """Weights along each axis."""
        z, y, x = map(gaussian, self.size)
        return z, y, x


def box_sizes(align: int, largest: int) -> list[int]:
    """The sizes that a box may have along an axis, up to the first that is not below `largest`.

    They are few, so that scans of similar sizes have the same ones.

    Args:
      align: all are multiples of it.
      largest: number of voxels.
    """
    sizes = [align]
    while sizes[-1] < largest:
        step = max(align, 16 if sizes[-1] < 128 else 32 if sizes[-1] < 512 else 64)
        size = (sizes[-1] // step + 1) * step
        sizes.append(-(-size // align) * align)
    return sizes


def choose_box(
    regions: Sequence[tuple[int, int]], *, margin: int, align: int, fits: Callable[[Box, Triple], bool]
) -> Box:
    """The box whose tiles cover a level with the fewest voxels computed.

    Args:
      regions: voxels [low, high) of the level to cover, along z, y, x.
      margin: voxels by which a tile reaches beyond the middle between it and the next.
      align: starts and sizes are multiples of it.
      fits: whether a box fits the memory, given the voxels along z, y, x from the first tile's start to the last one's
        end. If none does, the smallest is taken.

    Returns:
      The box. Among equals it is the smallest.
    """
    axes = []
    for low, high in regions:
        choices = []  # size, stride, number of tiles
        for size in box_sizes(align, high - low + 2 * align):
            stride = max(align, (size - 2 * margin) // align * align)
            count = axis_count(low, high, size, stride=stride, align=align)
            if count == 1:
                choices.append((size, size, 1))
                break
            if size >= SMALLEST:
                choices.append((size, stride, count))
        axes.append(choices)
    options = []
    for choice in itertools.product(*axes):
        (z, z_stride, z_count), (y, y_stride, y_count), (x, x_stride, x_count) = choice
        if (voxels := z * y * x) <= LARGEST:
            box = Box((z, y, x), (z_stride, y_stride, x_stride))
            extent = z + (z_count - 1) * z_stride, y + (y_count - 1) * y_stride, x + (x_count - 1) * x_stride
            options.append((voxels * z_count * y_count * x_count, voxels, box, extent))
    options.sort(key=lambda option: option[:2])
    smallest = min(options, key=lambda option: option[1])[2]
    return next((box for _, _, box, extent in options if fits(box, extent)), smallest)
