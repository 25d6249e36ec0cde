"""One scan in and out: files of the usual formats and DICOM series, in canonical orientation and back.

The (x, y, z) order of files is known in this folder alone; all that leaves it is (z, y, x).
"""

import collections
import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from autocontext_jax import runtime
from autocontext_jax.errors import UserError, counted
from autocontext_jax.files import exists, is_file
from autocontext_jax.images import reader_process
from autocontext_jax.images.checks import as_user_error, check_kind, check_size, make_grid
from autocontext_jax.images.checks import numbers as listed
from autocontext_jax.images.finding import series_of
from autocontext_jax.images.formats import NIFTI, PICTURES, scan_name, suffix_of
from autocontext_jax.images.grid import Grid, Scan
from autocontext_jax.images.in_memory import as_image, sheared_affine
from autocontext_jax.images.intensity import stored_voxels
from autocontext_jax.images.itk import grid_of
from autocontext_jax.images.nifti import read_nifti, write_nifti
from autocontext_jax.images.spec import CT, ImageSpec
from autocontext_jax.images.voxel_files import bytes_held

log = logging.getLogger(__name__)

# A label lies on its image's grid where their canonical grids differ by no more than this (mm; components of unit
# vectors). Files keep float32 or a few decimals, so equality would refuse honest masks; the smallest real mistake, a
# shift by half a voxel, is far above.
TOLERANCES = {"size": 0.0, "spacing": 1e-3, "origin": 1e-2, "direction": 1e-3}

ROUNDING = 1e-3  # by which a label may be off a whole number


def read_grid(paths: str | os.PathLike | Sequence[str | os.PathLike], *, series: str | None = None) -> Grid:
    """A scan's grid from the headers of its first file alone.

    Raises:
      UserError: as `read_scan`, but for what only the voxels can show.
    """
    _, grid = _read(as_paths(paths)[0], series, header_only=True, several=True)
    return grid


def read_scan(
    paths: str | os.PathLike | Sequence[str | os.PathLike], spec: ImageSpec = CT, *, series: str | None = None
) -> Scan:
    """Reads a scan: a file of one of `FORMATS`, a DICOM file with many frames, or a series of a DICOM folder.

    Of CT, values are HU: fractions are rounded; values outside int16 are clipped to it, and a warning says how many.

    Args:
      paths: of the file or folder; of several channels one for each, on the same grid, or one that holds all.
      spec: of the channels.
      series: which one of a DICOM folder with several: its number, its description or its series instance UID.

    Raises:
      UserError: the path is missing, empty, truncated, damaged or of another format; the image is not 3D or has another
        number of channels; their grids differ; a voxel is not finite; the axes are not at right angles; a DICOM folder
        holds no series, or several and none is named; slices are missing, double, or contradict each other.
    """
    files = as_paths(paths)
    grid, channels = read_channels(files, len(spec.channels), series=series)
    if len(channels) != len(spec.channels):
        raise UserError(
            f"{_named(files)} holds {counted(len(channels), 'channel')}; expected {len(spec.channels)}: {spec.names}"
        )
    return _scan_of(_named(files), channels, grid, spec)


def read_channels(files: Sequence[Path], expected: int, *, series: str | None = None) -> tuple[Grid, list[np.ndarray]]:
    """The grid of a scan, and its channels as the files hold them, each canonical [D, H, W]; see `read_scan`.

    Args:
      files: of the scan.
      expected: number of channels; a file with several is refused where it is 1.
      series: as in `read_scan`.
    """
    grid, channels = None, []
    for path in files:
        stored, own = _read(path, series, several=expected > 1)
        if grid is not None and (other := _difference(own, grid)):
            what, found, first = other
            raise UserError(
                f"{path}: its {what} (z, y, x) is {found}, that of {files[0]} is {first}: the channels of a scan must "
                "lie on one grid; resample them or correct a header"
            )
        grid = grid or own
        channels += [own.to_canonical(channel) for channel in (stored if stored.ndim == 4 else [stored])]
    assert grid is not None, "a scan has files"
    return grid, channels


