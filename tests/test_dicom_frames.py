"""Files of many frames: each frame is a slice with a place and a rescale of its own."""

import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import (
    CT,
    ORIGIN,
    SERIES,
    SPACING,
    UPRIGHT,
    check_as_itk_sees_it,
    check_read,
    enhanced,
    file_of,
    hu_of,
    pack,
    refused_scan,
    save,
    store,
    warned,
)
from pydicom.uid import JPEGLSLossless, RLELossless

from autocontext_jax.images import scans
from autocontext_jax.images.finding import find_scans

HEIGHTS = [ORIGIN[2] + SPACING[0] * k for k in range(8)]
RANDOM = np.random.default_rng(0).permutation(8)


def test_frames_in_ascending_order(tmp_path):
    save(enhanced(hu_of()), tmp_path / "volume.dcm")
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_frames_in_descending_order(tmp_path):
    save(enhanced(hu_of()[::-1], HEIGHTS[::-1]), tmp_path / "volume.dcm")
    scan = check_read(tmp_path)
    image = sitk.ReadImage(str(tmp_path / "volume.dcm"))  # GDCM takes the direction from the first two frames
    assert image.GetOrigin()[2] == HEIGHTS[-1]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image)[::-1], scan.voxels[0])


def test_frames_in_random_order(tmp_path):
    save(enhanced(hu_of()[RANDOM], [HEIGHTS[k] for k in RANDOM]), tmp_path / "volume.dcm")
    scan = check_read(tmp_path)
    frames = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "volume.dcm")))  # in the order of the file
    np.testing.assert_array_equal(frames, scan.voxels[0][RANDOM])


def test_the_file_itself_is_a_scan(tmp_path):
    save(enhanced(hu_of()), tmp_path / "volume.dcm")
    (source,) = find_scans(tmp_path / "volume.dcm")
    assert str(source.name) == "volume"
    check_read(source.path, series=source.series)


def test_a_rescale_of_each_frame(tmp_path):
    rescale = [(1, -1024) if k < 4 else (2, -3000) for k in range(8)]
    save(enhanced(hu_of(), rescale=rescale), tmp_path / "volume.dcm")
    check_read(tmp_path)


def test_a_rescale_of_each_frame_in_random_order(tmp_path):
    rescale = [(1, -1024 - 10 * k) for k in range(8)]
    save(enhanced(hu_of()[RANDOM], [HEIGHTS[k] for k in RANDOM], rescale), tmp_path / "volume.dcm")
    check_read(tmp_path)


def test_one_frame_without_rescale_is_refused(tmp_path):
    file = enhanced(hu_of())
    del file.PerFrameFunctionalGroupsSequence[3].PixelValueTransformationSequence
    save(file, tmp_path / "volume.dcm")
    refused_scan(tmp_path, "volume.dcm, frame 4 has no RescaleSlope", "RescaleIntercept -1024")


def test_a_rescale_of_all_frames_in_the_file_itself_counts(tmp_path):
    file = enhanced(hu_of())
    for group in file.PerFrameFunctionalGroupsSequence:
        del group.PixelValueTransformationSequence
    file.RescaleSlope, file.RescaleIntercept = 1, -1024
    save(file, tmp_path / "volume.dcm")
    check_read(tmp_path)


def test_spacing_and_orientation_of_each_frame(tmp_path):
    file = enhanced(hu_of())
    shared = file.SharedFunctionalGroupsSequence[0]
    for group in file.PerFrameFunctionalGroupsSequence:
        group.PixelMeasuresSequence = shared.PixelMeasuresSequence
        group.PlaneOrientationSequence = shared.PlaneOrientationSequence
    del file.SharedFunctionalGroupsSequence
    save(file, tmp_path / "volume.dcm")
    check_read(tmp_path)


def test_a_spacing_that_changes_by_frame_is_refused(tmp_path):
    other = enhanced(hu_of()).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    other[0].PixelSpacing = [1.6, 1.4]
    file = enhanced(hu_of())
    file.PerFrameFunctionalGroupsSequence[6].PixelMeasuresSequence = other
    save(file, tmp_path / "volume.dcm")
    refused_scan(tmp_path, "volume.dcm, frame 7 has the PixelSpacing (1.6, 1.4)", "frame 1 has (0.8, 0.7)")


