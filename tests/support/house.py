"""How the product is built, in numbers: `python tests/support/house.py [CHECKOUT ...]`.

Rooms are the packages and modules at the top of ldalign/, kernels/ and train/; an arrow is a room
that imports another, floors are the rooms' levels when every arrow points down. Printed as one
column a checkout, so that two layouts can be compared.
"""

import ast
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
WIDTH = 100


def sources(root: Path) -> dict[str, tuple[str, ast.Module]]:
    """{full module name: (text, syntax tree)} of ldalign/, kernels/ and train/."""
    found = {}
    for folder in ("ldalign", "kernels", "train"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = [*path.relative_to(root).with_suffix("").parts]
            if folder != "ldalign":
                parts.insert(0, "ldalign")
            text = path.read_text(encoding="utf-8")
            found[".".join(p for p in parts if p != "__init__")] = (text, ast.parse(text))
    return found


def room(module: str) -> str:
    """ldalign.run.stages.data -> run, ldalign.ops -> ops; a flat module is a room of its own."""
    return [*module.split("."), ""][1]


def arrows(found: dict[str, tuple[str, ast.Module]], by_room: bool) -> dict[str, set[str]]:
    """{room or module: the others that it imports}."""
    place = room if by_room else str
    out: dict[str, set[str]] = {place(module): set() for module in found if room(module)}
    for module, (_, tree) in found.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = (f"{node.module}.{alias.name}" for alias in node.names)
                names = [name if name in found else node.module for name in whole]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name in found and room(name) and room(module) and place(name) != place(module):
                    out[place(module)].add(place(name))
    return out


def floors(graph: dict[str, set[str]]) -> tuple[int, int]:
    """How many levels there are, and how many rooms stand in a circle (and so on none)."""
    level: dict[str, int] = {}
    left = dict(graph)
    while ready := [name for name, below in left.items() if below <= level.keys()]:
        for name in ready:
            level[name] = 1 + max((level[below] for below in graph[name]), default=0)
            del left[name]
    return max(level.values(), default=0), len(left)


def figures(root: Path) -> dict[str, object]:
    """The table's column of one checkout."""
    found = sources(root)
    rooms, modules = arrows(found, True), arrows(found, False)
    functions = [
        (int(node.end_lineno or 0) - node.lineno + 1, f"{module}.{node.name}")
        for module, (_, tree) in found.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    lengths = sorted(length for length, _ in functions)
    texts = [text for text, _ in found.values()]
    widths = [len(line) for text in texts for line in text.splitlines()]
    return {
        "files": len(found),
        "rooms": len(rooms),
        "floors of rooms": floors(rooms)[0],
        "arrows between rooms": sum(map(len, rooms.values())),
        "rooms in a circle": floors(rooms)[1],
        "arrows between files": sum(map(len, modules.values())),
        "floors of files": floors(modules)[0],
        "files in a circle": floors(modules)[1],
        f"lines over {WIDTH} columns": sum(width > WIDTH for width in widths),
        "fmt: skip": sum(text.count("# fmt: skip") for text in texts),
        "lines": len(widths),
        "median function, lines": lengths[len(lengths) // 2],
        "functions over 60 lines": sum(length > 60 for length in lengths),
        "longest function": "{} ({})".format(*max(functions)),
        "lines of README.md": len((root / "README.md").read_text().splitlines()),
        "docstrings that begin with Of": sum(text.count('"""Of ') for text in texts),
    }


if __name__ == "__main__":
    columns = [figures(Path(path)) for path in sys.argv[1:] or [HERE]]
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(str(column[name]) for column in columns) + " |")
