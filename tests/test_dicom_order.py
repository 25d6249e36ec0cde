"""Slices are placed by what each says of itself; those that contradict each other are refused."""

import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import (
    ORIGIN,
    SERIES,
    SPACING,
    check_as_itk_sees_it,
    check_read,
    hu_of,
    refused,
    refused_scan,
    save,
    save_series,
    slice_of,
    store,
    warned,
)

from autocontext_jax.images import scans
from autocontext_jax.images.finding import find_scans


def only(k, **elements):
    """A change to slice k alone; None takes an element away."""

    def change(at, file):
        for name, value in elements.items() if at == k else ():
            if value is None:
                delattr(file, name)
            else:
                setattr(file, name, value)

    return change


def all_of(**elements):
    return lambda k, file: only(k, **elements)(k, file)


def place(normal, orientation, origin=ORIGIN, step=SPACING[0]):
    """A change that lays slice k at origin + k step normal."""

    def change(k, file):
        file.ImageOrientationPatient = [round(float(value), 9) for value in orientation]
        file.ImagePositionPatient = [round(float(value), 6) for value in np.array(origin) + step * k * np.array(normal)]

    return change


def test_names_against_the_order(tmp_path):
    names = [f"IM{at:04d}" for at in np.random.default_rng(0).permutation(8)]
    save_series(tmp_path, name=names)
    scan = check_read(tmp_path)
    check_as_itk_sees_it(scan, tmp_path)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path), SERIES)
    np.testing.assert_array_equal(scan.voxels[0], sitk.GetArrayFromImage(sitk.ReadImage(names)))


def test_instance_numbers_against_the_order(tmp_path):
    save_series(tmp_path, None, lambda k, file: setattr(file, "InstanceNumber", 8 - k))
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_descending_order(tmp_path):
    top = (*ORIGIN[:2], ORIGIN[2] + 7 * SPACING[0])
    save_series(tmp_path, hu_of()[::-1], place((0, 0, -1), (1, 0, 0, 0, 1, 0), top))
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_positions_below_zero(tmp_path):
    save_series(tmp_path, None, place((0, 0, 1), (1, 0, 0, 0, 1, 0), (-20.0, 12.5, -1000.25)))
    check_as_itk_sees_it(scans.read_scan(tmp_path), tmp_path)


def test_a_patient_who_lies_face_down_with_the_feet_first(tmp_path):
    save_series(tmp_path, None, place((0, 0, 1), (-1, 0, 0, 0, -1, 0)))
    scan = scans.read_scan(tmp_path)
    check_as_itk_sees_it(scan, tmp_path)
    np.testing.assert_array_equal(scan.voxels[0], hu_of()[:, ::-1, ::-1])


def test_mirrored_slices(tmp_path):
    save_series(tmp_path, None, place((0, 0, -1), (-1, 0, 0, 0, 1, 0)))
    check_as_itk_sees_it(scans.read_scan(tmp_path), tmp_path)


def test_coronal_slices(tmp_path):
    save_series(tmp_path, None, place((0, 1, 0), (1, 0, 0, 0, 0, -1)))
    scan = scans.read_scan(tmp_path)
    check_as_itk_sees_it(scan, tmp_path)
    np.testing.assert_allclose(scan.spacing, (SPACING[1], SPACING[0], SPACING[2]))


def test_oblique_orientation(tmp_path):
    rotation = np.linalg.qr(np.array([[1, 0.1, 0.2], [-0.15, 1, 0.1], [-0.1, -0.2, 1]]))[0]
    rotation *= np.sign(np.diag(rotation))
    save_series(tmp_path, None, place(rotation[:, 2], [*rotation[:, 0], *rotation[:, 1]]))
    scan = scans.read_scan(tmp_path)
    check_as_itk_sees_it(scan, tmp_path)
    np.testing.assert_allclose(np.reshape(scan.direction, (3, 3)), rotation[::-1, ::-1], atol=1e-6)
    np.testing.assert_allclose(scan.spacing, SPACING, atol=1e-6)


