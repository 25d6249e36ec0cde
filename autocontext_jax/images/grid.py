"""The grid of a scan as its file stores it, and the canonical orientation that everything else uses.

Canonical means axes [D, H, W] = z, y, x whose indices grow towards the patient's superior, posterior and left (DICOM's
LPS, as x, y, z). So the last axis, x, runs from the patient's right to the left: mirroring along it, and along no
other, exchanges left and right. (In a picture without a patient, such as a PNG file, it runs along the rows.) A scan is
brought there by the permutation and flips of its file's axes that come nearest: an oblique scan stays oblique, and no
voxel is resampled.
"""

import dataclasses

import numpy as np

from autocontext_jax.images.stack import Stack


@dataclasses.dataclass(frozen=True)
class NiftiForms:
    """How a NIfTI header places its voxels: its fields as they are, so that a mask's header can repeat them.

    Attributes:
      version: 1 or 2.
      pixdim: qfac, then the size of a voxel along i, j, k.
      units: `xyzt_units`.
      qform_code: above 0 where the quaternion counts.
      quaternion: b, c, d, then the offsets along x, y, z.
      sform_code: above 0 where the matrix counts.
      sform: its three rows.
    """

    version: int
    pixdim: tuple[float, ...]
    units: int
    qform_code: int
    quaternion: tuple[float, ...]
    sform_code: int
    sform: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A scan's own grid exactly as its file stores it, so that a mask can be written on it.

    Attributes:
      size: voxels along the file's axes (i, j, k), the fastest first.
      spacing: mm along i, j, k.
      origin: mm, patient (x, y, z) of the centre of voxel (0, 0, 0).
      direction: 3×3 by rows; row = patient axis x, y, z; column = unit vector of i, j, k.
      orientation: where i, j, k point, nearest: one of L/R, P/A, S/I each, as "LPS" (canonical) or "RAI".
      forms: of a NIfTI file.
      stack: of DICOM slices that are no even, upright stack; the grid is then that of their upright resampling.
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]
    orientation: str
    forms: NiftiForms | None = None
    stack: Stack | None = None

    @property
    def canonical_size(self) -> tuple[int, int, int]:
        """Voxels, canonical (z, y, x)."""
        d, h, w = self._axes
        return self.size[2 - d], self.size[2 - h], self.size[2 - w]

    @property
    def canonical_spacing(self) -> tuple[float, float, float]:
        """In mm, canonical (z, y, x)."""
        d, h, w = self._axes
        return self.spacing[2 - d], self.spacing[2 - h], self.spacing[2 - w]

    @property
    def canonical_origin(self) -> tuple[float, float, float]:
        """Patient (z, y, x) in mm of the centre of the canonical array's voxel (0, 0, 0)."""
        first = [size - 1 if step < 0 else 0 for size, step in zip(self.canonical_size, self._steps, strict=True)]
        stored = self._matrix[:, self._axes]  # not yet flipped: from the file's first voxel to the canonical one
        offset = stored @ (np.array(self.canonical_spacing) * first)
        z, y, x = (np.array(self.origin[::-1]) + offset + 0.0).tolist()  # + 0.0: no -0.0
        return z, y, x

    @property
    def canonical_direction(self) -> tuple[float, ...]:
        """3×3 by rows; row = patient axis z, y, x; column = unit vector of the canonical array's axis D, H, W."""
        return tuple((self._matrix[:, self._axes] * self._steps + 0.0).ravel().tolist())

    def to_canonical(self, stored: np.ndarray) -> np.ndarray:
        """[k, j, i] as the file stores it -> a view of it as canonical [D, H, W]."""
        return stored.transpose(self._axes)[tuple(slice(None, None, step) for step in self._steps)]

    def from_canonical(self, voxels: np.ndarray) -> np.ndarray:
        """Canonical [D, H, W, ...] -> a view of it as the file stores it, [k, j, i, ...]."""
        flipped = voxels[tuple(slice(None, None, step) for step in self._steps)]
        return flipped.transpose(*np.argsort(self._axes), *range(3, voxels.ndim))

    @property
    def _axes(self) -> tuple[int, int, int]:
        """For each canonical axis D, H, W, the axis of the stored array [k, j, i] that runs along it."""
        along = {letter: axis for axis, letter in enumerate(self.orientation[::-1])}
        d, h, w = (along[towards] if towards in along else along[away] for towards, away in ("SI", "PA", "LR"))
        return d, h, w

    @property
    def _steps(self) -> tuple[int, ...]:
        """For each canonical axis, -1 where the file runs against it."""
        return tuple(1 if self.orientation[::-1][axis] in "SPL" else -1 for axis in self._axes)

    @property
    def _matrix(self) -> np.ndarray:
        """The direction with rows z, y, x and columns k, j, i."""
        return np.array(self.direction).reshape(3, 3)[::-1, ::-1]


@dataclasses.dataclass(frozen=True)
class Scan:
    """A scan in canonical orientation.

    Attributes:
      voxels: [C, D, H, W], C-contiguous: int16 HU of CT alone, else float32, see `spec`.
      spacing: mm, (z, y, x).
      origin: mm, patient (z, y, x) of the centre of voxel (0, 0, 0).
      direction: 3×3 by rows; row = patient axis z, y, x; column = unit vector of D, H, W. Identity unless oblique.
      grid: the file's own grid, for `write_mask`.
    """

    voxels: np.ndarray
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]
    grid: Grid
