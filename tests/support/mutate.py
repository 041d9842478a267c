"""`make mutate`: which small changes of the code no test notices.

    python tests/support/mutate.py [--modules objective guide ...] [--mutants 100] [--seed 0]
    [--tests PATH ...] [--seconds 60] [--limit 30] [--minutes N]
    [--jobs N] [--report]

Every module's mutants (`mutants.py`) are drawn with the seed, and each is put into a copy of the
tree (`build/mutate/`), where the tests that cover its line run until one fails: those of one file
after those of another, the cheapest first, at most `seconds` of them. Which test covers which line
is recorded before, once for as long as the code stays, and so is every verdict: after a stop the
same command goes on. A mutant that tests caught is not tried again before its module changes, one
that survived whenever a test does. So it is with what the committed report has of the same draw
from the same module; its entry then names the tests of both. After `minutes` no other mutant is
begun, and the report is of those that were tried.

The rest is a report, `docs/mutation.md` and `docs/results/mutation.json`: a module's entry there is
replaced when it is run. Mutants that no test can notice stand, each with the reason, in
`tests/support/equivalent_mutants.yaml`, and are not tried; those that a test could notice and none
should in `surviving_mutants.yaml`, which are tried and counted, and whose reasons the page shows.
`--report` writes the page again from what is recorded.

A test that starts another process is recorded as covering what its own process runs. A change that
only other processes reach counts as reached by no test.
"""

import argparse
import contextlib
import ctypes
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from mutants import Mutant, chosen, mutants, run_at_import

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "ldalign/objective.py",
    "ldalign/models/guide.py",
    "ldalign/training/guide.py",
    "ldalign/data/pairs.py",
    "ldalign/training/batches.py",
    "ldalign/training/loop.py",
    "ldalign/training/optim.py",
    "ldalign/training/checkpoint.py",
    "ldalign/generation/engine.py",
    "ldalign/generation/sampling.py",
    "ldalign/training/scoring.py",
    "ldalign/evaluation/statistics.py",
    "ldalign/data/records.py",
    "ldalign/data/encoding.py",
    "ldalign/data/tokenizer.py",
    "ldalign/system/distributed.py",
)
EQUIVALENT = "tests/support/equivalent_mutants.yaml"
SURVIVING = "tests/support/surviving_mutants.yaml"
PAGE, RESULTS = "docs/mutation.md", "docs/results/mutation.json"
WORK = "build/mutate"
KEYS = ("file", "function", "before", "after")  # of a listed mutant
COUNTS = ("possible", "tried", "caught", "timeout", "survived", "no test")
# What a copy of the tree leaves out.
LEFT_OUT = (".git", ".venv*", ".*cache", ".hypothesis", "runs", "build", "site", "__pycache__")
# Imported once, before a process forks for every mutant: what takes seconds, and none of ldalign.
HEAVY = (
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.checkpoint",
    "numpy",
    "hypothesis",
    "pytest",
    "safetensors.torch",
    "tokenizers",
    "jinja2",
    "pyarrow.parquet",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.mistral.modeling_mistral",
)
MEMORY = 8 * 2**30  # bytes a mutant may take
PR_SET_PDEATHSIG = 1  # a child ends with its parent
WRONG_TREE = 97  # exit code of a process that imports the package from elsewhere


@dataclass(frozen=True)
class Covered:
    """What the tests of one file cover: their seconds, and by module and line their names."""

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]


# ---------------------------------------------------------------------------------- a copy's tests


