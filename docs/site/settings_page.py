"""The page of every key of a run and of a comparison, read from the source without running it.

`--help` says the same of each (`describe` in ldalign/system/config.py); torch, which the config
classes need to be imported, is not there where the site is built.
"""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ROOT / "ldalign/run/settings.py"
COMPARISON = ROOT / "ldalign/run/compare_settings.py"
HEAD = """\
# Settings

Every key of a run, of the scripts that make one stage of it, and of a comparison (`compare.*`):
its default, what may be given, and what it does, as `--help` says it too. A key is given as
`key=value` behind a command, or in the file of `--config` ([Using ldalign](using.md)).

## Of the run as a whole
"""
BOUNDS = {
    "positive": "greater than 0",
    "non_negative": "0 or greater",
    "not_empty": "not empty",
    "between": "between {} and {}",
    "at_least": "{} or greater",
    "above_up_to": "greater than {}, at most {}",
    "at_least_below": "{} or greater, below {}",
    "each": "{}",
}
TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "None": "null",
    "list[str]": "a list of texts",
    "list[int]": "a list of integers",
    "list[float]": "a list of numbers",
}
LITERALS = {"None": "null", "True": "true", "False": "false"}


def page() -> str:
    """Returns the page in Markdown."""
    parts = [HEAD]
    groups = []
    for path, name in ((SETTINGS, "RunConfig"), (COMPARISON, "CompareConfig")):
        for key, field in _fields(path, name):
            if isinstance(field.value, ast.Call) and _name(field.value.func) == "group":
                groups.append((path, key, field.value))
            else:
                parts.append(_entry(path, key, field))
    for path, key, call in groups:
        home, name = _home(path, _name(call.args[0]))
        about = _text(call.args[1]) if len(call.args) > 1 else ""
        parts.append(f"\n## `{key}.*`: {_escaped(about)}\n")
        parts += [_entry(home, f"{key}.{inner}", field) for inner, field in _fields(home, name)]
    return "".join(parts)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _fields(path: Path, name: str) -> list[tuple[str, ast.AnnAssign]]:
    """The keys of a config class, each with its declaration."""
    made = [n for n in _tree(path).body if isinstance(n, ast.ClassDef) and n.name == name]
    declared = [n for n in made[0].body if isinstance(n, ast.AnnAssign)]
    return [
        (n.target.id, n)
        for n in declared
        if isinstance(n.target, ast.Name) and "ClassVar" not in ast.unparse(n.annotation)
    ]


def _home(path: Path, name: str) -> tuple[Path, str]:
    """The file that makes a name which `path` has: itself, or the one that it imports from."""
    for node in _tree(path).body:
        if isinstance(node, ast.ImportFrom) and any(name == one.name for one in node.names):
            parts = (node.module or "").split(".")
            parts = parts[1:] if parts[1:2] in (["kernels"], ["train"]) else parts
            return ROOT.joinpath(*parts).with_suffix(".py"), name
    return path, name


def _value(path: Path, name: str) -> ast.expr | None:
    home, name = _home(path, name)
    for node in _tree(home).body:
        if isinstance(node, ast.Assign) and any(_name(target) == name for target in node.targets):
            return node.value
    return None


def _entry(path: Path, key: str, field: ast.AnnAssign) -> str:
    call = field.value
    assert isinstance(call, ast.Call), f"{path}: {key}: no setting(...)"
    default, words = _shown(path, call.args[0]), _text(call.args[1])
    checks = [one.value for one in call.keywords if one.arg == "check"]
    bound = "; " + _bound(path, checks[0]) if checks else ""
    kind = _kind(path, field.annotation)
    return f"\n#### `{key}={default}`\n\n*{_escaped(kind + bound)}*: {_escaped(words)}\n"


def _shown(path: Path, node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        value = _value(path, node.id)
        return node.id if value is None else _shown(path, value)
    value = ast.literal_eval(node) if not isinstance(node, (ast.Attribute, ast.Call)) else None
    if isinstance(value, str):
        return value
    return LITERALS.get(ast.unparse(node), ast.unparse(node)).replace("'", "").replace("_", "")


def _bound(path: Path, node: ast.expr) -> str:
    if isinstance(node, ast.Call) and _name(node.func) == "Check":
        return _text(node.args[1])
    if isinstance(node, ast.Name) and node.id not in BOUNDS:
        value = _value(path, node.id)
        return node.id if value is None else _bound(_home(path, node.id)[0], value)
    if isinstance(node, ast.Call):
        given = [
            _bound(path, one) if _name(one) in BOUNDS else _shown(path, one) for one in node.args
        ]
        return BOUNDS[_name(node.func)].format(*given)
    return BOUNDS[_name(node)]


def _kind(path: Path, node: ast.expr) -> str:
    """What may be given, in the words of `--help`."""
    if isinstance(node, ast.BinOp):
        return " or ".join(_kind(path, side) for side in (node.left, node.right))
    if isinstance(node, ast.Subscript) and _name(node.value) == "Literal":
        given = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return "one of " + ", ".join(_shown(path, one) for one in given)
    if isinstance(node, ast.Name) and node.id not in TYPES:
        value = _value(path, node.id)
        return node.id if value is None else _kind(_home(path, node.id)[0], value)
    return TYPES.get(ast.unparse(node), ast.unparse(node))


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node).upper()


def _name(node: ast.AST) -> str:
    return str(
        getattr(node, "id", getattr(node, "attr", getattr(getattr(node, "func", None), "id", "")))
    )


def _escaped(text: str) -> str:
    return re.sub(r"([*_<\[\]$|])", r"\\\1", text)
