"""Evaluations that a run folder holds: whether they are of its model as it is now, and their removal."""

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from autocontext_jax import processes
from autocontext_jax.data.datasets import Case
from autocontext_jax.evaluation.report import read_evaluation
from autocontext_jax.files import writing
from autocontext_jax.jobs.restore import chosen_step, chosen_steps
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import TEST, VALIDATION, RunData
from autocontext_jax.sections import as_dict

Step = int | dict[str, int]  # of a checkpoint; of an ensemble those of its folds


def settings_of(config: RunConfig, step: Step, cases: Sequence[Case]) -> dict[str, Any]:
    """What the numbers of an evaluation depend on, as JSON."""
    predict = {key: value for key, value in as_dict(config.predict).items() if key != "memory"}
    evaluated = {case.name: " ".join([case.checksum, *(case.annotated or ())]) for case in cases}
    settings: dict[str, Any] = {
        "step": step,
        "predict": predict,
        "tolerance": config.evaluate.tolerance,
        "cases": evaluated,
        "metrics": config.evaluate.metrics,
    }
    if config.evaluate.root:
        settings["root"] = str(Path(config.evaluate.root).expanduser().resolve())
    return json.loads(json.dumps(settings))


def is_tested(config: RunConfig, workdir: Path, data: RunData) -> bool:
    """Whether the evaluation that `evaluate_test` would make is there already, and has every case."""
    return _is_of(workdir / TEST, config, data.test, lambda: chosen_steps(config, workdir), whole=True)


def is_evaluated(config: RunConfig, workdir: Path, data: RunData) -> bool:
    """Whether the evaluation that `evaluate_run` would make is there already, and has every case."""
    cases, _ = data.scored()
    return _is_of(workdir, config, cases, lambda: chosen_step(config, workdir), whole=True)


def is_validated(config: RunConfig, workdir: Path, data: RunData, *, whole: bool = False) -> bool:
    """Whether the evaluation that `evaluate_validation` would make is there already; with `whole` every case of it."""
    folder = workdir / VALIDATION
    return _is_of(folder, config, data.validation, lambda: chosen_step(config, workdir), whole=whole)


def _is_of(folder: Path, config: RunConfig, cases: Sequence[Case], chosen: Callable[[], Step], *, whole: bool) -> bool:
    """Whether a folder holds an evaluation of these cases by the checkpoint and under the settings of now."""
    if not processes.gather((folder / "evaluation.json").exists())[0]:
        return False
    expected, found = settings_of(config, chosen(), cases), _read(folder)
    same = found.get("settings") == expected and (not whole or len(found["cases"]) == len(cases))
    return processes.gather(same)[0]


def _read(folder: Path) -> dict[str, Any]:
    """The evaluation in a folder; {} where another job replaces it meanwhile, or it is damaged."""
    try:
        found = read_evaluation(folder)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remove_evaluations(config: RunConfig, workdir: Path) -> None:
    """Removes the results of an earlier training, whose checkpoints somebody has removed: they are another model's."""
    folders = [workdir, workdir / VALIDATION, *workdir.glob("on_*")]
    if config.data.folds and config.data.fold >= 0:
        both = workdir.parent
        if (workdir / VALIDATION / "evaluation.json").exists():
            folders.insert(0, both)  # the table of all folds has these scores too
        folders += [each for each in (both / TEST, *both.glob("on_*")) if workdir.name in _folds_of(each)]
    with writing(workdir):
        for folder in folders:
            for name in ("evaluation.json", "table.md", "table.csv"):
                (folder / name).unlink(missing_ok=True)


def _folds_of(folder: Path) -> Collection[str]:
    """The folds whose ensemble an evaluation is of; none if it is not of an ensemble."""
    step = _read(folder).get("settings", {}).get("step")
    return step if isinstance(step, dict) else ()
