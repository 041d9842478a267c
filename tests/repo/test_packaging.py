"""What gets installed, under which names, and that nothing of ours hides somebody else's module."""

import email
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
import torch
import yaml
from runs import one_thread

import ldalign
from ldalign.kernels import cpp

ROOT = Path(__file__).resolve().parents[2]
SCRIPT_FOLDERS = [
    name for name in ("train", "bench", "bench/peers", "kernels") if any((ROOT / name).glob("*.py"))
]


def python(code: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("package", "folder"), [("", "ldalign"), (".kernels", "kernels"), (".train", "train")]
)
def test_packages_import_from_anywhere(tmp_path: Path, package: str, folder: str) -> None:
    where = python(f"import ldalign{package} as package; print(package.__file__)", tmp_path)
    assert Path(where).parent == ROOT / folder


def test_extension_lies_in_the_package() -> None:
    if not cpp.available():
        pytest.skip(cpp.why_not())
    extension = importlib.import_module("ldalign._C")
    assert extension.__file__ and Path(extension.__file__).parent == ROOT / "ldalign"


def copy_sources(folder: Path) -> Path:
    source = folder / "source"
    source.mkdir()
    for name in ("ldalign", "kernels", "train", "configs", "csrc"):
        copytree(ROOT / name, source / name, ignore=ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        copy(ROOT / name, source / name)
    return source


def build_wheel(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Puts a wheel beside the folder of sources."""
    folder = source.parent
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    return subprocess.run(
        build, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_wheel_without_a_compiler_puts_only_ldalign_at_the_top(tmp_path: Path) -> None:
    run = build_wheel(copy_sources(tmp_path), CXX="no-such-compiler", LDALIGN_BUILD="1")
    assert run.returncode == 0, run.stderr
    assert (
        "the extension is not built: there is no C++ compiler (no-such-compiler)"
    ) in run.stdout + run.stderr
    (wheel,) = tmp_path.glob("ldalign-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ldalign"}
    for path in (
        "ldalign/system/errors.py",
        "ldalign/kernels/__init__.py",
        "ldalign/train/__init__.py",
    ):
        assert path in names
    for folder, package in (
        ("ldalign", "ldalign"),
        ("kernels", "ldalign/kernels"),
        ("train", "ldalign/train"),
    ):
        paths = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py"))
        modules = {f"{package}/{path}" for path in paths}
        assert modules <= set(names), f"missing from the wheel: {modules - set(names)}"
    suffixes = (".yaml", ".html", ".txt")
    data = {str(p.relative_to(ROOT)) for p in (ROOT / "ldalign").rglob("*") if p.suffix in suffixes}
    assert len(data) > 10 and data <= set(names), f"missing from the wheel: {data - set(names)}"


# ------------------------------------------------------------------------------------- what is sent


def build(hook: str, source: Path, target: Path) -> Path:
    """Calls a hook of the build backend, build_sdist or build_wheel; returns what it made."""
    code = f"import sys, setuptools.build_meta as b; print(b.{hook}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        cwd=source,
        env={**os.environ, "LDALIGN_BUILD": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of the files that git knows, and the wheel that is built from it alone."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    folder = tmp_path_factory.mktemp("sent")
    known = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, known.stdout.split("\0")):
        if (ROOT / name).is_file():  # not one that is being removed
            (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, folder / "clone" / name)
    sdist = build("build_sdist", folder / "clone", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return sdist, build("build_wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)


def test_the_sdist_has_all_that_git_has(sent: tuple[Path, Path]) -> None:
    """So whoever has it can build, test, lint and read."""
    with tarfile.open(sent[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    known = {str(path.relative_to(sent[0].parent / "clone")) for path in clone_files(sent[0])}
    assert len(known) > 300 and known <= names, f"missing from the sdist: {known - names}"


def clone_files(sdist: Path) -> list[Path]:
    folder = sdist.parent / "clone"
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if "ldalign.egg-info" not in path.parts]


def test_the_wheel_has_the_command_the_presets_and_no_tests(sent: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(sent[1]) as wheel:
        names = set(wheel.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        entries = wheel.read(entry_points).decode()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        described = email.message_from_bytes(wheel.read(metadata))
    presets = {f"ldalign/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert len(presets) > 10 and presets <= names and "ldalign/py.typed" in names
    assert "[console_scripts]\nldalign = ldalign.cli:main\n" in entries
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ldalign"}
    assert not [name for name in names if "test" in name]
    assert described["Version"] == ldalign.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert described["Author"] == citation["authors"][0]["name"]
    assert described["Description-Content-Type"] == "text/markdown"
    assert str(described.get_payload()).lstrip().startswith("# ldalign")


def test_an_index_takes_them(sent: tuple[Path, Path]) -> None:
    """`twine check` reads the metadata as PyPI does; check-wheel-contents looks for strays."""
    twine = ["twine", "check", "--strict", *map(str, sent)]
    for command in (twine, ["check_wheel_contents", str(sent[1])]):
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, cwd=sent[0].parent
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_alone_is_enough(sent: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment of its own with torch, from an empty folder: a preset is copied, a dry run
    checks it, and nothing comes from the checkout.
    """
    environment, work = tmp_path / "environment", tmp_path / "work"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (packages,) = (environment / "lib").glob("python*/site-packages")
    # This environment's packages without its .pth files, so without this checkout.
    (packages / "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python")]
    subprocess.run(
        [*pip, "install", "-q", "--no-deps", "--no-index", str(sent[1])], check=True, cwd=work
    )

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(environment / "bin/ldalign"), *arguments],
            cwd=work,
            env={**one_thread(), "PYTHONPATH": "", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    assert command("presets", "copy", "toy", "my.yaml").returncode == 0
    done = command("align", "--config", "my.yaml", "cache=cache", "--dry-run")
    assert done.returncode == 0 and "dry run: nothing was made" in done.stderr, done.stderr
    assert sorted(path.name for path in work.iterdir()) == ["cache", "my.yaml"]
    where = command("align", "--config", "my.yaml", "policy=nowhere", "--debug").stderr
    assert f"{packages}/ldalign/train/align.py" in where and str(ROOT) not in where


def test_sources_that_do_not_compile_are_an_error(tmp_path: Path) -> None:
    """The extension is optional, but not to fail in silence where there is a compiler."""
    if not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    source = copy_sources(tmp_path)
    (source / "csrc" / "a_first.cpp").write_text("#error on purpose\n")
    run = build_wheel(source, CXX="c++", MAX_JOBS="1", LDALIGN_BUILD="1", LDALIGN_BUILD_CUDA="0")
    assert run.returncode != 0 and "on purpose" in run.stdout + run.stderr


@pytest.mark.parametrize("insisted", [False, True])
def test_a_cuda_part_that_does_not_compile_is_left_out(tmp_path: Path, insisted: bool) -> None:
    """A torch that says it is for CUDA and an nvcc that compiles its own headers alone: the install
    ends with the CPU's extension and a line that says so; with LDALIGN_BUILD_CUDA=1 it fails.
    """
    if not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    source = tmp_path / "source"
    (source / "csrc" / "cuda").mkdir(parents=True)
    (source / "csrc" / "cuda" / "kernels.cu").touch()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        copy(ROOT / name, source / name)
    for name in ("ldalign", "kernels", "train", "configs"):
        (source / name).mkdir()
    (source / "ldalign" / "__init__.py").write_text('__version__ = "0"\n')
    module = "#include <Python.h>\nPyMODINIT_FUNC PyInit__C() { return nullptr; }\n"
    (source / "csrc" / "module.cpp").write_text(module)
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  --version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;\n"
        "  --list-gpu-arch) echo compute_80; echo compute_90 ;;\n"
        "  *csrc*) echo 'error: on purpose' >&2; exit 1 ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    code = (
        "import runpy, sys, torch, torch.utils.cpp_extension as builder; "
        f"torch.version.cuda = '13.0'; builder.CUDA_HOME = {str(nvcc.parents[1])!r}; "
        "sys.argv = ['setup.py', 'build_ext', '--inplace']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LDALIGN_BUILD")}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**environment, "MAX_JOBS": "1", **({"LDALIGN_BUILD_CUDA": "1"} if insisted else {})},
        capture_output=True,
        text=True,
    )
    said = run.stdout + run.stderr
    assert "building ldalign._C for the CPU and for CUDA" in said and "on purpose" in said, said
    assert (run.returncode == 0) != insisted, said
    assert ("the CUDA part is left out, its build failed" in said) != insisted
    assert bool(list((source / "ldalign").glob("_C*.so"))) != insisted


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS)
def test_no_script_hides_a_standard_module(folder: str) -> None:
    """A script launched by path has its folder first on the import path: train/profile.py would
    break cProfile.
    """
    names = {path.stem for path in (ROOT / folder).glob("*.py")}
    assert not names & set(sys.stdlib_module_names)
    # -c puts the working directory first, as a script does
    python("import cProfile", ROOT / folder)


def test_tests_are_no_package() -> None:
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_requirements_are_pinned() -> None:
    files = sorted((ROOT / "requirements").glob("*.txt"))
    assert len(files) == 15
    for file in files:
        for line in file.read_text().splitlines():
            assert not line or line.startswith(("#", "-r ")) or "==" in line, f"{file.name}: {line}"
