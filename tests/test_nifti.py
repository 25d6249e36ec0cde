"""NIfTI files, beside what SimpleITK and numbers written out here say of them."""

import gzip
import logging
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from autocontext_jax.errors import UserError
from autocontext_jax.images import scans

SIZE = (4, 5, 6)  # i, j, k
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SFORM = np.array([[-2.0, 0, 0, 10], [0, -1.5, 0, 20], [0, 0, 3.0, 30], [0, 0, 0, 1]])
MIRRORED = np.array([[2.0, 0, 0, 4], [0, -1.5, 0, 20], [0, 0, 3.0, 30], [0, 0, 0, 1]])


def voxels(dtype=np.int16):
    """[i, j, k]; all differ."""
    return (np.arange(np.prod(SIZE)).reshape(SIZE) - 60).astype(dtype)


def save(path, data=None, *, sform=SFORM, sform_code=1, qform=SFORM, qform_code=1, kind=nib.Nifti1Image, **fields):
    """A file with both forms; `fields` are then set in its header as bytes, whatever nibabel thinks of them."""
    image = kind(voxels() if data is None else data, None)
    image.header.set_sform(sform, sform_code)
    image.header.set_qform(qform, qform_code)
    image.header["sform_code"], image.header["qform_code"] = sform_code, qform_code
    image.header.set_xyzt_units("mm")
    plain = path.with_name("plain.nii")
    nib.save(image, plain)
    content = bytearray(plain.read_bytes())
    plain.unlink()
    template = (nib.Nifti2Header if kind is nib.Nifti2Image else nib.Nifti1Header).template_dtype
    for name, value in fields.items():
        field, offset = template.fields[name][:2]
        content[offset : offset + field.itemsize] = np.array(value, field).tobytes()
    path.write_bytes(gzip.compress(bytes(content)) if path.name.lower().endswith(".gz") else bytes(content))
    return path


def canonical(data, affine):
    """The array [z, y, x] of LPS axes that a reader of the affine's own makes: for axes along the patient's."""
    turned = data
    lps = TO_LPS @ affine
    for axis in range(3):
        if lps[axis, axis] < 0:
            turned = np.flip(turned, axis)
    return turned.transpose(2, 1, 0)


def test_values_positions_and_spacing_are_those_that_itk_reads(tmp_path):
    path = save(tmp_path / "a.nii.gz", sform=MIRRORED, qform=MIRRORED)
    scan, itk = scans.read_scan(path), sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    np.testing.assert_array_equal(scan.voxels[0], sitk.GetArrayFromImage(itk))
    np.testing.assert_allclose(scan.spacing[::-1], itk.GetSpacing())
    np.testing.assert_allclose(scan.origin[::-1], itk.GetOrigin(), atol=1e-5)


@pytest.mark.parametrize(
    ("sform_code", "qform_code", "used"),
    [(1, 1, "sform"), (2, 1, "sform"), (1, 2, "sform"), (1, 0, "sform"), (0, 1, "qform")],
)
def test_the_sform_counts_if_its_code_is_above_0_else_the_qform(tmp_path, caplog, sform_code, qform_code, used):
    path = save(tmp_path / "a.nii", sform_code=sform_code, qform=MIRRORED, qform_code=qform_code)
    scan = scans.read_scan(path)
    affine = SFORM if used == "sform" else MIRRORED
    np.testing.assert_array_equal(scan.voxels[0], canonical(voxels(), affine))
    both = sform_code > 0 and qform_code > 0
    assert len(caplog.messages) == both
    if both:
        assert "(10, 20, 30)" in caplog.text
        assert "(4, 20, 30)" in caplog.text
        assert str(path) in caplog.text


