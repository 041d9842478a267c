"""The optimizer loop, the only one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ldalign.system import distributed
from ldalign.system.errors import NumericsError
from ldalign.system.files import write_text

REFUSED = "non_finite_step.json"  # beside metrics.jsonl: the rows of a step that was not done


def forget_refused_step(metrics_path: Path | None) -> None:
    """The file that an earlier start may have left: this one tries the step again."""
    if metrics_path is not None and distributed.rank() == 0:
        metrics_path.with_name(REFUSED).unlink(missing_ok=True)


def refuse_step(
    rows: Sequence[str], stage: str, step: int, loss: float, norm: float, metrics_path: Path | None
) -> NoReturn:
    """A step's loss or gradient norm, summed over all ranks, is not finite: its row ids go into a
    file. NumericsError.

    The same on all ranks; nobody has touched the weights.
    """
    where = ""
    if metrics_path is not None:
        path = metrics_path.with_name(REFUSED)
        found = {
            "stage": stage,
            "step": step + 1,
            "loss": str(loss),
            "grad_norm": str(norm),
            "rows": list(rows),
        }
        text = json.dumps(found, indent=1) + "\n"
        distributed.on_rank0(lambda: write_text(path, text))
        where = f" (all {len(rows)} in {path})"
    raise NumericsError(
        f"{stage}: step {step + 1}: loss {loss}, gradient norm {norm}; the weights were not "
        "changed. Rows of the batch: "
        f"{', '.join(rows[:5])}{', ...' if len(rows) > 5 else ''}{where}. Lower learning_rate or "
        "look at these rows"
    )
