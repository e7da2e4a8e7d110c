"""A server of draws is not trusted: where the key goes, how long is waited, how much is read, what is believed."""

import contextlib
import gzip
import http.server
import importlib.util
import json
import sys
import threading
import time
from pathlib import Path

import pytest

from peft_calib import predict_served
from peft_calib.prediction import transport
from peft_calib.prediction.serving import list_draws

GOOD = {"choices": [{"logprobs": {"top_logprobs": [{"A": -0.5, "B": -1.5}]}}]}


@pytest.fixture
def serve():
    """Start servers that answer with a function of the handler."""
    servers = []

    def start(answer, tokenizes=False):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def reply(self, body, status=200, **headers):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.body = json.loads(body) if body else None
                with contextlib.suppress(OSError):  # the client has gone
                    if self.path == "/tokenize" and not tokenizes:
                        self.reply(b"", 404)
                    else:
                        answer(self)
                self.close_connection = True

            do_GET = do_POST = handle_any

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(url, **options):
    return predict_served(url, ["x"], ["A", "B"], draws=["draw-0"], **{"timeout": 5.0, **options})


def test_a_good_answer_is_believed(serve):
    assert ask(serve(lambda h: h.reply(GOOD))).probabilities[0, 0] == pytest.approx(
        1 / (1 + 2.718281828**-1), abs=1e-6
    )


# ----------------------------------------------------------------- where the key goes


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_no_redirect_takes_the_key_to_another_origin(serve, status, host):
    seen = []

    def take(handler):
        seen.append(handler.headers.get("Authorization"))
        handler.reply({"data": [{"id": "draw-0"}]})

    other = serve(take).replace("127.0.0.1", host)
    first = serve(lambda h: h.reply(b"", status, Location=f"{other}/models"))
    for call in (lambda: list_draws(first, api_key="SECRET"), lambda: ask(first, api_key="SECRET")):
        with pytest.raises(ConnectionError, match="which is not followed"):
            call()
    assert not seen


def test_a_redirect_within_the_origin_is_followed_some_times(serve):
    def answer(handler):
        if handler.path.endswith("/models/"):
            handler.reply({"data": [{"id": handler.headers["Authorization"]}, {"id": "draw-0"}]})
        else:
            handler.reply(b"", 307, Location="/v1/models/")

    assert list_draws(serve(answer), api_key="SECRET") == ["draw-0"]
    with pytest.raises(ConnectionError, match="redirects more than"):
        list_draws(serve(lambda h: h.reply(b"", 302, Location=h.path)))
    with pytest.raises(ConnectionError, match="not followed"):  # a body is sent once
        ask(serve(lambda h: h.reply(b"", 307, Location=h.path)))


@pytest.mark.parametrize(
    "target", ["https://127.0.0.1:9/x", "ftp://127.0.0.1/x", "//evil.example/x", "http://[bad", ""]
)
def test_other_redirects_are_refused(serve, target):
    with pytest.raises(ConnectionError):
        list_draws(serve(lambda h: h.reply(b"", 302, Location=target)), api_key="SECRET")


def test_what_is_secret_is_in_no_message(serve):
    echo = serve(lambda h: h.reply(f"no: {h.headers['Authorization']}".encode(), 500))
    named = echo.replace("http://", "http://me:pa%20ss@")
    for call in (
        lambda: list_draws(echo, api_key="SECRET"),
        lambda: list_draws(named),
        lambda: ask("http://me:pa%20ss@127.0.0.1:9/v1"),
        lambda: ask("http://me:pa%20ss@127.0.0.1:port/v1"),
        lambda: ask("ftp://me:pa%20ss@127.0.0.1/v1"),
        lambda: ask("http://me:pa%20ss@127.0.0.1:9/v1", api_key="SECRET"),
        lambda: ask(echo, api_key="SECRET\nX-Other: 1"),
    ):
        with pytest.raises((ConnectionError, ValueError)) as caught:
            call()
        chain, error = "", caught.value
        while error is not None:
            chain, error = (
                chain + str(error),
                error.__cause__ or (None if error.__suppress_context__ else error.__context__),
            )
        assert not any(secret in chain for secret in ("SECRET", "pa%20ss", "pa ss", "bWU6cGEgc3M=")), chain


def test_user_and_password_are_sent_to_the_server(serve):
    seen = []

    def answer(handler):
        seen.append(handler.headers["Authorization"])
        handler.reply(GOOD)

    ask(serve(answer).replace("http://", "http://me:pa%20ss@"))
    assert seen == ["Basic bWU6cGEgc3M="]


# ----------------------------------------------------------------- how long, how much


