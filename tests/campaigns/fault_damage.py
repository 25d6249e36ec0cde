"""Faults of files: flipped bits, files cut short, emptied or lost, in a work directory or a data set.

Each fault strikes in a new folder, and raises `Wrong` if the run did not survive it.
"""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from fault_jobs import Job, NotPossible, Wrong
from fault_runs import (
    STEPS,
    TEST,
    UndisturbedRun,
    compare_mask,
    delete_named_folder,
    first_step,
    names_one_of,
    newest,
    predict,
    predict_again,
    restart,
)


def damage(path: Path, rng: random.Random) -> None:
    """Flips one to three bits of a file, cuts it short, empties it or deletes it."""
    data = bytearray(path.read_bytes())
    how = rng.choice(["flip"] * 4 + ["cut", "empty", "delete"])
    if how == "flip" and data:
        for _ in range(rng.choice([1, 1, 3])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif how == "delete":
        path.unlink()
    else:
        path.write_bytes(data[: rng.randrange(len(data))] if how == "cut" and data else b"")


def any_file(folder: Path, rng: random.Random) -> Path:
    """One of the files in a folder, at any depth."""
    return rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


def damaged_checkpoint(job: str) -> Callable[[UndisturbedRun, random.Random, Path], None]:
    """Any file of any checkpoint is damaged."""

    def fault(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
        workdir, target = folder / "run", folder / "mask.nii.gz"
        stage = "8" if job == "train" else "trained"
        reference.copy(stage, workdir)
        step = rng.choice([4, 8, 8]) if job == "train" else rng.choice([8, 12, 12])
        damage(any_file(workdir / "checkpoints" / str(step), rng), rng)
        run = predict(reference, workdir, target) if job == "predict" else Job(workdir, job)
        ended = run.wait()
        if job == "train":
            if ended.error:
                raise Wrong(ended.error)
            aside = step == 8 and (workdir / "damaged" / "8").exists()
            if first_step(ended.text) != (4 if aside else 8):
                raise Wrong(f"went on from step {first_step(ended.text)}:\n{ended.text}")
            if aside and f"checkpoint {workdir / 'checkpoints' / '8'}" not in ended.text:
                raise Wrong(f"moved a checkpoint and did not name it:\n{ended.text}")
            # What was damaged and is not read stays as it is.
            reference.compare(workdir, "train", STEPS if aside else tuple(s for s in STEPS if s != step))
            return
        if not ended.error:
            if job == "predict":
                compare_mask(reference, target)
            else:
                reference.compare(workdir, job, tuple(s for s in STEPS if s != step))
            return
        names_one_of(ended.error, workdir / "checkpoints" / str(step))
        delete_named_folder(ended.error, workdir)
        if job == "predict":  # the mask of the newest is compared: it is trained again
            restart(reference, workdir, "train", 0, tuple(s for s in STEPS if s != step or step == 12))
            predict_again(reference, workdir, target)
        else:
            restart(reference, workdir, "all", 8 if step == 12 else 12, (4, 8, 12) if step == 12 else (4, 12))

    return fault


def damaged_json(name: str, job: str) -> Callable[[UndisturbedRun, random.Random, Path], None]:
    """A JSON file of the work directory is damaged; if a job refuses it, it is put back from a copy."""

    def fault(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
        workdir, target = folder / "run", folder / "mask.nii.gz"
        reference.copy("8" if job == "train" else "trained", workdir)
        if not (path := workdir / name).exists():
            raise NotPossible(f"a work directory holds no {name}")
        whole, saved = path.read_bytes(), newest(workdir)
        damage(path, rng)
        ended = (predict(reference, workdir, target) if job == "predict" else Job(workdir, job)).wait()
        if ended.error:
            names_one_of(ended.error, workdir)
            path.write_bytes(whole)
        elif job == "predict":
            compare_mask(reference, target)
        else:
            # Training writes the file anew or finds it right; other jobs leave it as it is.
            reference.compare(workdir, job, without="" if job == "train" else re.escape(name))
        path.write_bytes(whole)
        if job != "predict":
            restart(reference, workdir, job, saved)
            return
        again = predict_again(reference, workdir, target)
        told = [[line for line in run.text.splitlines() if str(target) in line] for run in (ended, again)]
        if not ended.error and told[0] != told[1]:
            raise Wrong(f"said {told[0]} of the mask; expected {told[1]}")

    return fault


def damaged_store(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
    """Any file of the prepared data set is damaged before it is trained on."""
    workdir = folder / "run"
    reference.copy("8", workdir)
    case = workdir / "prepared" / f"phantom_00{rng.randrange(3)}.ome.zarr"
    damage(any_file(case, rng), rng)
    ended = Job(workdir, "train").wait()
    if ended.error:
        names_one_of(ended.error, case)
        saved = newest(workdir)
        delete_named_folder(ended.error, workdir)
        restart(reference, workdir, rng.choice(["train", "all"]), saved)
        return
    # Nothing was said: it was prepared anew, or what was damaged was not read or does not matter.
    reference.compare(workdir, "train", without=r"file prepared/.*")


def damaged_store_read(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
    """Likewise, by reading alone in one long-lived process: whatever is read is right or refused."""
    workdir = folder / "run"
    name = f"phantom_00{rng.randrange(3)}"
    shutil.copytree(reference.workdir / "prepared" / f"{name}.ome.zarr", workdir / f"{name}.ome.zarr")
    damage(any_file(workdir, rng), rng)
    error, found = reference.prepared_case(workdir, name)
    if error:
        if "\n" in error or not error.startswith("error: "):
            raise Wrong(error)
        names_one_of(error, workdir / f"{name}.ome.zarr")
        delete_named_folder(error, workdir)
    elif found != reference.prepared_case(reference.workdir / "prepared", name)[1]:
        raise Wrong("read damaged data and said nothing")


def vanished(job: str) -> Callable[[UndisturbedRun, random.Random, Path], None]:
    """A scan, a label, or both of one case are gone."""

    def fault(reference: UndisturbedRun, rng: random.Random, folder: Path) -> None:
        workdir = folder / "run"
        reference.copy({"prepare": "phantoms", "train": "8", "evaluate": "trained"}[job], workdir)
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
        names_one_of(ended.error or ended.text, workdir / "phantoms")
        for path, data in kept.items():
            path.write_bytes(data)
        restart(reference, workdir, job, saved)

    return fault
