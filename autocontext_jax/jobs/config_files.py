"""Configurations where they enter: config files and flags as a ConfigDict, and a run folder's config.json.

Below this file everything takes the frozen sections of `run_config.py`, where each key is explained.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from autocontext_jax.data.fingerprint import FORMAT as fingerprint_format
from autocontext_jax.errors import UserError
from autocontext_jax.files import read_json, write_json
from autocontext_jax.geometry import halved_axes
from autocontext_jax.inference.tiling import PredictorConfig
from autocontext_jax.jobs.run_config import RunConfig, config_from_dict
from autocontext_jax.planning.plan import PlanConfig
from autocontext_jax.sections import as_dict, flat_keys

FORMAT = 3  # of config.json

# Keys that a later start of a run may change: they change neither the parameters' shapes nor the sequence of batches.
CHANGEABLE = (
    "data.root", "data.outside_paths", "data.prepared", "data.workers", "data.cache_mib", "data.new_cases",
    "loader.threads", "loader.prefetch", "train.steps", "train.log_every", "train.checkpoint_every", "train.keep",
    "train.non_finite", "train.deterministic", "predict.", "evaluate.", "export.", "experiment", "mesh.",
    "plan.",
)  # fmt: skip
# Keys that prediction and evaluation take from the command line; the others are the run's own.
INFERENCE = ("predict.", "evaluate.", "export.", "data.root", "data.outside_paths", "data.workers")
# Keys that came since the format, with what runs before them did.
ADDED = {
    "data.outside_paths": False, "data.normalization": (), "data.folds": 0, "predict.margin": PredictorConfig.margin,
    "predict.memory": 0.0, "predict.crop_to_body": False,
}  # fmt: skip
# Keys that are gone: tiles were cubes that overlapped by a share of them.
REMOVED = ("predict.overlap", "predict.plane", "predict.space")
# Keys that prediction and evaluation depend on: a config file that contradicts the run in one of them is refused.
MODEL = ("levels.", "model.", "pyramid.", "data.normalization", "data.window")


def default_config() -> ConfigDict:
    """A complete configuration, to be changed by an experiment's file. It is locked: an unknown key is an error."""
    return to_config_dict(RunConfig())


def to_config_dict(config: RunConfig) -> ConfigDict:
    """The configuration as config files and flags change it."""
    return ConfigDict(as_dict(config)).lock()


def from_config_dict(config: ConfigDict) -> RunConfig:
    """The typed configuration.

    Raises:
      UserError: see `sections.from_dict`.
    """
    return config_from_dict(config.to_dict())


