"""Files and folders are there whole or not at all, whoever writes them and whatever happens meanwhile."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from peft_calib import files
from peft_calib.files import fill_folder, folder_lock, move_into_place, replace_folder, replacing, write_atomically


def test_threads_that_write_one_file_leave_one_whole_content_and_nothing_else(tmp_path):
    place, faults = tmp_path / "state.json", []

    def work(number):
        for _ in range(40):
            try:
                write_atomically(place, json.dumps([number] * 4000 * (number + 1)))
                assert len(set(json.loads(place.read_text()))) == 1
            except Exception as error:
                faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_permissions_stay_and_new_files_have_those_of_the_umask(tmp_path):
    (tmp_path / "secret").write_text("old")
    (tmp_path / "secret").chmod(0o600)
    write_atomically(tmp_path / "secret", "new")
    write_atomically(tmp_path / "open", "new")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "open").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_links_are_followed(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "file").write_text("old")
    (tmp_path / "file").symlink_to(tmp_path / "store" / "file")
    (tmp_path / "folder").symlink_to(tmp_path / "store")
    write_atomically(tmp_path / "file", "new")
    replace_folder(tmp_path / "folder", lambda new: write_atomically(new / "other", "x"))
    assert (tmp_path / "file").is_symlink() and (tmp_path / "folder").is_symlink()
    assert [entry.name for entry in (tmp_path / "store").iterdir()] == ["other"]


def test_a_failed_write_leaves_the_old(tmp_path):
    write_atomically(tmp_path / "file", "old")

    def breaks_off():
        with replacing(tmp_path / "file") as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        breaks_off()
    replace_folder(tmp_path / "folder", lambda new: write_atomically(new / "a", "old"))

    def fails(new):
        (new / "b").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_folder(tmp_path / "folder", fails)
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["a", "file", "folder"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    replace_folder(tmp_path / "folder", lambda new: write_atomically(new / "a", "old"))
    rename = os.rename

    def second_fails(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "I/O error")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", second_fails)
    with pytest.raises(OSError, match="I/O error"):
        replace_folder(tmp_path / "folder", lambda new: write_atomically(new / "a", "new"))
    monkeypatch.undo()
    assert (tmp_path / "folder" / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


#: The module alone: the package behind it takes seconds to import.
ALONE = """
import importlib.util, time
spec = importlib.util.spec_from_file_location("files", {path!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
"""


def child(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", ALONE.format(path=files.__file__) + code])


def wait_for(condition) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_what_a_killed_process_left_is_cleared_and_what_a_living_one_writes_is_not(tmp_path):
    code = f"with files.replacing({str(tmp_path / 'file')!r}) as p:\n p.write_text('half'); time.sleep(300)"
    running = child(code)
    try:
        wait_for(lambda: list(tmp_path.glob(".file.*.partial")))
        write_atomically(tmp_path / "file", "whole")
        assert len(list(tmp_path.glob(".file.*.partial"))) == 1  # it lives
    finally:
        running.kill()
        running.wait()
    write_atomically(tmp_path / "file", "again")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_a_killed_process_had_moved_aside_comes_back(tmp_path):
    running = child("pass")
    running.wait()
    aside = tmp_path / f".run.{files._machine()}-{running.pid}-0123456789ab.replaced"
    aside.mkdir()
    (aside / "run.json").write_text("{}")
    files.clear_leftovers(tmp_path / "run")
    assert (tmp_path / "run" / "run.json").exists() and not aside.exists()


def test_one_writer_a_folder_and_a_killed_one_is_followed_at_once(tmp_path):
    running = child(f"with files.folder_lock({str(tmp_path / 'run')!r}):\n time.sleep(300)")
    try:
        wait_for(lambda: (tmp_path / ".run.lock").exists() and (tmp_path / ".run.lock").read_text())
        with pytest.raises(BlockingIOError, match=f"run is being written by process {running.pid} on "):
            with folder_lock(tmp_path / "run"):
                pass
    finally:
        running.kill()
        running.wait()
    with folder_lock(tmp_path / "run"):
        with pytest.raises(BlockingIOError, match=f"by process {os.getpid()}"), folder_lock(tmp_path / "run"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_filling_a_folder_keeps_what_else_lies_in_it(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "report.json").write_text("old")

    def write(new):
        (new / "adapter").mkdir()
        (new / "adapter" / "a").write_text("new")
        (new / "report.json").write_text("new")

    fill_folder(tmp_path, write, "report.json")
    names = sorted(str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*"))
    assert names == ["adapter", "adapter/a", "notes.txt", "report.json"]
    assert (tmp_path / "report.json").read_text() == "new"
    (tmp_path / "spare").mkdir()
    move_into_place(tmp_path / "spare", tmp_path / "adapter")
    assert list((tmp_path / "adapter").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.EFBIG, "File too large"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos"), True),
        (OSError(errno.ENOENT, "No such file"), False),
        (RuntimeError("shapes do not fit"), False),
    ],
)
def test_a_full_disk_is_known_by_its_many_words(error, full):
    assert files.disk_is_full(error) is full
