"""DICOM files that are damaged, and files among slices that are none."""

import struct

import numpy as np
import pytest
from dicom_files import check_as_itk_sees_it, check_read, hu_of, pack, refused_scan, save_series, store, warned
from pydicom.uid import RLELossless

from autocontext_jax.images.finding import find_scans


def test_a_file_truncated_in_its_voxels(tmp_path):
    path = save_series(tmp_path) / "slice_003.dcm"
    path.write_bytes(path.read_bytes()[:-100])
    refused_scan(tmp_path, "slice_003.dcm", "truncated", "copy")


def test_a_large_file_truncated_in_its_voxels(tmp_path):
    path = save_series(tmp_path, np.zeros((4, 80, 90), np.int16)) / "slice_003.dcm"
    path.write_bytes(path.read_bytes()[:-100])
    refused_scan(tmp_path, "slice_003.dcm", "truncated", "copy")


@pytest.mark.parametrize("kept", [140, 300, 500, 900])
def test_a_file_truncated_in_its_header(tmp_path, kept):
    path = save_series(tmp_path) / "slice_007.dcm"  # the last one: no gap would tell
    assert path.stat().st_size > kept
    path.write_bytes(path.read_bytes()[:kept])
    refused_scan(tmp_path, "slice_007.dcm", "truncated", "copy")


def test_a_packed_file_that_is_truncated(tmp_path):
    path = pack(save_series(tmp_path), RLELossless) / "slice_003.dcm"
    path.write_bytes(path.read_bytes()[:-60])
    refused_scan(tmp_path, "slice_003.dcm", "damaged", "copy")


def test_a_damaged_header(tmp_path):
    path = save_series(tmp_path) / "slice_003.dcm"
    data = path.read_bytes()
    at = data.index(struct.pack("<HH2s", 0x0020, 0x0032, b"DS"))
    path.write_bytes(data[: at + 8] + b"x" * 6 + data[at + 14 :])
    refused_scan(tmp_path, "slice_003.dcm", "damaged", "copy")


def test_a_header_that_is_zero_throughout(tmp_path, caplog):
    path = save_series(tmp_path) / "slice_003.dcm"
    path.write_bytes(bytes(path.stat().st_size))
    refused_scan(tmp_path, "lacks 1 slice(s) between slice_002.dcm and slice_004.dcm")
    assert "slice_003.dcm (no DICOM file)" in warned(caplog)


def test_an_empty_file_among_slices_is_named(tmp_path, caplog):
    (save_series(tmp_path) / "slice_008.dcm").touch()
    check_read(tmp_path)
    assert "slice_008.dcm (no DICOM file)" in warned(caplog)


def test_a_text_file_among_slices_is_named(tmp_path, caplog):
    (save_series(tmp_path) / "notes.txt").write_text("seen by me", encoding="utf-8")
    check_read(tmp_path)
    assert "notes.txt (no DICOM file)" in warned(caplog)


def test_hidden_files_and_the_index_of_a_disk_are_no_slices(tmp_path, caplog):
    (save_series(tmp_path) / "._slice_000.dcm").write_bytes(b"\0\5\x16\7")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    check_read(tmp_path)
    assert warned(caplog) == ""


def test_more_bytes_than_voxels_are_named(tmp_path, caplog):
    save_series(tmp_path, None, lambda k, file: k == 3 and setattr(file, "PixelData", file.PixelData * 2))
    check_read(tmp_path)
    assert "1 slice(s), the first slice_003.dcm, hold more bytes than their Rows and Columns say" in warned(caplog)


def test_an_odd_number_of_bytes_is_made_even_without_a_word(tmp_path, caplog):
    hu = np.arange(8 * 9, dtype=np.int16).reshape(8, 3, 3)

    def change(k, file):
        file.RescaleIntercept = 0
        store(file, hu[k], np.uint8)
        file.PixelData += b"\0"

    check_as_itk_sees_it(check_read(save_series(tmp_path, hu, change), hu), tmp_path)
    assert warned(caplog) == ""


def test_more_voxels_than_bytes_are_refused(tmp_path):
    save_series(tmp_path, None, lambda k, file: setattr(file, "Rows", 4000))
    refused_scan(tmp_path, "slice_000.dcm", "240 of the 80000 bytes", "truncated")


def test_a_packing_that_nobody_knows_is_not_called_damaged(tmp_path):
    for path in save_series(tmp_path).iterdir():
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"))
    line = refused_scan(tmp_path, "slice_000.dcm is packed in the transfer syntax 1.2.840.10008.1.2.9", "export it")
    assert "damaged" not in line


def test_voxels_without_a_number_of_bits_are_refused(tmp_path):
    save_series(tmp_path, None, lambda k, file: k == 2 and delattr(file, "BitsAllocated"))
    refused_scan(tmp_path, "slice_002.dcm has no BitsAllocated")


def test_a_series_that_changes_between_listing_and_reading_is_seen(tmp_path):
    (source,) = find_scans(save_series(tmp_path / "scan"))
    save_series(tmp_path / "scan", hu_of() + 1)
    check_read(source.path, hu_of() + 1, series=source.series)
