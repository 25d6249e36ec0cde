"""NIfTI-1 and NIfTI-2 in single files, read and written through nibabel.

A header can place its voxels twice, by a matrix (the sform) and by a quaternion (the qform). The sform counts if its
code is above 0, else the qform. A mask repeats both as its scan had them, so that every program sees it on its scan.
"""

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from isal import igzip

from autocontext_jax.errors import UserError
from autocontext_jax.images.checks import check_kind, check_packing, check_size, make_grid, numbers
from autocontext_jax.images.grid import Grid, NiftiForms

log = logging.getLogger(__name__)

_MM = {1: 1000.0, 3: 0.001}  # of `xyzt_units`: metres and micrometres; else it is mm, or not said
_RGB = {128: 3, 2304: 4}  # datatypes of several values a voxel
# Of the smallest spacing: by this much two placements of the scan's corners must differ to be told apart.
_APART = 0.05
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # NIfTI's patient axes point to right, anterior, superior


def read_nifti(path: Path, *, header_only: bool = False, several: bool = False) -> tuple[np.ndarray | None, Grid]:
    """The voxels of a file as it stores them, [k, j, i], and its grid.

    Args:
      path: of the file. Whether it is packed is seen from its content, not from its name.
      header_only: the voxels are not read.
      several: whether a 4D file is allowed: its last axis counts channels, and the voxels are [C, k, j, i].

    Returns:
      The voxels, integers or floats in this machine's byte order, scaled as the header says; and the grid.

    Raises:
      UserError: the file is truncated or damaged; it holds no 3D image with one number a voxel; its voxels are not
        placed.
      OSError, EOFError, isal.isal_zlib.error: it cannot be unpacked.
    """
    with _unpacked(path) as file:
        header = _read_header(path, file)
        size, channels = _size(path, header, several)
        grid = _grid(path, header, size)
        if header_only:
            return None, grid
        voxels = _read_voxels(path, file, header, (*size, channels))
        return voxels if channels > 1 else voxels[0], grid


def write_nifti(path: Path, stored: np.ndarray, grid: Grid, affine: np.ndarray | None = None) -> None:
    """Writes an image whole; a name that ends in .gz is packed.

    Args:
      path: of the file.
      stored: [k, j, i], of a type that NIfTI has.
      grid: places the voxels: by the forms of the NIfTI file that it is from, else by both forms, with code 1.
      affine: places them instead, from (i, j, k) to LPS, by a sform alone: it may be sheared.
    """
    forms = grid.forms if affine is None else None
    large = max(stored.shape) > np.iinfo(np.int16).max
    kind = nib.Nifti2Header if large or (forms and forms.version == 2) else nib.Nifti1Header
    header = kind()
    header.set_data_dtype(stored.dtype)
    header.set_data_shape(stored.shape[::-1])
    if forms is not None:
        header["pixdim"][:4] = forms.pixdim
        header["xyzt_units"] = forms.units
        for name, value in zip(_QUATERNION, forms.quaternion, strict=True):
            header[name] = value
        for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
            header[name] = forms.sform[4 * row : 4 * row + 4]
        header["qform_code"], header["sform_code"] = forms.qform_code, forms.sform_code
    else:
        header.set_xyzt_units("mm")
        placed = _LPS @ (_affine_of(grid) if affine is None else affine)
        header["pixdim"][1:4] = np.linalg.norm(placed[:3, :3], axis=0)
        header.set_sform(placed, 1)
        if affine is None:
            header.set_qform(placed, 1)
    image = (nib.Nifti2Image if kind is nib.Nifti2Header else nib.Nifti1Image)(stored.T, None, header)
    # Neither the name nor the time is written, so that the same image makes the same file.
    with path.open("wb") as file:
        packed = path.name.lower().endswith(".gz")
        with igzip.IGzipFile("", "wb", fileobj=file, mtime=0) if packed else contextlib.nullcontext(file) as out:
            image.to_file_map({"image": nib.FileHolder(fileobj=out)})


_ROUNDED = 1e-4  # by which a quaternion that was rounded may be longer than 1; nibabel refuses 2e-7
_QUATERNION = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if packed:
            with igzip.IGzipFile(fileobj=file, mode="rb") as unpacked:
                yield io.BufferedReader(unpacked, 1 << 20)
        else:
            yield file


