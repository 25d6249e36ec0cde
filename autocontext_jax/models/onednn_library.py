"""Loads oneDNN's shared library and the OpenMP runtime that it needs.

The package `onednn-cpu-gomp` installs the library, but not the runtime that it is linked to, GNU's `libgomp.so.1`. Most
Linux systems have that; minimal ones, such as slim container images, do not. There LLVM's runtime from the package
`cmeel-libomp` replaces it: it has GNU's functions too, under GNU's symbol versions.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import logging
import os
import platform
from collections.abc import Iterator
from ctypes import POINTER, byref, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import jax

from autocontext_jax.runtime import let_openmp_threads_sleep

log = logging.getLogger(__name__)

ONEDNN, RUNTIME = "libdnnl.so.3", "libgomp.so.1"
REMEDIES = {
    ONEDNN: "pip install onednn-cpu-gomp",
    RUNTIME: "pip install cmeel-libomp, or install the system's package of it (libgomp1 on Debian and Ubuntu)",
}
RTLD_DI_LINKMAP = 2  # `dlfcn.h`


@functools.cache
def load() -> Any:
    """The library; None if it cannot be loaded: one warning then names what is missing, if it would have been used."""
    let_openmp_threads_sleep()
    try:
        library = _load()
    except OSError as error:
        if platform.machine() == "x86_64" and jax.default_backend() == "cpu":
            remedy = REMEDIES.get(_file_named_by(error), "see whether the file is whole and readable")
            log.warning("convolutions will be several times slower, as oneDNN cannot be loaded: %s (%s)", error, remedy)
        return None
    library.dnnl_primitive_desc_query_md.restype = c_void_p
    library.dnnl_memory_desc_get_size.restype = c_size_t
    return library


def _load() -> Any:
    library = _installed_file("onednn-cpu-gomp", ONEDNN)
    try:
        return ctypes.CDLL(library)
    except OSError as error:
        if _file_named_by(error) != RUNTIME:
            raise
    with _known_as(RUNTIME, ctypes.CDLL(_installed_file("cmeel-libomp", RUNTIME))):
        return ctypes.CDLL(library)


def _installed_file(package: str, name: str) -> str:
    """Path of a file that a Python package installed; its name if there is none, so that the system is searched."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return next((os.path.realpath(str(file.locate())) for file in files if file.name == name), name)


def _file_named_by(error: OSError) -> str:
    """The file that the dynamic linker complains about: its messages are "FILE: REASON", in the user's language."""
    return Path(str(error).partition(":")[0]).name


@contextlib.contextmanager
def _known_as(name: str, library: ctypes.CDLL) -> Iterator[None]:
    """Within this context, libraries that need a library called `name` are linked to this one.

    glibc looks for a needed library first among those that are loaded. It compares the name with the one inside the
    file, and with the path in `link_map`. The path is replaced by the name here, and restored afterwards.
    """
    link_map = POINTER(_LinkMap)()
    if ctypes.CDLL(None).dlinfo(c_void_p(library._handle), RTLD_DI_LINKMAP, byref(link_map)):
        raise OSError(f"{name}: its replacement has no `link_map`")
    path, replacement = link_map.contents.l_name, ctypes.create_string_buffer(name.encode())
    link_map.contents.l_name = ctypes.addressof(replacement)
    try:
        yield
    finally:
        link_map.contents.l_name = path


class _LinkMap(ctypes.Structure):
    """The first fields of `struct link_map` in `link.h`."""

    _fields_ = (("l_addr", c_size_t), ("l_name", c_void_p))
