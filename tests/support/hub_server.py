"""A Hub on this machine, for the real `huggingface_hub` client: repositories, branches, LFS, commits, bad days."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants as constants
import pytest
from huggingface_hub import hf_api
from xet_store import XetStore

TOKEN = "hf_for_the_server_of_the_tests"


@dataclass
class Commit:
    sha: str
    files: dict[str, bytes] = field(default_factory=dict)
    message: str = ""
    description: str = ""


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, Commit] = field(default_factory=lambda: {"main": Commit(hashlib.sha1(b"").hexdigest())})
    commits: int = 0


class HubServer:
    """Repositories in memory, and what clients asked; `answer` decides of each request what goes wrong with it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.xet = XetStore(self.objects)
        self.requests: list[str] = []
        self.answer: Callable[[int, str], int | str | None] = lambda number, request: None
        self.lost: Callable[[str], bool] = lambda request: False  # carried out, but answered by an error
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[name].branches[branch].files


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def client_of_a_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server, and the client of this process asking it instead of the Hub."""
    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # made when the module was imported; PEFT asks it
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's pauses before it asks again, and ours
    try:
        yield server
    finally:
        server.close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _go(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with hub.lock:
            hub.requests.append(f"{self.command} {path}")
            wrong = hub.answer(len(hub.requests), hub.requests[-1])
        if wrong == "cut":
            self.close_connection = True
            self.connection.close()
            return
        if isinstance(wrong, int):
            return self._send(wrong, {"error": "as the test wants it"})
        writes = self.command not in ("GET", "HEAD") and not path.startswith(("/lfs/", "/xet/"))
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        self.is_lost = hub.lost(hub.requests[-1])
        with hub.lock:
            self._answer(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = _go

    def _answer(self, path: str, body: bytes) -> None:
        hub, parts = self.hub, path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            kind = "" if asked.get("type", "model") == "model" else f"{asked['type']}s/"
            name = f"{kind}{asked.get('organization') or 'user'}/{asked['name']}"
            if name in hub.repositories:
                return self._send(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
            hub.repositories[name] = Repository(bool(asked.get("private") or asked.get("visibility") == "private"))
            return self._send(200, {"url": f"{hub.url}/{name}", "name": name})
        if parts[0] == "xet":
            told = hub.xet.take(path, body)
            return self._send(404, {}) if told is None else self._send(200, told)
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if parts[0] == "lfs":
            if self.command == "PUT":
                hub.objects[parts[1]] = body
            return self._send(200, {})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._send(
                200, {"transfer": "basic", "objects": [self._upload(o) for o in json.loads(body)["objects"]]}
            )
        if parts[0] == "api" and len(parts) >= 4:
            name = f"{'' if parts[1] == 'models' else parts[1] + '/'}{parts[2]}/{parts[3]}"
            if name in hub.repositories:
                return self._api(name, parts[4:], body)
        if len(parts) > 4 and parts[2] == "resolve" and f"{parts[0]}/{parts[1]}" in hub.repositories:
            return self._file(hub.repositories[f"{parts[0]}/{parts[1]}"], parts[3], "/".join(parts[4:]))
        return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def _upload(self, asked: dict) -> dict:
        found = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] in self.hub.objects:
            return found
        return {**found, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}}

    def _api(self, name: str, parts: list[str], body: bytes) -> None:
        repository = self.hub.repositories[name]
        what, revision = parts[0] if parts else "", "/".join(parts[1:]) or "main"
        if what in ("", "revision"):
            commit = self._commit_of(repository, revision)
            if commit is None:
                return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": file, "size": len(content)} for file, content in commit.files.items()]
            about = {"id": name, "modelId": name, "sha": commit.sha, "siblings": siblings, "tags": []}
            return self._send(200, {**about, "private": repository.private, "downloads": 0, "likes": 0})
        if what == "xet-write-token":
            told = {"casUrl": f"{self.hub.url}/xet", "accessToken": "for uploads", "exp": int(time.time()) + 3600}
            return self._send(200, told)
        if what == "tree":
            commit = self._commit_of(repository, revision)
            files = {} if commit is None else commit.files
            told = [{"type": "file", "oid": _oid(f), "size": len(f), "path": path} for path, f in files.items()]
            return self._send(200, told)
        if what == "commits":
            commit = self._commit_of(repository, revision)
            told = {"id": commit.sha, "title": commit.message, "message": commit.description, "authors": []}
            return self._send(200, [{**told, "date": "2026-01-01T00:00:00.000Z"}])
        if what == "branch":
            if revision in repository.branches:
                return self._send(409, {"error": "Reference already exists"})
            old = repository.branches["main"]
            repository.branches[revision] = Commit(old.sha, dict(old.files))
            return self._send(200, {})
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith((".safetensors", ".png")) else "regular" for f in files}
            told = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            return self._send(200, {"files": told})
        if what == "commit":
            return self._commit(name, repository, revision, [json.loads(line) for line in body.splitlines() if line])
        return self._send(404, {"error": f"no {what} here"})

    def _commit_of(self, repository: Repository, revision: str) -> Commit | None:
        by_sha = {commit.sha: commit for commit in repository.branches.values()}
        return repository.branches.get(revision) or by_sha.get(revision)

    def _commit(self, name: str, repository: Repository, revision: str, lines: list[dict]) -> None:
        head = next(line["value"] for line in lines if line["key"] == "header")
        old = repository.branches[revision]
        if head.get("parentCommit") not in (None, old.sha):
            return self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(old.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.commits += 1
        sha = hashlib.sha1(f"{name} {repository.commits}".encode()).hexdigest()
        new, pull = Commit(sha, files, head["summary"], head.get("description", "")), {}
        if "create_pr" in self.query:
            repository.branches["refs/pr/1"] = new
            pull = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/1"}
        else:
            repository.branches[revision] = new
        self._send(200, {"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", **pull})

    def _file(self, repository: Repository, revision: str, path: str) -> None:
        commit = self._commit_of(repository, revision)
        if commit is None or path not in commit.files:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        content = commit.files[path]
        etag = hashlib.sha256(content).hexdigest()
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit.sha})

    def _send(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None) -> None:
        status = 504 if getattr(self, "is_lost", False) else status
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
