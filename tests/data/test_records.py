"""Files of every kind: compressed, JSON arrays, Arrow, pointers; and the pieces of each."""

import datetime
import gzip
import json
import pickle
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
from faults import forget_peak, peak
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_rows import GOOD, a, parquet, u, write

from ldalign.data import records
from ldalign.data.columns import Columns
from ldalign.data.reading import Reading, Tally, iter_chunks, iter_rows, read_chunk, read_rows
from ldalign.data.records import MAX_ROW_BYTES, json_lines
from ldalign.data.rows import RowNames
from ldalign.data.sources import files_of
from ldalign.data.store import data_hash
from ldalign.system.errors import InputError

ROWS = [{"prompt": f"q{i}", "response": "r" * 300, "id": i} for i in range(9000)]  # several chunks


def zstd(path, content):
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)
    return path


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows):
    return pa.table({key: [row[key] for row in rows] for key in rows[0]})


def arrow(path, rows, new=pa.ipc.new_stream):
    with pa.OSFile(str(path), "wb") as sink, new(sink, table(rows).schema) as writer:
        writer.write_table(table(rows), max_chunksize=1000)
    return path


def make(kind, path):
    if kind == "jsonl":
        path.write_bytes(lines(ROWS))
    elif kind == "gzip":
        path.write_bytes(gzip.compress(lines(ROWS[:4000])) + gzip.compress(lines(ROWS[4000:])))
    elif kind == "zstd":
        zstd(path, lines(ROWS))
    elif kind == "array":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "array in gzip":
        path.write_bytes(gzip.compress(b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode()))
    elif kind == "parquet":
        parquet(path, {key: [row[key] for row in ROWS] for key in ROWS[0]})
    elif kind == "Arrow stream":
        arrow(path, ROWS)
    elif kind == "Arrow file":
        arrow(path, ROWS, pa.ipc.new_file)
    return path


KINDS = ["jsonl", "gzip", "zstd", "array", "array in gzip", "parquet", "Arrow stream", "Arrow file"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_the_same_rows(tmp_path, kind):
    path = make(kind, tmp_path / "x")
    expected = read_rows(make("jsonl", tmp_path / "y"))
    rows = read_rows(path)
    assert data_hash(rows) == data_hash(expected)
    assert [row.where for row in rows] == [f"{path}:{i + 1}" for i in range(len(ROWS))]


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_can_be_read_elsewhere(tmp_path, kind):
    """The pieces of a file go to other processes: what comes back is what one process reads."""
    path, reading = make(kind, tmp_path / "x"), Reading()
    tally, names, rows = Tally(), RowNames(), []
    sent = [pickle.dumps(chunk) for chunk in iter_chunks(files_of(path), Columns())]
    assert len(sent) > 1 and max(map(len, sent)) < 2 * records.CHUNK_BYTES
    for chunk in map(pickle.loads, sent):
        found, part = pickle.loads(pickle.dumps(read_chunk(chunk, reading)))  # noqa: S301
        tally.add(part, reading)
        rows += [names.named(row) for row in found]
    tally.finish(reading)
    assert rows == read_rows(path) and (tally.good, tally.rows) == (9000, 9000)


def test_rows_come_before_the_file_is_read_to_its_end(tmp_path):
    path = write(tmp_path / "x", *ROWS, b"{")
    rows = iter_rows(path)
    assert next(rows).id == "0"
    with pytest.raises(InputError, match="x:9001:2: broken JSON"):
        list(rows)


@pytest.mark.parametrize("size", [3, 10, 40, -1, -9])
@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_compressed_file_that_is_cut(tmp_path, kind, size):
    path = make(kind, tmp_path / "x")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=rf"^{path}[: ]") as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_a_key_that_is_given_twice_is_not_guessed(tmp_path, bad_rows):
    """Python's json takes the last one, without a word."""
    twice = '{"prompt": "q", "response": "one", "response": "two"}'
    inside = (
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "role": "user"}]}'
    )
    for line, key in ((twice, "response"), (inside, "role")):
        path = tmp_path / f"{key}.jsonl"
        path.write_text("\n".join([json.dumps(GOOD)] * 200 + [line]))
        if bad_rows == "error":
            message = rf"{key}.jsonl:201: broken JSON: the key '{key}' is given twice in one object"
            with pytest.raises(InputError, match=message):
                read_rows(path)
        else:
            assert len(read_rows(path, bad_rows="skip")) == 200


def test_a_line_that_is_decompressed_without_end(tmp_path):
    path = tmp_path / "x.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"prompt": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
    before = forget_peak()
    with pytest.raises(InputError, match="x.gz:1: the line is longer than 8388608 bytes"):
        read_rows(path)
    assert peak() - before < 60 * 2**20


@pytest.mark.parametrize("size", [8, 50, 300, -1, -40])
@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_an_arrow_file_that_is_cut(tmp_path, new, size):
    path = arrow(tmp_path / "x", ROWS[:50], new)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=f"^{path}: ") as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)


