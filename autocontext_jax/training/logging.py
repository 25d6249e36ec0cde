"""A run's numbers: one JSON object a logged step in `metrics.jsonl`, and the same for TensorBoard."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2
from tqdm import tqdm

from autocontext_jax.files import write_whole, writing
from autocontext_jax.training.state import Metrics
from autocontext_jax.training.validation import named_values


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard event files in a work directory.

    Args:
      workdir: exists.
      step: the step the run goes on from. Lines of later steps, left by a run that died after its last checkpoint, are
        dropped: those steps are about to be done again.
    """

    def __init__(self, workdir: Path, *, step: int):
        path = workdir / "metrics.jsonl"
        if path.exists():
            rows = [line for line in path.read_bytes().splitlines() if _step_of(line) <= step]
            write_whole(path, b"".join(row + b"\n" for row in rows))
        self._lines, self._folder = path, workdir / "tensorboard"
        with writing(self._lines):
            self._file = path.open("ab")
        # Written by this thread: the library's own would die of a full disk, and the run then wait for it for ever.
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(self._folder / "events"))
            if step:  # what TensorBoard has of later steps is to be forgotten
                log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=log))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line, `step` first; a value that is not finite is written as null."""
        with writing(self._lines):
            # JSON has no NaN and no infinity.
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._file.write(f"{json.dumps({'step': step, **finite}, allow_nan=False)}\n".encode())
            self._file.flush()
        self._event(step, [summary.scalar(name, value) for name, value in values.items()])

    def image(self, step: int, name: str, rgb: np.ndarray) -> None:
        """Writes a picture [H, W, 3] uint8 for TensorBoard."""
        self._event(step, [summary.image(name, rgb, dataformats="HWC")])
        with writing(self._folder):
            self._events.flush()  # to the disk itself, which is too slow for every step

    def _event(self, step: int, parts: Sequence[Any]) -> None:
        values = [value for part in parts for value in part.value]
        event = event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values))
        with writing(self._folder):
            self._events.write_event(event)

    def close(self) -> None:
        """Flushes and closes both."""
        with writing(self._lines):
            self._file.close()
        with writing(self._folder):
            self._events.close()


class StepLog:
    """Logs the numbers of a step when the next one is logged: by then the device has them, and nobody waits for it.

    Args:
      metrics: where they go; None logs nothing, as in all processes but the first.
      bar: shows the newest ones.
      levels: those that are trained.
      batch_size: patches a step.
      step: where the run goes on from.
    """

    def __init__(self, metrics: MetricsLog | None, bar: tqdm, *, levels: Sequence[int], batch_size: int, step: int):
        self._log, self._bar, self._levels, self._batch_size = metrics, bar, levels, batch_size
        self._waiting: tuple[int, Metrics, dict[str, float]] | None = None
        self._since, self._since_step = time.monotonic(), step

    def add(self, step: int, metrics: Metrics, skipped: int) -> None:
        """Writes the numbers of the step added before, and keeps this one's."""
        self.flush()
        now = time.monotonic()
        more = {"patches_per_second": self._batch_size * (step - self._since_step) / (now - self._since)}
        if skipped:
            more["skipped_steps"] = skipped
        self._waiting, self._since, self._since_step = (step, metrics, more), now, step

    def flush(self, validated: dict[str, float] | None = None) -> None:
        """Writes the numbers of the step added last, with those of its validation."""
        if self._waiting is None:
            return
        step, metrics, more = self._waiting
        self._waiting = None
        metrics = jax.device_get(metrics)
        values = named_values(metrics, self._levels) | {"gradient_norm": float(metrics.gradient_norm)}
        if self._log is not None:
            self._log.scalars(step, values | more | (validated or {}))
        shown = {key: f"{value:.3f}" for key, value in values.items() if key == "loss" or key.startswith("dice")}
        self._bar.set_postfix({**shown, "patches/s": f"{more['patches_per_second']:.1f}"}, refresh=False)

    def restart_clock(self) -> None:
        """Leaves out of the speed what has happened since the last step was added."""
        self._since = time.monotonic()


def _step_of(line: bytes) -> float:
    """The step of a line; infinite for a line cut short by a kill, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
