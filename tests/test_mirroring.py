"""Tiles that are predicted as their mirror images too: the average over all combinations of the axes."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import ndimage, special

from autocontext_jax.inference import tile_programs
from autocontext_jax.inference.tile_programs import Mirroring, make_tile_program
from autocontext_jax.models.pyramid import PyramidConfig

TILES, SIZE, CLASSES = 2, (4, 6, 8), 3


class Stencil(nnx.Module):
    """Each output sees the 27 voxels about its own, of the image and of the enlarged maps, with weights of its own."""

    def __init__(self, weights: np.ndarray, activation: str):
        self.config = PyramidConfig(levels=2, classes=CLASSES, activation=activation)
        self.weights = nnx.Param(jnp.asarray(weights, jnp.float32))  # [3, 3, 3, inputs, K]

    def level(self, level, image, maps):
        """As `Pyramid.level`."""
        x = image.astype(jnp.float32)
        if maps is not None:
            inner = maps[:, 1:-1, 1:-1, 1:-1].astype(jnp.float32)
            for axis in (1, 2, 3):
                inner = jnp.repeat(inner, 2, axis)
            x = jnp.concatenate([x, inner], axis=-1)
        weights = self.weights[...][..., : x.shape[-1], :]
        padded, out = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0))), 0.0
        z, y, x = SIZE
        for i, j, k in itertools.product(range(3), repeat=3):
            out += jnp.einsum("nzyxc,co->nzyxo", padded[:, i : i + z, j : j + y, k : k + x], weights[i, j, k])
        return out


def by_numpy(weights: np.ndarray, activation: str, image: np.ndarray, context: np.ndarray | None) -> np.ndarray:
    """The maps of one tile: image [z, y, x], context [z / 2, y / 2, x / 2, K] without its border."""
    inputs = [image]
    if context is not None:
        inputs += list(np.moveaxis(context.repeat(2, 0).repeat(2, 1).repeat(2, 2), -1, 0))
    logits = np.stack(
        [
            sum(ndimage.correlate(x, weights[..., c, k], mode="constant") for c, x in enumerate(inputs))
            for k in range(CLASSES)
        ],
        axis=-1,
    )
    return special.softmax(logits, axis=-1) if activation == "softmax" else special.expit(logits)


@pytest.fixture
def in_single_precision(monkeypatch):
    monkeypatch.setattr(tile_programs, "MAP_DTYPE", jnp.float32)


def program_of(weights: np.ndarray, level: int, mirroring: Mirroring, activation: str = "softmax"):
    """(images, chunks, weights of voxels, offsets) -> maps."""
    graph, state = nnx.split(Stencil(weights, activation))
    program = make_tile_program(graph, level, mirroring=mirroring)
    return lambda *arguments: np.array(program(state, *arguments))


def given(seed: int = 0):
    """Images, chunks of a coarser level, weights of voxels, places of the tiles' contexts in the chunks."""
    rng = np.random.default_rng(seed)
    images = rng.integers(-3, 4, (TILES, 1, *SIZE)).astype(np.int16)
    chunks = tuple(jnp.asarray(rng.random((4, 9, 10, CLASSES)), jnp.float32) for _ in range(2))
    weights = tuple(rng.random((TILES, size)).astype(np.float32) for size in SIZE)
    return images, chunks, weights, np.array([[1, 2, 3], [3, 0, 1]], np.int32)


