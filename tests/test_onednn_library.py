"""How oneDNN's library is loaded, with and without the OpenMP runtime that it is linked to."""

import subprocess
import sys
from pathlib import Path

import pytest

from autocontext_jax.models import onednn, onednn_library

pytestmark = pytest.mark.skipif(onednn.version() is None, reason="oneDNN's package is for x86 Linux alone")

# Stands in for libgomp.so.1, which this system may have: a copy of oneDNN that needs this file instead.
MISSING = "libnone.so.1"

# Replaces where the library's and the runtime's files are searched.
REPLACE = """
import sys
from pathlib import Path
from autocontext_jax.models import onednn_library
installed, library = onednn_library._installed_file, sys.argv[1]
onednn_library._installed_file = lambda package, name: library if name == onednn_library.ONEDNN else FIND_RUNTIME
onednn_library.RUNTIME = "libnone.so.1"
onednn_library.REMEDIES["libnone.so.1"] = onednn_library.REMEDIES["libgomp.so.1"]
"""


@pytest.fixture
def library(tmp_path):
    """A copy of oneDNN that needs a runtime which no system has."""
    installed = Path(onednn_library._installed_file("onednn-cpu-gomp", onednn_library.ONEDNN))
    copy = tmp_path / installed.name
    copy.write_bytes(installed.read_bytes().replace(b"libgomp.so.1", MISSING.encode()))
    yield copy
    copy.unlink()  # 65 MB


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


def test_the_library_is_the_environments_own():
    """Not whatever another package has loaded."""
    assert f"{sys.prefix}/lib/libdnnl.so.3" in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_llvms_runtime_replaces_gnus(library):
    code = f"""{REPLACE.replace("FIND_RUNTIME", "installed(package, 'libgomp.so.1')")}
import numpy as np
from autocontext_jax.models import convolution, onednn
rng = np.random.default_rng(0)
x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 16, 16, 16, 8), (16, 3, 3, 3, 8)))
np.testing.assert_allclose(onednn.convolution(x, kernel), convolution.direct_convolution(x, kernel), atol=1e-4)
print(Path("/proc/self/maps").read_text())
"""
    done = run(code, library)
    assert done.returncode == 0, done.stderr
    assert str(library) in done.stdout
    assert "cmeel.prefix/lib/libgomp.so.1" in done.stdout
    assert done.stderr == ""


def test_a_missing_runtime_is_named(library):
    done = run(f"{REPLACE.replace('FIND_RUNTIME', 'name')}assert onednn_library.load() is None", library)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "oneDNN cannot be loaded: libnone.so.1: " in line
    assert "pip install cmeel-libomp" in line


def test_a_missing_library_is_named():
    done = run(f"{REPLACE.replace('FIND_RUNTIME', 'name')}assert onednn_library.load() is None", "/none/libdnnl.so.3")
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "oneDNN cannot be loaded: /none/libdnnl.so.3: " in line
    assert "pip install onednn-cpu-gomp" in line
