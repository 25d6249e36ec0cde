"""Which job a mode is, and what of a run folder it may change.

Each job is imported when it is run: together their libraries take seconds to import, and no job needs them all.
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

from autocontext_jax import processes
from autocontext_jax.data import folds
from autocontext_jax.errors import UserError
from autocontext_jax.images.spec import ImageSpec
from autocontext_jax.inference.model import Model, load_file
from autocontext_jax.inference.model_file import read_description
from autocontext_jax.jobs.config_files import for_inference, read_config
from autocontext_jax.jobs.extensions import NO_EXTENSIONS, Extensions
from autocontext_jax.jobs.lock import locked_by_first
from autocontext_jax.jobs.predict import predict
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.saved_config import config_of_model
from autocontext_jax.sections import as_dict, flat_keys

log = logging.getLogger(__name__)

# The modes that only use a run, which knows its own configuration.
USES = ("evaluate", "predict", "report", "export")


@dataclasses.dataclass(frozen=True)
class Paths:
    """The files and folders that a job is given.

    Attributes:
      workdir: the run folder.
      model: a model file in its place, for `predict`.
      source: what `predict` reads.
      series: which DICOM series of it, where only one is read.
      target: what `predict` and `export` write.
    """

    workdir: Path
    model: Path | None = None
    source: Path = Path()
    series: str | None = None
    target: Path | None = None


def run(mode: str, config: RunConfig, paths: Paths, extensions: Extensions = NO_EXTENSIONS) -> bool:
    """Runs the job that a mode names.

    Args:
      mode: `all`, `plan`, `prepare`, `train`, `evaluate`, `predict`, `report` or `export`.
      config: as config file and flags give it.
      paths: where it works.
      extensions: networks, losses and metrics from outside the package.

    Returns:
      False if some of many scans failed.

    Raises:
      UserError: the user's mistake.
    """
    started = time.monotonic()
    if mode in USES:
        return _use(mode, config, paths, extensions)
    if mode == "plan" and not config.plan.automatic:
        raise UserError("--mode plan requires plan.automatic: --config configs/auto.py, or --config.plan.automatic")
    extensions.network(config), extensions.extra_losses(config)  # refused at once
    if mode == "all":
        extensions.extra_metrics(config)
    workdir = paths.workdir
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be made ({error.strerror}): choose another folder") from None
    config = _with_absolute_paths(config)  # a later job may be started from another folder
    config, with_folds = processes.agree(lambda: _as_begun(config, workdir))
    if with_folds:
        from autocontext_jax.jobs.folds import cross_validate

        return cross_validate(mode, config, workdir, extensions, started)
    with locked_by_first(workdir):
        return _make(mode, config, workdir, extensions, started)


def load(config: RunConfig, paths: Paths, extensions: Extensions) -> Model:
    """The model of a run folder or of a model file; of a cross-validation the ensemble of its trained folds.

    Args:
      config: of the run and of what inference changes; of a model file only the section `predict`.
      paths: where it is.
      extensions: networks from outside the package.

    Raises:
      UserError: the user's mistake.
    """
    if paths.model is not None:
        path = paths.model
        options = {name: value for name, value in as_dict(config.predict).items() if name != "checkpoint"}
        return processes.agree(lambda: _from_file(path, config, extensions, options))
    from autocontext_jax.jobs.restore import restore_ensemble, restore_model
    from autocontext_jax.jobs.run_folder import known_split

    workdir = _chosen(config, paths.workdir)
    config = for_inference(config, _saved(workdir), workdir)
    if config.data.holds_folds:
        return restore_ensemble(config, workdir, extensions)[0]
    split = processes.agree(lambda: known_split(workdir))
    return restore_model(config, workdir, split, extensions)[0]


def _image(config: RunConfig, paths: Paths) -> ImageSpec:
    """The channels of a model, which is not loaded yet."""
    if paths.model is not None:
        return read_description(paths.model).image
    from autocontext_jax.jobs.run_folder import read_fingerprint

    workdir = _chosen(config, paths.workdir)
    return read_fingerprint(_saved(workdir), workdir).image


def _from_file(path: Path, config: RunConfig, extensions: Extensions, options: dict[str, Any]) -> Model:
    own, given = (flat_keys(as_dict(each)) for each in (config_of_model(path), config))
    if other := [key for key in own if given[key] != own[key] and not key.startswith("predict.")]:
        raise UserError(f"config key {other[0]} is given with --model {path}; expected only keys of predict.")
    return load_file(path, extensions.networks, options)


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    def absolute(path: str) -> str:
        return path if not path or "://" in path else str(Path(path).expanduser().absolute())

    root = ",".join(absolute(str(folder)) for folder in config.data.folders)
    splits = str(Path(config.data.splits).expanduser()) if config.data.splits else ""
    data = dataclasses.replace(config.data, root=root, prepared=absolute(config.data.prepared), splits=splits)
    return dataclasses.replace(config, data=data)


def _as_begun(config: RunConfig, workdir: Path) -> tuple[RunConfig, bool]:
    """The configuration, and whether the run folder holds folds, each of which is a run of its own.

    A folder in which an earlier version trained one fold of a file, without a folder for the fold, goes on as it is.

    Raises:
      UserError: the folder was begun as another kind.
    """
    saved, data = read_config(workdir), config.data
    begun = saved.data if saved else None
    if begun and begun.folds and begun.fold >= 0:
        raise UserError(
            f"--workdir {workdir} is fold {begun.fold} of a cross-validation; expected the folder of all folds: "
            f"--workdir {workdir.resolve().parent} --config.data.fold={begun.fold}"
        )
    with_folds = data.has_folds and not config.experiment
    if begun and begun.splits and not begun.folds and with_folds and not data.folds:
        if data.fold not in (-1, begun.fold):
            raise UserError(
                f"config key data.fold is {data.fold}; expected {begun.fold}, of which --workdir {workdir} is the run: "
                "choose another --workdir"
            )
        return dataclasses.replace(config, data=dataclasses.replace(data, fold=begun.fold)), False
    holds_folds = begun.holds_folds if begun else (workdir / folds.FILE).exists()
    if holds_folds and not with_folds:
        raise UserError(
            f"--workdir {workdir} holds the folds of a cross-validation ({folds.FILE}); expected their number, "
            f"--config.data.folds={begun.folds if begun else 'N'}, or another --workdir"
        )
    if with_folds and not holds_folds and (begun or (workdir / "split.json").exists()):
        key = f"data.folds is {data.folds}" if data.folds else f"data.splits is {data.splits}"
        raise UserError(
            f"config key {key}, and --workdir {workdir} belongs to a run without folds; expected another --workdir"
        )
    return config, with_folds


def _make(mode: str, config: RunConfig, workdir: Path, extensions: Extensions, started: float) -> bool:
    """The modes that make a run, or go on with it."""
    from autocontext_jax.jobs.prepare import prepare
    from autocontext_jax.jobs.run_folder import open_data

    data = None
    if config.plan.automatic:
        from autocontext_jax.jobs.plan import make_plan

        data = open_data(config, workdir)
        config = make_plan(config, workdir, data, extensions)
        if mode == "plan":
            return True
    if mode == "all" and config.experiment:
        from autocontext_jax.jobs.experiment import experiment

        return experiment(config, workdir, extensions)
    data = prepare(config, workdir, data)
    if mode == "prepare":
        return True
    if config.plan.minutes:
        from autocontext_jax.jobs.timing import fit_minutes

        evaluates = "run" if mode == "all" else ""
        fitted = fit_minutes(config, workdir, data, extensions, started=started, evaluates=evaluates)
        if fitted is None:
            return True  # ended by a signal
        config = fitted
    from autocontext_jax.jobs.train import train

    if not train(config, workdir, data, extensions) or mode == "train":
        return True  # perhaps ended by a signal; what was done is saved
    scored, _ = data.scored()
    if not scored:
        log.warning("every case was trained on: nothing is left to evaluate")
        return True
    from autocontext_jax.jobs.evaluate import evaluate_run

    return evaluate_run(config, workdir, data, extensions)


def _use(mode: str, config: RunConfig, paths: Paths, extensions: Extensions) -> bool:
    """The modes that only use a run."""
    if mode == "predict":
        assert paths.target is not None
        return predict(
            lambda: load(config, paths, extensions),
            lambda: processes.agree(lambda: _image(config, paths)),
            paths.source,
            paths.target,
            paths.series,
        )
    if mode == "export":
        from autocontext_jax.jobs.export import export

        export(lambda: load(config, paths, extensions), _chosen(config, paths.workdir), paths.target)
        return True
    elsewhere = mode == "evaluate" and config.evaluate.root
    workdir = _chosen(config, paths.workdir) if elsewhere else paths.workdir
    config = for_inference(config, _saved(workdir), workdir)
    if mode == "evaluate":
        if config.data.holds_folds and not config.evaluate.root:
            from autocontext_jax.jobs.folds import evaluate_folds

            return evaluate_folds(config, workdir, extensions)
        from autocontext_jax.jobs.evaluate import evaluate

        return evaluate(config, workdir, extensions)
    from autocontext_jax.jobs.report import report

    processes.first_does(lambda: report(config, workdir))
    return True


def _chosen(config: RunConfig, workdir: Path) -> Path:
    """The run folder to use: of a cross-validation that of a fold, if the configuration names one."""
    from autocontext_jax.jobs.run_folder import fold_folder

    one = _saved(workdir).data.holds_folds and config.data.fold >= 0
    return fold_folder(workdir, config.data.fold) if one else workdir


def _saved(workdir: Path) -> RunConfig:
    saved = processes.agree(lambda: read_config(workdir))
    if saved is None:
        raise UserError(f"--workdir {workdir} has no config.json: train there first (--mode train)")
    return saved
