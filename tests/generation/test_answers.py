"""Answers to many prompts: killed anywhere, gone on with, merged; losers made elsewhere."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from ldalign.data.pairs import Pair
from ldalign.data.rows import Row
from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.generation import answers
from ldalign.generation.answers import chunks, make_answers
from ldalign.generation.decoders import Decoder, ModuleDecoder, PackedDecoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.external import read_losers
from ldalign.generation.sampling import Response, Sampling
from ldalign.kernels import cpp
from ldalign.models.toy import write_toy_model
from ldalign.system.errors import InputError

KINDS = [
    pytest.param("packed", marks=pytest.mark.skipif(not cpp.available(), reason="no C++ backend")),
    "modules",
]
COUNT = 23


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "CHUNK", 5)


def requests() -> list[Request]:
    return [Request(f"row{i}", prompt, i) for i, prompt in enumerate(tiny.prompts(COUNT))]


def new_engine(decoder: Decoder) -> Engine:
    return Engine(decoder, Sampling(12), [2, 7], 0, longest=40, rows=4)


def record(request: Request, response: Response) -> dict[str, Any]:
    return {"key": request.key, "ids": response.ids, "logp": response.logp, "text": "\u2028ü"}


def make(path: Path, kind: str, kill_after: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """The records, and how many answers were made for them in this call."""
    decoder: Decoder = (
        PackedDecoder(tiny.mistral()) if kind == "packed" else ModuleDecoder(tiny.mistral())
    )
    made = 0

    def counted(request: Request, response: Response) -> dict[str, Any]:
        nonlocal made
        if made == kill_after:
            raise Killed
        made += 1
        return record(request, response)

    records = make_answers(path, requests(), decoder, new_engine, counted)
    return records, made


def test_merged_answers_are_not_made_again(tmp_path: Path) -> None:
    """The run was stopped after the merge, before the stage had its name."""
    whole, made = make(tmp_path / "a.jsonl", "modules")
    assert made == COUNT and make(tmp_path / "a.jsonl", "modules") == (whole, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("killed_after", [0, 1, 7, 13, 22])
def test_a_killed_run_is_gone_on_with(tmp_path: Path, kind: str, killed_after: int) -> None:
    """To the bit what it would have been; and no finished chunk (row, where rows
    stand alone) is made again.
    """
    whole, _ = make(tmp_path / "whole.jsonl", kind)
    assert [r["key"] for r in whole] == [f"row{i}" for i in range(COUNT)]
    path = tmp_path / "cut.jsonl"
    with pytest.raises(Killed):
        make(path, kind, killed_after)
    part = path.with_name("cut.jsonl.rank0")
    # and its last line is torn
    part.write_bytes(part.read_bytes() + b'[3, {"key": "row3", "ids": [1')
    again, made = make(path, kind)
    assert again == whole
    done = killed_after if kind == "packed" else killed_after // 5 * 5
    assert made == COUNT - done
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.jsonl", "whole.jsonl"]
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_take_chunks_and_take_over(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank has claimed two chunks and died in the second; its file counts all the same."""
    whole, _ = make(tmp_path / "whole.jsonl", kind)
    path = tmp_path / "out.jsonl"
    theirs = [r.index for chunk in chunks(requests(), 5)[1:3] for r in chunk][:7]
    lines = [json.dumps([i, whole[i]], ensure_ascii=False) + "\n" for i in theirs]
    path.with_name("out.jsonl.rank1").write_text("".join(lines), encoding="utf-8")
    path.with_name(f"out.jsonl{answers.CLAIM}1").touch()
    again, made = make(path, kind)
    assert again == whole and made == COUNT - (7 if kind == "packed" else 5)


def test_a_claimed_chunk_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for number in (0, 2):
        path.with_name(f"out.jsonl{answers.CLAIM}{number}").touch()
    mine = list(answers._claimed(path, [[r] for r in requests()[:4]]))
    assert [chunk[0].index for chunk in mine] == [1, 3]
    assert list(answers._claimed(path, [[r] for r in requests()[:4]])) == []


