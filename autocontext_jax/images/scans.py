"""One scan in and out: files of the usual formats through SimpleITK, in canonical orientation and back.

SimpleITK's (x, y, z) order is known in this folder alone; all that leaves it is (z, y, x).
"""

import collections
import contextlib
import math
import os
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from autocontext_jax.errors import UserError
from autocontext_jax.images import headers
from autocontext_jax.images.dicom import read_series, series_of
from autocontext_jax.images.formats import FORMATS, suffix_of
from autocontext_jax.images.grid import Grid, Scan
from autocontext_jax.images.in_memory import as_image
from autocontext_jax.images.itk import (
    UNREADABLE,
    check_kind,
    check_size,
    grid_of,
    itk_errors,
    not_finite,
    numbers,
)

# A label lies on its image's grid where their canonical grids differ by no more than this (mm; components of unit
# vectors). Files keep float32 or a few decimals, so equality would refuse honest masks; the smallest real mistake, a
# shift by half a voxel, is far above.
TOLERANCES = {"size": 0.0, "spacing": 1e-3, "origin": 1e-2, "direction": 1e-3}

_DEFLATE = 1032  # no byte that deflate packed holds more bytes than these


def read_grid(path: str | os.PathLike) -> Grid:
    """A scan's grid from its header alone; a DICOM series is read whole, for its grid is spread over its files.

    Raises:
      UserError: as `read_scan`, but for what only the voxels can show.
    """
    path = Path(path)
    return grid_of(path, read_series(path) if path.is_dir() else _read_header(path))


def read_scan(path: str | os.PathLike) -> Scan:
    """Reads a CT scan: a file of one of `FORMATS`, or a folder that holds one DICOM series.

    Values are HU; those outside int16 are clipped to it and fractions are rounded.

    Raises:
      UserError: the path is missing, empty, truncated, damaged or of another format; the image is not 3D or has several
        values a voxel; a voxel is not finite; the axes are not at right angles; a DICOM folder holds no or several
        series, or one with slices missing, unreadable, unevenly spaced or sheared (a tilted gantry).
    """
    path = Path(path)
    return _scan_of(path, _read_image(path))


def scan_of_image(image: sitk.Image) -> Scan:
    """A scan that is in memory; as `read_scan`.

    Raises:
      UserError: as `read_scan`, of the image.
    """
    name = Path("the given image")
    check_kind(name, image.GetSize(), image.GetNumberOfComponentsPerPixel())
    kind = image.GetPixelIDTypeAsString()
    if "complex" in kind or "label" in kind:
        raise UserError(f"{name} holds voxels of the kind {kind}: expected integers or floats")
    check_size(name, image.GetSize())
    return _scan_of(name, image)


def array_of_image(image: sitk.Image) -> np.ndarray:
    """The voxels of an image, [k, j, i] or [k, j, i, C]."""
    return sitk.GetArrayFromImage(image)


