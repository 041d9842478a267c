"""Peak memory of training, measured and as `--dry-run` estimates it.

    python bench/memory.py FOLDER

Each case trains the model of FOLDER for three steps on random pairs in a process of its own, on the
CPU (Linux). Peak and estimate are anonymous memory on top of the process with everything imported
and nothing loaded.
"""

import argparse
import json
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.distributed.fsdp  # imported by whoever needs it, and no part of a model's peak

from ldalign.data.pairs import Pair
from ldalign.models.mistral import Mistral
from ldalign.models.weights import check_model, load_model
from ldalign.system import distributed
from ldalign.system.exits import run
from ldalign.system.memory import resident
from ldalign.training.memory_model import TrainingShape, training_memory
from ldalign.training.policy import TrainSettings, train


@dataclass(frozen=True)
class Case:
    """One training of `pairs` a step, `micro` of them in a micro-batch.

    A pair has `prompt` and twice `response` tokens.
    """

    weights: Literal["float32", "bfloat16"]
    states: Literal["float32", "bfloat16"]
    compute: Literal["float32", "bfloat16"]
    checkpointing: Literal["none", "selective", "full"] = "none"
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    pairs: int = 4
    micro: int = 4
    prompt: int = 60
    response: int = 120

    @property
    def tokens(self) -> int:
        """How many tokens a pair has."""
        return self.prompt + 2 * self.response


CASES = [
    Case("bfloat16", "bfloat16", "bfloat16"),
    Case("bfloat16", "bfloat16", "bfloat16", "selective", pairs=8, micro=8),
    Case("bfloat16", "bfloat16", "bfloat16", "full", pairs=8, micro=8),
    Case("bfloat16", "float32", "bfloat16", pairs=8, micro=4),
    Case("float32", "float32", "float32", optimizer="rmsprop"),
    Case("float32", "float32", "bfloat16"),
    Case("float32", "float32", "bfloat16", pairs=8, micro=4),
]


def measure(folder: str, case: Case) -> int:
    """The peak of three steps above the process as it stands, in bytes."""
    device = distributed.start("cpu")
    draw = random.Random(0)
    vocabulary = check_model(folder).config.vocab_size

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(count)]

    pairs = [
        Pair(str(i), ids(case.prompt), ids(case.response), ids(case.response))
        for i in range(case.pairs)
    ]
    settings = TrainSettings(
        epochs=3,
        global_batch=case.pairs,
        micro_tokens=case.micro * case.tokens,
        learning_rate=1e-5,
        optimizer=case.optimizer,
        checkpointing=case.checkpointing,
        state_dtype=getattr(torch, case.states),
    )
    compute = getattr(torch, case.compute)
    before = _bytes("RssAnon")
    model = load_model(folder, getattr(torch, case.weights), device)
    train(
        model,
        pairs,
        settings,
        compute_dtype=compute,
        device=device,
        seed=0,
        stage="memory",
        step0_is_reference=False,
    )
    distributed.stop()
    return _bytes("VmHWM") - _bytes("RssFile") - before


def _bytes(name: str) -> int:
    found = resident(name)
    assert found is not None, name
    return found


def estimate(folder: str, case: Case) -> dict[str, float]:
    """Estimates the same as `--dry-run` does, in bytes by part."""
    model = check_model(folder)
    assert isinstance(model, Mistral)
    shape = TrainingShape(
        weight_bytes=getattr(torch, case.weights).itemsize,
        state_bytes=getattr(torch, case.states).itemsize * (2 if case.optimizer == "adamw" else 1),
        compute_bytes=getattr(torch, case.compute).itemsize,
        checkpointing=case.checkpointing,
        tokens=case.micro * case.tokens,
        responses=case.micro * 2 * case.response,
        micros=case.pairs // case.micro,
    )
    return training_memory(model, shape)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/memory.py", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", help="model folder (mistral or llama)")
    parser.add_argument("--case", type=json.loads, help="one case, as JSON; prints JSON")
    args = parser.parse_args(argv)
    if args.case:
        case = Case(**args.case)
        print(
            json.dumps(
                {
                    "peak": measure(args.folder, case),
                    "estimate": sum(estimate(args.folder, case).values()),
                }
            )
        )
        return
    columns = (
        "weights states compute checkpointing optimizer micro-batches tokens peak/MiB estimate "
        "ratio"
    ).split()
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for case in CASES:
        command = [sys.executable, __file__, args.folder, "--case", json.dumps(asdict(case))]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        peak, expected = found["peak"] / 2**20, found["estimate"] / 2**20
        row = [
            case.weights,
            case.states,
            case.compute,
            case.checkpointing,
            case.optimizer,
            case.pairs // case.micro,
            case.micro * case.tokens,
            f"{peak:.0f}",
            f"{expected:.0f}",
            f"{expected / peak:.2f}",
        ]
        print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    run(main)
