"""Questions to any OpenAI-compatible endpoint, each paid for once.

Every answer is appended to a JSON Lines file at once, by the hash of its question, so a run that
was stopped asks only what is missing. The key comes from OPENAI_API_KEY and is written nowhere.

The server is a stranger: what it sends is bounded in bytes and in time before any of it is read,
is never unpacked, and leads to no other address. What is no answer is asked again, as is what
fails for a time (429, 5xx, a lost connection; waits that double, or as long as the server says).
"""

import hashlib
import http.client
import io
import json
import logging
import os
import queue
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldalign.system.errors import EnvironmentProblem, InputError, LdalignError
from ldalign.system.files import writing

log = logging.getLogger(__name__)

RETRIES = 6  # after waits of 0.5, 1, 2, 4, 8 and 8 seconds, where the server names none
LONGEST_WAIT_S = 60.0  # whatever the server names
ANSWER_S = 600.0  # a try's: to connect, to send, and from then to the answer's last byte
MAX_BYTES = 2**20  # of an answer as it is sent; parsed, JSON takes up to 20 times that
# Of all that comes for a try, headers and the lines of chunks with it: an answer of MAX_BYTES in
# chunks of one byte takes 6 times that.
MAX_SENT = 8 * MAX_BYTES
KEPT_CHARACTERS = 20_000  # of an answer's text, its end: the verdict comes last
MAX_LINE = 2**20  # bytes of a kept answer; a character takes at most 6, as \u001b does
KEY = "OPENAI_API_KEY"


