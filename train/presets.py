"""The presets, the config files that come with ldalign.

    ldalign presets                     lists them
    ldalign presets copy NAME my.yaml   makes one's own of one; an existing file stays

`--config NAME` takes a preset as it is, where there is no file NAME. A preset whose `base:` names
another one finds it from wherever it is copied to; a file of that name beside the copy comes first.
"""

from collections.abc import Sequence
from pathlib import Path

from ldalign.system import exits
from ldalign.system.errors import EnvironmentProblem, InputError, nearest
from ldalign.system.presets import presets, summary


def main(argv: list[str]) -> None:
    """Lists the presets, or copies one."""
    if {"-h", "--help"} & set(argv):
        print((__doc__ or "").strip())
    elif not argv or argv == ["list"]:
        known = presets()
        width = max(map(len, known))
        print("\n".join(f"{name:{width}}  {summary(path)}" for name, path in known.items()))
    elif argv[0] == "copy":
        copy(argv[1:])
    else:
        name = argv[0] if argv[0] in presets() else "NAME"
        raise InputError(f"presets {argv[0]}: unknown; write `ldalign presets copy {name} my.yaml`")


def copy(argv: Sequence[str]) -> None:
    """Writes the preset argv[0] to the new file argv[1]."""
    if len(argv) != 2:
        raise InputError("presets copy: needs a preset and a new file's name: copy toy my.yaml")
    name, target = argv[0].removesuffix(".yaml"), Path(argv[1]).expanduser()
    known = presets()
    if name not in known:
        hint = nearest(name, known) or "; `ldalign presets` lists them"
        raise InputError(f"presets copy: {argv[0]}: no such preset{hint}")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(known[name].read_text(encoding="utf-8"))
    except FileExistsError:
        raise InputError(f"presets copy: {target}: is there already; give another name") from None
    except OSError as error:
        raise EnvironmentProblem(f"presets copy: {target}: {error.strerror}") from None
    command = "compare" if name.startswith("compare-") else "align"
    print(f"{target}: a copy of {name}; now: ldalign {command} --config {target} --dry-run")


if __name__ == "__main__":
    exits.run(main)
