"""The benchmarks: `python bench/run.py [--only kernels,step,generate] [--repeat 5] [--policy FOLDER] [--small]`
(`make bench`). `kernels` is bench/kernels.py, a script of its own.

Every benchmark is a module of this folder; every peer of it runs in a process of its own, on the same token ids, in the
same dtype, one after the other. What counts is the ratio of medians within one run: bare times are the machine's.
Results go to bench/results/NAME.json and NAME.md.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ldalign import tasks
from ldalign.data import Row
from ldalign.env import describe_machine
from ldalign.errors import EnvironmentProblem, run
from ldalign.pretrained import DEFAULT_MODEL, resolve_model
from ldalign.settings import RunConfig
from ldalign.stages import choose_dtype
from ldalign.tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parent
# Module: (what one repetition is, unit of `work`, how many rows of the embedded data it takes per repetition)
BENCHMARKS = {
    "step": ("one optimizer step of weighted DPO (AdamW, reference log-probs cached)", "tokens trained", 8),
    "generate": ("sampling at temperature 1, every row to its full length", "tokens made", 32),
}
PEERS = ("ldalign", "transformers")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default=",".join(("kernels", *BENCHMARKS)), help="benchmarks to run, by name")
    parser.add_argument("--repeat", type=int, default=5, help="measured repetitions, after one to warm up")
    parser.add_argument("--policy", default=DEFAULT_MODEL, help="model folder or name")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "ldalign", help="of fetched models")
    parser.add_argument("--small", action="store_true", help="a fraction of the work: does it run at all?")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the result files")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    for name in names:
        if name not in ("kernels", *BENCHMARKS):
            parser.error(f"--only {name}: choose from kernels, {', '.join(BENCHMARKS)}")
    if "kernels" in names:
        command = [sys.executable, str(HERE / "kernels.py"), "--results", str(args.results)]
        command += ["--repeat", str(args.repeat), *(["--small"] if args.small else [])]
        if subprocess.run(command, check=False).returncode:
            raise EnvironmentProblem("bench: kernels failed; see above")
    names = [name for name in names if name in BENCHMARKS]
    folder = resolve_model(args.policy, args.cache) if names else Path()
    for name in names:
        result = measure(name, folder, args.repeat, args.small) | {"policy": args.policy}
        args.results.mkdir(exist_ok=True)
        (args.results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (args.results / f"{name}.md").write_text(render(result), encoding="utf-8")
        print(render(result))


def measure(name: str, folder: Path, repeat: int, small: bool) -> dict[str, Any]:
    """One benchmark: every peer in its own process; medians, ratios, peak memory."""
    what, unit, rows = BENCHMARKS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = str(choose_dtype(RunConfig(), device)).removeprefix("torch.")
    peers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        job = {
            "folder": str(folder), "dtype": dtype, "device": str(device), "repeat": repeat, "scratch": scratch,
            "new_tokens": 4 if small else 48, "batch": 2 if small else rows,
            "pairs": make_pairs(folder, (2 if small else rows) * (repeat + 1)),
        }  # fmt: skip
        for peer in PEERS:
            if peer != "ldalign" and importlib.util.find_spec(peer) is None:
                print(f"bench: {peer} is not installed (requirements/dev.txt has it): not measured", file=sys.stderr)
                continue
            print(f"bench: {name}: {peer} ...", file=sys.stderr, flush=True)
            peers[peer] = one_peer(name, job | {"peer": peer})
    ours = peers["ldalign"]
    for peer in peers.values():
        peer["median_seconds"] = statistics.median(peer["seconds"])
        peer["work_per_second"] = statistics.median(w / s for w, s in zip(peer["work"], peer["seconds"], strict=True))
    for peer in peers.values():
        peer["time_ratio"] = peer["median_seconds"] / ours["median_seconds"]
        peer["memory_ratio"] = peer["peak_gib"] / ours["peak_gib"]
    return {
        "benchmark": name, "what": what, "unit": unit, "dtype": dtype, "device": str(device), "repeat": repeat,
        "small": small, "batch": job["batch"], "peers": peers, "machine": describe_machine(),
        "versions": {package: importlib.metadata.version(package) for package in ("torch", *peers)},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def one_peer(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """{"seconds": [...], "work": [...], "peak_gib": ...} from `python bench/NAME.py`, which reads the job on stdin."""
    command = [sys.executable, str(HERE / f"{name}.py")]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise EnvironmentProblem(f"bench: {name}: {job['peer']} failed: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def make_pairs(folder: Path, count: int) -> list[dict[str, list[int]]]:
    """Pairs of embedded rows in token ids; the loser is another row's response, of a length that differs."""
    tokenizer = load_tokenizer(folder)
    rows = tasks.make_rows(0, "train", count)
    ids = [
        tokenizer.pair_ids(Row(r["id"], (r["messages"][0],), r["messages"][1]["content"])) for r in rows
    ]  # fmt: skip
    return [
        {"prompt": list(own.prompt), "real": list(own.response), "generated": list(other.response)}
        for own, other in zip(ids, [*ids[1:], ids[0]], strict=True)
    ]


def render(result: dict[str, Any]) -> str:
    """The Markdown page of one result."""
    machine, unit = result["machine"], result["unit"]
    lines = [
        f"## {result['benchmark']}", "",
        f"{result['what']}; {result['batch']} rows a repetition, {result['policy']}, {result['dtype']} on "
        f"{result['device']}, medians of {result['repeat']} after one to warm up.", "",
        f"| | seconds | {unit} a second | time / ldalign's | peak memory, GiB | memory / ldalign's |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, p in result["peers"].items():
        speed = f"{p['median_seconds']:.3f} | {p['work_per_second']:.0f} | {p['time_ratio']:.2f}"
        lines.append(f"| {name} | {speed} | {p['peak_gib']:.2f} | {p['memory_ratio']:.2f} |")
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    lines += [
        "", f"{result['date']}, commit {machine['git_commit']}, {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['torch_threads']} threads; {versions}.",
    ]  # fmt: skip
    if result["small"]:
        lines += ["", "Made with --small: shows that it runs, measures nothing."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
