"""Results do not depend on how many devices share the work, nor on what they share; and what they tell each other."""

import functools
import itertools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FUSION_EMITTERS
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from random_models import with_random_weights

from autocontext_jax import processes
from autocontext_jax.models.blocks import ConvolutionBlock, NetworkConfig, UpsamplingBlock
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig
from autocontext_jax.models.unet import UNet
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.sharding import batch_sharding, make_mesh, place, replicated, state_sharding
from autocontext_jax.training.state import Batch, TrainState, create_state, make_train_step

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CLASSES, EDGE, BATCH = 3, 8, 4
# By plain gradients, so that the parameters say what these were; the momentum is a state to split.
OPTIMIZER = optax.sgd(1.0, momentum=0.9)
# (data, space), and whether the optimiser's state is split.
SAMPLE_NORMS, MESHES = ("instance", "group"), ((1, 1), (4, 2))
LAYOUTS = [(1, 1, False), (2, 1, False), (1, 2, False), (4, 2, False), (4, 2, True)]


def new_pyramid() -> Pyramid:
    network = NetworkConfig(base_channels=4, depth=2)
    config = PyramidConfig(levels=2, classes=CLASSES)
    return Pyramid(config, lambda inputs, spacing, rngs: UNet(inputs, CLASSES, network, rngs=rngs), rngs=nnx.Rngs(0))


@functools.cache
def initial_state():
    """Of one device, so that all layouts begin with the same numbers.

    No voxel lies near a ReLU's kink: one that rounding puts on its other side changes gradients by 1e-5 and more.
    """
    state = jax.device_get(create_state(with_random_weights(new_pyramid, seed=0), OPTIMIZER)[1])
    raised = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 6 if "bias" in jax.tree_util.keystr(path) else leaf, state.params
    )
    return state.replace(params=raised)


def train_a_step(layout: tuple[int, int, bool]) -> tuple[list[str], dict[str, np.ndarray], str]:
    """One step on a mesh: how the optimiser's state lies, what the step measured and left, the compiled program."""
    data, space, split = layout
    graph, _ = create_state(nnx.eval_shape(new_pyramid), OPTIMIZER)
    rng = np.random.default_rng(0)
    shape = (BATCH, EDGE, EDGE, EDGE)
    labels = [rng.integers(0, CLASSES, shape).astype(np.uint8) for _ in range(2)]
    images = [(200.0 * label + rng.normal(0, 100, shape)).astype(np.float32)[..., None] for label in labels]

    mesh = make_mesh(data, space)
    assert dict(mesh.shape) == {"data": data, "space": space}
    with jax.set_mesh(mesh):
        placement = state_sharding(mesh, initial_state(), split_optimizer=split)
        state = jax.device_put(initial_state(), placement)
        batch = Batch(*(tuple(place(array, batch_sharding(mesh)) for array in arrays) for arrays in (images, labels)))
        step = make_train_step(graph, OPTIMIZER, LossConfig(), sharding=(placement, replicated(mesh)))
        compiled = step.lower(state, batch).compile()
        state, metrics = compiled(state, batch)
    trees = {"params": state.params, "statistics": state.batch_stats}
    found = {f"{name}/{i}": leaf for name, tree in trees.items() for i, leaf in enumerate(jax.tree.leaves(tree))}
    found |= {"losses": metrics.losses, "gradient_norm": metrics.gradient_norm}
    specs = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(state.optimizer)}
    return sorted(specs), jax.device_get(found), compiled.as_text()