class Endpoint:
    """One model behind one URL.

    answers: the file of answers, which several runs and stages may share one after the other.
    token_cap: the most tokens, of questions and answers, that all answers in the file may have
    taken, and what was no answer since then; None: no bound. It is checked before each try, so up
    to `concurrency` questions may go beyond it. answer_tokens: an answer is cut there. Raises
    InputError for a key that no header can hold.
    """

    def __init__(
        self,
        url: str,
        model: str,
        answers: Path,
        *,
        token_cap: int | None,
        concurrency: int,
        answer_tokens: int,
    ) -> None:
        self.url, self.model, self.path = url, model, answers
        self.token_cap, self.concurrency, self._longest = token_cap, concurrency, answer_tokens
        self._secret = os.environ.get(KEY) or "none"  # a server of one's own takes any key
        if not (self._secret.isascii() and self._secret.isprintable()):
            raise InputError(f"{KEY}: holds what no key does, such as a line's end; set it anew")
        self._opener = urllib.request.OpenerDirector()  # with nothing that follows a redirect
        for handler in (urllib.request.ProxyHandler(), _Http(), _Https()):
            self._opener.add_handler(handler)
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": answer_tokens}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._answers, self.tokens = _read(answers)
        self.refused = 0  # how many times what came was no answer

    def ask(
        self, questions: Sequence[str], progress: Callable[[int], None] = lambda answers: None
    ) -> list[str]:
        """Returns the answers, in order; equal questions are asked once.

        Raises InputError where the cap is reached or the endpoint refuses the question,
        EnvironmentProblem where it refuses the key or gives no answer. The answers until then are
        in the file, and those under way are waited for. A request to stop does not wait.
        """
        keys = [self._key(question) for question in questions]
        missing = {
            key: q for key, q in zip(keys, questions, strict=True) if key not in self._answers
        }
        progress(len(keys) - len(missing))
        waiting, done = deque(missing.items()), queue.SimpleQueue[BaseException | None]()

        def work() -> None:
            while True:
                try:
                    key, question = waiting.popleft()
                except IndexError:
                    return
                try:
                    self._answer(key, question)
                except BaseException as error:
                    done.put(error)
                    return
                done.put(None)

        self._ended.clear()
        # Daemons: neither a stop nor the process's end waits for a server.
        count = min(self.concurrency, len(missing))
        workers = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        for worker in workers:
            worker.start()
        try:
            for _ in missing:
                if error := done.get():
                    raise error
                progress(1)
        except BaseException as error:
            waiting.clear()
            self._ended.set()
            if isinstance(error, Exception):  # else it is a request to stop
                for worker in workers:
                    worker.join()  # what they have asked is paid for
            raise
        if self.refused:
            log.warning("%s: %d times what came was no answer; asked again", self.url, self.refused)
        return [self._answers[key] for key in keys]

    def _key(self, question: str) -> str:
        # With a longer answer allowed, one that was cut may end in a verdict.
        named = json.dumps([self.url, self.model, self._longest, question])
        return hashlib.sha256(named.encode()).hexdigest()

    def _answer(self, key: str, question: str) -> None:
        """Asks the question, and keeps the answer in memory and in the file."""
        text, tokens = self._request(question)
        line = json.dumps(
            {"key": key, "model": self.model, "answer": text, "tokens": tokens}, ensure_ascii=False
        )
        with self._lock:
            self._answers[key], self.tokens = text, self.tokens + tokens
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def _request(self, question: str) -> tuple[str, int]:
        """Returns the answer to a question and the tokens that both took; repeats what may help."""
        options, tries = dict(self._options), 0
        message = {"role": "user", "content": question}
        while True:
            self._check_cap()
            body = json.dumps({"model": self.model, "messages": [message], **options}).encode()
            try:
                reply = self._post(body)
                if reply.status == 200:
                    return _answer_in(reply.data, question)
            except _NoAnswer as error:
                said, wait = str(error), None
                with self._lock:  # it may be on the bill all the same
                    self.tokens += _estimate(question)
                    self.refused += 1
            except (OSError, ValueError, http.client.HTTPException) as error:
                said, wait = _reason(error), None
            else:
                said, parameter = _said(reply.data)
                # Newer models of OpenAI's refuse one or both: they set these themselves.
                if reply.status == 400 and parameter in options:
                    del options[parameter]
                    self._options = options
                    continue
                if reply.status not in (408, 409, 429) and reply.status < 500:
                    raise self._problem(said, reply)
                said, wait = f"{reply.status}: {said}", reply.wait
            tries += 1
            if tries > RETRIES or self._ended.wait(wait or min(0.5 * 2 ** (tries - 1), 8)):
                raise self._problem(said)

    def _post(self, body: bytes) -> "_Reply":
        """Sends a question, through the proxy that the environment names.

        Raises _NoAnswer for an answer of status 200 that is packed or has more than MAX_BYTES, and
        for any that comes in more than MAX_SENT; OSError, ValueError or HTTPException where no
        answer comes within ANSWER_S.
        """
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {self._secret}",
            "Accept-Encoding": "identity",
        }
        url = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, body, headers)
        with self._opener.open(request, timeout=ANSWER_S) as response:
            data = response.read(MAX_BYTES + 1)
            status, said = response.status, response.headers
        packed = said.get("Content-Encoding", "identity").lower()
        if status == 200 and packed != "identity":
            raise _NoAnswer(f"it is packed, as {packed}")
        if status == 200 and len(data) > MAX_BYTES:
            raise _NoAnswer(f"it has more than {MAX_BYTES} bytes")
        location = said.get("Location", "") if 300 <= status < 400 else None
        return _Reply(status, data[:MAX_BYTES], _wait(said), location)

    def _check_cap(self) -> None:
        with self._lock:
            if self.token_cap is not None and self.tokens >= self.token_cap:
                raise InputError(
                    f"judge.token_cap={self.token_cap}: reached, with {len(self._answers)} answers "
                    f"in {self.path}; raise it and run the same command again to go on from there"
                )

    def _problem(self, said: str, reply: "_Reply | None" = None) -> LdalignError:
        """Returns our error, with a line of the server's.

        reply: one that asking again does not change; None: asking again has not helped.
        """
        kept = f"; what was answered is in {self.path}, and the same command goes on from there"
        if reply is None:
            said = self._shown(said)
            return EnvironmentProblem(
                f"{self.url}: gives no answer after {RETRIES} more tries ({said}); is the server "
                f"up, and judge.endpoint right?{kept}"
            )
        code = reply.status
        if code in (401, 403):
            return EnvironmentProblem(
                f"{self.url}: refuses the key ({code}); set {KEY} to one that it knows{kept}"
            )
        if reply.location is not None:
            there = self._shown(reply.location)
            return InputError(
                f"{self.url}: sends us elsewhere ({code}: {there}), which is not followed; give "
                f"judge.endpoint the right address{kept}"
            )
        said = self._shown(said)
        return InputError(
            f"{self.url}: refuses the question to judge.model={self.model} ({said}){kept}"
        )

    def _shown(self, said: str) -> str:
        """A line of the server's as it may be shown: short, without the key and control codes."""
        said = said.replace(self._secret, "...")
        return " ".join("".join(c if c.isprintable() else " " for c in said).split())[:200]


# ---------------------------------------------------------------------------------- what is sent us


class _NoAnswer(Exception):
    """What came is no answer: says why."""


