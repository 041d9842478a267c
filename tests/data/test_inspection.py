"""The parts of a row and the figures of a file, against counts by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from made_tokenizers import CHATML_TEMPLATE

from ldalign.data.encoding import FittedRow, Fitting, encode_rows, fit_rows
from ldalign.data.inspection import (
    FileFigures,
    Split,
    choose_rows,
    file_figures,
    parts_of,
    pieces,
)
from ldalign.data.records import BadRow
from ldalign.data.rows import Row
from ldalign.data.tokenizer import load_tokenizer
from ldalign.system.errors import InputError


def row(n: int = 0, response: str = "Yes it is", rejected: str | None = None) -> Row:
    history = ({"role": "user", "content": "Is it so?"},)
    return Row(f"id{n}", history, response, rejected, where=f"data/rows.jsonl:{n + 1}")


@pytest.mark.parametrize("folder", ["zephyr_folder", "chatml_folder"])
@pytest.mark.parametrize("room", [1000, 3, 1, 0, -2])
def test_parts_are_what_a_run_trains_on(
    folder: str, room: int, request: pytest.FixtureRequest
) -> None:
    """With room for all, for some of the response, for one token, and for none."""
    tokenizer = load_tokenizer(request.getfixturevalue(folder))
    prompt, response = tokenizer.pair_ids(row())
    fitting = Fitting(len(prompt) + room)
    [fitted] = fit_rows([row()], tokenizer, fitting)
    assert not isinstance(fitted, BadRow)
    parts = {part.name: part for part in parts_of(fitted)}
    assert parts["prompt"].ids == prompt and not parts["prompt"].trained
    trained = [token for part in parts.values() if part.trained for token in part.ids]
    assert trained == response[: max(0, room)]
    many = encode_rows([row(), *([row()] * 200)], tokenizer, fitting)
    assert [pair.real for pair in many.pairs] == [trained] * (201 if room > 0 else 0)
    whole = [token for part in parts.values() for token in part.ids]
    assert whole == [*prompt, *response]
    assert ("end" in parts) == (room >= len(response)) != ("cut" in parts)
    if "end" in parts:
        assert parts["end"].ids == [tokenizer.end_ids[0]] and parts["end"].trained


@pytest.mark.parametrize("room", [1000, 5])
def test_a_rejected_response_has_parts_of_its_own(room: int, chatml_folder: Path) -> None:
    tokenizer = load_tokenizer(chatml_folder)
    both = row(rejected="No" if room == 1000 else "No, it is not so.", response="Yes")
    prompt, _ = tokenizer.pair_ids(both)
    [fitted] = fit_rows([both], tokenizer, Fitting(len(prompt) + room))
    assert isinstance(fitted, FittedRow)
    for trained in ({"response"}, {"response", "rejected"}, set[str]()):
        parts = {part.name: part for part in parts_of(fitted, trained)}
        last = "rejected end" if room == 1000 else "cut"
        assert list(parts) == ["prompt", "response", "end", "rejected", last]
        assert parts["response"].trained == parts["end"].trained == ("response" in trained)
        assert parts["rejected"].trained == ("rejected" in trained)
        assert parts[last].trained == ("rejected" in trained and last != "cut")
        text = parts["rejected"].ids + (parts["cut"].ids[:-1] if last == "cut" else [])
        assert tokenizer.decode(text) == both.rejected


@pytest.mark.parametrize("folder", ["zephyr_folder", "chatml_folder"])
def test_pieces_give_the_text_back(folder: str, request: pytest.FixtureRequest) -> None:
    """Spaces are seen, a character of several tokens comes with all of them."""
    tokenizer = load_tokenizer(request.getfixturevalue(folder))
    for text in ("Yes  it is", "naïve 日本 🙂\n\tx", "a\ufffdb"):
        ids = tokenizer.encode(text)
        found = pieces(ids, tokenizer)
        assert [token for _, group in found for token in group] == ids
        assert "".join(piece for piece, _ in found).lstrip() == text
    (name, _), *_ = pieces(tokenizer.end_ids, tokenizer)
    assert name in ("</s>", "<|im_end|>")
    half = pieces(tokenizer.encode("🙂")[-1:], tokenizer)
    assert len(half) == 1 and half[0][0]  # a part of a character is shown as what there is


def test_figures_of_files(chatml_folder: Path) -> None:
    """Rows of two files and both splits: what is cut, what is left out and why, and the lengths."""
    refuses = "{% if messages[0].content == 'No' %}{{ raise_exception('refused') }}{% endif %}"
    tokenizer = load_tokenizer(chatml_folder, template=refuses + CHATML_TEMPLATE)
    prompt, _ = tokenizer.pair_ids(row())
    max_length = len(prompt) + 4
    long = replace(row(3), history=({"role": "user", "content": "Is it so? " * 50},))
    broken = replace(row(4), history=({"role": "user", "content": "No"},))
    other = replace(row(0, rejected="No, no, no"), where="other.jsonl:1")
    given = [row(0, "No"), row(1, "Yes it is so, and has been"), row(2), long, broken]
    rows: list[tuple[Row, Split]] = [
        (r, "training" if i else "held out") for i, r in enumerate(given)
    ]
    rows.append((other, "training"))
    found = file_figures(rows, tokenizer, Fitting(max_length))
    assert list(found) == ["data/rows.jsonl", "other.jsonl"]
    figures = found["data/rows.jsonl"]
    assert figures.splits == {"held out": 1, "training": 2}
    lengths = [tokenizer.pair_ids(r) for r in given[:4]]
    assert list(figures.prompts) == [len(p) for p, _ in lengths]
    assert list(figures.responses) == [len(r) for _, r in lengths]
    assert figures.cut == sum(len(r) > 4 for _, r in lengths[:3]) > 0 == figures.truncated
    fills = f"the prompt alone fills max_length={max_length}"
    assert figures.dropped == {fills: ["data/rows.jsonl:4"]}
    assert figures.bad == ["data/rows.jsonl:5: chat template: refused"]
    assert found["other.jsonl"].cut == 1
    longest = max(len(p) + len(r) for p, r in lengths)
    assert figures.quantiles()["together"][-1] == longest
    assert list(figures.read) == [min(max_length, len(p) + len(r)) for p, r in lengths[:3]]
    assert figures.longer_than(max_length - 1) >= 1 and figures.longer_than(max_length) == 0
    assert FileFigures().quantiles() == {}


@pytest.mark.parametrize("long_prompts", ["drop", "error", "truncate"])
def test_figures_are_what_a_run_makes_of_the_rows(
    long_prompts: Literal["drop", "error", "truncate"], chatml_folder: Path
) -> None:
    """Long prompts and rows without a loser, by the code of a run: every row is counted once."""
    tokenizer = load_tokenizer(chatml_folder)
    asked = [("Is it so?", "No"), ("Is it so? " * 50, "No"), ("Is it so?", None)] * 3
    given: list[tuple[Row, Split]] = [
        (
            replace(row(n, rejected=loser), history=({"role": "user", "content": question},)),
            "training" if n < 6 else "held out",
        )
        for n, (question, loser) in enumerate(asked)
    ]
    fitting = Fitting(80, long_prompts)
    figures = file_figures(given, tokenizer, fitting, preference=True)["data/rows.jsonl"]
    bad = {"drop": 2, "error": 5, "truncate": 2}[long_prompts]
    dropped = 3 if long_prompts == "drop" else 0
    assert len(figures.bad) == bad and sum(map(len, figures.dropped.values())) == dropped
    assert figures.splits.total() + bad + dropped == len(given)
    assert figures.truncated == (3 if long_prompts == "truncate" else 0)
    assert (max(figures.prompts) > 80) == (long_prompts != "error")  # lengths as in the data
    assert max(figures.read) <= 80
    plain = file_figures(given, tokenizer, fitting)["data/rows.jsonl"]
    assert len(plain.bad) == bad - 2


def test_quantiles_are_lengths_that_there_are() -> None:
    figures = FileFigures()
    figures.prompts.extend(range(1, 101))
    figures.responses.extend([7] * 100)
    found = figures.quantiles()
    assert found["prompt"] == [1, 25, 50, 75, 95, 99, 100]
    assert found["response"] == [7] * 7 and found["together"][0] == 8


def test_rows_are_chosen_by_number_id_or_place() -> None:
    rows = [row(i) for i in range(5)]
    rows[4] = replace(rows[4], id="2", where="data/rows.jsonl:4")  # turns=all: of one line
    assert choose_rows(rows, 2) == [0, 1] and choose_rows(rows, 9) == [0, 1, 2, 3, 4]
    assert choose_rows(rows, 0) == []
    assert choose_rows(rows, "id3") == [3]
    assert choose_rows(rows, ["id3", "1", "rows.jsonl:3"]) == [3, 0, 2]
    assert choose_rows(rows, "2") == [4]  # an id goes before a number
    assert choose_rows(rows, "data/rows.jsonl:4") == [3, 4]
    for wrong in ("0", "6", "nobody", "ows.jsonl:1", "rows.jsonl:9", ""):
        with pytest.raises(InputError, match=f"rows: '{wrong}': no such row; .* from 1 to 5"):
            choose_rows(rows, wrong)