def test_a_gap_between_frames_is_refused(tmp_path):
    keep = [0, 1, 2, 5, 6, 7]
    save(enhanced(hu_of()[keep], [HEIGHTS[k] for k in keep]), tmp_path / "volume.dcm")
    refused_scan(tmp_path, "lacks 2 slice(s) between volume.dcm, frame 3 and volume.dcm, frame 4")


def test_two_frames_at_one_position_are_refused(tmp_path):
    save(enhanced(hu_of(), [*HEIGHTS[:7], HEIGHTS[2]]), tmp_path / "volume.dcm")
    refused_scan(tmp_path, "volume.dcm, frame 3 and volume.dcm, frame 8 lie at the same position", "double slice")


def test_legacy_converted(tmp_path):
    save(enhanced(hu_of()[::-1], HEIGHTS[::-1], storage=f"{CT}.2"), tmp_path / "volume.dcm")
    check_read(tmp_path)


def test_one_series_of_two_files_of_many_frames(tmp_path):
    save(enhanced(hu_of()[4:], HEIGHTS[4:], instance="9"), tmp_path / "a.dcm")
    save(enhanced(hu_of()[:4], HEIGHTS[:4], instance="10"), tmp_path / "b.dcm")
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_a_copy_of_a_file_of_many_frames_is_left_out_and_named(tmp_path, caplog):
    path = save(enhanced(hu_of()), tmp_path / "volume.dcm")
    shutil.copy(path, tmp_path / "z.dcm")
    check_read(tmp_path)
    assert "left out as exact copies of other files: z.dcm, frame 1, z.dcm, frame 2" in warned(caplog)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless], ids=["rle", "jpeg_ls"])
def test_packed_frames_in_random_order(tmp_path, syntax):
    save(enhanced(hu_of()[RANDOM], [HEIGHTS[k] for k in RANDOM]), tmp_path / "volume.dcm")
    check_read(pack(tmp_path, syntax))


def flat(count=8):
    """A file of many frames with one place for all, as older machines and screenshots have it."""
    file = file_of()
    file.NumberOfFrames, file.ImagePositionPatient, file.PixelSpacing = count, list(ORIGIN), list(SPACING[1:])
    file.ImageOrientationPatient, file.SpacingBetweenSlices, file.SliceThickness = list(UPRIGHT), 2.5, 2.5
    file.RescaleSlope, file.RescaleIntercept = 1, -1024
    store(file, hu_of().astype(np.int32) + 1024, np.uint16)
    return file


def test_frames_without_positions_are_refused(tmp_path):
    save(flat(), tmp_path / "volume.dcm")
    refused_scan(tmp_path, "volume.dcm holds 8 frames and does not say where they lie",
                 "export one file for each slice")  # fmt: skip


def test_frames_of_which_one_has_no_position_are_refused(tmp_path):
    file = enhanced(hu_of())
    del file.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence
    save(file, tmp_path / "volume.dcm")
    refused_scan(tmp_path, "volume.dcm, frame 3 has no ImagePositionPatient")


def test_fewer_places_than_frames_are_refused(tmp_path):
    file = enhanced(hu_of())
    del file.PerFrameFunctionalGroupsSequence[7]
    save(file, tmp_path / "volume.dcm")
    refused_scan(tmp_path, "volume.dcm holds 8 frames and places 7")


def test_fewer_voxels_than_frames_are_refused(tmp_path):
    file = enhanced(hu_of())
    file.PixelData = file.PixelData[: 7 * 240]
    save(file, tmp_path / "volume.dcm")
    refused_scan(tmp_path, "volume.dcm, frame 8 holds 0 of the 240 bytes of its voxels")


def test_a_file_of_many_frames_without_positions_beside_a_scan_does_not_hide_it(tmp_path):
    save(enhanced(hu_of()), tmp_path / "volume.dcm")
    other = flat()
    other.SeriesInstanceUID, other.SeriesNumber = f"{SERIES}.2", 2
    save(other, tmp_path / "other.dcm")
    sources = find_scans(tmp_path)
    assert [source.series for source in sources] == [SERIES, f"{SERIES}.2"]
    check_read(tmp_path, series=SERIES)
    refused_scan(tmp_path, "other.dcm holds 8 frames", series=f"{SERIES}.2")


def test_one_frame_of_an_enhanced_file(tmp_path):
    save(enhanced(hu_of()[:1]), tmp_path / "volume.dcm")
    scan = scans.read_scan(tmp_path)
    np.testing.assert_array_equal(scan.voxels[0], hu_of()[:1])
    assert scan.spacing == SPACING
