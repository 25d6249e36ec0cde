"""--mode evaluate: predict held-out whole scans and score every level on the scans' own grids."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from autocontext_jax.data import scans
from autocontext_jax.data.datasets import Case
from autocontext_jax.errors import UserError
from autocontext_jax.evaluation import metrics, pictures, report
from autocontext_jax.jobs.config import model_factors, model_levels
from autocontext_jax.jobs.prepare import Data
from autocontext_jax.jobs.restore import restore_predictor
from autocontext_jax.jobs.stages import in_stages

log = logging.getLogger(__name__)

Labelled = tuple[scans.Scan, np.ndarray]  # a scan and its label


def evaluate(config: ConfigDict, workdir: Path, data: Data) -> bool:
    """Writes predictions, pictures, `evaluation.json` and `table.md`, and prints the table.

    The scans are the data set's labelled test cases; without any, its validation cases.

    Returns:
      False if scans or labels could not be read: they are named at the end, the others are scored.

    Raises:
      UserError: nothing to evaluate, no checkpoint, labels that are not the checkpoint's.
    """
    cases = held_out(data)
    if not cases:
        raise UserError(
            f"data set {data.dataset.root} has no labelled test case and no validation case; wanted at least one scan "
            "that was not trained on: add imagesTs and labelsTs, or more training cases"
        )
    predictor, labels = restore_predictor(config, workdir)
    organs = labels[1:]
    if labels != data.dataset.labels:
        raise UserError(
            f"the data set {data.dataset.root} has labels {data.dataset.labels}; the checkpoint knows {tuple(labels)}"
        )
    levels = model_levels(config)
    tolerance = config.evaluate.tolerance
    for folder in ("predictions", "pictures"):
        (workdir / folder).mkdir(exist_ok=True)

    def read(case: Case) -> Labelled:
        assert case.label is not None
        scan = scans.read_scan(case.image)
        return scan, scans.read_label(case.label, labels=range(len(labels)), like=scan.grid, case=case.name)

    def masks_of(case: Case, labelled: Labelled) -> tuple[Labelled, dict[int, np.ndarray]]:
        scan, _ = labelled
        every = tuple(range(1, len(levels) + 1))
        made = predictor.masks(scan.voxels, model_factors(config, scan.spacing), levels=every)
        return labelled, {level: made[number] for number, level in enumerate(levels, start=1)}

    def score(case: Case, made: tuple[Labelled, dict[int, np.ndarray]]) -> dict:
        (scan, truth), masks = made
        scans.write_mask(workdir / "predictions" / f"{case.name}.nii.gz", masks[levels[-1]], scan.grid)
        columns = {"truth": truth, **{f"level {level}": mask for level, mask in masks.items()}}
        path = workdir / "pictures" / f"{case.name}.png"
        pictures.figure(path, scan.voxels, columns, organs, scan.spacing, title=case.name)
        return {
            f"level_{level}": metrics.scores(mask, truth, organs, scan.spacing, tolerance=tolerance)
            for level, mask in masks.items()
        }

    results, bad = {}, []
    for case, outcome in tqdm(in_stages(cases, read, masks_of, score), total=len(cases), desc="evaluate", unit="scan"):
        if isinstance(outcome, UserError):
            bad.append(str(outcome))
        else:
            results[case.name] = outcome

    if results:
        result = report.evaluation(results, organs, tolerance=tolerance)
        report.write(result, workdir)
        print(report.table(result))
    for message in bad:
        log.error("%s", message)
    if bad:
        log.error("%d of %d scans could not be scored", len(bad), len(cases))
    return not bad


def held_out(data: Data) -> Sequence[Case]:
    """The cases to score: labelled test cases, else validation cases; empty if there is neither."""
    return [case for case in data.dataset.test if case.label is not None] or data.validation
