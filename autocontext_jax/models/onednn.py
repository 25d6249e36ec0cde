"""Same-size 3D convolutions on x86 processors by the oneDNN library, called from compiled programs.

XLA's compiler has no fast 3D convolution for CPUs; the library has, in float32 and, where the processor multiplies it,
in bfloat16. `ctypes` reaches its C interface. Programs reach the handlers in here by XLA's foreign function interface,
which hands over addresses of arrays; what memory the library wants besides is an array of the program too, so that XLA
plans it with the others.

Constants and structures are those of `dnnl_types.h` (oneDNN 3) and of `xla/ffi/api/c_api.h` (0.1).
"""

import ctypes
import functools
import logging
import math
import os
import platform
import sys
import threading
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

log = logging.getLogger(__name__)

FILE = "libdnnl.so.3"
ALIGNMENT = 64  # bytes, of what shares the scratch array

# dnnl_data_type_t, and XLA_FFI_DataType for the same.
DATA_TYPES = {"bfloat16": 2, "float32": 3}
XLA_TYPES = {16: "bfloat16", 11: "float32"}
CPU, IN_ORDER, ANY_LAYOUT, FORWARD_TRAINING, DIRECT, USERS_SCRATCH = 1, 1, 1, 64, 1, 1
# Arguments of a call, and what its description is asked for.
FROM, TO, WEIGHTS, SCRATCH = 1, 17, 33, 80
FROM_GRADIENT, TO_GRADIENT, WEIGHTS_GRADIENT = 129, 145, 161
ASK_WEIGHTS, ASK_WEIGHTS_GRADIENT, ASK_SCRATCH = 131, 132, 136

# What is computed: from the first two of these arrays the third, a gradient being in its array's place; and what the
# library calls them. x is [B, D, H, W, C], the kernel [O, kd, kh, kw, C], y [B, D, H, W, O].
ROLES = {
    "convolution": {"x": FROM, "kernel": WEIGHTS, "y": TO},
    "input_gradient": {"y": TO_GRADIENT, "kernel": WEIGHTS, "x": FROM_GRADIENT},
    "filter_gradient": {"x": FROM, "y": TO_GRADIENT, "kernel": WEIGHTS_GRADIENT},
}


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Zero-padded to the same size; only where `version` is not None.

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
        # There release 3.2 leaves planes of a bfloat16 kernel's gradient unset on processors without AMX.
        x, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    return _call("filter_gradient", x, gradient, (gradient.shape[-1], *size, x.shape[-1])).astype(dtype)


@functools.cache
def version() -> str | None:
    """The library's, such as "3.2.0"; None where this environment and the system have none of version 3."""
    if _library() is None:
        return None
    numbers = POINTER(c_int * 3)
    _library().dnnl_version.restype = numbers
    return ".".join(str(number) for number in _library().dnnl_version().contents)


def _call(what: str, first: jax.Array, second: jax.Array, result: tuple[int, ...]) -> jax.Array:
    shapes = dict(zip(ROLES[what], (first.shape, second.shape, result), strict=True))
    operation = _operation(what, tuple(shapes["x"]), tuple(shapes["kernel"]), str(first.dtype))
    results = jax.ShapeDtypeStruct(result, first.dtype), jax.ShapeDtypeStruct((operation.scratch_bytes,), jnp.uint8)
    return jax.ffi.ffi_call(_targets()[what], results)(first, second)[0]


# ---- The library


@functools.cache
def _library() -> Any:
    # Its threads would else spin for milliseconds after each call and hold up XLA's.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for place in (str(Path(sys.prefix, "lib", FILE)), FILE):
        try:
            library = ctypes.CDLL(place)
        except OSError as error:
            reason = error
            continue
        library.dnnl_primitive_desc_query_md.restype = c_void_p
        library.dnnl_memory_desc_get_size.restype = c_size_t
        return library
    if platform.machine() == "x86_64" and jax.default_backend() == "cpu":
        log.warning("oneDNN is missing, convolutions will be several times slower (%s)", reason)
    return None


def _check(function: str, *arguments: Any) -> None:
    if status := getattr(_library(), function)(*arguments):
        raise RuntimeError(f"{function} of oneDNN {version()} ended with status {status}")


