"""Same-size 3D convolutions on x86 processors by the oneDNN library, called from compiled programs.

XLA's compiler has no fast 3D convolution for CPUs. oneDNN has one, in float32 and, on processors that multiply it, in
bfloat16. Its C interface is called through `ctypes`, from handlers that are registered with XLA's foreign function
interface (`xla_ffi.py`). Memory that oneDNN needs besides the arrays is an array of the program too, so that XLA plans
it together with the others.

The constants are those of `dnnl_types.h` and `dnnl_common_types.h` (oneDNN 3), under their names there.
"""

import ctypes
import functools
import math
import threading
from collections.abc import Sequence
from ctypes import POINTER, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from autocontext_jax.models import onednn_library, xla_ffi

ALIGNMENT = 64  # bytes, of each part of the scratch array

# dnnl_data_type_t
DNNL_TYPES = {"bfloat16": 2, "float32": 3}
DNNL_CPU, DNNL_STREAM_IN_ORDER, DNNL_FORMAT_TAG_ANY = 1, 1, 1
DNNL_FORWARD_TRAINING, DNNL_CONVOLUTION_DIRECT, DNNL_SCRATCHPAD_MODE_USER = 64, 1, 1
DNNL_ARG_SRC, DNNL_ARG_DST, DNNL_ARG_WEIGHTS, DNNL_ARG_SCRATCHPAD = 1, 17, 33, 80
DNNL_ARG_DIFF_SRC, DNNL_ARG_DIFF_DST, DNNL_ARG_DIFF_WEIGHTS = 129, 145, 161
DNNL_QUERY_WEIGHTS_MD, DNNL_QUERY_DIFF_WEIGHTS_MD, DNNL_QUERY_SCRATCHPAD_MD = 131, 132, 136

# The arrays of each operation as oneDNN's arguments: the first two are given, the third is computed. A gradient has its
# array's name and shape: x is [B, D, H, W, C], the kernel [O, kd, kh, kw, C], y [B, D, H, W, O].
ARGUMENTS = {
    "convolution": {"x": DNNL_ARG_SRC, "kernel": DNNL_ARG_WEIGHTS, "y": DNNL_ARG_DST},
    "input_gradient": {"y": DNNL_ARG_DIFF_DST, "kernel": DNNL_ARG_WEIGHTS, "x": DNNL_ARG_DIFF_SRC},
    "filter_gradient": {"x": DNNL_ARG_SRC, "y": DNNL_ARG_DIFF_DST, "kernel": DNNL_ARG_DIFF_WEIGHTS},
}


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution, zero-padded to the same size; available if `version` is not None.

    Args:
      x: [B, D, H, W, C], float32 or bfloat16.
      kernel: [O, kd, kh, kw, C] of the same type, odd sizes.

    Returns:
      [B, D, H, W, O].
    """
    return _call("convolution", x, kernel, (*x.shape[:4], kernel.shape[0]))


def input_gradient(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """Gradient of `convolution` with respect to its input.

    Args:
      gradient: [B, D, H, W, O], with respect to its output, float32 or bfloat16.
      kernel: [O, kd, kh, kw, C] of the same type, odd sizes.

    Returns:
      [B, D, H, W, C].
    """
    return _call("input_gradient", gradient, kernel, (*gradient.shape[:4], kernel.shape[4]))


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
    return _call("filter_gradient", x, gradient, (gradient.shape[-1], *size, x.shape[-1])).astype(dtype)


@functools.cache
def version() -> str | None:
    """The library's version, such as "3.2.0"; None if no oneDNN 3 can be loaded."""
    if onednn_library.load() is None:
        return None
    numbers = POINTER(c_int * 3)
    onednn_library.load().dnnl_version.restype = numbers
    return ".".join(str(number) for number in onednn_library.load().dnnl_version().contents)


# ---- Calls by compiled programs


