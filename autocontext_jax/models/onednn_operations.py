"""oneDNN's convolutions, their gradients, and convolutions followed by a ReLU, as its C interface runs them.

The constants are those of `dnnl_types.h` and `dnnl_common_types.h` (oneDNN 3), under their names there.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

from autocontext_jax.models import onednn_library

ALIGNMENT = 64  # bytes, of each part of the scratch array

# dnnl_data_type_t
DNNL_TYPES = {"bfloat16": 2, "float32": 3}
DNNL_CPU, DNNL_STREAM_IN_ORDER, DNNL_FORMAT_TAG_ANY, DNNL_FORMAT_TAG_A = 1, 1, 1, 2
DNNL_FORWARD_TRAINING, DNNL_CONVOLUTION_DIRECT, DNNL_DECONVOLUTION_DIRECT, DNNL_ELTWISE_RELU = 64, 1, 10, 32
DNNL_SCRATCHPAD_MODE_USER = 1
DNNL_ARG_SRC, DNNL_ARG_DST, DNNL_ARG_WEIGHTS, DNNL_ARG_BIAS, DNNL_ARG_SCRATCHPAD = 1, 17, 33, 41, 80
DNNL_ARG_DIFF_SRC, DNNL_ARG_DIFF_DST, DNNL_ARG_DIFF_WEIGHTS = 129, 145, 161
DNNL_QUERY_WEIGHTS_MD, DNNL_QUERY_DIFF_WEIGHTS_MD, DNNL_QUERY_SCRATCHPAD_MD = 131, 132, 136

Shape = tuple[int, ...]


@functools.cache
def version() -> str | None:
    """The library's version, such as "3.2.0"; None if no oneDNN 3 can be loaded."""
    if onednn_library.load() is None:
        return None
    numbers = POINTER(c_int * 3)
    onednn_library.load().dnnl_version.restype = numbers
    return ".".join(str(number) for number in onednn_library.load().dnnl_version().contents)


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


# Of the axes of [B, D, H, W, C] and [O, kd, kh, kw, C], the order in which oneDNN names them, whatever the order in
# memory: channels second. And of the axes of a deconvolution's kernel, [kd, kh, kw, O, C].
CHANNELS_SECOND, DECONVOLUTION_KERNEL = (0, 4, 1, 2, 3), (3, 4, 0, 1, 2)


def _memory_desc(shape: Shape, dtype: str, order: Shape = CHANNELS_SECOND) -> c_void_p:
    """Describes a row-major array with five axes."""
    dims = _dims([shape[axis] for axis in order])
    strides = _dims([math.prod(shape[axis + 1 :]) for axis in order])
    return _create("dnnl_memory_desc_create_with_strides", 5, dims, DNNL_TYPES[dtype], strides)


def _any_layout(shape: Shape, dtype: str, order: Shape = CHANNELS_SECOND) -> c_void_p:
    """Describes an array whose layout oneDNN chooses."""
    dims = _dims([shape[axis] for axis in order])
    return _create("dnnl_memory_desc_create_with_tag", 5, dims, DNNL_TYPES[dtype], DNNL_FORMAT_TAG_ANY)


def _vector(size: int) -> c_void_p:
    """Describes an array [size] of float32."""
    return _create("dnnl_memory_desc_create_with_tag", 1, _dims([size]), DNNL_TYPES["float32"], DNNL_FORMAT_TAG_A)


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


def _reorder(source: tuple[c_void_p, str], target: tuple[c_void_p, str], attributes: c_void_p) -> _Primitive:
    """Copies an array to another with a different layout or type."""
    engine = _engine()
    primitive_desc = _create("dnnl_reorder_primitive_desc_create", source[0], engine, target[0], engine, attributes)
    return _Primitive(primitive_desc, {DNNL_ARG_SRC: source, DNNL_ARG_DST: target})


def _reading_kernel(
    primitive_desc: c_void_p, kernel: tuple[c_void_p, str], arguments: dict[int, tuple[c_void_p, str]]
) -> tuple[list[_Primitive], c_void_p]:
    """A primitive after the reorder of its kernel, and the layout of kernels that oneDNN prefers for it."""
    preferred = _query(primitive_desc, DNNL_QUERY_WEIGHTS_MD)
    arguments = {**arguments, DNNL_ARG_WEIGHTS: (preferred, "preferred")}
    return [_reorder(kernel, (preferred, "preferred"), _attributes()), _Primitive(primitive_desc, arguments)], preferred


