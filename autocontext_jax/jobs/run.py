"""Which job a mode is, and what of a run folder it may change."""

import contextlib
import dataclasses
import logging
from pathlib import Path

from autocontext_jax import processes
from autocontext_jax.errors import UserError
from autocontext_jax.jobs.config_files import for_inference, read_config
from autocontext_jax.jobs.evaluate import evaluate, evaluate_run
from autocontext_jax.jobs.experiment import experiment
from autocontext_jax.jobs.lock import locked
from autocontext_jax.jobs.predict import predict
from autocontext_jax.jobs.prepare import prepare
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.train import train

log = logging.getLogger(__name__)


def run(mode: str, config: RunConfig, workdir: Path, source: Path, target: Path) -> bool:
    """Runs the job that a mode names.

    Args:
      mode: `all`, `prepare`, `train`, `evaluate`, `predict` or `report`.
      config: as config file and flags give it.
      workdir: the run folder.
      source: what `predict` reads.
      target: what `predict` writes.

    Returns:
      False if some of many scans failed.

    Raises:
      UserError: the user's mistake.
    """
    if mode in ("evaluate", "predict", "report"):
        saved = processes.agree(lambda: read_config(workdir))
        if saved is None:
            raise UserError(f"--workdir {workdir} has no config.json: train there first (--mode train)")
        return _use(mode, for_inference(config, saved, workdir), workdir, source, target)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be made ({error.strerror}): choose another folder") from None
    config = _with_absolute_paths(config)  # a later job may be started from another folder
    with contextlib.ExitStack() as held:
        processes.first_does(lambda: held.enter_context(locked(workdir)))
        return _make(mode, config, workdir)


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    def absolute(path: str) -> str:
        return path if not path or "://" in path else str(Path(path).expanduser().absolute())

    data = dataclasses.replace(config.data, root=absolute(config.data.root), prepared=absolute(config.data.prepared))
    return dataclasses.replace(config, data=data)


def _make(mode: str, config: RunConfig, workdir: Path) -> bool:
    """The modes that make a run, or go on with it."""
    if mode == "all" and config.experiment:
        return experiment(config, workdir)
    data = prepare(config, workdir)
    if mode == "prepare":
        return True
    if not train(config, workdir, data) or mode == "train":
        return True  # perhaps ended by a signal; what was done is saved
    scored, _ = data.scored()
    if not scored:
        log.warning("every case was trained on: nothing is left to evaluate")
        return True
    return evaluate_run(config, workdir, data)


def _use(mode: str, config: RunConfig, workdir: Path, source: Path, target: Path) -> bool:
    """The modes that only use a run."""
    if mode == "predict":
        return predict(config, workdir, source, target)
    if mode == "evaluate":
        return evaluate(config, workdir)
    from autocontext_jax.jobs.report import report  # needs plotly and others that nothing else does

    processes.first_does(lambda: report(config, workdir))
    return True
