"""One request to a server that is not trusted: a deadline, a limit of size, and a key that goes to nobody else."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import re
import socket
import time
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, OpenerDirector, Request, build_opener

#: Bytes of an answer that are read. One next token with its alternatives takes some kilobytes.
LARGEST_ANSWER = 16 * 2**20
#: Redirects within one origin that are followed.
MOST_REDIRECTS = 5


class Refused(ConnectionError):
    """A server that answered with an error of HTTP: its code, and what it said."""

    def __init__(self, url: str, code: int, said: str) -> None:
        super().__init__(f"{url} answered {code}: {said}")
        self.code, self.said = code, said


class Server:
    """A base URL with the key or password that goes to it, and to no other origin, and is not shown."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        parts = _split(base_url)
        user, password = parts.username, parts.password
        if api_key is not None and (not isinstance(api_key, str) or not re.fullmatch(r"[\x21-\x7e]+", api_key)):
            raise ValueError("api_key must be printable ASCII without spaces or line ends; it is not shown here.")
        if api_key is not None and user is not None:
            raise ValueError("base_url holds a user and api_key is given too; a request carries one of them.")
        host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else str(parts.hostname)
        port = "" if parts.port is None else f":{parts.port}"
        self.shown = f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"
        self.root = self.shown.removesuffix("/v1")
        self.headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._secrets = [secret for secret in (api_key, password, unquote(password or "")) if secret]
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"
        elif user is not None:
            token = base64.b64encode(f"{unquote(user)}:{unquote(password or '')}".encode()).decode()
            self.headers["Authorization"] = f"Basic {token}"
            self._secrets.append(token)

    def ask(self, path: str, body: dict[str, Any] | None, timeout: float) -> Any:
        """Send a request and read its answer, all within `timeout` seconds but for the look-up of the host's name.

        A path that begins with a slash counts from above `/v1`.
        """
        check_timeout(timeout)
        url = f"{self.root}{path}" if path.startswith("/") else f"{self.shown}/{path}"
        deadline = _Deadline(timeout)
        try:
            return _parsed(self._read(url, body, deadline), url)
        except Refused as error:
            raise Refused(url, error.code, self._hidden(error.said)) from None
        except ConnectionError as error:
            # a server may send back what it was sent
            raise ConnectionError(self._hidden(str(error))) from None
        except TimeoutError:
            raise ConnectionError(f"{url} cannot be reached: no whole answer within {timeout:g} s.") from None
        except (URLError, OSError, http.client.HTTPException, ValueError) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, TimeoutError):
                reason = f"no whole answer within {timeout:g} s"
            raise ConnectionError(self._hidden(f"{url} cannot be reached: {_one_line(reason)}")) from None

    def _read(self, url: str, body: dict[str, Any] | None, deadline: _Deadline) -> bytes:
        opener, target = _opener(deadline), url
        for _ in range(MOST_REDIRECTS + 1):
            data = None if body is None else json.dumps(body).encode()
            try:
                with opener.open(Request(target, data, self.headers), timeout=deadline.left()) as response:
                    return _bounded(response, url)
            except HTTPError as error:
                with error:
                    location = error.headers.get("Location") if 300 <= error.code < 400 else None
                    if location is None:
                        raise Refused(url, error.code, _message(error.read(8000))) from None
                target = _followed(target, location, is_get=data is None)
        raise ConnectionError(f"{url} redirects more than {MOST_REDIRECTS} times.")

    def _hidden(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def check_timeout(timeout: object) -> None:
    """Raise `ValueError` unless a timeout is a positive number of seconds."""
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not number or not math.isfinite(timeout) or timeout <= 0:  # type: ignore[operator, arg-type]
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}.")


def _split(url: object) -> SplitResult:
    # no message may show the URL: it can hold a password
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        shown = repr(re.sub(r"//[^/@]*@", "//***@", url)) if isinstance(url, str) else type(url).__name__
        raise ValueError(f"base_url must begin with http:// or https://, got {shown}.")
    if re.search(r"[\x00-\x20\x7f-\uffff]", url):
        raise ValueError("base_url holds a space, a control character or one outside ASCII. Quote it.")
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0  # asking for the port checks it
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("base_url has no usable host and port. Write it like http://localhost:8000/v1.")
    if parts.query or parts.fragment:
        raise ValueError("base_url must have no ? and no #. Write it like http://localhost:8000/v1.")
    return parts


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _followed(url: str, location: str, is_get: bool) -> str:
    """Where a redirect leads, if it may be followed: the key must reach no other origin, and a body is sent once."""
    try:
        target = urljoin(url, location)
        same = _origin(target) == _origin(url) and "@" not in urlsplit(target).netloc
    except ValueError:
        target, same = location, False
    if same and is_get:
        return target
    shown = _one_line(re.sub(r"//[^/@]*@", "//", target))[:200]
    raise ConnectionError(
        f"{url} answered with a redirect to {shown}, which is not followed: the key and the prompts are for the "
        "server they were given for. If it is the right one, pass its address as base_url."
    )


def _bounded(response: Any, url: str) -> bytes:
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("", "identity"):
        raise ConnectionError(f"{url} answered with the encoding {encoding[:40]!r}, which was not asked for.")
    parts, size = [], 0
    while chunk := response.read(65536):
        size += len(chunk)
        if size > LARGEST_ANSWER:
            raise ConnectionError(
                f"{url} answered with more than {LARGEST_ANSWER // 2**20} MiB; the rest is not read."
            )
        parts.append(chunk)
    return b"".join(parts)


def _parsed(data: bytes, url: str) -> Any:
    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name occurs twice in one object")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        return json.loads(data.decode(), object_pairs_hook=without_doubles, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else _one_line(error)
        raise ConnectionError(f"{url} did not answer in JSON that can be read ({why}).") from None


def _message(body: bytes) -> str:
    """What an answer that is an error says, in one line: the message in it, or all of it."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
        for name in ("error", "message"):
            found = found.get(name, found) if isinstance(found, dict) else found
        text = found if isinstance(found, str) else text
    except (ValueError, RecursionError):
        pass
    return _one_line(text)[:500]


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return left


class _Reader(io.RawIOBase):
    """Bytes of a socket until a deadline: a socket's own timeout begins anew with every byte."""

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self._sock, self._raw, self._deadline = sock, sock.makefile("rb", buffering=0), deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._deadline.left())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Socket:
    """A socket whose reading and writing end at a deadline."""

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self._sock, self._deadline = sock, deadline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def makefile(self, *_: Any, **__: Any) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._sock, self._deadline))

    def sendall(self, data: Any) -> None:
        self._sock.settimeout(self._deadline.left())
        self._sock.sendall(data)


def _opener(deadline: _Deadline) -> OpenerDirector:
    def limited(kind: type[http.client.HTTPConnection]) -> Any:
        class Limited(kind):  # type: ignore[misc, valid-type]
            def connect(self) -> None:
                super().connect()
                self.sock = _Socket(self.sock, deadline)

        return Limited

    class Http(HTTPHandler):
        def http_open(self, req: Request) -> Any:
            return self.do_open(limited(http.client.HTTPConnection), req)

    class Https(HTTPSHandler):
        def https_open(self, req: Request) -> Any:
            connection = limited(http.client.HTTPSConnection)
            return self.do_open(connection, req, context=self._context)  # type: ignore[attr-defined]

    class NoRedirects(HTTPRedirectHandler):
        """Leaves redirects to the caller, who reads no body of them."""

        def http_error_302(self, *_: Any) -> None:  # type: ignore[override]
            return None

        http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    return build_opener(Http, Https, NoRedirects)
