"""Grids, patches and tiles: where every voxel of every level lies.

A level is counted from 1 = coarsest to S = finest; each level halves the voxel of the one before. Along one axis,
voxel i of a level with downsample factor f covers native voxels [f i, f (i + 1)), so its centre lies at native
coordinate f (i + 1/2) - 1/2. Tuples run (z, y, x). Everything here is plain Python and numpy.

The rank is that of the networks: 3, or 2 for images that are seen slice by slice. A patch of rank 2 is one voxel thick,
and its levels halve along y and x alone.
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


def patch_shape(edge: int, rank: int) -> Triple:
    """Voxels of a patch: (N, N, N), or (1, N, N) of rank 2."""
    return (edge if rank == 3 else 1), edge, edge


def halving(rank: int) -> Triple:
    """Voxels of the next finer level per voxel of a level along each axis: (2, 2, 2), or (1, 2, 2) of rank 2."""
    return (2 if rank == 3 else 1), 2, 2


def pyramid_starts(centre: Triple, edge: int, levels: int, rank: int = 3) -> tuple[Triple, ...]:
    """First voxel of each level's patch, coarsest first, of the pyramid patch around a voxel of the finest level.

    Level s + 1 starts at 2 (start of level s + N/4): the voxel grids nest exactly and all patches share one centre.
    Nesting leaves the finest start a multiple of 2^(S-1) plus a constant; the nearest one is taken, so that with two
    levels `centre` is always one of the 2^3 voxels around the patch's centre.

    Args:
      centre: a voxel of the finest level; may lie anywhere.
      edge: N, a multiple of 4.
      levels: S.
      rank: 3 or 2.

    Returns:
      S starts; negative where the patch leaves the scan.
    """
    coarsest = []
    for voxel, size, step in zip(centre, patch_shape(edge, rank), halving(rank), strict=True):
        nesting = step ** (levels - 1)
        # The finest start that a coarsest start of 0 gives: the recurrence above, summed.
        offset = (nesting - 1) * size / 2
        coarsest.append(round_half_up((voxel + 0.5 - size / 2 - offset) / nesting))
    starts = [(coarsest[0], coarsest[1], coarsest[2])]
    for _ in range(levels - 1):
        starts.append(next_level_start(starts[-1], edge, rank))
    return tuple(starts)


def next_level_start(start: Triple, edge: int, rank: int = 3) -> Triple:
    """Start of the patch at the next finer level that shares the centre of the patch at `start`."""
    z, y, x = start
    return (2 * (z + edge // 4) if rank == 3 else z), 2 * (y + edge // 4), 2 * (x + edge // 4)


def round_half_up(value: float) -> int:
    """The nearest integer; unlike Python's round, steps are even so that no centre is favoured."""
    return math.floor(value + 0.5)


@dataclasses.dataclass(frozen=True)
class SpatialLimits:
    """How far the spatial augmentation may move a voxel.

    Attributes:
      rotation: degrees about each axis, uniform in [-rotation, rotation]. Of rank 2 nothing moves out of its slice:
        rotation is about z alone.
      translation: voxels of the finest level along each axis, uniform in [-translation, translation].
      elastic_sigma: standard deviation of the B-spline control vectors, voxels of the finest level.
      elastic_spacing: distance of the control points, voxels of the finest level.
      scaling: relative, the same along all axes, uniform in [-scaling, scaling]; of rank 2 along z too, unseen.
      unmoved: share of the patches that stay where they are. What moves is interpolated, and so a little blurred, which
        scans never are when they are predicted.
      mirror_classes: half of the patches are mirrored, right for left; the class that each class is then, so that what
        is drawn in pairs keeps its names. () mirrors none.
    """

    rotation: float = 5.0
    translation: float = 4.0
    elastic_sigma: float = 4.0
    elastic_spacing: int = 32
    scaling: float = 0.0
    unmoved: float = 0.0
    mirror_classes: tuple[int, ...] = ()

    @property
    def elastic_limit(self) -> float:
        """Where a displacement is clipped, voxels of the finest level.

        A cubic B-spline of independent control vectors has at most 0.35 of their deviation, so this is beyond four
        deviations of the field: a bound for the margin that practically never acts.
        """
        return 1.5 * self.elastic_sigma


def crop_margins(
    edge: int, levels: int, spacings: list[tuple[float, float, float]], limits: SpatialLimits | None, rank: int = 3
) -> tuple[Triple, ...]:
    """Voxels to read beyond each side of each level's patch so that no augmented voxel falls outside the crop.

    Args:
      edge: N.
      levels: S.
      spacings: the finest level's spacing in mm of every scan of the data set; the margin holds for all of them.
      limits: None means no spatial augmentation and no margin.
      rank: 3 or 2.

    Returns:
      A (z, y, x) margin for each level, coarsest first.
    """
    if limits is None or limits == SpatialLimits(0.0, 0.0, 0.0, limits.elastic_spacing):
        return ((0, 0, 0),) * levels
    corners = np.array(list(itertools.product((-1, 1), repeat=3))) * edge / 2
    # Past a right angle a corner comes no further out; up to 15 degrees the extremes are at the limits.
    largest = min(limits.rotation, 90.0)
    steps = np.linspace(-1, 1, 2 * math.ceil(largest / 15) + 1)
    angles = np.deg2rad(largest) * np.array(list(itertools.product(steps, repeat=3))) * turning_axes(rank)
    turn = np.zeros(3)
    for spacing in sorted(set(spacings)):
        for angle in angles:
            moved = (1 + limits.scaling) * (corners * spacing) @ rotation_matrix(angle).T / spacing
            turn = np.maximum(turn, np.abs(moved - corners).max(axis=0))
    margins = []
    for level in range(1, levels + 1):
        shift = (limits.translation + limits.elastic_limit) / 2 ** (levels - level)
        z, y, x = (math.ceil(along + shift + 1) for along in turn)  # + 1: the interpolation's neighbour
        margins.append((z if rank == 3 else 0, y, x))
    return tuple(margins)


def turning_axes(rank: int) -> Triple:
    """1 for each axis that a patch may be rotated about: all, or z alone of rank 2."""
    return (1, 1, 1) if rank == 3 else (1, 0, 0)


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