@pytest.mark.parametrize("axes", ["z", "y", "x", "zx", "zyx"])
@pytest.mark.usefixtures("in_single_precision", "compiled_quickly")
def test_a_lopsided_network_is_averaged_over_all_combinations(axes):
    activation = "sigmoid" if axes == "zx" else "softmax"
    classes = (0, 2, 1) if "x" in axes else ()
    stencil = np.random.default_rng(1).normal(size=(3, 3, 3, 1 + CLASSES, CLASSES))
    images, chunks, weights, offsets = given()
    program = program_of(stencil, 2, Mirroring(axes, classes), activation)
    found = program(images, chunks, weights, offsets)
    combinations = [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]
    assert len(combinations) == 2 ** len(axes)
    coarser = np.concatenate([np.array(chunk, float) for chunk in chunks])
    for tile in range(TILES):
        first = offsets[tile] + 1
        context = coarser[tuple(slice(f, f + s // 2) for f, s in zip(first, SIZE, strict=True))]
        passes = []
        for combination in combinations:
            places = [("zyx").index(axis) for axis in combination]
            exchanged = list(classes) if "x" in combination else [0, 1, 2]
            seen = by_numpy(
                stencil, activation,
                np.flip(images[tile, 0].astype(float), places), np.flip(context, places)[..., exchanged],
            )  # fmt: skip
            passes.append(np.flip(seen, places)[..., exchanged])
        weight = np.einsum("z,y,x->zyx", *(along[tile] for along in weights))[..., None]
        np.testing.assert_allclose(found[tile], weight * np.mean(passes, axis=0), rtol=0, atol=1e-5)
        # The passes do differ, and so would an average of fewer of them.
        assert np.abs(passes[-1] - np.mean(passes, axis=0)).max() > 0.1


@pytest.mark.usefixtures("in_single_precision", "compiled_quickly")
@pytest.mark.parametrize("level", [1, 2])
def test_a_symmetric_network_gives_the_same_maps(level):
    """Its weights depend on the distance alone, and its last two outputs are each other's left and right."""
    distance = np.abs(np.indices((3, 3, 3)) - 1).sum(0)
    inputs = np.random.default_rng(2).normal(size=(4, 1 + CLASSES, CLASSES))
    exchanged = inputs[:, [0, 1, 3, 2]][..., [0, 2, 1]]
    stencil = ((inputs + exchanged) / 2)[distance]
    images, chunks, weights, offsets = given()
    if level == 1:
        chunks = offsets = None
    once = program_of(stencil, level, Mirroring())(images, chunks, weights, offsets)
    found = program_of(stencil, level, Mirroring("zyx", (0, 2, 1)))(images, chunks, weights, offsets)
    np.testing.assert_allclose(found, once, rtol=0, atol=1e-6)
    assert once.std(axis=(0, 1, 2, 3)).min() > 0.01


@pytest.mark.parametrize(("axes", "passes"), [("x", 2), ("zy", 4), ("zyx", 8)])
def test_every_combination_is_one_pass_and_twice_mirrored_is_the_tile(axes, passes):
    mirroring = Mirroring(axes, (0, 2, 1) if "x" in axes else ())
    combinations = mirroring.combinations
    assert len({tuple(row) for row in combinations.tolist()}) == len(combinations) == passes
    assert not combinations[0].any()
    maps = np.arange(2 * 24 * 3.0).reshape(2, 2, 3, 4, 3)
    images = [mirroring.apply(maps, row) for row in combinations]
    assert len({np.array(image).tobytes() for image in images}) == passes
    for row, image in zip(combinations, images, strict=True):
        np.testing.assert_array_equal(mirroring.apply(image, row), maps)
    np.testing.assert_array_equal(
        mirroring.apply(maps[..., :1], combinations[-1], maps=False),
        np.flip(maps[..., :1], [1 + "zyx".index(axis) for axis in axes]),
    )


@pytest.mark.usefixtures("in_single_precision", "compiled_quickly")
def test_a_tile_takes_hardly_more_memory_for_eight_passes():
    stencil = np.ones((3, 3, 3, 1 + CLASSES, CLASSES))
    arguments = given()

    def temporary(mirroring: Mirroring) -> int:
        graph, state = nnx.split(Stencil(stencil, "softmax"))
        program = make_tile_program(graph, 2, mirroring=mirroring)
        return program.lower(state, *arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporary(Mirroring("zyx", (0, 2, 1))) < 1.5 * temporary(Mirroring())
