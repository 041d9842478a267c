"""Mutants of a source file: one small change each, which some test should notice (`mutate.py`).

Changes are made to the text, at the places that the syntax tree names, so that everything else of a
file stays as it is. Left alone are annotations, decorators, imports, asserts and texts: a change
there is either none or seen by other checks.
"""

import ast
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
PLAIN = (ast.Name, ast.Attribute, ast.Call, ast.Subscript)  # conditions without an operator
# Fields of nodes that are left alone.
ALONE = ("annotation", "returns", "decorator_list", "bases")


@dataclass(frozen=True)
class Mutant:
    """One change of one file: the bytes from `start` to `end` become `text`."""

    file: str  # ldalign/objective.py
    function: str  # Class.method of the change; "" for the module's own lines
    line: int
    lines: tuple[int, int]  # first and last of its statement; without the body of one that has one
    operator: str
    before: str  # as it is shown, in one line
    after: str
    start: int
    end: int
    text: str

    @property
    def name(self) -> str:
        """What tells it from the file's others, whatever lines stand above its function."""
        return f"{self.operator} {self.function} {self.start}: {self.before} -> {self.after}"

    def apply(self, source: bytes) -> bytes:
        """The changed file."""
        return source[: self.start] + self.text.encode() + source[self.end :]


def mutants(source: bytes, file: str) -> list[Mutant]:
    """Returns every mutant of a file there is, in the order of their places."""
    finder = _Finder(source, file)
    finder.visit(ast.parse(source))
    found = {(one.start, one.end, one.text): one for one in finder.found}
    return sorted(
        (one for one in found.values() if _compiles(one.apply(source))),
        key=lambda one: (one.start, one.end, one.operator, one.text),
    )


