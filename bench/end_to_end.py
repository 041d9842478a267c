"""A whole iteration of SPIN, prompts to next policy: ldalign, TRL, and the best pieced together.

    python bench/end_to_end.py [--rows 256] [--new-tokens 64] [--sides ldalign,trl]
        [--pieced-pairs 2]

Part of `make bench`, on a CPU. Every side samples a response to each prompt, takes the start
policy's log-probs as the reference, trains one epoch and measures the held-out rows before and
after. Sides, each as its user runs it, one after the other:

- ldalign: `train/align.py` with the configuration that this script writes.
- trl: `peers/trl_iteration.py`, TRL's DPOTrainer as its user gets it and transformers' `generate`.
- pieced: the GGUF file that ldalign exports, sampled by OpenVINO GenAI (`peers/pieced_sample.py`),
  and DPOTrainer at its best setting (`peers/pieced_train.py`).

All have the same rows, prompts by the same chat template, temperature 1 with no cut, end tokens
honoured, global batches, learning rate, AdamW, float32 weights and states, and bfloat16 products.
DPO's loss with TRL's `sigmoid` is SPIN's (docs/methods.md).
"""

import argparse
import io
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import yaml
from environments import PeerMissing, peer_python
from step import pinned
from work import LENGTHS

from ldalign.data.embedded import make_rows
from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.models.toy import write_toy_model
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.exits import run

ROOT = common.HERE.parent
PEERS = common.HERE / "peers"
STAGES = ("hand-over", "sampling", "reference", "training", "evaluation", "rest")
STAGE_LINE = "stage: "  # what a peer prints as a stage begins
WATCH_SECONDS = 0.1  # between two looks at the memory
LEARNING_RATE, BETA = 1e-5, 0.1
# Not those of the rows: held-out texts are others.
SEEDS = {"train": 0, "heldout": 1}


@dataclass(frozen=True)
class Work:
    """What every side has to do."""

    policy: str  # model folder
    data: str  # JSON Lines of prompt and response
    heldout: str
    rows: int
    heldout_rows: int
    new_tokens: int
    global_batch: int
    pieced_pairs: int  # that the pieced-together side's training takes at a time

    def options(self, out: Path) -> list[str]:
        """The same as a peer's command line."""
        return [
            *("--policy", self.policy, "--data", self.data, "--heldout", self.heldout),
            *("--new-tokens", str(self.new_tokens), "--global-batch", str(self.global_batch)),
            *("--learning-rate", str(LEARNING_RATE), "--beta", str(BETA), "--out", str(out)),
        ]


@dataclass(frozen=True)
class Command:
    """A line that a user types; `stage`: what its time belongs to until it says so itself."""

    words: list[str]
    stage: str = "rest"
    environment: Mapping[str, str] = field(default_factory=dict)


def main(argv: list[str]) -> None:
    args = _parse(argv)
    sides = args.sides.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        policy = common.model_of(args)[0] or write_toy_model(place / "toy")
        lengths = "short" if args.small else "gsm8k"
        counts = {"train": args.rows, "heldout": args.heldout_rows}
        tokenizer = load_tokenizer(policy)
        for split, count in counts.items():
            write_rows(place / f"{split}.jsonl", tokenizer, lengths, count, split)
        work = Work(
            str(policy),
            str(place / "train.jsonl"),
            str(place / "heldout.jsonl"),
            args.rows,
            args.heldout_rows,
            args.new_tokens,
            args.global_batch,
            args.pieced_pairs,
        )
        found = {}
        for name in sides:
            common.say(f"end_to_end: {name} ...")
            found[name] = measure_side(name, work, place / name)
    compare(found)
    result = common.result(
        "end-to-end",
        args,
        lengths=lengths,
        rows=args.rows,
        heldout_rows=args.heldout_rows,
        new_tokens=args.new_tokens,
        global_batch=args.global_batch,
        pieced_pairs=args.pieced_pairs,
        learning_rate=LEARNING_RATE,
        beta=BETA,
        sides=found,
        versions=pinned({"trl": ("trl", "transformers"), "openvino": ("openvino-genai",)}),
    )
    common.save(result, render(result), args.results, "end-to-end-cpu")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = common.options("end_to_end", __doc__)
    parser.add_argument("--rows", type=int, help="prompts; default 256")
    parser.add_argument("--heldout-rows", type=int, help="default 64")
    parser.add_argument("--new-tokens", type=int, help="most of a sampled response; default 64")
    parser.add_argument("--global-batch", type=int, help="rows an optimizer step; default 64")
    parser.add_argument(
        "--pieced-pairs", type=int, default=2, help="that TRL at its best takes at a time"
    )
    parser.add_argument("--sides", default=",".join(SIDES), help="which to measure, by name")
    args = parser.parse_args(argv)
    for key, usual, small in (
        ("rows", 256, 8),
        ("heldout_rows", 64, 4),
        ("new_tokens", 64, 4),
        ("global_batch", 64, 4),
    ):
        if getattr(args, key) is None:
            setattr(args, key, small if args.small else usual)
    if args.no_peers:
        args.sides = "ldalign"
    for name in args.sides.split(","):
        if name not in SIDES:
            parser.error(f"--sides {name}: choose from {', '.join(SIDES)}")
    return args


