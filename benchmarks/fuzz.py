"""Does any file, however broken, crash, hang or exhaust a reader, or is each read or refused with one line?

    python benchmarks/fuzz.py [--inputs 100000] [--seed 0] [--readers NAME ...] [--keep FOLDER]

Every reader starts from small valid files that the package itself wrote. An input is one of those, or an earlier input
that was kept, changed in one to four places: bits, numbers and slices anywhere; fields of a NIfTI header; lines of a
text header; nodes of a JSON tree; the inside of what gzip packed. It is kept to be changed further when it is the first
to reach some line of the package (seen by `sys.settrace`) or, since the formats are decoded by libraries that no line
of ours shows, the first of a new wording of refusal.

Readers run in a process of their own, which is started again when it dies. An input fails when the reader raises
anything but a `UserError`, raises one of several lines, ends the process, takes more than 10 s, grows the process by
more than 64 MiB of resident memory, or asks for more than 1 GiB beside what is there (all inputs are under 1 MiB).
`--keep` saves the inputs that failed. The same flags make the same inputs as long as the same lines are reached.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mutations import mutate

import autocontext_jax
from autocontext_jax.data import preparation, scans
from autocontext_jax.data.datasets import Case, read_dataset, split, split_from_file
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.errors import UserError
from autocontext_jax.jobs import config as configuration
from autocontext_jax.jobs.checks import check

PACKAGE = str(Path(autocontext_jax.__file__).parent)
SECONDS, GROWTH, ADDRESSES = 10.0, 2**26, 2**30  # the limits of one input: s, bytes, bytes
KEPT = 400  # inputs a reader keeps at most; the oldest of them leaves

SIZE, LABELS = (6, 5, 4), ("background", "artery", "vein")

# What is written over a part of the reader's folder: path -> bytes.
Input = dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader and where its inputs come from.

    Attributes:
      share: of all inputs.
      write: fills an empty folder with valid files.
      mutable: a pattern of the paths in that folder that are changed.
      read: reads the folder; called in the other process.
      fresh: whether reading changes the folder, so that each input needs a new one.
    """

    share: float
    write: Callable[[Path], None]
    mutable: str
    read: Callable[[Path], object]
    fresh: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an input.

    Attributes:
      kind: `read`, `refused` or `failed`.
      text: the refusal, or how it failed.
      seconds: that the reader took.
      lines: of the package, as "file:line", that this process had not reached before.
    """

    kind: str
    text: str = ""
    seconds: float = 0.0
    lines: frozenset[str] = frozenset()


# ---- the readers: valid files, and how they are read


def write_scans(folder: Path, suffix: str) -> None:
    """An image, a label map on its grid, and an image of floats."""
    rng = np.random.default_rng(0)
    scans.write_scan(folder / f"image{suffix}", rng.integers(-1000, 1000, SIZE, np.int16), (2.5, 0.8, 0.7))
    scans.write_scan(folder / f"label{suffix}", rng.integers(0, 3, SIZE, np.uint8), (2.5, 0.8, 0.7))
    scans.write_scan(folder / f"float{suffix}", rng.normal(size=SIZE).astype(np.float32), (2.5, 0.8, 0.7))


def write_plain_scans(folder: Path, suffix: str) -> None:
    """The same, not compressed; .mhd with its voxels in a second file."""
    import SimpleITK as sitk

    write_scans(folder, ".mha")
    for path in sorted(folder.iterdir()):
        sitk.WriteImage(sitk.ReadImage(str(path)), str(path.with_suffix(suffix)), useCompression=False)
        if suffix != ".mha":
            path.unlink()


def read_scans(folder: Path, suffix: str) -> None:
    """All that is done with a scan's file: its grid, its voxels, and the label map on it."""
    scans.read_grid(folder / f"image{suffix}")
    scan = scans.read_scan(folder / f"image{suffix}")
    scans.read_label(folder / f"label{suffix}", labels=range(3), like=scan.grid, case="a")
    scans.read_scan(folder / f"float{suffix}")


def write_series(folder: Path) -> None:
    """Three slices of CT."""
    import SimpleITK as sitk

    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(3):
        image = sitk.GetImageFromArray(np.full(SIZE[1:], k, np.int16))
        place = {
            "0008|0060": "CT",
            "0020|000e": "1.2.3",
            "0020|0032": f"0\\0\\{2.5 * k}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for key, value in {"0008|0018": f"1.2.3.{k}", "0020|000d": "1.2", **place}.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{k}.dcm"))
        writer.Execute(image)


