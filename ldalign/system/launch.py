"""Several ranks of one command on this machine: torch's elastic launcher, without its own words.

What torchrun does beside it is to print a traceback and a summary after the rank's one line, and to
exit with 1. For several machines torchrun stays (`torchrun train/align.py`).
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ldalign.system.errors import EnvironmentProblem, LdalignError
from ldalign.system.exits import leave
from ldalign.system.interrupt import LAUNCHER, SIGNALS
from ldalign.system.workers import available_cores

HANDLED = (*SIGNALS, signal.SIGQUIT)  # what ends all ranks
NO_FILE = "<N/A>"  # torch's: this rank wrote no error file


def launch(module: str, argv: Sequence[str], ranks: int) -> NoReturn:
    """Runs `python -m module argv` in as many processes as `ranks` says, and exits as they do.

    The processes share the cores, unless OMP_NUM_THREADS is set.
    The exit code is that of the rank that failed first, or of the signal that ended all.

    Raises EnvironmentProblem where the system killed a rank, LdalignError where it crashed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // ranks)))
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    debug = ["--debug"] if "--debug" in sys.argv else []
    if not debug:
        logging.disable(logging.CRITICAL)  # the ranks say what there is to say
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        # Not a hangup that is ignored, as under nohup: it is no request.
        signals_to_handle=",".join(
            number.name for number in HANDLED if signal.getsignal(number) != signal.SIG_IGN
        ),
    )
    try:
        # -P: the working directory is no place to import from (kernels/ lies in a checkout's)
        elastic_launch(config, sys.executable)("-P", "-m", module, *debug, *argv)
    except SignalException as stopped:
        leave(128 + stopped.sigval)
    except ChildFailedError as failed:
        rank, failure = first_failure(failed.failures)
        if failure.exitcode > 0:  # it has said why
            leave(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        if failure.exitcode == -signal.SIGKILL:
            raise EnvironmentProblem(
                f"rank {rank} was killed ({name}), as the system does where memory runs out (see "
                "`dmesg`); run the same command again: what is finished is kept"
            ) from None
        raise LdalignError(f"rank {rank} crashed ({name})") from None
    leave(0)


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first, and how: of those that left an error file, or else of all.

    A rank that ends for another one's failure leaves none (exits.py).
    """
    causes = {rank: f for rank, f in failures.items() if f.error_file != NO_FILE} or failures
    rank = min(causes, key=lambda rank: causes[rank].timestamp)
    return rank, causes[rank]
