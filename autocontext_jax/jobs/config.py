"""Every key of a run with its default, what the sections describe, and the file that a work directory keeps of them.

The sections are the dataclasses that the code takes, so each key is explained where it acts: `levels` in
`data/store/level_grids.py`, `feed` in `data/pipeline.py`, `spatial` in `geometry.py`, `intensity` in `data/augment.py`,
`model` in `models/blocks.py`, `pyramid` in `models/pyramid.py`, `loss` and `optimizer` in `training/`, `predict` in
`inference/predictor.py`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from autocontext_jax.data.augment import IntensityLimits
from autocontext_jax.data.pipeline import FeedConfig
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.errors import UserError
from autocontext_jax.files import write_whole
from autocontext_jax.geometry import SpatialLimits
from autocontext_jax.inference.predictor import PredictorConfig
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.fcn import FCN
from autocontext_jax.models.pyramid import PyramidConfig
from autocontext_jax.models.residual_unet import ResidualUNet
from autocontext_jax.models.unet import UNet
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.optimizers import OptimizerConfig
from autocontext_jax.training.phases import Phase, phases

# The network of every level.
BACKBONES: dict[str, type] = {"unet": UNet, "residual_unet": ResidualUNet, "fcn": FCN}

# Keys that may differ between a work directory's checkpoint and the run that goes on from it: they change neither the
# parameters' shapes nor the sequence of batches.
FREE = ("data.root", "data.prepared", "data.workers", "data.cache_mib", "feed.threads", "feed.ahead",
        "train.steps", "train.log_every", "train.checkpoint_every", "train.keep", "predict.", "evaluate.",
        "experiment", "mesh.", "train.non_finite", "train.deterministic")  # fmt: skip


def default_config() -> ConfigDict:
    """A complete configuration; an experiment's file changes what it needs."""
    config = ConfigDict()
    config.seed = 0
    # Training modes that `--mode all` trains, evaluates and compares: see `jobs/experiment.py`; () trains one run.
    config.experiment = ()
    config.data = ConfigDict()
    # The data set's folder (nnU-Net v2 or Medical Segmentation Decathlon).
    config.data.root = ""
    # Where prepared cases go; "" is `prepared/` in the work directory. Runs of equal `levels` can share one.
    config.data.prepared = ""
    # Share of the training cases held out for validation, or a file of folds (nnU-Net's splits_final.json).
    config.data.validation_fraction = 0.1
    config.data.splits = ""
    config.data.fold = 0
    # Scans prepared at the same time; 0 is one a core.
    config.data.workers = 0
    # Decoded chunks kept in memory by the feed.
    config.data.cache_mib = 1024
    # Class names, background first; filled in from the data set.
    config.data.labels = ()
    # Phantoms to generate into `data.root` (in the work directory if that is ""); 0 uses what is there.
    config.phantom = ConfigDict(
        {"training": 0, "test": 0, "size": (96, 96, 96), "spacing": (3.5, 3.5, 3.5), "look_alikes": 0}
    )
    # `finest_spacing` in mm, or () for factors of each scan's own grid. `rank` 2 sees a scan slice by slice.
    config.levels = ConfigDict({"factors": (4, 2), "finest_spacing": (), "rank": 3})
    config.feed = _section(FeedConfig(batch=3, edge=64), without=("rank", "levels", "spatial", "intensity"))
    config.spatial = _section(SpatialLimits(), without=("mirror_classes",))
    # Whether half of the patches are mirrored, right for left, and the organs that then change names:
    # ("right_kidney=left_kidney", ...).
    config.spatial.mirror = False
    config.spatial.mirror_pairs = ()
    config.intensity = _section(IntensityLimits())
    config.model = _section(NetworkConfig(), without=("rank",))
    config.model.backbone = "unet"
    config.pyramid = _section(PyramidConfig(levels=2, classes=2), without=("levels", "classes", "rank"))
    config.loss = _section(LossConfig())
    config.optimizer = _section(OptimizerConfig())
    # Devices that share the depth of one patch; the others share the batch. `split_optimizer` gives each of these a
    # share of the optimiser's state in place of a copy: see `training/sharding.py`.
    config.mesh = ConfigDict({"space": 1, "split_optimizer": False})
    config.train = ConfigDict()
    # How the levels learn: see `training/phases.py`.
    config.train.mode = "end_to_end"
    # Of each phase: `separate` has one a level, the other modes have one.
    config.train.steps = 20_000
    # Last share of the steps that normalise by the running averages, as inference does (Wu and Johnson, 2021): with few
    # patches a step, batch statistics are so far from them that organs come out too large.
    config.train.frozen_norm = 0.0
    # What follows a loss or gradient that is not finite: `stop`, with its cases named and all that was saved kept, or
    # `skip`, which goes on without that step.
    config.train.non_finite = "stop"
    # Whether a run that goes on from a checkpoint repeats the very bits on GPUs too, where XLA otherwise times several
    # algorithms and takes the fastest. CPUs and TPUs repeat them anyway. On until its price has been measured.
    config.train.deterministic = True
    config.train.log_every = 10
    # Validation and checkpoint together; the newest `keep` checkpoints and the best are kept.
    config.train.checkpoint_every = 500
    config.train.keep = 2
    # Held-out patches scored at every checkpoint.
    config.train.validation_patches = 24
    config.predict = _section(PredictorConfig())
    # `best` by validation or `latest`.
    config.predict.checkpoint = "best"
    # Whether tiles are seen in a mirror too and both maps averaged, by networks trained with `spatial.mirror`.
    config.predict.mirror = False
    config.evaluate = ConfigDict()
    # mm: surfaces that lie no farther apart count as one in the surface Dice.
    config.evaluate.tolerance = 2.0
    # With --mode evaluate: another data set to score all labelled cases of, and what its organs are called here where
    # the names differ: ("aorta=artery", ...). See `jobs/evaluate.py`.
    config.evaluate.root = ""
    config.evaluate.labels = ()
    return config


