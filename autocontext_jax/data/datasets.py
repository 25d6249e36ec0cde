"""Folder layouts -> lists of cases: nnU-Net v2 and the Medical Segmentation Decathlon (MSD).

Nothing here opens a scan, and nothing is unpickled: a layout is its `dataset.json` and the names beside it.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autocontext_jax.errors import UserError
from autocontext_jax.files import is_file
from autocontext_jax.images.formats import FORMATS, scan_name


@dataclasses.dataclass(frozen=True)
class Case:
    """One patient's scan, and its label map where there is one.

    Attributes:
      name: of the case.
      image: file of the scan.
      label: file of the label map; None if there is none.
      checksum: of both files' content, where it is known; "" elsewhere.
    """

    name: str
    image: Path
    label: Path | None
    checksum: str = ""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A folder of cases.

    Attributes:
      root: the folder that holds `dataset.json`.
      labels: K names in the order of their values, "background" (0) first.
      training: every case with its label, by name.
      test: cases kept apart, by name; with labels where `labelsTs` has them.
    """

    root: Path
    labels: tuple[str, ...]
    training: tuple[Case, ...]
    test: tuple[Case, ...]


def read_dataset(root: str | os.PathLike) -> Dataset:
    """Lists the cases of a folder in the nnU-Net v2 or the MSD layout, told apart by the keys of its `dataset.json`.

    Raises:
      UserError: the folder or `dataset.json` is missing, is not JSON, or lacks a key; labels are not 0..K-1 with
        background at 0; there are several channels; an image lacks its label or a label its image; a case is named
        twice; a path leads out of the folder; there is no training case; there are not as many as the file says.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: expected a data set in the nnU-Net v2 or the MSD layout")
    path = root / "dataset.json"
    if not path.is_file():
        raise UserError(f"{root} has no dataset.json: expected a data set in the nnU-Net v2 or the MSD layout")
    description = read_description(path)
    if not isinstance(description, dict):
        raise UserError(f"{path} holds a {type(description).__name__}: expected an object with the data set's keys")
    if "channel_names" in description:
        _one_channel(path, "channel_names", description)
        labels = _labels(path, _get(path, description, "labels", dict))
        training, test = _nnunet_cases(root, _get(path, description, "file_ending", str))
        for key, folder, cases in (("numTraining", "imagesTr", training), ("numTest", "imagesTs", test)):
            # Where image and label are both lost nothing else tells; without any training case, see below.
            if training and description.get(key, len(cases)) != len(cases):
                raise UserError(
                    f'{path}: "{key}" is {description[key]!r}, and {root / folder} has {len(cases)} cases: bring the '
                    "others back or correct the number"
                )
    elif "training" in description:
        _one_channel(path, "modality", description)
        labels = _labels(path, {str(name): value for value, name in _get(path, description, "labels", dict).items()})
        training = _msd_cases(root, _get(path, description, "training", list), None)
        test = _msd_cases(root, _get(path, description, "test", list) if "test" in description else [], "labelsTs")
    else:
        raise UserError(
            f'{path} has neither the key "channel_names" (nnU-Net v2) nor "training" (MSD): found '
            f"{', '.join(description) or 'no key'}"
        )
    names = [case.name for case in (*training, *test)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"{root} names the case {twice[0]} more than once: expected each case once, in training or test"
        )
    for case in training:
        if case.label is None:
            raise UserError(f"case {case.name}: {case.image} has no label: add it or move it away")
    if not training:
        raise UserError(f"{root} has no training case: expected images in imagesTr and their labels in labelsTr")
    return Dataset(root, labels, training, test)


def read_description(path: Path) -> Any:
    """The JSON that a data set's folder has in a file.

    Raises:
      UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text: expected JSON in UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise UserError(f"{path} holds what no data set needs ({error}): expected plain JSON") from None


