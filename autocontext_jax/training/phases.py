"""Training modes: which levels of the ladder a run has, and in which order they learn."""

import dataclasses

MODES = ("end_to_end", "separate", "first_level", "no_context")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run, of `train.steps` steps.

    Attributes:
      levels: those that are fed and run, counted on the whole ladder from 1 = coarsest.
      learning: those of them that train; the others stand still, with their running averages.
    """

    levels: tuple[int, ...]
    learning: tuple[int, ...]


def phases(mode: str, levels: int) -> tuple[Phase, ...]:
    """The phases of a mode, on a ladder of S levels; the last one runs all levels that the model has.

    end_to_end: all levels at once, gradients passing through the context (the paper's third block).
    separate: one level after the other, each on the maps of the frozen ones before it (the paper's second block).
    first_level: level 1 alone (the paper's first block).
    no_context: the finest level alone, from scratch (what the paper compares with).
    """
    ladder = tuple(range(1, levels + 1))
    return {
        "end_to_end": (Phase(ladder, ladder),),
        "separate": tuple(Phase(ladder[:level], (level,)) for level in ladder),
        "first_level": (Phase((1,), (1,)),),
        "no_context": (Phase((levels,), (levels,)),),
    }[mode]