def write_nnunet(folder: Path) -> None:
    """The nnU-Net v2 layout with empty scans, which no reader of layouts opens."""
    description = {"channel_names": {"0": "CT"}, "labels": {name: k for k, name in enumerate(LABELS)}}
    description |= {"numTraining": 2, "file_ending": ".nii.gz"}
    _write_layout(folder, description, "_0000")


def write_msd(folder: Path) -> None:
    """The Medical Segmentation Decathlon's layout, likewise."""
    pairs = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in "ab"]
    description = {"modality": {"0": "CT"}, "labels": {str(k): name for k, name in enumerate(LABELS)}}
    _write_layout(folder, description | {"training": pairs, "test": ["./imagesTs/c.nii.gz"]}, "")


def _write_layout(folder: Path, description: dict[str, Any], channel: str) -> None:
    for place in (f"imagesTr/a{channel}", f"imagesTr/b{channel}", "labelsTr/a", "labelsTr/b", f"imagesTs/c{channel}"):
        path = folder / f"{place}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def read_layout(folder: Path) -> None:
    """The layout and its split, as `jobs/prepare.py` takes them."""
    split(read_dataset(folder).training, fraction=0.5, seed=0)


def write_splits(folder: Path) -> None:
    """Two folds."""
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["b", "c"], "val": ["a"]}]
    (folder / "splits_final.json").write_text(json.dumps(folds), encoding="utf-8")


def read_splits(folder: Path) -> None:
    """Both folds."""
    cases = [Case(name, Path(name), None) for name in "abc"]
    for fold in range(2):
        split_from_file(cases, folder / "splits_final.json", fold)


def write_store(folder: Path) -> None:
    """A prepared case of two levels."""
    size = (2 * SIZE[0], 2 * SIZE[1], 2 * SIZE[2])
    rng = np.random.default_rng(0)
    case = Case("a", folder / "image.nii", folder / "label.nii")
    scans.write_scan(case.image, rng.integers(-1000, 1000, size, np.int16), (2.5, 0.8, 0.7))
    scans.write_scan(folder / "label.nii", rng.integers(0, 3, size, np.uint8), (2.5, 0.8, 0.7))
    preparation.prepare_case(case, str(folder), LevelGrids((2, 1)), LABELS)


def read_store(folder: Path) -> None:
    """What the feed reads of a case: its description, a crop of each level, a voxel of each class."""
    case = PreparedCase.open(str(folder), "a")
    for level in range(1, len(case.shapes) + 1):
        case.read(level, (-2, 0, 1), (8, 8, 8)).result()
    for entry in (0, case.foreground_offsets[-1] - 1):
        case.foreground_voxel(entry)


def write_checkpoints(folder: Path) -> None:
    """Two checkpoints of a small state."""
    import jax
    import jax.numpy as jnp

    from autocontext_jax.training.checkpoints import Checkpoints

    checkpoints = Checkpoints(folder / "c")
    for step in (1, 2):
        state = {"kernel": jax.random.normal(jax.random.key(step), (3, 5)), "step": jnp.asarray(step, jnp.int32)}
        checkpoints.save(step, state, {"next_index": step}, dice=step / 3)
    checkpoints.close()


def read_checkpoints(folder: Path) -> None:
    """The newest is read or refused; then it is set aside if it is damaged, and the run goes on from what is whole."""
    import jax
    import jax.numpy as jnp

    from autocontext_jax.training.checkpoints import Checkpoints

    like = jax.eval_shape(lambda: {"kernel": jnp.zeros((3, 5)), "step": jnp.asarray(0, jnp.int32)})
    with contextlib.closing(Checkpoints(folder / "c")) as checkpoints:
        refusal = None
        try:
            checkpoints.restore(2, like)
        except UserError as error:
            refusal = error
        checkpoints.set_damaged_aside()
        checkpoints.restore(checkpoints.latest or 0, like)
        if refusal:
            raise refusal


def write_config_json(folder: Path) -> None:
    """The defaults, with a data set's labels."""
    config = configuration.default_config()
    config.data.labels = LABELS
    configuration.write_config(config, folder)


def read_config_json(folder: Path) -> None:
    """As a run does that goes on in the work directory."""
    saved = configuration.read_config(folder)
    if saved is not None:
        config = configuration.default_config()
        config.data.labels = tuple(saved["data"]["labels"])
        configuration.check_same_run(config, saved, folder)


