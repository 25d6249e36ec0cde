"""Scores of many cases in few numbers, as in the paper's Table 1."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

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
      {organ or "mean": {metric: {"avg": , "std": , "min": , "max": }}}; NaN where no case counts. The standard
      deviation is the population's.
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
    counted = [value for value in values if not math.isnan(value)]
    return {name: float(function(counted)) if counted else math.nan for name, function in STATISTICS.items()}
