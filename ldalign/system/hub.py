"""Repositories of the Hugging Face hub: files fetched once and then kept, and folders pushed.

All files are of one commit. What was fetched is kept with that commit and the size and sha256 of
every file, and is not looked up again: neither a run's data nor its model change under it, and a
later start needs no network. Delete the folder to fetch anew.
"""

import contextlib
import glob
import logging
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldalign.system.errors import EnvironmentProblem, InputError, how_to_install
from ldalign.system.files import hash_file, write_json, writing
from ldalign.system.untrusted import read_json

log = logging.getLogger(__name__)

# In a fetched folder: name, commit, licence, and size and sha256 of each file.
SOURCE_FILE = "ldalign_source.json"

# Names of files to fetch, given the names of all files of the repository and its card (or None).
Choose = Callable[[list[str], Any], list[str]]


@dataclass(frozen=True)
class Kind:
    """A kind of repository, and the words in which its users are told what is wrong."""

    word: str  # for which key of the configuration
    repo_type: str  # as the hub's client calls it
    noun: str
    absent: str  # locally, where it was looked for first
    instead: str  # what else can be given


MODEL = Kind("model", "model", "model", "no such folder", "the path of a model folder")
DATA = Kind("data", "dataset", "data set", "no such file or folder", "the path of a file")


def fetch(
    kind: Kind,
    name: str,
    repo: str,
    revision: str | None,
    folder: Path,
    choices: Sequence[Choose],
) -> list[Path]:
    """Returns the files of a repository that `choices` name, in `folder`.

    name: what the user wrote. choices: each is called when the files that the one before it named
    are there. Raises InputError for a repository or a revision that is not there, and
    EnvironmentProblem where the hub cannot be reached.
    """
    if (kept := _kept(folder, name)) is not None:
        return kept
    with _client(kind, name) as hub:
        info = hub.repo_info(repo, repo_type=kind.repo_type, revision=revision)
    there = [one.rfilename for one in info.siblings or []]
    log.info("%s %s: fetching commit %s from the hub", kind.word, name, info.sha)
    files: list[str] = []
    for choose in choices:
        chosen = choose(there, getattr(info, "card_data", None))
        chosen = [one for one in chosen if one != SOURCE_FILE]  # an export's, which is not ours
        with _client(kind, name) as hub:
            hub.snapshot_download(
                repo,
                repo_type=kind.repo_type,
                revision=info.sha,
                local_dir=folder,
                allow_patterns=[glob.escape(one) for one in chosen],
            )
        files += chosen
    # Offline, the hub's client may hand back an unfinished folder.
    if missing := [one for one in files if not (folder / one).is_file()]:
        raise EnvironmentProblem(
            f"{kind.word} {name!r}: the download into {folder} is incomplete ({missing[0]}); check "
            "the network"
        )
    with writing(folder):
        sums = {one: [(folder / one).stat().st_size, hash_file(folder / one)] for one in files}
        license = getattr(getattr(info, "card_data", None), "license", None)
        license = license if isinstance(license, str) else None
        about = {"name": name, "commit": info.sha, "files": sums, "license": license}
        write_json(folder / SOURCE_FILE, about)
    size = sum((folder / one).stat().st_size for one in files) / 2**20
    said = (kind.word, name, len(files), size, info.sha, folder)
    log.info("%s %s: %d files, %.1f MiB, of commit %s in %s", *said)
    return [folder / one for one in files]


