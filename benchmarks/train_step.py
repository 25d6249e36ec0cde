"""How many pyramid patches a second does the jitted training step make on the devices here?

    python benchmarks/train_step.py [--width 32] [--edge 64] [--batch 1,2,3,6] [--dtype float32|bfloat16] [--levels 2]
        [--data phantoms] [--peers] [--steps 10] [--rounds 3] [--device cpu]

The step is the real one (forward, total Dice loss, gradients, Adam) on one synthetic batch; every combination of the
comma-separated sizes is a row. Compilation is timed apart. FLOPs are counted by hand: two for each weight of a
convolution or deconvolution at each voxel, times three for forward and both gradients; XLA's own count changes with the
lowering. Memory is what the compiled program says (without the scratch of foreign calls).

--data FOLDER (a data set, or a prepared store) or `phantoms` runs blocks of steps on batches from the real pipeline,
augmented, in turn with blocks on the synthetic batch. What the feed read while others ran is used up before the clock
starts. `feed` is the fed rate over the synthetic one: 1 means that the step never waits.

--peers runs the same network, loss and Adam in eager PyTorch on the CPU with all its cores, checks that both have the
same loss, and takes the better of PyTorch's two memory layouts; then the forward pass in eval mode likewise. Ratios
above 1 mean that ours is faster. In bfloat16 PyTorch runs under autocast.
"""

import argparse
import functools
import importlib.util
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from common import machine, make_pyramid, median_ratio, prepared_cases, report

from autocontext_jax.data.pipeline import Feed, FeedConfig
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.geometry import SpatialLimits
from autocontext_jax.main import fuse_results, keep_freed_memory, wait_for_programs
from autocontext_jax.models.pyramid import Pyramid
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.sharding import batch_sharding, make_mesh, replicated
from autocontext_jax.training.state import Batch, create_state, inference_model, make_train_step

Calls = dict[str, Callable[[], Any]]