def test_positions_count_not_the_thickness_nor_the_stated_distance(tmp_path):
    save_series(tmp_path, None, all_of(SliceThickness=5.0, SpacingBetweenSlices=1.0, SliceLocation=3.0))
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_rows_and_columns_of_different_spacing_are_not_exchanged(tmp_path):
    save_series(tmp_path, None, all_of(PixelSpacing=[1.5, 0.5]))
    scan = scans.read_scan(tmp_path)
    check_as_itk_sees_it(scan, tmp_path)
    assert scan.spacing == (2.5, 1.5, 0.5)


def test_a_missing_pixel_spacing_is_refused(tmp_path):
    save_series(tmp_path, None, all_of(PixelSpacing=None))
    refused_scan(tmp_path, "slice_000.dcm has no PixelSpacing")


def test_a_pixel_spacing_missing_in_one_slice_is_refused(tmp_path):
    save_series(tmp_path, None, only(4, PixelSpacing=None))
    refused_scan(tmp_path, "slice_004.dcm has no PixelSpacing")


def test_a_pixel_spacing_of_0_is_refused(tmp_path):
    save_series(tmp_path, None, all_of(PixelSpacing=[0, 0.7]))
    refused_scan(tmp_path, "PixelSpacing (0", "expected mm above 0")


def test_a_pixel_spacing_that_changes_is_refused(tmp_path):
    save_series(tmp_path, None, only(5, PixelSpacing=[1.6, 1.4]))
    refused_scan(tmp_path, "slice_005.dcm has the PixelSpacing (1.6, 1.4)", "slice_000.dcm has (0.8, 0.7)")


def test_a_pixel_spacing_that_is_rounded_is_no_change(tmp_path):
    save_series(tmp_path, None, only(5, PixelSpacing=[0.80001, 0.69999]))
    check_read(tmp_path)


def test_rows_and_columns_that_change_are_refused(tmp_path):
    save_series(tmp_path, None, lambda k, file: k == 6 and store(file, np.zeros((10, 12)), np.uint16))
    refused_scan(tmp_path, "slice_006.dcm has the Rows × Columns 10 × 12", "slice_000.dcm has 12 × 10")


def test_a_missing_position_is_refused(tmp_path):
    save_series(tmp_path, None, only(3, ImagePositionPatient=None))
    refused_scan(tmp_path, "slice_003.dcm has no ImagePositionPatient")


def test_a_missing_orientation_is_refused(tmp_path):
    save_series(tmp_path, None, only(7, ImageOrientationPatient=None))
    refused_scan(tmp_path, "slice_007.dcm has no ImageOrientationPatient")


@pytest.mark.parametrize("orientation", [[-1.0, 0.0, 0.0, 0.0, -1.0, 0.0], [0.995, 0.0998, 0.0, -0.0998, 0.995, 0.0]])
def test_mixed_orientations_are_refused(tmp_path, orientation):
    save_series(tmp_path, None, only(7, ImageOrientationPatient=orientation))
    refused_scan(tmp_path, "slice_007.dcm has the orientation (-1" if orientation[0] < 0 else "(0.995, 0.0998",
                 "slice_000.dcm has (1, 0, 0, 0, 1, 0)")  # fmt: skip


def test_axes_that_are_not_at_right_angles_are_refused(tmp_path):
    save_series(tmp_path, None, all_of(ImageOrientationPatient=[1.0, 0.0, 0.0, 0.3, 0.95, 0.0]))
    refused_scan(tmp_path, "ImageOrientationPatient (1, 0, 0, 0.3, 0.95, 0)", "at right angles")


def test_two_patients_are_refused(tmp_path):
    save_series(tmp_path, None, only(2, PatientID="p2"))
    refused_scan(tmp_path, "slice_002.dcm has the PatientID p2", "slice_000.dcm has p1")


