"""The results of an evaluation as JSON, as CSV and as Markdown tables in the layout of the paper's Table 1."""

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

# Columns of the last table: metrics of `statistics.summarise` and their captions.
OTHER_METRICS = {
    "jaccard": "Jaccard (%)",
    "absolute_volume_difference": "absolute volume difference (mL)",
    "hausdorff_95": "95 % Hausdorff (mm)",
    "surface_distance": "surface distance (mm)",
    "surface_dice": "surface Dice at {tolerance:g} mm (%)",
}
DISTANCES = ("hausdorff_95", "surface_distance")

MISSED = (
    '"m of n missed": in m of n scans at least one class is in the truth or in the prediction but not in both. Such a '
    "class has no distance. The average leaves these m scans out; do not compare it with an average over other scans. "
    "Dice, Jaccard and surface Dice count a missed class as 0."
)


def evaluation(
    cases: Mapping[str, Mapping[str, Any]],
    classes: Sequence[str],
    *,
    cases_are: str,
    tolerance: float,
    pairs: Iterable[tuple[str, str]] = (),
    extra_metrics: Sequence[str] = (),
) -> dict[str, Any]:
    """The result of an evaluation, as `write` stores it.

    Args:
      cases: {case: {block: {class: {metric: value}}}}, scores of `metrics.scores`. A block is a level ("level_1") or a
        method; every case has the same blocks.
      classes: names without the background, in the order of the tables.
      cases_are: which cases these are and how they were chosen, a sentence without a full stop, for example
        "6 test cases" or "5 validation cases, which also chose the checkpoint: scores are optimistic".
      tolerance: mm, of the surface Dice.
      pairs: the blocks to compare, (a, b).
      extra_metrics: names of metrics from outside the package, which the last table shows too.

    Returns:
      A dictionary with
        classes, cases_are, tolerance, cases, extra_metrics: as given;
        summary: {block: `statistics.summarise` of its cases};
        comparisons: `statistics.compare` of the pairs.
    """
    blocks = {block: {case: scores[block] for case, scores in cases.items()} for block in next(iter(cases.values()))}
    return {
        "classes": list(classes),
        "cases_are": cases_are,
        "tolerance": tolerance,
        "extra_metrics": list(extra_metrics),
        "cases": cases,
        "summary": {block: summarise(scores, classes) for block, scores in blocks.items()},
        "comparisons": compare(blocks, pairs, classes),
    }


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a table of Dice in percent for each block as in the paper's Table 1, tests, and the other metrics.

    Args:
      result: of `evaluation`.
    """
    columns = [*result["classes"], "mean"]
    rule = f"| --- |{' ---: |' * len(columns)}"
    lines = []
    for block, summary in result["summary"].items():
        lines += [f"| {_title(block)}: Dice (%) | {' | '.join(columns)} |", rule]
        for statistic in STATISTICS:
            values = [summary[column]["dice"][statistic] for column in columns]
            lines.append(f"| {statistic} | {' | '.join(_percent(value) for value in values)} |")
        lines.append("")
    if result["comparisons"]:
        lines += [f"| Difference in Dice (%), p (Wilcoxon, Holm) | {' | '.join(columns)} |", rule]
        for pair, comparison in result["comparisons"].items():
            cells = [_difference(comparison[column]) for column in columns]
            lines.append(f"| {' − '.join(map(_title, pair.split(' - ')))} | {' | '.join(cells)} |")
        lines.append("")
    captions = OTHER_METRICS | {name: name for name in result["extra_metrics"]}
    names = [name.format(tolerance=result["tolerance"]) for name in captions.values()]
    lines += [f"| Mean over classes, avg ± std | {' | '.join(names)} |"]
    lines += [f"| --- |{' ---: |' * len(captions)}"]
    for block, summary in result["summary"].items():
        cells = [_cell(metric, summary["mean"][metric]) for metric in captions]
        lines.append(f"| {_title(block)} | {' | '.join(cells)} |")
    if missed := _missed_by_block(result):
        lines += ["", " ".join([MISSED, *missed])]
    lines += ["", f"{result['cases_are']}. Each scan was scored on its own grid."]
    return "\n".join(lines) + "\n"


def beside_published(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """Markdown in the layout of the paper's Table 2: mean Dice in percent, own rows first, then published rows.

    A published row is shown if it has at least one of the classes.

    Args:
      rows: {name of a run, level or data set: {class: mean Dice, or None}}.
    """
    classes = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"| Dice (%) | {' | '.join(classes)} | average |", f"| --- |{' ---: |' * (len(classes) + 1)}"]
    percent = {
        _title(title): {name: 100 * dice for name, dice in row.items() if dice is not None and not math.isnan(dice)}
        for title, row in rows.items()
    }
    for title, scans, dice in TABLE_2:
        known = {name: value for name, value in zip(PUBLISHED, dice, strict=True) if value is not None}
        if known.keys() & set(classes):
            percent[f"{title}, {scans}"] = known
    for title, row in percent.items():
        cells = [f"{row[name]:.1f}" if name in row else "–" for name in classes]
        shown = [row[name] for name in classes if name in row]
        average = f"{sum(shown) / len(shown):.1f}" if shown else "–"
        lines.append(f"| {title} | {' | '.join(cells)} | {average} |")
    return "\n".join(lines) + "\n"


def rows(result: Mapping[str, Any]) -> str:
    """CSV with a row for each block, class (or "mean") and metric, and for each comparison of two blocks.

    NaN is an empty field. So are the columns that a row has no value for.

    Args:
      result: of `evaluation`.
    """
    written = io.StringIO()
    columns = ["block", "class", "metric", "cases", "missed", *STATISTICS, "difference", "p", "p_holm"]
    writer = csv.DictWriter(written, columns, restval="", lineterminator="\n")
    writer.writeheader()
    summaries = [
        {"block": block, "class": name, "metric": metric, **statistics}
        for block, summary in result["summary"].items()
        for name, metrics in summary.items()
        for metric, statistics in metrics.items()
    ]
    tests = [
        {"block": pair, "class": name, "metric": "dice", **test}
        for pair, comparison in result["comparisons"].items()
        for name, test in comparison.items()
    ]
    for row in summaries + tests:
        writer.writerow({key: "" if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()})
    return written.getvalue()


def write(result: Mapping[str, Any], workdir: Path) -> None:
    """Writes `evaluation.json`, `table.md` and `table.csv`, each whole or not at all.

    JSON has neither NaN nor infinity: null stands for NaN (no score exists), "inf" for an infinite distance.

    Args:
      result: of `evaluation`.
      workdir: the folder to write to.
    """
    for name, text in (
        ("evaluation.json", json.dumps(_as_json(result), indent=1) + "\n"),
        ("table.md", table(result)),
        ("table.csv", rows(result)),
    ):
        write_whole(workdir / name, text)


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The content of a folder's `evaluation.json`: None in the place of NaN, "inf" of an infinite distance."""
    return json.loads((folder / "evaluation.json").read_bytes())


