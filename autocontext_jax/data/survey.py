"""What the labelled cases of a data set are: how large and how finely sampled, and how large and thick their classes.

For a planner, which chooses spacing, levels and patches from it. It reads label maps, which takes a while, so that no
other job makes it.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from autocontext_jax.data.class_sizes import ClassSize, class_sizes
from autocontext_jax.data.label_maps import read_label_map
from autocontext_jax.data.labels import IGNORE, LabelSpec
from autocontext_jax.data.layouts import Case
from autocontext_jax.data.workers import WorkerDiedError, in_processes, out_of_memory
from autocontext_jax.errors import UserError, counted
from autocontext_jax.images import scans
from autocontext_jax.images.grid import Grid

log = logging.getLogger(__name__)

FORMAT = 1  # of the survey in fingerprint.json: one of another format counts as none, and is made anew
LABEL_MAPS = 200  # that are read at most: more would change medians little


@dataclasses.dataclass(frozen=True)
class Range:
    """A number over cases: its median, its smallest and its largest value."""

    median: float
    smallest: float
    largest: float


Axes = tuple[Range, Range, Range]  # along (z, y, x), each by itself


@dataclasses.dataclass(frozen=True)
class ClassSurvey:
    """A class in the label maps that were read.

    Ranges are over the cases in which the class occurs, and None if there is none.

    Attributes:
      name: of the class or region.
      annotated: number of cases that annotate it, in any voxel; in all others it is unknown whether it occurs.
      cases: in how many of these it occurs.
      share: of the voxels of all cases that annotate it, without those that nobody labelled; None if there are none.
      voxels: number of its voxels.
      volume: ml.
      extent: mm along (z, y, x) of the smallest box that holds all of it, from edge to edge of its voxels.
      thickness: mm along (z, y, x): its mean length along lines parallel to the axis, see `survey`.
    """

    name: str
    annotated: int
    cases: int
    share: float | None
    voxels: Range | None
    volume: Range | None
    extent: Axes | None
    thickness: Axes | None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ClassSurvey":
        """What `dataclasses.asdict` gave, and JSON kept."""
        values = dict(content)
        values |= {name: values[name] and Range(**values[name]) for name in ("voxels", "volume")}
        values |= {name: values[name] and _axes_of(values[name]) for name in ("extent", "thickness")}
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Survey:
    """The labelled cases of a data set.

    Attributes:
      cases: number of them; the scans' numbers are over all.
      shape: voxels along (z, y, x), canonical.
      extent: mm along (z, y, x), from edge to edge of the voxels.
      spacing: mm along (z, y, x).
      spacing_p10: its 10th percentile along each of (z, y, x), mm, see `survey`.
      orientations: of the files, as `Grid.orientation` has them, with their numbers of cases, most frequent first.
      label_maps: number of cases whose label maps were read; the classes' numbers are over these.
      classes: [K - 1] without the background.
      made_from: a checksum of what it depends on; "" where the content of the files was not known.
    """

    cases: int
    shape: Axes
    extent: Axes
    spacing: Axes
    spacing_p10: tuple[float, float, float]
    orientations: tuple[tuple[str, int], ...]
    label_maps: int
    classes: tuple[ClassSurvey, ...]
    made_from: str = ""

    def is_of(self, cases: Sequence[Case], labels: LabelSpec, *, at_most: int = LABEL_MAPS) -> bool:
        """Whether `survey` would find the same again; the arguments are its own. Reads nothing."""
        return bool(self.made_from) and self.made_from == _made_from(_labelled(cases), labels, at_most)

    def to_json(self) -> dict[str, Any]:
        """As `fingerprint.json` has it."""
        return {"format": FORMAT, **dataclasses.asdict(self), "orientations": dict(self.orientations)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> "Survey | None":
        """What `to_json` gave; None if there is none, or one of another format."""
        if content is None or content["format"] != FORMAT:
            return None
        values = dict(content)
        del values["format"]
        values |= {name: _axes_of(values[name]) for name in ("shape", "extent", "spacing")}
        values["spacing_p10"] = tuple(values["spacing_p10"])
        values["orientations"] = tuple(values["orientations"].items())
        values["classes"] = tuple(map(ClassSurvey.from_json, values["classes"]))
        return cls(**values)


def survey(
    cases: Sequence[Case],
    labels: LabelSpec,
    *,
    workers: int,
    progress: Callable[[str], object],
    at_most: int = LABEL_MAPS,
) -> Survey:
    """The survey of a data set: reads the headers of all its labelled cases and the label maps of some, once.

    Thickness is the mean intercept of stereology. Along an axis of spacing s, the n voxels of a class make r unbroken
    rows, whose mean length is s · n / r. A slab has its thickness across it, a straight tube π/4 of its diameter, a
    ball 2/3, whatever the spacing along the other axes. Spacing along an axis resolves a class while it is well below
    the thickness along it; the smallest of the three is that of the class. Thin parts count as lines meet them, not by
    their volume, so that a vessel's trunk does not hide its branches. A row also ends where another class or what
    nobody labelled begins, and at the edge of the scan. No row is shorter than a voxel: of what is thinner than the
    scan's own spacing, that spacing is found.

    Percentiles are interpolated linearly, along each axis by itself. nnU-Net 2 resamples to the median spacing, but
    along the axis of the largest median to the 10th percentile, if this median is more than 3 times that of both other
    axes, and the scans' median number of voxels along it less than a third of that along both others; to no less than
    the larger of the other medians. So it keeps what the thinner slices of some cases show. (Its numbers of voxels are
    those of scans cropped to what is not 0; those here are of whole scans.)

    Args:
      cases: those to learn from. The ones without a label are left out.
      labels: of their data set. What a case does not annotate is unknown in it.
      workers: number of processes, each with one label map in memory.
      progress: called with the name of each case whose label map is done with, good or bad.
      at_most: so many label maps are read, drawn by the cases' names; all if there are fewer.

    Raises:
      UserError: no case has a label; a header or a label map cannot be read: it is named with the number of others,
        which have been logged; the system ended a process.
    """
    labelled = _labelled(cases)
    if not labelled:
        raise UserError(f"none of {counted(len(cases), 'case')} has a label: expected one or more to survey")
    grids = _grids(labelled)
    drawn = [labelled[place] for place in np.random.default_rng(0).permutation(len(labelled))[:at_most]]
    measured = _measured([(case, grids[case.name]) for case in drawn], labels, workers, progress)
    spacings = {name: _spacing(grid) for name, grid in grids.items()}

    spacing = np.array(list(spacings.values()))  # [cases, 3]
    shape = np.array([grid.canonical_size for grid in grids.values()])
    orientations = Counter(sorted(grid.orientation for grid in grids.values())).most_common()
    z, y, x = (_rounded(value) for value in np.percentile(spacing, 10, axis=0))
    classes = []
    for number, name in enumerate(labels.classes[1:], start=1):
        annotating = [case for case in drawn if labels.known(case.annotated)[number]]
        found = [(spacings[case.name], *measured[case.name]) for case in annotating]
        classes.append(_class_survey(name, [(mm, count, sizes[number - 1]) for mm, count, sizes in found if count]))
    return Survey(
        cases=len(labelled),
        shape=_axes(shape),
        extent=_axes(shape * spacing),
        spacing=_axes(spacing),
        spacing_p10=(z, y, x),
        orientations=tuple(orientations),
        label_maps=len(drawn),
        classes=tuple(classes),
        made_from=_made_from(labelled, labels, at_most),
    )


def _labelled(cases: Sequence[Case]) -> list[Case]:
    """By name: the order in which cases come changes nothing."""
    return sorted((case for case in cases if case.label is not None), key=lambda case: case.name)


def _made_from(labelled: Sequence[Case], labels: LabelSpec, at_most: int) -> str:
    if not all(case.checksum for case in labelled):
        return ""
    files = [case.files and dataclasses.astuple(case.files) for case in labelled]
    known = [[case.name, case.checksum, case.annotated] for case in labelled]
    content = [FORMAT, labels.to_json(), known, files, min(at_most, len(labelled))]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _grids(labelled: Sequence[Case]) -> dict[str, Grid]:
    """The grid of every case, by name."""

    def read(case: Case) -> Grid | UserError:
        try:
            return scans.read_grid(case.images)
        except UserError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # they wait for the disk
        found = list(pool.map(read, labelled))
    _refuse([str(grid) for grid in found if isinstance(grid, UserError)], len(labelled))
    return {case.name: grid for case, grid in zip(labelled, found, strict=True) if isinstance(grid, Grid)}


def _measured(
    drawn: Sequence[tuple[Case, Grid]], labels: LabelSpec, workers: int, progress: Callable[[str], object]
) -> dict[str, tuple[int, tuple[ClassSize, ...]]]:
    """What `_measure` finds in the label map of each case, by name."""
    found, bad = {}, {}
    try:
        for (case, _), outcome in in_processes(functools.partial(_measure, labels=labels), drawn, workers=workers):
            if isinstance(outcome, UserError):
                bad[case.name] = str(outcome)
            else:
                found[case.name] = outcome
            progress(case.name)
    except WorkerDiedError:
        raise out_of_memory("survey", min(workers, len(drawn))) from None
    _refuse([bad[name] for name in sorted(bad)], len(drawn))
    return found


def _measure(item: tuple[Case, Grid], labels: LabelSpec) -> tuple[int, tuple[ClassSize, ...]]:
    """The number of voxels of a case that somebody labelled, and the size of each class."""
    case, grid = item
    label = read_label_map(case, labels, grid)
    return label.size - int(np.count_nonzero(label == IGNORE)), class_sizes(label, labels)


def _refuse(messages: Sequence[str], count: int) -> None:
    if messages:
        for message in messages[:-1]:
            log.error("%s", message)
        raise UserError(f"{messages[-1]} ({len(messages)} of {count} cases cannot be surveyed)")


def _class_survey(name: str, measured: Sequence[tuple[np.ndarray, int, ClassSize]]) -> ClassSurvey:
    """Of one class, from the spacing, the labelled voxels and the class's size in each case that annotates it."""
    labelled = sum(known for _, known, _ in measured)
    share = _rounded(sum(size.voxels for _, _, size in measured) / labelled) if labelled else None
    found = [(spacing, size) for spacing, _, size in measured if size.voxels]
    if not found:
        return ClassSurvey(name, len(measured), 0, share, None, None, None, None)
    spacing = np.array([spacing for spacing, _ in found])  # [cases, 3]
    voxels, box, runs = (
        np.array(counts) for counts in zip(*(dataclasses.astuple(size) for _, size in found), strict=True)
    )
    return ClassSurvey(
        name,
        annotated=len(measured),
        cases=len(found),
        share=share,
        voxels=_range(voxels),
        volume=_range(voxels * spacing.prod(axis=1) / 1000),
        extent=_axes(box * spacing),
        thickness=_axes(spacing * voxels[:, None] / runs),
    )


def _spacing(grid: Grid) -> np.ndarray:
    """In mm, [3]. Headers hold float32: to seven digits equal spacings are equal."""
    return np.array([float(f"{value:.7g}") for value in grid.canonical_spacing])


def _range(values: np.ndarray) -> Range:
    """Of [cases]."""
    return Range(*(_rounded(fold(values)) for fold in (np.median, np.min, np.max)))


def _axes(values: np.ndarray) -> Axes:
    """Of [cases, 3]."""
    z, y, x = (_range(column) for column in values.T)
    return z, y, x


def _axes_of(content: Sequence[Mapping[str, float]]) -> Axes:
    z, y, x = (Range(**entry) for entry in content)
    return z, y, x


def _rounded(value: float) -> float:
    """Without the last digits of its arithmetic; counts of voxels and halves of them stay exact."""
    return float(f"{value:.12g}")