def test_a_file_that_is_not_placed_is_named(tmp_path, caplog):
    scans.read_scan(save(tmp_path / "a.nii", sform_code=0, qform_code=0))
    assert "neither a sform nor a qform" in caplog.text


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("codes", [(1, 1), (1, 2), (2, 1), (0, 1), (1, 0), (0, 0), (4, 3)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_mask_repeats_both_forms(tmp_path, codes, suffix, kind):
    """Read by nibabel and by ITK, which choose differently, the mask lies on its scan."""
    sform_code, qform_code = codes
    path = save(
        tmp_path / f"a{suffix}", sform_code=sform_code, qform=MIRRORED, qform_code=qform_code, kind=kind,
    )  # fmt: skip
    grid = scans.read_grid(path)
    scans.write_mask(tmp_path / f"m{suffix}", np.zeros(grid.canonical_size, np.uint8), grid)
    scan, mask = nib.load(path), nib.load(tmp_path / f"m{suffix}")
    assert isinstance(mask, kind)
    np.testing.assert_array_equal(mask.affine, scan.affine)
    for form in ("get_sform", "get_qform"):
        (one, code), (other, same) = getattr(scan, form)(coded=True), getattr(mask, form)(coded=True)
        assert code == same
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)
    if kind is nib.Nifti2Image:
        return  # which ITK does not read
    itk_scan, itk_mask = (sitk.ReadImage(str(tmp_path / f"{name}{suffix}")) for name in "am")
    for get in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
        assert getattr(itk_scan, get)() == getattr(itk_mask, get)()


@pytest.mark.parametrize("pixdim", [(1.0, 1.0, 1.0), (2.0, 1.5, 6.0)])
@pytest.mark.parametrize("qform_code", [0, 1])
def test_pixdim_against_the_sform_is_named(tmp_path, caplog, pixdim, qform_code):
    path = save(tmp_path / "a.nii.gz", qform_code=qform_code, pixdim=(1, *pixdim, 0, 0, 0, 0))
    scan = scans.read_scan(path)
    np.testing.assert_allclose(scan.spacing, (3.0, 1.5, 2.0))
    assert len(caplog.messages) == 1
    assert f"({', '.join(f'{mm:g}' for mm in pixdim)})" in caplog.text
    assert "(2, 1.5, 3)" in caplog.text


@pytest.mark.parametrize(("units", "scale"), [(1, 1000.0), (2, 1.0), (3, 0.001), (0, 1.0)])
def test_units_become_mm_as_in_itk(tmp_path, units, scale):
    path = save(tmp_path / "a.nii", xyzt_units=units)
    grid, itk = scans.read_grid(path), sitk.ReadImage(str(path))
    np.testing.assert_allclose(grid.spacing, np.array([2.0, 1.5, 3.0]) * scale, rtol=1e-6)
    np.testing.assert_allclose(grid.spacing, itk.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(grid.origin, itk.GetOrigin(), rtol=1e-6)
    scans.write_mask(tmp_path / "m.nii", np.zeros(grid.canonical_size, np.uint8), grid)
    assert sitk.ReadImage(str(tmp_path / "m.nii")).GetSpacing() == itk.GetSpacing()


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept", "expected"),
    [
        (np.int16, 2.0, -100.0, lambda stored: 2 * stored - 100.0),
        (np.uint8, 0.5, -1024.0, lambda stored: np.rint(0.5 * stored - 1024)),
        (np.int16, 1.0, 0.0, lambda stored: stored),
        (np.int16, np.nan, np.nan, lambda stored: stored),
        (np.float32, 3.0, 1.0, lambda stored: 3 * stored + 1.0),
    ],
)
def test_values_are_scaled_as_the_header_says(tmp_path, dtype, slope, intercept, expected):
    data = np.abs(voxels()).astype(dtype)
    path = save(tmp_path / "a.nii.gz", data, scl_slope=slope, scl_inter=intercept)
    read = scans.read_scan(path).voxels[0]
    np.testing.assert_array_equal(read, canonical(expected(data.astype(float)), SFORM))
    if np.isfinite(slope):
        itk = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS"))
        np.testing.assert_array_equal(read, np.rint(itk))


def test_a_slope_of_0_with_an_intercept_is_named(tmp_path, caplog):
    path = save(tmp_path / "a.nii", scl_slope=0.0, scl_inter=-1024.0)
    np.testing.assert_array_equal(scans.read_scan(path).voxels[0], canonical(voxels(), SFORM))
    assert "the slope 0 and the intercept -1024" in caplog.text
    caplog.clear()
    scans.read_scan(save(tmp_path / "b.nii", scl_slope=0.0, scl_inter=0.0))
    assert caplog.messages == []


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "A.NII.GZ", "A.Nii"])
def test_nifti_of_both_versions_whatever_the_case_of_its_name(tmp_path, name, kind, packed):
    """Whether a file is packed is seen from its content."""
    path = save(tmp_path / "x.nii", kind=kind)
    content = path.read_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if packed else content)
    np.testing.assert_array_equal(scans.read_scan(path).voxels[0], canonical(voxels(), SFORM))


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_big_endian_files(tmp_path, kind):
    image = kind(voxels(), SFORM)
    swapped = kind(voxels().astype(">i2"), SFORM, image.header.as_byteswapped(">"))
    nib.save(swapped, tmp_path / "a.nii")
    np.testing.assert_array_equal(scans.read_scan(tmp_path / "a.nii").voxels[0], canonical(voxels(), SFORM))


@pytest.mark.parametrize("shape", [(*SIZE, 1), (*SIZE, 1, 1)])
def test_axes_of_length_1_at_the_end_are_none(tmp_path, shape):
    path = save(tmp_path / "a.nii.gz", voxels().reshape(shape))
    np.testing.assert_array_equal(scans.read_scan(path).voxels[0], canonical(voxels(), SFORM))


@pytest.mark.parametrize(
    ("shape", "shown"), [((*SIZE, 2), "4D"), ((*SIZE, 1, 3), "3 value(s)"), ((4, 5), "2D")], ids=str
)
def test_images_of_other_kinds_are_refused(tmp_path, shape, shown):
    path = save(tmp_path / "a.nii.gz", np.zeros(shape, np.int16))
    with pytest.raises(UserError, match=rf"a\.nii\.gz is a .*{shown[:2]}") as caught:
        scans.read_scan(path)
    assert shown in str(caught.value)


