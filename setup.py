"""Where the packages lie, and how the extension `ldalign._C` is built. The rest is in
pyproject.toml.

`kernels/`, `train/` and `configs/` stand at the top of the repository but install as
`ldalign.kernels`, `ldalign.train` and `ldalign.configs` (presets, no code): a package named
`kernels` exists on PyPI, and nothing but `ldalign` may appear at the top level of a user's
environment. Develop with an editable install (`make setup` makes one); without
`kernels/__init__.py` it cannot find the package.

The extension is optional: without torch, a C++ compiler or Python's headers the install succeeds
without it and says so. Where it can be built, a build that fails is an error; of its CUDA part, a
line that says so. From the environment:
    LDALIGN_BUILD=0         build nothing
    LDALIGN_BUILD_CUDA=0|1  leave the CUDA part out, or insist on it; unset: built where this
                            torch and nvcc can, and left out where it then fails
    TORCH_CUDA_ARCH_LIST    the GPUs it is built for; unset: those of this machine, without one
                            all that this nvcc knows of ARCHITECTURES
    MAX_JOBS                how many files are compiled at once (with ninja)
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup

CXX_FLAGS = [
    "-O3",
    "-g0",
    # sqrt as one instruction; NaN and infinity keep their meaning, unlike with -ffast-math
    "-fno-math-errno",
    "-ffp-contract=fast",  # a * b + c as one instruction
    "-fvisibility=hidden",
]
CUDA_HEADERS = ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h")
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")  # compute capabilities: A100, H100, B200, RTX 50


def extension() -> dict[str, Any]:
    """setup()'s arguments for the extension; none where it is not wanted or cannot be built, and
    says why.
    """
    if {"egg_info", "dist_info", "sdist"} & set(sys.argv):
        return {}  # pip asks for metadata first: no need to load torch for it
    problem = _cannot_build()
    if problem:
        _say(f"the extension is not built: {problem}. ldalign runs on plain PyTorch without it")
        return {}
    from torch.utils import cpp_extension as builder

    problem = _cannot_build_cuda()
    if problem and os.environ.get("LDALIGN_BUILD_CUDA") == "1":
        raise SystemExit(
            f"ldalign: LDALIGN_BUILD_CUDA=1, but the CUDA part cannot be built: {problem}"
        )
    _say("building ldalign._C for the CPU" + (f" only: {problem}" if problem else " and for CUDA"))
    uses_openmp = "#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }"
    openmp = ["-fopenmp"] if _compiles(uses_openmp, "-fopenmp") else []
    if not openmp:
        _say("the compiler has no OpenMP: the kernels will use one thread")

    def module(make: Callable[..., Extension], *patterns: str) -> Extension:
        return make(
            "ldalign._C",
            sorted(path for pattern in patterns for path in glob(pattern)),
            extra_compile_args={"cxx": CXX_FLAGS + openmp, "nvcc": ["-O3"]},
            extra_link_args=openmp,
            depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True),
        )

    cpu = module(builder.CppExtension, "csrc/*.cpp")
    wanted = cpu
    if not problem:
        wanted = module(builder.CUDAExtension, "csrc/*.cpp", "csrc/cuda/*.cpp", "csrc/cuda/*.cu")

    class Build(builder.BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (Exception, SystemExit) as error:  # whatever a compiler's or a builder's way is
                if problem or os.environ.get("LDALIGN_BUILD_CUDA") == "1":
                    raise
                said = (str(error).splitlines() or [type(error).__name__])[0]
                _say(
                    f"the CUDA part is left out, its build failed: {said}. Building for the CPU "
                    "only; LDALIGN_BUILD_CUDA=1 makes it an error"
                )
                vars(wanted).update(vars(cpu))
                super().build_extensions()

    return {
        "ext_modules": [wanted],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=builder.is_ninja_available())},
    }


def _cannot_build() -> str | None:
    """Why nothing is built at all, or None."""
    if os.environ.get("LDALIGN_BUILD") == "0":
        return "LDALIGN_BUILD=0"
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return (
            f"torch cannot be imported while building ({error}); install it first and use "
            "--no-build-isolation"
        )
    compiler = _compiler()[0]
    if not shutil.which(compiler):
        return f"there is no C++ compiler ({compiler})"
    if not _compiles("int main() { return 0; }"):
        return f"the C++ compiler ({compiler}) does not compile an empty program"
    if not _compiles(
        "#include <Python.h>\nint main() { return 0; }", f"-I{sysconfig.get_path('include')}"
    ):
        return "Python's headers are missing (on Debian: apt install python3-dev)"
    return None


def _cannot_build_cuda() -> str | None:
    """Why the CUDA part is not built, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if os.environ.get("LDALIGN_BUILD_CUDA") == "0":
        return "LDALIGN_BUILD_CUDA=0"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    nvcc = shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin")) if CUDA_HOME else None
    if nvcc is None:
        return "there is no nvcc; set CUDA_HOME to where it is"
    release = re.search(
        r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc is of CUDA {release[1] if release else '?'}, torch of CUDA {torch.version.cuda}"
        )
    if not _compiles(
        "".join(f"#include <{name}>\n" for name in CUDA_HEADERS),
        "-c",
        compiler=[nvcc],
        suffix=".cu",
    ):
        return f"nvcc does not compile a file that includes {', '.join(CUDA_HEADERS)}"
    if not torch.cuda.is_available():  # else torch's builder asks the devices
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        fit = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known.split()]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(fit) + "+PTX")
    return None


def _compiler() -> list[str]:
    """The command torch's builder will use: CXX, or c++."""
    return shlex.split(os.environ.get("CXX") or "c++")


def _compiles(
    source: str, *flags: str, compiler: list[str] | None = None, suffix: str = ".cpp"
) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_text(source)
        command = [
            *(compiler or _compiler()),
            str(path),
            *flags,
            "-o",
            str(path.with_suffix(".out")),
        ]
        return subprocess.run(command, capture_output=True).returncode == 0


def _say(text: str) -> None:
    print(f"ldalign: {text}", flush=True)


setup(
    packages=[
        *find_packages(include=["ldalign", "ldalign.*"]),
        "ldalign.kernels",
        "ldalign.train",
        "ldalign.configs",
    ],
    package_dir={
        "ldalign": "ldalign",
        "ldalign.kernels": "kernels",
        "ldalign.train": "train",
        "ldalign.configs": "configs",
    },
    package_data={
        "ldalign.configs": ["*.yaml"],
        "ldalign": [
            "py.typed",
            "evaluation/benchmarks/tasks/*.yaml",
            "data/responses.txt",
            "data/wordings.txt",
            "report/page.html",
        ],
    },
    **extension(),
)
