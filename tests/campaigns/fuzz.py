"""Does any file, however broken, crash, hang or exhaust a reader, or is each read or refused with one line?

    python tests/campaigns/fuzz.py [--inputs 100000] [--seed 0 [1 2 ...]] [--readers NAME ...] [--keep FOLDER]

Every reader starts from small valid files. An input is one of those, or an earlier input that was kept, changed in one
to four places: bits, numbers and slices anywhere; fields of a NIfTI header; lines of a text header; elements of a DICOM
file; nodes of a JSON tree; the inside of what gzip packed. It is kept to be changed further when it is the first
to reach some line of the package (seen by `sys.settrace`) or, since the formats are decoded by libraries that no line
of ours shows, the first of a new wording of refusal.

Readers run in a process of their own, which is started again when it dies. An input fails when the reader raises
anything but a `UserError`, raises one of several lines, ends the process, takes more than 10 s, grows the process by
more than 64 MiB of resident memory, asks for more than 1 GiB beside what is there (all inputs are under 1 MiB), or
leaves files open. The same holds for the reading process that it has for some formats; but this one may crash, be
ended after 2 s, or be refused memory by its limit, where one line then says so. The table counts these.
`--keep` saves the inputs that failed. The table is over all seeds. The same flags make the same inputs as long as the
same lines are reached.
"""

import argparse
import collections
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuzz_process import LIMITED, Input, Worker, files_in
from fuzz_readers import READERS
from mutations import mutate
from results import print_results

KEPT = 400  # inputs that a reader keeps at most; the oldest of them leaves


def fuzz(
    name: str, count: int, seed: int, folder: Path, keep: Path | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Gives a reader changed files.

    Args:
      name: of `READERS`.
      count: inputs.
      seed: of the changes.
      folder: an empty one to work in, best in memory.
      keep: where inputs that failed are saved.

    Returns:
      A row of the table, and for each way to fail an example's text.
    """
    reader, rng = READERS[name], random.Random(f"{seed} {name}")
    home = folder / "files"
    home.mkdir(parents=True)
    reader.write(home)
    paths = [path for path in files_in(home) if re.fullmatch(reader.mutable, path)]
    valid = {path: (home / path).read_bytes() for path in paths}
    worker = Worker(name, home)
    corpus: collections.deque[Input] = collections.deque(maxlen=KEPT)
    counts: collections.Counter[str] = collections.Counter()
    lines: set[str] = set()
    wordings: set[str] = set()
    failures: dict[str, str] = {}
    slowest, kept = 0.0, 0
    started = time.perf_counter()
    for _ in range(count):
        base = dict(rng.choice(corpus)) if corpus and rng.random() < 0.5 else {}
        path = rng.choice(paths)
        other = valid[rng.choice(paths)]
        if corpus and rng.random() < 0.5:
            other = rng.choice([*rng.choice(corpus).values()])
        changed = base | {path: mutate(rng, path, base.get(path, valid[path]), other)}
        outcome = worker.outcome(changed)
        counts[outcome.kind] += 1
        counts["crashed"] += outcome.kind == "refused" and "the library that reads it crashed" in outcome.text
        counts["out of memory"] += outcome.kind == "refused" and LIMITED in outcome.text
        counts["out of time"] += outcome.kind == "refused" and "is not read after" in outcome.text
        slowest = max(slowest, outcome.seconds)
        plain = re.sub(r"'.*'|\".*\"|/[^ ]*|[^a-zA-Z ]+", "", outcome.text.replace(str(home), ""))
        wording = f"{outcome.kind} {plain[:60]}"
        if outcome.kind == "failed":
            if wording not in failures and keep:
                for path, content in changed.items():
                    target = keep / name.replace(" ", "_") / str(len(failures)) / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
            failures.setdefault(wording, outcome.text)
        elif outcome.lines - lines or wording not in wordings:
            corpus.append(changed)
            kept += 1
        lines |= outcome.lines
        wordings.add(wording)
    worker.close()
    row = {
        "reader": name,
        "inputs": count,
        "read": counts["read"],
        "refused with one line": counts["refused"],
        "of these crashed": counts["crashed"],
        "out of time": counts["out of time"],
        "out of memory": counts["out of memory"],
        "failed": counts["failed"],
        "kept for new coverage": kept,
        "slowest ms": 1e3 * slowest,
        "ms each": 1e3 * (time.perf_counter() - started) / count,
    }
    return row, failures


def total(rows: Sequence[dict[str, Any]], reader: str) -> dict[str, Any]:
    """One row of the table from several: numbers of inputs added up, the slowest, the mean time."""
    counts = ("inputs", "read", "refused with one line", "of these crashed", "out of time", "out of memory", "failed",
              "kept for new coverage")  # fmt: skip
    return {
        "reader": reader,
        **{key: sum(row[key] for row in rows) for key in counts},
        "slowest ms": max(row["slowest ms"] for row in rows),
        "ms each": sum(row["ms each"] * row["inputs"] for row in rows) / sum(row["inputs"] for row in rows),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the campaign; 1 if an input failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="of each seed, for all readers together")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--keep", type=Path, help="a folder in which inputs that failed are saved")
    flags = parser.parse_args(argv)
    shares = {name: READERS[name].share for name in flags.readers}
    rows: list[dict[str, Any]] = []
    failed: dict[str, list[str]] = collections.defaultdict(list)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    for seed in flags.seed:
        for name, share in shares.items():
            count = max(1, -(-int(flags.inputs * share * 1e6) // int(sum(shares.values()) * 1e6)))
            keep = flags.keep and flags.keep / f"seed_{seed}"
            with tempfile.TemporaryDirectory(dir=memory) as folder:
                row, failures = fuzz(name, count, seed, Path(folder), keep)
            rows.append(row)
            for text in failures.values():
                failed[name].append(text)
                print(f"{name}, seed {seed}: {text}", file=sys.stderr)
            print(f"{name}, seed {seed}: {row['ms each']:.2f} ms each", file=sys.stderr)
    print_results(
        [*(total([row for row in rows if row["reader"] == name], name) for name in shares), total(rows, "all")],
        packages=("SimpleITK", "pydicom", "python-gdcm", "pyjpegls", "nibabel", "tensorstore", "orbax-checkpoint"),
        flags=vars(flags) | {"keep": str(flags.keep)},
        failures=failed,
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
