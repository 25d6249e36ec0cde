"""The results of an evaluation as JSON, CSV and a Markdown table in the layout of the paper's Table 1."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autocontext_jax.evaluation.published import ORGANS as PUBLISHED
from autocontext_jax.evaluation.published import TABLE_2
from autocontext_jax.evaluation.statistics import STATISTICS, compare, summarise
from autocontext_jax.files import write_whole

# Beside the Dice, as `metrics.scores` defines them and `statistics.summarise` averages them.
OTHER_METRICS = {
    "jaccard": "Jaccard (%)",
    "absolute_volume_difference": "absolute volume difference (mL)",
    "hausdorff_95": "95 % Hausdorff (mm)",
    "surface_distance": "surface distance (mm)",
    "surface_dice": "surface Dice at {tolerance:g} mm (%)",
}
DISTANCES = ("hausdorff_95", "surface_distance")

MISSED = (
    '"m of n missed": in m of n scans at least one organ is in the truth or in the prediction but not in both. Such an '
    "organ has no distance. The average leaves these m scans out; do not compare it with an average over other scans. "
    "Dice, Jaccard and surface Dice count a missed organ as 0."
)


def evaluation(
    cases: Mapping[str, Mapping[str, Any]],
    organs: Sequence[str],
    *,
    tolerance: float,
    pairs: Iterable[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Everything known of a set of scored cases.

    Args:
      cases: {case: {block: {organ: {metric: value}}, ...}}; a block is a level ("level_1") or a method.
      organs: in the order of the labels.
      tolerance: of the surface Dice, mm.
      pairs: blocks to compare.

    Returns:
      {"labels": organs, "tolerance": mm, "cases": cases, "summary": {block: `statistics.summarise` of it, ...},
      "comparisons": `statistics.compare` of the pairs}.
    """
    blocks = {block: {case: scores[block] for case, scores in cases.items()} for block in next(iter(cases.values()))}
    return {
        "labels": list(organs),
        "tolerance": tolerance,
        "cases": cases,
        "summary": {block: summarise(scores, organs) for block, scores in blocks.items()},
        "comparisons": compare(blocks, pairs, organs),
    }


def table(result: Mapping[str, Any]) -> str:
    """Markdown in the layout of Table 1: blocks of Dice in percent with a column an organ; tests; other metrics."""
    columns = [*result["labels"], "mean"]
    rule = f"| --- |{' ---: |' * len(columns)}"
    lines = []
    for block, summary in result["summary"].items():
        lines += [f"| {_name(block)}: Dice (%) | {' | '.join(columns)} |", rule]
        for statistic in STATISTICS:
            values = [summary[column]["dice"][statistic] for column in columns]
            lines.append(f"| {statistic} | {' | '.join(_percent(value) for value in values)} |")
        lines.append("")
    if result["comparisons"]:
        lines += [f"| Difference in Dice (%), p (Wilcoxon, Holm) | {' | '.join(columns)} |", rule]
        for pair, comparison in result["comparisons"].items():
            cells = [_difference(comparison[column]) for column in columns]
            lines.append(f"| {' − '.join(map(_name, pair.split(' - ')))} | {' | '.join(cells)} |")
        lines.append("")
    names = [name.format(tolerance=result["tolerance"]) for name in OTHER_METRICS.values()]
    lines += [f"| Mean over organs, avg ± std | {' | '.join(names)} |"]
    lines += [f"| --- |{' ---: |' * len(OTHER_METRICS)}"]
    for block, summary in result["summary"].items():
        cells = [_cell(metric, summary["mean"][metric]) for metric in OTHER_METRICS]
        lines.append(f"| {_name(block)} | {' | '.join(cells)} |")
    if missed := _missed_by_block(result):
        lines += ["", " ".join([MISSED, *missed])]
    lines += ["", f"{len(result['cases'])} scans, scored on their own grids."]
    return "\n".join(lines) + "\n"


