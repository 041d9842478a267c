"""Rows as token ids: what fits, what is cut, dropped, or loses its beginning."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_tokenizers import CHATML_TEMPLATE

from ldalign.data import encoding
from ldalign.data.encoding import FittedRow, Fitting, TooLong, encode_rows, fit_rows, truncated
from ldalign.data.records import BadRow
from ldalign.data.rows import Row
from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.system.errors import InputError

LONG = "Say it, " * 100


def row(i: int, prompt: str = "Say it.", response: str = "It is said.") -> Row:
    return Row(id=f"row{i}", history=({"role": "user", "content": prompt},), response=response)


def fitted(row: Row, tokenizer: Tokenizer, fitting: Fitting) -> FittedRow:
    [found] = fit_rows([row], tokenizer, fitting)
    assert isinstance(found, FittedRow), found
    return found


@pytest.fixture
def tokenizer(chatml_folder: Path) -> Tokenizer:
    return load_tokenizer(chatml_folder)


def test_what_fits_is_kept_whole(tokenizer: Tokenizer) -> None:
    (pair,) = encode_rows([row(0)], tokenizer, Fitting(10_000)).pairs
    assert pair.real[-1] in tokenizer.end_ids
    size = len(pair.prompt) + len(pair.real)
    exact = fitted(row(0), tokenizer, Fitting(size))
    assert (exact.prompt, exact.response, exact.cut) == (pair.prompt, pair.real, False)
    assert not exact.truncated and exact.lost == exact.rejected_lost == []


def test_the_response_is_cut_and_loses_its_end_token(tokenizer: Tokenizer) -> None:
    (pair,) = encode_rows([row(0)], tokenizer, Fitting(10_000)).pairs
    cut = fitted(row(0), tokenizer, Fitting(len(pair.prompt) + 2))
    assert cut.cut and cut.prompt == pair.prompt and cut.response == pair.real[:2]
    assert cut.lost == pair.real[2:] and not cut.truncated
    assert not set(cut.response) & set(tokenizer.end_ids)


def test_a_rejected_response_is_encoded_as_the_chosen_one_is(tokenizer: Tokenizer) -> None:
    both = replace(row(0), rejected="No.")
    other = fitted(row(1, response="No."), tokenizer, Fitting(1000))
    assert fitted(both, tokenizer, Fitting(1000)).rejected == other.response
    assert other.rejected is None


@pytest.mark.parametrize("responses", [("No.", LONG), (LONG, "No."), (LONG, LONG)])
def test_a_row_is_cut_where_either_response_is(
    responses: tuple[str, str], tokenizer: Tokenizer
) -> None:
    both = replace(row(0, response=responses[0]), rejected=responses[1])
    whole = fitted(both, tokenizer, Fitting(10_000))
    assert not whole.cut and whole.rejected is not None
    room = len(whole.prompt) + 12
    cut = fitted(both, tokenizer, Fitting(room))
    assert cut.cut and [bool(cut.lost), bool(cut.rejected_lost)] == [r == LONG for r in responses]
    assert cut.response + cut.lost == whole.response
    assert cut.rejected is not None and cut.rejected + cut.rejected_lost == whole.rejected
    assert len(cut.response) <= 12 >= len(cut.rejected)


def test_a_row_that_needs_a_rejected_response(tokenizer: Tokenizer) -> None:
    """Those of the numbers given, and no other; before its prompt is found too long."""
    rows = [
        row(0),
        replace(row(1), rejected="No."),
        row(2),
        replace(row(3, prompt=LONG), where="f"),
    ]
    found = fit_rows(rows, tokenizer, Fitting(60), preference=[0, 1, 3])
    assert [type(f) for f in found] == [BadRow, FittedRow, FittedRow, BadRow]
    assert str(found[0]).startswith("row0: has no rejected response, which method=dpo needs")
    assert str(found[3]).startswith("f: has no rejected response")


def test_a_prompt_that_fills_all(tokenizer: Tokenizer) -> None:
    """Dropped, an error that names the row, or without its beginning."""
    rows = [row(0), replace(row(7, prompt=LONG), where="rows.jsonl:8")]
    long = fit_rows(rows, tokenizer, Fitting(60))[1]
    assert isinstance(long, TooLong) and long.reason == "the prompt alone fills max_length=60"
    assert long.ids == tokenizer.pair_ids(rows[1])
    assert [r.id for r in encode_rows(rows, tokenizer, Fitting(60)).rows] == ["row0"]
    bad = fit_rows(rows, tokenizer, Fitting(60, "error"))[1]
    assert isinstance(bad, BadRow) and "rows.jsonl:8: the prompt alone has" in str(bad)
    with pytest.raises(InputError, match=r"rows\.jsonl:8: .*max_length=60"):
        encode_rows(rows, tokenizer, Fitting(60, "error"))
    cut = fitted(rows[1], tokenizer, Fitting(60, "truncate"))
    assert cut.truncated and cut.whole_prompt == len(long.ids.prompt)
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
    cut = fitted(long, tokenizer, Fitting(size - 10, "truncate"))
    assert cut.truncated
    history = cut.row.history
    assert history[0] == system and history[1:] == long.history[-len(history) + 1 :]
    assert history[1]["role"] == "user" and 2 < len(history) < len(long.history)
    # No more turns go than must.
    more = (system, *long.history[-len(history) - 1 :])
    assert len(tokenizer.prompt_ids(more)) > size - 10 - Fitting(size - 10).room


def test_a_greeting_is_no_question(tokenizer: Tokenizer) -> None:
    """An answer before the only question stays with it: neither is half of a whole turn."""
    greeting = {"role": "assistant", "content": "Hello!"}
    long = Row("x", (greeting, {"role": "user", "content": LONG}), "Yes.")
    cut = fitted(long, tokenizer, Fitting(60, "truncate"))
    first, question = cut.row.history
    assert first == greeting and LONG.endswith(question["content"]) and cut.truncated


def test_what_is_cut_and_still_too_long_is_not_cut_again(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text's end may have more tokens alone than it had behind its beginning."""
    times: list[Row] = []

    def hardly(row: Row, *_: object) -> Row:
        times.append(row)
        assert len(times) < 5
        return row

    monkeypatch.setattr(encoding, "truncated", hardly)
    [found] = fit_rows([row(0, prompt=LONG)], tokenizer, Fitting(60, "truncate"))
    assert isinstance(found, TooLong) and len(times) == 1


