"""The typed configuration of a run: a tree of frozen sections, each of which validates itself where it is defined."""

import dataclasses
from pathlib import Path
from typing import Any

from autocontext_jax.data.augmentation_ranges import AugmentationConfig
from autocontext_jax.data.loader import LoaderConfig
from autocontext_jax.data.phantom.dataset import PhantomConfig
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.errors import UserError, require
from autocontext_jax.files import exists
from autocontext_jax.images.spec import NORMALIZATIONS
from autocontext_jax.inference.tiling import PredictorConfig
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import PyramidConfig
from autocontext_jax.sections import from_dict
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.optimizers import OptimizerConfig
from autocontext_jax.training.phases import MODES, Phase, phases
from autocontext_jax.training.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the data lie and which cases are for what.

    Attributes:
      root: the data set's folder, in the layout of nnU-Net v2 or of the Medical Segmentation Decathlon; or the folders
        of several with commas between them, "A,B", each with its own `dataset.json`. Together they have the classes of
        all, by name. What a data set does not name is unknown in its cases, not background. Cases of one name are
        told apart as FOLDER_case. (A folder that exists and has a comma in its name is one folder.)
      outside_paths: whether `dataset.json` may name files outside that folder; otherwise one line refuses it.
      prepared: where prepared cases go; "" is `prepared/` in the run folder. Runs of equal `levels`, labels and
        normalisation can share one.
      validation_fraction: share of the training cases held out for validation.
      splits: a file of folds (nnU-Net's splits_final.json) that says it instead.
      fold: number of the fold in it, from 0.
      new_cases: what becomes of cases that were added to the data set after the run began: `ignore` names them and
        leaves them out; `train` takes them into training. They never join the validation or test cases.
      normalization: of each channel, where its name in dataset.json does not choose well: `CT`, `zscore`,
        `rescale_to_0_1`, `rgb_to_0_1` or `noNorm`, see `images.spec.Channel`; () leaves it to the names.
      window: (low, high) in HU, to which CT is clipped and which become -1 and 1, as in the paper; () clips it to the
        0.5 and 99.5 percentiles of what is labelled in the training scans and takes mean and deviation from there.
      workers: scans prepared at the same time; 0 is one for each processor that this process may use.
      cache_mib: memory for decompressed chunks of the prepared cases, in MiB.
    """

    root: str = ""
    outside_paths: bool = False
    prepared: str = ""
    validation_fraction: float = 0.1
    splits: str = ""
    fold: int = 0
    new_cases: str = "ignore"
    normalization: tuple[str, ...] = ()
    window: tuple[float, ...] = ()
    workers: int = 0
    cache_mib: int = 1024

    def __post_init__(self):
        require(0 < self.validation_fraction < 1, self, "validation_fraction", "a fraction in (0, 1)")
        for name in ("fold", "workers", "cache_mib"):
            require(getattr(self, name) >= 0, self, name, "0 or more")
        wrong = set(self.normalization) - set(NORMALIZATIONS)
        require(not wrong, self, "normalization", f"some of {', '.join(NORMALIZATIONS)}, one for each channel")
        good = not self.window or (len(self.window) == 2 and self.window[0] < self.window[1])
        require(good, self, "window", "(low, high) in HU with low < high, or ()")
        require(self.new_cases in ("ignore", "train"), self, "new_cases", "one of ignore, train")

    @property
    def folders(self) -> tuple[Path, ...]:
        """The data sets that `root` names; () if it is empty."""
        if not self.root:
            return ()
        whole = Path(self.root).expanduser()
        if "," not in self.root or exists(whole):
            return (whole,)
        return tuple(Path(part.strip()).expanduser() for part in self.root.split(",") if part.strip())


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
        """Patches and tiles must halve as often as the network does, patches on each device that shares their depth."""
        divisor, size, space = self.model.divisor, self.loader.patch_size, self.mesh.space
        unit = max(4, divisor)
        for key, edge in (("loader.patch_size", size), ("predict.tile", self.predict.tile)):
            if edge % unit:
                raise UserError(
                    f"config key {key} is {edge}; expected a multiple of {unit}, since model.depth is "
                    f"{self.model.depth}: choose {unit * max(1, edge // unit)}"
                )
            if 0 < edge < self.model.smallest:
                raise UserError(
                    f"config key {key} is {edge}; expected at least {self.model.smallest}, since model.norm is "
                    f"{self.model.norm} and model.depth {self.model.depth}: a channel of one voxel has no variance"
                )
        if size % (space * divisor) or (space > 1 and self.levels.spatial_dims == 2):
            choices = [n for n in range(2, size) if size % (n * divisor) == 0]
            raise UserError(
                f"config key mesh.space is {space}; expected devices that each take a multiple of {divisor} of "
                f"the {size} planes of loader.patch_size, in 3D: choose 1 or one of {choices}"
            )

    def phases(self) -> tuple[Phase, ...]:
        """What the run trains, in order; the last phase runs every level that the model has."""
        return phases(self.train.mode, len(self.levels.factors))

    def model_levels(self) -> tuple[int, ...]:
        """The pyramid's levels that the model has, from 1 = coarsest."""
        return self.phases()[-1].levels

    def tiling(self) -> PredictConfig:
        """How whole scans are predicted: networks that normalise by each sample see tiles of the training patch's size.

        Their statistics depend on how much a tile shows. nnU-Net (Isensee et al., 2021) has instance norm and does the
        same. `predict.tile` above 0 chooses another size.
        """
        if self.predict.tile or not self.model.normalizes_by_sample:
            return self.predict
        return dataclasses.replace(self.predict, tile=self.loader.patch_size)

    def phase_loss(self, phase: Phase) -> LossConfig:
        """A phase's loss: only the levels that learn count."""
        weights = self.loss.level_weights or (1.0,) * len(self.levels.factors)
        learning = tuple(float(weights[level - 1]) * (level in phase.learning) for level in phase.levels)
        return dataclasses.replace(self.loss, level_weights=learning)


def config_from_dict(values: Any) -> RunConfig:
    """The typed tree of nested dictionaries, such as a ConfigDict or config.json gives them.

    Raises:
      UserError: see `sections.from_dict`.
    """
    return from_dict(RunConfig, values, place="config key")
