"""Every setting of the whole process, and of XLA's compiler, each with its reason.

Nothing here imports JAX before it must: worker processes that prepare scans import this module too.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import logging
import math
import os
import platform
import sys
import types
from collections.abc import Iterator
from pathlib import Path

from absl import logging as absl_logging

from autocontext_jax.errors import UserError

# Settings of glibc's `mallopt`, from `malloc.h`.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def compiler_options(platform: str, *, deterministic: bool = False) -> dict[str, bool]:
    """The options of XLA for programs of these layers, for `jax.jit` or `compile`.

    Args:
      platform: of the devices, such as `jax.default_backend()` gives it.
      deterministic: whether the same inputs must give the same bits in every run. On GPUs XLA then uses no operation
        that adds up in a random order, and chooses algorithms by rule, not by timing. Programs for CPUs and TPUs are
        deterministic anyway.
    """
    if platform not in ("gpu", "cuda"):
        return {}
    # Otherwise XLA puts channels first for 3D convolutions, which costs transposes around them and inside cuDNN.
    options = {"xla_gpu_force_conv_nhwc": True}
    return options | {"xla_gpu_deterministic_ops": True} if deterministic else options


def set_up(*, training: bool, dtype: str) -> None:
    """Everything that a job on the command line sets; before the first program runs and any thread has started.

    Args:
      training: whether the job trains.
      dtype: of the network's computations.
    """
    log_plainly()
    if training:
        keep_freed_memory()
    if dtype == "float32":
        fuse_results()
    disable_asynchronous_dispatch()


def package_version() -> str:
    """The version of this package; "0+unknown" in a clone that was not installed."""
    try:
        return importlib.metadata.version("autocontext_jax")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def set_up_library(*, dtype: str) -> None:
    """What the Python functions set, in a process that belongs to somebody else.

    Args:
      dtype: of the network's computations.
    """
    quieten_libraries()
    if dtype == "float32":
        fuse_results()
    disable_asynchronous_dispatch()


def join_processes(distributed: bool, coordinator: str, count: int, index: int) -> None:
    """Makes this process one of several where the flags say so; then keeps compiled programs.

    Args:
      distributed: whether it is one of several, which find each other.
      coordinator: HOST:PORT of the first, where they cannot.
      count: number of processes.
      index: of this one, from 0.

    Raises:
      UserError: it cannot join the others.
    """
    if distributed or coordinator:
        from autocontext_jax import processes

        try:
            processes.start(coordinator, count, index)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"process {index} of {count} cannot join the others ({' '.join(str(error).split())[:200]}): see that "
                "all are started and that --coordinator HOST:PORT can be reached; name it if nothing else does"
            ) from error
        if not processes.is_first():
            logging.getLogger("autocontext_jax").setLevel(logging.ERROR)  # the first one speaks for all
    keep_compiled_programs()


def silence_itk() -> None:
    """Silences ITK's warnings in the whole process, from now on.

    They name neither the file nor what to do; readers check for themselves what ITK warns of. One thread reads while
    another writes, so neither could switch them on again for itself.
    """
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)


def log_plainly() -> None:
    """Shows our own messages on standard error, and those of libraries from warnings up."""
    quieten_libraries()
    ours = logging.getLogger("autocontext_jax")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.addHandler(logging.StreamHandler(sys.stderr))


def quieten_libraries() -> None:
    """Shows messages of libraries from warnings up. Without this orbax logs every stage of every save."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    # Errors in orbax's threads, such as a full disk, are logged with a traceback and raised again where we handle them.
    # It also warns of every checkpoint directory that is opened for reading only, which is meant.
    absl_logging.get_absl_logger().addFilter(_is_news)
    if sys.unraisablehook is not _show_unraisable:
        global _unraisablehook_before
        _unraisablehook_before, sys.unraisablehook = sys.unraisablehook, _show_unraisable


_unraisablehook_before = sys.__unraisablehook__


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message is to be shown; messages of others than orbax always are."""
    theirs = "orbax" in record.pathname
    return not theirs or (record.exc_info is None and "directory is read only" not in record.getMessage())


def _show_unraisable(what: "sys.UnraisableHookArgs") -> None:
    """Shows exceptions that no caller can catch, except those of reads and writes that orbax abandons."""
    if str(what.exc_value) != "Event loop is closed":
        _unraisablehook_before(what)


def available_cpus() -> int:
    """Processors that this process may use: by its affinity, and by the quotas of its control groups (containers)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for folder, first_version in _control_groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # a ValueError if the quota is "max"
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if first_version else ("cpu.max",)
            quota, period = " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
            quotas.append(float(quota) / float(period))
    return max(1, min([count, *(math.ceil(quota) for quota in quotas if quota > 0)]))


