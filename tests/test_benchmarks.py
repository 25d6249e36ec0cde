"""The benchmark scripts as a user starts them, made small and without their peers."""

import json
import math
import subprocess
import sys
from pathlib import Path

import accuracy_at_time
import pytest

from autocontext_jax.data.phantom.dataset import write_dataset
from autocontext_jax.evaluation.statistics import summarise

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
PHANTOMS = "--cases 2 --size 16 24 24 --spacing 12 12 12"


def rows(script: str, flags: str) -> list[dict]:
    """The table's rows, all of whose numbers are positive."""
    done = subprocess.run([sys.executable, SCRIPTS / script, *flags.split()], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    result = json.loads(last)
    assert result["machine"]["jax"]
    numbers = [value for row in result["rows"] for value in row.values() if not isinstance(value, str)]
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    return result["rows"]


def test_train_step(tmp_path):
    write_dataset(tmp_path, training=2, test=0, size=(16, 24, 24), spacing=(12.0, 12.0, 12.0), seed=0)
    (row,) = rows("train_step.py", f"--width 2 --edge 16 --depth 2 --batch 1 --steps 1 --rounds 1 --data {tmp_path}")
    assert row.keys() >= {"patches/s", "GFLOP/s", "peak GB", "compile s", "feed"}


def test_convolution():
    found = rows("convolution.py", "--shapes 3x4x2x3,1x2x3x5 --repeats 1")
    assert [(row["type"], row["kernel"], row["channels"]) for row in found] == [
        (dtype, *shape) for dtype in ("float32", "bfloat16") for shape in ((3, "2 to 3"), (1, "3 to 5"))
    ]


def test_input_pipeline():
    found = rows("input_pipeline.py", f"{PHANTOMS} --edge 16 --batch 2 --batches 2 --rounds 1")
    parts = ["host", "feed", "read, level 1", "read, level 2"]
    augment = ["augment, pyramid", "augment, one patch"]
    assert [row["part"] for row in found] == [*parts, *(f"{part}, cached" for part in parts), *augment]


@pytest.mark.skipif(sys.platform != "linux", reason="it reads the memory of all processes from /proc")
def test_prepare():
    (ours,) = rows("prepare.py", f"{PHANTOMS} --workers 2 --rounds 1")
    assert ours["side"] == "ours"
    assert ours.keys() >= {"scans a minute", "CPU seconds a scan", "peak GB"}


def test_predict_scan():
    found = rows("predict_scan.py", "--slices 8 12 --size 32 --tile 16 --network trivial")
    assert [row["scan"] for row in found] == ["8x32x32", "12x32x32"]
    assert found[0].keys() >= {"seconds", "peak_gb"}


def test_start_up():
    without, kept = rows("start_up.py", "--size 16 --width 1 --depth 1 --rounds 1")
    assert without.keys() >= {"whole command", "import", "load the model", "compile", "predict"}
    assert kept["whole command"] > 0


def test_accuracy_at_times_line():
    """Its jobs are those of test_main; four more processes would take a minute and a half."""
    cases = {name: {"liver": {"dice": dice}, "vein": {"dice": 0.5}} for name, dice in (("a", 0.7), ("b", 0.9))}
    found = accuracy_at_time.line(summarise(cases, ["liver", "vein"]), seconds=90, steps=7)
    expected = {"used": 1.5, "steps": 7, "mean Dice": 0.65, "std over scans": 0.05, "liver": 0.8, "vein": 0.5}
    assert found == pytest.approx(expected)
