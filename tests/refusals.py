"""What is refused says so in one line."""

from collections.abc import Callable
from typing import Any

import pytest

from autocontext_jax.errors import UserError


def refused(call: Callable[[], Any], *parts: object) -> None:
    """Checks that a call raises a `UserError` of one line, which holds these parts."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert str(part) in str(caught.value)
