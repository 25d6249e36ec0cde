"""Grids, patches and tiles: where every voxel of every level lies.

A level is counted from 1 = coarsest to S = finest; each level halves the voxel of the one before, along all axes or, of
scans with thick slices, along some (`halved_axes`). Along one axis, voxel i of a level with downsample factor f covers
native voxels [f i, f (i + 1)), so its centre lies at native coordinate f (i + 1/2) - 1/2. Tuples run (z, y, x).
Everything here is plain Python.

Spacings may be in any unit. An axis along which the networks do not look, z in 2D, has an infinite spacing: it is never
halved, and kernels are flat along it.
"""

import dataclasses
import math

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]

CUBES: Spacing = (1.0, 1.0, 1.0)  # voxels that are as long along each axis
SLICE_BY_SLICE: Spacing = (math.inf, 1.0, 1.0)  # of networks that see each slice by itself


def along_axes(size: tuple[int, ...], spatial_dims: int = 3) -> Triple:
    """Voxels (z, y, x) of a patch or tile from how a configuration says it.

    Args:
      size: (z, y, x), or one number for all axes that the networks look along; in 2D z is then 1.
      spatial_dims: 3 or 2.
    """
    z, y, x = size if len(size) == 3 else (size[0] if spatial_dims == 3 else 1, size[0], size[0])
    return z, y, x


def level_shape(native_shape: Triple, factors: Spacing) -> Triple:
    """Voxels of a level's grid over a scan of `native_shape`; a last partial voxel counts."""
    # The tolerance keeps 100 / (2.5 / 0.5) from becoming 21 voxels through rounding.
    z, y, x = (max(1, math.ceil(size / factor - 1e-6)) for size, factor in zip(native_shape, factors, strict=True))
    return z, y, x


def halved_axes(spacing: Spacing) -> Triple:
    """By how much the next coarser grid divides the voxels along each axis: 2, or 1 along an axis that is too coarse.

    An axis is halved if its spacing is less than twice that of the finest axis, as in nnU-Net (Isensee et al., 2021).
    Where slices are thick, coarser grids so come nearer to cubes.
    """
    # Headers hold float32: twice the finest spacing is not less than twice.
    z, y, x = (2 if along < (2 - 1e-4) * min(spacing) else 1 for along in spacing)
    return z, y, x


def halvings(spacing: Spacing, count: int) -> tuple[Triple, ...]:
    """`halved_axes` of a grid with this spacing, then of the grid that it becomes, and so on: `count` of them."""
    steps = []
    for _ in range(count):
        steps.append(halved_axes(spacing))
        spacing = times(spacing, steps[-1])
    return tuple(steps)


def level_steps(spacing: Spacing, levels: int) -> tuple[Triple, ...]:
    """For each of S levels, coarsest first, its voxels for one of the level before along each axis; 1 at the coarsest.

    Args:
      spacing: of the finest level.
      levels: S.
    """
    return (1, 1, 1), *reversed(halvings(spacing, levels - 1))


def level_scales(spacing: Spacing, levels: int) -> tuple[Triple, ...]:
    """For each level, coarsest first, the voxels of the finest level for one of it; arguments as `level_steps`."""
    steps = level_steps(spacing, levels)
    return tuple(product(steps[level:]) for level in range(1, levels + 1))


def times(spacing: Spacing, factors: Spacing) -> Spacing:
    """The spacing of a grid whose voxels are so many times as long."""
    z, y, x = (along * factor for along, factor in zip(spacing, factors, strict=True))
    return z, y, x


def product(steps: tuple[Triple, ...]) -> Triple:
    """The product of several steps along each axis; of none it is (1, 1, 1)."""
    z, y, x = (math.prod(along) for along in zip((1, 1, 1), *steps, strict=True))
    return z, y, x


@dataclasses.dataclass(frozen=True)
class PyramidPatch:
    """The shape of a pyramid patch: one patch a level, all about one centre.

    Attributes:
      shape: voxels along each axis, the same at every level; a multiple of 4 along axes that levels halve.
      levels: S.
      spacing: of the finest level, in any unit, see above.
    """

    shape: Triple
    levels: int
    spacing: Spacing = CUBES

    @property
    def scales(self) -> tuple[Triple, ...]:
        """See `level_scales`."""
        return level_scales(self.spacing, self.levels)

    @property
    def thickness(self) -> Spacing:
        """Of a voxel of the finest level along each axis, as a multiple of the finest axis: 1 where it is halved."""
        steps = halved_axes(self.spacing)
        z, y, x = (
            1.0 if step == 2 else along / min(self.spacing) for step, along in zip(steps, self.spacing, strict=True)
        )
        return z, y, x

    def starts(self, centre: Triple) -> tuple[Triple, ...]:
        """First voxel of each level's patch, coarsest first, of the pyramid patch around a voxel of the finest level.

        Along an axis that is halved, level s + 1 starts at 2 (start of level s + N/4), else where level s does: the
        voxel grids nest exactly and all patches share one centre. Nesting leaves the finest start a multiple of
        2^(halvings) plus a constant; the nearest one is taken, so that with two levels `centre` is always one of the
        voxels around the patch's centre.

        Args:
          centre: a voxel of the finest level; may lie anywhere.

        Returns:
          S starts; negative where the patch leaves the scan.
        """
        coarsest = []
        for voxel, size, nesting in zip(centre, self.shape, self.scales[0], strict=True):
            # The finest start that a coarsest start of 0 gives: the recurrence above, summed.
            offset = (nesting - 1) * size / 2
            coarsest.append(round_half_up((voxel + 0.5 - size / 2 - offset) / nesting))
        starts = [(coarsest[0], coarsest[1], coarsest[2])]
        for step in level_steps(self.spacing, self.levels)[1:]:
            starts.append(next_level_start(starts[-1], self.shape, step))
        return tuple(starts)


def cube(edge: int, levels: int) -> PyramidPatch:
    """A pyramid patch of cubes: N voxels along each axis, S levels that halve all axes."""
    return PyramidPatch((edge, edge, edge), levels)


def next_level_start(start: Triple, shape: Triple, step: Triple) -> Triple:
    """Start of the patch at the next finer level that shares the centre of the patch at `start`.

    Args:
      start: first voxel of the patch.
      shape: voxels of both patches.
      step: voxels of the finer level for one of this level, 1 or 2 along each axis.
    """
    z, y, x = (2 * (s + n // 4) if by == 2 else s for s, n, by in zip(start, shape, step, strict=True))
    return z, y, x


def round_half_up(value: float) -> int:
    """The nearest integer; unlike Python's round, steps are even so that no centre is favoured."""
    return math.floor(value + 0.5)
