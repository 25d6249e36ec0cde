"""What a run refuses before it starts: values that no job could work with."""

import itertools
from typing import Any

from ml_collections import ConfigDict

from autocontext_jax.data.sampling import CENTRES
from autocontext_jax.errors import UserError
from autocontext_jax.jobs.config import BACKBONES, flat_keys
from autocontext_jax.models.pyramid import CONTEXTS
from autocontext_jax.training.optimizers import SCHEDULES
from autocontext_jax.training.phases import MODES

# What the items of a tuple are, and how many there can be where their number is fixed.
TUPLES: dict[str, tuple[type, tuple[int, ...]]] = {
    "experiment": (str, ()),
    "data.labels": (str, ()),
    "phantom.size": (int, (3,)),
    "phantom.spacing": (float, (3,)),
    "levels.factors": (float, ()),
    "levels.finest_spacing": (float, (0, 3)),
    "spatial.mirror_pairs": (str, ()),
    "pyramid.window": (float, (2,)),
    "loss.level_weights": (float, ()),
    "evaluate.labels": (str, ()),
}

# The largest that make sense: a slip of the keyboard must not take all memory or all time.
LARGEST = {"model.depth": 10, "model.width": 4096, "feed.edge": 4096, "predict.tile": 4096, "predict.plane": 2**16}


def check(config: ConfigDict) -> None:
    """Refuses what cannot run.

    Raises:
      UserError: names the key, the value found and the value wanted.
    """
    _check_values(config)
    divisor = 2 ** (config.model.depth - 1)
    for key, edge in (("feed.edge", config.feed.edge), ("predict.tile", config.predict.tile)):
        wanted = max(4, divisor)
        if edge <= 0 or edge % wanted:
            raise UserError(
                f"config key {key} is {edge}; wanted a positive multiple of {wanted}, as model.depth "
                f"{config.model.depth} asks: choose {wanted * max(1, edge // wanted)}"
            )
    for section, key, edge in (
        ("mesh", "feed.edge", config.feed.edge),
        ("predict", "predict.tile", config.predict.tile),
    ):
        space = config[section].space
        if space < 1 or edge % (space * divisor) or (space > 1 and config.levels.rank == 2):
            raise UserError(
                f"config key {section}.space is {space}; wanted devices that each take a multiple of {divisor} of the "
                f"{edge} planes of {key}, of rank 3: choose 1 or one of "
                f"{[n for n in range(2, edge) if edge % (n * divisor) == 0]}"
            )
    factors = tuple(config.levels.factors)
    if not factors or factors[-1] <= 0 or any(a != 2 * b for a, b in itertools.pairwise(factors)):
        raise UserError(
            f"config key levels.factors is {factors}; wanted factors that halve from level to level, coarsest first, "
            "such as (4, 2)"
        )
    spacing = tuple(config.levels.finest_spacing)
    if spacing and (len(spacing) != 3 or min(spacing) <= 0):
        raise UserError(f"config key levels.finest_spacing is {spacing}; wanted (z, y, x) in mm, or ()")
    if config.levels.rank not in (2, 3):
        raise UserError(f"config key levels.rank is {config.levels.rank}; wanted 3, or 2 to see a scan slice by slice")
    weights = config.loss.level_weights
    if weights and len(weights) != len(factors):
        raise UserError(
            f"config key loss.level_weights is {weights}; wanted {len(factors)} numbers, one a level, or ()"
        )
    choices: dict[str, tuple[str, ...]] = {
        "feed.centre": CENTRES,
        "train.mode": MODES,
        "pyramid.context": CONTEXTS,
        "model.backbone": tuple(BACKBONES),
        "model.norm": ("batch", "none"),
        "model.dtype": ("float32", "bfloat16"),
        "optimizer.schedule": SCHEDULES,
        "train.non_finite": ("stop", "skip"),
        "predict.checkpoint": ("best", "latest"),
    }
    for key, allowed in choices.items():
        value = _get(config, key)
        if value not in allowed:
            raise UserError(f"config key {key} is {value!r}; wanted one of {', '.join(allowed)}")
    if not set(config.experiment) <= set(MODES):
        raise UserError(f"config key experiment is {tuple(config.experiment)}; wanted some of {', '.join(MODES)}")
    low, high = config.pyramid.window
    if not low < high:
        raise UserError(f"config key pyramid.window is ({low}, {high}); wanted (low, high) in HU with low < high")
    for key in ("rotation", "translation", "elastic_sigma"):
        if config.spatial[key] < 0:
            raise UserError(f"config key spatial.{key} is {config.spatial[key]}; wanted 0 or more")
    for key in ("feed.batch", "train.steps", "train.log_every", "train.checkpoint_every", "train.keep", "model.width",
                "model.depth", "train.validation_patches", "spatial.elastic_spacing"):  # fmt: skip
        if _get(config, key) < 1:
            raise UserError(f"config key {key} is {_get(config, key)}; wanted at least 1")
    for key in ("feed.anywhere", "spatial.unmoved", "train.frozen_norm"):
        if not 0 <= _get(config, key) <= 1:
            raise UserError(f"config key {key} is {_get(config, key)}; wanted a share in [0, 1]")
    if not 0 <= config.spatial.scaling < 1:
        raise UserError(f"config key spatial.scaling is {config.spatial.scaling}; wanted a fraction in [0, 1)")
    if config.predict.mirror and not config.spatial.mirror:
        raise UserError("config key predict.mirror is True; wanted spatial.mirror True with it, for the training")
    if not 0 <= config.predict.overlap < 1:
        raise UserError(f"config key predict.overlap is {config.predict.overlap}; wanted a fraction in [0, 1)")
    if not 0 < config.data.validation_fraction < 1:
        raise UserError(
            f"config key data.validation_fraction is {config.data.validation_fraction}; wanted a fraction in (0, 1)"
        )


def _check_values(config: ConfigDict) -> None:
    """Refuses numbers and tuples that the other checks could not reckon with.

    Raises:
      UserError: names the key, the value found and the value wanted.
    """
    for key, value in flat_keys(config.to_dict()).items():
        kind, counts = TUPLES.get(key, (float, ()))
        items = value if key in TUPLES else [value]
        if not isinstance(items, tuple | list) or (counts and len(items) not in counts):
            raise UserError(
                f"config key {key} is {value!r}; wanted {' or '.join(map(str, counts)) or 'a tuple of'} items"
            )
        for item in items:
            number = isinstance(item, int | float) and not isinstance(item, bool)
            if key in TUPLES and not (isinstance(item, str) if kind is str else number):
                raise UserError(f"config key {key} is {value!r}; wanted {'names' if kind is str else 'numbers'} in it")
            if number and not abs(item) <= LARGEST.get(key, 2**31 - 1):
                found = item if isinstance(item, float) else f"a number of {item.bit_length()} bits"
                raise UserError(f"config key {key} is {found}; wanted at most {LARGEST.get(key, 2**31 - 1)}")
    for key in ("seed", "data.fold", "data.workers"):
        if _get(config, key) < 0:
            raise UserError(f"config key {key} is {_get(config, key)}; wanted 0 or more")
    if config.model.depth < 1:
        raise UserError(f"config key model.depth is {config.model.depth}; wanted at least 1")


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config