def with_system(words: int, question: str) -> Row:
    system = {"role": "system", "content": "Answer " + "kindly " * words}
    return replace(row(0, prompt=question), history=(system, {"role": "user", "content": question}))


def limit(most: int) -> Fitting:
    """The settings that leave a truncated prompt exactly `most` tokens."""
    fitting = next(f for f in map(Fitting, range(2 * most + 2)) if f.max_length - f.room == most)
    return replace(fitting, long_prompts="truncate")


def test_a_quarter_is_kept_for_the_response() -> None:
    assert [Fitting(n).room for n in (1, 4, 7, 8, 100)] == [1, 1, 1, 2, 25]


def test_a_prompt_that_just_fits_is_left_as_it_is(tokenizer: Tokenizer) -> None:
    """With turns that could go, and with a question that is less than half of the prompt."""
    turns = [
        {"role": r, "content": f"{r} {n} says it"} for n in range(3) for r in ("user", "assistant")
    ]
    history = (*turns, {"role": "user", "content": "And now?"})
    for whole in (Row("x", history, "Yes."), with_system(30, "And now?")):
        size = len(tokenizer.prompt_ids(whole.history))
        assert truncated(whole, tokenizer, limit(size)) == whole
        shorter = truncated(whole, tokenizer, limit(size - 1))
        assert shorter is None or len(tokenizer.prompt_ids(shorter.history)) <= size - 1
    assert shorter is None


