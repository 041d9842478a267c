"""The presets: config files that come with ldalign, found by name wherever it is installed.

In a wheel they lie in the package (`ldalign/configs/`), in a checkout beside it (`configs/`), as
setup.py maps the one to the other. A name stands for a preset only where there is no file of that
name.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def presets() -> dict[str, Path]:
    """The files of all presets, by name, in the order of their names."""
    folder = _PACKAGE / "configs"
    if not folder.is_dir():
        folder = _PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def find_config(path: Path, folder: Path | None = None) -> Path:
    """The config file that `path` means: itself, relative to `folder`, where that is a file; else
    the preset of that name, with or without `.yaml`; else itself, which is not there.

    folder: None: the working directory.
    """
    file = path if folder is None else folder / path
    if not file.is_file() and path.name == str(path):
        return presets().get(path.name.removesuffix(".yaml"), file)
    return file


def summary(preset: Path) -> str:
    """What a preset is for: its file's first line, without the comment's sign."""
    with preset.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
