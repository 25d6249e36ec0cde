"""Scans and masks in memory: arrays and SimpleITK images, in the orientation that their owner gave them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk

from autocontext_jax.errors import UserError
from autocontext_jax.images.grid import Grid

Image = sitk.Image


def image_of_array(array: np.ndarray, spacing: Sequence[float], direction: Sequence[Sequence[float]] | None) -> Image:
    """An array as an image.

    Args:
      array: [D, H, W], or of several channels [C, D, H, W]; numbers.
      spacing: mm along the array's axes.
      direction: [3, 3]; column j is the unit vector of the array's axis j, its rows are the patient's axes (z, y, x),
        which point to superior, posterior and left. None means the identity.

    Raises:
      UserError: the array is not 3D or 4D, or its values are no numbers; the spacing is not three numbers above 0; the
        direction is not 3×3.
    """
    array = np.asarray(array)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim not in (3, 4) or not array.size:
        raise UserError(
            f"the array has the shape {array.shape}; expected a scan, [D, H, W], or of several channels [C, D, H, W]"
        )
    if array.dtype == bool or array.dtype.kind not in "iuf":
        raise UserError(f"the array is of the type {array.dtype}; expected integers or floats")
    if array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8):  # ITK has no other floats
        array = array.astype(np.float32)
    mm, matrix = _numbers(spacing), np.eye(3) if direction is None else _numbers(direction)
    if mm.shape != (3,) or not (np.isfinite(mm).all() and (mm > 0).all()):
        raise UserError(f"the spacing of the array is {spacing}; expected (z, y, x) in mm, above 0")
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise UserError(f"the direction of the array is {direction}; expected 3 rows of 3 numbers")
    voxels = np.ascontiguousarray(np.moveaxis(array, 0, -1) if array.ndim == 4 else array)
    image = sitk.GetImageFromArray(voxels, isVector=array.ndim == 4)
    image.SetSpacing(mm[::-1].tolist())
    try:
        image.SetDirection(matrix[::-1, ::-1].ravel().tolist())
    except RuntimeError:
        raise UserError(
            f"the direction of the array is {direction}; expected unit vectors at right angles to each other"
        ) from None
    return image


def _numbers(given: Any) -> np.ndarray:
    """An array of what was given; without elements if that is no array of numbers."""
    try:
        return np.array(given, float)
    except (TypeError, ValueError):
        return np.array([])


def as_image(voxels: np.ndarray, grid: Grid) -> Image:
    """A canonical array as an image on a grid; of DICOM slices that are no regular grid an image of these slices.

    Such an image has one plane for each slice, from bottom to top. Where a tilted gantry has shifted the slices evenly,
    its direction is sheared and places them. Where their distances differ, no image can place them: it has the median
    distance, and its metadata `slice_heights` has the mm of each slice from the first along their normal.

    Args:
      voxels: [D, H, W], or [D, H, W, C] for C values a voxel; the first axes are `grid.canonical_size`.
      grid: of the scan.
    """
    if voxels.shape[:3] != grid.canonical_size:
        raise ValueError(f"an array of shape {voxels.shape} for a grid of {grid.canonical_size}")
    stored = grid.from_canonical(voxels)
    if grid.stack is not None:
        stored = grid.stack.to_slices(stored)
    image = sitk.GetImageFromArray(stored, isVector=voxels.ndim == 4)
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    if grid.stack is not None and grid.stack.even:
        affine = sheared_affine(grid)
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetOrigin(affine[:3, 3].tolist())
        image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    elif grid.stack is not None:
        image.SetMetaData("slice_heights", " ".join(f"{height:.6g}" for height in grid.stack.heights))
    return image


def sheared_affine(grid: Grid) -> np.ndarray:
    """From (i, j, k) of evenly shifted slices to LPS, mm, [4, 4]."""
    assert grid.stack is not None
    axes = np.array(grid.direction).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :2] = axes[:, :2] * grid.spacing[:2]
    affine[:3, 2] = axes @ grid.stack.step
    affine[:3, 3] = np.array(grid.origin) + axes[:, :2] @ grid.stack.offsets[0]
    return affine


def array_of_image(image: Image) -> np.ndarray:
    """The voxels of an image, [k, j, i] or [k, j, i, C]."""
    return sitk.GetArrayFromImage(image)
