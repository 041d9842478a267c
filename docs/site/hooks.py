"""What mkdocs is told beside mkdocs.yml: its navigation, pages made of other files, and formulas.

The pages are written for a code host: they link to files of the repository, wherever these lie, and
their formulas are TeX. Here a linked page or figure outside docs/ becomes one of the site's, any
other linked file a page that shows it, and a formula becomes MathML, which browsers draw by
themselves; the font for it comes with the package ziamath. Pages about the public calls and the
settings are made of the source.
"""

import html
import posixpath
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import ziamath
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
import settings_page

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = ROOT / ".venv-docs/source"  # the package as it is installed: mkdocs.yml names it too
INDEX = "docs/README.md"
PLACES = {"README.md": "index.md", INDEX: "pages.md"}  # in the site, of what does not keep its name
FOREIGN = ROOT / "ldalign/run/foreign_names.py"  # keys of other trainers, and what to give here
MORE = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
# Modules with a page of their own, beside the public names.
MODULES = (
    "objective",
    "ops",
    "kernels.reference",
    "data.rows",
    "data.pairs",
    "models.guide",
    "generation.generate",
    "training.policy",
    "training.loop",
    "evaluation.statistics",
    "run.methods",
    "system.config",
    "system.errors",
)
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=(?:#[^)\s]*)?\))")
FENCE = re.compile(r"^( *)(```+)[^\n]*\n.*?^\1\2 *$", re.MULTILINE | re.DOTALL)
MATH_FENCE = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MATH = re.compile(
    r'<(span|div) class="arithmatex">\s*(?:\\\((.*?)\\\)|\\\[(.*?)\\\])\s*</\1>', re.DOTALL
)
LOST_LIST = re.compile(r"<p>(?:(?!</p>).)*?\n((?:- |\d+\. )[^\n<]*)", re.DOTALL)
SPACED = (  # what latex2mathml leaves to be spaced: a function's name, a sign, a prime
    (re.compile(r"<mi>(log|ln|max|min)</mi>(?!<mo)"), r'<mi>\1</mi><mspace width="0.17em" />'),
    (re.compile(r"(?<=<mo>&#x0003D;</mo>)<mo>&#x02212;"), '<mo form="prefix">&#x02212;'),
    (re.compile(r"<mi>&#x02032;</mi>"), "<mo>&#x02032;</mo>"),
    (re.compile(r"<mo[^>]*>(?=&#x0?2016;|&#x0?2225;)"), '<mo stretchy="false">'),
)
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cu": "cpp", ".yaml": "yaml"}

log = get_plugin_logger("site")
_sources: dict[str, str] = {}  # of the site's pages: where each lies in the repository


def on_startup(command: str, dirty: bool) -> None:
    """Lays the package out, before mkdocstrings looks for it."""
    _lay_out()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Makes the navigation."""
    nav: list[dict[str, Any]] = [{"What it is": "index.md"}]
    index = (ROOT / INDEX).read_text(encoding="utf-8")
    for group in index.split("\n## ")[1:]:
        title, _, text = group.partition("\n")
        pages = [
            _in_repository(INDEX, link)
            for link in re.findall(r"^- \[[^]]*\]\(([^)]+)\)", text, re.M)
        ]
        nav.append({title: [{_title(page): _place(page)} for page in pages]})
    nav += [
        {
            "Reference": [
                {"Settings": "settings.md"},
                *([{"Names of other trainers": "foreign-names.md"}] if FOREIGN.is_file() else []),
                {"Public names": "api/ldalign.md"},
                *_modules(),
            ]
        },
        {"Project": [{_title(page): page} for page in MORE]},
    ]
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and figures that the pages lead to, and those made of the source."""
    _sources.clear()
    waiting = ["README.md", INDEX, *MORE, *_own(files)]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            waiting += [_in_repository(path, link) for link in _links(text)]
        place = _place(path)
        _sources[place] = path
        if files.get_file_from_path(place) is None:
            files.append(_file(path, place, config))
    made = {"settings.md": settings_page.page(), "api/ldalign.md": _public()}
    if FOREIGN.is_file():
        made["foreign-names.md"] = _foreign()
    for name in MODULES:
        made[f"api/{name}.md"] = f"# ldalign.{name}\n\n::: ldalign.{name}\n"
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    assets = [Path(__file__).with_name(name) for name in ("site.css", "iframe-worker.js")]
    for path in [*assets, Path(ziamath.__file__).parent / "fonts/STIXTwoMath-Regular.ttf"]:
        files.append(File.generated(config, f"assets/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads the links of a page to where the site has their targets."""
    source = _sources.get(page.file.src_uri)
    if source is None or not source.endswith(".md"):
        return markdown
    markdown = re.sub(r"\A## ", "# ", markdown)  # a table of bench/, made for a longer page
    markdown = MATH_FENCE.sub(lambda found: f"\n$$\n{found[1]}$$\n", markdown)
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        return posixpath.relpath(_place(_in_repository(source, link[1])), here or ".")

    return _outside_fences(markdown, lambda text: LINK.sub(moved, text))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns formulas into MathML; warns, which ends the build, of what was not understood."""
    for found in LOST_LIST.finditer(content):
        log.warning("%s: no empty line before a list: %s", page.file.src_uri, found[1])

    def drawn(found: re.Match[str]) -> str:
        inline, block = found[2], found[3]
        tex = html.unescape(inline if inline is not None else block)
        drawing = convert(tex, display="inline" if inline is not None else "block")
        for pattern, better in SPACED:
            drawing = pattern.sub(better, drawing)
        return drawing

    content = re.sub(r"<code>(?=[^<]{1,16}</code>)", '<code class="whole">', content)
    return MATH.sub(drawn, content)


def _own(files: Files) -> list[str]:
    return [f"docs/{file.src_uri}" for file in files.documentation_pages()]


def _outside_fences(text: str, change: Any) -> str:
    parts, at = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, change(text[at:])])


def _links(text: str) -> list[str]:
    """The files that a page leads to, as it writes them."""
    return LINK.findall(FENCE.sub("", text))


def _in_repository(page: str, link: str) -> str:
    """Where a link of a page leads, from the root of the repository."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    inner = f"{path}/README.md"
    return inner if (ROOT / inner).is_file() else path


def _place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path in PLACES:
        return PLACES[path]
    if path.endswith((".md", ".svg", ".png", ".json")):
        return path.removeprefix("docs/")
    return f"source/{path}.md"


def _file(path: str, place: str, config: MkDocsConfig) -> File:
    if not place.startswith("source/"):
        return File.generated(config, place, abs_src_path=str(ROOT / path))
    text = (ROOT / path).read_text(encoding="utf-8").rstrip()
    head = "---\nsearch:\n  exclude: true\nhide: [toc, navigation]\n---\n"
    language = LANGUAGES.get(Path(path).suffix, "text")
    return File.generated(
        config, place, content=f"{head}# {path}\n\n`````{language}\n{text}\n`````\n"
    )


def _title(path: str) -> str:
    line = (ROOT / path).read_text(encoding="utf-8").partition("\n")[0]
    return line.removeprefix("# ").replace("`", "")


def _modules() -> list[dict[str, str]]:
    return [{f"ldalign.{name}": f"api/{name}.md"} for name in MODULES]


def _public() -> str:
    """The page of the names in ldalign.__all__, each as the module has it that makes it."""
    source = (ROOT / "ldalign/__init__.py").read_text(encoding="utf-8")
    homes = re.findall(r"^ {4}from (ldalign[\w.]*) import (.+)$", source, re.MULTILINE)
    names = [(home, name) for home, listed in homes for name in listed.split(", ")]
    parts = ["# Public names\n\nWhat `import ldalign` gives; other modules may change.\n"]
    for home, name in sorted(names, key=lambda pair: pair[1]):
        if name == "ops":
            parts.append(
                "\n## ldalign.ops\n\nThe fused operations, a function each: [ops](ops.md).\n"
            )
            continue
        parts.append(
            f"\n::: {home}.{name}\n    options:\n      heading: ldalign.{name}\n"
            "      show_root_heading: true\n      show_root_toc_entry: true\n"
        )
    return "".join(parts)


def _foreign() -> str:
    """The page of the keys of other trainers, as the settings answer to them."""
    names: dict[str, str] = runpy.run_path(str(FOREIGN))["FOREIGN"]
    rows = []
    for name, here in names.items():
        key, semicolon, note = here.partition(";")
        shown = f"`{key}`{semicolon}{note}" if re.match(r"[\w.]+=", key) else here
        rows.append(f"| `{name}` | {shown.replace('|', chr(92) + '|')} |\n")
    return (
        "# Names of other trainers\n\nWhat is answered where a key of TRL, axolotl or "
        "LLaMA-Factory is given; [coming from other trainers](coming-from.md) has the rest.\n\n"
        "| there | here |\n|---|---|\n" + "".join(rows)
    )


def _lay_out() -> None:
    """Makes a folder of links in which the packages lie as they are installed (setup.py)."""
    package = LAYOUT / "ldalign"
    package.mkdir(parents=True, exist_ok=True)
    for old in package.iterdir():
        old.unlink()
    for path in [*(ROOT / "ldalign").iterdir(), ROOT / "kernels", ROOT / "train"]:
        if path.suffix in ("", ".py") and path.name != "__pycache__":
            (package / path.name).symlink_to(path)
