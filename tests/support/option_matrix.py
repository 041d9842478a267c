"""`make test-options`: every choice of every key that selects code, each pair of them in one run.

    python tests/support/option_matrix.py [--policy smollm2-135m-instruct] [--rows 0 7 ...]
    [--jobs N] [--keep FOLDER] [--list]

A run is `train/align.py` on a few short rows, two optimizer steps an iteration. It holds where the
command ends well, which the product's own checks must allow: the loss of step 0 (policy equals
reference), finite losses, gradients, weights and distances. Beside these every number of its
`metrics.jsonl` and summaries must be finite.

The choices are read from the settings: enumerated keys with all their values (`enumerated`), and
beside them `MORE`. `LEFT_OUT` says of an enumerated key why it is in no run, `RULES` of values
which the product refuses together, and by which words. Rows are made greedily, the same on every
call: each begins with a pair that no row has yet, and takes for every other key the value that
brings the most new pairs. A row that fails leaves its log in `runs/options/`; exit code 1.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent))

from runs import ROOT, one_thread, script_command

from ldalign.objective import WEIGHTS
from ldalign.run.settings import GUIDED, UNREAD, RunConfig, reader, unread
from ldalign.system.files import read_jsonl

Row = dict[str, Any]  # a value of every key of the matrix
Pair = frozenset[tuple[str, Any]]

# Of keys that are no enumeration, the values that select code; the first is the usual one.
MORE: dict[str, tuple[Any, ...]] = {
    "data": ("embedded", "embedded-wordings", "ROWS"),
    "iterations": (1, 2),
    "max_length": (128, 0),
    "max_new_tokens": (12, 0),
    "weight_clip": (None, 1.5),
    "sampling.temperature": (1.0, 0.0),
    "sampling.top_k": (0, 5),
    "sampling.top_p": (1.0, 0.9),
    "sampling.min_p": (0.0, 0.05),
    "sampling.repetition_penalty": (1.0, 1.2),
    "sampling.stop": ("[]", '["."]'),
    "training.weight_decay": (0.0, 0.1),
    "training.max_grad_norm": (1.0, 0.0),
    "loss.nll": (0.0, 0.5),
    "loss.label_smoothing": (0.0, 0.1),
    "guide.latent_tokens": (1, 2),
    "guide.contrast": (10.0, 0.0),
    "guide.bag_of_words": (0.0, 0.5),
    "guide.token_dropout": (None, 0.5),
    "guide.latent_noise": (0.0, 0.1),
    "guide.loss_tokens": (None, 4),
    "judge.model": ("checker", "policy", "embedding"),
    "sft.epochs": (0, 1),
    "continual_sft.epochs": (0, 1),
    "validation.rows": (0, 8),
    "validation.early_stop": (None, 1),
}
# Enumerated keys that no run of the matrix sets, and why.
LEFT_OUT = {
    "device": "a machine has one; make gpu runs the tests of the other",
    "training.whole": "acts between ranks: tests/system/test_distributed.py",
    "guide.gate": "stop ends a run whose guide tells nothing, as after two steps: kept at warn",
    "log": "the libraries of the sinks are optional: tests/system/test_sinks.py",
    "benchmarks.chat_template": "needs files of a benchmark: tests/evaluation/test_benchmarks.py",
    "hub.private": "sends files into the world: tests/system/test_push.py",
}
# What every run has beside its row: as small as it can be.
SMALL = (
    "max_rows=8",
    "global_batch=4",
    "training.steps=2",
    "training.micro_tokens=1024",
    "sampling.batch_rows=16",
    "sft.rows=8",
    "sft.global_batch=4",
    "continual_sft.rows=8",
    "continual_sft.global_batch=4",
    "evaluation.rows=8",
    "evaluation.samples=1",
    "learning_rate=1e-5",
)
SMALL_GUIDE = (  # not read by every method
    "guide.gate=warn",
    "guide.epochs=1",
    "guide.layers=1",
    "guide.width=32",
    "guide.heads=2",
    "guide.vocabulary=400",
    "guide.latent_width=16",
)
UNGUIDED = tuple(kind for kind in WEIGHTS if kind not in GUIDED)
DECIDING = ("method", "sft_prompts", "weights")  # which other keys are read: chosen first


@dataclass(frozen=True)
class Rule:
    """Values that the product refuses together, one of each key; `says` is in what it says.

    at: settings, as they are read; start, by what the data and the models are, also with --dry-run;
    run, in the middle of it.
    """

    when: Mapping[str, tuple[Any, ...]]
    says: str
    at: Literal["settings", "start", "run"] = "settings"

    def holds(self, row: Row) -> bool:
        """Whether a row has such values."""
        return all(row[key] in values for key, values in self.when.items())


RULES = (
    Rule({"loss.kind": ("ipo",), "loss.label_smoothing": (0.1,)}, "loss.kind=ipo has none"),
    Rule({"method": ("dpo",), "iterations": (2,)}, "has the same pairs in each"),
    Rule(
        {"method": ("sft",), "sft_prompts": ("all",), "iterations": (2,)},
        "has the same pairs in each",
    ),
    Rule(
        {"method": ("ld_align",), "weights": UNGUIDED, "distance": ("cosine",)},
        "has a distance of its own",
    ),
    Rule(
        {"method": ("ld_align",), "weights": UNGUIDED, "guide.retrain": (True,)},
        "come of no guide",
    ),
    Rule({"guide.backbone": ("gpt2",), "guide.towers": ("frozen",)}, "must be trained"),
    Rule(
        {"guide.latent_map": ("fitted", "tuned"), "guide.readout": ("queries",)},
        "is fitted to mean states",
    ),
    Rule(
        {"guide.latent_map": ("fitted", "tuned"), "guide.injection": ("prefix", "both")},
        "is fitted to mean states",
    ),
    Rule(
        {"guide.bag_of_words": (0.5,), "guide.injection": ("prefix",)},
        "predicts through what guide.injection=output adds",
    ),
    Rule(
        {"validation.rows": (0,), "validation.early_stop": (1,)},
        "no rows are set aside for validation",
    ),
    Rule(
        {"validation.rows": (0,), "validation.metric": ("accuracy",)},
        "no rows are set aside for validation",
    ),
    Rule({"validation.rows": (0,), "select": ("best",)}, "no rows are set aside for validation"),
    Rule(
        {
            "evaluation.iterations": ("last",),
            "iterations": (2,),
            "validation.rows": (8,),
            "select": (None, "best"),
        },
        "the best iteration by validation may be another",
    ),
    Rule({"method": ("self_reward",), "judge.model": ("embedding",)}, "judges by itself"),
    Rule(
        {"method": ("ld_align",), "weights": ("oracle",), "data": ("ROWS",)},
        "name no checker",
        "start",
    ),
    Rule({"method": ("dpo",), "data": ("ROWS",)}, "has no rejected response", "start"),
    Rule(
        {"validation.metric": ("accuracy",), "data": ("ROWS",)},
        "a program can check none of the",
        "start",
    ),
    # The start policy is hardly ever right: every pair is a tie (test_methods_of_two_samples).
    Rule({"method": ("rlaif",), "judge.model": ("checker",)}, "no pair left to learn from", "run"),
    Rule(
        {"method": ("self_reward", "rlaif"), "sampling.temperature": (0.0,)},
        "no pair left to learn from",
        "run",
    ),
)


# ------------------------------------------------------------------------------------- the choices


def enumerated(cls: type = RunConfig, prefix: str = "") -> dict[str, tuple[Any, ...]]:
    """{dotted key: its values} of the settings' keys that take one of a few: Literal, bool, and
    lists of such.
    """
    found: dict[str, tuple[Any, ...]] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= enumerated(typing.cast(type, hint), f"{prefix}{field.name}.")
        elif values := _values(hint):
            found[prefix + field.name] = values
    return found


def _values(hint: Any) -> tuple[Any, ...]:
    """The values of a type that has few; () for others."""
    if hint is bool:
        return (False, True)
    if hint is types.NoneType:
        return (None,)
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return parts
    if typing.get_origin(hint) is list:
        return _values(parts[0])
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        found = [_values(part) for part in parts if part is not types.NoneType]
        if found and all(found):
            return (*sum(found, ()), *((None,) if types.NoneType in parts else ()))
    return ()


@functools.cache
def choices() -> dict[str, tuple[Any, ...]]:
    """{key: its values} of the whole matrix, the usual value first."""
    found = dict(MORE)
    for key, values in enumerated().items():
        if key not in LEFT_OUT:
            usual = default(key)
            found[key] = (usual, *(value for value in values if value != usual))
    return found


def default(key: str) -> Any:
    """A key's default in the settings."""
    value: Any = RunConfig()
    for part in key.split("."):
        value = getattr(value, part)
    return value


