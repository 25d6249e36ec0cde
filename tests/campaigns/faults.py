"""Does a run survive what happens on real machines: kills, full disks, flipped bits, lost scans, other processes?

    python tests/campaigns/faults.py [--faults 232] [--seed 0 [1 2 ...]] [--kinds NAME ...] [--keep FOLDER]

One undisturbed run on tiny phantoms is the reference (and a second one, shared by two processes). Each fault strikes a
work directory of its own, copied from a stage of the reference, in a job of the command line. A fault is survived when

- the job either succeeds, or ends with status 2 and one line "error: ..." that names the file at fault, no traceback;
  an evaluation goes on after a scan that fails, and ends with status 1 and a line for each of them;
- after the remedy in that line and nothing else (room on the disk, a folder deleted, a file put back), the same command
  succeeds and goes on from the newest whole checkpoint that there was when the fault struck;
- what is there then equals the reference to the bit: the prepared store, the losses of every step, every array of every
  checkpoint, the voxels of the predictions, `evaluation.json`, the other JSON files.

Anything else counts as "lost or silently wrong", and its story is printed. `skipped`, in the last line, counts the
faults that could not be made (mounting file systems needs root). `--faults` is the number for each seed; the table is
over all seeds. The seed decides when a kill strikes, but not what the job does at that moment; other faults are the
same for the same seed. Ctrl-C ends the campaign early, with its table. The status is 1 if a fault was not survived.
"""

import argparse
import collections
import contextlib
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fault_contents import ContentReader
from fault_jobs import RUNNING, NotPossible, Wrong
from fault_kinds import KINDS
from fault_runs import UndisturbedRun
from results import print_results


def main() -> None:
    """Runs the campaign and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=sum(kind.share for kind in KINDS.values()), help="of each seed")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME", help=", ".join(KINDS))
    parser.add_argument("--keep", type=Path, help="a folder for the work directories of faults that were not survived")
    flags = parser.parse_args()

    order = [(seed, name) for seed in flags.seed for name in evenly(flags.kinds, flags.faults)]
    outcomes: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in flags.kinds}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, contextlib.suppress(KeyboardInterrupt):
        import_everything(Path(temporary))
        reference = UndisturbedRun(Path(temporary) / "reference", ContentReader())
        counts: collections.Counter[tuple[int, str]] = collections.Counter()
        for number, (seed, name) in enumerate(order):
            folder = Path(temporary) / f"{number}_{name}"
            folder.mkdir()
            began = time.monotonic()
            rng = random.Random(f"{seed} {name} {counts[seed, name]}")
            counts[seed, name] += 1
            try:
                KINDS[name].strike(reference, rng, folder)
                outcome, story = "survived", ""
            except NotPossible as reason:
                outcome, story = "skipped", str(reason)
            except Exception as error:  # whatever it is, the campaign goes on and reports it
                outcome, story = "wrong", str(error) if isinstance(error, Wrong) else repr(error)
                if flags.keep:
                    shutil.copytree(folder, flags.keep / f"seed_{seed}_{folder.name}", dirs_exist_ok=True)
            outcomes[name][outcome] += 1
            about = f"{number + 1}/{len(order)} {name}, seed {seed}: {outcome}"
            print(f"{about} {time.monotonic() - began:.1f} s {story}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    for pid in RUNNING:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    rows = table(outcomes)
    print_results(
        rows,
        packages=("orbax-checkpoint", "tensorstore"),
        flags={"faults": flags.faults, "seed": flags.seed, "kinds": flags.kinds},
        minutes=(time.monotonic() - started) / 60,
        skipped={name: count["skipped"] for name, count in outcomes.items() if count["skipped"]},
    )
    sys.exit(rows[-1]["lost or silently wrong"] > 0)


def evenly(names: list[str], faults: int) -> list[str]:
    """Kinds of faults in an order in which each has its share of any number, and one at least if there are enough."""
    shares = sum(KINDS[name].share for name in names)
    turns = [
        (turn / KINDS[name].share, name) for name in names for turn in range(-(-KINDS[name].share * faults // shares))
    ]
    return [name for _, name in sorted(turns)[:faults]]


def import_everything(folder: Path) -> None:
    """Imports all that jobs import, before any job is forked, and settles how they compile.

    Half of a run's seconds would be XLA's: it need not try hard, and need not compile again what it can keep.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for module in ("jobs.evaluate", "jobs.experiment", "jobs.predict", "jobs.report", "jobs.train"):
        importlib.import_module(f"autocontext_jax.{module}")
    importlib.import_module("matplotlib.backends.backend_agg")


def table(outcomes: dict[str, collections.Counter[str]]) -> list[dict[str, Any]]:
    """A row for each kind of fault that was tried, and one for all."""
    rows: list[dict[str, Any]] = [
        {
            "fault": KINDS[name].fault,
            "job": KINDS[name].job,
            "tried": count["survived"] + count["wrong"],
            "survived": count["survived"],
            "lost or silently wrong": count["wrong"],
        }
        for name, count in outcomes.items()
    ]
    total: dict[str, Any] = {"fault": "all", "job": ""}
    return [*rows, total | {key: sum(row[key] for row in rows) for key in list(rows[0])[2:]}]


if __name__ == "__main__":
    main()
