"""The levels, the patch and the depth of the networks that a data set needs, from what its survey says.

Nothing is read or compiled here: one number, the length of a patch's edge, says how much a step may take, and all else
follows from the data.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.survey import Survey
from autocontext_jax.geometry import Spacing, Triple, along_axes, times
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import PyramidConfig, divisor, size_unit
from autocontext_jax.sections import keys

MOST_LEVELS = 4
# The coarsest patch holds at least this share of the median scan, as nnU-Net requires it before it adds a coarser
# network (Isensee et al., 2021); or along each axis so many times the largest class.
SHARE_SEEN = 0.25
CLASSES_SEEN = 4.0
# Voxels that the thinnest class must have across it, so that the finest level may be coarser than the scans; and how
# many times coarser it may be: as in the paper.
RESOLVED = 4.0
COARSEST_FINEST = 2.0
DEEPEST = 4  # resolutions of the paper's networks
SMALLEST_MAP = 3.5  # voxels of the coarsest feature map along the axes that are pooled


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The grids of a pyramid and of its networks.

    Attributes:
      levels: the section `levels` of a configuration; in mm with the finest level's spacing.
      spacing: of the finest level, mm along (z, y, x).
      patch: voxels (z, y, x).
      depth: resolutions of the networks.
      scan: voxels (z, y, x) of the median scan at the finest level.
      share: of the median scan, in 2D of a slice of it, what the finest and what the coarsest patch hold.
    """

    levels: LevelGrids
    spacing: Spacing
    patch: Triple
    depth: int
    scan: Spacing
    share: tuple[float, float]

    @property
    def voxels(self) -> int:
        """Of one pyramid patch, all levels together."""
        return math.prod(self.patch) * len(self.levels.factors)


def target_spacing(survey: Survey) -> tuple[Spacing, bool]:
    """The spacing that the finest level multiplies, mm along (z, y, x); and whether it is not the median.

    nnU-Net's rule: the median along each axis, but along the axis of thick slices the 10th percentile, see
    `survey.survey`.
    """
    median = np.array([each.median for each in survey.spacing])
    shape = np.array([each.median for each in survey.shape])
    thick = int(np.argmax(median))
    others = [axis for axis in range(3) if axis != thick]
    if median[thick] > 3 * median[others].max() and shape[thick] * 3 < shape[others].min():
        median[thick] = max(survey.spacing_p10[thick], median[others].max())
    z, y, x = (float(f"{mm:.7g}") for mm in median)
    return (z, y, x), (z, y, x) != tuple(each.median for each in survey.spacing)


def spatial_dims(survey: Survey, given: Mapping[str, Any]) -> int:
    """2 where every scan is a single slice, or where it is given; else 3."""
    return given.get("levels.spatial_dims", 2 if survey.shape[0].largest == 1 else 3)


def plan_geometry(survey: Survey, edge: int, given: Mapping[str, Any]) -> Geometry:
    """The geometry of a data set for patches of about edge^3 voxels, in 2D of edge^2.

    Levels are added until the coarsest sees enough, `SHARE_SEEN` or `CLASSES_SEEN`. A finest level that no class needs,
    `RESOLVED`, is left out where there are more than two, unless the finest level's spacing is given.

    Args:
      survey: of the data set.
      edge: of a patch whose voxels are cubes, voxels.
      given: keys that the user has set, see `plan.Choices`.
    """
    own = {name: given[f"levels.{name}"] for name in keys(LevelGrids) if f"levels.{name}" in given}
    base = dataclasses.replace(LevelGrids(unit="mm", spatial_dims=spatial_dims(survey, given)), **own)
    if "factors" in own:
        return _geometry(survey, base, edge, given)
    finest, is_given = 1.0, bool(base.finest_spacing) or base.unit == "voxels"
    while True:
        for count in range(1, MOST_LEVELS + 1):
            factors = tuple(finest * 2.0 ** (count - number) for number in range(1, count + 1))
            chosen = _geometry(survey, dataclasses.replace(base, factors=factors), edge, given)
            if _sees_enough(survey, chosen):
                break
        if is_given or finest >= COARSEST_FINEST or count <= 2:
            return chosen
        # Would the second finest level do as the finest?
        if not _resolves(survey, times(chosen.spacing, chosen.levels.scales[-2]), base.spatial_dims):
            return chosen
        finest *= 2