# ----------------------------------------------------------------------------------------- the rows


def write_rows(path: Path, tokenizer: Tokenizer, lengths: str, count: int, split: str) -> None:
    """Writes `count` rows of text whose prompts and responses have the given lengths in tokens.

    The text is that of the embedded set's rows, one after the other, cut: what it says matters to
    nobody's time. A text read again may have a token more or less than it was cut at.
    """
    dice = random.Random(f"{SEEDS[split]}/{lengths}")
    template = LENGTHS[lengths].template
    drawn = [LENGTHS[lengths].draw(dice) for _ in range(count)]
    source = make_rows(SEEDS[split], split, 2000)
    prompts, responses = (
        tokenizer.encode("\n".join(row["messages"][turn]["content"] for row in source))
        for turn in (0, 1)
    )

    def some(stream: list[int], tokens: int) -> str:
        start = dice.randrange(len(stream) - tokens)
        return tokenizer.decode(stream[start : start + tokens]).strip()

    with path.open("w", encoding="utf-8") as file:
        for prompt, response, _ in drawn:
            row = {
                "prompt": some(prompts, prompt - template),
                "response": some(responses, response),
            }
            file.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------------------------------- the sides


def ldalign_commands(work: Work, out: Path) -> list[Command]:
    """Ours: one command, and the configuration, which is written here."""
    config = out / "spin.yaml"
    config.write_text(yaml.safe_dump(our_config(work, out), sort_keys=False), encoding="utf-8")
    return [Command([sys.executable, str(ROOT / "train/align.py"), "--config", str(config)])]


def our_config(work: Work, out: Path) -> dict[str, Any]:
    """What a user has to say of this run; the rest are ldalign's defaults."""
    return {
        "run": str(out / "run"),
        "policy": work.policy,
        "data": work.data,
        "heldout": work.heldout,
        "method": "spin",
        "iterations": 1,
        "max_new_tokens": work.new_tokens,
        "global_batch": work.global_batch,
        "learning_rate": LEARNING_RATE,
        "beta": BETA,
        "dtype": "bfloat16",
        "policy_dtype": "float32",
        "sampling": {"batch_rows": 256},
        "training": {
            "epochs": 1,
            "optimizer": "adamw",
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "micro_tokens": 3072,
            "checkpointing": "selective",
        },
        "evaluation": {"rows": work.heldout_rows},
        "validation": {"rows": 0},
    }


def trl_commands(work: Work, out: Path) -> list[Command]:
    """TRL and transformers: one script in one environment."""
    script = [str(peer_python("trl")), str(PEERS / "trl_iteration.py")]
    return [Command([*script, *work.options(out)])]


def pieced_commands(work: Work, out: Path) -> list[Command]:
    """Weights to GGUF, samples by OpenVINO GenAI, the rest by TRL."""
    gguf, samples = str(out / "policy.gguf"), str(out / "samples.jsonl")
    sample = [str(peer_python("openvino")), str(PEERS / "pieced_sample.py")]
    train = [str(peer_python("trl")), str(PEERS / "pieced_train.py")]
    train += ["--samples", samples, "--pairs-at-a-time", str(work.pieced_pairs)]
    export = [sys.executable, str(ROOT / "train/export.py"), "gguf", work.policy, gguf, "dtype=f16"]
    return [
        Command(export, "hand-over"),
        Command([*sample, gguf, work.data, samples, str(work.new_tokens)], "sampling"),
        Command([*train, *work.options(out)], "rest", common.KEEP_MEMORY),
    ]


@dataclass(frozen=True)
class Side:
    """Whose iteration is measured."""

    name: str
    commands: Any  # (Work, Path) -> list[Command]
    scripts: tuple[str, ...]  # that its user writes, of bench/peers


SIDES = {
    "ldalign": Side("ldalign", ldalign_commands, ()),
    "trl": Side("TRL + transformers", trl_commands, ("trl_iteration.py", "held_out.py")),
    "pieced": Side(
        "OpenVINO GenAI + TRL at its best",
        pieced_commands,
        ("pieced_sample.py", "pieced_train.py", "held_out.py"),
    ),
}


