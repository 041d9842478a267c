"""The errors a user may meet, and the one way every command ends.

A problem a person can solve is raised as one of the three classes below, with a message of the form
`FILE:LINE: what is wrong; what to do`. `run` turns it into one line on stderr and an exit code; everything else is a
bug of ours and says so. Exit codes: 1 bug, 2 input, 3 environment, 4 numerics; 130 Ctrl-C, 143 terminated. (torchrun
itself exits with 1 whatever a worker's code; the worker's own is in the summary torchrun prints.)
"""

import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ldalign import interrupt


class LdalignError(Exception):
    """Base of every error ldalign raises on purpose; `exit_code` is what the command exits with."""

    exit_code = 1


class InputError(LdalignError, ValueError):
    """Something the user gave is wrong: a file, a row, a config key, a model folder. Exit code 2."""

    exit_code = 2


class EnvironmentProblem(LdalignError, RuntimeError):
    """The machine is in the way: a missing package, a full disk, an absent device, a held lock. Exit code 3."""

    exit_code = 3


class NumericsError(LdalignError, ArithmeticError):
    """A value that must be finite (loss, gradient, distance, weight) is not. Exit code 4."""

    exit_code = 4


def is_failure(error: BaseException) -> bool:
    """Whether a library failed, if only by a panic of its Rust code, and nobody asked to stop."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


# What gloo, NCCL and torch's store say when the other side is gone; they raise plain RuntimeErrors among others.
_CONNECTION = re.compile(r"gloo|NCCL|TCPStore|Connection (closed|reset|refused)|Broken pipe", re.IGNORECASE)
_AGAIN = "torchrun's summary says which and why; run the same command again: what is finished is kept"


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command's `main(argv)` and exit: 0, or an error's code after one line on stderr.

    `--debug` anywhere in the arguments is taken out before `main` sees them and adds the traceback.
    """
    argv = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(argv) < len(sys.argv) - 1
    interrupt.listen()
    try:
        _run(main, argv, debug)
    except interrupt.Stopped as stop:  # here, for a signal may also come while another error is dealt with
        _exit(str(stop), stop.exit_code, expected=True)
    leave(0)


def _run(main: Callable[[list[str]], None], argv: list[str], debug: bool) -> None:
    try:
        main(argv)
    except KeyboardInterrupt:
        _exit("interrupted", 130, expected=True)
    except LdalignError as error:
        _exit(str(error), error.exit_code, expected=True, trace=traceback.format_exc() if debug else "")
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and _CONNECTION.search(str(error)):
            line = str(error).strip().splitlines()[0]
            _exit(f"another rank ended, or is out of reach ({line}); {_AGAIN}", 3, expected=False)
        hint = "" if debug else " (run again with --debug for the traceback)"
        message = f"unexpected {type(error).__name__}: {error}{hint}"
        _exit(message, 1, expected=False, trace=traceback.format_exc() if debug else "")


def _exit(message: str, code: int, *, expected: bool, trace: str = "") -> NoReturn:
    """Print `ldalign: error: message` as one line, if it is this rank's turn to speak, and exit with `code`."""
    if _may_speak(expected):
        line = " ".join(message.split())
        print(f"{trace}ldalign: error: {line}", file=sys.stderr, flush=True)
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process at once, its output written, without Python's own shutdown.

    A thread of the process group lives on after `destroy_process_group`, as FSDP holds the group; one that drops a
    tensor while the interpreter shuts down ends in C++'s "terminate called without an active exception", and a
    finished run would exit with -6.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _may_speak(expected: bool) -> bool:
    """Whether this process should print its error: in a run of several ranks only one does.

    Under torchrun the first rank of a host to fail speaks (whoever creates the marker file beside the workers' error
    files; torchrun removes that folder). So ranks that fail alike say it once, and a rank that dies of the first one's
    death, of a broken connection, does not bury the cause. Under another launcher expected errors, which all ranks meet
    alike, are rank 0's to print, and an unexpected one is printed by whichever rank has it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_0/<local rank>/error.json
    if error_file:
        try:
            (Path(error_file).parent.parent / "ldalign_error_printed").touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return True  # better twice than never
        return True
    return not expected or os.environ.get("RANK", "0") == "0"
