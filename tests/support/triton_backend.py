"""The Triton backend for its tests: compiled on a CUDA device, else interpreted; import first."""

import importlib.util
import os
import sys
from types import ModuleType

import pytest
import torch

NATIVE = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"


def load_backend() -> ModuleType:
    """Returns a copy of ldalign.kernels.triton_ops for these tests, interpreted without a GPU."""
    if not NATIVE and os.environ.get("TRITON_INTERPRET") != "1":
        assert "triton" not in sys.modules, (
            "a test file imports triton before this one: set TRITON_INTERPRET=1"
        )
    spec = importlib.util.find_spec("ldalign.kernels.triton_ops")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        if not NATIVE:
            # read where kernels are defined, Triton's own too: at this import
            patch.setenv("TRITON_INTERPRET", "1")
        pytest.importorskip("triton", reason="the package triton is not installed")
        spec.loader.exec_module(module)
    return module


gpu = load_backend()


@pytest.fixture(autouse=True)
def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable again: at its first launch the interpreter imports more of Triton."""
    if not NATIVE:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not NATIVE:
        pytest.skip("needs a CUDA device")
    if request.param == "interpreter" and NATIVE:
        pytest.skip("Triton compiles in this process; TRITON_INTERPRET=1 runs the interpreter")
    return "cuda" if NATIVE else "cpu"
