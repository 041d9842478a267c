"""The matrix's D rows: data files that are broken, odd or change; nothing gets past readers."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from faults import forget_peak, peak
from made_rows import GOOD, a, parquet, s, u, write
from toy_context import open_toy, rows_file

from ldalign.data.encoding import Fitting, encode_rows
from ldalign.data.pairs import with_losers
from ldalign.data.reading import read_rows
from ldalign.data.records import json_lines
from ldalign.data.rows import Row
from ldalign.data.tokenizer import load_tokenizer
from ldalign.generation.external import read_losers
from ldalign.run import manifest
from ldalign.system import distributed
from ldalign.system.errors import InputError
from ldalign.train import generate


def refusal(path: Path, message: str) -> None:
    """Reading `path` ends in one line that matches `message`, within a second of processor time."""
    start = time.process_time()
    with pytest.raises(InputError, match=message) as caught:
        read_rows(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.process_time() - start < 1


def test_D1_broken_json_names_file_line_and_column(tmp_path: Path) -> None:
    """Line 4812 of a file of 5000 is broken JSON.

    Expected: one line with file, line and column.
    """
    lines: list[Any] = [GOOD] * 5000
    lines[4811] = b'{"messages": [}'
    refusal(write(tmp_path / "rows.jsonl", *lines), r"rows\.jsonl:4812:15: broken JSON")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[]", "the row is a list"),
        (b"null", "the row is null"),
        (b"3", "the row is a number"),
        (b"{}", "no known shape.*found no keys"),
        (b'{"text": "x", "label": 3}', "no known shape.*found 'text', 'label'"),
        (b'{"messages": null}', "no known shape"),
        ({"messages": {}}, "messages: is an object"),
        ({"messages": []}, "messages: is empty"),
        ({"messages": ["q"]}, "messages: turn 1 is text"),
        ({"messages": [u("q"), a(None)]}, "messages: turn 2 has content of type null"),
    ],
)
def test_D2_row_of_no_known_shape(line: Any, message: str, tmp_path: Path) -> None:
    """A line is a list, null or a number; `messages` is missing or of the wrong type.

    Expected: one line with file, line and the keys found.
    """
    refusal(write(tmp_path / "rows.jsonl", GOOD, line, GOOD), rf"rows\.jsonl:2: {message}")


ODD_TURNS = [
    ([u("q"), {"role": "tool", "content": "x"}], "turn 2 has role 'tool'"),
    ([u("q")], "no assistant turn"),
    ([u("q"), a("x"), a("r")], "turn 3 is assistant; expected user"),
    ([u("q"), u("q"), a("r")], "turn 2 is user; expected assistant"),
    ([u("q"), s("late"), a("r")], "turn 2 is system; expected assistant"),
    ([u("q"), a(" \n")], r"turn 2 \(assistant\) is empty"),
    ([u(""), a("r")], r"turn 1 \(user\) is empty"),
]


@pytest.mark.parametrize(("turns", "message"), ODD_TURNS)
def test_D3_odd_turns(turns: list[dict[str, str]], message: str, tmp_path: Path) -> None:
    """Unknown role, no assistant turn, two assistants in a row, an empty answer.

    Expected: one line with file and line.
    """
    refusal(
        write(tmp_path / "rows.jsonl", GOOD, {"messages": turns}),
        r"rows\.jsonl:2: "
        rf"messages: {message}",
    )


def test_D3_bad_rows_skip(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same with `bad_rows=skip`: 1 % of the rows are odd, then more.

    Expected: they are left out, counted in the summary; over 1 % is an error.
    """
    path = rows_file(tmp_path / "rows.jsonl", 198)
    path.write_text(path.read_text() + '{"messages": []}\n{"prompt": "q", "response": ""}\n')
    options = [f"data={path}", "sft.rows=null", "max_rows=null", "evaluation.rows=0"]
    with pytest.raises(InputError, match=r"rows\.jsonl:199: messages: is empty"):
        open_toy(tmp_path, *options)
    ctx = open_toy(tmp_path, *options, "bad_rows=skip")
    assert len(ctx.train.rows) == 198 and "2 are bad" in capfd.readouterr().err
    with ctx.run as run:
        pass
    assert json.loads((run.path / "data/summary.json").read_text())["rows/skipped"] == 2
    path.write_text(path.read_text() + "[]\n")
    with pytest.raises(InputError, match="3 of 201 rows are bad, more than the 1%"):
        open_toy(tmp_path, *options, "bad_rows=skip")
    distributed.stop()


