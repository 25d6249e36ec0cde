"""What every reader checks and says alike: the kind and size of an image, where it lies, its values."""

import contextlib
import math
import os
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from autocontext_jax.errors import UserError
from autocontext_jax.images.grid import Grid, NiftiForms
from autocontext_jax.images.stack import Stack

# Components of unit vectors: axes are at right angles within it.
RIGHT_ANGLE = 1e-3

# A header that promises more is refused before memory is taken: 2000 slices of 1024 x 1024 are half of it. The
# environment variable AUTOCONTEXT_MAX_VOXELS sets another limit.
MAX_VOXELS = 4_000_000_000

UNPACKING: Any = isal_zlib.error
DEFLATE = 1032  # no byte that deflate packed holds more bytes than these


@contextlib.contextmanager
def as_user_error(path: Path, failure: str) -> Iterator[None]:
    """Turns what libraries and the file system raise into one UserError."""
    try:
        yield
    except (RuntimeError, OSError, EOFError, ValueError, zlib.error, UNPACKING) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].removeprefix("sitk::ERROR: ")
        raise UserError(f"{path} cannot be {failure} ({reason})") from None
    except MemoryError:
        raise UserError(
            f"{path} needs more memory than there is: it is damaged, or too large for this machine"
        ) from None


def make_grid(
    path: Path,
    size: Sequence[int],
    spacing: Sequence[float],
    origin: Sequence[float],
    direction: Sequence[float],
    forms: NiftiForms | None = None,
    stack: Stack | None = None,
) -> Grid:
    """A grid of finite numbers and axes at right angles; the arguments are its fields.

    Raises:
      UserError: spacing or origin are not finite, or the axes are not at right angles.
    """
    if not (np.isfinite([*spacing, *origin]).all() and min(spacing) > 0):
        raise UserError(
            f"{path} has the spacing {numbers(spacing)} and the origin {numbers(origin)}: expected finite mm, spacing "
            "above 0; correct its header"
        )
    matrix = np.array(direction).reshape(3, 3)
    if not np.allclose(matrix.T @ matrix, np.eye(3), rtol=0.0, atol=RIGHT_ANGLE):
        raise UserError(
            f"{path} has the direction {numbers(direction)}, whose axes are not at right angles: resample it to a "
            "rectangular grid"
        )
    i, j, k = size
    return Grid(
        (i, j, k), _three(spacing), _three(origin), tuple(map(float, direction)), _orientation(matrix), forms, stack
    )


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = map(float, values)
    return x, y, z


def _orientation(matrix: np.ndarray) -> str:
    """Where i, j, k point: for each the patient's axis that is nearest, each patient's axis once."""
    letters, left = [""] * 3, np.abs(matrix)
    for _ in range(3):
        row, column = np.unravel_index(np.argmax(left), left.shape)
        letters[column] = "RAI LPS"[int(row) + 4 * bool(matrix[row, column] > 0)]
        left[row, :] = left[:, column] = -1
    return "".join(letters)


def check_kind(path: Path, size: Sequence[int], components: int, *, expected: int | None = 1) -> None:
    """Refuses images that are not 3D, or have another number of values a voxel; None expects any number.

    Raises:
      UserError: it is not.
    """
    if len(size) != 3 or expected not in (None, components):
        raise UserError(
            f"{path} is a {len(size)}D image of {' × '.join(map(str, size))} with {components} value(s) a voxel: "
            f"expected a 3D image with {'one' if expected == 1 else expected}; export a single volume"
        )


def check_size(path: Path, size: Sequence[int]) -> None:
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


def check_packing(path: Path, expected: int, held: int) -> None:
    """Refuses a header that promises more bytes than any packing gets into the bytes that the file holds.

    Raises:
      UserError: it does.
    """
    if expected > held * DEFLATE:
        raise UserError(
            f"{path} has {held} bytes and promises {expected}, more than any packing gets into so few: it is truncated "
            "or its header damaged; copy or export it again"
        )


def not_finite(path: Path | str, count: int) -> UserError:
    """The refusal of a file with voxels that are not finite."""
    return UserError(f"{path} holds {count} voxels that are not finite: expected numbers everywhere; export it again")


def numbers(values: Collection[float]) -> str:
    """Numbers as messages show them."""
    return f"({', '.join(f'{value:.6g}' for value in values)})"