@pytest.mark.parametrize("count", [0, 1, 5, 6, 11])
def test_chunks_hold_everything_once(count: int) -> None:
    cut = chunks(requests()[:count], 5)
    assert sorted(r.index for chunk in cut for r in chunk) == list(range(count))
    lengths = [len(r.prompt) for chunk in cut for r in chunk]
    assert lengths == sorted(lengths, reverse=True) and all(0 < len(chunk) <= 5 for chunk in cut)


# ------------------------------------------------------------------------------------------- losers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_toy_model(tmp_path_factory.mktemp("toy") / "toy"))


Reader = Callable[..., list[Response]]


@pytest.fixture
def read(tokenizer: Tokenizer, tmp_path: Path) -> Reader:
    rows = [
        Row(f"r{i}", ({"role": "user", "content": f"Say {i}."},), f"It is {i}.") for i in range(3)
    ]
    pairs = [Pair(row.id, *map(list, tokenizer.pair_ids(row))) for row in rows]

    def read(*lines: Any) -> list[Response]:
        path = tmp_path / "losers.jsonl"
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text(text, encoding="utf-8")
        return read_losers(path, rows[:2], pairs[:2], rows, tokenizer, tmp_path / "train.jsonl")

    return read


def test_losers_in_ids_and_in_text(read: Reader, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "Say 0."}])
    end = tokenizer.end_ids[0]
    ids = tokenizer.encode("No. It is 5.")
    unused = {"id": "r2", "response": "x"}
    given = {"id": "r0", "response": "No. It is 5.", "token_ids": ids, "prompt_token_ids": prompt}
    first, second = read(
        {"id": "r1", "response": "cut of", "finish_reason": "length"}, "", unused, given
    )
    assert (
        first == Response([*ids, first.ids[-1]], "stop", None)
        and first.ids[-1] in tokenizer.end_ids
    )
    assert second == Response(tokenizer.encode("cut of"), "length", None)
    (text, _) = read({"id": "r0", "response": "No. It is 5."}, {"id": "r1", "response": "a"})
    assert text.ids == first.ids  # the template's own end
    (kept, _) = read(
        {"id": "r0", "response": "a", "token_ids": [*ids, end]}, {"id": "r1", "response": "a"}
    )
    assert kept.ids == [*ids, end]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], r"losers.jsonl:1:2: broken JSON"),
        (['{"id": "r0", "response": "a"}', '{"id": "r0"}'], "losers.jsonl:2: expected {"),
        ([{"id": "r0", "response": "a", "finish_reason": "abort"}], "losers.jsonl:1: expected"),
        ([{"id": "r0", "response": "a", "token_ids": [1.5]}], "losers.jsonl:1: expected"),
        ([{"id": "r9", "response": "a"}], "losers.jsonl:1: id 'r9' is not in the data"),
        ([{"id": "r0", "response": "a"}] * 2, "losers.jsonl:2: id 'r0' was answered before"),
        ([{"id": "r1", "response": "a"}], "1 of 2 rows have no response, the first: 'r0'"),
        (
            [{"id": "r0", "response": "a", "token_ids": [10**6]}, {"id": "r1", "response": "a"}],
            "the vocabulary has",
        ),
        (
            [
                {"id": "r0", "response": "a", "prompt_token_ids": [1, 2]},
                {"id": "r1", "response": "a"},
            ],
            "losers.jsonl:1: prompt_token_ids differ from ldalign's from token",
        ),
    ],
)
def test_bad_losers(read: Reader, lines: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(*lines)


def test_a_prompt_cut_short_is_another_prompt(read: Reader, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "Say 0."}])
    with pytest.raises(InputError, match=f"from token {len(prompt) - 1} on"):
        read(
            {"id": "r0", "response": "a", "prompt_token_ids": prompt[:-1]},
            {"id": "r1", "response": "a"},
        )


def test_unchecked_prompts_are_said(read: Reader, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read({"id": "r0", "response": "a"}, {"id": "r1", "response": "b"})
    assert "cannot be checked that the prompts were rendered alike" in caplog.text


def test_absent_losers_say_where_the_prompts_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = Row("a", ({"role": "user", "content": "x"},), "y")
    with pytest.raises(
        InputError,
        match=r"nothing.jsonl: not there yet; answer the prompts in "
        r".*train.jsonl",
    ):
        read_losers(
            tmp_path / "nothing.jsonl", [row], [], [row], tokenizer, tmp_path / "train.jsonl"
        )
