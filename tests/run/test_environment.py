"""The tick list must not claim what is not there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT

from ldalign.run import environment


def ticks() -> dict[str, environment.Tick]:
    return {tick.name: tick for tick in environment.tick_list()}


def test_what_is_here_is_ticked() -> None:
    found = ticks()
    assert found["Python"].found and found["torch"].found
    assert torch.__version__ in found["torch"].detail
    assert ("GPU 0" in found) == torch.cuda.is_available()


@pytest.mark.parametrize("body", [None, "exit 1", "echo release 13.0 V13.0; exit 0"])
def test_compilers_are_tried_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str | None
) -> None:
    """None on the path; one that fails; and, the control, one that works as far
    as its exit status tells.
    """
    for name in ("c++", "nvcc") if body else ():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    works = body is not None and "exit 0" in body
    assert ticks()["C++ compiler"].found == works
    assert ticks()["CUDA compiler"].found == works


def test_unsupported_torch_is_not_ticked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # trying compilers takes time
    for version, fits in [
        ("2.10.1", False),
        ("2.11.0+cu128", True),
        ("2.13.0+cpu", True),
        ("2.14.0", False),
    ]:
        monkeypatch.setattr(torch, "__version__", version)
        assert ticks()["torch"].found == fits, version


def test_machine_is_plain_data() -> None:
    machine = environment.describe_machine()
    assert json.loads(json.dumps(machine)) == machine
    assert machine["packages"]["torch"] == torch.__version__
    assert machine["cpu"] and machine["cores"] >= 1


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")
def test_the_commit_is_that_of_the_checkout() -> None:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert str(environment.git_commit()).removesuffix("-dirty") == head


def test_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ldalign.run.environment"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("[x] Python") and "[x] torch" in result.stdout
    assert (
        subprocess.run(
            [sys.executable, "-m", "ldalign.run.environment", "x"], capture_output=True
        ).returncode
        == 2
    )
