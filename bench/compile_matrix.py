"""What every Triton kernel takes on GPUs that are not here: registers, spills, shared memory.

    python bench/compile_matrix.py

After `make gpu-check`, whose Tritons it compiles with, beside the installed one. A line is a kernel
in one dtype on one GPU, the worst of all production shapes.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common

from ldalign.kernels.compile_check import SHARED_KIB, Compiled, compiled_apart, problems
from ldalign.system.exits import run

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> None:
    args = common.options("compile_matrix", __doc__).parse_args(argv)
    jobs: list[tuple[Path | None, str]] = [(None, "--short")]
    if not args.small:
        others = [made.parent for made in sorted(ROOT.glob(".venv-triton-*/.made"))]
        jobs = [(place, f"--arch={arch}") for place in (None, *others) for arch in SHARED_KIB]
    rows: list[Compiled] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # each waits for a process
        done = threads.map(lambda job: compiled_apart(*job), jobs)
        for (place, option), found in zip(jobs, done, strict=True):
            common.say(f"compile_matrix: {place.name if place else 'triton'} {option}")
            rows += found
    result = common.result("compile_matrix", args, rows=summary(rows), problems=problems(rows))
    common.save(result, render(result), args.results, "compile-matrix")


def summary(rows: Iterable[Compiled]) -> list[dict[str, Any]]:
    """The worst of each (kernel, dtype, GPU, Triton): the most of what is taken, the fewest of
    each instruction that some shape has."""
    groups: dict[tuple[str, str, int, str], list[Compiled]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.dtype, row.arch, row.triton), []).append(row)
    return [
        dict(zip(("kernel", "dtype", "arch", "triton"), key, strict=True))
        | {
            name: max(getattr(row, name) for row in group)
            for name in ("registers", "spilled_bytes", "looped_spills", "shared_bytes")
        }
        | {
            "shapes": len(group),
            "instructions": {
                name: min(row.instructions[name] for row in group if row.instructions[name])
                for name in group[0].instructions
                if any(row.instructions[name] for row in group)
            },
        }
        for key, group in sorted(groups.items())
    ]


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    tritons = sorted({row["triton"] for row in result["rows"]})
    lines = [
        "## compile_matrix",
        "",
        "By Triton version: registers of a thread / bytes of them spilled, all before and after "
        "loops where nothing else is said / KiB of shared memory of a program, the worst of all "
        "shapes. Instructions of the last version: the fewest that a "
        "shape with some has.",
        "",
        *common.table("kernel", "dtype", "GPU", *tritons, "instructions"),
    ]
    groups: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["kernel"], row["dtype"], row["arch"]), {})[row["triton"]] = row
    for (kernel, dtype, arch), by in groups.items():
        cells = [
            f"{x['registers']} / {x['spilled_bytes']} / {x['shared_bytes'] / 1024:.1f}"
            if (x := by.get(triton))
            else "-"
            for triton in tritons
        ]
        counts = by[max(by)]["instructions"].items()
        instructions = ", ".join(f"{name} {count}" for name, count in counts)
        lines.append(common.row(kernel, dtype, f"sm_{arch}", *cells, instructions))
    return [*lines, "", *(result["problems"] or ["No problems."])]


if __name__ == "__main__":
    run(main)
