"""The section `data` of a run's configuration: where the data lie, and which cases are for what."""

import dataclasses
from pathlib import Path

from autocontext_jax.errors import require
from autocontext_jax.files import exists
from autocontext_jax.images.spec import NORMALIZATIONS


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the data lie and which cases are for what.

    Attributes:
      root: the data set's folder, in the layout of nnU-Net v2 or of the Medical Segmentation Decathlon; or the folders
        of several with commas between them, "A,B", each with its own `dataset.json`. Together they have the classes of
        all, by name. What a data set does not name is unknown in its cases, not background. Cases of one name are
        told apart as FOLDER_case. (A folder that exists and has a comma in its name is one folder.)
      outside_paths: whether `dataset.json` may name files outside that folder; otherwise one line refuses it.
      prepared: where prepared cases go; "" is `prepared/` in the run folder. Runs of the same
        data set and of equal `levels` and normalisation can share one.
      validation_fraction: share of the training cases held out for validation.
      folds: folds of a cross-validation, drawn as nnU-Net draws them, in place of that share; each is a run in a
        folder `fold_N` of the run folder, see `jobs/folds.py`; 0 for none.
      splits: a file of folds (nnU-Net's splits_final.json) to take instead of drawing them.
      fold: number of the one fold to train, to predict with or to export, from 0; -1 means every fold.
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
    folds: int = 0
    splits: str = ""
    fold: int = -1
    new_cases: str = "ignore"
    normalization: tuple[str, ...] = ()
    window: tuple[float, ...] = ()
    workers: int = 0
    cache_mib: int = 1024

    def __post_init__(self):
        require(0 < self.validation_fraction < 1, self, "validation_fraction", "a fraction in (0, 1)")
        for name in ("folds", "workers", "cache_mib"):
            require(getattr(self, name) >= 0, self, name, "0 or more")
        last = self.folds - 1
        choice = f"one of 0 to {last}" if self.folds else "the number of a fold, from 0"
        good = self.fold >= -1 and (not self.folds or self.fold <= last)
        require(good, self, "fold", f"{choice}, or -1 for every fold")
        expected = "-1, or folds to choose from: data.folds or data.splits"
        require(self.fold < 0 or self.has_folds, self, "fold", expected)
        wrong = set(self.normalization) - set(NORMALIZATIONS)
        require(not wrong, self, "normalization", f"some of {', '.join(NORMALIZATIONS)}, one for each channel")
        good = not self.window or (len(self.window) == 2 and self.window[0] < self.window[1])
        require(good, self, "window", "(low, high) in HU with low < high, or ()")
        require(self.new_cases in ("ignore", "train"), self, "new_cases", "one of ignore, train")

    @property
    def has_folds(self) -> bool:
        """Whether folds say which cases are for training and which for validation."""
        return bool(self.folds or self.splits)

    @property
    def holds_folds(self) -> bool:
        """Of a run folder: whether it holds folds, each in a folder of its own."""
        return bool(self.folds) and self.fold < 0

    @property
    def folders(self) -> tuple[Path, ...]:
        """The data sets that `root` names; () if it is empty."""
        if not self.root:
            return ()
        whole = Path(self.root).expanduser()
        if "," not in self.root or exists(whole):
            return (whole,)
        return tuple(Path(part.strip()).expanduser() for part in self.root.split(",") if part.strip())
