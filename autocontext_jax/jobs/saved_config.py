"""The config file that a run folder or a model file is: what `--config` means where it is left out."""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from autocontext_jax.errors import UserError
from autocontext_jax.files import exists, full_path, is_file
from autocontext_jax.inference.model_file import read_description
from autocontext_jax.jobs.config_files import read_config, to_config_dict
from autocontext_jax.jobs.run_config import ModelConfig, RunConfig


def get_config(path: str) -> ConfigDict:
    """The configuration of a run folder or of a model file, for `--config=saved_config.py:PATH`.

    Raises:
      UserError: there is none.
    """
    place = full_path(path)
    if not exists(place):
        raise UserError(f"{place} does not exist; expected a model file NAME.autocontext or the folder of a run")
    if is_file(place):
        return to_config_dict(config_of_model(place))
    config = read_config(place)
    if config is None:
        raise UserError(f"run folder {place} has no config.json: train there first (--mode train)")
    return to_config_dict(config)


def config_of_model(path: Path) -> RunConfig:
    """The configuration of a model file, as far as prediction depends on it; the other sections have their defaults.

    Raises:
      UserError: see `model_file.read_model`.
    """
    description = read_description(path)
    network, tiling, default = description.network, description.tiling, RunConfig()
    return dataclasses.replace(
        default,
        model=ModelConfig(**dataclasses.asdict(network.alone())),
        pyramid=description.pyramid,
        levels=description.levels,
        loader=dataclasses.replace(default.loader, patch_size=(max(64, *(2 * unit for unit in network.divisor)),)),
        augmentation=dataclasses.replace(default.augmentation, flip=tiling.flip_axes),
        predict=dataclasses.replace(
            default.predict,
            tile=tiling.tile,
            margin=tiling.margin,
            crop_to_body=tiling.crop_to_body,
            flip=tiling.flip,
        ),
    )
