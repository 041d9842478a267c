"""Rows as token ids: what fits, what is cut, dropped, or loses its beginning."""

from dataclasses import replace
from pathlib import Path

import pytest

from ldalign.data.encoding import Fitting, encode_rows, fit_rows
from ldalign.data.records import BadRow
from ldalign.data.rows import Row
from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.system.errors import InputError

LONG = "Say it, " * 100


def row(i: int, prompt: str = "Say it.", response: str = "It is said.") -> Row:
    return Row(id=f"row{i}", history=({"role": "user", "content": prompt},), response=response)


@pytest.fixture
def tokenizer(chatml_folder: Path) -> Tokenizer:
    return load_tokenizer(chatml_folder)


def test_what_fits_is_kept_whole(tokenizer: Tokenizer) -> None:
    (pair,) = encode_rows([row(0)], tokenizer, Fitting(10_000)).pairs
    assert pair.real[-1] in tokenizer.end_ids
    size = len(pair.prompt) + len(pair.real)
    (exact,) = fit_rows([row(0)], tokenizer, Fitting(size))
    assert not isinstance(exact, BadRow) and exact is not None
    assert (exact.prompt, exact.response, exact.cut) == (pair.prompt, pair.real, False)


def test_the_response_is_cut_and_loses_its_end_token(tokenizer: Tokenizer) -> None:
    (pair,) = encode_rows([row(0)], tokenizer, Fitting(10_000)).pairs
    (cut,) = fit_rows([row(0)], tokenizer, Fitting(len(pair.prompt) + 2))
    assert not isinstance(cut, BadRow) and cut is not None
    assert cut.cut and cut.prompt == pair.prompt and cut.response == pair.real[:2]
    assert not set(cut.response) & set(tokenizer.end_ids)


def test_a_rejected_response_is_encoded_as_the_chosen_one_is(tokenizer: Tokenizer) -> None:
    both = replace(row(0), rejected="No.")
    fitted, other = fit_rows([both, row(1, response="No.")], tokenizer, Fitting(1000))
    assert not isinstance(fitted, BadRow) and fitted is not None
    assert not isinstance(other, BadRow) and other is not None
    assert fitted.rejected == other.response and other.rejected is None


def test_a_prompt_that_fills_all(tokenizer: Tokenizer) -> None:
    """Dropped, an error that names the row, or without its beginning."""
    rows = [row(0), replace(row(7, prompt=LONG), where="rows.jsonl:8")]
    assert fit_rows(rows, tokenizer, Fitting(60))[1] is None
    bad = fit_rows(rows, tokenizer, Fitting(60, "error"))[1]
    assert isinstance(bad, BadRow) and "rows.jsonl:8: the prompt alone has" in str(bad)
    with pytest.raises(InputError, match=r"rows\.jsonl:8: .*max_length=60"):
        encode_rows(rows, tokenizer, Fitting(60, "error"))
    cut = fit_rows(rows, tokenizer, Fitting(60, "truncate"))[1]
    assert not isinstance(cut, BadRow) and cut is not None
    question = cut.row.history[-1]["content"]
    assert LONG.endswith(question) and question and len(cut.prompt) <= 45
    assert cut.prompt == tokenizer.prompt_ids(cut.row.history)


def test_whole_turns_go_before_a_part_of_one(tokenizer: Tokenizer) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [
        {"role": r, "content": f"{r} {n} says it"} for n in range(9) for r in ("user", "assistant")
    ]
    long = Row("x", (system, *turns, {"role": "user", "content": "And now?"}), "Yes.")
    size = len(tokenizer.prompt_ids(long.history))
    (cut,) = fit_rows([long], tokenizer, Fitting(size - 10, "truncate"))
    assert not isinstance(cut, BadRow) and cut is not None
    history = cut.row.history
    assert history[0] == system and history[1:] == long.history[-len(history) + 1 :]
    assert history[1]["role"] == "user" and 2 < len(history) < len(long.history)
    # No more turns go than must.
    more = (system, *long.history[-len(history) - 1 :])
    assert len(tokenizer.prompt_ids(more)) > size - 10 - Fitting(size - 10).room
