"""What a model file says of the run that it is from."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from autocontext_jax.data.fingerprint import Fingerprint
from autocontext_jax.data.split import Split
from autocontext_jax.errors import UserError
from autocontext_jax.evaluation.pictures import class_color
from autocontext_jax.evaluation.report import read_evaluation
from autocontext_jax.inference.description import ClassDescription, Description, NetworkDescription, Tiling
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import TEST, VALIDATION, fold_folder
from autocontext_jax.runtime import package_version


def describe(config: RunConfig, workdir: Path, split: Split, learned: Fingerprint, step: int) -> Description:
    """The description of a run's model.

    Args:
      config: of the run.
      workdir: the run folder.
      split: the run's.
      learned: of its training scans.
      step: of the checkpoint.

    Raises:
      UserError: a code of a class that the run does not know.
    """
    codes = dict(pair.split("=", 1) for pair in config.export.codes)
    if unknown := [name for name in codes if name not in split.classes]:
        raise UserError(
            f"config key export.codes names the class {unknown[0]!r}; expected one of {', '.join(split.classes)}"
        )
    labels = split.labels
    regions = ((), *labels.regions) if labels.regions else ((),) * len(labels.classes)
    classes = tuple(
        ClassDescription(
            name,
            value,
            class_color(number) if number else (),
            codes.get(name, ""),
            tuple(labels.values[member] for member in members),
        )
        for number, (name, value, members) in enumerate(zip(labels.classes, labels.mask_values, regions, strict=True))
    )
    # Only the levels that the model has; its finest level need not be the run's.
    levels = config.levels.with_spacing(learned.spacing).only(config.model_levels())
    network, tiling = dataclasses.asdict(config.model.alone()), config.tiling()
    return Description(
        name=workdir.resolve().name,
        license=config.export.license,
        classes=classes,
        network=NetworkDescription(**network, name=config.model.backbone.rpartition(":")[2]),
        pyramid=config.pyramid,
        image=learned.image,
        levels=levels,
        trained_spacing=(learned.smallest, learned.largest),
        tiling=Tiling(
            tiling.tile,
            tiling.margin,
            tiling.crop_to_body,
            tiling.flip,
            config.augmentation.flip_classes(labels),
            config.augmentation.flip,
        ),
        training=_training(config, split, step),
        evaluation=_evaluation(config, workdir, step),
    )


def _training(config: RunConfig, split: Split, step: int) -> dict[str, Any]:
    sides = [case.side for case in split.cases.values()]
    return {
        "mode": config.train.mode,
        "steps": step,
        "batch_size": config.loader.batch_size,
        "patch_size": [*config.patch_shape],  # as JSON has it
        "training_cases": sides.count("training"),
        "validation_cases": sides.count("validation"),
        "seed": config.seed,
        "autocontext_jax": package_version(),
        "jax": jax.__version__,
    }


def _evaluation(config: RunConfig, workdir: Path, step: int) -> dict[str, Any]:
    """Dice of the finest level, if the run's evaluation is of this model; of a fold that of its validation."""
    return _evaluation_in(workdir, config, step) or _evaluation_in(workdir / VALIDATION, config, step)


def _evaluation_in(folder: Path, config: RunConfig, step: int | dict[str, int]) -> dict[str, Any]:
    tiling = {name: getattr(config.predict, name) for name in ("margin", "crop_to_body", "flip")}
    tiling["tile"] = [*config.predict.tile]  # as JSON has it
    try:
        result = read_evaluation(folder)
        settings, evaluated = result["settings"], result["settings"]["predict"]
        if settings["step"] != step or any(evaluated.get(key, value) != value for key, value in tiling.items()):
            return {}
        return _dice(result)
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # none, or not whole: an evaluation that is written meanwhile


def evaluation_of_folds(config: RunConfig, workdir: Path, steps: dict[str, int]) -> dict[str, Any]:
    """Dice of the finest level of a cross-validation's ensemble on test cases; without it that of its members.

    Each member is scored on the validation cases of its fold. {} if neither evaluation is of these models.

    Args:
      config: how all folds predict.
      workdir: of all folds.
      steps: of each fold's checkpoint, by the name of its folder.
    """
    if of_ensemble := _evaluation_in(workdir / TEST, config, steps):
        return of_ensemble
    try:
        result = read_evaluation(workdir)
        if {fold_folder(workdir, number).name for number in result["folds"].values()} != set(steps):
            return {}
        for name, step in steps.items():
            own = workdir / name / VALIDATION
            scored = read_evaluation(own)["cases"]
            if not _evaluation_in(own, config, step) or scored != {case: result["cases"][case] for case in scored}:
                return {}
        return _dice(
            result | {"cases_are": f"{result['cases_are']}; these are scores of the members, not of the ensemble"}
        )
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _dice(result: dict[str, Any]) -> dict[str, Any]:
    """What a description holds of an evaluation."""
    summary = result["summary"][list(result["summary"])[-1]]
    dice = {name: {key: scores["dice"][key] for key in ("avg", "std", "cases", "missed")}
            for name, scores in summary.items()}  # fmt: skip
    return {"cases_are": result["cases_are"], "dice": dice}
