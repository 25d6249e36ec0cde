"""A short form of the fault campaign: a fault of each of the quicker kinds, and how its parts judge."""

import json
import random
import subprocess
import sys
from pathlib import Path

import fault_damage
import fault_jobs
import fault_runs
import faults
import pytest

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SCRIPT = Path(faults.__file__)


@pytest.mark.skipif(sys.platform != "linux", reason="it forks, mounts file systems and reads /proc")
def test_a_few_faults_are_survived():
    kinds = ["kill_prepare", "kill_train", "kill_evaluate", "read_only_predict", "checkpoint_predict", "store_read",
             "config_predict", "vanished_prepare", "worker"]  # fmt: skip
    command = [sys.executable, SCRIPT, "--faults", "9", "--seed", "1", "--kinds", *kinds]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    total = result["rows"][-1]
    assert total["lost or silently wrong"] == 0
    assert total["tried"] == total["survived"] == 9 - sum(result["skipped"].values())


def test_what_a_job_says_is_judged():
    assert fault_jobs.Ended(0, "").error == ""
    assert fault_jobs.Ended(2, "bar\nerror: no room\n").error == "error: no room"
    assert "mask.nii.gz" in fault_jobs.Ended(1, "mask.nii.gz: no room\n1 of 1 scans could not be scored\n").error
    for status, text in (
        (1, ""),
        (2, ""),
        (2, "error: a\nerror: b"),
        (0, "Traceback"),
        (-9, ""),
        (2, "Traceback\nerror: a"),
    ):
        with pytest.raises(fault_jobs.Wrong):
            _ = fault_jobs.Ended(status, text).error


def test_files_are_damaged_alike_for_the_same_seed(tmp_path):
    damaged = []
    for seed in (*range(20), *range(20)):
        path = tmp_path / "file"
        path.write_bytes(bytes(range(100)))
        fault_damage.damage(path, random.Random(seed))
        damaged.append(path.read_bytes() if path.exists() else None)
    assert damaged[:20] == damaged[20:]
    assert bytes(range(100)) not in damaged
    assert None in damaged


def test_a_folder_that_a_message_names_is_deleted_inside_the_work_directory_alone(tmp_path):
    folder = tmp_path / "checkpoints" / "8"
    folder.mkdir(parents=True)
    with pytest.raises(fault_jobs.Wrong):
        fault_runs.delete_named_folder(
            "error: checkpoint /elsewhere/8 cannot be read (x): delete that folder", tmp_path
        )
    fault_runs.delete_named_folder(f"error: checkpoint {folder} cannot be read (x): delete that folder", tmp_path)
    assert not folder.exists()


def test_kinds_are_spread_evenly():
    names = list(faults.KINDS)
    whole = sum(kind.share for kind in faults.KINDS.values())
    assert {name: faults.evenly(names, whole).count(name) for name in names} == {
        name: kind.share for name, kind in faults.KINDS.items()
    }
    assert sorted(faults.evenly(names, len(names))) == sorted(names)
    assert len(faults.evenly(names, 7)) == 7
