"""How does the training step scale to devices that are not here, and to processes that are?

    python benchmarks/scaling.py [--accelerator h100] [--devices 1,8,64,256] [--space 1,8] [--edge 64,256] [--batch 3]
        [--width 32] [--levels 2] [--classes 8] [--dtype bfloat16] [--strong] [--processes 2]

Compiles the real step for each number of devices, where `--space` of them share the depth of a patch of `--edge` (the
n-th edge belongs to the n-th space), the others the batch: `--batch` patches on each share of devices (weak scaling),
or in all (`--strong`; fewer devices than patches are left out). Its compiler must be there: `pip install -e
'.[cuda13]'` or `'.[tpu]'`. Hosts have 8 GPUs.

Of each device: FLOPs, bytes to and from its memory, memory, every kind of collective with its number and the bytes that
leave the device, and the step time that follows: the roofline's, with what is sent passing the links at full bandwidth
(in one host NVLink's, between hosts `--network` of each device) while nothing else runs. `sent / least` compares these
bytes with one all-reduce of the gradients and the normalisation's sums; borders of patches come on top of it.

With `--processes` it measures instead: real processes on this machine, one core each, against one process on one core
with the same batch a process; both in turn.
"""

import argparse
import collections
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import optax
from common import machine, make_pyramid, report, run

from autocontext_jax import processes
from autocontext_jax.errors import UserError
from autocontext_jax.planning import hlo_text
from autocontext_jax.planning.compiled import TrainingStep, compile_program
from autocontext_jax.planning.costs import COLLECTIVE, COLLECTIVES, instruction_costs, roofline_seconds
from autocontext_jax.planning.devices import absent_devices, accelerator_and_count
from autocontext_jax.runtime import compile_for_absent_devices
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.sharding import batch_sharding, make_mesh, place, replicated
from autocontext_jax.training.state import Batch, create_state, make_train_step

HOST = 8  # GPUs


