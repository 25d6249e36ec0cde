"""DICOM files -> planes: one slice each, or one frame of a file that holds many, with the properties of its own."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from autocontext_jax.errors import UserError

# Objects that lie beside scans, and are none.
NO_SCANS = {
    "RTSTRUCT": "contours", "RTPLAN": "a plan", "RTDOSE": "a dose", "RTRECORD": "a treatment record", "SR": "a report",
    "SEG": "a segmentation", "KO": "a list of images", "PR": "a way to show images", "REG": "a registration",
    "DOC": "a document", "RTIMAGE": "a radiograph", "RWV": "a table of values",
}  # fmt: skip

_NAMES = (
    "SpecificCharacterSet", "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality", "SeriesDescription", "PatientID",
    "PatientName",
    "SeriesInstanceUID", "SeriesNumber", "FrameOfReferenceUID", "SliceThickness", "SpacingBetweenSlices", "Columns",
    "ImagePositionPatient", "ImageOrientationPatient", "SamplesPerPixel", "PhotometricInterpretation", "Rows",
    "PlanarConfiguration", "NumberOfFrames", "PixelSpacing", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "RescaleIntercept", "RescaleSlope", "ModalityLUTSequence", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "FloatPixelData",
    "DoubleFloatPixelData", "PixelData",
)  # fmt: skip
_TAGS: list[Any] = [Tag(name) for name in _NAMES]
_LARGE = 4096  # bytes of an element that is left in its file until it is used

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # what counts is checked below


@dataclasses.dataclass(frozen=True)
class Plane:
    """One slice as its file describes it; what a file lacks is None.

    Attributes:
      name: of the file, and of the frame where it holds several.
      dataset: of the file.
      frame: its number in the file, from 0.
      identity: SOP instance UID and frame.
      localizer: whether the file says that it is one.
      position: mm, patient (x, y, z) of the first voxel's centre.
      orientation: unit vectors along the rows, then along the columns.
      spacing: mm between rows, between columns.
      thickness: mm, of a single slice.
      slope, intercept: of its values.
      patient, frame_of_reference: identifiers; where there is none of the patient, `patient_name` stands for it.
    """

    name: str
    dataset: Any
    frame: int
    identity: tuple[str, int]
    localizer: bool
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    thickness: float | None
    slope: float | None
    intercept: float | None
    patient: str
    patient_name: str
    frame_of_reference: str

    @property
    def size(self) -> tuple[int, int]:
        """Voxels along the rows and along the columns."""
        return int(self.dataset.Columns), int(self.dataset.Rows)


def whole(dataset: Any, name: str, default: int) -> int:
    """An element that is a whole number, or the default where it is missing or no number."""
    try:
        value = dataset.get(name)
        return default if value is None or value == "" else int(value)
    except Exception:  # pydicom raises many kinds
        return default


def read_dataset(path: Path) -> Any:
    """The elements of a DICOM file that are needed; None if it is no DICOM file.

    Large elements stay in the file until they are used.

    Raises:
      UserError: it is damaged.
    """
    with path.open("rb") as file:
        head = file.read(132)
    marked = head[128:] == b"DICM"
    if not marked and not _begins_with_element(head):
        return None
    try:
        dataset = pydicom.dcmread(path, defer_size=_LARGE, force=not marked, specific_tags=_TAGS)
        if not marked and "SOPClassUID" not in dataset:
            return None
        storage, _, _ = _storage(dataset), str(dataset.get("Modality", "")), int(dataset.get("Rows") or 0)
        series = str(dataset.get("SeriesInstanceUID") or "")
        is_colour(dataset)  # decoded here, where what a damaged element raises is expected
    except Exception as error:  # pydicom raises many kinds
        raise _damaged(path, error) from None
    if not storage or (not series and is_image(dataset)):
        lacking = "SeriesInstanceUID" if storage else "SOPClassUID"
        raise UserError(f"{path} is truncated or damaged: it has no {lacking}; copy or export it again")
    return dataset


def _begins_with_element(head: bytes) -> bool:
    """Whether a file begins with an element of group 2 or 8: old files lack the mark."""
    group, number = int.from_bytes(head[:2], "little"), int.from_bytes(head[2:4], "little")
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    return group in (2, 8) and number < 0x20 and (explicit or int.from_bytes(head[4:8], "little") < 256)


def _storage(dataset: Any) -> str:
    """What kind of object a file holds."""
    return str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")


def is_colour(dataset: Any) -> bool:
    """Whether voxels are colours, or numbers of colours in a palette."""
    kind = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")
    return whole(dataset, "SamplesPerPixel", 1) != 1 or not kind.startswith("MONOCHROME")


def is_image(dataset: Any) -> bool:
    """Whether a file holds slices, or should."""
    if str(dataset.get("Modality", "")) in NO_SCANS:
        return False
    storage = _storage(dataset)
    # CT, MR, PET and their enhanced forms: without rows such a file is damaged, not something else.
    scanners = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.128")
    return "Rows" in dataset or any(storage == kind or storage.startswith(f"{kind}.") for kind in scanners)


def planes_of(path: Path, dataset: Any) -> list[Plane]:
    """The planes of a file, one for each frame.

    Raises:
      UserError: it has no voxels; an element that places them is damaged.
    """
    try:
        return _planes(path, dataset)
    except UserError:
        raise
    except Exception as error:  # a number that is none, an element of another kind: pydicom raises what it likes
        raise _damaged(path, error) from None


_COUNTS = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")


def _planes(path: Path, dataset: Any) -> list[Plane]:
    for name in _COUNTS:
        if (value := dataset.get(name)) is not None and not isinstance(value, int):
            raise UserError(f"{path} has the {name} {str(value)[:60]}: expected a whole number; export it again")
    pixels = [name for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if name in dataset]
    if not pixels or not dataset.get("Rows") or not dataset.get("Columns"):
        raise UserError(f"{path} is truncated: it has no voxels, though it is an image; copy or export it again")
    if is_colour(dataset):
        kind = f"{dataset.get('SamplesPerPixel', 1)} value(s) a voxel, {dataset.get('PhotometricInterpretation', '')}"
        raise UserError(f"{path} is a colour image ({kind}): expected one value a voxel; choose another series")
    count = int(dataset.get("NumberOfFrames") or 1)
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if groups is None:
        if count > 1:
            raise UserError(
                f"{path} holds {count} frames and does not say where they lie: expected an enhanced image, whose "
                "frames have positions; export one file for each slice"
            )
        return [_plane(path, dataset, 0, [dataset], path.name)]
    if len(groups) != count:
        raise UserError(f"{path} holds {count} frames and places {len(groups)}: it is damaged; export it again")
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    return [
        _plane(path, dataset, number, [*_items(group), *_items(shared), dataset], f"{path.name}, frame {number + 1}")
        for number, group in enumerate(groups)
    ]


_GROUPS = (
    "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence",
    "CTImageFrameTypeSequence", "MRImageFrameTypeSequence", "PETFrameTypeSequence",
)  # fmt: skip


def _items(group: Any) -> list[Any]:
    """What a functional group says of a frame's place and values."""
    return [group[name][0] for name in _GROUPS if name in group and len(group[name].value)]


