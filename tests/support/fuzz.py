"""`make fuzz`: readers against damaged and hostile files, which succeed or say what is wrong.

Every outcome must be success or an ldalign error.

    python tests/support/fuzz.py [--count 10000] [--minutes 10] [--seed 0] [--reader NAME ...]
    [--jobs N] [--keep FOLDER]

Each reader gets a real input, changed at random (bytes, JSON values, lines; templates also from a
small grammar), until `count` inputs or `minutes` are over. Inputs are read in child processes, one
a core, many inputs each. A crash, more than 10 s of processor time or 60 s in all, 512 MB more of
memory, or any exception that is not an ldalign error is a failure: the input is kept in FOLDER for
a look, and the run goes on with the next. An input is a function of (seed, reader, number). Exit
code 1 where anything failed.
"""

import argparse
import faulthandler
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from faults import forget_peak, peak

CPU_SECONDS, SECONDS, MEMORY = 10, 60, 512 * 2**20
FORK = multiprocessing.get_context("fork")
# What the readers below import.
USED = (
    "pyarrow.parquet",
    "made_weights",
    "ldalign.data.reading",
    "ldalign.generation.external",
    "ldalign.models.fetch",
    "ldalign.run.settings",
    "ldalign.models.weights",
)
INTEGERS = [
    0,
    1,
    -1,
    7,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    2**64 - 1,
    10**30,
    -(2**63),
]
VALUES: list[Any] = [
    None,
    True,
    False,
    *INTEGERS,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "\0",
    "..",
    "../x",
    "/etc/passwd",
    "é" * 1000,
    "</s>",
    "<|im_end|>",
    [],
    {},
    [[]],
    [None],
    {"": ""},
    {"content": 3},
    "NaN",
    "a/b",
]
SNIPPETS = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b"\n",
    b"\\ud800",
    b"\xef\xbb\xbf",
    b"[" * 5000,
    b"9" * 5000,
    b"NaN",
    b"null",
    b"-",
    b"PAR1",
    b"{%",
    b"%}",
    b"{{",
    b"}}",
    b"&a *a",
    b"!!python/object:os.system",
    b"\xed\xa0\x80",
    b": ",
    b"- ",
    b"|",
    b"\t",
]


# ---------------------------------------------------------------------------------------- mutations


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    """`data` with one to four changes."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        # Headers and counts lie at the beginning: more often there.
        at = draw.randrange(min(len(data), 64) + 1) if draw.random() < 0.3 else at
        upto = min(len(data), at + draw.choice((1, 1, 4, 8, 50, 1000)))
        kind = draw.randrange(7)
        if kind == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[upto:]
        elif kind == 3:
            data = data[:at] + data[at:upto] * draw.choice((2, 3, 50)) + data[upto:]
        elif kind == 4:
            data = data[:at] + draw.choice(SNIPPETS) + data[at:]
        elif kind == 5:
            size = draw.choice((4, 8))
            number = (draw.choice(INTEGERS) % 2 ** (8 * size)).to_bytes(size, "little")
            data = data[:at] + number + data[at + size :]
        else:
            data = data[:at] + draw.randbytes(upto - at) + data[upto:]
    return data[: 2**20]


def change_json(value: Any, draw: random.Random) -> Any:
    """`value` (plain JSON) with one place in it changed."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        out: Any = value.copy()
        action = draw.random()
        if action < 0.1:
            del out[key]
        elif action < 0.2 and isinstance(out, dict):
            out[draw.choice([*keys, "x", "", "auto_map", "type", "__class__"])] = out.pop(key)
        elif action < 0.25 and isinstance(out, list):
            out.insert(key, draw.choice([out[key], draw.choice(VALUES)]))
        else:
            out[key] = change_json(out[key], draw)
        return out
    if isinstance(value, str) and draw.random() < 0.3:
        return change_bytes(value.encode("utf-8", "surrogatepass"), draw).decode("utf-8", "replace")
    return draw.choice(VALUES)


def change_lines(data: bytes, draw: random.Random) -> bytes:
    """JSON Lines with one line's value changed."""
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    try:
        lines[at] = json.dumps(change_json(json.loads(lines[at]), draw)).encode()
    except ValueError:
        pass
    return b"\n".join(lines)


