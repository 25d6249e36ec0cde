"""DICOM in every encoding, and what readers trip over in valid files."""

import struct

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import (
    SPACING,
    check_as_itk_sees_it,
    check_read,
    hu_of,
    pack,
    save_series,
    store,
)
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from autocontext_jax.images import scans
from autocontext_jax.images.finding import find_scans


def test_implicit_vr(tmp_path):
    def change(k, file):
        file.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian

    check_as_itk_sees_it(check_read(save_series(tmp_path, None, change)), tmp_path)


def test_big_endian(tmp_path):
    def change(k, file):
        file.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        file.PixelData = np.frombuffer(file.PixelData, "<u2").astype(">u2").tobytes()

    check_as_itk_sees_it(check_read(save_series(tmp_path, None, change)), tmp_path)


def test_deflated(tmp_path):
    def change(k, file):
        file.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian

    check_as_itk_sees_it(check_read(save_series(tmp_path, None, change)), tmp_path)


def test_deflated_with_large_slices(tmp_path):
    hu = np.random.default_rng(0).integers(-1000, 1000, (4, 80, 90), np.int16)

    def change(k, file):
        file.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian

    check_as_itk_sees_it(check_read(save_series(tmp_path, hu, change), hu), tmp_path)


def test_no_preamble(tmp_path):
    save_series(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[132:])
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_neither_preamble_nor_file_meta(tmp_path):
    for k, plane in enumerate(hu_of()):
        save_series(tmp_path, plane[None], lambda _, file, k=k: moved(file, k), name=f"{k}.dcm")

    def rewrite(path):
        file = pydicom.dcmread(path)
        bare = Dataset(file)
        pydicom.dcmwrite(path, bare, implicit_vr=True, little_endian=True)

    for path in tmp_path.iterdir():
        rewrite(path)
        assert path.read_bytes()[:2] == b"\x08\0"
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def moved(file, k):
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.88.{k + 1}"
    x, y, z = file.ImagePositionPatient
    file.ImagePositionPatient = [x, y, z + SPACING[0] * k]


def test_no_file_extension(tmp_path):
    folder = save_series(tmp_path / "scan", name="IM{:05d}")
    (source,) = find_scans(folder)
    check_as_itk_sees_it(check_read(source.path, series=source.series), folder)


def test_a_series_of_one_file_by_its_path(tmp_path):
    save_series(tmp_path, hu_of()[:1], name="IM1")
    (source,) = find_scans(tmp_path / "IM1")
    check_read(source.path, hu_of()[:1], series=source.series)
    assert str(source.name) == "IM1"


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_rle(tmp_path, kind):
    hu = hu_of()
    save_series(tmp_path, hu, lambda k, file: signed(file, hu[k]) if kind == np.int16 else None)
    check_as_itk_sees_it(check_read(pack(tmp_path, RLELossless)), tmp_path)


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_jpeg_ls(tmp_path, kind):
    hu = hu_of()
    save_series(tmp_path, hu, lambda k, file: signed(file, hu[k]) if kind == np.int16 else None)
    check_as_itk_sees_it(check_read(pack(tmp_path, JPEGLSLossless)), tmp_path)


def test_12_bits_packed_by_jpeg_ls(tmp_path):
    hu = hu_of()
    save_series(tmp_path, hu, lambda k, file: signed(file, hu[k], bits=12))
    check_as_itk_sees_it(check_read(pack(tmp_path, JPEGLSLossless)), tmp_path)


def test_an_overlay_in_the_high_bits_of_packed_slices(tmp_path):
    hu = hu_of()

    def change(k, file):
        store(file, (hu[k].astype(np.int32) + 1024) | 0x5000, np.uint16, bits=12)

    check_read(pack(save_series(tmp_path, hu, change), RLELossless))


def signed(file, hu, bits=16):
    file.RescaleIntercept = 0
    store(file, hu, np.int16, bits)


