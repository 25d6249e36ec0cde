"""A tilted gantry and slices at irregular distances: upright and regular for the network, and masks brought back.

The phantom is a smooth function of the place in the patient, so that its value is known between slices too.
"""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import SPACING, refused_scan, save_series, store, warned

from autocontext_jax.images import scans
from autocontext_jax.images.in_memory import as_image

SIZE = (10, 24, 20)  # slices, rows, columns
CENTRE, RADIUS = np.array([-12.0, 22.0, 112.0]), 6.0  # mm; of the organ
TILT = np.deg2rad(15)


def phantom(points):
    """HU at points [..., 3], mm."""
    x, y, z = np.moveaxis(points, -1, 0)
    return 300 * np.sin(x / 9) + 250 * np.cos(y / 11) + 12 * (z - 110)


def organ(points):
    """Mm inside the organ, below 0 outside."""
    return RADIUS - np.linalg.norm(points - CENTRE, axis=-1)


class Slices:
    """Slices at given first voxels, [K, 3] in mm (x, y, z), along rows `i` and columns `j`."""

    def __init__(self, firsts, i=(1.0, 0.0, 0.0), j=(0.0, 1.0, 0.0)):
        self.firsts, self.i, self.j = np.array(firsts), np.array(i), np.array(j)
        rows, columns = np.indices(SIZE[1:])
        inside = SPACING[2] * columns[..., None] * self.i + SPACING[1] * rows[..., None] * self.j
        self.points = self.firsts[:, None, None] + inside  # [K, J, I, 3]

    def save(self, folder, flip=False):
        stored = np.rint(phantom(self.points))

        def change(k, file):
            file.ImageOrientationPatient = [round(float(value), 9) for value in (*self.i, *self.j)]
            file.ImagePositionPatient = [round(float(value), 5) for value in self.firsts[k]]
            store(file, stored[k] + 1024, np.uint16)

        names = [f"{len(stored) - k if flip else k:03d}.dcm" for k in range(len(stored))]
        return save_series(folder, stored, change, names)

    def covers(self, points):
        """Whether points lie inside the stack: by the two slices around each, which are looked up."""
        normal = np.cross(self.i, self.j)
        heights = self.firsts @ normal
        at = points @ normal
        inside = (at >= heights[0] - 1e-6) & (at <= heights[-1] + 1e-6)
        for axis, spacing, count in (self.i, SPACING[2], SIZE[2]), (self.j, SPACING[1], SIZE[1]):
            starts = self.firsts @ axis
            for side in -1e-6, 1e-6:  # of the slice below and of the one above
                near = np.searchsorted(heights, at + side).clip(0, len(heights) - 1)
                for first in starts[near], starts[(near - 1).clip(0)]:
                    along = points @ axis - first
                    inside &= (along >= -1e-6) & (along <= spacing * (count - 1) + 1e-6)
        return inside


def tilted():
    """A gantry tilted about the patient's x axis; the table moves along z."""
    firsts = np.array([-20.0, 12.5, 101.25]) + np.arange(SIZE[0])[:, None] * np.array([0, 0, 2.5])
    return Slices(firsts, j=(0.0, np.cos(TILT), np.sin(TILT)))


def sheared():
    """Upright slices, each shifted against the one below, to the left and to the back."""
    return Slices(np.array([-20.0, 12.5, 101.25]) + np.arange(SIZE[0])[:, None] * np.array([0.3, -0.5, 2.5]))


def irregular():
    """A protocol that changes its distance."""
    heights = np.cumsum([0, 2, 2, 2, 2, 3, 3, 3, 3, 3])
    return Slices(np.array([-20.0, 12.5, 101.25]) + heights[:, None] * np.array([0, 0, 1.0]))


def points_of(scan):
    """Where the voxels of a scan lie, [D, H, W, 3], mm (x, y, z)."""
    index = np.moveaxis(np.indices(scan.voxels[0].shape), 0, -1) * np.array(scan.spacing)
    return (index @ np.array(scan.direction).reshape(3, 3).T + scan.origin)[..., ::-1]


def check_upright(scan, slices, error):
    """The voxels are the phantom's at their own places; their axes are at right angles."""
    direction = np.array(scan.direction).reshape(3, 3)
    np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-6)
    points = points_of(scan)
    covered = slices.covers(points)
    assert covered.sum() > 0.8 * slices.points[..., 0].size * slices.firsts.shape[0] / SIZE[0] * 0.9
    np.testing.assert_allclose(scan.voxels[0][covered], phantom(points)[covered], atol=error)
    matrix = direction * scan.spacing
    index = np.linalg.solve(matrix, (slices.points.reshape(-1, 3)[:, ::-1] - scan.origin).T)
    assert index.min() > -1e-3  # the grid holds all slices
    assert (index.max(axis=1) < np.array(scan.voxels[0].shape) - 1 + 1e-3).all()


