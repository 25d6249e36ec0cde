"""Same-size 3D convolutions and deconvolutions on x86 processors by the oneDNN library, called from programs.

XLA's compiler has no fast 3D convolution for CPUs. oneDNN has one, in float32 and, on processors that multiply it, in
bfloat16. Its operations (`onednn_operations.py`) run in handlers that are registered with XLA's foreign function
interface (`xla_ffi.py`). Memory that oneDNN needs besides the arrays is an array of the program too, so that XLA plans
it together with the others.
"""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from autocontext_jax.models import onednn_operations, xla_ffi
from autocontext_jax.models.onednn_operations import version

# The names of an operation's arrays: its operands, then its result. A gradient has its array's name and shape: x is
# [B, D, H, W, C], the kernel [O, kd, kh, kw, C], y [B, D, H, W, O].
ARRAYS = {
    "convolution": ("x", "kernel", "y"),
    "input_gradient": ("y", "kernel", "x"),
    "filter_gradient": ("x", "y", "kernel"),
    "deconvolution_relu": ("x", "kernel", "bias", "y"),
}
KINDS = (*ARRAYS, "convolution_relu")


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution, zero-padded to the same size; available if `version` is not None.

    Args:
      x: [B, D, H, W, C], float32 or bfloat16.
      kernel: [O, kd, kh, kw, C] of the same type, odd sizes.

    Returns:
      [B, D, H, W, O].
    """
    return _call("convolution", x, kernel, result=(*x.shape[:4], kernel.shape[0]))


def convolution_relu(xs: Sequence[jax.Array], kernels: Sequence[jax.Array], bias: jax.Array) -> jax.Array:
    """relu(convolution of xs[0] + convolution of xs[1] + ... + bias), without an array in between.

    Args:
      xs: [B, D, H, W, C] each, float32 or bfloat16; the channels may differ.
      kernels: for each of xs [O, kd, kh, kw, C] of the same type, odd sizes.
      bias: [O], float32.

    Returns:
      [B, D, H, W, O].
    """
    pairs = [array for pair in zip(xs, kernels, strict=True) for array in pair]
    return _call("convolution_relu", *pairs, bias, result=(*xs[0].shape[:4], kernels[0].shape[0]))


def deconvolution_relu(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """relu(deconvolution + bias), the deconvolution with strides as large as the kernel, so that blocks do not overlap.

    Args:
      x: [B, D, H, W, C], float32 or bfloat16.
      kernel: [kd, kh, kw, O, C] of the same type.
      bias: [O], float32.

    Returns:
      [B, kd D, kh H, kw W, O].
    """
    batch, *size, _ = x.shape
    return _call("deconvolution_relu", x, kernel, bias, result=(batch, *_times(size, kernel), kernel.shape[3]))


def _times(size: Sequence[int], kernel: jax.Array) -> list[int]:
    return [n * step for n, step in zip(size, kernel.shape[:3], strict=True)]


def input_gradient(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """Gradient of `convolution` with respect to its input.

    Args:
      gradient: [B, D, H, W, O], with respect to its output, float32 or bfloat16.
      kernel: [O, kd, kh, kw, C] of the same type, odd sizes.

    Returns:
      [B, D, H, W, C].
    """
    return _call("input_gradient", gradient, kernel, result=(*gradient.shape[:4], kernel.shape[4]))


def filter_gradient(x: jax.Array, gradient: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Gradient of `convolution` with respect to its kernel, summed in float32.

    Args:
      x: [B, D, H, W, C], the convolution's input, float32 or bfloat16.
      gradient: [B, D, H, W, O] of the same type, with respect to its output.
      size: of the kernel, (kd, kh, kw), odd.

    Returns:
      [O, kd, kh, kw, C] of the same type.
    """
    dtype = x.dtype
    if x.shape[1] < size[0]:
        # For these oneDNN 3.2 does not set all planes of a bfloat16 kernel's gradient on processors without AMX.
        x, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    return _call("filter_gradient", x, gradient, result=(gradient.shape[-1], *size, x.shape[-1])).astype(dtype)


# ---- Calls by compiled programs


def _call(kind: str, *operands: jax.Array, result: tuple[int, ...]) -> jax.Array:
    return _operation_p.bind(*operands, kind=kind, result=tuple(result))


# An operation as JAX sees it: operands -> result, in the order of ARRAYS. A primitive, because its lowering depends on
# what the program is for: an exported program runs in other processes, which have no such handlers.
_operation_p = Primitive("onednn_operation")


@functools.partial(jax.jit, static_argnames=("kind", "result"))
def _run_at_once(*operands: jax.Array, kind: str, result: tuple[int, ...]) -> jax.Array:
    return _operation_p.bind(*operands, kind=kind, result=result)


_operation_p.def_impl(_run_at_once)
_operation_p.def_abstract_eval(lambda *operands, kind, result: operands[0].update(shape=result))


def _foreign(*operands: jax.Array, kind: str, result: tuple[int, ...]) -> jax.Array:
    """The call of oneDNN."""
    dtype = operands[0].dtype
    operation, _ = _operation(kind, (*(operand.shape for operand in operands), result), str(dtype))
    results = jax.ShapeDtypeStruct(result, dtype), jax.ShapeDtypeStruct((operation.scratch_bytes,), jnp.uint8)
    return jax.ffi.ffi_call(_targets()[kind], results)(*operands)[0]


