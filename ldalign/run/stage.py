"""What a stage says of itself before it is made: the name of its folder, and what it costs.

Each file of `ldalign/run/stages/` says it once, in a `Stage` of its own; its place among
the others is its line in `ldalign/run/plan.py`. Order, planned stages, dry run, disk
estimate and tables read from there.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ldalign.run.context import Context


@dataclass(frozen=True)
class Cost:
    """What one stage takes: tokens of the policy's tokenizer, optimizer steps, bytes on the disk.

    It is an estimate: sampled responses are taken to be as long as the real ones.
    """

    trained: int = 0  # tokens read in training, all epochs together
    scored: int = 0  # tokens read without training
    generated: int = 0  # tokens sampled; their text is kept, beside `kept`
    steps: int = 0  # of the optimizer
    kept: int = 0  # bytes in its folder when it is finished
    checkpoint: int = 0  # bytes of one checkpoint in training
    best: int = 0  # bytes of the best weights in training, and how often they may be written
    bests: int = 0


def no_cost(ctx: Context, name: str) -> Cost:
    """The cost of a stage that is small beside the others."""
    return Cost()


@dataclass(frozen=True)
class Stage:
    """One kind of stage: `name` is the last part of its folder's name in a run, and the name of the
    file in `ldalign/run/stages/` that makes it.
    """

    name: str
    cost: Callable[[Context, str], Cost] = no_cost  # of the planned stage of that folder
    numbered_from: int = 0  # the iterations before lie in RUN/NAME, without a number
    by_task: bool = False  # its folder holds one for each task, and these are the stages

    def folder(self, group: str | int = "") -> str:
        """The name of its folder in a run: "distances" -> "iteration_0/distances".

        group: the policy that it belongs to ("sft"), or the number of the iteration; "": it is made
        once a run, in RUN/NAME.
        """
        if isinstance(group, int):
            group = f"iteration_{group}" if group >= self.numbered_from else ""
        return f"{group}/{self.name}" if group else self.name
