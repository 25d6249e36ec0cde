"""A run's numbers: one JSON object a logged step in `metrics.jsonl`, and the same for TensorBoard."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from autocontext_jax.files import write_whole, writing


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
        """Writes one line, `step` first."""
        with writing(self._lines):
            self._file.write(f"{json.dumps({'step': step, **values})}\n".encode())
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


def _step_of(line: bytes) -> float:
    """The step of a line; infinite for a line cut short by a kill, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
