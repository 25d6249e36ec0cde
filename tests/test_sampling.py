"""The random sequence: distinct cases, whole epochs, and the frequencies that were asked for."""

import itertools

import numpy as np
import pytest

from autocontext_jax.data.sampling import SAMPLING, case_batches, draw_anywhere, draw_entry


@pytest.mark.parametrize(("cases", "batch"), [(6, 3), (7, 3), (5, 5), (1, 1), (12, 1)])
def test_batches_hold_distinct_cases_and_epochs_hold_every_case(cases, batch):
    sequence = case_batches(cases, batch, seed=4)
    an_epoch = cases // batch
    epochs = []
    for epoch in range(6):
        batches = [np.array(sequence[epoch * an_epoch + i]) for i in range(an_epoch)]
        assert all(len(numbers) == batch and len(set(numbers.tolist())) == batch for numbers in batches)
        seen = np.concatenate(batches).tolist()
        assert len(set(seen)) == an_epoch * batch  # no case twice in an epoch
        if cases % batch == 0:
            assert sorted(seen) == list(range(cases))
        epochs.append(seen)
    assert set(itertools.chain(*epochs)) == set(range(cases))
    if cases > 2:
        assert len({tuple(epoch) for epoch in epochs}) > 1  # every epoch has an order of its own


def test_seed_alone_sets_the_order():
    first, again, other = ([case_batches(10, 2, seed=seed)[i].tolist() for i in range(20)] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_sequence_does_not_end():
    assert len(case_batches(5, 2, seed=0)[10**12]) == 2


@pytest.mark.parametrize(("cases", "batch"), [(1, 3), (2, 3), (3, 4), (3, 7)])
def test_fewer_cases_than_the_batch_holds(cases, batch):
    sequence = case_batches(cases, batch, seed=0)
    counts = np.zeros(cases, int)
    for i in range(60):
        numbers = np.array(sequence[i])
        assert numbers.shape == (batch,)
        one = np.bincount(numbers, minlength=cases)
        assert one.max() <= -(-batch // cases)
        counts += one
    assert counts.sum() == 60 * batch
    assert counts.min() > 0.8 * counts.mean()


OFFSETS = [0, 10, 10, 1010, 1013]  # 10 voxels of class 1, none of 2, 1000 of 3, 3 of 4


def draws(offsets: list[int], centre: str, count: int = 6000) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([draw_entry(offsets, rng, sampling=centre) for _ in range(count)])


def shares(entries: np.ndarray, offsets: list[int]) -> np.ndarray:
    """Share of the entries in each class, 1 to K - 1."""
    return np.histogram(np.searchsorted(offsets, entries, side="right"), np.arange(1, len(offsets) + 1))[0] / len(
        entries
    )


def test_foreground_is_uniform_over_voxels():
    entries = draws(OFFSETS, "foreground")
    assert entries.min() >= 0
    assert entries.max() < OFFSETS[-1]
    # searchsorted puts an entry at the last of equal offsets: the absent class gets none.
    np.testing.assert_allclose(shares(entries, OFFSETS), np.array([10, 0, 1000, 3]) / 1013, atol=0.005)
    quarters = np.histogram(entries, 4, (0, OFFSETS[-1]))[0] / len(entries)
    np.testing.assert_allclose(quarters, 0.25, atol=0.03)


def test_classes_are_uniform_over_those_present():
    entries = draws(OFFSETS, "classes")
    np.testing.assert_allclose(shares(entries, OFFSETS), [1 / 3, 0, 1 / 3, 1 / 3], atol=0.03)
    assert set(entries[entries < 10]) == set(range(10))  # all voxels of a class
    assert set(entries[entries >= 1010]) == {1010, 1011, 1012}


@pytest.mark.parametrize("centre", SAMPLING)
@pytest.mark.parametrize("offsets", [[0, 1], [0, 0, 0, 1], [0, 1, 1], [0, 0, 5, 5]])
def test_absent_classes_are_never_drawn(centre, offsets):
    entries = draws(offsets, centre, 200)
    assert set(entries) == set(range(offsets[-1]))


@pytest.mark.parametrize("centre", SAMPLING)
def test_every_draw_takes_two_numbers(centre):
    """So that another case in the same place leaves the draws after it as they are."""
    after = []
    for offsets in ([0, 1], OFFSETS, [0, 0, 7]):
        rng = np.random.default_rng(3)
        draw_entry(offsets, rng, sampling=centre)
        after.append(rng.random())
    expected = np.random.default_rng(3).random(3)[2]
    assert after == [expected] * 3


@pytest.mark.parametrize("centre", SAMPLING)
def test_the_ends_of_the_random_interval_stay_inside(centre):
    class Fixed:
        def __init__(self, value: float):
            self.value = value

        def random(self, size: int) -> np.ndarray:
            return np.full(size, self.value)

    for offsets in (OFFSETS, [0, 2**31 + 3], [0, 5, 10**9 + 7]):
        assert draw_entry(offsets, Fixed(0.0), sampling=centre) == 0
        assert draw_entry(offsets, Fixed(np.nextafter(1, 0)), sampling=centre) == offsets[-1] - 1


def test_anywhere_is_uniform_over_the_scan():
    rng = np.random.default_rng(0)
    voxels = [draw_anywhere((2, 3, 4), rng, share=0.25) for _ in range(8000)]
    drawn = np.array([voxel for voxel in voxels if voxel is not None])
    assert len(drawn) == pytest.approx(2000, abs=150)
    counts = np.zeros((2, 3, 4))
    np.add.at(counts, tuple(drawn.T), 1)
    np.testing.assert_allclose(counts / len(drawn), 1 / 24, atol=0.015)
    assert draw_anywhere((5, 5, 5), rng, share=0.0) is None
    assert draw_anywhere((1, 1, 1), rng, share=1.0) == (0, 0, 0)


def test_anywhere_always_takes_four_numbers():
    for share in (0.0, 1.0):
        rng = np.random.default_rng(3)
        draw_anywhere((5, 6, 7), rng, share=share)
        assert rng.random() == np.random.default_rng(3).random(5)[4]
