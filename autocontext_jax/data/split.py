"""Which case is for what, decided once and written down: training, validation, test.

A run's `split.json` names every case with its side and a checksum of its files. Each later start compares the data set
with it, so that a case which was added, lost or changed is named instead of silently changing sides.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autocontext_jax.data.datasets import Dataset
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.layouts import Case
from autocontext_jax.errors import UserError
from autocontext_jax.images.voxel_files import voxel_files

FORMAT = 1  # of split.json


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What is known of a file.

    Attributes:
      file: its path in the data set's folder.
      bytes: its size; with that of the files beside a header that hold its voxels.
      modified: when it was modified last, nanoseconds; of several files the sum.
      checksum: of its content. It is computed anew only where size or time differ.
    """

    file: str
    bytes: int
    modified: int
    checksum: str


@dataclasses.dataclass(frozen=True)
class SplitCase:
    """A case and what it is for.

    Attributes:
      side: `training`, `validation`, `test`, or `unused` where a file of folds leaves it out.
      images: the files of its scan.
      label: its label map; None if it had none.
      annotated: the classes that it annotates; None for all.
    """

    side: str
    images: tuple[FileRecord, ...]
    label: FileRecord | None
    annotated: tuple[str, ...] | None = None

    @property
    def checksum(self) -> str:
        """Of all files."""
        return " ".join(record.checksum for record in (*self.images, self.label) if record is not None)


@dataclasses.dataclass(frozen=True)
class Split:
    """Every case of a data set with its side.

    Attributes:
      labels: of the data set.
      cases: by name.
    """

    labels: LabelSpec
    cases: Mapping[str, SplitCase]

    @property
    def classes(self) -> tuple[str, ...]:
        """[K] names, background first."""
        return self.labels.classes

    def of(self, side: str, dataset: Dataset) -> tuple[Case, ...]:
        """The cases of one side, by name, as the data set has them, with their checksums."""
        found = {case.name: case for case in (*dataset.training, *dataset.test)}
        return tuple(
            dataclasses.replace(found[name], checksum=case.checksum)
            for name, case in sorted(self.cases.items())
            if case.side == side
        )

    def to_json(self) -> dict[str, Any]:
        """As `split.json` has it."""
        cases = {name: dataclasses.asdict(case) for name, case in sorted(self.cases.items())}
        for case in cases.values():
            annotated = case.pop("annotated")
            case |= {} if annotated is None else {"annotated": list(annotated)}
        return {"format": FORMAT, **self.labels.to_json(), "cases": cases}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Split":
        """What `to_json` gave."""

        def record(values: dict[str, Any] | None) -> FileRecord | None:
            return None if values is None else FileRecord(**values)

        cases = {}
        for name, values in content["cases"].items():
            # The first files have scans of one file.
            images = values["images"] if "images" in values else [values["image"]]
            annotated = tuple(values["annotated"]) if "annotated" in values else None
            records = tuple(FileRecord(**image) for image in images)
            cases[name] = SplitCase(values["side"], records, record(values["label"]), annotated)
        return cls(LabelSpec.from_json(content), cases)


@dataclasses.dataclass(frozen=True)
class Changes:
    """How a data set differs from a split that was made of it.

    Attributes:
      lost: what the split has and the data set has not: cases, or labels of test cases.
      new: names of cases that the split does not know.
      changed: names of cases whose scan or label has another content now, or which annotate other classes.
      labels: those of the data set where they differ, else None.
    """

    lost: tuple[str, ...]
    new: tuple[str, ...]
    changed: tuple[str, ...]
    labels: LabelSpec | None


def make_split(dataset: Dataset, sides: Mapping[str, str], known: Split | None = None) -> Split:
    """Records every case of a data set that has a side; reads each file's content once, unless it is known already.

    Args:
      dataset: with all cases that `sides` names.
      sides: of the cases, by name.
      known: an earlier record. A file of the same size and time is taken to have the same content.
    """
    cases = {case.name: case for case in (*dataset.training, *dataset.test) if case.name in sides}
    before = known.cases if known else {}

    def look(case: Case) -> SplitCase:
        old = before.get(case.name)
        old_images = old.images if old and len(old.images) == len(case.images) else (None,) * len(case.images)
        images = tuple(
            _record(dataset.root, path, known, case.name) for path, known in zip(case.images, old_images, strict=True)
        )
        old_label = old.label if old else None
        label = None if case.label is None else _record(dataset.root, case.label, old_label, case.name)
        return SplitCase(sides[case.name], images, label, case.annotated)

    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing lets go of Python's lock
        looked = dict(zip(cases, pool.map(look, cases.values()), strict=True))
    return Split(dataset.labels, looked)


