"""Does a run survive what machines do to it: kills, full disks, flipped bits, lost scans, a second run?

    python benchmarks/faults.py [--faults 200] [--seed 0] [--kinds NAME ...] [--keep FOLDER]

One undisturbed run on tiny phantoms is the reference. Every fault then strikes a work directory of its own, copied from
a stage of the reference, in one of the command line's jobs: its own process, forked from this one (which has imported
the package but started no device, so that a run takes seconds), killed with SIGKILL, put on a small file system that is
full or for reading only, given damaged files. A fault is survived when

- the job either succeeds, or ends with status 2 and one line "error: ..." that names the file at fault, no traceback;
  an evaluation goes on past a scan that fails and ends with status 1 and a line for each;
- a restart, after the remedy that line asks for and nothing else (room given back, a folder deleted), succeeds and goes
  on from the newest whole checkpoint that there was when the fault struck;
- what is there then equals the reference to the bit: the prepared store, the losses of every step, every array of every
  checkpoint, the predictions' voxels, `evaluation.json`.

Anything else is "lost or silently wrong", and its story is printed. The last line's `skipped` counts the faults that
this machine does not let us make (mounting wants root); Ctrl-C ends the campaign early with its table. When a kill
strikes is drawn from the seed, but not what the job is at just then; the others are the same for the same seed.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fault_runs import STEPS, TEST, UNDER_WAY, Campaign, Job, Wrong

DISK = 24 * 2**20  # bytes of the small file systems


class NotHere(Exception):
    """This machine does not let us make the fault."""


def newest(workdir: Path) -> int:
    """Step of the newest checkpoint that is whole, as its final name says; 0 if there is none."""
    folder = workdir / "checkpoints"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def went_on_from(text: str) -> int:
    """The step that a job said it goes on from."""
    found = re.search(r"from step (\d+)\n", text) or re.search(r"trained already: step (\d+)", text)
    return int(found[1]) if found else 0


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Callable[[], None]]:
    """A file system of `DISK` bytes at `path`; gives a function that makes it one for reading only, and back."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(path)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        raise NotHere("mounting is not permitted here")
    state = ["ro", "rw"]

    def turn() -> None:
        subprocess.run(["mount", "-o", f"remount,{state[0]}", str(path)], check=True, capture_output=True)
        state.reverse()

    try:
        yield turn
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True, capture_output=True)


def restart(campaign: Campaign, workdir: Path, job: str, least: int, steps: tuple[int, ...] = STEPS) -> None:
    """Starts the job again, which must succeed, go on from step `least` or later and end as the reference."""
    ended = Job(workdir, job).wait()
    if ended.error:
        raise Wrong(f"the restart failed: {ended.error}")
    if job in ("train", "all") and went_on_from(ended.text) < least:
        raise Wrong(f"went on from step {went_on_from(ended.text)}, though {least} was saved:\n{ended.text}")
    campaign.same(workdir, job, steps)


def named(error: str, *paths: Path) -> None:
    """The line names one of these, and what to do."""
    if not any(str(path) in error for path in paths):
        raise Wrong(f"names none of {[str(path) for path in paths]}: {error}")


def do_as_told(error: str, workdir: Path) -> None:
    """Deletes the folder that the line says to delete."""
    found = re.search(r"(?:checkpoint )?(\S+?) (?:cannot|is|has|holds) .*delete that folder", error)
    if not found or workdir not in Path(found[1]).parents or not Path(found[1]).is_dir():
        raise Wrong(f"says no folder to delete: {error}")
    shutil.rmtree(found[1])


# ---- the faults: each strikes in a new folder, and raises `Wrong` if it was not survived


def kill_prepare(campaign: Campaign, rng: random.Random, folder: Path) -> None:
    """At any moment, most often while the store is written; the run alone, or its workers with it."""
    workdir = folder / "run"
    campaign.copy(rng.choice(["new", "phantoms", "phantoms"]), workdir)
    job = Job(workdir, "prepare", "--config.data.workers=2")
    if rng.random() < 0.8:
        case = workdir / "prepared" / f"phantom_00{rng.randrange(3)}.ome.zarr"
        job.until(case.exists)
        time.sleep(rng.uniform(0, 0.03))
    else:
        time.sleep(rng.uniform(0, 2.5))
    workers = job.children()
    job.kill(group=rng.random() < 0.5)
    job.wait()
    deadline = time.monotonic() + 5
    while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            raise Wrong("the workers outlive the run")
        time.sleep(0.01)
    restart(campaign, workdir, "prepare", 0)