def change_document(data: bytes, draw: random.Random) -> bytes:
    """A JSON document with one to three values changed."""
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = change_json(value, draw)
    return json.dumps(value).encode()


def change_header(data: bytes, draw: random.Random) -> bytes:
    """Changes the JSON header of a safetensors file, and makes the length before it right again."""
    length = int.from_bytes(data[:8], "little")
    header = change_document(data[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


PIECES = (
    "messages",
    "messages[0]",
    "m",
    "m.content",
    "m['role']",
    "loop",
    "loop.index",
    "loop.length",
    "range(5)",
    "range(99999)",
    "range(10**9)",
    "'a'",
    "'%s'",
    "'%99d'",
    "'{:9}'",
    "10",
    "10**9",
    "-1",
    "ns.x",
    "[m, m]",
    "{'a': m}",
    "(1, m)",
    "none",
    "undefined",
    "eos_token",
    "''.join",
    "cycler(1, 2)",
    "joiner()",
    "namespace(x=1)",
    "dict(a=m)",
    "strftime_now('%Y')",
    "raise_exception",
    "tools",
    "self",
    "varargs",
    "add_generation_prompt",
)
OPERATORS = ("+", "*", "**", "%", "~", "-", "/", "//", "==", "<", "in", "and", "or", "is not")
TAILS = (
    "|join",
    "|join(m)",
    "|list",
    "|length",
    "|tojson",
    "|tojson(indent=4)",
    "|center(999999)",
    "|indent(99999)",
    "|map('upper')",
    "|replace('', m)",
    "|format(1)",
    "|batch(3)",
    "|slice(3)",
    "|string",
    "|sort",
    "|unique",
    "|groupby('role')",
    "|sum",
    "|first",
    "|last",
    "|reverse",
    "|trim",
    "|int",
    "|round(9)",
    ".split()",
    ".join(m)",
    ".format(1)",
    ".replace('', 'aaaa')",
    ".ljust(99999)",
    "[::2]",
    "[0]",
    ".__class__",
    ".items()",
    ".append(1)",
    "()",
    "|attr('x')",
    "|default(1)",
    "|select('string')",
    "|dictsort",
    " is defined",
    ".encode()",
)


def expression(draw: random.Random, depth: int = 0) -> str:
    text = draw.choice(PIECES)
    for _ in range(draw.choice((0, 0, 1, 2))):
        text += draw.choice(TAILS)
    if depth < 3 and draw.random() < 0.5:
        text = f"({text} {draw.choice(OPERATORS)} {expression(draw, depth + 1)})"
    return text


def statement(draw: random.Random, depth: int = 0) -> str:
    inner = (
        "".join(statement(draw, depth + 1) for _ in range(draw.randrange(3))) if depth < 5 else "x"
    )
    e, operator = expression(draw), draw.choice(OPERATORS[:5])
    return draw.choice(
        (
            f"{{{{ {e} }}}}",
            f"{{{{ {e} }}}}",
            f"{{% set ns.x = {e} %}}",
            f"{{% set m = {e} %}}",
            f"{{% for m in {e} %}}{inner}{{% endfor %}}",
            f"{{% for m in messages %}}{inner}{{% endfor %}}",
            f"{{% for m in {e} recursive %}}{inner}{{{{ loop(m) }}}}{{% endfor %}}",
            f"{{% if {e} %}}{inner}{{% endif %}}",
            f"{{% set m %}}{inner}{{% endset %}}",
            f"{{% macro f(m) %}}{inner}{{{{ f(m) }}}}{{% endmacro %}}{{{{ f({e}) }}}}",
            f"{{% for i in range(99999) %}}{inner}{{% set ns.x = ns.x {operator} {e} %}}{{% endfor "
            f"%}}",
            f"{{% filter upper %}}{inner}{{% endfilter %}}",
            f"{{% include {e} %}}",
            "text\n",
        )
    )


def change_template(data: bytes, draw: random.Random) -> bytes:
    """A template with bytes changed, or with statements of the grammar in it."""
    if draw.random() < 0.4:
        return change_bytes(data, draw)
    new = ("{% set ns = namespace(x='a') %}{% set m = messages[0] %}") + "".join(
        statement(draw) for _ in range(3)
    )
    return new.encode() + (data if draw.random() < 0.5 else b"")


# ------------------------------------------------------------------------------------------ readers


@dataclass
class Reader:
    """A reader: make(folder) writes sound input, read(folder, draw) reads it.

    make returns the files to change.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path, random.Random], Any]
    changes: tuple[Callable[[bytes, random.Random], bytes], ...] = (change_bytes,)
    sound: bool = True  # what make() writes can be read, whatever is drawn
    state: dict[str, Any] = field(default_factory=dict)


ROWS = [
    {"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "r"}]},
    {"prompt": "q", "response": "r", "id": 3, "kind": "dates", "answer": {"day": 3}},
    {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": "a",
        "rejected": [{"role": "assistant", "content": "b"}],
    },
    {"chosen": "Hi there. Yes", "rejected": "Hi there. No"},
]


def make_rows(folder: Path) -> list[Path]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [path]


def make_parquet(folder: Path) -> list[Path]:
    import pyarrow
    import pyarrow.parquet

    path = folder / "rows.parquet"
    table = pyarrow.table(
        {"messages": [ROWS[0]["messages"]] * 20, "id": [str(i) for i in range(20)]}
    )
    pyarrow.parquet.write_table(table, path)
    return [path]


def make_array(folder: Path) -> list[Path]:
    path = folder / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1))
    return [path]


def make_arrow(folder: Path) -> list[Path]:
    import pyarrow

    paths = [folder / "stream.arrow", folder / "file.arrow"]
    kinds = pyarrow.array(["a", "b"] * 10).dictionary_encode()
    table = pyarrow.table({"messages": [ROWS[0]["messages"]] * 20, "hint": kinds})
    for path, new in zip(paths, (pyarrow.ipc.new_stream, pyarrow.ipc.new_file), strict=True):
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=8)
    return paths


def read_data(folder: Path, draw: random.Random) -> None:
    from ldalign.data.reading import read_rows

    read_rows(
        folder, turns=draw.choice(("first", "last", "all")), bad_rows=draw.choice(("error", "skip"))
    )


def make_model(folder: Path) -> list[Path]:
    import made_weights

    raw = made_weights.MISTRAL | {"tie_word_embeddings": False, "num_hidden_layers": 1}
    made_weights.write_folder(folder, raw, shard_bytes=6000)
    return [*folder.glob("*.safetensors"), *folder.glob("*.json")]


def read_model(folder: Path, draw: random.Random) -> None:
    from ldalign.models.weights import load_model

    load_model(folder)


def make_gguf(folder: Path) -> list[Path]:
    import made_weights

    path = folder / "model.gguf"
    made_weights.write_gguf(path, tied=True)
    return [path]


def read_gguf(folder: Path, draw: random.Random) -> None:
    from ldalign.models.gguf import convert_gguf

    convert_gguf(folder / "model.gguf", folder / "made")


def make_tokenizer(folder: Path) -> list[Path]:
    from made_tokenizers import CHATML_TEMPLATE, byte_level_tokenizer, write_tokenizer_folder

    write_tokenizer_folder(
        folder, byte_level_tokenizer(), CHATML_TEMPLATE, eos_token="<|im_end|>", add_bos_token=False
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2, "vocab_size": 600}))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}})
    )
    return sorted(folder.glob("*.json"))


def make_template(folder: Path) -> list[Path]:
    make_tokenizer(folder)
    return [folder / "chat_template.jinja"]


def read_tokenizer(folder: Path, draw: random.Random) -> None:
    from ldalign.data.rows import Row
    from ldalign.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.pair_ids(
        Row("1", ({"role": "user", "content": "What? </s>"},), "That <|im_end|>.", where="x:1")
    )


def make_config(folder: Path) -> list[Path]:
    path = folder / "run.yaml"
    path.write_text((Path(__file__).parents[2] / "configs/toy.yaml").read_text())
    return [path]


def read_config(folder: Path, draw: random.Random) -> None:
    from ldalign.run.settings import RunConfig
    from ldalign.system.config import load_config, to_yaml

    override = change_bytes(
        draw.choice((b"beta=0.1", b"data=[a, b]", b"guide.width=64", b"sampling.stop=['x']")), draw
    )
    overrides = [override.decode("utf-8", "surrogateescape")][: draw.randrange(2)]
    to_yaml(load_config(RunConfig, folder / "run.yaml", overrides))


def make_losers(folder: Path) -> list[Path]:
    path = folder / "losers.jsonl"
    records = [{"id": str(i), "response": "No.", "finish_reason": "stop"} for i in range(4)]
    records[1] |= {"token_ids": [5, 6, 2], "prompt_token_ids": [1, 2]}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [path]


def read_losers(folder: Path, draw: random.Random) -> None:
    from ldalign.data.encoding import Fitting, encode_rows
    from ldalign.data.rows import Row
    from ldalign.data.tokenizer import load_tokenizer
    from ldalign.generation import external

    state = READERS["losers"].state
    if not state:
        with tempfile.TemporaryDirectory() as other:
            make_tokenizer(Path(other))
            state["tokenizer"] = load_tokenizer(other)
        state["rows"] = [
            Row(str(i), ({"role": "user", "content": "q"},), "r", where=f"x:{i}") for i in range(4)
        ]
        state["pairs"] = encode_rows(state["rows"], state["tokenizer"], Fitting(100)).pairs
    rows, pairs, tokenizer = state["rows"], state["pairs"], state["tokenizer"]
    external.read_losers(
        folder / "losers.jsonl", rows, pairs, rows, tokenizer, folder / "train.jsonl"
    )


def make_stage(folder: Path) -> list[Path]:
    from ldalign.run import manifest

    def make(partial: Path) -> None:
        (partial / "inner").mkdir()
        (partial / "inner/a.txt").write_text("hello")

    manifest.run_stage(folder / "stage", {"data": "d1", "beta": 0.1}, make)
    return [folder / "stage/manifest.json"]


def read_stage(folder: Path, draw: random.Random) -> None:
    from ldalign.run import manifest

    manifest.check_stage(folder / "stage", {"data": "d1", "beta": 0.1})


READERS = {
    "jsonl": Reader(make_rows, read_data, (change_bytes, change_lines)),
    "array": Reader(make_array, read_data, (change_bytes, change_lines)),
    "parquet": Reader(make_parquet, read_data),
    "arrow": Reader(make_arrow, read_data),
    "safetensors": Reader(make_model, read_model, (change_bytes, change_header, change_document)),
    "gguf": Reader(make_gguf, read_gguf),
    "template": Reader(make_template, read_tokenizer, (change_template,)),
    "tokenizer": Reader(
        make_tokenizer, read_tokenizer, (change_bytes, change_document, change_document)
    ),
    "config": Reader(make_config, read_config, sound=False),
    "losers": Reader(make_losers, read_losers, (change_bytes, change_lines), sound=False),
    "manifest": Reader(make_stage, read_stage, (change_bytes, change_document)),
}


# -------------------------------------------------------------------------------------- one process


def examine(
    name: str,
    seed: int,
    numbers: Iterable[int],
    folder: Path,
    keep: Path,
    until: float,
    tell: Callable[..., None],
) -> None:
    """Reads inputs of a reader in `folder`, until all `numbers` are done or the time is `until`.

    tell(number, "begins", file) comes before each, and tell(number, "read", "refused" or "failed",
    file) after it.
    """
    from ldalign.system.errors import LdalignError

    reader = READERS[name]
    files = {path: path.read_bytes() for path in reader.make(folder)}
    if reader.sound:
        reader.read(folder, random.Random(0))
    for number in numbers:
        if time.time() > until:
            break
        shutil.rmtree(folder / "made", ignore_errors=True)
        draw = random.Random(f"{seed}/{name}/{number}")
        path = draw.choice(list(files))
        change = draw.choice([c for c in reader.changes if fits(c, path)])
        content = change(files[path], draw)
        path.write_bytes(content)
        file = str(path.relative_to(folder))
        tell(number, "begins", file)
        spent = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(spent.ru_utime + spent.ru_stime) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        before, why = forget_peak(), ""
        try:
            reader.read(folder, draw)
            word = "read"
        except LdalignError:
            word = "refused"
        except BaseException:
            word, why = "failed", traceback.format_exc()
        grown = peak() - before
        if grown > MEMORY:
            word, why = "failed", f"{why}took {grown // 2**20} MB more memory"
        if why:
            save(keep, name, number, file, content, why)
        tell(number, word, file)
        path.write_bytes(files[path])
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def fits(change: Callable[[bytes, random.Random], bytes], path: Path) -> bool:
    if change is change_document:
        return path.suffix == ".json"
    return change is not change_header or path.suffix == ".safetensors"


def save(keep: Path, name: str, number: int, file: str, content: bytes, why: str) -> None:
    """Keeps an input that failed, and what happened."""
    (keep / f"{name}-{number}-{Path(file).name}").write_bytes(content)
    (keep / f"{name}-{number}.txt").write_text(why)


# --------------------------------------------------------------------------------------- the parent


class Worker:
    """A watched process that examines inputs; one that dies or hangs counts, another goes on."""

    def __init__(
        self, name: str, seed: int, numbers: range, folder: Path, keep: Path, until: float
    ) -> None:
        self.name, self.seed, self.keep, self.until, self.folder = name, seed, keep, until, folder
        self.seen: Counter[str] = Counter()
        self._start(numbers)

    def _start(self, numbers: range) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "input").mkdir(parents=True)
        self.numbers, self.current, self.hangs = numbers, None, False
        self.pipe, theirs = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._work, args=(theirs,))
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does
        self.heard = time.monotonic()

    def _work(self, pipe: Connection) -> None:
        os.dup2(os.open(self.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        faulthandler.enable()
        folder = self.folder / "input"
        examine(
            self.name,
            self.seed,
            self.numbers,
            folder,
            self.keep,
            self.until,
            lambda *told: pipe.send(told),
        )

    def listen(self) -> bool:
        """Takes in what the process has told; whether there is more to come."""
        try:
            while self.pipe.poll():
                number, word, file = self.pipe.recv()
                self.heard = time.monotonic()
                self.current = (number, file) if word == "begins" else None
                self.seen[word] += word != "begins"
        except (EOFError, ConnectionResetError):
            return self._ended()
        if time.monotonic() - self.heard > SECONDS and not self.hangs:
            self.hangs = True
            self.process.kill()
        return True

    def _ended(self) -> bool:
        self.process.join()
        code = self.process.exitcode
        if code == 0 and not self.current:
            return False
        why = f"no end after {SECONDS} s" if self.hangs else f"the process ended with {code}"
        why += "\n" + (self.folder / "said").read_text(errors="replace")[-5000:]
        if self.current is None:
            raise RuntimeError(f"{self.name}: outside any input: {why}")
        number, file = self.current
        self.seen["failed"] += 1
        save(self.keep, self.name, number, file, (self.folder / "input" / file).read_bytes(), why)
        rest = self.numbers[self.numbers.index(number) + 1 :]
        if rest:
            self._start(rest)
        return bool(rest)


def fuzz(name: str, count: int, minutes: float, seed: int, keep: Path, jobs: int) -> dict[str, Any]:
    """Reads `count` inputs in `jobs` processes, or what time allows; returns what came of it."""
    began = time.time()
    memory = Path("/dev/shm")  # opening a file costs more than reading it on many a disk
    with tempfile.TemporaryDirectory(
        dir=memory if os.access(memory, os.W_OK) else None
    ) as temporary:
        every = [(range(k, count, jobs), Path(temporary) / str(k)) for k in range(min(jobs, count))]
        workers = [
            Worker(name, seed, numbers, folder, keep, began + 60 * minutes)
            for numbers, folder in every
        ]
        going = workers
        while going:
            wait([worker.pipe for worker in going], timeout=0.5)
            going = [worker for worker in going if worker.listen()]
    seen = sum((worker.seen for worker in workers), Counter())
    counts = {word: seen[word] for word in ("read", "refused", "failed")}
    return {
        "reader": name,
        "inputs": sum(counts.values()),
        **counts,
        "seconds": round(time.time() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", nargs="*", default=list(READERS), choices=list(READERS))
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes (default: one a core)",
    )
    parser.add_argument(
        "--keep", type=Path, default=Path("runs/fuzz"), help="where inputs that fail are kept"
    )
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    for module in USED:  # once, for all processes
        importlib.import_module(module)
    print(
        "| reader | inputs | read | refused | failed | seconds |\n|---|---|---|---|---|---|",
        flush=True,
    )
    failed = 0
    for name in args.reader:
        result = fuzz(name, args.count, args.minutes, args.seed, args.keep, args.jobs)
        failed += result["failed"]
        print("| " + " | ".join(map(str, result.values())) + " |", flush=True)
    if failed:
        print(f"{failed} failed; the inputs and what happened are in {args.keep}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