def beside_published(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """Markdown in the layout of the paper's Table 2: mean Dice in percent, then its rows where they know these organs.

    Args:
      rows: {run, level or data set: {organ: mean Dice or None}}.
    """
    organs = list(dict.fromkeys(organ for row in rows.values() for organ in row))
    lines = [f"| Dice (%) | {' | '.join(organs)} | average |", f"| --- |{' ---: |' * (len(organs) + 1)}"]
    percent = {
        _name(name): {organ: 100 * dice for organ, dice in row.items() if dice is not None and not math.isnan(dice)}
        for name, row in rows.items()
    }
    for name, scans, dice in TABLE_2:
        known = {organ: value for organ, value in zip(PUBLISHED, dice, strict=True) if value is not None}
        if known.keys() & set(organs):
            percent[f"{name}, {scans}"] = known
    for name, row in percent.items():
        cells = [f"{row[organ]:.1f}" if organ in row else "–" for organ in organs]
        shown = [row[organ] for organ in organs if organ in row]
        average = f"{sum(shown) / len(shown):.1f}" if shown else "–"
        lines.append(f"| {name} | {' | '.join(cells)} | {average} |")
    return "\n".join(lines) + "\n"


def rows(result: Mapping[str, Any]) -> str:
    """CSV with a row for each block (or pair of blocks), organ (or "mean") and metric.

    Columns that a row does not have, and values that are NaN, are empty. In the row of a pair, "cases" counts the cases
    that both have.
    """
    written = io.StringIO()
    columns = ["block", "organ", "metric", "cases", "missed", *STATISTICS, "difference", "p", "p_holm"]
    writer = csv.DictWriter(written, columns, restval="", lineterminator="\n")
    writer.writeheader()
    summaries = [
        {"block": block, "organ": organ, "metric": metric, **statistics}
        for block, summary in result["summary"].items()
        for organ, metrics in summary.items()
        for metric, statistics in metrics.items()
    ]
    tests = [
        {"block": pair, "organ": organ, "metric": "dice", **test}
        for pair, comparison in result["comparisons"].items()
        for organ, test in comparison.items()
    ]
    for row in summaries + tests:
        writer.writerow({key: "" if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()})
    return written.getvalue()


def write(result: Mapping[str, Any], workdir: Path) -> None:
    """Writes `evaluation.json` (NaN as null, infinity as "inf"), `table.md`, `table.csv`; each whole or not at all."""
    for name, text in (
        ("evaluation.json", json.dumps(_as_json(result), indent=1) + "\n"),
        ("table.md", table(result)),
        ("table.csv", rows(result)),
    ):
        write_whole(workdir / name, text)


def read_cases(path: Path) -> dict[str, dict[str, Any]]:
    """The scored cases of an `evaluation.json`, as `evaluation` takes them."""
    return _from_json(json.loads(path.read_bytes())["cases"])


def _name(level: str) -> str:
    return level.replace("_", " ").capitalize()


def _cell(metric: str, statistics: Mapping[str, float]) -> str:
    """Average ± std; for a distance also the number of scans that it leaves out."""
    number = _percent if "(%)" in OTHER_METRICS[metric] else "{:.2f}".format
    text = f"{number(statistics['avg'])} ± {number(statistics['std'])}" if math.isfinite(statistics["avg"]) else "–"
    if metric in DISTANCES and statistics["missed"]:
        text += f" ({statistics['missed']} of {statistics['cases']} missed)"
    return text


def _missed_by_block(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each block that misses an organ, with the organs and the numbers of scans."""
    sentences = []
    for block, summary in result["summary"].items():
        counts = {organ: summary[organ]["dice"] for organ in result["labels"]}
        named = [f"{organ} in {n['missed']} of {n['cases']}" for organ, n in counts.items() if n["missed"]]
        if named:
            sentences.append(f"Missed by {_name(block)}: {', '.join(named)}.")
    return sentences


def _difference(test: Mapping[str, float]) -> str:
    if not test["cases"]:
        return "–"
    p = "< 0.0001" if test["p_holm"] < 1e-4 else f"{test['p_holm']:.2g}"
    return f"{_percent(test['difference'], sign='+')} ({p})"


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


def _from_json(value: Any) -> Any:
    """What `_as_json` was given."""
    if isinstance(value, Mapping):
        return {key: _from_json(inner) for key, inner in value.items()}
    return math.nan if value is None else float(value)
