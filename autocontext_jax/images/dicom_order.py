"""DICOM planes -> one stack: those that do not belong to it are named, the others ordered by where they lie."""

import collections
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from autocontext_jax.errors import UserError, some
from autocontext_jax.images.checks import RIGHT_ANGLE, make_grid, numbers
from autocontext_jax.images.dicom_planes import Plane, whole
from autocontext_jax.images.dicom_voxels import stored_values
from autocontext_jax.images.grid import Grid
from autocontext_jax.images.stack import IN_PLANE, Stack, along

log = logging.getLogger(__name__)

# A distance between planes above this many times the median is a gap, if at most this share of distances is, and no
# run of so many: a protocol that changes its distance does so for many planes.
_GAP, _SHARE, _RUN = 1.5, 0.2, 3
_SAME = 0.01  # mm: planes at one position
_FEW = 3  # planes across all others are a localizer, though they do not say so


def arrange(place: Path, folder: Path, planes: Sequence[Plane]) -> tuple[list[Plane], Grid]:
    """The planes of one stack from bottom to top along their normal, and its grid.

    Args:
      place: the folder or file, as messages name it.
      folder: of the files.
      planes: of one series.

    Raises:
      UserError: planes lack what places them, contradict each other, lie at one position, or are missing.
    """
    planes = _without_localizers(place, folder, planes)
    _check_equal(place, planes, _BELONGS)
    planes = _without_copies(place, folder, planes)
    if any(not mm > 0 for mm in planes[0].spacing or ()):
        raise UserError(f"{folder / planes[0].name} has the PixelSpacing {planes[0].spacing}: expected mm above 0")
    along_i, along_j, normal = _axes(folder, planes[0])
    heights = np.array([np.dot(normal, plane.position or ()) for plane in planes])
    order = np.argsort(heights, kind="stable")
    planes, heights = [planes[number] for number in order], heights[order]
    _check_single(place, planes, heights)
    _check_equal(place, planes, _LIES)  # two phases can differ in these
    _check_gaps(place, planes, heights)

    y, x = planes[0].spacing or (0.0, 0.0)
    positions = np.array([plane.position for plane in planes])
    offsets = (positions - positions[0]) @ np.column_stack([along_i, along_j])
    z, stack = _spacing(place, folder, planes, heights, offsets, (x, y))
    first = positions[0]
    size = (*planes[0].size, len(planes))
    if stack is not None:
        size = stack.regular_size
        first = positions[0] - along_i * stack.offsets[0][0] - along_j * stack.offsets[0][1]
    direction = np.column_stack([along_i, along_j, normal])
    grid = make_grid(place, size, (x, y, z), first.tolist(), (direction + 0.0).ravel().tolist(), stack=stack)
    return planes, grid


def _without_localizers(place: Path, folder: Path, planes: Sequence[Plane]) -> list[Plane]:
    """The planes of the stack: of the orientation that most have. Localizers among them are named."""
    scanned = [plane for plane in planes if not plane.localizer] or list(planes)
    left = [plane for plane in planes if plane.localizer] if len(scanned) < len(planes) else []
    for what, element in (("position", "ImagePositionPatient"), ("orientation", "ImageOrientationPatient"),
                          ("spacing", "PixelSpacing")):  # fmt: skip
        if lacking := [plane for plane in scanned if getattr(plane, what) is None]:
            raise UserError(
                f"{folder / lacking[0].name} has no {element}: expected it in every slice, as nothing else says where "
                "the voxels lie; export the series again"
            )
    groups: list[list[Plane]] = []
    for plane in scanned:
        for group in groups:
            if np.allclose(plane.orientation or (), group[0].orientation or (), rtol=0.0, atol=RIGHT_ANGLE):
                group.append(plane)
                break
        else:
            groups.append([plane])
    groups.sort(key=len, reverse=True)
    stack = groups[0]
    for group in groups[1:]:
        if len(group) > _FEW or len(group) >= len(stack) or not _across(stack[0], group[0]):
            found, expected = (numbers(plane.orientation or ()) for plane in (group[0], stack[0]))
            raise UserError(
                f"{place}: {group[0].name} has the orientation {found}, and {stack[0].name} has {expected}: expected "
                "one orientation in a series; give each a folder of its own"
            )
        left += group
    if left:
        log.warning("%s: left out as localizers, by what they say or as they lie across the slices: %s",
                    place, some(plane.name for plane in left))  # fmt: skip
    return stack