def config_from_flat(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A configuration with other values of some keys, by dotted names.

    Raises:
      UserError: see `sections.from_dict`.
    """
    values = as_dict(config)
    for key, value in changes.items():
        _set(values, key, value)
    return config_from_dict(values)


def write_config(config: RunConfig, workdir: Path) -> None:
    """Writes `config.json`, whole or not at all."""
    write_json(workdir / "config.json", {"format": FORMAT, "config": as_dict(config)})


def read_config(workdir: Path) -> RunConfig | None:
    """The configuration that a run folder was made with; None if it has none.

    Raises:
      UserError: the file is damaged, or of another format.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    saved = read_json(path, FORMAT).get("config")
    data = saved.get("data") if isinstance(saved, dict) else None
    if isinstance(data, dict) and "folds" not in data and not data.get("splits"):
        data["fold"] = -1  # it was 0, without a meaning where no file of folds was named
    if isinstance(saved, dict):
        saved.setdefault("plan", as_dict(PlanConfig()))
    for key, value in ADDED.items():
        section, name = key.split(".")
        if isinstance(saved, dict) and isinstance(saved.get(section), dict):
            saved[section].setdefault(name, value)
    if isinstance(saved, dict) and isinstance(saved.get("pyramid"), dict) and isinstance(saved.get("data"), dict):
        window = saved["pyramid"].pop("window", ())  # its first place
        saved["data"].setdefault("window", window)
    if isinstance(saved, dict) and isinstance(levels := saved.get("levels"), dict) and "anisotropic" not in levels:
        levels["anisotropic"] = _was_isotropic(workdir)  # levels once halved all axes, whatever the spacing
    if isinstance(saved, dict) and isinstance(loader := saved.get("loader"), dict):
        size = loader.get("patch_size")
        loader |= {"patch_size": [size]} if isinstance(size, int) else {}  # patches were cubes
    if isinstance(saved, dict) and isinstance(predict := saved.get("predict"), dict):
        edge = predict.get("tile")
        predict |= {"tile": [edge]} if isinstance(edge, int) else {}  # and so were tiles
    augmentation = saved.get("augmentation") if isinstance(saved, dict) else None
    if isinstance(augmentation, dict) and isinstance(flip := augmentation.get("flip"), bool):
        augmentation["flip"] = "x" if flip else ""  # once the only axis
    for key in REMOVED:
        section, name = key.split(".")
        if isinstance(saved, dict) and isinstance(saved.get(section), dict):
            saved[section].pop(name, None)
    try:
        return config_from_dict(saved)
    except UserError as error:
        raise UserError(f"{path}: {error}: choose another --workdir, or bring the file back") from None


def _was_isotropic(workdir: Path) -> bool:
    """Whether the levels of a run of before have the same axes halved today."""
    path = workdir / "fingerprint.json"
    if not path.exists():
        return True
    spacing = read_json(path, fingerprint_format).get("spacing")
    return isinstance(spacing, list) and len(spacing) == 3 and halved_axes(tuple(spacing)) == (2, 2, 2)


def check_same_run(config: RunConfig, saved: RunConfig, workdir: Path) -> None:
    """Refuses to go on with a checkpoint that another configuration made.

    Raises:
      UserError: lists the keys that differ, with both values.
    """
    # Where one phase ends is where the next begins.
    one_phase = len(config.phases()) == 1
    free = tuple(key for key in CHANGEABLE if key != "train.steps" or one_phase)
    if differing := _differences(config, saved, lambda key: not key.startswith(free)):
        raise UserError(
            f"run folder {workdir} belongs to another configuration; keys that differ: {', '.join(differing)}: use "
            "another --workdir or set them back"
        )


def for_inference(given: RunConfig, saved: RunConfig, workdir: Path) -> RunConfig:
    """The run's own configuration, with those keys of a given one that inference may change.

    Of a given one that leaves its choices to a plan, what differs from the defaults counts, and what `plan.keep` names.

    Raises:
      UserError: the given one contradicts the run in what its network is.
    """
    default = flat_keys(as_dict(RunConfig())) if given.plan.automatic else {}
    now = flat_keys(as_dict(given))
    planned = {key for key, value in default.items() if now[key] == value and key not in given.plan.keep}
    if differing := _differences(given, saved, lambda key: key.startswith(MODEL) and key not in planned):
        raise UserError(
            f"the checkpoint of {workdir} was trained with another configuration; keys that differ: "
            f"{', '.join(differing)}: leave --config out, since the run folder knows its own"
        )
    values = as_dict(saved)
    for key, value in now.items():
        # A config file that names no data set does not take the run's own away.
        if key in planned:
            continue
        if key.startswith(INFERENCE) and (key, value) not in (("data.root", ""), ("data.outside_paths", False)):
            _set(values, key, value)
    config = config_from_dict(values)
    config.check_sections()  # a planned configuration does not check itself
    return config


def _differences(config: RunConfig, saved: RunConfig, counts: Any) -> list[str]:
    now, before = flat_keys(as_dict(config)), flat_keys(as_dict(saved))
    return [
        f"{key} (the run has {before[key]}, given is {now[key]})"
        for key in now
        if now[key] != before[key] and counts(key)
    ]


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values[section]
    values[name] = value