def _read_header(path: Path, file: IO[bytes]) -> Any:
    head = file.read(348)
    # It begins with its own size.
    lengths = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    if 540 in lengths:
        head += file.read(540 - 348)
        magic, length = head[4:7], 540
    elif 348 in lengths:
        magic, length = head[344:347], 348
    else:
        raise UserError(f"{path} cannot be read: it is no NIfTI file; expected what its name says")
    if len(head) < length:
        raise UserError(f"{path} holds {len(head)} of the {length} bytes of its header: it is truncated; copy it again")
    if magic != b"n+" + (b"2" if length == 540 else b"1"):
        raise UserError(
            f"{path} has the mark {magic!r}: expected n+1 or n+2, a NIfTI file that holds its voxels itself; export "
            f"it again"
        )
    return (nib.Nifti2Header if length == 540 else nib.Nifti1Header)(head, check=False)


def _size(path: Path, header: Any, several: bool) -> tuple[tuple[int, int, int], int]:
    """Voxels along i, j, k, and channels; refuses other images. Axes of length 1 at the end are none."""
    axes = int(header["dim"][0])
    size: list[int] = header["dim"][1 : 1 + axes].tolist() if 1 <= axes <= 7 else []
    if not size or min(size) < 1:
        found = ", ".join(map(str, header["dim"].tolist()))
        raise UserError(
            f"{path} has the dimensions {found}: expected at least one voxel along each axis; export it again"
        )
    while len(size) > 3 and size[-1] == 1:
        size = size[:-1]
    components, channels = _RGB.get(int(header["datatype"]), 1), 1
    if several and len(size) == 4:
        size, channels = size[:3], size[3]
    elif len(size) == 5 and size[3] == 1:  # how NIfTI stores vectors
        size, vector = size[:3], size[4]
        components, channels = (components, vector) if several else (components * vector, 1)
    check_kind(path, size, components)
    check_size(path, (*size, channels) if channels > 1 else size)
    i, j, k = size
    return (i, j, k), channels


def _read_voxels(path: Path, file: IO[bytes], header: Any, size: tuple[int, ...]) -> np.ndarray:
    try:
        dtype = header.get_data_dtype()
    except (nib.spatialimages.HeaderDataError, KeyError):
        dtype = np.dtype("V1")
    if dtype.kind not in "iuf":
        raise UserError(
            f"{path} holds voxels of the datatype {int(header['datatype'])}: expected integers or floats; export it "
            f"again"
        )
    start, begun = float(header["vox_offset"]), int(header["sizeof_hdr"])
    if not begun <= start <= 2**31:
        raise UserError(f"{path} has its voxels at byte {start:g}: expected a place behind its header; export it again")
    expected = math.prod(size) * dtype.itemsize
    check_packing(path, expected, path.stat().st_size)
    found = begun
    while found < math.ceil(start) and (skipped := file.read(min(1 << 20, math.ceil(start) - found))):
        found += len(skipped)
    voxels = np.empty(math.prod(size), dtype)
    memory: Any = memoryview(voxels.view(np.uint8))  # type: ignore[arg-type]
    filled = 0
    while filled < expected and (count := file.readinto(memory[filled : filled + (1 << 24)])):  # type: ignore[attr-defined]
        filled += count
    if filled < expected:
        total = math.ceil(start) + expected
        raise UserError(f"{path} holds {found + filled} of its {total} bytes: it is truncated; copy or export it again")
    while file.read(1 << 20):  # to the very end, where the checksum of a packed file is
        pass
    stored = voxels.reshape(size[::-1])
    return _scaled(path, stored if dtype.isnative else stored.astype(dtype.newbyteorder("=")), header)


