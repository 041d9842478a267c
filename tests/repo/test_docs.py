"""What the pages name is there: config keys with their defaults, files, tests, links."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import ROOT

from ldalign.run.compare_settings import CompareConfig
from ldalign.run.settings import RunConfig
from ldalign.system.config import to_dict
from ldalign.train.generate import GenerateConfig
from ldalign.train.inspect_data import InspectConfig

DOCS = sorted(ROOT.glob("docs/*.md"))
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
PAGES = [*DOCS, *CONFIGS, *(ROOT / name for name in ("README.md", "SECURITY.md", "csrc/README.md"))]

DEFAULTS: dict[str, Any] = to_dict(CompareConfig()) | to_dict(GenerateConfig())
DEFAULTS |= to_dict(InspectConfig())
GROUPS = {name: value for name, value in DEFAULTS.items() if isinstance(value, dict)}
SHORT = {"guide": "folder", "judge": "model", "reward": "model", "benchmarks": "tasks"}

FOLDERS = "ldalign|kernels|train|tests|bench|docs|configs|csrc|requirements"
PATH = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*{{}},-]*\w")
PYTHON_FILE = re.compile(r"(?<![\w./*{},-])\w+\.py\b")
TEST = re.compile(r"([\w/]*test_\w+\.py)::(test_\w+)")
MODULE = re.compile(r"\bldalign(?:\.[A-Za-z]\w*)+")  # not ldalign._C, which is built
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
# `group.key`, `group.*`, `group.key=VALUE`; what ends like a file's name is one
GROUP_KEY = re.compile(rf"(?<![\w./-])({'|'.join(GROUPS)})\.(\w+|\*)(?![\w/.])")
FILE_ENDINGS = {"md", "py", "json", "jsonl", "yaml", "cpp", "h", "html", "txt"}
# in backticks: `key` (VALUE), `key=VALUE` (default), default `key=VALUE`
LITERAL = r"null|true|false|-?\d[\d.e-]*"
QUOTED = re.compile(
    rf"`([\w.]+)` \(({LITERAL})\)|`([\w.]+)=([^`\s]+)` \(default\)|default `([\w.]+)=([^`\s]+)`"
)
OURS = "align|sft|guide|generate|chat|evaluate|judge|compare|inspect"
COMMAND = re.compile(
    rf"(?:train/\w+\.py|make (?:align|compare|evaluate)|\bldalign (?:{OURS}))\b(.*)"
)
ARGUMENT = re.compile(r"(?<![\w.,/=-])([a-z_]+(?:\.[a-z_]+)?)=")


def unknown_keys(text: str) -> Iterator[str]:
    """Names in a group of the config that are no keys of it; capitals stand for any (errors.md)."""
    for group, key in GROUP_KEY.findall(text):
        if key not in (*GROUPS[group], *FILE_ENDINGS, "*") and not key.isupper():
            yield f"{group}.{key}"


def wrong_defaults(text: str) -> Iterator[str]:
    """Defaults that a page quotes and that are others in the code."""
    for groups in QUOTED.findall(" ".join(text.split())):
        key, quoted = (part for part in groups if part)
        key = f"{key}.{SHORT[key]}" if key in SHORT else key
        value: Any = DEFAULTS
        for part in key.split("."):
            value = value.get(part, KeyError) if isinstance(value, dict) else KeyError
        if value is not KeyError and value != yaml.safe_load(quoted):
            yield f"{key}={quoted}"


def wrong_arguments(text: str) -> Iterator[str]:
    """`key=` in the commands of a page (their continued lines too) that no script knows."""
    for line in re.sub(r"\\\n\s*#?", " ", text).splitlines():
        command = COMMAND.search(line)
        rest = re.split(r"[`#]", command[1])[0] if command else ""
        for argument in ARGUMENT.findall(re.sub(r"--\w+[ =]\S+", "", rest)):
            group, _, key = argument.partition(".")
            if group not in DEFAULTS or (key and key not in GROUPS.get(group, ())):
                yield argument


def missing_paths(text: str) -> Iterator[str]:
    """Files and folders of the repository that a page names and that are not there."""
    for path in PATH.findall(text):
        if not any(any(ROOT.glob(one)) for one in braces(path)):
            yield path


def braces(path: str) -> list[str]:
    """a{b,c} -> ab, ac."""
    found = re.search(r"\{([^}]*)\}", path)
    if not found:
        return [path]
    return [path[: found.start()] + part + path[found.end() :] for part in found[1].split(",")]


def missing_python_files(text: str) -> Iterator[str]:
    """Names like `engine.py`, without a folder, that no file has."""
    for name in PYTHON_FILE.findall(text):
        if not any(any(ROOT.glob(f"{folder}/**/{name}")) for folder in FOLDERS.split("|")):
            if not (ROOT / name).is_file():
                yield name


def missing_tests(text: str) -> Iterator[str]:
    """FILE::TEST that is not there."""
    for file, test in TEST.findall(text):
        files = [ROOT / file] if "/" in file else list(ROOT.glob(f"tests/**/{file}"))
        if not any(path.is_file() and f"def {test}(" in path.read_text() for path in files):
            yield f"{file}::{test}"


def missing_names(text: str) -> Iterator[str]:
    """Modules of ldalign, and names in them, that are not there."""
    for name in MODULE.findall(text):
        _, *parts = name.split(".")
        path = ROOT if parts[0] in ("kernels", "train") else ROOT / "ldalign"
        while parts and (path / parts[0]).is_dir():
            path /= parts.pop(0)
        file = (
            path / f"{parts.pop(0)}.py" if parts and (path / f"{parts[0]}.py").is_file() else path
        )
        source = (file / "__init__.py" if file.is_dir() else file).read_text()
        if parts and not re.search(rf"\b{parts[0]}\b", source):
            yield name


def broken_links(text: str, page: Path) -> Iterator[str]:
    """Targets of links to files that are not there."""
    for target in LINK.findall(text):
        if not (page.parent / target).exists():
            yield target


CHECKS = (
    unknown_keys,
    wrong_defaults,
    wrong_arguments,
    missing_paths,
    missing_python_files,
    missing_tests,
    missing_names,
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = [f"{check.__name__}: {problem}" for check in CHECKS for problem in check(text)]
    found += [f"broken_links: {target}" for target in broken_links(text, page)]
    assert not found, "\n".join(found)


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert {page.name for page in DOCS} - {"README.md"} <= set(LINK.findall(index))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`training.epoch` passes", "training.epoch"),
        ("# of guide.tokens, in a config's comment", "guide.tokens"),
        ("every `checkpoint.minutes` (11)", "checkpoint.minutes=11"),
        ("more than the default `judge.answer_tokens=17`", "judge.answer_tokens=17"),
        ("| `judge=policy` (default) |", "judge.model=policy"),
        ("torchrun train/align.py policy=X \\\n    sft.epoch=0", "sft.epoch"),
        ('make align ARGS="model=X"', "model"),
        ("ldalign align model=X", "model"),
        ("see `ldalign/generation/pages.py`", "ldalign/generation/pages.py"),
        ("see `tests/test_bench.py`", "tests/test_bench.py"),
        ("`kernels/{eager,fast}.py`, `bench/none.py`", "bench/none.py"),
        ("read `pages.py` first", "pages.py"),
        ("`test_pairs.py::test_nothing`", "test_pairs.py::test_nothing"),
        ("`ldalign.generation.pages`", "ldalign.generation.pages"),
        ("`ldalign.models.guide.decode_all`", "ldalign.models.guide.decode_all"),
    ],
)
def test_a_page_that_is_wrong_is_found(text: str, found: str) -> None:
    assert {problem for check in CHECKS for problem in check(text)} == {found}


def test_a_page_that_is_right_passes() -> None:
    text = (
        "`training.*`, `checkpoint.minutes` (10), `checkpoint.steps` (null), `guide.json`, "
        "default `judge.answer_tokens=16`, `configs/zephyr-7b-{spin,dpo}.yaml`, `kernels/*.py`, "
        "`ldalign.run.methods`, `test_pairs.py::test_with_losers_and_usable`\n"
        'make compare COMPARE=configs/x ARGS="data=F compare.seeds=[0] judge=policy"'
    )
    problems = [problem for check in CHECKS for problem in check(text)]
    assert problems == ["configs/x"]


def test_groups_of_a_run_are_known() -> None:
    assert {"training", "guide", "sampling"} <= set(GROUPS) and "seed" in to_dict(RunConfig())
