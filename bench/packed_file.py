"""Packed weights mapped from a file beside the model, instead of packed anew at each start.

    python bench/packed_file.py [--new-tokens 128] [--repeat 7]

Part of `make bench`, on a CPU. What a start would save, the reading of the model in it, and what
every token would cost: the packed weights of the policy are written to a file and mapped, as they
are and with the advice to use large pages, and the same rows are sampled by turns with those that
`PackedDecoder` makes, in pages of 2 MiB. The file is in memory already, the best case for it.
"""

import copy
import mmap
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from ours import make_model

from ldalign.generation.decoders import Packed, PackedDecoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.sampling import Sampling
from ldalign.system import distributed
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.exits import run

PROMPT = list(range(1, 81))
ROWS = (1, 8)


def main(argv: list[str]) -> None:
    parser = common.options("packed_file", __doc__)
    parser.add_argument("--new-tokens", type=int, default=128, help="of a row")
    args = parser.parse_args(argv)
    new, repeat = (4, 1) if args.small else (args.new_tokens, args.repeat or 7)
    folder, config = common.model_of(args)
    device = distributed.start("cpu")
    job = {"folder": str(folder) if folder else None, "config": config}

    def make() -> PackedDecoder:
        model = make_model(job, torch.bfloat16, device).eval()
        if not PackedDecoder.able(model):
            raise EnvironmentProblem("bench: packed_file: needs the C++ extension")
        return PackedDecoder(model, release=True)

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "packed"
        write(make(), path)
        ways: dict[str, Callable[[PackedDecoder], PackedDecoder]] = {
            "packed at the start": lambda packed: make(),
            "mapped": lambda packed: mapped(packed, path),
            "mapped, large pages asked for": lambda packed: mapped(packed, path, large=True),
        }
        rows = measure(make(), ways, new, repeat)
    distributed.stop()
    result = common.result("packed-file", args, new_tokens=new, repeat=repeat, rows=rows)
    common.save(result, render(result), args.results)


def write(decoder: PackedDecoder, path: Path) -> None:
    """Writes a decoder's packed weights one after the other, none with a header."""
    with path.open("wb") as file:
        for weight in (*decoder.packed, decoder.head):
            file.write(weight.values.view(torch.uint8).numpy().tobytes())


def mapped(decoder: PackedDecoder, path: Path, large: bool = False) -> PackedDecoder:
    """A decoder like `decoder` whose packed weights are the file's, which is mapped."""
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    if large:
        memory.madvise(mmap.MADV_HUGEPAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody writes to it
        whole, at = torch.frombuffer(memory, dtype=torch.uint8), 0
    found = []
    for weight in (*decoder.packed, decoder.head):
        values = weight.values
        found.append(Packed(whole[at : at + values.nbytes].view(values.dtype).view(values.shape)))
        at += values.nbytes
    other = copy.copy(decoder)
    other.packed, other.head = found[:-1], found[-1]
    return other


def measure(
    packed: PackedDecoder,
    ways: dict[str, Callable[[PackedDecoder], PackedDecoder]],
    new: int,
    repeat: int,
) -> list[dict[str, Any]]:
    """Of each way the median seconds until there is a decoder and its first token is drawn, and of
    a token after that for each of ROWS; by turns.
    """
    starts: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[list[float]]] = {name: [[] for _ in ROWS] for name in ways}
    for _ in range(repeat + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            decoder = way(packed)
            sample(decoder, 1, 1)
            starts[name].append(time.perf_counter() - began)
            for rows, seconds in zip(ROWS, tokens[name], strict=True):
                seconds.append(sample(decoder, rows, new) / new)
    usual = tokens[next(iter(ways))]
    # the first turn warms up
    return [
        {
            "name": name,
            "start": statistics.median(starts[name][1:]),
            "token": [statistics.median(seconds[1:]) for seconds in tokens[name]],
            "ratio": [
                common.median_ratio(theirs[1:], ours[1:])
                for theirs, ours in zip(tokens[name], usual, strict=True)
            ],
        }
        for name in ways
    ]


def sample(decoder: PackedDecoder, rows: int, new: int) -> float:
    """Seconds of sampling `new` tokens of so many rows with one prompt."""
    engine = Engine(decoder, Sampling(new), [], 0, longest=len(PROMPT) + new, rows=rows)
    began = time.perf_counter()
    for _ in engine.run([Request(str(i), PROMPT, i) for i in range(rows)]):
        pass
    return time.perf_counter() - began


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    lines = [
        "## packed weights from a file",
        "",
        f"{result['policy']}, bfloat16, {result['new_tokens']} new tokens a row: medians of "
        f"{result['repeat']} turns after one to warm up. Start: until the weights are there and a "
        "first token is drawn.",
        "",
        *common.table(
            "weights",
            "start, s",
            *(f"a token of {n} rows, ms" for n in ROWS),
            *(f"time at {n} rows / the first's" for n in ROWS),
        ),
    ]
    for row in result["rows"]:
        cells = [f"{row['start']:.3f}"]
        cells += [f"{1000 * seconds:.2f}" for seconds in row["token"]]
        cells += [f"{ratio:.3f}" for ratio in row["ratio"]]
        lines.append(common.row(row["name"], *cells))
    return lines


if __name__ == "__main__":
    run(main)