def drip_body(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    drip(handler)


def drip_chunks(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    drip(handler, b"1\r\n \r\n")


def drip_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    drip(handler)


def drip_status(handler):
    drip(handler, b"H")


def drip_error(handler):
    handler.send_response(500)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    drip(handler)


def redirect_slowly(handler):
    time.sleep(0.4)
    handler.reply(b"", 302, Location=handler.path)


def drip(handler, piece=b" "):
    for _ in range(60):
        handler.wfile.write(piece)
        handler.wfile.flush()
        time.sleep(0.2)


@pytest.mark.parametrize(
    "answer",
    [drip_body, drip_chunks, drip_headers, drip_status, drip_error, redirect_slowly, lambda _: time.sleep(12)],
)
def test_the_deadline_is_that_of_the_whole_request(serve, answer):
    url, start = serve(answer), time.monotonic()
    with pytest.raises(ConnectionError):
        list_draws(url, timeout=1.0)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("headers", [{}, {"Transfer_Encoding": "chunked", "Content_Length": "0"}])
def test_no_endless_answer_is_read(serve, headers, monkeypatch):
    monkeypatch.setattr(transport, "LARGEST_ANSWER", 2**20)
    sent = []

    def pour(handler):
        handler.send_response(200)
        if headers:
            handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        piece = b"10000\r\n" + b" " * 65536 + b"\r\n" if headers else b" " * 65536
        for _ in range(2000):
            handler.wfile.write(piece)
            sent.append(1)

    with pytest.raises(ConnectionError, match="more than 1 MiB"):
        ask(serve(pour))
    assert len(sent) < 500


def test_a_compressed_answer_is_not_unpacked(serve):
    bomb = gzip.compress(b" " * 10**7)
    with pytest.raises(ConnectionError, match="encoding 'gzip'"):
        ask(serve(lambda h: h.reply(bomb, Content_Encoding="gzip")))


# ----------------------------------------------------------------- what is believed


def with_scores(scores):
    return {"choices": [{"logprobs": {"top_logprobs": [scores]}}]}


ANSWERS = {
    "no json": b"<html>",
    "empty": b"",
    "not utf-8": b'"\xff\xfe"',
    "deep": b"[" * 100_000,
    "a number": 3,
    "null": None,
    "no choices": {},
    "choices no list": {"choices": {"0": 1}},
    "no choice": {"choices": []},
    "two choices": {"choices": GOOD["choices"] * 2},
    "choice no object": {"choices": [1]},
    "no logprobs": {"choices": [{"text": "A"}]},
    "null logprobs": {"choices": [{"logprobs": None}]},
    "logprobs a list": {"choices": [{"logprobs": [1]}]},
    "no positions": {"choices": [{"logprobs": {"top_logprobs": []}}]},
    "two positions": {"choices": [{"logprobs": {"top_logprobs": [{"A": -1, "B": -1}] * 2}}]},
    "null position": {"choices": [{"logprobs": {"top_logprobs": [None]}}]},
    "text": with_scores({"A": "-1", "B": -1}),
    "null score": with_scores({"A": None, "B": -1}),
    "true": with_scores({"A": True, "B": -1}),
    "a list": with_scores({"A": [-1], "B": -1}),
    "NaN": b'{"choices": [{"logprobs": {"top_logprobs": [{"A": NaN, "B": -1}]}}]}',
    "infinity": b'{"choices": [{"logprobs": {"top_logprobs": [{"A": -Infinity, "B": -1}]}}]}',
    "overflow": b'{"choices": [{"logprobs": {"top_logprobs": [{"A": -1e999, "B": -1}]}}]}',
    "positive": with_scores({"A": 3.0, "B": -1}),
    "more than all": with_scores({"A": -0.1, "B": -0.1}),
    "twice": b'{"choices": [{"logprobs": {"top_logprobs": [{"A": -1, "B": -2, "A": -3}]}}]}',
    "huge number": b'{"choices": [{"logprobs": {"top_logprobs": [{"A": -1' + b"0" * 5000 + b', "B": -1}]}}]}',
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_malformed_answer_is_a_connection_error(serve, answer):
    with pytest.raises(ConnectionError) as caught:
        ask(serve(lambda h: h.reply(ANSWERS[answer])))
    assert "completions" in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def classes(probabilities, **more):
    return {"data": [{"index": 0, "probs": probabilities, **more}]}


CLASSES = {
    "nothing": {},
    "no entry": {"data": []},
    "two entries": {"data": classes([0.5, 0.5])["data"] * 2},
    "no probabilities": {"data": [{"index": 0}]},
    "one class": classes([1.0]),
    "text": classes(["a", "b"]),
    "null": classes([None, 1.0]),
    "negative": classes([-0.5, 1.5]),
    "true": classes([True, False]),
    "too much": classes([0.9, 0.9]),
    "scores": classes([0.1, 0.2]),
    "another place": classes([0.5, 0.5], index=1),
    "a place of text": classes([0.5, 0.5], index="0"),
    "infinity": b'{"data": [{"index": 0, "probs": [1e999, 0]}]}',
}


@pytest.mark.parametrize("answer", CLASSES)
def test_malformed_classes_are_a_connection_error(serve, answer):
    with pytest.raises(ConnectionError) as caught:
        predict_served(serve(lambda h: h.reply(CLASSES[answer])), ["x"], draws=["draw-0"])
    assert "/classify" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", [{}, [], {"tokens": "1"}, {"tokens": [1.5]}, {"tokens": [True]}, {"tokens": [-1]}])
def test_malformed_tokens_are_a_connection_error(serve, answer):
    with pytest.raises(ConnectionError, match="/tokenize did not answer"):
        ask(serve(lambda h: h.reply(answer), tokenizes=True))


def test_draws_of_different_classes_are_refused(serve):
    def answer(handler):
        handler.reply(classes([0.5, 0.5] if handler.body["model"] == "draw-0" else [0.2, 0.3, 0.5]))

    with pytest.raises(ConnectionError, match="different numbers of classes"):
        predict_served(serve(answer), ["x"], draws=["draw-0", "draw-1"])


LISTS = [
    b"x",
    None,
    [],
    {},
    {"data": None},
    {"data": [1]},
    {"data": [{}]},
    {"data": [{"id": 3}]},
    {"data": {"id": "a"}},
]


@pytest.mark.parametrize("answer", LISTS, ids=str)
def test_a_malformed_list_is_a_connection_error(serve, answer):
    with pytest.raises(ConnectionError, match="models"):
        list_draws(serve(lambda h: h.reply(answer)))


@pytest.mark.parametrize("names", [["draw-0", "draw-2"], ["draw-0", "draw-0"], ["draw-0", "draw-00"], ["draw-1"]])
def test_draws_that_are_missing_or_there_twice(serve, names):
    url = serve(lambda h: h.reply({"data": [{"id": name} for name in names]}))
    with pytest.raises(ValueError, match="is missing, or there twice"):
        list_draws(url)


def test_names_in_other_digits_are_no_draws(serve):
    url = serve(lambda h: h.reply({"data": [{"id": "draw-\u00b2"}, {"id": "draw-\u0663"}]}))
    with pytest.raises(ValueError, match="none is named"):
        list_draws(url)


@pytest.mark.parametrize(
    "options",
    [
        *[{"timeout": 0}, {"timeout": float("nan")}, {"timeout": None}, {"top_logprobs": 0}, {"concurrency": 0}],
        *[{"api_key": "a b"}, {"api_key": ""}, {"api_key": 5}],
    ],
)
def test_bad_options_are_refused_before_anything_is_sent(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ask("http://127.0.0.1:9/v1", **options)


@pytest.mark.parametrize("draws", [[], "draw-0", ["draw-0", "draw-0"]])
def test_bad_draws_are_refused(draws):
    with pytest.raises(ValueError, match="draws must be"):
        predict_served("http://127.0.0.1:9/v1", ["x"], ["A", "B"], draws=draws)


@pytest.mark.parametrize(
    "url", ["http://", "http://a b/v1", "http://x/\n", "http://x/v1?key=1", "http://x:99999/v1", 5]
)
def test_bad_urls_are_refused(url):
    with pytest.raises(ValueError, match="base_url"):
        list_draws(url)


def test_the_first_error_ends_the_others(serve):
    count = []

    def answer(handler):
        count.append(1)
        handler.reply(b"", 500)

    with pytest.raises(ConnectionError, match="answered 500"):
        predict_served(serve(answer), ["x"] * 500, ["A", "B"], draws=["draw-0"], concurrency=2)
    assert len(count) < 250


def test_the_script_says_it_in_one_line(serve, monkeypatch):
    path = Path(__file__).parents[2] / "hub_examples" / "serve_draws.py"
    spec = importlib.util.spec_from_file_location("serve_draws_alone", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    asked = []

    def answer(handler):
        asked.append(handler.path)
        handler.reply({"data": [{"id": "draw-0"}]} if handler.path.endswith("models") else GOOD)

    url = serve(answer)
    arguments = ["serve_draws.py", "ask", "x", "--labels", "A", "C", "--top-logprobs", "7", "--url"]
    for address, expected in ((url, "7 most probable"), ("http://127.0.0.1:9/v1", "cannot be reached")):
        monkeypatch.setattr(sys, "argv", [*arguments, address])
        with pytest.raises(SystemExit) as caught:
            example.main()
        assert expected in caught.value.code and "\n" not in caught.value.code