def _geometry(survey: Survey, levels: LevelGrids, edge: int, given: Mapping[str, Any]) -> Geometry:
    """The geometry with these levels."""
    target, _ = target_spacing(survey)
    known = levels.with_spacing(target)
    extent = [each.median for each in survey.extent]
    if known.finest_spacing:
        z, y, x = known.finest_spacing
    else:
        z, y, x = times(target, (known.factors[-1],) * 3)
    spacing = (z, y, x)
    planes, rows, columns = (max(1.0, along / mm) for along, mm in zip(extent, spacing, strict=True))
    scan = planes, rows, columns
    patch = given.get("loader.patch_size")
    ideal = along_axes(patch, known.spatial_dims) if patch else _ideal_patch(scan, spacing, edge, known.spatial_dims)
    depth = given.get("model.depth") or _depth(ideal, known)
    planes, rows, columns = size_unit(NetworkConfig(depth=depth), _connected(known))
    shared = given.get("mesh.space", 1) if known.spatial_dims == 3 else 1  # in 2D `check_patch` refuses it
    units = planes * shared, rows, columns
    z, y, x = (int(size) if patch else _multiple(size, unit) for size, unit in zip(ideal, units, strict=True))
    shares = (np.minimum(1.0, np.array((z, y, x)) * scale / np.array(scan)) for scale in (1, known.scales[0]))
    # Of what is seen slice by slice, the share of a slice.
    finest_share, coarsest_share = (float(np.prod(share[3 - known.spatial_dims :])) for share in shares)
    return Geometry(known, spacing, (z, y, x), depth, scan, (finest_share, coarsest_share))


def _ideal_patch(scan: Spacing, spacing: Spacing, edge: int, dims: int) -> Spacing:
    """Voxels of a patch of about edge^dims voxels, as long in mm along each axis, but no longer than the scan."""
    free = list(range(3 - dims, 3))
    sizes = [1.0, 1.0, 1.0]
    voxels = float(edge**dims)
    while free:
        length = (voxels * math.prod(spacing[axis] for axis in free)) ** (1 / len(free))
        short = [axis for axis in free if length / spacing[axis] >= scan[axis]]
        for axis in short or free:
            sizes[axis] = scan[axis] if short else length / spacing[axis]
            voxels /= sizes[axis]
        free = [axis for axis in free if axis not in short] if short else []
    z, y, x = sizes
    return z, y, x


def _depth(patch: Spacing, levels: LevelGrids) -> int:
    """The most resolutions, of at most `DEEPEST`, that leave the coarsest map `SMALLEST_MAP` voxels."""
    for depth in range(DEEPEST, 1, -1):
        every = divisor(NetworkConfig(depth=depth), _connected(levels))
        if all(size / by >= SMALLEST_MAP for size, by in zip(patch, every, strict=True) if by > 1):
            return depth
    return 2


def _connected(levels: LevelGrids) -> PyramidConfig:
    return PyramidConfig(levels=len(levels.factors), spacing=levels.relative_spacing)


def _multiple(size: float, unit: int) -> int:
    """The multiple of a unit below a size, or the one above where the former loses more than an eighth."""
    below = unit * int(size // unit)
    return below if below >= 7 / 8 * size else below + unit


def _sees_enough(survey: Survey, made: Geometry) -> bool:
    if made.share[1] >= SHARE_SEEN:
        return True
    found = [each.extent for each in survey.classes if each.extent]
    if not found:
        return False
    scale = made.levels.scales[0]
    for axis in range(3 - made.levels.spatial_dims, 3):
        seen = made.patch[axis] * made.spacing[axis] * scale[axis]
        largest = max(extent[axis].median for extent in found)
        if seen < min(survey.extent[axis].median, CLASSES_SEEN * largest):
            return False
    return True


def _resolves(survey: Survey, spacing: Spacing, dims: int) -> bool:
    """Whether a grid has enough voxels across every class; in 2D across it in a slice."""
    found = [each.thickness for each in survey.classes if each.thickness]
    return bool(found) and all(
        thickness[axis].median >= RESOLVED * spacing[axis] for thickness in found for axis in range(3 - dims, 3)
    )
