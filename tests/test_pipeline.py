"""The feed: the right crops, the same sequence for any number of processes, and an exact way on from any batch."""

import functools
import json
import logging
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from autocontext_jax.data import pipeline, preparation, scans
from autocontext_jax.data.augment import IntensityLimits
from autocontext_jax.data.datasets import Case
from autocontext_jax.data.pipeline import Feed, FeedConfig, host_batches, read_batch
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.errors import UserError
from autocontext_jax.geometry import SpatialLimits, crop_margins, pyramid_starts

LABELS = ("background", "one", "two", "three")
EDGE = 8
SPATIAL = SpatialLimits(rotation=5, translation=1, elastic_sigma=1, elastic_spacing=8)
CONFIG = FeedConfig(2, EDGE, spatial=SPATIAL, intensity=IntensityLimits(10, 20, 0.1))
SIZES = [(37, 41, 45), (30, 33, 52), (45, 29, 36), (33, 44, 31), (26, 27, 29)]


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[PreparedCase]:
    """Five small scans of noise, of different size and spacing; the last lacks classes."""
    folder = tmp_path_factory.mktemp("cases")
    rng = np.random.default_rng(0)
    opened = []
    for number, size in enumerate(SIZES):
        name, spacing = f"case_{number}", (2.5 - 0.25 * number, 0.75, 1.0)
        case = Case(name, folder / f"{name}.nii.gz", folder / f"{name}_label.nii.gz")
        label = np.zeros(size, np.uint8)
        label[:6, :7, :8] = 1  # at the very corner
        if number < 4:
            label[-5:, 10:20, 10:20] = 2
            label[10:20, 8:24, -12:-4] = 3
        scans.write_scan(case.image, rng.integers(-1000, 2000, size, np.int16), spacing)
        scans.write_scan(case.label, label, spacing)
        preparation.prepare_case(case, str(folder / "store"), LevelGrids((4, 2)), LABELS)
        opened.append(PreparedCase.open(str(folder / "store"), name))
    return opened


@pytest.fixture(scope="module")
def sharding() -> NamedSharding:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return NamedSharding(mesh, PartitionSpec("data"))


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Feeds of one configuration share the compiled augmentation: compiling is most of this file's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_augment", functools.cache(pipeline.make_augment))
        yield


def margins_of(cases) -> tuple:
    return crop_margins(EDGE, 2, [case.spacing for case in cases], SPATIAL)


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
            whole[case.name, level] = np.pad(image, wide, constant_values=-1024), np.pad(label, wide)
    z, y, x = cases[1].shapes[-1]
    places = [(0, (9, 9, 10)), (0, (0, 0, 0)), (1, (z - 1, y - 1, x - 1)), (1, (0, y - 1, 5)), (0, (-20, 70, 3))]
    batch = read_batch([(cases[number], centre) for number, centre in places], EDGE, margins)
    np.testing.assert_array_equal(batch["spacing"], np.array([cases[n].spacing for n, _ in places], np.float32))
    assert batch["spacing"].dtype == np.float32
    outside = []
    for sample, (number, centre) in enumerate(places):
        starts = pyramid_starts(centre, EDGE, 2)
        for level, (start, margin) in enumerate(zip(starts, margins, strict=True), start=1):
            box = tuple(
                slice(wide + first - m, wide + first + EDGE + m) for first, m in zip(start, margin, strict=True)
            )
            image, label = batch["images"][level - 1][sample], batch["labels"][level - 1][sample]
            assert (image.dtype, label.dtype) == (np.int16, np.uint8)
            wanted_image, wanted_label = whole[cases[number].name, level]
            np.testing.assert_array_equal(image, wanted_image[box])
            np.testing.assert_array_equal(label, wanted_label[box])
            outside.append((image == -1024).mean())
    assert 0 < outside[2] < 1  # the corner's coarse patch leaves the scan
    assert outside[-1] == 1  # the last lies beyond it


