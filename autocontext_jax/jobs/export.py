"""--mode export: a run's trained model as one file."""

import logging
from pathlib import Path

from autocontext_jax import processes
from autocontext_jax.errors import UserError
from autocontext_jax.inference.model_file import SUFFIX
from autocontext_jax.jobs.extensions import Extensions
from autocontext_jax.jobs.restore import restore_model
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import known_split

log = logging.getLogger(__name__)


def export(config: RunConfig, workdir: Path, target: Path | None, extensions: Extensions) -> None:
    """Writes the model file of a run.

    Args:
      config: the run's own, see `config_files.for_inference`.
      workdir: the run folder; nothing in it is changed.
      target: the file; None writes NAME.autocontext into the current folder, where NAME is the run folder's.
      extensions: networks from outside the package.

    Raises:
      UserError: the run has no checkpoint; the name is no model file's; the file cannot be written.
    """
    path = target or Path(f"{workdir.resolve().name}{SUFFIX}")
    if path.suffix != SUFFIX:
        raise UserError(f"--output {path} is no name of a model file; expected one that ends in {SUFFIX}")
    split = processes.agree(lambda: known_split(workdir))
    model, _ = restore_model(config, workdir, split, extensions)
    if not model.description.license:
        log.warning('no license is named; the model card says so: --config.export.license="..."')
    if not model.description.evaluation:
        log.warning("this checkpoint was not evaluated; the model card says so: --mode evaluate")

    def write() -> None:
        model.save(path)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")

    processes.first_does(write)
