"""The one way every command ends: one line, from one rank, and an exit code.

The codes: 1 bug, 2 input, 3 environment, 4 numerics; 129 terminal gone, 130 Ctrl-C, 143 terminated.
In a run of several ranks the line begins with the rank that failed. `ldalign --ranks` ends with
that rank's code (launch.py). torchrun exits with 1 whatever a worker's code and always prints a
traceback of its own and a summary, which no worker can prevent; the summary names the rank and its
code.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import select
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ldalign.system import interrupt, logs
from ldalign.system.errors import FILE_SYSTEM, LdalignError
from ldalign.system.visible import visible

PEERS: list[tuple[str, int]] = []  # (host, process number) by rank, once `distributed` knows them

# What gloo, NCCL and torch's store say, most often in a RuntimeError, when the other side is gone.
_CONNECTION = re.compile(
    r"gloo|NCCL|TCPStore|Connection (closed|reset|refused)|Broken pipe", re.IGNORECASE
)
_AGAIN = (
    "its own line, or torchrun's summary, says why; run the same command again: what is finished "
    "is kept"
)


def of_rank(error: BaseException, rank: int) -> BaseException:
    """Marks `error`, which this rank raises because `rank` did: it is said in that rank's name."""
    error.__dict__["ldalign_rank"] = rank
    return error


def is_of_all(error: BaseException) -> bool:
    """Says whether every rank raises this error, as `of_rank` has marked it."""
    return "ldalign_rank" in error.__dict__


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs a command's `main(argv)` and exits: with 0, or an error's code after one line on stderr.

    `--debug` anywhere in the arguments is taken out before `main` sees them and adds the traceback.
    What the terminal's encoding does not have is printed with its number (`\\u2192`).
    """
    _open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is by itself
    argv = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(argv) < len(sys.argv) - 1
    interrupt.listen()
    logs.configure()
    _forget_earlier_lines()
    try:
        interrupt.end_with_launcher()
        _run(main, argv, debug)
    except interrupt.Stopped as stop:  # here: it may come while another error is dealt with
        _exit(str(stop), stop.exit_code, aftermath=True)
    leave(0)


def _open_missing_streams() -> None:
    """Gives a command that was started without a stream (`2>&-`) one that goes nowhere.

    Else print takes stdout for a stderr that is not there, and the next file to be opened gets the
    stream's number, into which a library or another process may write.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _run(main: Callable[[list[str]], None], argv: list[str], debug: bool) -> None:
    try:
        main(argv)
        sys.stdout.flush()  # here, where what cannot be written is still an error
    except KeyboardInterrupt:
        _exit("interrupted", 130, aftermath=True)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            leave(0)  # `... | head` has seen enough
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
            # files are named in an error of their own: this is where stdout goes
            _exit(f"what is printed cannot be written: {error.strerror}; make room there", 3)
        rank = getattr(error, "ldalign_rank", None)
        trace = traceback.format_exc() if debug else ""
        if isinstance(error, LdalignError):
            _exit(str(error), error.exit_code, rank=rank, trace=trace)
        if _ranks() > 1 and rank is None and _CONNECTION.search(str(error)):
            line = str(error).strip().splitlines()[0]
            message = f"{_ended()} ended, or is out of reach ({line}); {_AGAIN}"
            _exit(message, 3, aftermath=True, trace=trace)
        if isinstance(error, OSError) and error.errno in (*FILE_SYSTEM, errno.EACCES, errno.EPERM):
            where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            message = f"{where}{error.strerror}; mend that and run the same command again: what is"
            _exit(f"{message} finished is kept", 3, rank=rank, trace=trace)
        if _no_memory(error):
            message = "out of memory: use a machine with more, or give it less at a time"
            _exit(f"{message} ({type(error).__name__}: {error})", 3, rank=rank, trace=trace)
        another = rank is not None and str(rank) != os.environ.get("RANK", "0")
        # another rank's text has the error's kind already
        text = str(error) if another else f"{type(error).__name__}: {error}"
        hint = "" if debug else " (run again with --debug for the traceback)"
        _exit(f"unexpected {text}{hint}", 1, rank=rank, trace=trace)


def _no_memory(error: Exception) -> bool:
    """Whether an allocation failed, in Python or in a library of those that are there."""
    if "torch" not in sys.modules:  # which takes seconds to import
        return isinstance(error, MemoryError)
    from ldalign.system.memory import is_out_of_memory

    return is_out_of_memory(error)


