"""The grids of a pyramid's levels over a scan."""

import dataclasses

Triple = tuple[float, float, float]

AIR = -1024  # HU outside a scan


@dataclasses.dataclass(frozen=True)
class LevelGrids:
    """Which grids the levels have.

    Attributes:
      factors: downsample factor of each level, coarsest first: native voxels per voxel along each axis.
      finest_spacing: mm, (z, y, x). If given, the finest level has this spacing whatever the scanner's, and another
        level's is larger by the ratio of their factors.
      rank: 3, or 2 for slices: along z every level keeps the scan's voxels.
    """

    factors: tuple[float, ...]
    finest_spacing: Triple | None = None
    rank: int = 3

    def level_factors(self, spacing: Triple) -> tuple[Triple, ...]:
        """Native voxels per voxel of each level, coarsest first, along (z, y, x), in a scan of this spacing in mm."""
        if self.finest_spacing is None:
            return tuple(self._in_plane((factor, factor, factor)) for factor in self.factors)
        # Headers hold float32: to six digits a scan that has the finest spacing gets a factor of exactly 1.
        z, y, x = (round(mm / own, 6) for mm, own in zip(self.finest_spacing, spacing, strict=True))
        ratios = [factor / self.factors[-1] for factor in self.factors]
        return tuple(self._in_plane((ratio * z, ratio * y, ratio * x)) for ratio in ratios)

    def _in_plane(self, factors: Triple) -> Triple:
        return factors if self.rank == 3 else (1.0, *factors[1:])


def times(spacing: Triple, factors: Triple) -> Triple:
    """Spacing of a level in mm, from the scan's and the level's downsample factors."""
    z, y, x = (mm * factor for mm, factor in zip(spacing, factors, strict=True))
    return z, y, x
