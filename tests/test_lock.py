"""One run at a time in a work directory."""

import os
import subprocess
import sys
import threading

import pytest

from autocontext_jax.errors import UserError
from autocontext_jax.jobs.lock import locked
from autocontext_jax.jobs.prepare import _one_at_a_time


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    refused = pytest.raises(UserError, match=rf"{tmp_path} is in use by process {os.getpid()}: wait for it")
    with locked(tmp_path), refused, locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_killed_run_holds_nothing(tmp_path):
    code = (
        "import os, pathlib, sys\n"
        "from autocontext_jax.jobs.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written(tmp_path):
    with (
        pytest.raises(UserError, match=r" cannot be written.*choose another folder"),
        locked(tmp_path / "no"),
    ):
        pass


def test_two_runs_that_share_a_store_prepare_one_after_the_other(tmp_path):
    store, entered = str(tmp_path / "store"), threading.Event()

    def other():
        with _one_at_a_time(store):
            entered.set()

    thread = threading.Thread(target=other)
    with _one_at_a_time(store):
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()
