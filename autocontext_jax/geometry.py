"""Grids, patches and tiles: where every voxel of every level lies.

A level is counted from 1 = coarsest to S = finest; each level halves the voxel of the one before. Along one axis,
voxel i of a level with downsample factor f covers native voxels [f i, f (i + 1)), so its centre lies at native
coordinate f (i + 1/2) - 1/2. Tuples run (z, y, x). Everything here is plain Python and numpy.

The spatial_dims is that of the networks: 3, or 2 for images that are seen slice by slice. A patch in 2D is one voxel
thick, and its levels halve along y and x alone.
"""

import math

Triple = tuple[int, int, int]


def level_shape(native_shape: Triple, factors: tuple[float, float, float]) -> Triple:
    """Voxels of a level's grid over a scan of `native_shape`; a last partial voxel counts."""
    # The tolerance keeps 100 / (2.5 / 0.5) from becoming 21 voxels through rounding.
    z, y, x = (max(1, math.ceil(size / factor - 1e-6)) for size, factor in zip(native_shape, factors, strict=True))
    return z, y, x


def patch_shape(edge: int, spatial_dims: int) -> Triple:
    """Voxels of a patch: (N, N, N), or (1, N, N) in 2D."""
    return (edge if spatial_dims == 3 else 1), edge, edge


def halving(spatial_dims: int) -> Triple:
    """Voxels of the next finer level per voxel of a level along each axis: (2, 2, 2), or (1, 2, 2) in 2D."""
    return (2 if spatial_dims == 3 else 1), 2, 2


def pyramid_starts(centre: Triple, edge: int, levels: int, spatial_dims: int = 3) -> tuple[Triple, ...]:
    """First voxel of each level's patch, coarsest first, of the pyramid patch around a voxel of the finest level.

    Level s + 1 starts at 2 (start of level s + N/4): the voxel grids nest exactly and all patches share one centre.
    Nesting leaves the finest start a multiple of 2^(S-1) plus a constant; the nearest one is taken, so that with two
    levels `centre` is always one of the 2^3 voxels around the patch's centre.

    Args:
      centre: a voxel of the finest level; may lie anywhere.
      edge: N, a multiple of 4.
      levels: S.
      spatial_dims: 3 or 2.

    Returns:
      S starts; negative where the patch leaves the scan.
    """
    coarsest = []
    for voxel, size, step in zip(centre, patch_shape(edge, spatial_dims), halving(spatial_dims), strict=True):
        nesting = step ** (levels - 1)
        # The finest start that a coarsest start of 0 gives: the recurrence above, summed.
        offset = (nesting - 1) * size / 2
        coarsest.append(round_half_up((voxel + 0.5 - size / 2 - offset) / nesting))
    starts = [(coarsest[0], coarsest[1], coarsest[2])]
    for _ in range(levels - 1):
        starts.append(next_level_start(starts[-1], edge, spatial_dims))
    return tuple(starts)


def next_level_start(start: Triple, edge: int, spatial_dims: int = 3) -> Triple:
    """Start of the patch at the next finer level that shares the centre of the patch at `start`."""
    z, y, x = start
    return (2 * (z + edge // 4) if spatial_dims == 3 else z), 2 * (y + edge // 4), 2 * (x + edge // 4)


def round_half_up(value: float) -> int:
    """The nearest integer; unlike Python's round, steps are even so that no centre is favoured."""
    return math.floor(value + 0.5)
