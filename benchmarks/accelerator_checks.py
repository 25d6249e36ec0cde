"""Part 2 of accelerator.py: whether an accelerator's results are right, and the same in every run."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from training_program import Calls, TrainingProgram, in_turn

from autocontext_jax.data.labels import IGNORE
from autocontext_jax.geometry import CUBES, Spacing
from autocontext_jax.images.spec import CT, Channel, ImageSpec
from autocontext_jax.models.activations import activate
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import PyramidConfig, make_pyramid
from autocontext_jax.models.unet import UNet
from autocontext_jax.runtime import compiler_options
from autocontext_jax.training.checkpoints import Checkpoints
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.state import Batch, create_state, inference_model, make_train_step
from autocontext_jax.training.targets import CLASSES, Targets

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
FACTORS = {"float32": 3.0, "bfloat16": 1.5}
LABELS = 8  # 0 and seven organs
DICE = LossConfig()  # of the paper


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model and data.

    Attributes:
      loss: that is minimised.
      norm: see `NetworkConfig`.
      spacing: of the finest level.
      channels: of an image.
      targets: what the labels mean.
      unknown: whether the first sample of a batch does not annotate the last class or region.
    """

    loss: LossConfig = DICE
    norm: str = "batch"
    spacing: Spacing = CUBES
    channels: int = 1
    targets: Targets = CLASSES
    unknown: bool = False


MODELS = {
    "CT, as in the paper": Kind(),
    "thick slices, instance norm, two channels, partly annotated regions, ignored voxels": Kind(
        LossConfig(cross_entropy=0.5),
        "instance",
        (4.0, 1.0, 1.0),
        2,
        Targets(((1, 2, 3), (2, 3), (5,)), ignore=True),
        unknown=True,
    ),
}


def against_the_cpu(kind: Kind, *, width: int, depth: int, edge: int, batch: int) -> list[dict[str, Any]]:
    """Loss, gradients, running averages and predicted maps of a small pyramid beside the CPU's in float32.

    Errors are the norm of the difference over the norm of the CPU's values, all arrays of a kind together. In float32
    all products have the highest precision on both; in bfloat16 the network computes as in training. Gradients are
    sensitive to rounding on any device: a ReLU or a maximum that is nearly undecided changes, and batch normalisation
    subtracts the mean of gradients that were rounded, which is most of them. The CPU shows how sensitive: in bfloat16
    by its own error, in float32 by how far its results move when every voxel moves by its last bit. Results are right
    if they are no further off than the tolerance, or than 1.5 times (bfloat16) or 3 times (float32) that.

    Args:
      kind: of model and data.
      width: channels of the first convolution.
      depth: resolutions of the network.
      edge: N.
      batch: B.

    Returns:
      A row for each type and kind of result.
    """
    steps, states = {}, {}
    for dtype in TOLERANCES:
        network = NetworkConfig(width, depth, kind.norm, dtype=dtype)
        graph, states[dtype] = create_state(make_pyramid(UNet, network, _pyramid(kind), seed=0), _keep_gradients())
        # The function beneath the jitted step: all of it is compiled as one program below.
        step = make_train_step(graph, _keep_gradients(), kind.loss, targets=kind.targets).__wrapped__
        steps[dtype] = (graph, step)

    def compute(dtype: str, state: Any, batch: Batch) -> dict[str, Any]:
        graph, step = steps[dtype]
        with jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext():
            after, metrics = step(state, batch)
            logits = inference_model(graph, state.params, state.batch_stats)(batch.images)
        maps = tuple(activate(level, kind.targets.activation) for level in logits)
        results = {"loss": metrics.loss, "gradients": after.optimizer, "maps": maps}
        return results | ({"running averages": after.batch_stats} if kind.norm == "batch" else {})

    def both(states, batch):
        return {dtype: compute(dtype, states[dtype], batch) for dtype in TOLERANCES}

    images, labels = _blocks(kind, edge, batch)
    arguments = states, _batch(kind, images, labels)
    program = jax.jit(both, compiler_options=compiler_options(jax.default_backend()))
    found = jax.device_get(program(*jax.device_put(arguments, jax.devices()[0])))
    reference = program if jax.default_backend() == "cpu" else jax.jit(both)  # there, one compilation is enough
    cpu = jax.devices("cpu")[0]
    on_cpu = jax.device_get(reference(*jax.device_put(arguments, cpu)))
    nudged = _batch(kind, [np.nextafter(image, np.float32(np.inf)) for image in images], labels)
    moved = jax.device_get(reference(*jax.device_put((states, nudged), cpu)))["float32"]
    rows = []
    for dtype, tolerance in TOLERANCES.items():
        for name, expected in on_cpu["float32"].items():
            error = relative_error(found[dtype][name], expected)
            own = relative_error(moved[name] if dtype == "float32" else on_cpu[dtype][name], expected)
            allowed = max(tolerance, FACTORS[dtype] * own)
            row = {"type": dtype, "of": name, "relative error": error, "the CPU's own": own, "allowed": allowed}
            rows.append(row | {"right": "yes" if error <= allowed else "NO"})
    return rows


def _pyramid(kind: Kind) -> PyramidConfig:
    """Two levels."""
    image = CT
    if kind.channels > 1:
        image = ImageSpec(tuple(Channel(f"MR {number}", "zscore") for number in range(kind.channels)))
    outputs, activation = len(kind.targets.regions) or LABELS, kind.targets.activation
    return PyramidConfig(2, outputs, image=image, spacing=kind.spacing, activation=activation)


def _blocks(kind: Kind, edge: int, batch: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Noisy images of 4^3 blocks, labelled by the blocks' intensities: gradients of pure noise would say nothing."""
    rng = np.random.default_rng(0)
    images, labels = [], []
    for _ in range(2):
        blocks = np.kron(rng.uniform(-1, 1, (batch, 4, 4, 4)), np.ones((1, *(edge // 4,) * 3)))
        noise = 0.1 * rng.standard_normal((*blocks.shape, kind.channels))
        scale = 1 if kind.channels > 1 else 500  # HU of CT
        images.append((scale * (blocks[..., None] + noise)).astype(np.float32))
        labels.append(((blocks + 1) * LABELS / 2).astype(np.uint8))
        if kind.targets.ignore:
            labels[-1][:, 0] = IGNORE
    return images, labels


def _batch(kind: Kind, images: list[np.ndarray], labels: list[np.ndarray]) -> Batch:
    known = None
    if kind.unknown:
        known = np.ones((len(labels[0]), 1 + len(kind.targets.regions) if kind.targets.regions else LABELS), bool)
        known[0, -1] = False
    return Batch(*jax.device_put((tuple(images), tuple(labels), known)))


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
