"""What of a row is prompt and what is answer, whatever the template and the answer look like."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_tokenizers import (
    CHATML_TEMPLATE,
    CONVERSATIONS,
    ZEPHYR_TEMPLATE,
    as_row,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    write_tokenizer_folder,
)

from ldalign.data import tokenizer as tokenizer_module
from ldalign.data.records import BadRow
from ldalign.data.rows import Row
from ldalign.data.tokenizer import PairIds, Tokenizer, load_tokenizer
from ldalign.system.errors import InputError

REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML_TEMPLATE
)
CUTS_REASONING = CHATML_TEMPLATE.replace(
    "message['content']", "message['content'].split('</think>')[-1].strip()"
)
# As Mistral's: the system text stands in the last user turn, no header before an answer.
SYSTEM_LAST = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = "
    "messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest "
    "%}{% if m.role == 'user' %}[INST] {% if loop.last and s is defined %}{{ s }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def chatml(chatml_folder: Path) -> Tokenizer:
    return load_tokenizer(chatml_folder)


@pytest.fixture(scope="module")
def joining(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """ChatML where two line ends are one token: a prompt's last would take in an answer's first."""
    folder = tmp_path_factory.mktemp("joining")
    write_tokenizer_folder(folder, byte_level_tokenizer(), CHATML_TEMPLATE, eos_token="<|im_end|>")
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["model"]["vocab"]["ĊĊ"] = len(raw["model"]["vocab"])
    raw["model"]["merges"].insert(0, ["Ċ", "Ċ"])
    path.write_text(json.dumps(raw), encoding="utf-8")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def zephyr(zephyr_folder: Path) -> Tokenizer:
    return load_tokenizer(zephyr_folder)


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


# ----------------------------------------------------------- answers that begin with white space


@pytest.mark.parametrize("answer", ["\n\nAlpha 57.", "\nx", " x", "\t x", "\n", "\r\n\n ok "])
@pytest.mark.parametrize("name", ["chatml", "zephyr", "joining"])
def test_an_answer_may_begin_with_white_space(name: str, answer: str, request: Any) -> None:
    """The prompt's ids are those that generation starts from; the rest stands behind them."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    row = as_row([("user", "Name city number 57."), ("assistant", answer)])
    pair = tokenizer.pair_ids(row)
    assert pair.prompt == tokenizer.prompt_ids(row.history)
    assert pair.response[-1] in tokenizer.end_ids
    end = shown(tokenizer, pair.response[-1:])
    text = tokenizer.render([*row.history, {"role": "assistant", "content": answer}])
    assert shown(tokenizer, pair.prompt + pair.response).replace("<s> ", "") in (
        text,
        text.rstrip(),
        *(t.replace("</s>\n", "</s> \n") for t in (text, text.rstrip())),
    )
    assert shown(tokenizer, pair.response).endswith(end)


@pytest.mark.parametrize("prefix", ["legacy", "first", "always", "never"])
@pytest.mark.parametrize("answer", ["\n\nAlpha", "  Alpha", "Alpha", "\n", "é"])
def test_no_space_is_put_in_front_of_an_answer(prefix: str, answer: str, tmp_path: Path) -> None:
    """Tokenizers that begin a text with a space of their own: none comes between prompt and answer,
    and the ids are those of the whole where the two do not join.
    """
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tiny = sentencepiece_tokenizer(prefix)
    folder = write_tokenizer_folder(tmp_path, tiny, ZEPHYR_TEMPLATE, **names)
    tokenizer = load_tokenizer(folder)
    pair = tokenizer.pair_ids(as_row([("user", "q"), ("assistant", answer)]))
    prompt, whole = shown(tokenizer, pair.prompt), shown(tokenizer, pair.prompt + pair.response)
    assert whole.startswith(prompt) and whole[len(prompt) :].rstrip(" ") == f"{answer}</s>"


def test_an_answer_keeps_the_prompts_ids_and_its_own_text(joining: Tokenizer) -> None:
    pair = joining.pair_ids(as_row([("user", "q"), ("assistant", "\n\na")]))
    line, two = joining.encode("\n")[0], joining.encode("\n\n")[0]
    assert joining.encode("\n\n\na")[0] == two != line  # what the whole has
    assert pair.prompt[-1] == line
    assert pair.response == [*joining.encode("\n\na"), *joining.end_ids]


def test_an_answer_that_cannot_stand_behind_its_prompt_is_a_bad_row(
    joining: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "ANCHORS", ())
    [bad] = joining.pairs_ids([as_row([("user", "q"), ("assistant", "\n\na")])])
    assert isinstance(bad, BadRow) and "cannot be encoded after its prompt" in str(bad)


TEXT = st.text(st.sampled_from(" \n\taAé.</s><|im_end|>1 🙂"), min_size=1, max_size=12)