def _attributes(*, add: bool = False, relu: bool = False, dtype: str = "float32") -> c_void_p:
    """Attributes of a primitive.

    Args:
      add: whether the result is added to what its array holds.
      relu: whether negative results, after that, become zero.
      dtype: of the result.
    """
    attributes, after = _create("dnnl_primitive_attr_create"), _create("dnnl_post_ops_create")
    if add:
        _check("dnnl_post_ops_append_sum", after, c_float(1), 0, DNNL_TYPES[dtype])
    if relu:
        _check("dnnl_post_ops_append_eltwise", after, DNNL_ELTWISE_RELU, c_float(0), c_float(0))
    _check("dnnl_primitive_attr_set_post_ops", attributes, after)
    _check("dnnl_primitive_attr_set_scratchpad_mode", attributes, DNNL_SCRATCHPAD_MODE_USER)
    return attributes


def _forward(x: Shape, kernel: Shape, dtype: str, attributes: c_void_p, *, bias: bool = False) -> c_void_p:
    """The descriptor of a convolution, zero-padded to the same size."""
    return _create(
        "dnnl_convolution_forward_primitive_desc_create", _engine(), DNNL_FORWARD_TRAINING, DNNL_CONVOLUTION_DIRECT,
        _memory_desc(x, dtype), _any_layout(kernel, dtype),
        _vector(kernel[0]) if bias else None, _memory_desc((*x[:4], kernel[0]), dtype),
        *_geometry(kernel), attributes,
    )  # fmt: skip


