"""Shapes that people have: ShareGPT, Alpaca, transcripts, content parts, a column `system`."""

import json
from dataclasses import replace

import pytest
from made_rows import GOOD, a, parquet, s, u, write

from ldalign.data.columns import CONVERSATION_IDS, READ, Columns, KeyCounts
from ldalign.data.reading import Reading, iter_rows, read_rows
from ldalign.data.records import BadRow
from ldalign.data.shapes import read_prompt
from ldalign.system.errors import InputError


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def part(text):
    return {"type": "text", "text": text}


HH = "\n\nHuman: City?\n\nAssistant: Alpha.\n\nHuman: Sure?\n\nAssistant:"


@pytest.mark.parametrize(
    ("record", "history", "response", "rejected"),
    [
        ({"conversations": [human("q"), gpt("r")]}, [u("q")], "r", None),
        (
            {"conversations": [{"from": "system", "value": "s"}, human("q"), gpt("r")]},
            [s("s"), u("q")],
            "r",
            None,
        ),
        ({"conversations": [u("q"), a("r")], "messages": None}, [u("q")], "r", None),
        ({"system": "s", "conversations": [human("q"), gpt("r")]}, [s("s"), u("q")], "r", None),
        (
            {"conversations": [human("q")], "chosen": gpt("r"), "rejected": gpt("g")},
            [u("q")],
            "r",
            "g",
        ),
        ({"instruction": "i", "input": "", "output": "r"}, [u("i")], "r", None),
        ({"instruction": "i", "input": "x", "output": "r"}, [u("i\n\nx")], "r", None),
        ({"instruction": "i", "output": "r", "system": "s"}, [s("s"), u("i")], "r", None),
        ({"instruction": "i", "chosen": "r", "rejected": "g"}, [u("i")], "r", "g"),
        (
            {"system": "s", "prompt": "q", "chosen": "r", "rejected": "g"},
            [s("s"), u("q")],
            "r",
            "g",
        ),
        ({"system": "", "prompt": "q", "response": "r"}, [u("q")], "r", None),
        ({"system": "s", "messages": [s("s"), u("q"), a("r")]}, [s("s"), u("q")], "r", None),
        (
            {"chosen": HH + " Yes.", "rejected": HH + " No idea."},
            [u("City?"), a("Alpha."), u("Sure?")],
            "Yes.",
            "No idea.",
        ),
        (
            {"prompt": HH, "chosen": " Yes.", "rejected": " No."},
            [u("City?"), a("Alpha."), u("Sure?")],
            "Yes.",
            "No.",
        ),
        (
            {"messages": [u([part("a "), part("b")]), a([part("r")])]},
            [u("a b")],
            "r",
            None,
        ),
        (
            {"prompt": [u([part("q")])], "response": [a([{**part("r"), "cache_control": 1}])]},
            [u("q")],
            "r",
            None,
        ),
        (
            {"prompt": "q", "messages": [u("q"), a("r")], "chosen": [u("q"), a("r")]}
            | {"rejected": [u("q"), a("g")]},
            [u("q")],
            "r",
            "g",
        ),
    ],
)
def test_shapes(tmp_path, record, history, response, rejected):
    (row,) = read_rows(write(tmp_path / "x", record))
    assert (list(row.history), row.response, row.rejected) == (history, response, rejected)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [human("q"), {"from": "observation", "value": "x"}]}, "role 'observati"),
        ({"conversations": [{**human("q"), "content": "p"}, gpt("r")]}, "both content and value"),
        ({"instruction": 3, "output": "r"}, "instruction: is a number"),
        ({"input": "q", "output": "r"}, "no known shape.*columns: {prompt: input}"),
        ({"question": "q", "answer": "r"}, "columns: {prompt: question, response: answer}"),
        ({"prompt": "q", "response": "r", "completion": "t"}, "completion: is not read beside"),
        ({**GOOD, "response": "t"}, "response: is not read beside messages"),
        ({**GOOD, "chosen": "t"}, "chosen: is not read beside messages"),
        ({**GOOD, "conversations": [human("p"), gpt("t")]}, "conversations: is not read beside"),
        ({**GOOD, "prompt": "other"}, "prompt: is no turn of messages"),
        (
            {"messages": [u("q"), a("x")], "chosen": [u("q"), a("r")]}
            | {"rejected": [u("q"), a("g")]},
            "messages: is not read beside chosen",
        ),
        ({**GOOD, "system": 3}, "system: is a number"),
        ({"system": "t", "messages": [s("s"), u("q"), a("r")]}, "system: differs from"),
        (
            {
                "chosen": "### Human: q ### Assistant: r",
                "rejected": "### Human: q ### Assistant: g",
            },
            "chosen: is a whole conversation in one text",
        ),
        (
            {"chosen": "Human: q r", "rejected": "Human: q g"},
            "chosen: is a whole conversation in one text",
        ),
        ({"prompt": "<|im_start|>user\nq", "response": "r"}, r"begins with '<\|im_start\|>user'"),
        ({"prompt": "<s>[INST] q [/INST]", "response": "r"}, r"prompt: begins with '<s>\[INST\]'"),
        ({"prompt": HH, "response": " a\n\nHuman: b\n\nAssistant: c"}, "goes on with a turn"),
        (
            {"messages": [u([part("q"), {"type": "image_url", "image_url": {}}]), a("r")]},
            "turn 1, part 2: is of type 'image_url'",
        ),
        ({"messages": [u(["q"]), a("r")]}, "turn 1, part 1: is no"),
        ({"messages": [u([{**part("q"), "file": "x"}]), a("r")]}, "part 1: has file"),
        ({"messages": [u([]), a("r")]}, r"turn 1 \(user\) is empty"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, record, message):
    with pytest.raises(InputError, match=f"x:2: .*{message}"):
        read_rows(write(tmp_path / "x", GOOD, record))


