"""Answers to many prompts: dealt out, killed anywhere, gone on with, merged; and losers made
elsewhere.
"""

import itertools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from ldalign.data.pairs import Pair
from ldalign.data.rows import Row
from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.generation import answers
from ldalign.generation.answers import TOGETHER, deal, make_answers
from ldalign.generation.decoders import Decoder, ModuleDecoder, PackedDecoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.external import read_losers
from ldalign.generation.sampling import Response, Sampling
from ldalign.kernels import cpp
from ldalign.models.toy import write_toy_model
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.system.partial_rows import Part, Parts

KINDS = [
    pytest.param("packed", marks=pytest.mark.skipif(not cpp.available(), reason="no C++ backend")),
    "modules",
]
COUNT = 23


class Killed(Exception):
    pass


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
    """No finished row is made again, and the others come as they would have: to the bit with the
    C++ decoder; with the modules, log-probs in their last bits may differ.
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
    assert made == COUNT - killed_after
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.jsonl", "whole.jsonl"]
    if kind == "packed":
        assert again == whole
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    for record, other in zip(again, whole, strict=True):
        assert record["logp"] == pytest.approx(other["logp"], abs=1e-4)
        assert record | {"logp": 0.0} == other | {"logp": 0.0}


def test_rows_are_kept_in_the_order_in_which_they_end(tmp_path: Path) -> None:
    """A row that ends is on disk before the next one does, one line each."""
    path, lines = tmp_path / "out.jsonl", []

    def seen(request: Request, response: Response) -> dict[str, Any]:
        part = path.with_name("out.jsonl.rank0").read_text(encoding="utf-8")
        lines.append([json.loads(line[9:])[0] for line in part.split("\n")[:-1]])
        return record(request, response)

    told: list[tuple[int, int]] = []
    records = make_answers(
        path,
        requests(),
        ModuleDecoder(tiny.mistral()),
        new_engine,
        seen,
        lambda *moved: told.append(moved),
    )
    assert [len(found) for found in lines] == list(range(COUNT))
    assert all(longer[:-1] == shorter for shorter, longer in itertools.pairwise(lines))
    assert lines[-1] != sorted(lines[-1])
    assert [r["key"] for r in records] == [f"row{i}" for i in range(COUNT)]
    # Tokens are told as they are made: some before the first row has ended, and all in the end.
    tokens = sum(len(r["ids"]) for r in records)
    assert [sum(numbers) for numbers in zip(*told, strict=True)] == [COUNT, tokens]
    first = next(i for i, (rows, _) in enumerate(told) if rows)
    assert 0 < sum(tokens for _, tokens in told[:first]) < tokens


@pytest.mark.parametrize("kind", KINDS)
def test_other_ranks_may_go_on(tmp_path: Path, kind: str) -> None:
    """Three ranks were killed, one of them in the middle of a line; one rank makes what is left."""
    whole, _ = make(tmp_path / "whole.jsonl", kind)
    path = tmp_path / "out.jsonl"
    for rank, hand in enumerate(deal(requests(), 3)):
        part = path.with_name(f"out.jsonl.rank{rank}")
        with part.open("a", encoding="utf-8") as file:
            Part(file).append((r.index, whole[r.index]) for r in hand[: rank + 2])
        if rank == 1:
            os.truncate(part, part.stat().st_size - 1)
    again, made = make(path, kind)
    assert made == COUNT - 8 and [r["ids"] for r in again] == [r["ids"] for r in whole]
    assert again == whole or kind == "modules"


def test_rows_that_the_disk_has_lost_are_no_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even under python -O, which has no assertions."""
    monkeypatch.setattr(Parts, "read", lambda parts: {0: {}, 2: {}})
    with pytest.raises(EnvironmentProblem, match=rf"2 of {COUNT} rows can be read back"):
        make(tmp_path / "out.jsonl", "modules")


def test_a_rank_may_get_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes nothing, keeps nothing, and comes to the end."""
    last = SimpleNamespace(rank=lambda: 29, world_size=lambda: 30, barrier=lambda: None)
    monkeypatch.setattr(answers, "distributed", last)
    monkeypatch.setattr(answers, "on_rank0", lambda work: [])  # of rank 0 it hears this
    records, made = make(tmp_path / "out.jsonl", "modules")
    assert records == [] and made == 0
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b""]


# --------------------------------------------------------------------------------------------- deal


@given(
    prompts=st.lists(st.integers(1, 4), max_size=60),
    ranks=st.integers(1, 9),
)
def test_a_deal_is_even(prompts: list[int], ranks: int) -> None:
    """Each row goes to one rank, every rank gets as many, longest prompts first, in any order of
    the requests.
    """
    rows = [Request(str(i), [7] * n, i) for i, n in enumerate(prompts)]
    hands = deal(rows, ranks)
    assert sorted(r.index for hand in hands for r in hand) == list(range(len(rows)))
    sizes = [len(hand) for hand in hands]
    assert len(hands) == ranks and max(sizes) - min(sizes) <= TOGETHER
    for hand in hands:
        lengths = [len(r.prompt) for r in hand]
        assert lengths == sorted(lengths, reverse=True)
    assert deal(rows[::-1], ranks) == hands


def test_a_deal_of_different_prompts_goes_in_turns() -> None:
    rows = [Request(str(i), [i, *range(20 - i)], i) for i in range(11)]
    assert [[r.index for r in hand] for hand in deal(rows, 3)] == [
        [0, 3, 6, 9],
        [1, 4, 7, 10],
        [2, 5, 8],
    ]


def test_equal_prompts_are_dealt_together() -> None:
    """Samples of a prompt share its pages: few of them go to one rank, many to all."""
    samples = [Request(str(i), [i // 4, 1, 2], i) for i in range(16)]
    assert [[r.index for r in hand] for hand in deal(samples, 3)] == [
        [0, 1, 2, 3, 12, 13, 14, 15],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    one = [Request(str(i), [5, 6], i) for i in range(40)]
    assert [len(hand) for hand in deal(one, 4)] == [16, 8, 8, 8]


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
