"""Files and folders that are whole or not there, whatever fails."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from unmasked.errors import OutputError
from unmasked.files.writing import folder_aside, write_text, written_aside


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "x.txt"
    write_text(path, "einß")
    assert path.read_bytes() == "einß".encode()
    with pytest.raises(KeyError), written_aside(path) as file:
        file.write(b"half")
        assert ".x.txt.aside" in names(path.parent)
        raise KeyError
    assert path.read_bytes() == "einß".encode() and names(path.parent) == ["x.txt"]


def test_a_write_that_fails_is_told(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    told = pytest.raises(OutputError, match="x cannot be written: No space left on device. Fix: ma")
    for aside in (written_aside, folder_aside):
        with told, aside(tmp_path / "x"):
            raise full
        with pytest.raises(FileNotFoundError), aside(tmp_path / "x"):
            (tmp_path / "nowhere").open()
        assert names(tmp_path) == []
    (tmp_path / "x").touch()
    with pytest.raises(OutputError, match="x is a file. Fix: name a folder"):
        folder_aside(tmp_path / "x").__enter__()


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe, read = tmp_path / "p", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_text(pipe, "einß")
    reader.join(10)
    assert read == ["einß".encode()] and pipe.is_fifo() and names(tmp_path) == ["p"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "x").write_text("old")
    (tmp_path / "x").symlink_to(tmp_path / "disk" / "x")
    write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").is_symlink() and (tmp_path / "disk" / "x").read_text() == "new"
    assert names(tmp_path) == ["disk", "disk/x", "x"]


def test_a_folder_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "models" / "m"
    with folder_aside(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("1")
        (folder / "b").write_text("1")
        assert not path.exists()
    assert names(path.parent) == ["m", "m/b", "m/inner", "m/inner/a"]
    assert path.stat().st_mode & 0o777 == 0o755


def test_a_folder_that_is_there_keeps_what_is_not_replaced(tmp_path):
    (tmp_path / "m" / "inner").mkdir(parents=True)
    for name in ("b", "mine", "inner/a"):
        (tmp_path / "m" / name).write_text("old")
    with pytest.raises(KeyError), folder_aside(tmp_path / "m") as folder:
        (folder / "b").write_text("new")
        raise KeyError
    assert (tmp_path / "m" / "b").read_text() == "old"
    left = tmp_path / "m" / "left.tmp"  # by a process that was killed
    left.mkdir()
    (left / "stale").touch()
    with folder_aside(tmp_path / "m", aside=left) as folder:
        assert folder == left
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("new")
        (folder / "b").write_text("new")
    assert names(tmp_path) == ["m", "m/b", "m/inner", "m/inner/a", "m/mine"]
    found = {name: (tmp_path / "m" / name).read_text() for name in ("b", "mine", "inner/a")}
    assert found == {"b": "new", "mine": "old", "inner/a": "new"}


def test_the_last_file_says_that_all_are_there(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    moved = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (moved.append(a.name), replace(a, b)))
    with folder_aside(tmp_path / "m", last={"a", "done"}) as folder:
        for name in ("done", "z", "a"):
            (folder / name).touch()
    assert moved == ["z", "a", "done"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "new", Path("/proc/nowhere/new")):
        told = pytest.raises(OutputError, match=r"new cannot be written: .*\. Fix: name a place")
        with told, folder_aside(place):
            pass
