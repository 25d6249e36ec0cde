"""From labelled scans to prepared cases, in parallel processes. Free of jax, as worker processes import it."""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence

import numpy as np

from autocontext_jax.data.body import voxels_outside
from autocontext_jax.data.histograms import ct_statistics
from autocontext_jax.data.label_maps import read_label_map
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.layouts import Case
from autocontext_jax.data.split import content_checksum
from autocontext_jax.data.store.format import FORMAT, read_attributes
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.data.store.writer import write_case
from autocontext_jax.data.workers import WorkerDiedError, in_processes, out_of_memory
from autocontext_jax.errors import UserError, counted, some
from autocontext_jax.images import scans
from autocontext_jax.images.intensity import looks_like_ct
from autocontext_jax.images.spec import CT, ImageSpec, with_statistics

log = logging.getLogger(__name__)


def prepare_case(case: Case, root: str, grids: LevelGrids, labels: LabelSpec, image: ImageSpec = CT) -> bool:
    """Writes a case's pyramid, unless it is there already; a part of it from an interrupted run is replaced.

    Args:
      case: its scan and label on one grid.
      root: folder or URL of the store.
      grids: of the levels.
      labels: of its data set.
      image: of the channels.

    Returns:
      True if written, False if it was there.

    Raises:
      UserError: the case has no label; a file cannot be read (see `scans`).
    """
    if case.label is None:
        raise UserError(f"case {case.name}: {case.images[0]} has no label: add one or leave the case out of training")
    digest = _digest(case, grids, labels, image)
    if read_attributes(root, case.name).get("hash") == digest:
        return False

    scan = scans.read_scan(case.images, image)
    for channel in image.ct:
        values = scan.voxels[channel]
        if not looks_like_ct(values):
            log.warning("case %s does not look like CT in HU: %d to %d", case.name, values.min(), values.max())
    label = read_label_map(case, labels, scan.grid)
    if image.ct and (lost := voxels_outside(scan.voxels[image.ct[0]], label)):
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
        image=image,
        origin=scan.origin,
        direction=scan.direction,
        known=labels.known(case.annotated),
        digest=digest,
    )
    return True


def prepare_cases(
    cases: Sequence[Case],
    root: str,
    grids: LevelGrids,
    labels: LabelSpec,
    image: ImageSpec = CT,
    *,
    workers: int,
    progress: Callable[[str], object],
) -> list[tuple[Case, str]]:
    """Prepares cases in parallel processes, each with one scan in memory at a time.

    Args:
      cases: of different names.
      root: folder or URL of the store.
      grids: of the levels.
      labels: of their data set.
      image: of the channels.
      workers: number of processes.
      progress: called with the name of each case that is done with, good or bad.

    Returns:
      The cases that a `UserError` stopped and its line, in the order given; the others are prepared nevertheless.

    Raises:
      UserError: the system ended a process.
    """
    bad = {}
    try:
        work = functools.partial(prepare_case, root=root, grids=grids, labels=labels, image=image)
        for case, outcome in in_processes(work, cases, workers=workers):
            if isinstance(outcome, UserError):
                bad[case.name] = str(outcome)
            progress(case.name)
    except WorkerDiedError:
        raise out_of_memory("prepare", min(workers, len(cases))) from None
    return [(case, bad[case.name]) for case in cases if case.name in bad]


def check_classes(cases: Sequence[Case], root: str, labels: LabelSpec, dataset: str) -> None:
    """Looks at what the prepared training cases hold; warns of cases without any class and of classes without any case.

    Args:
      cases: prepared, those to train on.
      root: folder or URL of the store.
      labels: of the data set.
      dataset: name of the data set, for messages.

    Raises:
      UserError: no case holds a labelled voxel.
    """
    of_numbers = np.array([np.diff(PreparedCase.open(root, case.name).foreground_offsets) for case in cases])
    voxels = of_numbers @ labels.membership[1:, 1 : len(labels.values)].T  # [cases, K - 1]
    if not voxels.any():
        raise UserError(
            f"data set {dataset}: in its {counted(len(cases), 'training case')} no voxel is labelled at the finest "
            f"level: expected at least one of {some(labels.classes[1:])}: correct the labels, or choose finer levels"
        )
    if empty := [case.name for case, has in zip(cases, voxels, strict=True) if not has.any()]:
        log.warning("%s: no class is labelled in these cases, trained on as background: %s", dataset, some(empty))
    if absent := [name for name, has in zip(labels.classes[1:], voxels.T, strict=True) if not has.any()]:
        log.warning("%s: no training case has these classes, which cannot be learned: %s", dataset, some(absent))


def learned_image(cases: Sequence[Case], root: str, image: ImageSpec) -> ImageSpec:
    """The channels with what CT needs to be normalised, learned from the labelled voxels of prepared training cases.

    Args:
      cases: prepared; at least one has a labelled voxel.
      root: folder or URL of the store.
      image: of the channels, as the cases were prepared with it.
    """
    if image.learned:
        return image
    counted_in = [PreparedCase.open(root, case.name).intensities() for case in cases]
    statistics = {
        channel: ct_statistics(counts[place] for counts in counted_in)
        for place, channel in enumerate(image.ct)
        if not image.channels[channel].window
    }
    return with_statistics(image, statistics)


def _digest(case: Case, grids: LevelGrids, labels: LabelSpec, image: ImageSpec) -> str:
    """Of all that a prepared case is made from."""
    numbers = [[float(number) for number in row or ()] for row in (grids.factors, grids.finest_spacing)]
    files = dataclasses.astuple(case.files or labels.files)
    made_from = [FORMAT, labels.classes, labels.members, files, case.annotated, numbers, grids.spatial_dims]
    made_from.append(grids.scales)
    made_from.append(image.stored_as)
    digest = hashlib.blake2b(json.dumps(made_from).encode(), digest_size=16)
    digest.update((case.checksum or content_checksum(case)).encode())
    return digest.hexdigest()
