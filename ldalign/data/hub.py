"""Data sets of the Hugging Face hub: `org/name[@revision][:[config:]split]`, fetched once.

Only the files of one split are fetched, as they are: no code of a data set runs. Which files they
are is what its card says, else what its file names say.
"""

import fnmatch
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldalign.system import hub
from ldalign.system.errors import InputError

HUB_DATA = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?:(?P<config>[\w.+-]+):)?(?P<split>[\w.-]+))?"
)
DEFAULT_SPLIT = "train"


def hub_files(name: str, cache: Path, is_data: Callable[[Path], bool]) -> list[Path]:
    """Returns the files of a data set's split, fetched into `cache` where they are not there yet.

    is_data: whether a file of this name can be read. Raises InputError for a name, config or split
    that is not there, and EnvironmentProblem where the hub cannot be reached.
    """
    found = HUB_DATA.fullmatch(name)
    if found is None:
        raise InputError(f"data {name!r}: expected org/name[@revision][:[config:]split]")

    def choose(names: list[str], card: Any) -> list[str]:
        configs = _card_configs(card)
        wanted = _split_files(name, names, configs, found["config"], found["split"])
        files = sorted(one for one in wanted if is_data(Path(one)))
        if not files:
            raise InputError(
                f"data {name!r}: none of its files can be read ({', '.join(sorted(wanted)[:5])}); "
                "convert them to parquet or JSON Lines"
            )
        return files

    folder = cache / "hub-data" / re.sub(r"[/@:]", "--", name)
    return hub.fetch(hub.DATA, name, found["repo"], found["revision"], folder, [choose])


# ------------------------------------------------------------------------- the files of one split

Configs = dict[str, dict[str, list[str]]]  # config: {split: patterns of file names}


def _split_files(
    name: str, names: list[str], card: Configs, config: str | None, split: str | None
) -> list[str]:
    """The names of the files of a config's split, by the card, else by the names themselves."""
    if card:
        splits = card[_choose(name, "config", config, list(card), "default")]
        chosen = _choose(name, "split", split, list(splits), DEFAULT_SPLIT)
        files = [n for n in names if any(fnmatch.fnmatch(n, p) for p in splits[chosen])]
        if not files:
            raise InputError(
                f"data {name!r}: its card names {', '.join(splits[chosen])} for {chosen}, and no "
                "file matches"
            )
        return files
    inside = [n for n in names if config is None or config in n.split("/")[:-1]]
    if not inside:
        raise InputError(f"data {name!r}: has no folder {config!r}")
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(split or DEFAULT_SPLIT)}(?![A-Za-z0-9_])")
    files = [n for n in inside if word.search(n)]
    if not files:
        raise InputError(
            f"data {name!r}: no file is named after the split {split or DEFAULT_SPLIT!r}; found "
            f"{', '.join(sorted(inside)[:10])}"
        )
    return files


def _choose(name: str, what: str, given: str | None, there: list[str], default: str) -> str:
    """The config or split that is asked for, else the default one, else the only one."""
    if given in there:
        return str(given)
    if given is None and default in there:
        return default
    if given is None and len(there) == 1:
        return there[0]
    asked = f"has no {what} {given!r}" if given is not None else f"has several of {what}"
    raise InputError(
        f"data {name!r}: {asked}; write org/name:config:split, with a {what} of "
        f"{', '.join(sorted(there)[:20])}"
    )


def _card_configs(card: Any) -> Configs:
    """What a data set's card says of its configs; {} where it says nothing that can be read.

    `configs: [{config_name, default, data_files: PATTERNS or [{split, path: PATTERNS}]}]`. The
    default one is called "default" here too.
    """
    try:
        listed = card.to_dict().get("configs") or []
        found: Configs = {}
        for one in listed:
            files = one.get("data_files") or []
            if isinstance(files, str) or all(isinstance(pattern, str) for pattern in files):
                splits = {DEFAULT_SPLIT: _patterns(files)} if files else {}
            elif isinstance(files, dict):
                splits = {str(split): _patterns(paths) for split, paths in files.items()}
            else:
                splits = {str(part["split"]): _patterns(part["path"]) for part in files}
            if splits:
                found[str(one.get("config_name", "default"))] = splits
                if one.get("default"):
                    found.setdefault("default", splits)
        return found
    except (AttributeError, KeyError, TypeError):
        return {}


def _patterns(value: Any) -> list[str]:
    return [str(pattern) for pattern in ([value] if isinstance(value, str) else value)]
