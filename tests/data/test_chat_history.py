"""The turns before an answer: all of them stand in the prompt, or the row is bad."""

from datetime import date
from pathlib import Path

import pytest
from made_tokenizers import CHATML_TEMPLATE, as_row, messages
from test_chat_templates import CASES, CHATS, FEATURES, NAMES, oracle

from ldalign.data.chat_text import ChatText
from ldalign.data.records import BadRow
from ldalign.data.rows import Message
from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.system.errors import InputError

TURNS = [
    ("system", "Be brief, and kind."),
    ("user", "What is 6 x 7?"),
    ("assistant", "It is 42."),
    ("user", "And 6 x 8?"),
    ("assistant", "It is 48."),
]
CONTENT = "message['content']"


def changed(tokenizer_folder: Path, content: str, called: str | None = None) -> Tokenizer:
    """ChatML with another text in place of a turn's."""
    template = CHATML_TEMPLATE.replace(CONTENT, f"({content})")
    return load_tokenizer(tokenizer_folder, template, template_called=called)


@pytest.mark.parametrize(
    ("content", "turn"),
    [
        (f"{CONTENT} if message['role'] != 'system' else ''", "the system turn, 'Be brief, and ki"),
        (f"{CONTENT} if message['role'] != 'system' else 'Be br'", "the system turn, 'Be brief,"),
        (f"{CONTENT} if message['role'] != 'user' or loop.index > 2 else '?'", "turn 2 (user), 'W"),
        (f"{CONTENT} if loop.index > 3 or loop.index < 3 else ''", "turn 3 (assistant), 'It is 42"),
        (f"{CONTENT} if message['role'] != 'user' else {CONTENT}[:6]", "turn 2 (user), 'What is 6"),
        (f"{CONTENT} if message['role'] != 'user' else {CONTENT} | lower", "turn 2 (user), 'What"),
        (f"{CONTENT} if loop.index != 4 else ''", "turn 4 (user), 'And 6 x 8?'"),
    ],
)
def test_a_turn_that_the_template_leaves_out_is_named(
    content: str, turn: str, chatml_folder: Path
) -> None:
    row = as_row(TURNS, where="rows.jsonl:3")
    for called, subject in ((None, "the chat template"), ("template=t.jinja",) * 2):
        [bad] = changed(chatml_folder, content, called).pairs_ids([row])
        assert isinstance(bad, BadRow)
        assert str(bad).startswith(f"{subject} leaves out or changes {turn}"), bad
        assert "use a template that writes it, or leave it out of the data" in str(bad)


@pytest.mark.parametrize(
    "choice",
    ["[messages[-2], messages[-1]]", "messages | rejectattr('role', 'equalto', 'assistant')"],
)
def test_turns_that_are_left_out_whole_or_moved(choice: str, chatml_folder: Path) -> None:
    """The head of the conversation; its answers; the turns the other way round."""
    for chosen in (choice, "messages | reverse"):
        template = CHATML_TEMPLATE.replace("in messages %}", f"in {chosen} %}}")
        tokenizer = load_tokenizer(chatml_folder, template)
        history = messages(TURNS[1:4])
        with pytest.raises(BadRow, match="the chat template leaves out or changes turn "):
            tokenizer._chat._check_history(tokenizer.render(history, True), history)


@pytest.mark.parametrize(
    "content",
    [
        f"{CONTENT} | trim",
        f"{CONTENT}.split() | join(' ')",
        f"'x' + {CONTENT} + 'y'",
        f"{CONTENT}.split('</think>')[-1] if message['role'] == 'assistant' and not loop.last "
        f"else {CONTENT}",
    ],
)
def test_white_space_and_reasoning_of_earlier_answers_do_not_count(
    content: str, chatml_folder: Path
) -> None:
    turns = [("system", " Be  brief.\n"), ("user", "\n6 x\t7?  "), ("assistant", "<think>6 sevens")]
    turns[2] = ("assistant", "<think>\nsix sevens</think>\n\nIt is  42. ")
    row = as_row([*turns, ("user", " so? "), ("assistant", "Yes.")])
    pair = changed(chatml_folder, content).pair_ids(row)
    assert pair.response


@pytest.mark.parametrize(
    ("reasoning", "fine"),
    [
        ("<think>six</think>", True),
        ("<seed:think>six</seed:think>", True),
        ("<thought>six</thought>", True),
        ("<Reasoning>six</Reasoning>", True),
        ("[THINK]six[/THINK]", True),
        ("<b>six</b>", False),
        ("six\n\n", False),
    ],
)
def test_what_an_earlier_answer_may_lose(reasoning: str, fine: bool, chatml_folder: Path) -> None:
    """Reasoning, by the mark that ends it, and nothing else; what follows it must stand."""
    cut = f"{CONTENT}.replace('{reasoning}', '')".replace("\n", "\\n")
    for content, good in ((cut, fine), (f"{cut}.replace('42', '')", False)):
        only_earlier = f"{CONTENT} if loop.last else {content}"
        turns = [("user", "q"), ("assistant", f"{reasoning}It is 42."), ("user", "r")]
        row = as_row([*turns, ("assistant", "a")])
        [pair] = changed(chatml_folder, only_earlier).pairs_ids([row])
        assert isinstance(pair, BadRow) != good
        assert good or "turn 2 (assistant)" in str(pair)


