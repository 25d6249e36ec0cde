"""The results of an evaluation: `evaluation.json` and a table in the layout of the paper's Table 1."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autocontext_jax.evaluation.statistics import STATISTICS, summarise


def evaluation(cases: Mapping[str, Mapping[str, Any]], organs: Sequence[str]) -> dict[str, Any]:
    """Everything known of a set of scored cases.

    Args:
      cases: {case: {"level_1": {organ: {metric: value}}, ...}}.
      organs: in the order of the labels.

    Returns:
      {"labels": organs, "cases": cases, "summary": {"level_1": `statistics.summarise` of it, ...}}.
    """
    levels = list(next(iter(cases.values())))
    summary = {level: summarise({case: scores[level] for case, scores in cases.items()}, organs) for level in levels}
    return {"labels": list(organs), "cases": cases, "summary": summary}


def table(result: Mapping[str, Any], *, metric: str = "dice") -> str:
    """Markdown in the layout of Table 1: levels as blocks, organs as columns, in percent."""
    columns = [*result["labels"], "mean"]
    lines = []
    for level, summary in result["summary"].items():
        name = level.replace("_", " ").capitalize()
        lines += [
            f"| {name}: {metric.capitalize()} (%) | {' | '.join(columns)} |",
            f"| --- |{' ---: |' * len(columns)}",
        ]
        for statistic in STATISTICS:
            values = [summary[column][metric][statistic] for column in columns]
            lines.append(f"| {statistic} | {' | '.join(_percent(value) for value in values)} |")
        lines.append("")
    lines.append(f"{len(result['cases'])} scans, scored on their own grids.")
    return "\n".join(lines) + "\n"


def write(result: Mapping[str, Any], workdir: Path) -> None:
    """Writes `evaluation.json` (NaN as null) and `table.md`, each whole or not at all."""
    for name, text in (
        ("evaluation.json", json.dumps(_without_nan(result), indent=1) + "\n"),
        ("table.md", table(result)),
    ):
        partial = workdir / f"{name}.partial"
        partial.write_text(text)
        os.replace(partial, workdir / name)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for a score that does not exist."""
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