def _across(plane: Plane, other: Plane) -> bool:
    """Whether planes meet at more than 45 degrees."""
    a, b = (np.cross(*np.array(one.orientation).reshape(2, 3)) for one in (plane, other))
    return abs(np.dot(a, b)) < np.cos(np.pi / 4) * np.linalg.norm(a) * np.linalg.norm(b)


# What must be the same in all planes.
_BELONGS: dict[str, Callable[[Plane], str]] = {
    "Rows × Columns": lambda plane: f"{plane.size[1]} × {plane.size[0]}",
    "PixelSpacing": lambda plane: numbers(plane.spacing or ()),
    "PatientID": lambda plane: plane.patient,
    "PatientName": lambda plane: plane.patient_name,
    "Modality": lambda plane: str(plane.dataset.get("Modality") or ""),
}
_LIES: dict[str, Callable[[Plane], str]] = {
    "FrameOfReferenceUID": lambda plane: plane.frame_of_reference,
    "SeriesNumber": lambda plane: str(whole(plane.dataset, "SeriesNumber", 0) or ""),
}


def _check_equal(place: Path, planes: Sequence[Plane], properties: dict[str, Callable[[Plane], str]]) -> None:
    """Refuses planes that contradict each other; the value that most have counts as right."""
    for name, get in properties.items():
        found = collections.Counter(value for plane in planes if (value := get(plane)))
        if len(found) < 2:
            continue
        (usual, _), *_ = found.most_common(1)
        other = next(plane for plane in planes if get(plane) == usual)
        odd = [plane for plane in planes if get(plane) not in ("", usual)]
        if name == "PixelSpacing":  # which files round in several ways
            odd = [plane for plane in odd if not np.allclose(plane.spacing or (), other.spacing or (), rtol=1e-4)]
        if odd:
            raise UserError(
                f"{place}: {odd[0].name} has the {name} {get(odd[0])}, and {other.name} has {usual}: expected one "
                "value in a series; move what does not belong to it away"
            )


def _without_copies(place: Path, folder: Path, planes: Sequence[Plane]) -> list[Plane]:
    """Without second files of one and the same image, which are named."""
    kept: dict[tuple[str, int], Plane] = {}
    left = []
    for plane in planes:
        first = kept.setdefault(plane.identity if plane.identity[0] else (plane.name, plane.frame), plane)
        if first is plane:
            continue
        same = all(getattr(first, name) == getattr(plane, name) for name in ("position", "slope", "intercept"))
        if not same or not np.array_equal(stored_values(folder, first), stored_values(folder, plane)):
            raise UserError(
                f"{place}: {first.name} and {plane.name} have the same SOPInstanceUID and differ: expected an "
                "identifier of its own for each; move the wrong one away"
            )
        left.append(plane)
    if left:
        log.warning("%s: left out as exact copies of other files: %s", place, some(plane.name for plane in left))
    return list(kept.values())