def _exit(
    message: str, code: int, *, rank: int | None = None, aftermath: bool = False, trace: str = ""
) -> NoReturn:
    """Prints `ldalign: error: message` as one line, unless another rank has, and exits with `code`.

    rank: the one that failed, where it is not this one. aftermath: this comes of another's end, and
    is said only where nothing was said before.
    """
    line = visible(" ".join(message.split()))  # it may hold a name from a stranger's file
    if _ranks() > 1:
        line = f"rank {os.environ.get('RANK', '0') if rank is None else rank}: {line}"
    if not aftermath:
        _record_cause(line, code)
    if _may_speak(line if rank is not None else line.partition(": ")[2], aftermath):
        with contextlib.suppress(OSError):
            print(f"{visible(trace)}ldalign: error: {line}", file=sys.stderr, flush=True)
    leave(code)


def leave(code: int) -> NoReturn:
    """Ends the process at once, its output written, without Python's own shutdown.

    A thread of the process group lives on after `destroy_process_group`, as FSDP holds the group;
    one that drops a tensor while the interpreter shuts down ends in C++'s "terminate called without
    an active exception", and a finished run would exit with -6.
    """
    for stream in (sys.stdout, sys.stderr):
        # nobody reads it any more, or (`>&-`) nobody ever did
        with contextlib.suppress(OSError, AttributeError):
            stream.flush()
    os._exit(code)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _record_cause(line: str, code: int) -> None:
    """Writes the file in which torchrun and launch.py look for the rank that failed first, and why:
    ranks that end for it write none.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    rank = line.partition(":")[0]  # the line itself is said once, not in the summary again
    why = f"said above, in the line that begins with `ldalign: error: {rank}` (exit code {code})"
    more = {"py_callstack": why, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": why, "extraInfo": more}}))


# ---------------------------------------------------------------------------------- one rank speaks
#
# Ranks that fail alike say it once, and one that dies of another's death, of a broken connection,
# does not bury the cause: who is about to say a line makes a file named by it. Under torchrun it
# lies beside the workers' error files (torchrun removes that folder), else among the temporary
# files, named also by what all ranks of a run on a host share: the process that started them, and
# the port they meet at. So every host says it; better twice than never.


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _lines() -> tuple[Path, str]:
    """Returns the folder of the files that stand for lines said, and their names' beginning."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_0/<local rank>/error.json
    if error_file:
        return Path(error_file).parent.parent, "ldalign_said_"
    run = f"{os.getuid()}_{os.getppid()}_{os.environ.get('MASTER_PORT', '')}"
    return Path(tempfile.gettempdir()), f"ldalign_said_{run}_"


def _forget_earlier_lines() -> None:
    """Removes what this rank left in an earlier run of the same parent, and what is a day old."""
    if _ranks() == 1:
        return
    folder, prefix = _lines()
    for path in folder.glob("ldalign_said_*"):
        with contextlib.suppress(OSError):
            mine = path.name.startswith(prefix) and path.read_text() == os.environ.get("RANK", "0")
            if mine or path.stat().st_mtime < time.time() - 86_400:
                path.unlink()


def _may_speak(line: str, aftermath: bool) -> bool:
    """Says whether this process should print `line`: of several ranks, only if none has."""
    if _ranks() == 1:
        return True
    folder, prefix = _lines()
    try:
        said = folder.glob(f"{prefix}*")
        if aftermath and any(path.stat().st_uid == os.getuid() for path in said):
            return False
        digest = hashlib.sha256(line.encode("utf-8", "replace")).hexdigest()
        path = folder / f"{prefix}{digest[:16]}"
        with path.open("x") as file:
            file.write(os.environ.get("RANK", "0"))
    except FileExistsError:
        return path.stat().st_uid != os.getuid()
    except OSError:
        pass
    return True


def _ended() -> str:
    """Says which ranks of this host have ended: those that the connection may have broken for."""
    host, deadline = socket.gethostname(), time.monotonic() + 2
    while time.monotonic() < deadline:
        ended = [
            str(rank)
            for rank, (where, process) in enumerate(PEERS)
            if where == host and not _lives(process)
        ]
        if ended:
            return f"rank{'s' * (len(ended) > 1)} {', '.join(ended)}"
        time.sleep(0.05)  # a process closes its connections a moment before it is gone
    return "another rank"


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