# Of each method, by its `reader`, the keys of the matrix that it does not read.
NOT_READ = {name: frozenset(unread(name, choices())) for name in UNREAD}


OF_GUIDE = frozenset({key for key in choices() if key.startswith("guide.")} | {"distance"})


def refusal(row: Row) -> str | None:
    """Why the product refuses a row, by a piece of what it says; None: it does not."""
    method = str(row["method"])
    for key in NOT_READ[reader(method, str(row["sft_prompts"]))]:
        if row[key] != choices()[key][0]:
            return f"method={method}"
    return next((rule.says for rule in RULES if rule.holds(row)), None)


def idle(row: Row) -> frozenset[str]:
    """The keys that a row's run does not read: by its method, and the guide's without a guide."""
    method = str(row["method"])
    keys = NOT_READ[reader(method, str(row["sft_prompts"]))]
    guided = method != "ld_align" or row["weights"] in GUIDED
    return keys if guided else keys | OF_GUIDE


# -------------------------------------------------------------------------------------- the matrix


def pairs(row: Row) -> Iterator[Pair]:
    """All pairs of two keys' values in a row, of those that its run reads."""
    not_read = idle(row)
    return map(frozenset, combinations([i for i in row.items() if i[0] not in not_read], 2))


def completed(given: Mapping[str, Any]) -> Row | None:
    """A row that has the given values and reads them, and no other unusual ones than it takes to be
    allowed; None where there is none.

    Tried are the methods, with their usual judge, and what a contradiction is about.
    """
    all_of = choices()
    usual = {key: values[0] for key, values in all_of.items()}
    helps: tuple[Row, ...] = (
        {},
        {"judge.model": "policy"},
        {"validation.rows": 8},
        {"validation.rows": 8, "select": "last"},
        {"judge.model": "policy", "validation.rows": 8},
        {"judge.model": "policy", "validation.rows": 8, "select": "last"},
    )
    for method in all_of["method"]:
        for sft_prompts in all_of["sft_prompts"]:
            for more in helps:
                row = usual | {"method": method, "sft_prompts": sft_prompts} | more | given
                if refusal(row) is None and not given.keys() & idle(row):
                    return row
    return None


