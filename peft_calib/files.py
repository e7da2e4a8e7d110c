"""Files and folders that are there whole or not at all, and a lock for a folder that one process writes.

New content is written beside its place, under a name of its own, and takes the place in one step. What stood there
stands until then, and comes back if that step fails. The names tell who wrote them, so that what a killed process
left behind is cleared by the next write to the same place, and what a living one is writing is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # a system without it: the lock then goes by process numbers alone
    fcntl = None  # type: ignore[assignment]

_PARTIAL, _REPLACED = "partial", "replaced"
#: How long the name of a file may be on every usual file system, less what is put around it here.
_LONGEST_NAME = 150
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

#: Names that this very process is writing, or has moved aside.
_mine: set[str] = set()
_guard = threading.Lock()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A place beside a file for its new content, which takes the file's place when the block ends without error.

    A symbolic link is followed; the file's permissions stay, a new one has those of the umask. Threads and processes
    can write one file at once.
    """
    path = _real(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    with _own_name(path, _PARTIAL) as partial:
        # made here and not by mkstemp, so that the system applies the umask: reading the umask is not safe in threads
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = partial.stat().st_mode
        with contextlib.suppress(FileNotFoundError):
            mode = path.stat().st_mode
        try:
            yield partial
            os.chmod(partial, mode & 0o7777)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, so that a reader finds the old content or the new, never half of it."""
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def replace_folder(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Write a folder beside its place and put it there whole; the old folder goes last, and comes back on failure."""
    given, path = Path(path), _real(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{given} is a file; name a folder.")
    with _written_aside(path, write) as partial:
        move_into_place(partial, path)
    _sync_folder(path.parent)
    return given


def move_into_place(source: str | Path, path: str | Path) -> None:
    """Move what is finished to its place; what is there steps aside, comes back on failure, and goes last."""
    source, path = Path(source), _real(path)
    with _own_name(path, _REPLACED) as aside:
        try:
            if source.is_dir() and path.is_dir():
                os.chmod(source, path.stat().st_mode & 0o7777)
            os.rename(path, aside)
        except FileNotFoundError:
            os.rename(source, path)
            return
        try:
            os.rename(source, path)
        except BaseException:
            os.rename(aside, path)
            raise
        _remove(aside)


def fill_folder(path: str | Path, write: Callable[[Path], None], last: str) -> None:
    """Put new contents into a folder one by one; `last` says that all are there: it goes first and comes last."""
    path = _real(path)
    path.mkdir(parents=True, exist_ok=True)
    with _written_aside(path, write) as partial:
        (path / last).unlink(missing_ok=True)
        for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == last):
            move_into_place(entry, path / entry.name)


@contextmanager
def _written_aside(path: Path, write: Callable[[Path], None]) -> Iterator[Path]:
    """A folder beside a path, filled and on the disk; what is still there when the block ends goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    with _own_name(path, _PARTIAL) as partial:
        partial.mkdir()
        try:
            write(partial)
            for file in partial.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def clear_leftovers(path: str | Path) -> None:
    """Clear what killed processes of this machine left beside a path; put back what they had moved aside."""
    path = _real(path)
    pattern = re.compile(re.escape(f".{_stem(path)}.") + rf"([0-9a-f]{{8}})-(\d+)-[0-9a-f]+\.({_PARTIAL}|{_REPLACED})")
    try:
        names = [name for name in os.listdir(path.parent) if name.startswith(".")]
    except OSError:
        return
    for name in names:
        match = pattern.fullmatch(name)
        if match is None or _lives(match[1], int(match[2]), name):
            continue
        left = path.parent / name
        if match[3] == _REPLACED and not os.path.lexists(path):
            with contextlib.suppress(OSError):
                os.rename(left, path)
        else:
            _remove(left)


@contextmanager
def folder_lock(path: str | Path) -> Iterator[None]:
    """Keep a folder to this call, by a locked file beside it; `BlockingIOError` while another has it.

    The system lets go of it when its process ends, however it ends, so a killed run can be resumed at once.
    """
    given, path = Path(path), _real(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f".{_stem(path)}.lock")
    handle = _take(place, given)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(place)):
                place.unlink()
        os.close(handle)


def _take(place: Path, folder: Path) -> int:
    """Open and lock the file; a lock of a process that has ended is taken over."""
    for _ in range(20):
        handle = os.open(place, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            taken = _try_lock(handle)
            if not taken and _held_by_orphans(handle):
                with contextlib.suppress(FileNotFoundError):
                    place.unlink()  # and begin another file
            elif not taken:
                raise BlockingIOError(_in_use(folder, _holder(handle)))
            elif os.path.exists(place) and os.path.samestat(os.fstat(handle), os.stat(place)):
                owner = {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine()}
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({**owner, "since": time.strftime("%F %T")}).encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the file was removed between opening and locking
    raise BlockingIOError(_in_use(folder, None))


def _try_lock(handle: int) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:
            pass  # a file system without locks
    holder = _holder(handle)
    return holder is None or _has_ended(holder)


def _held_by_orphans(handle: int) -> bool:
    """Whether a lock's process has ended while children that it forked live on and keep the system's lock."""
    for _ in range(2):  # twice: one that has just taken the lock of an ended process needs a moment to sign it
        owner = _holder(handle)
        if owner is None or not _has_ended(owner):
            return False
        time.sleep(0.2)
    return True


def _holder(handle: int) -> dict[str, Any] | None:
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and isinstance(owner.get("pid"), int) else None


def _has_ended(owner: dict[str, Any]) -> bool:
    return not _lives(str(owner.get("machine")), owner["pid"])


def _in_use(folder: Path, owner: dict[str, Any] | None) -> str:
    who = "another process"
    if owner is not None:
        who = f"process {owner['pid']} on {owner.get('host')} (since {owner.get('since')})"
    return f"{folder} is being written by {who}; wait until it has ended, or name another folder"


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, says in anyone's words that there was no room to write."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(f"(os error {number})" in text for number in _FULL):  # safetensors
            return True
        if isinstance(seen, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text):
            return True  # torch.save, which does not say why
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def _own_name(path: Path, kind: str) -> Iterator[Path]:
    """A name beside a path that is of this call alone and tells by whom it is used."""
    name = f".{_stem(path)}.{_machine()}-{os.getpid()}-{secrets.token_hex(6)}.{kind}"
    with _guard:
        _mine.add(name)
    try:
        yield path.with_name(name)
    finally:
        with _guard:
            _mine.discard(name)


def _lives(machine: str, pid: int, name: str | None = None) -> bool:
    """Whether a process may still be at work; one of another machine always may."""
    if machine != _machine():
        return True
    if pid == os.getpid():  # this one, or an earlier one of the same number
        return name is None or name in _mine
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@cache
def _machine() -> str:
    """The system whose process numbers ours can be compared with: a container has numbers of its own."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with contextlib.suppress(OSError):
            parts.append(read())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _stem(path: Path) -> str:
    """The name of a file, short enough to have something put around it."""
    if len(os.fsencode(path.name)) <= _LONGEST_NAME:
        return path.name
    return f"{path.name[:40]}-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}"


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def _sync_folder(folder: Path) -> None:
    """Have a rename outlast a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
