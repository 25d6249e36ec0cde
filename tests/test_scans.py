import gzip
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import refused

from autocontext_jax.images import scans
from autocontext_jax.images.finding import find_scans
from autocontext_jax.images.formats import scan_name
from autocontext_jax.images.intensity import looks_like_ct

SIZE = (6, 5, 4)  # D, H, W
SPACING = (2.5, 0.8, 0.7)
ORIGIN = (-30.0, 12.5, 101.25)
SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"

# All 48 ways to name the axes of a file: an order of the three pairs, and an end of each.
ORIENTATIONS = [
    "".join(letters) for pairs in itertools.permutations(("LR", "PA", "SI")) for letters in itertools.product(*pairs)
]


def voxels_of(size=SIZE, dtype=np.int16):
    """All values differ, so that no permutation or flip goes unseen."""
    return (np.arange(np.prod(size)).reshape(size) - 100).astype(dtype)


def rotation(x, y, z):
    matrix = np.eye(3)
    for axis, angle in enumerate((x, y, z)):
        i, j = [(1, 2), (0, 2), (0, 1)][axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def image_of(voxels, direction=None):
    """A SimpleITK image whose own order is canonical."""
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin(ORIGIN[::-1])
    if direction is not None:
        image.SetDirection(np.asarray(direction).ravel().tolist())
    return image


def save(path, voxels, direction=None):
    sitk.WriteImage(image_of(voxels, direction), str(path), True)
    return path


def save_series(folder, voxels, uid="1.2.3", shift=lambda k: (0.0, 0.0, SPACING[0] * k)):
    """One DICOM file a slice, named so that the order of names is not that of positions."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k, plane in enumerate(voxels):
        image = sitk.GetImageFromArray(plane)
        image.SetSpacing(SPACING[:0:-1])
        position = np.array(ORIGIN[::-1]) + shift(k)
        for key, value in {
            "0008|0018": f"{uid}.{k + 1}",
            "0008|0060": "CT",
            "0018|0050": str(SPACING[0]),
            "0020|000d": "1.2",
            "0020|000e": uid,
            "0020|0032": "\\".join(f"{value:.3f}" for value in position),
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{uid}_{99 - k}.dcm"))
        writer.Execute(image)
    return folder


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("tilt", [(0.0, 0.0, 0.0), (0.2, -0.3, 0.25)], ids=["straight", "oblique"])
@pytest.mark.parametrize("code", ORIENTATIONS)
def test_every_orientation_of_one_scan_reads_alike_and_its_mask_goes_back(tmp_path, code, tilt):
    voxels = voxels_of()
    canonical = image_of(voxels, rotation(*tilt))
    stored = sitk.DICOMOrient(canonical, code)
    path = tmp_path / "scan.mha"  # keeps float64 geometry
    sitk.WriteImage(stored, str(path))

    scan = scans.read_scan(path)
    assert scan.grid.orientation == code
    assert scan.voxels[0].dtype == np.int16
    assert scan.voxels[0].flags.c_contiguous
    np.testing.assert_array_equal(scan.voxels[0], voxels)
    np.testing.assert_allclose(scan.spacing, SPACING)
    np.testing.assert_allclose(scan.origin, ORIGIN, atol=1e-9)
    np.testing.assert_allclose(np.reshape(scan.direction, (3, 3)), rotation(*tilt)[::-1, ::-1], atol=1e-12)
    assert scan.grid == scans.read_grid(path)
    assert scan.grid.canonical_size == SIZE

    mask = np.zeros(SIZE, np.uint8)
    mask[4, 1, 2] = 3  # one voxel off every axis of symmetry
    scans.write_mask(tmp_path / "mask.mha", mask, scan.grid)
    written = sitk.ReadImage(str(tmp_path / "mask.mha"))
    for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(written, get)() == getattr(stored, get)()
    (k,), (j,), (i,) = np.nonzero(sitk.GetArrayFromImage(written))
    there = written.TransformIndexToPhysicalPoint((int(i), int(j), int(k)))
    np.testing.assert_allclose(there, canonical.TransformIndexToPhysicalPoint((2, 1, 4)), atol=1e-9)
    back = scans.read_label(tmp_path / "mask.mha", values=(0, 3), like=scan.grid, case="a")
    np.testing.assert_array_equal(back, mask // 3)


def test_canonical_geometry_places_every_corner(tmp_path):
    stored = sitk.DICOMOrient(image_of(voxels_of(), rotation(0.2, -0.3, 0.25)), "SRA")
    sitk.WriteImage(stored, str(tmp_path / "a.mha"))
    scan = scans.read_scan(tmp_path / "a.mha")
    direction = np.reshape(scan.direction, (3, 3))
    raw = sitk.GetArrayFromImage(stored)
    for index in itertools.product(*((0, size - 1) for size in SIZE)):
        k, j, i = (int(axis[0]) for axis in np.nonzero(raw == scan.voxels[0][index]))
        here = np.array(scan.origin) + direction @ (np.array(scan.spacing) * index)
        np.testing.assert_allclose(here, stored.TransformIndexToPhysicalPoint((i, j, k))[::-1], atol=1e-9)


@pytest.mark.parametrize("code", ["LPS", "RAS", "LAS", "SRA"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_a_mask_in_every_format_keeps_the_header(tmp_path, suffix, code):
    source, target = tmp_path / f"scan{suffix}", tmp_path / f"mask{suffix}"
    sitk.WriteImage(sitk.DICOMOrient(image_of(voxels_of()), code), str(source))
    grid = scans.read_grid(source)
    mask = (voxels_of() % 5 == 0).astype(np.uint8)
    scans.write_mask(target, mask, grid)
    written = scans.read_grid(target)
    assert (written.size, written.origin, written.direction) == (grid.size, grid.origin, grid.direction)
    if suffix == ".nrrd":  # stores spacing times direction: one rounding
        np.testing.assert_allclose(written.spacing, grid.spacing, rtol=1e-15)
    else:
        assert written.spacing == grid.spacing
    np.testing.assert_array_equal(scans.read_label(target, values=[0, 1], like=grid, case="a"), mask)


def test_an_oblique_nifti_keeps_its_header_within_float32(tmp_path):
    grid = scans.read_grid(save(tmp_path / "a.nii.gz", voxels_of(), rotation(0.2, -0.3, 0.25)))
    scans.write_mask(tmp_path / "m.nii.gz", np.zeros(SIZE, np.uint8), grid)
    written = scans.read_grid(tmp_path / "m.nii.gz")
    assert (written.size, written.spacing, written.origin) == (grid.size, grid.spacing, grid.origin)
    np.testing.assert_allclose(written.direction, grid.direction, atol=1e-7)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_write_scan_and_read_scan_are_inverse(tmp_path, suffix):
    path = tmp_path / "new" / f"a{suffix}"
    scans.write_scan(path, voxels_of(), SPACING, ORIGIN)
    scan = scans.read_scan(path)
    np.testing.assert_array_equal(scan.voxels[0], voxels_of())
    np.testing.assert_allclose(scan.spacing, SPACING, rtol=1e-6)
    np.testing.assert_allclose(scan.origin, ORIGIN, rtol=1e-6)
    assert scan.direction == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert scan.grid.orientation == "LPS"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_header_with_its_voxels_in_another_file(tmp_path):
    np.testing.assert_array_equal(scans.read_scan(save(tmp_path / "a.mhd", voxels_of())).voxels[0], voxels_of())


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
def test_other_types_are_rounded_and_clipped_to_int16(tmp_path, dtype, suffix):
    voxels = np.zeros(SIZE, dtype)
    voxels.flat[1] = 200
    if np.dtype(dtype).itemsize > 1:
        voxels.flat[2] = 50000
    if np.dtype(dtype).kind == "f":
        voxels.flat[3:6] = -1000.4, -1000.6, -1e9
    got = scans.read_scan(save(tmp_path / f"a{suffix}", voxels)).voxels[0]
    assert got.dtype == np.int16
    np.testing.assert_array_equal(got, np.clip(np.rint(voxels.astype(float)), -32768, 32767))


def test_a_dicom_series(tmp_path):
    folder = save_series(tmp_path / "series", voxels_of())
    (folder / "notes.txt").write_text("not a slice", encoding="utf-8")
    scan = scans.read_scan(folder)
    np.testing.assert_array_equal(scan.voxels[0], voxels_of())
    np.testing.assert_allclose(scan.spacing, SPACING)
    np.testing.assert_allclose(scan.origin, ORIGIN)
    assert scans.read_grid(folder) == scan.grid
    scans.write_mask(tmp_path / "mask.nii.gz", np.ones(SIZE, np.uint8), scan.grid)
    scans.read_label(tmp_path / "mask.nii.gz", values=[1], like=scan.grid, case="a")


def test_dicom_folders_that_are_not_one_even_stack(tmp_path):
    voxels = voxels_of()
    two = save_series(save_series(tmp_path / "two", voxels), voxels, uid="1.9.9")
    refused(lambda: scans.read_scan(two), two, "2 DICOM series", "1.2.3", "1.9.9", "--series")
    (tmp_path / "none").mkdir()
    refused(lambda: scans.read_scan(tmp_path / "none"), tmp_path / "none", "no DICOM series")
    missing = save_series(tmp_path / "missing", voxels)
    (missing / "1.2.3_97.dcm").unlink()
    refused(lambda: scans.read_scan(missing), missing, "lacks 1 slice", "1.2.3_98.dcm and 1.2.3_96.dcm", "5 mm")
    cut = save_series(tmp_path / "cut", voxels)
    last = cut / "1.2.3_99.dcm"
    last.write_bytes(last.read_bytes()[:-20])
    refused(lambda: scans.read_scan(cut), cut, "1.2.3_99.dcm")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7, 0.97])
def test_a_file_cut_short_is_refused(tmp_path, suffix, kept):
    rng = np.random.default_rng(0)
    path = save(tmp_path / f"a{suffix}", rng.integers(-1000, 1000, (20, 30, 40)).astype(np.int16))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    refused(lambda: scans.read_scan(path), path, "empty" if kept == 0.0 else "truncated")


def test_a_gzip_stream_that_ends_early_but_well_is_refused(tmp_path):
    whole = save(tmp_path / "whole.nii", voxels_of())
    short = tmp_path / "short.nii.gz"
    short.write_bytes(gzip.compress(whole.read_bytes()[:-50]))
    size = whole.stat().st_size
    refused(lambda: scans.read_scan(short), f"{size - 50} of its {size} bytes")


def test_a_damaged_gzip_stream_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    path = save(tmp_path / "a.nii.gz", rng.integers(-1000, 1000, (60, 128, 128)).astype(np.int16))
    data = bytearray(path.read_bytes())
    data[-6] ^= 0xFF  # the checksum, which ITK does not look at
    path.write_bytes(data)
    refused(lambda: scans.read_scan(path), path, "CRC")


def test_files_that_are_not_scans_are_refused(tmp_path):
    refused(lambda: scans.read_scan(tmp_path / "a.nii.gz"), tmp_path / "a.nii.gz", "does not exist")
    text = tmp_path / "a.txt"
    text.write_text("HU", encoding="utf-8")
    refused(lambda: scans.read_scan(text), text, ".nii.gz")
    for suffix in (".nii", ".nii.gz", ".mha", ".nrrd"):
        junk = tmp_path / f"junk{suffix}"
        junk.write_bytes(b"this is no scan" * 100)
        refused(lambda path=junk: scans.read_grid(path), junk, "cannot be read")
        junk.unlink()


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".nii.gz"])
def test_images_of_other_dimensions_are_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 4), np.int16)), str(path))
    refused(lambda: scans.read_scan(path), path, "2D", "4 × 5")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 6, 5, 4), np.int16), isVector=False), str(path))
    refused(lambda: scans.read_scan(path), path, "4D", "4 × 5 × 6 × 2")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((6, 5, 4, 3), np.uint8), isVector=True), str(path))
    refused(lambda: scans.read_scan(path), path, "3 value(s)")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])  # ITK's NIfTI reader would make them 0
def test_voxels_that_are_not_finite_are_refused(tmp_path, suffix, dtype):
    voxels = voxels_of(dtype=dtype)
    voxels.flat[[3, 50]] = np.nan, np.inf
    path = save(tmp_path / f"a{suffix}", voxels)
    refused(lambda: scans.read_scan(path), path, "2 voxels", "finite")


def test_sheared_axes_are_refused(tmp_path):
    path = save(tmp_path / "a.mha", voxels_of(), [[1, 0.3, 0], [0, 1, 0], [0, 0, 1]])
    refused(lambda: scans.read_scan(path), path, "right angles")


def test_two_nifti_files_that_itk_confuses(tmp_path):
    """ITK reads a.nii where a.nii.gz is named; a mask is not written where it would be so confused."""
    save(tmp_path / "a.nii", voxels_of())
    path = save(tmp_path / "a.nii.gz", voxels_of() + 1)
    np.testing.assert_array_equal(scans.read_scan(path).voxels[0], voxels_of() + 1)
    path.unlink()
    refused(lambda: scans.check_writable_format(path), path, "beside a.nii")


@pytest.mark.parametrize(
    ("what", "change", "shown"),
    [
        ("size", lambda image: image[:, :, 1:], ["(5, 5, 4)", "(6, 5, 4)"]),
        ("spacing", lambda image: image.SetSpacing((0.7, 0.8, 2.6)) or image, ["(2.6, 0.8, 0.7)", "(2.5, 0.8, 0.7)"]),
        ("origin", lambda image: image.SetOrigin((101.25, 12.5, -29)) or image, ["(-29, ", "(-30, "]),
        ("direction", lambda image: image.SetDirection(rotation(0, 0, 0.1).ravel().tolist()) or image, ["0.99", "1"]),
    ],
)
def test_a_label_off_its_image_is_refused(tmp_path, what, change, shown):
    like = scans.read_grid(save(tmp_path / "image.mha", voxels_of()))
    path = tmp_path / "label.mha"
    sitk.WriteImage(change(image_of(np.zeros(SIZE, np.uint8))), str(path))
    line = refused(lambda: scans.read_label(path, values=[0, 1], like=like, case="pt_7"), "case pt_7", path, *shown)
    assert f"the label's {what} " in line


def test_a_label_may_differ_in_storage_order_and_by_rounding(tmp_path):
    like = scans.read_grid(save(tmp_path / "image.mha", voxels_of()))
    label = image_of((voxels_of() % 3).astype(np.float32))
    label.SetOrigin([value + 0.004 for value in label.GetOrigin()])
    sitk.WriteImage(sitk.DICOMOrient(label, "ASR"), str(tmp_path / "label.mha"))
    got = scans.read_label(tmp_path / "label.mha", values=range(3), like=like, case="a")
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, voxels_of() % 3)


@pytest.mark.parametrize(
    ("dtype", "strange", "shown"),
    [
        (np.uint8, [9, 9], "9 (2 voxels)"),
        (np.int16, [-1, 300, 300], "300 (2 voxels), -1 (1 voxels)"),
        (np.float32, [0.5, 1.0], "0.5 (1 voxels);"),
        (np.float32, [np.nan], "nan (1 voxels)"),
    ],
)
def test_label_values_that_are_not_named_are_refused(tmp_path, dtype, strange, shown):
    labels = np.zeros(SIZE, dtype)
    labels.flat[10 : 10 + len(strange)] = strange
    path = save(tmp_path / "label.mha", labels)
    like = scans.read_grid(path)
    refused(
        lambda: scans.read_label(path, values=[0, 1, 2], like=like, case="pt_7"), "case pt_7", path, shown, "0, 1, 2"
    )


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_values_of_any_size_become_numbers_and_are_written_again(tmp_path, dtype, suffix):
    values = (0, 205, 420, 40_000 if dtype == np.uint16 else 70_000)
    numbers = (voxels_of() % 4).astype(np.uint8)
    path = save(tmp_path / "label.mha", np.asarray(values, dtype)[numbers])
    like = scans.read_grid(path)
    read = scans.read_label(path, values=values, like=like, case="a")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, numbers)
    target = tmp_path / f"mask{suffix}"
    scans.write_mask(target, scans.label_values(read, values), like)
    np.testing.assert_array_equal(scans.read_label(target, values=values, like=like, case="a"), numbers)
    stored = sitk.ReadImage(str(target))
    assert stored.GetPixelIDValue() in (sitk.sitkUInt16, sitk.sitkUInt32)
    assert sorted(np.unique(sitk.GetArrayFromImage(stored))) == sorted(values)
    refused(
        lambda: scans.read_label(path, values=values[:3], like=like, case="a"),
        str(values[3]),
        "expected only 0, 205, 420",
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_values_become_the_numbers_that_are_given(tmp_path, dtype):
    values, numbers = (0, 3, 7, 9), (0, 2, 255, 1)
    places = voxels_of() % 4
    path = save(tmp_path / "label.mha", np.asarray(values, dtype)[places])
    read = scans.read_label(path, values=values, numbers=numbers, like=scans.read_grid(path), case="a")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, np.asarray(numbers)[places])


def test_strange_values_are_named_whole(tmp_path):
    path = save(tmp_path / "label.mha", np.full(SIZE, 123_456_789, np.int32))
    like = scans.read_grid(path)
    refused(lambda: scans.read_label(path, values=[0, 1], like=like, case="a"), "123456789 (")


def test_values_that_are_numbers_stay_bytes():
    numbers = (voxels_of() % 3).astype(np.uint8)
    assert scans.label_values(numbers, (0, 1, 2)) is numbers
    assert scans.label_values(numbers, (0, 7, 255)).dtype == np.uint8
    assert scans.label_values(numbers, (0, 7, 256)).dtype == np.uint16


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    scans.write_scan(path, voxels_of(), SPACING)
    before = path.read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    refused(lambda: scans.write_scan(path, np.zeros(SIZE, np.int16), SPACING), path, "No space left")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    refused(lambda: scans.write_scan(path / "below.nii", voxels_of(), SPACING), path, "cannot be written")
    for name in ("a.mhd", "a.png"):
        refused(lambda name=name: scans.write_scan(tmp_path / name, voxels_of(), SPACING), name, ".nii.gz")


def test_a_mask_of_another_shape_is_a_bug(tmp_path):
    grid = scans.read_grid(save(tmp_path / "a.mha", voxels_of()))
    with pytest.raises(ValueError, match=re.escape("(4, 5, 6)")):
        scans.write_mask(tmp_path / "m.nii.gz", np.zeros(SIZE[::-1], np.uint8), grid)


def test_scans_are_found_by_name_and_by_content(tmp_path):
    for name in ("b.nii.gz", "a.MHA", "c.nrrd"):
        (tmp_path / name).touch()
    for name in (".d.nii", "._b.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    series = save_series(tmp_path / "series", voxels_of())
    found = find_scans(tmp_path)
    assert [source.path.name for source in found] == ["a.MHA", "b.nii.gz", "c.nrrd", "series"]
    assert [str(source.name) for source in found] == ["a", "b", "c", "series"]
    assert [source.path for source in find_scans(series)] == [series]
    assert [source.path for source in find_scans(tmp_path / "c.nrrd")] == [tmp_path / "c.nrrd"]
    refused(lambda: find_scans(tmp_path / "empty"), "empty holds no scan")
    refused(lambda: find_scans(tmp_path / "notes.txt"), "notes.txt is not a scan")
    refused(lambda: find_scans(tmp_path / "nowhere"), "nowhere does not exist")


def test_scan_names():
    names = ["a/liver_1.nii.gz", "liver.v2.nii", "x.NRRD", "series/1.2.3"]
    assert [scan_name(name) for name in names] == ["liver_1", "liver.v2", "x", "1.2.3"]


def test_what_looks_like_ct():
    rng = np.random.default_rng(0)
    assert looks_like_ct(rng.integers(-1024, 1500, (4, 4, 4), np.int16))
    assert not looks_like_ct(rng.integers(0, 2500, (4, 4, 4), np.int16))  # no offset, or MRI
    assert not looks_like_ct(rng.integers(-1, 2, (4, 4, 4), np.int16))  # scaled
    assert not looks_like_ct(np.full((4, 4, 4), -1000, np.int16))  # nothing but air


def test_refusals_are_silent_on_standard_error(tmp_path):
    """ITK's own warnings go to the process's standard error, past Python; hence a process of its own."""
    path = save(tmp_path / "a.nrrd", voxels_of())
    path.write_bytes(path.read_bytes()[:-10])
    missing = save_series(tmp_path / "missing", voxels_of())
    (missing / "1.2.3_97.dcm").unlink()
    code = (
        "import sys; from autocontext_jax.images import scans\n"
        "from autocontext_jax.errors import UserError\n"
        "for path in sys.argv[1:]:\n"
        "    try: scans.read_scan(path)\n"
        "    except UserError: print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path, missing], capture_output=True, encoding="utf-8", check=True
    )
    assert (done.stdout.split(), done.stderr) == (["refused"] * 2, "")


def test_a_real_scan_and_its_label():
    path = SHARED / "abdomen" / "imagesTr" / "abdomen_0000.nii.gz"
    if not path.exists():
        pytest.skip(f"the shared scan {path} is not on this machine")
    scan = scans.read_scan(path)
    assert scan.voxels[0].shape == (112, 101, 122)
    assert scan.spacing == (3.0, 3.0, 3.0)
    assert scan.grid.orientation == "RAS"
    assert looks_like_ct(scan.voxels[0])
    label = scans.read_label(SHARED / "abdomen/labelsTr/abdomen.nii.gz", values=range(8), like=scan.grid, case="a")
    where = [np.argwhere(label == organ).mean(0) for organ in (3, 4)]  # liver, spleen
    assert where[0][2] < where[1][2]  # x grows to the left, where the spleen is
    assert scan.voxels[0][label == 3].mean() == pytest.approx(50, abs=30)  # liver, HU
