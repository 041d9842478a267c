"""The errors a user may meet, and the exit code of each.

A problem that a person can solve is raised as one of the three classes below, with a message of the
form `FILE:LINE: what is wrong; what to do`; `exits.run` turns it into one line on stderr and an
exit code. Everything else is a bug of ours and says so.
"""

import difflib
import errno
from collections.abc import Iterable


class LdalignError(Exception):
    """Base of every error ldalign raises on purpose; `exit_code` is what the command exits with."""

    exit_code = 1


class InputError(LdalignError, ValueError):
    """What the user gave is wrong: a file, a row, a config key, a model folder. Exit code 2."""

    exit_code = 2


class EnvironmentProblem(LdalignError, RuntimeError):
    """The machine is in the way: no package, no device, a full disk, a held lock. Exit code 3."""

    exit_code = 3


class NumericsError(LdalignError, ArithmeticError):
    """A value that must be finite (loss, gradient, distance, weight) is not. Exit code 4."""

    exit_code = 4


# What a file system says of itself, whatever file it was asked for.
FILE_SYSTEM = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EREMOTEIO,
    errno.ENOTCONN,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)


def cannot_be_read(where: object, error: OSError) -> LdalignError:
    """What to raise where a file that was given cannot be read: an EnvironmentProblem where the
    file system itself fails (stale, timed out, no descriptors), else an InputError.
    """
    if error.errno in FILE_SYSTEM:
        return EnvironmentProblem(
            f"{where}: cannot be read: {error.strerror}; mend that and run the same command again: "
            "what is finished is kept"
        )
    return InputError(f"{where}: cannot be read: {error.strerror or error}")


def is_failure(error: BaseException) -> bool:
    """Whether a library failed, if only by a panic of its Rust code: nobody asked to stop, and
    memory is not what it lacked.
    """
    failed = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    return failed and not isinstance(error, MemoryError)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about the unknown `name`: the known one that is most like it, or "".

    prefix: stands before the known name.
    """
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def how_to_install(*extras: str) -> str:
    """The command that installs what `extras` of pyproject.toml name, quoted for any shell.

    The packages themselves are named: `ldalign[extra]` is found only where an index has ldalign.
    """
    wanted: list[str] = []
    for extra in extras:
        of_extra = f'extra == "{extra}"'
        lines = [line for line in _requirements() if of_extra in line.replace("'", '"')]
        wanted += [line.partition(";")[0].strip() for line in lines] or [f"ldalign[{extra}]"]
    return " ".join(["pip install", *(f"'{requirement}'" for requirement in wanted)])


def _requirements() -> list[str]:
    import importlib.metadata  # here: it is slow to import, and seldom needed

    try:
        return importlib.metadata.requires("ldalign") or []
    except importlib.metadata.PackageNotFoundError:  # its files alone were copied
        return []