def write_overrides(folder: Path) -> None:
    """Every key with its default as on a command line, five an argument list."""
    lines = []
    for key, value in configuration.default_config().to_dict().items():
        section = value if isinstance(value, dict) else {"": value}
        lines += [f"--config.{key}{'.' * bool(inner)}{inner}={item}" for inner, item in section.items()]
    for start in range(0, len(lines), 5):
        (folder / f"{start:03}.flags").write_text("\n".join(lines[start : start + 5]), encoding="utf-8")
    (folder / "config.py").write_text("from autocontext_jax.jobs.config import default_config as get_config\n")


def read_overrides(folder: Path) -> None:
    """Parses the command line, checks the configuration and takes it apart as the jobs do."""
    from absl import flags

    from autocontext_jax import main

    changed = max(folder.glob("*.flags"), key=lambda path: path.stat().st_mtime_ns)
    lines = [line for line in changed.read_text("utf-8", "replace").split("\n") if line.startswith("--config.")]
    sys.argv = ["main", f"--config={folder / 'config.py'}", f"--workdir={folder}", *lines]  # where ml_collections looks
    flags.FLAGS.unparse_flags()
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    main._parse(sys.argv)
    config = main.CONFIG.value
    check(config)
    config.data.labels = LABELS
    spacing = configuration.settings(config).level_factors((2.5, 0.8, 0.7))
    assert len(spacing) == len(config.levels.factors)
    for phase in configuration.training_phases(config):
        configuration.loss(config, phase)
        configuration.feed(config, phase)
    json.dumps(config.to_dict())


def _scan_reader(suffix: str, share: float, write: Callable[[Path, str], None] = write_scans) -> Reader:
    pattern = r".*\.(mhd|raw)" if suffix == ".mhd" else f".*{re.escape(suffix)}"
    return Reader(share, lambda folder: write(folder, suffix), pattern, lambda folder: read_scans(folder, suffix))


READERS = {
    "scan .nii": _scan_reader(".nii", 0.05),
    "scan .nii.gz": _scan_reader(".nii.gz", 0.04),
    "scan .mha": _scan_reader(".mha", 0.03),
    "scan .mha, plain": _scan_reader(".mha", 0.03, write_plain_scans),
    "scan .mhd": _scan_reader(".mhd", 0.03, write_plain_scans),
    "scan .nrrd": _scan_reader(".nrrd", 0.03),
    "scan .nrrd, plain": _scan_reader(".nrrd", 0.03, write_plain_scans),
    "scan DICOM": Reader(0.03, write_series, r".*\.dcm", scans.read_scan),
    "dataset.json nnU-Net": Reader(0.19, write_nnunet, "dataset.json", read_layout),
    "dataset.json MSD": Reader(0.19, write_msd, "dataset.json", read_layout),
    "splits_final.json": Reader(0.16, write_splits, "splits_final.json", read_splits),
    "store": Reader(0.03, write_store, r"a\.ome\.zarr/.*", read_store),
    "checkpoint": Reader(0.0015, write_checkpoints, r"c/2/.*", read_checkpoints, fresh=True),
    "config.json": Reader(0.13, write_config_json, r"config\.json", read_config_json),
    "overrides": Reader(0.03, write_overrides, r".*\.flags", read_overrides),
}


# ---- the process that reads


def work(connection: multiprocessing.connection.Connection, name: str, folder: Path) -> None:
    """Reads one input after the other until the other end is closed.

    Args:
      connection: gives inputs, takes outcomes.
      name: of the reader.
      folder: holds the valid files.
    """
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reader = READERS[name]
    valid = {path: (folder / path).read_bytes() for path in _files(folder)}
    reader.read(folder)  # all that is imported or kept by the first call is no input's fault
    if reader.fresh:
        _restore(folder, valid)
    limit = _memory("VmSize") + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    seen: set[str] = set()
    with contextlib.suppress(EOFError):
        while True:
            changed: Input = connection.recv()
            for path, content in changed.items():
                (folder / path).write_bytes(content)
            connection.send(_observe(reader, folder, seen))
            if reader.fresh:
                _restore(folder, valid)
            else:
                for path in changed:
                    (folder / path).write_bytes(valid[path])


