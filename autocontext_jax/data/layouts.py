"""Where the files of a data set's cases lie: side by side in folders, or named by the lists of `dataset.json`.

Nothing here opens a scan. What lies in the folders of a data set and belongs to no case is named in a warning.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autocontext_jax.data.labels import FileLabels
from autocontext_jax.errors import UserError, some
from autocontext_jax.files import is_file
from autocontext_jax.images.formats import FORMATS, scan_name, suffix_of

log = logging.getLogger(__name__)

FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")


@dataclasses.dataclass(frozen=True)
class Case:
    """One patient's scan, and its label map where there is one.

    Attributes:
      name: of the case.
      images: files of the scan: one, or of several channels one for each.
      label: file of the label map; None if there is none.
      checksum: of the files' content, where it is known; "" elsewhere.
      annotated: names of the classes that its label map shows where they are; None for all. The others may be anywhere.
      files: how its label map is read; None as `LabelSpec.files` of its data set says.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    checksum: str = ""
    annotated: tuple[str, ...] | None = None
    files: FileLabels | None = None


@dataclasses.dataclass(frozen=True)
class Root:
    """A data set's folder, and how far its `dataset.json` may lead.

    Attributes:
      folder: that holds `dataset.json`.
      outside_paths: whether `dataset.json` may name files outside the folder.
    """

    folder: Path
    outside_paths: bool = False

    @property
    def json(self) -> Path:
        """The file that describes the data set."""
        return self.folder / "dataset.json"

    def path(self, words: str, place: str) -> Path:
        """A path as `dataset.json` names it, relative to the folder or absolute.

        It is inside the folder by its words, so that imagesTr may be a link to another disk; an absolute one also where
        the folder is reached by another link than the words name.

        Raises:
          UserError: it is outside, and that is not allowed.
        """
        here = os.path.abspath(self.folder)
        named = os.path.normpath(os.path.join(here, words))
        real = os.path.realpath(here)
        ways = [(named, here), (named, real)]
        with contextlib.suppress(ValueError):  # a name that no file can have
            ways += [(os.path.realpath(named), real)] if os.path.isabs(words) else []
        for path, root in ways:
            if Path(path).is_relative_to(root):
                return self.folder / Path(path).relative_to(root)
        if not self.outside_paths:
            raise UserError(
                f'{self.json}, {place}: "{words}" is outside {self.folder}: expected a path inside it; '
                "--config.data.outside_paths=True allows others"
            )
        return Path(named)