def test_prompts_are_those_of_generation(
    chatml: Tokenizer, zephyr: Tokenizer, joining: Tokenizer
) -> None:
    """Any conversation: the prompt's ids as `prompt_ids` makes them, and where encoding the whole
    leaves them as they are, as it mostly does, prompt and response are its ids.
    """
    counts = Counter[bool]()

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(TEXT.filter(str.strip), min_size=2, max_size=5), st.booleans())
    def holds(texts: list[str], system: bool) -> None:
        check_prompt((chatml, zephyr, joining), texts, system, counts)

    holds()
    assert counts[True] > 100


def check_prompt(
    tokenizers: tuple[Tokenizer, ...], texts: list[str], system: bool, counts: Counter[bool]
) -> None:
    turns = [("system", "s")] * system
    turns += [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    if turns[-1][0] == "user":
        turns.append(("assistant", texts[0]))
    row = as_row(turns)
    for tokenizer in tokenizers:
        pair = tokenizer.pair_ids(row)
        assert pair.prompt == tokenizer.prompt_ids(row.history)
        text = tokenizer._chat.pair(row)
        prompt, whole = (
            tokenizer.encode(t) for t in (text.prompt.text, "".join(t.text for t in text))
        )
        same = whole[: len(prompt)] == prompt
        counts[same] += 1
        if same:
            bos = len(pair.prompt) - len(prompt)
            ids = [*pair.prompt, *pair.response]
            assert ids == [*pair.prompt[:bos], *whole][: len(ids)]
        assert sum(i in tokenizer.end_ids for i in pair.response) == 1
        squeezed = "".join(shown(tokenizer, pair.response).split())
        assert "".join(row.response.split()) in squeezed


# ------------------------------------------------------------------------------------- many at once


def test_many_rows_at_once_are_each_as_alone(chatml: Tokenizer, zephyr: Tokenizer) -> None:
    rows = [as_row(turns) for turns in CONVERSATIONS] * 3
    for tokenizer in (chatml, zephyr):
        together = tokenizer.pairs_ids(rows)
        assert together == [tokenizer.pair_ids(row) for row in rows]
        assert all(isinstance(pair, PairIds) for pair in together)
    assert chatml.pairs_ids([]) == []


def test_a_bad_row_does_not_stop_the_others(chatml_folder: Path) -> None:
    tokenizer = load_tokenizer(chatml_folder, template=REFUSES_SYSTEM)
    good = as_row([("user", "q"), ("assistant", "a")], where="data.jsonl:57")
    bad = as_row([("system", "s"), ("user", "q"), ("assistant", "a")], where="data.jsonl:58")
    first, second, third = tokenizer.pairs_ids([good, bad, good])
    assert first == third == tokenizer.pair_ids(good)
    assert isinstance(second, BadRow) and str(second) == "chat template: System role not supported"
    with pytest.raises(InputError) as caught:
        tokenizer.pair_ids(bad)
    assert str(caught.value) == "data.jsonl:58: chat template: System role not supported"


@pytest.mark.parametrize("template", ["{{ ''.__class__ }}", "{{ 'a' * 10**9 }}", ""])
def test_what_is_wrong_with_every_row_stops_at_once(template: str, chatml_folder: Path) -> None:
    rows = [as_row(CONVERSATIONS[0])] * 3
    with pytest.raises(InputError, match="SecurityError|has no chat template"):
        load_tokenizer(chatml_folder, template=template).pairs_ids(rows)


def test_a_row_is_rendered_twice(chatml: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without its answer; more would be time lost in every preparation."""
    chatml.pair_ids(as_row(CONVERSATIONS[0]))
    calls = []
    render = chatml._chat.render

    def counted(*args: Any) -> str:
        calls.append(args)
        return render(*args)

    monkeypatch.setattr(chatml._chat, "render", counted)
    chatml.pairs_ids([as_row(turns) for turns in CONVERSATIONS])
    assert len(calls) == 2 * len(CONVERSATIONS)


# ---------------------------------------------------------------- templates that rewrite what was


@pytest.mark.parametrize("system", [True, False])
def test_a_system_text_in_the_last_user_turn(system: bool, zephyr_folder: Path) -> None:
    """The prompt is as for generation; the answer is what follows the last user turn."""
    tokenizer = load_tokenizer(zephyr_folder, template=SYSTEM_LAST)
    first = [("system", "Be brief.")] if system else []
    turns = [*first, ("user", "a"), ("assistant", "b"), ("user", "2 + 2?"), ("assistant", "four")]
    row = as_row(turns)
    pair = tokenizer.pair_ids(row)
    assert pair.prompt == tokenizer.prompt_ids(row.history)
    assert shown(tokenizer, pair.response).strip() == "four</s>"
    assert ("Be brief.\n\n2 + 2?" in shown(tokenizer, pair.prompt)) == system


def test_a_prompt_that_counts_the_turns_is_as_for_generation(chatml_folder: Path) -> None:
    tokenizer = load_tokenizer(chatml_folder, template="{{ messages | length }}" + CHATML_TEMPLATE)
    pair = tokenizer.pair_ids(as_row(CONVERSATIONS[0]))
    assert shown(tokenizer, pair.prompt).startswith("1<|im_start|>user")
    assert shown(tokenizer, pair.response) == "12 + 30 = 42<|im_end|>"


def test_a_header_that_changes_when_an_answer_follows_is_a_bad_row(chatml_folder: Path) -> None:
    template = CHATML_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>' }}")
    tokenizer = load_tokenizer(chatml_folder, template=template)
    row = as_row([("user", "q"), ("assistant", "a")], where="data.jsonl:3")
    with pytest.raises(InputError) as caught:
        tokenizer.pair_ids(row)
    assert str(caught.value).startswith(
        "data.jsonl:3: the prompt is not how prompt + answer begins: character 51 and what follows "
        "is '<think>' in the prompt, 'a<|im_end|>\\n' in the whole;"
    )
    # An answer that begins as the header goes on is whole, though a part of it is in the prompt.
    pair = tokenizer.pair_ids(as_row([("user", "q"), ("assistant", "<think>hm</think>a")]))
    assert shown(tokenizer, pair.response) == "hm</think>a<|im_end|>"


# --------------------------------------------------------------------- answers that are not written


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ("CUTS", "<think>\nhm\n</think>\n\nfour"),
        ("message['content'] | upper", "four"),
        ("message['content'][:3]", "four"),
        ("message['content'] | replace('o', '0')", "four"),
        ("(message['content'] if message['role'] == 'user' else '')", "four"),
    ],
)
def test_an_answer_of_which_a_part_is_left_out_is_a_bad_row(
    change: str, answer: str, chatml_folder: Path
) -> None:
    template = CUTS_REASONING
    if change != "CUTS":
        template = CHATML_TEMPLATE.replace("message['content']", change)
    tokenizer = load_tokenizer(chatml_folder, template=template)
    turns = [("user", answer), ("assistant", answer)]  # what the prompt says does not count
    with pytest.raises(InputError) as caught:
        tokenizer.pair_ids(as_row(turns, where="data.jsonl:7"))
    assert (
        "data.jsonl:7: the chat template leaves out or changes a part of the answer: the data "
        in (str(caught.value))
    )
    assert f"have {answer!r}" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        "message['content'] | trim",
        "message['content'].split() | join(' ')",
        "'<think>\n\n</think>\n\n' + message['content']",
    ],
)
def test_white_space_and_what_is_added_do_not_count(change: str, chatml_folder: Path) -> None:
    template = CHATML_TEMPLATE.replace("message['content']", f"({change})")
    tokenizer = load_tokenizer(chatml_folder, template=template)
    row = Row("1", ({"role": "user", "content": "q"},), " a  b\n<|im_end|>\n")
    assert "<|im_end|>" in shown(tokenizer, tokenizer.pair_ids(row).response[:-1])


def test_reasoning_of_earlier_turns_may_be_cut(chatml_folder: Path) -> None:
    last = "{% if loop.last %}{{ message.content }}{% else %}{{ message.content.split('</think>')"
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        + last
        + "[-1] }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = load_tokenizer(chatml_folder, template=template)
    thought = "<think>x</think>y"
    turns = [("user", "q"), ("assistant", thought), ("user", "r"), ("assistant", thought)]
    pair = tokenizer.pair_ids(as_row(turns))
    assert shown(tokenizer, pair.response) == thought + "<|im_end|>"
    assert "x" not in shown(tokenizer, pair.prompt)


def test_tails_that_are_remembered_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template whose prompt ends with the user's text has as many ends as rows."""
    monkeypatch.setattr(tokenizer_module, "TAILS", 4)
    template = "<|im_start|>{{ messages[0].content }}\n{% for m in messages[1:] %}{{ m.content }}"
    template += "<|im_end|>{% endfor %}"
    folder = write_tokenizer_folder(
        tmp_path, byte_level_tokenizer(), template, eos_token="<|im_end|>"
    )
    tokenizer = load_tokenizer(folder)
    rows = [as_row([("user", f"q {i}"), ("assistant", f"a {i}")]) for i in range(20)]
    pairs = tokenizer.pairs_ids(rows)
    assert len(tokenizer._tails) <= 4
    assert [shown(tokenizer, p.prompt) for p in pairs if isinstance(p, PairIds)] == [
        f"<|im_start|>q {i}\n" for i in range(20)
    ]