def main() -> None:
    """Measures every combination of sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", "32"), ("edge", "64"), ("batch", "3")):
        parser.add_argument(f"--{name}", type=_numbers, default=default)
    for name, number in (("levels", 2), ("classes", 8), ("steps", 10), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--data", default="", help="a data set, a prepared store of as many levels, or `phantoms`")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--device", default="", help="JAX's name of a platform; its own choice unless given")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", flags.device or None)
    # As the job does. PyTorch, in the same process, then finds its memory kept too.
    keep_freed_memory()
    if flags.dtype == "float32":
        fuse_results()
    wait_for_programs()
    peers = flags.peers and importlib.util.find_spec("torch") is not None
    if flags.peers and not peers:
        print("PyTorch is not installed (pip install torch): ours is measured alone")

    with tempfile.TemporaryDirectory() as folder:
        factors = tuple(2 ** (flags.levels - level) for level in range(flags.levels))
        cases = prepared_cases(flags.data, factors, Path(folder)) if flags.data else []
        sizes = itertools.product(flags.width, flags.edge, flags.batch)
        rows = [measure(*size, flags, cases=cases, peers=peers) for size in sizes]
    means = {}
    for program in ("train", "predict") if peers else ():
        means[program] = float(np.exp(np.mean([np.log(row[f"{program} ratio"]) for row in rows])))
    if means:
        means["both"] = float(np.sqrt(means["train"] * means["predict"]))
        print("geometric mean of the ratios:", ", ".join(f"{name} {mean:.3g}" for name, mean in means.items()))
    versions = machine(*(["torch"] if peers else []))
    report(rows, geometric_means=means, machine=versions, flags=vars(flags))


def measure(
    width: int, edge: int, batch: int, flags: Any, *, cases: Sequence[PreparedCase], peers: bool
) -> dict[str, Any]:
    """One row of the table."""
    classes = len(cases[0].labels) if cases else flags.classes
    pyramid = make_pyramid(levels=flags.levels, classes=classes, width=width, dtype=flags.dtype)
    flops = 3 * batch * convolution_flops(pyramid, edge)
    rng = np.random.default_rng(0)
    shape = (batch, *(edge,) * 3)
    images = tuple(rng.uniform(-500, 500, shape).astype(np.float32) for _ in range(flags.levels))
    labels = tuple(rng.integers(0, classes, shape, np.uint8) for _ in range(flags.levels))
    rivals = _torch_calls(pyramid, images, labels, flags.dtype) if peers else None

    mesh = make_mesh(batch)
    sharding = batch_sharding(mesh)
    synthetic = Batch(jax.device_put(images, sharding), jax.device_put(labels, sharding))
    optimizer = optax.adam(1e-3)
    graph, state = create_state(pyramid, optimizer)
    # A copy even where nothing moves: the first step takes its arguments' memory.
    state = jax.device_put(state, replicated(mesh), may_alias=False)
    frozen = jax.device_put((state.params, state.statistics), may_alias=False)
    started = time.perf_counter()
    with jax.set_mesh(mesh):  # as the job does: layers ask for it
        step = make_train_step(graph, optimizer, LossConfig()).lower(state, synthetic).compile()
    compile_seconds = time.perf_counter() - started

    def train(batch: Batch) -> jax.Array:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics.loss

    first_loss = float(train(synthetic))
    calls: Calls = {"ours": lambda: train(synthetic)}
    feed = None
    if cases:
        feed_config = FeedConfig(batch=batch, edge=edge, spatial=SpatialLimits())
        feed = Feed(cases, feed_config, seed=0, sharding=sharding)
        fed = iter(feed)
        calls["fed"] = lambda: train(Batch(*next(fed)))
    if rivals:
        losses = {name: call() for name, call in rivals["train"].items()}
        tolerance = 1e-4 if flags.dtype == "float32" else 1e-2
        assert all(abs(loss - first_loss) < tolerance for loss in losses.values()), (first_loss, losses)
        calls |= rivals["train"]
    seconds = in_turn(calls, steps=flags.steps, lead_in=FeedConfig.ahead if feed else 0, rounds=flags.rounds)
    median = float(np.median(seconds["ours"]))
    row = {
        "width": width,
        "edge": edge,
        "batch": batch,
        "dtype": flags.dtype,
        "compile s": compile_seconds,
        "step s": median,
        "pairs/s": batch / median,
        "GFLOP/s": flops / median / 1e9,
        "peak GB": step.memory_analysis().peak_memory_in_bytes / 1e9,
    }
    if feed:
        feed.close()
        row["feed"] = 1 / median_ratio(seconds["ours"], seconds["fed"])
    if rivals:
        row |= _against("train", seconds)
        predict = jax.jit(lambda weights, images: inference_model(graph, *weights)(images))
        calls = {"ours": lambda: predict(frozen, synthetic.images), **rivals["predict"]}
        row |= _against("predict", in_turn(calls, steps=flags.steps, lead_in=0, rounds=flags.rounds))
    return row


def in_turn(calls: Calls, *, steps: int, lead_in: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each kind, in blocks of `steps` calls, A B A B ...

    Only a block's end waits for the device, as a training run hardly ever does. Before each block come `lead_in` calls
    that are not timed; before the first, one of each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in calls.items():
            jax.block_until_ready([call() for _ in range(lead_in)])
            started = time.perf_counter()
            jax.block_until_ready([call() for _ in range(steps)])
            seconds[name].append((time.perf_counter() - started) / steps)
    return seconds


def convolution_flops(pyramid: Pyramid, edge: int) -> int:
    """FLOPs in convolutions and deconvolutions of one pyramid patch's forward pass: two a multiplication."""
    total = 0
    networks: Sequence[Any] = pyramid.networks
    for network in networks:
        for resolution, blocks in enumerate(network.analysis):
            total += sum(block.layer.kernel[...].size for block in blocks) * (edge >> resolution) ** 3
        for resolution, (up, *blocks) in enumerate(reversed(network.synthesis)):
            # An eighth of a deconvolution's weights acts on each of its output voxels.
            kernels = sum(block.layer.kernel[...].size for block in blocks) + up.layer.kernel[...].size // 8
            total += kernels * (edge >> resolution) ** 3
        total += network.head.kernel[...].size * edge**3
    return 2 * total


def _torch_calls(
    pyramid: Pyramid, images: Sequence[np.ndarray], labels: Sequence[np.ndarray], dtype: str
) -> dict[str, Calls]:
    """A training step (giving its loss) and a forward pass in eval mode, in each of PyTorch's memory layouts."""
    import torch
    from torch_pyramid import to_torch, total_loss

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    inputs = [torch.from_numpy(image) for image in images]
    targets = [torch.from_numpy(label).long() for label in labels]
    calls: dict[str, Calls] = {"train": {}, "predict": {}}
    narrow = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    for name, layout in (("NCDHW", torch.contiguous_format), ("NDHWC", torch.channels_last_3d)):
        model, frozen = (to_torch(pyramid).to(memory_format=layout) for _ in range(2))
        frozen.eval()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)

        def train(model=model, optimizer=optimizer) -> float:
            optimizer.zero_grad()
            with narrow():
                logits = model(inputs)
            loss = total_loss([level.float() for level in logits], targets)
            loss.backward()
            optimizer.step()
            return loss.item()

        def predict(frozen=frozen) -> None:
            with torch.inference_mode(), narrow():
                frozen(inputs)

        calls["train"][name], calls["predict"][name] = train, predict
    return calls


def _against(program: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Columns that compare a program with PyTorch in its faster layout."""
    layout = min(("NCDHW", "NDHWC"), key=lambda name: float(np.median(seconds[name])))
    ratio = median_ratio(seconds["ours"], seconds[layout])
    return {f"{program} torch s": float(np.median(seconds[layout])), "layout": layout, f"{program} ratio": ratio}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