def as_paths(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> tuple[Path, ...]:
    """The files of a scan: of several channels there can be several."""
    return (Path(paths),) if isinstance(paths, str | os.PathLike) else tuple(map(Path, paths))


def scan_of_image(image: sitk.Image, spec: ImageSpec = CT) -> Scan:
    """A scan that is in memory; as `read_scan`. Of several channels each voxel has several values.

    Raises:
      UserError: as `read_scan`, of the image.
    """
    name = Path("the given image")
    count = len(spec.channels)
    check_kind(name, image.GetSize(), image.GetNumberOfComponentsPerPixel(), expected=count)
    kind = image.GetPixelIDTypeAsString()
    if "complex" in kind or "label" in kind:
        raise UserError(f"{name} holds voxels of the kind {kind}: expected integers or floats")
    check_size(name, image.GetSize())
    voxels, grid = sitk.GetArrayFromImage(image), grid_of(name, image)
    stored = [voxels] if voxels.ndim == 3 else [voxels[..., channel] for channel in range(count)]
    return _scan_of(str(name), [grid.to_canonical(channel) for channel in stored], grid, spec)


def _scan_of(name: str, channels: Sequence[np.ndarray], grid: Grid, spec: ImageSpec) -> Scan:
    voxels = stored_voxels(name, channels, spec)
    return Scan(voxels, grid.canonical_spacing, grid.canonical_origin, grid.canonical_direction, grid)


def _named(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))


def _difference(found: Grid, expected: Grid) -> tuple[str, str, str] | None:
    """What of a grid differs from another, beyond `TOLERANCES`, and both values; None if nothing does."""
    for what, tolerance in TOLERANCES.items():
        own, other = (getattr(grid, f"canonical_{what}") for grid in (found, expected))
        if not np.allclose(own, other, rtol=0.0, atol=tolerance):
            return what, listed(own), listed(other)
    return None


def read_label(
    path: str | os.PathLike, *, values: Sequence[int], numbers: Sequence[int] | None = None, like: Grid, case: str
) -> np.ndarray:
    """Reads a label map and checks it against its image.

    Args:
      path: as in `read_scan`; the file's axes may be stored in another order than the image's.
      values: at most 256, ascending: those that the file may hold, background included.
      numbers: what each of them becomes, below 256; None for its place among the values.
      like: the image's grid.
      case: its name, for the messages.

    Returns:
      [D, H, W] uint8, canonical, C-contiguous: the number of each voxel's value.

    Raises:
      UserError: as `read_scan`; the grid is not the image's; the file holds another value.
    """
    path = Path(path)
    found_voxels, grid = _read(path, None)
    if difference := _difference(grid, like):
        what, found, expected = difference
        raise UserError(
            f"case {case}: the label's {what} (z, y, x) is {found}, the image's is {expected}: {path} must lie on its "
            "image's grid; resample it with nearest neighbours or correct its header"
        )

    stored, allowed = grid.to_canonical(found_voxels), np.asarray(values)
    voxels = np.empty(stored.shape, np.uint8)
    table = np.arange(len(values), dtype=np.uint8) if numbers is None else np.asarray(numbers, np.uint8)
    as_stored = list(values) == table.tolist()
    strangers: collections.Counter[float] = collections.Counter()
    for plane, target in zip(stored, voxels, strict=True):  # a plane at a time: np.unique copies and sorts
        present, counts = np.unique(plane, return_counts=True)
        whole = np.rint(present)
        strange = ~np.isin(whole, allowed) | (np.abs(present - whole) > ROUNDING)
        strangers.update(dict(zip(present[strange].tolist(), counts[strange].tolist(), strict=True)))
        if not strangers:  # otherwise the cast could overflow, and the array is not needed any more
            rounded = plane if plane.dtype.kind != "f" else np.rint(plane)
            np.copyto(target, rounded if as_stored else table[np.searchsorted(allowed, rounded)], casting="unsafe")
    if strangers:
        found = ", ".join(f"{_exact(value)} ({count} voxels)" for value, count in strangers.most_common(8))
        raise UserError(
            f"case {case}: {path} holds the label values {found}{', …' * (len(strangers) > 8)}; expected only "
            f"{', '.join(map(str, values))}: correct the mask or name its labels in dataset.json"
        )
    return voxels


