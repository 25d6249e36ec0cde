"""--mode report: what stands in a work directory as one page, `report.html`, and as PNG files."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from autocontext_jax.data.label_maps import read_label_map
from autocontext_jax.errors import UserError
from autocontext_jax.evaluation import page, pictures, surface_meshes
from autocontext_jax.evaluation.report import beside_published, read_evaluation
from autocontext_jax.images import scans
from autocontext_jax.images.formats import mask_suffix
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import VALIDATION, RunData, fold_folder, read_data
from autocontext_jax.training.phases import MODES

log = logging.getLogger(__name__)


def report(config: RunConfig, workdir: Path) -> None:
    """Writes the page of a run's or an experiment's evaluation, and pictures of the best, median and worst case.

    Of an experiment the cases are those of its end-to-end run, or of its first without one; of a cross-validation each
    case is that of the fold that scored it.

    Raises:
      UserError: nothing was evaluated there; a scan or a mask is missing.
    """
    result = _read(workdir)
    modes = [mode for mode in MODES if (workdir / mode / "evaluation.json").exists()]
    run = workdir / modes[0] if modes else workdir
    folds = {case: fold_folder(workdir, number).name for case, number in result.get("folds", {}).items()}
    curves, runs = {}, modes or sorted(set(folds.values()))
    for name, folder in {name: workdir / name for name in runs}.items() if runs else [("", workdir)]:
        curves[name] = [json.loads(line) for line in _found(folder / "metrics.jsonl").read_bytes().splitlines()]
    tables = _found(workdir / "table.md").read_text(encoding="utf-8")
    tables += "\n## Beside the paper's Table 2\n\n" + beside_published(_mean_dice(result, run))

    classes, shown = result["classes"], []
    pictures.boxes(workdir / "dice.png", result)
    data = read_data(config, workdir)
    for title, case in _best_median_worst(_read(run)).items():
        place = workdir / folds[case] / VALIDATION if folds else run
        columns = _surfaces(place, case, data)
        surface_meshes.figure(place / "pictures" / f"{case}_surfaces.png", columns, classes, title=title)
        shown.append(page.Shown(title, _found(place / "pictures" / f"{case}.png").read_bytes(), columns))
    page.write_page(
        workdir / "report.html", title=workdir.resolve().name, tables=tables, result=result, curves=curves, cases=shown
    )
    log.info("wrote %s", workdir / "report.html")


def _found(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path} is missing: train and evaluate there first (--mode all, or --mode evaluate)")
    return path


def _read(folder: Path) -> dict[str, Any]:
    _found(folder / "evaluation.json")
    return read_evaluation(folder)


def _mean_dice(result: dict[str, Any], run: Path) -> dict[str, dict[str, float | None]]:
    """Dice per class, of every block of an evaluation, and of the run's finest level on other data sets."""
    found = dict(result["summary"])
    for path in sorted(run.glob("on_*/evaluation.json")):
        *_, finest = read_evaluation(path.parent)["summary"].values()
        found[path.parent.name.replace("_", " ", 1)] = finest
    return {
        name: {title: summary[title]["dice"]["avg"] for title in summary if title != "mean"}
        for name, summary in found.items()
    }


def _best_median_worst(result: dict[str, Any]) -> dict[str, str]:
    """{what the picker says: case} by the finest level's mean Dice."""
    *_, finest = result["summary"]
    scored = {}
    for case, blocks in result["cases"].items():
        dice = [scores["dice"] for scores in blocks[finest].values() if scores["dice"] is not None]
        if dice:  # without any, its classes are neither there nor predicted
            scored[case] = float(np.mean(dice))
    scored = scored or dict.fromkeys(result["cases"], 0.0)
    order = sorted(scored, key=lambda case: scored[case], reverse=True)
    places = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    return {f"{place}: {case}, Dice {100 * scored[case]:.1f} %": case for place, case in places.items()}


def _surfaces(run: Path, name: str, data: RunData) -> dict[str, dict[str, surface_meshes.Surface]]:
    """Of the truth and of every level's mask."""
    dataset, labels = data.dataset, data.labels
    (case,) = [case for case in (*dataset.training, *dataset.test) if case.name == name]
    grid, mask = scans.read_grid(case.images), f"{name}{mask_suffix(case.images[0])}"
    files = {}
    for folder in sorted((run / "predictions").glob("level_*")):
        files[folder.name.replace("_", " ")] = folder / mask
    files["finest level"] = run / "predictions" / mask

    def surfaces(mask: np.ndarray) -> dict[str, surface_meshes.Surface]:
        return surface_meshes.class_surfaces(mask, labels.classes[1:], grid.canonical_spacing)

    columns = {"truth": surfaces(labels.drawn[read_label_map(case, labels, grid)])}
    written = {"values": labels.masks.values, "numbers": labels.masks.numbers}
    for column, path in files.items():
        columns[column] = surfaces(scans.read_label(path, **written, like=grid, case=name))
    return columns
