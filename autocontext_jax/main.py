"""The command line: flags -> one job.

python -m autocontext_jax.main --config configs/quickstart.py --workdir runs/quickstart
    [--mode all|prepare|train|evaluate|predict|report] [--input SCAN_OR_FOLDER --output PATH] [--config.key=value ...]
    [--distributed | --coordinator HOST:PORT --processes N --process I]
"""

import contextlib
import ctypes
import logging
import os
import platform
import sys
from pathlib import Path

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from autocontext_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment's file, such as configs/quickstart.py.")
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run: checkpoints, logs, predictions, tables.")
MODE = flags.DEFINE_enum("mode", "all", ["all", "prepare", "train", "evaluate", "predict", "report"], "What to do.")
INPUT = flags.DEFINE_string("input", "", "With --mode predict: a scan, a DICOM folder or a folder of scans.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes, as SLURM, Kubernetes, ... say.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0 where nothing else says it.")
PROCESSES = flags.DEFINE_integer("processes", 1, "With --coordinator: how many there are.")
PROCESS = flags.DEFINE_integer("process", 0, "With --coordinator: which one this is, from 0.")
OUTPUT = flags.DEFINE_string("output", "", "With --mode predict: the mask to write, or a folder for masks.")

# Of `malloc.h`.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def run() -> bool:
    """Runs the job that the flags name; False if some of many scans failed."""
    # Worker processes import this module again; what follows is slow to import and is not theirs.
    from autocontext_jax import processes
    from autocontext_jax.jobs.evaluate import evaluate, evaluate_elsewhere, held_out
    from autocontext_jax.jobs.experiment import experiment
    from autocontext_jax.jobs.lock import locked
    from autocontext_jax.jobs.predict import predict
    from autocontext_jax.jobs.prepare import describe, prepare
    from autocontext_jax.jobs.report import report
    from autocontext_jax.jobs.train import train

    config, workdir, mode = CONFIG.value, Path(WORKDIR.value).expanduser(), MODE.value
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be made ({error.strerror}): choose another folder") from None
    if mode == "predict":
        return predict(config, workdir, Path(INPUT.value), Path(OUTPUT.value))
    with locked(workdir) if processes.is_first() else contextlib.nullcontext():
        if mode == "all" and config.experiment:
            return experiment(config, workdir)
        if mode == "report":
            report(config, workdir)
            return True
        if mode == "evaluate" and config.evaluate.root:
            return evaluate_elsewhere(config, workdir)
        data = describe(config, workdir) if mode == "evaluate" else prepare(config, workdir)
        if mode in ("all", "train") and not train(config, workdir, data):
            return True  # a signal ended it; what was done is saved
        if mode == "all" and not held_out(data):
            logging.getLogger("autocontext_jax").warning("every case was trained on: nothing is left to evaluate")
            return True
        return mode not in ("all", "evaluate") or evaluate(config, workdir, data)


def main(argv: list[str]) -> int:
    """Parses the command line and runs; returns the exit status: 0, 1 (some scans failed) or 2 (the user's mistake)."""
    try:
        _parse(argv)
        _log_plainly()
        if MODE.value in ("all", "train"):
            keep_freed_memory()
        # Worker processes import this module again; this is slow to import and not theirs.
        from autocontext_jax.jobs.checks import check

        check(CONFIG.value)
        if CONFIG.value.model.dtype == "float32":
            fuse_results()
        wait_for_programs()
        _start_processes()
        keep_compiled_programs()
        return 0 if run() else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _log_plainly() -> None:
    """Our own lines on standard error; the libraries' only from warnings up (orbax tells every step of a save)."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    # What orbax's threads log with a traceback, as of a full disk, they raise too, where we have one line for it.
    absl_logging.get_absl_logger().addFilter(lambda record: record.exc_info is None)
    sys.unraisablehook = _untold
    ours = logging.getLogger("autocontext_jax")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.addHandler(logging.StreamHandler(sys.stderr))


def _untold(what: "sys.UnraisableHookArgs") -> None:
    """Shows what no caller can catch, but for the reads and writes that orbax leaves behind after the first fails."""
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def _start_processes() -> None:
    if not (DISTRIBUTED.value or COORDINATOR.value):
        return
    from autocontext_jax import processes

    try:
        processes.start(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"process {PROCESS.value} of {PROCESSES.value} cannot join the others ({' '.join(str(error).split())[:200]}"
            "): see that all are started and that --coordinator HOST:PORT can be reached; name it if nothing else does"
        ) from error
    if not processes.is_first():
        logging.getLogger("autocontext_jax").setLevel(logging.ERROR)  # the first one speaks for all


def keep_compiled_programs() -> None:
    """A second run of the same shapes on an accelerator compiles nothing.

    JAX_COMPILATION_CACHE_DIR names another folder than the user's cache; empty, it keeps nothing.
    """
    import jax

    # The CPU's compile in seconds.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and jax.default_backend() != "cpu":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autocontext_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def wait_for_programs() -> None:
    """Has calls of programs on the CPU return when they are done.

    One that still ran as Python ends, as after an error, would wait for ever for its next call of oneDNN, which takes
    Python's lock. Reading and writing have threads of their own, so that nothing else waits.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def fuse_results() -> None:
    """Has XLA on the CPU compute several results of the same arrays in one pass; called before its first program.

    A step in float32 then takes 0.87 to 0.94 times as long, by faster Adam and gradients of normalisation. Not for
    bfloat16: there it keeps float32 copies of activations, and a step takes up to 1.1 times as long
    (benchmarks/README.md). On accelerators XLA does so anyway.
    Where XLA_FLAGS hold an `--xla_backend_extra_options` already, that one stays and nothing is added.
    """
    # As an option of one compilation XLA does not take it.
    option, given = "--xla_backend_extra_options", os.environ.get("XLA_FLAGS", "")
    if option not in given:
        os.environ["XLA_FLAGS"] = f"{given} {option}=xla_cpu_use_multi_output_fusion"


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for what is taken next; where there is no glibc it does nothing.

    XLA takes the memory of a step anew each time. Given back to Linux in between, it comes in cleared pages of 4 KiB:
    on CPUs a tenth to a fifth of the step (`benchmarks/README.md`). Before any thread has begun.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        # A threshold of -1 is none.
        for setting, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
            mallopt(setting, value)


def _parse(argv: list[str]) -> None:
    try:
        rest = flags.FLAGS(argv)[1:]
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}; wanted only --flags")
        if CONFIG.value is None or not WORKDIR.value:
            raise UserError("--config FILE and --workdir FOLDER are both wanted")
        if MODE.value == "predict" and not (INPUT.value and OUTPUT.value):
            raise UserError("--mode predict wants --input SCAN_OR_FOLDER and --output PATH")
        CONFIG.value.to_dict()  # a file that could not be loaded says so only when it is used
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError, SyntaxError, MemoryError) as error:
        # MemoryError: so many brackets that Python's parser gives up.
        raise UserError(f"command line: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv))
