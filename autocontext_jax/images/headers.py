"""What ITK and GDCM trust in a file's header, seen to before they read it.

From a broken header they crash the process, take all memory or do not come back, where a scan that cannot be read is to
end in one line. These are no readers: what they let pass, the libraries may still refuse.
"""

import contextlib
import gzip
import io
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from autocontext_jax.errors import UserError
from autocontext_jax.files import is_file

# The fields of text headers that ITK trusts, with a word's pattern and how many words a field has, by the number of
# axes: what it takes from a wrong one is a crash or all memory.
_NUMBER = r"[-+]?(\d{1,40}\.?\d{0,40}|\.\d{1,40})([eE][-+]?\d{1,3})?"
_ONE, _EACH, _SQUARE = 0, 1, 2  # words: axes to this power
_NRRD = {"dimension": (r"\d", _ONE), "sizes": (r"\d{1,10}", _EACH), "kinds": (r"\S{1,40}", _EACH)}
_NRRD_FIELDS = {
    "number", "type", "dimension", "space", "space dimension", "sizes", "spacings", "thicknesses", "axis mins",
    "axismins", "axis maxs", "axismaxs", "space directions", "centers", "centerings", "kinds", "labels", "units",
    "min", "max", "old min", "oldmin", "old max", "oldmax", "endian", "encoding", "line skip", "lineskip", "byte skip",
    "byteskip", "sample units", "sampleunits", "space units", "space origin", "measurement frame", "data file",
    "datafile", "block size", "blocksize",
}  # fmt: skip
_METAIMAGE = {
    "NDims": (r"\d", _ONE),
    "CompressedDataSize": (r"\d{1,18}", _ONE),
    "DimSize": (r"\d{1,10}", _EACH),
    **dict.fromkeys(
        ("ElementSpacing", "ElementSize", "Offset", "Position", "Origin", "CenterOfRotation"), (_NUMBER, _EACH)
    ),
    **dict.fromkeys(("TransformMatrix", "Rotation", "Orientation"), (_NUMBER, _SQUARE)),
}


def check_text_header(path: Path) -> int:
    """Sees that a MetaImage or NRRD header holds nothing that ITK stumbles over.

    Returns:
      Bytes of the file that holds the voxels: this one, or the one that the header names.
    """
    with path.open("rb") as file:
        lines = file.read(1 << 20).splitlines()  # a header is far shorter
    nrrd = bool(lines) and lines[0].startswith(b"NRRD")
    rules, separator = (_NRRD, ":") if nrrd else (_METAIMAGE, "[=:]")
    axes, packed, held, seen = 0, 0, path.stat().st_size, set()
    for number, line in enumerate(lines, start=1):
        key, *rest = re.split(separator, line.decode("latin-1"), maxsplit=1)
        key, value = key.strip(), "".join(rest).strip()
        if key in rules:
            pattern, power = rules[key]
            if key in seen or not (axes or power == _ONE):
                raise _bad_line(path, number, line, f"{key} once, after the number of axes")
            if not all(re.fullmatch(pattern, word) for word in value.split()) or len(value.split()) != axes**power:
                raise _bad_line(path, number, line, f"{axes**power} word(s) as {key} has them")
            axes = int(value) if key in ("NDims", "dimension") else axes
            seen.add(key)
        free = not line or line.startswith((b"#", b"NRRD", b"content:")) or value.startswith("=")
        if nrrd and not free and (key not in _NRRD_FIELDS or max(map(len, value.split()), default=0) > 100):
            raise _bad_line(path, number, line, "a field of NRRD, with no word of more than 100 letters")
        if nrrd and len(line) > (4000 if free else 500):  # ITK's reader crashes on some longer ones
            raise _bad_line(path, number, line, "a shorter line")
        if key == "CompressedDataSize":
            packed = int(value)
        if key in ("ElementDataFile", "data file", "datafile") and value.upper() != "LOCAL":
            if not is_file(path.parent / value):
                raise _bad_line(path, number, line, "the name of one file that exists, or its voxels in itself")
            held = (path.parent / value).stat().st_size
        if key == "ElementDataFile" or (nrrd and not line):
            break
    if packed > held:
        raise UserError(f"{path} has {held} of its {packed} packed bytes: it is truncated; copy or export it again")
    return held