@pytest.mark.parametrize("centre", ["foreground", "classes"])
def test_host_batches(cases, centre):
    margins = margins_of(cases)
    config = FeedConfig(3, EDGE, centre=centre, spatial=SPATIAL)
    batches = host_batches(cases, config, margins, seed=0)
    by_spacing = {np.float32(case.spacing[0]): case for case in cases}
    for index, batch in enumerate(take(batches, 6)):
        assert sorted(batch) == ["images", "labels", "numbers", "spacing"]
        np.testing.assert_array_equal(batch["numbers"], np.arange(3 * index, 3 * index + 3))
        assert (batch["numbers"].dtype, batch["spacing"].dtype) == (np.uint32, np.float32)
        assert len({spacing[0] for spacing in batch["spacing"]}) == 3  # distinct cases
        assert all(spacing[0] in by_spacing for spacing in batch["spacing"])
        for image, label, margin in zip(batch["images"], batch["labels"], margins, strict=True):
            shape = (3, *(EDGE + 2 * m for m in margin))
            assert (image.shape, image.dtype) == (shape, np.int16)
            assert (label.shape, label.dtype) == (shape, np.uint8)
        # A foreground voxel is one of the central ones of the finest level.
        middle = tuple(slice(m + EDGE // 2 - 1, m + EDGE // 2 + 1) for m in margins[-1])
        assert batch["labels"][-1][(slice(None), *middle)].any(axis=(1, 2, 3)).all()
    batches.close()


def test_centres_drawn_from_the_whole_scan(cases):
    batches = host_batches(cases, FeedConfig(2, EDGE, anywhere=1.0), ((0, 0, 0),) * 2, seed=0)
    middle = slice(EDGE // 2 - 1, EDGE // 2 + 1)
    central = [batch["labels"][-1][:, middle, middle, middle].any(axis=(1, 2, 3)) for batch in take(batches, 20)]
    batches.close()
    assert 0 < np.mean(central) < 0.9  # around a foreground voxel it would be 1


def test_same_seed_same_batches(cases):
    margins = margins_of(cases)
    runs = []
    for seed, threads in ((5, 2), (5, 1), (6, 2)):
        batches = host_batches(cases, FeedConfig(2, EDGE, threads=threads, ahead=threads), margins, seed=seed)
        runs.append(take(batches, 5))
        batches.close()
    assert_same(runs[0], runs[1])  # whatever the threads
    assert differ(runs[0], runs[2])
    assert differ(runs[0][0], runs[0][1])


@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_shares_are_the_single_batch(cases, processes):
    margins = margins_of(cases)
    config, share = FeedConfig(4, EDGE), 4 // processes
    iterators = [host_batches(cases, config, margins, seed=2)]
    iterators += [
        host_batches(cases, config, margins, seed=2, rows=slice(process * share, (process + 1) * share))
        for process in range(processes)
    ]
    single, *shares = [take(iterator, 4) for iterator in iterators]
    for whole, *parts in zip(single, *shares, strict=True):
        assert all(len(part["numbers"]) == share for part in parts)
        assert_same(whole, jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts))
    for iterator in iterators:
        iterator.close()


def test_the_cases_of_any_batch_are_known(cases, sharding):
    feed = Feed(cases, CONFIG, seed=1, sharding=sharding)
    batches = host_batches(cases, CONFIG, margins_of(cases), seed=1)
    by_spacing = {np.float32(case.spacing[0]): case.name for case in cases}
    for number, batch in enumerate(take(batches, 7)):
        assert feed.cases_of(number) == [by_spacing[spacing[0]] for spacing in batch["spacing"]]
    batches.close()
    feed.close()


def test_one_case_fills_a_batch(cases):
    batches = host_batches(cases[:1], FeedConfig(3, EDGE), ((0, 0, 0),) * 2, seed=0)
    first, second = take(batches, 2)
    batches.close()
    assert first["images"][0].shape[0] == 3
    assert len({image.tobytes() for image in (*first["images"][1], *second["images"][1])}) > 3  # of different centres


@pytest.mark.parametrize("consumed", [0, 3])
def test_a_restored_feed_goes_on_bit_for_bit(cases, sharding, consumed):
    feed = Feed(cases, CONFIG, seed=11, sharding=sharding)
    take(feed, consumed)
    state = json.dumps(feed.get_state())
    following = take(feed, 3)
    feed.close()
    other = Feed(cases, CONFIG, seed=11, sharding=sharding)
    take(other, 1)  # from elsewhere in the sequence, with batches read ahead
    other.set_state(json.loads(state))
    assert json.dumps(other.get_state()) == state
    assert_same(following, take(other, 3))
    other.close()


def test_batches_on_the_device(cases, sharding, caplog):
    feed = Feed(cases, CONFIG, seed=1, sharding=sharding)
    assert iter(feed) is feed
    next(feed)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        batches = [next(feed) for _ in range(4)]
    assert not [record for record in caplog.records if "ompil" in record.message]
    feed.close()
    for images, labels in batches:
        assert len(images) == len(labels) == 2
        for image, label in zip(images, labels, strict=True):
            assert (image.shape, image.dtype) == ((2, EDGE, EDGE, EDGE), np.float32)
            assert (label.shape, label.dtype) == ((2, EDGE, EDGE, EDGE), np.uint8)
            assert image.sharding.is_equivalent_to(sharding, 4)
            assert np.isfinite(image).all()
            assert int(label.max()) < len(LABELS)


def test_the_feed_is_the_augmented_host_batch(cases, sharding):
    plain = FeedConfig(2, EDGE)
    feed, batches = (
        Feed(cases, plain, seed=3, sharding=sharding),
        host_batches(cases, plain, ((0, 0, 0),) * 2, seed=3),
    )
    for _ in range(2):
        images, labels = next(feed)
        host = next(batches)
        assert_same(jax.tree.map(np.array, images), tuple(image.astype(np.float32) for image in host["images"]))
        assert_same(jax.tree.map(np.array, labels), host["labels"])
    feed.close()
    batches.close()


def test_no_transfer_but_the_explicit_one(cases, sharding):
    feed = Feed(cases, CONFIG, seed=1, sharding=sharding)
    next(feed)
    with jax.transfer_guard("disallow"):
        next(feed)
    feed.close()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def test_close_stops_the_threads(cases, sharding):
    before = set(reading_threads())
    feed = Feed(cases, CONFIG, seed=1, sharding=sharding)
    next(feed)
    mine = set(reading_threads()) - before
    assert mine
    feed.close()
    deadline = time.monotonic() + 10
    while any(thread.is_alive() for thread in mine) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in mine)
    feed.close()  # again does nothing


def test_a_users_error_comes_through_the_threads(cases, monkeypatch):
    def damaged(*_):
        raise UserError("case_0 cannot be read")

    monkeypatch.setattr(pipeline, "read_batch", damaged)
    batches = host_batches(cases, FeedConfig(2, EDGE), ((0, 0, 0),) * 2, seed=0)
    with pytest.raises(UserError, match="case_0"):
        next(batches)
    batches.close()
