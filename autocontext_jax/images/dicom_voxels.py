"""The values of DICOM planes, each scaled as its own file says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut, pixel_array
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from autocontext_jax.errors import UserError
from autocontext_jax.images.checks import numbers
from autocontext_jax.images.dicom_planes import Plane

_PLAIN = {ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian}
_NO_RESCALE = "no RescaleSlope and RescaleIntercept"


def read_values(folder: Path, planes: Sequence[Plane]) -> np.ndarray:
    """The values of planes, [K, J, I]: integers, or float32 where a plane's slope or intercept is a fraction.

    Raises:
      UserError: some planes say how their values are scaled, and some do not; voxels are missing or cannot be decoded.
    """
    _check_rescale(folder, planes)
    whole = all(float(number or 0).is_integer() for plane in planes for number in (plane.slope, plane.intercept))
    columns, rows = planes[0].size
    voxels = np.empty((len(planes), rows, columns), np.int16 if whole else np.float32)
    for number, plane in enumerate(planes):
        values = _scaled(folder, plane)
        if voxels.dtype != np.float32 and not np.can_cast(values.dtype, voxels.dtype):
            voxels = _widened(voxels, values)
        voxels[number] = values
    return voxels


def stored_values(folder: Path, plane: Plane) -> np.ndarray:
    """The values of a plane as they are stored, [J, I].

    Raises:
      UserError: there are fewer than the file says, or they cannot be decoded.
    """
    dataset, (columns, rows) = plane.dataset, plane.size
    path = folder / plane.name
    try:
        syntax = dataset.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian)
        allocated = int(dataset.BitsAllocated)
        if syntax not in _PLAIN or allocated not in (8, 16, 32) or "PixelData" not in dataset:
            array = pixel_array(_complete(dataset, syntax), index=plane.frame, raw=True)
            return _significant(np.asarray(array).reshape(rows, columns), dataset)
        signed = int(dataset.get("PixelRepresentation", 0)) == 1
        size = rows * columns * allocated // 8
        data = dataset.PixelData[plane.frame * size : (plane.frame + 1) * size]
    except Exception as error:  # pydicom and its decoders raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path} cannot be decoded ({reason}): it is damaged; copy or export it again") from None
    if len(data) < size:
        raise UserError(f"{path} holds {len(data)} of the {size} bytes of its voxels: it is truncated; copy it again")
    kind = np.dtype(f"<{'i' if signed else 'u'}{allocated // 8}")
    return _significant(np.frombuffer(data, kind).reshape(rows, columns), dataset)


def _complete(dataset: Any, syntax: Any) -> Any:
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def _significant(stored: np.ndarray, dataset: Any) -> np.ndarray:
    """The bits that belong to the value; the others can hold an overlay (DICOM PS3.5, 8.1.1)."""
    if stored.dtype.kind not in "iu":
        return stored
    allocated = 8 * stored.dtype.itemsize
    bits = int(dataset.get("BitsStored") or allocated)
    high = int(dataset.get("HighBit", bits - 1))
    if not 1 <= bits <= high + 1 <= allocated:
        raise UserError(
            f"{Path(dataset.filename)} has BitsStored {bits} and HighBit {high} of {allocated} bits: expected at most "
            f"as many "
            "bits as are allocated; export it again"
        )
    if bits == allocated:
        return stored
    # Left, so that the value's sign is the type's; then right, which repeats the sign.
    return (stored << (allocated - 1 - high)) >> (allocated - bits)


def _scaled(folder: Path, plane: Plane) -> np.ndarray:
    """The values of a plane in the smallest of int16, int32 and int64 that holds them, or as floats."""
    stored = stored_values(folder, plane)
    if plane.slope is None and plane.intercept is None and "ModalityLUTSequence" in plane.dataset:
        try:
            return np.asarray(apply_modality_lut(stored, plane.dataset)).astype(np.int32)
        except Exception as error:  # pydicom raises many kinds
            raise UserError(
                f"{folder / plane.name} has a ModalityLUTSequence that cannot be used ({type(error).__name__}): "
                "expected a table of its values; export it again"
            ) from None
    slope, intercept = 1.0 if plane.slope is None else plane.slope, plane.intercept or 0.0
    if stored.dtype.kind == "f" or not (slope.is_integer() and intercept.is_integer()):
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

    def said(plane: Plane) -> str:
        if "ModalityLUTSequence" in plane.dataset and plane.slope is None and plane.intercept is None:
            return "a ModalityLUTSequence"
        if plane.slope is None and plane.intercept is None:
            return _NO_RESCALE
        return (
            f"slope and intercept {numbers((plane.slope if plane.slope is not None else 1.0, plane.intercept or 0.0))}"
        )

    silent = [plane for plane in planes if said(plane) == _NO_RESCALE]
    others = [plane for plane in planes if said(plane) != _NO_RESCALE]
    if silent and others:
        raise UserError(
            f"{folder}: {silent[0].name} has {_NO_RESCALE}, and {others[0].name} has {said(others[0])}: expected both "
            f"to say "
            "how values become HU; export the series again"
        )
    for plane in planes:
        if plane.slope == 0:
            raise UserError(f"{folder / plane.name} has the RescaleSlope 0: expected another number; export it again")


pydicom.config.logger.disabled = True  # what matters is said here
