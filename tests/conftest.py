"""Fixtures that several test files share."""

import jax
import pytest

OPTION = "jax_disable_most_optimizations"


@pytest.fixture(scope="module")
def compiled_quickly():
    """Compiles this module's programs, and those of its subprocesses, with LLVM's optimisations off.

    They compute the same operations; XLA's own passes, such as fusion, stay. For files whose time is mostly compiling,
    and which look neither at speed nor at machine code: some of the tests take half as long with it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(OPTION.upper(), "1")
        jax.config.update(OPTION, True)
        yield
        jax.config.update(OPTION, False)
