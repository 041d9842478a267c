"""One optimizer step of weighted DPO: the program's own loop, against a padded step on transformers.

The peer is what preference trainers do: float32 weights under bf16 autocast, winners and losers in one right-padded
batch, log-softmax of all logits, AdamW. Both have the reference's log-probs ready and take the same pairs in the same
order. Run by run.py, not by hand.
"""

import json
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from peer import Job, Timings, main, settle

from ldalign import distributed
from ldalign.batches import Pair, global_batches
from ldalign.training import TrainSettings, train
from ldalign.weights import load_model

LEARNING_RATE, BETA, SEED = 1e-6, 0.1, 0


def ldalign(job: Job, dtype: torch.dtype, device: torch.device) -> Timings:
    """`training.train`, timed by its own metrics."""
    distributed.start(device.type)
    model = load_model(job["folder"], torch.float32, device)
    pairs = [Pair(str(i), **ids) for i, ids in enumerate(job["pairs"])]
    path = Path(job["scratch"]) / "metrics.jsonl"
    settings = TrainSettings(
        epochs=1, global_batch=job["batch"], micro_tokens=10**9, learning_rate=LEARNING_RATE, beta=BETA
    )
    # The reference's log-probs count as zero: their values do not change the work.
    train(
        model, pairs, settings, compute_dtype=dtype, device=device, seed=SEED, stage="bench", metrics_path=path,
        step0_is_reference=False,
    )  # fmt: skip
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tokens = [record["num_tokens"] for record in records]
    distributed.stop()
    return [r["time/step"] for r in records[1:]], [float(b - a) for a, b in pairwise(tokens)]


def transformers(job: Job, dtype: torch.dtype, device: torch.device) -> Timings:
    """The padded step."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    seconds, work = [], []
    for step, (_, indices) in enumerate(global_batches(len(job["pairs"]), job["batch"], 1, SEED)):
        settle(device)
        began = time.perf_counter()
        pairs = [job["pairs"][i] for i in indices]
        sequences = [(p["prompt"], p[side]) for side in ("real", "generated") for p in pairs]
        longest = max(len(x) + len(y) for x, y in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        seen, answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, (x, y) in enumerate(sequences):
            ids[i, : len(x) + len(y)] = torch.tensor([*x, *y])
            seen[i, : len(x) + len(y)] = 1
            answer[i, len(x) : len(x) + len(y)] = True
        ids, seen, answer = ids.to(device), seen.to(device), answer.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
        token_logps = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        real, generated = (token_logps * answer[:, 1:]).sum(1).chunk(2)
        loss = -F.logsigmoid(BETA * (real - generated)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        settle(device)
        if step:
            seconds.append(time.perf_counter() - began)
            work.append(float(sum(len(x) + len(y) for x, y in sequences)))
    return seconds, work


if __name__ == "__main__":
    main({"ldalign": ldalign, "transformers": transformers})
