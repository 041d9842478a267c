"""Every key of a row is read, known to be harmless, refused by name, or named."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rows import GOOD, a, parquet, s, u, write
from runs import ROOT

from ldalign.data.columns import (
    CONVERSATION_IDS,
    MEANING,
    METADATA,
    READ,
    TURN_MEANING,
    TURN_METADATA,
    TURN_READ,
    Columns,
    shown,
    use_of,
)
from ldalign.data.reading import Reading, iter_rows, read_rows
from ldalign.run.settings import RunConfig
from ldalign.system.config import load_config
from ldalign.system.errors import InputError

PAIR = {"prompt": "q", "chosen": "r", "rejected": "g"}
SAYS = [True, 0, 0.5, "text", ["x"], {"x": 1}, [[]]]
SILENT = [None, "", [], {}]


def read(tmp_path, *records, mapping=None, ignored=(), **options):
    columns = Columns(mapping or {}, frozenset(ignored))
    return read_rows(write(tmp_path / "x", *records), columns=columns, **options)


# -------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("key", MEANING)
@pytest.mark.parametrize("base", [GOOD, PAIR], ids=["messages", "pair"])
def test_a_key_with_meaning_is_refused_by_name(tmp_path, base, key):
    for value in SAYS:
        with pytest.raises(InputError, match=rf"x:2: {key}: .*ignore_columns: \[{key}\]"):
            read(tmp_path, base, {**base, key: value})
    plain = read(tmp_path, base)
    assert read(tmp_path, *({**base, key: value} for value in SILENT))[0] == plain[0]
    assert read(tmp_path, {**base, key: "text"}, ignored=[key]) == plain


@pytest.mark.parametrize("key", TURN_MEANING)
def test_a_key_of_a_turn_with_meaning_is_refused_by_name(tmp_path, key):
    for value in SAYS:
        record = {"messages": [u("q"), {**a("r"), key: value}]}
        with pytest.raises(InputError, match=rf"x:2: messages: turn 2: {key}: carries meaning"):
            read(tmp_path, GOOD, record)
    silent = [{"messages": [u("q"), {**a("r"), key: value}]} for value in SILENT]
    plain = read(tmp_path, GOOD)
    assert read(tmp_path, *silent)[0] == plain[0]
    assert read(tmp_path, {"messages": [u("q"), {**a("r"), key: 1}]}, ignored=[key]) == plain


KEY = st.sampled_from(sorted({*READ, *MEANING, *TURN_MEANING, "source", "score_x", "my_id"})) | (
    st.text(min_size=1, max_size=6)
)
VALUE = st.sampled_from([*SAYS, *SILENT])


def test_no_key_changes_a_row_in_silence(tmp_path, capfd):
    """Beside a whole row, whatever else stands in it is read, named in a line, or refused; each
    happens.
    """
    counts = Counter()

    @settings(max_examples=200, deadline=None)
    @given(st.dictionaries(KEY, VALUE, max_size=3), st.sampled_from([GOOD, PAIR]))
    def holds(extra, base):
        extra = {key: value for key, value in extra.items() if key not in base}
        path = write(tmp_path / "x", {**base, **extra})
        capfd.readouterr()
        try:
            (row,) = read_rows(path)
        except InputError as error:
            assert any(key in str(error) for key in extra)
            counts["refused"] += 1
            return
        said = capfd.readouterr().err
        assert (row.history[-1], row.response) == (u("q"), "r")
        counts["read"] += 1
        for key, value in extra.items():
            if value in SILENT or key in ("id", "kind", "answer", "system", *CONVERSATION_IDS):
                continue
            assert use_of(key) in ("metadata", "unknown") and shown(key) in said
            counts["named"] += 1

    holds()
    assert min(counts[what] for what in ("refused", "read", "named")) > 5


def test_the_page_has_the_same_table():
    text = (ROOT / "docs/data.md").read_text()
    table = {
        (of, what): set(re.findall(r"`([^`]+)`", keys))
        for of, what, keys in re.findall(r"^\| (row|turn) \| (\w+)[^|]* \| (.*) \|$", text, re.M)
    }
    assert table == {
        ("row", "read"): set(READ),
        ("row", "metadata"): set(METADATA),
        ("row", "refused"): set(MEANING),
        ("turn", "read"): set(TURN_READ),
        ("turn", "metadata"): set(TURN_METADATA),
        ("turn", "refused"): set(TURN_MEANING),
    }
    for names in (READ, TURN_READ):  # one key is in one place
        for key in names:
            assert use_of(key, names is TURN_READ) == "read"
    assert not {*READ} & {*MEANING} and not {*TURN_READ} & {*TURN_MEANING}


# ---------------------------------------------------------------------- what is said of the others


def test_metadata_are_listed_once_with_their_count(tmp_path, capfd):
    rows = [{**GOOD, "prompt_id": i, "source": "web"} for i in range(700)] + [GOOD] * 5
    read(tmp_path, *rows)
    lines = [line for line in capfd.readouterr().err.splitlines() if "prompt_id" in line]
    assert lines == [
        "data: keys that say nothing to train on: prompt_id (700 rows), source (700 rows)"
    ]


def test_unknown_keys_are_named_in_one_line(tmp_path, capfd):
    turn = {**u("q"), "mood": "glad"}
    rows = [{"messages": [turn, a("r")], "hint": "h", "note": ""}] * 2000
    read(tmp_path, *rows)
    lines = [line for line in capfd.readouterr().err.splitlines() if "WARNING" in line]
    assert len(lines) == 1 and "hint, mood (of a turn);" in lines[0] and "note" not in lines[0]


def test_unread_columns_of_parquet_are_counted(tmp_path, capfd):
    columns = {"messages": [[u("q"), a("r")]] * 3, "prompt_id": ["x"] * 3, "hint": ["h"] * 3}
    read_rows(parquet(tmp_path / "x", {**columns, "size": [1, 2, 3]}))
    said = capfd.readouterr().err
    assert "prompt_id (3 rows)" in said and "hint" in said and "size" in said


def test_no_prompt_is_guessed_where_another_text_is(tmp_path):
    texts = {"chosen": "The town is Alpha.", "rejected": "The town is Beta."}
    harmless = {"id": "a", "conversation_id": "b", "uuid": "c", "doc_id": "d", "rank": 3}
    harmless |= {
        "score": "4.5",
        "note": " ",
        "metadata": {"n": [1, "2"]},
        "tags": [],
        "prompt": None,
    }
    plain = ((u("The town is"),), "Alpha.")
    (row,) = read(tmp_path, {**texts, **harmless})
    assert (row.history, row.response) == plain
    texty = ["question", "system", "note", "input", "source", "topic", "kind", "answer", "lang"]
    for key in texty:
        for value in ("text", ["text"], {"a": [{"b": "text"}]}):
            wanted = rf"x:1: chosen and rejected have no prompt.* {key}[;,]"
            with pytest.raises(InputError, match=wanted):
                read(tmp_path, {**texts, key: value})
        assert read(tmp_path, {**texts, key: "text"}, ignored=[key])[0].history == plain[0]


@pytest.mark.parametrize("key", ["note", "source", "metadata", "answer", "size"])
@pytest.mark.parametrize("value", ["text", b"text", {"a": "text"}, ["text"]], ids=repr)
def test_no_prompt_is_guessed_beside_a_column(tmp_path, key, value):
    """Also one that is else not read: metadata, bytes."""
    texts = {"chosen": ["The town is Alpha."], "rejected": ["The town is Beta."]}
    path = parquet(tmp_path / "y", {**texts, key: [value]})
    with pytest.raises(InputError, match=f"y:1: chosen and rejected have no prompt.* {key};"):
        read_rows(path)
    named = parquet(
        tmp_path / "z", {"best": texts["chosen"], "worst": texts["rejected"], key: [value]}
    )
    with pytest.raises(InputError, match="z:1: chosen and rejected have no prompt"):
        read_rows(named, columns=Columns({"chosen": "best", "rejected": "worst"}))
    (row,) = read_rows(path, columns=Columns({}, frozenset([key])))
    assert row.history == (u("The town is"),)
    (row,) = read_rows(parquet(tmp_path / "y", {**texts, key: [None], "score": [1.5]}))
    assert row.history == (u("The town is"),)


# ----------------------------------------------------------------------- columns and ignore_columns


def test_columns_rename(tmp_path):
    record = {"question": "q", "answer": "r", "system_prompt": "s", "uid": 7, "kind": "dates"}
    mapping = {"prompt": "question", "response": "answer", "system": "system_prompt", "id": "uid"}
    (row,) = read(tmp_path, record, mapping=mapping)
    assert (row.id, row.history, row.response) == ("7", (s("s"), u("q")), "r")
    assert (row.kind, row.answer) == ("dates", None)  # the answer is the response alone
    record = {"talk": [u("q"), a("r")], "best": "b", "worst": "w"}
    assert read(tmp_path, record, mapping={"messages": "talk"})[0].response == "r"
    pair = {"prompt": "q", "best": "b", "worst": "w"}
    (row,) = read(tmp_path, pair, mapping={"chosen": "best", "rejected": "worst"})
    assert (row.history, row.response, row.rejected) == ((u("q"),), "b", "w")
    path = parquet(tmp_path / "p", {"source": ["q"], "output": ["r"]})  # metadata by the table
    (row,) = read_rows(path, columns=Columns({"prompt": "source"}))
    assert row.history == (u("q"),)


def test_columns_that_are_wrong(tmp_path):
    with pytest.raises(InputError, match=r"x:1: .*columns.prompt=qestion: the row has no such key"):
        read(tmp_path, {"question": "q", "response": "r"}, mapping={"prompt": "qestion"})
    with pytest.raises(InputError, match=r"columns.system=sytem: no row has such a key"):
        read(tmp_path, GOOD, mapping={"system": "sytem"})
    with pytest.raises(InputError, match=r"x:1: prompt: is there, and columns.prompt=question"):
        read(
            tmp_path,
            {"question": "q", "prompt": "p", "response": "r"},
            mapping={"prompt": "question"},
        )
    with pytest.raises(InputError, match=r"columns.id=uid: no row has such a key"):
        read(tmp_path, GOOD, mapping={"id": "uid"})
    with pytest.raises(InputError, match=r"columns.prompt=x: is left out by ignore_columns"):
        read(tmp_path, GOOD, mapping={"prompt": "x"}, ignored=["x"])
    with pytest.raises(InputError, match=r"columns.prompt=x: is read as another key too"):
        read(tmp_path, GOOD, mapping={"prompt": "x", "response": "x"})


def test_ignored_keys_that_no_row_has_are_named(tmp_path, capfd):
    turn = {**a("r"), "weight": 0}
    read(tmp_path, {"messages": [u("q"), turn], "tools": 1}, ignored=["weight", "tools", "tols"])
    assert "ignore_columns: no row has tols\n" in capfd.readouterr().err


def test_a_file_that_has_the_own_name_of_a_key_is_read_by_it(tmp_path, capfd):
    """As one of a mixture, or the held-out file, may."""
    columns = Columns(
        {"prompt": "question", "response": "answer", "id": "uid"}, frozenset(["tools"])
    )
    theirs = {"question": "q", "answer": "r", "uid": 7, "tools": [1]}
    ours = {"prompt": "p", "response": "t", "id": 8}
    filled = {**dict.fromkeys(theirs), **ours}  # as loaders do with rows of several files
    rows = read_rows(write(tmp_path / "x", theirs, ours, filled), columns=columns)
    assert [(r.id, r.history[0]["content"], r.response) for r in rows] == [
        ("7", "q", "r"),
        ("8", "p", "t"),
        ("8#2", "p", "t"),
    ]
    assert "WARNING" not in capfd.readouterr().err
    reading = Reading(columns=columns)
    for number, record in enumerate((theirs, ours)):
        list(iter_rows(write(tmp_path / str(number), record), reading))
    assert "WARNING" not in capfd.readouterr().err  # the first file has the names
    list(iter_rows(tmp_path / "1", Reading(columns=columns)))
    said = capfd.readouterr().err
    assert "columns.prompt=question: no row has such a key; prompt is read under its own" in said
    assert "ignore_columns: no row has tools" in said
    both = {**theirs, "prompt": "p"}
    with pytest.raises(InputError, match="x:1: prompt: is there, and columns.prompt=question"):
        read_rows(write(tmp_path / "x", both), columns=columns)


def test_errors_name_the_column_of_the_file(tmp_path):
    mapping = {"prompt": "question", "response": "answer"}
    for value, what in ((0.5, "is the number 0.5"), (True, "is a boolean"), ([], "is empty")):
        with pytest.raises(
            InputError, match=rf"x:1: answer \(columns.response\): {what}|x:1: .*empty"
        ):
            read(tmp_path, {"question": "q", "answer": value}, mapping=mapping)


def test_whole_numbers_are_answers(tmp_path, capfd):
    rows = [{"prompt": f"{i} + 1?", "response": i + 1} for i in range(700)]
    rows += [{"prompt": "2?", "chosen": 2, "rejected": -3}]
    found = read(tmp_path, *rows)
    assert [row.response for row in found[:2]] == ["1", "2"] and found[-1].rejected == "-3"
    assert "data: 702 rows have a whole number as an answer" in capfd.readouterr().err
    for value in (0.1, 2.0, 1e30):
        with pytest.raises(InputError, match="x:1: response: is the number .*; expected text"):
            read(tmp_path, {"prompt": "q", "response": value})


def test_nan_says_nothing(tmp_path, capfd):
    """It is how pandas writes a missing value."""
    nan = b'{"prompt": "q", "response": "r", "id": NaN, "score": NaN, "weight": NaN, "note": NaN}'
    (row,) = read(tmp_path, nan)
    assert (row.history, row.response) == ((u("q"),), "r") and len(row.id) == 16
    assert "score (1 rows)" in capfd.readouterr().err
    for line, message in (
        (b'{"prompt": NaN, "response": "r"}', "prompt: is a number"),
        (b'{"prompt": "q", "response": NaN}', "response: is the number nan"),
        (b'{"prompt": "q", "response": Infinity}', "response: is the number inf"),
        (b'{"prompt": "q", "response": "r", "id": Infinity}', "id: is inf"),
        (b'{"prompt": "q", "response": "r", "answer": Infinity}', "answer: cannot be kept"),
        (b'{"prompt": "q", "response": "r", "weight": Infinity}', "weight: carries meaning"),
    ):
        with pytest.raises(InputError, match=f"x:1: {message}"):
            read(tmp_path, line)


def test_names_are_printed_escaped(tmp_path, capfd):
    keys = {"\x1b[31mred\nline": "x", "bell\a_id": "x"}
    read(tmp_path, {**GOOD, **keys}, ignored=["no\nne"])
    turn = {**u("q"), "\x1bmood": "glad"}
    path = parquet(tmp_path / "y", {"messages": [[turn, a("r")]], "\x1bsize": [1]})
    read_rows(path)
    said = capfd.readouterr().err
    assert said.isascii() and "\x1b" not in said and "\a" not in said
    for name in (r"\x1b[31mred\nline", r"bell\x07_id", r"no\nne", r"\x1bmood", r"\x1bsize"):
        assert name in said


def test_the_keys_of_turns_are_counted(tmp_path, capfd):
    rows = [
        {"messages": [{**u("q"), "name": "x"}, {**a("r"), "source": "web", "name": None}]}
    ] * 600
    read(tmp_path, *rows, {**GOOD, "source": "web"})
    said = capfd.readouterr().err
    assert "source (1 rows), name (600 turns), source (600 turns)" in said


def test_what_no_program_checks_is_named(tmp_path, capfd):
    pair = {"prompt": "q", "response": "r"}
    rows = [
        {**pair, "answer": "42"},
        {**pair, "kind": "own", "answer": 1},
        {**pair, "kind": "dates"},
    ]
    read(tmp_path, *rows, {**pair, "kind": "", "answer": ""})
    assert "train on: answer (2 rows), kind (1 rows)" in capfd.readouterr().err


def test_the_keys_of_a_run():
    options = ["columns={prompt: question, response: answer}", "columns.system=sys"]
    config = load_config(RunConfig, None, [*options, "ignore_columns=[tools]"])
    named = {"prompt": "question", "response": "answer", "system": "sys"}
    assert config.data_columns == Columns(named, frozenset({"tools"}))
    with pytest.raises(InputError, match="columns.promt: unknown key; did you mean columns.prompt"):
        load_config(RunConfig, None, ["columns={promt: question}"])
    with pytest.raises(InputError, match=r"columns.prompt=tools: is left out by ignore_columns"):
        load_config(RunConfig, None, ["columns.prompt=tools", "ignore_columns=[tools]"])


def test_bad_rows_skip_counts_refused_keys(tmp_path, caplog):
    rows = [{"prompt": str(i), "response": "r"} for i in range(199)]
    odd = {"prompt": "q", "response": "r", "tools": [{"name": "clock"}]}
    assert len(read(tmp_path, *rows, odd, bad_rows="skip")) == 199
    assert "skipped 1 of 200 rows" in caplog.text
    json.dumps(rows)
