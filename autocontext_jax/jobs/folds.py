"""Cross-validation: a model for each fold, and a table of all cases, each scored by the model that has not seen it.

    WORKDIR/splits_final.json    the folds, as nnU-Net writes them
    WORKDIR/prepared/            every case, prepared once for all folds
    WORKDIR/fold_0/, ...         a run folder each; `validation/` in it has the scores of its validation cases
    WORKDIR/evaluation.json      every case once; and table.md, table.csv
    WORKDIR/test/                the scores of test cases, predicted by the ensemble of the folds

The folds share what decides the grids of the levels and how cases are stored: the median spacing, and whether the
background is cut out, are those of the cases of all folds. They would otherwise differ a little from fold to fold, the
models would work on different grids, and every case would be prepared again for each. nnU-Net does the same. Without a
plan no label of a case that is held out enters; a plan is one for all folds, and also counts the voxels of the classes
in the label maps of all cases. What CT is normalised by is learned for each fold from its training cases alone.
"""

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autocontext_jax import processes
from autocontext_jax.data.datasets import Dataset
from autocontext_jax.data.folds import FILE, Fold, as_text, draw_folds, read_folds, validated_twice
from autocontext_jax.data.split import Split, make_split, sides_of
from autocontext_jax.errors import UserError, counted, some
from autocontext_jax.evaluation import report
from autocontext_jax.files import write_json, write_whole, writing
from autocontext_jax.jobs.config_files import check_same_run, read_config, write_config
from autocontext_jax.jobs.evaluate import evaluate_test, evaluate_validation
from autocontext_jax.jobs.evaluations import is_tested, is_validated
from autocontext_jax.jobs.extensions import Extensions
from autocontext_jax.jobs.lock import locked_by_first
from autocontext_jax.jobs.plan import make_plan
from autocontext_jax.jobs.prepare import learn, prepare_cases
from autocontext_jax.jobs.restore import is_trained, trained_folds
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import (
    VALIDATION,
    RunData,
    fold_folder,
    has_begun,
    open_data,
    read_data,
    read_fingerprint,
    read_split,
    write_split,
)
from autocontext_jax.jobs.timing import fit_minutes
from autocontext_jax.jobs.train import train

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The run of one fold.

    Attributes:
      config: its configuration.
      folder: its run folder.
      data: its data; with the fingerprint of all folds until `_begin` has been called.
    """

    config: RunConfig
    folder: Path
    data: RunData


def cross_validate(mode: str, config: RunConfig, workdir: Path, extensions: Extensions, started: float) -> bool:
    """Prepares all cases and trains one fold or every fold; each goes on where it stopped.

    Args:
      mode: `plan`, `prepare`, `train`; or `all`, which also scores each fold's validation cases and writes the table
        of the folds that are done.
      config: `data.folds` or `data.splits` says which folds there are, `data.fold` which one is trained, -1 every one.
      workdir: of all folds.
      extensions: networks, losses and metrics from outside the package.
      started: when the job did, of `time.monotonic`.

    Returns:
      False if scans or labels could not be read.

    Raises:
      UserError: see `prepare`, `train` and `evaluate_run`; there are too few cases; the folds are not those that the
        folder was begun with.
    """
    # Folds may be trained by several commands at the same time: the first prepares the cases, the others wait for it.
    with locked_by_first(workdir, "folds", wait=True):
        data = open_data(config, workdir, lambda config, dataset: _first_split(config, dataset, workdir))
        folds = processes.agree(lambda: _checked_folds(config, data, workdir))
        chosen = range(len(folds)) if config.data.fold < 0 else [config.data.fold]
        shared = dataclasses.replace(config.data, folds=len(folds), fold=-1, splits="")  # which workdir/FILE says
        config = dataclasses.replace(config, data=shared)
        if config.plan.automatic:
            config = make_plan(config, workdir, data, extensions, runs=len(chosen))
        if mode == "plan":
            return True
        processes.agree(lambda: _check_same(config, workdir))
        prepare_cases(config, data)
        if mode == "prepare":
            return True
        if config.plan.minutes:
            first = _run(config, workdir, data, folds, chosen[0])
            processes.first_does(lambda: _make_folder(first.folder))
            first = _begin(first)
            fitted = fit_minutes(
                config, workdir, first.data, extensions, started=started, runs=len(chosen),
                evaluates="validation" if mode == "all" else "",
            )  # fmt: skip
            if fitted is None:
                return True  # ended by a signal
            config = fitted
        processes.first_does(lambda: write_config(config, workdir))
    good = True
    for number in chosen:
        log.info("fold %d of 0 to %d", number, len(folds) - 1)
        run = _run(config, workdir, data, folds, number)
        processes.first_does(lambda folder=run.folder: _make_folder(folder))  # type: ignore[misc]
        with locked_by_first(run.folder):
            run = _begin(run)
            if not train(run.config, run.folder, run.data, extensions):
                return True  # a signal ended it; what was done is saved
            if mode == "all":
                good &= _validate(run, extensions)
    if mode == "all":
        _write_table(config, workdir, data, folds, extensions)
    return good


def evaluate_folds(config: RunConfig, workdir: Path, extensions: Extensions) -> bool:
    """Scores the validation cases of every fold that is trained, unless that was done, and writes the table.

    Once all folds are trained, labelled test cases are scored too, by the ensemble of the folds.

    Returns:
      False if scans or labels could not be read.

    Raises:
      UserError: no fold is trained to its end; see `evaluate_run`.
    """
    data = processes.agree(lambda: read_data(config, workdir))
    folds = processes.agree(lambda: _checked_folds(config, data, workdir))
    trained, good = trained_folds(config, workdir), True
    for number in trained:
        good &= _validate(_run(config, workdir, data, folds, number), extensions)
    _write_table(config, workdir, data, folds, extensions)
    if data.test and len(trained) == len(folds) and not is_tested(config, workdir, data):
        good &= evaluate_test(config, workdir, data, extensions)
    return good


# ---- which folds there are


def _first_split(config: RunConfig, dataset: Dataset, workdir: Path) -> Split:
    """Writes the folds, unless their file is there, and takes every case that one of them names, to be prepared."""
    path, names, given = workdir / FILE, [case.name for case in dataset.training], config.data.splits
    if not path.exists():
        folds = read_folds(names, given) if given else draw_folds(names, config.data.folds, dataset.place)
        _check_number(config, folds, given)
        write_whole(path, as_text(folds))
    named = _named(read_folds(names, path))
    return make_split(dataset, sides_of(dataset, [case for case in dataset.training if case.name in named], []))


def _checked_folds(config: RunConfig, data: RunData, workdir: Path) -> tuple[Fold, ...]:
    """The folds that the folder was begun with.

    Raises:
      UserError: the configuration names other folds, or the file of the folds was changed.
    """
    path, names = workdir / FILE, [case.name for case in data.dataset.training]
    folds = read_folds(names, path)
    _check_number(config, folds, str(path))
    if config.data.splits and read_folds(names, config.data.splits) != folds:
        raise UserError(
            f"config key data.splits is {config.data.splits}, which has other folds than {path}; expected those with "
            "which the run began: choose another --workdir"
        )
    if config.data.fold >= len(folds):
        raise UserError(
            f"config key data.fold is {config.data.fold}; expected one of 0 to {len(folds) - 1}, or -1 for every fold"
        )
    known = {name for name, case in data.split.cases.items() if case.side == "training"}
    if more := sorted(_named(folds) - known):
        raise UserError(f"{path} names {some(more)}, which it did not when the run began: bring the file back")
    if (fewer := sorted(known - _named(folds))) and config.data.new_cases != "train":
        raise UserError(
            f"{path} does not name {some(fewer)}, which {workdir / 'split.json'} has for training: bring the file "
            "back, or train every fold on what was added later too, --config.data.new_cases=train"
        )
    return folds


def _check_number(config: RunConfig, folds: Sequence[Fold], place: str) -> None:
    if config.data.folds not in (0, len(folds)):
        raise UserError(f"config key data.folds is {config.data.folds}; expected {len(folds)}, as {place} has")


def _check_same(config: RunConfig, workdir: Path) -> None:
    """All folds have one configuration: refuses another one as soon as a fold has a checkpoint."""
    saved = read_config(workdir)
    if saved is not None and has_begun(workdir):
        check_same_run(config, saved, workdir)


def _named(folds: Sequence[Fold]) -> set[str]:
    return {name for fold in folds for name in (*fold.training, *fold.validation)}


# ---- the run of a fold


def _run(config: RunConfig, workdir: Path, data: RunData, folds: Sequence[Fold], number: int) -> _Run:
    """The run of a fold, which lies in a folder of its own over the data of all.

    Raises:
      UserError: it was begun with other cases.
    """
    folder, fold, named = fold_folder(workdir, number), folds[number], _named(folds)

    def side(name: str, before: str) -> str:
        if name in fold.validation:
            return "validation"
        # What no fold names was added later, and taken into training.
        taken = name in fold.training or (before == "training" and name not in named)
        return "training" if taken else before if before == "test" else "unused"

    cases = {name: dataclasses.replace(case, side=side(name, case.side)) for name, case in data.split.cases.items()}
    known = processes.agree(lambda: read_split(folder))
    for name, case in known.cases.items() if known else ():
        if name in cases and case.side != cases[name].side:
            raise UserError(
                f"{folder / 'split.json'} has case {name} for {case.side}; expected {cases[name].side}, as {FILE} "
                "says: bring back the file with which the run began"
            )
    root = ",".join(str(source.resolve()) for source in data.dataset.sources)
    own = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, fold=number, root=root, prepared=data.store),
        phantom=dataclasses.replace(config.phantom, training=0),
    )
    return _Run(own, folder, dataclasses.replace(data, split=dataclasses.replace(data.split, cases=cases)))


def _make_folder(folder: Path) -> None:
    with writing(folder):
        folder.mkdir(exist_ok=True)


def _begin(run: _Run) -> _Run:
    """Writes what a run folder says of its data; what was learned of it stays as soon as there is a checkpoint."""
    folder, data = run.folder, run.data

    def write() -> None:
        if read_split(folder) != data.split:
            write_split(data.split, folder)
        if not (has_begun(folder) and (folder / "fingerprint.json").exists()):
            write_json(folder / "fingerprint.json", data.fingerprint.to_json())

    processes.first_does(write)
    data = dataclasses.replace(data, fingerprint=read_fingerprint(run.config, folder))
    return dataclasses.replace(run, data=learn(run.config, folder, data))


def _validate(run: _Run, extensions: Extensions) -> bool:
    """Scores the validation cases, unless that was done; False if some could not be read."""
    if not run.data.validation:
        log.warning("%s has no validation case: nothing of it is scored", run.folder)
        return True
    if is_validated(run.config, run.folder, run.data, whole=True):
        return True
    return evaluate_validation(run.config, run.folder, run.data, extensions)


# ---- the table of all


def _scores(run: _Run) -> dict[str, dict[str, Any]]:
    return report.read_cases(run.folder / VALIDATION / "evaluation.json")


def _write_table(
    config: RunConfig, workdir: Path, data: RunData, folds: Sequence[Fold], extensions: Extensions
) -> None:
    """Writes and prints the evaluation of all folds that are done: every validation case once, out of fold."""
    if twice := validated_twice(folds):
        log.warning(
            "no table of all folds is written: case %s is in val of folds %d and %d, and each case is scored once",
            *twice,
        )
        return
    # Two commands that end at the same time write it one after the other: the second one has the scores of both folds.
    with locked_by_first(workdir, "evaluation", wait=True):
        cases: dict[str, dict[str, Any]] = {}
        fold_of: dict[str, int] = {}
        missing = []
        for number, fold in enumerate(folds):
            run = _run(config, workdir, data, folds, number)
            trained = is_trained(run.config, run.folder)
            if fold.validation and trained and is_validated(run.config, run.folder, run.data):
                found = _scores(run)
                cases |= found
                fold_of |= dict.fromkeys(found, number)
            elif fold.validation:
                missing.append(number)
        if missing:
            log.warning(
                "not trained and scored yet, and not in the table: %s",
                ", ".join(f"fold {number}" for number in missing),
            )
        if not cases:
            return
        of_all = sum(len(fold.validation) for fold in folds)
        names = [f"level_{level}" for level in config.model_levels()]
        result = report.evaluation(
            {name: cases[name] for name in sorted(cases)},
            data.classes[1:],
            cases_are=_cases_are(len(cases), of_all, missing, best=config.predict.checkpoint == "best"),
            tolerance=config.evaluate.tolerance,
            pairs=[(finer, coarser) for coarser, finer in itertools.pairwise(names)],
            extra_metrics=list(extensions.extra_metrics(config)),
        )

        def write() -> None:
            report.write(result | {"folds": {name: fold_of[name] for name in sorted(cases)}}, workdir)
            print(report.table(result))

        processes.first_does(write)


def _cases_are(number: int, of_all: int, missing: Sequence[int], *, best: bool) -> str:
    """What `report.evaluation` takes."""
    text = counted(of_all, "case") if number == of_all else f"{number} of {counted(of_all, 'case')}"
    text += ", each scored by the model of the fold that was not trained on it"
    if missing:
        text += f"; missing: {'fold' if len(missing) == 1 else 'folds'} {', '.join(map(str, missing))}"
    return text + ("; the cases also chose the checkpoints: scores are optimistic" if best else "")