def save_by_itk(folder, compressor, kind):
    """Slices packed by SimpleITK, which writes their values and its own rescale."""
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetUseCompression(True)
    writer.SetCompressor(compressor)
    for k, plane in enumerate(hu_of()):
        image = sitk.GetImageFromArray((plane[None].astype(np.int32) + (1024 if kind == np.uint16 else 0)).astype(kind))
        image.SetSpacing((*SPACING[:0:-1], SPACING[0]))
        position = (-20.0, 12.5, 101.25 + SPACING[0] * k)
        image.SetOrigin(position)
        for key, value in {
            "0008|0060": "CT", "0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0008|0018": f"1.2.826.0.1.88.{k + 1}",
            "0020|000d": "1.2.826.0.1.66", "0020|000e": "1.2.826.0.1.77.1", "0018|0050": str(SPACING[0]),
            "0028|1052": "-1024" if kind == np.uint16 else "0", "0028|1053": "1",
            "0020|0032": "\\".join(map(str, position)), "0020|0037": "1\\0\\0\\0\\1\\0",
        }.items():  # fmt: skip
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{k}.dcm"))
        writer.Execute(image)
    return folder


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
@pytest.mark.parametrize(
    ("compressor", "syntaxes"),
    [
        ("JPEG", ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")),
        ("JPEG2000", ("1.2.840.10008.1.2.4.90",)),
    ],
    ids=["jpeg_lossless", "jpeg_2000_lossless"],
)
def test_packed_by_itk(tmp_path, compressor, syntaxes, kind):
    save_by_itk(tmp_path, compressor, kind)
    (syntax,) = {str(pydicom.dcmread(path).file_meta.TransferSyntaxUID) for path in tmp_path.iterdir()}
    assert syntax in syntaxes
    scan = scans.read_scan(tmp_path)
    check_as_itk_sees_it(scan, tmp_path)
    np.testing.assert_array_equal(np.diff(scan.voxels[0].ravel().astype(int)), 2)


def test_packed_slices_beside_plain_ones(tmp_path):
    save_series(tmp_path / "plain", skip=range(0, 8, 2))
    packed = pack(save_series(tmp_path / "packed", skip=range(1, 8, 2)), RLELossless)
    for path in packed.iterdir():
        path.rename(tmp_path / "plain" / path.name)
    check_as_itk_sees_it(check_read(tmp_path / "plain"), tmp_path / "plain")


def implicit(group, element, value):
    return struct.pack("<HHI", group, element, len(value)) + value


def explicit(group, element, vr, value):
    return struct.pack("<HH2sH", group, element, vr, len(value)) + value


def in_item(inner):
    end = struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    return struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + inner + end


END_OF_SEQUENCE = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
CREATOR = explicit(0x2005, 0x0014, b"LO", b"Philips MR Imaging DD 005 ")


def before_pixels(folder, what):
    """Splices bytes into each file before its voxels."""
    for path in folder.iterdir():
        data = path.read_bytes()
        at = data.index(struct.pack("<HH2s", 0x7FE0, 0x0010, b"OW"))
        path.write_bytes(data[:at] + what + data[at:])
    return folder


def test_private_sequences_of_unknown_vr_and_undefined_length(tmp_path):
    item = in_item(implicit(0x0008, 0x1150, b"1.2.840.10008.5.1.4.1.1.2\0") + implicit(0x2005, 0x1410, b"\0\0\xc0\x3f"))
    blob = struct.pack("<HH2sHI", 0x2005, 0x140F, b"UN", 0, 0xFFFFFFFF) + 2 * item + END_OF_SEQUENCE
    before_pixels(save_series(tmp_path), CREATOR + blob)
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_private_sequences_of_unknown_vr_and_defined_length(tmp_path):
    items = 2 * in_item(implicit(0x0008, 0x1150, b"1.2.840.10008.5.1.4.1.1.2\0"))
    blob = struct.pack("<HH2sHI", 0x2005, 0x140F, b"UN", 0, len(items)) + items
    before_pixels(save_series(tmp_path), CREATOR + blob)
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_a_private_element_larger_than_the_slice(tmp_path):
    blob = struct.pack("<HH2sHI", 0x2005, 0x1401, b"OB", 0, 100_000) + bytes(100_000)
    before_pixels(save_series(tmp_path), CREATOR + blob)
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_an_icon_image_before_the_voxels(tmp_path):
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 64) + b"\7" * 64
    inner = explicit(0x0028, 0x0010, b"US", b"\x08\0") + explicit(0x0028, 0x0011, b"US", b"\x08\0") + pixels
    icon = struct.pack("<HH2sHI", 0x0088, 0x0200, b"SQ", 0, 0xFFFFFFFF) + in_item(inner) + END_OF_SEQUENCE
    before_pixels(save_series(tmp_path), icon)
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_bytes_behind_the_voxels(tmp_path):
    def change(k, file):
        file.DataSetTrailingPadding = bytes(1000)

    check_as_itk_sees_it(check_read(save_series(tmp_path, None, change)), tmp_path)


def test_names_in_another_alphabet(tmp_path):
    def change(k, file):
        file.SpecificCharacterSet, file.SeriesDescription = "ISO_IR 192", "Thorax nativ, Übersicht, 胸部"

    (source,) = find_scans(save_series(tmp_path / "scan", None, change))
    check_read(source.path, series="Thorax nativ, Übersicht, 胸部")


def test_an_unknown_alphabet_is_no_damage(tmp_path):
    def change(k, file):
        file.SeriesDescription = "Thorax"

    for path in save_series(tmp_path, None, change).iterdir():
        file = pydicom.dcmread(path)
        file.add_new(0x00080005, "CS", "ISO_IR 999")
        data = path.read_bytes()
        at = data.index(struct.pack("<HH2s", 0x0008, 0x0016, b"UI"))
        path.write_bytes(data[:at] + explicit(0x0008, 0x0005, b"CS", b"ISO_IR 999") + data[at:])
    check_read(tmp_path)


def test_a_series_number_that_is_no_number_is_no_damage(tmp_path):
    for path in save_series(tmp_path, None, lambda k, file: setattr(file, "SeriesNumber", 1234)).iterdir():
        path.write_bytes(path.read_bytes().replace(b"1234", b"12a4"))
    check_read(tmp_path)
