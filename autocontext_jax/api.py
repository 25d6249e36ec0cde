"""What the package exports: training, evaluation and prediction as Python functions. They do what the command does."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from autocontext_jax import runtime
from autocontext_jax.errors import UserError
from autocontext_jax.evaluation.report import read_evaluation
from autocontext_jax.files import full_path
from autocontext_jax.inference.ensemble import ensemble as ensemble
from autocontext_jax.inference.model import Model
from autocontext_jax.jobs import config_files, run
from autocontext_jax.jobs.evaluate import evaluation_folder
from autocontext_jax.jobs.extensions import Extensions
from autocontext_jax.jobs.plan import apply_plan, read_plan
from autocontext_jax.jobs.run_config import config_from_dict
from autocontext_jax.jobs.saved_config import get_config
from autocontext_jax.planning.plan import PlanConfig

Named = Mapping[str, Any]


def default_config() -> ConfigDict:
    """A complete configuration, to be changed: `config.train.steps = 1000`.

    It is locked: a key that does not exist is an error. `autocontext --help-keys` explains every key.
    """
    return config_files.default_config()


def load(path: str | Path, *, networks: Named | None = None, **options: Any) -> Model:
    """The trained model of a model file or of a run folder.

    Args:
      path: of the file NAME.autocontext, or of the folder. That of a cross-validation is the ensemble of the folds that
        are trained to their end.
      networks: classes of networks from outside the package, by the name that the model has for them. A model file
        names its network; it is never imported.
      options: what prediction changes: `tile`, `margin`, `memory`, `crop_to_body` and `flip` as in
        `autocontext --help-keys` under `predict.`; of a run folder also `checkpoint`, "best" or "latest".

    Raises:
      UserError: there is no model, it is damaged, its network is not known, or an option is wrong: one line says what.
    """
    place = full_path(path)
    config = get_config(str(place))
    if place.is_file() and "checkpoint" in options:
        raise UserError("option checkpoint is given with a model file, which has one; expected it with a run folder")
    _change(config, options, ("predict",))
    typed = config_files.from_config_dict(config)
    runtime.set_up_library(dtype=typed.model.dtype)
    paths = run.Paths(workdir=place, model=place if place.is_file() else None)
    return run.load(typed, paths, Extensions(networks=networks or {}))


def plan(
    config: ConfigDict,
    workdir: str | Path,
    *,
    networks: Named | None = None,
    losses: Mapping[str, Callable[..., Any]] | None = None,
) -> ConfigDict:
    """A complete configuration for a data set and the device at hand; `train` takes it, in this folder or another.

    Writes `plan.py` into the folder: the same configuration with a reason for each key.

    Args:
      config: see `default_config`. `config.data.root` names the data set. Keys that differ from their defaults, and
        those that `config.plan.keep` names, stay as they are; `config.plan.minutes` bounds the time.
      workdir: the run folder; it is made.
      networks: as in `train`.
      losses: as in `train`.

    Raises:
      UserError: a mistake in the configuration or in the data, or the device is too small: one line says what.
    """
    values = config.to_dict()
    typed, place = config_from_dict(values | {"plan": values["plan"] | {"automatic": True}}), full_path(workdir)
    runtime.set_up_library(dtype=typed.model.dtype)
    run.run("plan", typed, run.Paths(place), Extensions(networks or {}, losses or {}))
    made = read_plan(place)
    assert made is not None, "--mode plan writes it"
    planned = dataclasses.replace(apply_plan(made, typed), plan=PlanConfig())
    return config_files.to_config_dict(planned)


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    networks: Named | None = None,
    losses: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
    """Prepares a data set and trains a pyramid on it, or goes on where an earlier call stopped.

    SIGTERM and Ctrl-C end it cleanly after the step in hand, with a checkpoint.

    Args:
      config: of the run, see `default_config`. `config.data.root` names the data set.
      workdir: the run folder; it is made. With `config.data.folds` or `config.data.splits` each fold is trained in a
        folder of its own in it, `fold_0`, `fold_1`, ...; or one fold, `config.data.fold`.
      networks: {name: class} of Flax NNX networks from outside the package; `config.model.backbone` takes the name. A
        network is made by `Network(inputs, classes, config, rngs=rngs)`, with the section `model` of the configuration,
        and maps [B, D, H, W, inputs], float32, to logits [B, D, H, W, classes].
      losses: {name: function}; `config.loss.extra` takes names and weights, `(("name", 0.5),)`. A function maps logits
        [B, D, H, W, classes], float32, and labels [B, D, H, W], uint8, to a scalar.

    Raises:
      UserError: a mistake in the configuration or in the data: one line says what, where and what to do.
    """
    typed = config_files.from_config_dict(config)
    runtime.set_up_library(dtype=typed.model.dtype)
    run.run("train", typed, run.Paths(full_path(workdir)), Extensions(networks or {}, losses or {}))


def evaluate(
    workdir: str | Path,
    *,
    networks: Named | None = None,
    metrics: Mapping[str, Callable[..., Any]] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Predicts and scores the scans that a run has held out, and writes its tables.

    Of a cross-validation these are the validation cases of the folds that are trained to their end. Once all are, the
    ensemble of the folds is scored on labelled test cases too, into the folder `test`. With `root` it is scored on
    another data set alone.

    Args:
      workdir: the run folder.
      networks: as in `load`.
      metrics: {name: function} of further metrics, computed beside those that the run's configuration names. A function
        maps the voxels of a class in prediction and truth, [D, H, W] bool each, and the spacing (z, y, x) in mm to a
        number.
      options: keys of `autocontext --help-keys` under `evaluate.` and `predict.`, such as `tolerance`.

    Returns:
      The content of `evaluation.json`: "cases" holds every score of every class, level and scan; "summary" their
      averages. NaN is None, infinity is "inf".

    Raises:
      UserError: there is nothing to evaluate, or a scan cannot be read: one line says what, where and what to do.
    """
    place = full_path(workdir)
    config = get_config(str(place))
    named = dict.fromkeys((*config.evaluate.metrics, *(metrics or {})))
    _change(config, {"metrics": tuple(named), **options}, ("evaluate", "predict"))
    typed = config_files.from_config_dict(config)
    runtime.set_up_library(dtype=typed.model.dtype)
    extensions = Extensions(networks or {}, metrics=metrics or {})
    if not run.run("evaluate", typed, run.Paths(place), extensions):
        raise UserError(f"some scans of {place} could not be scored; each was named, and the others are in its tables")
    folder = evaluation_folder(typed, place)
    if not (folder / "evaluation.json").exists():
        raise UserError(
            f"{place} has no table of all folds: expected each case in the validation of one fold; what each fold "
            "scored is in its folder, fold_N/validation/evaluation.json"
        )
    return read_evaluation(folder)


def _change(config: ConfigDict, options: Named, sections: tuple[str, ...]) -> None:
    """Sets keys of some sections by their last names. They count also where their values are the defaults.

    Raises:
      UserError: an option that no section has.
    """
    for name, value in options.items():
        section = next((section for section in sections if name in config[section]), None)
        if section is None:
            known = [key for section in sections for key in config[section]]
            raise UserError(f"option {name} is unknown; expected one of {', '.join(known)}")
        owner = config[section]
        if config.plan.automatic:
            config.plan.keep = (*config.plan.keep, f"{section}.{name}")
        if isinstance(value, np.generic | np.ndarray):
            value = value.tolist()
        if isinstance(owner[name], tuple) and isinstance(value, int):
            value = (value,)  # such as tile=64
        with owner.ignore_type():  # the typed configuration checks it
            owner[name] = str(value) if isinstance(value, Path) else value