def _get(path: Path, description: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in description:
        raise UserError(f'{path} lacks the key "{key}": found {", ".join(description) or "none"}')
    if not isinstance(value := description[key], kind):
        raise UserError(f'{path}: "{key}" is a {type(value).__name__}: expected a {kind.__name__}')
    return value


def _one_channel(path: Path, key: str, description: Mapping[str, Any]) -> None:
    channels = _get(path, description, key, dict)
    if len(channels) != 1:
        found = ", ".join(map(str, channels.values())) or "none"
        raise UserError(f'{path}: "{key}" has {len(channels)} channels ({found}): expected one, the CT')


def _labels(path: Path, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Names in the order of their values, from name -> value; MSD writes the values as strings."""
    names: dict[int, str] = {}
    for name, value in values.items():
        if isinstance(value, list):
            raise UserError(
                f'{path}: label "{name}" is the region {value}: expected one value a label; regions overlap'
            )
        if name == "ignore":
            raise UserError(f'{path}: label "ignore" ({value}) is not supported: expected every voxel labelled')
        if isinstance(value, bool) or not re.fullmatch(r"\d{1,9}", str(value)):
            raise UserError(f'{path}: label "{name}" has the value {value!r}: expected a whole number from 0')
        names[int(value)] = name
    if sorted(names) != list(range(len(values))) or not 2 <= len(values) <= 256:
        found = ", ".join(f"{name} {value}" for name, value in values.items())
        raise UserError(f"{path}: labels are {found or 'none'}: expected the values 0, 1, 2, ... once each, up to 255")
    if names[0].lower() != "background":
        raise UserError(f'{path}: label 0 is "{names[0]}": expected "background"')
    return ("background", *(names[value] for value in range(1, len(names))))


def _nnunet_cases(root: Path, ending: str) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Pairs imagesTr/<case>_0000<ending> with labelsTr/<case><ending>, and the same of Ts."""
    if ending not in FORMATS:
        raise UserError(f'{root / "dataset.json"}: "file_ending" is "{ending}": expected one of {", ".join(FORMATS)}')
    for folder in ("imagesTr", "labelsTr"):
        if not (root / folder).is_dir():
            raise UserError(f"{root} has no folder {folder}: expected the training cases' images and labels there")
    training = _nnunet_pairs(root / "imagesTr", root / "labelsTr", ending)
    return training, _nnunet_pairs(root / "imagesTs", root / "labelsTs", ending)


def _nnunet_pairs(images: Path, labels: Path, ending: str) -> tuple[Case, ...]:
    found = {}
    for path in _visible(images, ending):
        name, _, channel = path.name.removesuffix(ending).rpartition("_")
        if not name or not re.fullmatch(r"\d{4}", channel):
            raise UserError(f"{path} is not named as nnU-Net's images: expected <case>_0000{ending}")
        if channel != "0000":
            raise UserError(f"case {name}: {path} is a further channel: expected one, the CT (_0000)")
        found[name] = path
    truth = {path.name.removesuffix(ending): path for path in _visible(labels, ending)}
    if orphans := sorted(truth.keys() - found.keys()):
        raise UserError(
            f"case {orphans[0]}: {truth[orphans[0]]} has no image: expected {images / orphans[0]}_0000{ending}, or no "
            "label"
        )
    return tuple(Case(name, found[name], truth.get(name)) for name in sorted(found))


def _visible(folder: Path, ending: str) -> list[Path]:
    """Files by their ending, but for hidden ones: macOS leaves "._" files that are no scans."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.endswith(ending) and not path.name.startswith("."))


def _msd_cases(root: Path, entries: Sequence[Any], labels: str | None) -> tuple[Case, ...]:
    """Cases of one of MSD's lists: {"image": path, "label": path}, or a path, whose label may lie in `labels`."""
    cases = []
    for entry in entries:
        parts = entry if isinstance(entry, dict) else {"image": entry}
        image = _inside(root, _get(root / "dataset.json", parts, "image", str))
        if image.name.startswith("."):
            continue
        name = scan_name(image)
        if not is_file(image):
            raise UserError(f"case {name}: {image} does not exist: add the image or take it out of dataset.json")
        label = None
        if "label" in parts:
            label = _inside(root, parts["label"])
            if not is_file(label):
                raise UserError(f"case {name}: its label {label} does not exist: add it or take the case out")
        elif labels and is_file(root / labels / image.name):
            label = root / labels / image.name
        cases.append(Case(name, image, label))
    return tuple(sorted(cases, key=lambda case: case.name))


def _inside(root: Path, relative: Any) -> Path:
    """A path of dataset.json, kept inside the folder; by its words, so that imagesTr may be a link to another disk."""
    path = os.path.normpath(str(relative))
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
        raise UserError(f'{root / "dataset.json"} names "{relative}": expected a path inside {root}')
    return root / path