def _plane(path: Path, dataset: Any, frame: int, sources: Sequence[Any], name: str) -> Plane:
    """A plane; each property is of the first source that has it: of the frame, else of all frames, else the file."""

    def find(key: str) -> Any:
        return next((value for source in sources if (value := source.get(key)) not in (None, "")), None)

    def floats(key: str, count: int) -> tuple[float, ...] | None:
        value = next((value for source in sources if (value := _decimals(source, key)) not in (None, "")), None)
        if value is None or (hasattr(value, "__len__") and not len(value)):
            return None
        found = tuple(float(number) for number in (value if hasattr(value, "__len__") else [value]))
        if len(found) != count or not np.isfinite(found).all():
            raise UserError(f"{path} has the {key} {value}: expected {count} number(s); export it again")
        return found

    def one(key: str) -> float | None:
        found = floats(key, 1)
        return None if found is None else found[0]

    thickness = next((mm for key in ("SliceThickness", "SpacingBetweenSlices") if (mm := one(key)) and mm > 0), None)
    image_type = find("FrameType") or dataset.get("ImageType") or []
    return Plane(
        name=name,
        dataset=dataset,
        frame=frame,
        identity=(str(dataset.get("SOPInstanceUID", "")), frame),
        localizer="LOCALIZER" in [str(word).upper() for word in image_type],
        position=floats("ImagePositionPatient", 3),
        orientation=floats("ImageOrientationPatient", 6),
        spacing=floats("PixelSpacing", 2),
        thickness=thickness,
        slope=one("RescaleSlope"),
        intercept=one("RescaleIntercept"),
        patient=str(dataset.get("PatientID") or ""),
        patient_name="" if dataset.get("PatientID") else str(dataset.get("PatientName") or ""),
        frame_of_reference=str(dataset.get("FrameOfReferenceUID") or ""),
    )


def _decimals(source: Any, key: str) -> Any:
    """The value of an element of decimals: straight from its text, as pydicom's own numbers take long to make."""
    element = source.get_item(_TAG_OF[key])
    if isinstance(element, RawDataElement) and element.value and element.VR in ("DS", None):
        return [
            float(number) for number in element.value.decode("ascii").strip(" \0").split("\\") if number.strip()
        ] or None
    return source.get(key)


_TAG_OF = {name: Tag(name) for name in _NAMES}


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return UserError(f"{path} is truncated or damaged ({reason}): copy or export it again")
