"""What gets installed, under which names, and that nothing of ours hides somebody else's module."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

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
    for name in ("ldalign", "kernels", "train", "csrc"):
        copytree(ROOT / name, source / name, ignore=ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
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


def test_sources_that_do_not_compile_are_an_error(tmp_path: Path) -> None:
    """The extension is optional, but not to fail in silence where there is a compiler."""
    if not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    source = copy_sources(tmp_path)
    (source / "csrc" / "a_first.cpp").write_text("#error on purpose\n")
    run = build_wheel(source, CXX="c++", MAX_JOBS="1", LDALIGN_BUILD="1", LDALIGN_BUILD_CUDA="0")
    assert run.returncode != 0 and "on purpose" in run.stdout + run.stderr


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
    assert len(files) == 9
    for file in files:
        for line in file.read_text().splitlines():
            assert not line or line.startswith(("#", "-r ")) or "==" in line, f"{file.name}: {line}"
