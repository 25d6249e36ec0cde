"""MetaImage and NRRD files, and images in memory, through SimpleITK."""

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from autocontext_jax import runtime
from autocontext_jax.errors import UserError
from autocontext_jax.files import is_file
from autocontext_jax.images.checks import check_kind, check_packing, check_size, make_grid
from autocontext_jax.images.grid import Grid


def read_itk(
    path: Path, *, header_only: bool = False, allocate: Callable[[Sequence[int], Any], np.ndarray] = np.empty
) -> tuple[np.ndarray | None, Grid]:
    """The voxels of a file as it stores them, [k, j, i], and its grid. ITK can crash on a damaged file.

    Args:
      path: of a MetaImage or NRRD file.
      header_only: the voxels are not read.
      allocate: makes the array of the voxels from its shape and type.

    Raises:
      UserError: it is no 3D image of numbers; its voxels are in a file outside its folder; it promises too much.
      RuntimeError: ITK cannot read it.
      MemoryError: there is not enough for its voxels.
    """
    runtime.silence_itk()
    held = bytes_held(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if path.name.lower().endswith(".nrrd") else "MetaImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    size = reader.GetSize()
    while len(size) > 3 and size[-1] == 1:
        size = size[:-1]
    check_kind(path, size, reader.GetNumberOfComponents())
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())  # such as "16-bit signed integer"
    if not (bits := re.match(r"(\d+)-bit (?:un)?(?:signed integer|float)", kind)):
        raise UserError(f"{path} holds voxels of the kind {kind}: expected integers or floats; export it again")
    check_size(path, size)
    check_packing(path, math.prod(size) * int(bits[1]) // 8, held)
    if len(reader.GetSize()) > 3:  # the header of more axes does not give the grid of three
        reader.SetExtractSize([*size, *[0] * (len(reader.GetSize()) - 3)])
    elif header_only:
        return None, grid_of(path, reader)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        if "alloc" in str(error):  # "Failed to allocate memory for image", "std::bad_alloc"
            raise MemoryError from None
        raise
    if header_only:
        return None, grid_of(path, image)
    view = sitk.GetArrayViewFromImage(image)
    voxels = allocate(view.shape, view.dtype)
    np.copyto(voxels, view)
    return voxels, grid_of(path, image)


def grid_of(path: Path, source: sitk.Image | sitk.ImageFileReader) -> Grid:
    """The grid of an image or of a header.

    Raises:
      UserError: see `make_grid`.
    """
    return make_grid(path, source.GetSize(), source.GetSpacing(), source.GetOrigin(), source.GetDirection())


def bytes_held(path: Path) -> int:
    """Bytes of a MetaImage or NRRD file, and of those beside it that hold its voxels.

    Raises:
      UserError: one of these does not exist, or lies outside the header's folder.
    """
    return path.stat().st_size + sum(part.stat().st_size for part in _parts(path))


_MOST_HEADER = 1 << 26  # bytes that are searched for where the voxels are


def _parts(path: Path) -> list[Path]:
    """The other files that hold a header's voxels.

    Raises:
      UserError: one does not exist, or lies outside the header's folder.
    """
    nrrd = path.name.lower().endswith(".nrrd")
    names: list[str] = []
    left = _MOST_HEADER
    with path.open("rb") as file:
        while left > 0 and (raw := file.readline(left)):
            left -= len(raw)
            if nrrd and not raw.strip():
                break
            if not (found := re.match(_NRRD_DATA if nrrd else _METAIMAGE_DATA, raw.replace(b"\r", b"\n"))):
                continue
            value = os.fsdecode(found[1].strip())
            words = value.split()
            if words and words[0].upper() == "LIST":
                names = [os.fsdecode(more.strip()) for more in file.read(left).splitlines() if more.strip()]
            elif words and value.upper() != "LOCAL":
                names = [words[0] if "%" in words[0] else value]
            break
    found_parts = []
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(
                f"{path} has its voxels in {name!r}: expected a file in its own folder; move the file there and "
                "correct the header"
            )
        if "%" in name:  # a pattern of names, of which the format can make any in the folder
            found_parts += [entry for entry in (path.parent / name).parent.iterdir() if entry.is_file()]
        elif not is_file(path.parent / name):
            raise UserError(f"{path} has its voxels in {name!r}, which does not exist: copy that file too")
        else:
            found_parts.append(path.parent / name)
    return found_parts


# As the libraries that ITK reads these formats with find the field.
_NRRD_DATA = re.compile(rb"data ?file\s*:=?(.*)", re.IGNORECASE | re.DOTALL)
_METAIMAGE_DATA = re.compile(rb"(?:.*\n)?\s*ElementDataFile\s*[=:]?(.*)", re.IGNORECASE | re.DOTALL)
