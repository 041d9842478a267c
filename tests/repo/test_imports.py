"""Who may import whom, read from the syntax trees: arrows point down, and names come from home."""

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"ldalign": "ldalign", "kernels": "ldalign.kernels", "train": "ldalign.train"}

# The rooms of the house, from the ground up: each may import from itself and from the lines below
# its own, and from nothing else.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("system",),
    ("kernels",),
    ("ops", "data"),
    ("objective",),
    ("models",),
    ("generation", "training"),
    ("evaluation",),
    ("run",),
    ("report",),
    ("train",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# These know nothing of models and data: beside themselves they import only what is named here.
SELF_CONTAINED = {
    "ldalign.ops": {"ldalign.kernels", "ldalign.system.errors", "ldalign.system.transfer"},
    "ldalign.system.distributed": {"ldalign.system"},
    "ldalign.training.optim": {"ldalign.ops", "ldalign.system.distributed"},
}
# It stands in ldalign/__init__.py.
READS_VERSION = {"ldalign.cli", "ldalign.system.distributed"}
FOREIGN = {
    "transformers",
    "trl",
    "accelerate",
    "lightning",
    "pytorch_lightning",
    "peft",
    "deepspeed",
    "datasets",
}
# What a module may import inside a function, for an extra; never at its top.
LAZY = {"ldalign.evaluation.transformers_folder": {"transformers"}}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """The product's modules by full name, as syntax trees; a package is its `__init__`."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            name = ".".join(part for part in parts if part != "__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None, int]]:
    """(module, name imported from it or None, line) of every import, wherever in the file.

    Imports under `if TYPE_CHECKING:` are left out: they never happen.
    """
    unreal = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in unreal:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: give the module's full name"
            yield from ((str(node.module), alias.name, node.lineno) for alias in node.names)


def targets(tree: ast.AST) -> set[str]:
    """The product's modules that a file imports, whole or names from them."""
    found = set()
    for module, name, _ in imports(tree):
        if module.split(".")[0] == "ldalign":
            whole = f"{module}.{name}"
            found.add(whole if whole in modules() or whole == "ldalign._C" else module)
    return found


def room(module: str) -> str:
    """The room that a module stands in: ldalign.data.rows -> data; "" for ldalign itself."""
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("module", modules())
def test_arrows_point_down(module: str) -> None:
    own, found = room(module), targets(modules()[module])
    if module in READS_VERSION:
        found = {target for target in found if target != "ldalign"}
    rooms = {room(target) for target in found} - {own, "_C"}
    if own:  # ldalign/__init__.py names the public things of any room
        assert own in FLOOR, f"{own}: give it a floor, above all it imports"
        upward = sorted(other for other in rooms if FLOOR.get(other, 99) >= FLOOR[own])
        assert not upward, f"{module} may not import {upward}: arrows point down"
    if module in SELF_CONTAINED:
        allowed = tuple(SELF_CONTAINED[module])
        assert all(target.startswith((*allowed, "ldalign._C")) for target in found)
    roots = {name.split(".")[0] for name, _, _ in imports(modules()[module])}
    assert not roots & {"tests", "bench", "train", "kernels"}, "import ldalign.kernels"


def test_every_room_has_one_floor() -> None:
    assert len(FLOOR) == sum(map(len, FLOORS))
    there = {room(module) for module in modules()} - {""}
    assert there == set(FLOOR), "every room is there, and each has its line in FLOORS"


def test_no_circles() -> None:
    arrows = {module: targets(tree) - {module} for module, tree in modules().items()}
    del arrows["ldalign"]  # imports each public name when it is first used
    for inner in arrows.values():
        inner.discard("ldalign")
    list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError, which names them


@pytest.mark.parametrize("module", modules())
def test_no_foreign_trainer_and_no_pickle(module: str) -> None:
    tree = modules()[module]
    roots = {name.split(".")[0] for name, _, _ in imports(tree)}
    assert not roots & FOREIGN - LAZY.get(module, set()), "a peer is never a runtime dependency"
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    above = {name.split(".")[0] for name, _, _ in imports(ast.Module(top, []))}
    assert not above & FOREIGN, "import an extra inside the function that needs it"
    assert not roots & PICKLES, "no pickle is ever read"
    names = {f"{name}.{inner}" for name, inner, _ in imports(tree)}
    loads = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "torch.load" not in names | loads, "torch.load reads pickles; use safetensors"


def defined(tree: ast.Module) -> set[str]:
    """The names that a module makes itself at its top level, also under `if` and `try`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def readers() -> list[Path]:
    """Every file that imports from the product: its own, the tests' and the benchmarks'."""
    return sorted(path for folder in (*FOLDERS, "tests", "bench") for path in files(folder))


def files(folder: str) -> list[Path]:
    return list((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", readers(), ids=lambda path: str(path.relative_to(ROOT)))
def test_names_come_from_their_home(path: Path) -> None:
    """No module passes on what it imported: who needs a name imports it from where it is made."""
    for module, name, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if module in modules() and module != "ldalign" and name is not None:
            known = name in defined(modules()[module]) or f"{module}.{name}" in modules()
            assert known, f"line {line}: {name} is not made in {module}: import it from its home"


@pytest.mark.parametrize("module", modules())
def test_no_private_names_across_modules(module: str) -> None:
    tree = modules()[module]
    whole = set()
    for source, name, line in imports(tree):
        if source.split(".")[0] != "ldalign" or name is None:
            continue
        assert not name.startswith("_") or name == "_C", f"line {line}: {name} is {source}'s own"
        if f"{source}.{name}" in modules():
            whole.add(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not (private and node.value.id in whole), f"line {node.lineno}: a private name"


def test_these_tests_can_fail() -> None:
    text = "from ldalign.models.mistral import Block\nimport transformers.models\n"
    text += "def f():\n    from ldalign.run import context\n"
    tree = ast.parse(text + "if TYPE_CHECKING:\n    import ldalign.data\n")
    assert [(module, name) for module, name, _ in imports(tree)] == [
        ("ldalign.models.mistral", "Block"),
        ("transformers.models", None),
        ("ldalign.run", "context"),
    ]
    assert "Block" not in defined(ast.parse("from ldalign.models.mistral import Block\n"))
    assert room("ldalign.run.stages.data") == "run" and room("ldalign") == ""
