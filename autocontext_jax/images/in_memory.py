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
      array: [D, H, W], numbers.
      spacing: mm along the array's axes.
      direction: [3, 3]; column j is the unit vector of the array's axis j, its rows are the patient's axes (z, y, x),
        which point to superior, posterior and left. None means the identity.

    Raises:
      UserError: the array is not 3D, or its values are no numbers; the spacing is not three numbers above 0; the
        direction is not 3×3.
    """
    array = np.asarray(array)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim != 3 or not array.size:
        raise UserError(f"the array has the shape {array.shape}; expected a scan, [D, H, W]")
    if array.dtype == bool or array.dtype.kind not in "iuf":
        raise UserError(f"the array is of the type {array.dtype}; expected integers or floats")
    if array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8):  # ITK has no other floats
        array = array.astype(np.float32)
    mm, matrix = _numbers(spacing), np.eye(3) if direction is None else _numbers(direction)
    if mm.shape != (3,) or not (np.isfinite(mm).all() and (mm > 0).all()):
        raise UserError(f"the spacing of the array is {spacing}; expected (z, y, x) in mm, above 0")
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise UserError(f"the direction of the array is {direction}; expected 3 rows of 3 numbers")
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
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
    """A canonical array as an image on a grid.

    Args:
      voxels: [D, H, W], or [D, H, W, C] for C values a voxel; the first axes are `grid.canonical_size`.
      grid: of the scan.
    """
    if voxels.shape[:3] != grid.canonical_size:
        raise ValueError(f"an array of shape {voxels.shape} for a grid of {grid.canonical_size}")
    image = sitk.GetImageFromArray(grid.from_canonical(voxels), isVector=voxels.ndim == 4)
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    return image
