"""Makes docs/errors.md of every error text in the source, and docs/site/errors.yaml.

    .venv/bin/python docs/site/errors_page.py

The texts are read from the source, nothing of it is run: what is given to InputError and its like,
to `need`, and to the lists of problems of a config. What a value stands for in a text is shown as a
word in capitals. errors.yaml has the topics, and says what to do about the texts that do not say it
themselves, by a part of the text; such a text without an entry there is an error.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/errors.md"
ADVICE = Path(__file__).with_name("errors.yaml")
COMMAND = ".venv/bin/python docs/site/errors_page.py"
FOLDERS = ("ldalign", "train")

# A call of one of these names makes an error of its first argument: the exit code of each.
CODES = {
    "InputError": 2,
    "UnsafeTemplate": 2,
    "TemplateRefusal": 2,
    "BadRow": 2,
    "Mismatch": 2,
    "EnvironmentProblem": 3,
    "OutOfMemory": 3,
    "NumericsError": 4,
}
LISTS = ("problems", "found")  # of texts that are said together, by `load_config`
# What the names in the source stand for, where they do not say it.
WORDS = {
    "where": "WHERE",
    "path": "FILE",
    "file": "FILE",
    "folder": "FOLDER",
    "partial": "FOLDER",
    "error": "REASON",
    "one_line": "REASON",
    "strerror": "REASON",
    "len": "N",
    "count": "N",
    "max": "N",
    "min": "N",
    "sum": "N",
    "id": "ID",
    "str": "TEXT",
    "repr": "TEXT",
    "t": "N",
    "f": "N",
    "begin": "KEY=VALUE",
    "called": "FILE",
    "fewer": "N",
    "forms": "NAME",
    "__name__": "KIND",
    "type_name": "KIND",
    "msg": "REASON",
    "shown": "VALUE",
    "shortly": "NAMES",
    "st_size": "N",
    "nearest": "",
    "prefix": "",
}
LISTED = "NAME, ..."

# A text with one of these says itself what to do, or what would have been right.
SAYS = re.compile(
    r"; |: (give|read|run|hold|shorten|delete)\b|\b(expected|must be|give|allowed|needs|instead|"
    r"install|leave out|lower|raise|set|delete|remove)\b|HOW-TO-"
)


@dataclass(frozen=True)
class Text:
    """An error text: its class, where the source makes it, and when, where a docstring says so."""

    text: str
    kind: str
    file: str
    when: str


def texts(root: Path = ROOT) -> list[Text]:
    """Returns the error texts of the source below `root`, file by file, each once."""
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    shared = _constants(trees.values())
    found: dict[str, Text] = {}
    for path, tree in trees.items():
        constants = shared | _constants([tree])
        for node, function in _walk(tree):
            for kind, argument in _errors(node, function):
                known = constants | _local(function, constants)
                for text in _readable(argument, function, tree, known):
                    name = str(path.relative_to(root))
                    found.setdefault(text, Text(text, kind, name, _when(function, kind)))
    return list(found.values())


def _constants(trees: Any) -> dict[str, str]:
    """The texts that have one name in capitals in the whole source."""
    found: dict[str, str] = {}
    twice: set[str] = set()
    for tree in trees:
        for node in tree.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            value = node.value if target is not None else None
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                name = target.id
                if name.isupper() and isinstance(value.value, (str, int)):
                    twice |= (
                        {name} if found.get(name, str(value.value)) != str(value.value) else set()
                    )
                    found[name] = str(value.value)
    return {name: value for name, value in found.items() if name not in twice}


def _local(function: Any, constants: dict[str, str]) -> dict[str, str]:
    """The names of a function that are given a text once."""
    made: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function) if function is not None else ():
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            made.setdefault(node.targets[0].id, []).append(node.value)
    return {
        name: _text(values[0], constants)
        for name, values in made.items()
        if len(values) == 1
        and (
            isinstance(values[0], ast.JoinedStr) or isinstance(getattr(values[0], "value", 0), str)
        )
    }


def _walk(tree: ast.AST, function: Any = None) -> Iterator[tuple[ast.AST, Any]]:
    """Yields every node with the function around it."""
    for node in ast.iter_child_nodes(tree):
        yield node, function
        inner = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        yield from _walk(node, node if inner else function)


def _errors(node: ast.AST, function: Any) -> Iterator[tuple[str, ast.expr]]:
    """Yields the class and the text of the error that a call makes."""
    if not isinstance(node, ast.Call) or not node.args:
        return
    name = getattr(node.func, "id", getattr(node.func, "attr", "")).lstrip("_")
    if name in CODES:
        yield name, node.args[0]
    elif name == "naming" and len(node.args) == 2:
        what = node.args[0].body if isinstance(node.args[0], ast.Lambda) else node.args[0]
        middle = ast.Constant(": out of memory; ")
        whole = ast.BinOp(ast.BinOp(what, ast.Add(), middle), ast.Add(), node.args[1])
        yield "OutOfMemory", whole
    elif name == "need" and len(node.args) == 2:
        yield "InputError", node.args[1]
    elif name == "append" and isinstance(node.func, ast.Attribute):
        listed = isinstance(node.func.value, ast.Name) and node.func.value.id in LISTS
        if listed and isinstance(node.args[0], (ast.JoinedStr, ast.Constant)):
            if node.func.value.id == "problems" or getattr(function, "name", "") == "problems":
                yield "InputError", node.args[0]


def _readable(
    node: ast.expr, function: Any, tree: ast.Module, constants: dict[str, str], depth: int = 0
) -> list[str]:
    """The texts that an expression may be; [] where only a run could tell."""
    if isinstance(node, ast.IfExp):
        sides = (node.body, node.orelse)
        return [t for side in sides for t in _readable(side, function, tree, constants, depth)]
    if isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp)):
        text = " ".join(_text(node, constants).split())
        return [text] if re.search(r"[a-z]{3}", re.sub(r"\[.*?\]", "", text)) else []
    if depth > 1:
        return []
    sources: list[ast.expr] = []
    if isinstance(node, ast.Name) and function is not None:
        sources = [
            one.value
            for one in ast.walk(function)
            if isinstance(one, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == node.id for t in one.targets)
        ]
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        sources = [
            one.value
            for made in ast.walk(tree)
            if isinstance(made, ast.FunctionDef) and made.name == name
            for one in ast.walk(made)
            if isinstance(one, ast.Return) and one.value is not None
        ]
    literal = [one for one in sources if not isinstance(one, (ast.Call, ast.Name))]
    return [t for one in literal for t in _readable(one, function, tree, constants, depth + 1)]


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    """An expression as the reader of the text would see it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [_text(value, constants) for value in node.values]
        pairs = zip(["", *parts], parts, strict=False)
        return "".join(" " * _run_together(*pair) + pair[1] for pair in pairs)
    if isinstance(node, ast.FormattedValue):
        text = _text(node.value, constants)
        return f"'{text}'" if node.conversion == ord("r") else text
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.Div):
        return "N"
    if isinstance(node, ast.BinOp):  # FOLDER / "name", or a quotient
        right = _text(node.right, constants)
        return f"{_text(node.left, constants)}/{right}" if re.search("[a-z]", right) else "N"
    if isinstance(node, ast.IfExp):
        sides = [_text(side, constants) for side in (node.body, node.orelse)]
        return sides[0] + f" or {sides[1].strip()}" if all(sides) else f"[{''.join(sides).strip()}]"
    if isinstance(node, ast.BoolOp):
        return _text(node.values[0], constants)
    if isinstance(node, ast.Subscript):
        return _text(node.value, constants)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr == "join":
            return LISTED
        if node.func.attr in ("format", "strip", "rstrip", "removeprefix"):
            return _text(node.func.value, constants)
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", "value"))
        return _word(name)
    name = getattr(node, "id", getattr(node, "attr", "value"))
    return constants.get(name) or _word(name)