def _axes(folder: Path, plane: Plane) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors along i, along j and along the normal."""
    along_i, along_j = np.array(plane.orientation).reshape(2, 3)
    lengths = np.linalg.norm(along_i), np.linalg.norm(along_j)
    if not np.allclose([*lengths, np.dot(along_i, along_j)], [1, 1, 0], rtol=0.0, atol=RIGHT_ANGLE):
        raise UserError(
            f"{folder / plane.name} has the ImageOrientationPatient {numbers(plane.orientation or ())}: expected unit "
            "vectors at right angles; export the series again"
        )
    along_i = along_i / lengths[0]
    along_j = along_j - np.dot(along_i, along_j) * along_i
    along_j = along_j / np.linalg.norm(along_j)
    return along_i, along_j, np.cross(along_i, along_j)


def _check_single(place: Path, planes: Sequence[Plane], heights: np.ndarray) -> None:
    """Refuses several planes at one position."""
    new = np.concatenate([[True], np.diff(heights) > _SAME])
    counts = np.bincount(np.cumsum(new) - 1)
    if counts.max() == 1:
        return
    first = int(np.flatnonzero(~new)[0])
    one, other = planes[first - 1], planes[first]
    pair = f"{one.name} and {other.name}"
    if (counts > 1).sum() * 2 >= len(counts) > 1:
        raise UserError(
            f"{place} holds {counts.max()} images at each position, such as {pair}: phases or echoes in one series; "
            "expected one image at each; export each phase as a series of its own"
        )
    where = [numbers(plane.position or ()) for plane in (one, other)]
    if np.allclose(one.position or (), other.position or (), rtol=0.0, atol=_SAME):
        raise UserError(
            f"{place}: {pair} lie at the same position, {where[0]} mm: a double slice; expected one; move one away"
        )
    raise UserError(
        f"{place}: {pair} lie in one plane, at {where[0]} and {where[1]} mm: expected slices one above the other; move "
        "away what is no part of the scan"
    )


def _check_gaps(place: Path, planes: Sequence[Plane], heights: np.ndarray) -> None:
    """Refuses a stack that lacks planes."""
    distances = np.diff(heights)
    if len(distances) < 3:
        return
    usual = float(np.median(distances))
    large = distances > _GAP * usual
    runs = np.convolve(large, np.ones(_RUN), "valid") >= _RUN if len(large) >= _RUN else np.array([])
    even_run = runs.any() and np.ptp(distances[large]) < 0.1 * usual
    if not large.any() or large.sum() > max(1, _SHARE * len(large)) or even_run:
        alone = _alone(distances)
        large = large | alone if alone.any() and not even_run else alone
    if not large.any():
        return
    gaps = np.flatnonzero(large)
    at = int(gaps[0])
    sides = [distances[side] for gap in gaps for side in (gap - 1, gap + 1) if 0 <= side < len(distances)]
    usual = min(usual, float(np.median(sides)))
    missing = int(np.maximum(np.rint(distances[large] / usual) - 1, 1).sum())
    raise UserError(
        f"{place} lacks {missing} slice(s){', the first' * (len(gaps) > 1)} between {planes[at].name} and "
        f"{planes[at + 1].name}, which are {distances[at]:.6g} mm apart: expected {usual:.6g} mm, as most are; copy or "
        "export what is missing"
    )


def _alone(distances: np.ndarray) -> np.ndarray:
    """Which distances are gaps among distances that are equal on each side of them."""
    found = np.zeros(len(distances), bool)
    for at, distance in enumerate(distances):
        sides = [side for side in (distances[max(0, at - 2) : at], distances[at + 1 : at + 3]) if len(side)]
        even = all(np.ptp(side) < 0.1 * side.min() for side in sides)
        found[at] = even and distance > _GAP * max(side.max() for side in sides)
    return found


def _spacing(
    place: Path,
    folder: Path,
    planes: Sequence[Plane],
    heights: np.ndarray,
    offsets: np.ndarray,
    spacing: tuple[float, float],
) -> tuple[float, Stack | None]:
    """Mm between the planes of the grid, and the stack where the slices are no such grid."""
    if len(planes) == 1:
        if not planes[0].thickness:
            raise UserError(
                f"{folder / planes[0].name} is a single slice without SliceThickness: expected it above 0, as nothing "
                "else says how thick the slice is; export it again"
            )
        return planes[0].thickness, None
    distances = np.diff(heights)
    even = heights[0] + np.arange(len(heights)) * (heights[-1] - heights[0]) / (len(heights) - 1)
    straight = np.ptp(offsets, axis=0).max() <= IN_PLANE
    regular = np.abs(heights - even).max() <= along(float(distances.mean()))
    z = float(distances.mean() if regular else np.median(distances))
    if straight and regular:
        return z, None
    shifts = np.zeros_like(offsets) if straight else offsets - offsets.min(axis=0)
    columns, rows = planes[0].size
    stack = Stack(
        tuple((heights - heights[0]).tolist()),
        tuple((i, j) for i, j in shifts.tolist()),
        (columns, rows),
        (*spacing, z),
    )
    if not straight:
        line = np.outer((heights - heights[0]) / (heights[-1] - heights[0]), offsets[-1])
        tilted = np.abs(offsets - line).max() <= IN_PLANE
        how = f"as by a gantry tilted by {stack.tilt:.1f} degrees" if tilted else f"by up to {shifts.max():.3g} mm"
        goes = "is sheared as they are in NIfTI, upright in other files" if stack.even else "of a file is upright too"
        log.warning(
            "%s: the slices are shifted against each other, %s: the network sees them upright, interpolated; the mask "
            "%s", place, how, goes,
        )  # fmt: skip
    if not regular:
        log.warning(
            "%s: the distances between slices are %.6g to %.6g mm: the network sees slices interpolated at %.6g mm; "
            "the mask of a file lies on these", place, distances.min(), distances.max(), z,
        )  # fmt: skip
    return z, stack
