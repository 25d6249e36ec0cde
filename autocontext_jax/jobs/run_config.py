"""The typed configuration of a run: a tree of frozen sections, each of which validates itself where it is defined."""

import dataclasses
from typing import Any

from autocontext_jax.data.augmentation_ranges import FLIP_VALUES, AugmentationConfig
from autocontext_jax.data.loader import LoaderConfig
from autocontext_jax.data.phantom.dataset import PhantomConfig
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.errors import UserError, require
from autocontext_jax.geometry import Triple, along_axes
from autocontext_jax.inference.tiling import PredictorConfig
from autocontext_jax.jobs.data_config import DataConfig
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import PyramidConfig, check_size, divisor
from autocontext_jax.planning.plan import PlanConfig
from autocontext_jax.sections import from_dict
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.optimizers import OptimizerConfig
from autocontext_jax.training.phases import MODES, Phase, phases
from autocontext_jax.training.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig(NetworkConfig):
    """The network of every level.

    Attributes:
      backbone: `unet` (the paper), `residual_unet` or `fcn`; or a network from outside the package, by the name under
        which it is passed to the Python functions, or as `package.module:Name`.
    """

    backbone: str = "unet"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and in which order the levels learn.

    Attributes:
      mode: `end_to_end`: all levels at once (the paper); `separate`: one level after the other, each on the maps of the
        fixed ones before it; `first_level` or `no_context`: the coarsest or the finest level alone.
      steps: of each phase; `separate` has one phase a level, the other modes have one.
      frozen_batch_stats: last share of the steps that normalise by the running averages, as inference does (Wu and
        Johnson, 2021). With few patches a step, batch statistics are so far from them that small classes come out too
        large. With another `model.norm` than `batch` all steps normalise as inference does, whatever it is.
      non_finite: what follows a loss or gradient that is not finite: `stop`, with its cases named and all that was
        saved kept, or `skip`, which goes on without that step.
      deterministic: whether a run that goes on from a checkpoint repeats the same bits on GPUs too, where XLA otherwise
        times several algorithms and takes the fastest. CPUs and TPUs repeat them anyway. It cost nothing on an H200.
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
      flip: whether every tile is also predicted mirrored along each combination of the axes of `augmentation.flip`, and
        all are averaged: 2, 4 or 8 predictions for 1, 2 or 3 axes.
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
      metrics: further metrics from outside the package: names under which they are passed to the Python functions, or
        `package.module:name`.
    """

    tolerance: float = 2.0
    root: str = ""
    label_mapping: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()

    def __post_init__(self):
        require(self.tolerance >= 0, self, "tolerance", "0 mm or more")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What a model file says beside what the run knows.

    Attributes:
      license: under which the weights may be used, such as "CC-BY-4.0".
      codes: of classes in a terminology, ("liver=SCT:10200004:Liver", ...).
    """

    license: str = ""
    codes: tuple[str, ...] = ()

    def __post_init__(self):
        require(all("=" in code for code in self.codes), self, "codes", "texts of the form CLASS=SCHEME:VALUE:MEANING")


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
    plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    phantom: PhantomConfig = dataclasses.field(default_factory=PhantomConfig)
    levels: LevelGrids = dataclasses.field(default_factory=lambda: LevelGrids(unit="mm"))
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
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)

    def __post_init__(self):
        require(self.seed >= 0, self, "seed", "0 or more")
        require(set(self.experiment) <= set(MODES), self, "experiment", f"some of {', '.join(MODES)}")
        one_split = not self.data.folds and (self.data.fold >= 0 or not self.data.splits)
        expected = "() with folds; to compare modes on one fold name a file and the fold, data.splits and data.fold"
        require(not self.experiment or one_split, self, "experiment", expected)
        good = self.plan.automatic or not (self.plan.minutes or self.plan.memory)
        require(good, self, "plan", "plan.automatic with plan.minutes or plan.memory, as configs/auto.py has it")
        if self.experiment and self.plan.minutes:
            raise UserError(
                f"config key plan.minutes is {self.plan.minutes:g}; expected 0 with an experiment, whose modes take "
                "times of their own: set train.steps"
            )
        if not self.plan.automatic:  # a plan chooses what is missing
            self.check_sections()

    def check_sections(self) -> None:
        """What the sections require of each other.

        Raises:
          UserError: sizes that do not halve as often as they must; keys that contradict each other.
        """
        self._check_sizes()
        if self.predict.flip and not self.augmentation.flip:
            raise UserError(
                "config key predict.flip is True; expected augmentation.flip to name axes with it: the network must "
                "have learned from mirrored patches"
            )
        if "z" in self.augmentation.flip and self.levels.spatial_dims == 2:
            raise UserError(
                f"config key augmentation.flip is {self.augmentation.flip!r}; expected axes without z, since "
                "levels.spatial_dims is 2 and a patch is one slice: choose "
                f"{self.augmentation.flip.replace('z', '')!r}"
            )
        weights, levels = self.loss.level_weights, len(self.levels.factors)
        if weights and len(weights) != levels:
            raise UserError(
                f"config key loss.level_weights is {weights}; expected one number a level, {levels} in all, or ()"
            )

    @property
    def patch_shape(self) -> Triple:
        """Voxels (z, y, x) of a patch."""
        return along_axes(self.loader.patch_size, self.levels.spatial_dims)

    def check_patch(self, grids: LevelGrids) -> None:
        """Patches must halve as often as levels and networks do, on each device that shares their depth.

        Args:
          grids: of the levels, see `LevelGrids.with_spacing`.

        Raises:
          UserError: they do not.
        """
        network, pyramid = self.model.alone(), _connected(grids)
        check_size("config key loader.patch_size", self.loader.patch_size, network, pyramid)
        unit, planes, space = divisor(network, pyramid)[0], self.patch_shape[0], self.mesh.space
        if planes % (space * unit) or (space > 1 and grids.spatial_dims == 2):
            choices = [n for n in range(2, planes) if planes % (n * unit) == 0]
            raise UserError(
                f"config key mesh.space is {space}; expected devices that each take a multiple of {unit} of the "
                f"{planes} planes of loader.patch_size, in 3D: choose 1 or one of {choices}"
            )

    def check_tile(self, grids: LevelGrids) -> None:
        """A tile that is given must halve as often too; arguments and errors as `check_patch`."""
        if not self.predict.boxes:
            check_size("config key predict.tile", self.predict.tile, self.model.alone(), _connected(grids))

    def _check_sizes(self) -> None:
        """What can be checked of patches and tiles before the scans are known."""
        cubes = dataclasses.replace(self.levels, anisotropic=False)
        for size, check in ((self.loader.patch_size, self.check_patch), (self.predict.tile, self.check_tile)):
            if self.levels.known:
                check(self.levels)
            elif len(set(size)) == 1 or self.levels.spatial_dims == 2:
                check(cubes)  # of a cube the finest axis, whichever it is, is halved each time

    def phases(self) -> tuple[Phase, ...]:
        """What the run trains, in order; the last phase runs every level that the model has."""
        return phases(self.train.mode, len(self.levels.factors))

    @property
    def last_step(self) -> int:
        """Steps of all phases together."""
        return len(self.phases()) * self.train.steps

    def model_levels(self) -> tuple[int, ...]:
        """The pyramid's levels that the model has, from 1 = coarsest."""
        return self.phases()[-1].levels

    def tiling(self) -> PredictConfig:
        """How whole scans are predicted: networks that normalise by each sample see tiles of the training patch's size.

        Their statistics depend on how much a tile shows. nnU-Net (Isensee et al., 2021) has instance norm and does the
        same. `predict.tile` may be another size.
        """
        if not self.predict.boxes or not self.model.normalizes_by_sample:
            return self.predict
        return dataclasses.replace(self.predict, tile=self.patch_shape)

    def phase_loss(self, phase: Phase) -> LossConfig:
        """A phase's loss: only the levels that learn count."""
        weights = self.loss.level_weights or (1.0,) * len(self.levels.factors)
        learning = tuple(float(weights[level - 1]) * (level in phase.learning) for level in phase.levels)
        return dataclasses.replace(self.loss, level_weights=learning)


def _connected(grids: LevelGrids) -> PyramidConfig:
    """The levels of known grids, as far as sizes of patches and tiles depend on them."""
    return PyramidConfig(levels=len(grids.factors), spacing=grids.relative_spacing)


def config_from_dict(values: Any) -> RunConfig:
    """The typed tree of nested dictionaries, such as a ConfigDict or config.json gives them.

    Raises:
      UserError: see `sections.from_dict`.
    """
    augmentation = values.get("augmentation") if isinstance(values, dict) else None
    if isinstance(augmentation, dict) and isinstance(flip := augmentation.get("flip"), bool):
        raise UserError(f"config key augmentation.flip is {flip}; expected axes to mirror along: {FLIP_VALUES}")
    return from_dict(RunConfig, values, place="config key")
