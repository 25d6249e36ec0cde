"""oneDNN as compiled programs call it, against XLA's own convolution."""

import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from autocontext_jax.models import convolution, onednn, onednn_operations

pytestmark = [
    pytest.mark.skipif(onednn.version() is None, reason="oneDNN's package is for x86 Linux alone"),
    pytest.mark.usefixtures("compiled_quickly"),
]


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def assert_relative(value: jax.Array, expected: jax.Array, tolerance: float):
    value, expected = (np.asarray(array, np.float64) for array in (value, expected))
    assert value.shape == expected.shape
    assert np.abs(value - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    ("x_shape", "outputs", "size"),
    [
        ((1, 8, 8, 8, 1), 8, (3, 3, 3)),  # the first layer
        ((1, 8, 8, 8, 9), 5, (3, 3, 3)),  # with context; channels that fill no register
        ((2, 5, 6, 7, 16), 24, (3, 3, 3)),
        ((2, 5, 6, 7, 4), 3, (1, 3, 3)),  # 2D
        ((1, 1, 1, 1, 4), 3, (3, 3, 3)),  # one voxel, all of it border
        ((1, 6, 6, 6, 2), 2, (5, 3, 1)),
        ((2, 5, 6, 7, 16), 24, (1, 1, 1)),  # a deconvolution
        ((1, 2, 2, 2, 256), 256, (3, 3, 3)),  # the deepest level of a patch of 32^3
        # On processors without AMX oneDNN 3.2 is wrong where the kernel is deeper than the volume.
        *(((2, depth, 4, 4, 16), 8, (size, 3, 3)) for size in (3, 5) for depth in (1, 2, 3, 4, 5)),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-8)])
def test_convolution_and_gradients_are_xlas(x_shape, outputs, size, dtype, tolerance):
    if dtype == "bfloat16" and not convolution.multiplies_bfloat16():
        pytest.skip("this processor does not multiply bfloat16: it is converted before")
    x, kernel = normal(0, *x_shape).astype(dtype), normal(1, outputs, *size, x_shape[-1]).astype(dtype)
    cotangent = normal(2, *x_shape[:-1], outputs).astype(dtype)
    wide = [array.astype(jnp.float32) for array in (x, kernel, cotangent)]
    with jax.default_matmul_precision("highest"):
        expected, pullback = jax.vjp(convolution.direct_convolution, *wide[:2])
    value = jax.jit(onednn.convolution)(x, kernel)
    x_gradient = jax.jit(onednn.input_gradient)(cotangent, kernel)
    kernel_gradient = jax.jit(onednn.filter_gradient, static_argnums=2)(x, cotangent, size)
    assert (value.dtype, x_gradient.dtype, kernel_gradient.dtype) == (dtype,) * 3
    assert_relative(value, expected, tolerance)
    assert_relative(x_gradient, pullback(wide[2])[0], tolerance)
    assert_relative(kernel_gradient, pullback(wide[2])[1], tolerance)


def test_programs_that_run_at_once_do_not_mix_their_arrays():
    """An operation's arguments are bound to addresses while it runs."""
    kernel = normal(1, 8, 3, 3, 3, 8)
    images = [normal(seed, 1, 12, 12, 12, 8) for seed in range(16)]
    expected = [convolution.direct_convolution(x, kernel) for x in images]
    call = jax.jit(onednn.convolution)
    for value, exact in zip([call(x, kernel) for x in images], expected, strict=True):
        assert_relative(value, exact, 1e-5)


def test_ctrl_c_within_a_call_fails_the_program(monkeypatch):
    """Calls may run in the main thread, where Python raises it."""

    def interrupted(*addresses):
        raise KeyboardInterrupt

    monkeypatch.setattr(onednn_operations.Operation, "run", interrupted)
    x, kernel = normal(0, 1, 4, 4, 4, 4), normal(1, 4, 3, 3, 3, 4)
    with pytest.raises(jax.errors.JaxRuntimeError, match="KeyboardInterrupt"):
        jax.block_until_ready(jax.jit(onednn.convolution)(x, kernel))


def test_a_failing_call_fails_the_program():
    """Else ctypes would print the error and the program go on with whatever its memory held."""
    x, kernel = normal(0, 1, 8, 8, 8, 4), normal(1, 4, 3, 3, 3, 4)
    jax.block_until_ready(onednn.convolution(x, kernel))  # so that XLA knows its name
    shapes = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((1,), jnp.uint8)
    call = jax.jit(jax.ffi.ffi_call(f"onednn_{onednn.version()}_convolution", shapes))
    with pytest.raises(jax.errors.JaxRuntimeError, match="compiled for 1 bytes of scratch memory"):
        jax.block_until_ready(call(x, kernel))


def gradients(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
    return jax.grad(lambda *arrays: (convolution.convolution(*arrays) ** 2).sum(), (0, 1))(x, kernel)


@pytest.mark.parametrize(("x_axis", "kernel_axis"), [(0, None), (1, None), (None, 0), (0, 2)])
def test_vmap_is_one_call_after_the_other(x_axis, kernel_axis):
    x = normal(0, 2, 5, 6, 7, 4) if x_axis is None else jnp.moveaxis(normal(0, 3, 2, 5, 6, 7, 4), 0, x_axis)
    one, many = normal(1, 8, 3, 3, 3, 4), normal(1, 3, 8, 3, 3, 3, 4)
    kernel = one if kernel_axis is None else jnp.moveaxis(many, 0, kernel_axis)
    for function in (lambda *arrays: (convolution.convolution(*arrays),), gradients):
        together = jax.vmap(function, (x_axis, kernel_axis))(x, kernel)
        alone = [
            function(
                x if x_axis is None else jnp.take(x, number, x_axis),
                kernel if kernel_axis is None else jnp.take(kernel, number, kernel_axis),
            )
            for number in range(3)
        ]
        for value, expected in zip(together, zip(*alone, strict=True), strict=True):
            assert_relative(value, jnp.stack(expected), 1e-6)


IMPORT_ELSEWHERE = """
import sys
import jax, numpy as np
from jax import export
arrays = np.load(sys.argv[1])
program = export.deserialize(open(sys.argv[2], "rb").read())
np.savez(sys.argv[3], *program.call(arrays["x"], arrays["kernel"]))
assert "autocontext_jax" not in sys.modules
"""


def test_an_exported_program_runs_where_nobody_knows_onednn(tmp_path):
    x, kernel = normal(0, 2, 5, 6, 7, 4), normal(1, 8, 3, 3, 3, 4)

    def function(x, kernel):
        return convolution.convolution(x, kernel), *gradients(x, kernel)

    assert "custom_call @onednn" in jax.jit(function).lower(x, kernel).as_text()  # as a rule it is called
    program = jax.export.export(jax.jit(function), platforms=["cpu", "cuda", "tpu"])(x, kernel)
    assert "custom_call @onednn" not in program.mlir_module()
    (tmp_path / "program").write_bytes(program.serialize())
    np.savez(tmp_path / "arrays.npz", x=x, kernel=kernel)
    places = [tmp_path / name for name in ("arrays.npz", "program", "results.npz")]
    subprocess.run([sys.executable, "-c", IMPORT_ELSEWHERE, *places], check=True, timeout=120)
    found = np.load(places[2])
    for name, expected in zip(found, function(x, kernel), strict=True):
        assert_relative(found[name], expected, 1e-5)
