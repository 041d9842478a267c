"""Which files `data=` stands for: files, folders, globs, names on the hub, and lists of these.

Of a folder that holds a data set, the training split is read: what its card says, else what the
names of its files show. Nothing that looks like data is passed over without a word: `find_files`
says what it leaves, and `described` puts that into lines.
"""

import contextlib
import difflib
import errno
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldalign.data.file_splits import (
    CARD,
    COLUMNS,
    COMPRESSED,
    KINDS,
    MOST_CARD_BYTES,
    TEST,
    TRAIN,
    UNREAD,
    VALIDATION,
    by_names,
    card_configs,
    files_by_card,
    looks_like_data,
    missing_shards,
    named_splits,
    read_card,
    shortly,
    split_ending,
    twice,
)
from ldalign.data.hub import HUB_DATA, hub_files
from ldalign.system.errors import InputError, cannot_be_read
from ldalign.system.untrusted import read_json

Key = Literal["data", "heldout"]

# What `data` calls ldalign's own rows, which no file holds.
EMBEDDED = ("embedded", "embedded-wordings")
# What lies in data folders beside the data.
METADATA_FILES = (
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "ldalign_source.json",
    "croissant.json",
)
# What a folder's split is where none is named: by key, the first of these that is there.
WANTED: dict[Key, tuple[str, ...]] = {"data": (TRAIN,), "heldout": (TEST, VALIDATION)}
DEEPEST = 3  # folders below a given one that are looked into
NAMED = 4  # files that are named one by one