def test_half_of_a_prompt_is_question_enough(tokenizer: Tokenizer) -> None:
    """A question is cut down to half of the prompt's tokens, and no further."""
    own = len(tokenizer.encode(LONG))
    for words in range(4, 20, 5):
        long = with_system(words, LONG)
        around = len(tokenizer.prompt_ids(long.history)) - own  # the question
        for most, kept in ((2 * around - 1, False), (2 * around, True), (2 * around + 1, True)):
            assert (truncated(long, tokenizer, limit(most)) is not None) == kept


@pytest.mark.parametrize(
    "question", ["What is the capital of France?", LONG, "é" * 300, "\n" * 400]
)
@pytest.mark.parametrize("max_length", [16, 40, 60, 100, 200])
def test_no_scrap_of_a_question_is_trained_on(
    question: str, max_length: int, tokenizer: Tokenizer
) -> None:
    """With system turns of any length: a question that is cut keeps half of the prompt's tokens,
    and a short one is whole or not there.
    """
    most, kept = max_length - Fitting(max_length).room, 0
    for words in range(0, max_length // 2, 3):
        long = with_system(words, question)
        [found] = fit_rows([long], tokenizer, Fitting(max_length, "truncate"))
        if isinstance(found, TooLong):
            assert found.reason == (
                f"the system turn fills too much of max_length={max_length} to leave room for the "
                "question"
            )
            assert "truncate" not in found.reason and found.ids == tokenizer.pair_ids(long)
            continue
        assert isinstance(found, FittedRow) and found.response
        assert found.row.history[0] == long.history[0]
        left = found.row.history[1]["content"]
        assert question.endswith(left)
        if found.truncated:
            kept += 1
            assert left.strip() and len(tokenizer.encode(left)) >= most / 2 - 1
        else:
            assert left == question
    assert kept or question != LONG or max_length < 60


def test_a_template_that_fills_all_is_named(tokenizer: Tokenizer) -> None:
    [found] = fit_rows([row(0, prompt=LONG)], tokenizer, Fitting(12, "truncate"))
    assert isinstance(found, TooLong) and found.reason.startswith(
        "the chat template fills too much"
    )


@pytest.mark.parametrize(
    "condition",
    [
        "messages | length < 3",  # both with its answer and without
        "messages | length < 3 and messages[-1].role == 'assistant'",
        "messages[-1].content | length < 100",
        "add_generation_prompt and messages[0].content == 'b'",
    ],
)
def test_a_template_that_refuses_what_is_left_makes_the_row_bad(
    condition: str, chatml_folder: Path
) -> None:
    """The row, by its place; the rows beside it are what they were."""
    refuses = f"{{% if {condition} %}}{{{{ raise_exception('too few turns') }}}}{{% endif %}}"
    tokenizer = load_tokenizer(chatml_folder, template=refuses + CHATML_TEMPLATE)
    turns = ("a " * 200, "b " * 200, "c " * 200)
    history = tuple(
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)
    )
    rows = [Row(str(n), history, "y " * 60, where=f"rows.jsonl:{n + 1}") for n in range(2)]
    plain = load_tokenizer(chatml_folder)
    for n, found in enumerate(fit_rows(rows, tokenizer, Fitting(200, "truncate"))):
        expected = fitted(rows[n], plain, Fitting(200, "truncate"))
        assert len(expected.row.history) == 1 and expected.truncated
        if condition.endswith("'b'") or "100" in condition:  # does not hold of what is left
            assert isinstance(found, FittedRow) and found.prompt == expected.prompt
            continue
        assert isinstance(found, BadRow)
        assert str(found) == (
            f"rows.jsonl:{n + 1}: chat template: too few turns (without the turns that "
            "long_prompts=truncate takes away)"
        )
