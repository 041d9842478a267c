"""Judges: the checker, a local model asked in both orders, and any OpenAI-compatible endpoint."""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
from runs import ROOT

from ldalign.data import embedded
from ldalign.data.rows import Row
from ldalign.data.tokenizer import load_tokenizer
from ldalign.evaluation import endpoint as endpoint_module
from ldalign.evaluation.endpoint import Endpoint
from ldalign.evaluation.judges import ONE_LETTER, QUESTION, Checker, EndpointJudge, ModelJudge
from ldalign.models.mistral import Mistral
from ldalign.models.toy import write_toy_model
from ldalign.models.weights import load_model
from ldalign.run.settings import RunConfig
from ldalign.system.config import load_config
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.system.files import read_jsonl
from ldalign.train.align import main


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [
        Row(
            r["id"],
            (r["messages"][0],),
            r["messages"][1]["content"],
            kind=r["kind"],
            answer=r["answer"],
        )
        for r in embedded.make_rows(0, "heldout", 7)
    ]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> ModelJudge:
    folder = write_toy_model(tmp_path_factory.mktemp("toy") / "model")
    model = cast(Mistral, load_model(folder, torch.float32))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8)  # a random model that has preferences
    return ModelJudge(model, load_tokenizer(folder), 2000, torch.device("cpu"))


def test_checker(rows: list[Row]) -> None:
    right = [row.response for row in rows]
    wrong = ["I do not know."] * len(rows)
    assert Checker().prefer(rows, right, wrong) == [1.0] * len(rows)
    assert Checker().prefer(rows, wrong, right) == [0.0] * len(rows)
    assert (
        Checker().prefer(rows, right, right)
        == Checker().prefer(rows, wrong, wrong)
        == [0.5] * len(rows)
    )
    (verdict,) = Checker().prefer([Row("x", rows[0].history, "y")], ["y"], ["z"])
    assert math.isnan(verdict)


def test_a_model_is_asked_in_both_orders(rows: list[Row], judge: ModelJudge) -> None:
    """Against whole logits of one prompt at a time: the share of one letter among the two, averaged
    over the orders.
    """
    first, second = [row.response for row in rows], [f"{n} is it." for n in range(len(rows))]
    a, b = (judge.tokenizer.encode(letter)[0] for letter in "AB")

    def says_a(row: Row, x: str, y: str) -> float:
        text = QUESTION.format(question=row.history[0]["content"], a=x, b=y) + ONE_LETTER
        ids = judge.tokenizer.prompt_ids([{"role": "user", "content": text}])
        scores = [float(tiny.logps(judge.model, ids, [letter]).detach()) for letter in (a, b)]
        return math.exp(scores[0]) / (math.exp(scores[0]) + math.exp(scores[1]))

    expected = [
        (says_a(r, x, y) + 1 - says_a(r, y, x)) / 2
        for r, x, y in zip(rows, first, second, strict=True)
    ]
    got = judge.prefer(rows, first, second)
    assert got == pytest.approx(expected, abs=1e-5)
    assert max(abs(p - 0.5) for p in got) > 0.02, "a judge that prefers nothing tests nothing"
    positions = [says_a(r, x, y) for r, x, y in zip(rows, first, second, strict=True)]
    assert got != pytest.approx(positions, abs=1e-2), "one order alone is another judge"


def test_a_model_is_symmetric_and_repeats(rows: list[Row], judge: ModelJudge) -> None:
    first, second = [row.response for row in rows], [f"{n} is it." for n in range(len(rows))]
    there = judge.prefer(rows, first, second)
    assert judge.prefer(rows, first, second) == there
    assert judge.prefer(rows, second, first) == pytest.approx([1 - p for p in there], abs=1e-12)
    assert judge.prefer(rows, first, first) == pytest.approx([0.5] * len(rows), abs=1e-6)


def test_no_verdict_on_what_a_model_cannot_read(rows: list[Row], judge: ModelJudge) -> None:
    verdicts = judge.prefer(rows[:3], ["short", "word " * 500, "short"], ["brief"] * 3)
    assert [math.isnan(v) for v in verdicts] == [False, True, False]
    assert judge.prefer([], [], []) == []


# ----------------------------------------------------------------------------------------- endpoint

# a status with an error object, or 200 and the model's text
Reply = tuple[int, dict[str, Any] | str]


