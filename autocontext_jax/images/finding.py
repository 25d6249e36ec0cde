"""The scans in a file, a DICOM folder or a tree of folders, and what lies beside them."""

import dataclasses
import logging
import os
import re
from pathlib import Path
from typing import Any

from autocontext_jax.errors import UserError
from autocontext_jax.files import exists, is_file
from autocontext_jax.images import reader_process
from autocontext_jax.images.formats import FORMATS, scan_name, suffix_of

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one scan is.

    Attributes:
      path: its file or DICOM folder.
      series: the series instance UID, in a folder with several series.
      name: of its mask, without suffix: the scan's path below the folder that was searched.
    """

    path: Path
    series: str | None
    name: Path

    def __str__(self) -> str:
        return str(self.path) if self.series is None else f"{self.path} ({self.name.name})"


def find_scans(place: str | os.PathLike, *, series: str | None = None) -> list[Source]:
    """The scans at a path, sorted: a file, or all in a folder and the folders in it.

    What is no scan is named in a warning. Names that begin with a dot are left out: what is hidden is another
    program's, or a file half written.

    Args:
      place: of the file or folder.
      series: the number, the description or the series instance UID of the one DICOM series to be found.

    Raises:
      UserError: there is nothing at the path, or no scan; no series, or several, are as named.
    """
    place = Path(place)
    if not exists(place):
        raise UserError(f"{place} does not exist: give a scan or a folder of scans")
    if place.is_dir():
        found = _in_folder(place, Path(), series)
    elif suffix_of(place):
        found = [Source(place, None, Path(scan_name(place)))]
    else:
        found = [Source(place, uid, Path(place.stem)) for uid in [series_of(place, series)]]
    if series is not None and not (len(found) == 1 and found[0].series):
        named = ", ".join(map(str, found[:5])) or "none"
        raise UserError(f"{place}: the series {series!r} is given; expected one DICOM series so named, found {named}")
    if found:
        return found
    raise UserError(
        f"{place} holds no scan: expected a file ({', '.join(FORMATS)}), a DICOM series, or a folder of those"
    )


def series_of(place: Path, series: str | None) -> str:
    """The identifier of the one series in a DICOM folder or file, or of the one that is named.

    Raises:
      UserError: there is none, or there are several; a file is damaged.
    """
    if not is_file(place) and not (exists(place) and place.is_dir()):
        raise UserError(f"{place} does not exist: give a scan file or a folder with a DICOM series")
    listed = reader_process.call("list_series", place)
    _name_others(place, listed)
    chosen = _chosen(listed, series)
    if len(chosen) == 1:
        return str(chosen[0]["uid"])
    if not listed["series"]:
        if place.is_dir():
            raise UserError(f"{place} holds no DICOM series: expected a folder with one")
        raise UserError(
            f"{place} is not a scan: expected {', '.join(FORMATS)}, a DICOM file or a folder of DICOM slices"
        )
    shown = "; ".join(map(_shown, chosen or listed["series"]))
    if series is None:
        raise UserError(
            f"{place} holds {len(chosen)} DICOM series: {shown}. Name one: --series NUMBER, in Python series="
        )
    raise UserError(
        f"{place} has {len(chosen) or 'no'} DICOM series {series!r}; it has {shown}. Give one of these UIDs"
    )


def _in_folder(folder: Path, below: Path, series: str | None) -> list[Source]:
    """The scans of a folder and of those in it; `below` is the folder's path from where the search began."""
    found: list[Source] = []
    rest = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += _in_folder(entry, below / entry.name, series)
        elif suffix_of(entry):
            if series is None:
                found.append(Source(entry, None, below / scan_name(entry)))
        else:
            rest.append(entry)
    if rest:
        found += _series_in(folder, below, series)
    return sorted(found, key=lambda source: (source.path, source.name))


def _series_in(folder: Path, below: Path, series: str | None) -> list[Source]:
    try:
        listed = reader_process.call("list_series", folder)
    except UserError:
        return [
            Source(folder, None, below if below.name else Path(folder.name))
        ]  # to be refused by itself when it is read
    _name_others(folder, listed)
    if strangers := [name for name in listed["strangers"] if not suffix_of(Path(name))]:
        shown = ", ".join(strangers[:5]) + f" and {len(strangers) - 5} more" * (len(strangers) > 5)
        log.warning("%s: left out, as no scans by name or content: %s", folder, shown)
    chosen = _chosen(listed, series)
    name = below if below.name else Path(folder.name)
    if len(chosen) == 1 and len(listed["series"]) - sum(bool(entry["left_out"]) for entry in listed["series"]) <= 1:
        return [Source(folder, chosen[0]["uid"], name)]
    return [Source(folder, entry["uid"], below / _name(entry, chosen)) for entry in chosen]


def _chosen(listed: dict[str, Any], series: str | None) -> list[dict[str, Any]]:
    if series is None:
        return [entry for entry in listed["series"] if not entry["left_out"]]
    return [e for e in listed["series"] if series in (e["uid"], str(e["number"]), e["description"])]


def _name(entry: dict[str, Any], among: list[dict[str, Any]]) -> str:
    """A file name for a series: its number and description, and what tells it from others that have the same."""
    words = re.sub(r"[^\w.+-]+", "_", f"{entry['number']}_{entry['description']}").strip("_.")
    same = [e for e in among if (e["number"], e["description"]) == (entry["number"], entry["description"])]
    return words if len(same) == 1 else f"{words}_{same.index(entry) + 1}"


def _name_others(place: Path, listed: dict[str, Any]) -> None:
    """Names what lies beside the scans and is none."""
    left = [f"{name} ({what})" for name, what in sorted(listed["others"].items())]
    left += [f"{_shown(entry)} ({entry['left_out']})" for entry in listed["series"] if entry["left_out"]]
    if left:
        more = f" and {len(left) - 5} more" * (len(left) > 5)
        log.warning("%s: left out: %s%s", place, "; ".join(left[:5]), more)


def _shown(entry: dict[str, Any]) -> str:
    """A series as messages name it."""
    description = f" {entry['description']!r}" if entry["description"] else ""
    return f"series {entry['number']}{description}, {entry['planes']} image(s), first {entry['first']}, {entry['uid']}"
