"""What several ranks do for tests/faults/test_faults_training.py, run by faults.Driver."""

import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldalign.data.pairs import Pair
from ldalign.models.gpt2 import GPT2Config
from ldalign.models.guide import GuideConfig, States
from ldalign.models.guide_folder import new_guide
from ldalign.system import distributed
from ldalign.system.metrics import MetricsLog
from ldalign.training import policy
from ldalign.training.checkpoint import CheckpointPlan
from ldalign.training.policy import TrainSettings, train
from ldalign.training.scoring import response_logps

CPU = torch.device("cpu")
# 11 pairs in steps of 4, 4 and 3, three times: 9 steps.
SETTINGS = TrainSettings(
    epochs=3, global_batch=4, micro_tokens=45, learning_rate=1e-3, optimizer="adamw"
)
STEPS = 9


def pairs() -> list[Pair]:
    """Pairs whose references are those of tiny.mistral()."""
    plain = tiny.pairs(11, weights=[0.5 + 0.1 * i for i in range(11)])
    table = response_logps(tiny.mistral(), plain, 10_000, CPU).tolist()
    return [
        replace(p, ref_real=real, ref_generated=gen)
        for p, (real, gen) in zip(plain, table, strict=True)
    ]


def trained(
    folder: Path, chosen: list[Pair] | None = None, **settings: Any
) -> tuple[dict[str, Tensor], Any]:
    """Trains tiny.mistral() with a checkpoint a step: (weights, on rank 0; the summary)."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny.mistral()
    summary = train(
        model,
        chosen or pairs(),
        replace(SETTINGS, **settings),
        compute_dtype=torch.float32,
        device=CPU,
        seed=0,
        stage="policy",
        metrics_path=folder / "metrics.jsonl",
        checkpoints=CheckpointPlan(folder / "checkpoint", steps=1),
    )
    return distributed.full_state(model, torch.float32), summary


def main(argv: list[str]) -> None:
    """Trains into FOLDER, and then, by the first argument:

    resume FOLDER STEP MICRO: is asked to stop after STEP (0: is not). explode FOLDER: an infinite
    gradient on the last rank. raise FOLDER: an error in a forward of the last rank's. alone FOLDER:
    no training, but an error of the last rank's in work that every rank does. nan FOLDER: no
    training, but a distance that is NaN.
    """
    what, folder = argv[0], Path(argv[1])
    distributed.start("cpu")
    if what == "nan":
        nan_distance(folder)
    elif what == "resume":
        stop_after(int(argv[2]))
        state, _ = trained(folder, micro_tokens=int(argv[3]))
        if state:
            save_file(state, folder / "model.safetensors")
    elif what == "alone":
        distributed.on_all(fail_on_the_last_rank)
    else:
        change_the_loss(explode if what == "explode" else fail)
        trained(folder)


def nan_distance(folder: Path) -> None:
    """Ten rows of one length in chunks of one; of two ranks the last comes upon row 7's."""
    folder.mkdir(exist_ok=True)
    texts = [f"It is {i}." for i in range(10)]
    size = GPT2Config(300, 1024, 16, 1, 2)
    guide = new_guide(GuideConfig(latent_width=4), 0, texts, size)
    plain = guide.states

    def states(pairs: Sequence[Pair]) -> States:
        made, spoilt = plain(pairs), [pair.id == "row-7" for pair in pairs]
        assert distributed.rank() == 1 or not any(spoilt)
        return made._replace(read=made.read * (math.nan if any(spoilt) else 1.0))

    guide.states = states  # type: ignore[method-assign]
    chosen = [guide.pair(f"row-{i}", "Say it.", text, f"{text}!") for i, text in enumerate(texts)]
    guide.pair_distances(chosen, 1, path=folder / "parts/distances")


def fail_on_the_last_rank() -> None:
    if distributed.rank() == distributed.world_size() - 1:
        raise KeyError("planted")


def stop_after(step: int) -> None:
    """SIGTERM to the last rank alone once it has done that step: the ranks must agree."""
    write = MetricsLog.write

    def stopping(log: MetricsLog, record: Mapping[str, Any], text: str) -> None:
        write(log, record, text)
        if record["global_step"] == step and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    MetricsLog.write = stopping  # type: ignore[method-assign]


def change_the_loss(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """From the last rank's fourth loss on it is change(loss, hidden)."""
    plain, calls = policy._dpo, [0]

    def changed(hidden: Tensor, *rest: Any) -> Tensor:
        loss = plain(hidden, *rest)
        calls[0] += 1
        last = distributed.rank() == distributed.world_size() - 1
        return change(loss, hidden) if calls[0] > 3 and last else loss

    policy._dpo = changed


def explode(loss: Tensor, hidden: Tensor) -> Tensor:
    return loss + (hidden - hidden.detach()).abs().sum().sqrt()  # 0, with an infinite slope


def fail(loss: Tensor, hidden: Tensor) -> Tensor:
    raise KeyError("planted")
