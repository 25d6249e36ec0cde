"""Reading, working and finishing overlap, in order, and one scan's mistake is its own."""

import threading

import pytest

from autocontext_jax.errors import UserError
from autocontext_jax.jobs.scan_pipeline import in_stages


def test_every_item_passes_every_stage_in_order():
    done = in_stages("abc", str.upper, lambda item, found: found + item, lambda item, made: (item, made))
    assert list(done) == [("a", ("a", "Aa")), ("b", ("b", "Bb")), ("c", ("c", "Cc"))]
    assert list(in_stages([], str, str, str)) == []


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_mistake_is_named_and_the_others_go_on(stage):
    seen = [[], [], []]

    def make(number):
        def run(item, given=None):
            seen[number].append(item)
            if number == stage and item == 1:
                raise UserError("scan 1 is bad")
            return item

        return run

    results = dict(in_stages(range(3), *map(make, range(3))))
    assert (results[0], str(results[1]), results[2]) == (0, "scan 1 is bad", 2)
    assert seen == [[0, 1, 2] if number <= stage else [0, 2] for number in range(3)]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_bug_is_raised(stage):
    def bug(item, given=None):
        raise ZeroDivisionError

    stages = [lambda item, given=None: item] * 3
    stages[stage] = bug
    with pytest.raises(ZeroDivisionError):
        list(in_stages(range(3), *stages))


def test_the_next_is_read_and_the_last_finished_meanwhile_and_no_more():
    """Each stage waits for what must run beside it: a sequence would never end, more at once is counted."""
    count, wait = 5, 10
    reads = [threading.Event() for _ in range(count)]
    finishes = [threading.Event() for _ in range(count)]
    working = [threading.Event() for _ in range(count)]
    alive, most = set(), []

    def read(item):
        alive.add(item)
        most.append(len(alive))
        reads[item].set()

    def work(item, found):
        working[item].set()
        assert item + 1 == count or reads[item + 1].wait(wait)  # the next is read while this one is worked on
        assert item == 0 or finishes[item - 1].wait(wait)  # and the last finished
        assert item + 2 >= count or not reads[item + 2].is_set()

    def finish(item, made):
        assert item + 1 == count or working[item + 1].wait(wait)
        alive.discard(item)
        finishes[item].set()

    assert [item for item, _ in in_stages(range(count), read, work, finish)] == list(range(count))
    assert max(most) <= 3
