"""Configuration: frozen dataclasses, filled from a YAML file and `key=value`, checked as a whole.

A config class lists its keys with `setting(default, help, check=...)` and its groups of keys with
`group(Class)`; annotations are the types. `load_config` reads file and overrides, refuses what it
does not know, and reports every problem it finds in one error. Nothing is adjusted in silence. The
program's own config classes are in ldalign/run/keys.py and settings.py.
"""

import contextlib
import dataclasses
import difflib
import itertools
import math
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ldalign.system.errors import FILE_SYSTEM, InputError, cannot_be_read
from ldalign.system.errors import nearest as _nearest
from ldalign.system.presets import find_config, presets

T = TypeVar("T")

FOREIGN = "FOREIGN"  # class attribute of a config: {a name from elsewhere: what is written here}
MAIN = "MAIN"  # the same: the group whose keys are named first, where several groups have a key
VALUE = "VALUE"  # in what FOREIGN says: the value that came with the name
BASE = "base"  # in a file: the config file whose keys hold where this one says nothing
REQUIRED: Any = object()  # a default: the key must be given (its class then needs kw_only=True)
ROWS = (".jsonl", ".ndjson", ".parquet", ".arrow", ".csv")  # what a data file's name ends in
MAX_BYTES = 10**6  # the most that a config file may have

# YAML 1.1 reads 010 as eight and 1:30 as ninety; here an integer is written the plain way.
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9_]*)")
_NULLS = ("None", "none")  # beside YAML's own null and ~: what Python users write
_NAMES: dict[Any, str] = {  # of types, in messages and in help
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    types.NoneType: "null",
}


# ------------------------------------------------------------------------------- declaring settings


@dataclass(frozen=True)
class Check:
    """A bound on one value. `bound` completes the sentence "must be ..."."""

    holds: Callable[[Any], bool]
    bound: str


positive = Check(lambda value: value > 0, "greater than 0")
non_negative = Check(lambda value: value >= 0, "0 or greater")
not_empty = Check(lambda value: len(value) > 0, "not empty")


def between(low: float, high: float) -> Check:
    """Bounds a number: low <= value <= high."""
    return Check(lambda value: low <= value <= high, f"between {low} and {high}")


def at_least(low: float) -> Check:
    """Bounds a number from below: value >= low."""
    return Check(lambda value: value >= low, f"{low} or greater")


def each(check: Check) -> Check:
    """Applies `check` to a value, or to every value of a list."""

    def holds(value: Any) -> bool:
        return all(map(check.holds, value)) if isinstance(value, list) else check.holds(value)

    return Check(holds, check.bound)


def above_up_to(low: float, high: float) -> Check:
    """Bounds a number: low < value <= high."""
    return Check(lambda value: low < value <= high, f"greater than {low}, at most {high}")


def at_least_below(low: float, high: float) -> Check:
    """Bounds a number: low <= value < high."""
    return Check(lambda value: low <= value < high, f"{low} or greater, below {high}")


def setting(
    default: Any,
    help: str,
    *,
    check: Check | None = None,
    path: bool = False,
    instead: Mapping[str, str] | None = None,
) -> Any:
    """Declares one key: the default and the help of a dataclass field.

    `help` gives meaning, unit and "off" value; `check` is skipped for None. A list given as the
    default is copied for each config. path: the value names files or folders, or may: a `~` that it
    (or an entry of it) begins with is the home directory. instead: values of an earlier version,
    each with what is written now.
    """
    metadata = {"help": help, "check": check, "path": path, "instead": instead or {}}
    if default is REQUIRED:
        return field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(cls: type, help: str = "") -> Any:
    """Declares a group of keys, itself a config class, as a dataclass field.

    If `cls` has a class attribute SHORTHAND, a plain value given for the group sets that key of it:
    with SHORTHAND = "folder", `guide=PATH` means `guide.folder=PATH`.
    """
    return field(default_factory=cls, metadata={"help": help})


# ------------------------------------------------------------------------------------------ loading


@dataclass(frozen=True)
class _Given:
    """A value as the user wrote it, and where: "run.yaml:3", or "seed=1" for an override."""

    node: yaml.Node
    where: str


