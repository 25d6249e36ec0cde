"""The scans in a file, a DICOM folder or a tree of folders, and what lies beside them."""

import collections
import dataclasses
import glob
import logging
import os
import re
from pathlib import Path
from typing import Any

from autocontext_jax.errors import UserError, some
from autocontext_jax.files import exists, is_file
from autocontext_jax.images import reader_process
from autocontext_jax.images.formats import FORMATS, PICTURES, scan_name, suffix_of

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one scan is.

    Attributes:
      path: its file or DICOM folder; of several channels the first one's.
      others: the files of further channels.
      series: the series instance UID, in a folder with several series.
      name: of its mask, without suffix: the scan's path below the folder that was searched.
    """

    path: Path
    series: str | None
    name: Path
    others: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All its files, or its DICOM folder."""
        return (self.path, *self.others)

    def __str__(self) -> str:
        return str(self.path) if self.series is None else f"{self.path} ({self.name.name})"


def find_scans(place: str | os.PathLike, *, series: str | None = None, channels: int = 1) -> list[Source]:
    """The scans at a path, sorted: a file, or all in a folder and the folders in it.

    Of several channels, files that are named as nnU-Net's are one scan: `case_0000.nii.gz`, `case_0001.nii.gz`, ... In
    the place of a folder the first of them can be given.

    What is no scan is named in a warning. Names that begin with a dot are left out: what is hidden is another
    program's, or a file half written.

    Args:
      place: of the file or folder.
      series: the number, the description or the series instance UID of the one DICOM series to be found.
      channels: how many a scan has.

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
    if series is not None and not found:
        there = [source for source in _in_folder(place, Path(), None) if source.series is not None]
        shown = some((str(source.name) for source in there), most=10) or "none"
        raise UserError(
            f"{place} holds no DICOM series {series!r}: expected the number, description or UID of one of {shown}"
        )
    if series is not None and not (len(found) == 1 and found[0].series):
        named = some(map(str, found))
        raise UserError(
            f"{place}: the series {series!r} is given, and found is {named}: expected one DICOM series; give its UID "
            "or its own folder"
        )
    if found:
        found = _without_pictures(found)
        if channels > 1:
            found = _grouped(found, channels)
        else:
            _name_channels(found)
            found = _without_number(found)
        _name_split(found)
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
    if listed["series"]:
        _name_others(place, listed, series)
    chosen = _chosen(listed, series)
    if len(chosen) == 1:
        if not place.is_dir() and chosen[0]["planes"] == 1:
            log.warning("%s is a single slice and read by itself: for its whole series give the folder", place)
        return str(chosen[0]["uid"])
    if not listed["series"]:
        if place.is_dir():
            raise UserError(f"{place} holds no DICOM series: expected a folder with one")
        raise UserError(
            f"{place} is not a scan: expected {', '.join(FORMATS)}, a DICOM file or a folder of DICOM slices"
        )
    shown = "; ".join(map(_shown, chosen or listed["series"]))
    if series is None:
        found = f"{len(chosen)} DICOM series" if chosen else "no DICOM series that is a scan by itself"
        raise UserError(
            f"{place} holds {found}: {shown}; expected one: name it by --series NUMBER, in Python by series="
        )
    found = f"holds {len(chosen)} DICOM series" if chosen else "holds no DICOM series"
    raise UserError(f"{place} {found} {series!r}: {'it has ' * (not chosen)}{shown}; expected one: give its UID")


def _in_folder(folder: Path, below: Path, series: str | None, above: tuple[Path, ...] = ()) -> list[Source]:
    """The scans of a folder and of those in it.

    Args:
      folder: where to look.
      below: its path from where the search began.
      series: as in `find_scans`.
      above: the folders that it lies in, resolved: a link to one of them leads round and round.
    """
    found: list[Source] = []
    if (resolved := folder.resolve()) in above:
        log.warning("%s: left out, as it is a link to a folder that it lies in", folder)
        return found
    rest = []
    try:
        entries = [(entry, entry.is_dir()) for entry in sorted(folder.iterdir())]
    except OSError as error:
        if below == Path():
            raise UserError(f"{folder} cannot be read ({error.strerror}): change its permissions") from None
        log.warning("%s: left out, as it cannot be read (%s)", folder, error.strerror)
        return found
    for entry, is_folder in entries:
        if entry.name.startswith("."):
            continue
        if is_folder:
            found += _in_folder(entry, below / entry.name, series, (*above, resolved))
        elif suffix_of(entry):
            if series is None:
                found.append(Source(entry, None, below / scan_name(entry)))
        else:
            rest.append(entry)
    if rest:
        found += _series_in(folder, below, series)
    return sorted(found, key=lambda source: (source.path, source.name))


def _series_in(folder: Path, below: Path, series: str | None) -> list[Source]:
    name = below if below.name else Path(folder.resolve().name or "scan")
    try:
        listed = reader_process.call("list_series", folder)
    except UserError:
        if series is not None:
            raise
        return [Source(folder, None, name)]  # to be refused by itself when it is read
    _name_others(folder, listed, series)
    chosen = _chosen(listed, series)
    if len(chosen) == 1 and sum(not entry["left_out"] for entry in listed["series"]) <= 1:
        return [Source(folder, chosen[0]["uid"], name)]
    return [Source(folder, entry["uid"], below / words) for entry, words in zip(chosen, _names(chosen), strict=True)]


def _chosen(listed: dict[str, Any], series: str | None) -> list[dict[str, Any]]:
    if series is None:
        return [entry for entry in listed["series"] if not entry["left_out"]]
    series = " ".join(series.split())  # as descriptions are
    by_uid = [entry for entry in listed["series"] if entry["uid"] == series]
    return by_uid or [entry for entry in listed["series"] if series in (str(entry["number"]), entry["description"])]


def _names(entries: list[dict[str, Any]]) -> list[str]:
    """File names for series: their numbers and descriptions, and what tells them from others that have the same."""
    names = [re.sub(r"[^\w.+-]+", "_", f"{e['number']}_{e['description']}"[:100]).strip("_.") for e in entries]
    return [
        name if names.count(name) == 1 else f"{name}_{names[: at + 1].count(name)}" for at, name in enumerate(names)
    ]


def _grouped(found: list[Source], channels: int) -> list[Source]:
    """The scans; files with the numbers of all channels, as nnU-Net names them, and no others, are one.

    A file that is the only one of its name has all channels; its mask is named without the number too.
    """
    grouped: dict[Path, Source] = {}
    for source in found:
        name = scan_name(source.path)
        base, ending = name[:-5], source.path.name[len(name) :]
        numbered = re.fullmatch(r".+_\d{4}", name) and source.series is None
        beside = (
            sorted(source.path.parent.glob(f"{glob.escape(base)}_[0-9][0-9][0-9][0-9]{ending}")) if numbered else []
        )
        expected = [source.path.with_name(f"{base}_{number:04d}{ending}") for number in range(channels)]
        if beside in (expected, expected[:1]):
            first, *others = beside
            grouped.setdefault(first, Source(first, None, source.name.with_name(base), tuple(others)))
        else:
            grouped[source.path] = source
    return list(grouped.values())


def _without_number(found: list[Source]) -> list[Source]:
    """The scans of one channel: the mask of `case_0000.nii.gz` is named `case`, if no other file has that name."""
    bases = [source.name.with_name(re.sub(r"(?<=.)_\d{4}$", "", source.name.name)) for source in found]
    count = collections.Counter(bases)

    def renamed(source: Source, base: Path) -> Source:
        first = source.name.name.endswith("_0000") and source.series is None
        return dataclasses.replace(source, name=base) if first and count[base] == 1 else source

    return [renamed(source, base) for source, base in zip(found, bases, strict=True)]


def _without_pictures(found: list[Source]) -> list[Source]:
    """The scans without the pictures that lie among them, which are named: previews, say."""
    pictures = [source for source in found if suffix_of(source.path) in PICTURES]
    if not pictures or len(pictures) == len(found):
        return found
    log.warning("left out, as pictures among scans: %s", some(str(source.path) for source in pictures))
    return [source for source in found if source not in pictures]


def _name_channels(found: list[Source]) -> None:
    """Names files that nnU-Net would take for further channels of a scan beside them."""
    files = {source.path for source in found if source.series is None}
    for path in sorted(files):
        name = scan_name(path)
        first = path.with_name(path.name.replace(name, f"{name[:-4]}0000", 1))
        if re.fullmatch(r".+_\d{4}", name) and path != first and first in files:
            log.warning(
                "%s is taken for a scan of its own: if it is a further channel of %s, its mask means nothing, as one "
                "channel is expected", path, first.name,
            )  # fmt: skip


def _name_split(found: list[Source]) -> None:
    """Names series that lie in several folders: such are copies, or one scan that was taken apart."""
    folders: dict[str, list[Source]] = {}
    for source in found:
        if source.series:
            folders.setdefault(source.series, []).append(source)
    for series, sources in folders.items():
        if len(sources) > 1:
            shown = some(str(source.path) for source in sources)
            log.warning(
                "the DICOM series %s lies in %d folders, each of which is taken for a scan of its own: %s; if it is "
                "one scan, move its files to one folder", series, len(sources), shown,
            )  # fmt: skip


def _name_others(place: Path, listed: dict[str, Any], series: str | None) -> None:
    """Names what lies beside the scans and is none; a series that `series` names is not left out."""
    left = [f"{name} ({what})" for name, what in sorted(listed["others"].items())]
    if series is None:
        left += [_shown(entry) for entry in listed["series"] if entry["left_out"]]
    left += [f"{name} (no DICOM file)" for name in listed["strangers"] if not _belongs(place / name)]
    if left:
        log.warning("%s: left out, as no scans: %s", place, some(left, separator="; "))


def _belongs(path: Path) -> bool:
    """Whether a file is a scan of another format, or the voxels of one."""
    voxels = path.suffix.lower() in (".raw", ".zraw") and is_file(path.with_suffix(".mhd"))
    return bool(suffix_of(path)) or voxels


def _shown(entry: dict[str, Any]) -> str:
    """A series as messages name it."""
    description = f" {entry['description']!r}" if entry["description"] else ""
    why = f", {entry['left_out']}" if entry["left_out"] else ""
    return (
        f"series {entry['number']}{description} ({entry['planes']} image(s){why}, first {entry['first']}, "
        f"{entry['uid']})"
    )