def _portable(*operands: jax.Array, kind: str, result: tuple[int, ...]) -> jax.Array:
    """The same function by XLA's own convolution."""

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "ODHWI", "NDHWC"))

    if kind == "convolution":
        return convolve(*operands)
    if kind == "convolution_relu":
        *pairs, bias = operands
        total = sum(convolve(x, kernel).astype(jnp.float32) for x, kernel in zip(pairs[::2], pairs[1::2], strict=True))
        return jax.nn.relu(total + bias).astype(pairs[0].dtype)
    if kind == "deconvolution_relu":
        x, kernel, bias = operands
        blocks = jnp.einsum("bdhwc,ijkoc->bdihjwko", x, kernel, preferred_element_type=jnp.float32)
        return jax.nn.relu(blocks.reshape(result) + bias).astype(x.dtype)
    first, second = operands
    missing = jnp.zeros(result, first.dtype)  # where it is taken does not matter to a linear function
    if kind == "input_gradient":
        return jax.vjp(lambda x: convolve(x, second), missing)[1](first)[0]
    return jax.vjp(lambda kernel: convolve(first, kernel), missing)[1](second)[0]


def _lower(context: Any, *operands: Any, kind: str, result: tuple[int, ...]) -> Any:
    exported = context.module_context.lowering_parameters.for_export
    lower = mlir.lower_fun(_portable if exported else _foreign, multiple_results=False)
    return lower(context, *operands, kind=kind, result=result)


mlir.register_lowering(_operation_p, _lower, platform="cpu")
# A program that is exported for several platforms is lowered for all of them, also where it will not be called.
mlir.register_lowering(_operation_p, mlir.lower_fun(_portable, multiple_results=False))


def _batch(arrays: Any, axes: Any, *, kind: str, result: tuple[int, ...]) -> tuple[jax.Array, int]:
    """`jax.vmap`: batches of images become one batch; where each has a kernel of its own, one operation each."""
    mapped = [array if axis is None else jnp.moveaxis(array, axis, 0)
              for array, axis in zip(arrays, axes, strict=True)]  # fmt: skip
    count = next(array.shape[0] for array, axis in zip(mapped, axes, strict=True) if axis is not None)
    images = [array.ndim - (axis is not None) == 5 and number % 2 == 0
              for number, (array, axis) in enumerate(zip(arrays, axes, strict=True))]  # fmt: skip
    if kind != "filter_gradient" and all(image == (axis is not None) for image, axis in zip(images, axes, strict=True)):
        operands = [array.reshape(-1, *array.shape[2:]) if image else array
                    for array, image in zip(mapped, images, strict=True)]  # fmt: skip
        flat = _call(kind, *operands, result=(count * result[0], *result[1:]))
        return flat.reshape(count, *result), 0
    every = [jnp.broadcast_to(array, (count, *array.shape)) if axis is None else array
             for array, axis in zip(mapped, axes, strict=True)]  # fmt: skip
    return lax.map(lambda operands: _call(kind, *operands, result=result), tuple(every)), 0


batching.primitive_batchers[_operation_p] = _batch


@functools.cache
def _targets() -> dict[str, str]:
    """Names of the handlers, registered with XLA. Programs are cached on disk, so the names contain the version."""
    names = {kind: f"onednn_{version()}_{kind}" for kind in KINDS}
    for kind, name in names.items():
        xla_ffi.register(name, functools.partial(_run, kind))
    return names


@functools.cache
def _operation(
    kind: str, shapes: tuple[tuple[int, ...], ...], dtype: str
) -> tuple[onednn_operations.Operation, tuple[str, ...]]:
    """The operation and the names of its arrays, from the shapes of its operands and its result."""
    if kind == "convolution_relu":
        xs, kernels = shapes[:-2:2], shapes[1:-2:2]
        pairs = [name for number in range(len(xs)) for name in (f"x{number}", f"kernel{number}")]
        return onednn_operations.convolution_relu(xs, kernels, dtype), (*pairs, "bias", "y")
    named = dict(zip(ARRAYS[kind], shapes, strict=True))
    make = getattr(onednn_operations, kind)
    return make(named["x"], named["kernel"], dtype), ARRAYS[kind]


def _run(kind: str, operands: Sequence[xla_ffi.Buffer], results: Sequence[xla_ffi.Buffer]) -> None:
    result, scratch = results
    buffers = (*operands, result)
    operation, names = _operation(kind, tuple(buffer.shape for buffer in buffers), result.dtype)
    if scratch.shape[0] < operation.scratch_bytes:
        raise RuntimeError(
            f"the program was compiled for {scratch.shape[0]} bytes of scratch memory, but oneDNN {version()} needs "
            f"{operation.scratch_bytes}"
        )
    with _running:
        operation.run({name: buffer.address for name, buffer in zip(names, buffers, strict=True)}, scratch.address)


# An operation's arguments hold addresses while it runs, and it runs on all cores.
_running = threading.Lock()