def chosen(found: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """Draws `count` mutants of a file's, all where it has no more; in the order of their places."""
    if count >= len(found):
        return list(found)
    draw = random.Random(f"{seed} {found[0].file}")
    return [found[i] for i in sorted(draw.sample(range(len(found)), count))]


def run_at_import(source: bytes) -> dict[int, range]:
    """Of the lines that an import runs (constants, defaults, classes), and no others: the lines of
    the function or class around them, or of the whole file.
    """
    tree, count = ast.parse(source), len(source.splitlines())
    spans = dict.fromkeys(range(1, count + 1), range(1, count + 1))
    for node in ast.walk(tree):  # outer ones come first
        if isinstance(node, FUNCTIONS):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            own = range(first, (node.end_lineno or node.lineno) + 1)
            spans |= dict.fromkeys(own, own)
            if not isinstance(node, ast.ClassDef):
                for line in range(node.body[0].lineno, own.stop):
                    del spans[line]
    return spans


def _compiles(source: bytes) -> bool:
    try:
        compile(source, "mutant", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


class _Finder(ast.NodeVisitor):
    """Goes through a file, and notes the changes of every node that it comes to."""

    def __init__(self, source: bytes, file: str) -> None:
        self.file, self.found = file, list[Mutant]()
        self.names: list[str] = []  # of the functions and classes around
        self.lines = (1, 1)  # of the statement around
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        self.starts = starts

    def note(self, node: Any, operator: str, after: str, *, expression: bool = True) -> None:
        """One change of a node, into the code `after`."""
        before = ast.unparse(node)
        if after == before:
            return
        self.found.append(
            Mutant(
                self.file,
                ".".join(self.names),
                node.lineno,
                self.lines,
                operator,
                " ".join(before.split()),
                " ".join(after.split()),
                self.starts[node.lineno - 1] + node.col_offset,
                self.starts[node.end_lineno - 1] + node.end_col_offset,
                f"({after})" if expression else after,
            )
        )

    def visit(self, node: ast.AST) -> None:
        outer = self.lines
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno
            self.lines = (node.lineno, max(node.lineno, last or 0))
        for operator, after in _changes(node):
            self.note(node, operator, after, expression=isinstance(node, ast.expr))
        if isinstance(node, (ast.If, ast.IfExp, ast.While)) and isinstance(node.test, PLAIN):
            self.note(node.test, "condition", f"not {ast.unparse(node.test)}")
        if isinstance(node, FUNCTIONS):
            self.names.append(node.name)
        for field, value in ast.iter_fields(node):
            # Of what stands inside an f-string, Python 3.11 does not know the place.
            if field not in ALONE and not isinstance(node, (ast.JoinedStr, ast.Assert)):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST) and not _is_type(node, field):
                        self.visit(child)
        if isinstance(node, FUNCTIONS):
            self.names.pop()
        self.lines = outer


def _is_type(node: ast.AST, field: str) -> bool:
    """Whether a field of a node holds a type, such as Literal["a", "b"]."""
    if isinstance(node, ast.ClassDef):
        return field == "keywords"
    return isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Literal", "Callable")


def _changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """The changes of one node: operator, and the code in its place."""
    if isinstance(node, ast.Compare):
        yield from _comparisons(node)
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _of_text(node):
        other = ARITHMETIC[type(node.op)]()
        yield "arithmetic", ast.unparse(ast.BinOp(node.left, other, node.right))
    elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        other = ARITHMETIC[type(node.op)]()
        yield "arithmetic", ast.unparse(ast.AugAssign(node.target, other, node.value))
        yield "dropped statement", "pass"
    elif isinstance(node, ast.Constant):
        yield from _constants(node.value)
    elif isinstance(node, ast.BoolOp):
        other_one = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "and, or", ast.unparse(ast.BoolOp(other_one, node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        is_not = isinstance(node.op, ast.Not)
        yield "not" if is_not else "sign", ast.unparse(node.operand)
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.Return):
        if node.value is not None and ast.unparse(node.value) != "None":
            yield "return None", "return None"
    elif isinstance(node, ast.Expr):
        if isinstance(node.value, (ast.Call, ast.Await, ast.Yield, ast.YieldFrom)):
            yield "dropped statement", "pass"
    elif isinstance(node, (ast.Raise, ast.Delete, ast.Break, ast.Continue)):
        yield "dropped statement", "pass"
    elif isinstance(node, ast.Assign) and _is_replaced(node):
        yield "dropped statement", "pass"


def _comparisons(node: ast.Compare) -> Iterator[tuple[str, str]]:
    for i, op in enumerate(node.ops):
        for other in COMPARISONS[type(op)]:
            ops = [*node.ops[:i], other(), *node.ops[i + 1 :]]
            yield "comparison", ast.unparse(ast.Compare(node.left, ops, node.comparators))


def _constants(value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, bool):
        yield "constant", str(not value)
    elif isinstance(value, (int, float)):
        for other in (value + 1, value - 1):
            if other != value:
                yield "constant", repr(other)


def _calls(node: ast.Call) -> Iterator[tuple[str, str]]:
    args = node.args
    for i in range(len(args) - 1):
        pair = args[i : i + 2]
        if not any(isinstance(arg, ast.Starred) for arg in pair):
            swapped = [*args[:i], *reversed(pair), *args[i + 2 :]]
            yield "swapped arguments", ast.unparse(ast.Call(node.func, swapped, node.keywords))
    for i, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            rest = [*node.keywords[:i], *node.keywords[i + 1 :]]
            yield "dropped argument", ast.unparse(ast.Call(node.func, args, rest))


def _of_text(node: ast.BinOp) -> bool:
    """Whether a text is added or formatted: another operator could only fail."""
    sides = (node.left, node.right)
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, (str, bytes)))
        or (isinstance(side, ast.BinOp) and _of_text(side))
        for side in sides
    )


def _is_replaced(node: ast.Assign) -> bool:
    """Whether an assignment makes a new value of a name out of its old one."""
    read = {
        one.id
        for one in ast.walk(node.value)
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)
    }
    written = [
        one.id
        for target in node.targets
        for one in ast.walk(target)
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
    ]
    return bool(written) and set(written) <= read