class Server:
    """An OpenAI-compatible server: POST /v1/chat/completions. `reply` answers each question."""

    def __init__(self) -> None:
        self.reply: Callable[[str, dict[str, Any]], Reply] = lambda question, body: (200, "A")
        self.asked: list[str] = []
        self.keys: set[str | None] = set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][0]["content"]
                server.asked.append(question)
                server.keys.add(self.headers["Authorization"])
                assert self.path == "/v1/chat/completions" and body["model"] == "big"
                status, said = server.reply(question, body)
                answer: dict[str, Any] = {"error": said}
                if status == 200:
                    choice = {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": said},
                    }
                    answer = {
                        "id": "1",
                        "object": "chat.completion",
                        "created": 0,
                        "model": "big",
                        "choices": [choice],
                        "usage": {
                            "prompt_tokens": 90,
                            "completion_tokens": 10,
                            "total_tokens": 100,
                        },
                    }
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After-Ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    thread = threading.Thread(
        target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()


def connect(
    server: Server, folder: Path, token_cap: int | None = None, concurrency: int = 4
) -> Endpoint:
    answers = folder / "judge.jsonl"
    return Endpoint(
        server.url, "big", answers, token_cap=token_cap, concurrency=concurrency, answer_tokens=16
    )


def verdicts(server: Server, folder: Path, first: list[str], second: list[str]) -> list[float]:
    rows = [
        Row(str(n), ({"role": "user", "content": f"question {n}"},), "") for n in range(len(first))
    ]
    return EndpointJudge(lambda: connect(server, folder)).prefer(rows, first, second)


def test_an_endpoint_is_asked_in_both_orders(server: Server, tmp_path: Path) -> None:
    """It likes "good" wherever it stands; a judge that always says A, or C,
    says that it is a tie.
    """

    def reply(question: str, body: dict[str, Any]) -> Reply:
        assert body["temperature"] == 0 and body["max_tokens"] == 16
        a, b = (question.index(f"[Answer {letter}]") for letter in "AB")
        return 200, "A" if "good" in question[a:b] else " b." if "good" in question[
            b:
        ] else "Answer: A"

    server.reply = reply
    assert verdicts(server, tmp_path, ["good", "bad", "same"], ["bad", "good", "like"]) == [
        1.0,
        0.0,
        0.5,
    ]
    assert len(server.asked) == 6 == len(set(server.asked)) and server.keys == {"Bearer sk-secret"}
    server.reply = lambda question, body: (200, "<think>A? B?</think> C")
    assert verdicts(server, tmp_path, ["x"], ["y"]) == [0.5]
    server.reply = lambda question, body: (200, "Both answers are fine.")
    assert math.isnan(verdicts(server, tmp_path, ["u"], ["v"])[0])
    assert "sk-secret" not in (tmp_path / "judge.jsonl").read_text()


def test_what_fails_for_a_time_is_repeated(server: Server, tmp_path: Path) -> None:
    tries: list[int] = []

    def reply(question: str, body: dict[str, Any]) -> Reply:
        tries.append(1)
        return (
            (429, {"message": "slow down"})
            if len(tries) == 1
            else (500, {})
            if len(tries) == 2
            else (200, "B")
        )

    server.reply = reply
    assert connect(server, tmp_path).ask(["q"]) == ["B"] and len(tries) == 3


def test_what_fails_for_good_says_so(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.reply = lambda question, body: (
        401,
        {"message": "Incorrect API key provided: sk-secret"},
    )
    with pytest.raises(
        EnvironmentProblem,
        match=r"refuses the key \(401\); set "
        r"OPENAI_API_KEY",
    ) as refused:
        connect(server, tmp_path).ask(["q"])
    assert "sk-secret" not in str(refused.value)
    server.reply = lambda question, body: (404, {"message": "no model big for key sk-secret"})
    with pytest.raises(InputError, match="judge.model=big") as unknown:
        connect(server, tmp_path).ask(["q"])
    assert "sk-secret" not in str(unknown.value)
    monkeypatch.setattr(endpoint_module, "RETRIES", 1)
    server.reply = lambda question, body: (503, {"message": "busy"})
    with pytest.raises(
        EnvironmentProblem, match=r"gives no answer after 1 more tries \(503: busy\)"
    ):
        connect(server, tmp_path).ask(["q"])
    nobody = Endpoint(
        "http://127.0.0.1:9/v1",
        "big",
        tmp_path / "x",
        token_cap=None,
        concurrency=1,
        answer_tokens=1,
    )
    with pytest.raises(EnvironmentProblem, match="127.0.0.1:9/v1: gives no answer .*refused"):
        nobody.ask(["q"])


def test_the_cap_keeps_what_is_paid_for(server: Server, tmp_path: Path) -> None:
    """100 tokens an answer: the fourth question is not asked, the next start goes on with it."""
    questions = [f"q{n}" for n in range(6)]
    with pytest.raises(
        InputError,
        match=r"judge.token_cap=300: reached, with 3 answers in "
        r".*judge.jsonl",
    ):
        connect(server, tmp_path, token_cap=300, concurrency=1).ask(questions)
    assert len(server.asked) == 3
    with pytest.raises(InputError, match="judge.token_cap=300"):
        connect(server, tmp_path, token_cap=300).ask(questions)
    assert len(server.asked) == 3
    assert connect(server, tmp_path, token_cap=601).ask(questions) == ["A"] * 6
    assert len(server.asked) == 6


def test_a_stopped_run_pays_nothing_twice(server: Server, tmp_path: Path) -> None:
    """A kill may leave a torn line; all whole ones count. Equal questions are one."""
    connect(server, tmp_path).ask(["one", "two", "two"])
    assert sorted(server.asked) == ["one", "two"]
    with (tmp_path / "judge.jsonl").open("a") as file:
        file.write('{"key": "torn", "answ')
    shown: list[int] = []
    again = connect(server, tmp_path)
    assert again.tokens == 200
    assert again.ask(["one", "three", "two"], shown.append) == ["A", "A", "A"]
    assert sorted(server.asked) == ["one", "three", "two"] and sum(shown) == 3
    assert connect(server, tmp_path).tokens == 300
    (tmp_path / "judge.jsonl").write_text("[]\n")
    with pytest.raises(InputError, match="judge.jsonl:1: not a kept answer"):
        connect(server, tmp_path)


def test_models_that_refuse_a_parameter_are_asked_without(server: Server, tmp_path: Path) -> None:
    def reply(question: str, body: dict[str, Any]) -> Reply:
        for name in ("max_tokens", "temperature"):
            if name in body:
                return 400, {
                    "message": f"Unsupported: {name}",
                    "param": name,
                    "code": "unsupported_parameter",
                }
        return 200, "A"

    server.reply = reply
    assert connect(server, tmp_path).ask(["q"]) == ["A"] and len(server.asked) == 3
    server.reply = lambda question, body: (400, {"message": "too long", "param": "messages"})
    with pytest.raises(InputError, match="too long"):
        connect(server, tmp_path).ask(["r"])


def test_a_run_of_rlaif_asks_an_endpoint(
    server: Server, tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    """From samples to policy: the endpoint likes the shorter answer, so the
    winners are. Asked once.
    """

    def reply(question: str, body: dict[str, Any]) -> Reply:
        a, b = (
            part.strip()
            for part in re.split(r"\[Answer [AB]\]\n", question.rpartition("\nReply with")[0])[1:]
        )
        return 200, "C" if len(a) == len(b) else "A" if len(a) < len(b) else "B"

    server.reply = reply
    run = tmp_path / "run"
    arguments = [
        "--config",
        str(ROOT / "configs/toy.yaml"),
        f"run={run}",
        f"cache={toy_cache}",
        "method=rlaif",
        "judge=big",
        f"judge.endpoint={server.url}",
        "iterations=1",
        "max_rows=16",
        "sft.epochs=0",
        "continual_sft.epochs=0",
        "evaluation.rows=0",
        "report=table",
    ]
    main(arguments)
    samples = read_jsonl(run / "iteration_0/responses/responses.jsonl")
    judged = read_jsonl(run / "iteration_0/judged/judged.jsonl")
    assert len(judged) == 16 and len(samples) == 32
    for record, a, b in zip(judged, samples[0::2], samples[1::2], strict=True):
        gap = len(a["response"].strip()) - len(b["response"].strip())
        assert record["preference"] == (0.5 if gap == 0 else float(gap < 0))
    trained = json.loads((run / "iteration_0/reference/rows.json").read_text())
    assert set(trained) == {r["id"] for r in judged if r["preference"] != 0.5} and len(trained) > 8
    assert (run / "iteration_0/policy/model.safetensors").is_file()
    asked = len(server.asked)
    assert asked == len(set(server.asked)) == len(read_jsonl(run / "judge.jsonl"))
    main(arguments)
    assert len(server.asked) == asked


def test_settings_of_an_endpoint() -> None:
    assert load_config(RunConfig, overrides=["judge=policy"]).judge.model == "policy"
    for keys, message in (
        (["judge.endpoint=localhost:8000", "judge=big"], "must be a URL"),
        (
            ["judge.endpoint=http://localhost:8000/v1"],
            "judge.model=checker must be the endpoint's name",
        ),
    ):
        with pytest.raises(InputError, match=message):
            load_config(RunConfig, overrides=keys)
