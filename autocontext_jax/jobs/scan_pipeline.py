"""Several scans through read, work and finish: the next is read and the last finished while one is worked on."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from autocontext_jax.errors import UserError

Item = TypeVar("Item")


def in_stages(
    items: Sequence[Item],
    read: Callable[[Item], Any],
    work: Callable[[Item, Any], Any],
    finish: Callable[[Item, Any], Any],
    *,
    prepare: Callable[[], Any] = lambda: None,
) -> Iterator[tuple[Item, Any]]:
    """Takes each item through three stages, each given what the stage before returned.

    `work` runs in the caller's thread, `read` and `finish` in one of their own. At most one item is read ahead and at
    most one is being finished, so memory does not grow with their number.

    Args:
      items: what to do, in this order.
      read: from the item.
      work: from the item and what was read.
      finish: from the item and what `work` made of it.
      prepare: called once, in the caller's thread, while the first item is read.

    Yields:
      Each item, in order, with what `finish` returned, or the UserError of the stage that failed; the others go on.
    """
    finishing: Future | None = None
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as finisher:
        reading = [reader.submit(_tried, read, item) for item in items[:1]]
        prepare()
        for number, item in enumerate(items):
            found = reading.pop().result()
            reading += [reader.submit(_tried, read, following) for following in items[number + 1 : number + 2]]
            made = _tried(work, item, found)
            del found
            if finishing is not None:
                yield items[number - 1], finishing.result()
            finishing = finisher.submit(_tried, finish, item, made)
            del made
        if finishing is not None:
            yield items[-1], finishing.result()


def _tried(stage: Callable[..., Any], item: Any, *given: Any) -> Any:
    """What the stage returns, or the user's mistake: as a value, which later stages pass on."""
    if given and isinstance(given[0], UserError):
        return given[0]
    try:
        return stage(item, *given)
    except UserError as error:
        return error
