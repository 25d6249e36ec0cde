"""How much one training step takes: the largest network, patch and batch that the memory and the time allow."""

import dataclasses
import logging
from collections.abc import Callable, Sequence

from autocontext_jax.errors import UserError

log = logging.getLogger(__name__)

# Seconds of a step that a run of so many minutes can afford are this times the root of the minutes: a run of twice the
# time has 1.4 times as many steps, each 1.4 times as long. From half an hour on two cores (`configs/hippocampus.py`,
# `configs/openkbp.py`: 2,800 steps of 0.65 s) and from five minutes (`configs/quickstart.py`: 1,150 of 0.26 s).
SECONDS = 0.12

# What grows first, from what a laptop can train in minutes to what fills an accelerator: (base channels, edge of a
# patch). Edges are those of cubes; of a slice they are `FLAT` times as long.
GROWTH = ((8, 32), (8, 48), (16, 48), (16, 64), (32, 64), (32, 80), (32, 96), (32, 128), (32, 160))
FLAT = 4
BATCHES = (2, 3, 4, 6, 8)  # of each device
MEASURED = 8  # sizes at most: each is compiled, which takes a while


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a step: base channels of the networks, edge of a patch (see `grids`), patches on each device."""

    base_channels: int
    edge: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a step needs on a device: seconds, and bytes of memory."""

    seconds: float
    bytes: float


def sizes(cost: Callable[[Size], float], same: Callable[[Size], object], *, flat: bool = False) -> list[Size]:
    """The sizes to choose from, each costs more than the one before.

    Args:
      cost: of a step, in any unit.
      same: sizes of equal values are one and the same, as where patches hold all of a scan.
      flat: whether patches are slices.
    """
    found: list[Size] = []
    seen = set()
    grown = [(channels, edge * FLAT if flat else edge) for channels, edge in GROWTH]
    for number, (channels, edge) in enumerate(grown):
        following = grown[number + 1 :]
        limit = min((cost(Size(*after, BATCHES[0])) for after in following
                     if same(Size(*after, BATCHES[0])) not in seen), default=float("inf"))  # fmt: skip
        for batch in BATCHES:
            size = Size(channels, edge, batch)
            dear_enough = not found or cost(size) > cost(found[-1])
            if same(size) not in seen and dear_enough and (batch == BATCHES[0] or cost(size) < limit):
                seen.add(same(size))
                found.append(size)
    return found


def largest_size(
    path: Sequence[Size],
    cost: Callable[[Size], float],
    measure: Callable[[Size], Measured | None],
    *,
    seconds: float,
    usable: float,
) -> tuple[Size, Measured]:
    """The largest size whose step takes no more than a time and a memory; the smallest if none is as fast.

    Few sizes are measured: the cheapest, then those that by its cost should just fit.

    Args:
      path: from the cheapest.
      cost: of a step, in any unit.
      measure: compiles and times a step; None if the device refuses it for lack of memory.
      seconds: that a step may take.
      usable: bytes of the device.

    Raises:
      UserError: not even the smallest fits the memory.
    """
    known: dict[int, Measured | None] = {}

    def look(number: int) -> Measured | None:
        if number not in known:
            known[number] = measure(path[number])
        found = known[number]
        return found if found is not None and found.bytes <= usable else None

    first = look(0)
    if first is None:
        measured = known[0]
        needed = "more memory than there is" if measured is None else f"{measured.bytes / 2**30:.1f} GiB"
        raise UserError(
            f"the smallest training step needs {needed}; expected at most {max(0.0, usable) / 2**30:.1f} GiB, which "
            "the device has free or plan.memory allows: free memory, or take a larger device"
        )
    best, low, high = first, 0, len(path)
    while high - low > 1 and len(known) < MEASURED:
        # The nearest known sizes say most of those between them; one that was too slow says more than a fast one.
        near = {number: found for number in (low, high) if (found := known.get(number)) is not None}
        rate = max(found.seconds / cost(path[number]) for number, found in near.items())
        heap = max(found.bytes / cost(path[number]) for number, found in near.items())
        fitting = [number for number in range(low + 1, high)
                   if cost(path[number]) * rate <= seconds and cost(path[number]) * heap <= usable]  # fmt: skip
        if not fitting:
            break
        refused = known.get(high, first) is None  # which says nothing of how much is too much
        number = (low + high) // 2 if refused else fitting[-1]
        found = look(number)
        if found is not None and found.seconds <= seconds:
            best, low = found, number
        else:
            high = number
    return path[low], best