def _exact(value: float) -> str:
    """A label's value, whole however large."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.6g}"


def label_values(classes: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """A label map as files hold it: the inverse of what `read_label` does.

    Args:
      classes: [D, H, W] uint8, each voxel's class.
      values: [K] of each class in a file, not negative.

    Returns:
      [D, H, W] of the smallest of uint8, uint16 and uint32 that holds the values.
    """
    if list(values) == list(range(len(values))):
        return classes
    return np.asarray(values).astype(np.min_scalar_type(max(values)))[classes]


def write_mask(path: str | os.PathLike, voxels: np.ndarray, grid: Grid) -> None:
    """Writes a canonical mask on exactly the grid of the file it came from, compressed, whole or not at all.

    Args:
      path: any of `FORMATS` but .mhd, which needs two files.
      voxels: [D, H, W] uint8, uint16 or uint32, canonical; its shape is `grid.canonical_size`.
      grid: the scan's.

    Raises:
      UserError: the file cannot be written.
    """
    path = Path(path)
    if voxels.shape != grid.canonical_size:
        raise ValueError(f"an array of shape {voxels.shape} for a grid of {grid.canonical_size}")
    check_writable_format(path, grid)
    if suffix_of(path) not in NIFTI:
        image = as_image(voxels, dataclasses.replace(grid, stack=None))
        if suffix_of(path) in PICTURES:
            image = image[:, :, 0]
        return _write(path, lambda partial: sitk.WriteImage(image, str(partial), useCompression=True))
    stored, affine = np.ascontiguousarray(grid.from_canonical(voxels)), None
    if grid.stack is not None and grid.stack.even:  # slices sheared by a tilted gantry: so is the affine
        stored, affine = grid.stack.to_slices(stored), sheared_affine(grid)
    return _write(path, lambda partial: write_nifti(partial, stored, grid, affine))


def write_scan(
    path: str | os.PathLike,
    voxels: np.ndarray,
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> None:
    """Writes a canonical array as a scan or label map of its own, axes along the patient's; as `write_mask` does.

    Args:
      path: any of `FORMATS` but .mhd.
      voxels: [D, H, W], values of a channel or labels.
      spacing: mm, (z, y, x).
      origin: mm, (z, y, x) of the centre of voxel (0, 0, 0).

    Raises:
      UserError: the file cannot be written.
    """
    size = voxels.shape[::-1]
    write_mask(path, voxels, make_grid(Path(path), size, spacing[::-1], origin[::-1], np.eye(3).ravel().tolist()))


def _read(path: Path, series: str | None, *, header_only: bool = False, several: bool = False) -> tuple[Any, Grid]:
    """The voxels of a file or a series as they are stored, [k, j, i], or None, and their grid.

    With `several` a file may hold more than one channel: [C, k, j, i].
    """
    suffix = "" if exists(path) and path.is_dir() else suffix_of(path)
    if not suffix:
        # What `find_scans` found is an identifier already.
        uid = (
            series if series is not None and re.fullmatch(r"[0-9]+(\.[0-9]+){3,}", series) else series_of(path, series)
        )
        found = reader_process.call("dicom", path, series=uid, header_only=header_only)
        return found.get("voxels"), found["grid"]
    if series is not None:
        raise UserError(f"{path} is a file, and the series {series!r} is given: expected a DICOM folder with a series")
    if not is_file(path):
        raise UserError(f"{path} does not exist: give a scan file or a folder with a DICOM series")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): copy or export it again")
    if suffix in NIFTI:
        with as_user_error(path, reader_process.UNREADABLE):
            return read_nifti(path, header_only=header_only, several=several)
    with as_user_error(path, reader_process.UNREADABLE):
        held = bytes_held(path)
    found = reader_process.call("itk", path, held=held, header_only=header_only, several=several)
    return found.get("voxels"), found["grid"]


def check_writable_format(path: Path, grid: Grid | None = None) -> None:
    """Refuses names of masks that no format is written for, before any work is done.

    Args:
      path: of a mask.
      grid: of its scan, once it is known.

    Raises:
      UserError: the name's ending, or that its format holds one slice and the scan has several.
    """
    if grid is not None and suffix_of(path) in PICTURES and grid.size[2] != 1:
        raise UserError(
            f"{path} cannot hold a mask of {grid.size[2]} slices: expected a name that ends in .nii.gz, .nii, .mha or "
            ".nrrd"
        )
    if suffix_of(path) in ("", ".mhd"):
        raise UserError(
            f"{path} cannot be written: expected a name that ends in .nii.gz, .nii, .mha or .nrrd, or of one slice "
            ".png or .tif"
        )
    if suffix_of(path) in NIFTI:
        for other in NIFTI:
            beside = path.with_name(scan_name(path) + other)
            if other != suffix_of(path) and is_file(beside):
                raise UserError(
                    f"{path} would lie beside {beside.name}, and some programs read one in the place of the other: "
                    "expected another name or another folder"
                )


def _write(path: Path, write: Callable[[Path], object]) -> None:
    suffix = suffix_of(path)
    partial = path.with_name(f".{scan_name(path)}.{os.getpid()}{suffix}")  # hidden: `find_scans` must not see it
    try:
        runtime.silence_itk()
        with as_user_error(path, "written: see that the disk has room and the folder lets you write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(partial)
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