def main() -> None:
    """Compiles or measures, and prints."""
    flags = parse_flags()
    if flags.worker:
        work(flags)
    elif flags.processes:
        measure(flags)
    else:
        compile_for_absent_devices()
        report(compiled_rows(flags), flags=vars(flags), compiled_on=machine("jaxlib", "optax"))


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="h100")
    for name, default in (("devices", "1,8,64,256"), ("space", "1"), ("edge", "64")):
        parser.add_argument(f"--{name}", type=lambda text: [int(n) for n in text.split(",")], default=default)
    for name, number in (("batch", 3), ("width", 32), ("levels", 2), ("classes", 8), ("processes", 0), ("steps", 20)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--network", type=float, default=50e9, help="bytes a second of each device to other hosts")
    parser.add_argument("--strong", action="store_true", help="--batch patches in all, not a device")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def compiled_rows(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of devices and each way to share them."""
    rows = []
    for space, edge in zip(flags.space, flags.edge, strict=True):
        for count in flags.devices:
            shares = count // space
            if count % space or (flags.strong and flags.batch % shares):
                continue
            batch = flags.batch // shares if flags.strong else flags.batch
            rows.append(compiled_row(flags, count, space, edge, batch))
            print(json.dumps(rows[-1]), file=sys.stderr)  # each takes some 20 s
    if not rows:
        raise UserError(f"none of {flags.devices} devices can be shared by {flags.space} and {flags.batch} patches")
    return rows


def compiled_row(flags: argparse.Namespace, count: int, space: int, edge: int, batch: int) -> dict[str, Any]:
    """What the step compiled for these devices does on each."""
    name = flags.accelerator if count == 1 else f"{flags.accelerator}x{count}"
    accelerator, _ = accelerator_and_count(name)
    step = TrainingStep(lambda: new_pyramid(flags), patch_size=(edge, edge, edge), batch_size=batch, space=space)
    compiled = compile_program(step, absent_devices(name))
    costs = instruction_costs(hlo_text.parse(compiled.text))
    number: collections.Counter[str] = collections.Counter()
    sent: dict[str, float] = collections.defaultdict(float)  # bytes
    for cost in costs:
        if cost.kind == COLLECTIVE:
            kind = next(kind for kind in COLLECTIVES if cost.instruction.opcode.startswith(kind))
            number[kind] += 1
            sent[kind] += passes(kind, count) * cost.link_bytes
    # Those who share a patch stand side by side, in one host if it holds them.
    link = {"collective-permute": accelerator.link if space <= HOST else flags.network}
    everywhere = accelerator.link if count <= HOST else flags.network
    busy = sum(roofline_seconds(cost, accelerator, 1) for cost in costs if cost.kind != COLLECTIVE)
    sending = sum(size / link.get(kind, everywhere) for kind, size in sent.items())
    least = passes("all-reduce", count) * least_reduced_bytes(flags)
    pairs = batch * count // space
    return {
        "devices": count,
        "space": space,
        "edge": edge,
        "pairs": pairs,
        "TFLOP": sum(cost.flops for cost in costs) / 1e12,
        "GB": sum(cost.bytes for cost in costs) / 1e9,
        "temporary GB": compiled.temporary_bytes / 1e9,
        "peak GB": compiled.needed_bytes / 1e9,
        "collectives": ", ".join(f"{number[kind]} {kind} {sent[kind] / 1e6:.1f} MB" for kind in sorted(sent)) or "-",
        "sent / least": sum(sent.values()) / least if least else float("nan"),
        "step ms": 1e3 * (busy + sending),
        "pairs/s": pairs / (busy + sending),
        "efficiency": busy / (busy + sending),
    }


def passes(kind: str, count: int) -> float:
    """How often a collective's bytes leave each device: in a ring a sum goes round twice, a neighbour's border once."""
    return {"all-reduce": 2 * (count - 1) / count, "reduce-scatter": (count - 1) / count}.get(kind, 1)


def least_reduced_bytes(flags: argparse.Namespace) -> int:
    """Gradients, and of each normalised layer two sums forward and two backward, in float32."""
    shapes = jax.eval_shape(lambda: create_state(new_pyramid(flags), optax.adam(1e-3))[1])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
    channels = sum(leaf.size for leaf in jax.tree.leaves(shapes.batch_stats)) // 2
    return 4 * (parameters + 4 * channels)


def new_pyramid(flags: argparse.Namespace) -> Any:
    """The model of all rows."""
    return make_pyramid(levels=flags.levels, classes=flags.classes, width=flags.width, dtype=flags.dtype)


def measure(flags: argparse.Namespace) -> None:
    """Real processes, one core each, in turn with one alone."""
    seconds: dict[int, list[float]] = {1: [], flags.processes: []}
    for _ in range(3):
        for count, found in seconds.items():
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            command = [sys.executable, *sys.argv, "--worker"]
            running = [
                subprocess.Popen([*command, f"{address},{count},{index}"], stdout=subprocess.PIPE, encoding="utf-8")
                for index in range(count)
            ]
            outputs = [process.communicate()[0] for process in running]
            if any(process.returncode for process in running):
                raise UserError(f"a process of {count} ended early; see above")
            found.append(json.loads(outputs[0].splitlines()[-1])["seconds"])
    one, several = (float(np.median(found)) for found in seconds.values())
    ratio = float(np.median(np.divide(seconds[1], seconds[flags.processes])))
    row = {"processes": flags.processes, "batch a process": flags.batch, "edge": flags.edge[0], "width": flags.width,
           "step of one, s": one, "step of all, s": several, "efficiency": ratio}  # fmt: skip
    report([row], flags=vars(flags), seconds=seconds, machine=machine())


def work(flags: argparse.Namespace) -> None:
    """One process: the median of some steps."""
    address, count, index = flags.worker.split(",")
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(index)]})
    processes.start(address, int(count), int(index))
    mesh = make_mesh(flags.batch * int(count))
    optimizer = optax.adam(1e-3)
    graph, state = create_state(new_pyramid(flags), optimizer)
    rng = np.random.default_rng(0)
    shape = (flags.batch * int(count), *(flags.edge[0],) * 3)
    images = rng.uniform(-500, 500, (*shape, 1)).astype(np.float32)
    labels = rng.integers(0, flags.classes, shape, np.uint8)
    with jax.set_mesh(mesh):
        whole, split = replicated(mesh), batch_sharding(mesh)
        state = jax.tree.map(lambda leaf: place(np.asarray(leaf), whole), state)
        batch = Batch((place(images, split),) * flags.levels, (place(labels, split),) * flags.levels)
        step = make_train_step(graph, optimizer, LossConfig(), sharding=whole)
        seconds = []
        for _ in range(flags.steps + 2):
            started = time.perf_counter()
            state, metrics = step(state, batch)
            metrics.loss.block_until_ready()
            seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": float(np.median(seconds[2:]))}))


if __name__ == "__main__":
    run(main)
