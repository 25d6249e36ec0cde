"""How far augmentation may go, and how much of a scan it therefore needs around a patch. Plain Python and numpy."""

import dataclasses
import itertools
import math

import numpy as np

from autocontext_jax.data.labels import IGNORE, LabelSpec
from autocontext_jax.errors import UserError, require
from autocontext_jax.geometry import PyramidPatch, Spacing, Triple

AXES = "zyx"  # of arrays [D, H, W], as a configuration names them

# What a message proposes for `AugmentationConfig.flip`, which once was True or False.
FLIP_VALUES = '"x" (what True was), "zyx" or others of these letters, or "" (what False was)'


@dataclasses.dataclass(frozen=True)
class SpatialRanges:
    """How far the spatial augmentation may move a voxel.

    Distances are voxels of the finest level. Along the axis of thick slices they are as many millimetres as along the
    others, see `geometry.PyramidPatch.thickness`; in 2D a patch does not move along z.

    Attributes:
      rotation: degrees about each axis, uniform in [-rotation, rotation]; in 2D about z alone.
      translation: voxels along each axis, uniform in [-translation, translation].
      elastic_sigma: standard deviation of the B-spline control vectors, voxels.
      elastic_spacing: distance of the control points, voxels.
      scaling: relative, the same along all axes, uniform in [-scaling, scaling].
      probability: that a patch is moved at all.
      flip: axes along which half of the patches are mirrored, each independently of the others: letters of "zyx".
      flip_classes: [K] the class that each class becomes where x is mirrored, which exchanges left and right, see
        `images.grid`; () where x is not mirrored.
      flip_numbers: the same of the numbers in label maps; () where they are those of the classes.
    """

    rotation: float = 5.0
    translation: float = 4.0
    elastic_sigma: float = 4.0
    elastic_spacing: int = 32
    scaling: float = 0.0
    probability: float = 1.0
    flip: str = ""
    flip_classes: tuple[int, ...] = ()
    flip_numbers: tuple[int, ...] = ()

    def __post_init__(self):
        require(bool(self.flip_classes) == ("x" in self.flip), self, "flip_classes", "classes where x is mirrored")

    @property
    def elastic_limit(self) -> float:
        """Where a displacement is clipped, voxels.

        A cubic B-spline of independent control vectors has at most 0.35 of their deviation, so this is beyond four
        deviations of the field: it bounds the margin and practically never acts.
        """
        return 1.5 * self.elastic_sigma

    @property
    def moves(self) -> bool:
        """Whether any patch can be changed."""
        size = self.rotation or self.translation or self.elastic_sigma or self.scaling
        return bool((self.probability and size) or self.flip)


@dataclasses.dataclass(frozen=True)
class IntensityRanges:
    """How far the intensity augmentation may go; zeros leave the image as it is.

    Attributes:
      noise: largest standard deviation of white noise, in units of what is stored: HU of CT, see `images.spec`.
      shift: largest shift of all intensities, in the same units.
      scale: largest relative change of contrast about 0.
    """

    noise: float = 0.0
    shift: float = 0.0
    scale: float = 0.0


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """The section `augmentation` of a configuration.

    Distances are voxels of the finest level. Along the axis of thick slices they are as many millimetres as along the
    others; in 2D a patch does not move along z.

    Attributes:
      rotation: degrees about each axis, uniform in [-rotation, rotation]; in 2D about z alone.
      translation: voxels along each axis.
      scaling: relative change of size, in [0, 1).
      elastic_sigma: standard deviation of the elastic deformation's control vectors, voxels.
      elastic_spacing: distance of its control points, voxels.
      probability: share of the patches that are moved. Moving interpolates, and so blurs a little, which scans never
        are when they are predicted.
      flip: axes along which half of the patches are mirrored, each independently of the others: some of the letters
        "zyx", in any order; "" is none. "x" exchanges left and right, "y" front and back, "z" top and bottom.
      flip_pairs: classes that exchange names where left and right are exchanged, such as
        ("right_kidney=left_kidney",); of regions those of one value each.
      noise: largest standard deviation of white noise, in units of what is stored: HU of CT, see `images.spec`.
      intensity_shift: largest shift of all intensities, in the same units.
      intensity_scale: largest relative change of contrast about 0.
    """

    rotation: float = 5.0
    translation: float = 4.0
    scaling: float = 0.0
    elastic_sigma: float = 4.0
    elastic_spacing: int = 32
    probability: float = 1.0
    flip: str = ""
    flip_pairs: tuple[str, ...] = ()
    noise: float = 0.0
    intensity_shift: float = 0.0
    intensity_scale: float = 0.0

    def __post_init__(self):
        for name in ("rotation", "translation", "elastic_sigma", "noise", "intensity_shift"):
            require(getattr(self, name) >= 0, self, name, "0 or more")
        for name in ("scaling", "intensity_scale"):
            require(0 <= getattr(self, name) < 1, self, name, "a fraction in [0, 1)")
        require(self.elastic_spacing >= 1, self, "elastic_spacing", "at least 1")
        require(0 <= self.probability <= 1, self, "probability", "a share in [0, 1]")
        text = self.flip if isinstance(self.flip, str) else ""
        axes = "".join(axis for axis in AXES if axis in text)
        require(
            sorted(axes) == sorted(text) and text == self.flip, self, "flip", f"axes to mirror along: {FLIP_VALUES}"
        )
        object.__setattr__(self, "flip", axes)  # "xz" and "zx" are the same configuration

    def spatial(self, labels: LabelSpec) -> SpatialRanges | None:
        """The spatial ranges for a data set's labels; None if nothing moves."""
        flip_classes = self.flip_classes(labels)
        ranges = SpatialRanges(
            self.rotation,
            self.translation,
            self.elastic_sigma,
            self.elastic_spacing,
            self.scaling,
            self.probability,
            self.flip,
            flip_classes,
            _flip_numbers(labels, flip_classes),
        )
        return ranges if ranges.moves else None

    def intensity(self) -> IntensityRanges:
        """The intensity ranges."""
        return IntensityRanges(self.noise, self.intensity_shift, self.intensity_scale)

    def flip_classes(self, labels: LabelSpec) -> tuple[int, ...]:
        """[K] the class that each class becomes when left and right are exchanged; () if x is not mirrored.

        Args:
          labels: of the data set.

        Raises:
          UserError: a pair with an unknown class, with a class of another pair, or with a region of several values; or
            another region holds a part of a pair alone.
        """
        if "x" not in self.flip:
            return ()
        names = list(labels.classes)
        numbers = list(range(len(names)))
        for pair in self.flip_pairs:
            right, _, left = pair.partition("=")
            if right not in names[1:] or left not in names[1:]:
                raise UserError(
                    f"config key augmentation.flip_pairs holds {pair!r}; expected RIGHT=LEFT with two of "
                    f"{tuple(names[1:])}"
                )
            first, second = names.index(right), names.index(left)
            if (numbers[first], numbers[second]) != (first, second):
                raise UserError(
                    f"config key augmentation.flip_pairs holds {pair!r}; expected each class in one pair at most"
                )
            if several := [name for name in (right, left) if len(labels.members[names.index(name)]) > 1]:
                raise UserError(
                    f"config key augmentation.flip_pairs holds {pair!r}, and {several[0]} is a region of several "
                    "values; expected classes of one value each"
                )
            numbers[first], numbers[second] = second, first
        table = _flip_numbers(labels, tuple(numbers))
        for number, name in enumerate(names if labels.regions else ()):
            after = sorted(table[member] for member in labels.members[number])
            if after != sorted(labels.members[numbers[number]]):
                raise UserError(
                    f"config key augmentation.flip_pairs is {self.flip_pairs!r}, and {name} is a region with one side "
                    "of a pair alone, which would show the other side when left and right are exchanged; expected "
                    "regions of both sides: leave x out of augmentation.flip"
                )
        return tuple(numbers)


