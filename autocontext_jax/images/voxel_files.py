"""The files that hold a scan: a MetaImage or NRRD header may have its voxels in other files. Free of ITK."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from autocontext_jax.errors import UserError
from autocontext_jax.files import exists, is_file
from autocontext_jax.images.formats import suffix_of


def voxel_files(path: Path) -> list[Path]:
    """A file, and those beside a MetaImage or NRRD header that hold its voxels.

    Raises:
      UserError: one of these does not exist, or lies outside the header's folder.
      OSError: a header cannot be read.
    """
    return [path, *(_parts(path) if suffix_of(path) in (".mha", ".mhd", ".nrrd") else ())]


def bytes_held(path: Path) -> int:
    """Bytes of the files of `voxel_files`; the same errors."""
    return sum(file.stat().st_size for file in voxel_files(path))


_MOST_HEADER = 1 << 26  # bytes of a header that are looked at


def header_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file; of a NRRD file up to the empty one that ends its header."""
    nrrd, left = path.name.lower().endswith(".nrrd"), _MOST_HEADER
    with path.open("rb") as file:
        while left > 0 and (line := file.readline(left)) and not (nrrd and not line.strip()):
            left -= len(line)
            yield line


def _parts(path: Path) -> list[Path]:
    nrrd = path.name.lower().endswith(".nrrd")
    names: list[str] = []
    lines = header_lines(path)
    for line in lines:
        if not (found := re.match(_NRRD_DATA if nrrd else _METAIMAGE_DATA, line.replace(b"\r", b"\n"))):
            continue
        value = os.fsdecode(found[1].strip())
        words = value.split()
        if words and words[0].upper() == "LIST":
            names = [os.fsdecode(name.strip()) for name in lines if name.strip()]
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
        place = path.parent / name
        if "%" in name and exists(place.parent):  # a pattern of names, of which any may be in the folder
            found_parts += [entry for entry in sorted(place.parent.iterdir()) if entry.is_file()]
        elif not is_file(place):
            raise UserError(f"{path} has its voxels in {name!r}, which does not exist: copy that file too")
        else:
            found_parts.append(place)
    return found_parts


# As the libraries that ITK reads these formats with find the field.
_NRRD_DATA = re.compile(rb"data ?file\s*:=?(.*)", re.IGNORECASE | re.DOTALL)
_METAIMAGE_DATA = re.compile(rb"(?:.*\n)?\s*ElementDataFile\s*[=:]?(.*)", re.IGNORECASE | re.DOTALL)
