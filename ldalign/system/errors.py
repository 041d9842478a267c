"""The errors a user may meet, and the exit code of each.

A problem that a person can solve is raised as one of the three classes below, with a message of the
form `FILE:LINE: what is wrong; what to do`; `exits.run` turns it into one line on stderr and an
exit code. Everything else is a bug of ours and says so.
"""


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


def is_failure(error: BaseException) -> bool:
    """Whether a library failed, if only by a panic of its Rust code, and nobody asked to stop."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