def _flip_numbers(labels: LabelSpec, flip_classes: tuple[int, ...]) -> tuple[int, ...]:
    """The number that each number in label maps becomes when its class becomes that of `flip_classes`.

    () where that is the same table: numbers of ordinary classes, all voxels labelled.
    """
    if not flip_classes or not (labels.regions or labels.ignore >= 0):
        return ()
    table = list(range(IGNORE + 1))  # beyond the data set's numbers, IGNORE stays what it is
    for number, becomes in enumerate(flip_classes):
        if number != becomes:
            (old,), (new,) = labels.members[number], labels.members[becomes]
            table[old] = new
    return tuple(table)


def crop_margins(patch: PyramidPatch, spacing: Spacing, ranges: SpatialRanges | None) -> tuple[Triple, ...]:
    """Voxels to read beyond each side of each level's patch, so that no augmented voxel falls outside the crop.

    Args:
      patch: of the levels.
      spacing: of the scan's finest level, mm, (z, y, x).
      ranges: None means no spatial augmentation and no margin.

    Returns:
      A (z, y, x) margin for each level, coarsest first.
    """
    if ranges is None or not dataclasses.replace(ranges, flip="", flip_classes=()).moves:
        return ((0, 0, 0),) * patch.levels
    seen = np.isfinite(patch.thickness)
    half = np.array(list(itertools.product((-1, 1), repeat=3))) * patch.shape / 2
    # Beyond a right angle a corner moves no further; up to 15 degrees the extremes are at the limits.
    largest = min(ranges.rotation, 90.0)
    steps = np.linspace(-1, 1, 2 * math.ceil(largest / 15) + 1)
    angles = np.deg2rad(largest) * np.array(list(itertools.product(steps, repeat=3))) * turning_axes(patch)
    shift = (ranges.translation + ranges.elastic_limit) / np.array(patch.thickness)
    margins = []
    for scale in patch.scales:
        corners = half * scale  # in voxels of the finest level
        turn = np.zeros(3)
        for angle in angles:
            moved = (1 + ranges.scaling) * (corners * spacing) @ rotation_matrix(angle).T / spacing
            turn = np.maximum(turn, np.abs(moved - corners).max(axis=0))
        # + 1: the interpolation's neighbour
        z, y, x = np.where(seen, np.ceil((turn + shift) / scale + 1), 0).astype(int).tolist()
        margins.append((z, y, x))
    return tuple(margins)


def turning_axes(patch: PyramidPatch) -> Triple:
    """1 for each axis (z, y, x) that a patch may be rotated about: all in 3D, z alone in 2D."""
    z, y, x = (int(np.isfinite(np.delete(patch.thickness, axis)).all()) for axis in range(3))
    return z, y, x


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
