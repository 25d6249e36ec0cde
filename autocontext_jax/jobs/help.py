"""What --help and --help-keys print."""

import dataclasses
import itertools
import re
import signal
import textwrap
import typing
from collections.abc import Sequence

from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.runtime import package_version
from autocontext_jax.sections import explained, keys

USAGE = """Trains multi-scale pyramids of 3D U-Nets with auto-context, and segments whole scans with them.

usage: autocontext --config FILE --workdir FOLDER [--config.SECTION.KEY=VALUE ...]
       autocontext --mode MODE --workdir FOLDER [...]
       autocontext --mode predict --model FILE --input SCAN --output MASK

--mode is one of
  all       prepare, train and evaluate; goes on where an earlier start stopped (the default)
  plan      choose a configuration for the data set and the device, with reasons: configs/auto.py
  prepare   write the data set's image pyramids
  train     train to the end, or on from the newest checkpoint
  evaluate  predict and score the scans that were held out
  predict   write the mask of a scan, of a DICOM folder or of every scan in a folder
  report    write report.html: tables, curves and pictures of an evaluation
  export    write the trained model as one file, NAME.autocontext

examples
  autocontext --config configs/quickstart.py --workdir runs/quickstart
  autocontext --config configs/abdomen_ct.py --workdir runs/mine --config.data.root=/data/mine
  autocontext --mode predict --model liver.autocontext --input scan.nii.gz --output mask.nii.gz

flags
{flags}
A config file is a Python file with a function get_config(); those in configs/ are the examples. --help-keys lists every
key of a configuration with its type, its default and its meaning."""


def show(argv: Sequence[str], flags: dict[str, str]) -> None:
    """Prints what a command line requests: the version, the keys of a configuration, or the usage.

    Args:
      argv: the command line.
      flags: the name of each flag and its meaning, as absl gives it.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `autocontext --help-keys | head` ends without an error
    if "--version" in argv:
        print(f"autocontext_jax {package_version()}")
    elif "--help-keys" in argv:
        print(key_list(), end="")
    else:
        width = max(map(len, flags)) + 2
        # absl puts a flag's choices before its meaning, and how to repeat it behind.
        meanings = {name: text.partition(">: ")[2] or text.partition(";\n")[0] for name, text in flags.items()}
        print(USAGE.format(flags="".join(f"  --{name:{width}}{text}\n" for name, text in meanings.items())))


def key_list() -> str:
    """The text of --help-keys: each key of a configuration with its type, its default and its meaning."""
    return "\n".join(_lines(RunConfig, RunConfig(), "")) + "\n"


# What ml_collections says where a config file sets a key to a value of another type than the default's.
OTHER_TYPE = re.compile(
    r"field '(?P<name>\w+)'.*?\)\. (?P<value>.*) is of original type .* to type <class '(?P<type>\w+)'>"
)


def of_another_type(message: str) -> str:
    """One line for a value of another type in a config file, with what the key means.

    Args:
      message: of the error that ml_collections raised.

    Returns:
      "" if it is about something else.
    """
    match = OTHER_TYPE.search(message)
    if match is None:
        return ""
    lines = key_list().splitlines()
    key = re.compile(rf"(?P<key>(\w+\.)*{match['name']}): (?P<type>{match['type']}\b.*?) = .*")
    for number, line in enumerate(lines):
        if found := key.fullmatch(line):
            meaning = itertools.takewhile(lambda text: text.startswith("    "), lines[number + 1 :])
            explained_as = " ".join(text.strip() for text in meaning)
            return f"config key {found['key']} is {match['value']}; expected {found['type']}: {explained_as}"
    return ""


def _lines(kind: type, defaults: typing.Any, prefix: str) -> list[str]:
    sections, lines, meanings = [], [], explained(kind)
    for name, type_ in keys(kind).items():
        default = getattr(defaults, name)
        if dataclasses.is_dataclass(type_):
            sections += ["", *_lines(type(default), default, f"{prefix}{name}.")]
        else:
            lines.append(f"{prefix}{name}: {_type_name(type_)} = {default!r}")
            lines += textwrap.wrap(meanings[name], 112, initial_indent="    ", subsequent_indent="    ")
    return lines + sections


def _type_name(type_: typing.Any) -> str:
    items = typing.get_args(type_)
    if not items:
        return type_.__name__
    return f"tuple[{', '.join('...' if item is Ellipsis else _type_name(item) for item in items)}]"
