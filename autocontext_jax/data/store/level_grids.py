"""The grids of a pyramid's levels over a scan."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from autocontext_jax.errors import require
from autocontext_jax.geometry import (
    CUBES,
    SLICE_BY_SLICE,
    PyramidPatch,
    Spacing,
    Triple,
    halved_axes,
    level_scales,
    times,
)


@dataclasses.dataclass(frozen=True)
class LevelGrids:
    """Which grids the levels have; the section `levels` of a configuration.

    Attributes:
      factors: downsample factor of each level, coarsest first. They halve from level to level: (4, 2) in the paper.
      unit: what the factors are multiples of. `mm`: of the median spacing of the training scans, so that every scan has
        the same spacing at a level; `voxels`: of each scan's own voxels, as in the paper.
      finest_spacing: with `mm`, the finest level's spacing, (z, y, x); () is the median's multiple.
      anisotropic: with `mm`, whether thick slices stay thick: levels and networks halve an axis only where its spacing
        is less than twice that of the finest axis at that resolution, and kernels are flat along it until then, as in
        nnU-Net. Factors are those of the axes that are halved. False halves all axes always.
      spatial_dims: 3; or 2 for networks, patches and levels that see one slice at a time: along z every level keeps
        the scan's voxels.
    """

    factors: tuple[float, ...] = (4.0, 2.0)
    unit: str = "voxels"
    finest_spacing: tuple[float, ...] = ()
    anisotropic: bool = True
    spatial_dims: int = 3

    def __post_init__(self):
        halving = all(coarser == 2 * finer for coarser, finer in itertools.pairwise(self.factors))
        good = bool(self.factors) and self.factors[-1] > 0 and halving
        require(good, self, "factors", "factors that halve from level to level, coarsest first, such as (4, 2)")
        require(self.unit in ("mm", "voxels"), self, "unit", "one of mm, voxels")
        good = len(self.finest_spacing) in (0, 3) and all(mm > 0 for mm in self.finest_spacing)
        require(good, self, "finest_spacing", "(z, y, x) in mm, or ()")
        require(self.unit == "mm" or not self.finest_spacing, self, "finest_spacing", "() where levels.unit is voxels")
        require(self.spatial_dims in (2, 3), self, "spatial_dims", "3, or 2 to see a scan slice by slice")

    @property
    def known(self) -> bool:
        """Whether the grids follow from this section alone, without the spacing of the training scans."""
        return self.unit == "voxels" or not self.anisotropic or bool(self.finest_spacing)

    def with_spacing(self, median: Spacing) -> "LevelGrids":
        """These grids with the spacing that they have in a run whose training scans have this median spacing in mm."""
        if self.unit == "voxels" or self.finest_spacing:
            return self
        return dataclasses.replace(self, finest_spacing=times(median, self._finest_factors(median)))

    def _finest_factors(self, median: Spacing) -> Spacing:
        """Of the finest level along each axis: it halves the axes of the median spacing as coarser levels do."""
        rest = self.factors[-1]
        if not self.anisotropic:
            return rest, rest, rest
        factors, spacing = CUBES, median if self.spatial_dims == 3 else (math.inf, *median[1:])
        while rest != 1:
            step = 2.0 if rest >= 2 else rest
            rest /= step
            axes = halved_axes(times(spacing, factors))
            z, y, x = (factor * (step if by == 2 else 1.0) for factor, by in zip(factors, axes, strict=True))
            factors = (z, y, x)
        return factors

    @property
    def relative_spacing(self) -> Spacing:
        """The finest level's spacing as networks and patches depend on it, see `geometry`."""
        assert self.known, "grids in mm need `with_spacing`"
        if self.unit == "voxels" or not self.anisotropic:
            return CUBES if self.spatial_dims == 3 else SLICE_BY_SLICE
        z, y, x = self.finest_spacing
        return (z if self.spatial_dims == 3 else math.inf), y, x

    @property
    def scales(self) -> tuple[Triple, ...]:
        """For each level, coarsest first, the voxels of the finest level for one of it along (z, y, x)."""
        return level_scales(self.relative_spacing, len(self.factors))

    def only(self, levels: Sequence[int]) -> "LevelGrids":
        """The grids of some consecutive levels, from 1 = coarsest, of these."""
        factors = tuple(self.factors[level - 1] for level in levels)
        if not self.finest_spacing:
            return dataclasses.replace(self, factors=factors)
        z, y, x = self.finest_spacing
        finest = times((z, y, x), self.scales[levels[-1] - 1])
        return dataclasses.replace(self, factors=factors, finest_spacing=finest)

    def patch(self, shape: Triple) -> PyramidPatch:
        """The pyramid patch of these grids with so many voxels."""
        return PyramidPatch(shape, len(self.factors), self.relative_spacing)

    def level_factors(self, spacing: Spacing) -> tuple[Spacing, ...]:
        """Native voxels per voxel of each level, coarsest first, along (z, y, x), in a scan of this spacing in mm."""
        if self.unit == "voxels":
            finest = (self.factors[-1],) * 3
        else:
            assert self.finest_spacing, "grids in mm need `with_spacing`"
            # Headers hold float32: to six digits a scan that has the finest spacing gets a factor of exactly 1.
            z, y, x = (round(mm / own, 6) for mm, own in zip(self.finest_spacing, spacing, strict=True))
            finest = (z, y, x)
        if self.spatial_dims == 2:
            finest = (1.0, *finest[1:])
        return tuple(times(finest, scale) for scale in self.scales)