def check_mask_of_slices(labels, slices):
    """Labels [K, J, I] are the organ's on the slices, but at its surface, where nearest voxels decide."""
    depth = organ(slices.points)
    sure = np.abs(depth) > 0.55  # half the diagonal of a voxel in its plane is 0.53 mm
    assert (depth[sure] > 0).sum() > 50
    np.testing.assert_array_equal(labels[sure], depth[sure] > 0)


@pytest.mark.parametrize("make", [tilted, sheared])
def test_a_tilted_gantry_is_seen_upright(tmp_path, make):
    slices = make()
    scan = scans.read_scan(slices.save(tmp_path))
    check_upright(scan, slices, error=1.5)
    np.testing.assert_allclose(scan.spacing[1:], SPACING[1:])


def test_a_tilted_gantry_in_descending_order_is_seen_upright(tmp_path):
    slices = tilted()
    check_upright(scans.read_scan(slices.save(tmp_path, flip=True)), slices, error=1.5)


def test_the_warning_gives_the_angle(tmp_path, caplog):
    scans.read_scan(tilted().save(tmp_path / "tilted"))
    assert "a gantry tilted by 15.0 degrees" in warned(caplog)
    scans.read_scan(sheared().save(tmp_path / "sheared"))
    assert f"tilted by {np.rad2deg(np.arctan2(np.hypot(0.3, 0.5), 2.5)):.1f} degrees" in warned(caplog)


def test_a_distance_between_tilted_slices_is_along_their_normal(tmp_path):
    scan = scans.read_scan(tilted().save(tmp_path))
    assert scan.spacing[0] == pytest.approx(2.5 * np.cos(TILT), abs=1e-4)


@pytest.mark.parametrize("make", [tilted, sheared])
def test_the_mask_of_a_tilted_gantry_by_source_frame(tmp_path, make):
    slices = make()
    scan = scans.read_scan(slices.save(tmp_path))
    image = as_image((organ(points_of(scan)) > 0).astype(np.uint8), scan.grid)
    assert image.GetSize() == SIZE[::-1]
    check_mask_of_slices(sitk.GetArrayFromImage(image), slices)
    for k, j, i in (0, 0, 0), (9, 23, 19), (4, 0, 19):
        point = image.TransformIndexToPhysicalPoint((i, j, k))
        np.testing.assert_allclose(point, slices.points[k, j, i], atol=1e-3)


@pytest.mark.parametrize("make", [tilted, sheared])
def test_the_nifti_of_a_tilted_gantry_is_sheared(tmp_path, make):
    slices = make()
    scan = scans.read_scan(slices.save(tmp_path / "scan"))
    scans.write_mask(tmp_path / "m.nii.gz", (organ(points_of(scan)) > 0).astype(np.uint8), scan.grid)
    mask = nib.load(tmp_path / "m.nii.gz")
    assert (int(mask.header["qform_code"]), int(mask.header["sform_code"])) == (0, 1)
    assert mask.shape == SIZE[::-1]
    check_mask_of_slices(np.asarray(mask.dataobj).T, slices)
    k, j, i = np.indices(SIZE).reshape(3, -1)
    seen = nib.affines.apply_affine(mask.affine, np.column_stack([i, j, k])) * [-1, -1, 1]  # RAS to LPS
    np.testing.assert_allclose(seen, slices.points.reshape(-1, 3), atol=1e-3)


def test_other_files_of_a_tilted_gantry_are_upright(tmp_path):
    scan = scans.read_scan(tilted().save(tmp_path / "scan"))
    mask = (organ(points_of(scan)) > 0).astype(np.uint8)
    scans.write_mask(tmp_path / "m.nrrd", mask, scan.grid)
    image = sitk.ReadImage(str(tmp_path / "m.nrrd"))
    depth = organ(points_of(scan))
    assert sitk.GetArrayFromImage(image).sum() == mask.sum()
    for d, h, w in np.argwhere(np.abs(depth) > 0.1)[::97]:
        x, y, z = points_of(scan)[d, h, w]
        assert image.GetPixel(image.TransformPhysicalPointToIndex((x, y, z))) == (depth[d, h, w] > 0)


