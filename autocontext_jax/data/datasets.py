"""A data set's folder -> its classes and cases: nnU-Net v2 and the Medical Segmentation Decathlon (MSD).

Nothing here opens a scan, and nothing is unpickled: a data set is its `dataset.json` and the files of `layouts.py`.
"""

import collections
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autocontext_jax.data.labels import LARGEST_COUNT, LabelSpec, parse_annotated, parse_labels
from autocontext_jax.data.layouts import (
    Case,
    Root,
    check_ending,
    get,
    listed_cases,
    named_cases,
    paired_cases,
    read_description,
    shown,
    visible,
    warn_of_unlisted,
)
from autocontext_jax.errors import UserError, counted, some

log = logging.getLogger(__name__)

# Keys that dataset.json may have: "relase" is how some data sets of MSD spell it, "phantom" is of generated scans.
ABOUT = {
    "name", "dataset_name", "description", "reference", "citation", "licence", "license", "release", "relase",
    "tensorImageSize", "converted_by", "numTraining", "numTest", "labels", "modality", "training", "test",
    "annotated", "phantom",
}  # fmt: skip
NNUNET = ABOUT | {"channel_names", "file_ending", "dataset", "regions_class_order", "overwrite_image_reader_writer"}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A folder of cases, or several, see `combination`.

    Attributes:
      root: the folder that holds `dataset.json`; of several the one that holds them all.
      labels: what the label files hold and what is learned of it.
      channels: [C] names of the images' channels.
      training: every case with its label, by name.
      test: cases kept apart, by name; with labels where `labelsTs` has them.
      folders: of the data sets, if they are several.
    """

    root: Path
    labels: LabelSpec
    channels: tuple[str, ...]
    training: tuple[Case, ...]
    test: tuple[Case, ...]
    folders: tuple[Path, ...] = ()

    @property
    def sources(self) -> tuple[Path, ...]:
        """Every folder that holds a `dataset.json`."""
        return self.folders or (self.root,)

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        return ", ".join(map(str, self.sources))


def read_dataset(root: str | os.PathLike, *, outside_paths: bool = False) -> Dataset:
    """Lists the cases of a folder in the nnU-Net v2 or the MSD layout, told apart by the keys of its `dataset.json`.

    Warns of keys that are not known, and of files that belong to no case.

    Args:
      root: the folder.
      outside_paths: whether `dataset.json` may name files outside the folder.

    Raises:
      UserError: the folder or `dataset.json` is missing, is not JSON, or lacks a key; its labels cannot be, see
        `parse_labels` and `parse_annotated`; there is no channel; an image lacks its label or a label its image; a case
        is named twice; a path leads out of the folder; there is no case; there are not as many as the file says.
    """
    place = Root(Path(root), outside_paths)
    if not place.folder.is_dir():
        raise UserError(f"{root} is not a folder: expected a data set in the nnU-Net v2 or the MSD layout")
    if not place.json.is_file():
        raise UserError(f"{root} has no dataset.json: expected a data set in the nnU-Net v2 or the MSD layout")
    description = read_description(place.json)
    if not isinstance(description, dict):
        raise UserError(f"{place.json} is {shown(description)}: expected an object with the data set's keys")
    if "channel_names" in description:
        dataset = _nnunet(place, description)
    elif "training" in description:
        dataset = _msd(place, description)
    else:
        raise UserError(
            f'{place.json} has neither the key "channel_names" (nnU-Net v2) nor "training" (MSD): found '
            f"{', '.join(description) or 'no key'}"
        )
    _check_cases(dataset)
    return _with_annotated(place.json, description, dataset)


def _nnunet(root: Root, description: Mapping[str, Any]) -> Dataset:
    """nnU-Net v2: labels by name; cases lie side by side, or the key "dataset" names their files."""
    channels = _channels(root.json, "channel_names", description)
    by_name = get(str(root.json), description, "labels", dict)
    labels = parse_labels(root.json, by_name, description.get("regions_class_order"))
    ending = get(str(root.json), description, "file_ending", str)
    check_ending(root, ending)
    _warn_of_keys(root, description, NNUNET)
    if "dataset" in description:
        training = named_cases(root, get(str(root.json), description, "dataset", dict), channels)
        warn_of_unlisted(root, 'its key "dataset" does not name them', training, ("imagesTr", "labelsTr"))
        _warn_of_number(root, description, "numTraining", '"dataset"', len(training), len(description["dataset"]))
    else:
        for folder in ("imagesTr", "labelsTr"):
            needed = visible(root.folder / "imagesTr") or not visible(root.folder / "imagesTs")
            if needed and not (root.folder / folder).is_dir():
                raise UserError(
                    f"{root.folder} has no folder {folder}: expected the training cases' {folder.removesuffix('Tr')} "
                    "there"
                )
        training = paired_cases(root, ending, "Tr", channels)
        _check_number(root, description, "numTraining", "imagesTr", training)
        _warn_of_other_labels(root, description, training)
    test = paired_cases(root, ending, "Ts", channels)
    _warn_of_number(root, description, "numTest", "imagesTs", len(test), len(test))
    return Dataset(root.folder, labels, channels, training, test)


def _msd(root: Root, description: Mapping[str, Any]) -> Dataset:
    """MSD and nnU-Net v1: labels by value, cases in lists."""
    channels = _channels(root.json, "modality", description)
    by_value = get(str(root.json), description, "labels", dict)
    values: dict[str, str] = {}
    for value, name in by_value.items():
        if (other := values.setdefault(str(name), value)) != value:
            raise UserError(f'{root.json}: the labels {other} and {value} are both "{name}": expected each name once')
    labels = parse_labels(root.json, values)
    _warn_of_keys(root, description, ABOUT)
    training = listed_cases(root, "training", get(str(root.json), description, "training", list), channels)
    _warn_of_number(root, description, "numTraining", '"training"', len(training), len(description["training"]))
    if "test" in description:
        test = listed_cases(root, "test", get(str(root.json), description, "test", list), channels, "labelsTs")
        _warn_of_number(root, description, "numTest", '"test"', len(test), len(description["test"]))
    else:
        test = ()
    warn_of_unlisted(root, "no list of it names them", (*training, *test))
    return Dataset(root.folder, labels, channels, training, test)


def _check_cases(dataset: Dataset) -> None:
    """What holds for the cases of every layout."""
    cases = (*dataset.training, *dataset.test)
    if not cases:
        raise UserError(
            f"{dataset.root} has no training case and no test case: expected images in imagesTr and their labels in "
            "labelsTr"
        )
    names = collections.Counter(case.name for case in cases)
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise UserError(
            f"{dataset.root} names the case {twice[0]} more than once: expected each case once, in training or test"
        )
    for case in dataset.training:
        if case.label is None:
            raise UserError(
                f'case {case.name}: "training" in {dataset.root / "dataset.json"} names no label of {case.images[0]}: '
                'expected {"image": path, "label": path}, or the case taken out'
            )
    first: dict[Path, str] = {}
    if shared := [case for case in cases if first.setdefault(case.images[0], case.name) != case.name]:
        pairs = (f"{first[case.images[0]]} and {case.name}" for case in shared)
        log.warning(
            "%s: different cases have the same image, and may be trained on and scored: %s", dataset.root, some(pairs)
        )


def _with_annotated(path: Path, description: Mapping[str, Any], dataset: Dataset) -> Dataset:
    """The data set with what single cases annotate."""
    if "annotated" not in description:
        return dataset
    every = (*dataset.training, *dataset.test)
    found = parse_annotated(path, description["annotated"], dataset.labels, [case.name for case in every])

    def annotated(cases: Sequence[Case]) -> tuple[Case, ...]:
        return tuple(dataclasses.replace(case, annotated=found.get(case.name)) for case in cases)

    return dataclasses.replace(dataset, training=annotated(dataset.training), test=annotated(dataset.test))


def _warn_of_keys(root: Root, description: Mapping[str, Any], known: set[str]) -> None:
    if unknown := [key for key in description if key not in known]:
        log.warning("%s: these keys are not known and have no effect: %s", root.json, some(unknown))


def _check_number(root: Root, description: Mapping[str, Any], key: str, folder: str, cases: Sequence[Case]) -> None:
    """Where image and label are both lost, nothing but the number tells."""
    found, number = len(cases), description.get(key, len(cases))
    if number == found:
        return
    if not isinstance(number, int):
        raise UserError(f'{root.json}: "{key}" is {shown(number)}: expected a whole number, that of the cases, {found}')
    raise UserError(
        f'{root.json}: "{key}" is {number}, and {root.folder / folder} has {counted(found, "case")}: '
        f"{'bring the others back' if number > found else 'take the others away'} or correct the number"
    )


def _warn_of_number(root: Root, description: Mapping[str, Any], key: str, place: str, found: int, listed: int) -> None:
    """Of test cases, which may have been removed, and where a list names every case: the list counts.

    A list may name hidden files, which are no cases.
    """
    number = description.get(key, found)
    if number not in (found, listed):
        log.warning(
            '%s: "%s" is %s, and %s has %s: no others are taken; correct the number, or add the others',
            root.json, key, shown(number), place, counted(found, "case"),
        )  # fmt: skip


def _warn_of_other_labels(root: Root, description: Mapping[str, Any], training: Sequence[Case]) -> None:
    """nnU-Net v2 does not read MSD's lists, which a data set may still have; they could name other files."""
    entries = description.get("training")
    listed = [entry.get("label") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    taken = {os.path.abspath(case.label) for case in training if case.label}
    other = [
        label
        for label in listed
        if isinstance(label, str) and os.path.abspath(os.path.join(root.folder, label)) not in taken
    ]
    if other:
        log.warning(
            '%s: with "channel_names" it is of nnU-Net v2, where the labels are those in labelsTr; the list "training" '
            "names others, which are left out: %s", root.json, some(other),
        )  # fmt: skip


def _channels(path: Path, key: str, description: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the channels, in the order of their numbers."""
    channels = get(str(path), description, key, dict)
    if sorted(channels) != sorted(str(number) for number in range(len(channels))) or not channels:
        found = ", ".join(f'"{number}": {shown(name)}' for number, name in channels.items()) or "empty"
        raise UserError(f'{path}: "{key}" is {found}: expected channels with the numbers "0", "1", ..., as "0": "CT"')
    if len(channels) > LARGEST_COUNT:
        raise UserError(f'{path}: "{key}" has {len(channels)} channels: expected at most {LARGEST_COUNT}')
    return tuple(str(channels[str(number)]) for number in range(len(channels)))