def _placement(real: str, code: str, offsets: tuple[int, ...], size: int) -> np.dtype:
    """Where a header places its voxels: their sizes, codes of the two ways (above 0: given), the ways themselves."""
    names, formats = ["sizes", "codes", "quaternion", "matrix"], [f"3{real}", f"2{code}", f"6{real}", f"(3,4){real}"]
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size})


_NIFTI_1 = _placement("f4", "i2", (80, 252, 256, 280), 348)
_NIFTI_2 = _placement("f8", "i4", (112, 344, 352, 400), 540)


def check_nifti_header(path: Path) -> int:
    """Sees that a NIfTI header places its voxels somewhere: from numbers without sense ITK does not come back.

    Returns:
      Bytes of the file.
    """
    with unpacked(path) as file:
        head = file.read(540)
    # It begins with its own size.
    sizes: dict[int, Literal["<", ">"]] = {
        int.from_bytes(head[:4], "little"): "<",
        int.from_bytes(head[:4], "big"): ">",
    }
    layout = _NIFTI_1 if 348 in sizes else _NIFTI_2
    if layout.itemsize not in sizes or len(head) < layout.itemsize:
        raise ValueError("no NIfTI header")
    header = np.frombuffer(head, layout.newbyteorder(sizes[layout.itemsize]), 1)[0]
    by_quaternion, by_matrix = (header["codes"] > 0).tolist()
    matrix = header["matrix"].astype(float)
    with np.errstate(all="ignore"):
        axes = np.linalg.norm(matrix[:, :3], axis=0)
        flat = not abs(np.linalg.det(matrix[:, :3] / axes)) > 1e-3
    used = np.concatenate([header["sizes"], *[header["quaternion"]] * by_quaternion, *[matrix.ravel()] * by_matrix])
    if not (np.abs(used) < 1e9).all() or (by_matrix and (flat or not axes.min() > 1e-6)):
        raise UserError(f"{path} does not say where its voxels lie: expected a finite qform and sform; export it again")
    return path.stat().st_size


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[gzip.GzipFile | io.BufferedReader]:
    """Opens a NIfTI file; not by its name: there are .nii.gz that were never packed."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as file:
        yield file


def _bad_line(path: Path, number: int, line: bytes, expected: str) -> UserError:
    found = line[:100].decode("latin-1")
    return UserError(f"{path}, line {number} is {found!r}: expected {expected}; it is damaged: copy or export it again")


_LONG = (
    b"OB",
    b"OW",
    b"OF",
    b"OD",
    b"OL",
    b"OV",
    b"SQ",
    b"UC",
    b"UR",
    b"UT",
    b"UN",
    b"SV",
    b"UV",
)  # DICOM PS3.5, 7.1.2
_TO_THE_END = 0xFFFFFFFF  # the length of what ends with a mark


def check_elements(path: Path) -> None:
    """Sees that no element of a DICOM file promises more than the file has: GDCM takes memory for it at once."""
    left, syntax = path.stat().st_size - 132, b""
    with path.open("rb") as file:
        file.seek(132)
        while len(head := file.read(8)) == 8:
            left -= 8
            group, element, kind, short = struct.unpack("<HH2sH", head)
            if group != 2 and syntax in (b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99"):
                return  # of big ends, or deflated: hardly ever seen
            implicit = group == 0xFFFE or (group != 2 and syntax == b"1.2.840.10008.1.2")
            length = int.from_bytes(head[4:], "little") if implicit else short
            if not implicit and kind in _LONG:
                length, left = int.from_bytes(file.read(4), "little"), left - 4
            if group == 2 and kind not in (b"UL", b"OB", b"UI", b"SH", b"AE", b"UR"):
                raise UserError(f"{path} is damaged: its DICOM header holds {head!r}; copy or export it again")
            nested = group == 0xFFFE or length == _TO_THE_END or (not implicit and kind == b"SQ")
            if length > left and length != _TO_THE_END:
                raise UserError(
                    f"{path} is truncated or damaged: its element ({group:04x},{element:04x}) has {max(left, 0)} of "
                    f"its {length} bytes; copy or export it again"
                )
            if (group, element) == (0x7FE0, 0x0010):
                return  # the voxels, with at most padding behind them
            if (group, element) == (0x0002, 0x0010):
                syntax = file.read(length).rstrip(b"\0 ")
                left -= length
            elif not nested:  # else its elements follow
                file.seek(length, os.SEEK_CUR)
                left -= length
