"""Is the code right on this accelerator, how fast is it, and where does the time go?

    python benchmarks/accelerator.py --minutes 8 --output FOLDER [--parts 1,2,3] [--small]

Seven parts, the most important first, on whatever device JAX has:
  1. what the device is, and its measured rates of matrix products and copies;
  2. whether results are right (against the CPU) and repeatable to the bit, and what determinism costs;
  3. the training step of the paper's configuration, beside PyTorch;
  4. which kernels take the time of a step;
  5. whether reading and augmenting keep up with the step;
  6. the prediction of a whole scan;
  7. the quick start, if minutes are left.
At most six programs of the paper's size are compiled: four training steps and the predictor's two.

Every result is printed and written at once: the tables to FOLDER/results.md, the numbers to FOLDER/results.jsonl, what
the libraries say to FOLDER/log.txt. Each part has its share of the minutes. A part that fails, crashes or takes too
long is reported, and the next one starts. --small shrinks every part for a trial on a CPU.

Parts 1 to 6 run in processes of their own (accelerator_parts.py), so that a part can be stopped wherever it is; what
was compiled is kept in FOLDER/cache. They need neither SimpleITK, plotly, matplotlib nor tensorboardX; part 7 does.
"""

import argparse
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("accelerator_parts.py")
# Share of the minutes. What a part leaves goes to the parts after it.
WEIGHTS = {1: 2, 2: 16, 3: 13, 4: 3, 5: 4, 6: 8, 7: 4}
TITLES = {
    1: "What it is",
    2: "Is it right",
    3: "How fast",
    4: "Where the time goes",
    5: "Does the loader keep up",
    6: "Whole scans",
    7: "The quick start",
}
# The sixth part has a process of its own, so that its peak of device memory is its own.
GROUPS = ((1, 2, 3, 4, 5), (6,))
MARK = "@@"  # begins a line that tells of a part's begin or end, not of a result
QUICK_START = ["-m", "autocontext_jax.main", "--config", str(ROOT / "configs/quickstart.py")]
SMALL_QUICK_START = [
    "--config.phantom.training=2", "--config.phantom.test=1", "--config.phantom.size=(24, 24, 24)",
    "--config.phantom.spacing=(12.0, 12.0, 12.0)", "--config.loader.patch_size=8", "--config.model.base_channels=2",
    "--config.model.depth=2", "--config.levels.factors=(1.0,)", "--config.train.steps=2",
    "--config.train.checkpoint_every=2", "--config.predict.tile=16",
    "--config.train.validation_patches=1",
]  # fmt: skip