def _call(kind: str, first: jax.Array, second: jax.Array, result: tuple[int, ...]) -> jax.Array:
    return _operation_p.bind(first, second, kind=kind, result=tuple(result))


# An operation as JAX sees it: (first, second) -> result, the arrays in the order of ARGUMENTS. A primitive, because its
# lowering depends on what the program is for: an exported program runs in other processes, which have no such handlers.
_operation_p = Primitive("onednn_operation")


@functools.partial(jax.jit, static_argnames=("kind", "result"))
def _run_at_once(first: jax.Array, second: jax.Array, *, kind: str, result: tuple[int, ...]) -> jax.Array:
    return _operation_p.bind(first, second, kind=kind, result=result)


_operation_p.def_impl(_run_at_once)
_operation_p.def_abstract_eval(lambda first, second, *, kind, result: first.update(shape=result))


def _foreign(first: jax.Array, second: jax.Array, *, kind: str, result: tuple[int, ...]) -> jax.Array:
    """The call of oneDNN."""
    shapes = dict(zip(ARGUMENTS[kind], (first.shape, second.shape, result), strict=True))
    operation = _operation(kind, tuple(shapes["x"]), tuple(shapes["kernel"]), str(first.dtype))
    results = jax.ShapeDtypeStruct(result, first.dtype), jax.ShapeDtypeStruct((operation.scratch_bytes,), jnp.uint8)
    return jax.ffi.ffi_call(_targets()[kind], results)(first, second)[0]


def _portable(first: jax.Array, second: jax.Array, *, kind: str, result: tuple[int, ...]) -> jax.Array:
    """The same function by XLA's own convolution."""

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "ODHWI", "NDHWC"))

    missing = jnp.zeros(result, first.dtype)  # where it is taken does not matter to a linear function
    if kind == "convolution":
        return convolve(first, second)
    if kind == "input_gradient":
        return jax.vjp(lambda x: convolve(x, second), missing)[1](first)[0]
    return jax.vjp(lambda kernel: convolve(first, kernel), missing)[1](second)[0]


def _lower(context: Any, first: Any, second: Any, *, kind: str, result: tuple[int, ...]) -> Any:
    exported = context.module_context.lowering_parameters.for_export
    lower = mlir.lower_fun(_portable if exported else _foreign, multiple_results=False)
    return lower(context, first, second, kind=kind, result=result)


mlir.register_lowering(_operation_p, _lower, platform="cpu")
# A program that is exported for several platforms is lowered for all of them, also where it will not be called.
mlir.register_lowering(_operation_p, mlir.lower_fun(_portable, multiple_results=False))


def _batch(arrays: Any, axes: Any, *, kind: str, result: tuple[int, ...]) -> tuple[jax.Array, int]:
    """`jax.vmap`: batches of images become one batch; where each has a kernel of its own, one operation each."""
    first, second = arrays
    if kind != "filter_gradient" and axes[1] is None:
        stacked = jnp.moveaxis(first, axes[0], 0)
        count, batch = stacked.shape[:2]
        flat = _call(kind, stacked.reshape(count * batch, *stacked.shape[2:]), second, (count * batch, *result[1:]))
        return flat.reshape(count, *result), 0
    mapped = [array if axis is None else jnp.moveaxis(array, axis, 0)
              for array, axis in zip(arrays, axes, strict=True)]  # fmt: skip
    count = next(array.shape[0] for array, axis in zip(mapped, axes, strict=True) if axis is not None)
    every = [jnp.broadcast_to(array, (count, *array.shape)) if axis is None else array
             for array, axis in zip(mapped, axes, strict=True)]  # fmt: skip
    return lax.map(lambda pair: _call(kind, pair[0], pair[1], result), tuple(every)), 0


batching.primitive_batchers[_operation_p] = _batch


