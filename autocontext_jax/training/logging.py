"""A run's numbers: one JSON object a logged step in `metrics.jsonl`, and the same for TensorBoard."""

import json
import os
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter


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
            rows = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            kept = path.with_suffix(".partial")
            kept.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
            os.replace(kept, path)
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line, `step` first."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def image(self, step: int, name: str, rgb: np.ndarray) -> None:
        """Writes a picture [H, W, 3] uint8 for TensorBoard."""
        self._events.add_image(name, rgb, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._events.close()


def _step_of(line: str) -> float:
    """The step of a line; infinite for a line cut short by a kill, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