def test_D4_bom_crlf_blank_lines(tmp_path: Path) -> None:
    """A byte-order mark, CRLF, blank lines, no final newline.

    Expected: read; the line numbers stay those of the file.
    """
    path, row = tmp_path / "rows.jsonl", json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf\r\n" + row + b"\r\n \t\r\n\n" + row)
    assert [found.where for found in read_rows(path)] == [f"{path}:2", f"{path}:5"]
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n{\r\n")
    refusal(path, r":3:2: broken JSON")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\xff"}', ":2:13: not UTF-8"),
        (b'{"prompt": "q", "response": "\\ud800"}', ":2: response: holds half of a surrogate pair"),
        (
            b'{"prompt": "q", "response": "r", "id": "\\udfff"}',
            ":2: id: holds half of a surrogate pair",
        ),
        (b'{"prompt": "q\\u0000", "response": "r"}', ":2: prompt: holds a NUL"),
        (b'{"prompt": "q\0", "response": "r"}', r":2:\d+: broken JSON: Invalid control character"),
        (b'{"prompt": "' + b"x" * 10 * 2**20 + b'"}', ":2: the line is longer than 8388608 bytes"),
        (b"[" * 10_000, ":2: broken JSON: nested too deeply"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, ":2: broken JSON: nested too deeply"),
        (b"1" * 10_000, ":2: broken JSON: Exceeds the limit"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_D5_hostile_bytes(line: bytes, message: str, tmp_path: Path) -> None:
    """Invalid UTF-8, half a surrogate pair, NUL, a row of 10 MB, 10,000 nested brackets.

    Expected: one line with file and line; memory bounded. The same for prompts and
    responses made elsewhere.
    """
    path = write(tmp_path / "rows.jsonl", GOOD, line, GOOD)
    before = forget_peak()
    refusal(path, rf"rows\.jsonl{message}")
    assert peak() - before < 100 * 2**20
    if b"u0000" not in line:  # which only the rows' own text may not hold
        with pytest.raises(InputError, match=r"rows\.jsonl:2"):
            list(json_lines(path))
    with pytest.raises(InputError, match=r"rows\.jsonl:"):
        generate.read_prompts(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"response": "\ud800"}, "half of a surrogate pair|surrogates"),
        ({"response": 3}, "expected"),
        ({"response": "x", "token_ids": [10**30]}, "token_ids has 1000000"),
        ({"response": "x", "token_ids": [-1]}, "token_ids has -1"),
        ({"response": "x", "token_ids": 3}, "expected"),
        ({"response": "x", "prompt_token_ids": [2**40]}, "prompt_token_ids has"),
        ({"response": "x", "finish_reason": ["stop"]}, "expected"),
        ({"response": "x", "id": [1]}, "expected"),
    ],
)
def test_D5_hostile_losers(
    record: dict[str, Any], message: str, tmp_path: Path, chatml_folder: Path
) -> None:
    """Responses made elsewhere with half a surrogate pair, impossible token ids, wrong types.

    Expected: one line with file and line.
    """
    tokenizer = load_tokenizer(chatml_folder)
    rows = [Row("1", (u("q"),), "r")]
    pairs = encode_rows(rows, tokenizer, Fitting(100)).pairs
    path = tmp_path / "losers.jsonl"
    path.write_text(json.dumps({"id": "1", **record}) + "\n")
    with pytest.raises(InputError, match=rf"losers\.jsonl:1: .*({message})"):
        read_losers(path, rows, pairs, rows, tokenizer, tmp_path / "train.jsonl")


def test_D6_nothing_to_read(tmp_path: Path) -> None:
    """An empty file, blank lines only, a glob without match, an empty folder, no such file.

    Expected: one line with the path.
    """
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_bytes(b"\n \r\n")
    (tmp_path / "folder").mkdir()
    for name in ("empty.jsonl", "blank.jsonl", "*.none", "folder", "nowhere"):
        with pytest.raises(InputError) as caught:
            read_rows(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)


def test_D6_fewer_rows_than_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data has fewer usable rows than one global batch.

    Expected: one line with both numbers, before any weights are read.
    """
    monkeypatch.setattr("ldalign.models.stored_tensors.fill", None)
    path = rows_file(tmp_path / "rows.jsonl", 12)
    with pytest.raises(
        InputError, match="11 usable rows are fewer than one batch of global_batch=16"
    ):
        open_toy(tmp_path, f"data={path}", "sft.epochs=0", "continual_sft.epochs=0")


def test_D7_broken_parquet(tmp_path: Path) -> None:
    """A parquet file is cut short, has a column of the wrong type, or is none at all.

    Expected: one line with the file, and row and column where there is one.
    """
    path = parquet(tmp_path / "rows.parquet", {"prompt": ["q"] * 100, "response": ["r"] * 100})
    whole = path.read_bytes()
    for size in (4, 5, 100, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:size])
        refusal(path, r"rows\.parquet: broken parquet file")
    refusal(
        parquet(tmp_path / "x.parquet", {"messages": [3]}),
        r"x\.parquet:1: messages: is a "
        r"number",
    )
    (tmp_path / "y.parquet").write_bytes(b"\x89PNG\r\n\x1a\n")
    refusal(tmp_path / "y.parquet", r"y\.parquet:1:1: not UTF-8 text, nor parquet, Arrow, gzip")


@pytest.mark.parametrize("text", ["a </s> b", "<s>", "</s></s>", "<unk>"])
def test_D8_control_text_is_text(text: str, zephyr_folder: Path) -> None:
    """A message holds the text of control tokens.

    Expected: encoded as text, never as control ids; the answer ends with its one end token.
    """
    tokenizer = load_tokenizer(zephyr_folder)
    pair = tokenizer.pair_ids(Row("1", (u(f"q {text}"),), f"r {text}"))
    assert [i for i in pair.response if i in (0, 1, 2)] == [2] and pair.response[-1] == 2
    assert (pair.prompt + pair.response).count(1) == 1 and text in tokenizer.decode(pair.response)


def test_D8_repeated_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same row several times, and two rows of one id.

    Expected: each has an id of its own; they are counted in the summary.
    """
    path = rows_file(tmp_path / "rows.jsonl", 20)
    path.write_text(
        path.read_text() * 2
        + json.dumps({**GOOD, "id": "x"})
        + "\n"
        + json.dumps({**GOOD, "id": "x"})
    )
    ctx = open_toy(tmp_path, f"data={path}", "evaluation.rows=0", "sft.rows=null", "max_rows=null")
    assert len({row.id for row in ctx.train.rows}) == 42 and ctx.counts["rows/repeated"] == 21
    assert "21 repeat others" in capfd.readouterr().err


