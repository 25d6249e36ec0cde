"""A run folder knows its data: the data set of a run, split once into what is trained on, validated on and scored.

`split.json` is written by the run's first start. Every later start compares the data set with it (see
`data/split.py`) and names what is lost, changed or new in one line.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autocontext_jax import processes
from autocontext_jax.data.combination import read_datasets
from autocontext_jax.data.datasets import Case, Dataset
from autocontext_jax.data.fingerprint import FORMAT as fingerprint_format
from autocontext_jax.data.fingerprint import Fingerprint, fingerprint, made_from
from autocontext_jax.data.folds import read_fold
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.phantom.dataset import write_dataset
from autocontext_jax.data.split import (
    FORMAT,
    Changes,
    Split,
    compare,
    draw_validation,
    make_split,
    same_scans,
    sides_of,
)
from autocontext_jax.errors import UserError, counted, some
from autocontext_jax.files import read_json, write_json, writing
from autocontext_jax.images.spec import CT, ImageSpec, ct_image, image_spec
from autocontext_jax.jobs.lock import is_locked
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.training.phases import MODES

log = logging.getLogger(__name__)

VALIDATION = "validation"  # the folder of a fold's evaluation, as nnU-Net calls it
TEST = "test"  # the folder of the evaluation of test cases by an ensemble of folds


def fold_folder(workdir: Path, number: int) -> Path:
    """The run folder of a fold, in that of its cross-validation."""
    return workdir / f"fold_{number}"


@dataclasses.dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
      dataset: as its folder describes it.
      split: which case is for what.
      fingerprint: of the training scans.
      store: where prepared cases lie, a folder or URL.
    """

    dataset: Dataset
    split: Split
    fingerprint: Fingerprint
    store: str

    @property
    def image(self) -> ImageSpec:
        """The channels, and how they are normalised."""
        return self.fingerprint.image

    @property
    def labels(self) -> LabelSpec:
        """What label maps hold and what is learned of it."""
        return self.split.labels

    @property
    def classes(self) -> tuple[str, ...]:
        """[K] names, background first."""
        return self.split.classes

    @property
    def training(self) -> Sequence[Case]:
        """The cases trained on."""
        return self.split.of("training", self.dataset)

    @property
    def validation(self) -> Sequence[Case]:
        """The cases that choose the best checkpoint."""
        return self.split.of("validation", self.dataset)

    @property
    def test(self) -> Sequence[Case]:
        """The test cases that have labels."""
        return [case for case in self.split.of("test", self.dataset) if case.label is not None]

    def scored(self, *, best: bool = True) -> tuple[Sequence[Case], Callable[[int], str]]:
        """The cases to score, none if every case was trained on; and what they are, from the number of them scored.

        Args:
          best: whether the checkpoint is the one that scored best on the validation cases.
        """
        if test := self.test:
            return test, lambda number: counted(number, "test case")
        return self.held_out(best=best)

    def held_out(self, *, best: bool) -> tuple[Sequence[Case], Callable[[int], str]]:
        """`scored` of the validation cases, also where there are test cases."""
        optimistic = ", which also chose the checkpoint: scores are optimistic" if best else ""
        return self.validation, lambda number: counted(number, "validation case") + optimistic


def open_data(
    config: RunConfig, workdir: Path, first_split: Callable[[RunConfig, Dataset], Split] | None = None
) -> RunData:
    """The data of a run that may go on: splits the data set at the first start, compares it at every later one.

    Phantoms are generated first if the configuration says so.

    Args:
      config: of the run.
      workdir: the run folder.
      first_split: how the data set is split at the first start; None is as the configuration says.

    Raises:
      UserError: the data set cannot be read; cases of the split are lost; its classes have changed.
    """
    read = []  # once, since reading warns

    def prepare() -> None:
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
        dataset = _read_dataset(config, workdir, generate=True)
        read.append(dataset)
        known = read_split(workdir)
        if known is None:
            split = (first_split or _first_split)(config, _with_training(dataset))
        else:
            split = _checked(config, dataset, known, workdir)
        if split != known:
            write_split(split, workdir)
        _take_fingerprint(config, workdir, dataset, split)

    processes.first_does(prepare)
    split = read_split(workdir)
    assert split is not None
    dataset = read.pop() if read else _read_dataset(config, workdir)
    return RunData(dataset, split, read_fingerprint(config, workdir), _store(config, workdir))


