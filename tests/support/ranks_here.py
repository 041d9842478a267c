"""Several gloo ranks, of which a test is one itself: the others are forks of it.

A test of two ranks takes a fraction of a second so, not the many that torchrun and its imports do.
What may be forked is a process that has not joined a group yet (the fixture `in_process`); the
forks compute no gradients.
"""

import gc
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

import torch

from ldalign.system import distributed

T = TypeVar("T")

DIED = pickle.dumps((True, "it died"))


def on_ranks(work: Callable[[], T], ranks: int = 2, here: int = 0) -> list[T]:
    """Returns what `work` does on each rank, all in one group on the CPU.

    here: the rank that this process is. Raises AssertionError, with its traceback, for a fork whose
    `work` fails.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    forks: dict[int, tuple[int, int]] = {}  # by rank: its process, and where its answer is read
    try:
        for rank in set(range(ranks)) - {here}:
            answer, written = os.pipe()
            process = os.fork()
            if process == 0:
                _be(rank, group, work, written)
            os.close(written)
            forks[rank] = process, answer
        found = {here: _joined(here, group, work)}
        for rank, (_, answer) in forks.items():
            with open(answer, "rb", closefd=False) as file:
                failed, value = pickle.loads(file.read() or DIED)  # noqa: S301 (a fork's own)
            assert not failed, f"rank {rank}: {value}"
            found[rank] = value
        return [found[rank] for rank in range(ranks)]
    finally:
        for process, answer in forks.values():
            os.close(answer)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        distributed.stop()


def _joined(rank: int, group: dict[str, str], work: Callable[[], T]) -> T:
    with mock.patch.dict(os.environ, {**group, "RANK": str(rank)}):
        distributed.start("cpu", timeout_minutes=1)
        found = work()
        distributed.barrier()
        return found


def _be(rank: int, group: dict[str, str], work: Callable[[], Any], written: int) -> None:
    """What a fork does, until the test ends it: its connections stay open for the others."""
    gc.freeze()  # the threads that an earlier group's end would wait for are not there
    try:
        torch.set_num_threads(1)
        outcome = False, _joined(rank, group, work)
    except BaseException:
        outcome = True, traceback.format_exc()
    try:
        with open(written, "wb") as file:
            pickle.dump(outcome, file)
        if not outcome[0]:
            signal.pause()
    finally:
        os._exit(1)
