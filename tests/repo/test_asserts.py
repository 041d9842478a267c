"""No `assert` guards what comes from outside: `python -O` leaves them all out.

What a file, a setting or another process says is checked by an error. An `assert` in the product is
for what its own code has made sure of, mostly for the type checker to know; each is listed here, by
function, with what makes it true.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "kernels/compile_check.py::_Launch.__init__": "the kernel's own parameters, gone through above",
    "kernels/eager.py::pair_loss": "made above where the options ask for it",
    "ldalign/data/encoding.py::_fit": "the loop above returns for each BadRow",
    "ldalign/data/mentions.py::_spellings": "two tables of this file",
    "ldalign/data/tokenizer.py::Tokenizer._make_literal": "the token was added the line before",
    "ldalign/evaluation/benchmarks/harness.py::HarnessModel._generate": "opened by its only caller",
    "ldalign/evaluation/benchmarks/runner.py::run_benchmark": "None only for other ranks, of which "
    "the harness knows none",
    "ldalign/generation/decoders.py::PackedDecoder._take": "an attribute of a module of ours",
    "ldalign/generation/decoders.py::Paged.attend": "set for the kinds of layers that read it",
    "ldalign/generation/engine.py::Engine.__init__": "an argument of our callers'",
    "ldalign/generation/engine.py::Engine._request": "asked only for rows that are in use",
    "ldalign/generation/engine.py::Engine._says_stop": "__init__ asks for it with stop strings",
    "ldalign/generation/paged_cache.py::PagePool.take": "the engine has looked at `free`",
    "ldalign/models/guide_folder.py::redrawn": "new_guide makes no other encoder",
    "ldalign/report/chart.py::inline_svg": "matplotlib has drawn it the line before",
    "ldalign/run/dry_run.py::dry_run": "open_policy has refused other models",
    "ldalign/run/dry_run.py::rough_seconds": "open_policy has refused other models",
    "ldalign/run/methods.py::_against_own": "with_losers has put them in",
    "ldalign/run/stages/policy.py::_accuracy.measure": "open_policy has refused other models",
    "ldalign/training/batches.py::token_logprobs": "a head was given, so no hidden states come",
    "ldalign/training/checkpoint.py::Checkpoints._finish": "set before a checkpoint is begun",
    "ldalign/training/policy.py::batch_loss": "a head was given, so no hidden states come",
    "train/tour.py::main": "open_policy has refused other models",
    "train/tour.py::pull": "backward was called above",
    "train/tour.py::update": "backward was called above",
}


def asserts_in(tree: ast.AST, name: str = "") -> Iterator[str]:
    """The function or class of every assert, by its full name."""
    for inner in ast.iter_child_nodes(tree):
        own = name
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own = f"{name}.{inner.name}" if name else inner.name
        if isinstance(inner, ast.Assert):
            yield own
        yield from asserts_in(inner, own)


def test_every_assert_is_known() -> None:
    found = Counter(
        f"{path.relative_to(ROOT)}::{name}"
        for folder in ("kernels", "ldalign", "train")
        for path in (ROOT / folder).rglob("*.py")
        for name in asserts_in(ast.parse(path.read_text(encoding="utf-8")))
    )
    assert found == Counter(ALLOWED.keys())


def test_an_assert_is_found_wherever_it_is() -> None:
    text = "assert 1\nclass A:\n  def f(self):\n    if x:\n      async def g():\n        assert 2"
    assert list(asserts_in(ast.parse(text))) == ["", "A.f.g"]
