"""Statistics of the scores of many cases, as in the paper's Table 1, and tests of whether two methods differ."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

ClassScores = Mapping[str, Mapping[str, float]]  # {class: {metric: value}} of one case and one method
STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "avg": np.mean,
    "std": np.std,
    "min": np.min,
    "max": np.max,
}


def summarise(cases: Mapping[str, ClassScores], classes: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Statistics over cases of every metric, for each class and for the mean over classes.

    A class is missed in a case if it is in the truth or in the prediction but not in both. Its distances are then
    infinite, and averages of distances leave the case out. This favours a method that misses the difficult cases, so
    the number of missed cases is reported with every average. Missed cases are not given a large distance instead, such
    as the scan's diagonal: the arbitrary choice would dominate the average. The overlap metrics count them as 0.

    Args:
      cases: {case: {class: {metric: value}}}; NaN if the class is in neither mask: the case does not count for it.
      classes: names, in the order of the result.

    Returns:
      {class or "mean": {metric: statistics}}. For "mean" the value of a case is the mean over its classes. Statistics:
        avg, std, min, max: over the finite values, NaN if there are none; std is that of the population;
        cases: number of cases that count;
        missed: how many of them miss the class, or for "mean" at least one class; the same for every metric.
      The mean of signed volume differences would hide errors that cancel. Therefore "volume_difference" is summarised
      by its absolute value, as "absolute_volume_difference".
    """
    averaged = {
        case: {name: _absolute_volumes(score) for name, score in scores.items()} for case, scores in cases.items()
    }
    metrics = list(next(iter(next(iter(averaged.values())).values())))
    summary = {}
    for name in [*classes, "mean"]:
        missed = sum(_missed(scores, name) for scores in averaged.values())
        summary[name] = {
            metric: {**_describe([_value(scores, name, metric) for scores in averaged.values()]), "missed": missed}
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


def _missed(scores: ClassScores, name: str) -> bool:
    """Whether a class, or for "mean" any class, is missed in a case."""
    considered = scores.values() if name == "mean" else [scores[name]]
    return any(math.isinf(value) for score in considered for value in score.values())


def _value(scores: ClassScores, name: str, metric: str) -> float:
    """A metric of a class, or for "mean" its mean over the classes that the case contains."""
    if name != "mean":
        return scores[name][metric]
    values = [score[metric] for score in scores.values() if not math.isnan(score[metric])]
    return float(np.mean(values)) if values else math.nan


def _describe(values: Sequence[float]) -> dict[str, float]:
    finite = [value for value in values if math.isfinite(value)]
    described = {name: float(function(finite)) if finite else math.nan for name, function in STATISTICS.items()}
    return {**described, "cases": sum(not math.isnan(value) for value in values)}


def compare(
    blocks: Mapping[str, Mapping[str, ClassScores]],
    pairs: Iterable[tuple[str, str]],
    classes: Sequence[str],
    metric: str = "dice",
) -> dict[str, dict[str, dict[str, float]]]:
    """Paired two-sided Wilcoxon signed-rank tests between methods that were scored on the same cases.

    Args:
      blocks: {method: its cases, as `summarise` takes them}.
      pairs: the methods to compare, (a, b).
      classes: names, in the order of the result.
      metric: the metric to compare.

    Returns:
      {"a - b": {class or "mean": test}}. A case counts if both scores are finite. Each test has
        difference: the mean of a - b over the cases that count, NaN if there are none;
        p: 1 if all differences are 0, NaN if no case counts;
        cases: number of cases that count;
        p_holm: p, corrected for the number of all tests of this call (Holm, 1979).

    Raises:
      ValueError: two methods to compare were not scored on the same cases.
    """
    result = {}
    for a, b in pairs:
        if blocks[a].keys() != blocks[b].keys():
            raise ValueError(f"cases of {a} and {b} differ: {sorted(blocks[a].keys() ^ blocks[b].keys())}")
        result[f"{a} - {b}"] = {name: _test(blocks[a], blocks[b], name, metric) for name in [*classes, "mean"]}
    tests = [test for comparison in result.values() for test in comparison.values()]
    for test, p_holm in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p_holm
    return result


def _test(a: Mapping[str, ClassScores], b: Mapping[str, ClassScores], name: str, metric: str) -> dict[str, float]:
    pairs = [(_value(a[case], name, metric), _value(b[case], name, metric)) for case in a]
    differences = np.array([x - y for x, y in pairs if math.isfinite(x) and math.isfinite(y)])
    if not len(differences):
        return {"difference": math.nan, "p": math.nan, "cases": 0}
    p = float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0
    return {"difference": float(differences.mean()), "p": p, "cases": len(differences)}


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects the p-values of several tests for their number (Holm, 1979).

    Args:
      p_values: NaN marks a test that could not be made; it is not counted.

    Returns:
      The corrected values in the same order, at most 1; NaN stays NaN.
    """
    tests = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(sorted(tests, key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(tests) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
