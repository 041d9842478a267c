"""Every input shape, every bad row with its place, ids; then arbitrary bytes and chats."""

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_rows import GOOD, a, parquet, s, u, write

from ldalign.data.pairs import Pairs
from ldalign.data.ragged import TokenLists
from ldalign.data.reading import read_rows
from ldalign.data.records import MAX_ROW_BYTES
from ldalign.data.rows import Row
from ldalign.data.store import Split, data_hash, tokens_hash
from ldalign.system.errors import InputError

# ------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("record", "history", "response", "rejected"),
    [
        ({"messages": [u("q"), a("r")]}, [u("q")], "r", None),
        ({"prompt": " q", "messages": [s("s"), u("q"), a("r")]}, [s("s"), u("q")], "r", None),
        ({"messages": [s(""), u("q"), a("r"), u("trailing")]}, [s(""), u("q")], "r", None),
        ({"prompt": "q", "response": "r"}, [u("q")], "r", None),
        ({"prompt": "q", "completion": " r "}, [u("q")], " r ", None),
        ({"prompt": [s("s"), u("q")], "completion": [a("r")]}, [s("s"), u("q")], "r", None),
        ({"real": [u("q"), a("r")], "generated": [u("q"), a("g")]}, [u("q")], "r", "g"),
        (
            {
                "real": [u("q"), a("x"), u("p"), a("r")],
                "generated": [u("q"), a("x"), u("p"), a("g")],
            },
            [u("q"), a("x"), u("p")],
            "r",
            "g",
        ),
        ({"prompt": "q", "chosen": "r", "rejected": "g"}, [u("q")], "r", "g"),
        (
            {"prompt": [s("s"), u("q")], "chosen": [a("r")], "rejected": [a("g")]},
            [s("s"), u("q")],
            "r",
            "g",
        ),
        ({"chosen": [u("q"), a("r")], "rejected": [u("q"), a("g")]}, [u("q")], "r", "g"),
        (
            {
                "prompt": "q",
                "prompt_id": "1",
                "messages": [u("q"), a("r")],
                "score_chosen": 8.0,
                "chosen": [u("q"), a("r")],
                "rejected": [u("q"), a("g")],
            },
            [u("q")],
            "r",
            "g",
        ),  # UltraFeedback binarized
        ({"prompt": [u("q")], "chosen": "r", "rejected": [u("q"), a("g")]}, [u("q")], "r", "g"),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            [u("The sky is")],
            "blue.",
            "black.",
        ),
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, [u("q")], "same", "same"),
        (
            {"messages": [{**u("q"), "name": "x"}, a("r")], "real": None, "generated": None},
            [u("q")],
            "r",
            None,
        ),
    ],
)
def test_shapes(tmp_path, record, history, response, rejected):
    path = write(tmp_path / "x", record)
    (row,) = read_rows(path)
    assert (list(row.history), row.response, row.rejected) == (history, response, rejected)
    assert row.where == f"{path}:1"


def test_turns(tmp_path):
    chat = [s("s"), u("1"), a("2"), u("3"), a("4")]
    path = write(tmp_path / "x.jsonl", {"messages": chat, "id": 7}, {"messages": chat[1:3]})
    first, last, every = (read_rows(path, turns=turns) for turns in ("first", "last", "all"))
    assert [(r.history, r.response) for r in first] == [((s("s"), u("1")), "2"), ((u("1"),), "2")]
    assert [(r.history, r.response) for r in last] == [(tuple(chat[:4]), "4"), ((u("1"),), "2")]
    assert [(r.id, r.response) for r in every[:2]] == [("7/0", "2"), ("7/1", "4")]
    assert [r.history for r in every] == [first[0].history, last[0].history, (u("1"),)]
    assert (first[0].id, last[0].id) == ("7", "7")


def test_kind_and_answer_are_kept(tmp_path):
    (row,) = read_rows(
        write(tmp_path / "x", {**GOOD, "kind": "dates", "answer": {"day": 3}, "other": 1})
    )
    assert (row.kind, row.answer) == ("dates", {"day": 3})


