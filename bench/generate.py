"""Sampling with the engine against transformers and the engines that are made for CPUs.

    python bench/generate.py [--batches 1,8,32,128] [--dtypes bfloat16,float32] [--shape mistral-7b]

Part of `make bench`. Prompts of GSM8K's lengths, mixed; no row may stop before its full length, so
all make the same number of tokens from the same prompts. Every row of the table is a process of its
own, the peers in an environment of their own, in the same run: transformers' `generate`,
left-padded, and its continuous batching; on a CPU also OpenVINO GenAI, vLLM, llama.cpp and
CTranslate2, each with the settings that the page names. Beside them, what the machine could
do: the time of the matrix products at its measured rate, and of reading weights and cache once a
token at its measured bandwidth. On a CPU one row and 32 in bfloat16 are measured beside a process
that spins, too: few have a machine alone.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from work import LENGTHS, SHAPES, Shape, generation_costs, make_pairs

from ldalign.models.gguf_export import GgufDtype, export_gguf
from ldalign.system.exits import run


@dataclass(frozen=True)
class Peer:
    """Whose generation is measured, and for which rows of the table."""

    script: str  # in bench/peers
    environment: str
    task: str = "generation"
    dtypes: tuple[str, ...] = ("bfloat16", "float32")  # tables that it is in
    rows: tuple[int, ...] | None = None  # the batches that it is measured at; None: all
    cpu: bool = False  # an engine for CPUs, which reads the policy's files
    ggufs: tuple[tuple[str, GgufDtype], ...] = ()  # (table's dtype, of the GGUF file that it reads)
    beside: bool = False  # measured beside a spinning process, too


PEERS = {
    "transformers generate": Peer("generate.py", "transformers", beside=True),
    # on a CPU it is slow
    "transformers continuous batching": Peer(
        "generate.py", "transformers", "continuous", rows=(32,)
    ),
    "OpenVINO GenAI": Peer(
        "openvino_engine.py",
        "openvino",
        cpu=True,
        ggufs=(("bfloat16", "f16"), ("float32", "f16")),
        beside=True,
    ),
    "OpenVINO GenAI, 8 bits": Peer(
        "openvino_engine.py",
        "openvino",
        dtypes=("bfloat16",),
        cpu=True,
        ggufs=(("bfloat16", "q8_0"),),
        beside=True,
    ),
    "vLLM": Peer("vllm_engine.py", "vllm", cpu=True),
    "llama.cpp": Peer(
        "llama_cpp_engine.py",
        "llamacpp",
        cpu=True,
        ggufs=(("bfloat16", "bf16"), ("float32", "f32")),
    ),
    "llama.cpp, 8 bits": Peer(
        "llama_cpp_engine.py",
        "llamacpp",
        dtypes=("bfloat16",),
        cpu=True,
        ggufs=(("bfloat16", "q8_0"),),
    ),
    "CTranslate2": Peer("ctranslate2_engine.py", "ctranslate2", dtypes=("float32",), cpu=True),
    # beside bfloat16, which it does not compute in on a CPU
    "CTranslate2, 8 bits": Peer(
        "ctranslate2_engine.py", "ctranslate2", "eight_bits", dtypes=("bfloat16",), cpu=True
    ),
}
BEGINNING = 24  # tokens that all prompts begin with under SmolLM2's chat template: its system turn
IN_8_BITS = "ldalign, 8 bits"  # sampling.weights=int8
BESIDE = ", beside a spinning process"
BUSY_ROWS = (1, 32)  # measured on a machine with other work, too


def main(argv: list[str]) -> None:
    parser = common.options("generate", __doc__)
    parser.add_argument("--batches", default="1,8,32,128", help="rows at a time")
    parser.add_argument("--dtypes", help="default: bfloat16,float32; on a GPU bfloat16")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--shape", choices=list(SHAPES), help="random weights in this shape, no model folder"
    )
    environments = sorted({peer.environment for peer in PEERS.values()})
    parser.add_argument(
        "--peers",
        default=",".join(environments),
        help="whose, by environment; default: %(default)s",
    )
    args = parser.parse_args(argv)
    peers = set() if args.no_peers else set(args.peers.split(","))
    if unknown := peers - set(environments):
        parser.error(f"--peers {','.join(unknown)}: choose from {', '.join(environments)}")
    device, dtype = common.device_and_dtype()
    folder, config = (
        (None, SHAPES[args.shape]) if args.shape and not args.small else common.model_of(args)
    )
    dtypes = args.dtypes or (
        dtype if device.type == "cuda" or dtype == "float32" else "bfloat16,float32"
    )
    new_tokens = 4 if args.small else args.new_tokens
    tables = []
    with tempfile.TemporaryDirectory() as scratch:
        ggufs = {}
        if folder is not None and device.type == "cpu":
            asked = [peer for peer in PEERS.values() if peer.environment in peers]
            for kind in sorted({kind for peer in asked for _, kind in peer.ggufs}):
                ggufs[kind] = str(Path(scratch) / f"{kind}.gguf")
                export_gguf(folder, Path(ggufs[kind]), kind)
        for name in dtypes.split(",")[: 1 if args.small else None]:
            for rows in [2] if args.small else map(int, args.batches.split(",")):
                repeat = 2 if args.small else args.repeat or (3 if rows <= 32 else 1)
                pairs = make_pairs(LENGTHS["gsm8k"], rows * (repeat + 1), config["vocab_size"])
                beginning = pairs[0]["prompt"][:BEGINNING]
                prompts = [beginning + pair["prompt"][len(beginning) :] for pair in pairs]
                job = {
                    "device": str(device),
                    "dtype": name,
                    "threads": torch.get_num_threads(),
                    "folder": str(folder) if folder else None,
                    "ggufs": ggufs,
                    "config": config,
                    "new_tokens": new_tokens,
                    "batches": [prompts[i : i + rows] for i in range(0, len(prompts), rows)],
                }
                tables.append(measure(job, Shape.of(config), rows, peers, device, args.small))
    result = common.result(
        "generate", args, device=str(device), shape=args.shape, new_tokens=new_tokens, tables=tables
    )
    suffix = f"-{args.shape}" if args.shape else ""
    common.save(result, render(result), args.results, f"generate-{device.type}{suffix}")


def measure(
    job: dict[str, Any], shape: Shape, rows: int, peers: set[str], device: torch.device, small: bool
) -> dict[str, Any]:
    """One batch size in one dtype: all sides, and the machine's limits for the same work."""
    common.say(f"generate: {rows} rows, {job['dtype']} ...")
    sides: dict[str, dict[str, Any]] = {"ldalign": common.measure_ours("generation", job)}
    if device.type == "cpu" and job["dtype"] == "bfloat16":
        common.say(f"generate: {rows} rows, {job['dtype']}: {IN_8_BITS} ...")
        sides[IN_8_BITS] = common.measure_ours("generation", {**job, "weights": "int8"})
    measured = {
        name: peer
        for name, peer in PEERS.items()
        if peer.environment in peers
        and job["dtype"] in peer.dtypes
        and (peer.rows is None or rows in peer.rows)
        and (not peer.cpu or device.type == "cpu")
    }
    for name, peer in measured.items():
        common.say(f"generate: {rows} rows, {job['dtype']}: {name} ...")
        sides[name] = measure_peer(job, peer)
    busy = small or rows in BUSY_ROWS
    if device.type == "cpu" and busy and job["dtype"] == "bfloat16":
        fewer = {**job, "batches": job["batches"][:2]}  # one after the one that warms up
        with common.spinning(1):
            common.say(f"generate: {rows} rows, {job['dtype']}{BESIDE} ...")
            sides["ldalign" + BESIDE] = common.measure_ours("generation", fewer)
            for name, peer in measured.items():
                if peer.beside:
                    sides[name + BESIDE] = measure_peer(fewer, peer)
    tokens = rows * job["new_tokens"]
    for side in sides.values():
        if "skipped" not in side:
            side["tokens_per_second"] = tokens / statistics.median(side["seconds"])
            # Beside a spinning process fewer batches were measured, the first ones.
            ours = sides["ldalign"]["seconds"][: len(side["seconds"])]
            side["time_ratio"] = common.median_ratio(side["seconds"], ours)
    itemsize = getattr(torch, job["dtype"]).itemsize
    costs = generation_costs(
        shape, [len(p) for p in job["batches"][-1]], job["new_tokens"], itemsize
    )
    rates = common.measure_machine(shape, max(rows, 64), job["dtype"], device, small)
    limits = {
        "products": tokens / (sum(c.flops for c in costs.values()) / rates["flops"]),
        # A copy reads and writes; reading alone is at least as fast as half of it.
        "reading": tokens
        / (sum(costs[part].bytes for part in ("attention", "MLP", "head")) / rates["bytes"]),
    }
    return {
        "rows": rows,
        "dtype": job["dtype"],
        "repeat": len(sides["ldalign"]["seconds"]),
        "sides": sides,
        "limits": limits,
        "rates": rates,
    }


def measure_peer(job: dict[str, Any], peer: Peer) -> dict[str, Any]:
    whole = {**job, "task": peer.task}
    if peer.cpu and job["folder"] is None:
        return {"skipped": "it reads a model's files, and these weights are random"}
    if peer.ggufs:
        whole["gguf"] = job["ggufs"][dict(peer.ggufs)[job["dtype"]]]
    return common.measure_or_say(
        f"peers/{peer.script}", whole, peer.environment, common.KEEP_MEMORY
    )


def in_8_bits(name: str, side: dict[str, Any], sides: dict[str, dict[str, Any]]) -> str:
    """A peer's time and memory over those of ldalign in 8 bits, where the peer is so, too."""
    if "8 bits" not in name or name.endswith(BESIDE):
        return ""
    ours = sides[IN_8_BITS]
    time = common.median_ratio(side["seconds"], ours["seconds"])
    return f"{time:.2f}, {side['peak_gib'] / ours['peak_gib']:.2f}"


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    lines = [
        f"## generate, {result['device']}",
        "",
        f"{result['shape'] or result['policy']}: prompts of GSM8K's lengths, "
        f"{result['new_tokens']} new tokens a row, sampled at temperature 1; medians after one "
        f"batch to warm up. The first {BEGINNING} tokens of all prompts are the same, as a chat "
        "template's are. First token: ldalign's is the mean over rows. Limits: all tokens at the "
        "machine's measured rate of matrix products, and at its measured copy bandwidth with the "
        "weights read once a step. A spinning process takes a core whenever it gets one. Others: "
        "the share of the cores that other processes used meanwhile.",
        "",
        *common.table(
            "rows",
            "dtype",
            "",
            "tokens a second",
            "time / ldalign's",
            "first token, s",
            "peak memory, GiB",
            "memory / ldalign's",
            "time, memory / ldalign's in 8 bits",
            "others",
        ),
    ]
    for table in result["tables"]:
        for name, side in table["sides"].items():
            cells: list[str] = [str(table["rows"]), table["dtype"], name]
            if "skipped" in side:
                cells += [f"not run: {side['skipped']}", *[""] * 6]
            else:
                first = "" if side["first"] is None else f"{side['first']:.2f}"
                speed = [f"{side['tokens_per_second']:.0f}", f"{side['time_ratio']:.2f}"]
                others = f"{100 * side['others']:.0f} %"
                cells += [*speed, first, f"{side['peak_gib']:.2f}"]
                cells += [f"{side['peak_gib'] / table['sides']['ldalign']['peak_gib']:.2f}"]
                cells += [in_8_bits(name, side, table["sides"]), others]
            lines.append(common.row(*cells))
        for name, limit in table["limits"].items():
            lines.append(
                common.row(
                    table["rows"], table["dtype"], f"limit: {name}", f"{limit:.0f}", *[""] * 6
                )
            )
    settings = {
        name: side["settings"]
        for table in result["tables"]
        for name, side in table["sides"].items()
        if "settings" in side and not name.endswith(BESIDE)
    }
    return [*lines, "", *(f"- {name}: {said}" for name, said in settings.items())]


if __name__ == "__main__":
    run(main)
