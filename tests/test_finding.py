"""What lies in a folder is a scan, or is named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import (
    SERIES,
    beside,
    check_read,
    enhanced,
    hu_of,
    pack,
    refused,
    save,
    save_series,
    slice_of,
    store,
    warned,
)
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from autocontext_jax.errors import UserError
from autocontext_jax.images import scans
from autocontext_jax.images.finding import find_scans


def series(folder, number, description, hu=None, uid=None, name="s{number}_{{:03d}}.dcm"):
    """A series with a number, a description and an identifier of its own, in file names of its own."""

    def change(k, file):
        file.SeriesInstanceUID = uid or f"{SERIES}.{number}"
        file.SeriesNumber, file.SeriesDescription = number, description
        file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = f"{file.SeriesInstanceUID}.{k + 1}"

    return save_series(folder, hu, change, name.format(number=number))


def names_of(found):
    return [str(source.name) for source in found]


def write_nifti(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(hu_of()), str(path))


def check_beside(folder, caplog, name, what):
    """The CT beside an object is read right, and the object is named with what it is."""
    (source,) = find_scans(folder)
    assert f"{name} ({what})" in warned(caplog)
    check_read(source.path, series=source.series)
    assert warned(caplog) == ""  # once is enough
    check_read(folder)
    assert f"{name} ({what})" in warned(caplog)


def test_contours_beside_a_ct_are_left_out_and_named(tmp_path, caplog):
    beside(save_series(tmp_path), "rs.dcm", "RTSTRUCT", "1.2.840.10008.5.1.4.1.1.481.3", StructureSetLabel="organs")
    check_beside(tmp_path, caplog, "rs.dcm", "RTSTRUCT, contours")


def test_contours_with_the_series_of_the_ct_are_left_out_and_named(tmp_path, caplog):
    beside(save_series(tmp_path), "rs.dcm", "RTSTRUCT", "1.2.840.10008.5.1.4.1.1.481.3", SeriesInstanceUID=SERIES)
    check_beside(tmp_path, caplog, "rs.dcm", "RTSTRUCT, contours")


def test_a_segmentation_beside_a_ct_is_left_out_and_named(tmp_path, caplog):
    file = enhanced(np.zeros((8, 12, 10), np.int16), storage="1.2.840.10008.5.1.4.1.1.66.4")
    file.Modality, file.SeriesInstanceUID = "SEG", f"{SERIES}.9"
    save(file, save_series(tmp_path) / "seg.dcm")
    check_beside(tmp_path, caplog, "seg.dcm", "SEG, a segmentation")


def test_a_dose_beside_a_ct_is_left_out_and_named(tmp_path, caplog):
    file = slice_of(np.zeros((12, 10)), 0, instance="77")
    file.Modality, file.NumberOfFrames, file.GridFrameOffsetVector = "RTDOSE", 2, [0, 2.5]
    file.PixelData, file.SeriesInstanceUID = file.PixelData * 2, f"{SERIES}.9"
    save(file, save_series(tmp_path) / "rd.dcm")
    check_beside(tmp_path, caplog, "rd.dcm", "RTDOSE, a dose")


def test_a_report_beside_a_ct_is_left_out_and_named(tmp_path, caplog):
    beside(save_series(tmp_path), "sr.dcm", "SR", "1.2.840.10008.5.1.4.1.1.88.67", ContentSequence=[Dataset()])
    check_beside(tmp_path, caplog, "sr.dcm", "SR, a report")


def test_a_plan_beside_a_ct_is_left_out_and_named(tmp_path, caplog):
    beside(save_series(tmp_path), "rp.dcm", "RTPLAN", "1.2.840.10008.5.1.4.1.1.481.5")
    check_beside(tmp_path, caplog, "rp.dcm", "RTPLAN, a plan")


def test_a_localizer_with_a_series_of_its_own_is_left_out_and_named(tmp_path, caplog):
    save_series(tmp_path)
    file = slice_of(np.zeros((30, 40)), 0, instance="99")
    file.ImageType, file.SeriesInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], f"{SERIES}.2"
    file.ImageOrientationPatient, file.SeriesNumber = [1, 0, 0, 0, 0, -1], 2
    save(file, tmp_path / "scout.dcm")
    (source,) = find_scans(tmp_path)
    check_read(source.path, series=source.series)
    assert "a localizer, first scout.dcm" in warned(caplog)


def test_a_few_images_beside_a_scan_are_left_out_and_named(tmp_path, caplog):
    save_series(tmp_path)
    series(tmp_path, 2, "bolus test", hu_of()[:2])
    (source,) = find_scans(tmp_path)
    check_read(source.path, series=source.series)
    assert "series 2 'bolus test' (2 image(s), few beside the 8 of another series, first s2_000.dcm" in warned(caplog)


def test_a_coloured_picture_of_a_dose_beside_a_scan_is_left_out_and_named(tmp_path, caplog):
    save_series(tmp_path)
    for k in range(5):
        file = slice_of(np.zeros((12, 10)), 0, instance=f"99.{k}")
        store(file, np.zeros((12, 30)), np.uint8)
        file.Columns, file.SamplesPerPixel, file.PlanarConfiguration = 10, 3, 0
        file.PhotometricInterpretation, file.SeriesInstanceUID = "RGB", f"{SERIES}.2"
        del file.ImagePositionPatient, file.ImageOrientationPatient
        save(file, tmp_path / f"shot{k}.dcm")
    (source,) = find_scans(tmp_path)
    check_read(source.path, series=source.series)
    assert "colour images, first shot0.dcm" in warned(caplog)


def test_radiographs_beside_a_scan_are_left_out_and_named(tmp_path, caplog):
    save_series(tmp_path)
    for k in range(5):
        file = slice_of(np.zeros((12, 10)), 0, instance=f"99.{k}")
        file.Modality, file.SeriesInstanceUID = "DX", f"{SERIES}.2"
        del file.ImagePositionPatient, file.ImageOrientationPatient
        save(file, tmp_path / f"chest{k}.dcm")
    (source,) = find_scans(tmp_path)
    check_read(source.path, series=source.series)
    assert "images without a place in the patient, first chest0.dcm" in warned(caplog)


def test_several_series_in_one_folder_are_several_scans(tmp_path):
    series(tmp_path, 2, "Abdomen nativ")
    series(tmp_path, 3, "Abdomen portal venous", hu_of() + 1)
    found = find_scans(tmp_path)
    assert names_of(found) == ["2_Abdomen_nativ", "3_Abdomen_portal_venous"]
    for source, hu in zip(found, (hu_of(), hu_of() + 1), strict=True):
        check_read(source.path, hu, series=source.series)


@pytest.mark.parametrize("series_", ["3", "Abdomen portal venous", f"{SERIES}.3"])
def test_one_of_several_series_is_chosen(tmp_path, series_):
    series(tmp_path, 2, "Abdomen nativ")
    series(tmp_path, 3, "Abdomen portal venous", hu_of() + 1)
    (source,) = find_scans(tmp_path, series=series_)
    check_read(source.path, hu_of() + 1, series=source.series)
    check_read(tmp_path, hu_of() + 1, series=series_)


def test_a_series_whose_description_is_all_digits_is_chosen(tmp_path):
    series(tmp_path, 2, "nativ")
    series(tmp_path, 3, "20240131", hu_of() + 1)
    check_read(tmp_path, hu_of() + 1, series="20240131")


def test_a_series_that_is_left_out_is_read_where_it_is_named(tmp_path, caplog):
    save_series(tmp_path)
    series(tmp_path, 2, "bolus test", hu_of()[:2])
    (source,) = find_scans(tmp_path, series="2")
    check_read(source.path, hu_of()[:2], series=source.series)
    assert "left out" not in warned(caplog)


def test_several_series_and_none_named_are_listed(tmp_path):
    series(tmp_path, 2, "nativ")
    series(tmp_path, 3, "venous")
    refused(lambda: scans.read_scan(tmp_path), "holds 2 DICOM series", "series 2 'nativ' (8 image(s)",
            "series 3 'venous'", "--series NUMBER", "series=")  # fmt: skip


def test_one_slice_of_a_series_by_its_path_is_named_as_such(tmp_path, caplog):
    path = series(tmp_path, 2, "nativ") / "s2_000.dcm"
    (source,) = find_scans(path)
    assert scans.read_scan(source.path, series=source.series).voxels[0].shape == (1, 12, 10)
    assert warned(caplog) == f"{path} is a single slice and read by itself: for its whole series give the folder"


def test_a_series_that_is_not_there(tmp_path):
    series(tmp_path, 2, "nativ")
    refused(lambda: scans.read_scan(tmp_path, series="7"), "holds no DICOM series '7'", "it has series 2 'nativ'")
    refused(lambda: find_scans(tmp_path, series="7"), "holds no DICOM series '7'", tmp_path.name)


def test_two_series_of_one_number_and_description(tmp_path):
    series(tmp_path, 2, "nativ", uid=f"{SERIES}.2.1", name="a{{:03d}}.dcm")
    series(tmp_path, 2, "nativ", hu_of() + 1, uid=f"{SERIES}.2.2", name="b{{:03d}}.dcm")
    assert names_of(find_scans(tmp_path)) == ["2_nativ_1", "2_nativ_2"]
    refused(lambda: scans.read_scan(tmp_path, series="2"), "holds 2 DICOM series '2'", "give its UID")
    check_read(tmp_path, hu_of() + 1, series=f"{SERIES}.2.2")


def test_descriptions_that_make_one_file_name(tmp_path):
    series(tmp_path, 2, "a/b", uid=f"{SERIES}.2.1", name="a{{:03d}}.dcm")
    series(tmp_path, 2, "a b", uid=f"{SERIES}.2.2", name="b{{:03d}}.dcm")
    names = names_of(find_scans(tmp_path))
    assert len(set(names)) == 2
    assert not any("/" in name for name in names)


def test_a_description_that_climbs_out_of_the_folder(tmp_path):
    series(tmp_path, 2, "nativ")
    series(tmp_path, 3, "../../etc/passwd")
    assert names_of(find_scans(tmp_path)) == ["2_nativ", "3_.._.._etc_passwd"]


def test_files_and_series_in_one_folder_and_below(tmp_path):
    write_nifti(tmp_path / "a.nii.gz")
    series(tmp_path, 1, "top")
    series(tmp_path / "one", 2, "one")
    write_nifti(tmp_path / "one" / "b.mha")
    series(tmp_path / "one" / "two", 3, "two")
    series(tmp_path / "one" / "two", 4, "late", hu_of() + 1)
    found = find_scans(tmp_path)
    assert sorted(names_of(found)) == ["a", "one", "one/b", "one/two/3_two", "one/two/4_late", tmp_path.name]
    by_name = {str(source.name): source for source in found}
    late = by_name["one/two/4_late"]
    check_read(late.path, hu_of() + 1, series=late.series)
    check_read(by_name["one"].path, series=by_name["one"].series)


def test_a_series_is_chosen_below_the_folder_too(tmp_path):
    write_nifti(tmp_path / "a.nii.gz")
    series(tmp_path / "one" / "two", 3, "two")
    series(tmp_path / "one" / "two", 4, "late", hu_of() + 1)
    (source,) = find_scans(tmp_path, series="late")
    check_read(source.path, hu_of() + 1, series=source.series)


def test_a_series_of_which_folders_hold_parts_is_named(tmp_path, caplog):
    save_series(tmp_path / "a", skip=range(4))
    save_series(tmp_path / "b", skip=range(4, 8))
    assert len(find_scans(tmp_path)) == 2
    assert f"the DICOM series {SERIES} lies in 2 folders" in warned(caplog)


def test_a_link_to_a_folder_above_is_not_followed(tmp_path, caplog):
    series(tmp_path, 1, "ct")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(find_scans(tmp_path)) == 1
    assert warned(caplog) == f"{tmp_path / 'loop'}: left out, as it is a link to a folder that it lies in"


def test_a_link_to_another_folder_is_followed(tmp_path):
    folder = series(tmp_path / "a", 1, "ct")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "link").symlink_to(folder)
    (source,) = find_scans(tmp_path / "b")
    check_read(source.path, series=source.series)


def test_a_damaged_series_does_not_hide_the_scans_beside_it(tmp_path):
    write_nifti(tmp_path / "a.nii.gz")
    series(tmp_path / "good", 1, "good")
    path = series(tmp_path / "bad", 2, "bad") / "s2_003.dcm"
    path.write_bytes(path.read_bytes()[:300])
    found = find_scans(tmp_path)
    assert names_of(found) == ["a", "bad", "good"]
    refused(lambda: scans.read_scan(found[1].path, series=found[1].series), "s2_003.dcm", "truncated or damaged")


def test_other_files_beside_scans_are_named_but_the_voxels_of_one(tmp_path, caplog):
    write_nifti(tmp_path / "a.mhd")
    assert (tmp_path / "a.raw").exists()
    (tmp_path / "read me.txt").write_text("hello", encoding="utf-8")
    assert names_of(find_scans(tmp_path)) == ["a"]
    assert warned(caplog) == f"{tmp_path}: left out, as no scans: read me.txt (no DICOM file)"


def test_files_of_other_formats_beside_slices_are_scans_of_their_own(tmp_path, caplog):
    series(tmp_path, 1, "ct")
    write_nifti(tmp_path / "mask.nii.gz")
    assert len(find_scans(tmp_path)) == 2
    assert warned(caplog) == ""


def test_packed_series_in_capital_letters(tmp_path):
    folder = tmp_path / "SCAN"
    pack(save_series(folder, name="IM{:03d}.DCM"), RLELossless)
    (source,) = find_scans(tmp_path)
    check_read(source.path, series=source.series)


def test_a_folder_of_contours_alone_holds_no_scan(tmp_path, caplog):
    beside(tmp_path, "rs.dcm", "RTSTRUCT", "1.2.840.10008.5.1.4.1.1.481.3")
    refused(lambda: find_scans(tmp_path), "holds no scan")
    assert "rs.dcm (RTSTRUCT, contours)" in warned(caplog)
    refused(lambda: find_scans(tmp_path / "rs.dcm"), "rs.dcm is not a scan")


def test_a_series_is_read_alike_with_and_without_what_lies_beside_it(tmp_path):
    folder = series(tmp_path / "a", 1, "ct")
    shutil.copytree(folder, tmp_path / "b")
    beside(tmp_path / "b", "rs.dcm", "RTSTRUCT", "1.2.840.10008.5.1.4.1.1.481.3")
    first, second = (scans.read_scan(tmp_path / name) for name in "ab")
    np.testing.assert_array_equal(first.voxels[0], second.voxels[0])
    assert first.grid == second.grid


def test_a_further_channel_is_named(tmp_path, caplog):
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b_0001.nii.gz", "c.nii.gz"):
        scans.write_scan(tmp_path / name, np.zeros((3, 4, 5), np.int16), (1.0, 1.0, 1.0))
    assert len(find_scans(tmp_path)) == 4
    assert len(caplog.messages) == 1
    assert "a_0001.nii.gz is taken for a scan of its own" in caplog.text


def test_the_mask_of_one_channel_is_named_without_its_number(tmp_path):
    for name in ("a_0000.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", "c_0000.nii.gz", "c.nii.gz", "d_0002.nii.gz"):
        write_nifti(tmp_path / name)
    found = {source.path.name: str(source.name) for source in find_scans(tmp_path)}
    assert found == {
        "a_0000.nii.gz": "a", "b_0000.nii.gz": "b_0000", "b_0001.nii.gz": "b_0001", "c.nii.gz": "c",
        "c_0000.nii.gz": "c_0000", "d_0002.nii.gz": "d_0002",
    }  # fmt: skip


def test_a_folder_that_cannot_be_read_does_not_hide_the_others(tmp_path, caplog, monkeypatch):
    write_nifti(tmp_path / "a.nii.gz")
    (tmp_path / "lost+found").mkdir()
    listed = Path.iterdir

    def iterdir(folder):
        if folder.name in ("lost+found", "closed"):
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert names_of(find_scans(tmp_path)) == ["a"]
    assert "lost+found: left out, as it cannot be read (Permission denied)" in caplog.text
    (tmp_path / "closed").mkdir()
    with pytest.raises(UserError, match=r"closed cannot be read \(Permission denied\)"):
        find_scans(tmp_path / "closed")


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    series(tmp_path / "chest", 1, "CT")
    monkeypatch.chdir(tmp_path / "chest")
    assert names_of(find_scans(".")) == ["chest"]
