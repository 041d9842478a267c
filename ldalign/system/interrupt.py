"""Requests to stop: SIGTERM (a scheduler, torchrun), SIGHUP (the terminal is gone, as where an ssh
session ends) and SIGINT (Ctrl-C).

Outside a training step a request ends the command where it stands: everything on disk is whole at
any moment. Python hears of a signal between two of its own instructions, so what waits long in a
library is done `aside`. Inside `held` a request is only noted, so that the step can be finished and
a checkpoint written. A second request ends at once.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

# Where ranks are asked by different ones, the run ends as the first of them has it.
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
LAUNCHER = "LDALIGN_LAUNCHER"  # the process that started this rank (launch.py), for the rank alone
PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
SAME_REQUEST_S = 2.0  # Ctrl-C under torchrun comes twice: from the terminal, then from torchrun


class Stopped(BaseException):
    """A signal asked to stop; `number` is the signal's.

    It is no Exception: nothing may take it for a failure.
    """

    def __init__(self, number: int, kept: str = "what is finished is kept") -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}; {kept}; run the same command to go on"
        )
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells show for a process that a signal ended."""
        return 128 + self.number


class _Requests:
    held = 0  # how many `held` blocks we are in
    number = 0  # of the first signal; 0: none yet
    at = 0.0


def listen() -> None:
    """From now on SIGNALS are requests to stop; but for a SIGHUP that is ignored, as under nohup.
    Only the main thread may call it.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or not hangup_is_ignored():
            signal.signal(number, _note)


def hangup_is_ignored() -> bool:
    """Whether this process was started so that it outlives its terminal (nohup)."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def end_with_launcher() -> None:
    """Makes the death of the process that launched this rank, also by SIGKILL, a request to stop:
    else its ranks would go on, and nobody would know of them. Linux alone has it.

    Ranks that torchrun or launch.py started; whoever starts ranks in another way may end before.
    """
    launcher = os.environ.pop(LAUNCHER, None)
    if sys.platform != "linux" or (launcher is None and "TORCHELASTIC_RUN_ID" not in os.environ):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
    if launcher is not None and os.getppid() != int(launcher):  # it died while this rank started
        os.kill(os.getpid(), signal.SIGTERM)


def _note(number: int, _: FrameType | None) -> None:
    now = time.monotonic()
    if not _Requests.number:
        _Requests.number, _Requests.at = number, now
        if not _Requests.held:
            raise Stopped(number)
    elif now - _Requests.at > SAME_REQUEST_S:
        os._exit(128 + number)


def requested() -> int:
    """Returns the number of the signal that asked to stop; 0: none did."""
    return _Requests.number


def aside(wait: Callable[[], T]) -> T:
    """Returns what `wait` does, or raises what it raises; it runs in a thread, so that a request to
    stop is heard while it waits. Whoever is asked to stop leaves the thread behind.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(wait())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="aside", daemon=True)
    thread.start()
    while thread.is_alive():
        # With an end: a signal that another thread received does not wake this one.
        thread.join(0.2)
    if failure:
        raise failure[0]
    return outcome[0]


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Lets a request wait until someone asks `requested`, at the latest until the block ends."""
    _Requests.held += 1
    try:
        yield
    finally:
        _Requests.held -= 1
    if _Requests.number and not _Requests.held:
        raise Stopped(_Requests.number)
