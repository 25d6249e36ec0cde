"""XLA's foreign function interface (FFI): compiled programs call Python functions on the CPU.

XLA passes the addresses of arrays, so nothing is copied. The structures and numbers below are those of
`xla/ffi/api/c_api.h`, version 0.1, which jaxlib contains.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import jax

XLA_FFI_EXTENSION_METADATA, XLA_FFI_ERROR_CODE_INTERNAL = 1, 13
# Seconds without a call after which, at exit, no program whose results nobody holds is taken to run.
QUIET = 2.0
# XLA_FFI_DataType of the types that are passed.
DATA_TYPES = {6: "uint8", 11: "float32", 16: "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array of a running program.

    Attributes:
      address: of its first element; valid during the call.
      shape: row-major.
      dtype: NumPy's name of its type.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str


def register(name: str, function: Callable[[Sequence[Buffer], Sequence[Buffer]], None]) -> None:
    """Registers a function under a name that `jax.ffi.ffi_call` takes, for programs on the CPU.

    Args:
      name: not yet registered in this process.
      function: called with the operands and the results; it fills the results. An exception fails the program that
        called it, with `jax.errors.JaxRuntimeError`.
    """
    handler = _Handler(functools.partial(_handle, function))
    _handlers.append(handler)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    if len(_handlers) == 1:
        atexit.register(_finish_programs)


@dataclasses.dataclass
class _Calls:
    """The calls of this process.

    Attributes:
      in_progress: number of calls that have begun and not ended.
      last: when a call began or ended last, seconds of the monotonic clock.
      ending: whether Python is about to shut down: calls are then refused.
      lock: held while the others change.
    """

    in_progress: int = 0
    last: float = float("-inf")
    ending: bool = False
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def change(self, by: int) -> None:
        """Counts a call that begins or ends."""
        with self.lock:
            self.in_progress += by
            self.last = time.monotonic()


_calls = _Calls()


def _finish_programs() -> None:
    """Waits for the programs that still run, at exit: a call of Python that is shutting down would never return.

    JAX runs programs asynchronously, so a script can end before its programs do, see
    `runtime.disable_asynchronous_dispatch`. First it waits for all results that somebody holds. Then further calls are
    refused, so that the programs that make them end. Of programs whose results are gone only their calls can be seen:
    one that computes for longer than `QUIET` between two calls is missed.
    """
    for array in jax.live_arrays("cpu"):
        with contextlib.suppress(Exception):  # the array was deleted, or its program failed
            array.block_until_ready()
    _calls.ending = True
    ended = time.monotonic()
    # The option is off only if it was switched off before the CPU's client was made.
    quiet = QUIET if jax.config.values["jax_cpu_enable_async_dispatch"] else QUIET / 20
    while _calls.in_progress or time.monotonic() < max(ended, _calls.last) + quiet:
        time.sleep(quiet / 10)


def _handle(function: Callable[[Sequence[Buffer], Sequence[Buffer]], None], frame: Any) -> int | None:
    """One call by XLA; returns None, or the address of an error."""
    frame = frame.contents
    if frame.extension and frame.extension.contents.type == XLA_FFI_EXTENSION_METADATA:
        version = frame.extension.contents.metadata.contents.version
        version.major, version.minor = 0, 1
        return None
    _calls.change(+1)
    try:
        if _calls.ending:
            raise RuntimeError("Python is shutting down")
        function(_buffers(frame.arguments), _buffers(frame.results))
    except BaseException as error:
        # KeyboardInterrupt too: otherwise ctypes prints the error and the program continues with undefined results.
        text = _Error(ctypes.sizeof(_Error), None, repr(error).encode(), XLA_FFI_ERROR_CODE_INTERNAL)
        return frame.api.contents.make_error(ctypes.byref(text))
    finally:
        _calls.change(-1)
    return None


def _buffers(array: "_Buffers") -> list[Buffer]:
    found = []
    for index in range(array.count):
        buffer = array.buffers[index].contents
        found.append(Buffer(buffer.data, tuple(buffer.dims[: buffer.rank]), DATA_TYPES[buffer.dtype]))
    return found


class _Version(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("extension", c_void_p), ("major", c_int), ("minor", c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("version", _Version), ("traits", ctypes.c_uint32))


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("type", c_int), ("next", c_void_p), ("metadata", POINTER(_Metadata)))


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("extension", c_void_p),
        ("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64)),
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


_Handler = ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))
# XLA keeps only their addresses, so they must not be collected.
_handlers: list[Any] = []
