"""What this machine has: the tick list that ends `make setup`, and the record each run keeps
(environment.json).

Nothing is ticked because a name was found: compilers compile, devices compute.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldalign import ops
from ldalign.kernels import cpp, flash
from ldalign.system import errors, exits
from ldalign.system.workers import available_cores

TORCH_SUPPORTED = ((2, 11), (2, 14))  # from, below
PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "jinja2",
    "pyyaml",
    "tqdm",
    "gguf",
    "triton",
    "pyarrow",
    "flash-attn",
    "flash-attn-3",
)


@dataclass(frozen=True)
class Tick:
    """One line of the tick list. A missing `required` item means ldalign cannot run here."""

    name: str
    found: bool
    detail: str
    required: bool = False

    def __str__(self) -> str:
        return f"[{'x' if self.found else ' '}] {self.name:<14} {self.detail}"


def tick_list() -> list[Tick]:
    """Every item of the tick list, in the order that they are printed."""
    return [
        _python(),
        _torch(),
        _compiler(),
        _cuda_compiler(),
        _extension(),
        _triton(),
        _flash_attention(),
        *_gpus(),
        *_backends(),
    ]


def _python() -> Tick:
    detail = f"{platform.python_version()} at {sys.executable}"
    return Tick("Python", sys.version_info >= (3, 11), detail, required=True)


def _torch() -> Tick:
    low, below = TORCH_SUPPORTED
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    fits = low <= version < below
    wanted = "" if fits else f"; ldalign supports {low[0]}.{low[1]} to {below[0]}.{below[1] - 1}"
    return Tick("torch", fits, f"{torch.__version__} ({built_for}){wanted}", required=True)


def _compiler() -> Tick:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        compiler = shutil.which(name) if name else None
        if compiler and _compiles([compiler, "-std=c++17"], "a.cpp", "int main() { return 0; }\n"):
            return Tick("C++ compiler", True, f"{_first_line([compiler, '--version'])}")
    return Tick(
        "C++ compiler", False, "none that compiles C++17 (only needed to build the extension)"
    )


def _cuda_compiler() -> Tick:
    home = os.environ.get("CUDA_HOME")
    compiler = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if not compiler:
        return Tick(
            "CUDA compiler", False, "no nvcc (only needed to build the extension for a GPU)"
        )
    release = next(
        (word for word in _output([compiler, "--version"]).split() if word.startswith("V1")), ""
    )
    if not _compiles([compiler, "-c"], "a.cu", "__global__ void f() {}\n"):
        return Tick(
            "CUDA compiler", False, f"{compiler} is there but does not compile an empty kernel"
        )
    return Tick("CUDA compiler", True, f"nvcc {release}")


def _extension() -> Tick:
    """The compiled operations of csrc/, and the instruction set they run with here."""
    if not cpp.available():
        return Tick("ldalign._C", False, cpp.why_not())
    info = cpp.build_info()
    threads = "threads" if info["threads"] else "one thread"
    return Tick(
        "ldalign._C",
        True,
        f"{info['isa']} (of {', '.join(info['isas'])}), {threads}, {info['compiler']}",
    )


def _flash_attention() -> Tick:
    found = flash.generations()
    if not found:
        return Tick("FlashAttention", False, f"{flash.why_not()} (optional, GPUs only)")
    names = [f"FlashAttention-{n} (heads up to {flash.WIDEST[n]} wide)" for n in found]
    passed_over = "" if 3 in found else f"; -3: {flash.why_not_3()}"
    detail = f"pair attention by {', else '.join(names)}, else Triton{passed_over}"
    detail += "; prompts of a generation by -3" if flash.reads_pages() else ""
    return Tick("FlashAttention", True, detail)


def _backends() -> list[Tick]:
    """What runs each operation, by device: one line a device, operations that
    share a backend together.
    """
    ticks = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        users = ops.backends(device).items()
        detail = "; ".join(f"{backend}: {', '.join(names)}" for backend, names in users)
        ticks.append(Tick(f"ops on {device}", True, detail))
    return ticks


def _triton() -> Tick:
    try:
        import triton
    except ImportError as error:
        return Tick("Triton", False, f"{error} (only needed for the GPU kernels)")
    where = "" if torch.cuda.is_available() else "; without a GPU only its interpreter runs"
    return Tick("Triton", True, f"{triton.__version__}{where}")


def _gpus() -> list[Tick]:
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        why = "torch sees no device" if built else "this torch is built without CUDA"
        cpu = f"{_cpu_name()}, {available_cores()} cores"
        return [Tick("GPU", False, f"{why}; runs go to the CPU, {cpu}")]
    ticks = []
    for index in range(torch.cuda.device_count()):
        name = f"GPU {index}"
        try:
            twos = torch.ones(8, 8, device=f"cuda:{index}") * 2
            works = float((twos @ twos).sum()) == 8 * 8 * 8 * 4
        except RuntimeError as error:
            ticks.append(Tick(name, False, f"does not compute: {str(error).splitlines()[0]}"))
            continue
        ticks.append(Tick(name, works, _gpu_name(index) if works else "computes wrongly"))
    return ticks


def describe_machine() -> dict[str, Any]:
    """The machine and the versions a run used, for environment.json: plain values only."""
    return {
        "ldalign": _version("ldalign"),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [_gpu_name(index) for index in range(torch.cuda.device_count())],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def git_commit() -> str | None:
    """The commit of the checkout this code runs from, "-dirty" added if files differ;
    None outside a checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed copy may lie inside someone else's repository
        return None
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"]).strip()
    dirty = _output(
        ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"]
    ).strip()
    return (commit + ("-dirty" if dirty else "")) or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _gpu_name(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _compiles(command: list[str], file: str, source: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file
        path.write_text(source)
        return _run([*command, str(path), "-o", str(path.with_suffix(".out"))]) is not None


def _first_line(command: list[str]) -> str:
    return next(iter(_output(command).splitlines()), "")


def _output(command: list[str]) -> str:
    return _run(command) or ""


def _run(command: list[str]) -> str | None:
    """The command's standard output, or None if it is missing, fails, or takes over a minute."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def main(argv: list[str]) -> None:
    """Prints the tick list. Raises EnvironmentProblem if something required is missing."""
    if {"-h", "--help"} & set(argv):
        print((__doc__ or "").strip())
        return
    if argv:
        raise errors.InputError(f"{argv[0]}: ldalign env takes no arguments")
    ticks = tick_list()
    print("\n".join(map(str, ticks)))
    missing = [tick.name for tick in ticks if tick.required and not tick.found]
    if missing:
        raise errors.EnvironmentProblem(
            f"{', '.join(missing)}: of a version ldalign does not support; see above"
        )


if __name__ == "__main__":
    exits.run(main)
