"""Part 2 of accelerator.py: whether an accelerator's results are right, and the same in every run."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import make_pyramid
from training_program import Calls, TrainingProgram, in_turn

from autocontext_jax.runtime import compiler_options
from autocontext_jax.training.checkpoints import Checkpoints
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.state import Batch, create_state, inference_model, make_train_step

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
FACTORS = {"float32": 3.0, "bfloat16": 1.5}


def against_the_cpu(*, width: int, depth: int, edge: int, batch: int, classes: int = 8) -> list[dict[str, Any]]:
    """Loss, gradients, running averages and predicted maps of a small pyramid beside the CPU's in float32.

    Errors are the norm of the difference over the norm of the CPU's values, all arrays of a kind together. In float32
    all products have the highest precision on both; in bfloat16 the network computes as in training. Gradients are
    sensitive to rounding on any device: a ReLU or a maximum that is nearly undecided changes, and batch normalisation
    subtracts the mean of gradients that were rounded, which is most of them. The CPU shows how sensitive: in bfloat16
    by its own error, in float32 by how far its results move when every voxel moves by its last bit. Results are right
    if they are no further off than the tolerance, or than 1.5 times (bfloat16) or 3 times (float32) that.

    Args:
      width: channels of the first convolution.
      depth: resolutions of the network.
      edge: N.
      batch: B.
      classes: K.

    Returns:
      A row for each type and kind of result.
    """
    steps, states = {}, {}
    for dtype in TOLERANCES:
        pyramid = make_pyramid(levels=2, classes=classes, width=width, depth=depth, dtype=dtype)
        graph, states[dtype] = create_state(pyramid, _keep_gradients())
        # The function beneath the jitted step: all of it is compiled as one program below.
        steps[dtype] = (graph, make_train_step(graph, _keep_gradients(), LossConfig()).__wrapped__)

    def compute(dtype: str, state: Any, batch: Batch) -> dict[str, Any]:
        graph, step = steps[dtype]
        with jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext():
            after, metrics = step(state, batch)
            logits = inference_model(graph, state.params, state.batch_stats)(batch.images)
        maps = tuple(jax.nn.softmax(level) for level in logits)
        results = {"loss": metrics.loss, "gradients": after.optimizer, "running averages": after.batch_stats}
        return results | {"maps": maps}

    def both(states, batch):
        return {dtype: compute(dtype, states[dtype], batch) for dtype in TOLERANCES}

    images, labels = _blocks(edge, batch, classes)
    arguments = states, _on_device(images, labels)
    program = jax.jit(both, compiler_options=compiler_options(jax.default_backend()))
    found = jax.device_get(program(*jax.device_put(arguments, jax.devices()[0])))
    reference = program if jax.default_backend() == "cpu" else jax.jit(both)  # there, one compilation is enough
    cpu = jax.devices("cpu")[0]
    on_cpu = jax.device_get(reference(*jax.device_put(arguments, cpu)))
    nudged = _on_device([np.nextafter(image, np.float32(np.inf)) for image in images], labels)
    moved = jax.device_get(reference(*jax.device_put((states, nudged), cpu)))["float32"]
    rows = []
    for dtype, tolerance in TOLERANCES.items():
        for kind, expected in on_cpu["float32"].items():
            error = relative_error(found[dtype][kind], expected)
            own = relative_error(moved[kind] if dtype == "float32" else on_cpu[dtype][kind], expected)
            allowed = max(tolerance, FACTORS[dtype] * own)
            row = {"type": dtype, "of": kind, "relative error": error, "the CPU's own": own, "allowed": allowed}
            rows.append(row | {"right": "yes" if error <= allowed else "NO"})
    return rows


def _blocks(edge: int, batch: int, classes: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Noisy images of 4^3 blocks, labelled by the blocks' intensities: gradients of pure noise would say nothing."""
    rng = np.random.default_rng(0)
    images, labels = [], []
    for _ in range(2):
        blocks = np.kron(rng.uniform(-500, 500, (batch, 4, 4, 4)), np.ones((1, *(edge // 4,) * 3)))
        images.append((blocks + 50 * rng.standard_normal(blocks.shape)).astype(np.float32))
        labels.append(((blocks + 500) * classes / 1000).astype(np.uint8))
    return images, labels


def _on_device(images: list[np.ndarray], labels: list[np.ndarray]) -> Batch:
    return Batch(jax.device_put(tuple(image[..., None] for image in images)), jax.device_put(tuple(labels)))


def relative_error(found: Any, expected: Any) -> float:
    """Norm of the difference of two trees of arrays over the norm of the second."""
    leaves = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    difference = sum(float(np.sum((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)) for a, b in leaves)
    return float(np.sqrt(difference / sum(float(np.sum(np.asarray(b, np.float64) ** 2)) for _, b in leaves)))


def repeatability(name: str, program: TrainingProgram, folder: Path) -> dict[str, Any]:
    """Ten steps from a fresh state; from their middle, saved and restored; and from the start again.

    Args:
      name: of the row.
      program: at its first step; it is left there.
      folder: of the checkpoint, which must be empty.

    Returns:
      Whether losses and every array of the state are equal to the bit.
    """
    start = jax.device_get(program.state)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), program.state
    )

    def five() -> list[bytes]:
        return [np.asarray(program.step()).tobytes() for _ in range(5)]

    losses = five()
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(5, program.state, {})
        checkpoints.wait()
        losses += five()
        end = jax.device_get(program.state)
        program.state, _ = checkpoints.restore(5, like)
    losses_restored = five()
    end_restored = jax.device_get(program.state)
    program.state = jax.device_put(start, shardings)
    losses_repeated = five() + five()
    end_repeated = jax.device_get(program.state)
    program.state = jax.device_put(start, shardings)
    return {
        "operations": name,
        "losses after restoring": _equal(losses_restored, losses[5:]),
        "state after restoring": _equal(end_restored, end),
        "losses repeated": _equal(losses_repeated, losses),
        "state repeated": _equal(end_repeated, end),
        "relative difference": max(relative_error(end_restored.params, end.params),
                                   relative_error(end_repeated.params, end.params)),
    }  # fmt: skip


def price_of_determinism(deterministic: TrainingProgram, default: TrainingProgram, *, steps: int) -> dict[str, Any]:
    """Seconds a step of both, in turn."""
    calls: Calls = {"deterministic": deterministic.step, "default": default.step}
    seconds = {
        name: float(np.median(times)) for name, times in in_turn(calls, steps=steps, lead_in=0, rounds=3).items()
    }
    return {f"{name}, ms a step": 1e3 * value for name, value in seconds.items()} | {
        "times as long": seconds["deterministic"] / seconds["default"]
    }


def _equal(found: Any, expected: Any) -> str:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    same = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    return "equal to the bit" if same else "DIFFERENT"


def _keep_gradients() -> optax.GradientTransformation:
    """An optimiser that changes nothing and keeps the gradients as its state."""

    def update(gradients, state, params=None):
        del state, params
        return jax.tree.map(jnp.zeros_like, gradients), gradients

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
