"""The typed configuration of a run: a tree of frozen sections, each of which validates itself where it is defined."""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args, get_origin, get_type_hints

from autocontext_jax.data.augmentation_ranges import AugmentationConfig
from autocontext_jax.data.loader import LoaderConfig
from autocontext_jax.data.phantom.dataset import PhantomConfig
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.errors import InvalidField, UserError, require
from autocontext_jax.inference.predictor import PredictorConfig
from autocontext_jax.models.backbones import BACKBONES
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import PyramidConfig
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.optimizers import OptimizerConfig
from autocontext_jax.training.phases import MODES, Phase, phases
from autocontext_jax.training.sharding import MeshConfig

LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the data lie and which cases are for what.

    Attributes:
      root: the data set's folder, in the layout of nnU-Net v2 or of the Medical Segmentation Decathlon.
      prepared: where prepared cases go; "" is `prepared/` in the run folder. Runs of equal `levels` can share one.
      validation_fraction: share of the training cases held out for validation.
      splits: a file of folds (nnU-Net's splits_final.json) that says it instead.
      fold: number of the fold in it, from 0.
      new_cases: what becomes of cases that were added to the data set after the run began: `ignore` names them and
        leaves them out; `train` takes them into training. They never join the validation or test cases.
      workers: scans prepared at the same time; 0 is one for each processor that this process may use.
      cache_mib: memory for decompressed chunks of the prepared cases, in MiB.
    """

    root: str = ""
    prepared: str = ""
    validation_fraction: float = 0.1
    splits: str = ""
    fold: int = 0
    new_cases: str = "ignore"
    workers: int = 0
    cache_mib: int = 1024

    def __post_init__(self):
        require(0 < self.validation_fraction < 1, self, "validation_fraction", "a fraction in (0, 1)")
        for name in ("fold", "workers", "cache_mib"):
            require(getattr(self, name) >= 0, self, name, "0 or more")
        require(self.new_cases in ("ignore", "train"), self, "new_cases", "one of ignore, train")


@dataclasses.dataclass(frozen=True)
class ModelConfig(NetworkConfig):
    """The network of every level.

    Attributes:
      backbone: `unet` (the paper), `residual_unet` or `fcn`.
    """

    backbone: str = "unet"

    def __post_init__(self):
        require(1 <= self.base_channels <= 4096, self, "base_channels", "a number from 1 to 4096")
        require(1 <= self.depth <= 10, self, "depth", "a number from 1 to 10")
        require(self.norm in ("batch", "none"), self, "norm", "one of batch, none")
        require(0 <= self.momentum < 1, self, "momentum", "a fraction in [0, 1)")
        require(self.dtype in ("float32", "bfloat16"), self, "dtype", "one of float32, bfloat16")
        require(self.backbone in BACKBONES, self, "backbone", f"one of {', '.join(BACKBONES)}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and in which order the levels learn.

    Attributes:
      mode: see `training/phases.py`.
      steps: of each phase; `separate` has one phase a level, the other modes have one.
      frozen_batch_stats: last share of the steps that normalise by the running averages, as inference does (Wu and
        Johnson, 2021). With few patches a step, batch statistics are so far from them that small classes come out too
        large.
      non_finite: what follows a loss or gradient that is not finite: `stop`, with its cases named and all that was
        saved kept, or `skip`, which goes on without that step.
      deterministic: whether a run that goes on from a checkpoint repeats the same bits on GPUs too, where XLA otherwise
        times several algorithms and takes the fastest. CPUs and TPUs repeat them anyway. On until its price has been
        measured.
      log_every: steps between two lines of metrics.jsonl.
      checkpoint_every: steps between two checkpoints, each with a validation.
      keep: how many of the newest checkpoints are kept; the best is kept too.
      validation_patches: held-out patches scored at every checkpoint.
    """

    mode: str = "end_to_end"
    steps: int = 20_000
    frozen_batch_stats: float = 0.0
    non_finite: str = "stop"
    deterministic: bool = True
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2
    validation_patches: int = 24

    def __post_init__(self):
        require(self.mode in MODES, self, "mode", f"one of {', '.join(MODES)}")
        for name in ("steps", "log_every", "checkpoint_every", "keep", "validation_patches"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(0 <= self.frozen_batch_stats <= 1, self, "frozen_batch_stats", "a share in [0, 1]")
        require(self.non_finite in ("stop", "skip"), self, "non_finite", "one of stop, skip")


@dataclasses.dataclass(frozen=True)
class PredictConfig(PredictorConfig):
    """How whole scans are predicted.

    Attributes:
      checkpoint: `best` by validation, or `latest`.
      flip: whether every tile is also predicted with left and right exchanged, and both averaged; for networks trained
        with `augmentation.flip`.
    """

    checkpoint: str = "best"
    flip: bool = False

    def __post_init__(self):
        super().__post_init__()
        require(self.checkpoint in ("best", "latest"), self, "checkpoint", "one of best, latest")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How masks are scored.

    Attributes:
      tolerance: mm; surfaces that lie no farther apart count as one in the surface Dice.
      root: another data set, all of whose labelled cases are scored, with --mode evaluate.
      label_mapping: what its classes are called here where the names differ: ("aorta=artery", ...).
    """

    tolerance: float = 2.0
    root: str = ""
    label_mapping: tuple[str, ...] = ()

    def __post_init__(self):
        require(self.tolerance >= 0, self, "tolerance", "0 mm or more")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that a run is configured by.

    Attributes:
      seed: of the split, the parameters and the sequence of batches.
      experiment: training modes that `--mode all` trains, evaluates and compares, see `jobs/experiment.py`; () trains
        one run.
    """

    seed: int = 0
    experiment: tuple[str, ...] = ()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    phantom: PhantomConfig = dataclasses.field(default_factory=PhantomConfig)
    levels: LevelGrids = dataclasses.field(default_factory=LevelGrids)
    loader: LoaderConfig = dataclasses.field(default_factory=LoaderConfig)
    augmentation: AugmentationConfig = dataclasses.field(default_factory=AugmentationConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    pyramid: PyramidConfig = dataclasses.field(default_factory=PyramidConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    predict: PredictConfig = dataclasses.field(default_factory=PredictConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)

    def __post_init__(self):
        require(self.seed >= 0, self, "seed", "0 or more")
        require(set(self.experiment) <= set(MODES), self, "experiment", f"some of {', '.join(MODES)}")
        self._check_sizes()
        if self.predict.flip and not self.augmentation.flip:
            raise UserError(
                "config key predict.flip is True; expected augmentation.flip to be True with it: the network must have "
                "learned from exchanged sides"
            )
        weights, levels = self.loss.level_weights, len(self.levels.factors)
        if weights and len(weights) != levels:
            raise UserError(
                f"config key loss.level_weights is {weights}; expected {levels} numbers, one a level, or ()"
            )

    def _check_sizes(self) -> None:
        """Patches and tiles must halve as often as the network does, on each device that shares their depth."""
        divisor = self.model.divisor
        unit = max(4, divisor)
        sizes = (("loader.patch_size", self.loader.patch_size, "mesh.space", self.mesh.space),
                 ("predict.tile", self.predict.tile, "predict.space", self.predict.space))  # fmt: skip
        for key, size, space_key, space in sizes:
            if size % unit:
                raise UserError(
                    f"config key {key} is {size}; expected a multiple of {unit}, since model.depth is "
                    f"{self.model.depth}: choose {unit * max(1, size // unit)}"
                )
            if size % (space * divisor) or (space > 1 and self.levels.spatial_dims == 2):
                choices = [n for n in range(2, size) if size % (n * divisor) == 0]
                raise UserError(
                    f"config key {space_key} is {space}; expected devices that each take a multiple of {divisor} of "
                    f"the {size} planes of {key}, in 3D: choose 1 or one of {choices}"
                )

    def phases(self) -> tuple[Phase, ...]:
        """What the run trains, in order; the last phase runs every level that the model has."""
        return phases(self.train.mode, len(self.levels.factors))

    def model_levels(self) -> tuple[int, ...]:
        """The pyramid's levels that the model has, from 1 = coarsest."""
        return self.phases()[-1].levels

    def model_factors(self, spacing: tuple[float, float, float]) -> tuple[tuple[float, float, float], ...]:
        """Downsample factors (z, y, x) of the model's levels for a scan of this spacing in mm."""
        factors = self.levels.level_factors(spacing)
        return tuple(factors[level - 1] for level in self.model_levels())

    def phase_loss(self, phase: Phase) -> LossConfig:
        """A phase's loss: only the levels that learn count."""
        weights = self.loss.level_weights or (1.0,) * len(self.levels.factors)
        learning = tuple(float(weights[level - 1]) * (level in phase.learning) for level in phase.levels)
        return dataclasses.replace(self.loss, level_weights=learning)


# Fields of the sections' classes that no key sets, because another key or the data set says them.
DERIVED: dict[type, tuple[str, ...]] = {
    ModelConfig: ("spatial_dims",),
    PyramidConfig: ("levels", "classes", "spatial_dims"),
}


def keys(kind: type) -> dict[str, Any]:
    """The fields of a section, or of the whole tree, that a configuration may set, with their types."""
    hints = get_type_hints(kind)
    return {
        field.name: hints[field.name] for field in dataclasses.fields(kind) if field.name not in DERIVED.get(kind, ())
    }


def as_dict(config: Any) -> dict[str, Any]:
    """A section or the whole tree as nested dictionaries; tuples stay tuples."""
    values = {name: getattr(config, name) for name in keys(type(config))}
    return {name: as_dict(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def from_dict(values: dict[str, Any]) -> RunConfig:
    """The typed tree of nested dictionaries, such as a ConfigDict or config.json gives them.

    Raises:
      UserError: a key is unknown or missing, or its value is of a wrong type or cannot be: names the key, the value
        found and the value expected.
    """
    return _section(RunConfig, values, "")


def flat_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted keys, such as "loader.batch_size"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _section(kind: Any, values: Any, prefix: str) -> Any:
    expected = keys(kind)
    if not isinstance(values, dict):
        raise UserError(
            f"config key {prefix.rstrip('.')} is {values!r}; expected a section with the keys {', '.join(expected)}"
        )
    if unknown := [name for name in values if name not in expected]:
        raise UserError(f"config key {prefix}{unknown[0]} is unknown; expected one of {', '.join(expected)}")
    if missing := [name for name in expected if name not in values]:
        raise UserError(f"config key {prefix}{missing[0]} is missing; expected a value")
    made = {}
    for name, type_ in expected.items():
        key = prefix + name
        made[name] = (
            _section(type_, values[name], f"{key}.")
            if dataclasses.is_dataclass(type_)
            else _value(key, values[name], type_)
        )
    try:
        return kind(**made)
    except InvalidField as error:
        raise UserError(f"config key {prefix}{error.field} is {error.found!r}; expected {error.expected}") from None


def _value(key: str, value: Any, type_: Any) -> Any:
    """A value of a key's type; a whole number stands for a float, a list for a tuple."""
    if get_origin(type_) is tuple:
        items: Sequence[Any] = get_args(type_)
        if not isinstance(value, tuple | list):
            raise UserError(f"config key {key} is {value!r}; expected a tuple")
        if items[-1] is Ellipsis:
            items = [items[0]] * len(value)
        if len(items) != len(value):
            raise UserError(f"config key {key} is {value!r}; expected {len(items)} items")
        return tuple(_value(key, item, kind) for item, kind in zip(value, items, strict=True))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if type_ is float and number:
        if not abs(value) <= LARGEST:  # also if it is not a number
            found = value if isinstance(value, float) else f"a number of {value.bit_length()} bits"
            raise UserError(f"config key {key} is {found}; expected a number of at most {LARGEST}")
        return float(value)
    if type_ is int and number and value == int(value if abs(value) <= LARGEST else 0):
        return int(value)
    if type_ in (bool, str) and isinstance(value, type_):
        return value
    names = {float: "a number", int: f"a whole number of at most {LARGEST}", bool: "True or False", str: "a text"}
    found = (
        f"a number of {value.bit_length()} bits"
        if number and isinstance(value, int) and abs(value) > LARGEST
        else repr(value)
    )
    raise UserError(f"config key {key} is {found}; expected {names[type_]}")
