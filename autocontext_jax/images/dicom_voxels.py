"""The values of DICOM planes, each scaled as its own file says."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut, get_decoder, pixel_array
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from autocontext_jax.errors import UserError
from autocontext_jax.images.dicom_planes import Plane, whole

log = logging.getLogger(__name__)

_PLAIN = {ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian}


def read_values(folder: Path, planes: Sequence[Plane]) -> np.ndarray:
    """The values of planes, [K, J, I]: integers, or float32 where a plane's slope or intercept is a fraction.

    Raises:
      UserError: some planes say how their values are scaled, and some do not; voxels are missing or cannot be decoded.
    """
    _check_rescale(folder, planes)
    integers = all(float(number or 0).is_integer() for plane in planes for number in (plane.slope, plane.intercept))
    columns, rows = planes[0].size
    voxels = np.empty((len(planes), rows, columns), np.int16 if integers else np.float32)
    surplus = []
    for number, plane in enumerate(planes):
        if _has_surplus(plane):
            surplus.append(plane.name)
        values = _scaled(folder, plane)
        if voxels.dtype != np.float32 and not np.can_cast(values.dtype, voxels.dtype):
            voxels = _widened(voxels, values)
        voxels[number] = values
        if "PixelData" in plane.dataset and whole(plane.dataset, "NumberOfFrames", 1) == 1:
            del plane.dataset.PixelData  # or all files would be held twice
    if surplus:
        log.warning(
            "%s: %d slice(s), the first %s, hold more bytes than their Rows and Columns say: what is beyond these is "
            "left out", folder, len(surplus), surplus[0],
        )  # fmt: skip
    return voxels


def _has_surplus(plane: Plane) -> bool:
    """Whether a file holds more voxels than it says, beside a byte that makes their number even."""
    dataset, (columns, rows) = plane.dataset, plane.size
    try:
        if plane.frame or "PixelData" not in dataset or _syntax(dataset).is_compressed:
            return False
        element = dataset.get_item("PixelData", keep_deferred=True)
        held = element.length if element.value is None else len(element.value)
    except Exception:  # pydicom raises many kinds; `stored_values` tells
        return False
    bits = columns * rows * whole(dataset, "BitsAllocated", 16) * max(1, whole(dataset, "NumberOfFrames", 1))
    return held > (bits + 7) // 8 + 1


def stored_values(folder: Path, plane: Plane) -> np.ndarray:
    """The values of a plane as they are stored, [J, I].

    Raises:
      UserError: there are fewer than the file says, or they cannot be decoded.
    """
    dataset, (columns, rows) = plane.dataset, plane.size
    path = folder / plane.name
    if not (allocated := whole(dataset, "BitsAllocated", 0)):
        raise UserError(f"{path} has no BitsAllocated: expected the bits of a voxel; export it again")
    try:
        syntax = _syntax(dataset)
        if syntax not in _PLAIN or allocated not in (8, 16, 32) or "PixelData" not in dataset:
            array = np.asarray(pixel_array(dataset, index=plane.frame, raw=True)).reshape(rows, columns)
            return _significant(path, array.astype(array.dtype.newbyteorder("="), copy=False), dataset)
        signed = int(dataset.get("PixelRepresentation", 0)) == 1
        size = rows * columns * allocated // 8
        data = _bytes_of(dataset, syntax, plane.frame * size, size)
    except UserError:
        raise
    except Exception as error:  # pydicom and its decoders raise many kinds
        if not _can_unpack(syntax := dataset.file_meta.get("TransferSyntaxUID")):
            raise UserError(
                f"{path} is packed in the transfer syntax {getattr(syntax, 'name', syntax)}, which cannot be unpacked "
                "here: expected plain voxels, RLE, JPEG, JPEG-LS or JPEG 2000; export it uncompressed"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path} cannot be decoded ({reason}): it is damaged; copy or export it again") from None
    if len(data) < size:
        raise UserError(f"{path} holds {len(data)} of the {size} bytes of its voxels: it is truncated; copy it again")
    kind = np.dtype(f"<{'i' if signed else 'u'}{allocated // 8}")
    return _significant(path, np.frombuffer(data, kind).reshape(rows, columns), dataset)


def _can_unpack(syntax: Any) -> bool:
    try:
        return get_decoder(syntax).is_available
    except Exception:  # pydicom raises many kinds
        return False


def _bytes_of(dataset: Any, syntax: Any, start: int, count: int) -> bytes:
    """Some of the bytes of the voxels; where pydicom left them in the file, they are read there, which is faster."""
    element = dataset.get_item("PixelData", keep_deferred=True)
    if element.value is not None or syntax == DeflatedExplicitVRLittleEndian:
        return dataset.PixelData[start : start + count]
    with open(dataset.filename, "rb") as file:
        file.seek(element.value_tell + start)
        return file.read(max(0, min(count, element.length - start)))


def _syntax(dataset: Any) -> Any:
    """How the values are packed; a file that does not say so has them as the elements before them."""
    if "TransferSyntaxUID" not in dataset.file_meta:
        little = dataset.original_encoding[1] is not False
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if little else ExplicitVRBigEndian
    return dataset.file_meta.TransferSyntaxUID


def _significant(path: Path, stored: np.ndarray, dataset: Any) -> np.ndarray:
    """The bits that belong to the value; the others can hold an overlay (DICOM PS3.5, 8.1.1)."""
    if stored.dtype.kind not in "iu":
        return stored
    allocated = 8 * stored.dtype.itemsize
    bits = whole(dataset, "BitsStored", allocated)
    high = whole(dataset, "HighBit", bits - 1)
    if not 1 <= bits <= high + 1 <= allocated:
        raise UserError(
            f"{path} has BitsStored {bits} and HighBit {high} of {allocated} bits: expected at most as many bits as "
            "are allocated; export it again"
        )
    if bits == allocated:
        return stored
    # Left, so that the value's sign is the type's; then right, which repeats the sign.
    return (stored << (allocated - 1 - high)) >> (allocated - bits)


def _scaled(folder: Path, plane: Plane) -> np.ndarray:
    """The values of a plane in the smallest of int16, int32 and int64 that holds them, or as floats."""
    stored = stored_values(folder, plane)
    if _by_table(plane):
        try:
            return np.asarray(apply_modality_lut(stored, plane.dataset)).astype(np.int32)
        except Exception as error:  # pydicom raises many kinds
            raise UserError(
                f"{folder / plane.name} has a ModalityLUTSequence that cannot be used ({type(error).__name__}): "
                "expected a table of its values; export it again"
            ) from None
    slope, intercept = 1.0 if plane.slope is None else plane.slope, plane.intercept or 0.0
    small = abs(slope) < 2**31 and abs(intercept) < 2**62
    if stored.dtype.kind == "f" or not (small and slope.is_integer() and intercept.is_integer()):
        return stored.astype(np.float64) * slope + intercept
    # The extremes tell what type is wide enough, which is faster than a wide array.
    ends = sorted(int(value) * int(slope) + int(intercept) for value in (stored.min(), stored.max()))
    kinds: tuple[type, ...] = (np.int16, np.int32, np.int64)
    kind = next((kind for kind in kinds if np.iinfo(kind).min <= ends[0] and ends[1] <= np.iinfo(kind).max), np.float64)
    if kind == np.int16 and slope == 1 and stored.dtype.itemsize == 2 and abs(intercept) < 2**15:
        return stored.view(np.int16) + np.int16(intercept)  # what wraps at first wraps back
    wide: np.ndarray = stored.astype(
        np.int32 if kind == np.int32 and stored.dtype.itemsize <= 2 else kind if kind != np.int16 else np.int64
    )
    return (wide * int(slope) + int(intercept)).astype(kind)


def _widened(voxels: np.ndarray, values: np.ndarray) -> np.ndarray:
    return voxels.astype(np.float32 if values.dtype.kind == "f" else np.promote_types(voxels.dtype, values.dtype))


def _check_rescale(folder: Path, planes: Sequence[Plane]) -> None:
    """Refuses a series of which only some slices say how their values are scaled: the others' would be off silently."""
    by_kind: dict[tuple[bool, ...], list[Plane]] = {}
    for plane in planes:
        if plane.slope == 0:
            raise UserError(f"{folder / plane.name} has the RescaleSlope 0: expected another number; export it again")
        by_kind.setdefault((plane.slope is None, plane.intercept is None, _by_table(plane)), []).append(plane)
    if len(by_kind) > 1:
        most, *_, least = sorted(by_kind.values(), key=len, reverse=True)
        raise UserError(
            f"{folder}: {least[0].name} has {_scaling(least[0])}, and {most[0].name} has {_scaling(most[0])}: expected "
            "both to say alike how values become HU; export the series again"
        )


def _by_table(plane: Plane) -> bool:
    return plane.slope is None and plane.intercept is None and "ModalityLUTSequence" in plane.dataset


def _scaling(plane: Plane) -> str:
    """How a plane says that its values are scaled, for messages."""
    if _by_table(plane):
        return "a ModalityLUTSequence"
    shown = [
        f"no {name}" if value is None else f"the {name} {value:.9g}"
        for name, value in (("RescaleSlope", plane.slope), ("RescaleIntercept", plane.intercept))
    ]
    return " and ".join(shown)


pydicom.config.logger.disabled = True  # what matters is said here
