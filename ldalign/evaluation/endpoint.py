"""Questions to any OpenAI-compatible endpoint, each paid for once.

The `openai` package (extra `judge`) speaks to it and repeats what fails for a time (429, 5xx, a
lost connection; waits that double, or as long as the server says). Every answer is appended to a
JSON Lines file at once, by the hash of its question, so a run that was stopped asks only what is
missing. The key comes from OPENAI_API_KEY and is written nowhere.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ldalign.system.errors import EnvironmentProblem, InputError, LdalignError, how_to_install

RETRIES = 6  # after waits of 0.5, 1, 2, 4, 8 and 8 seconds, where the server names none
KEY = "OPENAI_API_KEY"


class Endpoint:
    """One model behind one URL.

    answers: the file of answers, which several runs and stages may share one after the other.
    token_cap: the most tokens, of questions and answers, that all answers in the file may have
    taken; None: no bound. It is checked before each question, so up to `concurrency` questions may
    go beyond it. answer_tokens: an answer is cut there. Raises EnvironmentProblem without the
    openai package.
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
        try:
            import openai
        except ImportError:
            raise EnvironmentProblem(
                f"judge.endpoint: the openai package is missing; {how_to_install('judge')}"
            ) from None
        self.url, self.model, self.path = url, model, answers
        self.token_cap, self.concurrency, self._longest = token_cap, concurrency, answer_tokens
        # A server of one's own takes any key.
        self._client = openai.OpenAI(
            base_url=url, api_key=os.environ.get(KEY) or "none", max_retries=RETRIES
        )
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": answer_tokens}
        self._lock = threading.Lock()
        self._answers, self.tokens = _read(answers)

    def ask(
        self, questions: Sequence[str], progress: Callable[[int], None] = lambda answers: None
    ) -> list[str]:
        """Returns the answers, in order; equal questions are asked once.

        Raises InputError where the cap is reached or the endpoint refuses the question,
        EnvironmentProblem where it refuses the key or does not answer. The answers
        until then are in the file.
        """
        keys = [self._key(question) for question in questions]
        missing = {
            key: q for key, q in zip(keys, questions, strict=True) if key not in self._answers
        }
        progress(len(keys) - len(missing))
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = [pool.submit(self._answer, key, question) for key, question in missing.items()]
            try:
                for done in as_completed(asked):
                    done.result()
                    progress(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [self._answers[key] for key in keys]

    def _key(self, question: str) -> str:
        # With a longer answer allowed, one that was cut may end in a verdict.
        named = json.dumps([self.url, self.model, self._longest, question])
        return hashlib.sha256(named.encode()).hexdigest()

    def _answer(self, key: str, question: str) -> None:
        """Asks the question, and keeps the answer in memory and in the file."""
        with self._lock:
            if self.token_cap is not None and self.tokens >= self.token_cap:
                raise InputError(
                    f"judge.token_cap={self.token_cap}: reached, with {len(self._answers)} answers "
                    f"in {self.path}; raise it and run the same command again to go on from there"
                )
        reply = self._request(question)
        text = (reply.choices[0].message.content if reply.choices else None) or ""
        # Some servers do not count: then a token is taken as 3 bytes.
        tokens = reply.usage.total_tokens if reply.usage else len((question + text).encode()) // 3
        line = json.dumps(
            {"key": key, "model": self.model, "answer": text, "tokens": tokens}, ensure_ascii=False
        )
        with self._lock:
            self._answers[key], self.tokens = text, self.tokens + tokens
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def _request(self, question: str) -> Any:
        import openai

        messages: list[Any] = [{"role": "user", "content": question}]
        options = dict(self._options)
        while True:
            try:
                return self._client.chat.completions.create(
                    model=self.model, messages=messages, **options
                )
            except openai.BadRequestError as error:
                # Newer models of OpenAI's refuse one or both: they set these themselves.
                if error.param not in options:
                    raise self._problem(error) from None
                del options[error.param]
                self._options = options
            except openai.OpenAIError as error:
                raise self._problem(error) from None

    def _problem(self, error: Exception) -> LdalignError:
        """Returns our error for one that repeating does not help, with a line of the server's."""
        import openai

        kept = f"; what was answered is in {self.path}, and the same command goes on from there"
        code = getattr(error, "status_code", None)
        if code in (401, 403):
            return EnvironmentProblem(
                f"{self.url}: refuses the key ({code}); set {KEY} to one that it knows{kept}"
            )
        if isinstance(error, openai.APIConnectionError):
            return EnvironmentProblem(
                f"{self.url}: cannot be reached; is the server up, and judge.endpoint right?{kept}"
            )
        said = " ".join(str(error).replace(self._client.api_key, "...").split())[:200]
        if code is not None and code < 500 and code != 429:
            return InputError(
                f"{self.url}: refuses the question to judge.model={self.model} ({said}){kept}"
            )
        return EnvironmentProblem(
            f"{self.url}: does not answer after {RETRIES} more tries ({said}){kept}"
        )


def _read(path: Path) -> tuple[dict[str, str], int]:
    """Reads a file of answers: (answers by key, tokens they took).

    A torn last line is cut off, and asked again. Raises InputError for any other bad line.
    """
    answers, tokens = {}, 0
    if not path.is_file():
        return {}, 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    lines = whole.decode("utf-8", errors="replace").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            answer, cost = str(record["answer"]), int(record["tokens"])
            answers[str(record["key"])] = answer
            tokens += cost
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{path}:{number}: not a kept answer; delete the line, and it is asked again"
            ) from None
    return answers, tokens
