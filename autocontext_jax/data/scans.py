"""One scan in and out through SimpleITK, in canonical orientation and back.

Canonical means axes [D, H, W] = z, y, x whose indices grow towards the patient's superior, posterior and left (DICOM's
LPS, as x, y, z), by the permutation and flips of the file's axes that come nearest: an oblique scan stays oblique, and
no voxel is resampled. This is the one file that knows SimpleITK's (x, y, z) order; all that leaves it is (z, y, x).
"""

import collections
import contextlib
import dataclasses
import math
import os
import re
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from autocontext_jax.data import headers
from autocontext_jax.errors import UserError

FORMATS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")  # longest first: a name's suffix is the first that fits

# A label lies on its image's grid where their canonical grids differ by no more than this (mm; components of unit
# vectors). Files keep float32 or a few decimals, so equality would refuse honest masks; the smallest real mistake, a
# shift by half a voxel, is far above.
TOLERANCES = {"size": 0.0, "spacing": 1e-3, "origin": 1e-2, "direction": 1e-3}

# A header that promises more is refused before memory is taken: 2000 slices of 1024 x 1024 are half of it. The
# environment variable AUTOCONTEXT_MAX_VOXELS sets another limit.
MAX_VOXELS = 4_000_000_000

_DEFLATE = 1032  # no byte that deflate packed holds more bytes than these


@dataclasses.dataclass(frozen=True)
class Grid:
    """A scan's own grid exactly as its file stores it, so that a mask can be written on it.

    Attributes:
      size: voxels along the file's axes (i, j, k), the fastest first.
      spacing: mm along i, j, k.
      origin: mm, patient (x, y, z) of the centre of voxel (0, 0, 0).
      direction: 3×3 by rows; row = patient axis x, y, z; column = unit vector of i, j, k.
      orientation: where i, j, k point, nearest: one of L/R, P/A, S/I each, as "LPS" (canonical) or "RAI".
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]
    orientation: str

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
        """Canonical [D, H, W] -> a view of it as the file stores it, [k, j, i]."""
        return voxels[tuple(slice(None, None, step) for step in self._steps)].transpose(np.argsort(self._axes))

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
    """A CT scan in canonical orientation.

    Attributes:
      voxels: [D, H, W] int16, HU, C-contiguous.
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


def read_grid(path: str | os.PathLike) -> Grid:
    """A scan's grid from its header alone; a DICOM series is read whole, for its grid is spread over its files.

    Raises:
      UserError: as `read_scan`, but for what only the voxels can show.
    """
    path = Path(path)
    return _grid(path, _read_series(path) if path.is_dir() else _read_header(path))


def read_scan(path: str | os.PathLike) -> Scan:
    """Reads a CT scan: a file of one of `FORMATS`, or a folder that holds one DICOM series.

    Values are HU; those outside int16 are clipped to it and fractions are rounded.

    Raises:
      UserError: the path is missing, empty, truncated, damaged or of another format; the image is not 3D or has several
        values a voxel; a voxel is not finite; the axes are not at right angles; a DICOM folder holds no or several
        series, or one with slices missing, unreadable, unevenly spaced or sheared (a tilted gantry).
    """
    path = Path(path)
    image = _read_image(path)
    grid = _grid(path, image)
    voxels = _as_int16(path, grid.to_canonical(sitk.GetArrayViewFromImage(image)))
    return Scan(voxels, grid.canonical_spacing, grid.canonical_origin, grid.canonical_direction, grid)


def read_label(path: str | os.PathLike, *, labels: Collection[int], like: Grid, case: str) -> np.ndarray:
    """Reads a label map and checks it against its image.

    Args:
      path: as in `read_scan`; the file's axes may be stored in another order than the image's.
      labels: the values allowed, in [0, 255], background included.
      like: the image's grid.
      case: its name, for the messages.

    Returns:
      [D, H, W] uint8, canonical, C-contiguous.

    Raises:
      UserError: as `read_scan`; the grid is not the image's; a value is not one of `labels`.
    """
    path = Path(path)
    image = _read_image(path)
    grid = _grid(path, image)
    for what, tolerance in TOLERANCES.items():
        found, wanted = getattr(grid, f"canonical_{what}"), getattr(like, f"canonical_{what}")
        if not np.allclose(found, wanted, rtol=0.0, atol=tolerance):
            raise UserError(
                f"case {case}: the label's {what} (z, y, x) is {_numbers(found)}, the image's is {_numbers(wanted)}: "
                f"{path} must lie on its image's grid; resample it with nearest neighbours or correct its header"
            )

    stored = grid.to_canonical(sitk.GetArrayViewFromImage(image))
    voxels = np.empty(stored.shape, np.uint8)
    strangers: collections.Counter[float] = collections.Counter()
    for plane, target in zip(stored, voxels, strict=True):  # a plane at a time: np.unique copies and sorts
        values, counts = np.unique(plane, return_counts=True)
        strange = ~np.isin(values, list(labels))
        strangers.update(dict(zip(values[strange].tolist(), counts[strange].tolist(), strict=True)))
        if not strangers:  # else the cast could overflow, and the array is not wanted any more
            np.copyto(target, plane, casting="unsafe")
    if strangers:
        found = ", ".join(f"{value:g} ({count} voxels)" for value, count in strangers.most_common(8))
        raise UserError(
            f"case {case}: {path} holds the label values {found}{', …' * (len(strangers) > 8)}; wanted only "
            f"{', '.join(map(str, sorted(labels)))}: correct the mask or name its labels in dataset.json"
        )
    return voxels


