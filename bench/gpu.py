"""What a CUDA machine has to show, in under eight minutes and without a network: `make gpu`.

Runs every test marked `gpu` and every GPU benchmark, each part under a time limit, and prints one table last. A part
that fails is named in the table and makes the exit code 3; the parts after it still run.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ldalign import env
from ldalign.errors import EnvironmentProblem, run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


class Part(NamedTuple):
    name: str
    command: list[str]
    limit_s: int


PARTS = (
    Part("tests", ["-m", "pytest", "-m", "gpu", "-q", "tests"], 240),
    Part("kernels", ["bench/kernels.py", "--repeat", "9"], 200),
)


def main(argv: list[str]) -> None:
    if not torch.cuda.is_available():
        raise EnvironmentProblem("make gpu: torch sees no CUDA device; run it on a machine that has one")
    print("\n".join(map(str, env.tick_list())), flush=True)
    rows, failed = [], []
    for part in PARTS:
        print(f"\n=== {part.name}", flush=True)
        began = time.perf_counter()
        try:
            done = subprocess.run([sys.executable, *part.command], cwd=ROOT, timeout=part.limit_s, check=False)
            verdict = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
        except subprocess.TimeoutExpired:
            verdict = f"STOPPED after {part.limit_s} s"
        if verdict != "passed":
            failed.append(part.name)
        rows.append((part.name, verdict, f"{time.perf_counter() - began:.0f} s"))
    print("\n=== make gpu: " + torch.cuda.get_device_name())
    rows += figures(RESULTS / "kernels-cuda.json") if "kernels" not in failed else []
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    if failed:
        raise EnvironmentProblem(f"make gpu: {', '.join(failed)} did not pass; see above")


def figures(path: Path) -> list[tuple[str, str, str]]:
    """The kernels' benchmark in one line a figure."""
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for table in result["head"]:
        shape = " x ".join(map(str, table["shape"]))
        for name, peer in table["peers"].items():
            if "over_bare" in peer:
                time_ms = 1e3 * statistics.median(peer["seconds"])
                rows.append((f"pair_loss {shape}: {name}", f"{peer['over_bare']:.2f} x bare, {time_ms:.2f} ms",
                             f"{peer['extra_mib']:.0f} MiB"))  # fmt: skip
    for table in result["elementwise"]:
        for name, r in table["ops"].items():
            rows.append((f"{name} {table['dtype']}", f"{r['eager_over_ldalign']:.2f} x faster than eager",
                         f"{100 * r['share_of_copy_bandwidth']:.0f} % of copy bandwidth"))  # fmt: skip
    for table in result["attention"]:
        shape = f"{table['heads']} heads of {table['width']}, {table['pairs']} pairs, {table['tokens']} tokens"
        for name, r in table["peers"].items():
            rows.append((f"pair attention, {shape}: {name}", f"{r['over_ldalign']:.2f} x ldalign's time",
                         f"{r['needed_tflops_per_s']:.0f} TFLOP/s needed"))  # fmt: skip
    return rows


if __name__ == "__main__":
    run(main)
