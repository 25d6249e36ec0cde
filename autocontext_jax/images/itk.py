"""What every reader through SimpleITK shares: its errors, a file's grid, and limits checked before memory is taken."""

import contextlib
import math
import os
import re
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from autocontext_jax import runtime
from autocontext_jax.errors import UserError
from autocontext_jax.images.grid import Grid

# Components of unit vectors: axes are at right angles within it.
RIGHT_ANGLE = 1e-3

# A header that promises more is refused before memory is taken: 2000 slices of 1024 x 1024 are half of it. The
# environment variable AUTOCONTEXT_MAX_VOXELS sets another limit.
MAX_VOXELS = 4_000_000_000


UNREADABLE = "read: it is truncated, damaged or not what its name says; copy or export it again"


@contextlib.contextmanager
def itk_errors(path: Path, failure: str) -> Iterator[None]:
    """Silences ITK's warnings; turns its many-lined exceptions, and those of the file system, into one UserError."""
    runtime.silence_itk()
    try:
        yield
    except (RuntimeError, OSError, EOFError, ValueError, zlib.error) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].removeprefix("sitk::ERROR: ")
        raise UserError(f"{path} cannot be {failure} ({reason})") from None


def grid_of(path: Path, source: sitk.Image | sitk.ImageFileReader) -> Grid:
    """The grid of an image or of a header.

    Raises:
      UserError: spacing or origin are not finite, or the axes are not at right angles.
    """
    matrix = np.array(source.GetDirection()).reshape(3, 3)
    spacing, origin = source.GetSpacing(), source.GetOrigin()
    if not (np.isfinite([*spacing, *origin]).all() and min(spacing) > 0):
        raise UserError(
            f"{path} has the spacing {numbers(spacing)} and the origin {numbers(origin)}: expected finite mm, spacing "
            "above 0; correct its header"
        )
    if not np.allclose(matrix @ matrix.T, np.eye(3), rtol=0.0, atol=RIGHT_ANGLE):
        raise UserError(
            f"{path} has the direction {numbers(matrix.ravel())}, whose axes are not at right angles (a tilted "
            "gantry?): resample it to a rectangular grid"
        )
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(source.GetDirection())
    return Grid(source.GetSize(), source.GetSpacing(), source.GetOrigin(), source.GetDirection(), code)


def check_kind(path: Path, size: tuple[int, ...], components: int) -> None:
    """Refuses images that are not 3D with one value a voxel.

    Raises:
      UserError: it is not.
    """
    if len(size) != 3 or components != 1:
        raise UserError(
            f"{path} is a {len(size)}D image of {' × '.join(map(str, size))} with {components} value(s) a voxel: "
            "expected a 3D image with one; export a single volume"
        )


def check_size(path: Path, size: tuple[int, ...]) -> None:
    """Refuses more voxels than `MAX_VOXELS`, or than the environment variable says, before memory is allocated.

    Raises:
      UserError: there are more.
    """
    given = os.environ.get("AUTOCONTEXT_MAX_VOXELS", str(MAX_VOXELS))
    if not re.fullmatch(r"[0-9]{1,18}", given):
        raise UserError(f"the environment variable AUTOCONTEXT_MAX_VOXELS is {given!r}: expected a number of voxels")
    if math.prod(size) > int(given):
        raise UserError(
            f"{path} promises {' × '.join(map(str, size))} = {math.prod(size):.3g} voxels: expected at most {given}; "
            "if it is no mistake, set the environment variable AUTOCONTEXT_MAX_VOXELS to more"
        )


def not_finite(path: Path, count: int) -> UserError:
    """The refusal of a file with voxels that are not finite."""
    return UserError(f"{path} holds {count} voxels that are not finite: expected numbers everywhere; export it again")


def numbers(values: Collection[float]) -> str:
    """Numbers as messages show them."""
    return f"({', '.join(f'{value:.6g}' for value in values)})"