def copy_tree(root: Path, tree: Path) -> None:
    """Copies the tree, so that it imports itself and not the installed package."""
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(root, tree, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    for name in ("kernels", "train"):  # folders of the package that lie outside it
        if (tree / name).is_dir():
            (tree / "ldalign" / name).symlink_to(f"../{name}")
    # On the import path of the tests, and of the processes that they start (runs.one_thread).
    (tree / "tests/support").mkdir(exist_ok=True)
    (tree / "tests/support/ldalign").symlink_to("../../ldalign")


class Watch:
    """A pytest plugin: the first failed test, every test's seconds, and what it covers."""

    def __init__(self, tree: Path, coverage: Any = None) -> None:
        self.tree, self.coverage = tree, coverage
        self.seconds = Counter[str]()
        self.failed: list[str] = []
        self.skipped: list[str] = []

    def pytest_collection_finish(self) -> None:
        package = sys.modules.get("ldalign")
        if package and not Path(str(package.__file__)).resolve().is_relative_to(self.tree):
            os._exit(WRONG_TREE)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.coverage:
            self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.outcome != "passed":
            (self.failed if report.failed else self.skipped).append(report.nodeid)


def run_tests(tree: Path, tests: Sequence[str], seconds: float, modules: Sequence[str] = ()) -> Any:
    """Runs tests in a child process of their own; what `_child` returns, or why it came to nothing:
    "timeout", "wrong tree", "died".

    seconds: of processor time that it may take, and ten times as many of the clock's. modules:
    files to record the coverage of.
    """
    answer = tree / ".answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _limit(seconds)
            answer.write_text(json.dumps(_child(tree, tests, modules)))
            code = 0
        finally:
            os._exit(code)
    code, late = _wait(child, time.monotonic() + 10 * seconds)
    if late or code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timeout"
    if code == WRONG_TREE:
        return "wrong tree"
    return json.loads(answer.read_text()) if code == 0 and answer.is_file() else "died"


def _limit(seconds: float) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)


def _wait(child: int, until: float) -> tuple[int, bool]:
    """A child's exit code, or minus the signal that ended it; and whether it was late."""
    late = False
    try:
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            late = late or time.monotonic() > until
            if late:
                _kill(child)
            time.sleep(0.02)
    finally:
        _kill(child)  # and what it started
    return os.waitstatus_to_exitcode(ended[1]), late


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)


def _child(tree: Path, tests: Sequence[str], modules: Sequence[str]) -> dict[str, Any]:
    """pytest's exit code, the tests that failed or were skipped, and with `modules` what the tests
    cover. Without, it ends at the first that fails.
    """
    import pytest

    sys.dont_write_bytecode = True
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    sys.modules.pop("mutants", None)
    os.chdir(tree)
    coverage = None
    if modules:
        from coverage import Coverage

        include = [str(tree / module) for module in modules]
        coverage = Coverage(data_file=None, include=include, config_file=False)
        coverage.start()
    watch = Watch(tree, coverage)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(tree)]
    code = pytest.main(
        [*options, "-c", str(tree / "pyproject.toml"), *([] if modules else ["-x"]), *tests],
        plugins=[watch],
    )
    lines: dict[str, dict[int, list[str]]] = {}
    if coverage:
        coverage.stop()
        data = coverage.get_data()
        for module in modules:
            found = data.contexts_by_lineno(str(tree / module))
            lines[module] = {line: sorted({*names} - {""}) for line, names in found.items()}
            lines[module] = {line: names for line, names in lines[module].items() if names}
    return {
        "code": int(code),
        "failed": watch.failed,
        "skipped": watch.skipped,
        "seconds": watch.seconds,
        "lines": lines,
    }


# -------------------------------------------------------------------------------------- recordings