def measure_side(name: str, work: Work, out: Path) -> dict[str, Any]:
    """One side's iteration: seconds in all and by stage, peak memory, lines of its user's code, and
    what came out; of a peer that cannot run {"skipped": why}.
    """
    side = SIDES[name]
    out.mkdir()
    try:
        commands = side.commands(work, out)
        watched = watch(commands, out)
    except (PeerMissing, common.Failed) as why:
        if name == "ldalign":
            raise EnvironmentProblem(f"bench: end_to_end: ldalign failed: {why}") from None
        return {"skipped": str(why)}
    if name == "ldalign":
        stages, made = read_run(out / "run", watched["seconds"])
        lines = leaves(our_config(work, out))
    else:
        stages = watched["stages"]
        made = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        lines = sum(code_lines(PEERS / script) for script in side.scripts)
    shown = {stage: stages.get(stage, 0.0) for stage in STAGES}
    return {**watched, "stages": shown, "user_lines": lines + len(commands), "made": made}


def read_run(folder: Path, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """(Seconds by stage, what came out) of a run of ours, by its own summaries."""

    def summary(stage: str) -> dict[str, float]:
        text = (folder / stage / "summary.json").read_text(encoding="utf-8")
        return json.loads(text)  # type: ignore[no-any-return]

    before, after = summary("start/evaluation"), summary("iteration_0/evaluation")
    responses, policy = summary("iteration_0/responses"), summary("iteration_0/policy")
    stages = {
        "sampling": responses["seconds"],
        "reference": summary("iteration_0/reference")["seconds"],
        "training": policy["seconds"],
        "evaluation": before["seconds"] + after["seconds"],
    }
    metrics = (folder / "iteration_0/policy/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    made = {
        "sampled_rows": responses["rows"],
        "sampled_tokens": responses["tokens"],
        "steps": policy["steps"],
        "first_loss": json.loads(metrics[0])["loss"],
        "nll_before": before["nll/real"],
        "nll_after": after["nll/real"],
    }
    return stages | {"rest": seconds - sum(stages.values())}, made


def compare(found: dict[str, dict[str, Any]]) -> None:
    """Adds to every side that ran its time and memory over ldalign's."""
    ours = found.get("ldalign")
    for side in found.values():
        if ours and "skipped" not in side:
            side["time_ratio"] = side["seconds"] / ours["seconds"]
            side["memory_ratio"] = side["peak_gib"] / ours["peak_gib"]


# --------------------------------------------------------------------------------- what is measured


def watch(commands: list[Command], out: Path) -> dict[str, Any]:
    """Runs the commands in order: seconds in all and by stage, peak memory in GiB of all processes
    below this one, the others' share of the cores. Raises common.Failed.
    """
    stages: dict[str, float] = {}
    busy, began = common.Busy(), time.perf_counter()
    with Memory() as memory:
        for i, command in enumerate(commands):
            log = out / f"log-{i}.txt"
            _run(command, log, stages)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "stages": stages,
        "peak_gib": memory.peak / 2**30,
        "others": busy.others(),
    }