def told(template: str, history: list[Message]) -> str:
    """What is said of the history under a template: "" if it is all there, "refused"."""
    chat = ChatText(Path("folder"), template, date.today(), NAMES)
    try:
        chat._check_history(chat.render(history, True), history)
    except BadRow as bad:
        return str(bad)
    except InputError:
        return "refused"
    return ""


@pytest.mark.parametrize("chat", CHATS)
def test_templates_of_the_public_families_pass(chat: str) -> None:
    """Each way in which a family writes turns, and each feature that writes all of them."""
    history = messages(CHATS[chat])
    for name in set(CASES) - set(FEATURES):
        assert told(CASES[name], history) == "", name
    for name in (
        *("namespace counter", "macro", "generation tags", "system in the last user turn"),
        *("system in the first user turn", "system by default", "system moved", "reasoning cut"),
        *("reasoning kept in the last", "eos between", "content in parts"),
    ):
        assert told(FEATURES[name], history) == "", name


@pytest.mark.parametrize("chat", CHATS)
def test_every_feature_is_judged_by_the_words_that_it_writes(chat: str) -> None:
    """A turn is missing where transformers' rendering lacks its word, and only there."""
    words = [f"zq{i}xv" for i in range(9)]
    turns = [
        (role, f"<think>y</think>{word}" if "</think>" in content else word)
        for word, (role, content) in zip(words, CHATS[chat], strict=False)
    ]
    for name, template in CASES.items():
        try:
            text = oracle(template, messages(turns), True)
        except Exception:  # whatever a template runs into
            continue
        missing = next(
            (n for n, word in zip(range(len(turns)), words, strict=False) if word not in text), None
        )
        found = told(template, messages(turns))
        assert (missing is not None) == bool(found), name
        if missing is not None:
            role = turns[missing][0]
            turn = "the system turn" if role == "system" else f"turn {missing + 1} ({role})"
            assert f"leaves out or changes {turn}, " in found, name


def test_a_message_that_spells_a_control_token_is_found(chatml_folder: Path) -> None:
    tokenizer = load_tokenizer(chatml_folder)
    turns = [("user", "<|im_end|> "), ("assistant", "<|im_start|>"), ("user", "<|im_start|>y")]
    assert tokenizer.pair_ids(as_row([*turns, ("assistant", "a")])).prompt
    [bad] = changed(chatml_folder, f"{CONTENT}[:1] if loop.index == 1 else {CONTENT}").pairs_ids(
        [as_row([*turns, ("assistant", "a")])]
    )
    assert isinstance(bad, BadRow) and "turn 1 (user), '<|im_end|> '" in str(bad)


# ------------------------------------------------------------------------- every time, and by name


def test_no_generation_prompt_is_said_every_time(chatml_folder: Path) -> None:
    template = CHATML_TEMPLATE.partition("{% if add_generation_prompt")[0]
    tokenizer = load_tokenizer(chatml_folder, template, template_called="template=t.jinja")
    row = as_row(TURNS)
    for ask in (tokenizer.pair_ids, tokenizer.pair_ids, lambda r: tokenizer.prompt_ids(r.history)):
        with pytest.raises(InputError, match=r"^template=t\.jinja: has no generation prompt"):
            ask(row)


@pytest.mark.parametrize("called", [None, "template=t.jinja"])
def test_messages_name_the_template_that_was_given(called: str | None, chatml_folder: Path) -> None:
    subject = called or "the chat template"
    answer = f"'' if message['role'] == 'assistant' else {CONTENT}"
    [bad] = changed(chatml_folder, answer, called).pairs_ids([as_row(TURNS[-2:])])
    assert str(bad).startswith(f"{subject} leaves out or changes a part of the answer: ")
    template = CHATML_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>' }}")
    tokenizer = load_tokenizer(chatml_folder, template, template_called=called)
    [bad] = tokenizer.pairs_ids([as_row(TURNS[-2:])])
    assert f"; does {subject} write the assistant's header otherwise" in str(bad)


def test_turns_that_hold_each_other_stand_in_their_order(chatml_folder: Path) -> None:
    turns = [("user", "a"), ("assistant", "aa")] * 100
    tokenizer = load_tokenizer(chatml_folder)
    row = as_row(turns)
    assert tokenizer.pair_ids(row).response
    prompt = tokenizer.render(row.history, True)
    for number in (1, 99, 101, 199):  # one turn more than the prompt has
        history = [*row.history[:number], {"role": "user", "content": "aa"}, *row.history[number:]]
        with pytest.raises(BadRow, match=r"leaves out or changes turn \d+ "):
            tokenizer._chat._check_history(prompt, history)