def compare(split: Split, dataset: Dataset) -> tuple[Split, Changes]:
    """Compares a data set with the split that was made of it.

    Returns:
      The split with what its files are now (without what is lost), and the changes.
    """
    there = {case.name: case for case in (*dataset.training, *dataset.test)}
    lost = [name for name in split.cases if name not in there]
    lost += [
        f"the label of {name}"
        for name, case in split.cases.items()
        if name in there and case.label is not None and there[name].label is None
    ]
    sides = {name: case.side for name, case in split.cases.items() if name in there}
    now = make_split(dataset, sides, known=split)
    before = split.cases
    changed = [
        name
        for name, case in now.cases.items()
        if (case.checksum, case.annotated) != (before[name].checksum, before[name].annotated)
    ]
    new = sorted(name for name in there if name not in split.cases)
    labels = None if dataset.labels == split.labels else dataset.labels
    return now, Changes(tuple(lost), tuple(new), tuple(changed), labels)


def content_checksum(case: Case) -> str:
    """Of the files of a case, as `SplitCase.checksum` gives it.

    Raises:
      UserError: a file cannot be read.
    """
    return " ".join(_hash(_files(path), case.name) for path in (*case.images, case.label) if path is not None)


def same_scans(split: Split) -> list[tuple[str, str]]:
    """Pairs of a training case and one that is held out, `validation` or `test`, whose scans are the same files."""
    trained = {_scan(case): name for name, case in split.cases.items() if case.side == "training"}
    return [
        (trained[_scan(case)], name)
        for name, case in sorted(split.cases.items())
        if case.side in ("validation", "test") and _scan(case) in trained
    ]


def _scan(case: SplitCase) -> tuple[str, ...]:
    return tuple(record.checksum for record in case.images)


def draw_validation(cases: Iterable[Case], *, fraction: float, seed: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Draws a validation set: the same for the same names, fraction and seed, in whatever order the cases come.

    Args:
      cases: with distinct names.
      fraction: the share to validate on, between 0 and 1, rounded to whole cases but at least one on either side; a
        single case is for training.
      seed: of the draw.

    Returns:
      (training, validation), each by name.

    Raises:
      UserError: the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the validation fraction is {fraction}: expected more than 0 and less than 1")
    ordered = sorted(cases, key=lambda case: case.name)
    count = max(0, min(max(1, round(fraction * len(ordered))), len(ordered) - 1))
    drawn = set(np.random.default_rng(seed).permutation(len(ordered))[:count].tolist())
    training = tuple(case for index, case in enumerate(ordered) if index not in drawn)
    return training, tuple(ordered[index] for index in sorted(drawn))


def sides_of(dataset: Dataset, training: Iterable[Case], validation: Iterable[Case]) -> dict[str, str]:
    """The side of every case of a data set, by name."""
    sides = {case.name: "unused" for case in dataset.training}
    sides |= {case.name: "training" for case in training} | {case.name: "validation" for case in validation}
    return sides | {case.name: "test" for case in dataset.test}


def _record(root: Path, path: Path, known: FileRecord | None, case: str) -> FileRecord:
    files = _files(path)
    try:
        statuses = [os.stat(each) for each in files]
    except OSError as error:
        raise UserError(f"case {case}: {path} cannot be read: {error.strerror}") from None
    size, modified = sum(status.st_size for status in statuses), sum(status.st_mtime_ns for status in statuses)
    file = os.path.relpath(path, root)
    if known and (known.bytes, known.modified) == (size, modified):
        return dataclasses.replace(known, file=file)
    header = statuses[0].st_size, statuses[0].st_mtime_ns
    if known and len(files) > 1 and (known.bytes, known.modified) == header:
        return FileRecord(file, size, modified, known.checksum)  # an older record, of the header alone
    return FileRecord(file, size, modified, _hash(files, case))


def _files(path: Path) -> list[Path]:
    """A file and those that hold its voxels; where that is not known, reading the case says why."""
    try:
        return voxel_files(path)
    except (UserError, OSError):
        return [path]


def _hash(files: Iterable[Path], case: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        except OSError as error:
            raise UserError(f"case {case}: {path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()
