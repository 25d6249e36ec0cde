"""From labelled scans to prepared cases, in parallel processes. Free of jax, as worker processes import it."""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence

import numpy as np

from autocontext_jax.data.body import voxels_outside
from autocontext_jax.data.layouts import Case
from autocontext_jax.data.split import content_checksum
from autocontext_jax.data.store.format import FORMAT, read_attributes
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.data.store.writer import write_case
from autocontext_jax.data.workers import WorkerDiedError, in_processes
from autocontext_jax.errors import UserError, counted, some
from autocontext_jax.images import scans

log = logging.getLogger(__name__)


def prepare_case(
    case: Case, root: str, grids: LevelGrids, labels: tuple[str, ...], values: tuple[int, ...] = ()
) -> bool:
    """Writes a case's pyramid, unless it is there already; a part of it from an interrupted run is replaced.

    Args:
      case: its scan and label on one grid.
      root: folder or URL of the store.
      grids: of the levels.
      labels: [K] names, background first; a label's number is its place.
      values: [K] of each in the label files, ascending; () means 0, 1, 2, ...

    Returns:
      True if written, False if it was there.

    Raises:
      UserError: the case has no label; a file cannot be read (see `scans`).
    """
    if case.label is None:
        raise UserError(f"case {case.name}: {case.image} has no label: add one or leave the case out of training")
    values = values or tuple(range(len(labels)))
    digest = _digest(case, grids, labels, values)
    if read_attributes(root, case.name).get("hash") == digest:
        return False

    scan = scans.read_scan(case.image)
    if not scans.looks_like_ct(scan.voxels):
        log.warning("case %s does not look like CT in HU: %d to %d", case.name, scan.voxels.min(), scan.voxels.max())
    label = scans.read_label(case.label, values=values, like=scan.grid, case=case.name)
    if lost := voxels_outside(scan.voxels, label):
        log.warning(
            "case %s: %d labelled voxels lie outside the box around the body, where prediction leaves them out unless "
            "--config.predict.crop_to_body=False is set", case.name, lost,
        )  # fmt: skip
    write_case(
        root,
        case.name,
        scan.voxels,
        label,
        scan.spacing,
        grids,
        labels,
        origin=scan.origin,
        direction=scan.direction,
        digest=digest,
    )
    return True


def prepare_cases(
    cases: Sequence[Case],
    root: str,
    grids: LevelGrids,
    labels: tuple[str, ...],
    values: tuple[int, ...] = (),
    *,
    workers: int,
    progress: Callable[[str], object],
) -> list[tuple[Case, str]]:
    """Prepares cases in parallel processes, each with one scan in memory at a time.

    Args:
      cases: of different names.
      root: folder or URL of the store.
      grids: of the levels.
      labels: [K] names, background first.
      values: as `prepare_case`.
      workers: number of processes.
      progress: called with the name of each case that is done with, good or bad.

    Returns:
      The cases that a `UserError` stopped and its line, in the order given; the others are prepared nevertheless.

    Raises:
      UserError: the system ended a process.
    """
    bad = {}
    try:
        work = functools.partial(prepare_case, root=root, grids=grids, labels=labels, values=values)
        for case, error in in_processes(work, cases, workers=workers):
            if error is not None:
                bad[case.name] = str(error)
            progress(case.name)
    except WorkerDiedError:
        running = min(workers, len(cases))
        remedy = f"run again with fewer, --config.data.workers={running // 2}" if running > 1 else "free some memory"
        raise UserError(
            f"prepare: the system ended one of {counted(running, 'worker')}, likely for want of memory: {remedy}"
        ) from None
    return [(case, bad[case.name]) for case in cases if case.name in bad]


def check_classes(cases: Sequence[Case], root: str, labels: tuple[str, ...], dataset: str) -> None:
    """Looks at what the prepared training cases hold; warns of cases without any class and of classes without any case.

    Args:
      cases: prepared, those to train on.
      root: folder or URL of the store.
      labels: [K] names, background first.
      dataset: name of the data set, for messages.

    Raises:
      UserError: no case holds a labelled voxel.
    """
    voxels = np.array([np.diff(PreparedCase.open(root, case.name).foreground_offsets) for case in cases])
    if not voxels.any():
        raise UserError(
            f"data set {dataset}: in its {counted(len(cases), 'training case')} no voxel is labelled at the finest "
            f"level: expected at least one of {some(labels[1:])}: correct the labels, or choose finer levels"
        )
    if empty := [case.name for case, has in zip(cases, voxels, strict=True) if not has.any()]:
        log.warning("%s: no class is labelled in these cases, trained on as background: %s", dataset, some(empty))
    if absent := [name for name, has in zip(labels[1:], voxels.T, strict=True) if not has.any()]:
        log.warning("%s: no training case has these classes, which cannot be learned: %s", dataset, some(absent))


def _digest(case: Case, grids: LevelGrids, labels: tuple[str, ...], values: tuple[int, ...]) -> str:
    """Of all that a prepared case is made from."""
    own = (
        [] if values == tuple(range(len(labels))) else [values]
    )  # stores from before other values were read stay valid
    numbers = [[float(number) for number in row or ()] for row in (grids.factors, grids.finest_spacing)]
    digest = hashlib.blake2b(json.dumps([FORMAT, labels, numbers, grids.spatial_dims, *own]).encode(), digest_size=16)
    digest.update((case.checksum or content_checksum(case)).encode())
    return digest.hexdigest()
