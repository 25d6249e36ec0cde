"""The command line: flags -> one job.

python -m autocontext_jax.main --config configs/quickstart.py --workdir runs/quickstart
    [--mode all|prepare|train|evaluate|predict|report] [--input SCAN_OR_FOLDER --output PATH] [--config.key=value ...]
    [--distributed | --coordinator HOST:PORT --processes N --process I]
"""

import contextlib
import logging
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from autocontext_jax import runtime
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


def run() -> bool:
    """Runs the job that the flags name; False if some of many scans failed."""
    # Worker processes import this module again; what follows is slow to import and is not theirs.
    from autocontext_jax import processes
    from autocontext_jax.jobs.evaluate import evaluate, evaluate_elsewhere, held_out
    from autocontext_jax.jobs.experiment import experiment
    from autocontext_jax.jobs.lock import locked
    from autocontext_jax.jobs.predict import predict
    from autocontext_jax.jobs.prepare import describe, prepare
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
            from autocontext_jax.jobs.report import report  # needs plotly and others that nothing else does

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
        runtime.log_plainly()
        if MODE.value in ("all", "train"):
            runtime.keep_freed_memory()
        # Worker processes import this module again; this is slow to import and not theirs.
        from autocontext_jax.jobs.checks import check

        check(CONFIG.value)
        if CONFIG.value.model.dtype == "float32":
            runtime.fuse_results()
        runtime.disable_asynchronous_dispatch()
        _start_processes()
        runtime.keep_compiled_programs()
        return 0 if run() else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


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
