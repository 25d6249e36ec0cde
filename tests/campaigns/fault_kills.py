"""Faults that kill: SIGKILL of a run, of one of the processes that share a run, of a worker that prepares scans.

Each fault strikes in a new folder, and raises `Wrong` if the run did not survive it.
"""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

from fault_jobs import Job, Wrong, start
from fault_runs import STEPS, UndisturbedRun, compare_mask, newest, predict, predict_again, restart


def kill_prepare(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
    """At any moment, most often while the store is written; the run alone, or its workers with it."""
    workdir = folder / "run"
    reference.copy(rng.choice(["new", "phantoms", "phantoms"]), workdir)
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
    restart(reference, workdir, "prepare", 0)


def kill_worker(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
    """One of the processes that prepare cases."""
    workdir = folder / "run"
    reference.copy("phantoms", workdir)
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
    restart(reference, workdir, "prepare", 0)


def kill_train(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
    """At any moment, while a checkpoint is written, or between two."""
    workdir = folder / "run"
    reference.copy(rng.choice(["prepared", "prepared", "8"]), workdir)
    job = Job(workdir, "train")
    _wait_for_a_moment(job, workdir, rng)
    job.kill(group=rng.random() < 0.5)
    saved = newest(workdir)
    job.wait()
    restart(reference, workdir, rng.choice(["train", "train", "all"]), saved)


def _wait_for_a_moment(job: Job, workdir: Path, rng: random.Random) -> None:
    """Of a training run: while a checkpoint is written, between two, or any."""
    step = rng.choice([step for step in STEPS if step > newest(workdir)])
    moment = rng.choice(["write", "write", "between", "any"])
    if moment == "write":
        job.until(lambda: any((workdir / "checkpoints").glob(f"{step}.*")))
        time.sleep(rng.uniform(0, 0.1))
    elif moment == "between":
        job.until((workdir / "checkpoints" / str(step)).exists)
        time.sleep(rng.uniform(0, 0.1))
    else:
        time.sleep(rng.uniform(0, 4))


def kill_one_of_two(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
    """One of the two processes that train together. The other cannot go on; it is given some seconds to end.

    Both are then started again, and the end is compared with an undisturbed run of two processes.
    """
    workdir, of_two = folder / "run", reference.of_two_processes
    of_two.copy(rng.choice(["prepared", "prepared", "8"]), workdir)
    jobs = start(workdir, "train", processes=2)
    struck = rng.randrange(2)
    _wait_for_a_moment(jobs[0], workdir, rng)
    jobs[struck].kill(group=rng.random() < 0.5)
    other = jobs[1 - struck]
    # Schedulers end what is left of a run of which one process has died.
    other.until(lambda: False, seconds=10)
    if other.runs():
        other.kill(group=True)
    for job in jobs:
        job.wait()
    restart(of_two, workdir, "train", newest(workdir))


def kill_evaluate(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
    """At any moment, or while masks, pictures or tables are written."""
    workdir = folder / "run"
    reference.copy("trained", workdir)
    job = Job(workdir, "evaluate")
    what = rng.choice(["", "predictions", "pictures", "evaluation.json*", "table*"])
    if what:
        job.until(lambda: any(path.is_file() for path in [*workdir.glob(what), *workdir.glob(f"{what}/*")]))
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 2.5))
    job.kill()
    job.wait()
    restart(reference, workdir, "evaluate", 0)


def kill_predict(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
    """At any moment, or while the mask is written; a mask that is there must be whole."""
    workdir, target = folder / "run", folder / "out" / "mask.nii.gz"
    reference.copy("trained", workdir)
    job = predict(reference, workdir, target)
    if rng.random() < 0.5:
        job.until(target.parent.exists)
        time.sleep(rng.uniform(0, 0.01))
    else:
        time.sleep(rng.uniform(0, 2))
    job.kill()
    job.wait()
    if target.exists():
        compare_mask(reference, target)
    predict_again(reference, workdir, target)