def test_what_no_slice_covers_has_the_lowest_value(tmp_path):
    slices = sheared()
    scan = scans.read_scan(slices.save(tmp_path))
    points = points_of(scan)
    outside = points[..., 0] < slices.firsts[-1, 0] - 1
    outside[: SIZE[0] - 1] = False  # the last plane alone
    assert outside.any()
    assert set(scan.voxels[0][outside].tolist()) == {int(np.rint(phantom(slices.points)).min())}


def test_a_shift_below_a_tenth_of_a_millimetre_is_no_tilt(tmp_path, caplog):
    slices = Slices(np.array([-20.0, 12.5, 101.25]) + np.arange(SIZE[0])[:, None] * np.array([0.01, 0, 2.5]))
    scan = scans.read_scan(slices.save(tmp_path))
    np.testing.assert_array_equal(scan.voxels[0], np.rint(phantom(slices.points)))
    assert warned(caplog) == ""


def test_irregular_distances_are_seen_regular(tmp_path):
    slices = irregular()
    scan = scans.read_scan(slices.save(tmp_path))
    check_upright(scan, slices, error=0.6)  # z enters the phantom linearly
    assert scan.spacing == (3.0, *SPACING[1:])


def test_the_warning_gives_the_distances(tmp_path, caplog):
    scans.read_scan(irregular().save(tmp_path))
    text = warned(caplog)
    assert "the distances between slices are 2 to 3 mm" in text
    assert "interpolated at 3 mm" in text
    assert "\n" not in text


def test_the_mask_of_irregular_distances_by_source_frame(tmp_path):
    slices = irregular()
    scan = scans.read_scan(slices.save(tmp_path))
    image = as_image((organ(points_of(scan)) > 0).astype(np.uint8), scan.grid)
    assert image.GetSize() == SIZE[::-1]
    depth = organ(slices.points)
    sure = np.abs(depth) > 1.05  # these slices lie at most 1 mm from a plane of the grid
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image)[sure], depth[sure] > 0)
    heights = [float(height) for height in image.GetMetaData("slice_heights").split()]
    np.testing.assert_allclose(heights, slices.firsts[:, 2] - slices.firsts[0, 2], atol=1e-3)


def test_the_nifti_of_irregular_distances_is_regular(tmp_path):
    scan = scans.read_scan(irregular().save(tmp_path / "scan"))
    labels = (organ(points_of(scan)) > 0).astype(np.uint8)
    scans.write_mask(tmp_path / "m.nii.gz", labels, scan.grid)
    mask = nib.load(tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj).T, labels)
    k, j, i = np.indices(labels.shape).reshape(3, -1)
    seen = nib.affines.apply_affine(mask.affine, np.column_stack([i, j, k])) * [-1, -1, 1]
    np.testing.assert_allclose(seen, points_of(scan).reshape(-1, 3), atol=1e-3)


def test_a_tilt_with_irregular_distances(tmp_path, caplog):
    slices = irregular()
    slices = Slices(slices.firsts, j=(0.0, np.cos(TILT), np.sin(TILT)))
    scan = scans.read_scan(slices.save(tmp_path / "scan"))
    text = warned(caplog)
    assert "tilted by 15.0 degrees" in text
    assert "the distances between slices are 1.93185 to 2.89778 mm" in text
    check_upright(scan, slices, error=3)
    scans.write_mask(tmp_path / "m.nii.gz", (organ(points_of(scan)) > 0).astype(np.uint8), scan.grid)
    assert nib.load(tmp_path / "m.nii.gz").shape == scan.grid.size


def test_shifts_that_are_no_tilt_are_not_called_one(tmp_path, caplog):
    shifts = np.random.default_rng(0).uniform(-1, 1, (SIZE[0], 3)) * [1, 1, 0]
    slices = Slices(np.array([-20.0, 12.5, 101.25]) + np.arange(SIZE[0])[:, None] * np.array([0, 0, 2.5]) + shifts)
    scan = scans.read_scan(slices.save(tmp_path))
    assert "gantry" not in (text := warned(caplog))
    assert "shifted against each other, by up to" in text
    check_upright(scan, slices, error=1.5)
    image = as_image((organ(points_of(scan)) > 0).astype(np.uint8), scan.grid)
    check_mask_of_slices(sitk.GetArrayFromImage(image), slices)


def test_slices_so_near_that_the_regular_grid_would_be_endless_are_refused(tmp_path):
    heights = np.array([0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 90000, 180000, 270000])
    slices = Slices(np.array([-20.0, 12.5, 101.25]) + heights[:, None] * np.array([0, 0, 1.0]))
    slices.points = np.zeros_like(slices.points)
    refused_scan(slices.save(tmp_path), "promises 20 × 24 × 13500001")
