"""The feed: grain samples, reads and batches crops on the host; the device augments them."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from autocontext_jax.data.augment import Augment, IntensityLimits, make_augment
from autocontext_jax.data.sampling import case_batches, draw_anywhere, draw_entry
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.geometry import SpatialLimits, Triple, crop_margins, patch_shape, pyramid_starts

# Voxels read beyond each side of each level's patch, coarsest first; None at a level that is not read.
Margins = tuple[Triple | None, ...]


@dataclasses.dataclass(frozen=True)
class FeedConfig:
    """What a batch is made of.

    Attributes:
      batch: B, pyramid patches over all processes.
      edge: N, a multiple of 4.
      rank: 3, or 2 for patches of one slice.
      levels: those wanted, from 1 = coarsest; () means all. What the others would be changes nothing in these.
      centre: see `sampling.draw_entry`.
      anywhere: share of the patches whose centre is drawn from the whole scan instead. What lies far from every organ
        is seen in no other way, and may be taken for one.
      spatial: limits of the spatial augmentation; None for none.
      intensity: limits of the intensity augmentation.
      threads: that read ahead; TensorStore decodes in threads of its own.
      ahead: batches read ahead.
    """

    batch: int
    edge: int
    rank: int = 3
    levels: tuple[int, ...] = ()
    centre: str = "foreground"
    anywhere: float = 0.0
    spatial: SpatialLimits | None = None
    intensity: IntensityLimits = dataclasses.field(default_factory=IntensityLimits)
    threads: int = 2
    ahead: int = 4


class Feed:
    """An endless iterator over augmented batches on the device.

    Its state is the position in a fixed random sequence: two feeds of the same cases, configuration and seed that
      stand at the same position give the same batches, whatever the number of processes.

    Args:
      cases: the prepared cases to draw from, the same list in the same order in every process.
      config: see there.
      seed: of the whole sequence.
      sharding: of the patches' first axes, [B, D], over devices. Crops are split along B alone.
      deterministic: see `runtime.compiler_options`.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        config: FeedConfig,
        *,
        seed: int,
        sharding: NamedSharding,
        deterministic: bool = False,
    ):
        spacings = [case.spacing for case in cases]
        margins: Margins = crop_margins(config.edge, len(cases[0].shapes), spacings, config.spatial, config.rank)
        if config.levels:
            margins = tuple(m if level in config.levels else None for level, m in enumerate(margins, start=1))
        self._key = jax.random.key(seed)
        self._augment: Augment = make_augment(
            config.edge,
            margins,
            config.spatial,
            config.intensity,
            config.rank,
            sharding,
            deterministic=deterministic,
        )
        self._batch = config.batch
        self._sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
        self._names = [case.name for case in cases]
        self._sequence = case_batches(len(cases), config.batch, seed=seed)
        self._host = host_batches(cases, config, margins, seed=seed, rows=local_rows(self._sharding, config.batch))

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """(images, labels), each a wanted level's [B, N, N, N], coarsest first; float32 HU and uint8."""
        local = next(self._host)

        def place(array: np.ndarray) -> jax.Array:
            shape = (self._batch, *array.shape[1:])
            return jax.make_array_from_process_local_data(self._sharding, array, shape)

        batch = jax.tree.map(place, local)
        return self._augment(self._key, batch["numbers"], batch["spacing"], batch["images"], batch["labels"])

    def cases_of(self, number: int) -> list[str]:
        """Names of the cases in batch `number`, from 0, of the whole sequence."""
        return [self._names[case] for case in self._sequence[number]]

    def get_state(self) -> dict[str, Any]:
        """Position of the next batch, as JSON."""
        return self._host.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position that `get_state` gave."""
        self._host.set_state(state)

    def close(self) -> None:
        """Stops the reading threads."""
        self._host.close()


def local_rows(sharding: NamedSharding, batch: int) -> slice:
    """The rows of a batch that lie on this process's devices; processes that share patches want the same ones."""
    indices = sharding.addressable_devices_indices_map((batch,)).values()
    parts = [index[0].indices(batch) for index in indices if index is not None]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def host_batches(
    cases: Sequence[PreparedCase],
    config: FeedConfig,
    margins: Margins,
    *,
    seed: int,
    rows: slice | None = None,
) -> grain.DatasetIterator:
    """The rows of every batch that this process wants, all unless given, as numpy arrays.

    Each element is a dict of
      numbers: [b] uint32, the samples' places in the whole run's sequence;
      spacing: [b, 3] float32, the finest level's, mm;
      images, labels: for each level whose margin is not None [b, N + 2 m_z, N + 2 m_y, N + 2 m_x] int16 HU and uint8.
    """
    mine = np.arange(config.batch, dtype=np.uint32)[rows or slice(None)]

    def draw(numbers: np.ndarray, rng: np.random.Generator) -> list[tuple[PreparedCase, Triple]]:
        # Every process draws for the whole batch, so that the sequence does not depend on how many there are.
        drawn = []
        for case in (cases[number] for number in numbers):
            entry = draw_entry(case.foreground_offsets, rng, centre=config.centre)
            drawn.append((case, entry, draw_anywhere(case.shapes[-1], rng, share=config.anywhere)))
        wanted = drawn[rows or slice(None)]
        return [(case, case.foreground_voxel(entry) if voxel is None else voxel) for case, entry, voxel in wanted]

    def read(index: int, centres: list[tuple[PreparedCase, Triple]]) -> dict[str, Any]:
        return {
            "numbers": np.uint32(index * config.batch) + mine,
            **read_batch(centres, config.edge, margins, config.rank),
        }

    # Seeds are given to each stage, so that adding a stage does not change the others.
    sequence = case_batches(len(cases), config.batch, seed=seed).random_map(draw, seed=seed + 1).map_with_index(read)
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.ahead)
    return iter(sequence.to_iter_dataset(options))


def read_batch(
    centres: Sequence[tuple[PreparedCase, Triple]], edge: int, margins: Margins, rank: int = 3
) -> dict[str, Any]:
    """Crops of the pyramid patches around given centres; `host_batches` says of what shape.

    All reads are under way together: levels and samples wait for the disk once, not one after another.
    """
    wanted = {level: margin for level, margin in enumerate(margins, start=1) if margin is not None}
    shape = patch_shape(edge, rank)
    sizes = {
        level: (len(centres), *(size + 2 * m for size, m in zip(shape, margin, strict=True)))
        for level, margin in wanted.items()
    }
    images = {level: np.empty(size, np.int16) for level, size in sizes.items()}
    labels = {level: np.empty(size, np.uint8) for level, size in sizes.items()}
    pending = []
    for sample, (case, centre) in enumerate(centres):
        starts = pyramid_starts(centre, edge, len(margins), rank)
        for level, margin in wanted.items():
            z, y, x = (s - m for s, m in zip(starts[level - 1], margin, strict=True))
            _, depth, height, width = sizes[level]
            into = images[level][sample], labels[level][sample]
            pending.append(case.read(level, (z, y, x), (depth, height, width), into))
    for read in pending:
        read.result()
    return {
        "spacing": np.array([case.spacing for case, _ in centres], np.float32),
        "images": tuple(images.values()),
        "labels": tuple(labels.values()),
    }