@pytest.mark.parametrize("datatype", [32, 128, 1792, 7])
def test_datatypes_that_are_no_numbers_are_refused(tmp_path, datatype):
    with pytest.raises(UserError, match=r"a\.nii"):
        scans.read_scan(save(tmp_path / "a.nii", datatype=datatype))


def test_axes_that_are_not_at_right_angles_are_called_so(tmp_path):
    sheared = SFORM.copy()
    sheared[1, 2] = 0.5
    with pytest.raises(UserError, match="not at right angles"):
        scans.read_scan(save(tmp_path / "a.nii", sform=sheared, qform_code=0))


@pytest.mark.parametrize(
    "fields",
    [
        {"srow_x": (np.nan, 0, 0, 0)},
        {"srow_x": (0, 0, 0, 0)},
        {"dim": (3, 4, 0, 6, 1, 1, 1, 1)},
        {"dim": (9, 4, 5, 6, 1, 1, 1, 1)},
        {"dim": (3, 32767, 32767, 32767, 1, 1, 1, 1)},
        {"vox_offset": -5.0},
        {"vox_offset": 1e9},
        {"magic": b"ni1"},
        {"scl_slope": 2.0, "scl_inter": np.inf},
    ],
    ids=str,
)
def test_headers_without_sense_are_refused(tmp_path, fields):
    path = save(tmp_path / "a.nii", **fields)
    with pytest.raises(UserError, match=r"a\.nii") as caught:
        scans.read_scan(path)
    assert "\n" not in str(caught.value)


def test_a_quaternion_that_was_rounded_is_taken(tmp_path):
    """Such as of OpenNeuro ds000168: nibabel refuses one that is longer than 1 by more than 2e-7."""
    turned = np.float32(np.sqrt(0.5) * (1 + 4e-6))
    path = save(tmp_path / "a.nii", qform_code=1, sform_code=0, quatern_b=0.0, quatern_c=turned, quatern_d=turned)
    with pytest.raises(ValueError, match="w2 should be positive"):
        nib.load(path).header.get_qform()
    itk = sitk.ReadImage(str(path))
    grid = scans.read_grid(path)
    np.testing.assert_allclose(grid.direction, itk.GetDirection(), atol=1e-5)


def test_a_qform_that_says_nothing_beside_a_sform_is_named(tmp_path, caplog):
    path = save(tmp_path / "a.nii", quatern_b=3.0)
    expected = scans.read_grid(save(tmp_path / "b.nii"))
    found = scans.read_grid(path)
    assert "a.nii has a qform that says nothing: its sform is used" in caplog.text
    assert (found.direction, found.origin) == (expected.direction, expected.origin)
    with pytest.raises(UserError, match="does not say where its voxels lie"):
        scans.read_grid(save(tmp_path / "c.nii", quatern_b=3.0, sform_code=0))


def test_labels_close_to_whole_numbers_are_rounded(tmp_path):
    """As nibabel writes them with a slope, and as arithmetic leaves them."""
    labels = (np.arange(np.prod(SIZE)).reshape(SIZE) % 8).astype(float)
    grid = scans.read_grid(save(tmp_path / "a.nii"))
    for number, data in enumerate((labels * (1 - 1e-7), labels + 9e-4, labels)):
        path = tmp_path / f"{number}.nii.gz"
        image = nib.Nifti1Image(data.astype(np.float32), SFORM)
        if number == 2:
            image = nib.Nifti1Image(data, SFORM)
            image.set_data_dtype(np.int16)  # nibabel then stores a slope
        nib.save(image, path)
        read = scans.read_label(path, values=range(8), like=grid, case="a")
        np.testing.assert_array_equal(read, canonical(labels, SFORM))
    nib.save(nib.Nifti1Image((labels + 2e-3).astype(np.float32), SFORM), path)
    with pytest.raises(UserError, match=r"1\.002"):
        scans.read_label(path, values=range(8), like=grid, case="a")


def test_values_outside_int16_are_named(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    data = voxels(np.int32)
    data[0, 0, :2] = 40_000, -50_000
    read = scans.read_scan(save(tmp_path / "a.nii", data)).voxels[0]
    np.testing.assert_array_equal(read, canonical(data.clip(-32768, 32767), SFORM))
    assert "2 voxels outside" in caplog.text


def test_a_large_axis_makes_a_mask_of_version_2(tmp_path):
    size = (1, 1, 40_000)
    scans.write_scan(tmp_path / "a.nii.gz", np.zeros(size, np.int16), (1.0, 1.0, 1.0))
    with gzip.open(tmp_path / "a.nii.gz") as file:
        assert struct.unpack("<i", file.read(4)) == (540,)
    assert scans.read_scan(tmp_path / "a.nii.gz").voxels[0].shape == size


def test_the_same_mask_is_the_same_file(tmp_path):
    """No time of day is in it: a data set's checksums would change."""
    for name in ("a.nii.gz", "b.nii.gz"):
        scans.write_scan(tmp_path / name, np.zeros((4, 5, 6), np.int16), (1.0, 1.0, 1.0))
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "b.nii.gz").read_bytes()
    assert content[4:8] == bytes(4)
    assert b"a.nii" not in content
