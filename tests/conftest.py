"""Fixtures that several test files share."""

import os

import jax
import pytest
from jax._src import compiler
from jax.experimental.compilation_cache import compilation_cache

from autocontext_jax.data import preparation, survey
from autocontext_jax.errors import UserError

# Two workers share two cores. With two threads each, oneDNN's small convolutions wait for each other: 5 ms, not 0.1.
os.environ.setdefault("OMP_NUM_THREADS", "1")

OPTION = "jax_disable_most_optimizations"
# XLA's newer way of writing the code of a fused loop, which takes most of the time in which a small program compiles.
FUSION_EMITTERS = "xla_cpu_use_fusion_emitters"


# xdist begins with the files of many tests. A long file with few tests, begun last, would leave the other worker idle.
LONGEST = [
    "main", "predictor", "onednn", "accelerator", "api", "faults", "benchmarks", "plan", "fixed_normalization", "fuzz",
    "boxes", "channels", "learning", "levels", "backbones", "thick_slices", "kept_programs", "sharding", "label_kinds",
    "body", "augment", "state", "phases", "phantom",
]  # fmt: skip


def pytest_configure(config):
    """The order of `pytest_collection_modifyitems` stays."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The longest files first."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session", autouse=True)
def programs_of_commands_apart(tmp_path_factory):
    """Commands keep compiled programs in a folder of the tests' own, which is empty at the beginning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def compiled_quickly():
    """Compiles this module's programs, and those of its subprocesses, with LLVM's optimisations off.

    In this process XLA also writes loops in its older way; with both, a training step compiles in a third of the time.
    Subprocesses keep the newer way: the older one cannot compile what `runtime.fuse_results` fuses. Programs compute
    the same operations; XLA's own passes, such as fusion, stay. For files whose time is mostly compiling, and which
    look neither at speed nor at machine code.
    """
    options = compiler.get_compile_options  # JAX has options for one compilation, and none for all of them

    def quick_options(*arguments, env_options_overrides=None, **more):
        return options(
            *arguments, env_options_overrides={**(env_options_overrides or {}), FUSION_EMITTERS: False}, **more
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", quick_options)
        patch.setenv(OPTION.upper(), "1")
        jax.config.update(OPTION, True)
        yield
        jax.config.update(OPTION, False)


@pytest.fixture(scope="module")
def compiled_once(compiled_quickly, tmp_path_factory):
    """Compiles quickly, and keeps the programs of this module and of its subprocesses: none is compiled twice.

    For files that train or predict several times with one configuration. Each module has a cache of its own, so that
    what a test does depends on no other file.
    """
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    values = dict(zip(names, (str(tmp_path_factory.mktemp("programs")), 0.0), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def in_turn(function, items, *, workers):
    """What `workers.in_processes` does, in this process."""
    for item in items:
        try:
            yield item, function(item)
        except UserError as error:
            yield item, error


@pytest.fixture(scope="module")
def prepared_here():
    """Prepares and surveys cases in this process: starting another one takes longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "in_processes", in_turn)
        patch.setattr(survey, "in_processes", in_turn)
        yield