class _Reply(NamedTuple):
    status: int
    data: bytes  # the body, of at most MAX_BYTES
    wait: float | None  # seconds until the next try, where the server names them
    location: str | None  # of a redirect


class _Until(io.RawIOBase):
    """A connection's bytes, until ANSWER_S after it was made, however slowly they come.

    Here they are counted too, as only here all of them pass: http.client bounds neither how many
    lines an answer has before, between and after its chunks, nor what a chunk's size may say.
    """

    def __init__(self, connection: Any, raw: Any) -> None:
        self.connection, self.raw, self.end = connection, raw, time.monotonic() + ANSWER_S
        self.left = MAX_SENT

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        got: int | None = self.raw.readinto(buffer)
        self.left -= got or 0
        if self.left < 0:
            raise _NoAnswer(f"it came in more than {MAX_SENT} bytes")
        return got

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Until(sock, self.fp.detach()))

    def _read_next_chunk_size(self) -> int:
        # http.client reads it by int(), which takes a sign, and -1 bytes are all that ever come.
        size: int = super()._read_next_chunk_size()  # type: ignore[misc]
        if size < 0:
            raise ValueError("negative")  # which http.client tells as IncompleteRead
        return size


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req)


def _wait(headers: Any) -> float | None:
    for name, unit in (("Retry-After-Ms", 1000), ("Retry-After", 1)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:  # not given, or a date
            continue
        if seconds > 0:
            return min(seconds, LONGEST_WAIT_S)
    return None


def _answer_in(data: bytes, question: str) -> tuple[str, int]:
    """Returns the text of an answer, and the tokens that question and answer took.

    Raises _NoAnswer for anything but the JSON object of an OpenAI-compatible chat completion.
    """
    try:
        reply = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise _NoAnswer("it is not UTF-8") from None
    except (ValueError, RecursionError):
        raise _NoAnswer(f"it is not JSON: {data[:100].decode('utf-8', 'replace')}") from None
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        text = message["content"]
        # These servers say why: it stopped before its first word, or would not answer.
        if text is None and (
            choice.get("finish_reason") in ("length", "content_filter")
            or isinstance(message.get("refusal"), str)
        ):
            text = ""
        if not isinstance(text, str):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _NoAnswer("it has no text at choices[0].message.content") from None
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _NoAnswer("its text has half a surrogate pair") from None
    usage = reply.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    if type(tokens) is not int or tokens <= 0:
        tokens = _estimate(question + text)
    if len(text) > KEPT_CHARACTERS:
        text = f"[cut] {text[-KEPT_CHARACTERS:]}"
    return text, tokens


def _estimate(text: str) -> int:
    """The tokens of a text where the server does not count: 3 bytes are taken for one."""
    return max(1, len(text.encode()) // 3)


def _said(data: bytes) -> tuple[str, str | None]:
    """What a refusal says, and the name of the parameter that it is about, if of one."""
    text = data.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        named = error.get("param")
        return str(error["message"]), named if isinstance(named, str) else None
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
        return text, None


def _reason(error: Exception) -> str:
    """Says why no answer came, in words that hold nothing of what was sent."""
    inner = getattr(error, "reason", error)  # what urllib has wrapped
    if isinstance(inner, TimeoutError):
        return f"no whole answer within {ANSWER_S:g} s"
    return str(inner) if isinstance(inner, OSError | str) else type(inner).__name__


def _read(path: Path) -> tuple[dict[str, str], int]:
    """Reads a file of answers: (answers by key, tokens they took).

    Line by line, as the file may have come with a stranger's run folder. A torn last line is cut
    off, and asked again. Raises InputError for any other bad line, also for one of more than
    MAX_LINE bytes, which is not read to its end.
    """
    answers: dict[str, str] = {}
    tokens = whole = 0  # whole: the bytes until the last line's end
    if not path.is_file():
        return {}, 0
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(MAX_LINE + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) <= MAX_LINE and not line.endswith(b"\n"):
                os.truncate(path, whole)
                break
            try:
                if len(line) > MAX_LINE:
                    raise ValueError
                record = json.loads(line.decode("utf-8", errors="replace"))
                answer, cost = str(record["answer"]), record["tokens"]
                if type(cost) is not int or cost < 0:
                    raise ValueError
                answers[str(record["key"])] = answer
                tokens += cost
            except (ValueError, TypeError, KeyError, RecursionError):
                raise InputError(
                    f"{path}:{number}: not a kept answer; delete the line, and it is asked again"
                ) from None
            whole += len(line)
    return answers, tokens
