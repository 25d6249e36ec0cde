"""Runs of the command line on tiny phantoms that faults strike, and the undisturbed one that they are compared with."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SMALL = (
    "--config.phantom.training=3", "--config.phantom.test=1", "--config.phantom.size=(24, 24, 24)",
    "--config.phantom.spacing=(12.0, 12.0, 12.0)", "--config.loader.patch_size=8", "--config.loader.batch_size=1",
    "--config.model.base_channels=2", "--config.model.depth=1", "--config.train.steps=12",
    "--config.train.checkpoint_every=4", "--config.train.log_every=1", "--config.train.keep=3",
    "--config.train.validation_patches=2", "--config.predict.tile=16", "--config.predict.plane=24",
    "--config.predict.checkpoint=latest", "--config.augmentation.elastic_sigma=0.0",
)  # fmt: skip
STEPS, TEST = (4, 8, 12), "phantom_003"
SECONDS = 120  # a job that takes longer hangs
UNDER_WAY: set[int] = set()  # processes of jobs


class Wrong(Exception):
    """The fault was not survived."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """A job that ended: its exit status, negative for a signal, and what it wrote on standard error and output."""

    status: int
    text: str

    @property
    def error(self) -> str:
        """Its one line, or "" after success."""
        if self.status == 0 and "Traceback" not in self.text:
            return ""
        if self.status == 1 and "Traceback" not in self.text and "scans could not be" in self.text:
            return " ".join(self.text.splitlines())  # some of many scans: a line each
        lines = [line for line in self.text.splitlines() if line.startswith("error: ")]
        if self.status != 2 or len(lines) != 1 or "Traceback" in self.text:
            raise Wrong(f"status {self.status}, wanted 0, or 2 and one line:\n{self.text}")
        return lines[0]


class Job:
    """One command line in a process of its own.

    Args:
      workdir: of the run.
      mode: of the command line.
      more: further flags.
    """

    def __init__(self, workdir: Path, mode: str, *more: object):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `wait`
        config = str(ROOT / "configs" / "quickstart.py")
        arguments = ["main", "--config", config, "--workdir", str(workdir), "--mode", mode, *SMALL, *map(str, more)]
        self.pid = os.fork()
        if self.pid == 0:
            self._run(arguments)
        UNDER_WAY.add(self.pid)

    def _run(self, arguments: list[str]) -> None:
        """In the child: what `python -m autocontext_jax.main` does."""
        from autocontext_jax.main import main

        status = 1
        try:
            os.setpgid(0, 0)
            os.dup2(self._log.fileno(), 1)
            os.dup2(self._log.fileno(), 2)
            sys.argv = arguments  # where absl looks for the configuration's flags
            status = main(arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            os._exit(status)

    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def until(self, found: Callable[[], bool], seconds: float = SECONDS) -> bool:
        """Waits until something is there; False if the job ended, or the time went by, before it was."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.runs():
            if found():
                return True
            time.sleep(0.0005)
        return False

    def kill(self, group: bool = False) -> None:
        """SIGKILL, to the process alone or to those that it started too."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        """Until it ends; one that hangs is killed."""
        if self.until(lambda: False) or self.runs():
            self.kill(group=True)
            os.waitpid(self.pid, 0)
            self._log.seek(0)
            raise Wrong(f"hangs:\n{self._log.read().decode(errors='replace')}")
        _, status = os.waitpid(self.pid, 0)
        UNDER_WAY.discard(self.pid)
        self._log.seek(0)
        text = self._log.read().decode(errors="replace").replace("\r", "\n")
        self._log.close()
        return Ended(os.waitstatus_to_exitcode(status), text)

    def children(self) -> list[int]:
        """Workers that it started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError):
                parent = int(path.read_text().rpartition(")")[2].split()[1])
                if parent == self.pid and b"spawn_main" in (path.parent / "cmdline").read_bytes():
                    found.append(int(path.parent.name))
        return found


def contents(connection: Any) -> None:
    """In a process of its own, which may use devices: answers what the arrays of a work directory are."""
    import hashlib
    import warnings

    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    import SimpleITK as sitk

    warnings.simplefilter("ignore")  # orbax warns that the devices are those of the run

    def digest(array: Any) -> str:
        array = np.asarray(array)
        return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"

    while True:
        try:
            workdir, steps = connection.recv()
        except EOFError:  # the campaign is over
            return
        if isinstance(steps, str):
            connection.send(read_store(workdir, steps))
            continue
        try:
            found: dict[str, Any] = {}
            for step in steps:
                state = ocp.PyTreeCheckpointer().restore((workdir / "checkpoints" / str(step) / "state").absolute())
                leaves = jax.tree_util.tree_leaves_with_path(state)
                found[f"checkpoint {step}"] = {str(path): digest(leaf) for path, leaf in leaves}
            for path in sorted((workdir / "predictions").rglob("*.nii.gz")):
                image = sitk.ReadImage(path)
                place = (image.GetOrigin(), image.GetDirection(), image.GetSpacing())
                found[f"mask {path.relative_to(workdir)}"] = (digest(sitk.GetArrayFromImage(image)), place)
            connection.send(found)
        except Exception as error:  # an answer too: whatever is wrong is told by the asker
            connection.send({"unreadable": f"{type(error).__name__}: {error}"})


