"""Scripts and runs as a person starts them: by path, on one thread, on one rank or several."""

import os
import subprocess
import sys
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
