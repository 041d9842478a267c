"""Data sets of the Hugging Face hub: `org/name[@revision][:[config:]split]`, fetched once.

Only the files of one split are fetched, as they are: no code of a data set runs. Which files they
are is what its card says, else what its file names say (`ldalign.data.file_splits`).
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldalign.data.file_splits import (
    TRAIN,
    by_names,
    card_configs,
    files_by_card,
    in_one_form,
    looks_like_data,
    of_split,
    shortly,
)
from ldalign.system import hub
from ldalign.system.errors import InputError

log = logging.getLogger(__name__)

HUB_DATA = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?:(?P<config>[\w.+-]+):)?(?P<split>[\w.-]+))?"
)
HOW = "write org/name:config:split"


def hub_files(name: str, cache: Path, is_data: Callable[[Path], bool]) -> list[Path]:
    """Returns the files of a data set's split, fetched into `cache` where they are not there yet.

    is_data: whether a file of this name can be read. Raises InputError for a name, config or split
    that is not there, and EnvironmentProblem where the hub cannot be reached.
    """
    found = HUB_DATA.fullmatch(name)
    if found is None:
        raise InputError(f"data {name!r}: expected org/name[@revision][:[config:]split]")

    def choose(names: list[str], card: Any) -> list[str]:
        to_dict = getattr(card, "to_dict", dict)
        wanted = _split_files(
            name, names, to_dict(), found["config"], found["split"], lambda one: is_data(Path(one))
        )
        files = sorted(one for one in wanted if is_data(Path(one)))
        if not files:
            raise InputError(
                f"data {name!r}: none of its files can be read ({shortly(sorted(wanted))}); "
                "convert them to parquet or JSON Lines"
            )
        if unread := sorted(set(wanted) - set(files)):
            log.warning("data %s: of this split, not read: %s", name, shortly(unread))
        return in_one_form(files, lambda line: log.warning("data %s: %s", name, line))

    folder = cache / "hub-data" / folder_name(name)
    return hub.fetch(hub.DATA, name, found["repo"], found["revision"], folder, [choose])


def folder_name(name: str) -> str:
    """The folder of a name in the cache: no two names have the same."""
    # "--" is in no repository's name, and neither "," nor "%" in any part of a name.
    repo, mark, rest = re.fullmatch(r"([^@:]*)([@:]?)(.*)", name).groups()  # type: ignore[union-attr]
    end = f"{mark}{rest}".replace("/", "%2F").replace(":", ",")
    return repo.replace("/", "--") + end


def _split_files(
    name: str,
    names: list[str],
    card: Any,
    config: str | None,
    split: str | None,
    is_data: Callable[[str], bool],
) -> list[str]:
    """The names of the files of a config's split, by the card, else by the names themselves."""
    begin = f"data {name!r}"
    if configs := card_configs(card):
        return files_by_card(names, configs, config, split, [TRAIN], begin, HOW)
    inside = [n for n in names if config is None or config in n.split("/")[:-1]]
    if not inside:
        raise InputError(f"{begin}: has no folder {config!r}")
    data = [n for n in inside if is_data(n) or looks_like_data(n)]
    files = of_split(data, split) if split is not None else by_names(data, [TRAIN], begin, HOW)
    if not files:
        raise InputError(
            f"{begin}: no file is named after the split {split or TRAIN!r}; found "
            f"{', '.join(sorted(inside)[:10])}"
        )
    return files