def write_mask(path: str | os.PathLike, voxels: np.ndarray, grid: Grid) -> None:
    """Writes a canonical mask on exactly the grid of the file it came from, compressed, whole or not at all.

    Args:
      path: any of `FORMATS` but .mhd, which needs two files.
      voxels: [D, H, W] uint8, canonical; its shape is `grid.canonical_size`.
      grid: the scan's.

    Raises:
      UserError: the file cannot be written.
    """
    if voxels.shape != grid.canonical_size:
        raise ValueError(f"a mask of shape {voxels.shape} for a grid of {grid.canonical_size}")
    image = sitk.GetImageFromArray(grid.from_canonical(voxels))
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    _write(Path(path), image)


def write_scan(
    path: str | os.PathLike,
    voxels: np.ndarray,
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> None:
    """Writes a canonical array as a scan or label map of its own, axes along the patient's; as `write_mask` does.

    Args:
      path: any of `FORMATS` but .mhd.
      voxels: [D, H, W], int16 HU or uint8 labels.
      spacing: mm, (z, y, x).
      origin: mm, (z, y, x) of the centre of voxel (0, 0, 0).

    Raises:
      UserError: the file cannot be written.
    """
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin(origin[::-1])
    _write(Path(path), image)


def is_scan(path: str | os.PathLike) -> bool:
    """Whether this is a file of one of `FORMATS`, by its name, or a folder with a DICOM series in it."""
    path = Path(path)
    try:
        return bool(_series_of(path)) if path.is_dir() else path.is_file() and bool(_suffix(path))
    except UserError:
        return True  # a damaged one, to be refused by itself when it is read


def find_scans(path: str | os.PathLike) -> list[Path]:
    """The scans at a path, sorted: itself (a file, a DICOM folder), or the files and DICOM folders directly in it.

    Names that begin with a dot are left out: what is hidden is another program's, or a file half written.

    Raises:
      UserError: there is nothing at the path, or no scan.
    """
    path = Path(path)
    if is_scan(path):
        return [path]
    if not path.exists():
        raise UserError(f"{path} does not exist: give a scan or a folder of scans")
    inside = sorted(path.iterdir()) if path.is_dir() else []
    if scans := [entry for entry in inside if not entry.name.startswith(".") and is_scan(entry)]:
        return scans
    raise UserError(f"{path} holds no scan: wanted a file ({', '.join(FORMATS)}), a DICOM series, or a folder of those")


def scan_name(path: str | os.PathLike) -> str:
    """A scan's file name without its suffix: "a/liver_1.nii.gz" -> "liver_1"."""
    name = Path(path).name
    return name[: len(name) - len(_suffix(Path(path)))]


def looks_like_ct(voxels: np.ndarray) -> bool:
    """Whether intensities can be HU: the lowest is at most -200 (air or lung) and they span 200 or more.

    MRI, scans scaled to [0, 1] and scanner values stored without their offset of -1024 all fail it. A CT cut out so
    tightly that it holds no air fails too: warn, do not refuse.
    """
    low, high = int(voxels.min()), int(voxels.max())
    return low <= -200 and high - low >= 200


def _suffix(path: Path) -> str:
    return next((suffix for suffix in FORMATS if path.name.lower().endswith(suffix)), "")


def _numbers(values: Collection[float]) -> str:
    return f"({', '.join(f'{value:.6g}' for value in values)})"


@contextlib.contextmanager
def _itk(path: Path, failure: str) -> Iterator[None]:
    """Silences ITK's warnings; turns its many-lined exceptions, and those of the file system, into one UserError."""
    # For the whole process and for good: one thread reads while another writes, and neither can put it back alone.
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    except (RuntimeError, OSError, EOFError, ValueError, zlib.error) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].removeprefix("sitk::ERROR: ")
        raise UserError(f"{path} cannot be {failure} ({reason})") from None


