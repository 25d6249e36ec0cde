"""The benchmark scripts as a user starts them, made small and without their peers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *flags: str) -> dict:
    command = [sys.executable, SCRIPTS / script, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    return json.loads(last)


@pytest.mark.parametrize(
    ("script", "flags", "rows", "columns"),
    [
        ("train_step.py", "--width 2 --edge 16 --batch 1 --steps 1 --rounds 1 --data phantoms", 1, ("pairs/s", "feed")),
        ("input_pipeline.py", "--edge 16 --batch 2 --batches 2 --rounds 1 --factors 2 1", 6, ("pairs a second",)),
        ("predict_scan.py", "--slices 8 12 --size 32 --tile 16 --network trivial", 2, ("seconds",)),
    ],
)  # fmt: skip
def test_a_script_ends_in_a_line_of_positive_numbers(script, flags, rows, columns):
    result = run(script, *flags.split())
    assert len(result["rows"]) == rows
    assert all(row[column] > 0 for row in result["rows"] for column in columns)
    assert result["machine"]["jax"]
