"""--mode evaluate: predict held-out whole scans and score every level on the scans' own grids.

With `evaluate.root` these are all labelled scans of another data set. It may number and name its classes otherwise and
know fewer or more of them: what it does not annotate is left out, what the checkpoint does not know is background.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from autocontext_jax import processes
from autocontext_jax.data.datasets import Case, Dataset, read_dataset
from autocontext_jax.data.label_maps import read_label_map
from autocontext_jax.data.split import Split
from autocontext_jax.errors import UserError, counted
from autocontext_jax.evaluation import pictures, report
from autocontext_jax.evaluation.label_mapping import LabelMapping, label_mapping
from autocontext_jax.files import writing
from autocontext_jax.images import scans
from autocontext_jax.images.formats import PICTURES, mask_suffix
from autocontext_jax.jobs.evaluations import settings_of
from autocontext_jax.jobs.extensions import NO_EXTENSIONS, Extensions
from autocontext_jax.jobs.lock import locked_by_first
from autocontext_jax.jobs.restore import restore_ensemble, restore_model
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import TEST, VALIDATION, RunData, known_split, read_data
from autocontext_jax.jobs.scan_pipeline import in_stages

log = logging.getLogger(__name__)
Labelled = tuple[scans.Scan, np.ndarray]  # a scan and its stored label map


def evaluate(config: RunConfig, workdir: Path, extensions: Extensions = NO_EXTENSIONS) -> bool:
    """Scores the run's test cases, or the data set `evaluate.root`.

    Writes predictions, pictures, `evaluation.json`, `table.csv` and `table.md`, and prints the last. What an earlier
    evaluation left is removed first, so that masks of different evaluations are never mixed.

    Returns:
      False if scans or labels could not be read: they are named at the end, the others are scored.

    Raises:
      UserError: nothing to evaluate, no checkpoint, cases that are lost.
    """
    if config.evaluate.root:
        return _evaluate_elsewhere(config, workdir, extensions)
    data = processes.agree(lambda: read_data(config, workdir))
    return evaluate_run(config, workdir, data, extensions)


def evaluate_run(config: RunConfig, workdir: Path, data: RunData, extensions: Extensions = NO_EXTENSIONS) -> bool:
    """`evaluate` of a run's own cases: its labelled test cases; without any, its validation cases."""
    cases, cases_are = data.scored(best=config.predict.checkpoint == "best")
    _name_unlabelled(data)
    if not cases:
        raise UserError(
            f"data set {data.dataset.place} has no labelled test case and no validation case; expected at least one "
            "scan that was not trained on: add imagesTs and labelsTs, or more training cases"
        )
    return _score_own(config, workdir, data, extensions, cases, workdir, cases_are)


def evaluate_validation(
    config: RunConfig, workdir: Path, data: RunData, extensions: Extensions = NO_EXTENSIONS
) -> bool:
    """`evaluate` of a run's validation cases, also where there are test cases, into its folder `validation`."""
    cases, cases_are = data.held_out(best=config.predict.checkpoint == "best")
    return _score_own(config, workdir, data, extensions, cases, workdir / VALIDATION, cases_are)


def evaluate_test(config: RunConfig, workdir: Path, data: RunData, extensions: Extensions = NO_EXTENSIONS) -> bool:
    """`evaluate` of the test cases of a cross-validation by the ensemble of its folds, into its folder `test`."""

    def cases_are(number: int) -> str:
        return counted(number, "test case")

    _name_unlabelled(data)
    return _score_own(config, workdir, data, extensions, data.test, workdir / TEST, cases_are, ensemble=True)


def _name_unlabelled(data: RunData) -> None:
    if unlabelled := [case.name for case in data.split.of("test", data.dataset) if case.label is None]:
        log.warning("%s: test cases without a label are not scored: %s", data.dataset.place, ", ".join(unlabelled))


def _evaluate_elsewhere(config: RunConfig, workdir: Path, extensions: Extensions) -> bool:
    """Scores all labelled cases of `evaluate.root`, into a folder of its name in the run folder."""

    def read() -> tuple[Dataset, Split, LabelMapping]:
        split = known_split(workdir)
        dataset = read_dataset(Path(config.evaluate.root).expanduser(), outside_paths=config.data.outside_paths)
        return dataset, split, label_mapping(dataset.labels, split.labels, config.evaluate.label_mapping, dataset.place)

    dataset, split, labels = processes.agree(read)
    cases = [case for case in (*dataset.training, *dataset.test) if case.label is not None]
    if not cases:
        raise UserError(f"data set {dataset.place} has no case with a label: expected labels in labelsTs or labelsTr")
    if len(cases) < len(dataset.training) + len(dataset.test):
        unlabelled = [case.name for case in dataset.test if case.label is None]
        log.warning("%s: test cases without a label are not scored: %s", dataset.place, ", ".join(unlabelled))

    def cases_are(number: int) -> str:
        return f"{counted(number, 'labelled case')} of {dataset.root.resolve().name}"

    folder = evaluation_folder(config, workdir)
    with locked_by_first(workdir, "evaluation"):
        return _score(
            config, workdir, split, extensions, cases, folder, labels=labels, channels=dataset.channels,
            cases_are=cases_are, ensemble=config.data.holds_folds,
        )  # fmt: skip


