"""Training modes: which levels of the pyramid a run has, in which order they learn, and their titles in Table 1.

A new mode is one more entry of `MODES`.
"""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run, of `train.steps` steps.

    Attributes:
      levels: those that run, counted in the whole pyramid from 1 = coarsest.
      learning: those of them that are trained; the others are fixed and normalise by their running averages.
    """

    levels: tuple[int, ...]
    learning: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to train a pyramid.

    Attributes:
      phases: from the number of levels S to the phases, in order; the last one runs all levels that the model has.
      blocks: from S to {level: title} of the levels that the comparison of several modes shows, as in Table 1.
    """

    phases: Callable[[int], tuple[Phase, ...]]
    blocks: Callable[[int], dict[int, str]]


def _all(levels: int) -> tuple[int, ...]:
    return tuple(range(1, levels + 1))


MODES: dict[str, Mode] = {
    # All levels at once, gradients passing through the context: the paper's third block.
    "end_to_end": Mode(lambda levels: (Phase(_all(levels), _all(levels)),), lambda levels: {levels: "End-to-end"}),
    # One level after the other, each on the maps of the fixed ones before it: the paper's first and second block.
    "separate": Mode(
        lambda levels: tuple(Phase(_all(level), (level,)) for level in _all(levels)),
        lambda levels: {level: "Level 1" if level == 1 else f"Level {level} auto-context" for level in _all(levels)},
    ),
    # Level 1 alone: the paper's first block.
    "first_level": Mode(lambda levels: (Phase((1,), (1,)),), lambda levels: {1: "Level 1"}),
    # The finest level alone, from scratch: what the paper compares with.
    "no_context": Mode(lambda levels: (Phase((levels,), (levels,)),), lambda levels: {levels: "No auto-context"}),
}


def phases(mode: str, levels: int) -> tuple[Phase, ...]:
    """The phases of a mode for S levels."""
    return MODES[mode].phases(levels)
