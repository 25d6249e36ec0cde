"""Each slice's values are scaled as its own file says."""

import numpy as np
import pytest
from dicom_files import (
    SIZE,
    check_as_itk_sees_it,
    check_read,
    hu_of,
    refused_scan,
    save_series,
    store,
    warned,
)
from pydicom.dataset import Dataset

from autocontext_jax.images import reader_process, scans
from autocontext_jax.images.dicom import read_series


def stored_as(hu, kind, slope=1, intercept=-1024, bits=None, only=None):
    """A change to each slice (or to slice `only`): its values in another type, with another rescale."""

    def change(k, file):
        if only is None or k in only:
            file.RescaleSlope, file.RescaleIntercept = slope, intercept
            store(file, np.rint((hu[k] - float(intercept)) / slope), kind, bits)

    return change


def test_unsigned_and_signed_slices_in_one_series(tmp_path):
    hu = hu_of()
    save_series(tmp_path, hu, stored_as(hu, np.int16, intercept=0, only=range(0, 8, 2)))
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_slices_of_8_and_16_and_32_bits_in_one_series(tmp_path):
    hu = hu_of()
    hu[2] = np.arange(120).reshape(12, 10) - 1000
    changes = (
        stored_as(hu, np.uint8, intercept=-1000, only=[2]),
        stored_as(hu, np.uint32, only=[3]),
    )
    changes += (stored_as(hu, np.int32, intercept=0, only=[4]),)
    save_series(tmp_path, hu, lambda k, file: [change(k, file) for change in changes])
    check_as_itk_sees_it(check_read(tmp_path, hu), tmp_path)


def test_signed_8_bits(tmp_path):
    hu = np.full(SIZE, -40, np.int16) + np.arange(8)[:, None, None].astype(np.int16)
    save_series(tmp_path, hu, stored_as(hu, np.int8, intercept=0))
    check_as_itk_sees_it(check_read(tmp_path, hu), tmp_path)


def test_12_bits_stored_of_16(tmp_path):
    hu = hu_of()
    save_series(tmp_path, hu, stored_as(hu, np.uint16, bits=12))
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_an_overlay_in_the_high_bits(tmp_path):
    hu = hu_of()

    def change(k, file):
        store(file, (hu[k].astype(np.int32) + 1024) | (0x9000 if k % 2 else 0x5000), np.uint16, bits=12)

    check_read(save_series(tmp_path, hu, change))


def test_an_overlay_in_the_high_bits_of_signed_values(tmp_path):
    hu = hu_of()

    def change(k, file):
        file.RescaleIntercept = 0
        store(file, (hu[k].astype(np.int32) & 0xFFF) | 0x5000, np.uint16, bits=12)
        file.PixelRepresentation = 1

    check_read(save_series(tmp_path, hu, change))


def test_bits_that_differ_by_slice(tmp_path):
    hu = hu_of()

    def change(k, file):
        bits = 12 if k < 4 else 16
        store(file, (hu[k].astype(np.int32) + 1024) | (0x7000 if k < 4 else 0), np.uint16, bits)

    check_read(save_series(tmp_path, hu, change))


def test_values_in_the_upper_bits(tmp_path):
    hu = hu_of()

    def change(k, file):
        store(file, (hu[k].astype(np.int32) + 1024) << 4, np.uint16, bits=12)
        file.HighBit = 15

    check_read(save_series(tmp_path, hu, change))


def test_more_bits_stored_than_allocated_are_refused(tmp_path):
    save_series(tmp_path, None, lambda k, file: k == 3 and setattr(file, "BitsStored", 20))
    refused_scan(tmp_path, "slice_003.dcm", "BitsStored 20", "HighBit 15", "16 bits", "export it again")


def test_the_sign_of_one_slice_alone(tmp_path):
    hu = hu_of()
    save_series(tmp_path, hu, stored_as(hu, np.int16, intercept=0, only=[0]))
    scan = check_read(tmp_path)
    assert scan.voxels[0, 0].min() == -1000
    check_as_itk_sees_it(scan, tmp_path)


def test_an_intercept_that_differs_by_slice(tmp_path):
    hu = hu_of()
    changes = [stored_as(hu, np.uint16, intercept=-1024 - 100 * k, only=[k]) for k in range(8)]
    save_series(tmp_path, hu, lambda k, file: changes[k](k, file))
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_a_slope_that_differs_by_slice(tmp_path):
    hu = hu_of()
    save_series(tmp_path, hu, stored_as(hu, np.uint16, slope=2, intercept=-1024, only=[0, 5]))
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_an_intercept_in_slice_0_alone_that_would_overflow(tmp_path):
    hu = hu_of()
    save_series(tmp_path, hu, stored_as(hu, np.uint16, intercept=-32768, only=[0]))
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_an_intercept_beyond_int16(tmp_path):
    hu = hu_of() + 1500
    save_series(tmp_path, hu, stored_as(hu, np.int16, intercept=33000, only=[0, 3]))
    check_as_itk_sees_it(check_read(tmp_path, hu), tmp_path)


def test_fractional_slopes_are_exact_to_rounding(tmp_path):
    rng = np.random.default_rng(1)
    stored = rng.integers(0, 4096, SIZE)
    slopes, intercepts = rng.uniform(0.2, 1.5, 8).round(6), rng.uniform(-1100, 0, 8).round(3)

    def change(k, file):
        file.RescaleSlope, file.RescaleIntercept = float(slopes[k]), float(intercepts[k])
        store(file, stored[k], np.uint16)

    save_series(tmp_path, stored, change)
    exact = stored * slopes[:, None, None] + intercepts[:, None, None]
    voxels, _ = read_series(tmp_path, "1.2.826.0.1.77.1")
    assert voxels.dtype == np.float32
    np.testing.assert_array_equal(voxels, exact.astype(np.float32))
    np.testing.assert_array_equal(scans.read_scan(tmp_path).voxels[0], np.rint(exact))


