"""The program for the first minutes on an accelerator, made small; its parts fail one by one."""

import json
import subprocess
import sys
import time
from pathlib import Path

import accelerator
from kernel_times import Profile, _read

from autocontext_jax.planning.costs import ELEMENTWISE

SCRIPT = Path(accelerator.__file__)


def test_all_seven_parts_print_their_tables(tmp_path):
    command = [sys.executable, SCRIPT, "--minutes", "10", "--output", tmp_path, "--small"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert done.returncode == 0, done.stderr
    summary = done.stdout.partition("## Summary")[2].split("\n\n")[-1].splitlines()
    assert [line[:2] for line in summary] == [f"{part}." for part in range(1, 8)]
    assert [line for line in summary if ": done in " not in line] == [], log
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == done.stdout

    tables: dict[str, list[dict]] = {}
    for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tables.setdefault(row.pop("table"), []).append(row)
    assert {row["what"] for row in tables["Device"]} >= {"device", "driver", "python", "jax", "runtime"}
    assert all(row["rate"] > 0 for row in tables["Measured rates"])
    for title, results in (
        ("CT, as in the paper", ("gradients", "loss", "maps", "running averages")),
        (
            "thick slices, instance norm, two channels, partly annotated regions, ignored voxels",
            ("gradients", "loss", "maps"),
        ),
    ):
        checked = [(row["type"], row["of"], row["right"]) for row in tables[f"Against the CPU: {title}"]]
        assert checked == [(dtype, result, "yes") for dtype in ("float32", "bfloat16") for result in results]
    for row in tables["Ten steps: saved, restored, repeated"]:
        assert {row[key] for key in row if key.endswith(("restoring", "repeated"))} == {"equal to the bit"}
    assert [(row["type"], row["batch"]) for row in tables["The training step"]] == [
        ("bfloat16", 1),
        ("TF32 or float32", 1),
        ("bfloat16", 2),
    ]
    by_kind = {row["kind"]: row["ms a step"] for row in tables["Kernels' time by kind"]}
    assert by_kind[ELEMENTWISE] > 0  # on CPUs convolutions are foreign calls, which count here
    assert len(tables["The twenty longest kernels"]) == 20
    assert tables["The twenty longest kernels"][0]["ms a step"] > 0
    assert tables["Fed by the loader"][0]["fed over synthetic"] > 0
    assert tables["A whole scan"][0]["s"] > 0
    assert "| Level 1: Dice (%) |" in done.stdout


FAKE_WORKER = """
import sys, time, os
parts = sys.argv[sys.argv.index("--parts") + 1].split(",")
for part in map(int, parts):
    print("@@ begin", part, flush=True)
    print("result of", part, flush=True)
    if part == 2:
        print("@@ fail 2 ValueError: it is broken", flush=True)
        continue
    if part == 3:
        os._exit(7)
    if part == 4:
        time.sleep(600)
    print("@@ end", part, flush=True)
"""


def test_a_part_that_fails_crashes_or_hangs_is_reported_and_the_rest_runs(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE_WORKER, encoding="utf-8")
    monkeypatch.setattr(accelerator, "WORKER", worker)
    monkeypatch.setattr(accelerator, "WEIGHTS", accelerator.WEIGHTS | {4: 0.1})
    shown: list[str] = []
    outcomes = accelerator.run_parts([1, 2, 3, 4, 5, 6], tmp_path, time.time() + 60, shown.append, small=True)
    assert outcomes[1].startswith("done in")
    assert outcomes[2].endswith("ValueError: it is broken")
    assert outcomes[3].startswith("failed: its process ended with status 7")
    assert outcomes[4].startswith("failed: stopped after")
    assert outcomes[5].startswith("done in")
    assert outcomes[6].startswith("done in")
    assert [line for line in shown if line.startswith("result of")] == [f"result of {part}" for part in range(1, 7)]


def test_without_time_parts_are_not_run(tmp_path):
    outcomes = accelerator.run_parts([1, 6, 7], tmp_path, time.time() - 1, print, small=True)
    assert set(outcomes.values()) == {"not run: no time was left"}


class Line:
    def __init__(self, name, events):
        self.name, self.events = name, events
        self.lines = events


class Event:
    def __init__(self, name, start, duration, **stats):
        self.name, self.start_ns, self.duration_ns, self.stats = name, start, duration, stats.items()


def read(**planes) -> Profile:
    class Data:
        pass

    data, profile = Data(), Profile()
    data.planes = [Line(name.replace("_", ":").replace("..", "/"), lines) for name, lines in planes.items()]
    _read(data, profile)
    return profile


def test_a_gpus_profile_is_read_by_instruction():
    """Two kernels of one instruction, one of none, a copy; streams overlap; the host's events do not count."""
    compute = Line(
        "Stream #7(Compute)",
        [
            Event("sm90_conv", 0, 10, hlo_op="conv.1", hlo_module="jit_step"),
            Event("nchw_to_nhwc", 10, 5, hlo_op="conv.1"),
            Event("cutlass", 30, 5),
            Event("cutlass", 35, 5, hlo_op="command_buffer_8"),
        ],
    )
    copies = Line("Stream #9(MemcpyH2D)", [Event("MemcpyH2D", 35, 10)])
    modules = Line("XLA Modules", [Event("jit_step", 0, 45)])
    busy_host = Line("python", [Event("execute", 0, 1000, hlo_op="conv.1")])
    profile = read(**{"..host_CPU": [busy_host], "..device_GPU_0": [compute, copies, modules]})
    assert profile.instructions == {"conv.1": 15}
    assert profile.unnamed == {"cutlass": 10}
    assert profile.copies == {"H2D": (1, 10)}
    assert (profile.busy, profile.span) == (30, 45)


def test_a_tpus_profile_is_read_from_one_line():
    operations = Line("XLA Ops", [Event("fusion.1", 0, 4, hlo_op="fusion.1")])
    modules = Line("XLA Modules", [Event("jit_step", 0, 9, hlo_op="jit_step")])
    profile = read(**{"..host_CPU": [], "..device_TPU_0": [operations, modules]})
    assert profile.instructions == {"fusion.1": 4}