_UNREADABLE = "read: it is truncated, damaged or not what its name says; copy or export it again"


def _grid(path: Path, source: sitk.Image | sitk.ImageFileReader) -> Grid:
    matrix = np.array(source.GetDirection()).reshape(3, 3)
    spacing, origin = source.GetSpacing(), source.GetOrigin()
    if not (np.isfinite([*spacing, *origin]).all() and min(spacing) > 0):
        raise UserError(
            f"{path} has the spacing {_numbers(spacing)} and the origin {_numbers(origin)}: wanted finite mm, spacing "
            "above 0; correct its header"
        )
    if not np.allclose(matrix @ matrix.T, np.eye(3), rtol=0.0, atol=TOLERANCES["direction"]):
        raise UserError(
            f"{path} has the direction {_numbers(matrix.ravel())}, whose axes are not at right angles (a tilted "
            "gantry?): resample it to a rectangular grid"
        )
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(source.GetDirection())
    return Grid(source.GetSize(), source.GetSpacing(), source.GetOrigin(), source.GetDirection(), code)


def _read_image(path: Path) -> sitk.Image:
    if path.is_dir():
        return _read_series(path)
    reader = _read_header(path)
    with _itk(path, _UNREADABLE):
        if _suffix(path) in (".nii", ".nii.gz"):  # the other readers tell
            _check_nifti(path, reader)
        return reader.Execute()


