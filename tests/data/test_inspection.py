"""The parts of a row and the figures of a file, against counts by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_tokenizers import CHATML_TEMPLATE

from ldalign.data.encoding import Fitting, encode_rows
from ldalign.data.inspection import FileFigures, choose_rows, file_figures, parts_of, pieces
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
    max_length = len(prompt) + room
    parts = {part.name: part for part in parts_of(row(), tokenizer, max_length)}
    assert parts["prompt"].ids == prompt and not parts["prompt"].trained
    trained = [token for part in parts.values() if part.trained for token in part.ids]
    assert trained == response[: max(0, room)]
    many = (
        encode_rows([row(), *([row()] * 200)], tokenizer, Fitting(max_length)) if room > 0 else None
    )
    assert many is None or many.pairs[0].real == trained
    whole = [token for part in parts.values() for token in part.ids]
    assert whole == [*prompt, *response]
    assert ("end" in parts) == (room >= len(response)) != ("cut" in parts)
    if "end" in parts:
        assert parts["end"].ids == [tokenizer.end_ids[0]] and parts["end"].trained


def test_a_rejected_response_has_parts_of_its_own(chatml_folder: Path) -> None:
    tokenizer = load_tokenizer(chatml_folder)
    both = row(rejected="No")
    for trained in ({"response"}, {"response", "rejected"}, set[str]()):
        parts = {part.name: part for part in parts_of(both, tokenizer, 1000, trained)}
        assert list(parts) == ["prompt", "response", "end", "rejected", "rejected end"]
        assert parts["response"].trained == parts["end"].trained == ("response" in trained)
        assert parts["rejected"].trained == ("rejected" in trained)
        assert tokenizer.decode(parts["rejected"].ids) == "No"


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
    """Rows of two files and both splits: what is cut, what is dropped and why, and the lengths."""
    refuses = "{% if messages[0].content == 'No' %}{{ raise_exception('refused') }}{% endif %}"
    tokenizer = load_tokenizer(chatml_folder, template=refuses + CHATML_TEMPLATE)
    prompt, _ = tokenizer.pair_ids(row())
    max_length = len(prompt) + 4
    long = replace(row(3), history=({"role": "user", "content": "Is it so? " * 50},))
    broken = replace(row(4), history=({"role": "user", "content": "No"},))
    other = replace(row(0), where="other.jsonl:1")
    given = [row(0, "No"), row(1, "Yes it is so, and has been"), row(2), long, broken]
    rows = [(r, "training" if i else "held out") for i, r in enumerate(given)]
    found = file_figures([*rows, (other, "training")], tokenizer, max_length)  # type: ignore[list-item]
    assert list(found) == ["data/rows.jsonl", "other.jsonl"]
    figures = found["data/rows.jsonl"]
    assert figures.splits == {"held out": 1, "training": 4}
    lengths = [tokenizer.pair_ids(r) for r in given[:4]]
    assert list(figures.prompts) == [len(p) for p, _ in lengths]
    assert list(figures.responses) == [len(r) for _, r in lengths]
    assert figures.cut == sum(len(r) > 4 for _, r in lengths[:3]) > 0
    fills = f"the prompt alone fills max_length={max_length}"
    assert figures.dropped[fills] == ["data/rows.jsonl:4"]
    (message,) = figures.dropped["cannot be encoded, which ends a run but with bad_rows=skip"]
    assert message == "data/rows.jsonl:5: chat template: refused"
    longest = max(len(p) + len(r) for p, r in lengths)
    assert figures.quantiles()["together"][-1] == longest
    assert figures.longer_than(max_length - 1, max_length) >= 1
    assert figures.longer_than(max_length, max_length) == 0
    assert FileFigures().quantiles() == {}


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
