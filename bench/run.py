"""All benchmarks, one script after the other.

    python bench/run.py [--only step,guide] [their options]

`make bench`. Each is a script of this folder with its own `--help`; options that are not named here
go to every script that runs. What counts is the ratio of medians within one run: bare times are the
machine's. Results go to bench/results/.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from ldalign.system.errors import EnvironmentProblem
from ldalign.system.exits import run

HERE = Path(__file__).resolve().parent
BENCHMARKS = (
    "kernels",
    "step",
    "growth",
    "guide",
    "generate",
    "drafts",
    "int8",
    "end_to_end",
    "compile",
    "prepare",
    "startup",
    "packed_file",
)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/run.py", description=__doc__.partition("\n")[0] if __doc__ else ""
    )
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="benchmarks to run, by name")
    parser.add_argument("--repeat", help="measured repetitions")
    parser.add_argument(
        "--small", action="store_true", help="a fraction of the work: does it run at all?"
    )
    parser.add_argument("--results", help="folder of the result files")
    args, others = parser.parse_known_args(argv)
    names = args.only.split(",")
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"--only {name}: choose from {', '.join(BENCHMARKS)}")
    shared = ["--small"] if args.small else []
    shared += ["--repeat", args.repeat] if args.repeat else []
    shared += ["--results", args.results] if args.results else []
    failed = []
    for name in names:
        command = [
            sys.executable,
            str(HERE / f"{name}.py"),
            *shared,
            *(others if name != "kernels" else []),
        ]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        raise EnvironmentProblem(f"bench: {', '.join(failed)} failed; see above")


if __name__ == "__main__":
    run(main)