@dataclass(frozen=True)
class SourceFiles:
    """The files that a source stands for, in the order in which they are read.

    notes: what is not read of it and why, a sentence each.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def files_of(spec: Any, cache: Path | None = None, key: Key = "data") -> list[Path]:
    """Returns the files that `spec` stands for, in the order in which they are read.

    cache: where data from the hub are kept; None: hub names are refused. A name whose files are
    there already is not looked up again. key: of the settings, the one that says `spec`: for
    `heldout`, the test split of a folder is taken. Raises InputError where there is nothing to
    read, or something cannot be read, and as `hub_files` does.
    """
    return [path for found in find_files(spec, cache, key) for path in found.files]


def find_files(spec: Any, cache: Path | None = None, key: Key = "data") -> list[SourceFiles]:
    """Returns what each source of `spec` stands for, with arguments and errors of `files_of`."""
    found = []
    for source in _sources(spec, key):
        with _refusals(f"{key}={source}"):
            one = _find(source, cache, key)
            for path in one.files:
                _check(path, key)
        found.append(one)
    return found


def check_local(spec: Any, key: Key = "data") -> None:
    """Raises InputError as `files_of`; a name on the hub is not looked up."""
    for source in _sources(spec, key):
        if not _named_on_hub(source):
            find_files(source, None, key)


def described(found: Sequence[SourceFiles], key: Key = "data") -> list[str]:
    """Says in a line how many files are read, and which where they are few; in others what is not
    read of their folders.
    """
    files = [path for one in found for path in one.files]
    names = ", ".join(map(str, files))
    if len(files) > NAMED:
        names = f"{files[0]} to {files[-1]}"
    first = f"{key}: {len(files)} file{'s' * (len(files) > 1)}: {names}"
    return [first, *(f"{key}: {note}" for one in found for note in one.notes)]


def is_data_file(path: Path) -> bool:
    """Says whether a file has a name of data: a known ending, and no file that describes data."""
    _, ending = split_ending(path.name)
    packed_columns = ending.endswith(COMPRESSED) and ending.startswith(COLUMNS)
    hidden = path.name.startswith((".", "_"))
    return bool(ending) and not packed_columns and not hidden and path.name not in METADATA_FILES


def _sources(spec: Any, key: Key) -> list[str]:
    """`spec` as a list of paths, folders, globs and names."""
    entries = list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    if not entries:
        raise InputError(f"{key}: the list of files is empty")
    for path in entries:
        if not isinstance(path, str | Path) or not str(path).strip():
            raise InputError(
                f"{key}: {path!r} is not a path; expected a file, a folder, a glob, a name on the "
                "hub, or a list of these"
            )
        if str(path) in EMBEDDED and not Path(path).exists():
            raise InputError(
                f"{key}: {path} stands alone, as data={path}, with a held-out split of its "
                "own; python -m ldalign.data.embedded FOLDER writes its rows as files"
            )
    return list(map(str, entries))


@contextlib.contextmanager
def _refusals(begin: str) -> Iterator[None]:
    """Turns what the file system refuses into an InputError that names the source and the file."""
    try:
        yield
    except OSError as error:
        where = error.filename or ""
        named = "" if not where or begin.endswith(f"={where}") else f": {where}"
        raise cannot_be_read(f"{begin}{named}", error) from None


def _find(source: str, cache: Path | None, key: Key) -> SourceFiles:
    """What one source stands for, its files sorted by name."""
    path = Path(os.path.expanduser(source))  # Path's own raises for ~somebody
    begin = f"{key}={source}"
    if os.path.lexists(path) and not path.is_dir():
        return SourceFiles((path,))
    path.exists()  # says where a folder above cannot be looked into, or the name is too long
    if path.is_dir():
        return _in_folder(path, key)
    if glob.has_magic(source):
        return _in_glob(path, key)
    if cache is not None and _named_on_hub(source):
        _refuse_train(source, key)
        return SourceFiles(tuple(hub_files(source, cache, is_data_file)))
    hint = "; give a file or folder of rows"
    if "," in source:
        hint = f"; several are a list: {key}=[{source}]"
    elif path.parent.is_dir():
        others = {other.stem: other.name for other in path.parent.iterdir() if is_data_file(other)}
        close = difflib.get_close_matches(path.stem, others, n=1)
        hint = f"; did you mean {key}={path.with_name(others[close[0]])}?" if close else hint
    raise InputError(f"{begin}: no such file or folder{hint}")


def _named_on_hub(source: str) -> bool:
    """Whether a source is no path, but the name of a data set on the hub."""
    path = Path(os.path.expanduser(source))
    here = os.path.lexists(path) or glob.has_magic(source)
    return not here and HUB_DATA.fullmatch(source) is not None and not _has_ending(path)


def _has_ending(path: Path) -> bool:
    """Whether a name ends like a file, which none of a repository does."""
    return bool(split_ending(path.name)[1]) or path.name.lower().endswith(UNREAD)


def _refuse_train(name: str, key: Key) -> None:
    found = HUB_DATA.fullmatch(name)
    if key == "heldout" and found is not None and found["split"] is None:
        raise InputError(
            f"heldout={name}: without a split it is the training split; name the one that is held "
            f"out: heldout={name}:test"
        )


def _check(path: Path, key: Key) -> None:
    """Raises InputError where a file is none that can be read, and says what it is."""
    begin = f"{key}: {path}"
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if not path.is_symlink() or error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        what = f"a link to {os.readlink(path)}, which is not there"
        if error.errno == errno.ELOOP:
            what = "a link that leads back to itself"
        raise InputError(f"{begin}: is {what}") from None
    if not stat.S_ISREG(mode):
        kinds = {
            stat.S_IFIFO: "a named pipe",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
            stat.S_IFSOCK: "a socket",
        }
        what = kinds.get(stat.S_IFMT(mode), "something else")
        raise InputError(
            f"{begin}: is {what}, not a file; data are read more than once: write them to a file"
        )
    _, ending = split_ending(path.name)
    if ending.endswith(COMPRESSED) and ending.startswith(COLUMNS):
        raise InputError(
            f"{begin}: {ending.split('.')[1]} in a compressed file, which is not read; unpack it "
            "(such files are compressed within)"
        )
    if ending.endswith((*COLUMNS, ".zst")) and not _is_utf8(path):
        raise InputError(
            f"{begin}: its name is no UTF-8, and pyarrow, which reads such files, opens no other; "
            "rename it"
        )
    with path.open("rb"):  # it raises where it may not be read
        pass


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# ------------------------------------------------------------------------------------------ a glob


def _in_glob(path: Path, key: Key) -> SourceFiles:
    """The files that match; every file once, by whatever links it is reached."""
    there = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
    begin = f"{key}={path}"
    matched = [p for p in there if not p.is_dir()]
    # A glob may name files of endings of the user's own, but not beside those of data.
    files = list(filter(is_data_file, matched)) or matched
    if not files:
        root = next(p for p in path.parents if not glob.has_magic(str(p)))
        if root.is_dir():
            os.scandir(root).close()  # it raises where the folder may not be read
        raise InputError(f"{begin}: no file matches")
    inner = [p for p in there if p.is_dir() and "**" not in str(path) and any(_data_in(p))]
    left = [*(str(p) for p in matched if p not in files), *(f"{p}/" for p in inner)]
    notes = [f"{path}: not read, by their names: {shortly(left)}"] if left else []
    files, again = _once(files)
    notes += again
    names = [p.name for p in files]
    _refuse_twice({p.as_posix(): p for p in files}, begin)
    _refuse_missing(files, begin)
    shown = {split for name in names for split in named_splits(name)}
    if len(shown) > 1 and TRAIN in shown and key == "data":
        notes.append(
            f"WARNING: {path}: the names show several splits ({', '.join(sorted(shown))}), and all "
            "of these files are read"
        )
    return SourceFiles(tuple(files), tuple(notes))


def _once(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The files without those that are another again, by a link; and what is said of these."""
    first: dict[str, Path] = {}
    again = []
    for path in files:
        known = first.setdefault(os.path.realpath(path), path)
        if known is not path:
            again.append(str(path))
    notes = [f"the same files again, by links, not read: {shortly(again)}"] if again else []
    return list(first.values()), notes


