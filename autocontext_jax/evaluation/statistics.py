"""Scores of many cases in few numbers, as in the paper's Table 1, and whether two methods' scores differ."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

# {organ: {metric: value}}, and the same with a case's level before it.
OrganScores = Mapping[str, Mapping[str, float]]
STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "avg": np.mean,
    "std": np.std,
    "min": np.min,
    "max": np.max,
}


def summarise(cases: Mapping[str, OrganScores], organs: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """avg, std, min and max of every metric over cases, per organ and for the cases' means over organs.

    Args:
      cases: {case: {organ: {metric: value}}}; NaN where an organ is in neither mask: that case is left out there.
      organs: in the order wanted.

    Returns:
      {organ or "mean": {metric: {"avg": , "std": , "min": , "max": , "infinite": }}} over the finite scores, and how
      many were infinite (distances to an organ that was missed); NaN where no score is finite. The standard deviation
      is the population's.
    """
    metrics = list(next(iter(next(iter(cases.values())).values())))
    summary = {}
    for organ in [*organs, "mean"]:
        summary[organ] = {
            metric: _describe([_value(scores, organ, metric) for scores in cases.values()]) for metric in metrics
        }
    return summary


def _value(scores: OrganScores, organ: str, metric: str) -> float:
    if organ != "mean":
        return scores[organ][metric]
    values = [score[metric] for score in scores.values() if not math.isnan(score[metric])]
    return float(np.mean(values)) if values else math.nan


def _describe(values: Sequence[float]) -> dict[str, float]:
    finite = [value for value in values if math.isfinite(value)]
    described = {name: float(function(finite)) if finite else math.nan for name, function in STATISTICS.items()}
    return {**described, "infinite": sum(map(math.isinf, values))}


def compare(
    blocks: Mapping[str, Mapping[str, OrganScores]],
    pairs: Iterable[tuple[str, str]],
    organs: Sequence[str],
    metric: str = "dice",
) -> dict[str, dict[str, dict[str, float]]]:
    """Paired two-sided Wilcoxon signed-rank tests between methods scored on the same cases.

    Args:
      blocks: each method's cases, as `summarise` takes them.
      pairs: which to compare, (a, b).
      organs: in the order wanted.
      metric: what is compared.

    Returns:
      {"a - b": {organ or "mean": {"difference": mean of a - b, "p": , "p_holm": , "cases": pairs that count}}}; a case
      counts where both scores are finite. p is 1 where all differences are 0 and NaN where no case counts; p_holm is
      corrected for the number of all tests here (Holm, 1979).

    Raises:
      ValueError: the cases are not the same.
    """
    result = {}
    for a, b in pairs:
        if blocks[a].keys() != blocks[b].keys():
            raise ValueError(f"cases of {a} and {b} differ: {sorted(blocks[a].keys() ^ blocks[b].keys())}")
        result[f"{a} - {b}"] = {organ: _test(blocks[a], blocks[b], organ, metric) for organ in [*organs, "mean"]}
    columns = [column for comparison in result.values() for column in comparison.values()]
    for column, p in zip(columns, holm([column["p"] for column in columns]), strict=True):
        column["p_holm"] = p
    return result


def _test(a: Mapping[str, OrganScores], b: Mapping[str, OrganScores], organ: str, metric: str) -> dict[str, float]:
    pairs = [(_value(a[case], organ, metric), _value(b[case], organ, metric)) for case in a]
    differences = np.array([x - y for x, y in pairs if math.isfinite(x) and math.isfinite(y)])
    if not len(differences):
        return {"difference": math.nan, "p": math.nan, "cases": 0}
    p = float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0
    return {"difference": float(differences.mean()), "p": p, "cases": len(differences)}


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests corrected for their number (Holm, 1979); NaN stays and does not count."""
    numbers = [number for number, p in enumerate(p_values) if not math.isnan(p)]
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, number in enumerate(sorted(numbers, key=lambda number: p_values[number])):
        largest = max(largest, min(1.0, (len(numbers) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected
