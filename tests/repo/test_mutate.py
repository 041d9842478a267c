"""The tool behind `make mutate`: its operators on a few lines, and a whole small tree."""

import json
from argparse import Namespace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import mutate
import pytest
import yaml
from mutants import chosen, mutants, run_at_import
from runs import ROOT, run_script


def changes(code: str) -> list[str]:
    return [f"{one.operator}: {one.before} -> {one.after}" for one in mutants(code.encode(), "m")]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("a < b", ["comparison: a < b -> a <= b", "comparison: a < b -> a > b"]),
        ("a is b", ["comparison: a is b -> a is not b"]),
        ("a in b", ["comparison: a in b -> a not in b"]),
        ("a == b != c", [
            "comparison: a == b != c -> a == b == c",
            "comparison: a == b != c -> a != b != c",
        ]),
        ("a + b", ["arithmetic: a + b -> a - b"]),
        ("a / b ** c", ["arithmetic: a / b ** c -> a * b ** c", "arithmetic: b ** c -> b * c"]),
        ("a -= b", ["arithmetic: a -= b -> a += b", "dropped statement: a -= b -> pass"]),
        ("a = 3", ["constant: 3 -> 2", "constant: 3 -> 4"]),
        ("a = 0.5", ["constant: 0.5 -> -0.5", "constant: 0.5 -> 1.5"]),
        ("a = True", ["constant: True -> False"]),
        ("a and b and c", ["and, or: a and b and c -> a or b or c"]),
        ("not a", ["not: not a -> a"]),
        ("-a", ["sign: -a -> a"]),
        ("x = a if b else c", ["condition: b -> not b"]),
        ("f(a, b, c)", [
            "dropped statement: f(a, b, c) -> pass",
            "swapped arguments: f(a, b, c) -> f(a, c, b)",
            "swapped arguments: f(a, b, c) -> f(b, a, c)",
        ]),
        ("x = f(a, b=c, **d)", ["dropped argument: f(a, b=c, **d) -> f(a, **d)"]),
        ("def f(x):\n    return x", ["return None: return x -> return None"]),
        ("def f():\n    raise E", ["dropped statement: raise E -> pass"]),
        ("x = x.y", ["dropped statement: x = x.y -> pass"]),
        ("x = y", []),
        # nothing of texts, types, asserts, decorators, imports
        ("'a' + b", []),
        ("f'{a + 1}'", []),
        ("assert a < b", []),
        ("x: Literal[1] = y", []),
        ("x = Literal[1]", []),
        ("def f(x: a[0]) -> b[1]: ...", []),
        ("@f(1)\nclass A(b[1], c=2): ...", []),
        ("from a import b", []),
    ],
)  # fmt: skip
def test_operators(code: str, expected: list[str]) -> None:
    assert sorted(changes(code)) == sorted(expected)


SOURCE = '''"""A module."""

LIMIT = 3  # é


class A:
    def f(self, x):
        """Half, or nothing."""
        if (x
                > LIMIT):  # a comment
            return x / 2
        return 0
'''


def test_a_mutant_changes_its_place_and_no_other() -> None:
    source = SOURCE.encode()
    found = mutants(source, "m")
    assert len(found) == len({one.name for one in found}) > 8
    for one in found:
        changed = one.apply(source)
        assert changed != source and changed[: one.start] == source[: one.start]
        assert changed.endswith(source[one.end :])
    (one,) = (one for one in found if one.after == "x >= LIMIT")
    assert (one.function, one.line, one.lines) == ("A.f", 9, (9, 10))
    assert "if ((x >= LIMIT)):  # a comment" in one.apply(source).decode()


def test_what_an_import_runs() -> None:
    spans = run_at_import(SOURCE.encode())
    assert spans == {
        **dict.fromkeys(range(1, 6), range(1, 13)),
        6: range(6, 13),
        7: range(7, 13),
    }
    assert run_at_import(b"@f\ndef g(): return 1\n") == {1: range(1, 3)}


def test_what_an_import_runs_belongs_to_its_class_not_to_who_imported_it() -> None:
    code = b"class A:\n    n = 1\n\n    def f(self):\n        return 2\n"
    constant, other = mutants(code, "a.py")[0], mutants(code, "a.py")[-1]
    assert (constant.line, other.line) == (2, 5)
    recorded = {
        "first.py": mutate.Covered(
            {"imports": 1.0}, {"a.py": {1: ["imports"], 2: ["imports"], 4: ["imports"]}}
        ),
        "second.py": mutate.Covered({"calls": 1.0, "makes": 1.0}, {"a.py": {5: ["calls"]}}),
        "other.py": mutate.Covered({"else": 1.0}, {"b.py": {2: ["else"]}}),
    }
    both = {"first.py": ["imports"], "second.py": ["calls", "makes"]}
    assert mutate.covering(constant, code, recorded) == both
    assert mutate.covering(other, code, recorded) == {"second.py": ["calls"]}


def test_a_draw_is_the_seeds() -> None:
    found = mutants(SOURCE.encode(), "m")
    assert chosen(found, 1000, 0) == found
    assert chosen(found, 4, 0) == chosen(found, 4, 0) != chosen(found, 4, 1)
    assert found.index(chosen(found, 4, 0)[0]) < found.index(chosen(found, 4, 0)[-1])


def test_the_cheapest_tests_come_first() -> None:
    seconds = {"a": {"a::1": 9.0, "a::2": 1.0}, "b": {"b::1": 2.0}, "c": {"c::1": 60.0}}
    recorded = {file: mutate.Covered(took, {}) for file, took in seconds.items()}
    tests = {file: list(took) for file, took in seconds.items()}
    assert mutate.plan(tests, recorded, 100) == ([["b::1"], ["a::2", "a::1"], ["c::1"]], 0)
    assert mutate.plan(tests, recorded, 5) == ([["b::1"], ["a::2"]], 2)
    assert mutate.plan({"c": ["c::1"]}, recorded, 5) == ([["c::1"]], 0)  # one at the least


# ------------------------------------------------------------------------------------ a small tree

