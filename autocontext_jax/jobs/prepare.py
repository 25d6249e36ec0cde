"""--mode prepare: from a folder of labelled scans to the prepared data set."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from autocontext_jax import processes
from autocontext_jax.data import preparation
from autocontext_jax.data.datasets import Case, Dataset, read_dataset, split, split_from_file
from autocontext_jax.data.phantom.dataset import write_dataset
from autocontext_jax.errors import UserError
from autocontext_jax.jobs.config import settings

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
    """What the other jobs know of the data.

    Attributes:
      dataset: as its folder describes it.
      training, validation: its training cases, split.
      store: where prepared cases lie.
    """

    dataset: Dataset
    training: Sequence[Case]
    validation: Sequence[Case]
    store: str


def describe(config: ConfigDict, workdir: Path) -> Data:
    """Reads the data set's description and splits it; generates the phantoms first if the configuration asks for them.

    Raises:
      UserError: see `datasets`.
    """
    root = Path(config.data.root).expanduser() if config.data.root else workdir / "phantoms"
    if config.phantom.training:
        if processes.is_first():
            write_dataset(
                root,
                training=config.phantom.training,
                test=config.phantom.test,
                size=tuple(config.phantom.size),
                spacing=tuple(config.phantom.spacing),
                look_alikes=config.phantom.look_alikes,
                seed=config.seed,
            )
        processes.wait("phantoms")
    elif not config.data.root:
        raise UserError("config key data.root is empty; wanted the folder of the data set: --config.data.root=FOLDER")
    dataset = read_dataset(root)
    if config.data.splits:
        training, validation = split_from_file(dataset.training, Path(config.data.splits), config.data.fold)
    else:
        training, validation = split(dataset.training, fraction=config.data.validation_fraction, seed=config.seed)
    return Data(dataset, training, validation, config.data.prepared or str(workdir / "prepared"))


def prepare(config: ConfigDict, workdir: Path) -> Data:
    """Prepares every training and validation case that is not prepared yet, each process its share.

    Raises:
      UserError: names every case that cannot be prepared; the others are.
    """
    data = describe(config, workdir)
    cases = processes.mine([*data.training, *data.validation])
    workers = config.data.workers or os.cpu_count() or 1
    with tqdm(total=len(cases), desc="prepare", unit="scan", disable=not processes.is_first()) as bar:

        def progress(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        bad = preparation.prepare_cases(
            cases, data.store, settings(config), data.dataset.labels, workers=workers, progress=progress
        )
    messages = [message for found in processes.gather([message for _, message in bad]) for message in found]
    if messages:
        for message in messages[:-1]:
            log.error("%s", message)
        count = len(data.training) + len(data.validation)
        raise UserError(f"{messages[-1]} ({len(messages)} of {count} cases cannot be prepared)")
    return data