def free_memory() -> int:
    """Bytes of the host that programs can still take: of the machine, or of a control group that holds this process."""
    kept: dict[str, str] = {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kept = dict(line.split(":", 1) for line in lines)
    free = [1024 * int(kept.get("MemAvailable", "4000000 kB").split()[0])]
    for folder, first_version in _control_groups("memory"):
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if first_version else ("memory.max", "memory.current")
        )
        with contextlib.suppress(OSError, ValueError):  # a ValueError if the limit is "max"
            limit, taken = (int((folder / name).read_text(encoding="utf-8")) for name in names)
            free.append(max(0, limit - taken))
    return min(free)


def _control_groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of the control groups (containers) that hold this process, and whether they are of version 1."""
    groups = []
    with contextlib.suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    for group in groups:  # lines "NUMBER:CONTROLLERS:PATH"; version 2 of control groups names no controllers
        _, controllers, path = group.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", controller if controllers else "")
        # A container may see its own group at the root, under a path that does not exist there.
        for folder in {root, *(root / parent for parent in [Path(path[1:]), *Path(path[1:]).parents])}:
            yield folder, bool(controllers)


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """For starting processes with `multiprocessing`: they have one thread for BLAS, and do not run the user's script.

    Each of several workers would otherwise take threads for all processors. And Python imports the main script anew in
    each process that it starts: a script that trains without `if __name__ == "__main__":` would train there again.
    Workers need nothing from it.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    script, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def keep_compiled_programs() -> None:
    """Keeps compiled programs in the user's cache, so that a second run of the same shapes compiles nothing.

    Those for CPUs apart for each kind of processor, as they are machine code: a home folder may be shared. With
    programs for accelerators JAX keeps XLA's choices of algorithms. JAX_COMPILATION_CACHE_DIR names another folder;
    empty, nothing is kept.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autocontext_jax"
    if jax.default_backend() == "cpu":
        cache /= f"cpu-{_processor()}"
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_compilation_cache_dir", str(cache))


def _processor() -> str:
    """A short digest of the processor's name and instructions, or of what is known of it."""
    known = f"{platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        known += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return hashlib.sha256(known.encode()).hexdigest()[:12]


def disable_asynchronous_dispatch() -> None:
    """Disables asynchronous dispatch on the CPU: a call of a program returns when it has been computed.

    oneDNN is called through Python. A program that still ran while Python exits, as after an error, would wait for
    Python's lock for ever. Reading and writing have threads of their own, so nothing else waits. In a process that has
    used JAX before, it would have no effect and is left as it is: `models/xla_ffi.py` then waits at exit for programs
    that still run.
    """
    import jax
    from jax._src import xla_bridge  # nothing public says whether the CPU's client exists already

    if not xla_bridge.backends_are_initialized():
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def fuse_results() -> None:
    """Lets XLA on the CPU fuse operations with several results; must be called before the first program.

    A float32 training step then takes 0.87 to 0.94 times as long: Adam and the gradients of normalisation are faster.
    In bfloat16 it would keep float32 copies of activations, and a step would take up to 1.1 times as long
    (benchmarks/README.md). On accelerators XLA does this anyway.
    If XLA_FLAGS already holds `--xla_backend_extra_options`, the user's value stays and nothing is added.
    """
    # XLA does not accept it as an option of a single compilation.
    option, given = "--xla_backend_extra_options", os.environ.get("XLA_FLAGS", "")
    if option not in given:
        os.environ["XLA_FLAGS"] = f"{given} {option}=xla_cpu_use_multi_output_fusion"


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation; without glibc it does nothing.

    XLA allocates the memory of a step anew each time. If it is returned to Linux in between, Linux must clear every
    page of 4 KiB again: on CPUs a tenth to a fifth of the step (`benchmarks/README.md`). Must be called before any
    thread has started.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        # A threshold of -1 means never to trim.
        for setting, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
            mallopt(setting, value)


def let_openmp_threads_sleep() -> None:
    """Lets oneDNN's threads sleep between its calls; must be called before its OpenMP runtime is loaded.

    Otherwise they spin for milliseconds after each call and slow down XLA's. A value of the user's own stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def compile_for_absent_devices() -> None:
    """Lets this process compile for accelerators that it does not have; must be called before JAX starts.

    Nothing then runs on a device of this machine but the CPU. Without the variable, JAX does not load its CUDA plug-in
    where there is no GPU.
    """
    import jax

    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")
