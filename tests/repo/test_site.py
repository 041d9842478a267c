"""What the site of the pages is made of: the page of error texts, that of settings, the index."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from runs import ROOT

from ldalign.run.compare_settings import CompareConfig
from ldalign.system.config import describe, to_dict

SITE = ROOT / "docs/site"
FAQ = (ROOT / "docs/faq.md").read_text(encoding="utf-8")
COMING = (ROOT / "docs/coming-from.md").read_text(encoding="utf-8")


def load(name: str) -> ModuleType:
    """Imports docs/site/NAME.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location(name, SITE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


errors_page: Any = load("errors_page")
settings_page: Any = load("settings_page")


def advice() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(errors_page.ADVICE.read_text(encoding="utf-8"))
    return loaded


def source(tmp_path: Path, text: str) -> Path:
    """A repository whose only module has `text`."""
    for folder in errors_page.FOLDERS:
        (tmp_path / folder).mkdir()
    (tmp_path / "train/one.py").write_text(text, encoding="utf-8")
    return tmp_path


# ------------------------------------------------------------------------------------- error texts


def test_the_page_of_error_texts_is_current() -> None:
    page, problems = errors_page.make(errors_page.texts(), advice())
    again = f"run {errors_page.COMMAND}"
    assert not problems, f"{again} once these are mended:\n" + "\n".join(problems)
    assert page == errors_page.PAGE.read_text(encoding="utf-8"), f"docs/errors.md is old: {again}"


def test_every_raise_has_its_text() -> None:
    """Counted in another way than the page's: calls with a literal text, by name."""
    made = re.compile(r"\b(?:InputError|EnvironmentProblem|NumericsError|BadRow)\(\s*f?[\"']")
    files = [path for folder in errors_page.FOLDERS for path in (ROOT / folder).rglob("*.py")]
    calls = sum(len(made.findall(path.read_text(encoding="utf-8"))) for path in files)
    found = [one for one in errors_page.texts() if one.kind in errors_page.CODES]
    assert calls > 250 and len(found) > 0.95 * calls


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("def f(path, n):\n    raise InputError(f'{path}: has {n} rows; add some')", "FILE: has N"),
        ("def f(x):\n    raise InputError(f'{x!r} is odd' + '; give 1')", "'X' is odd; give 1"),
        (
            "NAME = 'a.json'\ndef f(d):\n    return InputError(f'{d}/{NAME}: bad; x')",
            "D/a.json: bad",
        ),
        ("def f(a):\n    need(a, 'a: is no; give it')", "a: is no; give it"),
        ("def f(found):\n    problems.append(f'{found}: no; give it')", "FOUND: no; give it"),
        ("def f(n):\n    with naming(lambda: f'{n} rows', LOWER): pass", "N rows: out of memory"),
        (
            "def f():\n    again = 'run it again'\n    raise InputError(f'no; {again}')",
            "no; run it",
        ),
        ("def f(a):\n    text = 'plain; give b'\n    raise InputError(text)", "plain; give b"),
        ("def f(a):\n    raise NumericsError('now' if a else 'then; stop')", "then; stop"),
    ],
)
def test_texts_are_read_from_code(tmp_path: Path, code: str, text: str) -> None:
    code = code.replace("(path, n)", "(path, count)").replace("{n} rows; add", "{count} rows; add")
    code = code.replace("(n)", "(count)").replace("{n} rows'", "{count} rows'")
    found = [one.text for one in errors_page.texts(source(tmp_path, code))]
    assert any(one.startswith(text) for one in found), found


def test_when_is_what_the_docstring_says(tmp_path: Path) -> None:
    code = '''
def f(path):
    """Reads. Raises InputError for an empty file, and EnvironmentProblem where there is none."""
    raise InputError(f"{path}: is empty; fill it")
    raise EnvironmentProblem("no disk; buy one")
'''
    found = {one.text: one.when for one in errors_page.texts(source(tmp_path, code))}
    assert found["FILE: is empty; fill it"] == "for an empty file"
    assert found["no disk; buy one"] == "where there is none"