def test_an_arrow_stream_that_is_cut_between_two_batches(tmp_path):
    """It looks whole but for its end mark."""
    path, ends = tmp_path / "x", []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table(ROWS).schema) as writer:
        for batch in table(ROWS[:3000]).to_batches(1000):
            writer.write_batch(batch)
            ends.append(sink.tell())
    whole = path.read_bytes()
    assert len(read_rows(path)) == 3000 and whole[ends[-1] :] == records.ARROW_END
    for number, end in enumerate(ends, start=1):
        path.write_bytes(whole[:end])
        with pytest.raises(
            InputError, match=f"x: broken Arrow file after row {number}000: .*end mark"
        ):
            read_rows(path)
    path.write_bytes(whole + whole)
    with pytest.raises(
        InputError, match="x: broken Arrow file after row 3000: something stands behi"
    ):
        read_rows(path)


def test_a_damaged_piece_of_a_parquet_file_names_the_rows_before_it(tmp_path):
    path = tmp_path / "x"
    rows = table(ROWS[: 3 * records.CHUNK_ROWS])
    pyarrow.parquet.write_table(rows, path, row_group_size=records.CHUNK_ROWS, compression="zstd")
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(2)
    content, start = bytearray(path.read_bytes()), group.column(0).data_page_offset
    content[start : start + 64] = b"\xff" * 64
    path.write_bytes(content)
    read = iter_rows(path)
    assert sum(1 for _ in zip(range(2 * records.CHUNK_ROWS), read, strict=False)) == 512
    with pytest.raises(InputError, match="^[^ ]*x: broken parquet file after row 512: "):
        next(read)


@pytest.mark.parametrize("kind", ["parquet", "Arrow stream", "Arrow file"])
def test_columns_that_say_nothing_are_not_read(tmp_path, kind):
    path, rows = tmp_path / "x", [{**row, "number": i} for i, row in enumerate(ROWS[:9])]
    if kind == "parquet":
        pyarrow.parquet.write_table(table(rows), path)
    else:
        arrow(path, rows, pa.ipc.new_stream if kind == "Arrow stream" else pa.ipc.new_file)
    for chunk in records.chunks(path):
        assert chunk.unread == ("number",)
        assert all(record.keys() == {"prompt", "response", "id"} for _, record in chunk.records())


