"""Who may import whom, read from the syntax trees: arrows point one way, and the product stands on
its own.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"ldalign": "ldalign", "kernels": "ldalign.kernels", "train": "ldalign.train"}

# The modules of ldalign from the ground up: each may import from the lines before its own, never
# from its own line or a later one. `errors` before the rest, so that anyone may. A new module needs
# a place here.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("interrupt",),
    ("errors",),
    (
        "config",
        "files",
        "tasks",
        "memory",
        "seeds",
        "pages",
        "kernels",
        "benchmark_rows",
        "templates",
        "modelfiles",
    ),
    ("gguf_check",),
    ("ops", "distributed", "tokenizer", "settings"),
    ("metrics", "env", "optim", "sampling", "benchmark_tasks", "parts"),
    ("checkpoint", "data", "layout"),
    ("mistral", "gpt2"),
    ("weights", "decoders"),
    ("toy", "batches", "engine", "reward"),
    ("pretrained", "generate", "losers"),
    ("scoring", "training", "guide", "harness"),
    ("guide_training", "methods"),
    ("pipeline", "endpoint"),
    ("answers", "context"),
    ("summaries", "judges", "work", "evaluate"),
    ("stages", "benchmarks", "analysis", "cautions", "disk"),
    ("sources", "measures"),
    ("agreement", "report", "estimate"),
    ("figures", "report_parts"),
    ("report_page", "comparison"),
    ("command",),
    ("train",),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
# These know nothing of models and data: beside errors and themselves only what is named here.
SELF_CONTAINED = {
    "kernels": {"kernels"},
    "ops": {"kernels", "_C"},
    "distributed": {"memory"},
    "optim": {"kernels", "ops"},
}
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
LAZY = {"reward": {"transformers"}}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def sources() -> list[Path]:
    return sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """The name in LAYERS: "" for ldalign itself, "kernels" and "train" for anything in those
    folders.
    """
    folder = path.relative_to(ROOT).parts[0]
    if folder != "ldalign":
        return folder
    return "" if path.stem == "__init__" else path.stem


def imports(tree: ast.AST, package: str) -> set[str]:
    """Full names of all imported modules and of all names imported from modules, wherever in the
    file.

    Imports under `if TYPE_CHECKING:` are left out: they never happen.
    """
    names = set()
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
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                part for part in (package if node.level else "", node.module or "") if part
            )
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def parsed(path: Path) -> tuple[ast.Module, set[str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return tree, imports(tree, PACKAGES[path.relative_to(ROOT).parts[0]])


def inner_targets(names: set[str]) -> set[str]:
    """The ldalign modules among imported names: "ldalign.config.setting" -> "config"."""
    known = set(LAYER) | {path.stem for path in (ROOT / "ldalign").glob("*.py")}
    parts = [name.split(".") for name in names if name.split(".")[0] == "ldalign"]
    return {part[1] if len(part) > 1 and part[1] in known | {"_C"} else "" for part in parts}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    name = module_name(path)
    _, names = parsed(path)
    targets = inner_targets(names)
    if name:  # ldalign/__init__.py names the public things of any module
        assert name in LAYER, f"{path.name}: give it a place in LAYERS, above all it imports"
        own = {name} if name in ("kernels", "train") else set()
        upward = {
            target for target in targets - own - {"", "_C"} if LAYER.get(target, 99) >= LAYER[name]
        }
        assert not upward, f"{name} may not import {sorted(upward)}: arrows point one way"
    if name in SELF_CONTAINED:
        assert targets <= SELF_CONTAINED[name] | {"errors"}
    if name != "train":
        assert "train" not in targets, "nothing imports train"
    roots = {imported.split(".")[0] for imported in names}
    assert not roots & {"tests", "bench", "train", "kernels"}, (
        "import ldalign.kernels; nothing imports tests or bench"
    )


def test_each_module_has_one_place() -> None:
    assert len(LAYER) == sum(map(len, LAYERS))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_foreign_trainer_and_no_pickle(path: Path) -> None:
    tree, names = parsed(path)
    roots = {name.split(".")[0] for name in names}
    assert not roots & FOREIGN - LAZY.get(module_name(path), set()), (
        "a peer is a test dependency, never a runtime one"
    )
    top = imports(
        ast.Module(
            [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []
        ),
        "",
    )
    assert not {name.split(".")[0] for name in top} & FOREIGN, (
        "import an extra inside the function that needs it"
    )
    assert not roots & PICKLES, "no pickle is ever read"
    loads = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"
    ]
    assert not loads and "torch.load" not in names, "torch.load reads pickles; use safetensors"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_names_across_modules(path: Path) -> None:
    tree, names = parsed(path)
    private = {
        name
        for name in names
        if name.startswith("ldalign.") and name.split(".")[-1].startswith("_")
    }
    assert not private - {"ldalign._C"}, f"private to another module: {sorted(private)}"
    modules = {name.split(".")[-1] for name in names if name.startswith("ldalign.")}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
        ):
            is_private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not is_private, (
                f"line {node.lineno}: {ast.unparse(node)} is private to another module"
            )


def test_these_tests_can_fail() -> None:
    text = (
        "from .mistral import Block\nimport transformers.models\ndef f():\n    from ldalign import "
        "train\n"
    )
    tree = ast.parse(text + "if TYPE_CHECKING:\n    import ldalign.data\n")
    names = imports(tree, "ldalign")
    assert names == {"ldalign.mistral.Block", "transformers.models", "ldalign.train"}
    assert inner_targets(names) == {"mistral", "train"}