def digest(paths: Iterable[Path]) -> str:
    """A hash of files' contents."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path.name} {len(path.read_bytes())} ".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def code_digest(root: Path) -> str:
    """A hash of what every test depends on, beside its own file."""
    folders = ("ldalign", "kernels", "train", "tests/support")
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    files = [path for path in files if path.stem not in ("mutate", "mutants")]
    return digest([*files, *(root / "tests").glob("conftest.py")])


def test_files(root: Path, paths: Sequence[str]) -> list[str]:
    """The test files in the given files and folders, from the root."""
    found = set[Path]()
    for path in paths:
        whole = root / path
        found |= {whole} if whole.is_file() else {*whole.rglob("test_*.py")}
    return sorted(str(path.relative_to(root)) for path in found)


def record(
    tree: Path, root: Path, files: Sequence[str], modules: Sequence[str], kept: Path
) -> dict[str, Covered]:
    """What each test file covers of the modules, from `kept` where nothing changed since.

    Tests that fail in the copy are left out.
    """
    code, found = code_digest(root), {}
    kept.mkdir(parents=True, exist_ok=True)
    for n, file in enumerate(files):
        known = kept / f"{file.replace('/', '.')}.json"
        key = f"{code} {digest([root / file])}"
        value = json.loads(known.read_text()) if known.is_file() else {}
        if value.get("key") != key or not {*modules} <= value["lines"].keys():
            answer = run_tests(tree, [file], 3600, modules)
            if isinstance(answer, str):
                answer = {"seconds": {}, "lines": {m: {} for m in modules}, "failed": [answer]}
            value = {"key": key, **{name: answer[name] for name in ("seconds", "lines", "failed")}}
            known.write_text(json.dumps(value))
            left = f", {len(value['failed'])} of them fail there" if value["failed"] else ""
            print(f"{n + 1}/{len(files)} {file}: {len(value['seconds'])} tests{left}", flush=True)
        failed = {*value["failed"]}
        lines = {
            module: {int(line): [t for t in tests if t not in failed] for line, tests in of.items()}
            for module, of in value["lines"].items()
        }
        seconds = {test: took for test, took in value["seconds"].items() if test not in failed}
        found[file] = Covered(seconds, lines)
    return found


def covering(mutant: Mutant, source: bytes, recorded: dict[str, Covered]) -> dict[str, list[str]]:
    """{test file: its tests} that run a mutant's lines.

    What is run at import alone (a default, a constant) belongs to all tests of the files that reach
    the function or class around it, or else the module: not to the test that happened to import it,
    and a test that only makes a dataclass runs no line of it.
    """
    places = [range(mutant.lines[0], mutant.lines[1] + 1)]
    around = run_at_import(source).get(mutant.line)
    if around:
        places = [around, range(1, source.count(b"\n") + 2)]
    for lines in places:
        found = {}
        for file, covered in recorded.items():
            of = covered.lines.get(mutant.file, {})
            if tests := {test for line in lines for test in of.get(line, ())}:
                found[file] = sorted(covered.seconds if around else tests)
        if found:
            return found
    return {}


def plan(
    tests: dict[str, list[str]], recorded: dict[str, Covered], seconds: float
) -> tuple[list[list[str]], int]:
    """The groups of tests to run, a file each, the cheapest first, and how many are left out.

    In a file its cheap tests come first. At most `seconds` of them in all, as they took when they
    were recorded, but at least one.
    """
    took = {test: recorded[file].seconds[test] for file, own in tests.items() for test in own}
    order = sorted(tests, key=lambda file: sum(took[test] for test in tests[file]))
    groups, left, spent = list[list[str]](), 0, 0.0
    for file in order:
        group = []
        for test in sorted(tests[file], key=lambda test: took[test]):
            if (groups or group) and spent + took[test] > seconds:
                left += 1
            else:
                group.append(test)
                spent += took[test]
        groups += [group] if group else []
    return groups, left


# -------------------------------------------------------------------------------------- one mutant


@dataclass(frozen=True)
class Task:
    """A mutant, the tests to run against it, and what they take."""

    mutant: Mutant
    groups: list[list[str]]
    left: int
    seconds: float  # of processor time, after which it counts as endless


def try_mutant(root: Path, work: Path, task: Task) -> dict[str, Any]:
    """Runs a mutant's tests in this process's copy of the tree: the verdict on it.

    caught: by a test, or as nothing can be imported any more; timeout: caught too, it went on for
    too long; survived; no test: none runs its lines.
    """
    tree = work / f"tree-{os.getpid()}"
    if not tree.is_dir():
        copy_tree(root, tree)
    path = tree / task.mutant.file
    source = (root / task.mutant.file).read_bytes()
    for stale in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        stale.unlink()
    verdict: dict[str, Any] = {"verdict": "survived" if task.groups else "no test", "by": ""}
    path.write_bytes(task.mutant.apply(source))
    try:
        for group in task.groups:
            answer = run_tests(tree, group, task.seconds)
            if answer == "wrong tree":
                raise RuntimeError(f"{tree}: its tests import ldalign from elsewhere")
            if answer == "timeout":
                verdict = {"verdict": "timeout", "by": group[0].split("::")[0]}
            elif isinstance(answer, str) or answer["code"]:
                by = answer["failed"] if isinstance(answer, dict) else []
                verdict = {"verdict": "caught", "by": (by or [group[0].split("::")[0]])[0]}
            if verdict["verdict"] != "survived":
                break
    finally:
        path.write_bytes(source)
    return {**verdict, "tests": sum(map(len, task.groups)), "left": task.left}


def warm(root: Path) -> None:
    """Imports what takes long, and nothing of ldalign, for the children to have it."""
    for name in HEAVY if (root / "kernels").is_dir() else ("pytest",):  # else a small tree
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert "ldalign" not in sys.modules


# ---------------------------------------------------------------------------------------- all of it


def asked_modules(root: Path, names: Sequence[str]) -> list[str]:
    """The files that names stand for: paths, or the stems of MODULES; all of them for none."""
    found = []
    for name in names:
        own = [path for path in MODULES if Path(path).stem == name]
        own = own or ([name] if (root / name).is_file() else [])
        if not own:
            known = ", ".join(sorted({Path(path).stem for path in MODULES}))
            sys.exit(f"mutate.py: no module {name}; give a file of the tree, or of {known}")
        found += own
    return found or [path for path in MODULES if (root / path).is_file()]


def listed(root: Path, name: str) -> list[dict[str, str]]:
    """A committed list of mutants: EQUIVALENT or SURVIVING."""
    path = root / name
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found: list[dict[str, str]] = yaml.safe_load(text) or []
    return found


def is_listed(mutant: Mutant, known: Sequence[dict[str, str]]) -> bool:
    """Whether the list has a mutant: by file, function and change, not by line."""
    return any(all(getattr(mutant, key) == one[key] for key in KEYS) for one in known)


def results_of(path: Path) -> Iterator[dict[str, Any]]:
    """The verdicts so far; a line that a stop cut off is none."""
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def run_module(
    root: Path,
    file: str,
    recorded: dict[str, Covered],
    args: argparse.Namespace,
    pool: ProcessPoolExecutor,
    reported: dict[str, Any] | None,
) -> dict[str, Any]:
    """Tries a module's drawn mutants that have no verdict yet; the report's entry of the module.

    reported: its entry before.
    """
    source = (root / file).read_bytes()
    key = digest([root / file])
    tests_key = hashlib.sha256(
        f"{args.seconds} {code_digest(root)}".encode()
        + digest(root / path for path in recorded).encode()
    ).hexdigest()[:16]
    every = mutants(source, file)
    draw = chosen(every, args.mutants, args.seed)
    drawn = [one for one in draw if not is_listed(one, args.equivalent)]
    known: dict[str, dict[str, Any]] = {}
    if reported and source_at(root, reported["commit"], file) == source:
        known = caught_before(draw, reported, args)
    path = root / WORK / "verdicts.jsonl"
    for one in results_of(path):
        same = one["source"] == key and one["file"] == file
        if same and (one["verdict"] in ("caught", "timeout") or one["tests_key"] == tests_key):
            known[one["name"]] = one
    waiting = {}
    for mutant in drawn:
        if mutant.name not in known:
            groups, left = plan(covering(mutant, source, recorded), recorded, args.seconds)
            took = {t: s for covered in recorded.values() for t, s in covered.seconds.items()}
            seconds = sum(took[test] for group in groups for test in group)
            task = Task(mutant, groups, left, args.limit + 5 * seconds)
            if time.monotonic() < args.until:
                waiting[pool.submit(try_mutant, root, root / WORK, task)] = mutant
    with path.open("a") as verdicts:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            verdicts.write("\n")  # after a line that a stop cut off
        for n, done in enumerate(as_completed(waiting)):
            if done.cancelled():
                continue
            mutant, verdict = waiting[done], done.result()
            known[mutant.name] = verdict
            named = {"file": file, "source": key, "tests_key": tests_key, "name": mutant.name}
            verdicts.write(json.dumps({**named, **verdict}) + "\n")
            verdicts.flush()
            what = f"{verdict['verdict']}: {mutant.before} -> {mutant.after}"
            print(f"{n + 1}/{len(waiting)} {file}:{mutant.line} {what}", flush=True)
            if time.monotonic() > args.until:
                for task_left in waiting:
                    task_left.cancel()
    drawn = [one for one in drawn if one.name in known]
    return entry(file, len(every), drawn, known, args)


def source_at(root: Path, commit: str, file: str) -> bytes | None:
    """A file as it was at a commit; None where that is not known."""
    command = ["git", "-C", root, "show", f"{commit}:{file}"]
    done = subprocess.run(command, capture_output=True)
    return done.stdout if done.returncode == 0 else None


def caught_before(
    draw: Sequence[Mutant], reported: dict[str, Any], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """The verdicts of the mutants that a report's entry of the same source counts as caught: those
    of the same draw that are not among its survivors. None of another draw.

    Adds the entry's tests to `args.tests` where there are some.
    """
    keys = ("line", "function", "operator", "before", "after")
    survived = {tuple(one[key] for key in keys) for one in reported["survivors"]}
    gone = [one for one in draw if tuple(getattr(one, key) for key in keys) not in survived]
    caught = [one for one in gone if not is_listed(one, args.equivalent)]
    there = {tuple(getattr(one, key) for key in keys) for one in draw}
    same = reported["seed"] == args.seed and survived <= there
    if not same or len(caught) != reported["caught"] + reported["timeout"]:
        return {}
    verdicts = ["timeout"] * reported["timeout"] + ["caught"] * reported["caught"]
    args.tests = [*dict.fromkeys([*reported["tests"], *args.tests])]
    pairs = zip(caught, verdicts, strict=True)
    return {one.name: {"verdict": verdict, "tests": 0, "left": 0} for one, verdict in pairs}


def entry(
    file: str,
    sites: int,
    drawn: Sequence[Mutant],
    known: dict[str, dict[str, Any]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """A module's part of the report."""
    counts = Counter(known[one.name]["verdict"] for one in drawn)
    survivors = [
        {
            "line": one.line,
            "function": one.function,
            "operator": one.operator,
            "before": one.before,
            "after": one.after,
            **{name: known[one.name][name] for name in ("verdict", "tests", "left")},
        }
        for one in drawn
        if known[one.name]["verdict"] in ("survived", "no test")
    ]
    return {
        "file": file,
        "commit": args.commit,
        "date": time.strftime("%Y-%m-%d"),
        "seed": args.seed,
        "tests": args.tests,
        "possible": sites,
        "equivalent": sum(one["file"] == file for one in args.equivalent),
        "tried": len(drawn),
        **{name: counts[name] for name in ("caught", "timeout", "survived", "no test")},
        "survivors": survivors,
    }


