"""Several data sets as one: the classes of all, and in each case those unknown that its data set does not annotate."""

import collections
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from autocontext_jax.data.datasets import Dataset, read_dataset
from autocontext_jax.data.labels import LARGEST_COUNT, FileLabels, LabelSpec
from autocontext_jax.data.layouts import Case
from autocontext_jax.errors import UserError, some

log = logging.getLogger(__name__)


def read_datasets(folders: Sequence[Path], *, outside_paths: bool = False) -> Dataset:
    """Reads a data set, or several and combines them.

    Args:
      folders: each with its own `dataset.json`.
      outside_paths: see `read_dataset`.

    Raises:
      UserError: see `read_dataset` and `combine`.
    """
    sets = [read_dataset(folder, outside_paths=outside_paths) for folder in folders]
    return sets[0] if len(sets) == 1 else combine(sets)


def combine(sets: Sequence[Dataset]) -> Dataset:
    """One data set of the cases of several.

    Its classes are the union of their names, in the order in which they appear. A class that a data set does not name
    is unknown in its cases. A name that cases of two data sets have is made distinct by that of the folder in front:
    FOLDER_case. Written masks have the data sets' own values where these agree, else 0, 1, 2, ..., and a warning says
    so.

    Args:
      sets: two or more.

    Raises:
      UserError: a folder comes twice; labels are regions or have "ignore"; channels differ; there are too many classes;
        cases of two data sets cannot be told apart.
    """
    folders = [each.root for each in sets]
    if twice := [folder for folder, count in collections.Counter(map(_real, folders)).items() if count > 1]:
        raise UserError(f"data.root names {twice[0]} more than once: expected each data set once")
    for each in sets:
        if each.labels.regions or each.labels.ignore >= 0:
            what = "regions" if each.labels.regions else '"ignore"'
            raise UserError(
                f"data set {each.root} has {what} among its labels, and data.root names {len(sets)} data sets: "
                f"expected classes of one value each to combine; name {each.root} alone, or change its labels"
            )
        if each.channels != sets[0].channels:
            raise UserError(
                f"data set {each.root} has the channels {', '.join(each.channels)}, {sets[0].root} has "
                f"{', '.join(sets[0].channels)}: expected the same channels in all data sets of data.root"
            )
    classes = tuple(dict.fromkeys(name for each in sets for name in each.labels.classes))
    if len(classes) > LARGEST_COUNT:
        raise UserError(
            f"the data sets {some(map(str, folders))} have {len(classes)} classes together: expected at most "
            f"{LARGEST_COUNT}, background included"
        )
    _warn_of_like_names(classes)
    labels = LabelSpec.plain(classes, _common_values(sets, classes))
    prefixes = _prefixes(folders)
    count = collections.Counter(case.name for each in sets for case in (*each.training, *each.test))

    def moved(each: Dataset, prefix: str, cases: Sequence[Case]) -> list[Case]:
        own = each.labels.classes
        files = FileLabels(each.labels.values, tuple(map(classes.index, own)))
        whole = None if len(own) == len(classes) else own[1:]
        return [
            dataclasses.replace(
                case,
                name=case.name if count[case.name] == 1 else f"{prefix}_{case.name}",
                annotated=case.annotated or whole,
                files=files,
            )
            for case in cases
        ]

    both = list(zip(sets, prefixes, strict=True))
    training = [case for each, prefix in both for case in moved(each, prefix, each.training)]
    test = [case for each, prefix in both for case in moved(each, prefix, each.test)]
    names = collections.Counter(case.name for case in (*training, *test))
    if twice_named := [name for name, number in names.items() if number > 1]:
        raise UserError(
            f"the data sets {some(map(str, folders))} have cases that would both be named {twice_named[0]}: expected "
            "different names; rename one"
        )
    root = Path(os.path.commonpath([folder.absolute() for folder in folders]))

    def by_name(cases: list[Case]) -> tuple[Case, ...]:
        return tuple(sorted(cases, key=lambda case: case.name))

    return Dataset(root, labels, sets[0].channels, by_name(training), by_name(test), tuple(folders))


def _common_values(sets: Sequence[Dataset], classes: Sequence[str]) -> tuple[int, ...]:
    """The value of each class in written masks."""
    values: dict[str, int] = {}
    owners: dict[int, str] = {}
    for each in sets:
        for name, value in zip(each.labels.classes, each.labels.values, strict=True):
            if values.setdefault(name, value) != value or owners.setdefault(value, name) != name:
                found = "; ".join(f"{each.root} has {each.labels.shown()}" for each in sets)
                log.warning(
                    "the data sets' values do not agree, and masks are written with %s: %s",
                    LabelSpec.plain(classes).shown(), found,
                )  # fmt: skip
                return tuple(range(len(classes)))
    return tuple(values[name] for name in classes)


def _warn_of_like_names(classes: Sequence[str]) -> None:
    """Two spellings of one organ would be two classes, each unknown where the other is annotated."""
    first: dict[str, str] = {}
    alike = [
        f"{first[plain]} and {name}"
        for name in classes
        if first.setdefault(plain := "".join(filter(str.isalnum, name.casefold())), name) != name
    ]
    if alike:
        log.warning("these are taken as different classes: %s: name them alike if they are the same", some(alike))


def _prefixes(folders: Sequence[Path]) -> list[str]:
    """A different name for each folder: as many of its last parts as that takes."""
    parts = [folder.absolute().parts[1:] for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["_".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}" for number in range(1, len(folders) + 1)]  # /a_b/c and /a/b_c


def _real(folder: Path) -> str:
    return os.path.realpath(folder)