def _section(defaults: Any, without: tuple[str, ...] = ()) -> ConfigDict:
    return ConfigDict({key: value for key, value in vars(defaults).items() if key not in without})


def dataclass_of(kind: type, section: ConfigDict, **more: Any) -> Any:
    """The dataclass that a section of the configuration describes."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: value for key, value in section.items() if key in names}, **more)


def settings(config: ConfigDict) -> LevelGrids:
    """What the prepared data set depends on."""
    finest_spacing = tuple(config.levels.finest_spacing) or None
    return LevelGrids(tuple(config.levels.factors), finest_spacing, config.levels.rank)


def training_phases(config: ConfigDict) -> tuple[Phase, ...]:
    """What the run trains, in order; the last phase runs every level that the model has."""
    return phases(config.train.mode, len(config.levels.factors))


def model_levels(config: ConfigDict) -> tuple[int, ...]:
    """The ladder's levels that the model has, from 1 = coarsest."""
    return training_phases(config)[-1].levels


def model_factors(config: ConfigDict, spacing: tuple[float, float, float]) -> tuple[tuple[float, float, float], ...]:
    """Downsample factors (z, y, x) of the model's levels for a scan of this spacing in mm."""
    factors = settings(config).level_factors(spacing)
    return tuple(factors[level - 1] for level in model_levels(config))


def loss(config: ConfigDict, phase: Phase) -> LossConfig:
    """A phase's loss: only the levels that learn count."""
    weights = config.loss.level_weights or [1.0] * len(config.levels.factors)
    learning = tuple(float(weights[level - 1]) * (level in phase.learning) for level in phase.levels)
    return dataclasses.replace(dataclass_of(LossConfig, config.loss), level_weights=learning)


def feed(config: ConfigDict, phase: Phase) -> FeedConfig:
    """A phase's feed."""
    spatial = dataclass_of(SpatialLimits, config.spatial, mirror_classes=mirror_classes(config))
    moves = (
        spatial.rotation or spatial.translation or spatial.elastic_sigma or spatial.scaling or spatial.mirror_classes
    )
    intensity = dataclass_of(IntensityLimits, config.intensity)
    moved = {"spatial": spatial if moves else None, "intensity": intensity}
    return dataclass_of(FeedConfig, config.feed, rank=config.levels.rank, levels=phase.levels, **moved)


def mirror_classes(config: ConfigDict) -> tuple[int, ...]:
    """`SpatialLimits.mirror_classes` for the labels that the data set has.

    Raises:
      UserError: a pair with an unknown organ, or with one of another pair.
    """
    if not config.spatial.mirror:
        return ()
    names = list(config.data.labels)
    classes = list(range(len(names)))
    for pair in config.spatial.mirror_pairs:
        right, _, left = pair.partition("=")
        if right not in names[1:] or left not in names[1:]:
            raise UserError(
                f"config key spatial.mirror_pairs holds {pair!r}; wanted RIGHT=LEFT with two of {tuple(names[1:])}"
            )
        first, second = names.index(right), names.index(left)
        if (classes[first], classes[second]) != (first, second):
            raise UserError(f"config key spatial.mirror_pairs holds {pair!r}; wanted each organ in one pair at most")
        classes[first], classes[second] = second, first
    return tuple(classes)


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Writes `config.json`, whole or not at all."""
    write_whole(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")


def read_config(workdir: Path) -> dict[str, Any] | None:
    """The configuration that a work directory was made with; None if it is new.

    Raises:
      UserError: the file is there but is not what a run wrote.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, thousands of brackets
        raise UserError(f"{path} is not JSON ({error}); wanted what a run wrote: choose another --workdir") from None
    sections = saved.values() if isinstance(saved, dict) else ()
    values = [value for section in sections for value in (section.values() if isinstance(section, dict) else [section])]
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    data = saved.get("data") if isinstance(saved, dict) else None
    labels = data.get("labels") if isinstance(data, dict) else None
    if not isinstance(labels, list) or any(isinstance(item, dict | list) for item in items):
        raise UserError(f"{path} is not a configuration; wanted what a run wrote: choose another --workdir")
    return saved


def check_same_run(config: ConfigDict, saved: dict[str, Any], workdir: Path) -> None:
    """Refuses to go on with a checkpoint that another configuration made.

    Raises:
      UserError: lists the keys that differ, with both values.
    """
    now, before = flat_keys(json.loads(json.dumps(config.to_dict()))), flat_keys(saved)
    # Where one phase ends is where the next begins.
    free = tuple(key for key in FREE if key != "train.steps" or len(training_phases(config)) == 1)
    differing = [
        f"{key} (there {before.get(key, 'absent')}, here {now.get(key, 'absent')})"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key) and not key.startswith(free)
    ]
    if differing:
        raise UserError(
            f"work directory {workdir} belongs to another config; keys that differ: {', '.join(differing)}: use "
            "another --workdir or set them back"
        )


def flat_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted keys, such as "feed.batch"."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flat_keys(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