def matrix(seed: int = 0) -> list[Row]:
    """The rows: every pair of values that the product allows is in one of them."""
    all_of = choices()
    items = [(key, value) for key, values in all_of.items() for value in values]
    wanted = [(a, b) for a, b in combinations(items, 2) if a[0] != b[0]]
    left = {frozenset(pair): row for pair in wanted if (row := completed(dict(pair)))}
    rows: list[Row] = []
    draw = random.Random(seed)
    while left:
        first = next(iter(left))
        row = dict(left[first])
        fixed = {key for key, _ in first}
        keys = [key for key in all_of if key not in fixed]
        draw.shuffle(keys)
        keys.sort(key=lambda key: key not in DECIDING)
        for key in keys:
            tried = ((value, row | {key: value}) for value in all_of[key])
            allowed = [v for v, new in tried if refusal(new) is None and not fixed & idle(new)]
            row[key] = max(allowed, key=lambda value: _gain(row, key, value, left))
        rows.append(row)
        for pair in pairs(row):
            left.pop(pair, None)
    return rows


def _gain(row: Row, key: str, value: Any, left: Mapping[Pair, Row]) -> int:
    """How many pairs that no row has yet a value of a key would bring to a row."""
    own, not_read = (key, value), idle(row | {key: value})
    if key in not_read:
        return 0
    others = (item for item in row.items() if item[0] != key and item[0] not in not_read)
    return sum(frozenset((own, item)) in left for item in others)


# ---------------------------------------------------------------------------------------- the runs