def _run_together(left: str, right: str) -> bool:
    """Whether two words in capitals would be read as one."""
    return bool(re.search(r"[A-Z]$", left) and re.match(r"[A-Z]", right))


def _word(name: str) -> str:
    name = name if name in WORDS else name.lstrip("_").lower()
    return WORDS.get(name, "" if name.endswith("hint") else name.upper().replace("_", "-"))


def _when(function: Any, kind: str) -> str:
    """What the function's docstring says of this class of error; '' where it says nothing."""
    doc = ast.get_docstring(function) if function is not None else None
    sentences = re.split(r"(?<=[.])\s+", " ".join((doc or "").split()))
    said = " ".join(one for one in sentences if one.startswith("Raises"))
    named = "InputError" if CODES[kind] == 2 else kind
    clauses = re.split(rf"(?:,? and |, |^Raises )(?:an? )?({'|'.join(CODES)}|\w+Error)\b", said)
    for name, clause in zip(clauses[1::2], clauses[2::2], strict=True):
        if name in (kind, named) and re.match(r" (for|where|if|when|unless|on)\b", clause):
            return "" if "else" in clause else clause.strip(" .,;")
    return ""


def make(found: list[Text], advice: dict[str, Any]) -> tuple[str, list[str]]:
    """Returns the page, and what has to be done to errors.yaml before it may stand."""
    said: dict[str, str] = advice["advice"]
    problems = [
        f"errors.yaml: in no text of the source: {part}"
        for part in said
        if not any(part in one.text for one in found)
    ]
    topics: list[dict[str, Any]] = advice["topics"]
    parts = [advice["head"].rstrip() + "\n"]
    placed: set[str] = set()
    for topic in topics:
        of_topic = [
            one
            for one in found
            if one.text not in placed and any(map(one.file.startswith, topic["files"]))
        ]
        if of_topic:
            parts.append(f"\n## {topic['title']}\n\n{topic['about'].rstrip()}\n")
        source = ""
        for one in of_topic:
            placed.add(one.text)
            if one.file != source:
                source = one.file
                parts.append(f"\n### `{source}`\n")
            todo = next((said[part] for part in said if part in one.text), "")
            if not todo and not SAYS.search(one.text):
                problems.append(f"errors.yaml: {one.file}: say what to do about: {one.text}")
            parts.append(_entry(one, todo))
    problems += [f"errors.yaml: no topic has {one.file}" for one in found if one.text not in placed]
    return "".join(parts), list(dict.fromkeys(problems))


def _entry(one: Text, todo: str) -> str:
    ticks = "``" if "`" in one.text else "`"
    pad = " " if "`" in (one.text[:1], one.text[-1:]) else ""
    code = f"Exit code {CODES[one.kind]}." if CODES[one.kind] != 2 else ""
    row = "`bad_rows=skip` leaves such rows out." if one.kind == "BadRow" else ""
    when = f"Comes {one.when}." if one.when else ""
    words = " ".join(filter(None, (when, todo.strip(), code, row)))
    body = textwrap.fill(words, 100, break_long_words=False, break_on_hyphens=False)
    return f"\n#### {ticks}{pad}{one.text}{pad}{ticks}\n" + (f"\n{body}\n" if body else "")


def main() -> int:
    """Writes the page; says what is missing in errors.yaml and returns 2 where something is."""
    page, problems = make(texts(), yaml.safe_load(ADVICE.read_text(encoding="utf-8")))
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
