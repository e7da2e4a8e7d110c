"""A folder on the Hub in one commit or none, whatever the server does."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

MESSAGE = "Upload with peft-calib"
#: How often a server's own failure is answered by asking again, and the seconds before the first time.
TRIES, PAUSE = 4, 0.5
SERVER_ERROR, CONFLICTS = 500, (409, 412)

T = TypeVar("T")


@dataclass(frozen=True)
class Destination:
    """A repository of the Hub, made if it does not exist; `sdk` is that of a Space."""

    repo_id: str
    revision: str | None = None
    private: bool | None = None
    create_pr: bool = False
    token: str | bool | None = None
    repo_type: str | None = None
    sdk: str | None = None

    def commit(self, folder: Path, message: str, managed: tuple[str, ...]) -> CommitInfo:
        """The files of a folder, and no other of those with `managed` beginnings, in one commit."""
        api = HfApi(token=self.token, library_name="peft-calib")
        kind: dict[str, Any] = {"repo_type": self.repo_type, "exist_ok": True}
        made = _again(lambda: api.create_repo(self.repo_id, private=self.private, space_sdk=self.sdk, **kind))
        name = made.repo_id
        if self.revision is not None:
            _again(lambda: api.create_branch(name, branch=self.revision, **kind))  # type: ignore[arg-type]
        return self._committed(api, name, folder, message, managed)

    def _committed(self, api: HfApi, name: str, folder: Path, message: str, managed: tuple[str, ...]) -> CommitInfo:
        """One commit on top of what was there when it was looked at."""
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        try:
            head = _again(lambda: api.repo_info(name, revision=self.revision, repo_type=self.repo_type))
        except RevisionNotFoundError:  # a repository without a commit
            head = None
        there = [] if head is None else [file.rfilename for file in head.siblings or ()]
        gone = [file for file in there if file not in files and file.startswith(managed)]
        operations = [CommitOperationAdd(file, folder / file) for file in files]
        operations += [CommitOperationDelete(file) for file in gone]
        where: dict[str, Any] = {"revision": self.revision, "repo_type": self.repo_type}
        options = {"commit_message": message, "create_pr": self.create_pr, **where}
        mark = _mark(folder, files)
        options |= {"commit_description": mark, "parent_commit": None if head is None else head.sha}
        try:
            return _again(lambda: api.create_commit(name, operations, **options))
        except HfHubHTTPError as error:
            if _status(error) not in CONFLICTS:
                raise
            made = api.list_repo_commits(name, **where)[0]
            if mark in made.message:  # an earlier try was carried out, though its answer did not arrive
                kind = "" if self.repo_type is None else f"{self.repo_type}s/"
                url = f"{api.endpoint}/{kind}{name}/commit/{made.commit_id}"
                return CommitInfo(commit_url=url, commit_message=message, commit_description=mark, oid=made.commit_id)
            raise ValueError(
                f"Somebody else pushed to {name} meanwhile, so nothing was written. Look at what is there now, and "
                "push again."
            ) from error


def _mark(folder: Path, files: Sequence[str]) -> str:
    """What tells a commit of these files from others: their digest."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file}\0{hashlib.sha256((folder / file).read_bytes()).hexdigest()}\n".encode())
    return f"Content sha256:{digest.hexdigest()}"


def _again(ask: Callable[[], T]) -> T:
    """Ask again where the server failed by its own fault."""
    for turn in range(TRIES):
        try:
            return ask()
        except HfHubHTTPError as error:
            if _status(error) < SERVER_ERROR or turn == TRIES - 1:
                raise
            time.sleep(PAUSE * 2**turn)
    raise AssertionError("the last try returns or raises")


def _status(error: HfHubHTTPError) -> int:
    return getattr(error.response, "status_code", 0)