def read_cases(path: Path) -> dict[str, dict[str, Any]]:
    """The scored cases of an `evaluation.json`, in the form that `evaluation` takes."""
    return _from_json(json.loads(path.read_bytes())["cases"])


def _title(block: str) -> str:
    """For example "Level 1" for "level_1"."""
    return block.replace("_", " ").capitalize()


def _cell(metric: str, statistics: Mapping[str, float]) -> str:
    """Average ± std, and for a distance the number of scans that the average leaves out."""
    number = _percent if "(%)" in OTHER_METRICS.get(metric, "") else "{:.2f}".format
    text = f"{number(statistics['avg'])} ± {number(statistics['std'])}" if math.isfinite(statistics["avg"]) else "–"
    if metric in DISTANCES and statistics["missed"]:
        text += f" ({statistics['missed']} of {statistics['cases']} missed)"
    return text


def _missed_by_block(result: Mapping[str, Any]) -> list[str]:
    """For each block that misses classes, a sentence with their names and numbers of scans."""
    sentences = []
    for block, summary in result["summary"].items():
        counts = {name: summary[name]["dice"] for name in result["classes"]}
        named = [f"{name} in {n['missed']} of {n['cases']}" for name, n in counts.items() if n["missed"]]
        if named:
            sentences.append(f"Missed by {_title(block)}: {', '.join(named)}.")
    return sentences


def _difference(test: Mapping[str, float]) -> str:
    if not test["cases"]:
        return "–"
    p = "< 0.0001" if test["p_holm"] < 1e-4 else f"{test['p_holm']:.2g}"
    return f"{_percent(test['difference'], sign='+')} ({p})"


def _percent(value: float, sign: str = "") -> str:
    return "–" if math.isnan(value) else f"{100 * value:{sign}.1f}"


def _as_json(value: Any) -> Any:
    """Replaces NaN by None and infinity by "inf" in nested dictionaries and lists."""
    if isinstance(value, Mapping):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _from_json(value: Any) -> Any:
    """The inverse of `_as_json` for nested dictionaries of numbers."""
    if isinstance(value, Mapping):
        return {key: _from_json(inner) for key, inner in value.items()}
    return math.nan if value is None else float(value)