MODULE = """
def clip(x):
    return 9 if x > 9 else x


def endless(n):
    while n:
        n = n - 1
    return n


def untested(a, b):
    return a - b
"""
TESTS = """
from ldalign.sums import clip, endless

def test_clip():
    assert clip(5) == 5

def test_endless():
    assert endless(4) == 0

def test_fails():
    assert False
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["tests/support"]\n',
        "ldalign/__init__.py": "",
        "ldalign/sums.py": MODULE,
        "tests/test_sums.py": TESTS,
        "tests/support/equivalent_mutants.yaml": yaml.safe_dump(
            [{
                "file": "ldalign/sums.py", "function": "clip", "before": "x > 9",
                "after": "x >= 9", "why": "9 becomes 9",
            }]
        ),
        "tests/support/surviving_mutants.yaml": yaml.safe_dump(
            [{
                "file": "ldalign/sums.py", "function": "clip", "before": "9", "after": "10",
                "why": "any bound will do",
            }]
        ),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(tree: Path, *more: str) -> dict[str, Any]:
    done = mutate_command(tree, "--mutants", "1000", "--limit", "2", *more)
    assert done.returncode == 0, done.stderr
    return json.loads((tree / mutate.RESULTS).read_text())["ldalign/sums.py"] | {"out": done.stdout}


def mutate_command(tree: Path, *arguments: str) -> CompletedProcess[str]:
    script = ROOT / "tests/support/mutate.py"
    modules = ("--modules", "ldalign/sums.py", "--jobs", "1")
    return run_script(script, "--root", tree, *modules, *arguments)


@pytest.mark.long
def test_a_whole_tree(tree: Path) -> None:
    """What is caught, survives and is run by no test; that it goes on, and tries again what
    survived when a test is added.
    """
    before = (tree / "ldalign/sums.py").read_bytes()
    found = run(tree)
    assert "3 tests, 1 of them fail there" in found["out"]
    left = {(one["before"], one["after"]): one["verdict"] for one in found["survivors"]}
    assert left == {
        ("9", "8"): "survived",
        ("9", "10"): "survived",
        ("1", "2"): "survived",
        ("return a - b", "return None"): "no test",
        ("a - b", "a + b"): "no test",
    }
    assert found["timeout"] == 3  # n + 1, n - 0, and n left as it is
    assert found["equivalent"] == 1 and found["tried"] == found["possible"] - 1
    assert (tree / "ldalign/sums.py").read_bytes() == before
    page = (tree / mutate.PAGE).read_text()
    assert "| 3 | constant: `` 9 `` to `` 10 `` | `clip` | 1 | any bound will do |" in page
    assert "| 3 | constant: `` 9 `` to `` 8 `` | `clip` | 1 |  |" in page
    assert page.count("| all | ") == 1

    # Stopped while it wrote its last verdict: that mutant alone is tried again.
    verdicts = tree / mutate.WORK / "verdicts.jsonl"
    verdicts.write_text(verdicts.read_text()[:-20])
    again = run(tree)
    assert again["out"].count("ldalign/sums.py:") == 1 and "tests/test_sums.py" not in again["out"]
    assert again["survivors"] == found["survivors"]

    # Of no time more: what is known of the same tests, and nothing is tried.
    none = run(tree, "--minutes", "0")
    assert "ldalign/sums.py:" not in none["out"] and none["survivors"] == found["survivors"]

    with (tree / "tests/test_sums.py").open("a") as tests:
        tests.write("def test_high():\n    assert clip(12) == 9\n")
    more = run(tree)
    assert more["out"].count("ldalign/sums.py:") == len(found["survivors"]) == 7
    assert [one["verdict"] for one in more["survivors"]] == ["survived"] * 3 + ["no test"] * 2


def test_what_a_report_knows_is_not_tried_again() -> None:
    """Of the same draw: a survivor is tried again, and with it what the report cannot tell from it
    (the two zeros of one line).
    """
    draw = mutants(b"def f(a, b):\n    return a[0] + b[0]\n", "m")
    keys = ("line", "function", "operator", "before", "after")
    zeros = [one for one in draw if (one.before, one.after) == ("0", "1")]
    survivors = [{key: getattr(zeros[0], key) for key in keys}]
    report = {"seed": 0, "survivors": survivors, "tests": ["a"], "caught": 3, "timeout": 1}
    args = Namespace(seed=0, equivalent=[], tests=["b", "a"])
    known = mutate.caught_before(draw, report, args)
    assert known.keys() == {one.name for one in draw} - {one.name for one in zeros}
    assert len(zeros) == 2 and sorted(v["verdict"] for v in known.values()) == [
        *["caught"] * 3, "timeout"
    ]  # fmt: skip
    assert args.tests == ["a", "b"]
    for other in ({"seed": 1}, {"caught": 4}, {"survivors": [{**survivors[0], "line": 9}]}):
        assert not mutate.caught_before(draw, report | other, args)
    assert mutate.source_at(ROOT, "no such commit", "Makefile") is None


def test_a_name_that_is_no_module(tree: Path) -> None:
    done = mutate_command(tree, "--modules", "objectives")
    assert done.returncode == 1 and "no module objectives; give a file of the tree" in done.stderr


# ------------------------------------------------------------------------------ of this repository


def test_the_modules_are_there() -> None:
    assert all((ROOT / path).is_file() for path in mutate.MODULES)


@pytest.mark.parametrize("name", [mutate.EQUIVALENT, mutate.SURVIVING])
def test_every_listed_mutant_is_one_of_the_code_as_it_is(name: str) -> None:
    """An entry whose code has changed says nothing any more."""
    listed = mutate.listed(ROOT, name)
    for file in {one["file"] for one in listed}:
        every = mutants((ROOT / file).read_bytes(), file)
        own = [one for one in listed if one["file"] == file]
        gone = [one for one in own if not any(mutate.is_listed(m, [one]) for m in every)]
        assert not gone and all(one["why"] for one in own), gone


def test_the_page_is_of_the_results() -> None:
    results = json.loads((ROOT / mutate.RESULTS).read_text(encoding="utf-8"))
    reasons = mutate.listed(ROOT, mutate.SURVIVING)
    assert (ROOT / mutate.PAGE).read_text(encoding="utf-8") == mutate.page(results, reasons)
    for one in results.values():
        assert one["tried"] == sum(one[key] for key in ("caught", "timeout", "survived", "no test"))
        assert len(one["survivors"]) == one["survived"] + one["no test"]