def _kept(folder: Path, name: str) -> list[Path] | None:
    """The files of a folder that was fetched whole, for this name; None where it was for another,
    and where a file is missing or has another size.

    Hashes are not compared here: a run writes down the hash of every file that it reads.
    """
    if not (folder / SOURCE_FILE).is_file():
        return None
    try:
        kept = read_json(folder / SOURCE_FILE)
        files = kept["files"].items()
        if kept["name"] != name:
            reason = f"holds {kept['name']}, not {name}"
        elif all((folder / one).stat().st_size == size for one, (size, _) in files):
            return [folder / one for one, _ in files]
        else:
            reason = "a file has another size"
    except (InputError, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        reason = str(error)
    log.warning("%s: %s; fetching it again", folder, reason)
    return None


@contextlib.contextmanager
def _client(kind: Kind, name: str) -> Iterator[Any]:
    """Gives the hub's client, and turns what it raises into one line."""
    begin = f"{kind.word} {name!r}"
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise EnvironmentProblem(
            f"{begin}: {kind.absent}, and to download it huggingface_hub is missing; "
            f"{how_to_install('hub')}"
        ) from error
    try:
        yield huggingface_hub
    except errors.GatedRepoError as error:
        raise InputError(
            f"{begin}: is gated; accept its terms on huggingface.co and set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise InputError(
            f"{begin}: {kind.absent}, and no such {kind.noun} (or revision) on the hub"
        ) from error
    except Exception as error:  # the http client's classes differ between versions
        reason = " ".join(str(error).split())[:300]
        raise EnvironmentProblem(
            f"{begin}: {kind.absent}, and the download failed ({type(error).__name__}: {reason}); "
            f"check the network, or give {kind.instead}"
        ) from error


# ------------------------------------------------------------------------------------------ pushing

# What the hub calls its repositories (its client's validate_repo_id).
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/(?!.*\.git$)[A-Za-z0-9_]([\w.-]{0,94}\w)?")
# Weights of an earlier push that are none of this one: beside these they would be read for them.
STALE = ("model*.safetensors", "model.safetensors.index.json")


def is_repository(name: str) -> bool:
    """Says whether a repository of the hub can be called `name`, OWNER/NAME."""
    return bool(REPOSITORY.fullmatch(name)) and "--" not in name and ".." not in name


def check_push(repo: str, private: bool, make: bool) -> None:
    """Makes sure that a folder can be pushed to the model repository `repo`, before it is there.

    make: the repository is made, empty, if it is not there; False: nothing is. Raises InputError
    for a token that is missing, not accepted or may not write there, a name that is refused, and a
    public repository where `private` asks for one that is not; EnvironmentProblem where the hub
    cannot be reached.
    """
    with _pushing(repo) as hub:
        who = hub.whoami()
    _check_rights(repo, who)
    if make:
        with _pushing(repo) as hub:
            hub.create_repo(repo, private=private, repo_type=MODEL.repo_type, exist_ok=True)
    _check_visibility(repo, private, make)


def _check_rights(repo: str, who: Any) -> None:
    """Raises InputError where the token only reads, or is of nobody who has repositories there."""
    owner = repo.partition("/")[0]
    token = ((who.get("auth") or {}).get("accessToken") or {}) if isinstance(who, dict) else {}
    if token.get("role") == "read":
        raise InputError(f"push to {repo}: the token only reads; make one that writes (HF_TOKEN)")
    owners = [who["name"], *(one["name"] for one in who.get("orgs") or [])]
    if owner.lower() not in [name.lower() for name in owners]:
        raise InputError(
            f"push to {repo}: the token's owner is {', '.join(owners)}, not {owner}; give one of "
            "these, or another token (HF_TOKEN)"
        )


def _check_visibility(repo: str, private: bool, made: bool) -> None:
    with _pushing(repo) as hub:
        try:
            info = hub.repo_info(repo, repo_type=MODEL.repo_type, revision=None)
        except hub.errors.RepositoryNotFoundError:
            if made:
                raise
            return  # it will be made
    if private and getattr(info, "private", None) is False:
        raise InputError(
            f"push to {repo}: is there already and public, and the policy was to be private; make "
            "it private on the hub, give another name, or private=false (of a run: "
            "hub.private=false)"
        )


def push(folder: Path, files: Sequence[str], repo: str, private: bool, message: str) -> str:
    """Pushes files of a folder to a model repository, as one commit; returns its address.

    What is there already is not sent again. Raises EnvironmentProblem, with the command that does
    it by hand, where anything goes wrong: the folder stays as it is.
    """
    patterns = [glob.escape(one) for one in files]
    try:
        with _pushing(repo) as hub:
            hub.create_repo(repo, private=private, repo_type=MODEL.repo_type, exist_ok=True)
            done = hub.upload_folder(
                repo_id=repo,
                folder_path=folder,
                repo_type=MODEL.repo_type,
                commit_message=message,
                allow_patterns=patterns,
                delete_patterns=list(STALE),
            )
    except (InputError, EnvironmentProblem) as error:
        raise EnvironmentProblem(
            f"{error}; nothing is lost, the policy is in {folder}: run the same command again, or "
            f"ldalign push {shlex.quote(str(folder))} {repo}"
        ) from error
    return str(getattr(done, "commit_url", repo))


@contextlib.contextmanager
def _pushing(repo: str) -> Iterator[Any]:
    """Gives the hub's client, and turns what it raises into one line."""
    begin = f"push to {repo}"
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise EnvironmentProblem(
            f"{begin}: package huggingface_hub is missing; {how_to_install('hub')}"
        ) from error
    try:
        yield huggingface_hub
    except errors.LocalTokenNotFoundError as error:
        raise InputError(
            f"{begin}: there is no token; set HF_TOKEN, or log in with: hf auth login"
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{begin}: the name is refused: {_one_line(error)}") from error
    except Exception as error:  # the http client's classes differ between versions
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            said = "the hub does not accept the token; set HF_TOKEN to one that is valid"
            raise InputError(f"{begin}: {said}") from error
        if status == 403:
            said = f"the token may not write there; give one that may ({_one_line(error)})"
            raise InputError(f"{begin}: {said}") from error
        if status in (400, 404, 409, 422):
            raise InputError(f"{begin}: is refused: {_one_line(error)}") from error
        raise EnvironmentProblem(
            f"{begin}: the hub cannot be reached ({type(error).__name__}: {_one_line(error)})"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