class TwoBlocks(nnx.Module):
    """Every place where a network normalises: after a convolution, and before a deconvolution's voxels are in place."""

    def __init__(self, norm: str):
        config, rngs = NetworkConfig(norm=norm), nnx.Rngs(0)
        self.first, self.second = (
            ConvolutionBlock(1, 16, (3, 3, 3), config, rngs),
            UpsamplingBlock(16, (2, 2, 2), config, rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.first(x))


def two_blocks(norm: str, data: int, space: int) -> dict[str, np.ndarray]:
    """Their result on a mesh, and the gradients of their parameters."""
    graph, params = nnx.split(nnx.eval_shape(lambda: TwoBlocks(norm)))
    rng = np.random.default_rng(0)
    # By large biases no voxel lies near a ReLU's kink, as in `initial_state`.
    params = jax.tree.map(
        lambda leaf: np.float32(rng.normal(0, 0.3, leaf.shape) if leaf.ndim > 1 else rng.uniform(6, 7, leaf.shape)),
        params,
    )
    x, weights = (np.float32(rng.normal(size=(BATCH, *(edge,) * 3, channels))) for edge, channels in ((8, 1), (16, 16)))
    x *= np.float32([1, 3, 10, 30])[:, None, None, None, None]  # each sample has statistics of its own

    def total(params, x, weights):
        y = nnx.merge(graph, params, copy=True)(x)
        return jnp.sum(weights * y), y

    mesh = make_mesh(data, space)
    with jax.set_mesh(mesh):
        placed = [place(array, batch_sharding(mesh)) for array in (x, weights)]
        compiled = jax.jit(jax.grad(total, has_aux=True)).lower(params, *placed).compile()
        assert "all-gather" not in compiled.as_text()
        gradients, y = compiled(params, *placed)
    found = {f"gradient/{i}": leaf for i, leaf in enumerate(jax.tree.leaves(gradients))}
    return jax.device_get(found | {"result": y})


def main(folder: str) -> None:
    """What the subprocess runs, with eight devices."""
    for norm, (data, space) in itertools.product(SAMPLE_NORMS, MESHES):
        np.savez(f"{folder}/{norm}_{data}_{space}.npz", **two_blocks(norm, data, space))
    for number, layout in enumerate(LAYOUTS):
        shards, found, program = train_a_step(layout)
        np.savez(f"{folder}/{number}.npz", **found)
        Path(f"{folder}/{number}.txt").write_text(program, encoding="utf-8")
        Path(f"{folder}/{number}.json").write_text(json.dumps(shards), encoding="utf-8")


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process with so many devices, which compiles as quickly as this one."""
    flags = f"--{FUSION_EMITTERS}=false --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    run = subprocess.run(
        [sys.executable, "-c", "import sys, test_sharding; test_sharding.main(sys.argv[1])", str(folder)],
        cwd=Path(__file__).parent, env=with_devices(8), capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return folder


def one_of_two(address: str, index: str, folder: str) -> None:
    """What each of two processes runs, with four of the mesh's eight devices."""
    processes.start(address, 2, int(index))
    _, found, _ = train_a_step((4, 2, False))
    if processes.is_first():
        np.savez(f"{folder}/processes.npz", **found)


def assert_those_of_one_device(folder: Path, name: str, one_device: str = "0.npz") -> None:
    one, several = np.load(folder / one_device), np.load(folder / name)
    assert one.files == several.files
    for key in one.files:
        scale = max(1, float(np.abs(one[key]).max()))
        np.testing.assert_allclose(several[key], one[key], rtol=0, atol=1e-5 * scale, err_msg=key)


def test_two_processes_have_the_losses_gradients_and_statistics_of_one_device(results):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = "import sys, test_sharding; test_sharding.one_of_two(*sys.argv[1:])"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(index), str(results)],
            cwd=Path(__file__).parent, env=with_devices(4), stderr=subprocess.PIPE, encoding="utf-8",
        )
        for index in range(2)
    ]  # fmt: skip
    for process in running:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    assert_those_of_one_device(results, "processes.npz")


@pytest.mark.parametrize("number", range(1, len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS[1:]])
def test_losses_gradients_and_statistics_are_those_of_one_device(results, number):
    assert_those_of_one_device(results, f"{number}.npz")


@pytest.mark.parametrize("norm", SAMPLE_NORMS)
def test_with_statistics_of_each_sample_results_and_gradients_are_those_of_one_device(results, norm):
    assert_those_of_one_device(results, f"{norm}_4_2.npz", f"{norm}_1_1.npz")


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
def test_only_borders_are_exchanged_and_only_sums_reduced(results, number):
    data, space, split = LAYOUTS[number]
    program = (results / f"{number}.txt").read_text(encoding="utf-8")
    assert ("collective-permute" in program) == (space > 1)
    assert ("all-reduce" in program) == (data * space > 1)
    assert ("all-gather" in program) == split  # of the parameters that each device has updated
    assert "all-to-all" not in program
    # What passes from neighbour to neighbour is smaller than a device's share of the activations that it completes.
    exchanged = re.findall(r"f32\[([\d,]+)\]\S* collective-permute\(", program)
    assert bool(exchanged) == (space > 1)
    for dims in exchanged:
        b, depth, *_ = (int(size) for size in dims.split(","))
        assert b == BATCH // data
        assert depth <= EDGE // space


def test_the_optimisers_state_is_split_only_where_wanted(results):
    specs = [json.loads((results / f"{number}.json").read_text(encoding="utf-8")) for number in range(len(LAYOUTS))]
    assert any("data" in spec for spec in specs[-1])
    assert [spec for spec in specs[:-1] if spec != ["P()"]] == []


def test_more_devices_for_a_patch_than_there_are():
    with pytest.raises(ValueError, match="space is 64; expected at most the"):
        make_mesh(4, 64)


def test_what_cannot_be_divided_is_copied():
    mesh = AbstractMesh((2, 1), ("data", "space"))
    state = TrainState(jnp.zeros((), jnp.int32), {}, {}, {"odd": jnp.zeros((3, 5)), "even": jnp.zeros((3, 4))})
    placement = state_sharding(mesh, state, split_optimizer=True)
    assert placement.optimizer["odd"].spec == PartitionSpec()
    assert placement.optimizer["even"].spec == PartitionSpec(None, "data")
