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
    """Statistics over cases of every metric, for each organ and for the mean over organs.

    An organ is missed in a case if it is in the truth or in the prediction but not in both: its distances are infinite.
    Distances are averaged over the other cases alone, which favours a method that misses the difficult ones. Hence
    every average comes with the number of missed cases. No large distance is put in their place: any choice, such as
    the scan's diagonal, would decide the average, and the overlap metrics count a missed organ as 0 already.

    Args:
      cases: {case: {organ: {metric: value}}}; NaN where the organ is in neither mask: such a case does not count.
      organs: names, in the order of the result.

    Returns:
      {organ or "mean": {metric: {"avg", "std", "min", "max", "cases", "missed"}}}. "mean" describes the cases' means
      over their organs. avg, std (of the population), min and max are over the finite values, NaN if there are none.
      "cases" is the number of cases that hold the organ (for "mean": any organ), "missed" the number of them in which
      the organ (for "mean": at least one organ) is missed; both are the same for every metric. The signed
      "volume_difference" is summarised as "absolute_volume_difference", since surplus and deficit would cancel.
    """
    averaged = {
        case: {organ: _absolute_volumes(score) for organ, score in scores.items()} for case, scores in cases.items()
    }
    metrics = list(next(iter(next(iter(averaged.values())).values())))
    summary = {}
    for organ in [*organs, "mean"]:
        missed = sum(_missed(scores, organ) for scores in averaged.values())
        summary[organ] = {
            metric: {**_describe([_value(scores, organ, metric) for scores in averaged.values()]), "missed": missed}
            for metric in metrics
        }
    return summary


def _absolute_volumes(score: Mapping[str, float]) -> dict[str, float]:
    """The same metrics in the same order, the absolute volume difference in place of the signed one."""
    absolute = {}
    for metric, value in score.items():
        if metric == "volume_difference":
            metric, value = "absolute_volume_difference", abs(value)
        absolute[metric] = value
    return absolute


def _missed(scores: OrganScores, organ: str) -> bool:
    considered = scores.values() if organ == "mean" else [scores[organ]]
    return any(math.isinf(value) for score in considered for value in score.values())


def _value(scores: OrganScores, organ: str, metric: str) -> float:
    if organ != "mean":
        return scores[organ][metric]
    values = [score[metric] for score in scores.values() if not math.isnan(score[metric])]
    return float(np.mean(values)) if values else math.nan


def _describe(values: Sequence[float]) -> dict[str, float]:
    finite = [value for value in values if math.isfinite(value)]
    described = {name: float(function(finite)) if finite else math.nan for name, function in STATISTICS.items()}
    return {**described, "cases": sum(not math.isnan(value) for value in values)}


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
