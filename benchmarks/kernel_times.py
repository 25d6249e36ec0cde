"""How long each kernel of a compiled program ran, read from a profile by JAX's own profiler."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass
class Profile:
    """What a device did while it was watched; nanoseconds.

    Attributes:
      instructions: time of each instruction of the compiled programs, by its name in their text, over all runs.
      unnamed: time of each kernel that the profile ascribes to no instruction, by the kernel's name. On GPUs, XLA puts
        many kernels together in a command buffer; the profile ascribes these to the buffer.
      copies: how many copies between host and device there were, and their time, by direction.
      busy: time in which the device did anything at all.
      span: from the first kernel's start to the last one's end.
    """

    instructions: dict[str, float] = dataclasses.field(default_factory=dict)
    unnamed: dict[str, float] = dataclasses.field(default_factory=dict)
    copies: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    busy: float = 0.0
    span: float = 0.0


@contextlib.contextmanager
def profiled(folder: Path) -> Iterator[Profile]:
    """Watches what runs within; the profile is filled in at the end, and the trace kept in `folder`.

    Whatever runs within must be waited for within.
    """
    found = Profile()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        yield found
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    _read(jax.profiler.ProfileData.from_file(str(newest)), found)


def _read(data: Any, found: Profile) -> None:
    intervals: list[tuple[float, float]] = []
    for line in _device_lines(data):
        for event in line.events:
            stats = dict(event.stats)
            instruction = stats.get("hlo_op")
            buffered = instruction is not None and instruction.startswith("command_buffer")
            if "memcpy" in event.name.lower() and instruction is None:
                direction = next((name for name in ("H2D", "D2H", "D2D") if name in event.name), "other")
                count, time = found.copies.get(direction, (0, 0.0))
                found.copies[direction] = (count + 1, time + event.duration_ns)
            elif instruction is not None and not buffered:
                found.instructions[instruction] = found.instructions.get(instruction, 0.0) + event.duration_ns
            elif buffered or line.name.startswith(("Stream", "XLA Ops")):
                found.unnamed[event.name] = found.unnamed.get(event.name, 0.0) + event.duration_ns
            else:
                continue  # of a host's line: threads that wait, and the like
            intervals.append((event.start_ns, event.start_ns + event.duration_ns))
    intervals.sort()
    end = 0.0
    for start, stop in intervals:
        found.busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    found.span = end - intervals[0][0] if intervals else 0.0


def _device_lines(data: Any) -> Iterator[Any]:
    """The lines of the first accelerator; of the host, where programs run on the CPU."""
    planes = {plane.name: plane for plane in data.planes}
    devices = sorted(name for name in planes if name.startswith("/device:") and "CUSTOM" not in name)
    if not devices:
        yield from planes["/host:CPU"].lines
        return
    lines = list(planes[devices[0]].lines)
    operations = [line for line in lines if line.name == "XLA Ops"]
    # Where these are there, as on TPUs, other lines tell of the same time again.
    streams = [line for line in lines if line.name.startswith("Stream")]
    yield from (operations if operations and not streams else streams or lines)
