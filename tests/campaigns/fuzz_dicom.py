"""Small valid DICOM series that inputs are made from, plain and compressed, single slices and many frames in a file."""

from pathlib import Path
from typing import Any

import gdcm  # type: ignore[import-untyped]
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless, RLELossless

from autocontext_jax.images import scans
from autocontext_jax.images.finding import find_scans

CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"
COUNT, ROWS, COLUMNS = 3, 12, 10

# How the voxels are kept: a transfer syntax, or what GDCM calls it.
SYNTAXES: dict[str, Any] = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "RLE": RLELossless,
    "JPEG-LS": JPEGLSLossless,
    "JPEG 2000": gdcm.TransferSyntax.JPEG2000Lossless,
    "JPEG": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
}


def write_series(folder: Path, syntax: str) -> None:
    """Three slices of CT, one a file."""
    for k in range(COUNT):
        dataset = _common(CT, f"1.2.3.{k}", _voxels()[k])
        dataset.InstanceNumber = k + 1
        dataset.ImagePositionPatient = [0, 0, 2.5 * k]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing = [0.8, 0.7]
        dataset.SliceThickness = 2.5
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1000 - k
        _save(dataset, folder / f"{k}.dcm", syntax)


def write_enhanced(folder: Path, syntax: str) -> None:
    """An enhanced CT of three frames, whose groups have no lengths, so that they can be changed inside."""
    dataset = _common(ENHANCED_CT, "1.2.3.9", _voxels())
    dataset.NumberOfFrames = COUNT
    shared = Dataset()
    shared.PixelMeasuresSequence = [_item(PixelSpacing=[0.8, 0.7], SliceThickness=2.5)]
    shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]
    dataset.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k in (1, 0, 2):
        frame = Dataset()
        frame.PlanePositionSequence = [_item(ImagePositionPatient=[0, 0, 2.5 * k])]
        frame.PixelValueTransformationSequence = [_item(RescaleSlope=1, RescaleIntercept=-1000 - k, RescaleType="HU")]
        frame.FrameContentSequence = [_item(StackID="1", InStackPositionNumber=k + 1)]
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = frames
    _without_lengths(dataset)
    _save(dataset, folder / "0.dcm", syntax)


def read_series(folder: Path) -> None:
    """All that is done with a folder: what lies in it, and its scans."""
    for source in find_scans(folder):
        scans.read_scan(source.path, series=source.series)


def read_frames(folder: Path) -> None:
    """The same of a file that is named."""
    scans.read_grid(folder / "0.dcm")
    scans.read_scan(folder / "0.dcm")


def _voxels() -> np.ndarray:
    """Smooth, as encoders for images do not always have room for noise."""
    return (900 + np.arange(COUNT * ROWS * COLUMNS).reshape(COUNT, ROWS, COLUMNS)).astype(np.uint16)


def _common(kind: str, identifier: str, voxels: np.ndarray) -> Dataset:
    dataset = _item(
        SpecificCharacterSet="ISO_IR 100", ImageType=["ORIGINAL", "PRIMARY", "AXIAL"], SOPClassUID=kind,
        SOPInstanceUID=identifier, Modality="CT", SeriesDescription="abdomen", PatientID="p",
        StudyInstanceUID="1.2", SeriesInstanceUID="1.2.3", SeriesNumber=4, FrameOfReferenceUID="1.2.4",
        SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", Rows=ROWS, Columns=COLUMNS, BitsAllocated=16,
        BitsStored=12, HighBit=11, PixelRepresentation=0,
    )  # fmt: skip
    dataset.PixelData = voxels.tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def _item(**values: Any) -> Dataset:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return item


def _without_lengths(dataset: Dataset) -> None:
    for element in dataset:
        if isinstance(element.value, Sequence):
            element.is_undefined_length = True
            for item in element.value:
                item.is_undefined_length_sequence_item = True
                _without_lengths(item)


def _save(dataset: Dataset, path: Path, syntax: str) -> None:
    kind = SYNTAXES[syntax]
    if isinstance(kind, int):  # pydicom decodes it and does not encode it
        dataset.save_as(path, enforce_file_format=True)
        reader, writer, change = gdcm.ImageReader(), gdcm.ImageWriter(), gdcm.ImageChangeTransferSyntax()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(kind))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return
    if kind in (RLELossless, JPEGLSLossless):
        dataset.compress(kind, generate_instance_uid=False)
    dataset.file_meta.TransferSyntaxUID = kind
    dataset.save_as(path, enforce_file_format=True, implicit_vr=kind == ImplicitVRLittleEndian, little_endian=True)


def elements(content: bytes) -> list[tuple[int, int, int, int]]:
    """Where the elements of a DICOM file are, those in sequences too, as far as they can be followed.

    Returns:
      For each the places of its tag and of its value, the value's length, and the bytes of the length's field.
    """
    place = 132 if content[128:132] == b"DICM" else 0
    explicit = pydicom.uid.ImplicitVRLittleEndian.encode() + b"\0" not in content[:400]
    found = []
    while place + 8 <= len(content):
        group, kind = content[place : place + 2], content[place + 4 : place + 6]
        if group == b"\xfe\xff":  # an item or an end
            place += 8
            continue
        if group == b"\2\0" or explicit:
            wide = kind in (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UN", b"UR", b"UT")
            value, field = (place + 12, 4) if wide else (place + 8, 2)
        else:
            value, field = place + 8, 4
        length = int.from_bytes(content[value - field : value], "little")
        nested = length == 0xFFFFFFFF or kind == b"SQ"
        end = len(content) if nested else min(value + length, len(content))
        found.append((place, value, 0 if nested else end - value, field))
        if content[place : place + 4] == b"\xe0\x7f\x10\0":  # the voxels are the last
            break
        place = value if nested else end
    return found
