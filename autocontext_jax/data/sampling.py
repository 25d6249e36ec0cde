"""Which case, which centre: the random sequence of a run, the same for any number of processes."""

from collections.abc import Sequence

import grain
import numpy as np

from autocontext_jax.geometry import Triple

SAMPLING = ("foreground", "classes")


def case_batches(cases: int, batch: int, seed: int) -> grain.MapDataset:
    """An endless sequence of batches of case numbers, each batch of distinct cases (as in the paper).

    Every epoch visits the cases in a new order; the few that do not fill a last batch wait for the next epoch. With
    fewer cases than the batch holds, distinct cases are impossible and each case stands in the order several times.
    """
    copies = -(-batch // cases)
    batches = copies * cases // batch

    def draw(index: int) -> np.ndarray:
        # Not grain's own shuffle: below some 1,000 elements a look-up takes it milliseconds, 8 with four cases.
        epoch, place = divmod(index, batches)
        order = np.random.default_rng([seed, epoch]).permutation(np.tile(np.arange(cases), copies))
        return order[place * batch : (place + 1) * batch]

    return grain.MapDataset.range(2**62).map(draw)


def draw_centre(
    offsets: Sequence[int], shape: Triple, rng: np.random.Generator, *, sampling: str, background_fraction: float
) -> int | Triple:
    """Where a patch of a case has its centre.

    Args:
      offsets: [K], as `draw_entry` takes them; all are 0 where the case has no foreground.
      shape: voxels of the case's finest level.
      rng: always gives six numbers.
      sampling: see `loader.LoaderConfig`.
      background_fraction: see `loader.LoaderConfig`; a case without foreground is drawn from anywhere.

    Returns:
      The number of an entry of the foreground list, or a voxel (z, y, x).
    """
    empty = offsets[-1] == 0
    entry = draw_entry((0, 1) if empty else offsets, rng, sampling=sampling)
    voxel = draw_anywhere(shape, rng, share=1.0 if empty else background_fraction)
    return entry if voxel is None else voxel


def draw_entry(offsets: Sequence[int], rng: np.random.Generator, *, sampling: str) -> int:
    """Number of a random entry of a case's foreground list.

    Args:
      offsets: [K], where class k's entries are offsets[k - 1] ... offsets[k] - 1; there must be one.
      rng: always gives two numbers, whatever the case, so that other draws do not depend on this case's contents.
      sampling: see `loader.LoaderConfig`.

    Returns:
      A number in [0, offsets[-1]).
    """
    which, where = rng.random(2)
    sizes = np.diff(offsets)
    if sampling == "foreground":
        return int(where * offsets[-1])
    present = np.flatnonzero(sizes)
    chosen = present[int(which * len(present))]
    return int(offsets[chosen] + int(where * sizes[chosen]))


def draw_anywhere(shape: Triple, rng: np.random.Generator, *, share: float) -> Triple | None:
    """A voxel (z, y, x) drawn uniformly from the whole scan with probability `share`, else None.

    Args:
      shape: voxels of the scan.
      rng: always gives four numbers.
      share: in [0, 1].
    """
    which, *where = rng.random(4)
    z, y, x = (int(place * size) for place, size in zip(where, shape, strict=True))
    return (z, y, x) if which < share else None
