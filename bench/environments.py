"""The peers' Python environments: one each, from requirements/bench-NAME.txt, beside our own.

A peer never shares packages with ldalign: its pins are its own. Only torch is the same, to the
version, and is installed first. The pins are all that a peer needs, and nothing else is installed:
nothing can bring another build of torch, with gigabytes of CUDA packages, or one of torchvision
that does not load beside it.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 3600  # of one installation: llama.cpp is compiled, half an hour on two cores
_missing: dict[str, str] = {}  # why, by name: nobody waits for the same failure twice


class PeerMissing(Exception):
    """A peer's environment is not there and cannot be made; the text says why."""


def peer_python(name: str, root: Path = ROOT) -> Path:
    """Returns the interpreter of peer `name`'s environment, ROOT/.venv-NAME.

    It is made, or made again where its pins have changed. LDALIGN_PEER_NAME in the
    environment, a Python that has the packages already, is used instead: for machines without
    a network. Raises PeerMissing.
    """
    variable = f"LDALIGN_PEER_{name.upper()}"
    if variable in os.environ:
        offered = Path(os.environ[variable])
        if not offered.is_file():
            raise PeerMissing(f"{variable}={offered}: no such file")
        return offered
    if name in _missing:
        raise PeerMissing(_missing[name])
    wanted = pins(name, root) + f"torch {importlib.metadata.version('torch')}\n"
    folder = root / f".venv-{name}"
    stamp, python = folder / "made-from.txt", folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"bench: making {folder} ...", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        venv.create(folder, with_pip=True, symlinks=True)
        install(python, requirements(name, root))
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        _missing[name] = f"its environment could not be made: {_last_line(error)}"
        raise PeerMissing(_missing[name]) from None
    stamp.write_text(wanted, encoding="utf-8")
    return python


def pins(name: str, root: Path = ROOT) -> str:
    """The text of the peer's requirements, with that of the files they build on."""
    file = requirements(name, root)
    text = file.read_text(encoding="utf-8")
    bases = [line.removeprefix("-r ") for line in text.splitlines() if line.startswith("-r ")]
    return text + "".join((file.parent / base).read_text(encoding="utf-8") for base in bases)


def requirements(name: str, root: Path = ROOT) -> Path:
    """Returns the file of the peer's pins: with CUDA bench-NAME-cuda.txt, where there is one."""
    own = root / "requirements" / f"bench-{name}-cuda.txt"
    return (
        own if torch.version.cuda and own.is_file() else root / "requirements" / f"bench-{name}.txt"
    )


def install(python: Path, wanted: Path) -> None:
    """Installs torch, exactly ours, then the pins and nothing that they ask for besides.

    Raises subprocess.SubprocessError.
    """
    pip = [str(python), "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check"]
    version = importlib.metadata.version("torch")
    # gigabytes that are here already: a .pth shows them, after the peer's own packages
    if torch.version.cuda:
        site = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        (Path(site) / "torch_of_ldalign.pth").write_text(
            str(Path(torch.__file__).parent.parent) + "\n"
        )
    else:
        _run([*pip, f"torch=={version.partition('+')[0]}"])
    _run([*pip, "--no-deps", "-r", str(wanted)])


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_S)


def _last_line(error: Exception) -> str:
    said = getattr(error, "stderr", None) or str(error)
    lines = [line for line in str(said).splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line]
    return (errors or lines or [type(error).__name__])[-1].strip()[:200]
