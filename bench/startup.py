"""What a user waits for before anything happens: help, and the first token of the default model.

    python bench/startup.py [--repeat 5]

Part of `make bench`. Whole commands, from their start to their end, a process each, in turns;
beside them what Python takes to import torch alone, below which nothing that computes can be. The
peer's first token is transformers' by the script that its documentation shows.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from environments import PeerMissing, peer_python

from ldalign.models.toy import write_toy_model
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.exits import run

PEER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
chat = [{"role": "user", "content": "Name a river."}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
ids = ids if torch.is_tensor(ids) else ids["input_ids"]
model.generate(ids, max_new_tokens=1, do_sample=True)
"""


def main(argv: list[str]) -> None:
    parser = common.options("startup", __doc__)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        policy = common.model_of(args)[0] or write_toy_model(place / "policy")
        (place / "prompts.jsonl").write_text('{"prompt": "Name a river."}\n', encoding="utf-8")
        rows = measure(commands(policy, place, args), 1 if args.small else args.repeat or 5)
    result = common.result("startup", args, rows=rows)
    common.save(result, render(result), args.results, "startup-cpu")


def commands(policy: Path, place: Path, args: Any) -> dict[str, list[str] | str]:
    """What is measured, by name; a text says why something is not."""
    ldalign = [sys.executable, "-m", "ldalign"]
    generate = f"generate policy={policy} prompts={place / 'prompts.jsonl'} max_new_tokens=1"
    found: dict[str, list[str] | str] = {
        "ldalign --help": [*ldalign, "--help"],
        "ldalign align --help": [*ldalign, "align", "--help"],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "ldalign generate, one token": [*ldalign, *generate.split(), f"output={place}/answers"],
        "the same by weights in 8 bits": [
            *ldalign,
            *generate.split(),
            "sampling.weights=int8",
            f"output={place}/answers_8_bits",
        ],
    }
    if not args.no_peers and not args.small:
        try:
            python = peer_python("transformers")
            found["transformers, one token"] = [str(python), "-c", PEER, str(policy)]
        except PeerMissing as why:
            found["transformers, one token"] = str(why)
    return found


def measure(commands: dict[str, list[str] | str], repeat: int) -> list[dict[str, Any]]:
    """Seconds of each command, `repeat` times after one that brings its files into memory."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    environment = {**os.environ, **common.QUIET}
    for number in range(repeat + 1):
        for name, command in commands.items():
            if isinstance(command, str):
                continue
            whole = [part.replace("/answers", f"/answers{number}") for part in command]
            began = time.perf_counter()
            done = subprocess.run(whole, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise EnvironmentProblem(f"bench: {name}: {done.stderr.strip()[-300:]}")
            if number:
                seconds[name].append(time.perf_counter() - began)
    floor = seconds["python -c 'import torch'"]
    return [
        {"name": name, "skipped": command}
        if isinstance(command, str)
        else {
            "name": name,
            "seconds": seconds[name],
            "median_seconds": statistics.median(seconds[name]),
            "time_ratio": common.median_ratio(seconds[name], floor),
        }
        for name, command in commands.items()
    ]


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    lines = [
        "## startup, cpu",
        "",
        f"{result['policy']}; whole commands from start to end, medians after one that warms the "
        "disk's cache.",
        "",
        *common.table("command", "seconds", "times `import torch`"),
    ]
    for row in result["rows"]:
        if "skipped" in row:
            lines.append(common.row(row["name"], f"not run: {row['skipped']}", ""))
        else:
            cells = f"{row['median_seconds']:.2f}", f"{row['time_ratio']:.2f}"
            lines.append(common.row(row["name"], *cells))
    return lines


if __name__ == "__main__":
    run(main)
