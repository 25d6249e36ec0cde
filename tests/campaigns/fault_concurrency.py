"""Faults by other processes: jobs that begin in the work directory of a training run or an evaluation under way.

Each fault strikes in a new folder, and raises `Wrong` if the run did not survive it.
"""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from fault_jobs import Job, NotPossible, Wrong
from fault_runs import STEPS, UndisturbedRun, compare_mask, names_one_of, newest, predict


def two_runs(job: str, stage: str) -> Callable[[UndisturbedRun, random.Random, Path], None]:
    """A second run of the same job begins in the work directory of one that is under way."""

    def fault(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
        workdir = folder / "run"
        reference.copy(stage, workdir)
        first = Job(workdir, job)
        time.sleep(rng.uniform(0, 1.5))
        second = Job(workdir, job)
        ended = first.wait(), second.wait()
        refused = [run.error for run in ended if run.error]
        # An evaluation may be over before the second begins; this training takes some seconds longer.
        few = 1 if job == "train" else 0
        if not few <= len(refused) <= 1 or not all("is in use by process" in error for error in refused):
            raise Wrong(f"expected that one is refused: {refused}")
        if refused:
            names_one_of(refused[0], workdir)
        reference.compare(workdir, job)

    return fault


def read_while_saving(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
    """Predict and evaluate begin, and end, while a training run in the same work directory saves a checkpoint.

    The training run is paused in the middle of a save, as slow storage would hold it up: what it has begun to write
    lies in the work directory meanwhile. So it goes for every checkpoint. Prediction must succeed as soon as a whole
    checkpoint is there. Evaluation may be refused while the work directory is in use. Training must end as if nothing
    had been.
    """
    workdir = folder / "run"
    reference.copy(rng.choice(["prepared", "prepared", "8"]), workdir)
    training = Job(workdir, "train")
    paused = 0
    try:
        for step in [step for step in STEPS if step > newest(workdir)]:
            begun = lambda: any((workdir / "checkpoints").glob(f"{step}.*"))  # noqa: B023, E731 - used in this turn only
            if not training.until(begun):
                break  # it has ended: below it is judged how
            time.sleep(rng.uniform(0, 0.1))
            training.pause()
            paused += begun()  # and not whole already
            _read(reference, workdir, folder / f"{step}.nii.gz", first=rng.choice(["predict", "evaluate"]))
            training.resume()
        error = training.wait().error
    except BaseException:
        training.kill(group=True)
        raise
    if error:
        raise Wrong(f"training ended: {error}")
    reference.compare(workdir, "train")
    if not paused:
        raise NotPossible("no save was caught under way")


def _read(reference: UndisturbedRun, workdir: Path, target: Path, *, first: str) -> None:
    """Predicts and evaluates at the same time."""
    whole = newest(workdir)
    jobs = {}
    for mode in (first, *({"predict", "evaluate"} - {first})):
        jobs[mode] = predict(reference, workdir, target) if mode == "predict" else Job(workdir, mode)
    errors = {mode: job.wait().error for mode, job in jobs.items()}
    if errors["evaluate"] and not ("is in use by process" in errors["evaluate"] or not whole):
        raise Wrong(f"evaluation beside training: {errors['evaluate']}")
    if errors["predict"]:
        names_one_of(errors["predict"], workdir)
        if whole:
            raise Wrong(f"prediction beside training, with checkpoint {whole}: {errors['predict']}")
    else:
        compare_mask(reference, target, expected=_mask_of_step(reference, whole))


def _mask_of_step(reference: UndisturbedRun, step: int) -> Path:
    """The mask that the undisturbed run's checkpoint of a step gives, predicted when it is first needed."""
    folder = reference.workdir.parent / f"until_{step}"
    target = folder / "mask.nii.gz"
    if not target.exists():
        reference.copy("trained", folder)
        for newer in [newer for newer in STEPS if newer > step]:
            shutil.rmtree(folder / "checkpoints" / str(newer))
        if error := predict(reference, folder, target).wait().error:
            raise SystemExit(f"the undisturbed run cannot predict: {error}")
    return target