def _observe(reader: Reader, folder: Path, seen: set[str]) -> Outcome:
    hits: set[tuple[str, int]] = set()

    def local(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            hits.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def trace(frame: Any, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # begins to measure the peak anew
    before = _memory("VmRSS")
    outcome = Outcome("read")
    started = time.perf_counter()
    sys.settrace(trace)
    try:
        reader.read(folder)
    except UserError as error:
        sys.settrace(None)
        text = str(error)
        outcome = Outcome("refused", text)
        if len(text.splitlines()) != 1 or not text.isprintable():
            outcome = Outcome("failed", f"not one line: {text!r}")
        elif re.search(r"alloc|memory", text.replace(str(folder), ""), re.IGNORECASE):
            outcome = Outcome("failed", f"took memory before it refused: {text}")
    except Exception as error:  # whatever escapes a reader is what is looked for
        sys.settrace(None)
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if frame.filename.startswith(PACKAGE)]
        place = ours[-1] if ours else "none of our lines"
        outcome = Outcome("failed", f"{type(error).__name__} at {place}: {str(error)[:300]}")
    finally:
        sys.settrace(None)
    seconds = time.perf_counter() - started
    if (growth := _memory("VmHWM") - before) > GROWTH and outcome.kind != "failed":
        outcome = Outcome("failed", f"grew by {growth / 2**20:.0f} MiB: {outcome.text}")
    lines = {f"{Path(file).name}:{line}" for file, line in hits} - seen
    seen |= lines
    return dataclasses.replace(outcome, seconds=seconds, lines=frozenset(lines))


def _memory(key: str) -> int:
    """Bytes, as the system counts them for this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text("utf-8").splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _restore(folder: Path, valid: Input) -> None:
    shutil.rmtree(folder)
    for path, content in valid.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


class Worker:
    """The process that reads, started again when it died or hung."""

    def __init__(self, name: str, folder: Path):
        self._name, self._folder = name, folder
        self._valid = {path: (folder / path).read_bytes() for path in _files(folder)}
        self._process: Any = None

    def outcome(self, changed: Input) -> Outcome:
        """Of one input."""
        if self._process is None:
            _restore(self._folder, self._valid)
            context = multiprocessing.get_context("forkserver")  # of a process that has no threads yet
            context.set_forkserver_preload(["autocontext_jax.jobs.config", "autocontext_jax.training.checkpoints"])
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=work, args=(theirs, self._name, self._folder), daemon=True)
            self._process.start()
            theirs.close()
            self._waited = 60.0  # until it is there
        started = time.perf_counter()
        try:
            self._connection.send(changed)
            if self._connection.poll(SECONDS + self._waited):
                self._waited = 0.0
                return self._connection.recv()
        except (EOFError, ConnectionError):
            pass
        hung = self._process.is_alive() and time.perf_counter() - started > SECONDS
        self.close()
        text = f"took more than {SECONDS:g} s" if hung else f"the process ended ({self._ended})"
        return Outcome("failed", text, time.perf_counter() - started)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._connection.close()
            self._process.join(1)
            self._process.kill()
            self._process.join()
            self._ended, self._process = self._process.exitcode, None


# ---- the campaign


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
    paths = [path for path in _files(home) if re.fullmatch(reader.mutable, path)]
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
        "failed": counts["failed"],
        "kept for new coverage": kept,
        "slowest ms": 1e3 * slowest,
        "ms each": 1e3 * (time.perf_counter() - started) / count,
    }
    return row, failures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the campaign; 1 if an input failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--keep", type=Path, help="where inputs that failed are saved")
    flags = parser.parse_args(argv)
    shares = {name: READERS[name].share for name in flags.readers}
    rows: list[dict[str, Any]] = []
    failed: dict[str, list[str]] = {}
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    for name, share in shares.items():
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            count = max(1, -(-int(flags.inputs * share * 1e6) // int(sum(shares.values()) * 1e6)))
            row, failures = fuzz(name, count, flags.seed, Path(folder), flags.keep)
        rows.append(row)
        for text in failures.values():
            print(f"{name}: {text}", file=sys.stderr)
        failed |= {name: list(failures.values())} if failures else {}
        print(f"{name}: {row['ms each']:.2f} ms each", file=sys.stderr)
    from common import machine, report  # only now: it starts JAX, and processes are made of this one

    total = {"reader": "all", **{key: sum(row[key] for row in rows) for key in list(rows[0])[1:6]}}
    total["slowest ms"] = max(row["slowest ms"] for row in rows)
    report(
        [*rows, total],
        machine=machine("SimpleITK", "tensorstore", "orbax-checkpoint"),
        flags=vars(flags) | {"keep": str(flags.keep)},
        failures=failed,
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
