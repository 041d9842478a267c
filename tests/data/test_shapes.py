"""Shapes that people have: ShareGPT, Alpaca, transcripts, content parts, a column `system`."""

import pytest
from made_rows import GOOD, a, parquet, s, u, write

from ldalign.data.columns import Columns, KeyCounts
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
        ({"prompt": "<|im_start|>user\nq", "response": "r"}, r"begins with '<\|im_start\|>'"),
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


def test_turns_of_one_record_are_one_conversation(tmp_path):
    talk = [u("1"), a("2"), u("3"), a("4")]
    path = write(
        tmp_path / "x", {"messages": talk, "id": 7}, {"messages": talk}, {"messages": talk[:2]}
    )
    rows = {turns: list(iter_rows(path, Reading(turns))) for turns in ("first", "last", "all")}
    every = [row.conversation for row in rows["all"]]
    assert every[:2] == ["7", "7"] and every[2] == every[3] and len(set(every)) == 3
    for turns in ("first", "last"):
        assert [row.conversation for row in rows[turns]] == [every[0], every[2], every[4]]
    assert [row.id for row in rows["all"]][:2] == ["7/0", "7/1"]
    (single,) = read_rows(write(tmp_path / "y", {**GOOD, "id": "k"}), turns="all")
    assert (single.id, single.conversation) == ("k/0", "k")
    pair = {"prompt": "q", "response": "r", "id": "k"}
    assert read_rows(write(tmp_path / "y", pair), turns="all")[0].id == "k"


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