def test_two_patients_without_identifiers_are_refused(tmp_path):
    def name(k, file):
        file.PatientID, file.PatientName = "", f"name {k // 3}"

    save_series(tmp_path, None, name)
    refused_scan(tmp_path, "has the PatientName name 1", "slice_000.dcm has name 0")


def test_two_frames_of_reference_are_refused(tmp_path):
    save_series(tmp_path, None, only(0, FrameOfReferenceUID="1.2.826.0.1.55.2"))
    refused_scan(tmp_path, "slice_000.dcm has the FrameOfReferenceUID 1.2.826.0.1.55.2",
                 "slice_001.dcm has 1.2.826.0.1.55")  # fmt: skip


def test_two_modalities_are_refused(tmp_path):
    save_series(tmp_path, None, only(1, Modality="PT"))
    refused_scan(tmp_path, "slice_001.dcm has the Modality PT", "slice_000.dcm has CT")


def test_two_series_of_one_identifier_are_refused(tmp_path):
    save_series(tmp_path, None, lambda k, file: setattr(file, "SeriesNumber", 1 + k % 2))
    refused_scan(tmp_path, "slice_001.dcm has the SeriesNumber 2", "slice_000.dcm has 1")


def test_a_single_slice_takes_its_thickness(tmp_path):
    save_series(tmp_path, hu_of()[:1], all_of(SliceThickness=4.0))
    scan = scans.read_scan(tmp_path)
    assert scan.spacing == (4.0, 0.8, 0.7)
    check_as_itk_sees_it(scan, tmp_path)


@pytest.mark.parametrize("thickness", [None, 0.0])
def test_a_single_slice_without_thickness_is_refused(tmp_path, thickness):
    save_series(tmp_path, hu_of()[:1], all_of(SliceThickness=thickness))
    refused_scan(tmp_path, "slice_000.dcm is a single slice without SliceThickness", "expected it above 0")


def test_an_exact_copy_of_a_slice_is_left_out_and_named(tmp_path, caplog):
    save_series(tmp_path)
    shutil.copy(tmp_path / "slice_004.dcm", tmp_path / "slice_004 (1).dcm")
    check_read(tmp_path)
    assert "left out as exact copies of other files: slice_004.dcm" in warned(caplog)  # the later by name


def test_a_copy_with_another_rescale_is_refused(tmp_path):
    file = slice_of(hu_of()[4], 4)
    file.RescaleIntercept = 0
    save(file, save_series(tmp_path) / "copy.dcm")
    refused_scan(tmp_path, "copy.dcm and slice_004.dcm have the same SOPInstanceUID and differ")


def test_a_copy_with_other_values_is_refused(tmp_path):
    save(slice_of(hu_of()[5], 4), save_series(tmp_path) / "copy.dcm")
    refused_scan(tmp_path, "copy.dcm and slice_004.dcm have the same SOPInstanceUID and differ")


def test_a_double_slice_is_refused_with_both_names(tmp_path):
    save(slice_of(hu_of()[5], 5, instance="99"), save_series(tmp_path) / "again.dcm")
    refused_scan(tmp_path, "again.dcm and slice_005.dcm lie at the same position, (-20, 12.5, 113.75) mm",
                 "a double slice", "move one away")  # fmt: skip


def test_two_phases_in_one_series_are_told_apart_from_double_slices(tmp_path):
    save_series(tmp_path)
    for k, plane in enumerate(hu_of()):
        save(slice_of(plane, k, instance=f"2.{k}"), tmp_path / f"venous_{k}.dcm")
    line = refused_scan(tmp_path, "holds 2 images at each position", "slice_000.dcm and venous_0.dcm", "phases")
    assert "double" not in line


