"""The command line: flags -> one job.

python -m autocontext_jax.main --config configs/quickstart.py --workdir runs/quickstart
    [--mode all|prepare|train|evaluate|predict|report] [--input SCAN_OR_FOLDER --output PATH] [--config.key=value ...]
    [--distributed | --coordinator HOST:PORT --processes N --process I]

With --mode evaluate, predict and report --workdir is enough: the run folder knows its configuration.
"""

import itertools
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from autocontext_jax import runtime
from autocontext_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment's file, such as configs/quickstart.py.")
WORKDIR = flags.DEFINE_string("workdir", "", "The run folder: checkpoints, logs, predictions, tables.")
MODE = flags.DEFINE_enum("mode", "all", ["all", "prepare", "train", "evaluate", "predict", "report"], "What to do.")
INPUT = flags.DEFINE_string("input", "", "With --mode predict: a scan, a DICOM folder or a folder of scans.")
OUTPUT = flags.DEFINE_string("output", "", "With --mode predict: the mask to write, or a folder for masks.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes, found through SLURM, Kubernetes, ...")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where --distributed cannot find it.")
PROCESSES = flags.DEFINE_integer("processes", 1, "With --coordinator: how many there are.")
PROCESS = flags.DEFINE_integer("process", 0, "With --coordinator: which one this is, from 0.")


def main(argv: list[str]) -> int:
    """Parses the command line and runs; returns the exit status: 0, 1 (some scans failed) or 2 (the user's mistake)."""
    try:
        _parse(argv)
        # Worker processes import this module again; this is slow to import, and they do not need it.
        from autocontext_jax.jobs.config_files import from_config_dict

        config = from_config_dict(CONFIG.value)
        runtime.set_up(training=MODE.value in ("all", "train"), dtype=config.model.dtype)
        runtime.join_processes(DISTRIBUTED.value, COORDINATOR.value, PROCESSES.value, PROCESS.value)
        from autocontext_jax.jobs.run import run

        workdir = Path(WORKDIR.value).expanduser()
        return 0 if run(MODE.value, config, workdir, Path(INPUT.value), Path(OUTPUT.value)) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> None:
    """Reads the flags; without --config, the modes that only look at a run take its own configuration.

    Raises:
      UserError: a flag, or the config file.
    """
    try:
        files = [argument.partition("=")[2] or value for argument, value in itertools.pairwise([*argv, ""])
                 if argument.partition("=")[0] in ("--config", "-config")]  # fmt: skip
        # Config files import others that lie beside them.
        sys.path += [str(Path(file).absolute().parent) for file in files]
        if not files:
            argv = _with_saved_config(argv)
        rest = flags.FLAGS(argv)[1:]
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}; expected only --flags")
        if not WORKDIR.value or CONFIG.value is None:
            raise UserError("expected --workdir FOLDER, and --config FILE unless the run in that folder is only used")
        if MODE.value == "predict" and not (INPUT.value and OUTPUT.value):
            raise UserError("--mode predict requires --input SCAN_OR_FOLDER and --output PATH")
        CONFIG.value.to_dict()  # a file that could not be loaded says so only when it is used
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError, SyntaxError, MemoryError) as error:
        # MemoryError: so many brackets that Python's parser gives up.
        raise UserError(f"command line: {' '.join(str(error).split())}") from error


def _with_saved_config(argv: list[str]) -> list[str]:
    """Adds the run folder's own configuration as --config, for the modes that only use a run."""
    from autocontext_jax.jobs import saved_config

    flags.FLAGS([argv[0], *(argument for argument in argv[1:] if not argument.startswith("--config."))])
    workdir, mode = WORKDIR.value, MODE.value
    flags.FLAGS.unparse_flags()
    if not workdir or mode not in ("evaluate", "predict", "report"):
        return argv
    saved_config.get_config(workdir)  # one line if it cannot be read
    return [argv[0], f"--config={saved_config.__file__}:{workdir}", *argv[1:]]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