def _read_header(path: Path) -> sitk.ImageFileReader:
    """A reader that knows the header of a 3D scalar image, whose voxels the file can hold, and nothing of them."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a scan file or a folder with a DICOM series")
    if not (suffix := _suffix(path)):
        raise UserError(f"{path} is not a scan by its name: wanted {', '.join(FORMATS)} or a folder of DICOM slices")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): copy or export it again")
    if suffix == ".nii.gz" and path.with_suffix("").exists():  # ITK would read that one's voxels under this one's name
        raise UserError(f"{path} has {path.with_suffix('').name} beside it, and ITK confuses the two: move one away")
    with _itk(path, _UNREADABLE):
        held = headers.check_nifti_header(path) if suffix in (".nii", ".nii.gz") else headers.check_text_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with _itk(path, _UNREADABLE):
        reader.ReadImageInformation()
    _check_kind(path, reader.GetSize(), reader.GetNumberOfComponents())
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())  # such as "16-bit signed integer"
    if not (bits := re.match(r"(\d+)-bit (?:un)?(?:signed integer|float)", kind)):
        raise UserError(f"{path} holds voxels of the kind {kind}: wanted integers or floats; export it again")
    _check_size(path, reader.GetSize())
    wanted = math.prod(reader.GetSize()) * int(bits[1]) // 8
    if wanted > held * _DEFLATE:
        raise UserError(
            f"{path} has {held} bytes and promises {wanted}, more than any packing gets into so few: it is truncated "
            "or its header damaged; copy or export it again"
        )
    return reader


def _check_kind(path: Path, size: tuple[int, ...], components: int) -> None:
    if len(size) != 3 or components != 1:
        raise UserError(
            f"{path} is a {len(size)}D image of {' × '.join(map(str, size))} with {components} value(s) a voxel: "
            "wanted a 3D image with one; export a single volume"
        )


def _check_size(path: Path, size: tuple[int, ...]) -> None:
    given = os.environ.get("AUTOCONTEXT_MAX_VOXELS", str(MAX_VOXELS))
    if not re.fullmatch(r"[0-9]{1,18}", given):
        raise UserError(f"the environment variable AUTOCONTEXT_MAX_VOXELS is {given!r}: wanted a number of voxels")
    if math.prod(size) > int(given):
        raise UserError(
            f"{path} promises {' × '.join(map(str, size))} = {math.prod(size):.3g} voxels: wanted at most {given}; if "
            "it is no mistake, set the environment variable AUTOCONTEXT_MAX_VOXELS to more"
        )


def _check_nifti(path: Path, header: sitk.ImageFileReader) -> None:
    """Looks for what ITK's NIfTI reader keeps to itself: a file cut short, gzip's checksum wrong, NaN read as 0."""
    place = float(header.GetMetaData("vox_offset"))
    if not 0 <= place <= 2**31:  # also if it is no number
        raise UserError(f"{path} has its voxels at byte {place:g}: wanted a place behind its header; export it again")
    start = math.ceil(place)
    wanted = start + math.prod(header.GetSize()) * int(header.GetMetaData("bitpix")) // 8
    kind = {"16": "f4", "64": "f8"}.get(header.GetMetaData("datatype"))
    strange = 0
    with headers.unpacked(path) as file:
        head = file.read(start)
        order = "<" if int.from_bytes(head[:4], "little") in (348, 540) else ">"  # the size of a header begins it
        found = len(head)
        while chunk := file.read(1 << 20):  # to the very end, where the checksum is
            if kind:
                count = min(len(chunk), max(wanted - found, 0)) // int(kind[1])
                strange += int(np.count_nonzero(~np.isfinite(np.frombuffer(chunk, order + kind, count))))
            found += len(chunk)
    if found < wanted:
        raise UserError(f"{path} holds {found} of its {wanted} bytes: it is truncated; copy or export it again")
    if strange:
        raise _not_finite(path, strange)


def _not_finite(path: Path, count: int) -> UserError:
    return UserError(f"{path} holds {count} voxels that are not finite: wanted numbers everywhere; export it again")


def _series_of(folder: Path) -> tuple[str, ...]:
    for path in folder.iterdir():
        if _is_dicom(path):
            headers.check_elements(path)
    with _itk(folder, "searched for DICOM slices"):
        return sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))


def _read_series(folder: Path) -> sitk.Image:
    """The one DICOM series of a folder, checked for what GDCM and ITK pass over in silence."""
    series = _series_of(folder)
    if len(series) != 1:
        listed = f": {', '.join(series)}; give each a folder of its own" if series else "; wanted a folder with one"
        raise UserError(f"{folder} holds {len(series)} DICOM series{listed}")
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    known = {Path(name).name for name in names} | {"DICOMDIR"}
    if unread := sorted(file.name for file in folder.iterdir() if file.name not in known and _is_dicom(file)):
        raise UserError(
            f"{folder} holds {len(unread)} DICOM file(s) that cannot be read as slices of its series, the first "
            f"{unread[0]}: copy or export them again, or move them away"
        )
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(names)
    reader.MetaDataDictionaryArrayUpdateOn()
    with _itk(folder, "read as a DICOM series: a slice is damaged or of another kind; export the series again"):
        image = reader.Execute()
        _check_kind(folder, image.GetSize(), image.GetNumberOfComponentsPerPixel())
        if image.GetSize()[2] == len(names) > 1:  # else one file that holds many slices and places them itself
            positions = [reader.GetMetaData(k, "0020|0032").split("\\") for k in range(len(names))]
            # ITK spaces the slices evenly from first to last along their normal; see that they lie there.
            expected = [image.TransformIndexToPhysicalPoint((0, 0, k)) for k in range(len(names))]
            errors = np.linalg.norm(np.array(positions, float) - expected, axis=1)
            if errors.max() > 0.1 * image.GetSpacing()[2]:
                raise UserError(
                    f"{folder} has slices missing, unevenly spaced or sheared by a tilted gantry: one lies "
                    f"{errors.max():.3g} mm off an even stack of {image.GetSpacing()[2]:.3g} mm; wanted an even stack"
                )
    return image


def _is_dicom(path: Path) -> bool:
    if path.name.startswith(".") or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _as_int16(path: Path, stored: np.ndarray) -> np.ndarray:
    """A C-contiguous int16 copy of an integer or float array, clipped; a plane at a time, as floats are large."""
    if stored.dtype == np.int16:
        return np.array(stored, order="C")
    voxels = np.empty(stored.shape, np.int16)
    limits = np.iinfo(np.int16)
    for plane, target in zip(stored, voxels, strict=True):
        if not np.isfinite(plane).all():
            raise _not_finite(path, int(np.count_nonzero(~np.isfinite(stored))))
        np.copyto(target, np.rint(plane).clip(limits.min, limits.max), casting="unsafe")
    return voxels


def check_writable_format(path: Path) -> None:
    """Refuses names of masks that no format is written for, before any work is done.

    Raises:
      UserError: the name's ending.
    """
    if _suffix(path) in ("", ".mhd"):
        raise UserError(f"{path} cannot be written: expected a name that ends in .nii.gz, .nii, .mha or .nrrd")


def _write(path: Path, image: sitk.Image) -> None:
    check_writable_format(path)
    suffix = _suffix(path)
    partial = path.with_name(f".{scan_name(path)}.{os.getpid()}{suffix}")  # hidden: `find_scans` must not see it
    try:
        with _itk(path, "written: see that the disk has room and the folder lets you write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(image, str(partial), useCompression=True)
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
