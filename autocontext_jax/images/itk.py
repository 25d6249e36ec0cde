"""MetaImage and NRRD files, and images in memory, through SimpleITK."""

import math
import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from autocontext_jax import runtime
from autocontext_jax.errors import UserError
from autocontext_jax.images.checks import check_kind, check_packing, check_size, make_grid
from autocontext_jax.images.grid import Grid


def read_itk(path: Path, *, header_only: bool = False) -> tuple[np.ndarray | None, Grid]:
    """The voxels of a file as it stores them, [k, j, i], and its grid. ITK can crash on a damaged file.

    Args:
      path: of a MetaImage or NRRD file.
      header_only: the voxels are not read.

    Raises:
      UserError: it is no 3D image of numbers; its voxels are in a file outside its folder; it promises too much.
      RuntimeError: ITK cannot read it.
    """
    runtime.silence_itk()
    held = path.stat().st_size + sum(part.stat().st_size for part in _parts(path))
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
    image = reader.Execute()
    if header_only:
        return None, grid_of(path, image)
    return sitk.GetArrayFromImage(image), grid_of(path, image)  # a view would not keep the image's memory


def grid_of(path: Path, source: sitk.Image | sitk.ImageFileReader) -> Grid:
    """The grid of an image or of a header.

    Raises:
      UserError: see `make_grid`.
    """
    return make_grid(path, source.GetSize(), source.GetSpacing(), source.GetOrigin(), source.GetDirection())


def _parts(path: Path) -> list[Path]:
    """The other files that hold a header's voxels.

    Raises:
      UserError: one does not exist, or lies outside the header's folder.
    """
    with path.open("rb") as file:
        lines = file.read(1 << 20).split(b"\n")
    nrrd = lines[0].startswith(b"NRRD")
    names: list[str] = []
    for number, raw in enumerate(lines):
        line = raw.decode("latin-1").strip()
        key, separator, value = line.partition(":" if nrrd else "=")
        if nrrd and not line:
            break
        if not separator or key.strip().lower() not in ("elementdatafile", "data file", "datafile"):
            continue
        words = value.split()
        listed = bool(words) and words[0].upper() == "LIST"
        if listed:
            names = [entry for more in lines[number + 1 :] if (entry := more.decode("latin-1").strip())]
        elif value.strip() and value.strip().upper() != "LOCAL":
            names = [words[0] if "%" in words[0] else value.strip()]
        break
    found = []
    for name in names:
        place = Path(name)
        if place.is_absolute() or ".." in place.parts:
            raise UserError(
                f"{path} has its voxels in {name!r}: expected a file in its own folder; move the file there and "
                f"correct "
                "the header"
            )
        if "%" in name:
            found += [entry for entry in path.parent.iterdir() if entry.is_file()]
        elif not (path.parent / name).is_file():
            raise UserError(f"{path} has its voxels in {name!r}, which does not exist: copy that file too")
        else:
            found.append(path.parent / name)
    return found
