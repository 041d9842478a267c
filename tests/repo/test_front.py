"""The pages that a newcomer reads first: that they are short, and that what they name is there."""

import functools
import re
from pathlib import Path

import pytest

import ldalign

ROOT = Path(__file__).resolve().parents[2]
README_LINES, COLUMNS = 150, 120
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    first = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
    return [*(ROOT / name for name in first), *sorted((ROOT / "docs").glob("*.md"))]


def part(heading: str) -> str:
    """README's text under `## heading`, up to the next heading."""
    return readme().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


@functools.cache
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def links(page: Path) -> list[str]:
    """The files that a page links to, as it writes them; code and other sites are left out."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    found = (link.partition("#")[0] for link in LINK.findall(text))
    return [link for link in found if link and not re.match(r"[a-z]+:", link)]


def too_long(text: str) -> list[int]:
    """Numbers of the lines over 120 columns, those of tables apart; an address counts nothing."""
    lines = enumerate(text.splitlines(), 1)
    return [
        number
        for number, line in lines
        if not line.startswith("|") and len(re.sub(r"\]\([^)]*\)", "]", line)) > COLUMNS
    ]


def test_readme_is_short() -> None:
    assert len(readme().splitlines()) <= README_LINES
    assert not too_long(readme())


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in links(page) if not (page.parent / link).exists()]
    assert not missing


def test_readme_names_what_is_there() -> None:
    """The eight files to read, and the first column of the tree."""
    read = re.findall(r"^\d+\. \[`([^`]+)`\]\(([^)]+)\)", part("Read in this order"), re.MULTILINE)
    assert len(read) == 8 and all(shown == link for shown, link in read)
    block = FENCED.findall(part("What is where"))[0]
    tree = re.findall(r"^([\w./]+)(?: {2,4}(\w+/))? ", block, re.MULTILINE)
    named = [path for row in tree for path in row if path]
    assert len(tree) >= 12 and "ldalign/objective.py" in named
    assert not [path for path in named if not (ROOT / path).exists()]
    rooms = {
        f"ldalign/{p.name}/" for p in (ROOT / "ldalign").iterdir() if (p / "__init__.py").exists()
    }
    assert rooms <= set(named), "every package has its line in the tree"


def test_make_targets_are_there() -> None:
    made = re.findall(r"^([a-z -]+):(?!=)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    targets = {name for line in made for name in line.split()}
    for page in pages():
        text = page.read_text(encoding="utf-8")
        asked = set(re.findall(r"(?:`|^|&& )make ([a-z][a-z-]*)", text, re.MULTILINE))
        assert asked <= targets, f"{page.name}: {asked - targets}"
    assert {"align", "test"} <= targets


def test_changelog_and_citation_say_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)[0] == ldalign.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (\S+)$", citation, re.MULTILINE) == [ldalign.__version__]


def test_these_tests_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "![a](a.svg) [b](b.md#part), [c](https://c.org), [d](#d)\n```\n[e](e.md)\n```\n[f](f)\n"
    )
    assert links(page) == ["a.svg", "b.md", "f"]
    assert too_long(f"| {'x' * 200} |\n[x]({'x' * 200})\n{'x' * 121}\n") == [3]