def load_config(cls: type[T], path: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Builds `cls` from its defaults, then the file at `path`, then the `key=value` overrides.

    A file's `base: OTHER.yaml` (relative to it, or a preset: `find_config`) is read before it.
    Nested keys are dotted
    (`sft.epochs=2`); a value starting with [ { or a quote is read as YAML, any other is
    taken as it stands. A config class may define `problems(self) -> list[str]` to check its
    keys against each other.

    `cls` may have two class attributes for unknown keys: FOREIGN, {name: what is written here in
    its place}, and MAIN, the group that is named first where several have a key of that name.

    Raises InputError with all problems found: unknown keys (what is meant is named), repeated keys,
    wrong types, NaN and infinity, values out of bounds, contradictions.
    """
    problems: list[str] = []
    given: dict[str, _Given] = {}
    try:
        if path is not None:
            _read_file(cls, path, given, problems)
        for override in _whole(cls, overrides, problems):
            _read_override(cls, override, given, problems)
        config = _build(cls, "", given, problems)
    except RecursionError:
        raise InputError(
            f"{path or 'key=value'}: nested too deeply, or an alias within itself"
        ) from None
    if problems or config is None:
        raise InputError(_counted(problems))
    return config


def _counted(problems: Sequence[str]) -> str:
    """All problems in one line."""
    return (f"{len(problems)} problems: " if len(problems) > 1 else "") + " | ".join(problems)


def given_keys(
    cls: type, path: Path | None, overrides: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Returns the dotted keys that the file at `path` gives itself, and those on the command line.

    A file's `base:` does not count. Both sources must be ones that `load_config` accepts.
    """
    in_file: dict[str, _Given] = {}
    on_line: dict[str, _Given] = {}
    if path is not None:
        _read_file(cls, path, in_file, [])
    for override in overrides:
        _read_override(cls, override, on_line, [])
    own = [key for key, value in in_file.items() if value.where.startswith(f"{path}:")]
    return own, list(on_line)


def split_argv(
    argv: Sequence[str], flags: Sequence[str] = (), cls: type | None = None
) -> tuple[Path | None, list[str], set[str]]:
    """Splits `[--config FILE] [flag ...] [key=value ...]` into config file, overrides and flags.

    `flags` are the flags the command knows, with their dashes (`-h` is `--help`); `cls` is the
    config whose keys it has. FILE may be the name of a preset, as `find_config` says. Raises
    InputError for anything else; for keys with dashes, all of them, each with the form that is
    right.
    """
    path: Path | None = None
    overrides: list[str] = []
    seen: set[str] = set()
    problems: list[str] = []
    arguments = iter(enumerate(argv))
    for number, argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "--config":
            value = value if equals else next(arguments, (0, ""))[1]
            if not value:
                raise InputError("--config: needs a file name; write --config FILE.yaml")
            path = find_config(_at_home(Path(value)))
        elif argument in flags:
            seen.add(argument)
        elif argument == "-h" and "--help" in flags:
            seen.add("--help")
        elif argument.startswith("-"):
            following = argv[number + 1] if number + 1 < len(argv) else "-"
            takes = not equals and not following.startswith("--") and "=" not in following
            if takes and following != "-":
                value = following
                next(arguments)
            hint = _undashed(cls, name, value, ["--config", *flags])
            problems.append(f"{argument}: unknown option{hint}")
        else:
            overrides.append(argument)
    if problems:
        raise InputError(_counted(problems))
    return path, overrides, seen


def _undashed(cls: type | None, name: str, value: str, flags: Sequence[str]) -> str:
    """What to write in place of an option that is no flag: a key where it is one, or the flag
    that is nearest.
    """
    key = name.lstrip("-").replace("-", "_")
    given = value or VALUE
    without = "; a key is given without dashes: "
    if not name.startswith("--") or not key:
        return _nearest(name, flags)
    if cls is None:
        return _nearest(name, flags) or f"{without}{key}={given}"
    leaves = _leaves(cls)
    if key in itertools.chain(*leaves.values()):
        return f"{without}{key}={given}"
    if key in getattr(cls, FOREIGN, {}):
        return _foreign(cls, key, given)
    if key in leaves:
        return without + _listed([f"{found}={given}" for found in leaves[key]])
    return _nearest(name, flags) or _meant(cls, cls, "", key, given) or "; --help has all keys"


def _read_file(
    cls: type,
    path: Path,
    given: dict[str, _Given],
    problems: list[str],
    seen: tuple[Path, ...] = (),
) -> None:
    if path.suffix in ROWS:
        raise InputError(f"{path}: is no YAML file; if these are rows: data={path}")
    root = _compose(path)
    if root is None:
        return
    bases = [pair for pair in root.value if pair[0].value == BASE]
    for key_node, _ in bases[1:]:
        line, first = key_node.start_mark.line + 1, bases[0][0].start_mark.line + 1
        problems.append(f"{path}:{line}: {BASE}: given twice (first in line {first}); keep one")
    for key_node, node in bases[:1]:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise InputError(
                f"{where}: {BASE} must be the name of a config file, not {_kind(node)}"
            )
        base = find_config(_at_home(Path(node.value)), path.parent)
        here = Path(os.path.realpath(path))
        if Path(os.path.realpath(base)) in (here, *seen):
            raise InputError(f"{where}: {BASE}: {base} leads back to itself")
        if not base.is_file():
            raise InputError(
                f"{where}: {BASE}: {base}: no such file; the name is relative to this file's "
                "folder, or a preset's"
            )
        _read_file(cls, base, given, problems, (here, *seen))
    root.value = [pair for pair in root.value if pair[0].value != BASE]
    _flatten(cls, cls, root, "", str(path), given, problems)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what is wrong with a config file's bytes into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno in FILE_SYSTEM:
            raise cannot_be_read(path, error) from None
        raise InputError(f"{path}: {error.strerror}{_preset_hint(path)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise InputError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    except (ValueError, OverflowError) as error:  # an escape that is no character
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not valid YAML: {error}") from None


def _compose(
    path: Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader
) -> yaml.MappingNode | None:
    """The keys and values of a config file; None of an empty one, or nothing but comments."""
    with _reading(path):
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise InputError(f"{path}: has more than {MAX_BYTES} bytes; is it a config?")
        root = yaml.compose(text.decode("utf-8"), Loader=loader)
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise InputError(
            f"{path}:{root.start_mark.line + 1}: a config must be `key: value` lines, not "
            f"{_kind(root)}"
        )
    return root


class _Written(yaml.SafeLoader):
    """Reads what `to_yaml` writes, which has no anchors: with them, few lines make gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            problem = f"anchor or alias {event.anchor!r}, which no command of ldalign writes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def read_written(cls: type, path: Path) -> dict[str, Any]:
    """Reads a config that a command wrote with `to_yaml`, a stranger's perhaps.

    A value of a key that `cls` has is of that key's type; keys of another version stay as they are,
    and a `base` is not followed. Raises InputError as `load_config` does, and for YAML's anchors;
    keys that contradict each other pass.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    try:
        root = _compose(path, _Written)
        if root is not None:
            _check_types(cls, root, "", path, problems)
            with _reading(path):
                values = yaml.constructor.SafeConstructor().construct_document(root)
    except RecursionError:
        raise InputError(
            f"{path}: nested too deeply; give a run folder that ldalign made (run=RUN)"
        ) from None
    if problems:
        raise InputError(_counted(problems))
    return values


def _check_types(
    cls: type, mapping: yaml.MappingNode, prefix: str, path: Path, problems: list[str]
) -> None:
    for key_node, node in mapping.value:
        name, where = key_node.value, f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(name, str) or name not in _fields(cls):
            continue
        inner, declared = _group_class(cls, name), _fields(cls)[name]
        if inner is not None and isinstance(node, yaml.MappingNode):
            _check_types(inner, node, f"{prefix}{name}.", path, problems)
        elif inner is not None:
            problems.append(f"{where}: {prefix}{name}: must be a group of keys, not {_kind(node)}")
        elif str(node.value) not in declared.metadata.get("instead", ()):
            try:
                _convert(node, _types(cls)[name])
            except _Mismatch as error:
                problems.append(f"{where}: {prefix}{name}: {error}")


def _preset_hint(path: Path) -> str:
    """The end of a message about a config file that is not there: the preset that may be meant."""
    if path.exists():
        return ""
    hint = _nearest(path.stem, presets(), "--config ")
    return hint or "; `ldalign presets` lists those that come with it"


def _whole(cls: type, overrides: Sequence[str], problems: list[str]) -> list[str]:
    """The overrides without those that blanks have torn apart (`beta 1`, `beta = 1`), each of which
    is a problem that says how it is written.
    """
    whole: list[str] = []
    keys = {*itertools.chain(*_leaves(cls).values()), *_fields(cls)}
    left = list(overrides)
    while left:
        key, equals, value = left[0].partition("=")
        torn = 1 if equals and not value and len(left) > 1 else 0
        if not equals and key in keys and len(left) > 1:
            torn = 2 if left[1] == "=" and len(left) > 2 else 1
        value = left[torn].removeprefix("=")
        if torn and (torn == 2 or "=" not in value):
            shown = " ".join(left[: torn + 1])
            problems.append(f"{shown}: has a blank in it; write {key}={value}")
        else:
            torn = 0
            whole.append(left[0])
        left = left[torn + 1 :]
    return whole


def _without_key(cls: type, word: str) -> str:
    """What a word without a key may be meant for: a config file, the rows, a folder."""
    path = Path(_at_home(word))
    if path.suffix in (".yaml", ".yml") or (word in presets() and not path.exists()):
        return f"; a config is given as --config {word}"
    if "/" not in word and not path.suffix and not os.path.lexists(path):
        return ""
    keys = ["data"] if path.suffix or path.is_file() else ["policy", "data", "run"]
    if path.is_dir():  # of a model, of a run; else of rows
        made = (path / "config.json").exists() or (path / "config.yaml").exists()
        keys = ["policy", "run"] if made else ["data", "run"]
    meant = [f"{key}={word}" for key in keys if key in _fields(cls)]
    return f"; is it {_listed(meant)}?" if meant else ""


def _read_override(cls: type, override: str, given: dict[str, _Given], problems: list[str]) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        hint = _without_key(cls, override) if key else ""
        problems.append(f"{override}: not of the form key=value{hint}")
        return
    node: yaml.Node | None = None
    if value[:1] in ("[", "{", '"', "'"):
        try:
            node = yaml.compose(value, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, ValueError, OverflowError):
            problems.append(f"{override}: the value is not valid YAML")
            return
    if node is None:
        tag = yaml.resolver.Resolver().resolve(yaml.ScalarNode, value, (True, False))
        node = yaml.ScalarNode(tag, value)
    *groups, name = key.split(".")
    owner: type = cls
    prefix = ""
    for part in groups:
        inner = _group_class(owner, part)
        if inner is None:
            near = _near(part, (field for field in _fields(owner) if _group_class(owner, field)))
            if part in _fields(owner):
                problem = f"{prefix}{part} is a key, not a group of keys"
            elif near and name not in getattr(cls, FOREIGN, {}):
                problem = f"{prefix}{part}: unknown key; did you mean {prefix}{near[0]}?"
            else:  # "trainer.optimizer": by its last part
                problem = f"{key}: unknown key{_meant(cls, cls, '', name, value)}"
            problems.append(f"{override}: {problem}")
            return
        owner, prefix = inner, f"{prefix}{part}."
    _place(cls, owner, name, node, prefix, override, None, given, problems)


def _flatten(
    root: type,
    cls: type,
    mapping: yaml.MappingNode,
    prefix: str,
    file: str | None,
    given: dict[str, _Given],
    problems: list[str],
) -> None:
    """Puts each key of a YAML mapping into `given` under its dotted name.

    root: the whole config, of which `cls` may be a group. file: the config file, for messages; None
    inside an override.
    """
    seen: dict[str, int] = {}
    for key_node, node in mapping.value:
        line = key_node.start_mark.line + 1
        where = f"{file}:{line}" if file else prefix.rstrip(".")
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{where}: a key must be plain text, not {_kind(key_node)}")
            continue
        key = key_node.value
        if key in seen:
            problems.append(
                f"{where}: {prefix}{key}: given twice (first in line {seen[key]}); keep one"
            )
            continue
        seen[key] = line
        _place(root, cls, key, node, prefix, where, file, given, problems)


def _place(
    root: type,
    cls: type,
    key: str,
    node: yaml.Node,
    prefix: str,
    where: str,
    file: str | None,
    given: dict[str, _Given],
    problems: list[str],
) -> None:
    """Puts the value given for `key` of `cls` into `given`, a group's value key by key."""
    if key not in _fields(cls):
        value = node.value if isinstance(node, yaml.ScalarNode) else ""
        problems.append(f"{where}: {_unknown(root, cls, prefix, key, value)}")
        return
    inner = _group_class(cls, key)
    if inner is None:
        given[prefix + key] = _Given(node, where)
        return
    shorthand = getattr(inner, "SHORTHAND", None)
    if isinstance(node, yaml.MappingNode):
        _flatten(root, inner, node, f"{prefix}{key}.", file, given, problems)
    elif shorthand is not None:
        _place(root, inner, shorthand, node, f"{prefix}{key}.", where, file, given, problems)
    else:
        problems.append(
            f"{where}: {prefix}{key} is a group of keys ({', '.join(_fields(inner))}), not "
            f"{_kind(node)}"
        )


def _build(cls: type[T], prefix: str, given: Mapping[str, _Given], problems: list[str]) -> T | None:
    """Makes the config object of `cls`; None if a value in it (or below it) is wrong."""
    values: dict[str, Any] = {}
    before = len(problems)
    for name, declared in _fields(cls).items():
        key = prefix + name
        inner = _group_class(cls, name)
        where = given[key].where + ": " if key in given else ""
        if inner is not None:
            values[name] = _build(inner, f"{key}.", given, problems)
            continue
        if key in given:
            old = str(given[key].node.value)
            if old in declared.metadata.get("instead", ()):
                now = declared.metadata["instead"][old]
                problems.append(f"{where}{key}: {old!r} is written otherwise; give {now}")
                continue
            try:
                values[name] = _convert(given[key].node, _types(cls)[name])
            except _Mismatch as error:
                problems.append(f"{where}{key}: {error}")
                continue
        elif declared.default is not dataclasses.MISSING:
            values[name] = declared.default
        elif declared.default_factory is not dataclasses.MISSING:
            values[name] = declared.default_factory()
        else:
            problems.append(f"{key}: must be given ({declared.metadata.get('help', '')})")
            continue
        if declared.metadata.get("path"):
            values[name] = _at_home(values[name])
        check: Check | None = declared.metadata.get("check")
        if check is not None and values[name] is not None and not check.holds(values[name]):
            problems.append(f"{where}{key}: {values[name]!r} must be {check.bound}")
    if len(problems) > before:
        return None
    config = cls(**values)
    together = getattr(config, "problems", None)
    if together is not None:
        problems.extend(together())
    return config


# -------------------------------------------------------------------------------------------- types


class _Mismatch(Exception):
    """A value is not of the annotated type; the text says what was found and what was expected."""


def _convert(node: yaml.Node, annotation: Any) -> Any:
    """Returns the Python value of a YAML node for a type annotation. Raises _Mismatch."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(node, arguments)
    if origin is Literal:
        return _convert_literal(node, arguments)
    if origin in (list, tuple):
        if not isinstance(node, yaml.SequenceNode):
            hint = ""
            if isinstance(node, yaml.ScalarNode):
                hint = f"; write [{'' if _is_null(node) else node.value}]"
            raise _Mismatch(f"{_shown(node)} is not {_type_name(annotation)}{hint}")
        return origin(_convert(item, arguments[0]) for item in node.value)
    if not isinstance(node, yaml.ScalarNode):
        raise _Mismatch(f"{_shown(node)} is not {_type_name(annotation)}")
    return _convert_scalar(node, annotation)


def _convert_scalar(node: yaml.ScalarNode, annotation: Any) -> Any:
    raw: str = node.value
    wrong = _Mismatch(f"{_shown(node)} is not {_type_name(annotation)}")
    if annotation is types.NoneType:
        if not _is_null(node):
            raise wrong
        return None
    if annotation in (str, Path):
        if node.tag == "tag:yaml.org,2002:null":
            raise wrong
        return annotation(raw)
    if annotation is bool:
        if node.tag != "tag:yaml.org,2002:bool":
            raise wrong
        return yaml.SafeLoader.bool_values[raw.lower()]
    if annotation is int:
        if not _INTEGER.fullmatch(raw):
            raise wrong
        try:
            return int(raw)
        except ValueError:  # 1__0, or more than the 4300 digits that Python reads
            raise wrong from None
    if annotation is float:
        return _finite(raw, wrong)
    raise TypeError(f"config fields of type {annotation} are not supported")


def _finite(raw: str, wrong: _Mismatch) -> float:
    """Reads `raw` as Python does, since YAML 1.1 takes 1e-4 for text. Raises _Mismatch."""
    try:
        value = float(raw.lstrip(".") if raw.lower() in (".nan", ".inf") else raw)
    except ValueError:
        raise wrong from None
    if not math.isfinite(value):
        raise _Mismatch(f"{raw} is not a finite number")
    return value


def _convert_union(node: yaml.Node, members: Sequence[Any]) -> Any:
    """Takes the first member that fits. Named choices are tried first, as "none" may be one; then
    None; text, which fits nearly all, last.
    """
    failures: list[tuple[Any, _Mismatch]] = []

    def turn(member: Any) -> tuple[bool, bool, bool]:
        origin: Any = typing.get_origin(member)
        return member in (str, Path), origin is not Literal, member is not types.NoneType

    in_turn = sorted(members, key=turn)
    for member in in_turn:
        try:
            return _convert(node, member)
        except _Mismatch as error:
            failures.append((member, error))
    meant = [failure for member, failure in failures if member is not types.NoneType]
    if len(meant) == 1:
        raise meant[0]
    raise _Mismatch(f"{_shown(node)} is not {' or '.join(map(_type_name, members))}")


def _at_home(value: Any) -> Any:
    """The value of a path key with the home directory in place of a `~` at its beginning; that of
    somebody whom the machine does not know stays, and will be no such file.
    """
    if isinstance(value, (str, Path)):
        return type(value)(os.path.expanduser(value))
    return type(value)(map(_at_home, value)) if isinstance(value, (list, tuple)) else value


def _convert_literal(node: yaml.Node, choices: Sequence[Any]) -> Any:
    if isinstance(node, yaml.ScalarNode):
        for choice in choices:
            if node.value == str(choice):
                return choice
    names = [str(choice) for choice in choices]
    nearest = _nearest(getattr(node, "value", ""), names)
    raise _Mismatch(f"{_shown(node)} is not one of {', '.join(names)}{nearest}")


def _is_null(node: yaml.ScalarNode) -> bool:
    return node.tag == "tag:yaml.org,2002:null" or (node.style is None and node.value in _NULLS)


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.value else "an empty value"
    return _kind(node)


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return f"the value {node.value!r}"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _type_name(annotation: Any) -> str:
    """Says an annotation in words, for messages and help."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"a list, each {_type_name(arguments[0])}"
    return _NAMES.get(annotation, str(annotation))


def _fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    return {declared.name: declared for declared in dataclasses.fields(cls)}


def _types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _group_class(cls: type, name: str) -> type | None:
    """Returns the config class of the group `name` of `cls`; None if that is a key, or unknown."""
    annotation = _types(cls).get(name) if name in _fields(cls) else None
    is_group = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    return annotation if is_group else None


def _unknown(root: type, cls: type, prefix: str, key: str, value: str = "") -> str:
    return f"{prefix}{key}: unknown key{_meant(root, cls, prefix, key, value)}"


def _meant(root: type, cls: type, prefix: str, key: str, value: str) -> str:
    """What an unknown key of `cls`, a group or `root` itself, stands for: what `root` says of that
    name, else the keys that end in it, else the nearest; "" where nothing is near.
    """
    if key in getattr(root, FOREIGN, {}):
        return _foreign(root, key, value or VALUE, cls, prefix)
    leaves, own = _leaves(root), _fields(cls)
    found = leaves.get(key, [])
    if not found:
        near = [*_near(key, own), *_near(key, leaves, 0.6)]
        if not near:
            return ""
        best = max(near, key=lambda name: difflib.SequenceMatcher(None, name, key).ratio())
        found = [prefix + best] if best in own else leaves[best]
    return f"; did you mean {_listed(found)}?"


def _listed(names: Sequence[str]) -> str:
    """Names in words: "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)}{' or ' if others else ''}{last}"


def _foreign(root: type, key: str, value: str, cls: type | None = None, prefix: str = "") -> str:
    """What the config says of a name from elsewhere, with the value that came with it.

    cls, prefix: the group that it was given in: of keys with the same last part, its own is meant.
    """
    text: str = getattr(root, FOREIGN)[key]
    key, equals, rest = text.partition("=")
    leaf = key.rpartition(".")[2]
    if cls is not None and equals and leaf in _fields(cls):
        text = f"{prefix}{leaf}={rest}"
    none = text.removeprefix("none: ")
    if none != text:
        return f"; there is none here: {none}"
    return f"; write {text.replace(VALUE, value)}"


def _leaves(cls: type) -> dict[str, list[str]]:
    """The dotted keys by their last part: those in no group first, then those of the main one."""
    groups = [name for name in _fields(cls) if _group_class(cls, name) is not None]
    groups.sort(key=lambda name: name != getattr(cls, MAIN, None))
    leaves = {name: [name] for name in _fields(cls) if name not in groups}
    for name in groups:
        for leaf, keys in _leaves(typing.cast(type, _group_class(cls, name))).items():
            leaves.setdefault(leaf, []).extend(f"{name}.{key}" for key in keys)
    return leaves


def _near(name: str, known: Iterable[str], cutoff: float = 0.5) -> list[str]:
    return difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)


# ------------------------------------------------------------------------------------------ writing


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the config as plain dicts, lists, text and numbers: what YAML and JSON can hold."""
    return {name: _plain(getattr(config, name)) for name in _fields(type(config))}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(config: Any, changed: bool = False) -> str:
    """Writes the resolved config as YAML; `load_config` reads it back to an equal config.

    changed: only the keys whose values are not the defaults, which reads back to the same.
    """
    values = to_dict(config)
    if changed:
        values = _differing(values, to_dict(type(config)()))
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _differing(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that are others, group by group."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            if inner := _differing(value, others[name]):
                out[name] = inner
        elif value != others[name]:
            out[name] = value
    return out


class _Dumper(yaml.SafeDumper):
    """Quotes the text "None", which here means null, and escapes what is not printable.

    PyYAML itself loses a U+0085.
    """

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Quotes `text` where a reader would take it for something else."""
        style = None if text.isprintable() and text not in _NULLS else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def ignore_aliases(self, data: Any) -> bool:
        """Writes no anchors, which `read_written` refuses."""
        return True


_Dumper.add_representer(str, _Dumper.represent_text)


def describe(cls: type, first: Sequence[str] = ()) -> str:
    """Says every key of `cls` with default, type, bound and help: the text of `--help`.

    first: the dotted names of keys, or of whole groups, that are set first: they stand at the top
    under a line of their own. Then come the other keys, then the groups, a paragraph each.
    """
    top = [line for key in first for line in _describe_dotted(cls, key)]
    plain: list[str] = []
    groups: list[str] = []
    for name in _fields(cls):
        if name in first:
            continue
        if _group_class(cls, name) is None:
            plain += _describe_key(cls, name, "")
        else:
            groups += ["", *_describe_key(cls, name, "")]
    if top:
        top = ["Set first:", "", *top, "", "The other keys:", ""]
    return "\n".join([*top, *plain, *groups])


def _describe_dotted(cls: type, key: str) -> list[str]:
    *parts, name = key.split(".")
    for part in parts:
        cls = _group_class(cls, part) or cls
    return _describe_key(cls, name, "".join(f"{part}." for part in parts))


def _describe_key(cls: type, name: str, prefix: str) -> list[str]:
    """The lines of a key, or of a group and all its keys. Raises KeyError for one that is none."""
    declared = _fields(cls)[name]
    key = prefix + name
    help_text = declared.metadata.get("help", "")
    inner = _group_class(cls, name)
    if inner is not None:
        shorthand = getattr(inner, "SHORTHAND", None)
        short = f"{key}=VALUE is short for {key}.{shorthand}=VALUE" if shorthand else ""
        lines = [f"{key}:  {' '.join(filter(None, (help_text, short)))}".rstrip()]
        for each_key in _fields(inner):
            lines += _describe_key(inner, each_key, f"{key}.")
        return lines
    check: Check | None = declared.metadata.get("check")
    bound = f"; {check.bound}" if check else ""
    head = f"{key}={_default_text(declared)}  ({_type_name(_types(cls)[name])}{bound})"
    indent = "    "
    return [
        head,
        *textwrap.wrap(help_text, 100, initial_indent=indent, subsequent_indent=indent),
    ]


def _default_text(declared: dataclasses.Field[Any]) -> str:
    if declared.default is not dataclasses.MISSING:
        value = declared.default
    elif declared.default_factory is not dataclasses.MISSING:
        value = declared.default_factory()
    else:
        return "REQUIRED"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(_plain(value))
