"""The reading process: killed, hung, short of memory, interrupted, forked, and without a trace afterwards."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from autocontext_jax.errors import UserError
from autocontext_jax.images import reader_process, scans

VOXELS = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)

# The process with functions that misbehave.
BAD = """
import os, signal, time
import numpy as np
from autocontext_jax.images import reader_process
def fill(path):
    return {"voxels": np.ones(1 << 36, np.uint8)}
def sleep(path):
    time.sleep(60)
def crash(path):
    os.kill(os.getpid(), signal.SIGSEGV)
def kill(path):
    os.kill(os.getpid(), signal.SIGKILL)
def fail(path):
    raise KeyError("a mistake of ours")
def odd(path):
    return {"odd": object()}
def voxels(path):
    return {"voxels": np.full((64, 512, 512), 7, np.int16)}
def fields(path):
    return {"text": "x" * 3_000_000, "voxels": np.arange(3)}
reader_process._FUNCTIONS.update(
    fill=fill, sleep=sleep, crash=crash, kill=kill, fail=fail, odd=odd, voxels=voxels, fields=fields
)
reader_process.serve()
"""


@pytest.fixture
def scan(tmp_path):
    path = tmp_path / "a.mha"
    scans.write_scan(path, VOXELS, (2.0, 1.0, 1.0))
    return path


@pytest.fixture
def bad(monkeypatch):
    reader_process._end()
    monkeypatch.setattr(reader_process, "_START", BAD)
    yield
    reader_process._end()


def check_read(path):
    np.testing.assert_array_equal(scans.read_scan(path).voxels[0], VOXELS)


def running():
    return reader_process._running[0].process


def open_files(process="self"):
    return len(os.listdir(f"/proc/{process}/fd"))


def children():
    """Of this process, zombies too."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = status.read_text("utf-8").rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid():
                found.append((int(status.parent.name), state))
    return found


def until(condition, seconds=5.0):
    stop = time.monotonic() + seconds
    while not condition() and time.monotonic() < stop:
        time.sleep(0.01)
    assert condition()


def test_it_is_killed_between_calls(scan):
    check_read(scan)
    first = running()
    first.kill()
    until(lambda: os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))  # all of its threads are gone
    check_read(scan)
    assert running().pid != first.pid
    assert first.pid not in dict(children())


def test_it_is_killed_during_a_call(bad, tmp_path, scan):
    errors = []

    def read():
        try:
            reader_process.call("sleep", tmp_path)
        except UserError as error:
            errors.append(str(error))

    reader_process.call("voxels", tmp_path)
    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.2)
    os.kill(running().pid, signal.SIGKILL)
    thread.join(5)
    assert "the process that read it was killed, as Linux does where memory runs out" in errors[0]
    check_read(scan)


