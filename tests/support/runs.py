"""Scripts and runs as a person starts them: by path, on one thread, on one rank or several."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_script(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs a training script by path, as a person types it: one thread, one rank or several.

    Several run under torchrun.
    """
    return subprocess.run(
        script_command(*arguments, ranks=ranks), capture_output=True, text=True, env=one_thread()
    )


def script_command(*arguments: object, ranks: int = 1) -> list[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*start, *map(str, arguments)]


def run_on_nodes(
    *per_node: Sequence[object],
    ranks_a_node: int = 1,
    folders: Sequence[Path] = (),
    restarts: int = 0,
) -> list[subprocess.CompletedProcess[str]]:
    """Runs one torchrun a node, side by side on this machine, each with its own command.

    They meet as several hosts do, at a port of the first. folders: where each runs, so that a
    relative path is another place on each, as a local disk's is. restarts: how often torchrun
    starts the ranks again.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(per_node))]
    start += ["--nproc-per-node", str(ranks_a_node), "--max-restarts", str(restarts)]
    start += ["--rdzv-id", "run", "--rdzv-backend", "c10d"]
    start += ["--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost"]
    nodes = [
        subprocess.Popen(
            [*start, *map(str, arguments)],
            env=one_thread(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folders[number] if folders else None,
        )
        for number, arguments in enumerate(per_node)
    ]
    done = []
    for node in nodes:
        out, err = node.communicate()
        done.append(subprocess.CompletedProcess(node.args, node.returncode, out, err))
    return done


def one_thread() -> dict[str, str]:
    # PYTHONPATH: `make test` keeps a script's own folder off the import path, and some run files of
    # this folder.
    here = str(Path(__file__).parent)
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONPATH": here,
    }
