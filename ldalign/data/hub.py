"""Data sets of the Hugging Face hub: `org/name[@revision][:[config:]split]`, fetched once.

Only the files of one split are fetched, as they are: no code of a data set runs. Which files they
are is what its card says, else what its file names say. What was fetched is kept with the commit it
is of and the sha256 of every file, and is not looked up again: a run's data do not change under it.
"""

import contextlib
import fnmatch
import glob
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.system.files import hash_file, write_json, writing
from ldalign.system.untrusted import read_json

log = logging.getLogger(__name__)

HUB_DATA = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?:(?P<config>[\w.+-]+):)?(?P<split>[\w.-]+))?"
)
SOURCE_FILE = "ldalign_source.json"  # in a fetched folder: commit, and the sha256 of each file
DEFAULT_SPLIT = "train"


def hub_files(name: str, cache: Path, is_data: Callable[[Path], bool]) -> list[Path]:
    """Returns the files of a data set's split, fetched into `cache` where they are not there yet.

    is_data: whether a file of this name can be read. Raises InputError for a name, config or split
    that is not there, and EnvironmentProblem where the hub cannot be reached.
    """
    folder = cache / "hub-data" / re.sub(r"[/@:]", "--", name)
    kept = _kept(folder)
    if kept is not None:
        return kept
    found = HUB_DATA.fullmatch(name)
    if found is None:
        raise InputError(f"data {name!r}: expected org/name[@revision][:[config:]split]")
    with _hub_errors(name) as hub:
        info = hub.dataset_info(found["repo"], revision=found["revision"])
    names = [one.rfilename for one in info.siblings or []]
    card = _card_configs(getattr(info, "card_data", None))
    wanted = _split_files(name, names, card, found["config"], found["split"])
    files = sorted(one for one in wanted if is_data(Path(one)))
    if not files:
        raise InputError(
            f"data {name!r}: none of its files can be read ({', '.join(sorted(wanted)[:5])}); "
            "convert them to parquet or JSON Lines"
        )
    with _hub_errors(name) as hub:
        hub.snapshot_download(
            found["repo"],
            repo_type="dataset",
            revision=info.sha,
            local_dir=folder,
            allow_patterns=[glob.escape(one) for one in files],
        )
    if missing := [one for one in files if not (folder / one).is_file()]:
        raise EnvironmentProblem(
            f"data {name!r}: the download into {folder} is incomplete ({missing[0]}); check the "
            "network"
        )
    with writing(folder):
        sums = {one: [(folder / one).stat().st_size, hash_file(folder / one)] for one in files}
        write_json(folder / SOURCE_FILE, {"name": name, "commit": info.sha, "files": sums})
    log.info("data %s: %d files of commit %s in %s", name, len(files), info.sha, folder)
    return [folder / one for one in files]


def _kept(folder: Path) -> list[Path] | None:
    """The files of a folder that was fetched whole; None where one is missing or has another size.

    Hashes are not compared here: a run writes down the hash of every file that it reads.
    """
    if not (folder / SOURCE_FILE).is_file():
        return None
    try:
        files = read_json(folder / SOURCE_FILE)["files"].items()
        if all((folder / one).stat().st_size == size for one, (size, _) in files):
            return [folder / one for one, _ in files]
        reason = "a file has another size"
    except (InputError, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        reason = str(error)
    log.warning("%s: %s; fetching it again", folder, reason)
    return None


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[Any]:
    """Gives the hub's client, and turns what it raises into one line."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise EnvironmentProblem(
            f"data {name!r}: no such file or folder, and to download it huggingface_hub is "
            "missing; pip install ldalign[hub]"
        ) from error
    try:
        yield huggingface_hub
    except errors.GatedRepoError as error:
        raise InputError(
            f"data {name!r}: is gated; accept its terms on huggingface.co and set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise InputError(
            f"data {name!r}: no such file or folder, and no such data set (or revision) on the hub"
        ) from error
    except Exception as error:  # the http client's classes differ between versions
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EnvironmentProblem(
            f"data {name!r}: no such file or folder, and the download failed "
            f"({type(error).__name__}: {reason}); check the network, or give the path of a file"
        ) from error


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