def _refuse_twice(files: dict[str, Path], begin: str) -> None:
    """Raises InputError where files differ in nothing but their endings."""
    for group in twice(files):
        first = files[group[0]]
        raise InputError(
            f"{begin}: {' and '.join(Path(one).name for one in group)} have one name in several "
            f"forms, and would be the same rows again; give one of them ({first}), or a list"
        )


def _refuse_missing(files: Sequence[Path], begin: str) -> None:
    """Raises InputError where some of the shards that the names count are not there."""
    gone = [p for p in missing_shards(map(str, files)) if not os.path.lexists(p)]
    if gone:
        raise InputError(
            f"{begin}: missing, by the names of the other files: {shortly(gone)}; fetch what is "
            "missing, or give a list of the files to read"
        )


# ---------------------------------------------------------------------------------------- a folder


def _in_folder(folder: Path, key: Key) -> SourceFiles:
    """What is read of a folder: the split that its card or its names show, else all its files."""
    if (folder / "state.json").is_file():
        return SourceFiles(tuple(_saved_dataset(folder)))
    listing = _Listing.of(folder)
    begin, wanted = f"{key}={folder}", WANTED[key]
    how = f"give the files, as {key}={folder}/PATTERN"
    names = sorted(listing.data)
    configs = card_configs(_card(folder))
    why = ""
    if configs:
        how = f"give the files of one, as {key}={folder}/PATTERN"
        by_card = files_by_card([*names, *listing.others], configs, None, None, wanted, begin, how)
        chosen = [name for name in by_card if name in listing.data]
        why = f"as {CARD} says"
        if not chosen:
            raise InputError(
                f"{begin}: none of the files that its {CARD} names can be read "
                f"({shortly(sorted(by_card))}); convert them to parquet or JSON Lines"
            )
    else:
        own = [name for name in names if "/" not in name]
        if not own and not any(map(named_splits, names)):
            _refuse_empty(folder, names, listing, begin)
        chosen = by_names(own or names, wanted, begin, how)
        splits = {split for name in chosen for split in named_splits(name)}
        if len(splits) == 1 and len(chosen) < len(names):
            why = f"the {splits.pop()} split by their names"
    files, notes = _once([listing.data[name] for name in chosen])
    _refuse_twice({name: listing.data[name] for name in chosen}, begin)
    _refuse_missing(files, begin)
    left = [name for name in names if name not in set(chosen)]
    if left:
        read = f"{len(chosen)} of {len(names)} files are read{why and ', '}{why}"
        others = shortly(dict.fromkeys(_pattern_of(folder, name) for name in left), 3)
        notes.insert(0, f"{folder}: {read}; not read: {shortly(left)} (give {key}={others})")
    if listing.others:
        notes.append(f"{folder}: not of a kind that is read: {shortly(sorted(listing.others))}")
    return SourceFiles(tuple(files), tuple(notes))


