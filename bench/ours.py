"""ldalign's side of the benchmarks: the program's own functions, as its scripts call them.

Run by the benchmarks. `PRECISION` says what each row of the step benchmark means to `policy.train`;
there is no other setting of ours.
"""

import json
import resource
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from worker import Job, Result, main, settle, timed

from ldalign.data.pairs import Pair
from ldalign.data.tokenizer import load_tokenizer
from ldalign.generation.decoders import new_decoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.sampling import Sampling
from ldalign.models.guide import GuideLoss
from ldalign.models.guide_folder import load_guide
from ldalign.models.mistral import Mistral, MistralConfig
from ldalign.models.weights import load_model
from ldalign.run.folder import RunFolder
from ldalign.run.prepared import open_data
from ldalign.run.settings import RunConfig
from ldalign.system import distributed
from ldalign.system.config import load_config, to_yaml
from ldalign.system.seeds import permutation
from ldalign.training.guide import GuideTrainSettings, train_guide
from ldalign.training.policy import TrainSettings, train

SEED, STAGE = 0, "bench"  # what the order of the rows depends on


@dataclass(frozen=True)
class Precision:
    """How a row of ours holds weights and states and computes."""

    weights: torch.dtype  # the model's, and with them the optimizer states'
    compute: torch.dtype
    settings: dict[str, Any] = field(default_factory=dict)  # more of TrainSettings


PRECISION = {
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16, {"state_dtype": torch.bfloat16}),
    "mixed": Precision(torch.float32, torch.bfloat16),
    "float32": Precision(torch.float32, torch.float32),
}


def dpo(job: Job) -> Result:
    """Times optimizer steps of `policy.train` by its own metrics; the first warms up."""
    device = distributed.start(job["device"])
    precision = PRECISION[job["precision"]]
    model = make_model(job, precision.weights, device)
    size = len(job["batches"][0])
    settings = TrainSettings(
        epochs=1,
        global_batch=size,
        micro_tokens=job["micro_tokens"],
        learning_rate=job["learning_rate"],
        beta=job["beta"],
        optimizer=job["optimizer"],
        schedule="constant",
        warmup_ratio=0.0,
        **precision.settings,
    )
    metrics = Path(job["scratch"]) / f"metrics-{time.monotonic_ns()}.jsonl"
    # The reference's log-probs count as zero: their values do not change the work.
    train(
        model,
        in_train_order([pair for batch in job["batches"] for pair in batch]),
        settings,
        compute_dtype=precision.compute,
        device=device,
        seed=SEED,
        stage=STAGE,
        metrics_path=metrics,
        step0_is_reference=False,
    )
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    distributed.stop()
    return {
        "seconds": [r["time/step"] for r in records[1:]],
        "losses": [r["loss"] for r in records],
    }


def in_train_order(pairs: list[dict[str, list[int]]]) -> list[Pair]:
    """The pairs laid so that training, which shuffles, takes them in the order given."""
    laid: list[Any] = [None] * len(pairs)
    order = permutation(SEED, f"{STAGE}/epoch/0", len(pairs))
    for pair, place in zip(pairs, order, strict=True):
        laid[int(place)] = Pair(str(place), pair["prompt"], pair["real"], pair["generated"])
    return laid


def make_model(job: Job, dtype: torch.dtype, device: torch.device) -> Mistral:
    """The job's model folder, or random weights in the shape of its config, made in place."""
    if job["folder"]:
        model = load_model(job["folder"], dtype, device)
        assert isinstance(model, Mistral)
        return model
    with torch.device("meta"):
        model = Mistral(MistralConfig.from_json(job["config"], "bench")).to(dtype)
    model.to_empty(device=device)
    torch.manual_seed(SEED)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.02) if p.ndim > 1 else p.fill_(1.0)
    return model


