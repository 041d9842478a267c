"""The judge's endpoint is a stranger: whatever it sends, in whatever time, ends in an answer or in
one line, and what was answered before is kept.
"""

import gzip
import json
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import Any

import pytest

from ldalign.evaluation import endpoint as endpoint_module
from ldalign.evaluation.endpoint import Endpoint
from ldalign.system.errors import EnvironmentProblem, InputError, LdalignError
from ldalign.system.files import read_jsonl

SECRET = "sk-secret"


def chat(content: Any = "A", **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content, **more}, "finish_reason": "stop"}]}


def http(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    lines = {"Content-Length": str(len(body)), "Retry-After-Ms": "1"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def answer(content: Any = "A", **usage: Any) -> bytes:
    return http(json.dumps({**chat(content), **usage}).encode())


class Stranger:
    """A server that sends what `says` returns for a question, or what it sends itself."""

    def __init__(self) -> None:
        self.says: Callable[[str, socket.socket], bytes] = lambda question, connection: answer()
        self.asked: list[str] = []
        self.heads: list[bytes] = []
        stranger = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with self.request.makefile("rb") as file:
                    head = b"".join(iter(file.readline, b"\r\n"))
                    size = int(head.lower().partition(b"content-length: ")[2].split()[0])
                    question = json.loads(file.read(size))["messages"][0]["content"]
                stranger.heads.append(head)
                stranger.asked.append(question)
                try:
                    self.request.sendall(stranger.says(question, self.request))
                except OSError:  # nobody listens any more
                    return

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def new_stranger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Stranger]]:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint_module, "RETRIES", 1)
    strangers: list[Stranger] = []

    def make() -> Stranger:
        strangers.append(Stranger())
        serve = strangers[-1].server.serve_forever
        threading.Thread(target=serve, args=(0.02,), daemon=True).start()
        return strangers[-1]

    yield make
    for one in strangers:
        one.server.shutdown()
        one.server.socket.close()


@pytest.fixture
def stranger(new_stranger: Callable[[], Stranger]) -> Stranger:
    return new_stranger()


def connect(stranger: Stranger, folder: Path, **more: Any) -> Endpoint:
    given = {"token_cap": None, "concurrency": 1, "answer_tokens": 16, **more}
    return Endpoint(stranger.url, "big", folder / "judge.jsonl", **given)


def refusal(endpoint: Endpoint, question: str, kind: type[LdalignError]) -> str:
    """The one line that asking this ends in."""
    with pytest.raises(kind) as caught:
        endpoint.ask([question])
    line = str(caught.value)
    assert line.startswith(f"{endpoint.url}: ") and line.isprintable() and len(line) < 600, line
    assert SECRET not in line and line.endswith("the same command goes on from there")
    return line


NO_TEXT = "it has no text at choices[0].message.content"
MALFORMED = {
    "an empty answer": (http(b""), "it is not JSON"),
    "no JSON": (http(b"<html>\x1b[2J busy</html>"), "it is not JSON: <html> [2J busy</html>"),
    "JSON without end": (http(b"[" * 10**5), "it is not JSON"),
    "an integer without end": (http(b"1" * 10**5), "it is not JSON"),
    "cut in the middle": (answer()[:-9], "it is not JSON"),
    "no UTF-8": (http(b'{"choices": "\xff"}'), "it is not UTF-8"),
    "a list": (http(b"[]"), NO_TEXT),
    "a number": (http(b"7"), NO_TEXT),
    "null": (http(b"null"), NO_TEXT),
    "no choices": (http(b"{}"), NO_TEXT),
    "null for choices": (http(b'{"choices": null}'), NO_TEXT),
    "no choice": (http(b'{"choices": []}'), NO_TEXT),
    "an object for choices": (http(b'{"choices": {"message": {}}}'), NO_TEXT),
    "text for a choice": (http(b'{"choices": ["A"]}'), NO_TEXT),
    "no message": (http(b'{"choices": [{}]}'), NO_TEXT),
    "text for a message": (http(b'{"choices": [{"message": "A"}]}'), NO_TEXT),
    "null content": (answer(None), NO_TEXT),
    "a number for text": (answer(7), NO_TEXT),
    "a list for text": (answer([{"type": "text", "text": "A"}]), NO_TEXT),
    "half a surrogate pair": (answer("\ud800"), "its text has half a surrogate pair"),
    "packed": (http(gzip.compress(answer()), Content_Encoding="gzip"), "it is packed, as gzip"),
    "a bomb": (http(gzip.compress(b"0" * 10**7), Content_Encoding="gzip"), "it is packed"),
    "too long": (http(b" " * (2**20 + 1)), "it has more than 1048576 bytes"),
    "no HTTP": (b"A\r\n\r\n", "BadStatusLine"),
    "a header without end": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10**6, "LineTooLong"),
    "a broken chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        "IncompleteRead",
    ),
    "a chunk of less than nothing": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"
        + json.dumps(chat()).encode(),
        "IncompleteRead",
    ),
    "no word": (b"", "Remote end closed connection without response"),
}


