"""A policy for other programs: one GGUF file, for llama.cpp and Ollama.

    python train/export.py gguf FOLDER [OUT.gguf] [dtype=bf16] [--force]

FOLDER is a model folder in the Mistral or Llama layout, or a run, of which the result is taken
(selected.json). OUT: FOLDER-DTYPE.gguf beside the folder, if it is not given. dtype, of the
matrices: f32, f16, bf16 (what ldalign writes, so nothing is lost), or q8_0, 8 bits and half the
size of bf16. --force replaces a GGUF file that is there. The file appears when it is whole.
"""

import re
from pathlib import Path

from ldalign.models.gguf_export import DTYPES, GgufDtype, export_gguf, refuse_existing
from ldalign.run.context import find_model
from ldalign.run.settings import RunConfig
from ldalign.system import exits
from ldalign.system.errors import InputError
from ldalign.system.metrics import say

FORMATS = ("gguf",)
KEY = re.compile(r"(\w+)=(.*)", re.DOTALL)


def main(argv: list[str]) -> None:
    """Reads what is to be exported, and exports it."""
    if {"-h", "--help"} & set(argv):
        print((__doc__ or "").strip())
        return
    places, dtype, force = _read_arguments(argv)
    if not places or places[0] not in FORMATS:
        given = f"{places[0]}: " if places else ""
        raise InputError(f"{given}what is to be written? give: gguf FOLDER [OUT.gguf]")
    if not 2 <= len(places) <= 3:
        raise InputError(
            f"gguf: give FOLDER [OUT.gguf], one or two names; there are {len(places) - 1}"
        )
    folder = find_model(RunConfig(), places[1])
    out = Path(places[2]).expanduser() if len(places) == 3 else _beside(places[1], folder, dtype)
    refuse_existing(out, force)
    done = export_gguf(folder, out, dtype, _title(folder), force)
    for note in done.notes:
        say(f"{folder}: {note}")
    say(f"{done.path}: {done.tensors} tensors as {dtype}, {done.size / 1e6:.1f} MB")


def _read_arguments(argv: list[str]) -> tuple[list[str], GgufDtype, bool]:
    """The names in order, the dtype, and whether a file may be replaced."""
    places: list[str] = []
    dtype: GgufDtype = "bf16"
    force = False
    for argument in argv:
        key = KEY.fullmatch(argument)
        if argument == "--force":
            force = True
        elif argument.startswith("-"):
            raise InputError(f"{argument}: unknown option; --force and --help are known")
        elif key is None or Path(argument).exists() or "/" in key[1]:
            places.append(argument)
        elif key[1] != "dtype":
            raise InputError(f"{argument}: {key[1]}: unknown key; dtype is known")
        else:
            found = next((one for one in DTYPES if one == key[2]), None)
            if found is None:
                raise InputError(f"{argument}: expected one of {', '.join(DTYPES)}")
            dtype = found
    return places, dtype, force


def _beside(name: str, folder: Path, dtype: GgufDtype) -> Path:
    """Where the file goes if nobody says it: beside the folder; of a model that was given by
    name, and lies in the cache, into the current folder.
    """
    place = _named(folder).parent if Path(name).expanduser().exists() else Path()
    return place / f"{_named(folder).name}-{dtype}.gguf"


def _named(folder: Path) -> Path:
    """The folder by a path that ends in a name of its own, which `..` is not."""
    return folder.resolve() if folder.name == ".." else folder.absolute()


def _title(folder: Path) -> str:
    """What programs call the model: RUN-iteration_1 for RUN/iteration_1/policy."""
    parts = _named(folder).parts[-3:]
    return "-".join(parts[:-1]) if parts[-1] == "policy" else parts[-1]


if __name__ == "__main__":
    exits.run(main)
