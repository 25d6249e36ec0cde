"""The undisturbed run: its stages, from which every fault starts, and the comparison with it at the end."""

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

from fault_contents import ContentReader
from fault_jobs import Ended, Job, Wrong, start

STEPS = (4, 8, 12)  # of the checkpoints
TEST = "phantom_003"  # the test case
STAGES = ("new", "phantoms", "prepared", "8", "trained", "all")
JSON_FILES = ("config.json", "split.json")  # of a work directory that has been trained in
# What a work directory holds, and from which stage on.
HELD = {
    "phantoms": "phantoms", "prepared": "prepared", "split.json": "prepared", "fingerprint.json": "prepared",
    "checkpoints": "8", "config.json": "8", "metrics.jsonl": "8", "tensorboard": "8",
    "predictions": "all", "pictures": "all", "evaluation.json": "all", "table.md": "all", "table.csv": "all",
}  # fmt: skip


class UndisturbedRun:
    """A run that no fault strikes.

    Args:
      workdir: where it runs; its parent belongs to the campaign.
      reader: reads this work directory and those that are compared with it.
      processes: how many share the run. Several only train; one alone does the whole job.
    """

    def __init__(self, workdir: Path, reader: ContentReader, *, processes: int = 1):
        self.workdir, self.processes = workdir, processes
        self._reader = reader
        mode = "all" if processes == 1 else "train"
        for ended in [job.wait() for job in start(workdir, mode, processes=processes)]:
            if ended.error:
                raise SystemExit(f"the undisturbed run failed: {ended.text}")
        jobs = ("prepare", "train", "evaluate", "all") if processes == 1 else ("prepare", "train")
        self._expected = {job: self.contents(workdir, job) for job in jobs}
        for found in self._expected.values():  # two that cannot be read are not equal
            if "unreadable" in found:
                raise SystemExit(f"the undisturbed run cannot be read: {found['unreadable']}")

    @functools.cached_property
    def of_two_processes(self) -> "UndisturbedRun":
        """Another undisturbed run, shared by two processes; made when it is first used."""
        return UndisturbedRun(self.workdir.parent / "reference_of_two", self._reader, processes=2)

    def copy(self, stage: str, workdir: Path) -> None:
        """Makes a work directory as this run's was at a stage.

        Args:
          stage: "new", "phantoms", "prepared", "8" (killed after that checkpoint), "trained", "all".
          workdir: does not exist, or is empty.
        """
        workdir.mkdir(exist_ok=True)
        for name, since in HELD.items():
            source = self.workdir / name
            if source.exists() and STAGES.index(stage) >= STAGES.index(since):
                (shutil.copytree if source.is_dir() else shutil.copy2)(source, workdir / name)
        if stage == "8":
            shutil.rmtree(workdir / "checkpoints" / "12")

    def contents(self, workdir: Path, job: str, steps: tuple[int, ...] = STEPS) -> dict[str, Any]:
        """Everything in a work directory that a job leaves and that must not depend on faults."""
        found: dict[str, Any] = {}
        prepared = workdir / "prepared"
        for path in sorted(prepared.rglob("*")):
            if path.is_file() and path.suffix != ".lock":  # which holds the number of a process
                found[f"file {path.relative_to(workdir)}"] = path.read_bytes()
        if job == "prepare":
            return found
        for name in JSON_FILES:
            if (workdir / name).exists():
                text = (workdir / name).read_text(encoding="utf-8").replace(str(workdir), "WORKDIR")
                # A file that was put back has another time, and so split.json another checksum of itself.
                found[name] = re.sub(r'"(modified|checksum)": \d+', "", text)
        for line in (workdir / "metrics.jsonl").read_bytes().splitlines():
            row = json.loads(line)
            found[f"step {row['step']}"] = {key: row[key] for key in row if key != "patches_per_second"}
        found["steps"] = (workdir / "metrics.jsonl").read_bytes().count(b"\n")
        if job in ("evaluate", "all"):
            found["evaluation"] = json.loads((workdir / "evaluation.json").read_bytes())
        for name, value in self._reader.arrays(workdir, steps).items():
            if job != "train" or not name.startswith("mask"):
                found[name] = value
        return found

    def prepared_case(self, folder: Path, name: str) -> tuple[str, list[bytes]]:
        """See `ContentReader.prepared_case`."""
        return self._reader.prepared_case(folder, name)

    def compare(self, workdir: Path, job: str, steps: tuple[int, ...] = STEPS, *, without: str = "") -> None:
        """Compares what a job has left in a work directory with this run, to the bit.

        Args:
          workdir: of the run that was struck.
          job: the last that ran there.
          steps: the checkpoints that are compared.
          without: a pattern of the names (keys of `contents`) that are not compared.

        Raises:
          Wrong: they differ.
        """
        found, expected = self.contents(workdir, job, steps), self._expected[job]
        others = {f"checkpoint {step}" for step in STEPS if step not in steps}
        differing = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        differing = [key for key in differing if key not in others and not (without and re.fullmatch(without, key))]
        if differing:
            raise Wrong(f"differs from the undisturbed run in {differing[:5]} {found.get('unreadable', '')}")


