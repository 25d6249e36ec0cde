"""How many pyramid patches a second does the jitted training step make on the devices here?

    python benchmarks/train_step.py [--width 32] [--edge 64] [--batch 3] [--levels 2] [--dtype bfloat16]

The step is the real one (forward, total Dice loss, gradients, Adam) on synthetic batches, so this is what the feed has
to keep up with. Prints a table, then one JSON line.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from autocontext_jax.models.pyramid import Pyramid, PyramidConfig
from autocontext_jax.models.unet import UNet, UNetConfig
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.state import Batch, create_state, make_train_step


def main() -> None:
    """Compiles and times the step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 32), ("edge", 64), ("batch", 3), ("levels", 2), ("classes", 8), ("steps", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    flags = parser.parse_args()

    network = UNetConfig(width=flags.width, dtype=flags.dtype)
    model = Pyramid(
        PyramidConfig(levels=flags.levels, classes=flags.classes),
        lambda inputs, rngs: UNet(inputs, flags.classes, network, rngs=rngs),
        rngs=nnx.Rngs(0),
    )
    optimizer = optax.adam(1e-3)
    graph, state = create_state(model, optimizer)
    rng = np.random.default_rng(0)
    shape = (flags.batch, *(flags.edge,) * 3)
    batch = Batch(
        images=tuple(jnp.asarray(rng.uniform(-500, 500, shape), jnp.float32) for _ in range(flags.levels)),
        labels=tuple(jnp.asarray(rng.integers(0, flags.classes, shape), jnp.uint8) for _ in range(flags.levels)),
    )

    started = time.perf_counter()
    compiled = make_train_step(graph, optimizer, LossConfig()).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - started
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    state, metrics = compiled(state, batch)
    seconds = []
    for _ in range(flags.steps):
        jax.block_until_ready(metrics)
        started = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)

    median = float(np.median(seconds))
    result = {
        "device": jax.devices()[0].device_kind,
        **vars(flags),
        "compile_seconds": round(compile_seconds, 1),
        "step_seconds": round(median, 4),
        "pairs_per_second": round(flags.batch / median, 3),
        "tflop_per_step": round(cost["flops"] / 1e12, 4),
        "tflop_per_second": round(cost["flops"] / median / 1e12, 4),
        "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 3),
    }
    for key, value in result.items():
        print(f"{key:18} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