@functools.cache
def _targets() -> dict[str, str]:
    """Names of the handlers, registered with XLA. Programs are cached on disk, so the names contain the version."""
    names = {kind: f"onednn_{version()}_{kind}" for kind in ARGUMENTS}
    for kind, name in names.items():
        xla_ffi.register(name, functools.partial(_run, kind))
    return names


def _run(kind: str, operands: Sequence[xla_ffi.Buffer], results: Sequence[xla_ffi.Buffer]) -> None:
    result, scratch = results
    buffers = dict(zip(ARGUMENTS[kind], (*operands, result), strict=True))
    operation = _operation(kind, buffers["x"].shape, buffers["kernel"].shape, result.dtype)
    if scratch.shape[0] < operation.scratch_bytes:
        raise RuntimeError(
            f"the program was compiled for {scratch.shape[0]} bytes of scratch memory, but oneDNN {version()} needs "
            f"{operation.scratch_bytes}"
        )
    with _running:
        operation.run({name: buffer.address for name, buffer in buffers.items()}, scratch.address)


# An operation's arguments hold addresses while it runs, and it runs on all cores.
_running = threading.Lock()


# ---- The library


def _check(function: str, *arguments: Any) -> None:
    if status := getattr(onednn_library.load(), function)(*arguments):
        raise RuntimeError(f"{function} of oneDNN {version()} returned status {status}")


def _create(function: str, *arguments: Any) -> c_void_p:
    created = c_void_p()
    _check(function, ctypes.byref(created), *arguments)
    return created


@functools.cache
def _engine() -> c_void_p:
    return _create("dnnl_engine_create", DNNL_CPU, c_size_t(0))


@functools.cache
def _stream() -> c_void_p:
    return _create("dnnl_stream_create", _engine(), DNNL_STREAM_IN_ORDER)


def _dims(values: Sequence[int]) -> Any:
    return (c_int64 * len(values))(*values)


def _memory_desc(shape: Sequence[int], dtype: str, *, any_layout: bool = False) -> c_void_p:
    """Describes a row-major array [B, D, H, W, C] or [O, kd, kh, kw, C]; `any_layout` leaves the layout to oneDNN."""
    order = (0, 4, 1, 2, 3)  # oneDNN's order of dimensions has channels second, whatever the order in memory
    dims = _dims([shape[axis] for axis in order])
    if any_layout:
        return _create("dnnl_memory_desc_create_with_tag", 5, dims, DNNL_TYPES[dtype], DNNL_FORMAT_TAG_ANY)
    strides = _dims([math.prod(shape[axis + 1 :]) for axis in order])
    return _create("dnnl_memory_desc_create_with_strides", 5, dims, DNNL_TYPES[dtype], strides)


def _query(primitive_desc: c_void_p, query: int) -> c_void_p:
    """A memory descriptor that oneDNN chose."""
    return c_void_p(onednn_library.load().dnnl_primitive_desc_query_md(primitive_desc, query, 0))