def _run(command: Command, log: Path, stages: dict[str, float]) -> None:
    """Runs a command and adds its seconds to the stages that it says it is in."""
    # in a folder that goes: TRL keeps the reference's log-probs, and would find them there again
    own = {"HF_HOME": str(log.parent / "huggingface"), "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **common.QUIET, **own, **command.environment}
    environment.pop("PYTHONPATH", None)
    stage, since = command.stage, time.perf_counter()
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command.words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(STAGE_LINE):
                now = time.perf_counter()
                stages[stage] = stages.get(stage, 0.0) + now - since
                stage, since = line.removeprefix(STAGE_LINE).strip(), now
        code = process.wait()
    stages[stage] = stages.get(stage, 0.0) + time.perf_counter() - since
    if code:
        said = log.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
        what = " ".join(shlex.quote(Path(word).name) for word in command.words[:2])
        raise common.Failed(f"{what}: exit code {code}: {said[-1][:300]}")


class Memory:
    """The peak memory of all processes below this one, in bytes, while it is entered.

    Of each its anonymous pages; of files that are mapped, such as torch's libraries, the most that
    one process has in memory, as they are there once. Looks every WATCH_SECONDS: a peak between two
    looks is missed.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(WATCH_SECONDS):
            self.peak = max(self.peak, tree_bytes(os.getpid()))


def tree_bytes(root: int) -> int:
    """Memory of all processes below `root`, which is not counted, in bytes (Linux)."""
    own, mapped, waiting = 0, 0, _children(root)
    while waiting:
        process = waiting.pop()
        waiting += _children(process)
        try:
            status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
        except OSError:  # it has ended
            continue
        kib = {
            name: int(value.split()[0])
            for name, _, value in (line.partition(":") for line in status.splitlines())
            if name.startswith("Rss")
        }
        own += kib.get("RssAnon", 0) + kib.get("RssShmem", 0)
        mapped = max(mapped, kib.get("RssFile", 0))
    return (own + mapped) * 1024


def _children(process: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += map(int, task.read_text(encoding="utf-8").split())
        except OSError:  # the thread has ended
            continue
    return found


def code_lines(path: Path) -> int:
    """Lines of a script with code in them: no blank ones, comments, docstrings, nor lines that tell
    this benchmark which stage begins.
    """
    text = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    begins = True  # a statement: a string alone in one is a docstring
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in silent | {tokenize.ENDMARKER}:
            begins = begins or token.type == tokenize.NEWLINE
            continue
        if not (begins and token.type == tokenize.STRING):
            lines.update(range(token.start[0], token.end[0] + 1))
        begins = False
    said = text.splitlines()
    return sum(not said[line - 1].lstrip().startswith(f'print("{STAGE_LINE}') for line in lines)


def leaves(config: Mapping[str, Any]) -> int:
    """How many keys of a configuration have a value: its lines, written as `key: value`."""
    return sum(leaves(value) if isinstance(value, dict) else 1 for value in config.values())


# ----------------------------------------------------------------------------------------- the page


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    sides: dict[str, dict[str, Any]] = result["sides"]
    texts = "GSM8K's" if result["lengths"] == "gsm8k" else "short"
    lines = [
        "## end to end, cpu",
        "",
        f"One iteration of SPIN with {result['policy']}, from prompts to the next policy's folder: "
        f"{result['rows']} rows of {texts} lengths, responses of at most {result['new_tokens']} "
        "tokens sampled at temperature 1 with end tokens honoured, log-probs of the reference, one "
        f"epoch in global batches of {result['global_batch']} at {result['learning_rate']:g} "
        f"(AdamW, float32 weights and states, bfloat16 products), and the real responses' "
        f"likelihood on {result['heldout_rows']} held-out rows before and after. Whole commands, "
        "Python's start and reports included. Peak memory: of all processes of a side together. "
        "User's lines: what a user of each has to write, without blank lines, comments and "
        "docstrings: ours a key a line, theirs scripts; each command is a line. Others: the share "
        "of the cores that other processes used meanwhile.",
        "",
        *common.table(
            "",
            "seconds",
            "time / ldalign's",
            "peak memory, GiB",
            "memory / ldalign's",
            "user's lines",
            "others",
        ),
    ]
    ran = {SIDES[key].name: side for key, side in sides.items() if "skipped" not in side}
    for key, side in sides.items():
        if "skipped" in side:
            cells = [f"not run: {side['skipped']}", "", "", "", "", ""]
        else:
            ratios = [f"{side[r]:.2f}" if r in side else "" for r in ("time_ratio", "memory_ratio")]
            cells = [f"{side['seconds']:.0f}", ratios[0], f"{side['peak_gib']:.2f}", ratios[1]]
            cells += [str(side["user_lines"]), f"{100 * side['others']:.0f} %"]
        lines.append(common.row(SIDES[key].name, *cells))
    lines += ["", "**Where the time goes**, in seconds:", "", *common.table("", *STAGES)]
    for name, side in ran.items():
        lines.append(common.row(name, *(f"{side['stages'][stage]:.1f}" for stage in STAGES)))
    lines += [
        "",
        "Hand-over: the policy's weights into the sampling engine's format. Reference: 0 where the "
        "trainer computes it within its steps. Rest: Python's start, reading the rows, saving, "
        "the report.",
        "",
        "**What came out**, which shows that the work was the same:",
        "",
        *common.table(
            "",
            "tokens a sampled response",
            "sampled tokens/s",
            "steps",
            "first loss",
            "NLL before",
            "NLL after",
        ),
    ]
    for name, side in ran.items():
        made = side["made"]
        mean = made["sampled_tokens"] / made["sampled_rows"]
        speed = made["sampled_tokens"] / max(side["stages"]["sampling"], 1e-9)
        figures = [f"{made[key]:.4f}" for key in ("first_loss", "nll_before", "nll_after")]
        cells = [f"{mean:.1f}", f"{speed:.0f}", f"{made['steps']:.0f}", *figures]
        lines.append(common.row(name, *cells))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [
        *lines,
        "",
        "NLL: nats a token of the held-out real responses. OpenVINO GenAI + TRL: float16 GGUF file "
        "by ldalign's exporter, computed in bfloat16; malloc's thresholds raised for its training, "
        f"which takes {result['pieced_pairs']} pairs at a time. "
        f"Peers: {versions}.",
    ]


if __name__ == "__main__":
    run(main)