def kill_worker(campaign: Campaign, rng: random.Random, folder: Path) -> None:
    """One of the processes that prepare cases."""
    workdir = folder / "run"
    campaign.copy("phantoms", workdir)
    job = Job(workdir, "prepare", "--config.data.workers=2")
    workers: list[int] = []

    def started() -> bool:
        workers[:] = job.children()
        return len(workers) == 2

    job.until(started)
    time.sleep(rng.uniform(0, 1.5))
    with contextlib.suppress(ProcessLookupError, IndexError):
        os.kill(rng.choice(workers), signal.SIGKILL)
    error = job.wait().error
    if error and "prepare: the system ended one of 2 workers" not in error:
        raise Wrong(error)
    restart(campaign, workdir, "prepare", 0)


def kill_train(campaign: Campaign, rng: random.Random, folder: Path) -> None:
    """At any moment, while a checkpoint is written, or between two."""
    workdir = folder / "run"
    campaign.copy(rng.choice(["prepared", "prepared", "8"]), workdir)
    before = newest(workdir)
    job = Job(workdir, "train")
    step = rng.choice([step for step in STEPS if step > before])
    moment = rng.choice(["write", "write", "between", "any"])
    if moment == "write":
        job.until(lambda: any((workdir / "checkpoints").glob(f"{step}.*")))
        time.sleep(rng.uniform(0, 0.1))
    elif moment == "between":
        job.until((workdir / "checkpoints" / str(step)).exists)
        time.sleep(rng.uniform(0, 0.1))
    else:
        time.sleep(rng.uniform(0, 4))
    job.kill(group=rng.random() < 0.5)
    saved = newest(workdir)
    job.wait()
    restart(campaign, workdir, rng.choice(["train", "train", "all"]), saved)


def kill_evaluate(campaign: Campaign, rng: random.Random, folder: Path) -> None:
    """At any moment, or while masks, pictures or tables are written."""
    workdir = folder / "run"
    campaign.copy("trained", workdir)
    job = Job(workdir, "evaluate")
    what = rng.choice(["", "predictions", "pictures", "evaluation.json*", "table*"])
    if what:
        job.until(lambda: any(path.is_file() for path in [*workdir.glob(what), *workdir.glob(f"{what}/*")]))
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 2.5))
    job.kill()
    job.wait()
    restart(campaign, workdir, "evaluate", 0)


def predict(campaign: Campaign, workdir: Path, target: Path) -> Job:
    """A job that predicts the reference's test scan."""
    scan = campaign.reference / "phantoms" / "imagesTs" / f"{TEST}_0000.nii.gz"
    return Job(workdir, "predict", "--input", scan, "--output", target)


def predicted_same(campaign: Campaign, target: Path) -> None:
    """Raises `Wrong` unless the mask is that of the reference."""
    import SimpleITK as sitk

    wanted = sitk.ReadImage(campaign.reference / "predictions" / f"{TEST}.nii.gz")
    found = sitk.ReadImage(target)
    same = sitk.GetArrayFromImage(found).tobytes() == sitk.GetArrayFromImage(wanted).tobytes()
    if not same or found.GetOrigin() != wanted.GetOrigin() or found.GetDirection() != wanted.GetDirection():
        raise Wrong("the mask is not that of the undisturbed run")


def predict_again(campaign: Campaign, workdir: Path, target: Path) -> None:
    """Which must succeed, leave the right mask and nothing else."""
    if error := predict(campaign, workdir, target).wait().error:
        raise Wrong(f"the restart failed: {error}")
    predicted_same(campaign, target)


def kill_predict(campaign: Campaign, rng: random.Random, folder: Path) -> None:
    """At any moment, or while the mask is written; a mask that is there must be whole."""
    workdir, target = folder / "run", folder / "out" / "mask.nii.gz"
    campaign.copy("trained", workdir)
    job = predict(campaign, workdir, target)
    if rng.random() < 0.5:
        job.until(target.parent.exists)
        time.sleep(rng.uniform(0, 0.01))
    else:
        time.sleep(rng.uniform(0, 2))
    job.kill()
    job.wait()
    if target.exists():
        predicted_same(campaign, target)
    predict_again(campaign, workdir, target)