def read_data(config: RunConfig, workdir: Path) -> RunData:
    """The data of a run that is only looked at: nothing is written.

    Raises:
      UserError: there is no split, or what it names is lost.
    """
    known = known_split(workdir)
    dataset = _read_dataset(config, workdir)
    split = _checked(config, dataset, known, workdir)
    return RunData(dataset, split, read_fingerprint(config, workdir), _store(config, workdir))


def read_split(workdir: Path) -> Split | None:
    """The split of a run; None if it has none yet.

    Raises:
      UserError: `split.json` is damaged.
    """
    path = workdir / "split.json"
    return Split.from_json(read_json(path, FORMAT)) if path.exists() else None


def write_split(split: Split, workdir: Path) -> None:
    """Writes the split of a run. A scan that is trained on and held out too is named: its score says little."""
    for trained, held_out in same_scans(split):
        log.warning(
            "%s: the training case %s and the %s case %s have the same scan, and their score is too good: remove one, "
            "or put both on one side by data.splits", workdir, trained, split.cases[held_out].side, held_out,
        )  # fmt: skip
    write_json(workdir / "split.json", split.to_json())


def read_fingerprint(config: RunConfig, workdir: Path) -> Fingerprint:
    """The fingerprint of a run's training scans.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = workdir / "fingerprint.json"
    if not path.exists():
        raise UserError(f"run folder {workdir} has no fingerprint.json: train there first (--mode train)")
    # Runs without an image in it had CT and a fixed window.
    default = ct_image(config.data.window) if config.data.window else CT
    return Fingerprint.from_json(read_json(path, fingerprint_format), place=str(path), default=default)


def write_learned(workdir: Path, known: Fingerprint, **learned: Any) -> None:
    """Completes the fingerprint of a run folder, `read_fingerprint`, by what was learned since: image or survey."""
    completed = dataclasses.replace(known, **learned)
    if completed != known:
        write_json(workdir / "fingerprint.json", completed.to_json())


def _take_fingerprint(config: RunConfig, workdir: Path, dataset: Dataset, split: Split) -> None:
    """Writes the fingerprint. It is made anew as long as nothing is trained; then the run keeps it.

    Raises:
      UserError: the channels of a run that has begun have changed.
    """
    cases = split.of("training", dataset)
    declared = image_spec(dataset.channels, config.data.normalization, config.data.window)
    if (workdir / "fingerprint.json").exists():
        known = read_fingerprint(config, workdir)
        if known.made_from == made_from(cases, declared):
            return
        if has_begun(workdir):  # training refuses another configuration
            names = [tuple(channel.name for channel in image.channels) for image in (declared, known.image)]
            if known.made_from and names[0] != names[1]:
                raise UserError(
                    f"data set {dataset.place} has the channels {names[0]}; expected {names[1]}, with which the run "
                    "began: set dataset.json back, or start in another --workdir"
                )
            return
    write_json(workdir / "fingerprint.json", fingerprint(cases, declared).to_json())


def has_begun(workdir: Path) -> bool:
    """Whether a run, or one of an experiment or of a cross-validation, has a checkpoint; or a fold is trained now."""
    folds = list(workdir.glob("fold_*"))
    runs = (workdir, *folds, *(workdir / mode for mode in MODES))
    return any(step.name.isdigit() for run in runs for step in run.glob("checkpoints/*")) or any(map(is_locked, folds))


def known_split(workdir: Path) -> Split:
    """The split of a run that has one.

    Raises:
      UserError: it has none, or `split.json` is damaged.
    """
    split = read_split(workdir)
    if split is None:
        raise UserError(f"run folder {workdir} has no split.json: train there first (--mode train)")
    return split


def _store(config: RunConfig, workdir: Path) -> str:
    return config.data.prepared or str(workdir.absolute() / "prepared")


def _read_dataset(config: RunConfig, workdir: Path, *, generate: bool = False) -> Dataset:
    folders = config.data.folders or (workdir / "phantoms",)
    if config.phantom.training and generate:
        if len(folders) > 1:
            raise UserError(
                f"config key data.root names {len(folders)} folders, and phantom.training is "
                f"{config.phantom.training}; expected one folder for phantoms, or --config.phantom.training=0"
            )
        write_dataset(
            folders[0],
            training=config.phantom.training,
            test=config.phantom.test,
            size=config.phantom.size,
            spacing=config.phantom.spacing,
            look_alikes=config.phantom.look_alikes,
            seed=config.seed,
        )
    elif not config.data.root and not config.phantom.training:
        raise UserError("config key data.root is empty; expected the folder of the data set: --config.data.root=FOLDER")
    return read_datasets(folders, outside_paths=config.data.outside_paths)


def _with_training(dataset: Dataset) -> Dataset:
    """The data set, if it has training cases.

    Raises:
      UserError: it has none.
    """
    if not dataset.training:
        raise UserError(
            f"data set {dataset.place} has no training case, only test cases: expected images in imagesTr and their "
            "labels in labelsTr to train on; a trained run scores it by --mode evaluate "
            f"--config.evaluate.root={dataset.sources[0]}"
        )
    return dataset


def _first_split(config: RunConfig, dataset: Dataset) -> Split:
    if config.data.splits:
        training, validation = read_fold(dataset.training, Path(config.data.splits), config.data.fold)
    else:
        training, validation = draw_validation(
            dataset.training, fraction=config.data.validation_fraction, seed=config.seed
        )
    return make_split(dataset, sides_of(dataset, training, validation))


def _checked(config: RunConfig, dataset: Dataset, known: Split, workdir: Path) -> Split:
    """The split with what its files are now and with new cases as the configuration says; tells of every change.

    Raises:
      UserError: something is lost, or the classes have changed.
    """
    now, changes = compare(known, dataset)
    _refuse(changes, known, dataset, workdir)
    if changes.changed:
        sides = {side: sorted(name for name in changes.changed if now.cases[name].side == side) for side in
                 ("training", "validation", "test")}  # fmt: skip
        told = "; ".join(f"{side}: {some(names)}" for side, names in sides.items() if names)
        log.warning(
            "%s: %s changed since the run began (%s): prepared again where they are trained on; what was trained so "
            "far has seen the old ones", dataset.place, counted(len(changes.changed), "case"), told,
        )  # fmt: skip
    if not changes.new:
        return now
    trainable = {case.name for case in dataset.training}
    taken = [name for name in changes.new if name in trainable] if config.data.new_cases == "train" else []
    if taken:
        log.warning("%s: %s taken into training: %s", dataset.place, counted(len(taken), "new case"), some(taken))
        every = {name: case.side for name, case in now.cases.items()} | dict.fromkeys(taken, "training")
        now = make_split(dataset, every, known=now)
    if left := [name for name in changes.new if name not in taken]:
        remedy = ". --config.data.new_cases=train takes new training cases into training"
        log.warning(
            "%s: %s since the run began, neither trained on nor scored: %s%s",
            dataset.place, counted(len(left), "case was added", "cases were added"), some(left),
            remedy if trainable & set(left) else "",
        )  # fmt: skip
    return now


def _refuse(changes: Changes, known: Split, dataset: Dataset, workdir: Path) -> None:
    if changes.lost:
        raise UserError(
            f"data set {dataset.place} lacks {some(changes.lost)}, which {workdir / 'split.json'} names: bring "
            f"{'it' if len(changes.lost) == 1 else 'them'} back, name the folder that has "
            f"{'it' if len(changes.lost) == 1 else 'them'} (--config.data.root=FOLDER), or start in another --workdir; "
            "--mode evaluate scores another data set by --config.evaluate.root=FOLDER"
        )
    if changes.labels:
        raise UserError(
            f"data set {dataset.place} has the labels {changes.labels.shown()}; expected {known.labels.shown()}, with "
            "which the run began: set dataset.json back, or start in another --workdir"
        )
