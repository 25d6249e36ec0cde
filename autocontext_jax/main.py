"""The command line: flags -> one job. `autocontext --help` explains it."""

import itertools
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from autocontext_jax import runtime
from autocontext_jax.errors import UserError
from autocontext_jax.files import full_path

MODES = ["all", "plan", "prepare", "train", "evaluate", "predict", "report", "export"]

CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment's file, such as configs/quickstart.py.")
WORKDIR = flags.DEFINE_string("workdir", "", "The run folder: checkpoints, logs, predictions, tables.")
MODE = flags.DEFINE_enum("mode", "all", MODES, "What to do, see above.")
MODEL = flags.DEFINE_string(
    "model", "", "With --mode predict: a model file, or a run folder; of a cross-validation all its folds."
)
INPUT = flags.DEFINE_string("input", "", "With --mode predict: a scan, a DICOM folder or a folder of scans.")
OUTPUT = flags.DEFINE_string(
    "output", "", "With --mode predict: the mask or a folder for masks. With export: the file."
)
SERIES = flags.DEFINE_string(
    "series", None, "With --mode predict: the number, description or UID of the one DICOM series to predict."
)
NETWORK = flags.DEFINE_multi_string("network", [], "package.module:Name of a network that --model names.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes, found through SLURM, Kubernetes, ...")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where --distributed cannot find it.")
PROCESSES = flags.DEFINE_integer("processes", 1, "With --coordinator: how many there are.")
PROCESS = flags.DEFINE_integer("process", 0, "With --coordinator: which one this is, from 0.")

OURS = (CONFIG, WORKDIR, MODE, MODEL, INPUT, OUTPUT, SERIES, NETWORK, DISTRIBUTED, COORDINATOR, PROCESSES, PROCESS)


def main(argv: list[str]) -> int:
    """Parses the command line and runs; returns the exit status: 0, 1 (some scans failed) or 2 (the user's mistake)."""
    try:
        if _requests_text(argv):
            from autocontext_jax.jobs import help

            help.show(argv, {flag.name: flags.FLAGS[flag.name].help for flag in OURS})
            return 0
        _parse(argv)
        # Worker processes import this module again; this is slow to import, and they do not need it.
        from autocontext_jax.jobs.config_files import from_config_dict

        config = from_config_dict(_with_kept_keys(CONFIG.value))
        training = MODE.value in ("all", "plan", "train")
        runtime.set_up(training=training, dtype=config.model.dtype)
        runtime.join_processes(DISTRIBUTED.value, COORDINATOR.value, PROCESSES.value, PROCESS.value)
        from autocontext_jax.jobs.extensions import Extensions, import_object
        from autocontext_jax.jobs.run import Paths, run

        given = full_path(MODEL.value or WORKDIR.value)
        paths = Paths(
            workdir=given,
            model=given if MODEL.value and not given.is_dir() else None,
            source=full_path(INPUT.value),
            series=SERIES.value,
            target=full_path(OUTPUT.value) if OUTPUT.value else None,
        )
        networks = {path.rpartition(":")[2]: import_object(path, "--network") for path in NETWORK.value}
        return 0 if run(MODE.value, config, paths, Extensions(networks)) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _with_kept_keys(config: ConfigDict) -> ConfigDict:
    """The configuration in which a plan keeps the keys that the command line sets, whatever their values."""
    if isinstance(config.get("plan"), ConfigDict) and config.plan.get("automatic"):
        named = [key for key in config_flags.get_override_values(flags.FLAGS["config"]) if not key.startswith("plan.")]
        config.plan.keep = tuple(dict.fromkeys((*config.plan.keep, *named)))
    return config


def command() -> None:
    """The command `autocontext`."""
    sys.exit(main(sys.argv))


def _requests_text(argv: list[str]) -> bool:
    """Whether the command line only requests a text, such as --help; without flags it does too."""
    return len(argv) == 1 or not {"--help", "-h", "-help", "--help-keys", "--version"}.isdisjoint(argv)


def _parse(argv: list[str]) -> None:
    """Reads the flags; without --config, the modes that only use a model take its own configuration.

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
        if MODEL.value and (MODE.value != "predict" or WORKDIR.value or files):
            raise UserError("--model is given; expected it with --mode predict, and without --workdir and --config")
        if not (WORKDIR.value or MODEL.value) or CONFIG.value is None:
            raise UserError(
                "expected --workdir FOLDER, and --config FILE unless the run in that folder is only used; or --mode "
                "predict with --model FILE. --help explains all flags"
            )
        if MODE.value == "predict" and not (INPUT.value and OUTPUT.value):
            raise UserError("--mode predict requires --input SCAN_OR_FOLDER and --output PATH")
        CONFIG.value.to_dict()  # a file that could not be loaded says so only when it is used
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError, SyntaxError, MemoryError) as error:
        # MemoryError: so many brackets that Python's parser gives up.
        from autocontext_jax.jobs.help import of_another_type

        text = " ".join(str(error).split())
        raise UserError(of_another_type(text) or f"command line: {text}") from error


def _with_saved_config(argv: list[str]) -> list[str]:
    """Adds the configuration of the run folder or model file as --config, for the modes that only use a model."""
    from autocontext_jax.jobs import run, saved_config

    flags.FLAGS([argv[0], *(argument for argument in argv[1:] if not argument.startswith("--config."))])
    place, mode = MODEL.value or WORKDIR.value, MODE.value
    flags.FLAGS.unparse_flags()
    if not place or mode not in run.USES:
        return argv
    saved_config.get_config(place)  # one line if it cannot be read
    return [argv[0], f"--config={saved_config.__file__}:{place}", *argv[1:]]


if __name__ == "__main__":
    command()