def _bytes(memory_desc: c_void_p) -> int:
    return -(-onednn_library.load().dnnl_memory_desc_get_size(memory_desc) // ALIGNMENT) * ALIGNMENT


class _Argument(ctypes.Structure):
    """dnnl_exec_arg_t."""

    _fields_ = (("arg", c_int), ("memory", c_void_p))


class _Primitive:
    """A oneDNN primitive. Its arguments are given as {DNNL_ARG_...: (memory descriptor, name of the array)}."""

    def __init__(self, primitive_desc: c_void_p, arguments: dict[int, tuple[c_void_p, str]]):
        scratch = _query(primitive_desc, DNNL_QUERY_SCRATCHPAD_MD)
        self.scratch_bytes = _bytes(scratch)
        self.primitive = _create("dnnl_primitive_create", primitive_desc)
        arguments = {**arguments, DNNL_ARG_SCRATCHPAD: (scratch, "scratch")}
        no_address = c_void_p(None)
        self.memories = [
            (number, _create("dnnl_memory_create", memory_desc, _engine(), no_address), name)
            for number, (memory_desc, name) in arguments.items()
        ]

    def run(self, addresses: dict[str, int]) -> None:
        arguments = (_Argument * len(self.memories))()
        for argument, (number, memory, name) in zip(arguments, self.memories, strict=True):
            _check("dnnl_memory_set_data_handle", memory, c_void_p(addresses[name]))
            argument.arg, argument.memory = number, memory
        _check("dnnl_primitive_execute", self.primitive, _stream(), len(arguments), arguments)


class _Operation:
    """One convolution or gradient, and the reorder of its kernel from or to the layout that oneDNN prefers."""

    def __init__(self, kind: str, x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], dtype: str):
        x, kernel = _memory_desc(x_shape, dtype), _memory_desc(kernel_shape, dtype)
        y = _memory_desc((*x_shape[:4], kernel_shape[0]), dtype)
        any_kernel = _memory_desc(kernel_shape, dtype, any_layout=True)
        ones, zeros, padding = _dims([1] * 3), _dims([0] * 3), _dims([size // 2 for size in kernel_shape[1:4]])
        attributes = _create("dnnl_primitive_attr_create")
        _check("dnnl_primitive_attr_set_scratchpad_mode", attributes, DNNL_SCRATCHPAD_MODE_USER)
        geometry = ones, zeros, padding, padding  # strides, dilations, padding before and after
        forward = _create(
            "dnnl_convolution_forward_primitive_desc_create", _engine(), DNNL_FORWARD_TRAINING, DNNL_CONVOLUTION_DIRECT,
            x, any_kernel, None, y, *geometry, attributes,
        )  # fmt: skip
        if kind == "convolution":
            primitive_desc = forward
        elif kind == "input_gradient":
            primitive_desc = _create(
                "dnnl_convolution_backward_data_primitive_desc_create", _engine(), DNNL_CONVOLUTION_DIRECT,
                x, any_kernel, y, *geometry, forward, attributes,
            )  # fmt: skip
        else:
            primitive_desc = _create(
                "dnnl_convolution_backward_weights_primitive_desc_create", _engine(), DNNL_CONVOLUTION_DIRECT,
                x, _memory_desc(kernel_shape, "float32", any_layout=True), None, y, *geometry, forward, attributes,
            )  # fmt: skip
        computes_kernel = kind == "filter_gradient"
        preferred = _query(primitive_desc, DNNL_QUERY_DIFF_WEIGHTS_MD if computes_kernel else DNNL_QUERY_WEIGHTS_MD)
        number = ARGUMENTS[kind]
        arguments = {number["x"]: (x, "x"), number["y"]: (y, "y"), number["kernel"]: (preferred, "preferred")}
        convolve = _Primitive(primitive_desc, arguments)
        if computes_kernel:
            self.steps = convolve, _reorder((preferred, "preferred"), (kernel, "kernel"), attributes)
        else:
            self.steps = _reorder((kernel, "kernel"), (preferred, "preferred"), attributes), convolve
        self.preferred_bytes = _bytes(preferred)
        self.scratch_bytes = self.preferred_bytes + max(step.scratch_bytes for step in self.steps)

    def run(self, addresses: dict[str, int], scratch: int) -> None:
        addresses = {**addresses, "preferred": scratch, "scratch": scratch + self.preferred_bytes}
        for step in self.steps:
            step.run(addresses)
        _check("dnnl_stream_wait", _stream())


def _reorder(source: tuple[c_void_p, str], target: tuple[c_void_p, str], attributes: c_void_p) -> _Primitive:
    """Copies an array to another with a different layout or type."""
    engine = _engine()
    primitive_desc = _create("dnnl_reorder_primitive_desc_create", source[0], engine, target[0], engine, attributes)
    return _Primitive(primitive_desc, {DNNL_ARG_SRC: source, DNNL_ARG_DST: target})


_operation = functools.cache(_Operation)
