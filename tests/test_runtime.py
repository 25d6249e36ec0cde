"""Settings of the whole process, and which libraries are needed for what."""

import subprocess
import sys
from pathlib import Path

import pytest

from autocontext_jax.runtime import compiler_options

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_deterministic_operations_are_an_option_of_gpus_alone():
    assert compiler_options("gpu") == {"xla_gpu_force_conv_nhwc": True}
    assert compiler_options("gpu", deterministic=True) == {
        "xla_gpu_force_conv_nhwc": True,
        "xla_gpu_deterministic_ops": True,
    }
    assert compiler_options("cpu", deterministic=True) == compiler_options("tpu", deterministic=True) == {}


@pytest.mark.parametrize(
    ("missing", "imports"),
    [
        (
            "plotly markdown_it skimage",
            "from autocontext_jax.jobs import evaluate, experiment, predict, prepare, train",
        ),
        ("SimpleITK plotly matplotlib tensorboardX markdown_it skimage ml_collections", "import accelerator_parts"),
    ],
    ids=["every job but the report", "the accelerator's first minutes"],
)
def test_what_is_missing_is_not_needed(missing, imports):
    code = f"import sys; sys.modules |= dict.fromkeys('{missing}'.split()); {imports}"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