def test_D9_prompt_alone_fills_max_length(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The prompt alone is longer than max_length, in 1 % of the rows, then in more.

    Expected: dropped by id, with a warning over 1 %; by key an error that names the row.
    """
    path = rows_file(tmp_path / "rows.jsonl", 99)
    long = json.dumps({"id": "long", "prompt": "word " * 100, "response": "r"}) + "\n"
    path.write_text(path.read_text() + long)
    options = [f"data={path}", "sft.rows=null", "max_rows=null", "evaluation.rows=0"]
    ctx = open_toy(tmp_path, *options)
    assert ctx.counts["rows/dropped"] == 1 and len(ctx.train.rows) == 99
    assert "WARNING: the prompt" not in capfd.readouterr().err
    with pytest.raises(InputError, match=r"rows\.jsonl:100: .* fills max_length=160"):
        open_toy(tmp_path, *options, "long_prompts=error")
    path.write_text(path.read_text() + long)
    ctx = open_toy(tmp_path, *options)
    assert ctx.counts["rows/dropped"] == 2
    assert "no room in max_length=160 in 2 of 101 rows" in capfd.readouterr().err
    distributed.stop()


def test_D10_answer_cut_by_max_length(chatml_folder: Path) -> None:
    """The answer, or the sampled loser, does not fit into max_length.

    Expected: cut, counted, and without an end token on the side that was cut.
    """
    tokenizer = load_tokenizer(chatml_folder)
    rows = [Row("cut", (u("q"),), "word " * 50), Row("whole", (u("q"),), "r")]
    cut, whole = encode_rows(rows, tokenizer, Fitting(40)).pairs
    assert len(cut.prompt) + len(cut.real) == 40
    assert not set(cut.real) & set(tokenizer.end_ids) and whole.real[-1] in tokenizer.end_ids
    (pair,) = with_losers([whole], [[5] * 100 + [tokenizer.end_ids[0]]], 40)
    assert pair.generated == [5] * (40 - len(whole.prompt))


def test_D11_winner_and_loser_are_equal(chatml_folder: Path) -> None:
    """The loser equals the winner, at once or only after both are cut; or the
    model said nothing at all.

    Expected: such pairs are not trained on (`losers/identical_frac` counts them).
    """
    tokenizer = load_tokenizer(chatml_folder)
    pairs = encode_rows([Row("1", (u("q"),), "word " * 50)] * 3, tokenizer, Fitting(40)).pairs
    losers = [[*pairs[0].real], [*pairs[0].real, 7, 8], [*pairs[0].real[:-1], 7]]
    kept = with_losers(pairs, losers, 40).usable
    assert kept.tolist() == [False, False, True]
    assert not with_losers(pairs[:1], [[]], 40)[0].usable


def test_D12_data_changes_before_a_resume(tmp_path: Path) -> None:
    """A data file is changed between a run's start and its resume.

    Expected: one line with the file, its old and its new hash; nothing is made.
    Where nothing was made of the rows yet, they are prepared anew.
    """
    path = rows_file(tmp_path / "rows.jsonl", 200)
    options = [f"data={path}", "max_rows=20", "evaluation.rows=0", "sft.epochs=0"]
    options += ["continual_sft.epochs=0"]
    old = manifest.hash_file(path)
    open_toy(tmp_path, *options)
    text = path.read_text()
    path.write_text(text.replace('"Say 3."', '"Tell 3."'))
    open_toy(tmp_path, *options)
    assert manifest.hash_file(path) in (tmp_path / "run/data/sources.json").read_text()
    path.write_text(text)
    open_toy(tmp_path, *options)
    (tmp_path / "run/iteration_0").mkdir()
    path.write_text(text.replace('"Say 3."', '"Tell 3."'))
    message = (
        rf"rows\.jsonl: changed since this run began: sha256 was {old}, now "
        rf"{manifest.hash_file(path)};"
    )
    with pytest.raises(InputError, match=message):
        open_toy(tmp_path, *options)
    assert old in (tmp_path / "run/data/sources.json").read_text()
    path.write_text(text)
    open_toy(tmp_path, *options)
    distributed.stop()