def _make(function: str, *arguments: Any) -> c_void_p:
    made = c_void_p()
    _check(function, ctypes.byref(made), *arguments)
    return made


@functools.cache
def _engine() -> c_void_p:
    return _make("dnnl_engine_create", CPU, c_size_t(0))


@functools.cache
def _stream() -> c_void_p:
    return _make("dnnl_stream_create", _engine(), IN_ORDER)


def _numbers(values: Sequence[int]) -> Any:
    return (c_int64 * len(values))(*values)


def _layout(shape: Sequence[int], dtype: str, *, free: bool = False) -> c_void_p:
    """Of [B, D, H, W, C] or [O, kd, kh, kw, C]; `free` leaves it to the library."""
    order = (0, 4, 1, 2, 3)  # the library names channels second, wherever they lie
    dims = _numbers([shape[axis] for axis in order])
    if free:
        return _make("dnnl_memory_desc_create_with_tag", 5, dims, DATA_TYPES[dtype], ANY_LAYOUT)
    strides = _numbers([math.prod(shape[axis + 1 :]) for axis in order])
    return _make("dnnl_memory_desc_create_with_strides", 5, dims, DATA_TYPES[dtype], strides)


def _asked(description: c_void_p, question: int) -> c_void_p:
    return c_void_p(_library().dnnl_primitive_desc_query_md(description, question, 0))