def test_keys_that_are_null_are_found_all_the_same(tmp_path):
    """A parquet file whose second row is empty: the message names the columns that are there."""
    path = parquet(tmp_path / "x", {"messages": [[u("q"), a("r")], None]})
    with pytest.raises(InputError, match=r"x:2: no known shape.*found 'messages' \(null\)"):
        read_rows(path)
    path = parquet(tmp_path / "x", {"size": [3], "source": ["x"]})
    with pytest.raises(InputError, match="x:1: .*found no keys; not read: 'size', 'source'"):
        read_rows(path)
    columns = {"conversations": [[human("Hi"), gpt("Ho")]] * 4, "source": ["x"] * 4}
    rows = read_rows(parquet(tmp_path / "x", columns))
    assert [(row.history, row.response) for row in rows] == [((u("Hi"),), "Ho")] * 4


@pytest.mark.parametrize("turns", ["first", "last", "all"])
def test_a_conversation_is_told_by_how_it_begins(tmp_path, turns):
    """Whatever the ids of its rows, and however far each goes."""
    talk = [u("1"), a("2"), u("3"), a("4")]
    same = [
        {"messages": talk, "id": 7},
        {"messages": talk[:2], "id": 8},
        {"messages": [s("Be brief."), u("1 "), *talk[1:]]},
        {"system": "s", "prompt": talk[:3], "response": "another"},
        {"prompt": talk[:3], "chosen": "x", "rejected": "y", "id": 7},
    ]
    others = [
        {"prompt": "1", "response": "another", "id": 7},
        {"prompt": "2", "response": "1", "id": 7},
        {"prompt": "12", "response": "", "output": "2"},
    ]
    path = write(tmp_path / "x", *same, *others)
    rows = list(iter_rows(path, Reading(turns)))
    assert len({row.conversation for row in rows[:-3]}) == 1 and len(rows) >= 8
    assert len({row.conversation for row in rows[-4:]}) == 4


def test_a_conversation_is_told_by_its_name(tmp_path):
    """Turns that stand in rows of their own, as in LMSYS and WildChat."""
    rows = [{"prompt": str(i), "response": "r"} for i in range(4)]
    for key in CONVERSATION_IDS:
        named = [{**row, key: name} for row, name in zip(rows, ["a", "a", "b", None], strict=True)]
        keys = [row.conversation for row in read_rows(write(tmp_path / "x", *named))]
        assert (
            keys[:3] == ["a", "a", "b"]
            and keys[3] == read_rows(write(tmp_path / "y", rows[3]))[0].conversation
        )
        mapped = read_rows(tmp_path / "x", columns=Columns({"id": key}))
        assert [row.conversation for row in mapped] == keys and mapped[1].id == "a#2"
        ignored = read_rows(tmp_path / "x", columns=Columns({}, frozenset([key])))
        assert len({row.conversation for row in ignored}) == 4
    both = [{**row, "session_id": "s", "conversation_id": i} for i, row in enumerate(rows)]
    assert len({row.conversation for row in read_rows(write(tmp_path / "x", *both))}) == 4


def test_a_number_names_a_conversation_in_its_file_alone(tmp_path):
    row = {"prompt": "q", "response": "r"}

    def keys(*names, value=0):
        return [
            read_rows(write(tmp_path / name, {**row, "conversation_id": value}))[0].conversation
            for name in names
        ]

    assert len(set(keys("train.jsonl", "test.jsonl"))) == 2
    assert len(set(keys("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"))) == 1
    assert len(set(keys("train.jsonl", "test.jsonl", value="7f"))) == 1
    assert keys("x", value="7") == keys("x", value=7) == keys("x", value=7.0) != keys("x", value=8)
    (single,) = read_rows(write(tmp_path / "y", {**GOOD, "id": "k"}), turns="all")
    assert single.id == "k/0"
    pair = {"prompt": "q", "response": "r", "id": "k"}
    assert read_rows(write(tmp_path / "y", pair), turns="all")[0].id == "k"