@pytest.mark.parametrize(("sent", "message"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_answer_is_asked_again(
    stranger: Stranger, tmp_path: Path, sent: bytes, message: str
) -> None:
    """Once with RETRIES=1: then it is one line, or the answer that came the second time. What was
    answered before stays.
    """
    endpoint = connect(stranger, tmp_path)
    assert endpoint.ask(["before"]) == ["A"]
    kept = (tmp_path / "judge.jsonl").read_bytes()
    stranger.says = lambda question, connection: sent
    line = refusal(endpoint, "q", EnvironmentProblem)
    assert f"gives no answer after 1 more tries ({message}" in line
    assert stranger.asked == ["before", "q", "q"]
    assert (tmp_path / "judge.jsonl").read_bytes() == kept
    again = [answer("B"), sent]
    stranger.says = lambda question, connection: again.pop()
    assert connect(stranger, tmp_path).ask(["q", "before"]) == ["B", "A"]
    assert len(stranger.asked) == 5 and len(read_jsonl(tmp_path / "judge.jsonl")) == 2


@pytest.mark.parametrize(
    "sent",
    [
        {"choices": [{"message": {"content": None}, "finish_reason": "length"}]},
        {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]},
        chat(None, refusal="I will not."),
    ],
    ids=["length", "filtered", "refused"],
)
def test_a_model_that_says_why_it_is_silent_is_not_asked_again(
    stranger: Stranger, tmp_path: Path, sent: dict[str, Any]
) -> None:
    stranger.says = lambda question, connection: http(json.dumps(sent).encode())
    assert connect(stranger, tmp_path).ask(["q"]) == [""] and stranger.asked == ["q"]


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Elsewhere", "308 For Good"])
def test_a_redirect_is_not_followed(
    stranger: Stranger, new_stranger: Callable[[], Stranger], tmp_path: Path, status: str
) -> None:
    """Neither the key nor a question goes to another address than the one given."""
    other = new_stranger()
    there = f"{other.url}/chat/completions?{SECRET}"
    stranger.says = lambda question, connection: http(b"", status, Location=there)
    line = refusal(connect(stranger, tmp_path), "q", InputError)
    assert f"sends us elsewhere ({status[:3]}: {other.url}/chat/completions?...)" in line
    assert stranger.asked == ["q"] and not other.heads


def test_an_answer_without_end_is_not_read_to_its_end(stranger: Stranger, tmp_path: Path) -> None:
    """Of 64 MB that are sent no more are taken than the bound and what sockets hold."""
    taken: list[int] = []

    def says(question: str, connection: socket.socket) -> bytes:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        taken.append(0)
        for _ in range(64):
            connection.sendall(b" " * 10**6)
            taken[-1] += 1
        return b""

    stranger.says = says
    line = refusal(connect(stranger, tmp_path), "q", EnvironmentProblem)
    assert "it has more than 1048576 bytes" in line and max(taken) < 32


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LONG_LINE = b"x" * 60_000 + b"\r\n"
TOO_MUCH = "it came in more than 8388608 bytes"
WITHOUT_END = {  # what is sent first, what then without end, and what it ends in
    "a chunk of less than nothing": (CHUNKED + b"-1\r\n", b" " * 60_000, "IncompleteRead"),
    "long lines of chunks": (CHUNKED, b"1;" + LONG_LINE + b" \r\n", TOO_MUCH),
    "lines behind the chunks": (CHUNKED + b"0\r\n", LONG_LINE, TOO_MUCH),
    "a head, again and again": (
        b"",
        b"HTTP/1.1 100 Continue\r\nX: " + LONG_LINE + b"\r\n",
        TOO_MUCH,
    ),
}


@pytest.mark.parametrize(("first", "then", "message"), WITHOUT_END.values(), ids=WITHOUT_END)
def test_what_is_around_an_answer_is_not_read_to_its_end(
    stranger: Stranger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: bytes,
    then: bytes,
    message: str,
) -> None:
    """Of 64 MB that are sent in each of two tries no more are taken than what all of an answer may
    have.
    """
    read: dict[int, int] = {}
    readinto = endpoint_module._Until.readinto

    def counted(self: Any, buffer: Any) -> int | None:
        got = readinto(self, buffer)
        read[id(self.connection)] = read.get(id(self.connection), 0) + (got or 0)
        return got

    def says(question: str, connection: socket.socket) -> bytes:
        connection.sendall(first)
        for _ in range(64 * 10**6 // len(then)):
            connection.sendall(then)
        return b""

    monkeypatch.setattr(endpoint_module._Until, "readinto", counted)
    stranger.says = says
    endpoint = connect(stranger, tmp_path)
    line = refusal(endpoint, "q", EnvironmentProblem)
    assert f"gives no answer after 1 more tries ({message}" in line
    assert len(stranger.asked) == 2 and 0 < sum(read.values()) <= 2 * 2**23
    assert endpoint.refused == (2 if message == TOO_MUCH else 0)


def test_an_answer_in_chunks_of_a_byte_is_read(
    stranger: Stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many bytes as an answer may have: with the chunks' lines, six times that. Here both
    bounds are a 64th of what they are.
    """
    most = endpoint_module.MAX_BYTES // 64
    monkeypatch.setattr(endpoint_module, "MAX_BYTES", most)
    monkeypatch.setattr(endpoint_module, "MAX_SENT", endpoint_module.MAX_SENT // 64)
    body = json.dumps(chat("B")).encode().ljust(most)
    whole = CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    stranger.says = lambda question, connection: whole
    assert connect(stranger, tmp_path).ask(["q"]) == ["B"] and stranger.asked == ["q"]


@pytest.mark.parametrize("part", ["status", "head", "body", "chunks"])
def test_an_answer_that_drips_is_not_waited_for(
    stranger: Stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A byte at a time, each long before the limit: all of them together are what counts."""
    monkeypatch.setattr(endpoint_module, "ANSWER_S", 0.3)
    whole = answer()
    if part == "chunks":
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        body = json.dumps(chat()).encode()
        whole = head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    at_once = {"status": 0, "head": 20}.get(part, whole.index(b"\r\n\r\n") + 4)

    def says(question: str, connection: socket.socket) -> bytes:
        connection.sendall(whole[:at_once])
        for byte in whole[at_once:]:
            time.sleep(0.02)
            connection.sendall(bytes([byte]))
        return b""

    stranger.says = says
    line = refusal(connect(stranger, tmp_path), "q", EnvironmentProblem)
    assert "no whole answer within 0.3 s" in line and len(stranger.asked) == 2


USAGE: tuple[Any, ...] = (
    -(10**9),
    0,
    1.5,
    float("nan"),
    float("-inf"),
    "7",
    "",
    None,
    True,
    [],
    {},
)


@pytest.mark.parametrize(
    "usage",
    [{}, {"usage": None}, {"usage": []}, {"usage": "none"}]
    + [{"usage": {"total_tokens": said}} for said in USAGE]
    + [{"usage": {"prompt_tokens": 1}}],
    ids=str,
)
def test_usage_that_is_no_count_does_not_loosen_the_cap(
    stranger: Stranger, tmp_path: Path, usage: dict[str, Any]
) -> None:
    """Then 3 bytes of question and answer are a token: 31 here, so that 3 answers reach 90."""
    stranger.says = lambda question, connection: answer("B", **usage)
    questions = [f"{n:092}" for n in range(6)]
    with pytest.raises(InputError, match="judge.token_cap=90: reached, with 3 answers"):
        connect(stranger, tmp_path, token_cap=90).ask(questions)
    assert len(stranger.asked) == 3
    assert [line["tokens"] for line in read_jsonl(tmp_path / "judge.jsonl")] == [31, 31, 31]


def test_the_cap_counts_what_is_no_answer(
    stranger: Stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on the bill: with 30 tokens a try, the fourth is not made."""
    monkeypatch.setattr(endpoint_module, "RETRIES", 10)
    stranger.says = lambda question, connection: http(b"{}")
    monkeypatch.setattr(threading.Event, "wait", lambda event, seconds=None: event.is_set())
    with pytest.raises(InputError, match="judge.token_cap=90: reached, with 0 answers"):
        connect(stranger, tmp_path, token_cap=90).ask(["x" * 90])
    assert len(stranger.asked) == 3


@pytest.mark.parametrize("tokens", ["-5", "NaN", "Infinity", "1.5", '"7"', "null", "true"])
def test_a_kept_line_without_a_count_is_refused(
    stranger: Stranger, tmp_path: Path, tokens: str
) -> None:
    line = f'{{"key": "k", "model": "big", "answer": "A", "tokens": {tokens}}}\n'
    (tmp_path / "judge.jsonl").write_text(line)
    with pytest.raises(InputError, match="judge.jsonl:1: not a kept answer"):
        connect(stranger, tmp_path)


def test_kept_lines_are_read_within_a_bound(
    stranger: Stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of 8 MB is refused when its first MiB has been read; of what ldalign writes the
    longest line is read again, and a torn one is cut off and asked again.
    """
    stranger.says = lambda question, connection: answer("\x01" * 10**5)
    (text,) = connect(stranger, tmp_path).ask(["q"])
    path = tmp_path / "judge.jsonl"
    assert path.stat().st_size > 6 * 20_000
    kept = path.read_bytes()
    path.write_bytes(kept + kept[:-1])
    assert connect(stranger, tmp_path).ask(["q"]) == [text] and stranger.asked == ["q"]
    assert path.read_bytes() == kept
    long = json.dumps({"key": "k", "model": "big", "answer": "A" * 2**23, "tokens": 1})
    path.write_bytes(kept + long.encode() + b"\n" + kept)
    parsed: list[int] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(len(text)) or loads(text))
    with pytest.raises(InputError, match="judge.jsonl:2: not a kept answer; delete the line"):
        connect(stranger, tmp_path)
    assert parsed == [len(kept.decode())]


@pytest.mark.parametrize("form", ["{}", '{{"error": "{}"}}', '{{"error": {{"message": "{}"}}}}'])
def test_what_a_refusal_says_is_cut(stranger: Stranger, tmp_path: Path, form: str) -> None:
    """Without the key and without what a terminal would obey; an odd `param` is none."""
    said = form.format(f"no \\u001b[2J \x1b[2J {SECRET} " + "x" * 10**6).encode()
    stranger.says = lambda question, connection: http(said, "400 Bad Request")
    line = refusal(connect(stranger, tmp_path), "q", InputError)
    assert "refuses the question to judge.model=big" in line and "..." in line
    said = b'{"error": {"message": "no", "param": ["temperature"]}}'
    assert "(no)" in refusal(connect(stranger, tmp_path), "q", InputError)


def test_a_long_answer_is_kept_by_its_end(stranger: Stranger, tmp_path: Path) -> None:
    stranger.says = lambda question, connection: answer("<think>" + "x" * 10**5 + "</think>B")
    (text,) = connect(stranger, tmp_path).ask(["q"])
    assert len(text) < 20_100 and text.startswith("[cut] xxx") and text.endswith("</think>B")
    assert connect(stranger, tmp_path).ask(["q"]) == [text] and stranger.asked == ["q"]


@pytest.mark.parametrize(
    ("named", "waited"),
    [("1e9", 60.0), ("7", 7.0), ("nan", 0.5), ("-1", 0.5), ("Sun, 29 Nov 2099 00:00:00 GMT", 0.5)],
)
def test_waits_that_the_server_names_have_a_bound(
    stranger: Stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, waited: float
) -> None:
    waits = []
    monkeypatch.setattr(
        threading.Event, "wait", lambda event, seconds=None: bool(waits.append(seconds))
    )
    sent = [answer(), http(b"", "429 Slow", Retry_After_Ms="x", Retry_After=named)]
    stranger.says = lambda question, connection: sent.pop()
    assert connect(stranger, tmp_path).ask(["q"]) == ["A"]
    assert [seconds for seconds in waits if seconds is not None] == [waited]


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-sécret", "a\rb"])
def test_a_key_that_no_header_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="^OPENAI_API_KEY: holds what no key does") as caught:
        Endpoint("http://x/v1", "m", tmp_path / "x", token_cap=1, concurrency=1, answer_tokens=1)
    assert key not in str(caught.value)


def test_an_error_waits_for_what_is_being_asked(stranger: Stranger, tmp_path: Path) -> None:
    """Of two questions at a time one is refused first; the other's answer was paid for, and kept.
    No third is asked.
    """
    refused = threading.Event()

    def says(question: str, connection: socket.socket) -> bytes:
        if question == "bad":
            refused.set()
            return http(b"no", "400 Bad Request")
        refused.wait()
        time.sleep(0.2)
        return answer("B")

    stranger.says = says
    with pytest.raises(InputError, match="refuses the question"):
        connect(stranger, tmp_path, concurrency=2).ask(["good", "bad", "third"])
    assert [line["answer"] for line in read_jsonl(tmp_path / "judge.jsonl")] == ["B"]
    assert sorted(stranger.asked) == ["bad", "good"]


ASK = """
import sys
from pathlib import Path
from ldalign.evaluation.endpoint import Endpoint
from ldalign.system import exits

def main(argv):
    url, folder = argv
    options = dict(token_cap=None, concurrency=4, answer_tokens=16)
    Endpoint(url, "big", Path(folder) / "judge.jsonl", **options).ask([f"q{n}" for n in range(9)])

exits.run(main)
"""


@pytest.mark.parametrize(("number", "code"), [(SIGTERM, 143), (SIGINT, 130)])
def test_a_request_to_stop_waits_for_no_answer(
    stranger: Stranger, tmp_path: Path, number: Signals, code: int
) -> None:
    """Two questions are answered and the next four never: the process ends, with these two kept."""
    silent, over = threading.Semaphore(0), threading.Event()

    def says(question: str, connection: socket.socket) -> bytes:
        if question not in ("q0", "q1"):
            silent.release()
            over.wait()
        return answer()

    stranger.says = says
    command = [sys.executable, "-c", ASK, stranger.url, str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for _ in range(4):
        assert silent.acquire(timeout=120)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)  # the server's part of the talk has no end
    over.set()
    assert process.returncode == code and "ldalign: error: stopped by" in said, said
    assert [line["answer"] for line in read_jsonl(tmp_path / "judge.jsonl")] == ["A", "A"]
