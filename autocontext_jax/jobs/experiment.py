"""--mode all with the key `experiment`: several training modes on the same data, side by side as in Table 1."""

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autocontext_jax import processes
from autocontext_jax.errors import UserError
from autocontext_jax.evaluation import report
from autocontext_jax.files import write_json, writing
from autocontext_jax.jobs.config_files import write_config
from autocontext_jax.jobs.evaluate import evaluate_run
from autocontext_jax.jobs.evaluations import is_evaluated
from autocontext_jax.jobs.extensions import Extensions
from autocontext_jax.jobs.prepare import prepare
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.train import train
from autocontext_jax.training.phases import MODES

log = logging.getLogger(__name__)


def experiment(config: RunConfig, workdir: Path, extensions: Extensions) -> bool:
    """Trains and evaluates every mode of `config.experiment` in a folder of its own, then writes the table of all.

    Each folder is a whole run, as `train.mode` alone would make it, and goes on where it stopped. All have the same
    cases and take `train.steps` steps to train a level: `separate` takes them once for each level.

    Returns:
      False if scans or labels could not be read.

    Raises:
      UserError: see `prepare`, `train` and `evaluate`.
    """
    data = prepare(config, workdir)
    processes.first_does(lambda: write_config(config, workdir))
    scored, cases_are = data.scored(best=config.predict.checkpoint == "best")
    if not scored:
        raise UserError(
            f"data set {data.dataset.place} has no scan that was not trained on; expected some to compare on"
        )
    good, cases = True, {}
    for mode in config.experiment:
        log.info("mode %s", mode)
        run, folder = (
            _run(config, mode, ",".join(str(folder.resolve()) for folder in data.dataset.sources), data.store),
            workdir / mode,
        )

        def begin(folder: Path = folder) -> None:
            with writing(folder):
                folder.mkdir(exist_ok=True)
            write_json(folder / "split.json", data.split.to_json())
            write_json(folder / "fingerprint.json", data.fingerprint.to_json())

        processes.first_does(begin)
        if not train(run, folder, data, extensions):
            return True  # a signal ended it; what was done is saved
        result = folder / "evaluation.json"
        if not is_evaluated(run, folder, data):
            good &= evaluate_run(run, folder, data, extensions)
        if not result.exists():
            return False  # no scan could be scored; each has been named
        cases[mode] = report.read_cases(result)
    shared = set.intersection(*(set(found) for found in cases.values()))
    compared = side_by_side(
        cases,
        len(config.levels.factors),
        data.classes[1:],
        cases_are=cases_are(len(shared)),
        tolerance=config.evaluate.tolerance,
        extra_metrics=list(extensions.extra_metrics(config)),
    )

    def write() -> None:
        report.write(compared, workdir)
        print(report.table(compared))

    processes.first_does(write)
    return good


def side_by_side(
    cases: dict[str, dict[str, Any]],
    levels: int,
    classes: Sequence[str],
    *,
    cases_are: str,
    tolerance: float,
    extra_metrics: Sequence[str] = (),
) -> dict[str, Any]:
    """The blocks of Table 1, each compared with every other, over the cases that all modes scored.

    Args:
      cases: of each mode, as `report.evaluation` takes them.
      levels: S.
      classes: in the order of the labels.
      cases_are: see `report.evaluation`.
      tolerance: of the surface Dice, mm.
      extra_metrics: see `report.evaluation`.

    Returns:
      `report.evaluation` of them.
    """
    # Of two modes that train the same block, such as level 1 alone, the first one shows it.
    blocks: dict[str, tuple[str, str]] = {}
    for mode in sorted(cases, key=["separate", *MODES].index):
        for level, title in MODES[mode].blocks(levels).items():
            blocks.setdefault(title, (mode, f"level_{level}"))
    shared = set.intersection(*(set(scored) for scored in cases.values()))
    merged = {
        case: {title: cases[mode][case][level] for title, (mode, level) in blocks.items()} for case in sorted(shared)
    }
    pairs = [(b, a) for a, b in itertools.combinations(blocks, 2)]
    return report.evaluation(
        merged, classes, cases_are=cases_are, tolerance=tolerance, pairs=pairs, extra_metrics=extra_metrics
    )


def _run(config: RunConfig, mode: str, root: str, store: str) -> RunConfig:
    """The configuration of one mode's run, over the data of all."""
    return dataclasses.replace(
        config,
        experiment=(),
        train=dataclasses.replace(config.train, mode=mode),
        data=dataclasses.replace(config.data, root=root, prepared=store),
        phantom=dataclasses.replace(config.phantom, training=0),
    )
