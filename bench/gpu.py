"""What a CUDA machine has to show, in under a quarter of an hour and without a network: `make gpu`.

    python bench/gpu.py [--only tests,kernels,step,step-7b,growth,generate,profile]

Runs every test marked `gpu` and every GPU benchmark, each part under a time limit, and prints
one table last. A part that fails is named in the table and makes the exit code 3; the parts
after it still run. The step benchmark's models have random weights in the shapes of
SmolLM2-135M and Mistral-7B; its peers run where LDALIGN_PEER_TRL and LDALIGN_PEER_TRANSFORMERS
name a Python that has them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldalign.run import environment
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.exits import run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


Figure = tuple[str, str, str]  # a line of the last table


class Part(NamedTuple):
    name: str
    command: list[str]
    limit_s: int


STEP = ["bench/step.py", "--lengths", "gsm8k", "--precisions", "bfloat16,mixed", "--repeat", "5"]
PARTS = (
    Part("tests", ["-m", "pytest", "-m", "gpu", "-q", "tests"], 240),
    Part("kernels", ["bench/kernels.py", "--repeat", "9"], 200),
    Part("step", [*STEP, "--shape", "smollm2-135m", "--batch", "32"], 180),
    Part(
        "step-7b", [*STEP, "--shape", "mistral-7b", "--batch", "8", "--optimizer", "rmsprop"], 240
    ),
    Part(
        "growth",
        ["bench/growth.py", "--shapes", "smollm2-135m,mistral-7b", "--optimizer", "rmsprop"],
        180,
    ),
    Part(
        "generate",
        ["bench/generate.py", "--shape", "mistral-7b", "--batches", "1,256", "--repeat", "2"],
        300,
    ),
    Part("profile", ["bench/profile_train.py", "--shape", "smollm2-135m", "--batch", "32"], 120),
)
NEEDED = ("tests", "kernels", "step", "step-7b")  # without --only


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--only", default=",".join(NEEDED), help=f"of {', '.join(part.name for part in PARTS)}"
    )
    names = parser.parse_args(argv).only.split(",")
    for name in names:
        if name not in {part.name for part in PARTS}:
            parser.error(f"--only {name}: choose from {', '.join(part.name for part in PARTS)}")
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            "make gpu: torch sees no CUDA device; run it on a machine that has one"
        )
    print("\n".join(map(str, environment.tick_list())), flush=True)
    rows, failed = [], []
    # Without a network and without peers on offer, no environment is tried.
    peers = [] if any(name.startswith("LDALIGN_PEER_") for name in os.environ) else ["--no-peers"]
    for part in (part for part in PARTS if part.name in names):
        print(f"\n=== {part.name}", flush=True)
        began = time.perf_counter()
        more = peers if part.name in ("step", "step-7b", "growth", "generate") else []
        try:
            done = subprocess.run(
                [sys.executable, *part.command, *more], cwd=ROOT, timeout=part.limit_s, check=False
            )
            verdict = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
        except subprocess.TimeoutExpired:
            verdict = f"STOPPED after {part.limit_s} s"
        if verdict != "passed":
            failed.append(part.name)
        rows.append((part.name, verdict, f"{time.perf_counter() - began:.0f} s"))
    print("\n=== make gpu: " + torch.cuda.get_device_name())
    for name, file, figures in FIGURES:
        if name in names and name not in failed:
            rows += figures(json.loads((RESULTS / file).read_text(encoding="utf-8")))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )
    if failed:
        raise EnvironmentProblem(f"make gpu: {', '.join(failed)} did not pass; see above")


def kernel_figures(result: dict[str, Any]) -> list[Figure]:
    """The kernels' benchmark in one line a figure."""
    rows = []
    for table in result["head"]:
        shape = " x ".join(map(str, table["shape"]))
        for name, peer in table["peers"].items():
            if "over_bare" in peer:
                time_ms = 1e3 * statistics.median(peer["seconds"])
                rows.append(
                    (
                        f"pair_loss {shape}: {name}",
                        f"{peer['over_bare']:.2f} x bare, {time_ms:.2f} ms",
                        f"{peer['extra_mib']:.0f} MiB",
                    )
                )
    for table in result["elementwise"]:
        for name, r in table["ops"].items():
            rows.append(
                (
                    f"{name} {table['dtype']}",
                    f"{r['eager_over_ldalign']:.2f} x faster than eager",
                    f"{100 * r['share_of_copy_bandwidth']:.0f} % of copy bandwidth",
                )
            )
    for table in result["attention"]:
        shape = (
            f"{table['heads']} heads of {table['width']}, {table['pairs']} pairs, "
            f"{table['tokens']} tokens"
        )
        for name, r in table["peers"].items():
            rows.append(
                (
                    f"pair attention, {shape}: {name}",
                    f"{r['over_ldalign']:.2f} x ldalign's time",
                    f"{r['needed_tflops_per_s']:.0f} TFLOP/s needed",
                )
            )
    return rows


def step_figures(result: dict[str, Any]) -> list[Figure]:
    """The step benchmark in one line a row."""
    rows = []
    for r in result["tables"][0]["rows"]:
        name = f"step {result['shape']}: {r['name']}, {r['precision']}"
        if "skipped" in r:
            rows.append((name, f"not run: {r['skipped']}", ""))
        else:
            speed = f"{r['tokens_per_second']:.0f} tokens/s, MFU {100 * r['mfu']:.0f} %"
            rows.append((name, speed, f"{r['peak_gib']:.1f} GiB"))
    return rows


FIGURES = (
    ("kernels", "kernels-cuda.json", kernel_figures),
    ("step", "step-cuda-smollm2-135m.json", step_figures),
    ("step-7b", "step-cuda-mistral-7b.json", step_figures),
)


if __name__ == "__main__":
    run(main)
