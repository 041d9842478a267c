"""Who has a run folder: one process at a time, of all hosts.

The lock is the kernel's (flock on the file `lock`), so it ends with the process that holds it,
however that dies; what the file says is only for people. Some network file systems have no such
locks. There the file `claim` stands for one: only one process can make it, and it says which.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from ldalign.run.stranger import MAX_BYTES
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.files import read_bounded
from ldalign.system.metrics import in_words, say

LOCK, CLAIM = "lock", "claim"  # in the run folder
WAIT_SECONDS = 1.0  # between two tries to get a lock that is waited for
BEAT_SECONDS = 30.0  # between two signs of life of a claim: its file's time

log = logging.getLogger(__name__)


class Lock:
    """A run folder that is this process's until it is closed. `lock` makes it."""

    def __init__(self, file: IO[str], claim: "_Claim | None" = None) -> None:
        self._file, self._claim = file, claim

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def sign(self) -> str:
        """Writes into the file whose the folder is, and what no other start writes; returns it."""
        signature = f"{_name()}\n{secrets.token_hex(8)}\n"
        self._file.truncate(0)
        self._file.write(signature)
        self._file.flush()
        os.fsync(self._file.fileno())  # for other hosts to read
        return signature

    def close(self) -> None:
        """Lets go of the folder."""
        # Emptied, not deleted: deleting would let a waiting process lock a file that no longer has
        # a name.
        with contextlib.suppress(OSError):  # what the file says is no more than a courtesy
            if self._file.writable():
                self._file.truncate(0)
            self._file.close()
        if self._claim is not None:
            self._claim.close()


def lock(folder: Path, write: bool = True) -> Lock:
    """Takes a run folder for this process. Raises EnvironmentProblem where another process has it.

    write: False: only to try it, in a folder that may be read-only; the file must be there.
    """
    file = (folder / LOCK).open("a+" if write else "r", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.readline(1000).strip()
        file.close()
        raise _in_use(folder / LOCK, holder) from None
    except OSError as error:  # some network file systems
        log.info("%s: this file system has no locks (%s)", folder, error.strerror)
        try:
            claim = _Claim(folder / CLAIM, write)
        except BaseException:
            file.close()
            raise
        return Lock(file, claim)
    return Lock(file)


def waiting_lock(folder: Path) -> Lock:
    """As `lock`, but waits, and says so once, where another process has it."""
    said = False
    while True:
        try:
            return lock(folder)
        except EnvironmentProblem:
            if not said:
                say(f"{folder}: another process works here; waiting for it")
            said = True
            time.sleep(WAIT_SECONDS)


def _name() -> str:
    return f"host {socket.gethostname()} pid {os.getpid()}"


def _in_use(path: Path, holder: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{path}: this run is in use by {holder or 'another process'}; wait for it, or give "
        "another folder (run=NAME)"
    )


class _Claim:
    """The file that stands for a lock: made by one process alone, touched while that lives, and
    gone when it lets go.

    One of a process of this host that is dead is taken over. Of another host nobody here can know:
    a person has to delete it. Raises EnvironmentProblem where it is another's. write: False: only
    to look at it.
    """

    def __init__(self, path: Path, write: bool) -> None:
        self.path = path
        self.text = f"{_name()} start {_start_of(os.getpid())}\n{secrets.token_hex(8)}\n"
        self._closed = threading.Event()
        if not write:
            if path.exists() and not self._is_left_over():
                raise self._refusal()
            return
        if not self._make():
            self._take_over()
        threading.Thread(target=self._live, name="claim", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            if self.path.read_text(encoding="utf-8") == self.text:
                self.path.unlink()

    def _make(self) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(self.text)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        return True

    def _take_over(self) -> None:
        # Two processes of this host must not both find it left over, and one delete the other's:
        # only one can have this name, which ends with the socket.
        with socket.socket(socket.AF_UNIX) as alone:
            try:
                digest = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()
                alone.bind(f"\0ldalign {digest}")
            except OSError:
                raise self._refusal() from None
            if not self._is_left_over():
                raise self._refusal()
            log.info("%s: of a process that has ended; taken over", self.path)
            self.path.unlink(missing_ok=True)
            if not self._make():
                raise self._refusal()

    def _holder(self) -> str:
        """Its first line, "" where it cannot be read or is not written yet."""
        try:
            return read_bounded(self.path, MAX_BYTES).decode("utf-8").partition("\n")[0]
        except (OSError, ValueError):
            return ""

    def _is_left_over(self) -> bool:
        """Whether it is of a process of this host that is dead; another may have its number."""
        found = re.fullmatch(r"host (\S+) pid (\d+) start (\d+)", self._holder())
        return bool(
            found and found[1] == socket.gethostname() and _start_of(int(found[2])) != found[3]
        )

    def _refusal(self) -> EnvironmentProblem:
        name = self._holder().partition(" start ")[0]
        if name.startswith(f"host {socket.gethostname()} "):
            return _in_use(self.path, name)
        try:
            age = in_words(max(0.0, time.time() - self.path.stat().st_mtime))
        except OSError:
            age = "a moment"
        return EnvironmentProblem(
            f"{self.path}: this run is in use by {name or 'another process'}, which gave a sign of "
            f"life {age} ago, and gives one every {BEAT_SECONDS:.0f} s; wait for it, or delete "
            "this file where that process has ended"
        )

    def _live(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _start_of(process: int) -> str:
    """When a process of this host began, in ticks since the host did; "" for a dead one."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
