"""oneDNN as compiled programs call it, against XLA's own convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autocontext_jax.models import convolution, onednn

pytestmark = pytest.mark.skipif(onednn.version() is None, reason="no oneDNN here: its package is for x86 Linux")


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


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

    monkeypatch.setattr(onednn._Operation, "run", interrupted)
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
