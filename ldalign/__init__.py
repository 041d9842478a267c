"""LD-Align: align a language model with latent distances (arXiv 2404.06390), from data to an
evaluated policy.

The public names, each imported from its module when it is first used: `import
ldalign` alone loads nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldalign import ops
    from ldalign.data.tokenizer import load_tokenizer
    from ldalign.generation.generate import generate
    from ldalign.models.guide_folder import load_guide
    from ldalign.models.weights import load_model, save_model

__version__ = "0.1.0"  # the one place: pyproject.toml reads it here
__all__ = ["generate", "load_guide", "load_model", "load_tokenizer", "ops", "save_model"]
_HOMES = {
    "generate": "ldalign.generation.generate",
    "load_guide": "ldalign.models.guide_folder",
    "load_model": "ldalign.models.weights",
    "load_tokenizer": "ldalign.data.tokenizer",
    "save_model": "ldalign.models.weights",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("ldalign.ops")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ldalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
