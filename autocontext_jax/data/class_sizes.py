"""How large and how thick each class is in a label map, counted in voxels."""

import dataclasses

import numpy as np
from scipy import ndimage

from autocontext_jax.data.labels import LabelSpec

Counts = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class ClassSize:
    """What a label map shows of a class.

    Attributes:
      voxels: number of its voxels; 0 where it does not occur, and the other numbers are 0 then too.
      box: voxels along (z, y, x) of the smallest box that holds them all.
      runs: how many unbroken rows of its voxels there are along (z, y, x).
    """

    voxels: int
    box: Counts
    runs: Counts


def class_sizes(label: np.ndarray, labels: LabelSpec) -> tuple[ClassSize, ...]:
    """The size of every class but the background.

    It takes the memory of two more label maps where a class fills the scan, and less where its box is smaller.

    Args:
      label: [D, H, W] uint8, a stored label map.
      labels: what its numbers mean. A region is the union of its numbers; regions may overlap.

    Returns:
      [K - 1] in the order of `labels.classes`.
    """
    boxes = ndimage.find_objects(label, max_label=len(labels.values) - 1)  # `IGNORE` is above it
    return tuple(
        _size(label, numbers, [box for number in numbers if (box := boxes[number - 1]) is not None])
        for numbers in labels.members[1:]
    )


def _size(label: np.ndarray, numbers: tuple[int, ...], boxes: list[tuple[slice, ...]]) -> ClassSize:
    """Of the voxels of some numbers; `boxes` holds each of those that occur."""
    if not boxes:
        return ClassSize(0, (0, 0, 0), (0, 0, 0))
    inside = label[
        tuple(slice(min(box[axis].start for box in boxes), max(box[axis].stop for box in boxes)) for axis in range(3))
    ]
    mask = inside == numbers[0]
    for number in numbers[1:]:  # a table of 256 entries would be shorter, and index with 8 bytes a voxel
        mask |= inside == number
    depth, height, width = mask.shape
    return ClassSize(
        int(np.count_nonzero(mask)), (depth, height, width), (_runs(mask, 0), _runs(mask, 1), _runs(mask, 2))
    )


def _runs(mask: np.ndarray, axis: int) -> int:
    """How many unbroken rows of voxels a mask has along an axis: each begins where the voxel before is not set."""
    along = np.moveaxis(mask, axis, 0)
    return int(np.count_nonzero(along[0]) + np.count_nonzero(along[1:] > along[:-1]))
