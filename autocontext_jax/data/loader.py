"""The loader: grain samples, reads and batches crops on the host; the device augments them."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from autocontext_jax.data.augment import Augment, make_augment, make_flip_known
from autocontext_jax.data.augmentation_ranges import IntensityRanges, SpatialRanges, crop_margins
from autocontext_jax.data.sampling import SAMPLING, case_batches, draw_centre
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.errors import require
from autocontext_jax.geometry import PyramidPatch, Triple

# Voxels read beyond each side of each level's patch, coarsest first; None at a level that is not read.
Margins = tuple[Triple | None, ...]


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """The section `loader` of a configuration.

    Attributes:
      batch_size: B, pyramid patches a step, over all devices and processes.
      patch_size: (z, y, x) voxels of a patch, the same at every level; multiples of 2^(model.depth - 1), and of 4 where
        levels halve an axis, less along thick slices. In 2D z is 1. One number, (64,), is that of all axes that the
        networks look along.
      sampling: how a patch's centre is drawn: `foreground`, uniformly over all foreground voxels, as in the paper; or
        `classes`, uniformly over the classes and then over the class's voxels, so that small ones are seen as often.
      background_fraction: share of the patches whose centre is drawn from the whole scan instead. What lies far from
        every class is seen in no other way, and could be taken for one. Of a case without any class all are.
      threads: that read ahead; TensorStore decodes in threads of its own.
      prefetch: batches read ahead.
    """

    batch_size: int = 3
    patch_size: tuple[int, ...] = (64,)
    sampling: str = "foreground"
    background_fraction: float = 0.0
    threads: int = 2
    prefetch: int = 4

    def __post_init__(self):
        for name in ("batch_size", "threads", "prefetch"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        good = len(self.patch_size) in (1, 3) and all(1 <= size <= 4096 for size in self.patch_size)
        require(good, self, "patch_size", "(z, y, x), each from 1 to 4096, or one number for all, such as (64,)")
        require(self.sampling in SAMPLING, self, "sampling", f"one of {', '.join(SAMPLING)}")
        require(0 <= self.background_fraction <= 1, self, "background_fraction", "a share in [0, 1]")


class Loader:
    """An endless iterator over augmented batches on the device.

    Its state is the position in a fixed random sequence: two loaders of the same cases, configuration and seed that
    stand at the same position give the same batches, whatever the number of processes.

    Args:
      cases: the prepared cases to draw from, the same list in the same order in every process.
      config: see there.
      patch: of all levels, of the cases' grids.
      seed: of the whole sequence.
      sharding: of the patches' first axes, [B, D], over devices. Crops are split along B alone.
      spatial: ranges of the spatial augmentation; None for none.
      intensity: ranges of the intensity augmentation.
      levels: those trained, from 1 = coarsest; () means all. The patches of a level do not depend on the others.
      deterministic: see `runtime.compiler_options`.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        config: LoaderConfig,
        patch: PyramidPatch,
        *,
        seed: int,
        sharding: NamedSharding,
        spatial: SpatialRanges | None = None,
        intensity: IntensityRanges | None = None,
        levels: tuple[int, ...] = (),
        deterministic: bool = False,
    ):
        margins = [case_margins(case, patch, spatial, levels=levels) for case in cases]
        largest = largest_margins(margins)
        self._key = jax.random.key(seed)
        self._augment: Augment = make_augment(
            patch, largest, spatial, intensity or IntensityRanges(), sharding, deterministic=deterministic
        )
        self._batch_size = config.batch_size
        self._sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
        self._flip_known = make_flip_known(spatial.flip_classes if spatial else (), self._sharding)
        self._names = [case.name for case in cases]
        self._sequence = case_batches(len(cases), config.batch_size, seed=seed)
        rows = local_rows(self._sharding, config.batch_size)
        self._host = host_batches(cases, config, patch, margins, seed=seed, rows=rows)

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...], jax.Array | None]:
        """(images, labels, known).

        Images and labels are each trained level's, coarsest first: [B, D, H, W, C] float32 and [B, D, H, W] uint8.
        `known` [B, K] bool says which classes each sample's case annotates; None if all cases annotate all.
        """
        local = next(self._host)

        def place(array: np.ndarray) -> jax.Array:
            shape = (self._batch_size, *array.shape[1:])
            return jax.make_array_from_process_local_data(self._sharding, array, shape)

        batch = jax.tree.map(place, local)
        numbers, known = batch["numbers"], batch.get("known")
        if known is not None:
            known = self._flip_known(self._key, numbers, known)
        images, labels = self._augment(self._key, numbers, batch["spacing"], batch["images"], batch["labels"])
        return images, labels, known

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


def case_margins(
    case: PreparedCase, patch: PyramidPatch, spatial: SpatialRanges | None, *, levels: tuple[int, ...] = ()
) -> Margins:
    """The margins that a case needs by its own spacing; None at levels that are not trained."""
    margins = crop_margins(patch, case.spacing, spatial)
    return tuple(margin if level in (levels or (level,)) else None for level, margin in enumerate(margins, start=1))


