"""The loader: the right crops, the same sequence for any number of processes, and an exact way on from any batch."""

import dataclasses
import functools
import json
import logging
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from autocontext_jax.data import loader, preparation
from autocontext_jax.data.augmentation_ranges import IntensityRanges, SpatialRanges
from autocontext_jax.data.datasets import Case
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.loader import (
    Loader,
    LoaderConfig,
    case_margins,
    host_batches,
    largest_margins,
    read_batch,
)
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.errors import UserError
from autocontext_jax.geometry import cube
from autocontext_jax.images import scans
from autocontext_jax.training.validation import validation_batches

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LABELS = ("background", "one", "two", "three")
EDGE = 8
PATCH = cube(EDGE, 2)
SPATIAL = SpatialRanges(rotation=5, translation=1, elastic_sigma=1, elastic_spacing=8)
CONFIG = LoaderConfig(2, (EDGE,))
AUGMENTED = {"spatial": SPATIAL, "intensity": IntensityRanges(10, 20, 0.1)}
NONE = ((0, 0, 0),) * 2
SIZES = [(37, 41, 45), (30, 33, 52), (45, 29, 36), (33, 44, 31), (26, 27, 29)]


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[PreparedCase]:
    """Five small scans of noise, of different size and spacing; the last lacks classes."""
    folder = tmp_path_factory.mktemp("cases")
    rng = np.random.default_rng(0)
    opened = []
    for number, size in enumerate(SIZES):
        name, spacing = f"case_{number}", (2.5 - 0.25 * number, 0.75, 1.0)
        case = Case(name, (folder / f"{name}.nii.gz",), folder / f"{name}_label.nii.gz")
        label = np.zeros(size, np.uint8)
        label[:6, :7, :8] = 1  # at the very corner
        if number < 4:
            label[-5:, 10:20, 10:20] = 2
            label[10:20, 8:24, -12:-4] = 3
        scans.write_scan(case.images[0], rng.integers(-1000, 2000, size, np.int16), spacing)
        scans.write_scan(case.label, label, spacing)
        preparation.prepare_case(case, str(folder / "store"), LevelGrids((4, 2)), LabelSpec.plain(LABELS))
        opened.append(PreparedCase.open(str(folder / "store"), name))
    return opened


@pytest.fixture(scope="module")
def sharding() -> NamedSharding:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return NamedSharding(mesh, PartitionSpec("data"))


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Loaders of one configuration share the compiled augmentation: compiling is most of this file's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "make_augment", functools.cache(loader.make_augment))
        yield


def margins_of(cases) -> list:
    return [case_margins(case, PATCH, SPATIAL) for case in cases]


def take(iterator, count: int) -> list:
    return [jax.tree.map(np.array, next(iterator)) for _ in range(count)]


def assert_same(first, second) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def differ(first, second) -> bool:
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), first, second)))


@pytest.mark.parametrize("margins", [((0, 0, 0), (0, 0, 0)), ((2, 3, 1), (4, 1, 5))])
def test_crops_are_cut_from_the_levels_and_padded_with_air(cases, margins):
    wide = 60
    whole = {}
    for case in cases[:2]:
        for level, shape in enumerate(case.shapes, start=1):
            image, label = case.read(level, (0, 0, 0), shape).result()
            whole[case.name, level] = np.pad(image[0], wide, constant_values=-1024), np.pad(label, wide)
    z, y, x = cases[1].shapes[-1]
    places = [(0, (9, 9, 10)), (0, (0, 0, 0)), (1, (z - 1, y - 1, x - 1)), (1, (0, y - 1, 5)), (0, (-20, 70, 3))]
    batch = read_batch([(cases[number], centre, margins) for number, centre in places], PATCH, margins)
    np.testing.assert_array_equal(batch["spacing"], np.array([cases[n].spacing for n, _ in places], np.float32))
    assert batch["spacing"].dtype == np.float32
    outside = []
    for sample, (number, centre) in enumerate(places):
        starts = PATCH.starts(centre)
        for level, (start, margin) in enumerate(zip(starts, margins, strict=True), start=1):
            box = tuple(
                slice(wide + first - m, wide + first + EDGE + m) for first, m in zip(start, margin, strict=True)
            )
            image, label = batch["images"][level - 1][sample, 0], batch["labels"][level - 1][sample]
            assert (image.dtype, label.dtype) == (np.int16, np.uint8)
            wanted_image, wanted_label = whole[cases[number].name, level]
            np.testing.assert_array_equal(image, wanted_image[box])
            np.testing.assert_array_equal(label, wanted_label[box])
            outside.append((image == -1024).mean())
    assert 0 < outside[2] < 1  # the corner's coarse patch leaves the scan
    assert outside[-1] == 1  # the last lies beyond it


