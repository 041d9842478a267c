"""What gets installed, under which names, and that nothing of ours hides somebody else's module."""

import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copy, copytree

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT_FOLDERS = [name for name in ("train", "bench", "kernels") if any((ROOT / name).glob("*.py"))]


def python(code: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(("package", "folder"), [("", "ldalign"), (".kernels", "kernels"), (".train", "train")])
def test_packages_import_from_anywhere(tmp_path: Path, package: str, folder: str) -> None:
    where = python(f"import ldalign{package} as package; print(package.__file__)", tmp_path)
    assert Path(where).parent == ROOT / folder


def test_wheel_puts_only_ldalign_at_the_top(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("ldalign", "kernels", "train", "csrc"):
        copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("ldalign-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ldalign"}
    for path in ("ldalign/errors.py", "ldalign/kernels/__init__.py", "ldalign/train/__init__.py"):
        assert path in names
    for folder, package in (("ldalign", "ldalign"), ("kernels", "ldalign/kernels"), ("train", "ldalign/train")):
        modules = {f"{package}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        assert modules <= set(names), f"missing from the wheel: {modules - set(names)}"


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS)
def test_no_script_hides_a_standard_module(folder: str) -> None:
    """A script launched by path has its folder first on the import path: train/profile.py would break cProfile."""
    names = {path.stem for path in (ROOT / folder).glob("*.py")}
    assert not names & set(sys.stdlib_module_names)
    python("import cProfile", ROOT / folder)  # -c puts the working directory first, as a script does


def test_tests_are_no_package() -> None:
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_requirements_are_pinned() -> None:
    files = sorted((ROOT / "requirements").glob("*.txt"))
    assert len(files) == 3
    for file in files:
        for line in file.read_text().splitlines():
            assert not line or line.startswith("#") or "==" in line, f"{file.name}: {line}"
