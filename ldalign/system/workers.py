"""Work that is spread over processes of this machine.

A worker imports what the work needs and nothing else: unlike `multiprocessing`, which imports the
program's main module into each, and with it torch. Nor does it ask the program for a guard around
its main code.
"""

import contextlib
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from ldalign.system.errors import EnvironmentProblem

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2  # tasks a process that are taken before their turn

# As `multiprocessing` does: a worker finds what its parent found.
_PROGRAM = "import sys; sys.path[:] = {!r}; from ldalign.system.workers import serve; serve({})"


def available_cores() -> int:
    """How many cores this process may use, which in a container can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(
    work: Callable[[Task], Result], tasks: Iterable[Task], processes: int
) -> Iterator[Result]:
    """Yields work(task) of every task, in their order; with one process, in this one.

    work and tasks are sent to others: `work` is a module's function, or a partial one. No more
    tasks are taken than a few a process ahead of what is asked for. An error of `work` is raised
    here. Raises EnvironmentProblem where a worker dies.
    """
    if processes <= 1:
        yield from map(work, tasks)
        return
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    workers = [_Worker(work) for _ in range(processes)]
    for worker in workers:
        idle.put(worker)

    def run(task: Task) -> Result:
        worker = idle.get()
        try:
            return worker.ask(task)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(len(workers))
    ahead: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            ahead.append(threads.submit(run, task))
            if len(ahead) > AHEAD * processes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for worker in workers:
            worker.kill()
        threads.shutdown(cancel_futures=True)


class _Worker:
    """A process that does one task at a time."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        own, others = socket.socketpair()
        with others:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM.format(sys.path, others.fileno())],
                pass_fds=[others.fileno()],
                # Threads of the tokenizers library in each of them would be too many.
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )
        self.connection = Connection(own.detach())
        self._send(work)

    def ask(self, task: Any) -> Any:
        """Returns work(task), or raises what it raised."""
        self._send(task)
        try:
            good, value = self.connection.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            raise EnvironmentProblem(
                f"a worker process ended by itself (exit code {code}); was it killed, for memory?"
            ) from None
        if not good:
            raise value
        return value

    def _send(self, value: Any) -> None:
        with contextlib.suppress(OSError):  # it died: reading its answer says so
            self.connection.send(value)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


def serve(descriptor: int) -> None:
    """What a worker does, over a socket: reads the work, then task after task, until its parent is
    gone. Then it ends within a task: the parent's next start may write the same files.
    """
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's, to all: the parent's to answer
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=[descriptor], daemon=True).start()
    connection = Connection(descriptor)
    work = connection.recv()
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            task = connection.recv()
            try:
                answer = (True, work(task))
            except Exception as error:
                answer = (False, error)
            connection.send(answer)


def _end_with_parent(descriptor: int) -> None:
    """Ends this process when the other end of the socket is closed, by whatever death."""
    poll = select.poll()
    # Not POLLIN, which is there with every task.
    poll.register(descriptor, getattr(select, "POLLRDHUP", 0) | select.POLLHUP)
    poll.poll()
    os._exit(1)
