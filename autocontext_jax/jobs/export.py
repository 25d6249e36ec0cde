"""--mode export: a run's trained model as one file."""

import logging
from collections.abc import Callable
from pathlib import Path

from autocontext_jax import processes
from autocontext_jax.errors import UserError
from autocontext_jax.inference.model import Model
from autocontext_jax.inference.model_file import SUFFIX

log = logging.getLogger(__name__)


def export(load: Callable[[], Model], workdir: Path, target: Path | None) -> None:
    """Writes the model file of a run.

    Args:
      load: gives the run's model.
      workdir: the run folder; nothing in it is changed.
      target: the file; None writes NAME.autocontext into the current folder, where NAME is the run folder's.

    Raises:
      UserError: the name is no model file's; the file cannot be written; as `load` says.
    """
    path = target or Path(f"{workdir.resolve().name}{SUFFIX}")
    if path.suffix != SUFFIX:
        raise UserError(f"--output {path} is no name of a model file; expected one that ends in {SUFFIX}")
    model = load()
    if not model.description.license:
        log.warning('no license is named; the model card says so: --config.export.license="..."')
    if not model.description.evaluation:
        log.warning("this model was not evaluated; the model card says so: --mode evaluate")

    def write() -> None:
        model.save(path)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")

    processes.first_does(write)
