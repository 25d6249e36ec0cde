"""--mode all with the key `experiment`: several training modes on the same data, side by side as in Table 1."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from autocontext_jax import processes
from autocontext_jax.errors import UserError
from autocontext_jax.evaluation import report
from autocontext_jax.files import writing
from autocontext_jax.jobs.evaluate import evaluate, held_out, held_out_are
from autocontext_jax.jobs.prepare import prepare
from autocontext_jax.jobs.train import train

log = logging.getLogger(__name__)


def experiment(config: ConfigDict, workdir: Path) -> bool:
    """Trains and evaluates every mode of `config.experiment` in a folder of its own, then writes the table of all.

    Each folder is a whole run, as `--config.train.mode` alone would make it, and goes on where it stopped. All have the
    same cases and take `train.steps` steps to train a level: `separate` takes them once for each level.

    Returns:
      False if scans or labels could not be read.

    Raises:
      UserError: see `prepare`, `train` and `evaluate`.
    """
    data = prepare(config, workdir)
    if not held_out(data):
        raise UserError(f"data set {data.dataset.root} has no scan that was not trained on; wanted some to compare on")
    good, cases = True, {}
    for mode in config.experiment:
        log.info("mode %s", mode)
        run, folder = _run(config, mode, str(data.dataset.root), data.store), workdir / mode
        with writing(folder):
            folder.mkdir(exist_ok=True)
        if not train(run, folder, data):
            return True  # a signal ended it; what was done is saved
        if not _evaluated(folder):
            good &= evaluate(run, folder, data)
        if not (folder / "evaluation.json").exists():
            return False  # no scan could be scored; each has been named
        cases[mode] = report.read_cases(folder / "evaluation.json")
    levels, organs = len(config.levels.factors), data.dataset.labels[1:]
    shared = set.intersection(*(set(scored) for scored in cases.values()))
    cases_are = held_out_are(config, data, len(shared))
    result = side_by_side(cases, levels, organs, cases_are=cases_are, tolerance=config.evaluate.tolerance)
    if processes.is_first():
        report.write(result, workdir)
        print(report.table(result))
    return good


def side_by_side(
    cases: dict[str, dict[str, Any]], levels: int, organs: Sequence[str], *, cases_are: str, tolerance: float
) -> dict[str, Any]:
    """The blocks of Table 1, each compared with every other, over the cases that all modes scored.

    Args:
      cases: of each mode, as `report.evaluation` takes them.
      levels: S.
      organs: in the order of the labels.
      cases_are: see `report.evaluation`.
      tolerance: of the surface Dice, mm.

    Returns:
      `report.evaluation` of them.
    """
    finest = f"level_{levels}"
    blocks = {
        "separate": {"level_1": "Level 1"}
        | {f"level_{level}": f"Level {level} auto-context" for level in range(2, levels + 1)},
        "first_level": {} if "separate" in cases else {"level_1": "Level 1"},
        "end_to_end": {finest: "End-to-end"},
        "no_context": {finest: "No auto-context"},
    }
    shared = set.intersection(*(set(scored) for scored in cases.values()))
    merged = {
        case: {
            name: cases[mode][case][level]
            for mode, named in blocks.items()
            if mode in cases
            for level, name in named.items()
        }
        for case in sorted(shared)
    }
    names = list(next(iter(merged.values())))
    pairs = [(b, a) for a, b in itertools.combinations(names, 2)]
    return report.evaluation(merged, organs, cases_are=cases_are, tolerance=tolerance, pairs=pairs)


def _run(config: ConfigDict, mode: str, root: str, store: str) -> ConfigDict:
    """The configuration of one mode's run, over the data of all."""
    run = config.copy_and_resolve_references()
    run.experiment = ()
    run.train.mode = mode
    run.data.root, run.data.prepared = root, store
    return run


def _evaluated(folder: Path) -> bool:
    """Whether an evaluation stands there that is newer than the newest checkpoint; delete it to have it made anew."""
    evaluation = folder / "evaluation.json"
    newest = max(path.stat().st_mtime for path in (folder / "checkpoints").iterdir())
    return evaluation.exists() and evaluation.stat().st_mtime > newest