EMPTY = [None, "", [], {}, float("nan")]


@pytest.mark.parametrize("empty", EMPTY, ids=repr)
@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "response": "r"},
        {"prompt": "q", "output": "r"},
        {"instruction": "q", "completion": "r"},
        {"messages": [u("q"), a("r")]},
        {"conversations": [human("q"), gpt("r")]},
        {"prompt": "q", "chosen": "r", "rejected": "g"},
        {"real": [u("q"), a("r")], "generated": [u("q"), a("g")]},
    ],
    ids=lambda record: " ".join(record),
)
def test_what_is_empty_is_not_there(tmp_path, record, empty):
    """Loaders fill the columns that a row of another shape has."""
    filled = {**dict.fromkeys(READ, empty), **record}
    filled["kind"] = filled["answer"] = None if empty in ([], {}) else empty
    for order in (filled, dict(reversed(filled.items()))):
        line = json.dumps(order).encode()
        (row,) = read_rows(write(tmp_path / "x", line))
        (plain,) = read_rows(write(tmp_path / "y", record))
        assert replace(row, where="") == replace(plain, where="")
    turns = [{"role": "user", "from": empty, "content": "q", "value": empty}]
    turns += [{"role": empty, "from": "gpt", "content": empty, "value": "r"}]
    line = json.dumps({"messages": turns}).encode()
    assert read_rows(write(tmp_path / "x", line))[0].response == "r"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "q", "response": ""}, r"response: turn 2 \(assistant\) is empty"),
        ({"prompt": "", "response": "r"}, r"response: turn 1 \(user\) is empty"),
        ({"instruction": "", "input": "", "output": "r"}, r"output: turn 1 \(user\) is empty"),
        ({"prompt": "q", "chosen": "r", "rejected": ""}, r"rejected: turn 2 .* is empty"),
        ({"messages": [], "conversations": []}, "messages: is empty"),
        ({"prompt": "q", "response": "", "output": ""}, r"response: turn 2 .* is empty"),
        (
            {"prompt": "q", "response": "r", "chosen": "c", "rejected": ""},
            "chosen: is not read bes",
        ),
    ],
)
def test_what_is_empty_alone_is_an_error(tmp_path, record, message):
    with pytest.raises(InputError, match=f"x:1: {message}"):
        read_rows(write(tmp_path / "x", record))


def test_a_user_turn_at_the_end_is_counted(tmp_path, capfd):
    open_end = {"messages": [u("q"), a("r"), u("and?")]}
    rows = read_rows(write(tmp_path / "x", GOOD, *[open_end] * 3))
    assert [row.response for row in rows] == ["r"] * 4
    assert (
        "data: 3 conversations end with a user turn, which is left out\n" in capfd.readouterr().err
    )


def test_a_turn_of_two_roles_is_refused(tmp_path):
    for role, other in (("user", "gpt"), ("user", "alice"), ("assistant", "human"), ("user", 3)):
        turn = {"role": role, "from": other, "content": "q"}
        with pytest.raises(InputError, match=rf"x:1: messages: turn 1 has role '{role}' and from"):
            read_rows(write(tmp_path / "x", {"messages": [turn, a("r")]}))
    turns = [{**u("q"), "from": "human"}, {**a("r"), "from": "gpt"}]
    assert read_rows(write(tmp_path / "x", {"messages": turns}))[0].response == "r"
    turns = [{**u("q"), "from": "alice"}, a("r")]
    columns = Columns({}, frozenset(["from"]))
    assert read_rows(write(tmp_path / "x", {"messages": turns}), columns=columns)[0].response == "r"


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": "q", "id": None}, [u("q")]),
        ({"prompt": None, "messages": [u("q")]}, [u("q")]),
        ({"conversations": [human("q")], "system": "s"}, [s("s"), u("q")]),
        ({"prompt": "q", "response": "r", "chosen": "c"}, [u("q")]),  # answers are no prompt
        ({"prompt": "q", "messages": [u("q"), a("r")]}, [u("q")]),
        ({"instruction": "i", "input": "x"}, [u("i\n\nx")]),
    ],
)
def test_prompts(record, messages):
    assert read_prompt(record, Columns(), KeyCounts()) == messages


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q"}, "found 'question'; name the keys: columns: {prompt: question}"),
        ({"prompt": "q", "tools": [1]}, "tools: carries meaning"),
        ({"prompt": "q", "instruction": "i"}, "instruction: is not read beside prompt"),
        ({"prompt": "p", "messages": [u("q")]}, "prompt: is no turn of messages"),
        ({"messages": [u("q"), a("r")]}, "ends with a turn of the assistant"),
        ({"messages": None}, r"found 'messages' \(null\)"),
        ([], "the row is a list"),
    ],
)
def test_prompts_that_cannot_be_read(record, message):
    with pytest.raises(BadRow, match=message):
        read_prompt(record, Columns(), KeyCounts())