def arguments(row: Row, made: Path) -> list[str]:
    """The `key=value` of a row's run; made: the folder of `make_inputs`."""
    not_read = NOT_READ[reader(str(row["method"]), str(row["sft_prompts"]))]
    row = row | {"data": str(made / "rows.jsonl")} if row["data"] == "ROWS" else row
    keys = [f"{key}={said(value)}" for key, value in row.items() if key not in not_read]
    if row["method"] == "ld_align":
        keys += SMALL_GUIDE
    semantic = row["method"] == "ld_align" and row["weights"] == "semantic"
    if semantic or ("judge.model" not in not_read and row["judge.model"] == "embedding"):
        keys.append(f"judge.folder={made / 'bert'}")
    return [*SMALL, *keys]


def said(value: Any) -> str:
    """A value as a command line has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def make_inputs(folder: Path) -> Path:
    """Makes what rows name: conversations of two questions, a tiny sentence-embedding model."""
    from made_bert import write_bert

    folder.mkdir(parents=True, exist_ok=True)
    turns = [
        [("user", f"Say {n}."), ("assistant", f"{n}"), ("user", "And one more?"),
         ("assistant", f"That is {n + 1}, one more than {n}.")]
        for n in range(240)
    ]  # fmt: skip
    rows = ({"messages": [{"role": r, "content": c} for r, c in one]} for one in turns)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not (folder / "bert").is_dir():
        write_bert(folder / "bert")
    return folder


def check_run(run: Path) -> list[str]:
    """What is wrong with the numbers that a run left; [] if nothing is."""
    found = []
    for path in sorted(run.rglob("summary.json")):
        found += _not_finite(json.loads(path.read_text()), str(path.relative_to(run)))
    records = read_jsonl(run / "metrics.jsonl")
    for n, record in enumerate(records):
        found += _not_finite(record, f"metrics.jsonl:{n + 1}")
    if not any("loss" in record for record in records):
        found.append("metrics.jsonl: no step was trained")
    return found


def _not_finite(record: Mapping[str, Any], where: str) -> list[str]:
    numbers = {k: v for k, v in record.items() if isinstance(v, float)}
    return [f"{where}: {k} is {v}" for k, v in numbers.items() if not math.isfinite(v)]


def run_row(row: Row, folder: Path, policy: str, made: Path, *more: str) -> list[str]:
    """Makes a row's run in a process of its own; what is wrong with it, [] if nothing is."""
    run = folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    keys = [f"policy={policy}", f"run={run}", *arguments(row, made), *more]
    command = script_command(ROOT / "train/align.py", *keys, "--debug")
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread())
    (folder / "log").write_text(f"{' '.join(keys)}\n{done.stdout}{done.stderr}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return [f"exit code {done.returncode}: {last}"]
    return check_run(run)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the rows; 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--policy", default="smollm2-135m-instruct")
    parser.add_argument("--rows", nargs="+", type=int, help="numbers of the rows; none: all")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep", type=Path, default=ROOT / "runs/options", help="of failed rows")
    parser.add_argument("--list", action="store_true", help="print the rows, run none")
    args = parser.parse_args(argv)
    rows = matrix()
    numbers = args.rows if args.rows is not None else list(range(len(rows)))
    if args.list:
        for n in numbers:
            print(n, *arguments(rows[n], args.keep / "inputs"))
        return 0
    made = make_inputs(args.keep / "inputs")
    began, failed = time.perf_counter(), 0

    def one(n: int) -> tuple[int, float, list[str]]:
        start = time.perf_counter()
        found = run_row(rows[n], args.keep / f"row-{n}", args.policy, made)
        return n, time.perf_counter() - start, found

    with ThreadPoolExecutor(args.jobs) as pool:
        for n, seconds, found in pool.map(one, numbers):
            print(f"row {n}: {'; '.join(found) or 'holds'} ({seconds:.0f} s)", flush=True)
            failed += bool(found)
            if not found:
                shutil.rmtree(args.keep / f"row-{n}")
    spent, used = (time.perf_counter() - began) / 60, resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{len(numbers)} of {len(rows)} rows, {failed} failed; {spent:.1f} minutes, "
        f"{(used.ru_utime + used.ru_stime) / 60:.1f} of a core"
    )
    if failed:
        print(f"logs: {args.keep}/row-N/log; one again: --rows N")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
