"""Files are whole or not there, and a refusal of the system is one line that names the file."""

import errno
import os

import pytest

from autocontext_jax.errors import UserError
from autocontext_jax.files import write_whole, writing


def test_what_was_there_stands_until_all_is_written(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    write_whole(path, "ä")
    assert path.read_bytes() == "ä".encode()
    write_whole(path, b"whole")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"table\.md cannot be written \(No space left on device\): see that the disk"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_only_the_systems_refusals_are_told(tmp_path):
    with (
        pytest.raises(UserError, match=r"here cannot be written \(No such file or directory\)"),
        writing(tmp_path / "here"),
    ):
        (tmp_path / "no" / "such").write_bytes(b"")
    with pytest.raises(ValueError, match="ours"), writing(tmp_path):
        raise ValueError("ours")