def full_disk(job: str, stage: str, most: int) -> Callable[[Campaign, random.Random, Path], None]:
    """The work directory's disk has between 0 and `most` bytes left when the job begins."""

    def fault(campaign: Campaign, rng: random.Random, folder: Path) -> None:
        workdir = folder / "run"
        with small_disk(workdir):
            campaign.copy(stage, workdir)
            saved, ballast, target = newest(workdir), workdir / "ballast", workdir / "out" / "mask.nii.gz"
            free = os.statvfs(workdir).f_bavail * os.statvfs(workdir).f_frsize
            ballast.write_bytes(bytes(max(0, free - rng.randrange(most) // 4096 * 4096)))
            run = predict(campaign, workdir, target) if job == "predict" else Job(workdir, job)
            if error := run.wait().error:
                named(error, workdir)
                if not re.search(r"room|space", error):
                    raise Wrong(f"says nothing of the disk's room: {error}")
            saved = max(saved, newest(workdir))
            ballast.unlink()
            if job == "predict":
                predict_again(campaign, workdir, target)
            else:
                restart(campaign, workdir, job, saved)

    return fault


def read_only(job: str, stage: str) -> Callable[[Campaign, random.Random, Path], None]:
    """The work directory lies on a file system for reading only; a mask may be written elsewhere."""

    def fault(campaign: Campaign, rng: random.Random, folder: Path) -> None:
        workdir = folder / "run"
        with small_disk(workdir) as turn:
            campaign.copy(stage, workdir)
            saved = newest(workdir)
            inside = rng.random() < 0.5
            target = (workdir if inside else folder) / "out" / "mask.nii.gz"
            turn()
            run = predict(campaign, workdir, target) if job == "predict" else Job(workdir, job)
            error = run.wait().error
            if job == "predict" and not inside:
                if error:
                    raise Wrong(error)
                predicted_same(campaign, target)
                return
            if not error:
                raise Wrong("nothing was said")
            named(error, workdir)
            turn()
            if job == "predict":
                predict_again(campaign, workdir, target)
            else:
                restart(campaign, workdir, job, saved)

    return fault


def spoil(path: Path, rng: random.Random) -> None:
    """One to three flipped bits, a file cut short, emptied or gone."""
    data = bytearray(path.read_bytes())
    how = rng.choice(["flip"] * 4 + ["cut", "empty", "lose"])
    if how == "flip" and data:
        for _ in range(rng.choice([1, 1, 3])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif how == "lose":
        path.unlink()
    else:
        path.write_bytes(data[: rng.randrange(len(data))] if how == "cut" and data else b"")


def any_file(folder: Path, rng: random.Random) -> Path:
    """One of the files in a folder, at any depth."""
    return rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


def damaged_checkpoint(job: str) -> Callable[[Campaign, random.Random, Path], None]:
    """Any file of any checkpoint is damaged."""

    def fault(campaign: Campaign, rng: random.Random, folder: Path) -> None:
        workdir, target = folder / "run", folder / "mask.nii.gz"
        stage = "8" if job == "train" else "trained"
        campaign.copy(stage, workdir)
        step = rng.choice([4, 8, 8]) if job == "train" else rng.choice([8, 12, 12])
        spoil(any_file(workdir / "checkpoints" / str(step), rng), rng)
        run = predict(campaign, workdir, target) if job == "predict" else Job(workdir, job)
        ended = run.wait()
        if job == "train":
            if ended.error:
                raise Wrong(ended.error)
            aside = step == 8 and (workdir / "damaged" / "8").exists()
            if went_on_from(ended.text) != (4 if aside else 8):
                raise Wrong(f"went on from step {went_on_from(ended.text)}:\n{ended.text}")
            if aside and f"checkpoint {workdir / 'checkpoints' / '8'}" not in ended.text:
                raise Wrong(f"moved a checkpoint and did not name it:\n{ended.text}")
            # What was damaged and is not read stays as it is.
            campaign.same(workdir, "train", STEPS if aside else tuple(s for s in STEPS if s != step))
            return
        if not ended.error:
            if job == "predict":
                predicted_same(campaign, target)
            else:
                campaign.same(workdir, job, tuple(s for s in STEPS if s != step))
            return
        named(ended.error, workdir / "checkpoints" / str(step))
        do_as_told(ended.error, workdir)
        if job == "predict":  # the newest is wanted: it is trained again
            restart(campaign, workdir, "train", 0, tuple(s for s in STEPS if s != step or step == 12))
            predict_again(campaign, workdir, target)
        else:
            restart(campaign, workdir, "all", 8 if step == 12 else 12, (4, 8, 12) if step == 12 else (4, 12))

    return fault


def damaged_store(campaign: Campaign, rng: random.Random, folder: Path) -> None:
    """Any file of the prepared data set is damaged before it is trained on."""
    workdir = folder / "run"
    campaign.copy("8", workdir)
    case = workdir / "prepared" / f"phantom_00{rng.randrange(3)}.ome.zarr"
    spoil(any_file(case, rng), rng)
    ended = Job(workdir, "train").wait()
    if ended.error:
        named(ended.error, case)
        saved = newest(workdir)
        do_as_told(ended.error, workdir)
        restart(campaign, workdir, rng.choice(["train", "all"]), saved)
        return
    # Nothing was said: then it was made anew, or what was damaged was not read or does not count.
    found, wanted = campaign.state(workdir, "train"), campaign.state(campaign.reference, "train")
    if {k: v for k, v in found.items() if "prepared" not in k} != {
        k: v for k, v in wanted.items() if "prepared" not in k
    }:
        raise Wrong("trained on damaged data and said nothing")


def damaged_store_read(campaign: Campaign, rng: random.Random, folder: Path) -> None:
    """As above, by reading alone in one long-lived process: whatever is read is right or refused."""
    workdir = folder / "run"
    name = f"phantom_00{rng.randrange(3)}"
    shutil.copytree(campaign.reference / "prepared" / f"{name}.ome.zarr", workdir / f"{name}.ome.zarr")
    spoil(any_file(workdir, rng), rng)
    error, found = campaign.read(workdir, name)
    if error:
        if "\n" in error or not error.startswith("error: "):
            raise Wrong(error)
        named(error, workdir / f"{name}.ome.zarr")
        do_as_told(error, workdir)
    elif found != campaign.read(campaign.reference / "prepared", name)[1]:
        raise Wrong("read damaged data and said nothing")


def vanished(job: str) -> Callable[[Campaign, random.Random, Path], None]:
    """A scan or a label is gone."""

    def fault(campaign: Campaign, rng: random.Random, folder: Path) -> None:
        workdir = folder / "run"
        campaign.copy({"prepare": "phantoms", "train": "8", "evaluate": "trained"}[job], workdir)
        saved = newest(workdir)
        where = "Ts" if job == "evaluate" else "Tr"
        lost = [any_file(workdir / "phantoms" / f"{kind}{where}", rng) for kind in rng.choice(
            [("images",), ("labels",), ("images", "labels")])]  # fmt: skip
        if len(lost) == 2:  # of one case
            lost[1] = lost[0].parents[1] / f"labels{where}" / lost[0].name.replace("_0000", "")
        kept = {path: path.read_bytes() for path in lost}
        for path in lost:
            path.unlink()
        ended = Job(workdir, job).wait()
        unscored = f"{workdir / 'phantoms'}: test cases without a label are not scored: {TEST}"
        if not ended.error and unscored not in ended.text:
            raise Wrong(f"ran without {[path.name for path in lost]} and said nothing")
        named(ended.error or ended.text, workdir / "phantoms")
        for path, data in kept.items():
            path.write_bytes(data)
        restart(campaign, workdir, job, saved)

    return fault


def two_runs(job: str, stage: str) -> Callable[[Campaign, random.Random, Path], None]:
    """A second run begins in the work directory of one that is under way."""

    def fault(campaign: Campaign, rng: random.Random, folder: Path) -> None:
        workdir = folder / "run"
        campaign.copy(stage, workdir)
        first = Job(workdir, job)
        time.sleep(rng.uniform(0, 1.5))
        second = Job(workdir, job)
        ended = first.wait(), second.wait()
        refused = [run.error for run in ended if run.error]
        # An evaluation may be over before the second begins; training here takes seconds longer.
        few = 1 if job == "train" else 0
        if not few <= len(refused) <= 1 or not all("is in use by process" in error for error in refused):
            raise Wrong(f"wanted one to be refused: {refused}")
        if refused:
            named(refused[0], workdir)
        campaign.same(workdir, job)

    return fault


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault: the table's words, its share of a campaign, and what it does."""

    fault: str
    job: str
    share: int
    strike: Callable[[Campaign, random.Random, Path], None]


KINDS = {
    "kill_prepare": Kind("SIGKILL", "prepare", 20, kill_prepare),
    "kill_train": Kind("SIGKILL", "train", 26, kill_train),
    "kill_evaluate": Kind("SIGKILL", "evaluate", 12, kill_evaluate),
    "kill_predict": Kind("SIGKILL", "predict", 12, kill_predict),
    "full_prepare": Kind("full disk", "prepare", 4, full_disk("prepare", "phantoms", 120_000)),
    "full_train": Kind("full disk", "train", 9, full_disk("train", "prepared", 900_000)),
    "full_evaluate": Kind("full disk", "evaluate", 5, full_disk("evaluate", "trained", 120_000)),
    "full_predict": Kind("full disk", "predict", 4, full_disk("predict", "trained", 8_192)),
    "read_only_prepare": Kind("read-only work directory", "prepare", 2, read_only("prepare", "phantoms")),
    "read_only_train": Kind("read-only work directory", "train", 2, read_only("train", "8")),
    "read_only_evaluate": Kind("read-only work directory", "evaluate", 2, read_only("evaluate", "trained")),
    "read_only_predict": Kind("read-only work directory", "predict", 3, read_only("predict", "trained")),
    "checkpoint_train": Kind("damaged checkpoint", "train", 13, damaged_checkpoint("train")),
    "checkpoint_evaluate": Kind("damaged checkpoint", "evaluate", 10, damaged_checkpoint("evaluate")),
    "checkpoint_predict": Kind("damaged checkpoint", "predict", 8, damaged_checkpoint("predict")),
    "store_train": Kind("damaged store", "train", 7, damaged_store),
    "store_read": Kind("damaged store", "reading alone", 50, damaged_store_read),
    "vanished_prepare": Kind("vanished scan or label", "prepare", 3, vanished("prepare")),
    "vanished_train": Kind("vanished scan or label", "train", 3, vanished("train")),
    "vanished_evaluate": Kind("vanished scan or label", "evaluate", 3, vanished("evaluate")),
    "worker": Kind("killed data worker", "prepare", 8, kill_worker),
    "two_train": Kind("two runs at once", "train", 3, two_runs("train", "prepared")),
    "two_evaluate": Kind("two runs at once", "evaluate", 2, two_runs("evaluate", "trained")),
}


def main() -> None:
    """Strikes, and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=sum(kind.share for kind in KINDS.values()))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME", help=", ".join(KINDS))
    parser.add_argument("--keep", type=Path, help="a folder for the work directories of faults not survived")
    arguments = parser.parse_args()

    # All that jobs import, before any is forked; a device must not be started here.
    temporary = tempfile.TemporaryDirectory()
    # Half of a run's seconds are XLA's: it need not try hard, and need not compile again what it can keep.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(temporary.name) / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for module in ("jobs.evaluate", "jobs.experiment", "jobs.predict", "jobs.report", "jobs.train"):
        importlib.import_module(f"autocontext_jax.{module}")
    importlib.import_module("matplotlib.backends.backend_agg")

    kinds = {name: KINDS[name] for name in arguments.kinds}
    shares = sum(kind.share for kind in kinds.values())
    # Spread evenly: of any number of faults each kind has its share, and one at least if there are enough.
    order = sorted((turn / kind.share, name) for name, kind in kinds.items()
                   for turn in range(-(-kind.share * arguments.faults // shares)))[: arguments.faults]  # fmt: skip
    counts = {name: collections.Counter[str]() for name in kinds}
    started = time.monotonic()
    with temporary, contextlib.suppress(KeyboardInterrupt):
        campaign = Campaign(Path(temporary.name))
        for number, (_, name) in enumerate(order):
            folder = Path(temporary.name) / f"{number}_{name}"
            folder.mkdir()
            began = time.monotonic()
            try:
                kinds[name].strike(campaign, random.Random(f"{arguments.seed} {name} {counts[name].total()}"), folder)
                outcome, story = "survived", ""
            except NotHere as reason:
                outcome, story = "skipped", str(reason)
            except Exception as wrong:  # whatever it is, the campaign goes on and tells it
                outcome, story = "wrong", str(wrong) if isinstance(wrong, Wrong) else repr(wrong)
                if arguments.keep:
                    shutil.copytree(folder, arguments.keep / folder.name, dirs_exist_ok=True)
            counts[name][outcome] += 1
            seconds = time.monotonic() - began
            print(f"{number + 1}/{len(order)} {name}: {outcome} {seconds:.1f} s {story}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    for pid in UNDER_WAY:
        os.kill(pid, signal.SIGKILL)
    minutes = (time.monotonic() - started) / 60
    rows = [
        {
            "fault": kinds[name].fault,
            "job": kinds[name].job,
            "tried": count["survived"] + count["wrong"],
            "survived": count["survived"],
            "lost or silently wrong": count["wrong"],
        }
        for name, count in counts.items()
    ]
    total: dict[str, Any] = {"fault": "all", "job": ""}
    total |= {key: sum(int(str(row[key])) for row in rows) for key in list(rows[0])[2:]}
    skipped = {name: count["skipped"] for name, count in counts.items() if count["skipped"]}

    from common import machine, report  # only now: it starts JAX, and processes are made of this one

    flags = {"faults": arguments.faults, "seed": arguments.seed, "kinds": arguments.kinds}
    about = machine("orbax-checkpoint", "tensorstore")
    report([*rows, total], machine=about, flags=flags, minutes=minutes, skipped=skipped)
    sys.exit(total["lost or silently wrong"] > 0)


if __name__ == "__main__":
    main()