HEAD = """# Changes that no test notices

`make mutate` (`tests/support/mutate.py`) changes the code in one small place at a time (a
comparison, an operator of arithmetic, a constant by 1, `and` and `or`, a `not`, a sign, a
condition, two arguments swapped, an argument or a statement left out, `None` returned) and runs the
tests that cover the place, in a copy of the tree, until one fails. A change that none notices is a
gap in the tests, or makes no difference at all: those are listed with the reason in
`tests/support/equivalent_mutants.yaml` and not counted below. One that makes a difference of which
no test should speak (a default size, a pause) is counted, with its reason beside it, from
`surviving_mutants.yaml` there. A survivor without a reason is a gap.

```
make mutate                                        # 100 mutants of every module, over hours
make mutate MODULES="objective optim" MUTANTS=600  # of some
make mutate MODULES=ldalign/data/ragged.py ARGS="--tests tests/data --jobs 1"
```

It can be stopped and goes on where it was: coverage by test and all verdicts are kept in
`build/mutate/`. This page is written by it; an entry stays until its module is run again.

*Score*: the share of the tried that were caught, a time limit included. *Possible*: all mutants the
module has; *tried*: those that were drawn and run, without the equivalent ones.
"""


def page(results: dict[str, dict[str, Any]], reasons: Sequence[dict[str, str]]) -> str:
    """docs/mutation.md. reasons: the list SURVIVING."""
    why = {tuple(one[key] for key in KEYS): one["why"] for one in reasons}
    lines = ["| module | possible | tried | caught | time limit | survived | no test | score |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    every = results.values()
    total = {key: sum(one[key] for one in every) for key in COUNTS}
    for name, one in [
        *((f"`{file}`", one) for file, one in sorted(results.items())),
        ("all", total),
    ]:
        caught, tried = one["caught"] + one["timeout"], one["tried"]
        score = f"{100 * caught / tried:.1f} %" if tried else "-"
        cells = [name, *(one[key] for key in COUNTS), score]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    text = HEAD + "\n" + "\n".join(lines) + "\n"
    for file, one in sorted(results.items()):
        text += f"\n## {file}\n\nCommit `{one['commit'][:7]}`, {one['date']}, seed {one['seed']}, "
        text += f"against `{' '.join(one['tests'])}`; {one['equivalent']} known to be equivalent. "
        if not one["survivors"]:
            text += "None survived.\n"
            continue
        text += "\n\n| line | change | in | tests | why it may |\n|---|---|---|---|---|\n"
        for mutant in one["survivors"]:
            before, after = (_code(mutant[key]) for key in ("before", "after"))
            tests = f"{mutant['tests']}"
            tests += f", {mutant['left']} left out" if mutant["left"] else ""
            change = f"{mutant['operator']}: {before} to {after}"
            reason = why.get((file, *(mutant[key] for key in KEYS[1:])), "")
            cells = [mutant["line"], change, f"`{mutant['function']}`", tests, reason]
            text += f"| {' | '.join(map(str, cells))} |\n"
    return text


def _code(text: str) -> str:
    short = text if len(text) <= 90 else f"{text[:87]}..."
    return f"`` {short} ``".replace("|", "\\|")


def commit_of(root: Path) -> str:
    done = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 whatever survives: the report says it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--modules", nargs="+", default=[], help="files, or names of MODULES")
    parser.add_argument("--mutants", type=int, default=100, help="of every module; all: 100000")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="files and folders of tests")
    parser.add_argument("--seconds", type=float, default=60, help="of tests, for one mutant")
    parser.add_argument("--limit", type=float, default=30, help="on top of 5 times these, for it")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of trying, then it ends")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree")
    parser.add_argument("--report", action="store_true", help="only write the page again")
    args = parser.parse_args(argv)
    root = args.root.resolve()
    path = root / RESULTS
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not args.report:
        args.equivalent, args.commit = listed(root, EQUIVALENT), commit_of(root)
        files = asked_modules(root, args.modules)
        work = root / WORK
        for old in work.glob("tree*"):
            shutil.rmtree(old)
        work.mkdir(parents=True, exist_ok=True)
        warm(root)
        copy_tree(root, work / "tree")
        modules = sorted({*files, *asked_modules(root, [])})
        asked = args.tests
        tests = test_files(root, asked)
        recorded = record(work / "tree", root, tests, modules, work / "coverage")
        fork = multiprocessing.get_context("fork")
        args.until = time.monotonic() + 60 * args.minutes
        pool = ProcessPoolExecutor(args.jobs, mp_context=fork)
        try:
            for file in files:
                args.tests = asked
                results[file] = run_module(root, file, recorded, args, pool, results.get(file))
                write(root, results)
        finally:  # stopped: what has not begun is not begun
            pool.shutdown(cancel_futures=True)
    write(root, results)
    print(f"{root / PAGE}: {len(results)} modules")
    return 0


def write(root: Path, results: dict[str, dict[str, Any]]) -> None:
    (root / RESULTS).parent.mkdir(parents=True, exist_ok=True)
    (root / RESULTS).write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    (root / PAGE).write_text(page(results, listed(root, SURVIVING)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