def _pattern_of(folder: Path, name: str) -> str:
    """What stands for a file that was left, and for others of its kind: a glob, or its folder."""
    inner, _, last = name.rpartition("/")
    if inner and not named_splits(last):
        return str(folder / inner)
    word = last.split("-")[0].split(".")[0]
    return f"{folder / inner / word}*"


def _refuse_empty(folder: Path, names: Sequence[str], listing: "_Listing", begin: str) -> None:
    hint = ""
    if names:
        inner = names[0].rpartition("/")[0]
        hint = f"; its folder {inner} does: give {folder / inner}"
    elif listing.others:
        hint = f"; it holds {shortly(sorted(listing.others))}"
    raise InputError(f"{begin}: the folder holds no {', '.join(KINDS)} file{hint}")


@dataclass
class _Listing:
    """The files of a folder and of those below it: by their names from it, with "/".

    data: of the kinds that are read. others: that look like data and are not read.
    """

    data: dict[str, Path]
    others: list[str]

    @classmethod
    def of(cls, folder: Path) -> "_Listing":
        found = cls({}, [])
        found._add(folder, "", {os.path.realpath(folder)}, DEEPEST)
        return found

    def _add(self, folder: Path, prefix: str, seen: set[str], depth: int) -> None:
        for path in sorted(folder.iterdir()):
            name = f"{prefix}{path.name}"
            if path.name.startswith("."):
                continue
            if path.is_dir():
                real = os.path.realpath(path)
                if depth and real not in seen:  # a link may lead back
                    seen.add(real)
                    self._add_inner(path, f"{name}/", seen, depth - 1)
            elif is_data_file(path):
                self.data[name] = path
            elif looks_like_data(path.name):
                self.others.append(name)

    def _add_inner(self, folder: Path, prefix: str, seen: set[str], depth: int) -> None:
        try:
            if (folder / "state.json").is_file():
                self.data |= {f"{prefix}{path.name}": path for path in _saved_dataset(folder)}
            else:
                self._add(folder, prefix, seen, depth)
        except PermissionError:
            self.others.append(f"{prefix} (may not be read)")


def _data_in(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from filter(is_data_file, folder.iterdir())


def _card(folder: Path) -> Any:
    """The YAML of a folder's card; {} where there is none."""
    try:
        with (folder / CARD).open("rb") as file:
            card = read_card(file.read(MOST_CARD_BYTES))
    except OSError:
        return {}
    return card if isinstance(card, dict) else {}


def _saved_dataset(folder: Path) -> list[Path]:
    """The files of a folder that `datasets.save_to_disk` wrote: those that its state names.

    Others are caches, which hold the same rows again.
    """
    state = read_json(folder / "state.json")
    listed = state.get("_data_files")
    if not isinstance(listed, list) or state.get("_indices_data_files"):
        raise InputError(
            f"{folder / 'state.json'}: lists no files of rows in their order; save the data again "
            "with save_to_disk, or as parquet"
        )
    files = []
    for entry in listed:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{folder / 'state.json'}: names {name!r}, which is no file beside it")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: is missing, and state.json names it")
        files.append(folder / name)
    if not files:
        raise InputError(f"{folder}: its state.json names no files, so it holds no rows")
    return files