def main() -> None:
    """Runs the parts within their time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", type=numbers, default="1,2,3,4,5,6,7")
    parser.add_argument("--small", action="store_true", help="every part shrunk, for a trial on a CPU")
    flags = parser.parse_args()
    flags.output.mkdir(parents=True, exist_ok=True)
    end = time.time() + 60 * flags.minutes
    with (
        (flags.output / "results.md").open("w", encoding="utf-8") as tables,
        (flags.output / "results.jsonl").open("w", encoding="utf-8") as rows,
    ):

        def show(line: str) -> None:
            file = rows if line.startswith("{") else tables
            print(line, file=file, flush=True)
            if file is tables:
                print(line, flush=True)

        outcomes = run_parts(flags.parts, flags.output, end, show, small=flags.small)
        show("\n## Summary\n")
        for part, outcome in outcomes.items():
            show(f"{part}. {TITLES[part]}: {outcome}")


def run_parts(
    parts: Sequence[int], folder: Path, end: float, show: Callable[[str], None], *, small: bool
) -> dict[int, str]:
    """Runs the parts one after the other, whatever happens to each.

    Args:
      parts: their numbers, in order.
      folder: of the results.
      end: when everything ends, as `time.time` gives it.
      show: called with each line of the results.
      small: see `main`.

    Returns:
      What became of each part: `done in ...`, `failed: ...` or `not run`.
    """
    outcomes = dict.fromkeys(parts, "not run: no time was left")
    for group in GROUPS:
        left = [part for part in group if part in parts]
        while left and time.time() < end:
            command = [sys.executable, str(WORKER), "--output", str(folder), "--end", repr(end)]
            command += ["--parts", ",".join(map(str, left)), "--all-parts", ",".join(map(str, parts))]
            reached = _run_worker(command + ["--small"] * small, left, parts, folder, end, show, outcomes)
            left = left[left.index(reached) + 1 :]
    if 7 in parts and time.time() < end:
        _begin(7, show)
        outcomes[7] = _quick_start(folder, end, show, small=small)
    return outcomes


def box_seconds(part: int, parts: Sequence[int], end: float) -> float:
    """Seconds that a part may take from now: its share of what is left for it and the parts after it."""
    after = [other for other in parts if other >= part]
    return max(0.0, end - time.time()) * WEIGHTS[part] / sum(WEIGHTS[other] for other in after)


def numbers(text: str) -> list[int]:
    """`1,2,3` as integers."""
    return [int(number) for number in text.split(",")]


def _environment(*, small: bool) -> dict[str, str]:
    """Of the processes: memory is taken as it is needed, so that its peak can be read; a trial compiles quickly."""
    added = {"PYTHONUNBUFFERED": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return os.environ | added | ({"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if small else {})


def _begin(part: int, show: Callable[[str], None]) -> None:
    show(f"\n## {part}. {TITLES[part]}\n")


def _run_worker(
    command: list[str],
    left: Sequence[int],
    parts: Sequence[int],
    folder: Path,
    end: float,
    show: Callable[[str], None],
    outcomes: dict[int, str],
) -> int:
    """Runs a worker until it ends or must be stopped; returns the last part that it began, and notes all outcomes."""
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        environment = _environment(small="--small" in command)
        worker = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, encoding="utf-8", start_new_session=True
        )
    assert worker.stdout is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read(stream=worker.stdout) -> None:
        with stream:
            for line in stream:
                lines.put(line.rstrip("\n"))
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    current, finished, begun = left[0], False, time.time()
    stop = begun + box_seconds(current, parts, end) + 60  # importing JAX and finding the device take their time
    try:
        while True:
            try:
                line = lines.get(timeout=max(0.0, stop - time.time()))
            except queue.Empty:
                outcomes[current] = f"failed: stopped after {time.time() - begun:.0f} s, when its time was up"
                break
            if line is None:
                if not finished:
                    outcomes[current] = f"failed: its process ended with status {worker.wait()}, see log.txt"
                break
            if not line.startswith(MARK):
                show(line)
                continue
            _, event, number, *message = line.split(" ", 3)
            current, finished = int(number), event != "begin"
            if event == "begin":
                begun = time.time()
                stop = begun + box_seconds(current, parts, end)
                _begin(current, show)
            else:
                seconds = f"{time.time() - begun:.0f} s"
                outcomes[current] = f"done in {seconds}" if event == "end" else f"failed after {seconds}: {message[0]}"
                # The next part's begin, or the process's end.
                stop = time.time() + 30
            if event == "fail":
                show(f"Part {current} failed: {message[0]} (the whole story is in log.txt)")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
        reader.join()
    if outcomes[current].startswith("failed: "):
        show(f"Part {current} {outcomes[current]}")
    return current


def _quick_start(folder: Path, end: float, show: Callable[[str], None], *, small: bool) -> str:
    """The quick start's training, evaluation and table in what time is left; returns what became of it."""
    begun = time.time()
    command = [sys.executable, *QUICK_START, "--workdir", str(folder / "quickstart"), *SMALL_QUICK_START * small]
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        job = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(small=small),
            encoding="utf-8",
            start_new_session=True,
        )
    try:
        output, _ = job.communicate(timeout=max(1.0, end - time.time()))
    except subprocess.TimeoutExpired:
        outcome = f"failed: stopped after {time.time() - begun:.0f} s, when its time was up"
    else:
        show(output.strip())
        seconds = f"{time.time() - begun:.0f} s"
        outcome = f"done in {seconds}" if job.returncode == 0 else f"failed after {seconds}: status {job.returncode}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    if outcome.startswith("failed"):
        show(f"Part 7 {outcome}, see log.txt")
    return outcome


if __name__ == "__main__":
    main()
