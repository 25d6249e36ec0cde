"""The grids of a pyramid's levels over a scan."""

import dataclasses
import itertools

from autocontext_jax.errors import require

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class LevelGrids:
    """Which grids the levels have; the section `levels` of a configuration.

    Attributes:
      factors: downsample factor of each level, coarsest first. They halve from level to level: (4, 2) in the paper.
      unit: what the factors are multiples of. `mm`: of the median spacing of the training scans, so that every scan has
        the same spacing at a level; `voxels`: of each scan's own voxels, as in the paper.
      finest_spacing: with `mm`, the finest level's spacing, (z, y, x); () is the median's multiple.
      spatial_dims: 3; or 2 for networks, patches and levels that see one slice at a time: along z every level keeps
        the scan's voxels.
    """

    factors: tuple[float, ...] = (4.0, 2.0)
    unit: str = "voxels"
    finest_spacing: tuple[float, ...] = ()
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

    def with_spacing(self, median: Triple) -> "LevelGrids":
        """These grids with the spacing that they have in a run whose training scans have this median spacing in mm."""
        if self.unit == "voxels" or self.finest_spacing:
            return self
        return dataclasses.replace(self, finest_spacing=times(median, (self.factors[-1],) * 3))

    def level_factors(self, spacing: Triple) -> tuple[Triple, ...]:
        """Native voxels per voxel of each level, coarsest first, along (z, y, x), in a scan of this spacing in mm."""
        assert self.finest_spacing or self.unit == "voxels", "grids in mm need `with_spacing`"
        if self.unit == "voxels":
            return tuple(self._in_plane((factor, factor, factor)) for factor in self.factors)
        # Headers hold float32: to six digits a scan that has the finest spacing gets a factor of exactly 1.
        z, y, x = (round(mm / own, 6) for mm, own in zip(self.finest_spacing, spacing, strict=True))
        ratios = [factor / self.factors[-1] for factor in self.factors]
        return tuple(self._in_plane((ratio * z, ratio * y, ratio * x)) for ratio in ratios)

    def _in_plane(self, factors: Triple) -> Triple:
        return factors if self.spatial_dims == 3 else (1.0, *factors[1:])


def times(spacing: Triple, factors: Triple) -> Triple:
    """Spacing of a level in mm, from the scan's and the level's downsample factors."""
    z, y, x = (mm * factor for mm, factor in zip(spacing, factors, strict=True))
    return z, y, x