def _geometry(kernel: Shape) -> tuple[Any, ...]:
    """Strides, dilations, padding before and after."""
    padding = _dims([size // 2 for size in kernel[1:4]])
    return _dims([1] * 3), _dims([0] * 3), padding, padding


class Operation:
    """A sequence of oneDNN's primitives with the arrays that they need besides the operation's own.

    Attributes:
      scratch_bytes: size of an array that `run` may write to.
    """

    def __init__(self, steps: Sequence[_Primitive], preferred: Sequence[c_void_p]):
        self._steps = steps
        self._preferred_bytes = max(map(_bytes, preferred))  # kernels in oneDNN's layout, used one after the other
        self.scratch_bytes = self._preferred_bytes + max(step.scratch_bytes for step in steps)

    def run(self, addresses: dict[str, int], scratch: int) -> None:
        """Computes the result.

        Args:
          addresses: of the operands and the result, by name.
          scratch: address of the scratch array.
        """
        addresses = {**addresses, "preferred": scratch, "scratch": scratch + self._preferred_bytes}
        for step in self._steps:
            step.run(addresses)
        _check("dnnl_stream_wait", _stream())


@functools.cache
def convolution(x: Shape, kernel: Shape, dtype: str) -> Operation:
    """From the arrays x and kernel to y."""
    return _convolutions([("x", x, "kernel", kernel)], dtype)


@functools.cache
def convolution_relu(xs: tuple[Shape, ...], kernels: tuple[Shape, ...], dtype: str) -> Operation:
    """From the arrays x0, kernel0, x1, kernel1, ..., bias to y: the sum of the convolutions and the bias, its ReLU."""
    parts = [(f"x{n}", x, f"kernel{n}", kernel) for n, (x, kernel) in enumerate(zip(xs, kernels, strict=True))]
    return _convolutions(parts, dtype, relu=True)


def _convolutions(parts: Sequence[tuple[str, Shape, str, Shape]], dtype: str, *, relu: bool = False) -> Operation:
    """Each convolution is added to the result of those before; with `relu` there is a bias too."""
    steps: list[_Primitive] = []
    chosen = []
    for number, (x_name, x, kernel_name, kernel) in enumerate(parts):
        last = number == len(parts) - 1
        with_bias = relu and number == 0
        attributes = _attributes(add=number > 0, relu=relu and last, dtype=dtype)
        primitive_desc = _forward(x, kernel, dtype, attributes, bias=with_bias)
        arguments = {
            DNNL_ARG_SRC: (_memory_desc(x, dtype), x_name),
            DNNL_ARG_DST: (_memory_desc((*x[:4], kernel[0]), dtype), "y"),
        }
        if with_bias:
            arguments[DNNL_ARG_BIAS] = (_vector(kernel[0]), "bias")
        both, preferred = _reading_kernel(primitive_desc, (_memory_desc(kernel, dtype), kernel_name), arguments)
        steps += both
        chosen.append(preferred)
    return Operation(steps, chosen)


@functools.cache
def deconvolution_relu(x: Shape, kernel: Shape, dtype: str) -> Operation:
    """From the arrays x, kernel [kd, kh, kw, O, C] and bias to y: the ReLU of the deconvolution plus the bias."""
    size, outputs = kernel[:3], kernel[3]
    y = (x[0], *(n * step for n, step in zip(x[1:4], size, strict=True)), outputs)
    x_desc, y_desc, bias_desc = _memory_desc(x, dtype), _memory_desc(y, dtype), _vector(outputs)
    any_kernel = _any_layout(kernel, dtype, DECONVOLUTION_KERNEL)
    primitive_desc = _create(
        "dnnl_deconvolution_forward_primitive_desc_create", _engine(), DNNL_FORWARD_TRAINING,
        DNNL_DECONVOLUTION_DIRECT, x_desc, any_kernel, bias_desc, y_desc,
        _dims(size), _dims([0] * 3), _dims([0] * 3), _dims([0] * 3), _attributes(relu=True),
    )  # fmt: skip
    arguments = {DNNL_ARG_SRC: (x_desc, "x"), DNNL_ARG_BIAS: (bias_desc, "bias"), DNNL_ARG_DST: (y_desc, "y")}
    given = _memory_desc(kernel, dtype, DECONVOLUTION_KERNEL)
    steps, preferred = _reading_kernel(primitive_desc, (given, "kernel"), arguments)
    return Operation(steps, [preferred])


@functools.cache
def input_gradient(x: Shape, kernel: Shape, dtype: str) -> Operation:
    """From the gradient of y and the kernel to the gradient of x."""
    attributes = _attributes()
    x_desc, y_desc = _memory_desc(x, dtype), _memory_desc((*x[:4], kernel[0]), dtype)
    primitive_desc = _create(
        "dnnl_convolution_backward_data_primitive_desc_create", _engine(), DNNL_CONVOLUTION_DIRECT,
        x_desc, _any_layout(kernel, dtype), y_desc, *_geometry(kernel),
        _forward(x, kernel, dtype, attributes), attributes,
    )  # fmt: skip
    arguments = {DNNL_ARG_DIFF_DST: (y_desc, "y"), DNNL_ARG_DIFF_SRC: (x_desc, "x")}
    steps, preferred = _reading_kernel(primitive_desc, (_memory_desc(kernel, dtype), "kernel"), arguments)
    return Operation(steps, [preferred])


@functools.cache
def filter_gradient(x: Shape, kernel: Shape, dtype: str) -> Operation:
    """From x and the gradient of y to the gradient of the kernel, summed in float32."""
    attributes = _attributes()
    x_desc, y_desc = _memory_desc(x, dtype), _memory_desc((*x[:4], kernel[0]), dtype)
    primitive_desc = _create(
        "dnnl_convolution_backward_weights_primitive_desc_create", _engine(), DNNL_CONVOLUTION_DIRECT,
        x_desc, _any_layout(kernel, "float32"), None, y_desc, *_geometry(kernel),
        _forward(x, kernel, dtype, attributes), attributes,
    )  # fmt: skip
    preferred = _query(primitive_desc, DNNL_QUERY_DIFF_WEIGHTS_MD)
    arguments = {
        DNNL_ARG_SRC: (x_desc, "x"),
        DNNL_ARG_DIFF_DST: (y_desc, "y"),
        DNNL_ARG_DIFF_WEIGHTS: (preferred, "preferred"),
    }
    reorder = _reorder((preferred, "preferred"), (_memory_desc(kernel, dtype), "kernel"), attributes)
    return Operation([_Primitive(primitive_desc, arguments), reorder], [preferred])
