"""MetaImage, NRRD, PNG and TIFF files, and images in memory, through SimpleITK."""

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from autocontext_jax import runtime
from autocontext_jax.errors import UserError
from autocontext_jax.images.checks import check_kind, check_packing, check_size, make_grid
from autocontext_jax.images.formats import PICTURES, suffix_of
from autocontext_jax.images.grid import Grid
from autocontext_jax.images.voxel_files import bytes_held, header_lines

log = logging.getLogger(__name__)


def read_itk(path: Path, *, header_only: bool = False, several: bool = False) -> tuple[np.ndarray | None, Grid]:
    """The voxels of a file as it stores them, [k, j, i], and its grid. ITK can crash on a damaged file.

    Args:
      path: of a MetaImage, NRRD, PNG or TIFF file.
      header_only: the voxels are not read.
      several: whether a colour picture is allowed: its voxels are [C, 1, j, i].

    Raises:
      UserError: it is no 3D image of numbers; its voxels are in a file outside its folder; it promises too much.
      RuntimeError: ITK cannot read it.
      MemoryError: there is not enough for its voxels.
    """
    runtime.silence_itk()
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{path} has a name that is not UTF-8: expected one that is, as ITK opens no other; rename the file or its "
            "folder"
        ) from None
    held = bytes_held(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_READERS[suffix_of(path)])
    reader.SetFileName(str(path))
    with _explained(path):
        reader.ReadImageInformation()
    if suffix_of(path) in PICTURES:
        return _read_picture(path, reader, header_only=header_only, several=several)
    size = reader.GetSize()
    while len(size) > 3 and size[-1] == 1:
        size = size[:-1]
    check_kind(path, size, reader.GetNumberOfComponents())
    # Such as "16-bit signed integer"; "vector of" it if an axis of NRRD, of length 1, has the kind "list".
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if not (bits := re.match(r"(?:vector of )?(\d+)-bit (?:un)?(?:signed integer|float)", kind)):
        raise UserError(f"{path} holds voxels of the kind {kind}: expected integers or floats; export it again")
    check_size(path, size)
    check_packing(path, math.prod(size) * int(bits[1]) // 8, held)
    _check_placement(path)
    if len(reader.GetSize()) > 3:  # the header of more axes does not give the grid of three
        reader.SetExtractSize([*size, *[0] * (len(reader.GetSize()) - 3)])
    elif header_only:
        return None, grid_of(path, reader)
    with _explained(path):
        image = reader.Execute()
    if header_only:
        return None, grid_of(path, image)
    voxels = sitk.GetArrayFromImage(image)  # a view would not keep the image's memory
    return voxels.reshape(voxels.shape[:3]), grid_of(path, image)


_READERS = {
    ".mha": "MetaImageIO", ".mhd": "MetaImageIO", ".nrrd": "NrrdImageIO", ".png": "PNGImageIO", ".tif": "TIFFImageIO",
    ".tiff": "TIFFImageIO",
}  # fmt: skip


def _read_picture(
    path: Path, reader: sitk.ImageFileReader, *, header_only: bool, several: bool
) -> tuple[np.ndarray | None, Grid]:
    """A slice of voxels of 1 mm, rows to the patient's back, columns to the left: the file says nothing of it."""
    width, height, *planes = reader.GetSize()
    if any(count != 1 for count in planes):
        raise UserError(
            f"{path} holds {math.prod(planes)} pictures: expected one slice; write each to a file of its own"
        )
    size = (width, height, 1)
    check_kind(path, size, reader.GetNumberOfComponents(), expected=None if several else 1)
    check_size(path, (*size, reader.GetNumberOfComponents()))
    grid = make_grid(path, size, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), np.eye(3).ravel().tolist())
    if header_only:
        return None, grid
    with _explained(path):
        voxels = sitk.GetArrayFromImage(reader.Execute())
    voxels = voxels.reshape(height, width, -1)
    if voxels.dtype.kind not in "iuf":
        raise UserError(f"{path} holds voxels of the type {voxels.dtype}: expected integers or floats")
    channels = np.moveaxis(voxels, -1, 0)[:, None]
    return channels if len(channels) > 1 else channels[0], grid


def _check_placement(path: Path) -> None:
    """Names what a header leaves open about where its voxels lie, and ITK fills in silently.

    Raises:
      UserError: lengths are in another unit than mm; ITK takes them for mm.
    """
    fields: dict[str, str] = {}
    nrrd = path.name.lower().endswith(".nrrd")
    for line in header_lines(path):
        name, _, value = line.decode("latin-1").partition(":" if nrrd else "=")
        fields.setdefault(name.strip().lower(), value.strip())
        if name.strip().lower() == "elementdatafile":
            break
    units = re.findall(
        r"[^\s\"]+", " ".join(fields.get(name, "") for name in ("space units", "units", "distanceunits"))
    )
    if other := [unit for unit in units if unit.lower() not in ("mm", "millimeter", "millimetre", "?", "none", "???")]:
        raise UserError(
            f"{path} has lengths in {other[0]}: expected mm, as ITK takes all lengths for mm; change the lengths and "
            "the unit in its header"
        )
    if not fields.keys() & {"space directions", "spacings", "elementspacing", "elementsize"}:
        log.warning(
            "%s does not say the size of its voxels: 1 mm is taken; if it is wrong, write the size into its header",
            path,
        )
    if nrrd and fields.get("space", "").lower().replace("-time", "") not in _SPACES:
        log.warning(
            "%s does not say how its patient lies (space %r): its first axis is taken to point to the left, its second "
            "to the back, its third to the head", path, fields.get("space", ""),
        )  # fmt: skip


_SPACES = {
    "left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las",
}  # fmt: skip

_LONGEST = 295  # bytes of a line of MetaImage that ITK has room for, whatever the field; some may have up to 32767


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Gives what ITK cannot do its own name, so that no whole file is called damaged."""
    try:
        yield
    except RuntimeError as error:
        if "alloc" in str(error):  # "Failed to allocate memory for image", "std::bad_alloc"
            raise MemoryError from None
        if "bzip2 encoding not available" in str(error):
            raise UserError(f"{path} is packed with bzip2, which ITK does not read: export it with gzip") from None
        if suffix_of(path) in (".mha", ".mhd"):
            with path.open("rb") as file:
                longest = max(len(line) for line in file.read(1 << 20).split(b"ElementDataFile")[0].split(b"\n"))
            if longest > _LONGEST:
                raise UserError(
                    f"{path} cannot be read: its header has a line of {longest} bytes, and ITK has no room for long "
                    "ones, such as a comment of more than 499; remove that line, or copy the file again"
                ) from None
        raise


def grid_of(path: Path, source: sitk.Image | sitk.ImageFileReader) -> Grid:
    """The grid of an image or of a header.

    Raises:
      UserError: see `make_grid`.
    """
    return make_grid(path, source.GetSize(), source.GetSpacing(), source.GetOrigin(), source.GetDirection())