@pytest.mark.parametrize("sampling", ["foreground", "classes"])
def test_host_batches(cases, sampling):
    every = margins_of(cases)
    margins = largest_margins(every)
    config = LoaderConfig(3, (EDGE,), sampling=sampling)
    batches = host_batches(cases, config, PATCH, every, seed=0)
    by_spacing = {np.float32(case.spacing[0]): case for case in cases}
    for index, batch in enumerate(take(batches, 6)):
        assert sorted(batch) == ["images", "labels", "numbers", "spacing"]
        np.testing.assert_array_equal(batch["numbers"], np.arange(3 * index, 3 * index + 3))
        assert (batch["numbers"].dtype, batch["spacing"].dtype) == (np.uint32, np.float32)
        assert len({spacing[0] for spacing in batch["spacing"]}) == 3  # distinct cases
        assert all(spacing[0] in by_spacing for spacing in batch["spacing"])
        for image, label, margin in zip(batch["images"], batch["labels"], margins, strict=True):
            shape = (3, *(EDGE + 2 * m for m in margin))
            assert (image.shape, image.dtype) == ((3, 1, *shape[1:]), np.int16)
            assert (label.shape, label.dtype) == (shape, np.uint8)
        # A foreground voxel is one of the central ones of the finest level.
        middle = tuple(slice(m + EDGE // 2 - 1, m + EDGE // 2 + 1) for m in margins[-1])
        assert batch["labels"][-1][(slice(None), *middle)].any(axis=(1, 2, 3)).all()
    batches.close()


def test_centres_drawn_from_the_whole_scan(cases):
    batches = host_batches(cases, LoaderConfig(2, (EDGE,), background_fraction=1.0), PATCH, [NONE] * len(cases), seed=0)
    middle = slice(EDGE // 2 - 1, EDGE // 2 + 1)
    central = [batch["labels"][-1][:, middle, middle, middle].any(axis=(1, 2, 3)) for batch in take(batches, 20)]
    batches.close()
    assert 0 < np.mean(central) < 0.9  # around a foreground voxel it would be 1


def test_same_seed_same_batches(cases):
    margins = margins_of(cases)
    runs = []
    for seed, threads in ((5, 2), (5, 1), (6, 2)):
        batches = host_batches(
            cases, LoaderConfig(2, (EDGE,), threads=threads, prefetch=threads), PATCH, margins, seed=seed
        )
        runs.append(take(batches, 5))
        batches.close()
    assert_same(runs[0], runs[1])  # whatever the threads
    assert differ(runs[0], runs[2])
    assert differ(runs[0][0], runs[0][1])


@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_shares_are_the_single_batch(cases, processes):
    margins = margins_of(cases)
    config, share = LoaderConfig(4, (EDGE,)), 4 // processes
    iterators = [host_batches(cases, config, PATCH, margins, seed=2)]
    iterators += [
        host_batches(cases, config, PATCH, margins, seed=2, rows=slice(process * share, (process + 1) * share))
        for process in range(processes)
    ]
    single, *shares = [take(iterator, 4) for iterator in iterators]
    for whole, *parts in zip(single, *shares, strict=True):
        assert all(len(part["numbers"]) == share for part in parts)
        assert_same(whole, jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts))
    for iterator in iterators:
        iterator.close()


def test_the_cases_of_any_batch_are_known(cases, sharding):
    source = Loader(cases, CONFIG, PATCH, seed=1, sharding=sharding, **AUGMENTED)
    batches = host_batches(cases, CONFIG, PATCH, margins_of(cases), seed=1)
    by_spacing = {np.float32(case.spacing[0]): case.name for case in cases}
    for number, batch in enumerate(take(batches, 7)):
        assert source.cases_of(number) == [by_spacing[spacing[0]] for spacing in batch["spacing"]]
    batches.close()
    source.close()


def test_one_case_fills_a_batch(cases):
    batches = host_batches(cases[:1], LoaderConfig(3, (EDGE,)), PATCH, [NONE], seed=0)
    first, second = take(batches, 2)
    batches.close()
    assert first["images"][0].shape[0] == 3
    assert len({image.tobytes() for image in (*first["images"][1], *second["images"][1])}) > 3  # of different centres


@pytest.mark.parametrize("consumed", [0, 3])
def test_a_restored_feed_goes_on_bit_for_bit(cases, sharding, consumed):
    source = Loader(cases, CONFIG, PATCH, seed=11, sharding=sharding, **AUGMENTED)
    take(source, consumed)
    state = json.dumps(source.get_state())
    following = take(source, 3)
    source.close()
    other = Loader(cases, CONFIG, PATCH, seed=11, sharding=sharding, **AUGMENTED)
    take(other, 1)  # from elsewhere in the sequence, with batches read ahead
    other.set_state(json.loads(state))
    assert json.dumps(other.get_state()) == state
    assert_same(following, take(other, 3))
    other.close()


def test_batches_on_the_device(cases, sharding, caplog):
    source = Loader(cases, CONFIG, PATCH, seed=1, sharding=sharding, **AUGMENTED)
    assert iter(source) is source
    next(source)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        batches = [next(source) for _ in range(4)]
    assert not [record for record in caplog.records if "ompil" in record.message]
    source.close()
    for images, labels, known in batches:
        assert known is None
        assert len(images) == len(labels) == 2
        for image, label in zip(images, labels, strict=True):
            assert (image.shape, image.dtype) == ((2, EDGE, EDGE, EDGE, 1), np.float32)
            assert (label.shape, label.dtype) == ((2, EDGE, EDGE, EDGE), np.uint8)
            assert image.sharding.is_equivalent_to(sharding, 5)
            assert np.isfinite(image).all()
            assert int(label.max()) < len(LABELS)


def test_the_feed_is_the_augmented_host_batch(cases, sharding):
    plain = LoaderConfig(2, (EDGE,))
    source, batches = (
        Loader(cases, plain, PATCH, seed=3, sharding=sharding),
        host_batches(cases, plain, PATCH, [NONE] * len(cases), seed=3),
    )
    for _ in range(2):
        images, labels, _ = next(source)
        host = next(batches)
        assert_same(
            jax.tree.map(np.array, images),
            tuple(np.moveaxis(image, 1, -1).astype(np.float32) for image in host["images"]),
        )
        assert_same(jax.tree.map(np.array, labels), host["labels"])
    source.close()
    batches.close()


def partly(cases, known) -> list[PreparedCase]:
    """The same cases of which the second annotates less."""
    return [dataclasses.replace(case, known=known) if number == 1 else case for number, case in enumerate(cases)]


def test_batches_say_what_is_annotated_where_it_is_not_all(cases, sharding):
    own = partly(cases, (True, True, False, False))
    plain = LoaderConfig(2, (EDGE,))
    source, before = (Loader(each, plain, PATCH, seed=3, sharding=sharding) for each in (own, cases))
    seen = set()
    for number in range(6):
        images, labels, known = next(source)
        assert_same((images, labels, None), next(before))  # nothing else changes
        names = source.cases_of(number)
        assert (known.shape, known.dtype) == ((2, len(LABELS)), np.bool_)
        for name, row in zip(names, np.array(known), strict=True):
            assert row.tolist() == ([True, True, False, False] if name == "case_1" else [True] * 4)
            seen.add(name)
    assert len(seen) > 2
    for loader_ in (source, before):
        loader_.close()


def test_validation_batches_say_what_is_annotated(cases):
    options = {"patches": 10, "batch_size": 2, "patch": PATCH, "levels": (1, 2), "seed": 0}
    assert not any("known" in batch for batch in validation_batches(cases, **options))
    batches = validation_batches(partly(cases, (True, False, True, True)), **options)
    rows = {tuple(row) for batch in batches for row in batch["known"]}
    assert rows == {(True,) * 4, (True, False, True, True)}


def test_no_transfer_but_the_explicit_one(cases, sharding):
    source = Loader(cases, CONFIG, PATCH, seed=1, sharding=sharding, **AUGMENTED)
    next(source)
    with jax.transfer_guard("disallow"):
        next(source)
    source.close()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def test_close_stops_the_threads(cases, sharding):
    before = set(reading_threads())
    source = Loader(cases, CONFIG, PATCH, seed=1, sharding=sharding, **AUGMENTED)
    next(source)
    mine = set(reading_threads()) - before
    assert mine
    source.close()
    deadline = time.monotonic() + 10
    while any(thread.is_alive() for thread in mine) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in mine)
    source.close()  # again does nothing


def test_a_users_error_comes_through_the_threads(cases, monkeypatch):
    def damaged(*_, **__):
        raise UserError("case_0 cannot be read")

    monkeypatch.setattr(loader, "read_batch", damaged)
    batches = host_batches(cases, LoaderConfig(2, (EDGE,)), PATCH, [NONE] * len(cases), seed=0)
    with pytest.raises(UserError, match="case_0"):
        next(batches)
    batches.close()


def test_a_case_is_read_no_further_than_its_own_margins(cases, monkeypatch):
    """One scan of thick slices must not enlarge what is read of all others; what it does not need is air."""
    small, large = ((1, 1, 1), (1, 2, 1)), ((3, 4, 1), (5, 2, 6))
    assert largest_margins([small, large]) == large
    read: list = []
    original = PreparedCase.read

    def watched(self, level, start, size, into=None):
        if threading.current_thread() is threading.main_thread():  # loaders of other tests may still read ahead
            read.append(size)
        return original(self, level, start, size, into)

    monkeypatch.setattr(PreparedCase, "read", watched)
    centre = (8, 9, 10)
    alone = read_batch([(cases[0], centre, small)], PATCH, small)
    both = read_batch([(cases[0], centre, small), (cases[1], centre, large)], PATCH, large)
    sizes = [tuple(EDGE + 2 * m for m in margin) for margin in (*small, *small, *large)]
    assert read == sizes
    for level, (inner, outer) in enumerate(zip(small, large, strict=True)):
        inside = tuple(slice(b - a, b + EDGE + a) for a, b in zip(inner, outer, strict=True))
        image, label = both["images"][level][0, 0], both["labels"][level][0]
        np.testing.assert_array_equal(image[inside], alone["images"][level][0, 0])
        image[inside], label[inside] = -1024, 0
        assert (image == -1024).all()
        assert not label.any()