def _bytes(layout: c_void_p) -> int:
    return -(-_library().dnnl_memory_desc_get_size(layout) // ALIGNMENT) * ALIGNMENT


class _Step:
    """One call of the library: a primitive and, by the library's numbers, its arguments' layouts and names."""

    def __init__(self, description: c_void_p, arguments: dict[int, tuple[c_void_p, str]]):
        scratch = _asked(description, ASK_SCRATCH)
        self.scratch_bytes = _bytes(scratch)
        self.primitive = _make("dnnl_primitive_create", description)
        arguments = {**arguments, SCRATCH: (scratch, "scratch")}
        nowhere = c_void_p(None)
        self.memories = [
            (number, _make("dnnl_memory_create", layout, _engine(), nowhere), name)
            for number, (layout, name) in arguments.items()
        ]

    def run(self, addresses: dict[str, int]) -> None:
        arguments = (_Argument * len(self.memories))()
        for argument, (number, memory, name) in zip(arguments, self.memories, strict=True):
            _check("dnnl_memory_set_data_handle", memory, c_void_p(addresses[name]))
            argument.number, argument.memory = number, memory
        _check("dnnl_primitive_execute", self.primitive, _stream(), len(arguments), arguments)


class _Argument(ctypes.Structure):
    _fields_ = (("number", c_int), ("memory", c_void_p))


class _Operation:
    """The steps of one convolution or gradient: the kernel is laid out as the library likes it in between."""

    def __init__(self, what: str, x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], dtype: str):
        x, kernel = _layout(x_shape, dtype), _layout(kernel_shape, dtype)
        y = _layout((*x_shape[:4], kernel_shape[0]), dtype)
        any_kernel = _layout(kernel_shape, dtype, free=True)
        ones, zeros, padding = _numbers([1] * 3), _numbers([0] * 3), _numbers([size // 2 for size in kernel_shape[1:4]])
        attributes = _make("dnnl_primitive_attr_create")
        _check("dnnl_primitive_attr_set_scratchpad_mode", attributes, USERS_SCRATCH)
        around = ones, zeros, padding, padding
        forward = _make(
            "dnnl_convolution_forward_primitive_desc_create", _engine(), FORWARD_TRAINING, DIRECT,
            x, any_kernel, None, y, *around, attributes,
        )  # fmt: skip
        if what == "convolution":
            description = forward
        elif what == "input_gradient":
            description = _make(
                "dnnl_convolution_backward_data_primitive_desc_create", _engine(), DIRECT,
                x, any_kernel, y, *around, forward, attributes,
            )  # fmt: skip
        else:
            description = _make(
                "dnnl_convolution_backward_weights_primitive_desc_create", _engine(), DIRECT,
                x, _layout(kernel_shape, "float32", free=True), None, y, *around, forward, attributes,
            )  # fmt: skip
        is_result = what == "filter_gradient"
        liked = _asked(description, ASK_WEIGHTS_GRADIENT if is_result else ASK_WEIGHTS)
        number = ROLES[what]
        arguments = {number["x"]: (x, "x"), number["y"]: (y, "y"), number["kernel"]: (liked, "liked")}
        convolve = _Step(description, arguments)
        if is_result:
            self.steps = convolve, _turn((liked, "liked"), (kernel, "kernel"), attributes)
        else:
            self.steps = _turn((kernel, "kernel"), (liked, "liked"), attributes), convolve
        self.liked_bytes = _bytes(liked)
        self.scratch_bytes = self.liked_bytes + max(step.scratch_bytes for step in self.steps)

    def run(self, addresses: dict[str, int], scratch: int) -> None:
        addresses = {**addresses, "liked": scratch, "scratch": scratch + self.liked_bytes}
        for step in self.steps:
            step.run(addresses)
        _check("dnnl_stream_wait", _stream())


def _turn(given: tuple[c_void_p, str], wanted: tuple[c_void_p, str], attributes: c_void_p) -> _Step:
    """From one array into another of another layout or type."""
    engine = _engine()
    description = _make("dnnl_reorder_primitive_desc_create", given[0], engine, wanted[0], engine, attributes)
    return _Step(description, {FROM: given, TO: wanted})


_operation = functools.cache(_Operation)
# An operation's arguments are bound to addresses while it runs, on all cores.
_running = threading.Lock()


# ---- XLA's foreign function interface


class _Version(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("extension", c_void_p), ("major", c_int), ("minor", c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("version", _Version), ("traits", ctypes.c_uint32))


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("type", c_int), ("next", c_void_p), ("metadata", POINTER(_Metadata)))


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("extension", c_void_p),
        ("dtype", c_int), ("data", c_void_p), ("spatial_dims", c_int64), ("dims", POINTER(c_int64)),
    )  # fmt: skip


class _Buffers(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("extension", c_void_p),
        ("count", c_int64), ("types", c_void_p), ("buffers", POINTER(POINTER(_Buffer))),
    )  # fmt: skip


class _Error(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("extension", c_void_p), ("message", c_char_p), ("code", c_int))


class _Api(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("extension", c_void_p),
        ("version", _Version), ("internal", c_void_p), ("make_error", ctypes.CFUNCTYPE(c_void_p, POINTER(_Error))),
    )  # fmt: skip


class _Frame(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("extension", POINTER(_MetadataExtension)),
        ("api", POINTER(_Api)), ("context", c_void_p), ("stage", c_int), ("arguments", _Buffers), ("results", _Buffers),
    )  # fmt: skip


METADATA, INTERNAL_ERROR = 1, 13


def _handle(what: str, frame: Any) -> int | None:
    """One call by a program: None, or the address of an error."""
    frame = frame.contents
    if frame.extension and frame.extension.contents.type == METADATA:
        wanted = frame.extension.contents.metadata.contents.version
        wanted.major, wanted.minor = 0, 1
        return None
    try:
        operands = [frame.arguments.buffers[index].contents for index in range(2)]
        result, scratch = (frame.results.buffers[index].contents for index in range(2))
        arrays = dict(zip(ROLES[what], (*operands, result), strict=True))
        shapes = (tuple(arrays[name].dims[:5]) for name in ("x", "kernel"))
        operation = _operation(what, *shapes, XLA_TYPES[result.dtype])
        if scratch.dims[0] < operation.scratch_bytes:
            raise RuntimeError(
                f"a program compiled for {scratch.dims[0]} bytes of scratch, not {operation.scratch_bytes}"
            )
        with _running:
            operation.run({name: array.data for name, array in arrays.items()}, scratch.data)
    except BaseException as error:  # Ctrl-C too: ctypes prints it and the program goes on with what its memory held
        text = _Error(ctypes.sizeof(_Error), None, repr(error).encode(), INTERNAL_ERROR)
        return frame.api.contents.make_error(ctypes.byref(text))
    return None


_Handler = ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))
_handlers = {what: _Handler(functools.partial(_handle, what)) for what in ROLES}


@functools.cache
def _targets() -> dict[str, str]:
    """Names of the handlers, made known to XLA; with the version, as programs are kept on disk."""
    names = {what: f"onednn_{version()}_{what}" for what in ROLES}
    for what, name in names.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(_handlers[what]), platform="cpu")
    return names
