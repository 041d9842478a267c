"""What a list of the file layer (failing_files.c) says about a loss of power at any moment."""

import re
from collections.abc import Sequence
from pathlib import Path

TEMPORARY = re.compile(r"\.partial(/|$)|(^|/)\.tmp[^/]*$")  # names that nobody takes for a result

# What safetensors fills; it is given its name by a call of which the file layer knows nothing.
OWN = re.compile(r"/\.tmp[^/]*$")


def events(path: Path) -> list[tuple[str, str, str]]:
    """(what, path, new path) of each line: open (for writing), made (a folder), write, sync,
    rename, gone.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(what, name, to) for what, name, to in (line.split("\t") for line in lines)]


def faults(seen: Sequence[tuple[str, str, str]]) -> list[str]:
    """Where a result could be lost or half there, a sentence each; [] where there is none.

    A result is a name that does not end in `.partial`, given by a rename: a stage, a checkpoint in
    one that is being made, a file. What it names has been synced before, content first, then the
    folders that hold the names; and its own folder is synced before another result gets its name.
    """
    found: list[str] = []
    dirty: set[str] = set()  # files whose content is not on disk
    names: dict[str, set[str]] = {}  # by folder, what was made there and is not on disk by name
    known: set[str] = set()
    given: dict[str, str] = {}  # folders to be synced, and the result that was given its name there

    def below(path: str, folder: str) -> bool:
        return path == folder or path.startswith(f"{folder}/")

    for what, path, to in seen:
        parent = path.rpartition("/")[0]
        if what in ("open", "made") and path not in known:
            known.add(path)
            names.setdefault(parent, set()).add(path)
        if what in ("open", "write"):
            dirty.add(path)
        own = [p for p in sorted(dirty) if OWN.search(p) and p.startswith(f"{parent}/.tmp")]
        if what == "sync":
            if path not in known and own:
                known.add(path)
                dirty.discard(own[0])
            dirty.discard(path)
            names.pop(path, None)
            given.pop(path, None)
        if what == "gone":
            dirty, known = ({p for p in s if not below(p, path)} for s in (dirty, known))
            names = {f: s - {path} for f, s in names.items() if not below(f, path)}
        if what == "rename":
            if not TEMPORARY.search(to.rpartition("/")[2]):
                lost = sorted(p for p in dirty if below(p, path))
                lost += own[:1] if path not in known else []
                unnamed = sorted(p for f, s in names.items() if below(f, path) for p in s)
                found += [f"{p}: renamed to {to}, and not synced before" for p in lost]
                found += [f"{p}: its folder is not synced before {to} is named" for p in unnamed]
                found += [f"{folder}: not synced after {r}" for folder, r in given.items()]
                given[to.rpartition("/")[0]] = to

            def moved(p: str, path: str = path, to: str = to) -> str:
                return to + p[len(path) :] if below(p, path) else p

            dirty, known = ({moved(p) for p in s} for s in (dirty, known))
            names = {moved(f): {moved(p) for p in s} for f, s in names.items()}
            known.add(to)
            names.setdefault(to.rpartition("/")[0], set()).add(to)
    return found + [f"{folder}: not synced after {result}" for folder, result in given.items()]


def in_place(seen: Sequence[tuple[str, str, str]]) -> set[str]:
    """The files that were written under the very name by which they are read."""
    return {path for what, path, _ in seen if what == "open" and not TEMPORARY.search(path)}
