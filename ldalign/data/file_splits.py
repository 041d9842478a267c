"""Which files of a data set belong to which split: by its card, else by their names.

One rule for a folder of this machine and for a data set of the hub. A name is a path within the
data set, with "/" between its parts. Patterns of a card are read as the hub's own library reads
them: `*` stays within one part, `**` goes over any number of parts.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from ldalign.system.errors import InputError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
# The words that say a split in a name: those that the hub's own library knows, and two more.
WORDS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev"),
    TEST: ("test", "testing", "eval", "evaluation", "heldout", "holdout"),
}
CARD = "README.md"
MOST_CARD_BYTES = 10**6

KINDS = (".jsonl", ".jsonlines", ".ndjson", ".json", ".parquet", ".pq", ".arrow")  # that are read
COMPRESSED = (".gz", ".zst")  # behind one of those that hold text
COLUMNS = (".parquet", ".pq", ".arrow")  # which are compressed within
# Of several forms of the same rows, the one that is taken from the hub: the first of these.
PREFERRED = (".parquet", ".pq", ".arrow", ".jsonl", ".jsonlines", ".ndjson", ".json")

# Endings of files that may hold rows and are not read, as they are not told by their content alone.
UNREAD = (
    *(".csv", ".tsv", ".txt", ".xlsx", ".feather", ".orc", ".avro", ".msgpack", ".pkl", ".pickle"),
    *(".db", ".sqlite", ".h5", ".lance", ".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar"),
    *(".tgz", ".7z", ".rar"),
)
NO_ROWS = ("readme", "license", "licence", "notice", "citation", "requirements", "changelog")


@dataclass(frozen=True)
class CardConfig:
    """What a card says of one config of a data set.

    folder: that all its files lie in; "": the data set's own. splits: patterns of file names by
    split; None: the names themselves say the split.
    """

    folder: str = ""
    splits: dict[str, list[str]] | None = None


Configs = dict[str, CardConfig]


# -------------------------------------------------------------------------------------------- names


def split_ending(name: str) -> tuple[str, str]:
    """Returns (the name without its endings of data, these endings in small letters, ""): the
    second is one of `KINDS`, with one of `COMPRESSED` behind it or not.
    """
    lower = name.lower()
    packed = next((end for end in COMPRESSED if lower.endswith(end)), "")
    inner = lower.removesuffix(packed)
    kind = next((end for end in KINDS if inner.endswith(end)), "")
    if not kind:
        return name, ""
    return name[: len(name) - len(kind + packed)], kind + packed


def looks_like_data(name: str) -> bool:
    """Whether a file of this name, of a kind that is not read, may well hold rows."""
    last = PurePosixPath(name).name.lower()
    return last.endswith(UNREAD) and not last.startswith((".", "_", *NO_ROWS))


def named_splits(name: str) -> frozenset[str]:
    """The splits of `WORDS` whose words stand in a name or in its folders, "_" around them or not:
    {"train"} of data/train_sft-00000.parquet.
    """
    return frozenset(
        split for split, words in WORDS.items() if _stands_in(words, name, "A-Za-z", loose=True)
    )


def _stands_in(words: Iterable[str], name: str, letters: str, loose: bool = False) -> bool:
    word = "|".join(map(re.escape, words))
    flags = re.IGNORECASE if loose else 0
    return re.search(rf"(?<![{letters}])(?:{word})(?![{letters}])", name, flags) is not None


def of_split(names: Iterable[str], split: str) -> list[str]:
    """The names that name the split, and no other split beside it.

    `train_sft` is a word of its own: it does not name `train`, unless no name has that word alone.
    """
    own = named_splits(split)
    alone = [name for name in names if not named_splits(name) - own]
    words = WORDS.get(split, (split,))
    exact = [name for name in alone if _stands_in(words, name, "A-Za-z0-9_")]
    return exact or [name for name in alone if split in named_splits(name)]


def by_names(names: Sequence[str], wanted: Sequence[str], begin: str, how: str) -> list[str]:
    """Returns the names of the first split of `wanted` that some have; all, where no two differ in
    the splits that they name; else those that name none.

    begin, how: of the InputError where all name splits, and none that is wanted.
    """
    shown = {name: named_splits(name) for name in names}
    if len(set(shown.values())) <= 1:
        return list(names)
    for split in wanted:
        if found := of_split(names, split):
            return found
    if plain := [name for name in names if not shown[name]]:
        return plain
    raise InputError(
        f"{begin}: the names of its files show no {wanted[0]} split ({shortly(names)}); {how}"
    )


def shortly(names: Iterable[str], most: int = 5) -> str:
    """Some of the names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def twice(names: Iterable[str]) -> list[list[str]]:
    """The groups of names that differ in nothing but their endings: the same rows, most likely, in
    several forms. In each, the form to take comes first.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        stem, ending = split_ending(name)
        if ending:
            groups.setdefault(stem, []).append(name)

    def turn(name: str) -> tuple[int, str]:
        ending = split_ending(name)[1]
        kind = next(
            kind
            for kind in KINDS
            if ending.startswith(kind) and (ending == kind or ending[len(kind) :] in COMPRESSED)
        )
        return PREFERRED.index(kind), ending

    return [sorted(group, key=turn) for group in groups.values() if len(group) > 1]


_SHARD = re.compile(r"(?P<before>.*?[-_.])(?P<number>\d+)-of-(?P<count>\d+)(?P<after>.*)")


def missing_shards(names: Iterable[str]) -> list[str]:
    """The names of the form x-00001-of-00003.parquet that complete the given ones of that form."""
    there: dict[tuple[str, str, str], dict[int, str]] = {}
    for name in names:
        if found := _SHARD.fullmatch(name):
            key = (found["before"], found["count"], found["after"])
            there.setdefault(key, {})[int(found["number"])] = found["number"]
    missing = []
    for (before, count, after), numbers in there.items():
        # Some count from one.
        first = 1 if int(count) in numbers and 0 not in numbers else 0
        if max(numbers) >= int(count) + first:
            continue  # no shards of a whole, whatever they are
        width = len(next(iter(numbers.values())))
        missing += [
            f"{before}{number:0{width}}-of-{count}{after}"
            for number in range(first, first + min(int(count), 10**6))
            if number not in numbers
        ]
    return missing


# --------------------------------------------------------------------------------------------- card


def files_by_card(
    names: Sequence[str],
    configs: Configs,
    config: str | None,
    split: str | None,
    wanted: Sequence[str],
    begin: str,
    how: str,
) -> list[str]:
    """Returns the names that a card gives a split, of the config and the split that are asked for;
    None: the default ones, the first of `wanted` among the splits.

    begin, how: of an InputError where something asked for is not there: "BEGIN: ...; HOW, ...".
    """
    chosen = configs[_choose(begin, how, "config", config, list(configs), ["default"])]
    inside = [
        n for n in names if not chosen.folder or PurePosixPath(n).is_relative_to(chosen.folder)
    ]
    if chosen.splits is None:
        files = of_split(inside, split) if split else by_names(inside, wanted, begin, how)
        if not files:
            raise InputError(
                f"{begin}: its card names the folder {chosen.folder}, and no file there is "
                f"{'of ' + split if split else 'data'}"
            )
        return files
    named = _choose(begin, how, "split", split, list(chosen.splits), wanted)
    patterns = [pattern_regex(f"{chosen.folder}/{p}") for p in chosen.splits[named]]
    files = [n for n in names if any(pattern.fullmatch(n) for pattern in patterns)]
    if not files:
        raise InputError(
            f"{begin}: its card names {', '.join(chosen.splits[named])} for {named}, and no file "
            "matches"
        )
    return files


def _choose(
    begin: str, how: str, what: str, given: str | None, there: list[str], default: Sequence[str]
) -> str:
    """The config or split that is asked for, else the first default one, else the only one."""
    if given in there:
        return str(given)
    for name in default:
        if given is None and name in there:
            return name
    if given is None and len(there) == 1:
        return there[0]
    asked = f"has no {what} {given!r}" if given is not None else f"has several of {what}"
    raise InputError(f"{begin}: {asked}; {how}, with a {what} of {', '.join(sorted(there)[:20])}")


def pattern_regex(pattern: str) -> re.Pattern[str]:
    """A card's pattern as a regular expression: `*` and `?` do not match "/", `**/` matches any
    number of folders, none as well.
    """
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    regex = ""
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**":
            regex += ".*" if last else "(?:.*/)?"
        else:
            regex += _part_regex(part) + ("" if last else "/")
    return re.compile(regex, re.DOTALL)


def _part_regex(part: str) -> str:
    """What one part of a pattern, between two "/", matches."""
    token = re.compile(r"\*\*+|\*|\?|\[!?\]?[^]/]*\]|.", re.DOTALL)
    out = ""
    for found in token.findall(part):
        if found.startswith("**"):
            out += ".*"
        elif found == "*":
            out += "[^/]*"
        elif found == "?":
            out += "[^/]"
        elif len(found) > 2 and found[0] == "[":
            inside = found[1:-1]
            negated = inside.startswith("!")
            inside = inside.removeprefix("!").replace("\\", r"\\").replace("[", r"\[")
            inside = inside.replace("^", r"\^").replace("]", r"\]")
            out += f"[^/{inside}]" if negated else f"[{inside}]"
        else:
            out += re.escape(found)
    return out


def card_configs(card: Any) -> Configs:
    """What a data set's card, its YAML as Python values, says of its configs; {} where it says
    nothing that can be read.

    `configs: [{config_name, default, data_dir, data_files}]`, where data_files is one or more
    patterns, or [{split, path: patterns}].
    The default one is called "default" here too.
    """
    try:
        found: Configs = {}
        for one in card.get("configs") or []:
            files = one.get("data_files") or []
            folder = str(PurePosixPath(str(one.get("data_dir") or "")))
            folder = "" if folder == "." else folder
            splits: dict[str, list[str]] | None = None
            if isinstance(files, dict):
                splits = {str(split): _patterns(paths) for split, paths in files.items()}
            elif files and (isinstance(files, str) or all(isinstance(f, str) for f in files)):
                splits = {TRAIN: _patterns(files)}
            elif files:
                splits = {str(part["split"]): _patterns(part["path"]) for part in files}
            if splits or folder:
                config = CardConfig(folder, splits)
                found[str(one.get("config_name", "default"))] = config
                if one.get("default"):
                    found.setdefault("default", config)
        return found
    except (AttributeError, KeyError, TypeError):
        return {}


def _patterns(value: Any) -> list[str]:
    return [str(pattern) for pattern in ([value] if isinstance(value, str) else value)]


def read_card(text: bytes) -> Any:
    """The YAML at the head of a card, between two lines of `---`, as Python values; None where
    there is none that can be read.
    """
    found = re.match(rb"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    if found is None:
        return None
    try:
        return yaml.safe_load(found[1].decode("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def in_one_form(names: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """The names without those that say the same rows in another form; `say` is told of each."""
    left = {}
    for first, *others in twice(names):
        say(f"{', '.join(others)}: not read, {first} has the same rows in another form")
        left.update(dict.fromkeys(others))
    return [name for name in names if name not in left]