def generation(job: Job) -> Result:
    """Times sampling without end tokens: rows go on to the end."""
    device = distributed.start(job["device"])
    model = make_model(job, getattr(torch, job["dtype"]), device).eval()
    decoder = new_decoder(model, release=True, weights=job.get("weights", "exact"))
    seconds: list[float] = []
    first: list[float] = []
    new = job["new_tokens"]
    longest = max(len(prompt) for prompts in job["batches"] for prompt in prompts) + new
    most = max(map(len, job["batches"]))
    # One for all, as a stage has it: on a GPU its graphs are captured once.
    engine = Engine(decoder, Sampling(new), [], SEED, longest=longest, rows=most)
    for n, prompts in enumerate(job["batches"]):
        requests = [Request(f"{n}/{i}", prompt, i) for i, prompt in enumerate(prompts)]
        seen: dict[int, float] = {}

        def note(chosen: list[Request], ids: list[int], seen: dict[int, float] = seen) -> None:
            for request in chosen:
                seen.setdefault(request.index, time.perf_counter())

        began = time.perf_counter()
        with timed(seconds, device):
            for _, response in engine.run(requests, note):
                assert len(response.ids) == new
        first.append(statistics.mean(seen.values()) - began)
    distributed.stop()
    return {"seconds": seconds[1:], "first": statistics.median(first[1:])}


def guide_training(job: Job) -> Result:
    """Times optimizer steps of `train_guide`, from the end of one to the end of the next."""
    device = distributed.start(job["device"])
    guide = load_guide(job["guide"], device, getattr(torch, job["dtype"]))
    if guide.shared:  # one tower that is both is not trained
        guide.encoder.requires_grad_(False)
    settings = GuideTrainSettings(
        epochs=1,
        global_batch=len(job["batches"][0]),
        learning_rate=job["learning_rate"],
        micro_tokens=job["micro_tokens"],
        loss=GuideLoss(**job["loss"]),
        weight_decay=0.0,
        warmup_ratio=0.0,
    )
    metrics = Path(job["scratch"]) / f"metrics-{time.monotonic_ns()}.jsonl"
    ends: list[float] = []

    def note(*_: object) -> None:
        settle(device)
        ends.append(time.perf_counter())

    register_optimizer_step_post_hook(note)
    train_guide(
        guide,
        in_train_order([pair for batch in job["batches"] for pair in batch]),
        settings,
        compute_dtype=getattr(torch, job["compute"]),
        device=device,
        seed=SEED,
        stage=STAGE,
        metrics_path=metrics,
    )
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    distributed.stop()
    return {
        "seconds": [b - a for a, b in pairwise(ends)],
        "losses": [r["loss"] for r in records],
    }


def guide_distance(job: Job) -> Result:
    """Times `Guide.pair_distances` of the job's pairs; the first time warms up."""
    device = distributed.start(job["device"])
    guide = load_guide(job["guide"], device, getattr(torch, job["dtype"]))
    pairs = [Pair(str(i), **pair) for i, pair in enumerate(job["pairs"])]
    seconds: list[float] = []
    for _ in range(job["repeat"] + 1):
        with timed(seconds, device):
            distances = guide.pair_distances(pairs, job["micro_tokens"])
    distributed.stop()
    return {"seconds": seconds[1:], "distances": distances.tolist()}


def prepare(job: Job) -> Result:
    """Times the opening of a run's rows, which prepares them where they are not there."""
    overrides = [f"{key}={job[key]}" for key in ("policy", "data", "run", "max_length")]
    config = load_config(RunConfig, None, overrides)
    with RunFolder(Path(config.run), to_yaml(config)) as folder:
        began = time.perf_counter()
        tokenizer = load_tokenizer(Path(config.policy), today=folder.began)
        data = open_data(folder, config, tokenizer)
        seconds = time.perf_counter() - began
    own, others = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "seconds": seconds,
        "cpu": own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime,
        "worker_mib": others.ru_maxrss / 1024,
        "tokens": int(sum(split.pairs.tokens.sum() for split in (data.train, data.heldout))),
    }


if __name__ == "__main__":
    tasks = (dpo, generation, guide_training, guide_distance, prepare)
    main({task.__name__: task for task in tasks})
