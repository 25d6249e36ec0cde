"""Grids, patches and tiles: where every voxel of every level lies.

A level is counted from 1 = coarsest to S = finest; each level halves the voxel of the one before. Along one axis,
voxel i of a level with downsample factor f covers native voxels [f i, f (i + 1)), so its centre lies at native
coordinate f (i + 1/2) - 1/2. Tuples run (z, y, x). Everything here is plain Python and numpy.
"""

import dataclasses
import itertools
import math

import numpy as np

Triple = tuple[int, int, int]


def level_shape(native_shape: Triple, factors: tuple[float, float, float]) -> Triple:
    """Voxels of a level's grid over a scan of `native_shape`; a last partial voxel counts."""
    # The tolerance keeps 100 / (2.5 / 0.5) from becoming 21 voxels through rounding.
    z, y, x = (max(1, math.ceil(size / factor - 1e-6)) for size, factor in zip(native_shape, factors, strict=True))
    return z, y, x


def pyramid_starts(centre: Triple, edge: int, levels: int) -> tuple[Triple, ...]:
    """First voxel of each level's patch, coarsest first, of the pyramid patch around a voxel of the finest level.

    Level s + 1 starts at 2 (start of level s + N/4): the voxel grids nest exactly and all patches share one centre.
    Nesting leaves the finest start a multiple of 2^(S-1) plus a constant; the nearest one is taken, so that with two
    levels `centre` is always one of the 2^3 voxels around the patch's centre.

    Args:
      centre: a voxel of the finest level; may lie anywhere.
      edge: N, a multiple of 4.
      levels: S.

    Returns:
      S starts; negative where the patch leaves the scan.
    """
    nesting = 2 ** (levels - 1)
    # The finest start that a coarsest start of 0 gives: the recurrence above, summed.
    offset = (nesting - 1) * edge // 2
    coarsest = [round_half_up((voxel - edge // 2 - offset + 0.5) / nesting) for voxel in centre]
    starts = [(coarsest[0], coarsest[1], coarsest[2])]
    for _ in range(levels - 1):
        starts.append(next_level_start(starts[-1], edge))
    return tuple(starts)


def next_level_start(start: Triple, edge: int) -> Triple:
    """Start of the patch at the next finer level that shares the centre of the patch at `start`."""
    z, y, x = (2 * (first + edge // 4) for first in start)
    return z, y, x


def round_half_up(value: float) -> int:
    """The nearest integer; unlike Python's round, steps are even so that no centre is favoured."""
    return math.floor(value + 0.5)


@dataclasses.dataclass(frozen=True)
class SpatialLimits:
    """How far the spatial augmentation may move a voxel.

    Attributes:
      rotation: degrees about each axis, uniform in [-rotation, rotation].
      translation: voxels of the finest level along each axis, uniform in [-translation, translation].
      elastic_sigma: standard deviation of the B-spline control vectors, voxels of the finest level.
      elastic_spacing: distance of the control points, voxels of the finest level.
    """

    rotation: float = 5.0
    translation: float = 4.0
    elastic_sigma: float = 4.0
    elastic_spacing: int = 32

    @property
    def elastic_limit(self) -> float:
        """Where a displacement is clipped, voxels of the finest level.

        A cubic B-spline of independent control vectors has at most 0.35 of their deviation, so this is beyond four
        deviations of the field: a bound for the margin that practically never acts.
        """
        return 1.5 * self.elastic_sigma


def crop_margins(
    edge: int, levels: int, spacings: list[tuple[float, float, float]], limits: SpatialLimits | None
) -> tuple[Triple, ...]:
    """Voxels to read beyond each side of each level's patch so that no augmented voxel falls outside the crop.

    Args:
      edge: N.
      levels: S.
      spacings: the finest level's spacing in mm of every scan of the data set; the margin holds for all of them.
      limits: None means no spatial augmentation and no margin.

    Returns:
      A (z, y, x) margin for each level, coarsest first.
    """
    if limits is None or limits == SpatialLimits(0.0, 0.0, 0.0, limits.elastic_spacing):
        return ((0, 0, 0),) * levels
    corners = np.array(list(itertools.product((-1, 1), repeat=3))) * edge / 2
    # Past a right angle a corner comes no further out; up to 15 degrees the extremes are at the limits.
    largest = min(limits.rotation, 90.0)
    steps = np.linspace(-1, 1, 2 * math.ceil(largest / 15) + 1)
    angles = np.deg2rad(largest) * np.array(list(itertools.product(steps, repeat=3)))
    turn = np.zeros(3)
    for spacing in sorted(set(spacings)):
        for angle in angles:
            moved = (corners * spacing) @ rotation_matrix(angle).T / spacing
            turn = np.maximum(turn, np.abs(moved - corners).max(axis=0))
    margins = []
    for level in range(1, levels + 1):
        shift = (limits.translation + limits.elastic_limit) / 2 ** (levels - level)
        z, y, x = (math.ceil(along + shift + 1) for along in turn)  # + 1: the interpolation's neighbour
        margins.append((z, y, x))
    return tuple(margins)


def rotation_matrix(angles: np.ndarray) -> np.ndarray:
    """Rotation about z, then y, then x by `angles` (z, y, x) in radians, acting on (z, y, x) vectors: [3, 3]."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix
