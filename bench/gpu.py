"""What a CUDA machine has to show, in a quarter of an hour and without a network: `make gpu`.

    python bench/gpu.py [--only tests,kernels,step,step-7b,generate,growth,profile] [--minutes 14]

Runs every test marked `gpu`, then the GPU benchmarks in the order of what they are worth, each
under a time limit and all under --minutes. After every part its figures are printed, and
bench/results/gpu.json and gpu.md are written anew: a run that is cut short has left what it found.
Beside a figure stands what the cost model computed for this card (roofline.py), where it knows the
card. A part that fails is named and makes the exit code 3; the parts after it still run. The step
benchmark's models have random weights in the shapes of SmolLM2-135M and Mistral-7B, the latter with
as many layers as fit; peers run where LDALIGN_PEER_TRL and LDALIGN_PEER_TRANSFORMERS name a Python
that has them, FlashAttention and Liger where they are installed.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from roofline import CARDS, DECODE, STEP, Card, Case, Reached, decode_seconds, step_seconds
from work import LENGTHS, SHAPES, Shape, make_pairs, tokens_of

from ldalign.run import environment
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.exits import run

ROOT = Path(__file__).resolve().parent.parent
Figure = tuple[str, str, str]  # what, as measured, as the cost model has it


class Part(NamedTuple):
    """A part of the run: its name and command, and the result file that its figures are read of."""

    name: str
    command: list[str]
    limit_s: int
    file: str = ""
    figures: Callable[[dict[str, Any], Card | None], list[Figure]] = lambda found, card: []


def parts(memory: int) -> tuple[Part, ...]:
    """All parts, on a card with `memory` bytes; the first PARTS_RUN are run without --only."""
    step = ["bench/step.py", "--lengths", "gsm8k", "--precisions", "bfloat16,mixed"]
    layers = str(layers_that_fit(Shape.of(SHAPES["mistral-7b"]), 14, memory))
    seven = ["--shape", "mistral-7b", "--layers", layers, "--batch", "8", "--optimizer", "rmsprop"]
    return (
        Part("tests", ["-m", "pytest", "-m", "gpu", "-q", "-n", "8", "tests"], 240),
        Part("kernels", ["bench/kernels.py", "--repeat", "5"], 180, "kernels-cuda", kernel_figures),
        Part(
            "step",
            [*step, "--shape", "smollm2-135m", "--batch", "32", "--repeat", "5"],
            120,
            "step-cuda-smollm2-135m",
            step_figures,
        ),
        Part(
            "step-7b", [*step, *seven, "--repeat", "3"], 180, "step-cuda-mistral-7b", step_figures
        ),
        Part(
            "generate",
            ["bench/generate.py", "--shape", "mistral-7b", "--batches", "1,256", "--repeat", "2"],
            240,
            "generate-cuda-mistral-7b",
            generate_figures,
        ),
        Part(
            "growth",
            ["bench/growth.py", "--shapes", "smollm2-135m,mistral-7b", "--optimizer", "rmsprop"],
            180,
        ),
        Part(
            "profile", ["bench/profile_train.py", "--shape", "smollm2-135m", "--batch", "32"], 120
        ),
    )


PARTS_RUN = 5  # of `parts`, without --only
WITH_PEERS = ("step", "step-7b", "growth", "generate")


def layers_that_fit(shape: Shape, bytes_a_weight: int, memory: int) -> int:
    """How many of the shape's layers can be trained: three quarters of the memory for weights,
    gradients and averages, the rest for activations and logits.
    """
    products = shape.attention_products + shape.mlp_products
    block = sum(i * o for i, o in products) + 2 * shape.D
    rest = shape.weights - shape.layers * block
    return max(1, min(shape.layers, int((0.75 * memory / bytes_a_weight - rest) // block)))


def main(argv: list[str]) -> None:
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    known = {part.name: part for part in parts(memory)}
    parser = argparse.ArgumentParser(
        prog="bench/gpu.py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--only", default=",".join([*known][:PARTS_RUN]), help=f"of {', '.join(known)}"
    )
    parser.add_argument("--minutes", type=float, default=14.0, help="for all parts together")
    parser.add_argument(
        "--results", type=Path, default=common.HERE / "results", help="folder of the result files"
    )
    args = parser.parse_args(argv)
    names = args.only.split(",")
    for name in names:
        if name not in known:
            parser.error(f"--only {name}: choose from {', '.join(known)}")
    if not memory:
        raise EnvironmentProblem(
            "make gpu: torch sees no CUDA device; run it on a machine that has one"
        )
    print("\n".join(map(str, environment.tick_list())), flush=True)
    run_parts([known[name] for name in known if name in names], args.minutes, args.results)


def run_parts(chosen: list[Part], minutes: float, results: Path) -> None:
    """Runs the parts one after the other; raises EnvironmentProblem at the end if any failed."""
    # Without a network and without peers on offer, no environment is tried.
    peers = [] if any(name.startswith("LDALIGN_PEER_") for name in os.environ) else ["--no-peers"]
    deadline = time.monotonic() + 60 * minutes
    device = torch.cuda.get_device_name()
    found: dict[str, Any] = {"benchmark": "gpu", "device": device, "small": False, "parts": []}
    found |= common.stamp()
    card = next((card for name, card in CARDS.items() if name in device), None)
    for part in chosen:
        left = deadline - time.monotonic()
        verdict, seconds, figures, began = "no time left", 0.0, [], time.time()
        if left > 0:
            more = peers if part.name in WITH_PEERS else []
            more = [*more, "--results", str(results)] if part.file else more
            verdict, seconds = run_part([*part.command, *more], min(part.limit_s, left), part.name)
        file = results / f"{part.file}.json"
        # One that was stopped may have left some; a file of an earlier run says nothing.
        fresh = part.file and file.exists() and file.stat().st_mtime >= began
        if fresh or (part.file and verdict == "passed"):
            try:
                figures = part.figures(json.loads(file.read_text(encoding="utf-8")), card)
            except (OSError, ValueError, LookupError) as error:  # the parts after it still run
                if verdict == "passed":
                    verdict = f"no figures: {type(error).__name__}: {error}"
        found["parts"].append(
            {"part": part.name, "verdict": verdict, "seconds": seconds, "figures": figures}
        )
        common.save(found, render(found), results, "gpu")
    failed = [part["part"] for part in found["parts"] if part["verdict"] != "passed"]
    if failed:
        raise EnvironmentProblem(f"make gpu: {', '.join(failed)} did not pass; see above")


def run_part(command: list[str], limit_s: float, name: str) -> tuple[str, float]:
    """Runs a command of this Python in a limited time; returns how it ended, and its seconds."""
    common.say(f"=== {name}")
    began = time.monotonic()
    # A session of its own: what the part has started ends with it, and frees the GPU.
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True) as part:
        try:
            code = part.wait(limit_s)
            verdict = "passed" if code == 0 else f"FAILED ({code})"
        except subprocess.TimeoutExpired:
            verdict = f"STOPPED after {limit_s:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(part.pid, signal.SIGKILL)
    return verdict, time.monotonic() - began


def render(found: dict[str, Any]) -> list[str]:
    """The page: a line a part, then its figures beside what was computed."""
    lines = [f"## gpu: {found['device']}", "", *common.table("part", "measured", "computed")]
    for part in found["parts"]:
        lines.append(
            common.row(f"**{part['part']}**", f"{part['verdict']}, {part['seconds']:.0f} s", "")
        )
        lines += [common.row(*figure) for figure in part["figures"]]
    computed = "Computed: by bench/roofline.py for this card, before anything was measured."
    return [*lines, "", computed]


def kernel_figures(result: dict[str, Any], card: Card | None) -> list[Figure]:
    """The kernels' benchmark in one line a figure."""
    rows: list[Figure] = []
    for table in result["head"]:
        n, d, v = table["shape"]
        bare = ""
        if card is not None:
            bare = f"bare {1e3 * 6 * n * d * v / (Reached().products * card.flops):.2f} ms"
        for name, peer in table["peers"].items():
            if "over_bare" in peer:
                time_ms = 1e3 * statistics.median(peer["seconds"])
                measured = f"{peer['over_bare']:.2f} x bare, {time_ms:.2f} ms"
                measured += f", {peer['extra_mib']:.0f} MiB"
                rows.append((f"pair_loss {n} x {d} x {v}: {name}", measured, bare))
    for table in result["attention"]:
        shape = (
            f"{table['heads']} heads of {table['width']}, {table['pairs']} pairs, "
            f"{table['tokens']} tokens"
        )
        rate = "" if card is None else f"{Reached().attention * card.flops / 1e12:.0f} TFLOP/s"
        for name, r in table["peers"].items():
            measured = f"{r['over_ldalign']:.2f} x ldalign's time"
            measured += f", {r['needed_tflops_per_s']:.0f} TFLOP/s needed"
            rows.append((f"pair attention, {shape}: {name}", measured, rate))
    for table in result["elementwise"]:
        for name, r in table["ops"].items():
            measured = f"{100 * r['share_of_copy_bandwidth']:.0f} % of copy bandwidth"
            measured += f", {r['eager_over_ldalign']:.2f} x faster than eager"
            rows.append((f"{name} {table['dtype']}", measured, ""))
    return rows


def step_figures(result: dict[str, Any], card: Card | None) -> list[Figure]:
    """The step benchmark in one line a row; computed for our rows."""
    rows: list[Figure] = []
    config = SHAPES[result["shape"]] | {"num_hidden_layers": result["layers"]}
    shape, batch = Shape.of(config), result["batch"]
    pairs = make_pairs(LENGTHS["gsm8k"], 2 * batch, shape.V)[batch:]
    averages = 2 if result["optimizer"] == "adamw" else 1
    for r in result["tables"][0]["rows"]:
        computed = ""
        if card is not None and r["name"] == "ldalign":
            weight = 2 if r["precision"] == "bfloat16" else 4
            case = Case(1, weight, averages * weight, tokens_of(pairs))
            seconds = sum(step_seconds(shape, pairs, card, case, STEP["now"]).values())
            computed = f"{tokens_of(pairs) / seconds:.0f} tokens/s"
        name = f"{result['shape']}, {shape.layers} layers: {r['name']}, {r['precision']}"
        measured = f"not run: {r.get('skipped')}"
        if "skipped" not in r:
            measured = f"{r['tokens_per_second']:.0f} tokens/s, MFU {100 * r['mfu']:.0f} %"
            measured += f", {r['peak_gib']:.1f} GiB"
        rows.append((name, measured, computed))
    return rows


def generate_figures(result: dict[str, Any], card: Card | None) -> list[Figure]:
    """Decoding in one line a side and number of rows, with its share of reading the weights and the
    cache once a token.
    """
    rows: list[Figure] = []
    shape, new = Shape.of(SHAPES[result["shape"]]), result["new_tokens"]
    for table in result["tables"]:
        n, computed = table["rows"], ""
        if card is not None:
            prompts = [len(p["prompt"]) for p in make_pairs(LENGTHS["gsm8k"], n, shape.V)]
            # All rows run to the same length, by one graph.
            extras = replace(DECODE["now"], rows_busy=1.0, graphs=1)
            parts = decode_seconds(shape, prompts, new, n, card, extras)
            computed = f"{1 / sum(parts.values()):.0f} tokens/s"
        for name, side in table["sides"].items():
            measured = f"not run: {side.get('skipped')}"
            if "skipped" not in side:
                speed = side["tokens_per_second"]
                share = speed / table["limits"]["reading"]
                measured = f"{speed:.0f} tokens/s, {100 * share:.0f} % of reading once a token"
            rows.append(
                (f"decoding {n} rows: {name}", measured, computed if name == "ldalign" else "")
            )
    return rows


if __name__ == "__main__":
    run(main)
