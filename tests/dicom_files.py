"""Small DICOM files for the tests, and what SimpleITK, through GDCM, sees in them."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from autocontext_jax.errors import UserError
from autocontext_jax.images import scans

SIZE = (8, 12, 10)  # slices, rows, columns
SPACING = (2.5, 0.8, 0.7)  # mm between slices, rows, columns
ORIGIN = (-20.0, 12.5, 101.25)  # mm, x, y, z of the first voxel
UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SERIES = "1.2.826.0.1.77.1"
CT = "1.2.840.10008.5.1.4.1.1.2"


def hu_of(size=SIZE):
    """HU that all differ, from -1000 on, so that no flip or exchange goes unseen."""
    return (np.arange(np.prod(size)).reshape(size) * 2 - 1000).astype(np.int16)


def file_of(storage=CT, instance="1", syntax=ExplicitVRLittleEndian):
    """A DICOM file in memory with identifiers and no image."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = storage
    meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.88.{instance}"
    meta.TransferSyntaxUID = syntax
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = storage, meta.MediaStorageSOPInstanceUID
    file.Modality, file.PatientID, file.StudyInstanceUID = "CT", "p1", "1.2.826.0.1.66"
    file.SeriesInstanceUID, file.FrameOfReferenceUID, file.SeriesNumber = SERIES, "1.2.826.0.1.55", 1
    return file


def slice_of(hu, k, instance=None):
    """One upright CT slice, number k from below: uint16, HU = stored - 1024."""
    file = file_of(instance=str(k + 1) if instance is None else instance)
    file.InstanceNumber, file.SliceThickness = k + 1, SPACING[0]
    file.ImageOrientationPatient, file.PixelSpacing = list(UPRIGHT), list(SPACING[1:])
    file.ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + SPACING[0] * k]
    file.RescaleSlope, file.RescaleIntercept = 1, -1024
    store(file, hu.astype(np.int32) + 1024, np.uint16)
    return file


def store(file, stored, kind, bits=None):
    """Puts stored values, of an integer type and so many bits, into a file."""
    kind = np.dtype(kind)
    file.Rows, file.Columns = stored.shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.PixelRepresentation = 8 * kind.itemsize, int(kind.kind == "i")
    file.BitsStored = bits or file.BitsAllocated
    file.HighBit = file.BitsStored - 1
    file.PixelData = np.ascontiguousarray(stored, kind.newbyteorder("<")).tobytes()
    file["PixelData"].VR = "OB" if kind.itemsize == 1 else "OW"


def save_series(folder, hu=None, change=None, name="slice_{:03d}.dcm", skip=()):
    """Writes HU [slices, rows, columns] as one file a slice; `change(k, file)` alters each before it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, plane in enumerate(hu_of() if hu is None else hu):
        file = slice_of(plane, k)
        if change is not None:
            change(k, file)
        if k not in skip:
            save(file, folder / (name if isinstance(name, str) else name[k]).format(k))
    return folder


def save(file, path):
    """Writes a DICOM file in the transfer syntax that it says; not in one that needs packing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, file, enforce_file_format=True)
    return path


def enhanced(hu, positions=None, rescale=None, storage=f"{CT}.1", instance="9"):
    """One file of all slices; frame f lies at z = positions[f] and has the (slope, intercept) rescale[f]."""
    file = file_of(storage, instance)
    positions = [ORIGIN[2] + SPACING[0] * k for k in range(len(hu))] if positions is None else positions
    file.NumberOfFrames, file.ImageType, file.InstanceNumber = len(hu), ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], 1
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(SPACING[1:]), SPACING[0]
    orientation.ImageOrientationPatient = list(UPRIGHT)
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    file.SharedFunctionalGroupsSequence = [shared]
    groups, stored = [], []
    for frame, (plane, z) in enumerate(zip(hu, positions, strict=True)):
        slope, intercept = rescale[frame] if rescale else (1, -1024)
        group, position, values = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [*ORIGIN[:2], z]
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = slope, intercept, "HU"
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [position], [values]
        groups.append(group)
        stored.append((plane.astype(np.int32) - intercept) // slope)
    file.PerFrameFunctionalGroupsSequence = groups
    store(file, np.stack(stored), np.uint16)
    return file


def beside(folder, name, modality, storage, **elements):
    """An object without slices: contours, a dose, a report."""
    file = file_of(storage, instance=f"7.{sum(name.encode())}")
    file.Modality, file.SeriesInstanceUID = modality, f"{SERIES}.{sum(modality.encode())}"
    for element, value in elements.items():
        setattr(file, element, value)
    return save(file, folder / name)


def pack(folder, syntax, **options):
    """Packs each file of a folder by an encoder of pydicom's."""
    for path in sorted(folder.iterdir()):
        file = pydicom.dcmread(path)
        file.compress(syntax, generate_instance_uid=False, **options)
        file.save_as(path, enforce_file_format=True)
    return folder


def check_as_itk_sees_it(scan, folder):
    """Each voxel of each file lies where SimpleITK places it, has the value that it reads, and no other is there."""
    count = 0
    for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        image = sitk.ReadImage(str(path), imageIO="GDCMImageIO")
        values = sitk.GetArrayFromImage(image)
        index = np.indices(values.shape).reshape(3, -1)[::-1]  # i, j, k
        matrix = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
        check_values_at(scan, (matrix @ index).T + image.GetOrigin(), values.ravel())
        count += values.size
    assert count == scan.voxels[0].size


def check_values_at(scan, points, values):
    """The voxels of a scan at points, mm (x, y, z), have these values."""
    matrix = np.array(scan.direction).reshape(3, 3)
    index = (points[:, ::-1] - np.array(scan.origin)) @ matrix / scan.spacing
    np.testing.assert_allclose(index, np.rint(index), atol=5e-3)
    np.testing.assert_array_equal(scan.voxels[0][tuple(np.rint(index).astype(int).T)], np.rint(values))


def check_read(folder, hu=None, **how):
    """Reads a series; its HU, spacing and place must be those of `save_series`, and SimpleITK must agree."""
    scan = scans.read_scan(folder, **how)
    np.testing.assert_array_equal(scan.voxels[0], hu_of() if hu is None else hu)
    np.testing.assert_allclose(scan.spacing, SPACING, atol=1e-6)
    np.testing.assert_allclose(scan.origin, ORIGIN[::-1], atol=1e-6)
    np.testing.assert_allclose(scan.direction, np.eye(3).ravel(), atol=1e-9)
    return scan


def refused(call, *parts):
    """The one line of the UserError that `call` ends with; it must hold each of `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert str(part) in line
    assert "  " not in line
    return line


def refused_scan(path, *parts, **how):
    """As `refused`, of reading a scan."""
    return refused(lambda: scans.read_scan(Path(path), **how), *parts)


def warned(caplog):
    """The warnings so far, as one text; they are forgotten."""
    text = "\n".join(record.getMessage() for record in caplog.records)
    caplog.clear()
    return text