def _scaled(path: Path, stored: np.ndarray, header: Any) -> np.ndarray:
    """Voxels with the header's slope and intercept; a slope of 0 means that there is no scaling."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        if slope == 0 and intercept != 0 and math.isfinite(intercept):
            log.warning(
                "%s has the slope 0 and the intercept %g: values are taken as they are stored, as the NIfTI standard "
                "says; if they should be scaled, set the slope to 1", path, intercept,
            )  # fmt: skip
        return stored
    if not math.isfinite(intercept):
        raise UserError(f"{path} has the intercept {intercept}: expected a finite number; correct its header")
    if (slope, intercept) == (1.0, 0.0):
        return stored
    if stored.dtype.kind != "f" and slope.is_integer() and intercept.is_integer() and stored.dtype.itemsize <= 2:
        largest = (1 << 16) * abs(slope) + abs(intercept)
        if largest < 2**31:
            return stored * np.int32(slope) + np.int32(intercept)
    wide: Any = stored.astype(np.float32 if stored.dtype.itemsize <= 2 else np.float64)
    wide *= slope
    wide += intercept
    return wide


def _grid(path: Path, header: Any, size: tuple[int, int, int]) -> Grid:
    """Where the voxels lie; warns where the header contradicts itself: other programs may see them elsewhere."""
    forms = _forms(header)
    by_matrix, by_quaternion = forms.sform_code > 0, forms.qform_code > 0
    used = [*forms.pixdim[1:], *forms.quaternion * by_quaternion, *forms.sform * by_matrix]
    if not (np.abs(used) < 1e9).all():
        raise _not_placed(path)
    mm = np.array(forms.pixdim[1:])
    placements = {}
    if by_matrix:
        placements["sform"] = np.array([*forms.sform, 0, 0, 0, 1], float).reshape(4, 4)
    if by_quaternion:
        try:
            placements["qform"] = _quaternion_affine(path, header, mm)
        except UserError:
            if not by_matrix:
                raise
            log.warning("%s has a qform that says nothing: its sform is used", path)
    if not placements:
        log.warning(
            "%s has neither a sform nor a qform, so that nothing says how its patient lies: its first axis is taken "
            "to point to the left, its second to the front, its third to the head", path,
        )  # fmt: skip
        placements["pixdim"] = header.get_base_affine() if (mm > 0).all() else np.zeros((4, 4))
    name, affine = next(iter(placements.items()))
    axes = np.linalg.norm(affine[:3, :3], axis=0)
    if not axes.min() > 1e-6 or not abs(np.linalg.det(affine[:3, :3] / axes)) > 1e-3:
        raise _not_placed(path)
    corners = np.array([[i, j, k, 1] for i in (0, size[0]) for j in (0, size[1]) for k in (0, size[2])], float).T
    other = placements.get("qform", affine)
    if np.linalg.norm((affine - other) @ corners, axis=0).max() > _APART * axes.min():
        log.warning(
            "%s is placed twice, and differently: by its sform with %s, by its qform with %s: the sform is used; if "
            "the qform is right, set sform_code to 0", path, _placement(affine), _placement(other),
        )  # fmt: skip
    elif name == "sform" and not np.allclose(axes, np.abs(mm), rtol=1e-3, atol=0.0):
        log.warning(
            "%s has the voxel size %s mm in pixdim and %s mm in its sform: the sform is used; if pixdim is right, "
            "correct the sform", path, numbers(mm), numbers(axes),
        )  # fmt: skip
    if name == "sform" and np.allclose(axes, np.abs(mm), rtol=1e-5, atol=0.0):
        axes = np.abs(mm)  # without the rounding of the matrix
    scale = _MM.get(forms.units & 7, 1.0)
    matrix = (_LPS @ affine)[:3]
    direction = matrix[:, :3] / np.linalg.norm(matrix[:, :3], axis=0)
    return make_grid(
        path,
        size,
        (scale * axes).tolist(),
        (scale * matrix[:, 3] + 0.0).tolist(),
        (direction + 0.0).ravel().tolist(),
        forms,
    )


def _forms(header: Any) -> NiftiForms:
    return NiftiForms(
        version=2 if int(header["sizeof_hdr"]) == 540 else 1,
        pixdim=tuple(header["pixdim"][:4].tolist()),
        units=int(header["xyzt_units"]),
        qform_code=int(header["qform_code"]),
        quaternion=tuple(float(header[name]) for name in _QUATERNION),
        sform_code=int(header["sform_code"]),
        sform=tuple(float(value) for name in ("srow_x", "srow_y", "srow_z") for value in header[name]),
    )


def _quaternion_affine(path: Path, header: Any, mm: np.ndarray) -> np.ndarray:
    """The qform; qfac is 1 unless it is -1, sizes are positive, as the NIfTI standard says."""
    if not (np.abs(mm) > 1e-6).all():
        raise _not_placed(path)
    tidy = header.copy()
    tidy["pixdim"][:4] = [-1 if header["pixdim"][0] < 0 else 1, *np.abs(mm)]
    length = math.hypot(*(float(header[name]) for name in _QUATERNION[:3]))
    if 1 < length < 1 + _ROUNDED:
        for name in _QUATERNION[:3]:
            tidy[name] = header[name] / length
    try:
        return tidy.get_qform()
    except (nib.spatialimages.HeaderDataError, ValueError):
        raise _not_placed(path) from None


def _not_placed(path: Path) -> UserError:
    return UserError(f"{path} does not say where its voxels lie: expected a finite qform and sform; export it again")


def _placement(affine: np.ndarray) -> str:
    """An affine to RAS as messages show it."""
    axes, spacing = "".join(nib.aff2axcodes(affine)), np.linalg.norm(affine[:3, :3], axis=0)
    return f"axes to {axes}, spacing {numbers(spacing)} and origin {numbers(affine[:3, 3])} mm"


def _affine_of(grid: Grid) -> np.ndarray:
    """From (i, j, k) to LPS, mm."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(grid.direction).reshape(3, 3) * grid.spacing
    affine[:3, 3] = grid.origin
    return affine
