"""Faults of the file system under a work directory: it is full, or for reading only.

Each fault strikes in a new folder, and raises `Wrong` if the run did not survive it.
"""

import contextlib
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from fault_jobs import Job, NotPossible, Wrong
from fault_runs import UndisturbedRun, compare_mask, names_one_of, newest, predict, predict_again, restart

DISK = 24 * 2**20  # bytes of the small file systems


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Callable[[], None]]:
    """A file system of `DISK` bytes at `path`; gives a function that makes it read-only, then writable again.

    Raises:
      NotPossible: this user may not mount.
    """
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(path)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        raise NotPossible("mounting is not permitted")
    state = ["ro", "rw"]

    def turn() -> None:
        subprocess.run(["mount", "-o", f"remount,{state[0]}", str(path)], check=True, capture_output=True)
        state.reverse()

    try:
        yield turn
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True, capture_output=True)


def full_disk(job: str, stage: str, most: int) -> Callable[[UndisturbedRun, random.Random, Path], None]:
    """The work directory's disk has between 0 and `most` bytes left when the job begins."""

    def fault(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
        workdir = folder / "run"
        with small_disk(workdir):
            reference.copy(stage, workdir)
            saved, ballast, target = newest(workdir), workdir / "ballast", workdir / "out" / "mask.nii.gz"
            free = os.statvfs(workdir).f_bavail * os.statvfs(workdir).f_frsize
            ballast.write_bytes(bytes(max(0, free - rng.randrange(most) // 4096 * 4096)))
            run = predict(reference, workdir, target) if job == "predict" else Job(workdir, job)
            if error := run.wait().error:
                names_one_of(error, workdir)
                if not re.search(r"room|space", error):
                    raise Wrong(f"says nothing of the disk's room: {error}")
            saved = max(saved, newest(workdir))
            ballast.unlink()
            if job == "predict":
                predict_again(reference, workdir, target)
            else:
                restart(reference, workdir, job, saved)

    return fault


def read_only(job: str, stage: str) -> Callable[[UndisturbedRun, random.Random, Path], None]:
    """The work directory lies on a file system for reading only; a mask may be written elsewhere."""

    def fault(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
        workdir = folder / "run"
        with small_disk(workdir) as turn:
            reference.copy(stage, workdir)
            saved = newest(workdir)
            inside = rng.random() < 0.5
            target = (workdir if inside else folder) / "out" / "mask.nii.gz"
            turn()
            run = predict(reference, workdir, target) if job == "predict" else Job(workdir, job)
            error = run.wait().error
            if job == "predict" and not inside:
                if error:
                    raise Wrong(error)
                compare_mask(reference, target)
                return
            if not error:
                raise Wrong("nothing was said")
            names_one_of(error, workdir)
            turn()
            if job == "predict":
                predict_again(reference, workdir, target)
            else:
                restart(reference, workdir, job, saved)

    return fault