def evaluation_folder(config: RunConfig, workdir: Path) -> Path:
    """Where an evaluation is written: the run folder, or for `evaluate.root` a folder of its name in it.

    Data sets of one name, such as `/a/heart` and `/b/heart`, have different folders, `on_heart` and `on_heart_2`.
    """
    if not config.evaluate.root:
        return workdir
    root = Path(config.evaluate.root).expanduser().resolve()
    folder, number, free = workdir / f"on_{root.name}", 1, None
    while folder.exists():
        if not (folder / "evaluation.json").exists():
            free = free or folder
        # Older evaluations do not name their root.
        elif report.read_evaluation(folder)["settings"].get("root", str(root)) == str(root):
            return folder
        number += 1
        folder = workdir / f"on_{root.name}_{number}"
    return free or folder


def _score_own(
    config: RunConfig,
    workdir: Path,
    data: RunData,
    extensions: Extensions,
    cases: Sequence[Case],
    folder: Path,
    cases_are: Callable[[int], str],
    *,
    ensemble: bool = False,
) -> bool:
    """`_score` of cases of the run's own data set; one evaluation of a run is made at a time."""
    own, channels = LabelMapping.same(data.labels), data.dataset.channels
    with locked_by_first(workdir, "evaluation"):
        return _score(
            config, workdir, data.split, extensions, cases, folder, labels=own, channels=channels, cases_are=cases_are,
            ensemble=ensemble,
        )  # fmt: skip


def _score(
    config: RunConfig,
    workdir: Path,
    split: Split,
    extensions: Extensions,
    cases: Sequence[Case],
    folder: Path,
    *,
    labels: LabelMapping,
    channels: Sequence[str],
    cases_are: Callable[[int], str],
    ensemble: bool,
) -> bool:
    """`evaluate` for these cases, into `folder`.

    Args:
      config: of the run.
      workdir: the run folder.
      split: the run's, whose classes are the checkpoint's.
      extensions: the network and metrics from outside the package.
      cases: labelled.
      folder: where all is written.
      labels: of the cases.
      channels: of the cases.
      cases_are: from the number of scored cases, what `report.evaluation` takes.
      ensemble: whether the run folder is that of a cross-validation, whose folds predict together.
    """
    model, step = (
        restore_ensemble(config, workdir, extensions) if ensemble else restore_model(config, workdir, split, extensions)
    )
    by = f", predicted by {'the ensemble of ' * (len(step) > 1)}{', '.join(step)}" if isinstance(step, dict) else ""
    trained_on = tuple(channel.name for channel in model.description.image.channels)
    if channels != trained_on and sorted(channels) == sorted(trained_on):
        raise UserError(
            f"the data set has the channels {', '.join(channels)}; expected the order of the training, "
            f"{', '.join(trained_on)}: rename its files, and correct its dataset.json"
        )
    if channels != trained_on:
        log.warning(
            "the data set has the channels %s, and the model was trained on %s: they are taken in this order",
            ", ".join(channels), ", ".join(trained_on),
        )  # fmt: skip
    classes, extra, image = split.classes, extensions.extra_metrics(config), model.description.image
    levels = config.model_levels()
    tolerance = config.evaluate.tolerance
    processes.first_does(lambda: _make_room(folder, levels))

    def read(case: Case) -> Labelled:
        scan = scans.read_scan(case.images, image)
        return scan, read_label_map(case, labels.theirs, scan.grid)

    def masks_of(case: Case, labelled: Labelled) -> tuple[Labelled, dict[int, np.ndarray]]:
        scan, _ = labelled
        made = model.level_masks(scan)
        return labelled, {level: made[number] for number, level in enumerate(levels, start=1)}

    def score(case: Case, made: tuple[Labelled, dict[int, np.ndarray]]) -> dict:
        (scan, truth), masks = made
        for level, mask in masks.items():
            place = folder / "predictions" / ("" if level == levels[-1] else f"level_{level}")
            valued = scans.label_values(mask, split.labels.mask_values)
            scans.write_mask(place / f"{case.name}{mask_suffix(case.images[0])}", valued, scan.grid)
        columns = {"truth": labels.shown(truth), **{f"level {level}": mask for level, mask in masks.items()}}
        path = folder / "pictures" / f"{case.name}.png"
        shown = image.ct[0] if image.ct else 0
        pictures.figure(
            path, scan.voxels[shown], columns, classes[1:], scan.spacing, title=case.name, hu=bool(image.ct)
        )
        return {
            f"level_{level}": labels.scores(mask, truth, case, scan.spacing, tolerance=tolerance, extra=extra)
            for level, mask in masks.items()
        }

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

    def write() -> None:
        names = [f"level_{level}" for level in levels]
        pairs = [(finer, coarser) for coarser, finer in itertools.pairwise(names)]
        result = report.evaluation(
            results, labels.annotated, cases_are=cases_are(len(results)) + by, tolerance=tolerance, pairs=pairs,
            extra_metrics=list(extra),
        )  # fmt: skip
        report.write(result | {"settings": settings_of(config, step, cases)}, folder)
        print(report.table(result))

    if results:
        processes.first_does(write)
    for message in bad:
        log.error("%s", message)
    if bad:
        log.error("%d of %d scans could not be scored", len(bad), len(cases))
    return not bad


def _make_room(folder: Path, levels: Sequence[int]) -> None:
    """Removes what an earlier evaluation wrote, its result first, and makes the folders."""
    with writing(folder):
        (folder / "evaluation.json").unlink(missing_ok=True)
        for pattern in (
            "table.md",
            "table.csv",
            *(f"predictions/*{suffix}" for suffix in (".nii.gz", *PICTURES)),
            *(f"predictions/level_*/*{suffix}" for suffix in (".nii.gz", *PICTURES)),
            "pictures/*.png",
        ):
            for path in folder.glob(pattern):
                path.unlink()
        for name in ("pictures", "predictions", *(f"predictions/level_{level}" for level in levels[:-1])):
            (folder / name).mkdir(parents=True, exist_ok=True)
