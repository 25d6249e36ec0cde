"""The config file that a run folder is: what `--config` means where it is left out, with --mode evaluate and others."""

from pathlib import Path

from ml_collections import ConfigDict

from autocontext_jax.errors import UserError
from autocontext_jax.jobs.config_files import read_config, to_config_dict


def get_config(workdir: str) -> ConfigDict:
    """The configuration of the run in a folder, for `--config=saved_config.py:WORKDIR`.

    Raises:
      UserError: there is none.
    """
    config = read_config(Path(workdir).expanduser())
    if config is None:
        raise UserError(f"--workdir {workdir} has no config.json: train there first (--mode train)")
    return to_config_dict(config)
