"""The results of an evaluation: `evaluation.json` and a table in the layout of the paper's Table 1."""

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autocontext_jax.evaluation.statistics import STATISTICS, compare, summarise

# Beside the Dice, as `metrics.scores` defines them.
OTHER_METRICS = {
    "jaccard": "Jaccard (%)",
    "volume_difference": "volume difference (mL)",
    "hausdorff_95": "95 % Hausdorff (mm)",
    "surface_distance": "surface distance (mm)",
    "surface_dice": "surface Dice at {tolerance:g} mm (%)",
}


def evaluation(cases: Mapping[str, Mapping[str, Any]], organs: Sequence[str], *, tolerance: float) -> dict[str, Any]:
    """Everything known of a set of scored cases.

    Args:
      cases: {case: {"level_1": {organ: {metric: value}}, ...}}.
      organs: in the order of the labels.
      tolerance: of the surface Dice, mm.

    Returns:
      {"labels": organs, "tolerance": mm, "cases": cases, "summary": {"level_1": `statistics.summarise` of it, ...},
      "comparisons": {"level_2 - level_1": `statistics.compare` of each level with the one before, ...}}.
    """
    levels = {level: {case: scores[level] for case, scores in cases.items()} for level in next(iter(cases.values()))}
    return {
        "labels": list(organs),
        "tolerance": tolerance,
        "cases": cases,
        "summary": {level: summarise(scores, organs) for level, scores in levels.items()},
        "comparisons": {
            f"{finer} - {coarser}": compare(levels[finer], levels[coarser], organs)
            for coarser, finer in itertools.pairwise(levels)
        },
    }


def table(result: Mapping[str, Any]) -> str:
    """Markdown in the layout of Table 1: levels as blocks, organs as columns, Dice in percent; then other metrics."""
    columns = [*result["labels"], "mean"]
    lines = []
    for level, summary in result["summary"].items():
        lines += [f"| {_name(level)}: Dice (%) | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
        for statistic in STATISTICS:
            values = [summary[column]["dice"][statistic] for column in columns]
            lines.append(f"| {statistic} | {' | '.join(_percent(value) for value in values)} |")
        lines.append("")
    for pair, comparison in result["comparisons"].items():
        finer, coarser = map(_name, pair.split(" - "))
        lines += [f"| {finer} − {coarser}: Dice (%) | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
        differences = [_percent(comparison[column]["difference"], sign="+") for column in columns]
        lines.append(f"| mean | {' | '.join(differences)} |")
        p_values = [comparison[column]["p_holm"] for column in columns]
        lines.append(f"| p (Wilcoxon, Holm) | {' | '.join('–' if math.isnan(p) else f'{p:.2g}' for p in p_values)} |")
        lines.append("")
    names = [name.format(tolerance=result["tolerance"]) for name in OTHER_METRICS.values()]
    lines += [f"| Mean over organs, avg ± std | {' | '.join(names)} |"]
    lines += [f"| --- |{' ---: |' * len(OTHER_METRICS)}"]
    for level, summary in result["summary"].items():
        cells = [_cell(metric, summary["mean"][metric]) for metric in OTHER_METRICS]
        lines.append(f"| {_name(level)} | {' | '.join(cells)} |")
    lines += ["", f"{len(result['cases'])} scans, scored on their own grids."]
    return "\n".join(lines) + "\n"


def write(result: Mapping[str, Any], workdir: Path) -> None:
    """Writes `evaluation.json` (NaN as null, infinity as "inf") and `table.md`, each whole or not at all."""
    for name, text in (
        ("evaluation.json", json.dumps(_as_json(result), indent=1) + "\n"),
        ("table.md", table(result)),
    ):
        partial = workdir / f"{name}.partial"
        partial.write_text(text)
        os.replace(partial, workdir / name)


def _name(level: str) -> str:
    return level.replace("_", " ").capitalize()


def _cell(metric: str, statistics: Mapping[str, float]) -> str:
    """Average ± std, and how many scans have no finite value."""
    number = _percent if "(%)" in OTHER_METRICS[metric] else "{:.2f}".format
    text = f"{number(statistics['avg'])} ± {number(statistics['std'])}" if math.isfinite(statistics["avg"]) else "–"
    return text + (f" ({statistics['infinite']} infinite)" if statistics["infinite"] else "")


def _percent(value: float, sign: str = "") -> str:
    return "–" if math.isnan(value) else f"{100 * value:{sign}.1f}"


def _as_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for a score that does not exist, "inf" for an infinite one."""
    if isinstance(value, Mapping):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