def test_one_fractional_slope_among_whole_ones(tmp_path):
    hu = hu_of() // 2 * 2
    save_series(tmp_path, hu, stored_as(hu, np.uint16, slope=0.5, only=[7]))
    check_as_itk_sees_it(check_read(tmp_path, hu), tmp_path)


def test_a_negative_slope(tmp_path):
    hu = hu_of()
    save_series(tmp_path, hu, stored_as(hu, np.int16, slope=-1, intercept=24))
    check_as_itk_sees_it(check_read(tmp_path), tmp_path)


def test_slice_0_without_rescale_among_others_with_is_refused(tmp_path):
    def bare(k, file):
        if k == 0:
            del file.RescaleSlope, file.RescaleIntercept

    save_series(tmp_path, None, bare)
    refused_scan(tmp_path, "slice_000.dcm has no RescaleSlope and no RescaleIntercept",
                 "slice_001.dcm has the RescaleSlope 1 and the RescaleIntercept -1024")  # fmt: skip


def test_a_slice_without_intercept_among_others_with_is_refused(tmp_path):
    save_series(tmp_path, None, lambda k, file: k == 5 and delattr(file, "RescaleIntercept"))
    refused_scan(tmp_path, "slice_005.dcm has the RescaleSlope 1 and no RescaleIntercept", "RescaleIntercept -1024")


def test_without_any_rescale_values_are_as_stored(tmp_path):
    def bare(k, file):
        del file.RescaleSlope, file.RescaleIntercept

    save_series(tmp_path, None, bare)
    check_as_itk_sees_it(check_read(tmp_path, hu_of() + 1024), tmp_path)


def test_a_slope_of_0_is_refused(tmp_path):
    save_series(tmp_path, None, lambda k, file: k == 2 and setattr(file, "RescaleSlope", 0))
    refused_scan(tmp_path, "slice_002.dcm has the RescaleSlope 0", "export it again")


@pytest.mark.parametrize("slope", ["1e300", "1e25"])
def test_an_absurd_slope_is_told_in_one_line(tmp_path, slope):
    save_series(tmp_path, np.full(SIZE, -1024), lambda k, file: k == 2 and setattr(file, "RescaleSlope", slope))
    assert scans.read_scan(tmp_path).voxels[0][3].max() == -1024


def test_values_beyond_int16_are_clipped_with_a_warning(tmp_path, caplog):
    hu = hu_of().astype(np.int32)
    hu[1, 2, 3], hu[4, 5, 6], hu[4, 5, 7] = 32768, -40000, 32767
    save_series(tmp_path, hu, stored_as(hu, np.int32, intercept=0))
    check_read(tmp_path, hu.clip(-32768, 32767))
    assert "has 2 voxels outside -32768 to 32767 HU: they are clipped" in warned(caplog)


def test_full_uint16_does_not_wrap(tmp_path, caplog):
    hu = hu_of().astype(np.int32)
    hu[0, 0, 0] = 65535 - 1024
    save_series(tmp_path, hu)
    check_read(tmp_path, hu.clip(-32768, 32767))
    assert "has 1 voxels outside" in warned(caplog)


def test_monochrome1_keeps_stored_hu(tmp_path):
    save_series(tmp_path, None, lambda k, file: setattr(file, "PhotometricInterpretation", "MONOCHROME1"))
    check_read(tmp_path)


def test_mixed_photometric_interpretation_keeps_stored_hu(tmp_path):
    save_series(tmp_path, None, lambda k, file: k == 0 and setattr(file, "PhotometricInterpretation", "MONOCHROME1"))
    check_read(tmp_path)


def test_rgb_is_refused(tmp_path):
    def colour(k, file):
        store(file, np.zeros((12, 30)), np.uint8)
        file.Columns, file.SamplesPerPixel, file.PlanarConfiguration = 10, 3, 0
        file.PhotometricInterpretation = "RGB"

    save_series(tmp_path, None, colour)
    refused_scan(tmp_path, "slice_000.dcm is a colour image (3 value(s) a voxel, RGB)", "expected one value a voxel")


def test_numbers_of_colours_in_a_palette_are_refused(tmp_path):
    save_series(tmp_path, None, lambda k, file: setattr(file, "PhotometricInterpretation", "PALETTE COLOR"))
    refused_scan(tmp_path, "slice_000.dcm is a colour image", "PALETTE COLOR")


def test_values_by_a_table(tmp_path):
    hu = hu_of()
    values = np.arange(0, 4096) * 3 % 4096

    def change(k, file):
        del file.RescaleSlope, file.RescaleIntercept
        table = Dataset()
        table.LUTDescriptor, table.ModalityLUTType = [4096, 0, 16], "US"
        table.add_new("LUTData", "OW", values.astype("<u2").tobytes())
        file.ModalityLUTSequence = [table]

    save_series(tmp_path, hu, change)
    check_read(tmp_path, values[hu.astype(int) + 1024])


def test_values_that_are_floats(tmp_path):
    hu = hu_of() + np.float32(0.25)

    def change(k, file):
        store(file, np.zeros((12, 10)), np.uint32)
        del file.PixelData, file.PixelRepresentation, file.BitsStored, file.HighBit
        file.RescaleIntercept = 0
        file.FloatPixelData = hu[k].astype("<f4").tobytes()

    save_series(tmp_path, None, change)
    voxels = reader_process.call("dicom", tmp_path, series="1.2.826.0.1.77.1", header_only=False)["voxels"]
    np.testing.assert_array_equal(voxels, hu)
