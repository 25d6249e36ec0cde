"""--mode evaluate: predict held-out whole scans and score every level on the scans' own grids.

With `config.evaluate.root` these are all labelled scans of another data set. It may number and name its organs
otherwise and know fewer or more of them: what it does not annotate is left out, what the checkpoint does not know is
background.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from autocontext_jax import processes
from autocontext_jax.data import scans
from autocontext_jax.data.datasets import Case, Dataset, read_dataset
from autocontext_jax.errors import UserError
from autocontext_jax.evaluation import metrics, pictures, report
from autocontext_jax.files import writing
from autocontext_jax.jobs.config import model_factors, model_levels
from autocontext_jax.jobs.prepare import Data
from autocontext_jax.jobs.restore import restore_predictor
from autocontext_jax.jobs.stages import in_stages

log = logging.getLogger(__name__)

Labelled = tuple[scans.Scan, np.ndarray]  # a scan and its label


def evaluate_elsewhere(config: ConfigDict, workdir: Path) -> bool:
    """As `evaluate`, for the data set `config.evaluate.root`, into a folder of its name in the work directory."""
    dataset = read_dataset(Path(config.evaluate.root).expanduser())
    cases = [case for case in (*dataset.training, *dataset.test) if case.label is not None]
    folder = workdir / f"on_{dataset.root.resolve().name}"

    def cases_are(number: int) -> str:
        return f"{number} labelled case{'' if number == 1 else 's'} of {dataset.root.resolve().name}"

    return _score(config, workdir, dataset, cases, folder, names=config.evaluate.labels, cases_are=cases_are)


def evaluate(config: ConfigDict, workdir: Path, data: Data) -> bool:
    """Writes predictions, pictures, `evaluation.json`, `table.csv` and `table.md`, and prints the last.

    The scans are the data set's labelled test cases; without any, its validation cases.

    Returns:
      False if scans or labels could not be read: they are named at the end, the others are scored.

    Raises:
      UserError: nothing to evaluate, no checkpoint, labels that are not the checkpoint's.
    """
    cases = held_out(data)
    if unlabelled := [case.name for case in data.dataset.test if case.label is None]:
        log.warning("%s: test cases without a label are not scored: %s", data.dataset.root, ", ".join(unlabelled))
    if not cases:
        raise UserError(
            f"data set {data.dataset.root} has no labelled test case and no validation case; wanted at least one scan "
            "that was not trained on: add imagesTs and labelsTs, or more training cases"
        )
    return _score(
        config, workdir, data.dataset, cases, workdir,
        names=None, cases_are=lambda number: held_out_are(config, data, number),
    )  # fmt: skip


def _score(
    config: ConfigDict,
    workdir: Path,
    dataset: Dataset,
    cases: Sequence[Case],
    folder: Path,
    *,
    names: Sequence[str] | None,
    cases_are: Callable[[int], str],
) -> bool:
    """`evaluate` for these cases, into `folder`.

    Args:
      config: of the run.
      workdir: of the run.
      dataset: of the cases.
      cases: labelled.
      folder: where all is written.
      names: as for `translation`; None means that the data set's labels must be the checkpoint's.
      cases_are: from the number of scored cases, what `report.evaluation` takes.
    """
    predictor, labels = restore_predictor(config, workdir)
    if names is None and labels != dataset.labels:
        raise UserError(
            f"the data set {dataset.root} has labels {dataset.labels}; the checkpoint knows {tuple(labels)}"
        )
    ours = translation(dataset, labels, names or ())
    annotated = [labels[number] for number in sorted(set(ours.tolist()) - {0})]
    levels = model_levels(config)
    tolerance = config.evaluate.tolerance
    for name in ("pictures", "predictions", *(f"predictions/level_{level}" for level in levels[:-1])):
        with writing(folder / name):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def read(case: Case) -> Labelled:
        assert case.label is not None
        scan = scans.read_scan(case.image)
        return scan, ours[scans.read_label(case.label, labels=range(len(ours)), like=scan.grid, case=case.name)]

    def masks_of(case: Case, labelled: Labelled) -> tuple[Labelled, dict[int, np.ndarray]]:
        scan, _ = labelled
        every = tuple(range(1, len(levels) + 1))
        made = predictor.masks(scan.voxels, model_factors(config, scan.spacing), levels=every)
        return labelled, {level: made[number] for number, level in enumerate(levels, start=1)}

    def score(case: Case, made: tuple[Labelled, dict[int, np.ndarray]]) -> dict:
        (scan, truth), masks = made
        for level, mask in masks.items():
            place = folder / "predictions" / ("" if level == levels[-1] else f"level_{level}")
            scans.write_mask(place / f"{case.name}.nii.gz", mask, scan.grid)
        columns = {"truth": truth, **{f"level {level}": mask for level, mask in masks.items()}}
        path = folder / "pictures" / f"{case.name}.png"
        pictures.figure(path, scan.voxels, columns, labels[1:], scan.spacing, title=case.name)
        scored = {}
        for level, mask in masks.items():
            every = metrics.scores(mask, truth, labels[1:], scan.spacing, tolerance=tolerance)
            scored[f"level_{level}"] = {organ: every[organ] for organ in annotated}
        return scored

    results, bad = {}, []
    share = processes.mine(cases)
    bar = tqdm(
        in_stages(share, read, masks_of, score),
        total=len(share), desc="evaluate", unit="scan", disable=not processes.is_first(),
    )  # fmt: skip
    for case, outcome in bar:
        if isinstance(outcome, UserError):
            bad.append(str(outcome))
        else:
            results[case.name] = outcome

    gathered = processes.gather((results, bad))
    scored = {name: scores for found, _ in gathered for name, scores in found.items()}
    results = {case.name: scored[case.name] for case in cases if case.name in scored}
    bad = [message for _, messages in gathered for message in messages]
    if results and processes.is_first():
        names = [f"level_{level}" for level in levels]
        pairs = [(finer, coarser) for coarser, finer in itertools.pairwise(names)]
        result = report.evaluation(
            results, annotated, cases_are=cases_are(len(results)), tolerance=tolerance, pairs=pairs
        )
        report.write(result, folder)
        print(report.table(result))
    processes.wait(f"evaluated in {folder}")  # what is written stands for every process
    for message in bad:
        log.error("%s", message)
    if bad:
        log.error("%d of %d scans could not be scored", len(bad), len(cases))
    return not bad


def held_out(data: Data) -> Sequence[Case]:
    """The cases to score: labelled test cases, else validation cases; empty if there is neither."""
    return [case for case in data.dataset.test if case.label is not None] or data.validation


def held_out_are(config: ConfigDict, data: Data, number: int) -> str:
    """Which cases `held_out` gives and how they were chosen, as `report.evaluation` takes it; `number` were scored."""
    plural = "" if number == 1 else "s"
    if any(case.label is not None for case in data.dataset.test):
        return f"{number} test case{plural}"
    optimistic = ", which also chose the checkpoint: scores are optimistic"
    return f"{number} validation case{plural}" + (optimistic if config.predict.checkpoint == "best" else "")


def translation(dataset: Dataset, labels: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """What a data set's label values are here.

    Args:
      dataset: with names of its own.
      labels: [K] the checkpoint's names, background first.
      names: "theirs=ours" for each organ that is called otherwise there.

    Returns:
      [its number of labels] uint8: the checkpoint's value of each, 0 where the checkpoint does not know it.

    Raises:
      UserError: a name that is not there, or no organ in common.
    """
    ours = {organ: organ for organ in dataset.labels[1:] if organ in labels}
    for name in names:
        there, _, here = name.partition("=")
        if there not in dataset.labels[1:] or here not in labels[1:]:
            raise UserError(
                f"config key evaluate.labels holds {name!r}; wanted THEIRS=OURS with one of {dataset.labels[1:]} of "
                f"{dataset.root} and one of {tuple(labels[1:])} of the checkpoint"
            )
        ours[there] = here
    if not ours:
        raise UserError(
            f"data set {dataset.root} has the organs {dataset.labels[1:]}, the checkpoint knows {tuple(labels[1:])}: "
            "name those that are the same, --config.evaluate.labels=\"('theirs=ours',)\""
        )
    known = {name: number for number, name in enumerate(labels)}
    return np.array([known.get(ours.get(organ, ""), 0) for organ in dataset.labels], np.uint8)