def test_two_phases_with_a_frame_of_reference_each_are_phases(tmp_path):
    save_series(tmp_path)
    for k, plane in enumerate(hu_of()):
        file = slice_of(plane, k, instance=f"2.{k}")
        file.FrameOfReferenceUID = "1.2.826.0.1.55.2"
        save(file, tmp_path / f"venous_{k}.dcm")
    refused_scan(tmp_path, "holds 2 images at each position", "slice_000.dcm and venous_0.dcm", "phases")


def test_slices_side_by_side_are_no_double_slice(tmp_path):
    save_series(tmp_path, None, place((1, 0, 0), (1, 0, 0, 0, 1, 0)))
    line = refused_scan(tmp_path, "slice_000.dcm and slice_001.dcm lie in one plane", "(-17.5, 12.5, 101.25)")
    assert "double" not in line


def test_a_missing_slice_is_named(tmp_path):
    save_series(tmp_path, skip=[4])
    refused_scan(tmp_path, "lacks 1 slice(s) between slice_003.dcm and slice_005.dcm, which are 5 mm apart",
                 "expected 2.5 mm")  # fmt: skip


def test_several_missing_slices_are_counted(tmp_path):
    save_series(tmp_path, skip=[4, 5, 6])
    refused_scan(tmp_path, "lacks 3 slice(s) between slice_003.dcm and slice_007.dcm, which are 10 mm apart")


def test_missing_slices_at_both_ends_are_named(tmp_path):
    save_series(tmp_path, skip=[1, 6])
    refused_scan(tmp_path, "lacks 2 slice(s), the first between slice_000.dcm and slice_002.dcm", "expected 2.5 mm")


def test_missing_slices_all_over_are_named(tmp_path):
    hu = np.zeros((40, 4, 4), np.int16)
    save_series(tmp_path, hu, skip=[3, 6, 10, 13, 17, 21, 25, 28, 31, 35])
    refused_scan(tmp_path, "lacks 10 slice(s), the first between slice_002.dcm and slice_004.dcm", "expected 2.5 mm")


def test_a_localizer_of_the_same_series_is_left_out_and_named(tmp_path, caplog):
    file = slice_of(hu_of()[5], 5, instance="99")
    file.ImageOrientationPatient, file.ImageType = [1, 0, 0, 0, 0, -1], ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    save(file, save_series(tmp_path) / "scout.dcm")
    check_read(tmp_path)
    assert "left out as localizers" in (text := warned(caplog))
    assert text.endswith("scout.dcm")


def test_a_localizer_that_does_not_say_so_is_left_out_and_named(tmp_path, caplog):
    file = slice_of(np.zeros((30, 40)), 5, instance="99")
    file.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    save(file, save_series(tmp_path) / "scout.dcm")
    check_read(tmp_path)
    assert "scout.dcm" in warned(caplog)


def test_a_localizer_without_a_place_is_left_out_and_named(tmp_path, caplog):
    file = slice_of(np.zeros((30, 40)), 5, instance="99")
    file.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    del file.ImagePositionPatient, file.ImageOrientationPatient, file.PixelSpacing
    save(file, save_series(tmp_path) / "scout.dcm")
    check_read(tmp_path)
    assert "scout.dcm" in warned(caplog)


def test_nothing_but_localizers(tmp_path):
    save_series(tmp_path, hu_of()[:2], all_of(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    line = refused_scan(tmp_path, "no DICOM series that is a scan by itself", "a localizer", "--series")
    assert " 0 DICOM" not in line
    refused(lambda: find_scans(tmp_path), "holds no scan")
    check_read(tmp_path, hu_of()[:2], series="1")


def test_nothing_but_localizers_without_a_place(tmp_path):
    save_series(tmp_path, hu_of()[:1], lambda k, file: delattr(file, "ImagePositionPatient")
                or setattr(file, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]))  # fmt: skip
    refused_scan(tmp_path, "slice_000.dcm has no ImagePositionPatient", series=SERIES)