def read_store(root: Path, name: str) -> tuple[str, list[bytes]]:
    """The error that reading a prepared case ends with, or "", and all that was read of it."""
    from autocontext_jax.data.store.reader import PreparedCase
    from autocontext_jax.errors import UserError

    found = []
    try:
        case = PreparedCase.open(str(root), name)
        for level, shape in enumerate(case.shapes, start=1):
            found += [array.tobytes() for array in case.read(level, (-1, 0, 2), shape).result()]
        found += [repr([case.foreground_voxel(n) for n in range(0, case.foreground_offsets[-1], 7)]).encode()]
        return "", [*found, repr(dataclasses.replace(case, root="")).encode()]
    except UserError as error:
        return f"error: {error}", []
    except Exception as error:  # an answer too, and not the one line that is wanted
        return f"{type(error).__name__}: {error}", []


class Campaign:
    """The reference run, its stages to copy, and how a work directory is compared with it.

    Args:
      folder: where all of it goes.
    """

    def __init__(self, folder: Path):
        here, there = multiprocessing.Pipe()
        self._reader, self._contents = (
            here,
            multiprocessing.get_context("spawn").Process(target=contents, args=(there,), daemon=True),
        )
        self._contents.start()
        there.close()
        self.reference = folder / "reference"
        if (ended := Job(self.reference, "all").wait()).error:
            raise SystemExit(ended.text)
        self._wanted = {job: self.state(self.reference, job) for job in ("prepare", "train", "evaluate", "all")}
        if told := self._wanted["all"].get("unreadable"):  # two that cannot be read are not alike
            raise SystemExit(f"the undisturbed run cannot be read: {told}")

    def copy(self, stage: str, workdir: Path) -> None:
        """A work directory as the reference was at a stage.

        Args:
          stage: "new", "phantoms", "prepared", "8" (killed after that checkpoint), "trained", "all".
          workdir: does not exist, or is empty.
        """
        workdir.mkdir(exist_ok=True)
        stages = ["new", "phantoms", "prepared", "8", "trained", "all"]
        at = stages.index(stage)
        for name, since in (
            ("phantoms", 1), ("prepared", 2), ("checkpoints", 3), ("config.json", 3), ("metrics.jsonl", 3),
            ("tensorboard", 3), ("predictions", 5), ("pictures", 5), ("evaluation.json", 5), ("table.md", 5),
            ("table.csv", 5),
        ):  # fmt: skip
            source = self.reference / name
            if at >= since:
                (shutil.copytree if source.is_dir() else shutil.copy2)(source, workdir / name)
        if stage == "8":
            shutil.rmtree(workdir / "checkpoints" / "12")

    def state(self, workdir: Path, job: str, steps: tuple[int, ...] = STEPS) -> dict[str, Any]:
        """All that a job leaves which must not depend on faults."""
        found: dict[str, Any] = {}
        prepared = workdir / "prepared"
        for path in sorted(prepared.rglob("*")):
            if path.is_file():
                found[f"file {path.relative_to(workdir)}"] = path.read_bytes()
        if job == "prepare":
            return found
        for line in (workdir / "metrics.jsonl").read_bytes().splitlines():
            row = json.loads(line)
            found[f"step {row['step']}"] = {key: row[key] for key in row if key != "pairs_per_second"}
        found["steps"] = (workdir / "metrics.jsonl").read_bytes().count(b"\n")
        if job in ("evaluate", "all"):
            found["evaluation"] = json.loads((workdir / "evaluation.json").read_bytes())
        self._reader.send((workdir, steps))
        for name, value in self._reader.recv().items():
            if job != "train" or not name.startswith("mask"):
                found[name] = value
        return found

    def read(self, root: Path, name: str) -> tuple[str, list[bytes]]:
        """`read_store` in the process that reads."""
        self._reader.send((root, name))
        return self._reader.recv()

    def same(self, workdir: Path, job: str, steps: tuple[int, ...] = STEPS) -> None:
        """Raises `Wrong` where a work directory differs from the reference."""
        found, wanted = self.state(workdir, job, steps), self._wanted[job]
        wanted = {
            key: value
            for key, value in wanted.items()
            if not key.startswith("checkpoint") or int(key.split()[1]) in steps
        }
        differing = [key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)]
        if differing:
            shown = found.get("unreadable", "")
            raise Wrong(f"differs from the undisturbed run in {sorted(differing)[:5]} {shown}")
