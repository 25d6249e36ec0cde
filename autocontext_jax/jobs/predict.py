"""--mode predict: masks of scans that have no labels."""

import collections
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from autocontext_jax import processes
from autocontext_jax.errors import UserError
from autocontext_jax.images import scans
from autocontext_jax.images.finding import Source, find_scans
from autocontext_jax.images.formats import mask_suffix, suffix_of
from autocontext_jax.images.spec import ImageSpec
from autocontext_jax.inference.model import Model
from autocontext_jax.jobs.scan_pipeline import in_stages

log = logging.getLogger(__name__)

Job = tuple[Source, Path]  # a scan and where its mask goes


def predict(
    load: Callable[[], Model],
    image_spec: Callable[[], ImageSpec],
    source: Path,
    target: Path,
    series: str | None = None,
) -> bool:
    """Writes the finest level's mask of one scan, a DICOM series or each scan of a folder.

    Args:
      load: gives the model, once it is known that the masks can be written.
      image_spec: gives the model's channels, which are known before it is loaded.
      source: a scan or a folder.
      target: for one scan a file to write, or a folder; for a folder of scans a folder, where each mask is named as its
        scan, and lies in folders as the scan does. Missing folders are made.
      series: which DICOM series, by number, description or identifier; None means all.

    Returns:
      False if scans of a folder could not be predicted: they are named at the end, the others are done.

    Raises:
      UserError: as `scans` and `load` say.
    """
    if suffix_of(target):
        scans.check_writable_format(target)
    image = image_spec()
    inputs = find_scans(source, series=series, channels=len(image.channels))
    many = source.is_dir() and [scan.path for scan in inputs] != [source]
    outputs = [_output(scan, target, many) for scan in inputs]
    for path in outputs:
        scans.check_writable_format(path)
    twice = [path for path, count in collections.Counter(outputs).items() if count > 1]
    if twice:
        raise UserError(
            f"{source} has several scans whose mask would be {twice[0]}; expected different names: rename one"
        )
    overwritten = set(outputs) & {path.resolve() for scan in inputs for path in scan.files}
    if overwritten:
        raise UserError(f"--output {target} would overwrite the input {overwritten.pop()}: choose another folder")

    model = functools.cache(load)  # loaded while the first scan is read
    bad: list[str] = []

    def read(job: Job) -> scans.Scan:
        found, output = job
        scan = scans.read_scan(found.files, image, series=found.series)
        scans.check_writable_format(output, scan.grid)
        return scan

    def mask_of(job: Job, scan: scans.Scan) -> tuple[np.ndarray, scans.Grid]:
        found, _ = job
        model().check(scan, str(found))
        return model().mask(scan, show_tiles), scan.grid

    def write(job: Job, made: tuple[np.ndarray, scans.Grid]) -> None:
        _, output = job
        scans.write_mask(output, *made)

    jobs = processes.mine(list(zip(inputs, outputs, strict=True)))
    bar = tqdm(
        in_stages(jobs, read, mask_of, write, prepare=model),
        total=len(jobs), desc="predict", unit="scan", disable=not processes.is_first(),
    )  # fmt: skip

    def show_tiles(done: int, total: int) -> None:
        bar.set_postfix_str(f"{done} of {total} tiles")

    for _, outcome in bar:
        if isinstance(outcome, UserError):
            if not many:
                raise outcome
            bad.append(str(outcome))
    bad = [message for found in processes.gather(bad) for message in found]
    if not many and processes.is_first():
        print(f"{outputs[0]}: {', '.join(f'{name} = {value}' for name, value in list(model().classes.items())[1:])}")
    for message in bad:
        log.error("%s", message)
    if bad:
        log.error("%d of %d scans could not be predicted", len(bad), len(inputs))
    return not bad


def _output(scan: Source, target: Path, many: bool) -> Path:
    """Where a scan's mask goes: the target itself if it names a scan file, else a file in it."""
    if not many and suffix_of(target):
        return target.resolve()
    return (target / scan.name.with_name(scan.name.name + mask_suffix(scan.path))).resolve()