# ----------------------------------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"messages": [}', r":2:15: broken JSON"),
        (b'{"prompt": "q",', r":2:16: broken JSON"),
        (b"[" + json.dumps(GOOD).encode(), r":2:\d+: broken JSON.*not a JSON array"),
        (b'{"prompt": "\xff"}', r":2:13: not UTF-8"),
        (b'{"prompt": "q\\u0000", "response": "r"}', ":2: prompt: holds a NUL"),
        (b'{"prompt": "q\0", "response": "r"}', r":2:\d+: broken JSON: Invalid control character"),
        (b'{"prompt": "q", "response": "\\ud800"}', ":2: response: holds half of a surrogate pair"),
        (
            b'{"prompt": "q", "response": "r", "id": "\\udfff"}',
            ":2: id: holds half of a surrogate pair",
        ),
        (b'{"prompt": "q", "response": "r", "answer": "\\udfff"}', ":2: answer: cannot be kept"),
        (b"[" * 10_000, ":2: broken JSON: nested too deeply"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, ":2: broken JSON: nested too deeply"),
        (b"1" * 10_000, ":2: broken JSON: Exceeds the limit"),
        (
            b'{"prompt": "' + b"x" * MAX_ROW_BYTES + b'"}',
            ":2: the line is longer than 8388608 bytes",
        ),
        (b"[]", ":2: the row is a list"),
        (b"null", ":2: the row is null"),
        (b"3", ":2: the row is a number"),
        (b"{}", ":2: no known shape.*found no keys"),
        (b'{"text": "x", "label": 3}', ":2: no known shape.*found 'text', 'label'"),
        (b'{"prompt": "q", "chosen": "r"}', ":2: no known shape"),
        (b'{"prompt": "q"}', r":2: prompt: has no answer beside it; expected response \| comp"),
        (b'{"instruction": "q", "answer": "r"}', ":2: instruction: .*columns: {response: answer}"),
        (b'{"data": [{"prompt": "q"}]}', ":2: no known shape.*where 'data' is the list of rows"),
        (b'{"messages": null}', ":2: no known shape"),
        ({"messages": {}}, ":2: messages: is an object"),
        ({"messages": []}, ":2: messages: is empty"),
        ({"messages": ["q"]}, ":2: messages: turn 1 is text"),
        (
            {"messages": [u("q"), {"role": "tool", "content": "x"}]},
            ":2: messages: turn 2 has role 'tool'.*; leave such rows out",
        ),
        (
            {"messages": [u("q"), {"role": ["x"], "content": "x"}]},
            r":2: messages: turn 2 has role "
            r"\['x'\]",
        ),
        (
            {"messages": [u("q"), {"from": "tool", "value": "x"}]},
            ":2: messages: turn 2 has role 'tool'",
        ),
        ({"messages": [u("q"), a(None)]}, ":2: messages: turn 2 has content of type null"),
        (
            {"messages": [u([{"type": "text"}]), a("r")]},
            ":2: messages: turn 1, part 1: has a text of type null",
        ),
        ({"messages": [u("q")]}, ":2: messages: no assistant turn"),
        (
            {"messages": [u("q"), a("x"), a("r")]},
            ":2: messages: turn 3 is assistant; expected user.*; join the two turns of the as",
        ),
        (
            {"messages": [u("q"), u("q"), a("r")]},
            ":2: messages: turn 2 is user; expected assistant.*; join the two turns of the user",
        ),
        (
            {"messages": [a("hello"), u("q"), a("r")]},
            ":2: messages: turn 1 is assistant; expected user.*; leave that turn out",
        ),
        (
            {"messages": [u("q"), s("late"), a("r")]},
            ":2: messages: turn 2 is system; expected assistant.*; a system turn is the first",
        ),
        ({"messages": [u("q"), a(" \n")]}, r":2: messages: turn 2 \(assistant\) is empty"),
        ({"messages": [u(""), a("r")]}, r":2: messages: turn 1 \(user\) is empty"),
        ({"prompt": "q", "response": ""}, ":2: response: turn 2 .*empty"),
        ({"prompt": "q", "response": True}, ":2: response: is a boolean; expected text"),
        ({"prompt": 3, "response": "r"}, ":2: prompt: is a number"),
        (
            {"prompt": [u("q"), a("x")], "response": "r"},
            ":2: prompt: ends with a turn of the assistant",
        ),
        ({"prompt": "q", "chosen": "r", "rejected": " "}, ":2: rejected: turn 2 .*empty"),
        (
            {"prompt": "q", "chosen": [u("q")], "rejected": "g"},
            ":2: chosen: ends with a turn of the user",
        ),
        ({"chosen": [a("r")], "rejected": [a("g")]}, ":2: chosen: an answer without a prompt"),
        (
            {"chosen": [u("q"), a("r")], "rejected": [u("p"), a("g")]},
            ":2: chosen and rejected differ before",
        ),
        ({"real": "abc", "generated": "xyz"}, ":2: real and generated share no prompt"),
        ({**GOOD, "id": [1]}, r":2: id: is \[1\]"),
        ({**GOOD, "id": 1.5}, ":2: id: is 1.5; .*ignore_columns"),
        ({**GOOD, "id": 1e17}, ":2: id: is 1e"),
        ({**GOOD, "id": True}, ":2: id: is True"),
        ({**GOOD, "conversation_id": [1]}, r":2: conversation_id: is \[1\]"),
        ({**GOOD, "kind": 1}, ":2: kind: is a number"),
    ],
)
def test_bad_row_names_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "rows.jsonl", GOOD, line, GOOD)
    with pytest.raises(InputError, match=r"rows\.jsonl" + message) as caught:
        read_rows(path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_skip_up_to_one_percent(tmp_path, caplog):
    rows = [{"prompt": str(i), "response": "r"} for i in range(198)]
    path = write(tmp_path / "x", b"{", *rows, b"x" * (3 * MAX_ROW_BYTES))  # 2 of 200
    caplog.set_level("WARNING")
    assert [row.where for row in read_rows(path, bad_rows="skip")] == [
        f"{path}:{i}" for i in range(2, 200)
    ]
    assert f"skipped 2 of 200 rows; the first: {path}:1:2: broken JSON" in caplog.text
    path = write(tmp_path / "x", b"{", *rows, b"[]", b"[]")
    with pytest.raises(InputError, match=r"x:1:2: broken JSON.*; 3 of 201 rows are bad"):
        read_rows(path, bad_rows="skip")
    with pytest.raises(InputError, match="1 of 1 rows are bad"):
        read_rows(write(tmp_path / "y", b"{"), bad_rows="skip")


def test_bom_crlf_blank_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf\r\n"
        + json.dumps(GOOD).encode()
        + b"\r\n \t\r\n\n"
        + json.dumps(GOOD).encode()
    )
    assert [row.where for row in read_rows(path)] == [f"{path}:2", f"{path}:5"]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n{\r\n")
    with pytest.raises(InputError, match=r":3:2: broken JSON"):
        read_rows(path)


def test_line_separators_inside_a_text_do_not_split_it(tmp_path):
    text = "a\u2028b\u2029c\x85d"
    (row,) = read_rows(write(tmp_path / "x", {"prompt": text, "response": text}))
    assert (row.history[0]["content"], row.response) == (text, text)


# -------------------------------------------------------------------------------------------- files


def test_file_folder_glob_list(tmp_path):
    one, two = (
        write(tmp_path / "b.jsonl", GOOD),
        write(tmp_path / "a.json", {"prompt": "2", "response": "r"}),
    )
    write(tmp_path / ".hidden", GOOD)
    (tmp_path / "README.md").write_text("# not data")
    names = [f"{two}:1", f"{one}:1"]
    assert [row.where for row in read_rows(tmp_path)] == names
    assert [row.where for row in read_rows(f"{tmp_path}/*.json*")] == names
    assert [row.where for row in read_rows([two, str(one)])] == names


@pytest.mark.parametrize(
    "spec",
    [
        "nowhere",
        "*.nothing",
        "empty",
        "empty.jsonl",
        "blank.jsonl",
        [],
        [3],
        [{"path": "x"}],
        "",
        None,
    ],
)
def test_nothing_to_read_is_an_input_error(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_bytes(b"\n \r\n")
    with pytest.raises(InputError):
        read_rows(spec)


def test_bad_options(tmp_path):
    path = write(tmp_path / "x", GOOD)
    with pytest.raises(InputError, match="turns='final'"):
        read_rows(path, turns="final")
    with pytest.raises(InputError, match="bad_rows='ignore'"):
        read_rows(path, bad_rows="ignore")


# ----------------------------------------------------------------------------------- ids and hashes


def test_ids_are_distinct_and_stable(tmp_path):
    other = {"prompt": "x", "response": "y", "id": "k"}
    records = [GOOD, {**GOOD, "id": "k"}, GOOD, other, {**GOOD, "id": "k#2"}, GOOD]
    rows = read_rows(write(tmp_path / "x", *records))
    base = rows[0].id
    assert [row.id for row in rows] == [base, "k", f"{base}#2", "k#2", "k#2#2", f"{base}#3"]
    again = read_rows(write(tmp_path / "elsewhere", b"", *records))
    assert [row.id for row in again] == [row.id for row in rows]
    assert data_hash(again) == data_hash(rows)
    (same,) = read_rows(write(tmp_path / "y", {"prompt": "q", "response": "r"}))
    assert same.id == base  # the content counts, not the shape it came in
    odd = read_rows(
        write(tmp_path / "z", {**GOOD, "id": ""}, {**GOOD, "id": 3.0}, {**GOOD, "id": 3})
    )
    assert [row.id for row in odd] == [base, "3", "3#2"]


def test_data_hash_sees_content_and_order():
    row = Row("i", (u("q"),), "r", "g", "kind", [1], "f:1")
    changed = [
        Row("j", (u("q"),), "r", "g", "kind", [1]),
        Row("i", (u("Q"),), "r", "g", "kind", [1]),
        Row("i", (u("q"),), "R", "g", "kind", [1]),
        Row("i", (u("q"),), "r", None, "kind", [1]),
        Row("i", (u("q"),), "r", "g", None, [1]),
        Row("i", (u("q"),), "r", "g", "kind", [2]),
    ]
    assert len({data_hash([r]) for r in [row, *changed]}) == 7
    assert data_hash([row, changed[0]]) != data_hash([changed[0], row])
    assert data_hash([row]) == data_hash([Row("i", (u("q"),), "r", "g", "kind", [1], "elsewhere")])


# ------------------------------------------------------------------------------------------ parquet


def test_tokens_hash_sees_tokens_order_and_borders():
    def split(*lists):
        prompts, real, rejected = (None if x is None else TokenLists.of(x) for x in lists)
        return Split([], Pairs(["a", "b"], prompts, real), rejected)

    plain = [[[1, 2], [3]], [[4], [5, 6]], None]
    changed = [
        [[[1, 9], [3]], plain[1], None],
        [plain[0], [[4], [5, 9]], None],
        [[[3], [1, 2]], plain[1], None],
        [[[1], [2, 3]], plain[1], None],
        [plain[0], [[4, 5], [6]], None],
        [plain[0], plain[1], [[7], [8]]],
        [plain[0], plain[1], [[7], [9]]],
    ]
    assert len({tokens_hash(split(*lists)) for lists in (plain, *changed)}) == 8
    halves = split(*plain)
    reversed_rows = Split([], halves.pairs.take([1, 0]), None)
    assert tokens_hash(reversed_rows) != tokens_hash(halves)


def test_parquet_is_told_by_content(tmp_path):
    chats = [[u(f"q{i}"), a(f"r{i}")] for i in range(1000)]  # more than one batch
    path = parquet(
        tmp_path / "no_suffix", {"prompt": [c[0]["content"] for c in chats], "messages": chats}
    )
    rows = read_rows(path)
    assert [(row.history, row.response) for row in rows] == [
        ((c[0],), c[1]["content"]) for c in chats
    ]
    assert rows[999].where == f"{path}:1000"
    lines = write(tmp_path / "x.parquet", *({"messages": chat} for chat in chats))
    assert data_hash(read_rows(lines)) == data_hash(rows)


def test_parquet_nulls_and_bad_rows(tmp_path):
    path = parquet(
        tmp_path / "x",
        {
            "prompt": ["q", "q"],
            "chosen": [None, "r"],
            "rejected": [None, "g"],
            "response": ["r", None],
            "when": [1, 2],
        },
    )
    assert [row.rejected for row in read_rows(path)] == [None, "g"]
    with pytest.raises(InputError, match="x:1: messages: is a number"):
        read_rows(parquet(tmp_path / "x", {"messages": [3]}))
    with pytest.raises(InputError, match="x:2: response: .* is empty"):
        read_rows(parquet(tmp_path / "x", {"prompt": ["q", "q"], "response": ["r", ""]}))
    with pytest.raises(InputError, match="x:1: no known shape"):
        read_rows(parquet(tmp_path / "x", {"text": ["q"]}))


@pytest.mark.parametrize("size", [4, 5, 100, -1, -9])
def test_truncated_parquet(tmp_path, size):
    path = parquet(tmp_path / "x", {"prompt": ["q"] * 100, "response": ["r"] * 100})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"x: broken parquet file"):
        read_rows(path)


# --------------------------------------------------------------------------------------- properties

TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1
).filter(str.strip)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)
MANY = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@MANY
@given(
    st.lists(TURNS, min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r\n \r\n"]),
)
def test_any_conversation_comes_back(tmp_path, chats, ascii_only, newline):
    lines = []
    for chat in chats:
        turns = [turn for q, r in chat for turn in (u(q), a(r))]
        lines.append(json.dumps({"messages": turns}, ensure_ascii=ascii_only).encode())
    path = tmp_path / "x"
    path.write_bytes(b"\xef\xbb\xbf" + newline.join(lines))
    rows = read_rows(path, turns="all")
    assert [(row.history[-1]["content"], row.response) for row in rows] == [
        pair for chat in chats for pair in chat
    ]
    assert len({row.id for row in rows}) == len(rows)


KEYS = [
    "messages",
    "prompt",
    "chosen",
    "rejected",
    "real",
    "generated",
    "response",
    "id",
    "role",
    "content",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS), inner)
        | st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system"]), "content": inner}
        )
    ),
    max_leaves=12,
)


SOUND = st.builds(
    lambda prompt, response: {"prompt": prompt, "response": response},
    st.text(min_size=1, max_size=5),
    st.text(min_size=1, max_size=5),
)


def test_any_bytes_give_rows_or_an_input_error(tmp_path):
    """Both happen: among the lines are some that could be rows."""
    path, counts = tmp_path / "x", Counter()

    @MANY
    @given(
        st.lists(
            st.binary(max_size=30) | (JSON | SOUND).map(lambda value: json.dumps(value).encode()),
            max_size=5,
        )
        | st.lists(SOUND.map(lambda value: json.dumps(value).encode()), min_size=1, max_size=3),
        st.booleans(),
    )
    def holds(lines, skip):
        path.write_bytes(b"\n".join(lines))
        try:
            rows = read_rows(path, turns="all", bad_rows="skip" if skip else "error")
        except InputError as error:
            assert str(error).startswith(str(path))
            counts["refused"] += 1
            return
        assert rows
        assert all(row.response.strip() and row.history[-1]["role"] == "user" for row in rows)
        json.dumps([row.response for row in rows], ensure_ascii=False).encode("utf-8")
        counts["read"] += 1

    holds()
    assert counts["read"] > 5 and counts["refused"] > 5