def newest(workdir: Path) -> int:
    """Step of the newest checkpoint that is whole, which shows in its final name; 0 if there is none."""
    folder = workdir / "checkpoints"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def first_step(text: str) -> int:
    """The step from which a job says that it goes on."""
    found = re.search(r"from step (\d+)\n", text) or re.search(r"trained already: step (\d+)", text)
    return int(found[1]) if found else 0


def restart(
    reference: UndisturbedRun, workdir: Path, job: str, least: int, steps: tuple[int, ...] = STEPS, *, without: str = ""
) -> None:
    """Starts a job again with as many processes as the undisturbed run has, and compares.

    Args:
      reference: the undisturbed run.
      workdir: of the run that was struck.
      job: the mode of the command line.
      least: step of the checkpoint from which, or from a newer one, training must go on.
      steps: see `UndisturbedRun.compare`.
      without: likewise.

    Raises:
      Wrong: the job fails, goes on from an older checkpoint, or leaves anything else than the undisturbed run.
    """
    ended = [process.wait() for process in start(workdir, job, processes=reference.processes)]
    if errors := [process.error for process in ended if process.error]:
        raise Wrong(f"the restart failed: {errors}")
    if job in ("train", "all") and first_step(ended[0].text) < least:
        raise Wrong(f"went on from step {first_step(ended[0].text)}, though {least} was saved:\n{ended[0].text}")
    reference.compare(workdir, job, steps, without=without)


def predict(reference: UndisturbedRun, workdir: Path, target: Path) -> Job:
    """Starts to predict the undisturbed run's test scan."""
    scan = reference.workdir / "phantoms" / "imagesTs" / f"{TEST}_0000.nii.gz"
    return Job(workdir, "predict", "--input", scan, "--output", target)


def compare_mask(reference: UndisturbedRun, target: Path, *, expected: Path | None = None) -> None:
    """Raises `Wrong` unless a mask is that of the undisturbed run, or the `expected` one."""
    import SimpleITK as sitk

    right = sitk.ReadImage(expected or reference.workdir / "predictions" / f"{TEST}.nii.gz")
    found = sitk.ReadImage(target)
    same = sitk.GetArrayFromImage(found).tobytes() == sitk.GetArrayFromImage(right).tobytes()
    if not same or found.GetOrigin() != right.GetOrigin() or found.GetDirection() != right.GetDirection():
        raise Wrong("the mask is not that of the undisturbed run")


def predict_again(reference: UndisturbedRun, workdir: Path, target: Path) -> Ended:
    """Predicts, which must succeed and give the mask of the undisturbed run."""
    ended = predict(reference, workdir, target).wait()
    if ended.error:
        raise Wrong(f"the restart failed: {ended.error}")
    compare_mask(reference, target)
    return ended


def names_one_of(error: str, *paths: Path) -> None:
    """Raises `Wrong` unless a line of error names one of these paths."""
    if not any(str(path) in error for path in paths):
        raise Wrong(f"names none of {[str(path) for path in paths]}: {error}")


def delete_named_folder(error: str, workdir: Path) -> None:
    """Deletes the folder that a line of error advises to delete.

    Raises:
      Wrong: it names none, or one outside the work directory.
    """
    found = re.search(r"(?:checkpoint )?(\S+?) (?:cannot|is|has|holds) .*delete that folder", error)
    if not found or workdir not in Path(found[1]).parents or not Path(found[1]).is_dir():
        raise Wrong(f"names no folder to delete: {error}")
    shutil.rmtree(found[1])