def largest_margins(margins: Sequence[Margins]) -> Margins:
    """The margins that are enough for every case: those of the arrays that the device gets."""

    def largest(of_level: tuple[Triple | None, ...]) -> Triple | None:
        z, y, x = (max(along) for along in zip(*(margin or (0, 0, 0) for margin in of_level), strict=True))
        return None if of_level[0] is None else (z, y, x)

    return tuple(largest(of_level) for of_level in zip(*margins, strict=True))


def local_rows(sharding: NamedSharding, batch_size: int) -> slice:
    """The rows of a batch that lie on this process's devices; processes that share patches have the same ones."""
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    parts = [index[0].indices(batch_size) for index in indices if index is not None]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def host_batches(
    cases: Sequence[PreparedCase],
    config: LoaderConfig,
    patch: PyramidPatch,
    margins: Sequence[Margins],
    *,
    seed: int,
    rows: slice | None = None,
) -> grain.DatasetIterator:
    """The rows of every batch that this process needs, all unless given, as numpy arrays.

    `margins` are those of each case. Each element is a dict of
      numbers: [b] uint32, the samples' places in the whole run's sequence;
      spacing: [b, 3] float32, the finest level's, mm;
      images, labels: for each trained level [b, C, D + 2 m_z, H + 2 m_y, W + 2 m_x] as it is stored and
        [b, D + 2 m_z, H + 2 m_y, W + 2 m_x] uint8, with m the largest of all cases' margins;
      known: [b, K] bool, the classes that each sample's case annotates; only if some of the cases do not annotate all.
    """
    mine = np.arange(config.batch_size, dtype=np.uint32)[rows or slice(None)]
    largest = largest_margins(margins)
    partly = partly_annotated(cases)

    def draw(numbers: np.ndarray, rng: np.random.Generator) -> list[tuple[PreparedCase, Triple, Margins]]:
        # Every process draws for the whole batch, so that the sequence does not depend on how many there are.
        centres = [
            draw_centre(
                cases[number].foreground_offsets,
                cases[number].shapes[-1],
                rng,
                sampling=config.sampling,
                background_fraction=config.background_fraction,
            )
            for number in numbers
        ]
        own = list(zip(numbers, centres, strict=True))[rows or slice(None)]
        return [
            (cases[number], cases[number].foreground_voxel(at) if isinstance(at, int) else at, margins[number])
            for number, at in own
        ]

    def read(index: int, crops: list[tuple[PreparedCase, Triple, Margins]]) -> dict[str, Any]:
        return {
            "numbers": np.uint32(index * config.batch_size) + mine,
            **read_batch(crops, patch, largest, known=partly),
        }

    # Seeds are given to each stage, so that adding a stage does not change the others.
    sequence = case_batches(len(cases), config.batch_size, seed=seed).random_map(draw, seed=seed + 1)
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)
    return iter(sequence.map_with_index(read).to_iter_dataset(options))


def partly_annotated(cases: Sequence[PreparedCase]) -> bool:
    """Whether any of the cases leaves classes out, so that batches say which ones each sample's case annotates."""
    return not all(all(case.known) for case in cases)


def read_batch(
    crops: Sequence[tuple[PreparedCase, Triple, Margins]],
    patch: PyramidPatch,
    margins: Margins,
    *,
    known: bool = False,
) -> dict[str, Any]:
    """Crops of the pyramid patches around given centres; `host_batches` says of what shape.

    All reads are under way together: levels and samples wait for the disk once, not one after another. Of each case no
    more is read than its own margins; beyond them the arrays hold padding, which augmentation never reads.

    Args:
      crops: of each sample its case, the patch's centre as a voxel of the finest level, and the case's margins.
      patch: of all levels.
      margins: of the arrays, at least each case's.
      known: whether the batch says which classes each sample's case annotates, see `partly_annotated`.
    """
    trained = {level: margin for level, margin in enumerate(margins, start=1) if margin is not None}
    shape = patch.shape
    sizes = {
        level: (len(crops), *(size + 2 * m for size, m in zip(shape, margin, strict=True)))
        for level, margin in trained.items()
    }
    spec = crops[0][0].image
    images = {
        level: np.empty((number, len(spec.channels), *size), spec.dtype) for level, (number, *size) in sizes.items()
    }
    labels = {level: np.empty(size, np.uint8) for level, size in sizes.items()}
    pending = []
    for sample, (case, centre, own) in enumerate(crops):
        starts = patch.starts(centre)
        for level, margin in trained.items():
            needed = own[level - 1] or margin
            z, y, x = (s - m for s, m in zip(starts[level - 1], needed, strict=True))
            depth, height, width = (size + 2 * m for size, m in zip(shape, needed, strict=True))
            inside = tuple(slice(m - n, m + size + n) for m, n, size in zip(margin, needed, shape, strict=True))
            if needed != margin:
                images[level][sample][...] = spec.padding
                labels[level][sample].fill(0)
            into = images[level][sample][..., *inside], labels[level][sample][inside]
            pending.append(case.read(level, (z, y, x), (depth, height, width), into))
    for read in pending:
        read.result()
    return {
        "spacing": np.array([case.spacing for case, _, _ in crops], np.float32),
        "images": tuple(images.values()),
        "labels": tuple(labels.values()),
        **({"known": np.array([case.known for case, _, _ in crops])} if known else {}),
    }
