"""DICOM series in a folder, or in one file, through pydicom.

A series is what has one series instance UID. Its planes are ordered by where they lie; all that a plane says of itself
(values, spacing, orientation, patient) is its own and must agree with the others'.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from autocontext_jax.errors import UserError
from autocontext_jax.images.checks import check_size
from autocontext_jax.images.dicom_order import arrange
from autocontext_jax.images.dicom_planes import NO_SCANS, Plane, is_colour, is_image, planes_of, read_dataset, whole
from autocontext_jax.images.dicom_voxels import read_values
from autocontext_jax.images.grid import Grid

log = logging.getLogger(__name__)

# A series of fewer planes beside one of at least as many is a localizer, a test of contrast, a picture of the table.
FEW = 4


def list_series(place: Path) -> dict[str, Any]:
    """The series of a folder or of one file.

    Returns:
      `series`: for each, by number, its uid, number, description, count of planes and first file; those that are left
      out unless they are named have the reason under `left_out`. `others`: names of DICOM files that hold no scan, with
      what they hold. `strangers`: names of files that are not DICOM.

    Raises:
      UserError: a file is damaged.
    """
    seen = _state(place)
    _last.clear()
    found, others, strangers = _last[seen] = _files(place)
    listed: list[dict[str, Any]] = []
    unfit = {}
    for uid, files in found.items():
        dataset, planes = files[0][1], _first_planes(files)
        listed.append(
            {
                "uid": uid,
                "number": whole(dataset, "SeriesNumber", 0),
                "description": _description(dataset),
                "planes": sum(max(1, whole(file, "NumberOfFrames", 1)) for _, file in files),
                "left_out": _localizer(files, planes),
                "first": files[0][0].name,
            }
        )
        unfit[uid] = _unfit(files, planes)
    # What cannot be a scan is left out beside one that can; alone it is refused when it is read.
    scans = [entry for entry in listed if not entry["left_out"] and not unfit[entry["uid"]]]
    most = max((entry["planes"] for entry in scans), default=0)
    for entry in listed if scans else []:
        if not entry["left_out"] and entry["planes"] < FEW <= most:
            entry["left_out"] = f"few beside the {most} of another series"
        entry["left_out"] = entry["left_out"] or unfit[entry["uid"]]
    listed.sort(key=lambda entry: (entry["number"], entry["uid"]))
    return {"series": listed, "others": others, "strangers": strangers}


def read_series(place: Path, uid: str | None, *, header_only: bool = False) -> tuple[np.ndarray | None, Grid]:
    """The voxels of one series, [k, j, i], with values as the planes scale them, and their grid.

    Args:
      place: a folder, or one file.
      uid: of the series.
      header_only: the voxels are not read.

    Raises:
      UserError: a file is damaged; the planes do not belong together, or do not make one stack without gaps.
    """
    seen = _state(place)
    found, _, _ = _last.pop(seen) if seen in _last else _files(place)
    folder = place if place.is_dir() else place.parent
    planes = [plane for path, dataset in found.get(uid or "", []) for plane in planes_of(path, dataset)]
    if not planes:
        raise UserError(f"{place} holds no DICOM series {uid}: expected a folder with one")
    ordered, grid = arrange(place, folder, planes)
    columns, rows = ordered[0].size
    for size in (columns, rows, len(ordered)), grid.size:
        check_size(place, size)
    if header_only:
        return None, grid
    voxels = read_values(folder, ordered)
    return (voxels if grid.stack is None else grid.stack.to_regular(voxels)), grid


_Files = list[tuple[Path, Any]]
_Found = tuple[dict[str, _Files], dict[str, str], list[str]]

# What was found last, by the state of its files: a series is listed, then read, and its headers are read once.
_last: dict[tuple, _Found] = {}


def _state(place: Path) -> tuple:
    """What changes when a folder or a file does."""
    files = [(path.name, path.stat()) for path in (place.iterdir() if place.is_dir() else [place]) if path.exists()]
    return place.absolute(), *sorted((name, file.st_ino, file.st_size, file.st_mtime_ns) for name, file in files)


def _files(place: Path) -> _Found:
    """The images by series, other DICOM objects, and the names of other files; not those that are hidden."""
    images: dict[str, _Files] = {}
    others: dict[str, str] = {}
    strangers = []
    for path in sorted(place.iterdir()) if place.is_dir() else [place]:
        if path.name.startswith(".") or not path.is_file() or path.name.upper() == "DICOMDIR":
            continue
        if (dataset := read_dataset(path)) is None:
            strangers.append(path.name)
        elif is_image(dataset):
            images.setdefault(str(dataset.SeriesInstanceUID), []).append((path, dataset))
        else:
            modality = str(dataset.get("Modality", "")) or "no modality"
            others[path.name] = f"{modality}, {NO_SCANS.get(modality, 'no image')}"
    return images, others, strangers


def _description(dataset: Any) -> str:
    try:
        return " ".join(str(dataset.get("SeriesDescription") or "").split())
    except Exception:  # pydicom raises many kinds; a name is not worth a refusal
        return ""


def _first_planes(files: _Files) -> list[Plane]:
    """The first plane of each of the first files; none if a file is damaged, which is told when the series is read."""
    try:
        return [planes_of(path, dataset)[0] for path, dataset in files[:FEW]]
    except UserError:
        return []


def _localizer(files: _Files, planes: list[Plane]) -> str:
    return "a localizer" if len(files) <= FEW and planes and all(plane.localizer for plane in planes) else ""


def _unfit(files: _Files, planes: list[Plane]) -> str:
    """Why a series is certainly no scan."""
    if all(is_colour(dataset) for _, dataset in files):
        return "colour images"
    return "images without a place in the patient" if planes and not any(plane.position for plane in planes) else ""