def _scan_of(path: Path, image: sitk.Image) -> Scan:
    grid = grid_of(path, image)
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
    grid = grid_of(path, image)
    for what, tolerance in TOLERANCES.items():
        found, expected = getattr(grid, f"canonical_{what}"), getattr(like, f"canonical_{what}")
        if not np.allclose(found, expected, rtol=0.0, atol=tolerance):
            raise UserError(
                f"case {case}: the label's {what} (z, y, x) is {numbers(found)}, the image's is {numbers(expected)}: "
                f"{path} must lie on its image's grid; resample it with nearest neighbours or correct its header"
            )

    stored = grid.to_canonical(sitk.GetArrayViewFromImage(image))
    voxels = np.empty(stored.shape, np.uint8)
    strangers: collections.Counter[float] = collections.Counter()
    for plane, target in zip(stored, voxels, strict=True):  # a plane at a time: np.unique copies and sorts
        values, counts = np.unique(plane, return_counts=True)
        strange = ~np.isin(values, list(labels))
        strangers.update(dict(zip(values[strange].tolist(), counts[strange].tolist(), strict=True)))
        if not strangers:  # otherwise the cast could overflow, and the array is not needed any more
            np.copyto(target, plane, casting="unsafe")
    if strangers:
        found = ", ".join(f"{value:g} ({count} voxels)" for value, count in strangers.most_common(8))
        raise UserError(
            f"case {case}: {path} holds the label values {found}{', …' * (len(strangers) > 8)}; expected only "
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
    write_image(path, as_image(voxels, grid))


def write_image(path: str | os.PathLike, image: sitk.Image) -> None:
    """Writes an image, compressed, whole or not at all.

    Args:
      path: any of `FORMATS` but .mhd, which needs two files.
      image: to be written.

    Raises:
      UserError: the file cannot be written.
    """
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
        return bool(series_of(path)) if path.is_dir() else path.is_file() and bool(suffix_of(path))
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
    raise UserError(
        f"{path} holds no scan: expected a file ({', '.join(FORMATS)}), a DICOM series, or a folder of those"
    )


def scan_name(path: str | os.PathLike) -> str:
    """A scan's file name without its suffix: "a/liver_1.nii.gz" -> "liver_1"."""
    name = Path(path).name
    return name[: len(name) - len(suffix_of(Path(path)))]


def looks_like_ct(voxels: np.ndarray) -> bool:
    """Whether intensities can be HU: the lowest is at most -200 (air or lung) and they span 200 or more.

    MRI, scans scaled to [0, 1] and scanner values stored without their offset of -1024 all fail it. A CT cut out so
    tightly that it holds no air fails too: warn, do not refuse.
    """
    low, high = int(voxels.min()), int(voxels.max())
    return low <= -200 and high - low >= 200


def _read_image(path: Path) -> sitk.Image:
    if path.is_dir():
        return read_series(path)
    reader = _read_header(path)
    with itk_errors(path, UNREADABLE):
        if suffix_of(path) in (".nii", ".nii.gz"):  # the other readers tell
            _check_nifti(path, reader)
        return reader.Execute()


def _read_header(path: Path) -> sitk.ImageFileReader:
    """A reader that knows the header of a 3D scalar image, whose voxels the file can hold, and nothing of them."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a scan file or a folder with a DICOM series")
    if not (suffix := suffix_of(path)):
        raise UserError(f"{path} is not a scan by its name: expected {', '.join(FORMATS)} or a folder of DICOM slices")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): copy or export it again")
    if suffix == ".nii.gz" and path.with_suffix("").exists():  # ITK would read that one's voxels under this one's name
        raise UserError(f"{path} has {path.with_suffix('').name} beside it, and ITK confuses the two: move one away")
    with itk_errors(path, UNREADABLE):
        held = headers.check_nifti_header(path) if suffix in (".nii", ".nii.gz") else headers.check_text_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with itk_errors(path, UNREADABLE):
        reader.ReadImageInformation()
    check_kind(path, reader.GetSize(), reader.GetNumberOfComponents())
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())  # such as "16-bit signed integer"
    if not (bits := re.match(r"(\d+)-bit (?:un)?(?:signed integer|float)", kind)):
        raise UserError(f"{path} holds voxels of the kind {kind}: expected integers or floats; export it again")
    check_size(path, reader.GetSize())
    expected = math.prod(reader.GetSize()) * int(bits[1]) // 8
    if expected > held * _DEFLATE:
        raise UserError(
            f"{path} has {held} bytes and promises {expected}, more than any packing gets into so few: it is truncated "
            "or its header damaged; copy or export it again"
        )
    return reader


def _check_nifti(path: Path, header: sitk.ImageFileReader) -> None:
    """Checks for faults that ITK's NIfTI reader does not report: a truncated file, a wrong checksum of gzip, NaN."""
    place = float(header.GetMetaData("vox_offset"))
    if not 0 <= place <= 2**31:  # also if it is no number
        raise UserError(f"{path} has its voxels at byte {place:g}: expected a place behind its header; export it again")
    start = math.ceil(place)
    expected = start + math.prod(header.GetSize()) * int(header.GetMetaData("bitpix")) // 8
    kind = {"16": "f4", "64": "f8"}.get(header.GetMetaData("datatype"))
    strange = 0
    with headers.unpacked(path) as file:
        head = file.read(start)
        order = "<" if int.from_bytes(head[:4], "little") in (348, 540) else ">"  # the size of a header begins it
        found = len(head)
        while chunk := file.read(1 << 20):  # to the very end, where the checksum is
            if kind:
                count = min(len(chunk), max(expected - found, 0)) // int(kind[1])
                strange += int(np.count_nonzero(~np.isfinite(np.frombuffer(chunk, order + kind, count))))
            found += len(chunk)
    if found < expected:
        raise UserError(f"{path} holds {found} of its {expected} bytes: it is truncated; copy or export it again")
    if strange:
        raise not_finite(path, strange)


def _as_int16(path: Path, stored: np.ndarray) -> np.ndarray:
    """A C-contiguous int16 copy of an integer or float array, clipped; a plane at a time, as floats are large."""
    if stored.dtype == np.int16:
        return np.array(stored, order="C")
    voxels = np.empty(stored.shape, np.int16)
    limits = np.iinfo(np.int16)
    for plane, target in zip(stored, voxels, strict=True):
        if not np.isfinite(plane).all():
            raise not_finite(path, int(np.count_nonzero(~np.isfinite(stored))))
        np.copyto(target, np.rint(plane).clip(limits.min, limits.max), casting="unsafe")
    return voxels


def check_writable_format(path: Path) -> None:
    """Refuses names of masks that no format is written for, before any work is done.

    Raises:
      UserError: the name's ending.
    """
    if suffix_of(path) in ("", ".mhd"):
        raise UserError(f"{path} cannot be written: expected a name that ends in .nii.gz, .nii, .mha or .nrrd")


def _write(path: Path, image: sitk.Image) -> None:
    check_writable_format(path)
    suffix = suffix_of(path)
    partial = path.with_name(f".{scan_name(path)}.{os.getpid()}{suffix}")  # hidden: `find_scans` must not see it
    try:
        with itk_errors(path, "written: see that the disk has room and the folder lets you write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(image, str(partial), useCompression=True)
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