def test_what_it_does_wrong_is_one_line(bad, tmp_path, monkeypatch, scan):
    before = open_files(), len(children())
    for function, message in (
        ("crash", r"cannot be read: the library that reads it crashed \(SIGSEGV\), as happens where a file is damaged"),
        ("kill", "the process that read it was killed"),
        ("fill", "needs more memory than there is"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            reader_process.call(function, tmp_path)
        assert str(tmp_path) in str(caught.value)
        check_read(scan)
    for function, message in (("fail", "a mistake of ours"), ("odd", "not JSON serializable")):  # not the user's
        with pytest.raises(RuntimeError, match=message):
            reader_process.call(function, tmp_path)
    monkeypatch.setattr(reader_process, "SECONDS", 0.3)
    with pytest.raises(UserError, match="is not read after 0 s: expected less for a file of its size"):
        reader_process.call("sleep", tmp_path)
    monkeypatch.undo()
    reader_process._end()
    assert (open_files(), len(children())) == before


def test_it_ends_by_itself_where_nobody_ends_it(tmp_path):
    program = f"""
import os, threading, time
from autocontext_jax.images import reader_process
reader_process._START = {BAD!r}
reader_process.SECONDS = -4.0  # the alarm is five seconds later
threading.Thread(target=reader_process.call, args=("sleep", __import__("pathlib").Path("/")), daemon=True).start()
while not reader_process._running:
    time.sleep(0.01)
print(reader_process._running[0].process.pid, flush=True)
time.sleep(0.1)
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False)
    until(lambda: not Path(f"/proc/{ended.stdout.strip()}").exists())


def test_voxels_are_this_process_s_own(bad, tmp_path):
    """They can be written, do not change with the next call, and are given back."""
    before = None
    for _ in range(5):
        first = reader_process.call("voxels", tmp_path)["voxels"]
        first[:] = 1
        second = reader_process.call("voxels", tmp_path)["voxels"]
        assert (first == 1).all()
        assert (second == 7).all()
        del first, second
        now = open_files(), open_files(running().pid)
        before = before or now
        assert now == before


def test_a_line_longer_than_the_socket(bad, tmp_path):
    result = reader_process.call("fields", tmp_path)
    assert len(result["text"]) == 3_000_000
    np.testing.assert_array_equal(result["voxels"], np.arange(3))


def test_ctrl_c_during_a_call_leaves_no_answer_for_the_next(bad, tmp_path, scan):
    reader_process.call("voxels", tmp_path)
    main = threading.main_thread().ident
    # A shell starts what it runs in the background with Ctrl-C ignored, and tests may be run there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        reader_process.call("sleep", tmp_path)
    signal.signal(signal.SIGINT, before)
    check_read(scan)


def test_ctrl_c_of_the_group_does_not_reach_it(tmp_path, scan):
    program = f"""
import os, signal, time
from autocontext_jax.images import reader_process, scans
scans.read_scan({str(scan)!r})
first = reader_process._running[0].process.pid
try:
    os.killpg(0, signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    pass
scans.read_scan({str(scan)!r})
print(first == reader_process._running[0].process.pid, first)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", start_new_session=True, check=True
    )
    same, process = ended.stdout.split()
    assert same == "True"
    until(lambda: not Path(f"/proc/{process}").exists())  # and none is left of it


@pytest.mark.parametrize("limit", ["soft", "hard"])
def test_a_limit_of_memory_that_was_there_stays(tmp_path, scan, limit):
    program = f"""
import resource
from autocontext_jax.images import reader_process, scans
most = 3 << 30
resource.setrlimit(resource.RLIMIT_AS, (most, most if {limit!r} == "hard" else resource.RLIM_INFINITY))
scans.read_scan({str(scan)!r})
print(resource.prlimit(reader_process._running[0].process.pid, resource.RLIMIT_AS)[0] == most)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False)
    assert ended.stdout == "True\n", ended.stderr


def test_two_threads_at_once(tmp_path):
    paths = []
    for number in range(8):
        paths.append(tmp_path / f"{number}.mha")
        scans.write_scan(paths[-1], VOXELS + number, (2.0, 1.0, 1.0))
    wrong = []

    def read(start):
        for turn in range(40):
            number = (start + turn) % len(paths)
            if not (scans.read_scan(paths[number]).voxels[0] == VOXELS + number).all():
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(start,)) for start in (0, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_worker_has_its_own(scan):
    """Also while another thread reads; it leaves nothing, and its parent's is untouched."""
    program = f"""
import multiprocessing
from autocontext_jax.images import reader_process, scans

def process():
    return reader_process._running[0].process.pid

def read(connection):
    shape = scans.read_scan({str(scan)!r}).voxels[0].shape
    connection.send((shape, process()))

scans.read_scan({str(scan)!r})
first = process()
context = multiprocessing.get_context("fork")
ours, theirs = context.Pipe()
with reader_process._lock:  # as another thread holds it
    worker = context.Process(target=read, args=(theirs,), daemon=True)
    worker.start()
assert ours.poll(20)
shape, its = ours.recv()
worker.join(5)
assert worker.exitcode == 0
assert shape == {VOXELS.shape}
assert its != first
scans.read_scan({str(scan)!r})
assert process() == first
print(its)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False)
    assert ended.returncode == 0, ended.stderr
    until(lambda: not Path(f"/proc/{ended.stdout.strip()}").exists())


@pytest.mark.parametrize(
    "name", ["with space", "new\nline", "é", "日本", "'\"$(x)", "-x", "%d", os.fsdecode(b"\xff\xfe"), "x" * 250]
)
def test_odd_names(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    scans.write_scan(tmp_path / "a.mha", VOXELS, (2.0, 1.0, 1.0))
    (tmp_path / "a.mha").rename(folder / "a.mha")
    monkeypatch.chdir(tmp_path)
    for path in (folder / "a.mha", Path(name) / "a.mha"):
        if name.isprintable() or "\n" in name:
            check_read(path)
        else:
            with pytest.raises(UserError, match=r"\\udcff\\udcfe/a\.mha has a name that is not UTF-8"):
                scans.read_scan(path)
    with pytest.raises(UserError, match="holds no DICOM series"):
        scans.read_scan(name)


@pytest.mark.parametrize(
    "path", ["x" * 300 + ".mha", "x" * 5000, "x/" * 5000, "a\0b.mha", "a\0b", "\ud800.mha", "\ud800"]
)
def test_names_that_no_file_can_have(path):
    with pytest.raises(UserError, match="does not exist" if len(path) < 1000 else "^x"):
        scans.read_scan(path)


def test_the_current_folder_changes_and_is_deleted(tmp_path, monkeypatch, scan):
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    check_read(Path("a.mha"))
    monkeypatch.chdir(tmp_path / "b")
    check_read(Path("../a.mha"))
    with pytest.raises(UserError, match="does not exist"):
        scans.read_scan("a.mha")
    (tmp_path / "b").rmdir()
    check_read(scan)
    reader_process._end()
    check_read(scan)  # it starts there too
    for path in ("a.mha", "series"):
        with pytest.raises(UserError, match="does not exist"):
            scans.read_scan(path)
    with pytest.raises(UserError, match="the current folder was deleted"):
        reader_process.call("itk", Path("a.mha"), header_only=True)


def test_modules_of_the_current_folder_are_not_taken(tmp_path, monkeypatch, scan):
    (tmp_path / "json.py").write_text("raise SystemExit", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    reader_process._end()
    check_read(scan)


def test_a_process_that_does_not_start(monkeypatch, scan):
    reader_process._end()
    monkeypatch.setattr(reader_process, "_START", "raise SystemExit(3)")
    before = open_files(), len(children())
    with pytest.raises(UserError, match="did not start: expected Python to import what it needs"):
        scans.read_scan(scan)
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(UserError, match="cannot be started"):
        scans.read_scan(scan)
    assert (open_files(), len(children())) == before


def test_the_environment_s_limit_reaches_it(monkeypatch, scan):
    check_read(scan)
    monkeypatch.setenv("AUTOCONTEXT_MAX_VOXELS", "23")
    with pytest.raises(UserError, match="expected at most 23"):
        scans.read_scan(scan)
    monkeypatch.delenv("AUTOCONTEXT_MAX_VOXELS")
    check_read(scan)


def test_limits_follow_what_is_read(tmp_path, monkeypatch):
    """Those of a header's voxels in a second file too."""
    requests = []
    monkeypatch.setattr(
        reader_process,
        "_process",
        lambda: type("Fake", (), {"ask": lambda _, request: requests.append(request) or STOP})(),
    )
    (tmp_path / "a.raw").write_bytes(bytes(4_000_000))
    (tmp_path / "a.mhd").write_text("NDims = 3\nElementDataFile = a.raw\n", encoding="utf-8")
    with pytest.raises(UserError, match="stop"):
        scans.read_scan(tmp_path / "a.mhd")
    assert requests[0]["seconds"] > reader_process.SECONDS + 2
    assert requests[0]["memory"] > reader_process.MEMORY + 3 * 4_000_000 * 1000
    json.dumps(requests)


STOP = {"warnings": [], "mistake": "stop", "failure": None, "result": None}
