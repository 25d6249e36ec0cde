"""Folds of a cross-validation, in nnU-Net's file `splits_final.json`: a list of {"train": [names], "val": [names]}."""

import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autocontext_jax.data.layouts import Case, read_description
from autocontext_jax.errors import UserError, counted

FILE = "splits_final.json"
SEED = 12345  # nnU-Net's


@dataclasses.dataclass(frozen=True)
class Fold:
    """What one model of a cross-validation is trained and validated on.

    Attributes:
      training: names of cases, sorted.
      validation: names of other cases, sorted.
    """

    training: tuple[str, ...]
    validation: tuple[str, ...]


def draw_folds(names: Collection[str], count: int, dataset: str) -> tuple[Fold, ...]:
    """Divides cases into folds, the same as nnU-Net 2.8.1 does.

    nnU-Net takes scikit-learn's `KFold(count, shuffle=True, random_state=12345)` of the sorted names: these are
    shuffled by NumPy's first generator, whose sequence NumPy promises not to change, and cut into `count` parts. The
    first parts have a case more where the number of cases is not a multiple.

    Args:
      names: of the training cases, each once, in any order.
      count: of folds.
      dataset: for messages.

    Returns:
      [count] folds. Every case is in the validation part of one.

    Raises:
      UserError: there is one fold, or there are fewer cases than folds.
    """
    ordered = sorted(names)
    if count < 2:
        raise UserError(f"config key data.folds is {count}; expected 2 or more, or 0 to draw no folds")
    if len(ordered) < count:
        choose = f"choose at most {len(ordered)}" if len(ordered) > 1 else "a single case cannot be cross-validated"
        raise UserError(
            f"config key data.folds is {count}, and data set {dataset} has {counted(len(ordered), 'training case')}; "
            f"expected as many cases as folds or more: {choose}"
        )
    order = np.arange(len(ordered))
    np.random.RandomState(SEED).shuffle(order)
    parts = [set(part.tolist()) for part in np.array_split(order, count)]
    return tuple(
        Fold(
            tuple(name for place, name in enumerate(ordered) if place not in part),
            tuple(name for place, name in enumerate(ordered) if place in part),
        )
        for part in parts
    )


def as_text(folds: Iterable[Fold]) -> str:
    """Folds as nnU-Net writes them, to the byte."""
    content = [{"train": fold.training, "val": fold.validation} for fold in folds]
    return json.dumps(content, sort_keys=True, indent=4)


def read_folds(names: Collection[str], path: str | os.PathLike) -> tuple[Fold, ...]:
    """Reads all folds of a file.

    Args:
      names: of the training cases of the data set.
      path: of the file.

    Raises:
      UserError: the file is missing or of another form; a fold names an unknown case, puts one on both sides, or leaves
        nothing to train on.
    """
    path = Path(path)
    folds = _read_list(path)
    return tuple(_fold(path, folds, number, names) for number in range(len(folds)))


def read_fold(cases: Iterable[Case], path: str | os.PathLike, fold: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Takes one fold of a file. Cases that the fold does not name are left out.

    Args:
      cases: of the data set, those with labels.
      path: of the file.
      fold: number of the fold, from 0.

    Returns:
      (training, validation), each by name.

    Raises:
      UserError: as `read_folds`, for this fold alone; or there is no such fold.
    """
    path = Path(path)
    folds = _read_list(path)
    if not 0 <= fold < len(folds):
        raise UserError(f"{path} has no fold {fold}: expected one of its {len(folds)}, counted from 0")
    known = {case.name: case for case in cases}
    found = _fold(path, folds, fold, known)
    return tuple(known[name] for name in found.training), tuple(known[name] for name in found.validation)


def validated_twice(folds: Sequence[Fold]) -> tuple[str, int, int] | None:
    """A case that two folds validate, with the numbers of both; None if there is none."""
    first: dict[str, int] = {}
    for number, fold in enumerate(folds):
        for name in fold.validation:
            if first.setdefault(name, number) != number:
                return name, first[name], number
    return None


def _read_list(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected nnU-Net's splits_final.json")
    folds = read_description(path)
    if not isinstance(folds, list) or not all(isinstance(entry, dict) for entry in folds):
        raise UserError(f'{path} is not a list of folds: expected [{{"train": [names], "val": [names]}}, ...]')
    if not folds:
        raise UserError(f'{path} has no fold: expected [{{"train": [names], "val": [names]}}, ...]')
    return folds


def _fold(path: Path, folds: Sequence[Mapping[str, Any]], number: int, known: Collection[str]) -> Fold:
    sides = [_names(path, folds[number], side) for side in ("train", "val")]
    known = set(known)
    if unknown := [name for side in sides for name in side if name not in known]:
        raise UserError(
            f"{path}, fold {number}: {counted(len(unknown), 'name')} of no training case of the data set, the first "
            f"{unknown[0]!r}: expected the names of its training cases"
        )
    if both := sorted(set(sides[0]) & set(sides[1])):
        raise UserError(f"{path}, fold {number}: case {both[0]} is in both train and val: expected it in one")
    if not sides[0]:
        raise UserError(f"{path}, fold {number}: train names no case: expected one or more")
    training, validation = (tuple(sorted(set(side))) for side in sides)
    return Fold(training, validation)


def _names(path: Path, fold: Mapping[str, Any], side: str) -> list[str]:
    if not isinstance(fold.get(side), list):
        found = ", ".join(fold) or "none" if side not in fold else f"a {type(fold[side]).__name__}"
        what = f'lacks the key "{side}"' if side not in fold else f'"{side}" is not a list'
        raise UserError(f"{path} {what}: found {found}; expected lists of names")
    return list(map(str, fold[side]))