def test_an_array_comes_in_pieces(tmp_path):
    sizes = [len(list(chunk.records())) for chunk in records.chunks(make("array", tmp_path / "x"))]
    size = records.CHUNK_ROWS
    assert sizes == [size] * (len(ROWS) // size) + [len(ROWS) % size]


def test_a_saved_part_of_a_data_set(tmp_path):
    """`select` keeps what is said of the whole in dataset_info.json: that is no fault."""
    arrow(tmp_path / "data-00000-of-00001.arrow", ROWS[:60])
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    info = {"splits": {"train": {"name": "train", "num_examples": 80}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert len(read_rows(tmp_path)) == 60


@pytest.mark.parametrize("kind", ["parquet", "Arrow stream", "Arrow file"])
def test_two_columns_of_one_name_are_refused(tmp_path, kind):
    path = tmp_path / "x"
    twice = pa.Table.from_arrays(
        [pa.array([v]) for v in "abc"], names=["prompt", "prompt", "response"]
    )
    if kind == "parquet":
        pa.parquet.write_table(twice, path)
    else:
        new = pa.ipc.new_stream if kind == "Arrow stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, twice.schema) as writer:
            writer.write_table(twice)
    with pytest.raises(InputError, match="x: has two columns of the name 'prompt'"):
        read_rows(path)


def test_a_zstd_file_may_begin_with_a_frame_to_skip(tmp_path):
    path = zstd(tmp_path / "x", lines(ROWS[:50]))
    whole = path.read_bytes()
    for magic in (0x50, 0x5F):
        path.write_bytes(bytes([magic]) + b"\x2a\x4d\x18\x04\0\0\0abcd" + whole)
        assert len(read_rows(path)) == 50


@pytest.mark.parametrize(
    ("name", "content", "is_csv"),
    [
        ("x.csv", b"prompt,response\nhi,there\n", True),
        ("x.CSV.gz", gzip.compress(b"a,b\n1,2\n", mtime=0), True),
        ("x.tsv", b"1\n2\n", True),
        ("x.jsonl", b'\xef\xbb\xbf\n"Question"\tanswer\r\nhi\tthere\n', True),
        ("x.csv", json.dumps(GOOD).encode(), False),
        ("x.jsonl", b"hello, world\n", False),
        ("x.jsonl", b"prompt\n", False),
    ],
)
def test_csv_is_named(tmp_path, name, content, is_csv):
    path = tmp_path / name
    path.write_bytes(content)
    if json.dumps(GOOD).encode() == content:
        assert len(read_rows(path)) == 1
        return
    with pytest.raises(InputError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert ("CSV is not read" in message) == is_csv and "\n" not in message


def test_the_conversion_of_csv_that_is_named_works(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('prompt\tresponse\nq\t"r\nand more"\n')
    with pytest.raises(InputError) as caught:
        read_rows(path)
    program = str(caught.value).split("python -c '")[1].removesuffix("'")
    subprocess.run([sys.executable, "-c", program], check=True)
    assert read_rows(tmp_path / "x.parquet")[0].response == "r\nand more"


@pytest.mark.parametrize("name", ["it's.csv", 'a"b.csv', "$x.csv"])
def test_no_name_that_a_shell_reads_otherwise_is_in_the_conversion(tmp_path, name):
    (tmp_path / name).write_text("prompt,response\nq,r\n")
    with pytest.raises(InputError) as caught:
        read_rows(tmp_path / name)
    assert ('c.read_csv("IN", ' in str(caught.value)) and '"OUT.parquet")' in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-16-be"])
def test_another_encoding_than_utf8_is_named(tmp_path, encoding):
    path = tmp_path / "x"
    path.write_bytes('{"prompt": "caf\u00e9", "response": "r"}\n'.encode(encoding))
    with pytest.raises(InputError, match=r"x:1:\d+: .*save[d it]* as UTF-8"):
        read_rows(path)


def test_a_git_lfs_pointer_is_named(tmp_path):
    for name in ("x.parquet", "x.jsonl"):
        (tmp_path / name).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123456\n"
        )
        with pytest.raises(InputError, match=rf"{name}: is a Git LFS pointer.*git lfs pull"):
            read_rows(tmp_path / name)


# ------------------------------------------------------------------------------------- JSON arrays


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", ":1: broken JSON array: the file ends|:1: broken JSON array: Expecting value"),
        ("[{}", ":1: broken JSON array: the file ends where , or ] was expected"),
        ("[{} {}]", ":1: broken JSON array: '{' stands where , or ] was expected"),
        ("[GOOD, {]", ":2: broken JSON array: Expecting property name"),
        ("[GOOD, NaN]", ":2: the row is a number"),
        (
            '[{"messages": "' + "\u00e9" * (MAX_ROW_BYTES // 2) + '"}]',
            ":1: .*: the value is longer than",
        ),
        (
            '[GOOD, {"a": 1, "a": 1}]',
            ":2: broken JSON array: the key 'a' is given twice in one obj",
        ),
        ("[GOOD] x", ":1: broken JSON array: something stands behind the array"),
        ("[GOOD, 3]", ":2: the row is a number"),
        ("[GOOD, " + "[" * 20000, ":2: broken JSON array: nested too deeply"),
        ('[GOOD, "\udcff"]', ":2: broken JSON array: not UTF-8 text|:1: .*not UTF-8 text"),
        ("[]", ": holds no rows"),
        ('[GOOD, "' + "x" * (MAX_ROW_BYTES + 9), ":2: broken JSON array: .*, within 8388608 bytes"),
    ],
    ids=lambda value: value[:20],
)
def test_a_broken_array(tmp_path, text, message):
    path = tmp_path / "x.json"
    text = text.replace("GOOD", json.dumps(GOOD))
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=rf"x\.json({message})"):
        read_rows(path, bad_rows="skip" if "broken" in message else "error")


def test_an_array_is_not_held_in_memory(tmp_path):
    path = tmp_path / "x.json"
    with path.open("w") as file:
        file.write("[")
        for i in range(60_000):
            file.write(("," if i else "") + json.dumps({"prompt": str(i), "response": "r" * 1000}))
        file.write("]")
    before = forget_peak()
    assert sum(1 for _ in iter_rows(path)) == 60_000
    assert peak() - before < 40 * 2**20 < path.stat().st_size


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(
    max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.lists(JSON, min_size=1, max_size=6), st.sampled_from([None, 2]), st.booleans())
def test_an_array_is_read_as_json_reads_it(tmp_path, monkeypatch, values, indent, ascii_only):
    """However the pieces of the file fall."""
    monkeypatch.setattr(records._Array, "PIECE", 1)
    path = tmp_path / "x"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    found = [value for chunk in records.chunks(path) for _, value in chunk.records()]
    assert found == values


def test_a_pretty_printed_object_gets_a_hint(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"data": [u("q"), a("r")]}, indent=2))
    with pytest.raises(InputError, match=r"x.json:1:2: broken JSON.*expected one JSON object a li"):
        read_rows(path)


def test_lines_of_a_table_and_what_no_json_holds(tmp_path):
    """Of every column where none are named; a date is refused by its file and row."""
    path = tmp_path / "rows.parquet"
    day = datetime.date(2026, 1, 2)
    rows = [{"id": "a", "at": "now"}, {"id": "b", "at": "then"}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    assert list(json_lines(path)) == [(f"{path}:1", rows[0]), (f"{path}:2", rows[1])]
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"id": "a", "prompt": day}]), path)
    with pytest.raises(InputError, match=r"rows\.parquet:1: cannot be kept as JSON: .*date"):
        list(json_lines(path))
