"""--mode prepare: from a folder of labelled scans to the prepared data set."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from autocontext_jax import processes, runtime
from autocontext_jax.data import preparation
from autocontext_jax.errors import UserError
from autocontext_jax.files import writing
from autocontext_jax.jobs.lock import locked_by_first
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import RunData, open_data, read_fingerprint, write_learned

log = logging.getLogger(__name__)


def prepare(config: RunConfig, workdir: Path, data: RunData | None = None) -> RunData:
    """Prepares every training and validation case that is not prepared yet, each process its share.

    Of files that have not changed since `split.json` was written nothing is read.

    Args:
      config: of the run.
      workdir: the run folder.
      data: of the run, where it has been opened.

    Raises:
      UserError: names every case that cannot be prepared, the others are; or no training case has a labelled voxel; or
        patches do not fit the levels' grids.
    """
    data = data or open_data(config, workdir)
    prepare_cases(config, data)
    return learn(config, workdir, data)


def prepare_cases(config: RunConfig, data: RunData) -> None:
    """Prepares the training and validation cases of a run's data, see `prepare`."""
    cases = processes.mine([*data.training, *data.validation])
    levels = config.levels.with_spacing(data.fingerprint.spacing)
    config.check_patch(levels)
    config.check_tile(levels)
    workers = config.data.workers or runtime.available_cpus()
    with (
        _one_at_a_time(data.store),
        tqdm(total=len(cases), desc="prepare", unit="scan", disable=not processes.is_first()) as bar,
    ):

        def progress(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        bad = processes.agree(
            lambda: preparation.prepare_cases(
                cases, data.store, levels, data.labels, data.image, workers=workers, progress=progress
            )
        )
    messages = [message for found in processes.gather([message for _, message in bad]) for message in found]
    if messages:
        for message in messages[:-1]:
            log.error("%s", message)
        count = len(data.training) + len(data.validation)
        raise UserError(f"{messages[-1]} ({len(messages)} of {count} cases cannot be prepared)")


@contextlib.contextmanager
def _one_at_a_time(store: str) -> Iterator[None]:
    """Runs that share a store prepare one after the other. A run that cannot write into the store needs no lock."""
    if "://" in store:
        yield
        return
    lock = Path(store) / ".prepare.lock"

    def make() -> bool:
        with writing(Path(store)):
            Path(store).mkdir(parents=True, exist_ok=True)
        return os.access(store, os.W_OK) and (not lock.exists() or os.access(lock, os.W_OK))

    if all(processes.gather(processes.agree(make))):
        with locked_by_first(Path(store), "prepare", wait=True):
            yield
    else:
        yield


def learn(config: RunConfig, workdir: Path, data: RunData) -> RunData:
    """The data with what CT needs to be normalised, learned from prepared training cases where it is not known yet.

    Raises:
      UserError: no training case has a labelled voxel.
    """
    processes.first_does(lambda: preparation.check_classes(data.training, data.store, data.labels, data.dataset.place))
    if data.image.learned:
        return data

    def write() -> None:
        image = preparation.learned_image(data.training, data.store, data.image)
        write_learned(workdir, read_fingerprint(config, workdir), image=image)

    processes.first_does(write)
    return dataclasses.replace(data, fingerprint=read_fingerprint(config, workdir))