def read_description(path: Path) -> Any:
    """The JSON that a data set's folder has in a file.

    Raises:
      UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text: expected JSON in UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise UserError(f"{path} holds what no data set needs ({error}): expected plain JSON") from None


def get(place: str, description: Mapping[str, Any], key: str, kind: type) -> Any:
    """The value of a key that must be there.

    Args:
      place: what has the keys, for messages: the file, perhaps with what of it.
      description: the keys and their values.
      key: whose value is returned.
      kind: that its value must have: dict, list or str.

    Raises:
      UserError: it is missing or of another kind.
    """
    if key not in description:
        raise UserError(f'{place} lacks the key "{key}": found {", ".join(description) or "none"}')
    if not isinstance(value := description[key], kind):
        raise UserError(f'{place}: "{key}" is {shown(value)}: expected {_KINDS[kind]}')
    return value


_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}


def shown(value: Any) -> str:
    """A value of JSON, for messages; of an object or a list only what it is."""
    return _KINDS[type(value)] if isinstance(value, dict | list) else json.dumps(value)[:200]


def paired_cases(root: Root, ending: str, side: str, channels: Sequence[str]) -> tuple[Case, ...]:
    """The cases of nnU-Net v2's folders: images<side>/<case>_0000<ending> with labels<side>/<case><ending>.

    Args:
      root: of the data set.
      ending: of every file.
      side: "Tr", where every case must have its label; or "Ts".
      channels: their names: a case has one file for each (_0000, _0001, ...), or one that holds all.

    Raises:
      UserError: an image or a label lacks the other, has a name of another form or an ending of its own, or a case has
        other channels.
    """
    images, labels = root.folder / f"images{side}", root.folder / f"labels{side}"
    found: dict[str, dict[str, Path]] = {}
    for path in _with_ending(images, ending):
        name, _, channel = path.name.removesuffix(ending).rpartition("_")
        if not name or not re.fullmatch(r"\d{4}", channel):
            raise UserError(f"{path} is not named as nnU-Net's images: expected <case>_0000{ending}")
        found.setdefault(name, {})[channel] = path
    for name, files in sorted(found.items()):
        _check_channels(name, list(files.values()), list(files), channels)
    truth = {path.name.removesuffix(ending): path for path in _with_ending(labels, ending)}
    if orphans := sorted(truth.keys() - found.keys()):
        raise UserError(
            f"case {orphans[0]}: {truth[orphans[0]]} has no image: expected {images / orphans[0]}_0000{ending}, or no "
            "label"
        )
    cases = tuple(Case(name, tuple(found[name].values()), truth.get(name)) for name in sorted(found))
    for case in cases:
        if case.label is None and side == "Tr":
            raise UserError(
                f"case {case.name}: {case.images[0]} has no label: expected {labels / case.name}{ending}, or no image"
            )
    return cases


def _check_channels(name: str, files: Sequence[Path], numbers: Sequence[str], channels: Sequence[str]) -> None:
    """Refuses a case whose files are neither one for each channel nor one that holds all."""
    every = [f"{number:04d}" for number in range(len(channels))]
    if list(numbers) not in (every, every[:1]):
        found = ", ".join(path.name for path in files)
        several = f"{len(channels)} channels, {', '.join(channels)} (_0000 to _{every[-1]}), or all in one file (_0000)"
        expected = f"one channel, {channels[0]} (_0000)" if len(channels) == 1 else several
        raise UserError(f"case {name}: its images in {files[0].parent} are {found}: expected {expected}")


def _with_ending(folder: Path, ending: str) -> list[Path]:
    """A folder's files with the data set's ending; others are named.

    Raises:
      UserError: scans lie there, and none of them has the ending.
    """
    there = visible(folder)
    others = [path for path in there if not path.name.endswith(ending)]
    scans = [path.name for path in others if suffix_of(path)]
    if scans and len(others) == len(there):
        raise UserError(
            f'{folder.parent / "dataset.json"}: "file_ending" is "{ending}", and no file in {folder} ends so: found '
            f"{some(scans)}: name their ending"
        )
    if others:
        log.warning(
            '%s: left out, since their names do not end in %s ("file_ending" in dataset.json): %s',
            folder, ending, some(path.name for path in others),
        )  # fmt: skip
    return [path for path in there if path.name.endswith(ending)]


def visible(folder: Path) -> list[Path]:
    """What lies in a folder but for hidden files: macOS leaves "._" files that are no scans.

    Raises:
      UserError: the folder cannot be read.
    """
    if not folder.is_dir():
        return []
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None


def named_cases(root: Root, entries: Mapping[str, Any], channels: Sequence[str]) -> tuple[Case, ...]:
    """The training cases of nnU-Net v2's key "dataset": {case: {"images": [path], "label": path}}.

    As in nnU-Net, $NAME in a path stands for the environment variable, if there is one.

    Raises:
      UserError: an entry has another form or other channels; a file does not exist; see `Root.path`.
    """
    cases = []
    for name, entry in entries.items():
        place = f'"dataset", case {name}'
        if not re.fullmatch(r"[^./\\\0][^/\\\0]{0,199}", name):
            raise UserError(f'{root.json}, {place}: expected a name that a file can have: no "/", no "." in front')
        if not isinstance(entry, dict):
            raise UserError(f'{root.json}, {place} is {shown(entry)}: expected {{"images": [path], "label": path}}')
        images = get(f"{root.json}, {place}", entry, "images", list)
        if len(images) not in (1, len(channels)) or not all(isinstance(image, str) for image in images):
            found = ", ".join(map(shown, images)) or "empty"
            paths = f"{len(channels)} paths or one" if len(channels) > 1 else "one path"
            raise UserError(f'{root.json}, {place}: "images" is {found}: expected {paths}, for {", ".join(channels)}')
        words = *images, get(f"{root.json}, {place}", entry, "label", str)
        files = [root.path(os.path.expandvars(path), place) for path in words]
        for path, word in zip(files, words, strict=True):
            if not is_file(path):
                what = "label" if path is files[-1] else "image"
                raise UserError(
                    f'{root.json}, {place}: its {what} "{word}" does not exist: add the file, or take the case out'
                )
        cases.append(Case(name, tuple(files[:-1]), files[-1]))
    return tuple(sorted(cases, key=lambda case: case.name))


def listed_cases(
    root: Root, key: str, entries: Sequence[Any], channels: Sequence[str], labels: str | None = None
) -> tuple[Case, ...]:
    """The cases of one of MSD's lists: {"image": path, "label": path}, or a path.

    Where nnU-Net v1 has prepared the data set, the list names `case.nii.gz`, and the file is `case_0000.nii.gz`.

    Args:
      root: of the data set.
      key: of the list, for messages.
      entries: of the list.
      channels: their names. A file of several channels is 4D.
      labels: folder where the labels of those lie that name none.

    Raises:
      UserError: an entry has another form; a file does not exist; a case has several channels; see `Root.path`.
    """
    cases = []
    for number, entry in enumerate(entries, start=1):
        place = f'"{key}", entry {number}'
        parts = entry if isinstance(entry, dict) else {"image": entry}
        listed = root.path(get(f"{root.json}, {place}", parts, "image", str), place)
        if listed.name.startswith("."):
            continue
        name = scan_name(listed)
        images = _files_of(listed, channels)
        if not is_file(images[0]):
            raise UserError(f"case {name}: {listed} does not exist: add the image or take it out of dataset.json")
        label = None
        if "label" in parts:
            label = root.path(get(f"{root.json}, {place}", parts, "label", str), place)
            if not is_file(label):
                raise UserError(f"case {name}: its label {label} does not exist: add it or take the case out")
        elif labels:
            paths = (root.folder / labels / each for each in dict.fromkeys((listed.name, _without_channel(listed))))
            label = next((path for path in paths if is_file(path)), None)
        cases.append(Case(name, images, label))
    return tuple(sorted(cases, key=lambda case: case.name))


def _files_of(listed: Path, channels: Sequence[str]) -> tuple[Path, ...]:
    """The files of an image in a list; see `listed_cases`."""
    name = scan_name(listed)
    numbered = [
        (f"{number:04d}", path)
        for number in range(len(channels) + 1)
        if is_file(path := listed.with_name(f"{name}_{number:04d}{listed.name[len(name) :]}"))
    ]
    if is_file(listed) or not numbered:
        return (listed,)
    numbers, files = zip(*numbered, strict=True)
    _check_channels(name, files, numbers, channels)
    return tuple(files)


def _without_channel(listed: Path) -> str:
    name = scan_name(listed)
    return name.removesuffix("_0000") + listed.name[len(name) :]


def warn_of_unlisted(root: Root, why: str, cases: Iterable[Case], folders: Sequence[str] = FOLDERS) -> None:
    """Names what lies in the folders and belongs to no case, where `dataset.json` names the files."""
    taken = {os.path.realpath(path) for case in cases for path in (*case.images, case.label) if path is not None}
    left = [path for name in folders for path in visible(root.folder / name) if os.path.realpath(path) not in taken]
    if left:
        log.warning(
            "%s: left out, since %s: %s",
            root.json, why, some(str(path.relative_to(root.folder)) for path in left),
        )  # fmt: skip


def check_ending(root: Root, ending: str) -> None:
    """Refuses a `file_ending` that no reader knows.

    Raises:
      UserError: it is none of `FORMATS`.
    """
    if ending.lower() not in FORMATS:
        raise UserError(f'{root.json}: "file_ending" is "{ending}": expected one of {", ".join(FORMATS)}')