def test_a_text_that_says_nothing_to_do_needs_an_entry(tmp_path: Path) -> None:
    found = errors_page.texts(source(tmp_path, "def f(x):\n    raise InputError(f'{x} is odd')"))
    told = advice() | {"advice": {}}
    _, problems = errors_page.make(found, told)
    assert problems == ["errors.yaml: train/one.py: say what to do about: X is odd"]
    page, problems = errors_page.make(found, told | {"advice": {"X is odd": "Give an even one."}})
    assert not problems and "#### `X is odd`\n\nGive an even one.\n" in page
    _, problems = errors_page.make(found, told | {"advice": {"X is odd": "So.", "gone": "Old."}})
    assert problems == ["errors.yaml: in no text of the source: gone"]


def test_what_the_questions_quote_is_said() -> None:
    """The quoted texts of faq.md are error texts, or parts of what the source says otherwise."""
    quoted = re.findall(r"^> `(.+)`$", FAQ, re.MULTILINE)
    listed = errors_page.PAGE.read_text(encoding="utf-8")
    literal = " ".join(
        "".join(str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant))
        for path in (ROOT / "ldalign").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr)
    )
    missing = [text for text in quoted if text not in listed and text not in literal]
    assert len(quoted) >= 20 and not missing


# ------------------------------------------------------------------------- settings, index, pages


def test_the_page_of_settings_says_what_help_says() -> None:
    page = settings_page.page()
    shown = re.findall(r"^#### `([\w.]+)=", page, re.MULTILINE)
    keys = []
    for key, value in to_dict(CompareConfig()).items():
        keys += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
    assert sorted(shown) == sorted(keys)
    told = [line.strip() for line in describe(CompareConfig).splitlines()]
    defaults = {line.partition("  (")[0] for line in told if re.match(r"[\w.]+=", line)}
    heads = set(re.findall(r"^#### `(.*)`$", page, re.MULTILINE))
    assert len(heads & defaults) > 0.9 * len(heads), sorted(heads - defaults)


def test_every_page_is_in_a_group_of_the_index() -> None:
    """The site's navigation is made of the groups of docs/README.md."""
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    grouped = re.findall(r"^- \[[^]]*\]\(([^)]+)\)", index.partition("\n## ")[2], re.MULTILINE)
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert set(grouped) == pages and len(grouped) == len(pages)
    for page in pages:
        first = (ROOT / "docs" / page).read_text(encoding="utf-8").partition("\n")[0]
        assert first.startswith("# "), f"{page}: the first line is its title"


def test_keys_of_other_trainers_lead_to_keys_that_are_there() -> None:
    """The table of keys in coming-from.md: ours exist; theirs are those that settings answer to."""
    table = COMING.partition("\n## Keys\n")[2].partition("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| `")]
    keys = to_dict(CompareConfig())
    for row in rows:
        for name in re.findall(r"`([^`]+)`", row.split("|")[1]):
            group, _, key = name.partition(".")
            assert group in keys and (not key or key in keys[group]), name
    assert len(rows) > 30
    if importlib.util.find_spec("ldalign.run.foreign_names") is None:
        return
    foreign = importlib.import_module("ldalign.run.foreign_names").FOREIGN
    beside: dict[str, str] = {}  # a name of theirs: our keys in all the rows that have it
    for row in rows:
        ours, *theirs = row.strip("| ").split("|")
        for name in re.findall(r"`(\w+)`", " ".join(theirs)):
            beside[name] = beside.get(name, "") + ours
    for name, ours in beside.items():
        key = re.match(r"[\w.]*", foreign.get(name, "none"))
        known = key is not None and (key[0] == "none" or re.search(rf"`{key[0]}[`.]", ours))
        assert known, f"{name}: {foreign[name]}, not {ours}"


def test_requirements_of_the_site_hold_no_torch() -> None:
    text = (ROOT / "requirements/docs.txt").read_text(encoding="utf-8")
    assert "mkdocs-material==" in text and "torch" not in text
