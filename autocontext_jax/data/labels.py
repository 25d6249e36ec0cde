"""What label files and stored label maps hold, and what a network predicts of it.

A label file holds values: whole numbers of the data set's own choice. A stored label map holds numbers: 0 for the
background, then 1, 2, ... for the other values, and `IGNORE` for voxels that nobody labelled. A class is made up of the
voxels of one number; a region, as nnU-Net has them, of several numbers, so that regions may overlap.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autocontext_jax.errors import UserError, some

log = logging.getLogger(__name__)

IGNORE = 255  # in stored label maps: voxels that nobody labelled
LARGEST_VALUE = 2**31 - 1  # of a label in a file
LARGEST_COUNT = 255  # of numbers and of classes, background included: both are stored as uint8, beside IGNORE


@dataclasses.dataclass(frozen=True)
class FileLabels:
    """How label files are read.

    Attributes:
      values: the values that they may hold, ascending.
      numbers: what is stored of each.
    """

    values: tuple[int, ...]
    numbers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LabelSpec:
    """The labels of a data set, of a run or of a model.

    Attributes:
      classes: [K] names of what is predicted, scored and shown, "background" first.
      values: [V] value in label files of each stored number.
      members: [K] the stored numbers that make up each class; of the background only 0.
      mask_values: [K] value of each class in a written mask. With regions a mask shows the last of those that a voxel
        is in: nnU-Net's `regions_class_order`.
      ignore: value in label files of voxels that nobody labelled; -1 for none.
    """

    classes: tuple[str, ...]
    values: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    mask_values: tuple[int, ...]
    ignore: int = -1

    @classmethod
    def plain(cls, classes: Sequence[str], values: Sequence[int] = (), *, ignore: int = -1) -> "LabelSpec":
        """Classes that do not overlap; their `values` are 0, 1, 2, ... unless given, and those of written masks too."""
        values = tuple(values) or tuple(range(len(classes)))
        return cls(tuple(classes), values, tuple((number,) for number in range(len(classes))), values, ignore)

    @property
    def regions(self) -> tuple[tuple[int, ...], ...]:
        """[K - 1] the numbers of each region; () for ordinary classes."""
        return self.members[1:] if any(len(numbers) > 1 for numbers in self.members) else ()

    @property
    def outputs(self) -> int:
        """How many maps a network has: one a class, or one a region; the background is no region."""
        return len(self.regions) or len(self.classes)

    @property
    def files(self) -> FileLabels:
        """How label files are read."""
        pairs = [(value, number) for number, value in enumerate(self.values)]
        pairs += [(self.ignore, IGNORE)] if self.ignore >= 0 else []
        values, numbers = zip(*sorted(pairs), strict=True)
        return FileLabels(values, numbers)

    @property
    def masks(self) -> FileLabels:
        """How written masks are read: the number of a class is its place in `classes`."""
        values, numbers = zip(*sorted((value, number) for number, value in enumerate(self.mask_values)), strict=True)
        return FileLabels(values, numbers)

    @property
    def number_names(self) -> tuple[str, ...]:
        """[V] what each stored number is called: the names of all regions that it is in."""
        return tuple(
            " + ".join(name for name, numbers in zip(self.classes, self.members, strict=True) if number in numbers)
            for number in range(len(self.values))
        )

    @property
    def membership(self) -> np.ndarray:
        """[K, 256] bool: whether a voxel of this stored number, or `IGNORE`, is of the class."""
        table = np.zeros((len(self.classes), 256), bool)
        for row, numbers in zip(table, self.members, strict=True):
            row[list(numbers)] = True
        return table

    @property
    def drawn(self) -> np.ndarray:
        """[256] uint8: the class that pictures show for a stored number, of regions the last; 0 for `IGNORE`."""
        return last_class(self.membership)

    @property
    def mask_membership(self) -> np.ndarray:
        """[K, K] bool: whether a voxel that a written mask shows as class j, the column, is of class k, the row."""
        of_class = [{self.values[number] for number in numbers} for numbers in self.members]
        return np.array([[value in values for value in self.mask_values] for values in of_class])

    def known(self, annotated: Sequence[str] | None) -> tuple[bool, ...]:
        """[K] whether a case annotates each class; the background always is.

        Args:
          annotated: names of the classes that it annotates; None for all.
        """
        return tuple(number == 0 or annotated is None or name in annotated for number, name in enumerate(self.classes))

    def shown(self) -> str:
        """In words, for messages: "background 0, tumor [1, 2], core 2; ignore 9"."""
        parts = [
            f"{name} {self.values[numbers[0]] if len(numbers) == 1 else [self.values[number] for number in numbers]}"
            for name, numbers in zip(self.classes, self.members, strict=True)
        ]
        masks = f"; in masks {', '.join(map(str, self.mask_values))}" if self.regions else ""
        return ", ".join(parts) + masks + (f"; ignore {self.ignore}" if self.ignore >= 0 else "")

    def to_json(self) -> dict[str, Any]:
        """As `split.json` has it."""
        return {name: _lists(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "LabelSpec":
        """What `to_json` gave, or what it gave at first: classes alone, and later with their values."""
        plain = cls.plain(content["classes"], content.get("values", ()), ignore=content.get("ignore", -1))
        if "members" not in content:
            return plain
        members = tuple(tuple(numbers) for numbers in content["members"])
        return dataclasses.replace(plain, members=members, mask_values=tuple(content["mask_values"]))


def last_class(membership: np.ndarray) -> np.ndarray:
    """[K, 256] bool, see `LabelSpec.membership` -> [256] uint8: the last class that a stored number is of, else 0."""
    return np.where(membership, np.arange(len(membership), dtype=np.uint8)[:, None], 0).max(axis=0).astype(np.uint8)


def parse_labels(path: Path, labels: Mapping[str, Any], order: Any = None) -> LabelSpec:
    """The labels that a `dataset.json` describes.

    Args:
      path: of the file, for messages.
      labels: of each name its value, or as nnU-Net writes a region the list of its values; MSD writes values as
        strings. "ignore" names the value of voxels that nobody labelled.
      order: `regions_class_order`, for each region the value that a written mask shows.

    Returns:
      Classes in the order of their values, or regions in the order of the file.

    Raises:
      UserError: a value is no whole number, or of two labels; the background is missing; regions lack their order, or
        it does not fit them.
    """
    values = {name: _values(path, name, value) for name, value in labels.items()}
    ignore = -1
    if "ignore" in values:
        (ignore, *others) = values["ignore"]
        if others:
            raise UserError(f'{path}: label "ignore" is the region {labels["ignore"]}: expected one value')
    first: dict[tuple[int, ...], str] = {}
    for name, own in values.items():
        if (other := first.setdefault(own, name)) != name:
            shown = f"the value {own[0]}" if len(own) == 1 else f"the values {list(own)}"
            raise UserError(f'{path}: the labels "{other}" and "{name}" both have {shown}: expected it once')
    values.pop("ignore", None)
    if list(values.values()) == [(0,)]:
        raise UserError(f"{path}: the only label is {next(iter(values))} 0: expected one or more beside the background")
    if (0,) not in first:
        found = ", ".join(f"{name} {value}" for name, value in labels.items())
        raise UserError(f"{path}: labels are {found or 'none'}: expected the background with the value 0 among them")
    if first[0,].lower() != "background":
        raise UserError(f'{path}: label 0 is "{first[0,]}": expected "background"')
    regions = {name: own for name, own in values.items() if own != (0,)}
    every = sorted({0, *(value for own in regions.values() for value in own)})
    if max(len(every), len(values)) > LARGEST_COUNT:
        raise UserError(
            f"{path} has {max(len(every), len(values))} labels: expected at most {LARGEST_COUNT}, background included"
        )
    if all(len(own) == 1 for own in regions.values()):
        return LabelSpec.plain(["background", *sorted(regions, key=lambda name: regions[name])], every, ignore=ignore)
    for name, own in regions.items():
        if taken := {0, ignore} & set(own):
            what = "background" if 0 in taken else "ignore"
            raise UserError(f'{path}: region "{name}" is {list(own)} with the value of "{what}": expected others alone')
    numbers = {value: number for number, value in enumerate(every)}
    return LabelSpec(
        ("background", *regions),
        tuple(every),
        ((0,), *(tuple(numbers[value] for value in own) for own in regions.values())),
        (0, *_class_order(path, regions, order)),
        ignore,
    )


def parse_annotated(
    path: Path, annotated: Any, labels: LabelSpec, cases: Sequence[str]
) -> dict[str, tuple[str, ...] | None]:
    """The classes that single cases annotate, from the key "annotated": {case: [names]}.

    Args:
      path: of the `dataset.json`, for messages.
      annotated: what its key says.
      labels: of the data set.
      cases: names of its cases.

    Returns:
      {case: names, in the order of the classes, or None where they are all}.

    Raises:
      UserError: an unknown case or class, a case without any, or another form.
    """
    form = 'expected {"case": ["class", ...]}'
    if not isinstance(annotated, dict):
        raise UserError(f'{path}: "annotated" is {annotated!r:.200}: {form}')
    found: dict[str, tuple[str, ...] | None] = {}
    known = set(cases)
    for case, names in annotated.items():
        if case not in known:
            raise UserError(f'{path}: "annotated" names the case {case!r}, which is none of the data set: correct it')
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f'{path}: "annotated" of case {case} is {names!r:.200}: {form}')
        if unknown := [name for name in names if name not in labels.classes]:
            raise UserError(
                f'{path}: "annotated" of case {case} names {unknown[0]!r}: expected some of '
                f"{some(labels.classes[1:])}, which are its labels"
            )
        own = tuple(name for name in labels.classes[1:] if name in names)
        if not own:
            raise UserError(f'{path}: "annotated" of case {case} names no class: name one, or take the case out')
        found[case] = None if own == labels.classes[1:] else own
    return found


def _class_order(path: Path, regions: Mapping[str, tuple[int, ...]], order: Any) -> tuple[int, ...]:
    """The value that a written mask shows of each region, from nnU-Net's `regions_class_order`."""
    names = list(regions)
    what = f'"regions_class_order", a value for each of the {len(names)} regions {", ".join(names)}'
    if order is None:
        raise UserError(f"{path}: labels are regions: expected {what} in this order, which masks show")
    if not isinstance(order, list) or len(order) != len(names):
        raise UserError(f'{path}: "regions_class_order" is {order!r:.200}: expected {what}')
    values = tuple(
        _value(path, f"regions_class_order of {name}", each) for name, each in zip(names, order, strict=True)
    )
    for number, (name, own) in enumerate(regions.items()):
        value = values[number]
        if value not in own:
            raise UserError(
                f'{path}: "regions_class_order" gives the region "{name}" the value {value}: expected one of its own, '
                f"{', '.join(map(str, own))}"
            )
        if value in values[:number]:
            raise UserError(
                f'{path}: "regions_class_order" gives the regions "{names[values.index(value)]}" and "{name}" the '
                f"value {value}: expected a value for each, or masks cannot show both"
            )
        if hidden := [other for other in names[:number] if set(regions[other]) < set(own)]:
            log.warning(
                "%s: the region %s holds %s, and comes later: masks show it in their place; name it first",
                path, name, some(hidden),
            )  # fmt: skip
    return values


def _values(path: Path, name: str, given: Any) -> tuple[int, ...]:
    """The values of a label, ascending."""
    if not isinstance(given, list):
        return (_value(path, name, given),)
    if not given:
        raise UserError(f'{path}: label "{name}" is an empty list: expected a value, or those of a region')
    return tuple(sorted({_value(path, name, each) for each in given}))


def _value(path: Path, name: str, given: Any) -> int:
    """One value; 1, 1.0 and "1" are the same."""
    number = int(given) if isinstance(given, float) and given.is_integer() else given
    text = number if isinstance(number, str) else f"{number}" if type(number) is int and abs(number) < 2**63 else ""
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= LARGEST_VALUE):
        raise UserError(
            f'{path}: label "{name}" has the value {given!r:.200}: expected a whole number from 0 to {LARGEST_VALUE}'
        )
    return int(text)


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value
