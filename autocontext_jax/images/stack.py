"""Slices that are no even, upright stack, brought to a regular grid and back.

A tilted gantry shifts each slice in its own plane; a protocol may change the distance of slices on its way. The network
sees neither: slices are shifted back in their planes, then interpolated at even heights. A mask goes the other way, by
nearest voxels, so that it lies on the slices as they were taken.
"""

import dataclasses
import math

import numpy as np

IN_PLANE = 0.1  # mm by which slices may be shifted in their planes and still count as straight


def along(step: float) -> float:
    """Mm by which slices may lie off their even places along the normal: files keep few decimals of positions."""
    return 0.1 * min(1.0, step)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Where slices lie, and the regular grid that stands for them.

    Attributes:
      heights: mm along the slices' normal, ascending; the first is 0.
      offsets: mm along i and j of each slice's first voxel from the regular grid's; none is below 0.
      size: voxels of a slice along i and j.
      spacing: mm along i and j, and between the planes of the regular grid.
    """

    heights: tuple[float, ...]
    offsets: tuple[tuple[float, float], ...]
    size: tuple[int, int]
    spacing: tuple[float, float, float]

    @property
    def regular_size(self) -> tuple[int, int, int]:
        """Voxels of the regular grid along i, j, k."""
        furthest = np.max(self.offsets, axis=0)
        i, j = (
            size + math.ceil(float(far) / mm - 1e-3)
            for size, far, mm in zip(self.size, furthest, self.spacing[:2], strict=True)
        )
        return i, j, 1 + math.ceil(self.heights[-1] / self.spacing[2] - 1e-3)

    @property
    def tilt(self) -> float:
        """Degrees between the normal and the line through the slices' first voxels; 0 if they lie on the normal."""
        if not self.sheared:
            return 0.0
        (i0, j0), (i1, j1) = self.offsets[0], self.offsets[-1]
        return math.degrees(math.atan2(math.hypot(i1 - i0, j1 - j0), self.heights[-1]))

    @property
    def sheared(self) -> bool:
        """Whether slices are shifted in their planes."""
        return bool(np.ptp(self.offsets, axis=0).max() > IN_PLANE)

    @property
    def even(self) -> bool:
        """Whether one affine, sheared or not, places all slices: they lie on a straight line at even distances."""
        steps = np.diff(np.column_stack([self.offsets, self.heights]), axis=0)
        drift = np.abs(np.cumsum(steps - steps.mean(axis=0), axis=0)).max(axis=0)
        return bool((drift <= (IN_PLANE, IN_PLANE, along(self.spacing[2]))).all())

    @property
    def step(self) -> tuple[float, float, float]:
        """Mm along i, j and the normal from one slice to the next, where `even`."""
        count = len(self.heights) - 1
        (i0, j0), (i1, j1) = self.offsets[0], self.offsets[-1]
        return (i1 - i0) / count, (j1 - j0) / count, self.heights[-1] / count

    def to_regular(self, slices: np.ndarray) -> np.ndarray:
        """Slices [K, J, I] -> the regular grid [k, j, i], linear; what no slice covers has the lowest value."""
        from scipy import ndimage  # slow to import, and seldom needed

        i, j, planes = self.regular_size
        lowest = slices.min()
        shifted = np.full((len(slices), j, i), lowest, np.float32)
        for plane, target, (along_i, along_j) in zip(slices, shifted, self.offsets, strict=True):
            target[: plane.shape[0], : plane.shape[1]] = plane
            shift = along_j / self.spacing[1], along_i / self.spacing[0]
            ndimage.shift(target.copy(), shift, target, order=1, mode="constant", cval=float(lowest))
        regular = np.empty((planes, j, i), np.float32)
        for plane, height in zip(regular, self.spacing[2] * np.arange(planes), strict=True):
            above = int(np.clip(np.searchsorted(self.heights, height), 1, len(slices) - 1))
            low, high = self.heights[above - 1], self.heights[above]
            share = np.float32(np.clip((height - low) / (high - low), 0, 1))
            plane[:] = (1 - share) * shifted[above - 1] + share * shifted[above]
        return regular if slices.dtype.kind == "f" else np.rint(regular).astype(slices.dtype)

    def to_slices(self, regular: np.ndarray) -> np.ndarray:
        """An array on the regular grid [k, j, i, ...] -> on the slices [K, J, I, ...], by nearest voxels."""
        (wide, high), (x, y, z) = self.size, self.spacing
        slices = np.empty((len(self.heights), high, wide, *regular.shape[3:]), regular.dtype)
        for target, height, (along_i, along_j) in zip(slices, self.heights, self.offsets, strict=True):
            k = min(round(height / z), len(regular) - 1)
            j = min(round(along_j / y), regular.shape[1] - high)
            i = min(round(along_i / x), regular.shape[2] - wide)
            target[:] = regular[k, j : j + high, i : i + wide]
        return slices
